"""How near two loss curves may lie by accident: the test behind the search for copied and jittered logs.

Two runs of one recipe differ at every validation by noise. At each step the differences of pairs give its size, and
their autocorrelation along the steps how many independent differences a pair of curves really holds. The mean square of
one pair's differences, in units of that noise, is then nearly chi-square over its degrees of freedom; only its lower
tail is of interest: nearer than noise allows. Half of the degrees of freedom that the autocorrelation gives are used,
so that an honest pair is not accused where the approximation is poor.

Only pairs that near are looked for, in a tree, so that the search in a folder of thousands of runs stays far below the
square of their number and loses none of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy

ACCUSED_BELOW = 1e-6  # chance of an accident, over all pairs that were looked at
FEWEST_CURVES = 3
FEWEST_POINTS = 4
FEWEST_DIGITS = 4  # printed units that the noise at a point must hold, for the point to tell near from equal
MOST_PAIRS = 20_000  # that the size of the noise is taken from
BLOCK = 1 << 16  # pairs whose differences are held at once
_NORMAL_MEDIAN = 0.6744897501960817  # median of |z| for a standard normal z


@dataclass(frozen=True, slots=True)
class Nearness:
    """Two curves that are nearer than noise allows."""

    first: int
    second: int
    ratio: float  # root mean square of their differences, in units of the noise between runs
    chance: float  # that any pair of those looked at comes so near by accident


@dataclass(frozen=True, slots=True)
class Noise:
    """How the runs of one series differ."""

    scale: np.ndarray  # (steps,) of the difference of two runs; 0 where most of them are equal
    freedom: float  # independent differences that a pair of curves holds, halved


def noise_of(curves: np.ndarray, grid: float = 0.0) -> Noise | None:
    """The noise between `curves` (runs, common validation steps), printed to the nearest multiple of `grid`; None where
    too few of either tell it."""
    if curves.ndim != 2 or len(curves) < FEWEST_CURVES or curves.shape[1] < FEWEST_POINTS:
        return None
    if not np.isfinite(curves).all():
        return None
    first, second = _some_pairs(len(curves))
    differences = curves[first] - curves[second]
    scale = np.median(np.abs(differences), axis=0) / _NORMAL_MEDIAN
    scale[scale <= FEWEST_DIGITS * grid] = 0.0  # digits too coarse to tell near from equal
    if (scale > 0).sum() < FEWEST_POINTS:
        return None
    z = differences[:, scale > 0] / scale[scale > 0]
    return Noise(scale, max(1.0, 0.5 * independent_points(z)))


def chance_of_equality(samples: Sequence[np.ndarray], least_noise: float, grid: float) -> float:
    """The chance that two of the curves (runs, points) of `samples` print alike at every point by accident.

    `grid`: the distance of neighbouring values as they were printed. The noise between runs is that of the quietest
    sample, or `least_noise` where none has three runs. Neighbouring points remember one another: every one after the
    first counts half, and less where the runs show that it should (a clock that is steady throughout a run is one
    number, however often it is printed).
    """
    if not samples or samples[0].shape[1] == 0:
        return 1.0
    grid = max(1e-9, grid)
    points = samples[0].shape[1]
    scales, independent = [np.full(points, least_noise)], float(points)
    if larger := [curves for curves in samples if len(curves) >= FEWEST_CURVES and np.isfinite(curves).all()]:
        differences = [curves[a] - curves[b] for curves in larger for a, b in [_some_pairs(len(curves))]]
        scales = [np.median(np.abs(one), axis=0) / _NORMAL_MEDIAN for one in differences]
        independent = min(
            independent_points(one / np.maximum(scale, grid / 4)) for one, scale in zip(differences, scales)
        )
    scale = np.maximum(np.min(scales, axis=0), grid / 4)
    each = np.minimum(1.0, grid / (math.sqrt(2 * math.pi) * scale))
    weight = min(0.5 + 0.5 / points, independent / points)
    return math.exp(weight * float(np.log(each).sum()))


def _some_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of n, or as many as tell their noise well enough."""
    if n * (n - 1) // 2 <= MOST_PAIRS:
        first, second = np.triu_indices(n, 1)
        return first, second
    rng = np.random.default_rng(0)
    first = rng.integers(0, n, MOST_PAIRS)
    return first, (first + rng.integers(1, n, MOST_PAIRS)) % n


def nearest_pairs(curves: Sequence[Sequence[float]] | np.ndarray, looks: int = 1, grid: float = 0.0) -> list[Nearness]:
    """The pairs of `curves` (runs, common validation steps) that are nearer than an accident explains, the nearest
    first; empty where there are too few runs or steps to tell noise from likeness. `looks`: in how many ways the caller
    looks at the curves, each of which is a chance of an accident."""
    x = np.asarray(curves, dtype=np.float64)
    noise = noise_of(x, grid)
    if noise is None:
        return []
    pairs = looks * len(x) * (len(x) - 1) // 2
    told = noise.scale > 0
    z = (x[:, told] - x[:, told].mean(axis=0)) / noise.scale[told]
    first, second = _within(z, _limit(noise.freedom, pairs))
    squares = ((z[first] - z[second]) ** 2).mean(axis=1)
    found = _accused(first, second, squares, np.full(len(first), noise.freedom), pairs)
    return [near for _, near in found]


