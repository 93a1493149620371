"""Gather the results of series into one small JSON, next to the values aimed at.

python -m lab.record --out=lab/results/ladder.json mlp=lab/out/names-mlp:2.17 gpt=lab/out/names-gpt:1.93
"""

import json
from pathlib import Path
from typing import Any

from lab import LabError, cli
from lab.runlog import write_json


def gather(folder: Path, target: float | None) -> dict[str, Any]:
    """Losses of every run of a series, finished or not; `reached`: the best validation loss is at or below `target`."""
    runs = []
    for path in sorted((folder / "runs").glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        kept = ("run_name", "status", "final_loss", "best", "test_loss", "num_parameters", "train_time_s", "split")
        runs.append({k: told.get(k) for k in kept} | {"config": told["config"], "code_hash": told["code_hash"]})
    if not runs:
        raise LabError(f"no run's JSON in {folder / 'runs'}; give the folder of a series")
    best = min(r["best"]["loss"] for r in runs if r["best"])
    return {"target": target, "best_validation": best, "reached": target is None or best <= target, "runs": runs}


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    positional, given = cli.split_arguments(words)
    if not positional or set(given) - {"out"}:
        print(__doc__)
        return 2
    results = {}
    for word in positional:
        name, equals, rest = word.partition("=")
        folder, _, target = rest.partition(":")
        if not equals:
            raise LabError(f"write name=FOLDER:TARGET, not {word!r}")
        results[name] = gather(Path(folder), cli.typed("target", float, target) if target else None)
    for name, r in results.items():
        wanted = "" if r["target"] is None else f", aim {r['target']}: {'reached' if r['reached'] else 'missed'}"
        print(f"{name}: {r['best_validation']:.4f}{wanted}")
    write_json(Path(given.get("out", "lab/results/ladder.json")), results)
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
