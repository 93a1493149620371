"""The page as a whole: its look, its four parts, and what they share."""

from __future__ import annotations

import contextlib
import functools
import html
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path

import gradio as gr

from data.shards import ShardError
from lab import LabError
from lab.studio.analyses import Microscope
from lab.studio.catalogue import Catalogue, Models
from lab.studio.jobs import Queue, QueueError
from lab.studio.places import Places, Refused
from lab.studio.samples import Samples
from stats.errors import StatsError

STYLE = Path(__file__).with_name("style.css")
EXPECTED = (Refused, QueueError, LabError, StatsError, ShardError, OSError)


class Studio:
    """What the pages share: places, queue, lists, and the models in memory."""

    def __init__(self, places: Places):
        self.places = places
        self.queue = Queue(places.trainings)
        self.catalogue = Catalogue(places)
        self.models = Models(places)
        self.samples = Samples(self.models)
        self.microscope = Microscope(places, self.models)


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


def look() -> dict:
    """Launch options of the look: fonts that the machine has, nothing fetched."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono)
    return {"theme": theme, "css": STYLE.read_text(encoding="utf-8")}


def build(places: Places) -> gr.Blocks:
    """The studio's four pages as one Gradio app, not yet served."""
    from lab.studio.pages import models, series, train, write

    studio = Studio(places)
    with gr.Blocks(title="Studio") as page:
        gr.Navbar(main_page_name="Models")
        models.build(studio, page)
    for name, part in (("Train", train), ("Write", write), ("Series", series)):
        with page.route(name, f"/{name.lower()}"):
            gr.Navbar(main_page_name="Models")
            part.build(studio, page)
    page.queue(default_concurrency_limit=4)
    studio.queue.work()
    return page
