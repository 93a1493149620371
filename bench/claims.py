"""docs/claims.md and its picture: from a folder of logs to a claim that holds, every number from files in records/.

python -m bench.claims            # runs the commands of the page on records/ and writes it
python -m bench.claims --check    # exit 1 if page or picture do not say what records/ says
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.common import REPO, read_result, up_to_date
from stats.cli import main as stats_main
from stats.compare import welch
from stats.judge import judge_sample
from stats.leaderboard import leaderboard
from stats.samples import Sample, sample_of
from stats.series import Series, load_series
from stats.svg import BLUE, INK, RED, Axis, Picture
from stats.ttest import TTest
from stats.validate import validate
from trainer.options import command, setting

PAGE, PICTURE = REPO / "docs" / "claims.md", REPO / "docs" / "claims.svg"
BASE, CANDIDATE = "records/nano", "records/nano-window"
ALPHA = 0.01
MARGIN = 0.01  # nats: a difference that is worth a claim at this size

TEXT = """# From a folder of logs to a claim that holds

Somebody changed a training recipe, ran it {candidate.n} times, and has a folder of logs. What may be said, and how does
a reader check it? Ten minutes, with two series of this repository: `{base_path}` is the recipe as it was,
`{candidate_path}` the one with the change. Every number on this page comes out of their files: `python -m bench.claims`
runs the commands below and writes the page.

![Every final loss of both series, means with their bounds, threshold](claims.svg)

## 1. What lies there

{import_}

