"""The trainer as people run it: processes, signals, checkpoints, bad inputs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import in_worlds, losses

import train_gpt
from data.shards import write_shard
from trainer import log as runlog
from trainer import sample
from trainer.checkpoints import CheckpointError, checkpoints_of, load_tensors, newest_whole
from trainer.processes import StopRequest

REPO = Path(__file__).resolve().parent.parent
SMALL = dict(
    preset="nano",
    num_iterations=12,
    tokens_per_step=1024,
    train_seq_len=128,
    val_seq_len=256,
    val_tokens=512,
    val_loss_every=4,
    warmup_steps=1,
    model_dim=32,
    num_heads=2,
    device="cpu",
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A folder with two byte shards and a validation shard; the text has structure, so that losses fall."""
    folder = tmp_path_factory.mktemp("shards")
    generator = np.random.default_rng(0)
    words = [bytes(generator.integers(97, 123, size=generator.integers(2, 7)).astype(np.uint8)) for _ in range(40)]
    text = b" ".join(words[i] for i in generator.zipf(1.5, 20000).clip(1, 40) - 1)
    tokens = np.frombuffer(text, np.uint8).astype(np.uint16).copy()
    tokens[::400] = 0
    write_shard(folder / "train_0.bin", tokens[:9000])
    write_shard(folder / "train_1.bin", tokens[9000:40000])
    write_shard(folder / "val_0.bin", tokens[40000:44000])
    return folder


def arguments(shards: Path, out: Path, **changes) -> list[str]:
    fields = (
        SMALL
        | dict(
            train_files=f"{shards}/train_*.bin", val_files=f"{shards}/val_*.bin", output_dir=str(out), run_name="run"
        )
        | changes
    )
    return [f"--{name}={value}" for name, value in fields.items()]


