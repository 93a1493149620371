"""All series of a folder in one table: what they claim, how good their evidence is, and whether neighbours differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from stats.compare import Difference, holm, welch
from stats.errors import StatsError
from stats.samples import Sample, selected, unlike_losses
from stats.series import Series
from stats.ttest import STRICT_ALPHA, TRACK_THRESHOLD, Summary
from stats.validate import Assessment, validate_each


@dataclass(frozen=True, slots=True)
class Entry:
    """One series."""

    series: str
    path: str
    grade: str
    passes: bool  # significant at alpha, or accepted by its sequential plan
    threshold: float | None
    n: int | None
    steps: int | None
    loss: Summary | None
    time_s: Summary | None
    p_value: float | None
    error: str | None  # why it could not be judged


@dataclass(frozen=True, slots=True)
class Pair:
    """Two series of the board, by their paths: the second minus the first, Holm-corrected over all pairs."""

    first: str
    second: str
    loss: Difference | None
    time_s: Difference | None


@dataclass(frozen=True, slots=True)
class Leaderboard:
    """Series that pass first, quickest first; then the others by mean loss."""

    entries: tuple[Entry, ...]
    pairs: tuple[Pair, ...]
    alpha: float
    markdown: str


def leaderboard(
    series: Sequence[Series],
    alpha: float = STRICT_ALPHA,
    assessments: Sequence[Assessment] | None = None,
    **selection: Any,
) -> Leaderboard:
    """The board over `series`; one that cannot be judged stands at its end with the reason.

    `assessments`: the series' grades where they are known. `selection`: threshold, stop_step, drop and allow_mixed,
    as for `stats.validate.validate_each`.
    """
    entries: list[Entry] = []
    samples: dict[str, Sample | None] = {}
    if assessments is None:
        assessments = validate_each(series, alpha, **selection).assessments
    for one, assessment in zip(series, assessments):
        sample, error = None, None
        try:
            sample = selected(one, **selection)
        except StatsError as problem:
            error = str(problem)
        entries.append(_entry(one, sample, assessment, error))
        samples[one.path] = sample
    entries.sort(key=_rank)
    judged = [(entry, sample) for entry in entries if entry.error is None and (sample := samples[entry.path])]
    pairs = _pairs([(a, b, x, y) for (a, x), (b, y) in combinations(judged, 2)])
    notes = [_machines(entries, samples)]
    if unlike := unlike_losses([sample.runs for _, sample in judged]):
        notes.append(f"Losses of different {unlike} cannot be compared.")
    return Leaderboard(tuple(entries), tuple(pairs), alpha, _markdown(entries, pairs, alpha, notes))


def _entry(series: Series, sample: Sample | None, assessment: Assessment, error: str | None) -> Entry:
    test = assessment.test
    steps = {point.step for point in sample.finals} if sample else set()
    if test is None:
        threshold = TRACK_THRESHOLD if series.threshold is None else series.threshold
        n = len(sample.runs) if sample else None
        reason = error or next((f.text for f in assessment.findings if f.grade == "F"), None)
        return Entry(series.name, series.path, assessment.grade, False, threshold, n, None, None, None, None, reason)
    return Entry(
        series.name,
        series.path,
        assessment.grade,
        assessment.passes,
        test.threshold,
        test.n,
        steps.pop() if len(steps) == 1 else None,
        test.loss,
        test.time_s,
        test.p_value,
        None,
    )


def _rank(entry: Entry) -> tuple:
    """Sort key: by threshold, those that pass before those that do not, then by time or by loss."""
    time = entry.time_s.mean if entry.time_s else float("inf")
    loss = entry.loss.mean if entry.loss else float("inf")
    return (
        entry.error is not None,
        entry.threshold or 0.0,
        not entry.passes,
        time if entry.passes else loss,
        entry.series,
    )


def _pairs(couples: Sequence[tuple[Entry, Entry, Sample, Sample]]) -> list[Pair]:
    """Welch's tests between every two series of the board, corrected together."""
    found = [
        Pair(first.path, second.path, welch(b.losses, a.losses, 0.05), welch(b.times_s, a.times_s, 0.05))
        for first, second, a, b in couples
    ]
    losses, times = holm([pair.loss for pair in found]), holm([pair.time_s for pair in found])
    return [Pair(pair.first, pair.second, loss, time) for pair, loss, time in zip(found, losses, times)]


def _machines(entries: Sequence[Entry], samples: dict[str, Sample | None]) -> str:
    """A line on times of different machines, or nothing."""
    machines: dict[tuple, list[str]] = {}
    for entry in entries:
        sample = samples[entry.path]
        for run in sample.runs if sample else ():
            names = machines.setdefault((run.hardware, run.world_size), [])
            if run.hardware and entry.series not in names:
                names.append(entry.series)
    told = {machine: names for machine, names in machines.items() if names}
    if len(told) < 2:
        return ""
    parts = "; ".join(f"{name}, {count or '?'} processes: {', '.join(names)}" for (name, count), names in told.items())
    return f"Times of different machines cannot be compared ({parts})."


def _markdown(entries: Sequence[Entry], pairs: Sequence[Pair], alpha: float, notes: Sequence[str]) -> str:
    from stats.text import p_text, table

    def cell(value: float | None, style: str) -> str:
        return "-" if value is None else format(value, style)

    rows, above = [], ""
    by_names = {(pair.first, pair.second): pair for pair in pairs}
    for entry in entries:
        pair = by_names.get((above, entry.path))
        above = entry.path
        loss_p = p_text(pair.loss.holm_p) if pair and pair.loss else "-"
        time_p = p_text(pair.time_s.holm_p) if pair and pair.time_s else "-"
        loss, time = entry.loss, entry.time_s
        rows.append(
            [
                entry.series,
                entry.grade,
                "yes" if entry.passes else "no",
                cell(entry.n, "d"),
                cell(entry.steps, "d"),
                cell(time.mean if time else None, ".2f"),
                cell(time.sample_std if time else None, ".2f"),
                time_p,
                cell(loss.mean if loss else None, ".6f"),
                cell(loss.sample_std if loss else None, ".6f"),
                loss_p,
                cell(entry.threshold, "g"),
                "-" if entry.p_value is None else p_text(entry.p_value),
            ]
        )
    header = "series,evidence,passes,runs,steps,time (s),sd,p above,mean loss,sd,p above,threshold,p".split(",")
    legend = (
        f"passes: the mean loss is below the threshold at alpha {alpha:g}, by the t-test or the plan of the series. "
        "p above: against the row above (Welch, two-sided, Holm-corrected over all pairs); a large one is no "
        "evidence of a difference, not a proof that there is none. evidence: `python -m stats validate`."
    )
    return "\n".join(
        [
            table(header, rows),
            "",
            legend,
            *filter(None, notes),
            *(f"\n{e.series}: {e.error}" for e in entries if e.error),
        ]
    )
