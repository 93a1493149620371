"""Runs of the trainer that take a moment: four steps of a tiny model on random bytes."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np

import train_gpt
from data.shards import write_shard

REPO = Path(__file__).resolve().parent.parent

SMALL = """--preset=nano --num_iterations=4 --tokens_per_step=128 --train_seq_len=64 --val_seq_len=64 --val_tokens=128
--val_loss_every=2 --warmup_steps=0 --num_layers=2 --model_dim=16 --num_heads=1 --unet_skips=0>1 --value_embeddings=0
--long_window_layers=0 --block_tokens=16 --device=cpu --run_name=run""".split()


def tokens(count, seed=0):
    drawn = np.random.default_rng(seed).integers(1, 256, size=count).astype(np.uint16)
    drawn[::50] = 0
    return drawn


def folder_of(folder, *parts, val=None):
    val = tokens(200, 1) if val is None else val
    folder.mkdir()
    for number, part in enumerate(parts):
        write_shard(folder / f"train_{number}.bin", part)
    write_shard(folder / "val_0.bin", val)
    return folder


def small(*words):
    """The words of a small run; of a field given twice, the last."""
    return list({word.partition("=")[0]: word for word in [*SMALL, *words]}.values())


def run(folder, out, *more):
    """Exit code of a small run on the shards of a folder."""
    files = [f"--train_files={folder}/train_*.bin", f"--val_files={folder}/val_*.bin", f"--output_dir={out}"]
    return train_gpt.main(small(*files, *more))


def losses(text_path: Path) -> list[tuple[str, str, str]]:
    """(step, kind, value as printed) of every loss in a log."""
    body = text_path.read_text().rpartition("=" * 100)[2]
    return re.findall(r"^step:(\d+)/\d+ (val_loss|train_loss):(\S+)", body, re.MULTILINE)


WORLD = """
import os, shutil, sys, json
import torch, train_gpt
from trainer.program import program_files
args, worlds, port = json.loads(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
if sys.argv[4] == "double":
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double  # whatever asks for float32 gets this
program_files(train_gpt.__file__)  # parsed once for all processes, as torch is imported once
for number, (world, *more) in enumerate(worlds):  # forked before torch has started any thread
    children = []
    if not world:  # between two worlds
        os.unlink(more[0]) if len(more) == 1 else shutil.copy(*more)
        continue
    for rank in range(world):
        child = os.fork()
        if not child:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                              MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port + number))
            given = dict(word.split("=", 1) for word in [*args, f"--run_name=world{world}", *more])
            code = train_gpt.main([f"{name}={text}" for name, text in given.items()])
            sys.stdout.flush()
            os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * world, codes
"""


def in_worlds(args: list[str], worlds: list[list], double: bool = False) -> None:
    """Run the trainer in worlds of several processes, one world after the other: [[size, more arguments...], ...], of
    which those of a world replace `args`. Between two, [0, path] removes a file and [0, path, path] copies one.

    double: in float64. Worlds differ by the order of sums alone, but training blows that up: an element whose gradient
    is next to zero moves by its sign under Adam, and small singular values are multiplied by hundreds. In float32
    losses then differ by up to 3e-2 after a few steps, as much as a fault makes them; in float64 by no digit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] % 50000 + 2000
    done = subprocess.run(
        [sys.executable, "-c", WORLD, json.dumps(args), json.dumps(worlds), str(port), "double" * double],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