def start(args: list[str], **environment) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, str(REPO / "train_gpt.py"), *args]
    return subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_here(args: list[str]) -> int:
    """The run within this process: no start-up cost. Signal handlers are put back."""
    before = {number: signal.getsignal(number) for name in StopRequest.NAMES if (number := getattr(signal, name))}
    try:
        return train_gpt.main(args)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def undisturbed(shards, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert run_here(arguments(shards, out)) == 0
    return out


def test_log_and_json_say_what_ran(undisturbed):
    text = (undisturbed / "run.txt").read_text()
    source, _, rest = text.partition("\n" + "=" * 100 + "\n")
    assert source.rstrip("\n") == (REPO / "train_gpt.py").read_text().rstrip("\n")
    assert "Running PyTorch" in rest and '"attention": "banded' in rest
    summary = json.loads((undisturbed / "run.json").read_text())
    assert summary["status"] == "finished" and summary["seed"] == 0
    assert [point["step"] for point in summary["validation"]] == [0, 4, 8, 12]
    assert summary["final_loss"] == summary["validation"][-1]["loss"] < summary["validation"][0]["loss"]
    printed = [value for _, kind, value in losses(undisturbed / "run.txt") if kind == "val_loss"]
    assert printed == [f"{point['loss']:.6f}" for point in summary["validation"]]
    assert summary["validation"][0]["loss"] == pytest.approx(np.log(256), abs=1e-6)
    assert len(summary["data_hash"]) == len(summary["val_data_hash"]) == 32 and len(summary["code_hash"]) == 64
    assert f"train_tokens:12288 data_hash:{summary['data_hash']}\n" in rest and summary["train_tokens"] == 12288
    assert re.search(r"^step:12/12 train_loss:\S+ train_time:\d+ms step_avg:[\d.]+ms$", rest, re.MULTILINE)


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(undisturbed, shards, tmp_path):
    assert run_here(arguments(shards, tmp_path)) == 0
    assert losses(tmp_path / "run.txt") == losses(undisturbed / "run.txt")
    assert run_here(arguments(shards, tmp_path, seed=1, run_name="other")) == 0
    assert losses(tmp_path / "other.txt")[-1] != losses(undisturbed / "run.txt")[-1]


def test_1_2_4_and_8_processes_give_the_same_training(undisturbed, shards, tmp_path):
    """To the last digit that is printed, in float64. In float32 the order of sums alone makes losses differ by up to
    3e-2 after a few steps, as orthogonalisation multiplies small singular values, which are rounding noise in the first
    steps, by up to 493: so does one process that takes the sequences of a step in another order."""
    args = [a for a in arguments(shards, tmp_path) if not a.startswith("--run_name")]
    in_worlds([*args, "--stop_after=8"], [[1], [2], [4], [8]], double=True)
    alone = losses(tmp_path / "world1.txt")
    assert alone[-1][:2] == ("8", "val_loss")
    for world in (2, 4, 8):
        together = losses(tmp_path / f"world{world}.txt")
        assert [row[:2] for row in together] == [row[:2] for row in alone]
        gaps = [abs(float(a[2]) - float(b[2])) for a, b in zip(together, alone)]
        assert max(gaps) <= 1e-6, (world, gaps)
        assert fed(tmp_path / f"world{world}.json") == fed(undisturbed / "run.json")[:-1]


def fed(summary: Path) -> list[tuple[int, int, str]]:
    """(step, training tokens so far, their hash) of every validation."""
    return [(p["step"], p["train_tokens"], p["data_hash"]) for p in json.loads(summary.read_text())["validation"]]


def test_overlapped_communication_trains_as_the_plain_one(shards, tmp_path):
    """The same sums by other routes, at 2 and 4 processes; and a checkpoint of either continues under the other."""
    args = arguments(shards, tmp_path, num_iterations=6, checkpoint_every=4, keep_checkpoints=0)
    plain, overlap = "--communication=plain", "--communication=overlap"
    both = [[n, way, f"--run_name={way[16:]}{n}"] for n in (2, 4) for way in (plain, overlap)]
    kept = [0, f"{tmp_path}/overlap2.txt", f"{tmp_path}/first.txt"]
    gone = [0, f"{tmp_path}/overlap2.checkpoints/step-000006.safetensors"]
    in_worlds(args, [*both, kept, gone, [2, plain, "--resume=auto", "--run_name=overlap2"]], double=True)
    for n in (2, 4):
        gaps = [
            abs(float(a[2]) - float(b[2]))
            for a, b in zip(losses(tmp_path / f"plain{n}.txt"), losses(tmp_path / f"overlap{n}.txt"), strict=True)
        ]
        assert max(gaps) <= 1e-6, gaps
    whole = {
        way: load_tensors(tmp_path / f"{way}2.checkpoints" / "step-000004.safetensors", "train_gpt-1")[1]
        for way in ("plain", "overlap")
    }
    assert whole["plain"].keys() == whole["overlap"].keys()
    for name, tensor in whole["plain"].items():
        torch.testing.assert_close(whole["overlap"][name], tensor, rtol=1e-6, atol=1e-9, msg=name)
    before, after = losses(tmp_path / "first.txt"), losses(tmp_path / "overlap2.txt")
    assert "resumed from the checkpoint of step 4" in (tmp_path / "overlap2.txt").read_text()
    assert max(abs(float(a[2]) - float(b[2])) for a, b in zip(after, before, strict=True)) <= 1e-6


def test_resuming_continues_bit_for_bit(undisturbed, shards, tmp_path):
    """Killed after step 8's checkpoint with later steps already logged: the lines after equal the undisturbed."""
    args = arguments(shards, tmp_path, checkpoint_every=4, keep_checkpoints=0)
    assert run_here(args) == 0
    folder = tmp_path / "run.checkpoints"
    (folder / "step-000012.safetensors").unlink()
    for name in ("run.json",):
        (tmp_path / name).unlink()
    assert run_here([*args, "--resume=auto"]) == 0
    assert losses(tmp_path / "run.txt") == losses(undisturbed / "run.txt")
    assert "resumed from the checkpoint of step 8" in (tmp_path / "run.txt").read_text()
    summary = json.loads((tmp_path / "run.json").read_text())
    assert [p["step"] for p in summary["validation"]] == [0, 4, 8, 12]


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(undisturbed, shards, tmp_path, capsys):
    args = arguments(shards, tmp_path, checkpoint_every=4, keep_checkpoints=0)
    assert run_here(args) == 0
    folder = tmp_path / "run.checkpoints"
    last, middle = folder / "step-000012.safetensors", folder / "step-000008.safetensors"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(data)
    middle.write_bytes(middle.read_bytes()[:-100])
    assert run_here([*args, "--resume=auto"]) == 0
    said = capsys.readouterr().out
    assert "step-000012.safetensors: damaged" in said and "step-000008.safetensors: not a whole" in said
    assert "resumed from the checkpoint of step 4" in said
    assert losses(tmp_path / "run.txt") == losses(undisturbed / "run.txt")
    for path in folder.iterdir():
        path.write_bytes(b"x" * 50)
    assert run_here([*args, "--resume=auto"]) == 3
    assert "none of its 3 checkpoints is whole" in capsys.readouterr().err


def test_a_checkpoint_of_another_configuration_is_refused(undisturbed, shards, tmp_path, capsys):
    (checkpoint,) = (undisturbed / "run.checkpoints").glob("*.safetensors")
    assert run_here(arguments(shards, tmp_path, muon_lr=0.5, resume=checkpoint)) == 3
    assert "these fields differ: muon_lr" in capsys.readouterr().err


def test_a_foreign_safetensors_file_and_a_pickle_are_refused(tmp_path, capsys):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(3)}, tmp_path / "foreign.safetensors", metadata={"format": "pt"})
    torch.save({"x": torch.zeros(3)}, tmp_path / "pickle.pt")
    for name, cause in (("foreign.safetensors", "not a checkpoint of format"), ("pickle.pt", "not a whole")):
        with pytest.raises(CheckpointError, match=cause):
            train_gpt.load_model(tmp_path / name)
    assert train_gpt.main(["sample", str(tmp_path / "absent")]) == 3
    assert "no checkpoint" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_good_checkpoint(shards, tmp_path, capsys, monkeypatch):
    import errno

    import safetensors.torch

    real = safetensors.torch.save_file
    calls = []

    def full(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) > 1:
            Path(path).write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    assert run_here(arguments(shards, tmp_path, checkpoint_every=4)) == 5
    assert "No space left" in capsys.readouterr().err
    (kept,) = (tmp_path / "run.checkpoints").iterdir()
    assert load_tensors(kept, train_gpt.CHECKPOINT_FORMAT)[0]["step"] == "4"
    summary = json.loads((tmp_path / "run.json").read_text())
    assert summary["status"] == "failed" and "No space left" in summary["error"]


