"""Files that the libraries themselves write: Weights & Biases offline, TensorBoard, Hugging Face's trainer.

Each test is skipped, with its reason, where its library is not installed.
"""

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib

import pytest
from places import Places, without_a_case

from stats.cli import main
from stats.errors import DataError
from stats.offline import read_offline
from stats.runs import EmptyLog
from stats.series import find_series, read_runs, reading_of
from stats.values import final_validation

STEPS = 60  # of a run; it validates after every 20


def final(path):
    """The final loss of the one run in a file."""
    (run,) = read_runs(path)
    return final_validation(run).loss


def told(capsys, *words):
    """(exit code, what a command prints as JSON)."""
    code = main([*map(str, words), "--json"])
    return code, json.loads(capsys.readouterr().out)


# ----------------------------------------------------------------------------------------------------
# Weights & Biases


def like_ours(run, loss):
    """The steps are those of the library."""
    for step in range(STEPS + 1):
        values = {"val_loss": loss + (STEPS - step) / 50} if step % 20 == 0 else {}
        run.log({"loss": 4.5 - step / 50, "train_time_s": 2.0 * step, **values}, step=step)


def like_nanogpt(run, loss):
    """The library counts calls, and the program's own steps stand in a column."""
    for step in range(0, STEPS + 1, 20):
        run.log({"iter": step, "train/loss": 2.5, "val/loss": loss + (STEPS - step) / 50, "lr": 1e-3})


def finish(run, path, exit_code=0):
    """End a run; the library's service writes on for a moment after that."""
    run.finish(exit_code=exit_code)
    for _ in range(300):
        try:
            state = read_offline(path)[0].state
        except EmptyLog as error:  # says it as well
            state = str(error)
        if state.endswith(("finished", "crashed (exit code 1)")):
            return path
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end after half a minute")


