"""Two recipes: against scipy and statsmodels on random data, and the words that are used."""

import json
import math

import numpy as np
import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW, ttost_ind

from stats.cli import main
from stats.compare import compare
from stats.errors import DataError, UsageError
from stats.samples import Sample
from stats.values import Run, Validation


def _sample(name, losses, times=None, seeds=None, hosts=None):
    times = [None] * len(losses) if times is None else times
    finals = tuple(Validation(100, float(x), t, None, 6, None) for x, t in zip(losses, times))
    runs = tuple(
        Run(
            f"{name}-{i}",
            f"{name}-{i}",
            "steps",
            1,
            100,
            100,
            100,
            (point,),
            seed=seeds[i] if seeds else None,
            host=hosts[i] if hosts else None,
        )
        for i, point in enumerate(finals)
    )
    return Sample(name, runs, finals)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.floats(-2, 2), st.floats(0.1, 5), st.integers(0, 10**6))
def test_welch_and_tost_against_the_libraries(n, m, shift, scale, seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(3, 1, n), rng.normal(3 + shift, scale, m)
    one = compare(_sample("a", a), [_sample("b", b)], alpha=0.05, loss_margin=1.0).comparisons[0]
    means = CompareMeans(DescrStatsW(b), DescrStatsW(a))
    t, p, df = means.ttest_ind(usevar="unequal")
    low, high = means.tconfint_diff(alpha=0.05, usevar="unequal")
    found = one.loss
    assert np.allclose([found.t_stat, found.p_value, found.df, found.low, found.high], [t, p, df, low, high], rtol=1e-8)
    assert found.estimate == pytest.approx(b.mean() - a.mean())
    assert one.loss_equivalence.p_value == pytest.approx(ttost_ind(b, a, -1, 1, usevar="unequal")[0], rel=1e-9)
    pooled = math.sqrt(((n - 1) * a.var(ddof=1) + (m - 1) * b.var(ddof=1)) / (n + m - 2))
    assert found.hedges_g == pytest.approx((b.mean() - a.mean()) / pooled * (1 - 3 / (4 * (n + m) - 9)))


def test_holm_over_several_candidates():
    rng = np.random.default_rng(0)
    base = _sample("base", rng.normal(3, 0.1, 9))
    others = [_sample(f"c{i}", rng.normal(3 + 0.05 * i, 0.1, 9)) for i in range(4)]
    result = compare(base, others)
    raw = [one.loss.p_value for one in result.comparisons]
    assert np.allclose([one.loss.holm_p for one in result.comparisons], multipletests(raw, method="holm")[1])


def test_losses_times_and_candidates_are_one_family():
    """Against statsmodels: Holm over all that is asked; --by one question leaves the other out of it."""
    rng = np.random.default_rng(6)
    base = _sample("base", rng.normal(3, 0.1, 9), rng.normal(90, 1, 9))
    others = [_sample(f"c{i}", rng.normal(3.05, 0.1, 9), rng.normal(90.5, 1, 9)) for i in range(3)]
    for asked in (("loss", "time_s"), ("loss",), ("time_s",)):
        result = compare(base, others, asked=asked)
        tests = [getattr(one, what) for one in result.comparisons for what in asked]
        raw = [test.p_value for test in tests]
        assert np.allclose([test.holm_p for test in tests], multipletests(raw, method="holm")[1])
        told = " ".join(result.comparisons[0].conclusions)
        assert ("loss: not asked" in told, "time: not asked" in told) == ("loss" not in asked, "time_s" not in asked)
    both, two = compare(base, others, correction="dunnett"), compare(base, others, correction="dunnett", asked=["loss"])
    for one, other in zip(both.comparisons, two.comparisons):
        assert one.loss.holm_p == pytest.approx(min(1, 2 * other.loss.holm_p))


def test_difference_and_equivalence_are_tested_in_one_family():
    """No difference and a difference of the margin cannot both be true: with one question nothing is corrected, with
    three candidates the least p of all six counts three times, not six."""
    rng = np.random.default_rng(7)
    base, *others = (_sample(str(i), rng.normal(3, 0.1, 9)) for i in range(4))
    alone = compare(base, others[:1], loss_margin=0.2).comparisons[0]
    assert alone.loss.holm_p == alone.loss.p_value and alone.loss_equivalence.holm_p == alone.loss_equivalence.p_value
    three = [compare(base, others, loss_margin=0.2).comparisons[i] for i in range(3)]
    tests = sorted([test for one in three for test in (one.loss, one.loss_equivalence)], key=lambda test: test.p_value)
    factors = [3, 3, 3, 3, 2, 1]  # Shaffer 1986
    wanted = np.minimum(1, np.maximum.accumulate([f * test.p_value for f, test in zip(factors, tests)]))
    assert np.allclose([test.holm_p for test in tests], wanted)


def test_exit_code_0_is_wrong_no_oftener_than_alpha():
    """Recipes that differ neither in loss nor in time, 400 times two candidates; and with a margin that is the very
    difference of the times, so that either of two claims would be wrong."""
    rng = np.random.default_rng(8)
    false = {"no difference": 0, "at the margin": 0}
    for _ in range(400):
        x, t = rng.normal(2.92, 0.001, (3, 8)), rng.normal(90, 1, (3, 8))
        for kind, shift, margins in (("no difference", 0, {}), ("at the margin", 2, {"time_margin_s": 2})):
            base, *others = (_sample(str(i), x[i], t[i] + shift * bool(i)) for i in range(3))
            result = compare(base, others, **margins)
            wrong = [one.loss.holm_p < 0.05 for one in result.comparisons]
            if kind == "no difference":
                wrong += [one.time_s.holm_p < 0.05 for one in result.comparisons]
                assert result.found_something == any(wrong)
            else:
                wrong += [one.time_equivalence.equivalent for one in result.comparisons]
            false[kind] += any(wrong)
    assert max(false.values()) <= 400 * 0.05 + 3 * math.sqrt(400 * 0.05 * 0.95), false


def test_by_says_what_the_exit_code_is_about(make_series, capsys):
    """One recipe is quicker and no better: exit code 0 by the times, 1 by the losses."""
    a = make_series("a", [2.9193, 2.9198, 2.9189, 2.9201], step_ms=50.0)
    b = make_series("b", [2.9194, 2.9197, 2.9188, 2.9203], step_ms=48.0)
    told = {
        by: (main(["compare", str(a), str(b), "--by", by]), capsys.readouterr().out) for by in ("loss", "time", "both")
    }
    assert {by: code for by, (code, _) in told.items()} == {"loss": 1, "time": 0, "both": 0}
    assert "time: not asked; these runs are shorter by" in told["loss"][1]
    assert "p-values of 2 questions are corrected together by Holm's" in told["both"][1]
    assert main(["compare", str(a), str(b), "--by", "time", "--sequential", "0.001", "0.001"]) == 2
    assert main(["compare", str(a), str(b), "--correction", "dunnett", "--time-margin", "1"]) == 2


def test_pairs_by_seed_or_by_host():
    rng = np.random.default_rng(1)
    shared = rng.normal(3, 1, 8)
    a, b = shared + rng.normal(0, 0.01, 8), shared + 0.02 + rng.normal(0, 0.01, 8)
    order = rng.permutation(8)
    by_seed = compare(
        _sample("a", a, seeds=list(range(8))), [_sample("b", b[order], seeds=[int(i) for i in order])]
    ).comparisons[0]
    reference = scipy.stats.ttest_rel(b, a)
    assert (by_seed.paired_loss.by, by_seed.paired_loss.pairs) == ("seed", 8)
    assert by_seed.paired_loss.p_value == pytest.approx(reference.pvalue)
    assert by_seed.paired_loss.p_value < 0.01 < by_seed.loss.p_value
    hosts = ["h1", "h1", "h2", "h2", "h3", "h3", "h4", "h4"]
    by_host = compare(_sample("a", a, hosts=hosts), [_sample("b", b, hosts=hosts)]).comparisons[0].paired_loss
    means = [values.reshape(4, 2).mean(axis=1) for values in (b, a)]
    assert (by_host.by, by_host.pairs) == ("host", 4)
    assert by_host.p_value == pytest.approx(scipy.stats.ttest_rel(*means).pvalue)
    assert compare(_sample("a", a), [_sample("b", b)]).comparisons[0].paired_loss is None


def test_words_never_say_that_two_are_the_same():
    rng = np.random.default_rng(2)
    a, b = _sample("old", rng.normal(2.92, 0.0006, 8)), _sample("new", rng.normal(2.92, 0.0006, 8))
    words = " ".join(compare(a, [b]).comparisons[0].conclusions)
    assert "no evidence of a difference" in words and " same" not in words
    words = " ".join(compare(a, [b], loss_margin=0.01).comparisons[0].conclusions)
    assert "equivalent within +-0.01 nats" in words
    words = " ".join(compare(a, [b], loss_margin=1e-5).comparisons[0].conclusions)
    assert "not shown to be equivalent within" in words
    far = _sample("far", rng.normal(2.93, 0.0006, 8))
    assert "far is higher by" in compare(a, [far]).comparisons[0].conclusions[0]


def test_false_positive_rate_of_compare():
    """20,000 pairs of equal recipes at alpha .05, unequal scatter: Monte-Carlo error 0.16 %."""
    rng = np.random.default_rng(3)
    a, b = rng.normal(0, 1, (20_000, 6)), rng.normal(0, 2, (20_000, 9))
    p = scipy.stats.ttest_ind(a, b, equal_var=False, axis=1).pvalue
    assert abs((p < 0.05).mean() - 0.05) < 3 * 0.0016
    samples = [(_sample("a", rng.normal(0, 1, 6)), _sample("b", rng.normal(0, 2, 9))) for _ in range(60)]
    rate = np.mean([compare(a, [b]).found_something for a, b in samples])
    assert rate < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 60)


