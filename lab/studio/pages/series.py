"""Series: a folder of runs, judged as they come in."""

from __future__ import annotations

import math

import gradio as gr

from lab.studio import markup
from lab.studio.places import Refused
from lab.studio.telling import EXPECTED, told
from lab.studio.verdicts import HEADERS, fingerprint, view, write_report

REFRESH_S = 3.0
WIDTHS = ["150px", "90px", "220px", "140px", "170px", "190px"]
NO_SERIES = "There is no series of runs yet: <a href='train'>train a model</a>, or start one with ./run.sh."
TITLE = "t-test, as python -m stats.ttest prints it"
# The link to the report is on the page soon after its handler has answered; it stays there, should the browser ask.
FETCH = "() => { setTimeout(() => document.querySelector('#report_link a')?.click(), 300); }"


def judging(threshold: str, alpha: float | None) -> tuple[float | None, float]:
    """Threshold (None: the series' own) and alpha as the page gives them. Refused if they are no such numbers."""
    try:
        limit = float(threshold) if threshold and threshold.strip() else None
    except ValueError:
        limit = math.nan
    if limit is not None and not math.isfinite(limit):
        raise Refused(f"the threshold is a loss in nats, such as 2.92, not {threshold!r}")
    if not isinstance(alpha, (int, float)) or not 0 < alpha <= 0.5:
        raise Refused("alpha is above 0 and at most 0.5")
    return limit, float(alpha)


def build(studio, page: gr.Blocks) -> None:
    """Lay the page out and say what its parts do."""
    gr.HTML(
        markup.heading("Series", "Is the mean loss below the threshold? Runs of one recipe, judged as they come in.")
    )
    with gr.Row(equal_height=True):
        folder = gr.Dropdown([], label="Series", elem_id="series", scale=3, min_width=280)
        threshold = gr.Textbox(
            label="Threshold", placeholder="the series' own", max_length=20, elem_id="threshold", scale=1, min_width=140
        )
        alpha = gr.Number(0.05, label="Alpha", minimum=0.001, maximum=0.5, elem_id="alpha", scale=1, min_width=120)
        report = gr.Button("Download the report", elem_id="report", size="sm", scale=1, min_width=160)
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            verdict = gr.HTML(elem_id="verdict")
            sequential = gr.HTML(elem_id="sequential")
        with gr.Column(scale=1, min_width=320):
            pictures = gr.HTML(elem_classes="pictures", elem_id="pictures")
    table = gr.Dataframe(
        headers=HEADERS, label="Runs", interactive=False, wrap=True, column_widths=WIDTHS, elem_id="runs"
    )
    link = gr.HTML("", elem_id="report_link")
    seen = gr.State(())
    outputs = [verdict, sequential, pictures, table, seen]

    def look(path, limit, level, before):
        """The series' values of `outputs`; nothing new if its files are as they were. What cannot be judged is told
        where the verdict would stand: a message that pops up would come again at every look."""
        if not path:
            said = "Choose a series." if studio.catalogue.series() else NO_SERIES
            return [markup.hint(said), "", "", [], ()]
        try:
            where = studio.places.inside(path)
            now = (str(where), limit, level, fingerprint(where))
            if before and tuple(before) == now:
                return [gr.skip()] * len(outputs)
            seen_now = view(where, *judging(limit, level))
        except EXPECTED as error:
            return [markup.printed(TITLE, f"No verdict: {error}"), "", "", [], ()]
        drawn = "".join(f"<div>{svg}</div>" for svg in (seen_now.curves, seen_now.losses, seen_now.path) if svg)
        plan = markup.printed("Sequential test, as runs come in", seen_now.sequential) if seen_now.sequential else ""
        return [markup.printed(TITLE, seen_now.verdict), plan, drawn, seen_now.rows, now]

    def open_page():
        found = [(studio.places.shown(path), studio.places.shown(path)) for path in studio.catalogue.series()]
        first = found[0][1] if found else None
        return gr.update(choices=found, value=first), *look(first, "", 0.05, ())

    inputs = [folder, threshold, alpha]
    page.load(told(open_page), None, [folder, *outputs])
    for changed in (folder.input, threshold.submit, threshold.blur, alpha.submit, alpha.blur):
        changed(look, [*inputs, seen], outputs)
    gr.Timer(REFRESH_S).tick(look, [*inputs, seen], outputs, show_progress="hidden")

    @told
    def make(path, limit, level):
        return markup.download(write_report(studio.places.inside(path), studio.places, *judging(limit, level)))

    report.click(make, inputs, link).success(None, js=FETCH)
    folder.input(lambda: "", None, link)
