"""Looking after every run, without fooling oneself.

Testing at p < 0.01 after each run passes far more than 1 % of the recipes that are exactly at the
threshold. These tests may look as they go. All have one form: at each look there are two bounds for

    t_n = (threshold - mean_n) / (s_n / sqrt(n))        large: the mean is below the threshold

at or above the upper one the series stops with ACCEPT, at or below the lower one with FUTILE, else it goes on.

sequential-t (Wald's likelihood ratio on the t statistic, whose distribution does not depend on sigma):

    LR_n = f(t_n; n - 1 degrees of freedom, noncentrality effect * sqrt(n)) / f(t_n; n - 1, noncentrality 0)

    ACCEPT at LR_n >= 1/alpha, FUTILE at LR_n <= beta. Under H0 the LR is a martingale with mean 1, so that by
    Ville's inequality P(ACCEPT ever) <= alpha exactly, for every sigma and every stopping; likewise for beta.
    With bounds `wald`, (1 - beta)/alpha and beta/(1 - alpha): a little earlier, and alpha holds only nearly.

group-sequential: few looks, alpha and beta spent by Lan and DeMets' version of O'Brien and Fleming's bounds
for a
    normal statistic, carried over to t by equal tail probabilities. The lower bounds do not bind: alpha
    holds for those who go on after FUTILE.

fixed: one look, at the cap.

Reaching the cap without ACCEPT is FUTILE. FUTILE means that the planned margin is not there, or cannot be
shown with these runs; it does not mean that the mean is above the threshold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from stats.errors import DataError
from stats.plans import Expectation, Plan

CONTINUE, ACCEPT, FUTILE = "CONTINUE", "ACCEPT", "FUTILE"


@dataclass(frozen=True, slots=True)
class Boundary:
    """The two bounds of t at one look. Infinite: no such decision at this look."""

    n: int
    t_futile: float
    t_accept: float


@dataclass(frozen=True, slots=True)
class Look:
    """What the first n runs say."""

    n: int
    mean: float
    t: float  # positive: below the threshold
    t_futile: float | None  # None where this n is no look of the plan
    t_accept: float | None
    log_likelihood_ratio: float | None  # of the planned margin against none


@dataclass(frozen=True, slots=True)
class Estimate:
    """The mean loss after stopping. The plain mean is biased by the stopping: series that stop early for
    ACCEPT are those whose first runs were lucky."""

    mean: float  # as it stands
    corrected_mean: float  # at which a series like this one would show `mean` on average (Whitehead's correction)
    upper_bound: float | None  # of the mean, holds whenever one stops; None before the first look
    level: float  # of that bound, 1 - alpha


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now."""

    verdict: str  # CONTINUE, ACCEPT or FUTILE
    n: int  # runs that the decision rests on
    unused: int  # losses after the one at which the test had decided: they do not change the verdict
    method: str
    plan_hash: str
    words: str
    path: tuple[Look, ...]
    estimate: Estimate | None  # once stopped


def decide(losses: Sequence[float], plan: Plan) -> Decision:
    """The verdict on the first losses of a series, given in the order in which the runs were launched.

    Raises DataError for a loss that is not finite, or if all the runs of the plan have one loss.
    """
    x = np.asarray(losses, dtype=np.float64)
    if x.ndim != 1 or not np.isfinite(x).all():
        bad = [float(value) for value in x.ravel() if not math.isfinite(value)]
        raise DataError(f"a sequential test needs finite losses; found {bad[:3]}")
    at_look = {boundary.n: boundary for boundary in boundaries(plan)}
    path: list[Look] = []
    verdict = CONTINUE
    for n in range(2, len(x) + 1):
        mean, t = float(x[:n].mean()), _t_statistic(x[:n], plan.threshold)
        boundary = at_look.get(n)
        if math.isnan(t) and n == plan.cap:
            raise DataError(f"no variance: all {n} planned losses are {float(x[0])}; copies of one run?")
        ratio = None if math.isnan(t) else float(log_likelihood_ratio(t, n, plan.effect))
        futile, accept = (boundary.t_futile, boundary.t_accept) if boundary else (None, None)
        path.append(Look(n, mean, t, futile, accept, ratio))
        if boundary and not math.isnan(t):  # equal losses decide nothing: the next look may
            verdict = ACCEPT if t >= boundary.t_accept else FUTILE if t <= boundary.t_futile else CONTINUE
        if verdict != CONTINUE:
            break
    used = path[-1].n if path else len(x)
    estimate = estimate_after(x[:used], plan) if verdict != CONTINUE else None
    return Decision(
        verdict, used, len(x) - used, plan.method, plan.hash, _words(verdict, used, plan), tuple(path), estimate
    )