def without_validations(run, loss):
    run.log({"samples_per_second": loss})


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """{name: its file}: runs as the library wrote them, in one folder and, of other kinds, in a second one."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (requirements-lab.txt)")
    home, found = tmp_path_factory.mktemp("offline"), {}
    ours = [(f"seed-{seed}", like_ours, 2.9 + seed / 1e3, {"seed": seed, "num_iterations": STEPS}) for seed in range(4)]
    others = [
        ("nanogpt", like_nanogpt, 3.25, {"max_iters": STEPS, "seed": 1337}),
        ("planned", like_ours, 3.0, {"max_steps": 2 * STEPS}),
        ("nothing", without_validations, 3.0, {}),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
            patch.delenv(name, raising=False)
        for name, recipe, loss, config in [*ours, *others]:
            folder = home / ("ours" if recipe is like_ours and config.get("num_iterations") else "others")
            folder.mkdir(exist_ok=True)
            settings = wandb.Settings(console="off", silent=True)
            run = wandb.init(project="p", name=name, dir=folder, mode="offline", config=config, settings=settings)
            recipe(run, loss)
            if name == "planned":
                run.log({"table": wandb.Table(columns=["seed", "val_loss"], data=[[0, 2.9], [1, 2.8]])})
            path = next(folder.glob(f"wandb/offline-run-*/run-{run.id}.wandb"))
            found[name] = finish(run, path, exit_code=1 if name == "seed-3" else 0)
    return found


def test_offline_files_are_a_series(offline, capsys):
    code, result = told(capsys, "ttest", offline["seed-0"].parents[2], "--threshold", 2.91, "--no-sensitivity")
    assert (code, result["n"]) == (0, 3)
    assert result["sample_mean"] == pytest.approx(2.901, rel=1e-12)
    (left_out,) = result["left_out"]
    assert left_out["run"] == "seed-3" and "crashed (exit code 1), says run-" in left_out["reason"]
    code, result = told(capsys, "import", offline["seed-2"])
    (run,) = result["runs"]
    assert (run["run"], run["seed"], run["planned_steps"], run["validations"]) == ("seed-2", 2, STEPS, 4)
    assert run["time_s"] == 2.0 * STEPS, "the program's own clock, before that of the library"
    for words in ("step from '_step'", "loss from 'val_loss'", "'loss'", "seed from its configuration's 'seed'"):
        assert words in run["reader"]


def test_a_column_of_steps_goes_before_the_count_of_calls(offline):
    (run,) = read_offline(offline["nanogpt"])
    assert [point.step for point in run.validations] == [0, 20, 40, 60]
    assert final_validation(run).loss == 3.25 and run.seed == 1337
    assert "step from 'iter'" in run.origin and "not used: '_runtime'" not in run.origin


def test_what_is_no_result_of_an_offline_run(offline):
    (run,) = read_offline(offline["planned"])
    with pytest.raises(DataError, match="last validation is at step 60 of 120 planned"):
        final_validation(run)
    with pytest.raises(EmptyLog, match=r"'samples_per_second'.*is a validation loss; the run is finished"):
        read_offline(offline["nothing"])
    passed = {
        entry.path: entry.reason for entry in reading_of(find_series([offline["nothing"].parents[2]])).passed_over
    }
    assert "is a validation loss" in passed[str(offline["nothing"])]
    (table,) = offline["planned"].parent.rglob("*.table.json")
    assert [(run.seed, run.validations[-1].loss) for run in read_runs(table)] == [(0, 2.9), (1, 2.8)]


def test_an_offline_file_that_was_cut_or_changed_is_no_result(offline, tmp_path):
    """Killed at any byte, it has no end; with any bit another, it is refused."""
    whole = offline["seed-0"].read_bytes()
    (good,) = read_offline(offline["seed-0"])
    path, rng = tmp_path / "run-x.wandb", random.Random(0)
    with Places() as places:
        for at in sorted({0, 6, 7, 8, len(whole) - 1, *rng.sample(range(len(whole)), 150)}):
            path.write_bytes(whole[:at])
            with pytest.raises(DataError):
                final_validation(*read_offline(path))
        path.write_bytes(whole[:-1])
        with pytest.raises(DataError, match="its state is 'running, or killed'"):
            final_validation(*read_offline(path))
        for at in rng.sample(range(len(whole)), 150):
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(8)]) + whole[at + 1 :])
            with pytest.raises(DataError):
                final_validation(*read_offline(path))
        messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
        no_json = messages.HistoryRecord(item=[messages.HistoryItem(key="loss", value_json="{")])
        no_json = messages.Record(history=no_json).SerializeToString()
        for damage, says in ((b"\x0a\xff", "cannot be decoded"), (no_json, "is not what Weights & Biases writes")):
            path.write_bytes(whole + chunk(damage))
            with pytest.raises(DataError, match=says):
                read_offline(path)
        path.write_bytes(whole + bytes(-len(whole) % (32 << 10)))  # a block filled up with zeros
        with pytest.raises(DataError, match="damaged at byte"):
            read_offline(path)
        with pytest.raises(EmptyLog):
            read_offline(offline["nothing"])
    assert good.state == "finished"
    missing = without_a_case(places.seen, ("DataError", "EmptyLog"))
    assert [place for place in missing if place.startswith("offline.py")] == []


def chunk(data):
    """A record as the format has it."""
    return struct.pack("<IHB", zlib.crc32(data, zlib.crc32(b"\1")), len(data), 1) + data


def test_a_record_of_several_blocks(tmp_path):
    """The library's writer divides what does not fit; the reader puts it together."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed (requirements-lab.txt)")
    settings = wandb.Settings(console="off", silent=True)
    run = wandb.init(project="p", name="long", dir=tmp_path, mode="offline", settings=settings)
    for step in range(3):
        run.log({"text": "abc" * 40_000, "val_loss": 3.0 - step / 10}, step=step)
    (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    finish(run, path)
    assert path.stat().st_size > 5 * (32 << 10)
    assert [point.loss for run in read_offline(path) for point in run.validations] == [3.0, 2.9, 2.8]


# ----------------------------------------------------------------------------------------------------
# TensorBoard


def write_events(folder, scalars):
    """Event files by the library's writer: {tag: [(step, value)]}."""
    reason = "tensorboard is not installed (requirements-lab.txt)"
    board = pytest.importorskip("torch.utils.tensorboard", reason=reason).SummaryWriter(folder)
    for tag, points in scalars.items():
        for step, value in points:
            board.add_scalar(tag, value, step)
    board.close()
    (path,) = folder.glob("events.out.tfevents.*")
    return path


def curve(last):
    """A validation loss that ends at `last`."""
    return [(step, last + (100 - step) / 50) for step in (0, 50, 100)]


def test_event_files_of_tensorboard(tmp_path, capsys):
    finals = (2.9186, 2.9191, 2.9179)
    for seed, last in enumerate(finals):
        write_events(tmp_path / f"run-{seed}", {"Loss/train": [(0, 4.0), (100, 3.0)], "Loss/val": curve(last)})
    (series,) = find_series([tmp_path])
    assert [final_validation(run).loss for run in series.runs] == pytest.approx(finals, rel=1e-6)
    assert all(run.origin.startswith("TensorBoard: loss from 'Loss/val'") for run in series.runs)
    assert main(["import", str(tmp_path)]) == 0
    assert "not used: 'Loss/train'" in capsys.readouterr().out


def test_event_files_of_one_folder_are_one_run(tmp_path):
    """As TensorBoard has it: what was resumed wrote a second file."""
    write_events(tmp_path / "run", {"val_loss": curve(2.9)[:2]})
    first = next((tmp_path / "run").iterdir())
    first.rename(first.with_name(f"{first.name}.0"))
    write_events(tmp_path / "again", {"val_loss": curve(2.9)[2:]})
    (second,) = (tmp_path / "again").iterdir()
    second.rename(tmp_path / "run" / f"{first.name}.1")
    (series,) = find_series([tmp_path])
    assert [[point.step for point in run.validations] for run in series.runs] == [[0, 50, 100]]


@pytest.mark.parametrize(
    "scalars, says",
    [
        ({"lr": [(0, 1.0)]}, r"of its scalars \('lr'\) none is a validation loss"),
        ({"val/loss": curve(1), "eval/loss": curve(2)}, "several could be the validation loss: "),
        ({"val_loss": [*curve(1), *curve(2)]}, "'val_loss' has two values for one step"),
    ],
)
def test_event_files_without_one_answer(scalars, says, tmp_path):
    with pytest.raises(DataError, match=says):
        read_runs(write_events(tmp_path, scalars))


def test_an_event_file_that_is_none(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed (requirements-lab.txt)")
    (tmp_path / "events.out.tfevents.1.host").write_bytes(b"\0" * 100)
    with pytest.raises(DataError, match=r"events.out.tfevents.1.host: (TensorBoard cannot read it|of its scalars)"):
        read_runs(tmp_path / "events.out.tfevents.1.host")


# ----------------------------------------------------------------------------------------------------
# Hugging Face


def test_state_of_hugging_faces_trainer(tmp_path):
    reason = "transformers is not installed (requirements-lab.txt)"
    callbacks = pytest.importorskip("transformers.trainer_callback", reason=reason)
    state = callbacks.TrainerState(max_steps=100, global_step=100)
    state.log_history = [{"step": 50, "loss": 3.5}, {"step": 50, "eval_loss": 3.4}, {"step": 100, "eval_loss": 3.25}]
    path = tmp_path / "run-a" / "trainer_state.json"
    path.parent.mkdir()
    state.save_to_json(str(path))
    assert final(path) == 3.25
    state.log_history.pop()
    state.save_to_json(str(path))
    with pytest.raises(DataError, match="last validation is at step 50 of 100 planned"):
        final(path)


TRAINER = """
import torch, transformers, wandb

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(4))

    def forward(self, x=None, labels=None):
        return {"loss": ((x @ self.w - labels) ** 2).mean()}

rows = [{"x": torch.randn(4), "labels": torch.tensor(1.0)} for _ in range(8)]
for seed in range(2):
    arguments = transformers.TrainingArguments(
        f"out/seed-{seed}", max_steps=4, eval_strategy="steps", eval_steps=2, logging_steps=2, seed=seed,
        report_to=["tensorboard", "wandb"], use_cpu=True, run_name=f"s{seed}", save_steps=2, disable_tqdm=True,
    )
    trainer = transformers.Trainer(Model(), arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    trainer.save_state()
    print("evaluated", trainer.evaluate()["eval_loss"])  # once more at the last step, as its examples do
    wandb.finish()
"""


@pytest.mark.slow
def test_what_hugging_faces_trainer_leaves_is_read_once(tmp_path, monkeypatch, capsys):
    """Its state, TensorBoard and Weights & Biases beside one another, of two seeds."""
    for name in ("transformers", "accelerate", "tensorboard", "wandb"):
        pytest.importorskip(name, reason=f"{name} is not installed, and transformers.Trainer needs it here")
    monkeypatch.chdir(tmp_path)
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    words = [sys.executable, "-c", TRAINER]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    evaluated = [float(loss) for loss in re.findall(r"^evaluated (\S+)", done.stdout, re.MULTILINE)]
    for folder in ("out", "wandb", "."):
        capsys.readouterr()
        code, result = told(capsys, "ttest", folder, "--threshold", 1000, "--no-sensitivity")
        assert (code, result["n"]) == (0, 2), folder
        assert result["sample_mean"] == pytest.approx(sum(evaluated) / 2, rel=1e-6)


# ----------------------------------------------------------------------------------------------------
# Beside a log


def test_a_run_that_a_library_kept_too_is_one_run(tmp_path, make_log, capsys):
    for seed in range(2):
        text = make_log(2.9 + seed / 1e3, seed=seed)
        (tmp_path / f"r{seed}.txt").write_text(text)
        points = [(int(step), float(loss)) for step, loss in re.findall(r"^step:(\d+)/60 val_loss:(\S+)", text, re.M)]
        assert len(points) == 4
        write_events(tmp_path / f"r{seed}.tensorboard", {"val_loss": points})
    write_events(tmp_path / "last.tensorboard", {"val_loss": [(60, 2.9)]})
    (series,) = find_series([tmp_path])
    assert [run.dialect for run in series.runs] == ["steps", "steps"]
    reasons = [entry.reason for entry in series.passed_over]
    assert [
        re.search(r"the run of .*/(\S+), kept twice", reason)[1] for reason in reasons
    ] == "r0.txt r0.txt r1.txt".split()
    assert main(["ttest", str(tmp_path), "--no-sensitivity"]) == 0
    points[-1] = (60, points[-1][1] + 0.0001)
    shutil.rmtree(tmp_path / "r1.tensorboard")
    write_events(tmp_path / "r1.tensorboard", {"val_loss": points})
    assert len(find_series([tmp_path])) == 2, "with another loss it is another run"


def test_one_loss_of_a_library_elsewhere_is_no_copy(tmp_path, make_log):
    """Equal to the digits that a log has, it may be an accident."""
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.txt").write_text(make_log(2.9))
    write_events(tmp_path / "board", {"val_loss": [(60, 2.9)]})
    assert len(find_series([tmp_path])) == 2


def test_what_no_library_reads_here_is_passed_over(tmp_path, make_log, monkeypatch, capsys):
    for seed in range(2):
        (tmp_path / f"r{seed}.txt").write_text(make_log(2.9 + seed / 1e3, seed=seed))
    (tmp_path / "events.out.tfevents.1").write_bytes(b"x")
    (tmp_path / "run-a.wandb").write_bytes(b"x")
    for name in ("tensorboard.backend.event_processing.event_accumulator", "wandb.proto"):
        monkeypatch.setitem(sys.modules, name, None)
    code, result = told(capsys, "ttest", tmp_path, "--no-sensitivity")
    reasons = [entry["reason"] for entry in result["reading"]["passed_over"]]
    assert (code, result["n"]) == (0, 2) and len(reasons) == 2
    assert "pip install tensorboard" in reasons[0] and "pip install wandb" in reasons[1]
