"""Is the mean validation loss below the threshold? One-sided one-sample t-test, and how far to trust it.

    python -m stats.ttest records/some-series          the runs of a folder
    python -m stats.ttest a.txt b.txt c.txt            files, as one sample
    python -m stats.ttest 2.9195 2.9198 2.9206         losses

H0: the mean of the losses is at the threshold or above. t = (mean - threshold) / (s / sqrt(n)), with s the
sample's standard deviation (n - 1); p from Student's t with n - 1 degrees of freedom. It assumes
independent runs, a number of runs that was fixed before the first of them (for looking after every run
there is `stats.sequential`), and losses that are roughly normal; `Sensitivity` shows what two tests without
the last assumption say.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from stats.correct import below_p, studentised_bound
from stats.errors import DataError, UsageError, check_alpha
from stats.power import least_margin
from stats.values import LeftOut

# Standard deviation of the final loss between runs of one configuration of the medium track, pooled over 13
# groups of public logs with 825 degrees of freedom.
POOLED_SIGMA, POOLED_SIGMA_DF = 0.0008, 825
TRACK_THRESHOLD = 2.92
STRICT_ALPHA = 0.01  # the track's own rule; alpha = 0.05 is the customary first look
FEWEST_FOR_BCA = 20
FEWEST_RUNS = 5  # below, the t-test leans on normality that nobody can check


@dataclass(frozen=True, slots=True)
class Summary:
    """Description of a sample. `std` is the population's (divided by n), as public READMEs quote it."""

    n: int
    mean: float
    median: float
    std: float
    sample_std: float | None  # divided by n - 1; None for one value
    min: float
    max: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """The same question without normality."""

    bootstrap_upper_bound: float | None  # of the mean, one-sided, at 1 - alpha
    bootstrap_method: str  # BCa, or studentised where BCa covers too little
    bootstrap_resamples: int
    sign_flip_p: float  # P(mean this low | the losses are symmetric about the threshold)
    sign_flip_exact: bool  # all 2^n signs, or a random sample of them
    sign_flip_least_p: float  # 2^-n: with fewer runs no data could do better


@dataclass(frozen=True, slots=True)
class RoundingInterval:
    """The range of p over every set of losses that would print as these did."""

    decimals: int
    p_low: float
    p_high: float
    decisive: bool  # the decisions at alpha, 0.05 and 0.01 are the same at both ends


@dataclass(frozen=True, slots=True)
class PooledZ:
    """z-test with a standard deviation from elsewhere. Assumes that these runs scatter as those did."""

    sigma: float
    sigma_df: int | None  # degrees of freedom of that standard deviation, where they are known
    z_stat: float
    p_value: float
    variance_p: float  # two-sided chi-square test of that assumption on this sample


@dataclass(frozen=True, slots=True)
class Outlook:
    """What these runs could find, and what would change the decision."""

    margin: float  # below the threshold; a true mean there is shown by as many runs, of this spread, with `power`
    power: float
    one_more_run: float | None  # the loss of one more run at which the decision at alpha turns; None: no loss turns it


@dataclass(frozen=True, slots=True)
class TTest:
    """The verdict. The first nine fields are the dictionary that public records quote."""

    n: int
    sample_mean: float
    sample_std: float
    t_stat: float
    p_value: float
    alpha: float
    decision: str
    upper_conf_bound_mean: float  # one-sided, at 1 - alpha
    threshold: float
    significant: bool
    decisions: dict[str, bool]  # at 0.05 and at 0.01
    loss: Summary
    time_s: Summary | None
    sensitivity: Sensitivity | None
    rounding: RoundingInterval | None
    pooled: PooledZ | None
    outlook: Outlook
    warnings: tuple[str, ...]
    series: str | None = None
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()


