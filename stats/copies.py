"""Runs that are one run: equal or nearly equal curves, within a series and across the series that are judged together.

Equal losses happen by accident where there are few of them and few digits, so that everything here comes with the
chance of that; what is below `stats.chance.ACCUSED_BELOW` is accused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from stats.chance import ACCUSED_BELOW, FEWEST_POINTS, Nearness, chance_of_equality, near_across, nearest_pairs
from stats.samples import Sample
from stats.series import Series
from stats.values import Finding, Run, decimals_of

# In how many ways curves are looked at: validations, the first half of them, and within a series training losses, each
# as it is and by its differences from one to the next, which a constant that was added leaves as they are.
LOOKS_WITHIN, LOOKS_ACROSS = 6, 2
# Between two runs, where too few tell it: nats, and seconds between validations.
LEAST_NOISE = {"every loss": 5e-4, "every time": 2e-3}
CHANCE_OF_A_TRACE = 2.0**-60
TIME_GRID = 1e-3  # seconds: the clocks of logs tell milliseconds at best


class Twins(NamedTuple):
    """Two runs that tell the same."""

    first: Run
    second: Run
    what: str  # every loss, every time, or both
    chance: float  # that any pair of all those runs is so by accident


def within(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """Copies among the runs of one series."""
    accused: set[frozenset[str]] = set()
    for twins in _no_accidents(list(_twins([series.runs]))):
        accused.add(frozenset((twins.first.label, twins.second.label)))
        text = f"{twins.second.name} and {twins.first.name} are the same run: {twins.what} is equal"
        yield Finding("duplicates", "F", text)
    for runs, curves, grid, told in _curves(series.runs):
        for way, look in _looks_at(curves):
            for near in nearest_pairs(look, LOOKS_WITHIN, grid)[:20]:
                a, b = runs[near.first], runs[near.second]
                pair = frozenset((a.label, b.label))
                if pair not in accused:
                    accused.add(pair)
                    text = f"{a.name} and {b.name} {way} {near.ratio:.2g} of the noise apart over {told}"
                    yield Finding(
                        "duplicates", "F", f"{text}: by accident with probability {max(near.chance, 1e-300):.1g}"
                    )


def _curves(all_runs: Sequence[Run]) -> Iterator[tuple[list[Run], np.ndarray, float, str]]:
    """(runs, their values (runs, steps), distance of neighbouring values as printed, what they are): validations, the
    first half of them (a copy may have a new end), training losses."""
    runs = [run for run in all_runs if len(run.validations) >= FEWEST_POINTS]
    x = _at_common_steps([run.losses_by_step for run in runs])
    half = x.shape[1] // 2
    yield runs, x, _grid(runs), f"{x.shape[1]} validations"
    yield runs, x[:, :half], _grid(runs), f"the first {half} validations"
    runs = [run for run in all_runs if len(run.training) >= FEWEST_POINTS]
    x = _at_common_steps([dict(run.training) for run in runs])
    yield runs, x, 1e-3, f"{x.shape[1]} training losses"


def _at_common_steps(curves: Sequence[dict[int, float]]) -> np.ndarray:
    """(runs, steps that all of them have) values."""
    common = sorted(set.intersection(*map(set, curves))) if curves else []
    return np.array([[curve[step] for step in common] for curve in curves]).reshape(len(curves), len(common))


def _looks_at(curves: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(how two of them are near, values) of curves (runs, steps): as they are, and their steps."""
    yield "lie", curves
    yield "run parallel,", np.diff(curves, axis=-1)


def _grid(runs: Sequence[Run]) -> float:
    """The distance of neighbouring losses as the logs print them; 0 for full precision."""
    digits = decimals_of([point for run in runs for point in run.validations])
    return 0.0 if digits is None else 10.0**-digits


def _no_accidents(found: Sequence[Twins]) -> list[Twins]:
    """Those that are no accident: each by itself, or the others all together."""
    weak = [twins for twins in found if twins.chance >= ACCUSED_BELOW]
    together = math.prod(twins.chance for twins in weak) < ACCUSED_BELOW
    return [twins for twins in found if together or twins.chance < ACCUSED_BELOW]


