"""The page as a whole: its look, its parts, and what they share."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from lab.studio.analyses import Microscope
from lab.studio.catalogue import Catalogue, Models
from lab.studio.jobs import Queue
from lab.studio.pages import blind, duel, models, series, train, write
from lab.studio.places import Places
from lab.studio.samples import Samples

PAGES = (("Train", train), ("Write", write), ("Duel", duel), ("Blind", blind), ("Series", series))
STYLE = Path(__file__).with_name("style.css")


class Studio:
    """What the pages share: places, queue, lists, and the models in memory."""

    def __init__(self, places: Places):
        self.places = places
        self.queue = Queue(places.trainings)
        self.catalogue = Catalogue(places)
        self.models = Models(places)
        self.samples = Samples(self.models)
        self.microscope = Microscope(places, self.models)


def look() -> dict:
    """Launch options of the look: fonts that the machine has, nothing fetched."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "DejaVu Sans", "sans-serif"]
    mono = ["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"]
    theme = gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=sans, font_mono=mono)
    quiet = {  # Gradio's own greys have a contrast of 2.6 to 1; these have 4.5 and more, in the light and in the dark
        name: shade
        for field in ("body_text_color_subdued", "block_info_text_color", "input_placeholder_color")
        for name, shade in ((field, "*neutral_600"), (f"{field}_dark", "*neutral_300"))
    }
    strong = {"button_primary_background_fill": "*primary_600", "button_primary_background_fill_hover": "*primary_700"}
    theme = theme.set(**quiet, **strong)
    return {"theme": theme, "css": STYLE.read_text(encoding="utf-8")}


def build(places: Places) -> gr.Blocks:
    """The studio's pages as one Gradio app, not yet served."""
    studio = Studio(places)
    with gr.Blocks(title="Studio") as page:
        gr.Navbar(main_page_name="Models")
        models.build(studio, page)
    for name, part in PAGES:
        with page.route(name, f"/{name.lower()}"):
            gr.Navbar(main_page_name="Models")
            part.build(studio, page)
    page.queue(default_concurrency_limit=4)
    studio.queue.work()
    return page