def log_likelihood_ratio(t: float | np.ndarray, n: int, effect: float) -> float | np.ndarray:
    """log of f(t | noncentrality effect*sqrt(n)) / f(t | 0), both with n - 1 degrees of freedom."""
    # Beyond this the ratio is at its limit to nine digits, while t * t would overflow from 1e154 on.
    values = np.clip(np.asarray(t, dtype=np.float64), -1e8, 1e8)
    shift = effect * math.sqrt(n)
    try:
        with np.errstate(all="ignore"):
            ratio = scipy.stats.nct.logpdf(values, n - 1, shift) - scipy.stats.t.logpdf(values, n - 1)
    except OverflowError:  # raised for the whole array, whichever element it was
        ratio = np.full(values.shape, np.nan)
    # Far from the centre of many runs the library's density under- or overflows; there the integral is taken.
    lost = ~np.isfinite(ratio)
    if lost.any():
        ratio = np.where(lost, np.vectorize(_ratio_by_integral)(values, n, shift), ratio)
    return float(ratio) if np.ndim(t) == 0 else ratio


def _ratio_by_integral(t: float, n: int, shift: float) -> float:
    """The same from the noncentral t's definition as an integral over the chi variable y, in logarithms:

    LR = exp(-shift^2 v / (2 (v + t^2))) * I(u) / I(0),  I(u) = integral of y^v exp(-(y - u)^2 / 2) over y >
    0, u = shift * t / sqrt(v + t^2), v = n - 1.
    """
    v = n - 1
    u = shift * t / math.sqrt(v + t * t)

    def log_integral(u: float) -> float:
        mode = (u + math.sqrt(u * u + 4 * v)) / 2
        top = v * math.log(mode) - (mode - u) ** 2 / 2
        width = 40 / math.sqrt(1 + v / mode**2)
        value, _ = scipy.integrate.quad(
            lambda y: math.exp(v * math.log(y) - (y - u) ** 2 / 2 - top),
            max(mode - width, 1e-300),
            mode + width,
            epsabs=0,
            epsrel=1e-10,
            limit=200,
        )
        return top + math.log(value)

    return -(shift**2) / 2 * v / (v + t * t) + log_integral(u) - log_integral(0.0)


# ----------------------------------------------------------------------------------------------------
# Bounds


@functools.lru_cache(maxsize=64)
def boundaries(plan: Plan) -> tuple[Boundary, ...]:
    """The bounds of t at every look of the plan; at the last one they meet."""
    if plan.method == "fixed":
        t = float(scipy.stats.t.ppf(1 - plan.alpha, plan.cap - 1))
        return (Boundary(plan.cap, t, t),)
    if plan.method == "group-sequential":
        lower, upper = spending_bounds(
            [n / plan.cap for n in plan.looks], plan.alpha, plan.beta, plan.effect * math.sqrt(plan.cap)
        )
        found = [Boundary(n, _as_t(low, n), _as_t(high, n)) for n, low, high in zip(plan.looks, lower, upper)]
    else:
        low, high = likelihood_bounds(plan)
        found = [
            Boundary(n, _t_at_ratio(low, n, plan.effect), _t_at_ratio(high, n, plan.effect))
            for n in range(plan.first_look, plan.cap + 1)
        ]
    last = found[-1]
    return (*found[:-1], Boundary(last.n, last.t_accept, last.t_accept))


def likelihood_bounds(plan: Plan) -> tuple[float, float]:
    """(log of the lower, log of the upper) bound of the likelihood ratio."""
    if plan.bounds == "wald":
        return math.log(plan.beta / (1 - plan.alpha)), math.log((1 - plan.beta) / plan.alpha)
    return math.log(plan.beta), -math.log(plan.alpha)


