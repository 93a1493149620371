"""Treatments against a base, pair by pair, looked at while they grow: helps, hurts, no effect, or not decided.

A pair is two runs with one seed, that is with equal data order and, where shapes agree, equal initial weights; what is
judged is the mean of the differences d = treatment - base. At the looks n_1 < ... < n_K (pairs, declared before the
first run)

    interval_k = mean(d) +- t(1 - a_k / 2; n_k - 1) * sd(d) / sqrt(n_k),    a_k = a * (n_k - n_{k-1}) / n_K

All K intervals hold together with probability 1 - a at least (a union bound: it needs nothing but each t interval), so
the one at which the study stops holds as well, whatever made it stop. With m treatments and a = alpha / m (Bonferroni)
the intervals of all treatments hold together: the probability of any wrong "helps" or "hurts" in the family is alpha
at most. Robbins' (1970) and Jennison and Turnbull's (1989) repeated confidence intervals are the finer relatives.

    helps        the interval lies below 0           hurts       it lies above 0
    no effect    it lies within +-margin             undecided   none of these at the last look

A run that diverged is a result, too: once half of a treatment's pairs have, it is called diverged and stops.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from stats.errors import DataError, UsageError

HELPS, HURTS, NO_EFFECT, UNDECIDED, DIVERGED, CONTINUE = (
    "helps",
    "hurts",
    "no effect",
    "undecided",
    "diverged",
    "continue",
)
MOST_PAIRS = 1000  # beyond these, "so many more runs" is of no use to anybody


@dataclass(frozen=True, slots=True)
class Design:
    """When to look, and what counts; fixed before the first run.

    alpha: probability of any wrong helps or hurts in the family. family: number of treatments. margin: the largest
    effect, in nats, that is called none."""

    looks: tuple[int, ...] = (4, 6, 8)
    alpha: float = 0.05
    family: int = 1
    margin: float = 0.005

    def __post_init__(self):
        if len(self.looks) == 0 or self.looks[0] < 2 or any(b <= a for a, b in zip(self.looks, self.looks[1:])):
            raise UsageError(f"looks {list(self.looks)}: growing numbers of pairs, the first at least 2")
        if not 0 < self.alpha < 1:
            raise UsageError(f"alpha {self.alpha}: above 0 and below 1")
        if self.family < 1:
            raise UsageError(f"family {self.family}: at least one treatment")
        if not (self.margin > 0 and math.isfinite(self.margin)):
            raise UsageError(f"margin {self.margin}: nats, above 0")

    @property
    def cap(self) -> int:
        """Pairs at the last look."""
        return self.looks[-1]

    def quantile(self, pairs: int, *, corrected: bool) -> float:
        """The t quantile of the interval at the last look that is not after `pairs`; at the first one before it."""
        return _quantile(self.looks, self.alpha / (self.family if corrected else 1), pairs)


@functools.cache
def _quantile(looks: tuple[int, ...], alpha: float, pairs: int) -> float:
    done = [n for n in looks if n <= pairs] or [looks[0]]
    before = looks[looks.index(done[-1]) - 1] if looks.index(done[-1]) else 0
    spent = alpha * (done[-1] - before) / looks[-1]
    return float(scipy.stats.t.isf(spent / 2, max(pairs, 2) - 1))


@dataclass(frozen=True, slots=True)
class Effect:
    """What the pairs so far say of one treatment. Intervals are None below two pairs."""

    pairs: int  # with two finite losses
    launched: int  # pairs with an end of both runs, diverged ones included
    diverged: int  # treatment's runs without a finite loss whose base has one
    estimate: float | None  # nats, treatment - base
    low: float | None  # interval of level 1 - alpha for this treatment alone; holds at whichever look one stops
    high: float | None
    family_low: float | None  # the same for all treatments of the family together
    family_high: float | None
    sd: float | None  # of the differences
    base_sd: float | None  # of the base's losses between seeds
    in_base_sds: float | None
    correlation: float | None  # of the two runs of a pair
    variance_ratio: float | None  # var(d) over what independent runs would give: below 1, pairing saves runs
    verdict: str
    more_pairs: int | None  # undecided: pairs still needed if estimate and scatter stay; None: more than anyone runs


def judge(base: Sequence[float], treatment: Sequence[float], design: Design, *, final: bool = False) -> Effect:
    """The verdict on pairs (base[i], treatment[i]) in the order of their seeds; NaN stands for a run that diverged.

    Between looks the verdict of the last look stands. `final`: no further pair will come, so that what is not decided
    is UNDECIDED in place of CONTINUE. Raises DataError where the base itself diverged, or for differences without
    scatter that are not zero."""
    a, b = np.asarray(base, float), np.asarray(treatment, float)
    if a.shape != b.shape or a.ndim != 1:
        raise DataError(f"{len(a)} runs of the base and {len(b)} of the treatment do not pair")
    if not np.isfinite(a).all():
        raise DataError("a run of the base has no finite loss: nothing can be compared with it")
    verdict = CONTINUE
    for n in [n for n in design.looks if n <= len(a)]:
        verdict = _verdict(a[:n], b[:n], design)
        if verdict != CONTINUE:  # decided: later pairs (of runs that were under way) change nothing
            a, b = a[:n], b[:n]
            break
    whole = verdict != CONTINUE or final or len(a) >= design.cap
    if verdict == CONTINUE and whole:
        verdict = UNDECIDED
    return _effect(a, b, design, verdict)


def _verdict(a: np.ndarray, b: np.ndarray, design: Design) -> str:
    """At one look."""
    finite = np.isfinite(b)
    diverged = len(b) - int(finite.sum())
    if 2 * diverged >= len(b):
        return DIVERGED
    low, high = _interval((b - a)[finite], design, corrected=True)
    if low > 0:
        return HURTS
    if high < 0 and not diverged:
        return HELPS
    if -design.margin < low and high < design.margin and not diverged:
        return NO_EFFECT
    return CONTINUE


def _interval(d: np.ndarray, design: Design, *, corrected: bool) -> tuple[float, float]:
    if len(d) < 2:
        return -math.inf, math.inf
    mean, sd = float(d.mean()), float(d.std(ddof=1))
    if sd == 0 and mean != 0:
        raise DataError(f"all {len(d)} differences are exactly {mean}: copies of one run?")
    half = design.quantile(len(d), corrected=corrected) * sd / math.sqrt(len(d))
    return mean - half, mean + half


def _effect(a: np.ndarray, b: np.ndarray, design: Design, verdict: str) -> Effect:
    finite = np.isfinite(b)
    x, y = a[finite], b[finite]
    d, n, launched = y - x, len(x), len(b)
    base_sd = float(a.std(ddof=1)) if launched > 1 else None
    nothing = dict.fromkeys(
        "estimate low high family_low family_high sd in_base_sds correlation variance_ratio more_pairs".split()
    )
    if n < 2:
        told = nothing | {"estimate": float(d[0]) if n else None}
        return Effect(pairs=n, launched=launched, diverged=launched - n, base_sd=base_sd, verdict=verdict, **told)
    low, high = _interval(d, design, corrected=False)
    family_low, family_high = _interval(d, design, corrected=True)
    varied = n > 2 and np.ptp(x) > 0 and np.ptp(y) > 0
    independent = x.var(ddof=1) + y.var(ddof=1)
    return Effect(
        pairs=n,
        launched=launched,
        diverged=launched - n,
        estimate=float(d.mean()),
        low=low,
        high=high,
        family_low=family_low,
        family_high=family_high,
        sd=float(d.std(ddof=1)),
        base_sd=base_sd,
        in_base_sds=float(d.mean()) / base_sd if base_sd else None,
        correlation=float(np.corrcoef(x, y)[0, 1]) if varied else None,
        variance_ratio=float(d.var(ddof=1) / independent) if independent > 0 else None,
        verdict=verdict,
        more_pairs=_more_pairs(d, design) if verdict == UNDECIDED else None,
    )


def _more_pairs(d: np.ndarray, design: Design) -> int | None:
    """Pairs beyond these until an interval of this estimate and scatter leaves 0, or fits into the margin."""
    mean, sd = abs(float(d.mean())), float(d.std(ddof=1))
    for n in range(len(d) + 1, MOST_PAIRS + 1):
        half = float(scipy.stats.t.isf(design.alpha / design.family / 2, n - 1)) * sd / math.sqrt(n)
        if mean > half or mean + half < design.margin:
            return n - len(d)
    return None


def pairs_to_see(effect: float, sd: float, design: Design, power: float = 0.8, simulations: int = 2000) -> float:
    """Mean number of pairs that `design` spends on a true `effect` whose differences scatter by `sd` (both nats), by
    simulation; infinite if it decides rightly less often than `power`."""
    noise = np.random.default_rng(0).standard_normal((simulations, design.cap)) * sd + effect
    right = HELPS if effect < 0 else HURTS
    spent, found = [], 0
    for row in noise:
        told = judge([0.0] * design.cap, row.tolist(), design)
        spent.append(told.launched)
        found += told.verdict == right
    return float(np.mean(spent)) if found >= power * simulations else math.inf


def ratio(base: Sequence[float], treatment: Sequence[float], level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of treatment / base within pairs of positive numbers (milliseconds a step): the geometric
    mean with its t interval. Raises DataError below two pairs."""
    logs = np.log(np.asarray(treatment, float)) - np.log(np.asarray(base, float))
    if len(logs) < 2 or not np.isfinite(logs).all():
        raise DataError("a paired ratio needs two pairs of positive numbers")
    half = float(scipy.stats.t.isf((1 - level) / 2, len(logs) - 1)) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
    centre = float(logs.mean())
    return math.exp(centre), math.exp(centre - half), math.exp(centre + half)
