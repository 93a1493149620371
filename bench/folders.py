"""A fuzz of folders with a known truth: every dialect and layout that the statistics read, some of them with a fault.

    python -m bench.folders --folders 10000      # bench/results/folders-cpu.json

Each folder is made from a seed: one to three series, each in some dialect and layout, some of them with a fault. The
generator knows which losses a series has, or why it must be refused, and `python -m stats ttest FOLDER` has to say just
that: the right numbers, or a refusal with the right reason at the right place.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import shutil
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.dialects import LOGS, RULE, TABLES, Truth
from trainer.options import command, setting

RESULT = Path(__file__).parent / "results" / "folders-cpu.json"
THRESHOLD = "3.0"
TELLS_PLAN = [name for name in LOGS if name not in ("llm_c",)]  # dialects that say how many steps were planned


@dataclass(frozen=True)
class Expected:
    """What must come out of one series: the losses that count, or why there is no verdict."""

    place: str  # the start of the path that a refusal has to name
    losses: tuple[float, ...] = ()
    reason: str = ""


@dataclass(frozen=True)
class Case:
    """One folder as it was made."""

    arguments: tuple[str, ...]  # of `ttest`
    expected: tuple[Expected, ...]
    words: str  # dialects, layout and fault, for the table


# ----------------------------------------------------------------------------------------------------
# Runs


def cadence(rng: random.Random) -> tuple[int, ...]:
    """Validation steps in one of the ways that programs choose them."""
    kind = rng.choice(["regular", "remainder", "first", "widening", "uneven", "end"])
    if kind == "regular":
        return tuple(range(0, 41, 5))
    if kind == "remainder":
        return (*range(0, 40, 6), 40)
    if kind == "first":  # none at step 0
        return tuple(range(8, 41, 8))
    if kind == "widening":
        return (0, 5, 10, 20, 30, 40)
    if kind == "uneven":  # sets of steps laid over one another
        return (0, 10, 20, 25, 26, 28, 29, 30, 35, 40)
    return (40,)


def series_of(rng: random.Random, runs: int, steps: tuple[int, ...], **same) -> list[Truth]:
    """Runs of one recipe. No two end at one loss: that is a kind of its own (`equal`)."""
    center, found, finals = round(rng.uniform(2.9, 2.99), 3), [], set()
    for seed in range(runs):
        losses = [round(center + (steps[-1] - at) / 50 + rng.gauss(0, 0.003), 4) for at in steps]
        # a fourth digit that is never 0 survives every format
        losses = tuple(loss if round(loss * 1e4) % 10 else round(loss + 0.0003, 4) for loss in losses)
        while losses[-1] in finals:
            losses = (*losses[:-1], round(losses[-1] + 0.0011, 4))
            losses = (*losses[:-1], round(losses[-1] + 0.0001 * (round(losses[-1] * 1e4) % 10 == 0), 4))
        finals.add(losses[-1])
        found.append(Truth(f"r{rng.getrandbits(24):06x}", seed, steps, losses, steps[-1], rng.uniform(20, 30), **same))
    return found


# ----------------------------------------------------------------------------------------------------
# Faults of logs. Each takes the runs and their texts, changes one, and returns (place below the series, reason).

Texts = dict[str, str]


def _cut(rng: random.Random, runs: list[Truth], texts: Texts) -> tuple[str, str]:
    """The log ends before the last validation."""
    stem = rng.choice(list(texts))
    lines = texts[stem].splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if _is_validation(line))
    texts[stem] = "".join(lines[:last])
    return stem, r"truncated or unfinished run: its last validation is at step \d+ of 40 planned"


def _half_a_line(rng: random.Random, runs: list[Truth], texts: Texts) -> tuple[str, str]:
    """The last line was being written."""
    stem = rng.choice(list(texts))
    lines = texts[stem].splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if _is_validation(line))
    texts[stem] = "".join(lines[:last]) + lines[last][: rng.randint(1, 12)]
    return stem, r"truncated or unfinished run: its last validation is at step \d+ of 40 planned"


def _twice(rng: random.Random, runs: list[Truth], texts: Texts) -> tuple[str, str]:
    """A validation stands there a second time."""
    stem = rng.choice(list(texts))
    lines = texts[stem].splitlines(keepends=True)
    at = [i for i, line in enumerate(lines) if _is_validation(line)][-2]
    lines.insert(at, lines[at])
    texts[stem] = "".join(lines)
    return stem, r"a second validation for step \d+"


def _gone(rng: random.Random, runs: list[Truth], texts: Texts) -> tuple[str, str]:
    """A validation in the middle is gone."""
    stem = rng.choice(list(texts))
    lines = texts[stem].splitlines(keepends=True)
    at = rng.choice([i for i, line in enumerate(lines) if _is_validation(line)][2:-2])
    del lines[at]
    texts[stem] = "".join(lines)
    return stem, r"a validation is missing between steps \d+ and \d+"


def _flipped(rng: random.Random, runs: list[Truth], texts: Texts) -> tuple[str, str]:
    """A letter of a validation's line is another one."""
    stem = rng.choice(list(texts))
    lines = texts[stem].splitlines(keepends=True)
    at = [i for i, line in enumerate(lines) if _is_validation(line)][-2]
    lines[at] = lines[at].replace("step:", rng.choice(["stxp:", "step;", "sep:"]), 1)
    texts[stem] = "".join(lines)
    return stem, r"a broken result line"