A run counts if its last validation is at its planned step. A log that was cut off, a line that is missing or repeated,
runs of different programs or data in one folder: none of them is averaged, each is an error that names the file and
the line. Any folder of logs will do, also those of other programs ([what is read](../stats/README.md#what-is-read)).

## 2. Is the mean below the threshold?

{ttest}

One line decides: p is {p:.2g}, the level that the track asks for is {alpha:g}. The bound says as much in nats: as far
as {n} runs can tell, the recipe's mean is below {bound:.4f}. `std` with n and with n - 1 are both printed, since
records quote either. The lines on what would change the decision tell whether one unlucky run would have turned it.

The recipe as it was does not pass: its mean of {base.sample_mean:.4f} is below {base.threshold:g} as well, and its p of
{base.p_value:.2g} is above {alpha:g}. That is no proof that it is worse, and no proof that it misses the threshold.

## 3. Is it better than before?

{compare}

The direction, the size in nats and in standard deviations, and its interval: {estimate:+.4f} nats, with 95 % confidence
between {low:+.4f} and {high:+.4f}. And the price stands beside it: {time:+.1f} s a run. Passing a threshold where the
base does not would not have been enough: the difference of the two has to be tested, not their verdicts.

## 4. How many runs, and when may one look?

Before the first run of the next series, its design goes into a file, whose hash goes into every log. The base is the
pilot that says how much runs scatter and how long they take:

{plan}

Then one may look after every run. Had `{candidate_path}` been run so, it would have ended early:

{monitor}

(The note is right: these logs do not carry that plan. It was made for this page, after them.)
{peeking}
## 5. Would a stranger believe it?

{validate}

Grade {grade}: each line below A is what a reader has to take on trust. A plan made before the first run, and a ledger
whose lines hold together, as `./run.sh` writes it today, leave nothing of that kind; `python -m stats head SERIES`
prints the hash to publish before the series goes on, `validate --against` it proves later that nothing above was
changed. [What remains possible for a cheater](../stats/README.md#what-a-cheater-would-have-to-do) is written down.

## 6. The claim

> Over {n} runs of one configuration, none left out, the mean validation loss is {mean:.4f} (standard deviation
> {std:.4f}), below {threshold:g} with p = {p:.2g} (one-sided t-test). It is {lower:.4f} nats lower than that of the
> recipe before, {base.n} runs (95 % interval {low:+.4f} to {high:+.4f}), and takes {time:+.1f} s a run. Logs, ledger
> and program: `{candidate_path}`; evidence grade {grade}.

And the table for the pull request, from `python -m stats leaderboard records`:

{board}

What may not be said: that a large p shows that two recipes are the same (`compare --loss-margin` can show that, within
a margin), or that a series which stopped at its first p below 0.01 has passed at 0.01.
"""


def said(*words: str, most: int | None = None) -> str:
    """A command of `python -m stats` and what it prints, as a block; of long tables the first and the last lines."""
    out = io.StringIO()
    with _inside(REPO), contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        stats_main(list(words))
    lines = out.getvalue().rstrip().splitlines()
    if most is not None and len(lines) > most:
        lines = [*lines[: most - 1], "...", lines[-1]]
    shown = " ".join(f"'{word}'" if re.search(r"[\s,]", word) else _short(word) for word in words)
    return "```\n$ python -m stats " + shown + "\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """The paths of the page are relative to the repository."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _short(word: str) -> str:
    """A path outside the repository by its last part."""
    return Path(word).name if os.path.isabs(word) else word


def planned(base: str, candidate: str, threshold: float) -> tuple[str, str]:
    """(what `plan` prints with `base` as its pilot, what `monitor` prints of `candidate` under that plan)."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "plan.json")
        question = ["--threshold", f"{threshold:g}", "--margin", f"{MARGIN:g}", "--alpha", f"{ALPHA:g}"]
        plan = said("plan", "--sigma-from", base, *question, "--write", file)
        return plan, said("monitor", candidate, "--plan", file)


def peeking() -> str:
    """What looking without a plan does, from the file of false positives; a newline where that was not measured."""
    record = read_result("false-positives")
    rows = {row["verdict"]: row for row in record["result"]["rows"]} if record else {}
    naive = rows.get("no verdict: p < 0.01 after any of 2 to 40 runs")
    proper = rows.get("monitor, sequential-t, a look after every run")
    if not naive or not proper:
        return "\n"
    return (
        f"\nLooking at the t-test instead, after every run until it says p < 0.01, passes {naive['rate']:.1%} of the "
        f"recipes that lie\nexactly at the threshold ({naive['series']:,} simulated series of up to 40 runs); the "
        f"sequential test passes {proper['rate']:.1%}.\n"
    )


def judged(path: str) -> tuple[Series, Sample, TTest]:
    """A series of records/ with its t-test."""
    series = load_series(REPO / path)
    sample = sample_of(series)
    return series, sample, judge_sample(series, sample, alpha=ALPHA, sensitivity=False)


def page() -> str:
    """docs/claims.md."""
    (base_series, base_sample, base), (series, sample, test) = judged(BASE), judged(CANDIDATE)
    loss = welch(sample.losses, base_sample.losses, 0.05)
    time_s = welch(sample.times_s, base_sample.times_s, 0.05)
    assert loss is not None and time_s is not None
    plan, monitored = planned(BASE, CANDIDATE, test.threshold)
    return TEXT.format(
        base=base,
        candidate=test,
        base_path=BASE,
        candidate_path=CANDIDATE,
        alpha=ALPHA,
        n=test.n,
        p=test.p_value,
        bound=test.upper_conf_bound_mean,
        mean=test.sample_mean,
        std=test.sample_std,
        threshold=test.threshold,
        estimate=loss.estimate,
        lower=-loss.estimate,
        low=loss.low,
        high=loss.high,
        time=time_s.estimate,
        grade=validate(series, ALPHA).grade,
        import_=said("import", CANDIDATE, most=7),
        ttest=said("ttest", CANDIDATE, "--alpha", f"{ALPHA:g}"),
        compare=said("compare", BASE, CANDIDATE),
        plan=plan,
        monitor=monitored,
        peeking=peeking(),
        validate=said("validate", CANDIDATE),
        board=leaderboard([series, base_series], ALPHA).markdown.partition("\n\n")[0],
    )


def picture() -> str:
    """docs/claims.svg: a row a series."""
    rows = [judged(path) for path in (CANDIDATE, BASE)]
    shown = [loss for _, sample, _ in rows for loss in sample.losses] + [rows[0][2].threshold]
    pad = 0.05 * (max(shown) - min(shown))
    drawn = Picture(
        "Final losses of two recipes",
        Axis(min(shown) - pad, max(shown) + pad, "final validation loss (nats)"),
        Axis(-0.2, 2.2, hidden=True),
        width=680,
        height=260,
    )
    drawn.key(BLUE, f"runs, their mean, and its upper {1 - ALPHA:.0%} bound")
    drawn.key(RED, f"threshold {rows[0][2].threshold:g}")
    for height, (series, sample, test) in enumerate(rows):
        drawn.box((test.sample_mean, height + 0.05), (test.upper_conf_bound_mean, height + 0.75), BLUE, 0.15)
        points = [(loss, height + 0.1 + 0.6 * ((i * 0.618034) % 1)) for i, loss in enumerate(sample.losses)]
        drawn.dots(points, BLUE, opacity=0.7)
        drawn.line([(test.sample_mean, height + 0.02), (test.sample_mean, height + 0.78)], BLUE, 1.8)
        told = f"{series.name}: mean {test.sample_mean:.4f}, below {test.upper_conf_bound_mean:.4f} at {1 - ALPHA:.0%}"
        drawn.name((test.sample_mean, height + 0.84), told, INK)
    drawn.level(rows[0][2].threshold, RED, upright=True)
    return drawn.svg("final losses of two recipes, their means and the threshold") + "\n"


@dataclass(frozen=True)
class Options:
    """What is done with the page."""

    check: bool = setting(False, "flag", "write nothing; exit 1 if something is out of date")
    page: Path = setting(PAGE, "file", "the page")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    _, options = command(__doc__, argv, Options)
    made = {options.page: page(), PICTURE: picture()}
    if options.check:
        return max([up_to_date(file, text, "bench.claims") for file, text in made.items()])
    for file, text in made.items():
        file.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
