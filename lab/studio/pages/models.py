"""Models: the checkpoints of the project; one of them opened, drawn and analysed."""

from __future__ import annotations

import html
from urllib.parse import quote

import gradio as gr

from lab.studio.catalogue import steps_of

HEADERS = ["model", "series · run", "step", "parameters", "size", "validation loss", "saved"]


def build(studio, page: gr.Blocks) -> None:
    """Lay the page out and say what its parts do."""
    from lab.studio.app import told

    table = gr.Dataframe(headers=HEADERS, label="Checkpoints (click one to open it)", interactive=False, wrap=True,
                         max_height=320, elem_id="checkpoints")  # fmt: skip
    with gr.Row(equal_height=True):
        path = gr.Dropdown([], label="Checkpoint", allow_custom_value=True, elem_id="path", scale=4, min_width=260)
        again = gr.Button("Refresh the list", size="sm", elem_id="refresh", scale=1, min_width=120)
    facts = gr.HTML(elem_id="facts")

    def refresh():
        found = studio.catalogue.checkpoints()
        rows = [studio.catalogue.row(one) for one in found]
        return rows, gr.update(choices=[(studio.catalogue.label(one), studio.places.shown(one.path)) for one in found])

    @told
    def open_row(event: gr.SelectData):
        found = studio.catalogue.checkpoints()
        number = event.index[0]
        if number >= len(found):
            return gr.skip(), gr.skip()
        return opened(studio.places.shown(found[number].path))

    def opened(chosen):
        checkpoint = studio.models.load(chosen)
        steps = [(step_label(one), studio.places.shown(one)) for one in steps_of(checkpoint.path)]
        return gr.update(choices=steps, value=studio.places.shown(checkpoint.path)), facts_html(studio, checkpoint)

    page.load(told(refresh), None, [table, path])
    again.click(told(refresh), None, [table, path])
    table.select(open_row, None, [path, facts])
    path.input(told(opened), path, [path, facts])


def step_label(path) -> str:
    """'best', or the step in a checkpoint's name."""
    return "best by validation" if path.stem == "best" else f"step {int(path.stem.rpartition('-')[2]):,}"


def facts_html(studio, checkpoint) -> str:
    """What a checkpoint says of itself, and the way to talk to it."""
    told = {k: v for k, v in checkpoint.told.items() if k not in ("tokenizer", "fields") and v not in ("", None)}
    told |= checkpoint.told.get("fields", {})
    tokenizer = checkpoint.tokenizer
    lines = {
        "model": checkpoint.name, "step": f"{checkpoint.step:,}",
        "parameters": f"{checkpoint.model.num_parameters():,}",
        "vocabulary": f"{tokenizer.vocab_size:,} tokens ({tokenizer.kind})",
    }  # fmt: skip
    lines |= {k: v for k, v in told.items() if k not in lines and not str(k).endswith(("hash", "digest"))}
    items = "".join(f"<dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd>" for k, v in lines.items())
    link = quote(studio.places.shown(checkpoint.path))
    return f"<dl>{items}</dl><p><a href='write?checkpoint={link}'>Write with this model</a></p>"
