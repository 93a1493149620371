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
from dataclasses import dataclass

import numpy as np
import scipy

ACCUSED_BELOW = 1e-6  # chance of an accident, over all pairs that were looked at
FEWEST_CURVES = 3
FEWEST_POINTS = 4
FEWEST_DIGITS = 4  # printed units that the noise at a point must hold, for the point to tell near from equal
MOST_PAIRS = 20_000  # that the size of the noise is taken from
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


def noise_of(curves: np.ndarray) -> Noise | None:
    """The noise between `curves` (runs, common validation steps); None where too few of either tell it."""
    if curves.ndim != 2 or len(curves) < FEWEST_CURVES or curves.shape[1] < FEWEST_POINTS:
        return None
    if not np.isfinite(curves).all():
        return None
    first, second = _some_pairs(len(curves))
    differences = curves[first] - curves[second]
    scale = np.median(np.abs(differences), axis=0) / _NORMAL_MEDIAN
    scale[scale <= FEWEST_DIGITS * grid_of(curves)] = 0.0  # digits too coarse to tell near from equal
    if (scale > 0).sum() < FEWEST_POINTS:
        return None
    z = differences[:, scale > 0] / scale[scale > 0]
    return Noise(scale, max(1.0, 0.5 * independent_points(z)))


def grid_of(values: np.ndarray) -> float:
    """The distance of neighbouring values as they were printed: 1e-4 for four digits; 0 for full precision."""
    digits = (digits for digits in range(8) if np.allclose(values, np.round(values, digits), rtol=0, atol=1e-11))
    return next((10.0**-one for one in digits), 0.0)


def chance_of_equality(samples: Sequence[np.ndarray], least_noise: float) -> float:
    """The chance that two of the curves (runs, points) of `samples` print alike at every point by accident.

    The noise between runs is that of the quietest sample, or `least_noise` where none has three runs. Neighbouring
    points remember one another: every one after the first counts half.
    """
    if not samples or samples[0].shape[1] == 0:
        return 1.0
    grid = max([1e-9, *(grid_of(curves) for curves in samples)])
    scales = [np.full(samples[0].shape[1], least_noise)]
    if larger := [curves for curves in samples if len(curves) >= FEWEST_CURVES and np.isfinite(curves).all()]:
        pairs = [(curves, _some_pairs(len(curves))) for curves in larger]
        scales = [np.median(np.abs(x[a] - x[b]), axis=0) / _NORMAL_MEDIAN for x, (a, b) in pairs]
    scale = np.maximum(np.min(scales, axis=0), grid / 4)
    each = np.minimum(1.0, grid / (math.sqrt(2 * math.pi) * scale))
    weight = 0.5 + 0.5 / len(each)
    return math.exp(weight * float(np.log(each).sum()))


def _some_pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of n, or as many as tell their noise well enough."""
    if n * (n - 1) // 2 <= MOST_PAIRS:
        first, second = np.triu_indices(n, 1)
        return first, second
    rng = np.random.default_rng(0)
    first = rng.integers(0, n, MOST_PAIRS)
    return first, (first + rng.integers(1, n, MOST_PAIRS)) % n


def nearest_pairs(curves: Sequence[Sequence[float]], looks: int = 1) -> list[Nearness]:
    """The pairs of `curves` (runs, common validation steps) that are nearer than an accident explains, the nearest
    first; empty where there are too few runs or steps to tell noise from likeness. `looks`: at how many parts of the
    curves the caller looks, each of which is a chance of an accident."""
    x = np.asarray(curves, dtype=np.float64)
    noise = noise_of(x)
    if noise is None:
        return []
    pairs = looks * len(x) * (len(x) - 1) // 2
    told = noise.scale > 0
    z = (x[:, told] - x[:, told].mean(axis=0)) / noise.scale[told]
    first, second = _within(z, _limit(noise.freedom, pairs))
    squares = ((z[first] - z[second]) ** 2).mean(axis=1)
    return _accused(first, second, squares, noise.freedom, pairs)


def near_across(series: Sequence[np.ndarray]) -> list[tuple[int, int, Nearness]]:
    """(series, other series, runs of the two) that are nearer than an accident explains, the nearest first.

    `series`: curves (runs, steps) over one set of steps. The noise of a pair is the lesser of its two series', so that
    a quiet recipe is not taken for a copy of a noisy one; a series of fewer than three runs tells none and is left out.
    """
    told = [(index, curves, noise) for index, curves in enumerate(series) if (noise := noise_of(curves)) is not None]
    if len(told) < 2:
        return []
    owner = np.concatenate([np.full(len(curves), place) for place, (_, curves, _) in enumerate(told)])
    member = np.concatenate([np.arange(len(curves)) for _, curves, _ in told])
    x = np.concatenate([curves for _, curves, _ in told])
    widest = np.max([noise.scale for _, _, noise in told], axis=0)
    x = (x - x.mean(axis=0))[:, widest > 0]
    pairs = len(x) * (len(x) - 1) // 2
    first, second = _within(x / widest[widest > 0], 1.0)
    other = owner[first] != owner[second]
    found = []
    for a, b in zip(first[other], second[other]):
        noises = [told[owner[one]][2] for one in (a, b)]
        scale = np.minimum(noises[0].scale, noises[1].scale)[widest > 0]
        if (scale > 0).sum() >= FEWEST_POINTS:
            square = float((((x[a] - x[b])[scale > 0] / scale[scale > 0]) ** 2).mean())
            freedom = min(noise.freedom for noise in noises)
            for near in _accused(member[[a]], member[[b]], np.array([square]), freedom, pairs):
                found.append((told[owner[a]][0], told[owner[b]][0], near))
    return sorted(found, key=lambda one: one[2].ratio)


def _limit(freedom: float, pairs: int) -> float:
    """The mean square below which one of `pairs` is accused."""
    return float(scipy.stats.chi2.ppf(ACCUSED_BELOW / pairs, freedom) / freedom)


def _within(z: np.ndarray, square: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of rows of z whose mean square difference is at most `square`."""
    radius = np.sqrt(square * z.shape[1]) * (1 + 1e-9) + 1e-12
    found = scipy.spatial.cKDTree(z).query_pairs(radius, output_type="ndarray")
    return found[:, 0], found[:, 1]


def _accused(first: np.ndarray, second: np.ndarray, squares: np.ndarray, freedom: float, pairs: int) -> list[Nearness]:
    """Those whose chance is below ACCUSED_BELOW, the nearest first."""
    chances = np.minimum(1.0, scipy.stats.chi2.cdf(freedom * squares, freedom) * pairs)
    return [
        Nearness(int(first[i]), int(second[i]), float(np.sqrt(squares[i])), float(chances[i]))
        for i in np.argsort(squares)
        if chances[i] < ACCUSED_BELOW
    ]


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
