"""The t-test: the published numbers, agreement with scipy, refusals and exit codes."""

import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import scipy
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from published_record import LOSSES, TIMES_S
from statsmodels.stats.weightstats import DescrStatsW

from stats.cli import main
from stats.errors import DataError, UsageError
from stats.ttest import pooled_z, rounding_interval, sensitivity_of, ttest

PUBLISHED = {
    "n": 19,
    "sample_mean": 2.9194117368421053,
    "sample_std": 0.0006300479560324045,
    "t_stat": -4.069816643193549,
    "p_value": 0.00035946114919240566,
    "alpha": 0.05,
    "decision": "REJECT H0 (mean < threshold)",
    "upper_conf_bound_mean": 2.919662383449226,
    "threshold": 2.92,
}


def _close(found: float, published: float) -> bool:
    return math.isclose(found, published, rel_tol=1e-12, abs_tol=0)


def test_every_published_number_of_the_record_is_reproduced():
    result = ttest(LOSSES, times_s=TIMES_S)
    for key, published in PUBLISHED.items():
        found = getattr(result, key)
        same = _close(found, published) if isinstance(published, float) else found == published
        assert same, f"{key}: {found!r}, published {published!r}"
    loss, time = result.loss, result.time_s
    expected = (2.9194117368421053, 2.919342, 0.000613243648848653, 2.918186, 2.920582)
    assert all(map(_close, (loss.mean, loss.median, loss.std, loss.min, loss.max), expected))
    expected = (1412.4492105263155, 1411.998, 2.8062021268488864, 1407.511, 1421.735)
    assert all(map(_close, (time.mean, time.median, time.std, time.min, time.max), expected))


def test_published_numbers_through_the_command_line(repo):
    command = [sys.executable, "-m", "stats.ttest", "--json", *map(str, LOSSES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=repo)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert list(printed)[: len(PUBLISHED)] == list(PUBLISHED)
    for key, published in PUBLISHED.items():
        assert _close(printed[key], published) if isinstance(published, float) else printed[key] == published
    assert printed["decisions"] == {"0.05": True, "0.01": True}


@pytest.mark.parametrize(
    "losses, words",
    [
        ([2.9], "at least 2"),
        ([], "at least 2"),
        ([2.9, 2.9, 2.9], "no variance"),
        ([2.9, float("nan"), 2.8], "loss 2 of 3 is nan"),
        ([2.9, float("inf")], "inf"),
    ],
)
def test_what_cannot_be_tested_is_refused_with_its_reason(losses, words):
    with pytest.raises(DataError, match=words):
        ttest(losses)


def test_usage_errors():
    for alpha in (0.0, -0.1, 0.51, float("nan")):
        with pytest.raises(UsageError, match="alpha"):
            ttest([1.0, 2.0], alpha=alpha)
    with pytest.raises(UsageError, match="threshold"):
        ttest([1.0, 2.0], threshold=float("nan"))


def test_exit_codes(tmp_path, capsys):
    assert main(["ttest", "2.91", "2.911", "2.912"]) == 0
    assert main(["ttest", "2.93", "2.931", "2.932"]) == 1
    assert main(["ttest", "2.91", "2.911", "--alpha", "7"]) == 2
    assert main(["ttest"]) == 2
    assert main(["no-such-verb"]) == 2
    assert main(["ttest", str(tmp_path)]) == 3
    assert "no logs in this folder" in capsys.readouterr().err
    assert main(["ttest", str(tmp_path / "absent.txt")]) == 3
    assert "absent.txt: cannot be read: No such file" in capsys.readouterr().err
    assert main(["ttest", "2.91", "nan", "2.92"]) == 3
    assert main(["ttest", "2.91"]) == 3
    assert main(["ttest", "2.91", "2.91"]) == 3


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(2.5, 3.5), min_size=2, max_size=30, unique=True), st.floats(2.5, 3.5), st.floats(0.001, 0.5))
def test_agreement_with_scipy_and_statsmodels(losses, threshold, alpha):
    assume(np.std(losses) > 1e-6)
    found = ttest(losses, threshold, alpha, sensitivity=False)
    reference = scipy.stats.ttest_1samp(losses, threshold, alternative="less")
    described = DescrStatsW(np.array(losses))
    t, p, _ = described.ttest_mean(threshold, alternative="smaller")
    assert found.t_stat == pytest.approx(reference.statistic, rel=1e-12)
    assert found.t_stat == pytest.approx(t, rel=1e-9)
    assert found.p_value == pytest.approx(reference.pvalue, rel=1e-12)
    assert found.p_value == pytest.approx(p, rel=1e-7)
    high = described.tconfint_mean(alpha, alternative="smaller")[1]
    assert found.upper_conf_bound_mean == pytest.approx(high, rel=1e-10)
    assert found.significant == (p < alpha)
    assert found.decision.startswith("REJECT") == found.significant


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(2.9, 2.94), min_size=2, max_size=8, unique=True))
def test_sign_flip_is_the_exact_enumeration(losses):
    x = np.array(losses) - 2.92
    flips = np.array(list(itertools.product((1, -1), repeat=len(x))))
    exact = np.mean((flips * x).mean(axis=1) <= x.mean() + 1e-15)
    found = sensitivity_of(np.array(losses), 2.92, 0.05, 9999, 0)
    assert found.sign_flip_exact
    assert found.sign_flip_p == pytest.approx(exact, abs=1.01 / len(flips))
    assert found.sign_flip_p >= found.sign_flip_least_p == 2.0 ** -len(x)