def _t_at_ratio(log_ratio: float, n: int, effect: float) -> float:
    """The t at which the log likelihood ratio, which grows with t, has this value; infinite if it never has."""
    limit = 1e4

    def gap(t: float) -> float:
        return float(log_likelihood_ratio(t, n, effect)) - log_ratio

    if gap(limit) < 0:
        return math.inf
    if gap(-limit) > 0:
        return -math.inf
    return float(scipy.optimize.brentq(gap, -limit, limit, xtol=1e-12))


def spending_bounds(
    shares: Sequence[float], alpha: float, beta: float, drift: float
) -> tuple[list[float], list[float]]:
    """(lower, upper) bounds of a normal statistic Z_k at information shares t_1 < ... < t_K = 1.

    Z_k has mean drift*sqrt(t_k); `drift` is its mean at the end if the planned margin is true. Errors are spent as 2 -
    2*Phi(z(1 - error/2) / sqrt(t)) (Lan and DeMets 1983). The upper bounds are those without stopping for futility. The
    crossing probabilities come from the density of the score process sqrt(t) Z among the paths that have not stopped,
    stepped from look to look on a grid (Armitage, McPherson and Rowe 1969).
    """
    upper = _spend(shares, _spent(shares, alpha), 0.0, None)
    lower = _spend(shares, _spent(shares, beta), drift, upper)
    return [min(low, high) for low, high in zip(lower, upper)], upper


def _spent(shares: Sequence[float], error: float) -> np.ndarray:
    """Error to be spent at each look."""
    z = scipy.stats.norm.isf(error / 2)
    return np.diff(2 * scipy.stats.norm.sf(z / np.sqrt(np.asarray(shares))), prepend=0.0)


def _spend(shares: Sequence[float], spend: np.ndarray, drift: float, upper: Sequence[float] | None) -> list[float]:
    """Bounds that let `spend[k]` of the paths out at look k: above, or below if `upper` bounds are given."""
    norm, sign = scipy.stats.norm, 1 if upper is None else -1
    bounds: list[float] = []
    grid = mass = None
    for k, share in enumerate(shares):
        step = share - (shares[k - 1] if k else 0.0)
        width = math.sqrt(step)

        def beyond(
            z: float, share: float = share, step: float = step, width: float = width, grid: Any = grid, mass: Any = mass
        ) -> float:
            """P(at this look for the first time, past z on the side that is being spent)."""
            edge = z * math.sqrt(share)
            if grid is None:
                return float(norm.sf(sign * (edge - drift * step) / width))
            return float(mass @ norm.sf(sign * (edge - grid - drift * step) / width))

        z = _bound(beyond, max(float(spend[k]), 1e-300), sign)
        bounds.append(z)
        root = math.sqrt(share)
        low, high = (-9.0 * root + min(drift, 0) * share, z * root) if upper is None else (z * root, upper[k] * root)
        points = np.linspace(low, max(high, low + 1e-9), 801)
        weights = scipy.integrate.simpson(np.eye(801), x=points)
        if grid is None:
            density = norm.pdf((points - drift * step) / width) / width
        else:
            density = norm.pdf((points[:, None] - grid[None] - drift * step) / width) @ mass / width
        grid, mass = points, weights * density
    return bounds


def _bound(beyond: Callable[[float], float], error: float, sign: int) -> float:
    """The z past which just `error` of the paths lie; the far end if fewer paths are left than should go."""
    if beyond(-sign * 12.0) <= error:
        return -sign * 12.0
    return float(scipy.optimize.brentq(lambda z: beyond(z) - error, -12.0, 12.0, xtol=1e-10))


def _as_t(z: float, n: int) -> float:
    """The t with n - 1 degrees of freedom that has the same tail probability as a normal z."""
    tail = scipy.stats.norm.sf(abs(z))
    return math.copysign(float(scipy.stats.t.isf(tail, n - 1)), z) if tail > 1e-290 else math.copysign(math.inf, z)


# ----------------------------------------------------------------------------------------------------
# Estimates and operating characteristics


