"""The command line of every verb. Only argparse is imported here; a verb loads what it needs when it runs.

Exit codes: 0 pass, 1 not significant, 2 usage, 3 invalid data, 4 continue (of a sequential test).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from stats.errors import Exit, StatsError, UsageError


def main(arguments: Sequence[str] | None = None, program: str = "python -m stats") -> int:
    """Runs one verb; returns the exit code."""
    parser = build_parser(program)
    try:
        options = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        return int(options.handler(options))
    except StatsError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # whoever read the output has left, as `| head` does
        return int(Exit.PASS)


def build_parser(program: str = "python -m stats") -> argparse.ArgumentParser:
    """All verbs and their options."""
    if program.endswith("stats.ttest"):  # one verb by itself: no verb to name
        parser = argparse.ArgumentParser(prog=program, description=_TTEST_HELP, formatter_class=_Formatter)
        # main() passes the verb's name first, for one way through the code.
        parser.add_argument("verb", choices=["ttest"], help=argparse.SUPPRESS)
        _ttest_options(parser)
        return parser
    parser = argparse.ArgumentParser(
        prog=program, description="From training logs to verdicts.", epilog=_EPILOG
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, text, add_options in _VERBS:
        verb = verbs.add_parser(name, help=text.split("\n")[0], description=text, formatter_class=_Formatter)
        add_options(verb)
    return parser


_Formatter = argparse.RawDescriptionHelpFormatter
_EPILOG = "exit codes: 0 pass, 1 not significant, 2 usage, 3 invalid data, 4 continue"

# ----------------------------------------------------------------------------------------------------
# Options that several verbs share


def _common(parser: argparse.ArgumentParser, handler: Callable) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(handler=handler)


def _selection(parser: argparse.ArgumentParser) -> None:
    """Which runs count."""
    parser.add_argument(
        "--stop-step", type=int, metavar="N", help="judge every run at its validation at step N"
    )
    parser.add_argument(
        "--drop",
        action="append",
        default=[],
        metavar="RUN=REASON",
        help="leave a run out; the reason is printed",
    )
    parser.add_argument(
        "--allow-mixed", action="store_true", help="runs of different configurations as one sample"
    )


def _drops(options: argparse.Namespace) -> dict[str, str]:
    drops = {}
    for text in options.drop:
        run, _, reason = text.partition("=")
        if not run or not reason.strip():
            raise UsageError(f"--drop {text}: write RUN=REASON; a run is not dropped without a reason")
        drops[run] = reason.strip()
    return drops


def _print_json(value: object) -> None:
    from stats.jsonio import dumps

    print(dumps(value))


# ----------------------------------------------------------------------------------------------------
# ttest

_TTEST_HELP = """Is the mean validation loss below the threshold? One-sided one-sample t-test.

PATH is a folder of logs (or of series, each judged by itself), a log, a CSV, JSON or JSONL table, `-` for
standard input, or simply losses: `ttest 2.9195 2.9198 2.9206`."""


def _ttest_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folders, files, -, or losses")
    parser.add_argument("--threshold", type=float, help="default: what record.json says, else 2.92")
    parser.add_argument(
        "--alpha", type=float, default=0.05, help="level of the test and its bound (default 0.05)"
    )
    parser.add_argument(
        "--pooled-sigma", type=float, nargs="?", const=-1.0, metavar="SIGMA",
        help="add the z-test with a standard deviation from elsewhere (no value: the medium track's, 0.0008)",
    )  # fmt: skip
    parser.add_argument(
        "--no-sensitivity", action="store_true", help="leave out the bootstrap and the sign flips"
    )
    _selection(parser)
    _common(parser, _run_ttest)


def _run_ttest(options: argparse.Namespace) -> int:
    from stats.ttest import POOLED_SIGMA, check_alpha, judge, judge_each, render, ttest

    check_alpha(options.alpha)
    sigma = POOLED_SIGMA if options.pooled_sigma == -1.0 else options.pooled_sigma
    settings = {"alpha": options.alpha, "pooled_sigma": sigma, "sensitivity": not options.no_sensitivity}
    losses, decimals = _losses_on_command_line(options.paths)
    if losses:
        threshold = {} if options.threshold is None else {"threshold": options.threshold}
        results, errors = [ttest(losses, decimals=decimals, **threshold, **settings)], ()
    else:
        from stats.series import find_series

        selection = (options.stop_step, _drops(options), options.allow_mixed)
        series = find_series(options.paths)
        if len(series) == 1:
            results, errors = [judge(series[0], options.threshold, *selection, **settings)], ()
        else:
            every = judge_each(series, options.threshold, *selection, **settings)
            results, errors = every.results, every.errors
    if options.json:
        _print_json(results[0] if len(results) == 1 and not errors else every)
    else:
        print("\n\n".join(map(render, results)))
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    if errors:
        return Exit.INVALID_DATA
    return Exit.PASS if all(result.significant for result in results) else Exit.NOT_SIGNIFICANT


def _losses_on_command_line(words: Sequence[str]) -> tuple[list[float], int | None]:
    """(losses, digits after the point) if every word is a number, else ([], None)."""
    try:
        losses = [float(word) for word in words]
    except ValueError:
        numbers = [word for word in words if word.replace(".", "", 1).isdigit()]
        if numbers and len(numbers) < len(words):
            odd = next(word for word in words if word not in numbers)
            raise UsageError(f"losses and paths together: {odd!r} is not a number") from None
        return [], None
    plain = all("e" not in word.lower() for word in words)
    return losses, max(len(word.partition(".")[2]) for word in words) if plain else None


_VERBS: tuple[tuple[str, str, Callable[[argparse.ArgumentParser], None]], ...] = (
    ("ttest", _TTEST_HELP, _ttest_options),
)
