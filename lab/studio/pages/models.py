"""Models: the checkpoints of the project; one of them opened, drawn and analysed."""

from __future__ import annotations

import html
from urllib.parse import quote

import gradio as gr

from lab.studio.analyses import ANALYSES, step_label
from lab.studio.catalogue import steps_of
from lab.studio.telling import told

HEADERS = ["model", "series · run", "step", "parameters", "size", "validation", "saved"]
WIDTHS = ["110px", "420px", "80px", "120px", "100px", "120px", "170px"]


def build(studio, page: gr.Blocks) -> None:
    """Lay the page out and say what its parts do."""
    table = gr.Dataframe(
        headers=HEADERS,
        label="Checkpoints (click one to open it)",
        interactive=False,
        wrap=True,
        max_height=320,
        column_widths=WIDTHS,
        elem_id="checkpoints",
    )
    with gr.Row(equal_height=True):
        path = gr.Dropdown([], label="Checkpoint", allow_custom_value=True, elem_id="path", scale=4, min_width=260)
        again = gr.Button("Refresh the list", size="sm", elem_id="refresh", scale=1, min_width=120)
    with gr.Row(visible=False) as details:
        with gr.Column(scale=1, min_width=320):
            facts = gr.HTML(elem_id="facts")
            drawing = _picture("diagram")
        with gr.Column(scale=1, min_width=320):
            kinds = [name for name in ANALYSES if name != "Architecture"]
            kind = gr.Radio(kinds, value=kinds[0], label="Analysis", elem_id="analysis")
            prompt = gr.Textbox(
                label="Prompt",
                placeholder="(empty: the beginning of a text)",
                max_length=2000,
                elem_id="analysis_prompt",
            )
            run = gr.Button("Analyse", elem_id="analyse")
            words = gr.Markdown(elem_id="analysis_words")
            picture = _picture("analysis_picture", visible=False)

    def refresh():
        found = studio.catalogue.checkpoints()
        rows = [studio.catalogue.row(one) for one in found]
        return rows, gr.update(choices=[(studio.catalogue.label(one), studio.places.shown(one.path)) for one in found])

    def opened(chosen):
        checkpoint = studio.models.load(chosen)
        shown = studio.places.shown
        steps = [(step_label(one), shown(one)) for one in steps_of(checkpoint.path)]
        listed = gr.update(choices=steps, value=shown(checkpoint.path))
        return listed, gr.update(visible=True), facts_html(studio, checkpoint), drawn(chosen)

    def drawn(chosen):
        return str(studio.microscope.look("Architecture", chosen, "").png_path)

    @told
    def open_row(event: gr.SelectData):
        found = studio.catalogue.checkpoints()
        number = event.index[0]
        return opened(studio.places.shown(found[number].path)) if number < len(found) else [gr.skip()] * 4

    @told
    def analyse(chosen, name, beginning):
        found = studio.microscope.look(name, chosen, beginning or "")
        return gr.update(value=str(found.png_path), visible=True), html.escape(found.summary)

    page.load(told(refresh), None, [table, path])
    again.click(told(refresh), None, [table, path])
    shown = [path, details, facts, drawing]
    table.select(open_row, None, shown)
    path.input(told(opened), path, shown)
    gr.on([run.click, prompt.submit, kind.input], analyse, [path, kind, prompt], [picture, words])


def _picture(id: str, visible: bool = True) -> gr.Image:
    return gr.Image(
        type="filepath",
        interactive=False,
        show_label=False,
        elem_id=id,
        visible=visible,
        buttons=["download", "fullscreen"],
    )


def facts_html(studio, checkpoint) -> str:
    """What a checkpoint says of itself, and the way to talk to it."""
    told = {k: v for k, v in checkpoint.told.items() if k not in ("tokenizer", "fields") and v not in ("", None)}
    told |= checkpoint.told.get("fields", {})
    tokenizer = checkpoint.tokenizer
    lines = {
        "model": checkpoint.name,
        "step": f"{checkpoint.step:,}",
        "parameters": f"{checkpoint.model.num_parameters():,}",
        "vocabulary": f"{tokenizer.vocab_size:,} tokens ({tokenizer.kind})",
    }
    lines |= {k: v for k, v in told.items() if k not in lines and not str(k).endswith(("hash", "digest"))}
    shown = [(html.escape(str(k)), html.escape(str(v))) for k, v in lines.items()]
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown)
    link = quote(studio.places.shown(checkpoint.path))
    return f"<p><a href='write?checkpoint={link}'>Write with this model</a></p><dl>{items}</dl>"
