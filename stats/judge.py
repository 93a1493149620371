"""From a series to the verdict of the t-test: which runs count, against which threshold, and what must be said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stats.errors import DataError, StatsError, UsageError
from stats.planfile import read_plan
from stats.samples import Sample, drops_in, sample_of
from stats.series import Series
from stats.ttest import TRACK_THRESHOLD, TTest, ttest
from stats.values import unit_of


@dataclass(frozen=True, slots=True)
class TTests:
    """The verdicts on several series, and what kept the others from having one."""

    results: tuple[TTest, ...]
    errors: tuple[str, ...]


def judge(
    series: Series,
    threshold: float | None = None,
    stop_step: int | None = None,
    drop: Mapping[str, str] | None = None,
    allow_mixed: bool = False,
    **settings: Any,
) -> TTest:
    """`ttest` on the runs of a series that count, against `threshold` or else the series' own or the track's.

    `settings` go to `ttest`. Raises DataError as `stats.samples.sample_of` and `ttest` do, with the series' path.
    """
    return judge_sample(series, sample_of(series, stop_step, drop, allow_mixed), threshold, **settings)


def judge_sample(series: Series, sample: Sample, threshold: float | None = None, **settings: Any) -> TTest:
    """`judge` where the sample of the series is at hand."""
    unit = unit_of(sample.finals[0]) if sample.finals else None
    if threshold is None and unit and series.threshold is None:
        text = f"its losses are in {unit}, for which no threshold is known: name one with --threshold"
        raise UsageError(f"{series.path}: {text}")
    if threshold is None:
        threshold = TRACK_THRESHOLD if series.threshold is None else series.threshold
    settings.setdefault("decimals", sample.decimals)
    try:
        result = ttest(sample.losses, threshold, times_s=sample.times_s, **settings)
    except DataError as error:
        left_out = "".join(f"; left out: {entry.run} ({entry.reason})" for entry in sample.left_out)
        raise DataError(error.cause + left_out, series.path) from None
    notes = sample.notes + _plan_note(series)
    return replace(result, series=sample.name, left_out=sample.left_out, notes=notes)


def _plan_note(series: Series) -> tuple[str, ...]:
    """That this p is not the verdict, where the series was planned to be looked at as it went."""
    if series.plan_path is None:
        return ()
    try:
        plan = read_plan(series.plan_path)
    except StatsError as error:
        return (f"its plan cannot be used: {error}",)
    if plan.method == "fixed":
        return ()
    return (f"this series has a {plan.method} plan: the verdict of `python -m stats monitor` counts, not this p",)


def judge_all(series: Sequence[Series], drop: Mapping[str, str] | None = None, **settings: Any) -> TTests:
    """`judge` for every series; drops apply where a run of that name is. One that cannot be judged does not hide the
    others; where there is only one, its error is raised."""
    results, errors = [], []
    for one in series:
        try:
            results.append(judge(one, drop=drops_in(one, drop), **settings))
        except StatsError as error:
            if len(series) == 1:
                raise
            errors.append(str(error))
    return TTests(tuple(results), tuple(errors))
