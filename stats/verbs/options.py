"""What several verbs share: options, finding the series that are named, saying what was read, printing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

from stats.errors import DataError, UsageError

Result = TypeVar("Result")


class Verb(NamedTuple):
    """One verb: its name, its help (the first line is its summary), and what adds its options."""

    name: str
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]


# ----------------------------------------------------------------------------------------------------
# Options


def common(parser: argparse.ArgumentParser, handler: Callable) -> None:
    """--json, and what runs the verb."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(handler=handler)


def selection(parser: argparse.ArgumentParser) -> None:
    """Which runs count."""
    parser.add_argument("--stop-step", type=int, metavar="N", help="judge every run at its validation at step N")
    parser.add_argument(
        "--drop", action="append", default=[], metavar="RUN=REASON", help="leave a run out; the reason is printed"
    )
    parser.add_argument("--allow-mixed", action="store_true", help="runs of different configurations as one sample")


def grouping(parser: argparse.ArgumentParser) -> None:
    """--group-by."""
    parser.add_argument(
        "--group-by", choices=["code", "config", "hardware", "steps"], help="take apart a folder that mixes these"
    )


def question(parser: argparse.ArgumentParser) -> None:
    """Which runs count and against what, for verbs that judge."""
    parser.add_argument("--threshold", type=float, help="default: each series' own, else 2.92")
    selection(parser)
    grouping(parser)


def asked(options: argparse.Namespace, series: Iterable[Any]) -> dict:
    """The selection as keyword arguments of validate_each, leaderboard and make_report."""
    names = ("threshold", "stop_step", "allow_mixed")
    return {name: getattr(options, name, None) for name in names} | {"drop": drops(options, series)}


def drops(options: argparse.Namespace, series: Iterable[Any]) -> dict[str, str]:
    """{run: reason} of --drop. UsageError without a reason, DataError where no series has a run of that name."""
    found = {}
    for text in options.drop:
        run, _, reason = text.partition("=")
        if not run or not reason.strip():
            raise UsageError(f"--drop {text}: write RUN=REASON; a run is not dropped without a reason")
        found[run] = reason.strip()
    if found:
        from stats.samples import names_in

        known = [name for one in series for name in names_in(one)]
        if unknown := [run for run in found if run not in known]:
            shown = ", ".join(known[:4]) + (f" and {len(known) - 4} more" if len(known) > 4 else "")
            raise DataError(f"no run named {', '.join(map(repr, unknown))} to drop; there are {shown}")
    return found


def losses_on_command_line(words: Sequence[str]) -> tuple[list[float], int | None]:
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


# ----------------------------------------------------------------------------------------------------
# Reading


def find(options: argparse.Namespace, paths: Sequence[str]) -> list:
    """The series at `paths`, taken apart where --group-by says so; what was passed over is told."""
    from stats.series import find_series

    series = find_series(paths)
    note_reading(options, series)
    if by := getattr(options, "group_by", None):
        from stats.samples import split

        series = [part for one in series for part in split(one, by)]
    return series


def find_one(path: str, options: argparse.Namespace) -> Any:
    """The one series at `path`. DataError where several are."""
    series = find(options, [path])
    if len(series) > 1:
        names = ", ".join(one.name for one in series[:4])
        raise DataError(f"{len(series)} series here ({names}{', ...' * (len(series) > 4)}): name one of them", path)
    return series[0]


def note_reading(options: argparse.Namespace, series: list) -> None:
    """What this command has read goes into its JSON, or onto standard error where something was passed over."""
    from stats.series import reading_of

    options.sources = [*getattr(options, "sources", ()), *series]
    options.reading = reading_of(options.sources)
    if not options.json:
        _tell(reading_of(series))


def _tell(reading: Any) -> None:
    """One line on standard error, where something was passed over."""
    passed = reading.passed_over
    if passed:
        first = f"{passed[0].path} ({passed[0].reason})"
        more = f" and {len(passed) - 1} more (all of them with --json)" if len(passed) > 1 else ""
        print(f"read {reading.runs} runs in {reading.series} series; passed over {first}{more}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------
# Printing


def show(options: argparse.Namespace, result: Result, render: Callable[[Result], str]) -> None:
    """The result as text, or as JSON."""
    if options.json:
        print_json(result, getattr(options, "reading", None))
    else:
        print(render(result))


def print_json(value: object, reading: object = None) -> None:
    """The result, with `reading`: what was read and what was passed over."""
    from stats.jsonio import dumps, to_jsonable

    told = to_jsonable(value)
    print(dumps(told if reading is None else told | {"reading": reading}))