def test_false_positive_rate_of_holm():
    """Three candidates equal to the baseline, 20,000 times: the chance of any claim stays at or below alpha .05
    (Monte-Carlo error 0.15 %). Holm claims something just if the least p is below alpha / 3; that `compare` does so is
    checked on some of them."""
    x = np.random.default_rng(4).normal(0, 1, (4, 20_000, 6))
    p = scipy.stats.ttest_ind(x[1:], x[:1], equal_var=False, axis=2).pvalue.min(axis=0)
    assert (p < 0.05 / 3).mean() < 0.05 + 3 * 0.0015
    order = np.argsort(p)
    near = np.searchsorted(p[order], 0.05 / 3)
    for index in order[near - 4 : near + 4]:
        base, *others = (_sample(str(i), x[i, index]) for i in range(4))
        assert compare(base, others).found_something == (p[index] < 0.05 / 3)


def test_refusals():
    good = _sample("a", [1.0, 2.0])
    with pytest.raises(DataError, match="b: a t-test needs at least 2"):
        compare(good, [_sample("b", [1.0])])
    with pytest.raises(DataError, match="b: no variance"):
        compare(good, [_sample("b", [1.0, 1.0])])
    with pytest.raises(UsageError, match="margin"):
        compare(good, [good], loss_margin=-1)
    with pytest.raises(UsageError, match="nothing to compare"):
        compare(good, [])


def test_command_line_and_community_table(make_series, capsys):
    a = make_series("a", [2.9193, 2.9198, 2.9189, 2.9201], step_ms=50.0)
    b = make_series("b", [2.9293, 2.9298, 2.9289, 2.9291], step_ms=48.0)
    assert main(["compare", str(a), str(b)]) == 0
    told = capsys.readouterr().out
    header = [cell.strip() for cell in told.splitlines()[0].split("|")[2:-1]]
    assert header == [
        "Runs",
        "Steps",
        "Time mean",
        "Time sd",
        "Time +/-",
        "Time p",
        "Loss mean",
        "Loss sd",
        "Loss +/-",
        "p",
    ]
    assert "b is higher by" in told and "b is shorter by" in told
    assert main(["compare", str(a), str(b), "--json"]) == 0
    loss = json.loads(capsys.readouterr().out)["comparisons"][0]["loss"]
    assert loss["estimate"] == pytest.approx(2.929275 - 2.919525)
    c = make_series("c", [2.9194, 2.9197, 2.9188, 2.9203])
    assert main(["compare", str(a), str(c)]) == 1
    assert main(["compare", str(a.parent), str(c)]) == 3
    assert "name one of them" in capsys.readouterr().err
