"""Power of the one-sided t-test: how many runs find a margin, and which margin some runs find."""

from __future__ import annotations

import math

import scipy

from stats.errors import UsageError, check_alpha

MOST_RUNS = 1000


def power(n: int, margin: float, sigma: float, alpha: float) -> float:
    """P(the one-sided t-test at `alpha` rejects | the true mean is `margin` below the threshold), for n runs."""
    check_sizes(margin=margin, sigma=sigma)
    check_alpha(alpha)
    if n < 2:
        return 0.0
    critical = float(scipy.special.stdtrit(n - 1, 1 - alpha))
    # what scipy.stats.nct.sf gives, without its overhead: a search asks many times
    found = 1.0 - float(scipy.special.nctdtr(n - 1, margin / sigma * math.sqrt(n), critical))
    return found if math.isfinite(found) else _power_by_integral(n, margin / sigma, alpha)


def _power_by_integral(n: int, effect: float, alpha: float) -> float:
    """The same where the library's noncentral t fails, at noncentralities above 37: the expectation of
    Phi(noncentrality - critical * s) over s, the sample's standard deviation in units of sigma."""
    df, critical, shift = n - 1, scipy.stats.t.isf(alpha, n - 1), effect * math.sqrt(n)
    scatter = scipy.stats.chi(df, scale=1 / math.sqrt(df))
    low, high = scatter.ppf(1e-12), scatter.isf(1e-12)
    value, _ = scipy.integrate.quad(
        lambda s: scatter.pdf(s) * scipy.stats.norm.cdf(shift - critical * s), low, high, limit=200
    )
    return min(max(float(value), 0.0), 1.0)


def runs_for_power(wanted: float, margin: float, sigma: float, alpha: float) -> int:
    """Least number of runs whose power is at least `wanted`. Raises UsageError beyond MOST_RUNS."""
    if not 0 < wanted < 1:
        raise UsageError(f"power must lie between 0 and 1, not {wanted}")
    if power(MOST_RUNS, margin, sigma, alpha) < wanted:
        raise UsageError(f"a margin of {margin} at sigma {sigma} takes more than {MOST_RUNS} runs")
    low, high = 1, MOST_RUNS  # power grows with n: bisect
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, margin, sigma, alpha) >= wanted else (middle, high)
    return high


def least_margin(n: int, wanted: float, sigma: float, alpha: float) -> float:
    """The margin below the threshold that n runs find with power `wanted`: nothing smaller is worth claiming."""
    if n < 2 or not 0 < wanted < 1:
        raise UsageError(f"at least 2 runs and a power between 0 and 1 are needed, not {n} and {wanted}")
    high = sigma
    while power(n, high, sigma, alpha) < wanted:
        high *= 2
    return float(scipy.optimize.brentq(lambda m: power(n, m, sigma, alpha) - wanted, 1e-6 * sigma, high))


def check_sizes(**sizes: float | None) -> None:
    for name, value in sizes.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{name} must be positive, not {value}")
