"""One report on one or more series: as Markdown for a pull request, and as one HTML file with its pictures inside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from stats.correct import below_p
from stats.errors import Exit, StatsError, UsageError
from stats.judge import judge_sample
from stats.leaderboard import Leaderboard, leaderboard
from stats.monitor import Monitoring, monitor
from stats.planfile import read_plan
from stats.plans import Plan
from stats.samples import Sample, selected
from stats.sequential import ACCEPT
from stats.series import Series
from stats.ttest import STRICT_ALPHA, TTest
from stats.validate import Assessment, validate_each

TEMPLATE = Path(__file__).with_name("templates") / "report.html.j2"


@dataclass(frozen=True, slots=True)
class PeekedP:
    """The t-test's p after the first n runs."""

    n: int
    p_value: float


@dataclass(frozen=True, slots=True)
class Section:
    """One series of a report."""

    series: str
    test: TTest | None
    error: str | None  # why there is no test
    assessment: Assessment
    monitoring: Monitoring | None  # where there is a plan
    p_path: tuple[PeekedP, ...]
    source: Series = field(repr=False)
    sample: Sample | None = field(repr=False)
    plan: Plan | None = field(repr=False)

    @property
    def passes(self) -> bool:
        """By the sequential test where the series has a plan for one, else by the t-test."""
        if self.monitoring and self.plan and self.plan.method != "fixed":
            return self.monitoring.decision.verdict == ACCEPT
        return self.test is not None and self.test.significant


@dataclass(frozen=True)
class Report:
    """Everything that the two forms of the report show."""

    alpha: float
    sections: tuple[Section, ...]
    leaderboard: Leaderboard | None  # for several series

    @cached_property
    def exit_code(self) -> Exit:
        """PASS if every series passes; INVALID_DATA if none could be judged."""
        tests = [section.test for section in self.sections]
        if all(test is None for test in tests):
            return Exit.INVALID_DATA
        return Exit.PASS if all(section.passes for section in self.sections) else Exit.NOT_SIGNIFICANT


def make_report(
    series: Sequence[Series],
    alpha: float = STRICT_ALPHA,
    threshold: float | None = None,
    plan: Plan | None = None,
    **selection: Any,
) -> Report:
    """Judge, grade and, where there is a plan, test sequentially. What fails for one series stands in its section.

    `selection`: stop_step, drop and allow_mixed, as for `stats.samples.selected`.
    """
    selection["threshold"] = threshold
    assessments = validate_each(series, alpha, **selection).assessments
    sections = tuple(_section(one, alpha, plan, grade, selection) for one, grade in zip(series, assessments))
    board = leaderboard(series, alpha, assessments=assessments, **selection) if len(series) > 1 else None
    return Report(alpha, sections, board)


def _section(series: Series, alpha: float, plan: Plan | None, assessment: Assessment, selection: dict) -> Section:
    test = error = sample = monitoring = None
    try:
        sample = selected(series, **selection)
        test = judge_sample(series, sample, selection["threshold"], alpha=alpha)
    except StatsError as problem:
        error = str(problem)
    try:
        if plan is None and series.plan_path:
            plan = read_plan(series.plan_path)
        monitoring = monitor(series, plan) if plan else None
    except StatsError as problem:
        error = error or str(problem)
    path = _p_path(sample.losses, test.threshold) if sample and test else ()
    return Section(series.name, test, error, assessment, monitoring, path, series, sample, plan)


def _p_path(losses: Sequence[float], threshold: float) -> tuple[PeekedP, ...]:
    found = []
    for n in range(2, len(losses) + 1):
        if len(set(losses[:n])) > 1:
            found.append(PeekedP(n, below_p(losses[:n], threshold)))
    return tuple(found)


def to_markdown(report: Report) -> str:
    """The report without pictures."""
    parts = [f"# {report.sections[0].series}" if len(report.sections) == 1 else f"# {len(report.sections)} series"]
    if report.leaderboard:
        parts.append(report.leaderboard.markdown)
    for section in report.sections:
        if len(report.sections) > 1:
            parts.append(f"## {section.series}")
        parts += _section_markdown(section)
    return "\n\n".join(parts) + "\n"


