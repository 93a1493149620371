"""The sequential test on a series that is running: what do the runs say so far, and what shall happen next?

The runs count in the order in which they were launched, not in which they ended: quick runs are not
preferred. At the first launch whose end is not known yet the test waits, even if later ones have ended.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stats.errors import DataError, UsageError
from stats.planfile import read_plan
from stats.plans import Plan
from stats.samples import final_of, in_launch_order, mixture, reason_left_out
from stats.sequential import Decision, decide
from stats.series import Launch, Series
from stats.ttest import t_range
from stats.values import LeftOut, Run, Validation, decimals_of, is_finished


@dataclass(frozen=True, slots=True)
class Monitoring:
    """The decision on a series, and which launch plays which part in it."""

    series: str
    decision: Decision
    counted: tuple[str, ...]  # runs whose losses the test has seen, in the order of their launch
    waiting_for: tuple[str, ...]  # launched, and neither ended nor given up
    ended_early: tuple[str, ...]  # ended, but after a launch that the test waits for
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]


def monitor(series: Series, plan: Plan | None = None, drop: Mapping[str, str] | None = None) -> Monitoring:
    """The sequential test of `plan` (the series' own plan.json if None) on what has ended of `series`.

    Raises UsageError without a plan; DataError for damaged logs, mixed configurations, a run that diverged.
    """
    if plan is None:
        if series.plan_path is None:
            raise UsageError(f"{series.path} has no plan.json; make one with `plan`, or name one with --plan")
        plan = read_plan(series.plan_path)
    stop_step = series.stop_step if plan.stop_step is None else plan.stop_step
    runs = {run.name: run for run in series.runs}
    counted: list[Run] = []
    finals: list[Validation] = []
    waiting, early, left_out = [], [], []
    for name, launch in _launches(series, stop_step):
        run = runs.get(name)
        reason = (drop or {}).get(name)
        if launch and launch.status in ("queued", "running", "interrupted") and not reason:
            waiting.append(name)
        elif reason := reason or reason_left_out(launch):
            left_out.append(LeftOut(name, reason))
        elif run is None:
            raise DataError(f"run {name} finished by the ledger, but its log is not there", series.path)
        elif waiting:
            early.append(name)
        else:
            counted.append(run)
            finals.append(final_of(run, launch, stop_step))
    if mixed := mixture(counted, stop_step):
        raise DataError(f"runs of different configurations: {'; '.join(mixed)}", series.path)
    decision = decide([point.loss for point in finals], plan)
    return Monitoring(
        series.name,
        decision,
        tuple(run.name for run in counted),
        tuple(waiting),
        tuple(early),
        tuple(left_out),
        (*_notes(series, plan, counted), *_notes_on_digits(finals, plan, decision)),
    )


def monitor_losses(losses: Sequence[float], plan: Plan) -> Monitoring:
    """The same for bare losses, in the order of their launch."""
    names = tuple(f"loss {number}" for number in range(1, len(losses) + 1))
    return Monitoring("losses", decide(losses, plan), names, (), (), (), ())


def _launches(series: Series, stop_step: int | None) -> list[tuple[str, Launch | None]]:
    """Every launch in order. Without a ledger the logs are all there is; an unfinished one counts as running."""
    if series.launches is not None:
        return [(launch.run, launch) for launch in series.launches]
    order = in_launch_order(series)
    return [
        (run.name, None if is_finished(run, stop_step) or run.problems else Launch(run.name, "running", 0))
        for run in order
    ]


def _notes_on_digits(finals: Sequence[Validation], plan: Plan, decision: Decision) -> list[str]:
    """That the printed digits decide: all losses equal, or a verdict that those which were not printed could turn."""
    look = decision.path[-1] if decision.path else None
    if look is None:
        return []
    used = finals[: look.n]
    if math.isnan(look.t):
        return [f"all {look.n} losses are {used[0].loss}, which decides nothing: copies of one run, or too few digits?"]
    digits = decimals_of(used)
    if look.t_accept is None or look.t_futile is None or digits is None:
        return []
    above, below = t_range(np.array([point.loss for point in used]), plan.threshold, digits)
    low, high = -below, -above
    if (low >= look.t_accept) == (high >= look.t_accept) and (low <= look.t_futile) == (high <= look.t_futile):
        return []
    text = f"the losses are rounded to {digits} decimals, which leaves t anywhere in [{low:.3g}, {high:.3g}]"
    return [f"{text}: the verdict hangs on digits not printed"]


def _notes(series: Series, plan: Plan, counted: list[Run]) -> tuple[str, ...]:
    notes = []
    if series.launches is None:
        notes.append("no ledger: runs are taken in the order of their names, and crashed ones cannot be seen")
    else:
        unknown = sorted({run.name for run in series.runs} - {launch.run for launch in series.launches})
        if unknown:
            notes.append(f"not in the ledger, and not counted: {', '.join(unknown)}")
        if again := [f"{launch.run} ({launch.crashes})" for launch in series.launches if launch.crashes]:
            notes.append(f"launches that crashed: {', '.join(again)}")
    other = [run.name for run in counted if run.plan_hash is None or not plan.hash.startswith(run.plan_hash)]
    if other:
        notes.append(
            f"{len(other)} of {len(counted)} logs do not carry this plan's hash ({', '.join(other[:3])}"
            f"{', ...' if len(other) > 3 else ''}): they do not show that the plan came first"
        )
    notes += [f"ledger.jsonl:{problem.line}: {problem.text}" for problem in series.ledger_problems]
    return tuple(notes)


def render(result: Monitoring) -> str:
    """The decision in plain text."""
    from stats.text import number, table

    decision = result.decision
    lines = [f"{result.series}: {decision.words}", ""]
    rows = [
        [look.n, *map(number, (look.mean, look.t, look.t_futile, look.t_accept, look.log_likelihood_ratio))]
        for look in decision.path
    ]
    if rows:
        header = ["runs", "mean loss", "t", "futile at or below", "accept at or above", "log likelihood ratio"]
        lines += [table(header, rows), ""]
    if estimate := decision.estimate:
        text = f"mean loss {number(estimate.mean)}; corrected for stopping {number(estimate.corrected_mean)}"
        if estimate.upper_bound is not None:
            text += f", below {number(estimate.upper_bound)} at {estimate.level:.0%}"
        lines.append(text)
    if decision.unused:
        lines.append(f"{decision.unused} later runs do not change the verdict")
    if result.waiting_for:
        early = f"; ended meanwhile: {', '.join(result.ended_early)}" if result.ended_early else ""
        lines.append(f"waiting for {', '.join(result.waiting_for)}{early}")
    lines += [f"left out: {entry.run}: {entry.reason}" for entry in result.left_out]
    lines += [f"note: {note}" for note in result.notes]
    lines.append(f"plan {decision.plan_hash[:16]}")
    return "\n".join(lines)
