"""Models: the checkpoints of the project; one of them opened, drawn and analysed."""

from __future__ import annotations

from urllib.parse import quote

import gradio as gr

from lab.studio import markup
from lab.studio.analyses import LONGEST_LOOK, step_label
from lab.studio.catalogue import steps_of
from lab.studio.diagram import gpt_paths
from lab.studio.places import Refused
from lab.studio.telling import EXPECTED, told

HEADERS = ["model", "corpus", "step", "validation loss", "parameters", "size", "saved", "series · run"]
WIDTHS = ["110px", "110px", "70px", "180px", "110px", "80px", "160px", "370px"]
FIRST = "samples"  # it fits every model
NO_MODEL = markup.hint(
    "There is no model yet. <a href='train'>Train one</a>: a minute is enough for the first, and it appears here."
)


def build(studio, page: gr.Blocks) -> None:
    """Lay the page out and say what its parts do."""
    gr.HTML(
        markup.heading(
            "Studio",
            "Train small language models in the browser, look inside them, and let them write. Here: every model "
            "of the project; choose one to see what it is made of.",
        )
    )
    empty = gr.HTML("", elem_id="empty")
    table = gr.Dataframe(
        headers=HEADERS,
        label="Checkpoints (choose one to open it)",
        interactive=False,
        wrap=True,
        max_height=320,
        column_widths=WIDTHS,
        elem_id="checkpoints",
    )
    with gr.Row(equal_height=True):
        path = gr.Dropdown([], label="Checkpoint", elem_id="path", scale=4, min_width=260)
        again = gr.Button("Refresh the list", size="sm", elem_id="refresh", scale=1, min_width=120)
    with gr.Row(visible=False) as details:
        with gr.Column(scale=1, min_width=320):
            facts = gr.HTML(elem_id="facts")
            keep = gr.Button("Make a page to keep", size="sm", elem_id="keep")
            kept = gr.HTML(elem_id="kept")
            drawing = gr.HTML(elem_id="diagram")
        with gr.Column(scale=1, min_width=320):
            kind, inputs, run, answer = _microscope(studio)

    def refresh():
        found = studio.catalogue.checkpoints()
        rows = [studio.catalogue.row(one) for one in found]
        choices = [(studio.catalogue.label(one), studio.places.shown(one.path)) for one in found]
        shown = gr.update(value=rows, visible=bool(rows))
        return shown, gr.update(choices=choices, value=None, visible=bool(rows)), "" if rows else NO_MODEL

    def opened(chosen):
        if not chosen:  # the field was left without a choice
            return [gr.skip()] * 7
        checkpoint = studio.models.load(chosen)
        shown = studio.places.shown
        steps = [(step_label(one), shown(one)) for one in steps_of(checkpoint.path)]
        listed = gr.update(choices=steps, value=shown(checkpoint.path))
        paths = gpt_paths(checkpoint.model.gpt) if checkpoint.name == "gpt" else ""
        drawn = paths + markup.finding(studio.microscope.look("architecture", chosen, ""))
        kinds = [(words, name) for words, name in studio.microscope.kinds(chosen) if name != "architecture"]
        offered = gr.update(choices=kinds, value=FIRST)
        return listed, gr.update(visible=True), facts_html(studio, checkpoint), drawn, "", offered, ""

    @told
    def open_row(event: gr.SelectData):
        # By the row's own words: its number counts another way once the table is sorted, or a training has ended since.
        rows = {studio.catalogue.row(one)[-1]: one.path for one in studio.catalogue.checkpoints()}
        path = rows.get(str(event.row_value[-1]))
        if path is None:
            raise Refused("this model is not there any more; refresh the list")
        return opened(studio.places.shown(path))

    page.load(told(refresh), None, [table, path, empty])
    again.click(told(refresh), None, [table, path, empty])
    shown = [path, details, facts, drawing, answer, kind, kept]
    table.select(open_row, None, shown)
    path.input(told(opened), path, shown)
    run([path, *inputs])

    @told
    def make_page(chosen, own):
        yield markup.hint("Everything that fits this model is gathered; that takes a minute or two ...")
        try:
            made = studio.microscope.page(chosen, own or "")
        except EXPECTED as error:
            yield markup.told_error(error)
            return
        yield f"<p>{markup.download(made, 'Save the page')} (one HTML file, which needs no network)</p>"

    keep.click(make_page, [path, inputs[-1]], kept, show_progress="hidden")


def _microscope(studio):
    """The right half: (which analysis, the fields that go with the checkpoint, what connects them, the answer)."""
    kind = gr.Dropdown([], label="Analysis", elem_id="analysis")
    prompt = gr.Textbox(
        label="Prompt",
        placeholder="(empty: the beginning of a text)",
        max_length=LONGEST_LOOK,
        elem_id="analysis_prompt",
    )
    with gr.Accordion("The model's own text, if it was trained on a file", open=False, elem_id="own_text"):
        upload = gr.File(label="Text file (UTF-8)", file_types=[".txt", ".md"], height=140, elem_id="analysis_text")
    text = gr.State("")
    button = gr.Button("Analyse", variant="primary", elem_id="analyse")
    answer = gr.HTML(elem_id="analysis_answer")

    def analyse(chosen, name, beginning, own):
        yield markup.hint("Looking ...")  # nothing of the analysis before stays, whatever comes of this one
        try:
            found = studio.microscope.look(name, chosen, beginning or "", own or "")
        except EXPECTED as error:
            yield markup.told_error(error)
            return
        yield markup.finding(found)

    upload.upload(told(lambda file: str(studio.places.keep_text(file)) if file else ""), upload, text)
    upload.clear(lambda: "", None, text)

    def connect(inputs):
        gr.on([button.click, prompt.submit], analyse, inputs, answer, show_progress="hidden")

    return kind, [kind, prompt, text], connect, answer


def facts_html(studio, checkpoint) -> str:
    """What a checkpoint says of itself, and the way to talk to it."""
    told = checkpoint.told | checkpoint.told.get("fields", {})
    told = {k: v for k, v in told.items() if not isinstance(v, dict) and v not in ("", None)}
    tokenizer = checkpoint.tokenizer
    lines = {
        "model": checkpoint.name,
        "step": f"{checkpoint.step:,}",
        "parameters": f"{checkpoint.model.num_parameters():,}",
        "vocabulary": f"{tokenizer.vocab_size:,} tokens ({tokenizer.kind})",
    }
    lines |= {k: v for k, v in told.items() if k not in lines and not str(k).endswith(("hash", "digest"))}
    link = quote(studio.places.shown(checkpoint.path))
    return f"<p><a href='write?checkpoint={link}'>Write with this model</a></p>{markup.facts(lines.items())}"
