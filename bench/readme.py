"""Fill the generated parts of README.md from records/ and bench/results/, so that no figure is typed.

Results count as git has them, committed or staged (`git add bench/results` before this), not as they lie on disk.

python -m bench.readme           # rewrite them
python -m bench.readme --check   # exit 1 if README.md does not say what the files say
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from trainer.options import command, setting

REPO = Path(__file__).resolve().parent.parent
REPO_README = REPO / "README.md"
RESULTS = REPO / "bench" / "results"
#: What belongs on a GPU: the result's name, how to measure it.
ON_A_GPU = {
    "attention": "`python -m bench.attention`: against FlexAttention and others, ms and TFLOP/s",
    "cross_entropy": "`python -m bench.cross_entropy`: against eager, compiled and other fused losses",
    "mlp": "`python -m bench.mlp`",
    "muon": "`python -m bench.muon`",
    "step": "`python -m bench.step`: a whole step of `medium`, its parts against their floors",
    "gpu": "`python -m bench.gpu first`, `step`, `peers`, `choices`: all of it, four commands under ten minutes each",
}


def leaderboard() -> str:
    """All series of records/, as Markdown."""
    from stats.leaderboard import leaderboard as board
    from stats.series import find_series

    found = find_series([REPO / "records"])
    return board(found).markdown.strip() if found else "No series in records/ yet."


def published() -> dict[str, dict]:
    """File name -> result, for all in bench/results/ that git has committed or staged, as they are there: a user's own
    measurements, which replace or join them on disk, do not change the README. Without git, all files."""
    folder = RESULTS.relative_to(REPO).as_posix()
    listed = subprocess.run(["git", "ls-files", "-s", folder], cwd=REPO, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        return {path.name: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    blobs = {Path(line.split("\t")[1]).name: line.split()[1] for line in listed.stdout.splitlines()}
    names = sorted(name for name in blobs if name.endswith(".json"))
    asked = "\n".join(blobs[name] for name in names)
    told = subprocess.run(["git", "cat-file", "--batch"], cwd=REPO, capture_output=True, input=asked.encode()).stdout
    found = {}
    for name in names:  # each: "<hash> blob <bytes>\n<content>\n"
        head, _, told = told.partition(b"\n")
        size = int(head.split()[2])
        found[name], told = json.loads(told[:size]), told[size + 1 :]
    return found


def _results(name: str) -> list[dict]:
    return [result for file, result in published().items() if file.startswith(f"{name}-")]


def _machine(result: dict) -> str:
    """The device that a result was measured on."""
    environment = result.get("environment", {})
    gpus = environment.get("gpus") or []
    return gpus[0]["name"] if gpus else f"{environment.get('cpu', 'CPU')}, {environment.get('cores', '?')} cores"


def measured() -> str:
    """A table: what, on which machine, when; and what has not been run on a GPU."""
    lines = ["| what | measured on | date |", "|-|-|-|"]
    on_gpu = set()
    for file, result in published().items():
        if "environment" not in result:
            continue
        name = file.rsplit("-", 1)[0] if "-" in file else file.removesuffix(".json")
        if result["environment"].get("gpus"):
            on_gpu.add(result.get("name", name))
        link = (RESULTS / file).relative_to(REPO)
        lines.append(f"| [{result.get('name', name)}]({link}) | {_machine(result)} | {result.get('date', '')[:10]} |")
    for name, how in ON_A_GPU.items():
        if name not in on_gpu:
            lines.append(f"| {how} | **not yet measured on a GPU** | |")
    lines.append("| the `medium` preset trained to its end, 19 times | **not yet measured** | |")
    return "\n".join(lines)


def _spread(values: list[float], style: str) -> str:
    """Median, and where there are several the least and the greatest."""
    median = format(statistics.median(values), style)
    return f"{median} ({min(values):{style}} to {max(values):{style}})" if len(values) > 1 else median


def race() -> str:
    """The race of `bench.race`, median over its repeats."""
    from bench.race import OURS

    results = _results("race")
    if not results:
        return "Not measured yet: `python -m bench.race`."
    told = results[-1].get("result", results[-1])
    columns = "| | seconds to the target, whole process | training steps alone, s | final loss, nats a character | n |"
    lines = [columns, "|-|-|-|-|-|"]
    names = {"nanogpt": "nanoGPT, published CPU recipe", "nano": "ours"}
    for key, name in names.items():
        rows = told["runs"][key]
        if rows:
            lines.append(
                f"| {name} | {_spread([row['seconds_to_target'] for row in rows], '.1f')} "
                f"| {statistics.median(row['train_seconds'] for row in rows):.1f} "
                f"| {statistics.median(row['final_loss'] for row in rows):.4f} | {len(rows)} |"
            )
    ratio = told.get("ratio_of_seconds")
    if ratio:
        pairs = [
            a["seconds_to_target"] / b["seconds_to_target"]
            for a, b in zip(told["runs"]["nano"], told["runs"]["nanogpt"])
        ]
        how = "pair by pair" if len(pairs) > 1 else "of a single pair: no range yet"
        lines.append(
            f"\nOn the same 90/10 split of Shakespeare, to {told['target']} nats per character, taking turns on the "
            f"same two cores: {_spread(pairs, '.2f')} of nanoGPT's time, {how}. nanoGPT ends above the target, so its "
            "time is that of its whole run."
        )
    if told.get("ours") != OURS:
        lines.append(f"\nOur run was `{told.get('ours')}`, of the presets of {results[-1].get('date', '')[:10]}. ")
        lines[-1] += f"Today's is `{OURS}`: **not yet measured**."
    return "\n".join(lines)


def cards() -> str:
    """What fits on which card, counted by bench.rehearse.cards."""
    from bench.rehearse.cards import table_of

    counted = published().get("rehearsal-cards.json")
    return table_of(counted["result"]) if counted else "Not counted yet: `python -m bench.rehearse.cards`."


PARTS = {"leaderboard": leaderboard, "measured": measured, "race": race, "cards": cards}


def filled(text: str) -> str:
    """`text` with every generated part made anew."""
    for name, make in PARTS.items():
        pattern = rf"<!-- generated: {name} -->\n.*?<!-- end -->"
        part = f"<!-- generated: {name} -->\n{make()}\n<!-- end -->"
        text, count = re.subn(pattern, lambda _, part=part: part, text, count=1, flags=re.DOTALL)
        if not count:
            raise ValueError(f"README.md has no part <!-- generated: {name} --> ... <!-- end -->")
    return text


@dataclass(frozen=True)
class Options:
    """What is done with the file."""

    check: bool = setting(False, "flag", "write nothing; exit 1 if README.md is out of date")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    _, options = command(__doc__, argv, Options)
    old = REPO_README.read_text(encoding="utf-8")
    new = filled(old)
    if options.check:
        print("README.md is " + ("up to date" if new == old else "out of date: python -m bench.readme"))
        return int(new != old)
    REPO_README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
