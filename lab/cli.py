"""What the lab's commands share: options by trainer/options.py, errors as one line and an exit code."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lab import LabError
from trainer.options import UsageError, check_limits, fields_text, fill, read_command, read_words, setting, wants_help

__all__ = ["checked", "command", "describe", "filled", "flags", "read", "run", "setting", "wants_help"]


def checked(options: Any) -> Any:
    """`options`, a dataclass of settings, itself; LabError for the first value outside of its field's range."""
    try:
        check_limits(options)
    except UsageError as error:
        raise LabError(str(error)) from None
    return options


def read(
    arguments: Sequence[str], *kinds: type, others: dict[str, str] | None = None
) -> tuple[list[str], dict[str, str]]:
    """(words, {field: text}) of a command line over the fields of `kinds`; LabError for an unknown field, unless
    `others` takes them (as in `read_words`)."""
    try:
        return read_words(kinds, arguments, {}, others=others)
    except UsageError as error:
        raise LabError(str(error)) from None


def flags(given: Mapping[str, Any]) -> list[str]:
    """A command line's words for {field: its value}."""
    return [f"--{name}={value}" for name, value in given.items()]


def filled(kind: type, given: dict[str, str]) -> Any:
    """An instance of the dataclass `kind` from texts, its ranges checked; LabError names the field at fault."""
    try:
        return checked(fill(kind, given))
    except UsageError as error:
        raise LabError(str(error)) from None


def describe(*kinds: type) -> str:
    """The fields of dataclasses as `--help` shows them, each under its docstring's first line."""
    parts = ([f"\n{(kind.__doc__ or kind.__name__).splitlines()[0]}", *fields_text(kind)] for kind in kinds)
    return "\n".join(line for lines in parts for line in lines)


def command(doc: str, arguments: Sequence[str], kind: type, words: tuple[int, int | None]) -> tuple[list[str], Any]:
    """(words, options) of a whole command line over one dataclass. With --help, or without any argument where words
    are needed, `doc` and the fields are printed and SystemExit raised.

    words: how few and how many are allowed (None: any number)."""
    try:
        return read_command(doc, arguments, kind, words)
    except UsageError as error:
        raise LabError(str(error)) from None


def run(main: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Call a command's `main` with its words; errors become one line on stderr and an exit code: 2 for
    input that the lab cannot use, 5 for input or output that failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(main(words) or 0)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 5
