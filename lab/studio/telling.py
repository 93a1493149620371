"""How a page's handlers tell what went wrong: in the words of the error, as a message on the page."""

from __future__ import annotations

import contextlib
import functools
import html
import inspect
from collections.abc import Callable, Iterator

import gradio as gr

from data.shards import ShardError
from lab import LabError
from lab.studio.jobs import QueueError
from lab.studio.places import Refused
from stats.errors import StatsError

EXPECTED = (Refused, QueueError, LabError, StatsError, ShardError, OSError)


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Errors that a user can do something about become messages on the page, in their own words."""
    try:
        yield
    except EXPECTED as error:
        raise gr.Error(html.escape(str(error)), duration=12, print_exception=False) from error


def told(handler: Callable) -> Callable:
    """`handler`, a function or a generator, within `telling`."""
    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def streamed(*arguments):
            with telling():
                yield from handler(*arguments)

        return streamed

    @functools.wraps(handler)
    def wrapped(*arguments):
        with telling():
            return handler(*arguments)

    return wrapped