def near_across(series: Sequence[np.ndarray], looks: int = 1, grid: float = 0.0) -> list[tuple[int, int, Nearness]]:
    """(series, other series, runs of the two) that are nearer than an accident explains, the nearest first.

    `series`: curves (runs, steps) over one set of steps. The noise of a pair is the lesser of its two series', so that
    a quiet recipe is not taken for a copy of a noisy one; a series of fewer than three runs tells none and is left out.
    """
    noises = {index: noise for index, curves in enumerate(series) if (noise := noise_of(curves, grid)) is not None}
    if len(noises) < 2:
        return []
    owner = np.concatenate([np.full(len(series[index]), index) for index in noises])
    member = np.concatenate([np.arange(len(series[index])) for index in noises])
    x = np.concatenate([series[index] for index in noises])
    scale, freedom = np.zeros((len(series), x.shape[1])), np.zeros(len(series))
    for index, noise in noises.items():
        scale[index], freedom[index] = noise.scale, noise.freedom
    pairs = looks * len(x) * (len(x) - 1) // 2
    first, second = _candidates(x, scale[list(noises)], _limit(float(freedom.max()), pairs))
    other = owner[first] != owner[second]
    first, second = first[other], second[other]
    squares = np.empty(len(first))
    for start in range(0, len(first), BLOCK):
        a, b = first[start : start + BLOCK], second[start : start + BLOCK]
        squares[start : start + BLOCK] = _squares(x[a] - x[b], np.minimum(scale[owner[a]], scale[owner[b]]))
    found = _accused(first, second, squares, np.minimum(freedom[owner[first]], freedom[owner[second]]), pairs)
    return [
        (
            int(owner[first[i]]),
            int(owner[second[i]]),
            replace(near, first=int(member[first[i]]), second=int(member[second[i]])),
        )
        for i, near in found
    ]


def _candidates(x: np.ndarray, scales: np.ndarray, square: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows of x (runs, steps) of which any two of the `scales` (series, steps) could make a mean square of at
    most `square`; none of those is missing, some that are farther apart are among them."""
    told = (scales > 0).all(axis=0)  # at each of these steps a pair's own scale is at most the widest
    if not told.any():
        first, second = np.triu_indices(len(x), 1)
        return first, second
    z = (x[:, told] - x[:, told].mean(axis=0)) / scales[:, told].max(axis=0)
    return _within(z, square * x.shape[1] / int(told.sum()))


def _squares(differences: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Mean squares of differences (pairs, steps) in units of `scale`, over the steps where that is above 0; infinite
    where there are too few of those."""
    told = scale > 0
    z = np.divide(differences, scale, out=np.zeros_like(differences), where=told)
    count = told.sum(axis=1)
    return np.where(count >= FEWEST_POINTS, (z * z).sum(axis=1) / np.maximum(count, 1), np.inf)


def _limit(freedom: float, pairs: int) -> float:
    """The mean square below which one of `pairs` is accused."""
    return float(2 * scipy.special.gammaincinv(freedom / 2, ACCUSED_BELOW / pairs) / freedom)


def _within(z: np.ndarray, square: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows of z whose mean square difference is at most `square`."""
    radius = np.sqrt(square * z.shape[1]) * (1 + 1e-9) + 1e-12
    found = scipy.spatial.cKDTree(z).query_pairs(radius, output_type="ndarray")
    return found[:, 0], found[:, 1]


def _accused(
    first: np.ndarray, second: np.ndarray, squares: np.ndarray, freedom: np.ndarray, pairs: int
) -> list[tuple[int, Nearness]]:
    """(index of a pair, pair) of those whose chance is below ACCUSED_BELOW, the nearest first."""
    chances = np.minimum(1.0, scipy.special.gammainc(freedom / 2, freedom * squares / 2) * pairs)
    order = [int(i) for i in np.argsort(squares) if chances[i] < ACCUSED_BELOW]
    return [(i, Nearness(int(first[i]), int(second[i]), float(np.sqrt(squares[i])), float(chances[i]))) for i in order]


def independent_points(z: np.ndarray) -> float:
    """How many independent values the squares of z (pairs, steps) hold along the steps, from their autocorrelation."""
    steps = z.shape[1]
    power = float((z * z).mean())
    if power == 0:
        return 1.0
    spread = 1.0
    for lag in range(1, steps):
        correlation = float((z[:, lag:] * z[:, :-lag]).mean()) / power
        spread += 2 * (1 - lag / steps) * correlation**2
    return min(float(steps), max(1.0, steps / spread))