def test_bootstrap_bound_is_near_the_t_bound_for_normal_losses():
    x = np.random.default_rng(0).normal(2.9194, 0.0006, 60)
    found = ttest(x)
    assert found.sensitivity.bootstrap_upper_bound == pytest.approx(found.upper_conf_bound_mean, abs=3e-5)
    assert ttest(x) == found  # the same seed, the same numbers


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 25), st.integers(2, 5), st.integers(0, 10**6))
def test_rounding_interval_holds_the_p_of_the_unrounded_losses(n, decimals, seed):
    exact = np.random.default_rng(seed).normal(2.9195, 0.0008, n)
    rounded = np.round(exact, decimals)
    found = rounding_interval(rounded, 2.92, 0.05, decimals)
    p = scipy.stats.ttest_1samp(exact, 2.92, alternative="less").pvalue
    assert found.p_low - 1e-12 <= p <= found.p_high + 1e-12
    both = (found.p_low, found.p_high)
    assert found.decisive == all(max(both) < level or min(both) >= level for level in (0.05, 0.01))


def test_losses_with_few_digits_are_warned_about():
    result = ttest([2.91, 2.92, 2.92, 2.91, 2.92], decimals=2)
    assert not result.rounding.decisive
    assert any("decision hangs on digits not printed" in warning for warning in result.warnings)


def test_fewer_than_five_runs_are_warned_about():
    assert any("only 4 runs" in warning for warning in ttest(LOSSES[:4]).warnings)
    assert not ttest(LOSSES[:5]).warnings


def test_pooled_z():
    found = pooled_z(np.array(LOSSES), 2.92, 0.0008)
    z = (np.mean(LOSSES) - 2.92) / (0.0008 / math.sqrt(19))
    assert found.z_stat == pytest.approx(z)
    assert found.p_value == pytest.approx(scipy.stats.norm.cdf(z))
    ratio = 18 * np.var(LOSSES, ddof=1) / 0.0008**2
    assert found.variance_p == pytest.approx(2 * min(scipy.stats.chi2.cdf(ratio, 18), scipy.stats.chi2.sf(ratio, 18)))
    wide = ttest([2.90, 2.91, 2.93, 2.92], pooled_sigma=0.0008)
    assert any("does not fit sigma" in warning for warning in wide.warnings)
    with pytest.raises(UsageError, match="sigma must be positive"):
        pooled_z(np.array(LOSSES), 2.92, 0.0)


def _rejections(simulations: int, mean: float, n: int = 19, alpha: float = 0.01) -> float:
    """Share of simulated series in which `ttest`'s rule rejects; the rule itself is checked against `ttest`."""
    x = np.random.default_rng(8).normal(mean, 0.0008, (simulations, n))
    bounds = x.mean(axis=1) + scipy.stats.t.ppf(1 - alpha, n - 1) * x.std(axis=1, ddof=1) / math.sqrt(n)
    rejected = bounds < 2.92
    for losses, expected in zip(x[:20], rejected):
        assert ttest(losses, alpha=alpha, sensitivity=False).significant == expected
    return float(rejected.mean())


def test_false_positive_rate_and_power():
    """20,000 series each: Monte-Carlo error 0.07 % at the threshold, 0.3 % at the margin (exact power 0.756)."""
    assert abs(_rejections(20_000, 2.92) - 0.01) < 3 * 0.0007
    assert abs(_rejections(20_000, 2.9194) - 0.756) < 3 * 0.003


@pytest.mark.slow
def test_false_positive_rate_and_power_with_a_million_series():
    """Monte-Carlo error 0.01 % and 0.043 %."""
    assert abs(_rejections(1_000_000, 2.92) - 0.01) < 3 * 0.0001
    assert abs(_rejections(1_000_000, 2.9194) - 0.75603) < 3 * 0.00043


def _sensitivity_rates(series: int) -> tuple[float, float]:
    """(share of sign-flip p below .05, share of bootstrap bounds below the true mean) at a true mean of 2.92."""
    rng = np.random.default_rng(9)
    flips = bounds = 0
    for _ in range(series):
        found = sensitivity_of(rng.normal(2.92, 0.0008, 10), 2.92, 0.05, 1999, 0)
        flips += found.sign_flip_p <= 0.05
        bounds += found.bootstrap_upper_bound < 2.92
    return flips / series, bounds / series


def test_error_rates_of_the_sensitivity_checks():
    """200 series: Monte-Carlo error 1.5 %. The bootstrap of ten losses is known to be a little too sure."""
    flips, bounds = _sensitivity_rates(200)
    assert flips < 0.05 + 3 * 0.0154
    assert bounds < 0.075 + 3 * 0.0154


@pytest.mark.slow
def test_error_rates_of_the_sensitivity_checks_with_5000_series():
    """Monte-Carlo error 0.3 %."""
    flips, bounds = _sensitivity_rates(5000)
    assert abs(flips - 0.05) < 3 * 0.0031 + 0.002
    assert bounds < 0.08


def test_command_line_mixes_of_losses_and_paths(capsys):
    assert main(["ttest", "2.91", "nowhere.txt"]) == 2
    assert "losses and paths together" in capsys.readouterr().err
    assert main(["ttest", "2.91", "2.911", "2.912", "--pooled-sigma"]) == 0
    assert "sigma = 0.0008" in capsys.readouterr().out
    assert main(["ttest", "2.91", "2.911", "2.912", "--pooled-sigma", "0.001", "--alpha", "0.001"]) == 1
    assert "sigma = 0.001" in (told := capsys.readouterr().out) and "825" not in told
