"""Series: a folder of runs, judged as they come in."""

from __future__ import annotations

import math

import gradio as gr

from lab.studio.places import Refused
from lab.studio.telling import told
from lab.studio.verdicts import HEADERS, fingerprint, view, write_report

REFRESH_S = 3.0
WIDTHS = ["150px", "90px", "220px", "140px", "170px", "190px"]


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
    with gr.Row(equal_height=True):
        folder = gr.Dropdown([], label="Series", elem_id="series", allow_custom_value=True, scale=3, min_width=280)
        threshold = gr.Textbox(
            label="Threshold", placeholder="the series' own", max_length=20, elem_id="threshold", scale=1, min_width=140
        )
        alpha = gr.Number(0.05, label="Alpha", minimum=0.001, maximum=0.5, elem_id="alpha", scale=1, min_width=120)
        report = gr.DownloadButton("Download the report", elem_id="report", size="sm", scale=1, min_width=160)
    with gr.Row():
        with gr.Column(scale=1, min_width=320):
            verdict = gr.Textbox(
                label="t-test, as python -m stats.ttest prints it",
                lines=12,
                max_lines=30,
                elem_id="verdict",
                buttons=["copy"],
            )
            sequential = gr.Textbox(
                label="Sequential test, as runs come in", lines=4, max_lines=30, elem_id="sequential", visible=False
            )
        with gr.Column(scale=1, min_width=320):
            pictures = gr.HTML(elem_classes="pictures", elem_id="pictures")
    table = gr.Dataframe(
        headers=HEADERS, label="Runs", interactive=False, wrap=True, column_widths=WIDTHS, elem_id="runs"
    )
    seen = gr.State(())
    outputs = [verdict, sequential, pictures, table, seen]

    def look(path, limit, level, before):
        """The series' values of `outputs`; nothing new if its files are as they were."""
        if not path:
            return ["Choose a series.", gr.update(visible=False), "", [], ()]
        where = studio.places.inside(path)
        now = (str(where), limit, level, fingerprint(where))
        if before and tuple(before) == now:
            return [gr.skip()] * len(outputs)
        seen_now = view(where, *judging(limit, level))
        drawn = "".join(f"<div>{svg}</div>" for svg in (seen_now.curves, seen_now.losses, seen_now.path) if svg)
        plan = gr.update(value=seen_now.sequential, visible=bool(seen_now.sequential))
        return [seen_now.verdict, plan, drawn, seen_now.rows, now]

    def open_page():
        found = [(studio.places.shown(path), studio.places.shown(path)) for path in studio.catalogue.series()]
        first = found[0][1] if found else None
        return gr.update(choices=found, value=first), *look(first, None, 0.05, ())

    inputs = [folder, threshold, alpha]
    page.load(told(open_page), None, [folder, *outputs])
    for changed in (folder.input, threshold.submit, threshold.blur, alpha.submit, alpha.blur):
        changed(told(lambda *given: look(*given, ())), inputs, outputs)
    gr.Timer(REFRESH_S).tick(told(look), [*inputs, seen], outputs, show_progress="hidden")

    @told
    def make(path, limit, level):
        return str(write_report(studio.places.inside(path or ""), studio.places, *judging(limit, level)))

    report.click(make, inputs, report)
