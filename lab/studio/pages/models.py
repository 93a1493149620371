"""Models: the checkpoints of the project; one of them opened, drawn and analysed."""

from __future__ import annotations

import gradio as gr

HEADERS = ["model", "folder", "step", "parameters", "size", "validation loss", "saved"]


def build(studio, page: gr.Blocks) -> None:
    """Lay the page out and say what its parts do."""
    from lab.studio.app import told

    table = gr.Dataframe(headers=HEADERS, label="Checkpoints (click one)", interactive=False, wrap=True, elem_id="checkpoints")
    with gr.Row(equal_height=True):
        path = gr.Dropdown([], label="Open", allow_custom_value=True, elem_id="path", scale=4, min_width=280)
        again = gr.Button("Refresh", elem_id="refresh", scale=1, min_width=100)
    about = gr.Markdown(elem_id="facts")

    def refresh():
        found = studio.catalogue.checkpoints()
        return [studio.catalogue.row(one) for one in found], gr.update(choices=[studio.places.shown(o.path) for o in found])

    page.load(told(refresh), None, [table, path])
    again.click(told(refresh), None, [table, path])