def _nan(rng: random.Random, runs: list[Truth], texts: Texts) -> tuple[str, str]:
    """The last loss is not finite."""
    stem, truth = rng.choice(list(zip(texts, runs)))
    head, sign, tail = texts[stem].rpartition(f"val_loss:{truth.losses[-1]:.4f}")
    texts[stem] = head + "val_loss:nan" + tail if sign else re.sub(r"val_loss:\S+(?=[^\n]*\n?\Z)", "val_loss:nan", head)
    return stem, r"the final validation loss is nan: a run that diverged"


def _is_validation(line: str) -> bool:
    return bool(re.match(r"step:\d+/\d+ val_loss|s:\d+ tel:|step \d+: train loss|Step \d+ \| Validation", line))


STEP_DIALECTS = ["autumn_2024", "medium_2025", "seconds_2026", "own"]
# {fault: dialects it is made in}; those that need a middle take a regular cadence
FAULTS: dict[Callable, list[str]] = {
    _cut: TELLS_PLAN, _half_a_line: TELLS_PLAN, _twice: STEP_DIALECTS, _gone: STEP_DIALECTS, _flipped: STEP_DIALECTS,
    _nan: ["seconds_2026"],
}  # fmt: skip


def _mixed(rng: random.Random, runs: list[Truth]) -> tuple[str, list[Truth], str]:
    """(dialect, runs of which one is another recipe, reason)."""
    what = rng.choice(["steps", "program", "gpus", "cadence"])
    odd = runs[-1]
    if what == "steps":
        dialect, reason = rng.choice(TELLS_PLAN), "2 different planned steps"
        odd = replace(odd, planned=45, steps=(*odd.steps, 45), losses=(*odd.losses, odd.losses[-1] - 0.01))
    elif what == "program":
        dialect, reason = "seconds_2026", r"2 different programs .*lr = 0\.0[23]; \+ lr = 0\.0[23]"
        odd = replace(odd, rate=0.03)
    elif what == "gpus":
        dialect, reason = rng.choice(STEP_DIALECTS), "2 different world_size: [18] in .*, [18] in"
        odd = replace(odd, gpus=1)
    else:
        dialect, reason = rng.choice(TELLS_PLAN), "2 different sets of validation steps"
        odd = replace(odd, steps=(20, 40), losses=(odd.losses[-2], odd.losses[-1]))
    return dialect, [*runs[:-1], odd], reason


# ----------------------------------------------------------------------------------------------------
# Folders


def make(folder: Path, seed: int) -> Case:
    """The folder of one seed."""
    rng = random.Random(seed)
    if rng.random() < 0.25:
        return _table_case(folder, rng)
    expected, words, parts = [], [], rng.choice([1, 1, 2, 3])
    names = [rng.choice(["a", "b", "base", "record"]) for _ in range(parts)]
    for number, name in enumerate(names):
        # two series of one name stand in different folders
        home = folder if parts == 1 else folder / rng.choice(["", "deep/er"]) / f"p{number}" / name
        one, told = _log_series(home, rng)
        expected.append(one)
        words.append(told)
    if rng.random() < 0.5:
        words.append(_strays(folder, rng))
    return Case((str(folder),), tuple(expected), " + ".join(words))


