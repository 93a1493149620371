"""Exit codes of every verb, and the one kind of error that this package raises on purpose."""

from __future__ import annotations

import enum
from pathlib import Path


class Exit(enum.IntEnum):
    """What the process says to the shell, the same for every verb."""

    PASS = 0
    NOT_SIGNIFICANT = 1
    USAGE = 2
    INVALID_DATA = 3
    CONTINUE = 4


class StatsError(Exception):
    """Base of this package's errors: prints as `file:line: cause`, with as much of the place as is known."""

    exit_code = Exit.INVALID_DATA

    def __init__(self, cause: str, path: str | Path | None = None, line: int | None = None):
        self.cause, self.path, self.line = cause, None if path is None else str(path), line
        place = "" if path is None else f"{path}: " if line is None else f"{path}:{line}: "
        super().__init__(place + cause)


class DataError(StatsError):
    """The data cannot carry a verdict: unreadable, incomplete, mixed, not finite, too few."""


class NoReader(DataError):
    """A file of a known kind, and the library that reads it is not installed."""


class UsageError(StatsError):
    """The question makes no sense, whatever the data say (an alpha of 2, a target above the first loss)."""

    exit_code = Exit.USAGE


def check_alpha(alpha: float) -> None:
    """UsageError unless 0 < alpha <= 0.5."""
    if not 0 < alpha <= 0.5:
        raise UsageError(f"alpha must be above 0 and at most 0.5, not {alpha}")