def _section_markdown(section: Section) -> list[str]:
    parts = [_verdict_words(section)]
    if section.test:
        parts.append(_summary_table(section.test))
    if section.monitoring:
        parts.append(section.monitoring.decision.words)
    reasons = [f for f in section.assessment.findings if f.grade != "A"] or list(section.assessment.findings)
    grade = f"Evidence: grade **{section.assessment.grade}**"
    parts.append(grade + "\n\n" + "\n".join(f"- {f.grade}, {f.check}: {f.text}" for f in reasons))
    if section.sample:
        parts.append(_runs_table(section.sample))
    left_out = section.test.left_out if section.test else section.assessment.left_out
    if left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {entry.run}: {entry.reason}" for entry in left_out))
    if section.test and section.test.warnings:
        parts.append("\n".join(f"- warning: {warning}" for warning in section.test.warnings))
    return parts


def _verdict_words(section: Section) -> str:
    from stats.text import p_text

    test = section.test
    if test is None:
        return f"No verdict: {section.error}"
    looked = section.plan is not None and section.plan.method != "fixed"
    words = "is below" if test.significant else "is not shown to be below"
    return (
        f"Mean final loss **{test.sample_mean:.6f}** over {test.n} runs {words} {test.threshold:g} "
        f"(one-sided t-test: t = {test.t_stat:.4g}, p = {p_text(test.p_value)}, alpha = {test.alpha:g}; "
        f"upper {1 - test.alpha:.0%} bound {test.upper_conf_bound_mean:.6f})."
        + (" The series was tested as it went: the verdict of its plan counts, not this p." if looked else "")
    )


def _summary_table(test: TTest) -> str:
    from stats.text import number, table

    rows = [("final loss (nats)", test.loss)] + ([("time (s)", test.time_s)] if test.time_s else [])
    return table(
        ["", "runs", "mean", "median", "std (population)", "std (sample)", "min", "max"],
        [[what, s.n, *map(number, (s.mean, s.median, s.std, s.sample_std, s.min, s.max))] for what, s in rows],
    )


def _runs_table(sample: Sample) -> str:
    from stats.text import table

    rows = [
        [
            run.name,
            "-" if run.seed is None else run.seed,
            point.step,
            f"{point.loss:.6f}",
            "-" if point.time_s is None else f"{point.time_s:.3f}",
        ]
        for run, point in zip(sample.runs, sample.finals)
    ]
    return table(["run", "seed", "step", "final loss", "time (s)"], rows)


def to_html(report: Report) -> str:
    """One HTML page that needs nothing else: styles and pictures are in it, scripts there are none."""
    try:
        import jinja2
    except ImportError as error:
        raise UsageError(f"--html needs {error.name}: pip install jinja2") from None

    from stats import figures

    sections = []
    for index, section in enumerate(report.sections):
        label, pictures = f"{section.series} {index}", []
        runs = section.sample.runs if section.sample else section.source.runs
        curves = [run for run in runs if run.validations]
        if curves and section.test and section.sample:
            pictures.append(figures.loss_curves(curves, section.test.threshold, label))
            pictures.append(figures.distribution(section.test, section.sample.losses, label))
        if len(section.p_path) > 1:
            path = [(point.n, point.p_value) for point in section.p_path]
            pictures.append(figures.p_path(path, report.alpha, label))
        if section.plan and section.monitoring and section.monitoring.decision.path:
            pictures.append(figures.sequential_path(section.monitoring.decision, section.plan, label))
        sections.append({"section": section, "pictures": pictures})
    judged = [section.test.p_value for section in report.sections if section.test]
    p_curve = figures.p_curve(judged, "all series") if len(judged) > 1 else None
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.globals |= {"verdict_words": _verdict_words}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(report=report, sections=sections, p_curve=p_curve)
