"""Race the nano-text preset against nanoGPT's published CPU recipe, on one text, on the same cores, in one run.

    python -m bench.race shakespeare.txt --nanogpt PATH_TO_A_CHECKOUT --repeats 3

Both learn the same first 90 % of the characters and are judged on the rest, in nats per character; the text must be
ASCII, so that a byte is a character. nanoGPT runs as its README says for a CPU: 4 layers, 4 heads, width 128,
context 64, batch 12, 2000 steps, no dropout, no compilation. It is neither contained in nor needed by this project.
The two take turns. What counts is the time of the whole process, start-up and validations included, until a
validation loss at or below the target stands in its output (the end of the process where none does, as for nanoGPT,
which ends at 1.886). The time of the training steps alone is told beside it.

Result: bench/results/race-<device>.json. Exit codes: 0 measured, 2 usage, 3 bad text or a run that failed.
"""

from __future__ import annotations

import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.common import REPO, write_result
from trainer.options import command, setting

RECIPE = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 "
    "--batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
OURS = "--preset=nano-text --val_loss_every=0 --val_seq_len=9216 --val_tokens=110592 --device=cpu"
TARGET = 1.88


class RaceError(RuntimeError):
    """A text that cannot be raced on, or a run that failed."""


def prepare(text: bytes, nanogpt: Path | None, folder: Path) -> None:
    """Write the same split as byte shards for us and as character ids for nanoGPT. Raises RaceError."""
    from data.shards import write_shard

    try:
        characters = text.decode("ascii")
    except UnicodeDecodeError as error:
        raise RaceError(f"the text must be ASCII, so that bytes are characters: {error}") from None
    border = int(len(characters) * 0.9)
    if len(characters) - border < 110593:
        raise RaceError(f"{len(characters)} characters are too few; a tenth of them must be at least 110593")
    tokens = np.frombuffer(text, np.uint8)
    write_shard(folder / "train.bin", tokens[:border])
    write_shard(folder / "val.bin", tokens[border:])
    if nanogpt is None:
        return
    alphabet = sorted(set(characters))
    ids = {c: i for i, c in enumerate(alphabet)}
    where = nanogpt / "data" / "shakespeare_char"
    for name, part in (("train.bin", characters[:border]), ("val.bin", characters[border:])):
        np.array([ids[c] for c in part], dtype=np.uint16).tofile(where / name)
    meta = dict(vocab_size=len(alphabet), itos=dict(enumerate(alphabet)), stoi=ids)
    (where / "meta.pkl").write_bytes(pickle.dumps(meta))  # the form in which nanoGPT reads it


def timed(command: list[str], cwd: Path, pattern: str) -> tuple[float, list[tuple[float, str]]]:
    """Run to the end; (seconds, [(seconds until the line came, line)] for lines that match). Raises RaceError."""
    began = time.perf_counter()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    found, last = [], ""
    for line in process.stdout:
        last = line.strip() or last
        if re.search(pattern, line):
            found.append((time.perf_counter() - began, line))
    if process.wait():
        raise RaceError(f"{command[1]} ended with code {process.returncode}: {last}")
    return time.perf_counter() - began, found


def until_target(seconds: float, losses: list[tuple[float, float]]) -> float:
    """Seconds until the first loss at or below the target; the whole run's if there is none."""
    return next((at for at, loss in losses if loss <= TARGET), seconds)


def race_nanogpt(nanogpt: Path) -> dict:
    """One run of the recipe."""
    command = [sys.executable, "train.py", *RECIPE.split(), "--out_dir=out-race"]
    seconds, lines = timed(command, nanogpt, r"^(step|iter) \d+")
    found = [(at, re.search(r"val loss ([\d.]+)", text)) for at, text in lines]
    losses = [(at, float(m[1])) for at, m in found if m]
    steps_ms = [float(m[1]) for _, text in lines if (m := re.match(r"iter \d+: loss \S+ time ([\d.]+)ms", text))]
    steps_ms = steps_ms or [float(m[1]) for _, t in lines if (m := re.search(r"time ([\d.]+)ms", t))]
    median_ms = statistics.median(steps_ms)  # iterations that validate are much longer
    return dict(
        seconds=seconds,
        seconds_to_target=until_target(seconds, losses),
        final_loss=losses[-1][1],
        train_seconds=median_ms * 2000 / 1000,
        characters=2000 * 12 * 64,
    )


def race_ours(folder: Path, number: int, extra: list[str]) -> dict:
    """One run of the nano-text preset."""
    command = [
        sys.executable,
        str(REPO / "train_gpt.py"),
        *OURS.split(),
        f"--train_files={folder}/train.bin",
        f"--val_files={folder}/val.bin",
        f"--output_dir={folder}",
        f"--run_name=race-{number}",
        f"--seed={number}",
        "--save_final=false",
        *extra,
    ]
    seconds, lines = timed(command, REPO, r"val_loss:")
    found = [(at, re.search(r"^step:(\d+)/(\d+) val_loss:(\S+) train_time:(\d+)ms", text)) for at, text in lines]
    losses = [(at, float(m[3])) for at, m in found]
    last = found[-1][1]
    if losses[-1][1] > TARGET:
        raise RaceError(f"our run ended at {losses[-1][1]}, above the target of {TARGET}: there is no time to tell")
    return dict(
        seconds=seconds,
        seconds_to_target=until_target(seconds, losses),
        final_loss=losses[-1][1],
        train_seconds=int(last[4]) / 1000,
        steps=int(last[2]),
    )


@dataclass(frozen=True)
class Options:
    """Who races."""

    nanogpt: Path | None = setting(None, "folder", "a checkout of nanoGPT; without it only ours runs")
    repeats: int = setting(3, "races", "of each, in turn", at_least=1)
    ours: str = setting("", "flags", "more of them for train_gpt.py, in one text")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    (text,), options = command(__doc__, argv, Options, (1, 1))
    try:
        with tempfile.TemporaryDirectory(prefix="race-") as name:
            prepare(Path(text).read_bytes(), options.nanogpt, Path(name))
            rows: dict[str, list[dict]] = {"nanogpt": [], "nano": []}
            for number in range(options.repeats):
                if options.nanogpt:
                    rows["nanogpt"].append(race_nanogpt(options.nanogpt.resolve()))
                    print("nanoGPT", rows["nanogpt"][-1], flush=True)
                rows["nano"].append(race_ours(Path(name), number, options.ours.split()))
                print("nano   ", rows["nano"][-1], flush=True)
    except (OSError, RaceError) as error:
        print(f"bench.race: {error}", file=sys.stderr)
        return 3
    result = dict(target=TARGET, recipe=RECIPE, ours=f"{OURS} {options.ours}".strip(), runs=rows)
    if options.nanogpt:
        ratios = [b["seconds_to_target"] / a["seconds_to_target"] for a, b in zip(rows["nanogpt"], rows["nano"])]
        result["ratio_of_seconds"] = dict(median=statistics.median(ratios), min=min(ratios), max=max(ratios))
        print(f"time to {TARGET}: {result['ratio_of_seconds']['median']:.3f} of nanoGPT's, pair by pair")
    print(write_result("race", result).relative_to(REPO))
    return 0


if __name__ == "__main__":
    sys.exit(main())
