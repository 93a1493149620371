"""Several tests at once, unequal spreads, sameness: the corrections and tests that stand beside Welch's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import scipy


def holm_p(p_values: Sequence[float], most_true: int | None = None) -> list[float]:
    """p-values corrected by Holm's step-down method (Holm 1979): the chance of any false claim stays below alpha.

    `most_true`: how many of the hypotheses can be true at once, where that is fewer than all of them (Shaffer 1986)."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        factor = min(len(p_values) - rank, most_true or len(p_values))
        highest = max(highest, min(1.0, factor * p_values[index]))
        corrected[index] = highest
    return corrected


def dunnett_p(candidates: Sequence[Sequence[float]], control: Sequence[float]) -> list[float]:
    """Two-sided p-values of several candidates against one control (Dunnett 1955); assumes one spread for all."""
    rng = np.random.default_rng(0)  # the multivariate t is integrated by quasi-random points
    return [float(p) for p in scipy.stats.dunnett(*map(np.asarray, candidates), control=control, rng=rng).pvalue]


def tost_p(a: Sequence[float], b: Sequence[float], margin: float) -> float:
    """p of two one-sided Welch tests that the means of `a` and `b` lie within `margin` of each other."""
    x, y = np.asarray(a, float), np.asarray(b, float)
    low = scipy.stats.ttest_ind(x + margin, y, equal_var=False, alternative="greater").pvalue
    high = scipy.stats.ttest_ind(x - margin, y, equal_var=False, alternative="less").pvalue
    return float(max(low, high))


def below_p(values: Sequence[float] | np.ndarray, threshold: float) -> float:
    """p of the one-sided one-sample t-test that the mean of two or more `values` that differ is below `threshold`;
    what scipy.stats.ttest_1samp gives, without its overhead, for the many small tests of curves and boards."""
    x = np.asarray(values, float)
    t = (x.mean() - threshold) / (x.std(ddof=1) / math.sqrt(len(x)))
    return float(scipy.special.stdtr(len(x) - 1, t))


def welch_anova_p(groups: Sequence[Sequence[float]]) -> float:
    """p that all groups have one mean, without one spread for all (Welch 1951)."""
    sizes = np.array([len(group) for group in groups], float)
    means = np.array([np.mean(group) for group in groups])
    weights = sizes / np.array([np.var(group, ddof=1) for group in groups])
    k, total = len(groups), weights.sum()
    mean = (weights * means).sum() / total
    spread = ((1 - weights / total) ** 2 / (sizes - 1)).sum() / (k * k - 1)
    f = (weights * (means - mean) ** 2).sum() / (k - 1) / (1 + 2 * (k - 2) * spread)
    return float(scipy.stats.f.sf(f, k - 1, 1 / (3 * spread)))


def studentised_bound(x: np.ndarray, alpha: float, resamples: int, rng: np.random.Generator) -> float | None:
    """One-sided upper bound of the mean at 1 - alpha by the bootstrap of t (Efron 1979, Hall 1988): unlike the
    bootstrap of the mean it knows that a small sample's own spread is uncertain. None where it has no end."""
    n = len(x)
    draws = x[rng.integers(0, n, (resamples, n))]
    spread = draws.std(axis=1, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (draws.mean(axis=1) - x.mean()) / (spread / math.sqrt(n))
    quantile = float(np.quantile(np.where(np.isnan(t), 0.0, t), alpha, method="lower"))
    bound = float(x.mean()) - quantile * float(x.std(ddof=1)) / math.sqrt(n)
    return bound if math.isfinite(bound) else None
