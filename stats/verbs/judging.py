"""Verbs that judge: ttest, compare, validate, leaderboard."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from stats.errors import Exit, StatsError, UsageError
from stats.verbs.options import (
    Verb,
    asked,
    common,
    drops,
    find,
    find_one,
    grouping,
    losses_on_command_line,
    print_json,
    question,
    selection,
    show,
)

# ----------------------------------------------------------------------------------------------------
# ttest

TTEST_HELP = """Is the mean validation loss below the threshold? One-sided one-sample t-test.

PATH is a folder of logs (or of series, each judged by itself), a log, a CSV, JSON or JSONL table, `-` for
standard input, or simply losses: `ttest 2.9195 2.9198 2.9206`."""


_TRACK = float("nan")  # --pooled-sigma without a number: the track's own


def ttest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folders, files, -, or losses")
    parser.add_argument("--threshold", type=float, help="default: what record.json says, else 2.92")
    parser.add_argument("--alpha", type=float, default=0.05, help="level of the test and its bound (default 0.05)")
    parser.add_argument(
        "--pooled-sigma",
        type=float,
        nargs="?",
        const=_TRACK,
        metavar="SIGMA",
        help="add the z-test with a standard deviation from elsewhere (no value: the medium track's, 0.0008)",
    )
    parser.add_argument("--no-sensitivity", action="store_true", help="leave out the bootstrap and the sign flips")
    parser.add_argument("--plot", metavar="FILE", help="draw the first series: every loss, mean, bound, threshold")
    selection(parser)
    grouping(parser)
    common(parser, _run_ttest)


def _run_ttest(options: argparse.Namespace) -> int:
    from stats.judge import TTests, judge_all
    from stats.ttest import POOLED_SIGMA, POOLED_SIGMA_DF, check_alpha, render, ttest

    check_alpha(options.alpha)
    settings = {"alpha": options.alpha, "sensitivity": not options.no_sensitivity}
    settings["pooled_sigma"] = options.pooled_sigma
    if options.pooled_sigma is _TRACK:
        settings |= {"pooled_sigma": POOLED_SIGMA, "pooled_sigma_df": POOLED_SIGMA_DF}
    losses, decimals = losses_on_command_line(options.paths)
    if losses:
        threshold = {} if options.threshold is None else {"threshold": options.threshold}
        every, series = TTests((ttest(losses, decimals=decimals, **threshold, **settings),), ()), []
    else:
        series = find(options, options.paths)
        every = judge_all(series, **asked(options, series), **settings)
    alone = len(every.results) == 1 and not every.errors
    if options.json:
        print_json(every.results[0] if alone else every, getattr(options, "reading", None))
    else:
        print("\n\n".join(map(render, every.results)))
    for error in every.errors:
        print(f"error: {error}", file=sys.stderr)
    if options.plot and every.results:
        _plot(every.results[0], losses, series, options)
    if every.errors:
        return Exit.INVALID_DATA
    return Exit.PASS if all(result.significant for result in every.results) else Exit.NOT_SIGNIFICANT


def _plot(result: Any, losses: Sequence[float], series: Sequence[Any], options: argparse.Namespace) -> None:
    """--plot: the first result as a picture."""
    from stats.figures import draw_test

    draw_test(result, losses or _losses_of(result, series, options), options.plot)


def _losses_of(result: Any, series: Sequence[Any], options: argparse.Namespace) -> Sequence[float]:
    """The losses of the series that a result is about: of its name, which another may have too, and with its sample."""
    from stats.samples import selected
    from stats.ttest import summarize

    for one in series:
        if one.name == result.series:
            try:
                losses = selected(one, **asked(options, series)).losses
            except StatsError:
                continue
            if losses and summarize(losses) == result.loss:
                return losses
    raise AssertionError(f"no series has the losses of {result.series}")


# ----------------------------------------------------------------------------------------------------
# compare

_COMPARE_HELP = """Do the losses and times of two recipes differ? The first PATH is the baseline.

