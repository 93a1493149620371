"""How often does each verdict claim what is not so? Series without an effect, judged by the code that judges real ones.

    python -m bench.false_positives            # bench/results/false-positives-cpu.json and the table in stats/README.md
    python -m bench.false_positives --only=copies   # only such rows, and those that are not in the file yet
    python -m bench.false_positives --check    # exit 1 if the table does not say what the file says

Every rate comes with the exact 95 % interval of a binomial share (Clopper and Pearson 1934). Two rows are no verdicts
of this program: they show what somebody gets who looks after every run with a test that does not allow for it.
"""

from __future__ import annotations

import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy

from bench.common import REPO, read_result, up_to_date, with_part, write_result
from stats.chance import nearest_pairs
from stats.compare import compare, compare_sequentially
from stats.plans import Plan, make_plan
from stats.samples import Sample
from stats.sequential import simulate
from stats.ttest import ttest
from stats.values import Run, Validation
from trainer.options import command, setting

NAME, PAGE = "false-positives", REPO / "stats" / "README.md"
BEGIN, END = "<!-- false positives: made by python -m bench.false_positives -->", "<!-- end of false positives -->"
THRESHOLD, SIGMA = 2.92, 0.0008  # of the track
CAP = 40


@dataclass(frozen=True)
class Row:
    """One verdict: `count(rng, n)` gives how many of n series without an effect it passes."""

    verdict: str
    promised: float | None  # the most that it may pass; None: no promise is made
    series: int
    count: Callable[[np.random.Generator, int], int]


# ----------------------------------------------------------------------------------------------------
# Series without an effect