def _strays(folder: Path, rng: random.Random) -> str:
    """What lies about in folders of logs."""
    (folder / "notes.txt").write_text("the second run was on the old machine\nloss went down nicely\n")
    (folder / "README.md").write_text("val_loss: see below\n")
    (folder / "plot.png").write_bytes(b"\x89PNG")
    (folder / "empty.log").write_text("")
    return "strays"


def _log_series(home: Path, rng: random.Random) -> tuple[Expected, str]:
    """One series of logs below `home`."""
    steps, runs = cadence(rng), rng.randint(2, 5)
    kind = rng.choice(["whole", "whole", "fault", "mixed", "alone", "equal", "one file"])
    dialect, reason, where = rng.choice(list(LOGS)), "", ""
    fault = None
    if kind == "fault":
        fault = rng.choice(list(FAULTS))
        dialect, steps = rng.choice(FAULTS[fault]), tuple(range(0, 41, 5))
    if dialect == "llm_c":  # tells its end only by a last validation off the cadence
        steps = (*range(0, 40, 6), 40)
    truths = series_of(rng, 1 if kind == "alone" else runs, steps)
    if kind == "alone" or (len(truths) == 1 and kind == "whole"):
        steps = steps if steps != (0, 10, 20, 25, 26, 28, 29, 30, 35, 40) else tuple(range(0, 41, 5))
        truths = series_of(rng, 1, steps)
        reason = "a t-test needs at least 2 losses; found 1"
    if kind == "equal":
        truths = [replace(t, losses=(*t.losses[:-1], truths[0].losses[-1])) for t in truths]
        reason = rf"no variance: all {runs} losses are"
    if kind == "mixed":
        truths = series_of(rng, runs + 1, tuple(range(0, 41, 5)))
        dialect, truths, reason = _mixed(rng, truths)
    texts = {t.stem: LOGS[dialect](t) for t in truths}
    if fault is not None:
        where, reason = fault(rng, truths, texts)
    layout = _place(home, rng, texts, one_file=kind == "one file" and dialect == "seconds_2026" and len(steps) > 1)
    losses = () if reason else tuple(t.losses[-1] for t in truths)
    place = where if where and layout != "a folder a run" else str(home)
    return Expected(place, losses, reason), f"{dialect}, {layout}, {fault.__name__[1:] if fault else kind}"


def _place(home: Path, rng: random.Random, texts: Texts, one_file: bool) -> str:
    """Writes the logs; returns the name of the layout."""
    ending = rng.choice([".txt", ".log", ".out", ".stdout"])
    layout = "one file" if one_file else rng.choice(["flat", "flat", "runs/", "twice", "a folder a run"])
    if layout == "one file":
        home.mkdir(parents=True, exist_ok=True)
        first, *more = texts.values()
        (home / f"all{ending}").write_text(first + "".join(text.rpartition(RULE)[2].lstrip() for text in more))
        return layout
    if len(texts) == 1 and layout == "a folder a run":
        layout = "flat"
    for number, (stem, text) in enumerate(texts.items()):
        folder = home / "runs" if layout == "runs/" else home / f"seed_{number}" if layout == "a folder a run" else home
        folder.mkdir(parents=True, exist_ok=True)
        name = "main" if layout == "a folder a run" else stem
        encoding = rng.choice(["utf-8", "utf-8", "utf-8-sig", "utf-16"])
        newline = rng.choice(["\n", "\n", "\r\n"])
        with open(folder / f"{name}{ending}", "w", encoding=encoding, newline=newline) as file:
            file.write(text)
        if layout == "twice":  # the console's output kept beside the log
            other = ".out" if ending != ".out" else ".txt"
            shutil.copy(folder / f"{name}{ending}", folder / f"{name}{other}")
    return layout


