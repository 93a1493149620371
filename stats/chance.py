"""How near two loss curves may lie by accident: the test behind the search for copied and jittered logs.

Two runs of one recipe differ at every validation by noise. At each step the differences of all pairs give its size, and
their autocorrelation along the steps how many independent differences a pair of curves really holds. The mean square of
one pair's differences, in units of that noise, is then nearly chi-square over its degrees of freedom; only its lower
tail is of interest: nearer than noise allows. Half of the degrees of freedom that the autocorrelation gives are used,
so that an honest pair is not accused where the approximation is poor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import scipy

ACCUSED_BELOW = 1e-6  # chance of an accident, over all pairs of a series
FEWEST_CURVES = 3
FEWEST_POINTS = 4
_NORMAL_MEDIAN = 0.6744897501960817  # median of |z| for a standard normal z


@dataclass(frozen=True, slots=True)
class Nearness:
    """Two curves that are nearer than the others."""

    first: int
    second: int
    ratio: float  # root mean square of their differences, in units of the noise between runs
    chance: float  # that any pair of the series comes so near by accident


def nearest_pairs(curves: Sequence[Sequence[float]]) -> list[Nearness]:
    """All pairs of `curves` (runs, common validation steps), the nearest first; empty where there are too few runs or
    steps to tell noise from likeness."""
    x = np.asarray(curves, dtype=np.float64)
    if x.ndim != 2 or len(x) < FEWEST_CURVES or x.shape[1] < FEWEST_POINTS or not np.isfinite(x).all():
        return []
    pairs = list(combinations(range(len(x)), 2))
    first, second = (np.array([pair[side] for pair in pairs]) for side in (0, 1))
    differences = x[first] - x[second]
    scale = np.median(np.abs(differences), axis=0) / _NORMAL_MEDIAN
    differences, scale = differences[:, scale > 0], scale[scale > 0]
    if len(scale) < FEWEST_POINTS:
        return []
    z = differences / scale
    freedom = max(1.0, 0.5 * independent_points(z))
    squares = (z * z).mean(axis=1)
    chances = np.minimum(1.0, scipy.stats.chi2.cdf(freedom * squares, freedom) * len(pairs))
    order = np.argsort(squares)
    return [Nearness(pairs[i][0], pairs[i][1], float(np.sqrt(squares[i])), float(chances[i])) for i in order]


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