def estimate_after(losses: np.ndarray, plan: Plan, simulations: int = 4000, seed: int = 0) -> Estimate:
    """Mean loss corrected for the stopping rule, and the bound that holds whenever one stops.

    The bound inverts the test: a mean m is excluded if at some look (m - mean_n) / (s_n / sqrt(n)) was at
    the bound for ACCEPT. The correction finds, by simulation with the observed scatter, the true mean whose
    series show the observed mean on average.
    """
    n, mean = len(losses), float(losses.mean())
    excluded = [
        float(losses[: b.n].mean()) + b.t_accept * float(losses[: b.n].std(ddof=1)) / math.sqrt(b.n)
        for b in boundaries(plan)
        if b.n <= n and math.isfinite(b.t_accept)
    ]
    sigma = float(losses.std(ddof=1))
    noise = np.random.default_rng(seed).standard_normal((simulations, plan.cap))
    observed = (plan.threshold - mean) / sigma

    def shown(effect: float) -> float:
        _, _, means = _stopped(noise + effect, plan)
        return float(means.mean()) - observed

    low, high = observed - 6.0, observed + 6.0
    if plan.method == "fixed":
        corrected = observed
    elif shown(low) < 0 < shown(high):
        corrected = float(scipy.optimize.brentq(shown, low, high, xtol=1e-4, maxiter=40))
    else:
        corrected = observed
    return Estimate(mean, plan.threshold - corrected * sigma, min(excluded, default=None), 1 - plan.alpha)


def simulate(
    plan: Plan, mean: float, simulations: int = 2000, seed: int = 0, sigma: float | None = None
) -> Expectation:
    """What the plan does if the true mean loss is `mean` (and the scatter `sigma`, the plan's unless given)."""
    sigma = plan.sigma if sigma is None else sigma
    noise = np.random.default_rng(seed).standard_normal((simulations, plan.cap))
    accepted, stops, _ = _stopped(noise + (plan.threshold - mean) / sigma, plan)
    share, error = float(accepted.mean()), 1 / math.sqrt(simulations)
    return Expectation(
        mean, share, float(stops.mean()), math.sqrt(share * (1 - share)) * error, float(stops.std()) * error
    )


def _stopped(x: np.ndarray, plan: Plan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(accepted, runs at the stop, mean at the stop) of simulated series x (series, cap), in units of
    sigma, positive below the threshold."""
    looks = boundaries(plan)
    n = np.arange(1, plan.cap + 1)
    mean = x.cumsum(axis=1) / n
    squares = (x * x).cumsum(axis=1)
    at = np.array([boundary.n for boundary in looks]) - 1
    variance = (squares[:, at] - n[at] * mean[:, at] ** 2) / (n[at] - 1)
    t = mean[:, at] / np.sqrt(variance / n[at])
    accept = t >= np.array([boundary.t_accept for boundary in looks])
    stop = accept | (t <= np.array([boundary.t_futile for boundary in looks]))
    first, rows = stop.argmax(axis=1), np.arange(len(x))
    return accept[rows, first], n[at][first], mean[:, at][rows, first]


def _t_statistic(losses: np.ndarray, threshold: float) -> float:
    """t, positive below the threshold; NaN without variance."""
    if np.ptp(losses) == 0:
        return math.nan
    return (threshold - float(losses.mean())) / (float(losses.std(ddof=1)) / math.sqrt(len(losses)))


def _words(verdict: str, n: int, plan: Plan) -> str:
    """The verdict for people who do not know the test."""
    if verdict == ACCEPT:
        risk = f"probability {plan.alpha} at most"
        if plan.method == "sequential-t" and plan.bounds == "wald":
            risk = f"a probability of about {plan.alpha}, {plan.alpha / (1 - plan.beta):.3g} at most"
        return (
            f"ACCEPT after {n} runs: the mean loss is below {plan.threshold}. "
            f"If it were not, a series with this plan would end in ACCEPT with {risk}."
        )
    if verdict == FUTILE:
        at_cap = ", the most that were planned" if n == plan.cap else ""
        return (
            f"FUTILE after {n} runs{at_cap}: these runs do not show a mean that lies {plan.margin:g}, the "
            f"planned margin, below {plan.threshold}. This is no proof that the mean is above the threshold: "
            "it may lie below it by less than the margin."
        )
    if plan.method == "sequential-t" and n < plan.first_look:
        return f"CONTINUE: {n} runs are too few to decide; the first look is at {plan.first_look}."
    return f"CONTINUE after {n} runs: the evidence points neither way yet; at most {plan.cap} runs in all."