def losses(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Final losses of a recipe that lies exactly at the threshold."""
    return THRESHOLD + SIGMA * rng.standard_normal(shape)


def sample(name: str, losses: Sequence[float], times: Sequence[float] | None = None) -> Sample:
    """What the readers make of a folder of such runs; its seeds count from 0."""
    points = [
        Validation(1000, float(loss), None if times is None else float(times[i]), None, 6, 1)
        for i, loss in enumerate(losses)
    ]
    runs = [
        Run(f"{name}/{seed}.txt", f"{name}-{seed}", "steps", 1, 1000, 1000, 0, (point,), seed=seed)
        for seed, point in enumerate(points)
    ]
    return Sample(name, tuple(runs), tuple(points))


# ----------------------------------------------------------------------------------------------------
# Verdicts


def by_ttest(runs: int, level: str, decimals: int | None = None) -> Callable:
    """`ttest` on a number of runs that was fixed beforehand."""

    def count(rng: np.random.Generator, n: int) -> int:
        x = losses(rng, n, runs)
        x = x if decimals is None else np.round(x, decimals)
        kept = x[np.ptp(x, axis=1) > 0]  # all alike: refused, not passed
        return sum(ttest(row, THRESHOLD, float(level), sensitivity=False).decisions[level] for row in kept)

    return count


def by_peeking(level: float, first: int) -> Callable:
    """p of the t-test below `level` after any run from `first` to CAP: what nobody may do."""

    def count(rng: np.random.Generator, n: int) -> int:
        x = losses(rng, n, CAP) - THRESHOLD
        k = np.arange(1, CAP + 1)
        mean = x.cumsum(axis=1) / k
        variance = ((x * x).cumsum(axis=1) - k * mean**2)[:, first - 1 :] / (k - 1)[first - 1 :]
        t = mean[:, first - 1 :] / np.sqrt(variance / k[first - 1 :])
        return int((scipy.special.stdtr(k[first - 1 :] - 1, t) < level).any(axis=1).sum())

    return count


def by_monitor(plan: Plan) -> Callable:
    """ACCEPT at any look of the plan."""

    def count(rng: np.random.Generator, n: int) -> int:
        return round(simulate(plan, plan.threshold, n, seed=int(rng.integers(2**31))).accepted * n)

    return count


def by_compare(sizes: tuple[int, ...], what: str, spread: float = 1.0, **settings) -> Callable:
    """`compare` of recipes that do not differ: a difference of `what` in any of them."""

    def count(rng: np.random.Generator, n: int) -> int:
        found = 0
        for _ in range(n):
            sides = []
            for index, size in enumerate(sizes):
                scale = spread if index else 1.0
                x = THRESHOLD + scale * SIGMA * rng.standard_normal(size)
                sides.append(sample(f"s{index}", x, 1400 + rng.standard_normal(size)))
            result = compare(sides[0], sides[1:], 0.05, **settings)
            one = result.comparisons[0]
            found += {
                "exit code 0": result.found_something,
                "pairs": one.paired_loss is not None and one.paired_loss.p_value < 0.05,
                "equivalent": one.loss_equivalence is not None and one.loss_equivalence.equivalent,
            }[what]
        return found

    return count


def at_the_margin(size: int, margin: float) -> Callable:
    """Equivalence within a margin, claimed of recipes that differ by just that margin."""

    def count(rng: np.random.Generator, n: int) -> int:
        found = 0
        for _ in range(n):
            sides = [sample("a", losses(rng, size)), sample("b", losses(rng, size) + margin)]
            equivalence = compare(sides[0], sides[1:], 0.05, loss_margin=margin).comparisons[0].loss_equivalence
            found += equivalence is not None and equivalence.equivalent
        return found

    return count


def by_sequential_comparison(margin: float) -> Callable:
    """LOWER or HIGHER after any pair."""

    def count(rng: np.random.Generator, n: int) -> int:
        found = 0
        for _ in range(n):
            sides = [sample(name, losses(rng, CAP)) for name in "ab"]
            found += compare_sequentially(*sides, margin, SIGMA, 0.05).verdict in ("LOWER", "HIGHER")
        return found

    return count


def accused_of_copies(rng: np.random.Generator, n: int) -> int:
    """Honest series whose curves are called copies: 3 to 40 runs, 4 to 60 validations, noise of any memory."""
    found = 0
    for _ in range(n):
        runs, points = int(rng.integers(3, 41)), int(rng.integers(4, 61))
        noise, memory = rng.standard_normal((runs, points)), float(rng.choice([0, 0.5, 0.9, 0.99]))
        for step in range(1, points):
            noise[:, step] = memory * noise[:, step - 1] + np.sqrt(1 - memory**2) * noise[:, step]
        x = np.round(3 + np.linspace(2, 0, points) + noise * np.linspace(0.02, SIGMA, points), 4)
        looks = [way for part in (x, x[:, : points // 2]) for way in (part, np.diff(part))]
        found += any(nearest_pairs(look, len(looks), 1e-4) for look in looks)
    return found


def rows() -> list[Row]:
    """Every verdict, in the order of the table."""
    plan = {"margin": 0.0006, "sigma": SIGMA, "alpha": 0.01, "cap": CAP}
    found = [
        Row(f"ttest, {n} runs, alpha {a}", float(a), 2000, by_ttest(n, a)) for n in (3, 5, 20) for a in ("0.05", "0.01")
    ]
    found += [
        Row("ttest, 10 runs, losses rounded to 3 digits, alpha 0.05", 0.05, 2000, by_ttest(10, "0.05", 3)),
        Row("no verdict: p < 0.01 after any of 2 to 40 runs", None, 100_000, by_peeking(0.01, 2)),
        Row("no verdict: p < 0.05 after any of 2 to 40 runs", None, 100_000, by_peeking(0.05, 2)),
        Row("monitor, sequential-t, a look after every run", 0.01, 100_000, by_monitor(make_plan(**plan))),
        Row(
            "monitor, sequential-t with Wald's bounds, a look after every run",
            0.01 / 0.89,
            100_000,
            by_monitor(make_plan(**plan, bounds="wald")),
        ),
        Row(
            "monitor, group-sequential, four looks",
            0.01,
            100_000,
            by_monitor(make_plan(**plan, method="group-sequential")),
        ),
        Row("monitor, fixed, one look", 0.01, 100_000, by_monitor(make_plan(**plan, method="fixed"))),
        Row("compare --by loss, 5 and 5 runs", 0.05, 1000, by_compare((5, 5), "exit code 0", asked=["loss"])),
        Row(
            "compare --by loss, 5 and 20 runs, spreads 3 to 1",
            0.05,
            1000,
            by_compare((20, 5), "exit code 0", 3.0, asked=["loss"]),
        ),
        Row("compare, losses of pairs by seed, 8 pairs", 0.05, 1000, by_compare((8, 8), "pairs")),
        Row("compare, exit code 0: a loss or a time", 0.05, 1000, by_compare((8, 8), "exit code 0")),
        Row("compare, exit code 0, three candidates", 0.05, 1000, by_compare((8, 8, 8, 8), "exit code 0")),
        Row("compare, three candidates, Holm", 0.05, 1000, by_compare((8, 8, 8, 8), "exit code 0", asked=["loss"])),
        Row(
            "compare, three candidates, Dunnett",
            0.05,
            1000,
            by_compare((8, 8, 8, 8), "exit code 0", asked=["loss"], correction="dunnett"),
        ),
        Row("compare, equivalence at its very margin", 0.05, 1000, at_the_margin(8, SIGMA)),
        Row("compare --sequential, a look after every pair", 0.05, 500, by_sequential_comparison(0.001)),
        Row("validate, honest runs called copies", 0.0, 1000, accused_of_copies),
    ]
    return found


# ----------------------------------------------------------------------------------------------------
# Measuring and telling


def interval(count: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's exact interval of a share."""
    tail = (1 - level) / 2
    low = 0.0 if count == 0 else float(scipy.stats.beta.ppf(tail, count, n - count + 1))
    high = 1.0 if count == n else float(scipy.stats.beta.isf(tail, count + 1, n - count))
    return low, high


def measured(row: Row) -> dict:
    """One row as it is kept. Its random numbers depend on its name alone, and not on the other rows."""
    start = time.process_time()
    count = row.count(np.random.default_rng(zlib.crc32(row.verdict.encode())), row.series)
    low, high = interval(count, row.series)
    return {
        "verdict": row.verdict,
        "promised": row.promised,
        "series": row.series,
        "false": count,
        "rate": count / row.series,
        "low": low,
        "high": high,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def table(record: dict) -> str:
    """The kept rows, in Markdown."""
    lines = ["| verdict | promised | series | false | rate | 95 % interval |", "|-|-:|-:|-:|-:|-:|"]
    for row in record["result"]["rows"]:
        promised = "nothing" if row["promised"] is None else f"{row['promised']:.2%}"
        told = f"{row['series']:,} | {row['false']:,} | {row['rate']:.2%} | {row['low']:.2%} to {row['high']:.2%}"
        lines.append(f"| {row['verdict']} | {promised} | {told} |")
    return "\n".join(lines)


def page(record: dict, text: str) -> str:
    """stats/README.md with the table of these rows."""
    return with_part(text, BEGIN, END, table(record))


@dataclass(frozen=True)
class Options:
    """What is done with the table."""

    check: bool = setting(False, "flag", "measure nothing; exit 1 if the table is out of date")
    only: str = setting("", "text", "measure the rows whose verdict has this in it, and those that the file lacks")
    page: Path = setting(PAGE, "file", "with the table")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    _, options = command(__doc__, arguments, Options)
    if not options.check:
        kept = {one["verdict"]: one for one in (read_result(NAME) or {"result": {"rows": []}})["result"]["rows"]}
        found = [
            measured(row) if options.only in row.verdict or row.verdict not in kept else kept[row.verdict]
            for row in rows()
        ]
        write_result(NAME, {"rows": found})
    record = read_result(NAME)
    if record is None:
        print("error: no result: run it without --check first", file=sys.stderr)
        return 2
    text = options.page.read_text(encoding="utf-8")
    if options.check:
        return up_to_date(options.page, page(record, text), "bench.false_positives")
    options.page.write_text(page(record, text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