Welch's t-test, paired tests by seed or host where runs pair up, and, with a margin, equivalence. Losses and times of
all candidates are one family, or with --by only the losses or only the times: the chance that exit code 0 is wrong is
at most alpha. Exit code 0: one of them differs, or was shown to be equivalent; 1: no evidence of a difference."""


def _compare_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("baseline", metavar="BASELINE", help="folder or file of the baseline's runs")
    parser.add_argument("candidates", nargs="+", metavar="CANDIDATE", help="folders or files, each one candidate")
    parser.add_argument("--alpha", type=float, default=0.05, help="level of tests and intervals (default 0.05)")
    parser.add_argument("--loss-margin", type=float, metavar="NATS", help="test equivalence of the losses within this")
    parser.add_argument("--time-margin", type=float, metavar="SECONDS", help="the same for the times")
    parser.add_argument(
        "--threshold", type=float, help="of the table's last column (default: the baseline's own, else 2.92)"
    )
    parser.add_argument(
        "--by", choices=["loss", "time", "both"], default="both", help="what is asked: losses, times or both (default)"
    )
    parser.add_argument("--correction", choices=["holm", "dunnett"], default="holm", help="over all that is asked")
    parser.add_argument(
        "--sequential",
        type=float,
        nargs=2,
        metavar=("MARGIN", "SIGMA"),
        help="stop when decided: ask after every pair whether the losses differ by MARGIN, runs scattering by SIGMA",
    )
    selection(parser)
    common(parser, _run_compare)


def _run_compare(options: argparse.Namespace) -> int:
    from stats.compare import QUESTIONS, compare, render
    from stats.samples import selected
    from stats.series import named_apart
    from stats.ttest import TRACK_THRESHOLD

    series = named_apart([find_one(path, options) for path in (options.baseline, *options.candidates)])
    dropped = drops(options, series)
    samples = [selected(one, None, options.stop_step, dropped, options.allow_mixed) for one in series]
    if options.sequential:
        return _run_compare_sequentially(samples, options)
    own = TRACK_THRESHOLD if series[0].threshold is None else series[0].threshold
    result = compare(
        samples[0],
        samples[1:],
        options.alpha,
        loss_margin=options.loss_margin,
        time_margin_s=options.time_margin,
        threshold=own if options.threshold is None else options.threshold,
        correction=options.correction,
        asked={"loss": ("loss",), "time": ("time_s",), "both": QUESTIONS}[options.by],
    )
    show(options, result, render)
    return Exit.PASS if result.found_something else Exit.NOT_SIGNIFICANT


def _run_compare_sequentially(samples: Sequence[Any], options: argparse.Namespace) -> int:
    from stats.compare import compare_sequentially

    if len(samples) != 2:
        raise UsageError("--sequential compares one candidate with the baseline")
    if options.by == "time":
        raise UsageError("--sequential asks about the losses: --by time says otherwise")
    baseline, candidate = samples
    margin, sigma = options.sequential
    result = compare_sequentially(baseline, candidate, margin, sigma, options.alpha)
    show(options, result, lambda one: one.words)
    return {"CONTINUE": Exit.CONTINUE, "FUTILE": Exit.NOT_SIGNIFICANT}.get(result.verdict, Exit.PASS)


# ----------------------------------------------------------------------------------------------------
# validate

_VALIDATE_HELP = """Does a record's evidence support its claim? A grade from A to F for each series, with reasons.

Exit code 0: every series has at least the grade --at-least (default C); 1: some have not; 3: nothing to grade."""


def _validate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="series' folders, or folders of them")
    parser.add_argument("--alpha", type=float, default=0.01, help="level of the claim (default 0.01)")
    parser.add_argument("--at-least", choices=list("ABCDF"), default="C", help="grade for exit code 0 (default C)")
    parser.add_argument("--against", metavar="HASH", help="a head of the ledger, or a commit, published before")
    question(parser)
    common(parser, _run_validate)


def _run_validate(options: argparse.Namespace) -> int:
    from stats.errors import check_alpha
    from stats.validate import GRADES, render, validate_each

    check_alpha(options.alpha)
    series = find(options, options.paths)
    result = validate_each(series, options.alpha, against=options.against, **asked(options, series))
    show(options, result, lambda all_: "\n\n".join(map(render, all_.assessments)))
    enough = all(GRADES.index(one.grade) <= GRADES.index(options.at_least) for one in result.assessments)
    return Exit.PASS if enough else Exit.NOT_SIGNIFICANT


# ----------------------------------------------------------------------------------------------------
# leaderboard

_LEADERBOARD_HELP = "All series of a folder: claim, evidence grade, and whether neighbours differ. Markdown."


def _leaderboard_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folders of series")
    parser.add_argument("--alpha", type=float, default=0.01, help="level of the claims (default 0.01)")
    question(parser)
    common(parser, _run_leaderboard)


def _run_leaderboard(options: argparse.Namespace) -> int:
    from stats.errors import check_alpha
    from stats.leaderboard import leaderboard

    check_alpha(options.alpha)
    series = find(options, options.paths)
    show(options, leaderboard(series, options.alpha, **asked(options, series)), lambda board: board.markdown)
    return Exit.PASS


VERBS = (
    Verb("ttest", TTEST_HELP, ttest_options),
    Verb("compare", _COMPARE_HELP, _compare_options),
    Verb("validate", _VALIDATE_HELP, _validate_options),
    Verb("leaderboard", _LEADERBOARD_HELP, _leaderboard_options),
)
