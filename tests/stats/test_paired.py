"""Paired, sequential comparisons with a base: verdicts, intervals that hold at any stop, errors over the family."""

import math

import numpy as np
import pytest
import scipy

from stats.errors import DataError, UsageError
from stats.paired import CONTINUE, DIVERGED, HELPS, HURTS, NO_EFFECT, UNDECIDED, Design, judge, pairs_to_see, ratio

DESIGN = Design(looks=(4, 6, 8), alpha=0.05, family=3, margin=0.01)


def losses(n, effect, sd=0.002, seed=0):
    random = np.random.default_rng(seed)
    base = 0.65 + 0.01 * random.standard_normal(n)
    return base, base + effect + sd * random.standard_normal(n)


def test_interval_is_the_t_interval_with_its_share_of_alpha():
    base, treated = losses(8, 0.0)
    found = judge(base, treated, Design(looks=(8,), alpha=0.1, margin=1e-9), final=True)
    truth = scipy.stats.ttest_rel(treated, base).confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((truth.low, truth.high), rel=1e-12)
    assert (found.family_low, found.family_high) == (found.low, found.high)
    share = Design(looks=(4, 8), alpha=0.1, family=2, margin=1e-9)
    assert share.quantile(8, corrected=True) == pytest.approx(scipy.stats.t.isf(0.1 / 2 / 2 / 2, 7), rel=1e-12)


@pytest.mark.parametrize(
    "effect, verdict", [(-0.05, HELPS), (0.05, HURTS), (0.0, NO_EFFECT), (-0.0095, CONTINUE)], ids=str
)
def test_verdicts(effect, verdict):
    base, treated = losses(6, effect, sd=0.001 if verdict != CONTINUE else 0.006)
    assert judge(base, treated, DESIGN).verdict == verdict


def test_undecided_tells_how_many_more():
    base, treated = losses(8, -0.004, sd=0.008, seed=3)
    found = judge(base, treated, DESIGN)
    assert found.verdict == UNDECIDED and 1 <= found.more_pairs <= 1000
    assert judge(base[:3], treated[:3], DESIGN).verdict == CONTINUE
    assert judge(base[:3], treated[:3], DESIGN, final=True).verdict == UNDECIDED


def test_later_pairs_do_not_change_a_decision():
    base, treated = losses(4, -0.05, sd=0.001)
    first = judge(base, treated, DESIGN)
    again = judge([*base, 0.6], [*treated, 0.9], DESIGN)
    assert first.verdict == HELPS and again == first


def test_the_same_program_twice_has_no_effect():
    base, _ = losses(4, 0.0)
    found = judge(base, base, DESIGN)
    assert (found.verdict, found.estimate, found.variance_ratio) == (NO_EFFECT, 0.0, 0.0)


def test_divergence_is_a_result():
    base, treated = losses(4, -0.05)
    treated[[0, 2, 3]] = math.nan
    found = judge(base, treated, DESIGN)
    assert (found.verdict, found.diverged, found.launched) == (DIVERGED, 3, 4)
    one = losses(4, -0.05)[1]
    one[1] = math.nan
    assert judge(base, one, DESIGN).verdict == CONTINUE  # three good pairs of four are no "helps"


@pytest.mark.parametrize(
    "base, treated, cause",
    [([1, 2], [1], "do not pair"), ([1, math.nan], [1, 2], "base"), ([1, 2, 3, 4], [2, 3, 4, 5], "copies")],
)
def test_refusals(base, treated, cause):
    with pytest.raises(DataError, match=cause):
        judge(base, treated, DESIGN)


@pytest.mark.parametrize(
    "bad", [dict(looks=()), dict(looks=(1, 3)), dict(looks=(4, 4)), dict(alpha=0.0), dict(margin=0)]
)
def test_designs_that_make_no_sense(bad):
    with pytest.raises(UsageError):
        Design(**bad)


def test_ratio_of_times_is_geometric():
    centre, low, high = ratio([10, 20, 40], [20, 40, 80])
    assert (centre, low, high) == pytest.approx((2, 2, 2))
    centre, low, high = ratio([10, 20, 40], [10, 30, 60])
    assert low < centre < high and centre == pytest.approx(1.5 ** (2 / 3))


def test_pairs_to_see_grows_as_the_effect_shrinks():
    spent = [pairs_to_see(effect, 0.004, DESIGN, simulations=200) for effect in (-0.05, -0.02)]
    assert 4 <= spent[0] < spent[1] <= 8
    assert pairs_to_see(-0.003, 0.004, DESIGN, simulations=200) == math.inf


def test_five_hundred_studies():
    """Known effects: covered by their intervals at the stated rate; wrong verdicts at most alpha over the family;
    fewer pairs spent than by a fixed design."""
    design, effects = Design(looks=(4, 6, 8, 12), alpha=0.05, family=4, margin=0.01), (0.0, 0.0, -0.02, 0.01)
    random = np.random.default_rng(1)
    covered = family_covered = wrong = spent = 0
    studies = 500
    for _ in range(studies):
        base = 0.65 + 0.008 * random.standard_normal(12)
        found = [judge(base, base + e + 0.006 * random.standard_normal(12), design) for e in effects]
        covered += sum(f.low <= e <= f.high for f, e in zip(found, effects))
        family_covered += all(f.family_low <= e <= f.family_high for f, e in zip(found, effects))
        wrong += any((f.verdict == HELPS and e >= 0) or (f.verdict == HURTS and e <= 0) for f, e in zip(found, effects))
        spent += sum(f.launched for f in found)
    low, high = scipy.stats.binomtest(wrong, studies).proportion_ci(0.999)
    assert low <= design.alpha, (wrong, low, high)
    assert scipy.stats.binomtest(covered, 4 * studies).proportion_ci(0.999).high >= 0.95
    assert scipy.stats.binomtest(family_covered, studies).proportion_ci(0.999).high >= 0.95
    assert spent < 0.95 * 12 * 4 * studies
