"""Lines for whoever looks on: if nobody can read them any more (closed pipe, full disk behind standard output, lost
terminal), the work goes on without."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import TextIO


def tell(text: str) -> None:
    """Print a line of news. What counts is in files; that nobody reads this one is no error."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        mute(sys.stdout)


def flush_or_mute(stream: TextIO) -> None:
    """Write what a stream still holds; if nobody can read it, nowhere."""
    try:
        stream.flush()
    except (OSError, ValueError):
        mute(stream)


def mute(stream: TextIO) -> None:
    """Send what is still written to a broken stream nowhere, so that neither the run nor its exit fails for it."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def program(name: str, main: Callable[[], int]) -> int:
    """The exit code of a command whose work is what it prints: 5 if that cannot be written, which is told unless it is
    only that the reader has gone, as with `| head`."""
    try:
        code = main()
        sys.stdout.flush()
        return code
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"{name}: {error.strerror or error}", file=sys.stderr)
        return 5
    finally:
        flush_or_mute(sys.stdout)
