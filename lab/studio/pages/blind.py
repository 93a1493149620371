"""Blind: grade stories of two models without knowing whose they are; stats judges the grades."""

from __future__ import annotations

import html
import time

import gradio as gr

from lab.studio import markup
from lab.studio.blind import FEWEST, GRADES, MOST, in_words, judged, keep, session
from lab.studio.places import Refused
from lab.studio.telling import EXPECTED, told
from lab.studio.writing import LONGEST_PROMPT
from lab.words import unread_words

NAMES = ("one", "two")  # of the models, as the form has them; a result names whole runs only once
START = markup.hint(
    "Choose two models and begin: their stories come in a shuffled order, and whose is whose at the end."
)


def build(studio, page: gr.Blocks) -> None:
    """Lay the page out and say what its parts do."""
    gr.HTML(markup.heading("Blind", "Grade the stories of two models without knowing whose they are."))
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            models = [gr.Dropdown([], label=f"Model {name}", elem_id=f"blind_{name}") for name in NAMES]
            prompt = gr.Textbox("", label="Beginning", max_length=LONGEST_PROMPT, elem_id="blind_prompt")
            count = gr.Number(
                8, label="Stories of each", precision=0, minimum=FEWEST, maximum=MOST, elem_id="blind_count"
            )
            begin = gr.Button("Begin", variant="primary", elem_id="blind_begin")
        with gr.Column(scale=2, min_width=320):
            shown = gr.HTML(START, elem_id="blind_story")
            grade = gr.Radio(
                [(f"{g}{' poor' if g == 1 else ' good' if g == max(GRADES) else ''}", g) for g in GRADES],
                label="Grade",
                visible=False,
                elem_id="blind_grade",
            )
            give = gr.Button("Give this grade", variant="primary", visible=False, elem_id="blind_give")
    state = gr.State(None)
    outputs = [shown, grade, give, state]

    @told
    def start(one, two, beginning, number):
        off = gr.update(visible=False)
        yield markup.hint("Both are writing ..."), off, off, None
        if not one or not two or one == two:
            raise Refused("choose two different models first")
        names = tuple(studio.catalogue.label_of(path) for path in (one, two))
        pair = tuple(studio.models.load(path) for path in (one, two))
        made = session(pair, names, beginning or "", number, seed=int(time.time()))
        unread = {unread_words(one.tokenizer, beginning or "") for one in pair} - {""}
        asked = _asking(made)
        yield asked[0] + "".join(markup.hint(html.escape(words)) for words in sorted(unread)), *asked[1:]

    @told
    def graded(value, made):
        if made is None:
            raise Refused("begin first")
        made.grade(value)
        if made.current is not None:
            return _asking(made)
        path = keep(made, studio.places.home / "grades")
        off = gr.update(visible=False)
        return _result(made, studio.places.shown(path)), off, off, None

    def open_page():
        found = studio.catalogue.checkpoints()
        labels = [(studio.catalogue.label(one), studio.places.shown(one.path)) for one in found]
        return [gr.update(choices=labels, value=labels[n][1] if len(labels) > 1 else None) for n in (0, 1)]

    page.load(told(open_page), None, models)
    begin.click(start, [*models, prompt, count], outputs, show_progress="hidden")
    give.click(graded, [grade, state], outputs, show_progress="hidden")


def _asking(made):
    """Values of the outputs for the next story."""
    number = f"Story {len(made.grades) + 1} of {len(made.stories)}"
    paragraphs = "".join(f"<p>{html.escape(part)}</p>" for part in made.current.split("\n") if part.strip())
    text = f"<h2>{number}</h2><div class='read'>{paragraphs or markup.hint('(nothing)')}</div>"
    return text, gr.update(value=None, visible=True), gr.update(visible=True), made


def _result(made, where: str) -> str:
    """Whose stories got which grades, and what stats says of them."""
    try:
        verdict = f"<p><b>{html.escape(in_words(made, judged(made)))}</b></p>"
    except EXPECTED as error:
        verdict = markup.told_error(Refused(f"No verdict: {error}"))
    rows = [(f"{grade} · {NAMES[whose]}", text) for grade, (whose, text) in zip(made.grades, made.stories)]
    listed = "; ".join(f"{short}: {name}" for short, name in zip(NAMES, made.names))
    kept = markup.hint(f"{html.escape(listed)}. Kept in {html.escape(where)}")
    return f"<h2>Result</h2>{verdict}{kept}{markup.texts(rows)}"