def _twins(samples: Sequence[Sequence[Run]]) -> Iterator[Twins]:
    """Pairs of equal runs in all the samples together, each run with the first one that it equals."""
    groups: dict[tuple[int, ...], list[list[Run]]] = {}
    for runs in samples:
        parts: dict[tuple[int, ...], list[Run]] = {}
        for run in runs:
            parts.setdefault(tuple(point.step for point in run.validations), []).append(run)
        for steps, part in parts.items():
            groups.setdefault(steps, []).append(part)
    found: dict[tuple[str, str], Twins] = {}
    for one in chain(*map(_equal_ones, groups.values()), _equal_traces([run for runs in samples for run in runs])):
        pair = one.first.label, one.second.label
        before = found.get(pair)
        found[pair] = one if before is None else _both(before, one)
    yield from found.values()


def _both(a: Twins, b: Twins) -> Twins:
    """One pair of runs that is equal in two ways."""
    return Twins(a.first, a.second, f"{a.what} and {b.what}", a.chance * b.chance)


def _equal_traces(runs: Sequence[Run]) -> Iterator[Twins]:
    """Runs whose lines between validations tell the same, whatever their validations say."""
    seen: dict[tuple[str, str], Run] = {}
    for run in runs:
        for what, trace in run.traces:
            before = seen.setdefault((what, trace), run)
            if before is not run:
                yield Twins(before, run, f"every {what}", CHANCE_OF_A_TRACE * len(runs) ** 2)


def _equal_ones(samples: Sequence[Sequence[Run]]) -> Iterator[Twins]:
    """`_twins` of samples over one set of steps."""
    told = {"every loss": [_losses(runs) for runs in samples], "every time": [_times(runs) for runs in samples]}
    grids = {"every loss": max([_grid(runs) for runs in samples]), "every time": TIME_GRID}
    chances = {what: chance_of_equality(tables, LEAST_NOISE[what], grids[what]) for what, tables in told.items()}
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
            copied.setdefault((here.path, there.path, _same_log(twins)), []).append(twins)
    found: dict[str, list[Finding]] = {}
    for (here_path, there_path, same), pairs in copied.items():
        if not (told := _no_accidents(pairs)):
            continue
        names = list(dict.fromkeys(twins.second.name for twins in told))
        losses = "every loss" if all("every loss" in twins.what for twins in told) else "every training loss"
        what = "are runs of" if same else f"have {losses} of runs of"
        text = f"{len(names)} runs ({', '.join(names[:3])}) {what} {there_path}: told twice, they are no new evidence"
        found.setdefault(here_path, []).append(Finding("copied", "F" if same else "C", text))
    for path, finding in _near_copies(series):
        if not any(one.grade == "F" for one in found.get(path, ())):
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
        grid = max(_grid(one.runs) for one in alike)
        accused: dict[tuple[int, int], dict[tuple[int, int], Nearness]] = {}
        for one in zip(*(list(_looks_at(each)) for each in curves)):
            for a, b, near in near_across([look for _, look in one], LOOKS_ACROSS, grid):
                if (curves[a][near.first] != curves[b][near.second]).any():  # equal ones are told as what they are
                    accused.setdefault((a, b), {}).setdefault((near.first, near.second), near)
        for (a, b), pairs in accused.items():
            names = list(dict.fromkeys(alike[b].runs[second].name for _, second in pairs))
            ratio, chance = (max(getattr(near, what) for near in pairs.values()) for what in ("ratio", "chance"))
            text = (
                f"{len(names)} runs ({', '.join(names[:3])}) lie within {ratio:.2g} of the noise of runs of "
                f"{alike[a].path}, or run parallel to them: by accident with probability {max(chance, 1e-300):.1g}"
            )
            if all(_two_recipes(alike[a].runs[first], alike[b].runs[second]) for first, second in pairs):
                text += "; or one seed under two recipes that hardly differ"
                yield alike[b].path, Finding("copied", "C", text)
            else:
                yield alike[b].path, Finding("copied", "F", text)


def _two_recipes(a: Run, b: Run) -> bool:
    """Whether two runs are of one seed and say that they are of different recipes: then they may well be near."""
    differ = any(
        None not in (one := (getattr(a, what), getattr(b, what))) and one[0] != one[1]
        for what in ("code_hash", "config_hash", "program_hash")
    )
    return a.seed is not None and a.seed == b.seed and differ


def _same_log(twins: Twins) -> bool:
    """Whether one log was told twice: its clock is the same. Equal losses alone may be one seed, run twice."""
    points = [{point.step: point.time_s for point in run.validations} for run in twins[:2]]
    common = points[0].keys() & points[1].keys()
    same_times = bool(common) and all(points[0][step] == points[1][step] for step in common)
    return "time" in twins.what or same_times
