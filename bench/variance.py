"""What makes a small effect visible in fewer runs: validation tokens, means over validations, equal initial weights.

    python -m bench.variance [--seeds=8] [--steps=100]     -> bench/results/variance-<device>.json

Runs of nano on the embedded corpus, a base and two treatments: one of the same shapes as the base's (the learning
rate ends at a tenth), one that lacks a table of it. All runs see the same data in the same order; within a pair they
begin with the same weights, too, wherever shapes agree (trainer/draws.py). Pairs of different seeds share the data
alone. For each way of measuring a run's loss: the standard deviation between seeds, that of differences within pairs
and of differences between runs of different seeds. Losses, not times: a busy machine changes nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.common import REPO, table, write_result
from trainer.options import command, setting

TREATMENTS = {"the rate ends at a tenth": ["--lr_floor=0.1"], "no value embedding": ["--value_embeddings=0"]}
BASE = "base"
LAST = (1, 2, 4)  # validations, five steps apart, that an end point is the mean of
TOKENS = (8192, 16384, 65536)  # that the last checkpoint is validated on


def endpoints(flags: Sequence[str], seed: int, steps: int, folder: Path) -> dict[str, float]:
    """Train one run; {way of measuring its loss: nats}. Raises CalledProcessError."""
    trainer = [sys.executable, str(REPO / "train_gpt.py")]
    words = [f"--num_iterations={steps}", "--val_loss_every=5", "--warmup_steps=0", f"--seed={seed}", *flags]
    words += ["--preset=nano", "--device=cpu", f"--output_dir={folder}", "--run_name=run", "--overwrite"]
    subprocess.run([*trainer, *words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    points = json.loads((folder / "run.json").read_text())["validation"]
    curve = [point["loss"] for point in points]
    found = {f"mean of the last {n}": float(np.mean(curve[-n:])) for n in LAST}
    for tokens in TOKENS:
        words = ["evaluate", str(folder / "run"), f"--val_tokens={tokens}", "--device=cpu", "--json=-"]
        done = subprocess.run([*trainer, *words], check=True, capture_output=True, text=True)
        found[f"{tokens:,} tokens"] = float(json.loads(done.stdout)["loss"])
    return found


def rows_of(losses: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict]:
    """losses: {arm: [{way: nats} of each seed]} -> a row for each treatment and way."""
    rows = []
    for arm in losses:
        for way in losses[BASE][0] if arm != BASE else ():
            a, b = (np.array([run[way] for run in losses[name]]) for name in (BASE, arm))
            others = np.concatenate([np.roll(b, shift) - a for shift in range(1, len(a))])
            rows.append(
                {
                    "treatment": arm,
                    "loss": way,
                    "effect": round(float((b - a).mean()), 4),
                    "sd between seeds": round(float(a.std(ddof=1)), 4),
                    "sd within pairs": round(float((b - a).std(ddof=1)), 4),
                    "sd of other seeds": round(float(others.std()), 4),
                }
            )
    return rows


@dataclass(frozen=True)
class Options:
    """How much is run."""

    seeds: int = setting(8, "runs", "of each arm", at_least=2)
    steps: int = setting(100, "steps", "of a run", at_least=20)
    out: Path | None = setting(None, "folder", "of the result (bench/results)")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    _, options = command(__doc__, argv, Options)
    losses: dict[str, list[dict[str, float]]] = {arm: [] for arm in (BASE, *TREATMENTS)}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            for arm in losses:
                losses[arm].append(endpoints(TREATMENTS.get(arm, []), seed, options.steps, Path(folder)))
                print(f"{arm}, seed {seed}: {losses[arm][-1]}", flush=True)
    rows = rows_of(losses)
    told = dict(seeds=options.seeds, steps=options.steps, losses=losses, rows=rows)
    print(table(rows), write_result("variance", told, folder=options.out), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