def _table_case(folder: Path, rng: random.Random) -> Case:
    """One table, named itself."""
    name = rng.choice(list(TABLES))
    truths = series_of(rng, rng.randint(3, 6), tuple(range(0, 41, 5)))
    kind, reason = rng.choice(["whole", "whole", "crashed", "a word", "two losses", "ragged"]), ""
    if kind == "crashed" and name == "wandb_runs":
        truths[1] = replace(truths[1], crashed=True)
    ending, text = TABLES[name](truths)
    if kind == "a word" and name in ("history_csv", "json_rows"):
        text = text.replace(f"{truths[1].losses[-1]}", "n/a" if ending == ".csv" else '"n/a"', 1)
        reason = "loss 'n/a' is not a number"
    elif kind == "two losses" and name == "history_csv":
        text = text.replace("seed,", "validation_loss,", 1)
        reason = "two columns for the loss, 'validation_loss' and 'val_loss'"
    elif kind == "ragged" and name in ("history_csv", "wandb_runs"):
        lines = text.splitlines()
        lines[2] += ",1"
        text, reason = "\n".join(lines) + "\n", r"\d cells under a header of \d"
    elif kind != "crashed":
        kind = "whole"
    path = folder / f"table{ending}"
    path.write_text(text, encoding=rng.choice(["utf-8", "utf-8-sig", "utf-16"]), newline="")
    losses = () if reason else tuple(t.losses[-1] for t in truths if not t.crashed)
    return Case((str(path),), (Expected(str(path), losses, reason),), f"{name}, named, {kind}")


# ----------------------------------------------------------------------------------------------------
# The judge of the judge


def wrong(case: Case) -> str:
    """What `ttest` says that is not the truth; empty if it is right."""
    from stats.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["ttest", *case.arguments, "--json", "--no-sensitivity", "--threshold", THRESHOLD])
    errors = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    told = json.loads(out.getvalue()) if out.getvalue().strip() else {"results": []}
    results = told["results"] if "results" in told else [told]
    good = Counter((len(e.losses), round(statistics.fmean(e.losses), 8)) for e in case.expected if not e.reason)
    found = Counter((one["n"], round(one["sample_mean"], 8)) for one in results)
    if found != good:
        return f"verdicts on {dict(found)}, not on {dict(good)}; {errors}"
    refused = [e for e in case.expected if e.reason]
    for one in refused:
        mine = [error for error in errors if one.place in error]
        if not any(re.search(one.reason, error) for error in mine):
            return f"no refusal of {one.place} for {one.reason!r}: {errors}"
    if len(errors) != len(refused):
        return f"{len(errors)} refusals, {len(refused)} were due: {errors}"
    return "" if (code == 3) == bool(refused) else f"exit code {code}"


def fuzz(folders: int, first: int = 0) -> tuple[Counter, list[str]]:
    """(how many folders of each kind, what was wrong) over `folders` seeds."""
    kinds, found = Counter(), []
    with tempfile.TemporaryDirectory() as work:
        for seed in range(first, first + folders):
            folder = Path(work) / "f"
            folder.mkdir()
            case = make(folder, seed)
            kinds[case.words if case.words.count("+") == 0 else "several series"] += 1
            if text := wrong(case):
                found.append(f"seed {seed} ({case.words}): {text}")
            shutil.rmtree(folder)
    return kinds, found


@dataclass(frozen=True)
class Options:
    """How many folders are tried."""

    folders: int = setting(10_000, "folders", "tried", at_least=1)
    first: int = setting(0, "seed", "of the first folder", at_least=0)
    out: Path = setting(RESULT, "file", "for the result")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the fuzz, writes its result; exit code 1 if anything was wrong."""
    _, options = command(__doc__, arguments, Options)
    start = time.process_time()
    kinds, found = fuzz(options.folders, options.first)
    result = {
        "folders": options.folders,
        "first_seed": options.first,
        "wrong": found,
        "kinds": len(kinds),
        "cpu_seconds": round(time.process_time() - start, 1),
        "folders_of_a_kind": dict(kinds.most_common()),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{options.folders} folders of {len(kinds)} kinds, {len(found)} wrong")
    print("\n".join(found[:20]))
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