def ttest(
    losses: Sequence[float],
    threshold: float = TRACK_THRESHOLD,
    alpha: float = 0.05,
    *,
    times_s: Sequence[float] = (),
    decimals: int | None = None,
    sensitivity: bool = True,
    pooled_sigma: float | None = None,
    pooled_sigma_df: int | None = None,
    resamples: int = 9999,
    seed: int = 0,
) -> TTest:
    """One-sided t-test that the mean of `losses` (nats) is below `threshold`.

    `decimals`, the digits after the point to which the losses are rounded, adds the interval of p that
    rounding leaves open; `pooled_sigma` adds the z-test. `seed` and `resamples` are of the bootstrap and
    the sign flips. Raises DataError for fewer than two losses, losses that are not finite, or that are all
    alike; UsageError for an alpha outside (0, 0.5] or a threshold that is not finite.
    """
    check_alpha(alpha)
    if not math.isfinite(threshold):
        raise UsageError(f"the threshold must be finite, not {threshold}")
    x = checked_losses(losses)
    n, mean, std = len(x), float(x.mean()), float(x.std(ddof=1))
    result = scipy.stats.ttest_1samp(x, threshold, alternative="less")
    t_stat, p_value = float(result.statistic), float(result.pvalue)
    bound = mean + float(scipy.stats.t.ppf(1 - alpha, n - 1)) * std / math.sqrt(n)
    significant = p_value < alpha
    rounding = None if decimals is None else rounding_interval(x, threshold, alpha, decimals)
    pooled = None if pooled_sigma is None else pooled_z(x, threshold, pooled_sigma, pooled_sigma_df)
    return TTest(
        n=n,
        sample_mean=mean,
        sample_std=std,
        t_stat=t_stat,
        p_value=p_value,
        alpha=alpha,
        decision=f"{'REJECT' if significant else 'FAIL TO REJECT'} H0 (mean < threshold)",
        upper_conf_bound_mean=bound,
        threshold=threshold,
        significant=significant,
        decisions={"0.05": p_value < 0.05, "0.01": p_value < STRICT_ALPHA},
        loss=summarize(losses),
        time_s=summarize(times_s) if len(times_s) else None,
        sensitivity=sensitivity_of(x, threshold, alpha, resamples, seed) if sensitivity else None,
        rounding=rounding,
        pooled=pooled,
        outlook=outlook_of(x, threshold, alpha),
        warnings=_warnings(n, len(times_s), rounding, pooled),
    )


def outlook_of(losses: np.ndarray, threshold: float, alpha: float, power: float = 0.9) -> Outlook:
    """The margin that n runs of this spread find with `power`, and the one further loss that turns the decision."""
    n, std = len(losses), float(losses.std(ddof=1))

    def p_with(loss: np.ndarray | float) -> np.ndarray:
        """p of the test with one more loss, for many of them at once."""
        mean = (losses.sum() + loss) / (n + 1)
        variance = (((losses - losses.mean()) ** 2).sum() + (loss - losses.mean()) ** 2 * n / (n + 1)) / n
        return scipy.special.stdtr(n, (mean - threshold) / np.sqrt(variance / (n + 1)))

    passes = below_p(losses, threshold) < alpha
    # From where the decision surely stays, towards where it may turn; far out the new loss itself spreads the sample
    # so much that p goes back.
    away = std * np.geomspace(0.01, 100.0, 60)
    center = float(losses.mean())
    grid = np.array([center, *(center + away)] if passes else [*(center + away[::-1]), center, *(center - away)])
    turned = np.flatnonzero((p_with(grid[1:]) < alpha) != passes)
    turn = None
    if len(turned):
        turn = float(scipy.optimize.brentq(lambda x: float(p_with(x)) - alpha, grid[turned[0]], grid[turned[0] + 1]))
    return Outlook(least_margin(n, power, std, alpha), power, turn)


def summarize(values: Sequence[float]) -> Summary:
    """Mean, median, standard deviations, least and greatest of a non-empty sample."""
    x = np.asarray(values, dtype=np.float64)
    sample_std = float(x.std(ddof=1)) if len(x) > 1 else None
    return Summary(
        len(x), float(x.mean()), float(np.median(x)), float(x.std()), sample_std, float(x.min()), float(x.max())
    )


