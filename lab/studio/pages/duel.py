"""Duel: two recipes side by side, and whether the difference is one."""

from __future__ import annotations

import html

import gradio as gr

from lab.studio import markup
from lab.studio.duel import mean_curves, sides, verdict
from lab.studio.places import Refused
from lab.studio.progress import loss_span
from lab.studio.telling import EXPECTED, told

COLORS = {"A": "#3b82f6", "B": "#d97706"}
NOTHING = markup.hint(
    "A duel needs two recipes with finished runs: <a href='train'>train two</a>, each with two seeds or more "
    "(“Runs” under “More”), on the same text."
)


def build(studio, page: gr.Blocks) -> None:
    """Lay the page out and say what its parts do."""
    gr.HTML(
        markup.heading("Duel", "Two recipes on the same text: which one is better, by how much, and how sure is that?")
    )
    with gr.Row(equal_height=True):
        first = gr.Dropdown([], label="A", elem_id="side_a", scale=3, min_width=260)
        second = gr.Dropdown([], label="B", elem_id="side_b", scale=3, min_width=260)
        go = gr.Button("Compare", variant="primary", elem_id="compare", scale=1, min_width=120)
    words = gr.HTML(NOTHING, elem_id="duel_verdict")
    plot = gr.LinePlot(
        x="step",
        y="loss",
        color="line",
        color_map=COLORS,
        height=320,
        tooltip="all",
        visible=False,
        label="Validation loss over steps, the mean of each side's runs",
        show_label=True,
        colors_in_legend=[],
        elem_id="duel_curves",
    )
    texts = []
    with gr.Row():
        for name in "ab":
            with gr.Column(min_width=320):
                texts.append(gr.HTML(elem_id=f"duel_{name}"))
    coloured = gr.HTML(elem_id="duel_text")
    outputs = [words, plot, *texts, coloured]

    def found():
        return {side.key: side for side in sides(studio.catalogue.series())}

    def open_page():
        known = found()
        choices = [(side.label, key) for key, side in known.items()]
        ready = len(choices) > 1
        values = [choices[0][1], choices[1][1]] if ready else [None, None]
        said = markup.hint("Choose two and compare.") if ready else NOTHING
        return *(gr.update(choices=choices, value=value) for value in values), said

    def compare(a, b):
        hidden = gr.update(visible=False)
        yield markup.hint("Judging ..."), hidden, "", "", ""
        known = found()
        if a not in known or b not in known:
            yield markup.told_error(Refused("choose two recipes first")), hidden, "", "", ""
            return
        pair = known[a], known[b]
        yield _judged(*pair), _curves(*pair), "", "", ""
        shown = gr.skip()  # a chart that is sent again while it appears may stay empty
        written = [_written(studio, name, side) for name, side in zip("AB", pair)]
        yield shown, shown, *written, markup.hint("Reading a text with both ...")
        yield shown, shown, shown, shown, _read(studio, *pair)

    page.load(told(open_page), None, [first, second, words])
    go.click(compare, [first, second], outputs, show_progress="hidden")


def _judged(first, second) -> str:
    """What stats says, in its own words, or why it cannot."""
    from stats.compare import render

    try:
        found = verdict(first, second)
    except EXPECTED as error:
        advice = " Train each with two seeds or more." if min(len(first.runs), len(second.runs)) < 2 else ""
        return markup.told_error(Refused(f"No verdict: {error}.{advice}"))
    one = found.comparisons[0]
    said = "".join(f"<p><b>{line}</b></p>" for line in map(html.escape, one.conclusions))
    return said + markup.printed("As python -m stats compare prints it", render(found))


def _curves(first, second):
    import pandas

    rows = mean_curves(first, second)
    if not rows:
        return gr.update(visible=False)
    last = max(step for step, _, _ in rows)
    frame = pandas.DataFrame(rows, columns=["step", "loss", "line"])
    return gr.update(value=frame, visible=True, x_lim=[0, last], y_lim=list(loss_span(rows, last)))


def _written(studio, name: str, side) -> str:
    title = f"<h2>{markup.swatch(COLORS[name])}{name} writes</h2>"
    if side.best is None:
        return title + markup.hint("It left no checkpoint.")
    try:
        return title + markup.texts([("best", studio.samples.text(side.best))])
    except EXPECTED as error:
        return title + markup.told_error(error)


def _read(studio, first, second) -> str:
    """One text of the validation split under both: blue where B is better, orange where A is."""
    if first.best is None or second.best is None:
        return markup.hint("A text read by both can be shown where both left a checkpoint.")
    title = "<h2>A text of the validation split: blue where B reads it better, orange where A does</h2>"
    try:
        return title + markup.finding(studio.microscope.look("coloured", second.best, "", second=first.best))
    except EXPECTED as error:
        return title + markup.told_error(error)
