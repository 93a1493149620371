"""Loss curves: when does a series reach a target, and how steep is it there?

Every run's own first crossing of the target favours lucky moments. A record needs one step for all runs:
`curve` gives the step at which the mean curve crosses the target, and the first common validation at which
the t-test passes. Between validations the loss is interpolated linearly.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stats.correct import below_p
from stats.errors import DataError, UsageError
from stats.values import Run


@dataclass(frozen=True, slots=True)
class Crossing:
    """Where one curve crosses the target. Steps are fractional: interpolated."""

    run: str
    steps: float | None  # None: it does not get there
    time_s: float | None
    slope_per_step: float | None  # nats a step over the last two validations; negative while the loss falls
    final_step: int
    final_loss: float


@dataclass(frozen=True, slots=True)
class CommonStep:
    """All runs at one step at which every one of them was validated."""

    step: int
    mean: float
    std: float | None
    time_s: float | None  # mean training time so far
    p_value: float | None  # one-sided t-test that the mean is below the target; None for one run


@dataclass(frozen=True, slots=True)
class Curve:
    """A series against a target."""

    series: str
    target: float
    alpha: float
    runs: tuple[Crossing, ...]
    common: tuple[CommonStep, ...]
    mean_crossing: Crossing | None  # of the mean curve
    first_below: int | None  # first common validation whose mean is at or below the target
    first_significant: int | None  # first one from which on every later one passes the t-test, too
    slope_per_step: float | None  # of the mean curve at its end: nats a step
    slope_per_s: float | None
    steps_to_spare: float | None  # steps by which the mean curve passes the target before its end
    notes: tuple[str, ...]


def curve(runs: Sequence[Run], target: float, alpha: float = 0.01, name: str = "") -> Curve:
    """Crossings of `target` (nats) by each run and by their mean.

    Unfinished runs count as far as they go. Raises DataError without validations or for a damaged log,
    UsageError for a target at which no curve can be looked at.
    """
    if not np.isfinite(target):
        raise UsageError(f"the target must be finite, not {target}")
    for run in runs:
        if run.problems:
            raise DataError(f"damaged log: {run.problems[0].text}", run.path, run.problems[0].line)
    runs = [run for run in runs if run.validations]
    if not runs:
        raise DataError("no validations, so no curve", name or None)
    crossings = tuple(crossing(run.name, _points(run), target) for run in runs)
    common = _common_steps(runs, target)
    mean_points = [(step.step, step.mean, step.time_s) for step in common]
    mean = crossing("mean", mean_points, target) if mean_points else None
    significant = _from_here_on(common, alpha)
    slope, slope_s = _slopes(mean_points)
    spare = common[-1].step - mean.steps if mean and mean.steps is not None else None
    return Curve(
        name,
        target,
        alpha,
        crossings,
        common,
        mean,
        next((step.step for step in common if step.mean <= target), None),
        significant,
        slope,
        slope_s,
        spare,
        _notes(runs, common),
    )


Points = Sequence[tuple[int, float, "float | None"]]


def _points(run: Run) -> Points:
    return [(point.step, point.loss, point.time_s) for point in run.validations]


def crossing(name: str, points: Points, target: float) -> Crossing:
    """Where a curve first reaches the target from above, linear between validations.

    points: (step, loss, seconds or None), at least one, in the order of the steps."""
    steps = time_s = None
    for (step0, loss0, time0), (step1, loss1, time1) in zip([points[0], *points], points):
        if loss1 <= target:
            share = 1.0 if loss0 <= target or step0 == step1 else (loss0 - target) / (loss0 - loss1)
            steps = step0 + share * (step1 - step0)
            time_s = None if time0 is None or time1 is None else time0 + share * (time1 - time0)
            break
    slope, _ = _slopes(points)
    return Crossing(name, steps, time_s, slope, points[-1][0], points[-1][1])


def _slopes(points: Points) -> tuple[float | None, float | None]:
    """(nats a step, nats a second) over the last two validations."""
    if len(points) < 2:
        return None, None
    (step0, loss0, time0), (step1, loss1, time1) = points[-2:]
    per_second = None if time0 is None or time1 is None or time1 <= time0 else (loss1 - loss0) / (time1 - time0)
    return (loss1 - loss0) / (step1 - step0), per_second


def _common_steps(runs: Sequence[Run], target: float) -> tuple[CommonStep, ...]:
    by_step = [{point.step: point for point in run.validations} for run in runs]
    found = []
    for step in sorted(set.intersection(*(set(points) for points in by_step))):
        at = [points[step] for points in by_step]
        losses = [point.loss for point in at]
        times = [point.time_s for point in at if point.time_s is not None]
        several = len(losses) > 1 and np.ptp(losses) > 0
        p_value = below_p(losses, target) if several else None
        found.append(
            CommonStep(
                step,
                statistics.fmean(losses),
                statistics.stdev(losses) if len(losses) > 1 else None,
                statistics.fmean(times) if len(times) == len(at) else None,
                p_value,
            )
        )
    return tuple(found)


def _from_here_on(common: Sequence[CommonStep], alpha: float) -> int | None:
    first = None
    for step in reversed(common):
        if step.p_value is None or step.p_value >= alpha:
            break
        first = step.step
    return first


def _notes(runs: Sequence[Run], common: Sequence[CommonStep]) -> tuple[str, ...]:
    notes = []
    if not common:
        notes.append("the runs have no validation step in common: no mean curve")
    longest = max(run.validations[-1].step for run in runs)
    short = [run.name for run in runs if run.validations[-1].step < longest]
    if short:
        notes.append(f"{len(short)} of {len(runs)} runs end before step {longest}: {', '.join(short[:4])}")
    if len(runs) > 1:
        notes.append("choosing the step after seeing these p-values is choosing among many tests: fix it in a plan")
    return tuple(notes)


def render(result: Curve, most_rows: int = 12) -> str:
    """Crossings and the last common validations in plain text."""
    from stats.text import number, p_text, table

    lines = [f"{result.series}: target {result.target:g}", ""]
    rows = [
        [
            c.run,
            _or_dash(c.steps, ".1f"),
            _or_dash(c.time_s, ".1f"),
            c.final_step,
            number(c.final_loss),
            _or_dash(c.slope_per_step, ".3g"),
        ]
        for c in (*result.runs, *([result.mean_crossing] if result.mean_crossing else []))
    ]
    header = ["run", "steps to target", "seconds to target", "final step", "final loss", "slope (nats/step)"]
    lines += [table(header, rows), ""]
    rows = [
        [
            s.step,
            number(s.mean),
            number(s.std),
            _or_dash(s.time_s, ".1f"),
            "-" if s.p_value is None else p_text(s.p_value),
        ]
        for s in result.common[-most_rows:]
    ]
    lines += [table(["common step", "mean loss", "std", "mean seconds", "p (below target)"], rows), ""]
    if result.mean_crossing and result.mean_crossing.steps is not None:
        lines.append(
            f"the mean curve reaches {result.target:g} at step {result.mean_crossing.steps:.1f}, "
            f"{result.steps_to_spare:.1f} steps before its end"
        )
    else:
        lines.append(f"the mean curve does not reach {result.target:g}")
    if result.first_significant is not None:
        lines.append(
            f"from step {result.first_significant} on, every common validation passes at alpha {result.alpha:g}"
        )
    return "\n".join(lines + [f"note: {note}" for note in result.notes])


def _or_dash(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