def rounding_interval(losses: np.ndarray, threshold: float, alpha: float, decimals: int) -> RoundingInterval:
    """Least and greatest p over all losses within half a unit of the last printed digit.

    The mean may be off by half a unit h, and the norm of the deviations from the mean by at most h*sqrt(n),
    since centring does not lengthen the vector of errors. t is taken at the corners of that box, so the
    interval contains the true one and is slightly wider.
    """
    low, high = (float(scipy.stats.t.cdf(t, len(losses) - 1)) for t in t_range(losses, threshold, decimals))
    decisive = all((low < level) == (high < level) for level in (alpha, 0.05, STRICT_ALPHA))
    return RoundingInterval(decimals, low, high, decisive)


def t_range(losses: np.ndarray, threshold: float, decimals: int) -> tuple[float, float]:
    """Least and greatest t statistic over the box of `rounding_interval`; negative: below the threshold."""
    n, half = len(losses), 0.5 * 10.0**-decimals
    mean, norm = float(losses.mean()), float(losses.std()) * math.sqrt(n)
    corners = []
    for shift in (-half, half):
        for spread in (max(norm - half * math.sqrt(n), 0.0), norm + half * math.sqrt(n)):
            gap = mean + shift - threshold
            error = spread / math.sqrt(n * (n - 1))
            corners.append(math.copysign(math.inf, gap) if error == 0 else gap / error)
    return min(corners), max(corners)


def sensitivity_of(losses: np.ndarray, threshold: float, alpha: float, resamples: int, seed: int) -> Sensitivity:
    """Bootstrap bound and sign-flip test; deterministic for one seed.

    BCa bounds of small samples cover too little (a 99 % bound covered the mean of five normal losses in 92 % of 250
    samples), so that below FEWEST_FOR_BCA runs the studentised bootstrap takes its place.
    """
    n = len(losses)
    if n < FEWEST_FOR_BCA:
        bound = studentised_bound(losses, alpha, resamples, np.random.default_rng(seed))
        method = "studentised"
    else:
        bound, method = _bca_bound(losses, alpha, resamples, seed), "BCa"
    flip = scipy.stats.permutation_test(
        (losses - threshold,),
        np.mean,
        permutation_type="samples",
        alternative="less",
        n_resamples=resamples,
        rng=np.random.default_rng(seed + 1),
    )
    return Sensitivity(bound, method, resamples, float(flip.pvalue), 2**n <= resamples, 2.0**-n)


def _bca_bound(losses: np.ndarray, alpha: float, resamples: int, seed: int) -> float | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a sample too small or too lumpy for BCa gives NaN, which is None below
        bound = scipy.stats.bootstrap(
            (losses,),
            np.mean,
            confidence_level=1 - alpha,
            alternative="less",
            method="BCa",
            n_resamples=resamples,
            rng=np.random.default_rng(seed),
        ).confidence_interval.high
    return float(bound) if math.isfinite(bound) else None


def pooled_z(losses: np.ndarray, threshold: float, sigma: float, sigma_df: int | None = None) -> PooledZ:
    """One-sided z-test with `sigma` from other series, and the chi-square test of whether that sigma fits here."""
    if not (sigma > 0 and math.isfinite(sigma)):
        raise UsageError(f"the pooled sigma must be positive, not {sigma}")
    n = len(losses)
    z = (float(losses.mean()) - threshold) / (sigma / math.sqrt(n))
    ratio = (n - 1) * float(losses.var(ddof=1)) / sigma**2
    below = float(scipy.stats.chi2.cdf(ratio, n - 1))
    return PooledZ(sigma, sigma_df, z, float(scipy.stats.norm.cdf(z)), 2 * min(below, 1 - below))


def checked_losses(losses: Sequence[float]) -> np.ndarray:
    """Losses as float64, or DataError that says what is wrong with them: n < 2, not finite, no variance."""
    x = np.asarray(losses, dtype=np.float64)
    if x.ndim != 1 or len(x) < 2:
        raise DataError(f"a t-test needs at least 2 losses; found {x.size}: {list(map(float, x.ravel()))}")
    if not np.isfinite(x).all():
        index = int(np.flatnonzero(~np.isfinite(x))[0])
        raise DataError(f"loss {index + 1} of {len(x)} is {float(x[index])}: only finite losses can be tested")
    if np.ptp(x) == 0:
        raise DataError(f"no variance: all {len(x)} losses are {float(x[0])}; are these copies of one run?")
    return x


