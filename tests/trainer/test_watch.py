"""What looks at a run beside its log, read back by the libraries it was written for, where they are installed."""

import json
import re
import time
from pathlib import Path

import pytest
import torch
from small_runs import folder_of, run, small, tokens

import train_gpt
from stats.offline import read_offline
from stats.series import find_series, read_runs
from stats.values import final_validation
from trainer import schedule
from trainer.log import Clock


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("watch") / "data", tokens(2000))


def test_tensorboard_reads_what_was_logged(data, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert run(data, tmp_path, "--watch=tensorboard", "--log_words=lr,window") == 0
    events = accumulator.EventAccumulator(str(tmp_path / "run.tensorboard")).Reload()
    summary = json.loads((tmp_path / "run.json").read_text())
    found = {event.step: event.value for event in events.Scalars("val_loss")}
    assert found == pytest.approx({p["step"]: p["loss"] for p in summary["validation"]}, rel=1e-6)
    losses = [event.value for event in events.Scalars("train_loss")]
    assert losses == pytest.approx(summary["train_loss"], abs=1e-5)
    assert [event.step for event in events.Scalars("lr")] == [1, 2, 3, 4]


def test_wandb_writes_offline(data, tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert run(data, tmp_path, "--watch=wandb") == 0
    (written,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = written.read_bytes()
    assert b"val_loss" in content and b"train_loss" in content and b"muon_lr" in content


def test_a_watched_run_is_one_run_to_the_statistics(data, tmp_path, monkeypatch):
    for name in ("tensorboard", "wandb"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert run(data, tmp_path, "--watch=tensorboard,wandb", "--seed=7") == 0
    (series,) = find_series([tmp_path])
    (logged,) = series.runs
    kept = {Path(entry.path).suffix for entry in series.passed_over if "kept twice" in entry.reason}
    assert logged.path.endswith("run.txt") and len(kept) == 2 and ".wandb" in kept
    for _ in range(300):  # the library's service writes on for a moment after the run
        (offline,) = find_series([tmp_path / "wandb"])
        (alone,) = offline.runs
        if alone.state == "finished":
            break
        time.sleep(0.1)
    assert (alone.name, alone.seed, alone.state, alone.planned_steps) == ("run", 7, "finished", logged.planned_steps)
    assert final_validation(alone).loss == pytest.approx(final_validation(logged).loss, abs=1e-6)


@pytest.mark.parametrize(
    "words, code, state",
    [(["--muon_lr=1e30", "--embed_lr=1e30"], 4, "crashed (exit code 1)"), (["--stop_after=2"], 0, "finished")],
)
def test_wandb_hears_how_a_run_ended(words, code, state, data, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    codes, finish = [], wandb.Run.finish
    monkeypatch.setattr(wandb.Run, "finish", lambda run, exit_code: (codes.append(exit_code), finish(run, exit_code)))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert run(data, tmp_path, "--watch=wandb", *words) == code
    assert codes == [int(state != "finished")]
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 30  # the library's service writes on for a moment
    while (found := read_offline(path)[0].state) != state and time.monotonic() < end:
        time.sleep(0.1)
    assert found == state


def test_words_in_the_lines_and_a_trace(data, tmp_path):
    assert run(data, tmp_path, "--log_words=lr,window,grad_norm", "--profile=1", "--num_iterations=6") == 0
    lines = re.findall(r"^step:(\d)/6 train_loss.* lr:(\S+) window:(\d+) grad_norm:(\S+)$", log(tmp_path), re.MULTILINE)
    assert [line[0] for line in lines] == list("123456")
    config = train_gpt.parse_config(small("--num_iterations=6"))
    for step, (_, lr, window, norm) in enumerate(lines):
        assert float(lr) == pytest.approx(config.muon_lr * schedule.learning_rate_factor(step, config), rel=1e-5)
        assert int(window) == schedule.window_blocks_at(step, config) * config.block_tokens and float(norm) > 0
    (found,) = read_runs(tmp_path / "run.txt")
    assert not found.problems and found.step_lines == 6
    trace = json.loads((tmp_path / "run.trace.json").read_text())
    assert any("aten::" in event.get("name", "") for event in trace["traceEvents"])
    assert "run.trace.json; https://ui.perfetto.dev opens it" in log(tmp_path)


def test_the_clock_stands_still_while_a_trace_is_begun_and_written(data, tmp_path, monkeypatch):
    clocks, running = [], []

    class Profiler:
        start = stop = export_chrome_trace = __init__ = lambda *_, **__: running.append(clocks[-1].started is not None)

    start = Clock.start
    monkeypatch.setattr(Clock, "start", lambda clock: (clocks.append(clock), start(clock)) and None)
    monkeypatch.setattr(torch.profiler, "profile", Profiler)
    assert run(data, tmp_path, "--profile=1", "--num_iterations=6") == 0
    assert running == [False] * 4, "made, begun, ended, written"


def log(folder):
    return (folder / "run.txt").read_text().rpartition("=" * 100)[2]


def test_the_gradient_norm_is_that_of_all_parameters(tmp_path):
    config = train_gpt.parse_config(small("--muon_lr=0", "--embed_lr=0", "--head_lr=0", "--scalar_lr=0"))
    trainer = train_gpt.Trainer(config, torch.device("cpu"))
    with torch.no_grad():
        trainer.model.head_w.normal_()
    batch = torch.arange(64) % 256, (torch.arange(64) + 1) % 256
    trainer.norm = train_gpt.GradientNorm(trainer.exchange)
    trainer.step(0, [batch])
    loss = trainer.model(batch[0][None].int(), batch[1][None], window_blocks=trainer.window) / 2  # of two sequences
    grads = torch.autograd.grad(loss, list(trainer.model.parameters()), allow_unused=True)
    wanted = torch.stack([g.norm() for g in grads if g is not None]).norm()
    assert trainer.norm.take() == pytest.approx(float(wanted), rel=1e-4)


def test_words_that_nobody_knows_are_refused(data, tmp_path, capsys):
    for word, message in (("--log_words=lr,loss", "not 'loss'"), ("--watch=mlflow", "of tensorboard, wandb")):
        assert run(data, tmp_path / "out", word) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()
