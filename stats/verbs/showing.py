"""Verbs that show: curve, times, report."""

from __future__ import annotations

import argparse

from stats.errors import DataError, Exit
from stats.verbs.options import Verb, asked, common, find, find_one, print_json, question, selection, show

_CURVE_HELP = """Steps and seconds to a target loss, one common step for all runs, and slopes.

Exit code 0: the mean curve reaches the target; 1: it does not."""


def _curve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="folders or files, as one series")
    parser.add_argument("--target", type=float, help="loss in nats (default: the series' threshold, else 2.92)")
    parser.add_argument("--alpha", type=float, default=0.01, help="level of the test at each step (default 0.01)")
    common(parser, _run_curve)


def _run_curve(options: argparse.Namespace) -> int:
    from stats.curve import curve, render
    from stats.ttest import TRACK_THRESHOLD, check_alpha

    check_alpha(options.alpha)
    series = find(options, options.paths)
    runs = [run for one in series for run in one.runs]
    target = options.target if options.target is not None else series[0].threshold
    name = series[0].name if len(series) == 1 else f"{len(series)} series"
    result = curve(runs, TRACK_THRESHOLD if target is None else target, options.alpha, name)
    show(options, result, render)
    reached = result.mean_crossing is not None and result.mean_crossing.steps is not None
    return Exit.PASS if reached else Exit.NOT_SIGNIFICANT


_TIMES_HELP = "Training times by host, with outliers labelled (never dropped) and drift."


def _times_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a series' folder, or a file")
    selection(parser)
    common(parser, _run_times)


def _run_times(options: argparse.Namespace) -> int:
    from stats.samples import selected
    from stats.times import render, times

    one = find_one(options.path, options)
    show(options, times(selected(one, **asked(options, [one]))), render)
    return Exit.PASS


_REPORT_HELP = """A report on one or more series: Markdown for a pull request, and one HTML file with its pictures.

Without --html and --markdown the Markdown is printed. Exit code 0: every series passes at alpha; 1: some do not."""


def _report_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", nargs="+", metavar="PATH", help="series' folders, or folders of them, or files")
    parser.add_argument("--alpha", type=float, default=0.01, help="level of the verdicts (default 0.01)")
    question(parser)
    parser.add_argument("--plan", metavar="FILE", help="plan for the sequential path (default: plan.json)")
    parser.add_argument("--html", metavar="FILE", help="write the self-contained HTML page")
    parser.add_argument("--markdown", metavar="FILE", help="write the Markdown")
    common(parser, _run_report)


def _run_report(options: argparse.Namespace) -> int:
    from stats.errors import check_alpha
    from stats.planfile import read_plan
    from stats.report import make_report, to_html, to_markdown

    check_alpha(options.alpha)
    plan = read_plan(options.plan) if options.plan else None
    series = find(options, options.paths)
    report = make_report(series, options.alpha, plan=plan, **asked(options, series))
    markdown = to_markdown(report)
    for path, make in ((options.html, lambda: to_html(report)), (options.markdown, lambda: markdown)):
        if path:
            _write_text(path, make())
    if options.json:
        print_json(report, options.reading)
    elif not (options.html or options.markdown):
        print(markdown)
    return report.exit_code


def _write_text(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror}", path) from None


VERBS = (
    Verb("curve", _CURVE_HELP, _curve_options),
    Verb("times", _TIMES_HELP, _times_options),
    Verb("report", _REPORT_HELP, _report_options),
)