def _warnings(n: int, n_times: int, rounding: RoundingInterval | None, pooled: PooledZ | None) -> tuple[str, ...]:
    from stats.text import p_text

    found = []
    if n < FEWEST_RUNS:
        found.append(f"only {n} runs: below {FEWEST_RUNS} the result rests on normality, which they cannot show")
    if 0 < n_times < n:
        found.append(f"only {n_times} of {n} runs tell their time")
    if rounding and not rounding.decisive:
        found.append(
            f"the losses are rounded to {rounding.decimals} decimals, which leaves p anywhere in "
            f"[{rounding.p_low:.3g}, {rounding.p_high:.3g}]: the decision hangs on digits not printed"
        )
    if pooled and pooled.variance_p < 0.05:
        found.append(f"the scatter of these runs does not fit sigma = {pooled.sigma} (p = {p_text(pooled.variance_p)})")
    return tuple(found)


def render(result: TTest) -> str:
    """The verdict in plain text."""
    from stats.text import number, p_text, table

    lines = [(f"{result.series}: " if result.series else "") + f"{result.n} runs", ""]
    rows = [("loss", result.loss)] + ([("time (s)", result.time_s)] if result.time_s else [])
    lines.append(
        table(
            ["", "n", "mean", "median", "std (population)", "std (sample)", "min", "max"],
            [[what, s.n, *map(number, (s.mean, s.median, s.std, s.sample_std, s.min, s.max))] for what, s in rows],
        )
    )
    lines += ["", f"H0: mean loss >= {result.threshold}"]
    lines.append(f"t = {result.t_stat:.6g}, one-sided p = {p_text(result.p_value)}, alpha = {result.alpha}")
    lines.append(f"upper {1 - result.alpha:.0%} confidence bound of the mean: {number(result.upper_conf_bound_mean)}")
    passed = ", ".join(f"{'passes' if ok else 'does not pass'} at {level}" for level, ok in result.decisions.items())
    lines.append(f"{result.decision}; {passed}")
    if s := result.sensitivity:
        bound = "none" if s.bootstrap_upper_bound is None else number(s.bootstrap_upper_bound)
        kind = "exact" if s.sign_flip_exact else f"{s.bootstrap_resamples} random flips"
        lines.append(
            f"without normality: bootstrap ({s.bootstrap_method}) bound {bound}; "
            f"sign-flip p = {p_text(s.sign_flip_p)} ({kind})"
        )
    if r := result.rounding:
        lines.append(f"rounding to {r.decimals} decimals leaves p in [{p_text(r.p_low)}, {p_text(r.p_high)}]")
    if z := result.pooled:
        df = "" if z.sigma_df is None else f" ({z.sigma_df} degrees of freedom)"
        lines.append(
            f"z-test: z = {z.z_stat:.4g}, p = {p_text(z.p_value)}, assuming that these runs scatter with sigma = "
            f"{z.sigma},\n  as the series it comes from did{df}; this sample fits that with p = {p_text(z.variance_p)}"
        )
    lines += _outlook_lines(result)
    lines += [f"left out: {entry.run}: {entry.reason}" for entry in result.left_out]
    lines += [f"note: {note}" for note in result.notes]
    lines += [f"warning: {warning}" for warning in result.warnings]
    return "\n".join(lines)


def _outlook_lines(result: TTest) -> list[str]:
    """Power at the observed spread, and what would change the decision."""
    from stats.text import number

    o = result.outlook
    turn = "no loss of one more run would change the decision"
    if o.one_more_run is not None:
        way = "above" if result.significant else "below"
        turn = f"one more run {way} {number(o.one_more_run)} would change the decision"
    return [f"{result.n} runs of this spread find a mean {o.margin:.3g} below with power {o.power:g}; {turn}"]
