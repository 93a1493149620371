"""What medium combines, at a size for two cores and entered as users do: compiled, bfloat16, several processes, plain
and overlapped exchange, a checkpoint and a resume; and a process that hangs. Nothing is prepared here."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from small_runs import REPO, folder_of, in_worlds, losses, tokens

import train_gpt
from trainer.checkpoints import load_tensors

pytestmark = pytest.mark.timeout(900)  # a busy machine takes ten times as long

# Every part of medium: second embedding, value embeddings, a skip, a layer without attention, long and short windows.
MEDIUM = dict(
    vocab_size=256,
    eos_id=0,
    num_layers=4,
    model_dim=32,
    num_heads=2,
    value_embeddings=1,
    unet_skips="1>3",
    attention_free_layers="2",
    long_window_layers="0,3",
    window_max_tokens=256,
    tokens_per_step=512,
    train_seq_len=128,
    val_seq_len=256,
    val_tokens=512,
    val_loss_every=3,
    num_iterations=6,
    checkpoint_every=3,
    keep_checkpoints=0,
    warmup_steps=2,
    log_train_loss=True,
    embed_lr=0.05,
    device="cpu",
    run_name="run",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    few = [np.where(part, part % 8 + 1, 0).astype(np.uint16) for part in (tokens(9000), tokens(1500, 1))]
    return folder_of(tmp_path_factory.mktemp("medium") / "data", few[0], val=few[1])


def words(data, out, **changes) -> list[str]:
    files = dict(train_files=f"{data}/train_*.bin", val_files=f"{data}/val_*.bin", output_dir=out)
    return [f"--{name}={value}" for name, value in (MEDIUM | files | changes).items()]


def go_on(out, name, resumed, tolerance):
    """The run `name` again from step 3 by `resumed()`: its losses are those of the first time."""
    shutil.copy(out / f"{name}.txt", out / f"{name}.first.txt")
    (out / f"{name}.checkpoints" / "step-000006.safetensors").unlink()
    resumed()
    went_on(out, name, tolerance)


def went_on(out, name, tolerance):
    """A run that was resumed from step 3 has the losses of its first time, which lie beside it."""
    first, again = losses(out / f"{name}.first.txt"), losses(out / f"{name}.txt")
    assert [row[:2] for row in first if row[1] == "val_loss"] == [(s, "val_loss") for s in ("0", "3", "6")]
    assert len(first) == 9 and float(first[-1][2]) < float(first[0][2])
    assert [row[:2] for row in again] == [row[:2] for row in first]
    assert max(abs(float(a[2]) - float(b[2])) for a, b in zip(again, first)) <= tolerance
    assert "resumed from the checkpoint of step 3" in (out / f"{name}.txt").read_text()


@pytest.mark.parametrize("sequences", [1, 2])
def test_two_processes_in_bfloat16_save_and_resume(data, tmp_path, sequences):
    """Either exchange continues the other's checkpoint; the checkpoints hold the same tensors, whoever held what.

    Of one sequence a process gradients leave in the backward pass, of two when they have been added up."""
    args = words(data, tmp_path, train_seq_len=256 // sequences)
    plain, overlap = ["--communication=plain", "--run_name=plain"], ["--communication=overlap", "--run_name=overlap"]
    between = [
        step
        for name in ("plain", "overlap")
        for step in (
            [0, f"{tmp_path}/{name}.txt", f"{tmp_path}/{name}.first.txt"],
            [0, f"{tmp_path}/{name}.checkpoints/step-000006.safetensors"],
        )
    ]
    exchanged = [[2, overlap[0], plain[1], "--resume=auto"], [2, plain[0], overlap[1], "--resume=auto"]]
    in_worlds(args, [[2, *plain], [2, *overlap], *between, *exchanged])
    states = {
        name: load_tensors(tmp_path / f"{name}.checkpoints" / "step-000003.safetensors", train_gpt.CHECKPOINT_FORMAT)[1]
        for name in ("plain", "overlap")
    }
    assert states["plain"].keys() == states["overlap"].keys()
    mantissas = [name for name in states["plain"] if "mantissa" in name]
    assert len(mantissas) == 11 and all(states["overlap"][name].dtype == torch.int16 for name in mantissas)
    for name, tensor in states["plain"].items():  # two summands: one sum, whatever the route
        assert torch.equal(tensor, states["overlap"][name]), name
    assert states["plain"]["model.head_w"].abs().sum() > 0
    went_on(tmp_path, "plain", 1e-6)
    went_on(tmp_path, "overlap", 1e-6)


@pytest.mark.slow
def test_compiled_training_saves_and_resumes(data, tmp_path, monkeypatch):
    """One process, `--compile=on`, bfloat16, and the losses of the eager run beside it."""
    import torch._inductor.config

    monkeypatch.setattr(torch._inductor.config.cpp, "simdlen", 1)  # plain loops: the C++ compiler is done sooner
    small = dict(num_layers=1, unet_skips="", attention_free_layers="", long_window_layers="0", value_embeddings=0)
    small |= dict(train_seq_len=256, tokens_per_step=256, second_input_embedding="true")
    args = words(data, tmp_path, compile="on", **small)
    assert train_gpt.main(args) == 0
    go_on(tmp_path, "run", lambda: train_gpt.main([*args, "--resume=auto"]), 1e-6)
    assert train_gpt.main(words(data, tmp_path / "eager", compile="off", **small)) == 0
    pairs = zip(losses(tmp_path / "run.txt"), losses(tmp_path / "eager" / "run.txt"), strict=True)
    assert max(abs(float(a[2]) - float(b[2])) for a, b in pairs) <= 0.02  # bfloat16, rounded in other places


@pytest.mark.slow
@pytest.mark.parametrize("dtype, sequences", [("bfloat16", 1), ("bfloat16", 2), ("float32", 2)])
@pytest.mark.parametrize("exchange", ["plain", "overlap"])
def test_all_of_it_at_once_by_torchrun(data, tmp_path, dtype, sequences, exchange):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    torchrun += ["--rdzv_endpoint=127.0.0.1:0", str(REPO / "train_gpt.py")]
    how = dict(compile="on", dtype=dtype, communication=exchange, train_seq_len=256 // sequences)
    args = words(data, tmp_path, **how)

    def run(*more):
        done = subprocess.run([*torchrun, *args, *more], cwd=REPO, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]

    run()
    go_on(tmp_path, "run", lambda: run("--resume=auto"), 1e-6)


HANGS = """
import json, os, signal, sys
import train_gpt
child = os.fork()
os.environ.update(RANK="0" if child else "1", LOCAL_RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                  MASTER_PORT=sys.argv[2])
real = train_gpt.Trainer.step
def step(self, number, batches):
    if number == 2 and not child:
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(self, number, batches)
train_gpt.Trainer.step = step
code = train_gpt.main(json.loads(sys.argv[1]))
if child:
    os.kill(child, signal.SIGKILL)
sys.exit(code)
"""


def test_a_hanging_process_ends_the_run_in_time_with_a_message(data, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    args = words(data, tmp_path, patience=8, warmup_steps=0, num_iterations=10**6, val_loss_every=0)
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HANGS, json.dumps(args), port]
    began = time.monotonic()
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1, done.stderr[-2000:]
    assert "rank 0 heard nothing from another process for 8 s (--patience)" in done.stderr
    assert time.monotonic() - began > 8
    summary = json.loads((tmp_path / "run.json").read_text())
    assert summary["status"] == "failed"
