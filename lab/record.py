"""Gather the results of series into one small JSON, next to the values aimed at; make lab/README.md from it.

    python -m lab.record mlp=lab/out/names-mlp:2.17 gpt=lab/out/names-gpt:1.93     # into lab/results/ladder.json
    python -m lab.record --page                                                    # the table in lab/README.md

Entries that are not named stay as they are.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.paths import write_text
from lab import LabError, cli
from lab.cli import setting
from lab.runlog import write_json


def gather(folder: Path, target: float | None) -> dict[str, Any]:
    """Losses of every run of a series, finished or not; `reached`: the best validation loss is at or below `target`."""
    runs = []
    for path in sorted((folder / "runs").glob("*.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        kept = ("run_name", "status", "final_loss", "best", "kept_by", "test_loss", "num_parameters", "train_time_s")
        kept += ("split", "overlap")
        runs.append({k: told.get(k) for k in kept} | {"config": told["config"], "code_hash": told["code_hash"]})
    if not runs:
        raise LabError(f"no run's JSON in {folder / 'runs'}; give the folder of a series")
    losses = [r["best"]["loss"] for r in runs if r["best"] and r["best"]["loss"] is not None]
    if not losses:
        raise LabError(f"no run in {folder / 'runs'} has a finite validation loss")
    best = min(losses)
    return {"target": target, "best_validation": best, "reached": target is None or best <= target, "runs": runs}


PAGE = Path(__file__).with_name("README.md")
LADDER = Path(__file__).with_name("results") / "ladder.json"


def table(results: dict[str, Any]) -> str:
    """Markdown of everything that was gathered: the run with the least validation loss of each series."""
    lines = [
        "| series | model | parameters | steps | best validation | at step | test | aim | reached |",
        "|-|-|-|-|-|-|-|-|-|",
    ]
    for name, told in results.items():
        scored = [r for r in told["runs"] if r["best"] and r["best"]["loss"] is not None]
        run = min(scored, key=lambda r: r["best"]["loss"])
        test = "" if run["test_loss"] is None else f"{run['test_loss']:.4f}"
        aim, reached = ("", "") if told["target"] is None else (told["target"], "yes" if told["reached"] else "**no**")
        config, best = run["config"], run["best"]
        lines.append(
            f"| {name} | {config['model']} | {config['num_parameters']:,} | {config['steps']:,} | {best['loss']:.4f} "
            f"| {best['step']:,} | {test} | {aim} | {reached} |"
        )
    return "\n".join(lines)


def replace_part(text: str, start: str, end: str, content: str) -> str:
    """`text` with what stands between its lines `start` and `end` replaced. LabError if it has no such place."""
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise LabError(f"{PAGE.name} has no part {start} ... {end}")
    return f"{before}{start}\n{content}\n{end}{after}"


def page(text: str, results: dict[str, Any]) -> str:
    """`text` with its generated table made anew. LabError if it has no place for one."""
    return replace_part(text, "<!-- generated: ladder -->", "<!-- end -->", table(results))


@dataclass(frozen=True)
class Gathering:
    """What is made of the results."""

    out: str = setting(str(LADDER), "file", "the JSON that is added to")
    page: bool = setting(False, "flag", "make the table in lab/README.md anew")


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    positional, asked = cli.command(__doc__, words, Gathering, (0, None))
    if not (positional or asked.page):
        print(__doc__)
        return 2
    out = Path(asked.out)
    results = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {}
    for word in positional:
        name, equals, rest = word.partition("=")
        folder, colon, target = rest.partition(":")
        if not equals or not (target.replace(".", "", 1).isdigit() or not colon):
            raise LabError(f"write name=FOLDER:TARGET (a loss) or name=FOLDER, not {word!r}")
        results[name] = gather(Path(folder), float(target) if target else None)
        r = results[name]
        wanted = "" if r["target"] is None else f", aim {r['target']}: {'reached' if r['reached'] else 'missed'}"
        print(f"{name}: {r['best_validation']:.4f}{wanted}")
    write_json(out, results)
    if asked.page:
        write_text(PAGE, page(PAGE.read_text(encoding="utf-8"), results))
        print(f"wrote {PAGE.name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
