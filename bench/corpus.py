"""All public logs at once: what the statistics cost on a corpus of their number and size, made from a seed.

    python -m bench.corpus            # bench/results/corpus-cpu.json and the paragraph in stats/README.md
    python -m bench.corpus --check    # exit 1 if the paragraph does not say what the file says

The logs of the public track are not in this repository. A corpus like them is: 1,572 logs in 160 folders, 260 MB, each
with the source of its program, in the dialects of 2024 to 2026; in every second folder each log's source has a run's
name and seed of its own, so that equal programs differ as texts. One folder is a copy of another, every loss and time
told a little otherwise. The commands run as whole processes, on a tenth of the corpus and on all of it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.common import REPO, read_result, up_to_date, with_part, write_result
from bench.dialects import Truth, autumn_2024, medium_2025, own, seconds_2026
from trainer.options import command, setting

NAME, PAGE = "corpus", REPO / "stats" / "README.md"
BEGIN, END = "<!-- corpus: made by python -m bench.corpus -->", "<!-- end of corpus -->"
LOGS, FOLDERS = 1572, 160
GOAL_S = 60.0  # of processor time, for the report on all of it
DIALECTS = (autumn_2024, medium_2025, seconds_2026, own)
PLANNED = (1600, 2030, 2700)
# {name in the result: words of the command after the folder}
COMMANDS = {"ttest": ("ttest", "--json"), "validate": ("validate", "--json"), "report": ("report",)}


@dataclass(frozen=True)
class Cost:
    """One command as a process."""

    cpu_s: float
    peak_mib: float
    exit_code: int


# ----------------------------------------------------------------------------------------------------
# The corpus


def make_corpus(root: Path, logs: int = LOGS, folders: int = FOLDERS, seed: int = 0) -> int:
    """Writes the corpus below `root`; returns its bytes. The last folder is the copy."""
    rng = random.Random(seed)
    program = (REPO / "train_gpt.py").read_text(encoding="utf-8")
    sizes = [2] * folders
    sizes[0] = 6  # what is copied
    sizes[-1] = 6
    while sum(sizes) < logs:
        sizes[rng.randrange(1, folders - 1)] += 1
    clocks = [248 + 4 * index / sum(sizes) for index in range(sum(sizes))]  # ms a step; no two runs have one clock
    rng.shuffle(clocks)
    total, first = 0, None
    for number, size in enumerate(sizes):
        dialect, planned = rng.choice(DIALECTS), rng.choice(PLANNED)
        runs = recipe(rng, [clocks.pop() for _ in range(size)], planned, number)
        if number == 0:
            first = dialect, runs
        elif number == folders - 1 and first:
            dialect, runs = first[0], [told_otherwise(rng, run) for run in first[1]]
        folder = root / f"{number:03d}-{dialect.__name__}"
        folder.mkdir(parents=True)
        for run in runs:
            own_text = f'run_id = "{run.stem}"\nseed = {run.seed}\n' if number % 2 else ""
            source = f"{program}\n{own_text}learning_rate = {0.02 + number * 1e-4:.4f}\n"
            total += (folder / f"{run.stem}.txt").write_text(source + dialect(run).lstrip("=\n"))
    return total


def recipe(rng: random.Random, clocks: Sequence[float], planned: int, number: int) -> list[Truth]:
    """Honest runs of one recipe, one a clock: noise between them that remembers, and grows smaller towards the end."""
    steps = (*range(0, planned, 125), planned)
    center, found = rng.uniform(2.914, 2.924), []
    for seed, step_ms in enumerate(clocks):
        noise, losses = rng.gauss(0, 1), []
        for step in steps:
            left = 1 - step / planned
            noise = 0.7 * noise + rng.gauss(0, 0.714)
            losses.append(round(center + 8 * left**3 + noise * (0.0008 + 0.02 * left), 5))
        stem = f"{number:03d}-{rng.getrandbits(48):012x}"
        found.append(Truth(stem, seed, steps, tuple(losses), planned, step_ms))
    return found


def told_otherwise(rng: random.Random, run: Truth) -> Truth:
    """The same run under a new name, its losses and times moved by less than runs differ."""
    losses = tuple(round(loss + rng.gauss(0, 2e-5), 5) for loss in run.losses)
    return replace(run, stem=f"{rng.getrandbits(48):012x}", losses=losses, step_ms=run.step_ms + 5)


# ----------------------------------------------------------------------------------------------------
# Measuring and telling


def cost_of(arguments: Sequence[str], out: Path) -> Cost:
    """Processor seconds (user and system) and peak memory of `python -m stats ...`, whose output goes to `out`."""
    with open(out, "wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "stats", *arguments], cwd=REPO, stdout=stream, stderr=subprocess.DEVNULL
        )
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return Cost(round(used.ru_utime + used.ru_stime, 2), round(used.ru_maxrss / 1024, 1), process.returncode)


def measured(logs: int, folders: int) -> dict:
    """Every command on a corpus of that size."""
    with tempfile.TemporaryDirectory() as work:
        corpus, out = Path(work) / "corpus", Path(work) / "out"
        size = make_corpus(corpus, logs, folders)
        found = {"logs": logs, "folders": folders, "bytes": size, "costs": {}}
        for name, (verb, *words) in COMMANDS.items():
            more = ["--html", str(Path(work) / "report.html")] if verb == "report" else words
            cost = cost_of([verb, str(corpus), *more], out)
            found["costs"][name] = {"cpu_s": cost.cpu_s, "peak_mib": cost.peak_mib, "exit_code": cost.exit_code}
            if verb == "validate":
                found["accused"] = accused(json.loads(out.read_text()))
        found["page_bytes"] = (Path(work) / "report.html").stat().st_size
    return found


def accused(told: dict) -> list[str]:
    """Series that `validate --json` calls copies."""
    checks = ("copied", "duplicates")
    return [one["series"] for one in told["assessments"] if any(f["check"] in checks for f in one["findings"])]


def paragraph(record: dict) -> str:
    """What stands in stats/README.md."""
    small, large = record["result"]["corpora"]
    lines = ["| command | logs | MB | processor time, s | peak memory, MiB |", "|-|-:|-:|-:|-:|"]
    for name in COMMANDS:
        for one in (small, large):
            cost = one["costs"][name]
            told = f"{one['logs']:,} | {one['bytes'] / 1e6:.0f} | {cost['cpu_s']:.1f} | {cost['peak_mib']:.0f}"
            lines.append(f"| {name}{' --html' if name == 'report' else ''} | {told} |")
    copies = len(large["accused"])
    lines.append(f"\nOf {large['folders']} folders {copies} {'is' if copies == 1 else 'are'} called a copy; one is.")
    return "\n".join(lines)


def page(record: dict, text: str) -> str:
    """stats/README.md with that paragraph."""
    return with_part(text, BEGIN, END, paragraph(record))


@dataclass(frozen=True)
class Options:
    """What is done with the paragraph."""

    check: bool = setting(False, "flag", "measure nothing; exit 1 if the paragraph is out of date")
    page: Path = setting(PAGE, "file", "with the paragraph")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 1 if the report took longer than the goal, or not just the copy was accused."""
    _, options = command(__doc__, arguments, Options)
    if not options.check:
        write_result(NAME, {"corpora": [measured(LOGS // 10, FOLDERS // 10), measured(LOGS, FOLDERS)]})
    record = read_result(NAME)
    if record is None:
        print("error: no result: run it without --check first", file=sys.stderr)
        return 2
    text = options.page.read_text(encoding="utf-8")
    if options.check:
        return up_to_date(options.page, page(record, text), "bench.corpus")
    options.page.write_text(page(record, text), encoding="utf-8")
    print(paragraph(record))
    large = record["result"]["corpora"][1]
    return int(large["costs"]["report"]["cpu_s"] > GOAL_S or len(large["accused"]) != 1)


if __name__ == "__main__":
    sys.exit(main())
