"""Runs that are one run: equal or nearly equal curves, within a series and across the series that are judged together.

Equal losses happen by accident where there are few of them and few digits, so that everything here comes with the
chance of that; what is below `stats.chance.ACCUSED_BELOW` is accused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from stats.chance import ACCUSED_BELOW, chance_of_equality, near_across, nearest_pairs
from stats.samples import Sample
from stats.series import Series
from stats.values import Finding, Run

PARTS = 2  # of curves that are looked at: the whole, and the first half
# Between two runs, where too few tell it: nats, and seconds between validations.
LEAST_NOISE = {"every loss": 5e-4, "every time": 2e-3}


class Twins(NamedTuple):
    """Two runs that tell the same."""

    first: Run
    second: Run
    what: str  # every loss, every time, or both
    chance: float  # that any pair of all those runs is so by accident


def within(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """Copies among the runs of one series."""
    accused: set[frozenset[str]] = set()
    found = list(_twins([series.runs]))
    for twins in found if math.prod(twins.chance for twins in found) < ACCUSED_BELOW else ():
        accused.add(frozenset((twins.first.label, twins.second.label)))
        text = f"{twins.second.name} and {twins.first.name} are the same run: {twins.what} is equal"
        yield Finding("duplicates", "F", text)
    runs = [run for run in series.runs if len(run.validations) >= 4]
    common = sorted(set.intersection(*({p.step for p in run.validations} for run in runs))) if runs else []
    curves = [[run.losses_by_step[step] for step in common] for run in runs]
    for part, points in (("", len(common)), ("the first ", len(common) // 2)):  # a copy may have a new end
        for near in nearest_pairs([curve[:points] for curve in curves], PARTS)[:20]:
            a, b = runs[near.first], runs[near.second]
            pair = frozenset((a.label, b.label))
            if pair not in accused:
                accused.add(pair)
                text = f"{a.name} and {b.name} lie {near.ratio:.2g} of the noise apart over {part}{points} validations"
                yield Finding("duplicates", "F", f"{text}: by accident with probability {max(near.chance, 1e-300):.1g}")


def _twins(samples: Sequence[Sequence[Run]]) -> Iterator[Twins]:
    """Pairs of equal runs in all the samples together, each run with the first one that it equals."""
    groups: dict[tuple[int, ...], list[list[Run]]] = {}
    for runs in samples:
        parts: dict[tuple[int, ...], list[Run]] = {}
        for run in runs:
            parts.setdefault(tuple(point.step for point in run.validations), []).append(run)
        for steps, part in parts.items():
            groups.setdefault(steps, []).append(part)
    for alike in groups.values():
        yield from _equal_ones(alike)


def _equal_ones(samples: Sequence[Sequence[Run]]) -> Iterator[Twins]:
    """`_twins` of samples over one set of steps."""
    told = {"every loss": [_losses(runs) for runs in samples], "every time": [_times(runs) for runs in samples]}
    chances = {what: chance_of_equality(tables, LEAST_NOISE[what]) for what, tables in told.items()}
    count = sum(map(len, samples))
    pairs = count * (count - 1) / 2
    seen: dict[tuple[str, bytes], Run] = {}
    for number, runs in enumerate(samples):
        for index, run in enumerate(runs):
            equal: dict[str, tuple[Run, list[str]]] = {}  # {run before: (itself, what is equal)}
            for what, tables in told.items():
                if tables[number].shape[1]:
                    before = seen.setdefault((what, tables[number][index].tobytes()), run)
                    if before is not run:
                        equal.setdefault(before.label, (before, []))[1].append(what)
            for before, whats in equal.values():
                chance = min(1.0, pairs * math.prod(chances[what] for what in whats))
                yield Twins(before, run, " and ".join(whats), chance)


def _losses(runs: Sequence[Run]) -> np.ndarray:
    """(runs, validations after the start)."""
    return np.array([[point.loss for point in run.validations if point.step] for run in runs]).reshape(len(runs), -1)


def _times(runs: Sequence[Run]) -> np.ndarray:
    """(runs, validations after the start) seconds between validations; no columns where a run does not tell its times,
    or they are in whole seconds."""
    times = [[point.time_s for point in run.validations if point.step] for run in runs]
    if any(time is None for told in times for time in told):
        return np.empty((len(runs), 0))
    found = np.round(np.diff(np.array(times, dtype=float).reshape(len(runs), -1), prepend=0.0, axis=1), 9)
    return found if (found % 1).any() else np.empty((len(runs), 0))


def across(series: Sequence[Series]) -> dict[str, list[Finding]]:
    """{path of a series: findings} for runs that stand in more than one series of those that are judged together."""
    owner = {id(run): one for one in series for run in one.runs}
    copied: dict[tuple[str, str, bool], list[Twins]] = {}
    for twins in _twins([one.runs for one in series]):
        here, there = owner[id(twins.second)], owner[id(twins.first)]
        if here.path != there.path:
            same_log = twins.first.validations and _same_times(twins.first, twins.second)
            copied.setdefault((here.path, there.path, bool(same_log)), []).append(twins)
    found: dict[str, list[Finding]] = {}
    for (here_path, there_path, same), pairs in copied.items():
        if math.prod(twins.chance for twins in pairs) >= ACCUSED_BELOW:
            continue
        names = list(dict.fromkeys(twins.second.name for twins in pairs))
        what = "are runs of" if same else "have every loss of runs of"
        text = f"{len(names)} runs ({', '.join(names[:3])}) {what} {there_path}: told twice, they are no new evidence"
        found.setdefault(here_path, []).append(Finding("copied", "F" if same else "C", text))
    for path, finding in _near_copies(series):
        if not any(one.check == "copied" for one in found.get(path, ())):
            found.setdefault(path, []).append(finding)
    return found


def _near_copies(series: Sequence[Series]) -> Iterator[tuple[str, Finding]]:
    """(path of a series, finding) where runs of another series stand once more with other digits."""
    groups: dict[tuple[int, ...], list[Series]] = {}
    for one in series:
        steps = {tuple(point.step for point in run.validations) for run in one.runs}
        if len(steps) == 1:
            groups.setdefault(steps.pop(), []).append(one)
    for alike in groups.values():
        curves = [np.array([[point.loss for point in run.validations] for run in one.runs]) for one in alike]
        accused: dict[tuple[int, int], list] = {}
        for a, b, near in near_across(curves):
            if (curves[a][near.first] != curves[b][near.second]).any():  # equal ones are told as what they are
                accused.setdefault((a, b), []).append(near)
        for (a, b), pairs in accused.items():
            names = list(dict.fromkeys(alike[b].runs[near.second].name for near in pairs))
            text = (
                f"{len(names)} runs ({', '.join(names[:3])}) lie within {pairs[-1].ratio:.2g} of the noise of runs of "
                f"{alike[a].path}: by accident with probability {max(pairs[-1].chance, 1e-300):.1g}"
            )
            yield alike[b].path, Finding("copied", "F", text)


def _same_times(a: Run, b: Run) -> bool:
    times = [[point.time_s for point in run.validations] for run in (a, b)]
    return times[0] == times[1]