def test_a_loss_that_is_not_finite_stops_the_run(shards, tmp_path, capsys, monkeypatch):
    real = train_gpt.Trainer.step

    def poisoned(self, step, batches):
        if step == 6:
            with torch.no_grad():
                self.model.embed1.weight[:] = float("nan")
        return real(self, step, batches)

    args = arguments(shards, tmp_path, checkpoint_every=4, warmup_steps=0)
    monkeypatch.setattr(train_gpt.Trainer, "step", poisoned)
    assert run_here(args) == 4
    assert "training loss at step 7 is nan" in capsys.readouterr().err
    (kept,) = (tmp_path / "run.checkpoints").iterdir()
    monkeypatch.undo()
    assert load_tensors(kept, train_gpt.CHECKPOINT_FORMAT)[0]["step"] == "4"
    assert run_here([*args, "--resume=auto"]) == 0


def test_a_killed_rank_ends_all_with_an_error(shards, tmp_path):
    args = arguments(shards, tmp_path, num_iterations=100000, val_loss_every=0, checkpoint_every=5)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--master_port=0",
        "--rdzv_backend=c10d",
        "--rdzv_endpoint=127.0.0.1:0",
        str(REPO / "train_gpt.py"),
        *args,
    ]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPO, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    log, folder = tmp_path / "run.txt", tmp_path / "run.checkpoints"
    deadline = time.time() + 90
    while time.time() < deadline and not (folder.is_dir() and checkpoints_of(folder)):
        time.sleep(0.1)
    assert log.exists(), process.communicate(timeout=10)[0]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    victims = [pid for pid in children if b"train_gpt" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(int(victims[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=90)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in output
    newest = newest_whole(folder, train_gpt.CHECKPOINT_FORMAT)
    assert newest is not None


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (dict(train_files="/nowhere/*.bin"), 3, "/nowhere"),
        (dict(vocab_size=64, eos_id=0), 3, "val_0.bin: token"),
        (dict(val_tokens=256 * 1000), 3, "too few"),
        (dict(device="cuda"), 2, "sees no GPU"),
        (dict(output_dir="/proc/nowhere"), 5, "nowhere"),
    ],
    ids=["no-files", "ids-above-vocabulary", "short-validation", "no-gpu", "unwritable"],
)
def test_bad_inputs_end_with_their_code_and_cause(change, code, message, shards, tmp_path, capsys):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert run_here(arguments(shards, tmp_path, **change)) == code
    assert message in capsys.readouterr().err


def test_a_name_is_taken_once(undisturbed, shards, capsys):
    assert run_here(arguments(shards, undisturbed)) == 2
    assert "exists; choose another --run_name" in capsys.readouterr().err
    with open(undisturbed / ".taken.lock", "w") as lock:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX)
        assert run_here(arguments(shards, undisturbed, run_name="taken")) == 2
    assert "another process is writing this run" in capsys.readouterr().err


def test_sampling_writes_text(undisturbed, capsys):
    (checkpoint,) = (undisturbed / "run.checkpoints").glob("*.safetensors")
    texts = []
    for _ in range(2):
        assert train_gpt.main(["sample", str(checkpoint), "--prompt", "ab", "--max_new_tokens", "20"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("ab")


def test_sampling_filters_are_what_they_say():
    logits = torch.tensor([3.0, 2.0, 1.0, 0.0])
    generator = torch.Generator().manual_seed(0)
    draw = lambda **options: {int(sample.pick(logits, generator=generator, **options)) for _ in range(200)}  # noqa: E731
    assert draw(temperature=0, top_k=0, top_p=1.0) == {0}
    assert draw(temperature=5.0, top_k=2, top_p=1.0) == {0, 1}
    assert draw(temperature=1.0, top_k=0, top_p=0.7) == {0, 1}
    assert draw(temperature=9.0, top_k=0, top_p=1.0) == {0, 1, 2, 3}
    batch = torch.stack([logits, logits.flip(0)]).repeat(100, 1)
    drawn = sample.pick(batch, 5.0, top_k=3, top_p=0.6, generator=generator)
    assert drawn.shape == (200,) and set(drawn[::2].tolist()) == {0, 1} and set(drawn[1::2].tolist()) == {2, 3}


def test_plain_lines_in_a_pipe_show_speed_and_time_left(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runlog.Progress, "due", lambda self: True)
    assert run_here(arguments(shards, tmp_path)) == 0
    said = capsys.readouterr().out
    assert re.search(r"progress: step 6 of 12, loss [\d.]+, [\d,]+ tokens/s, \d+ s left", said)  # no MFU on a CPU
