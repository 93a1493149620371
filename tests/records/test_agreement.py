"""Several studies together: signs, ranks, and what pairs are worth, on effects that are known."""

import re

import numpy as np
import pytest

from records import agreement
from records.agreement import Row
from records.study_plan import AGAIN, StudyError, StudyPlan, Treatment, read_plan
from stats.paired import Design, judge

DESIGN = dict(looks=(4, 8), alpha=0.05, margin=0.01)


def plan(name="one", preset="nano", files="text.bin"):
    flags = {"train_files": files} if files else {}
    return StudyPlan(name, preset, flags, (Treatment("t", {}),), **DESIGN)


def row(name, effect, *, of=None, percent=None, mn=None, sd=0.001, pairs=8, seed=0):
    """A treatment of a known effect, its pairs scattered by sd."""
    noise = np.random.default_rng(seed).normal(size=pairs) * sd
    base = 2.0 + np.random.default_rng(seed + 1).normal(size=pairs) * 0.01
    found = judge(base, base + effect + noise, (of or plan()).design, final=True)
    treatment = Treatment(name, {}, published_percent=percent, published_mn=mn)
    return Row(of or plan(), treatment, found, found.verdict)


def test_signs_and_ranks_proxy_by_proxy():
    micro = plan("two", "micro", "tokens.bin")
    rows = [row(f"t{i}", 0.05 * (i - 2.5), percent=i - 2.5) for i in range(6)]
    rows += [row(f"t{i}", -0.05 * (i - 2.5), of=micro, percent=i - 2.5) for i in range(6)]
    text = agreement.against_published(rows)
    one, two = (part for part in text.split("\n\n") if "treatments were measured" in part)
    assert one.startswith("`nano` on `text.bin`: 6 treatments") and two.startswith("`micro` on `tokens.bin`")
    assert "6 of them have a decided sign here, and 6 of those agree" in one and "Rank correlation +1.00" in one
    assert "0 of those agree with the claim in sign (not: t0, t1, t2, t3, t4, t5)" in two
    assert "Rank correlation -1.00" in two
    table = agreement.at_several_sizes(rows)
    assert table.count("**opposite signs here**") == 6 and "6 techniques in common. Rank correlation -1.00" in table


def test_what_one_size_shows_is_told_apart():
    micro = plan("two", "micro", "tokens.bin")
    rows = [
        row("both", -0.05), row("both", -0.03, of=micro),
        row("one", -0.05), row("one", -0.02, of=micro, sd=0.2),
        row("none", 0.0, sd=0.002), row("none", 0.0, of=micro, sd=0.002),
        row("wrong", 0.05, mn=-3.8),
        row("alone", -0.05), row(AGAIN, -0.05), row(AGAIN, -0.05, of=micro),
    ]  # fmt: skip
    said = {line.split(" | ")[0].strip("| "): line for line in agreement.at_several_sizes(rows).splitlines()}
    assert said["both"].endswith("| decided in all |")
    assert said["one"].endswith("| decided in `nano` on `text.bin` alone |")
    assert said["none"].endswith("| no effect here |")
    assert said["wrong"].endswith("| -2.0 | decided here, **against** the published sign |")
    assert "alone" not in said and AGAIN not in said  # nothing to compare them with


def test_of_two_studies_of_one_proxy_the_longer_counts():
    rows = [row("t", -0.5, pairs=4), row("t", -0.1, of=plan("later"), pairs=8, sd=0.3), row("t", 0.3, pairs=2)]
    kept = agreement.by_proxy(rows)["`nano` on `text.bin`"]["t"]
    assert kept.plan.name == "later"


@pytest.mark.parametrize("pairs, sd", [(4, 0.01), (8, 0.02)])
def test_the_smallest_effect_seen_is_seen_in_four_of_five(pairs, sd):
    """Against drawn studies, each judged as a study judges."""
    design = Design(looks=(pairs,), alpha=0.05, family=5, margin=1e-6)
    effect = agreement.smallest_seen(sd, design, pairs)
    drawn = np.random.default_rng(1).normal(size=(3000, pairs)) * sd - effect
    mean, spread = drawn.mean(1), drawn.std(1, ddof=1)
    seen = (mean + design.quantile(pairs, corrected=True) * spread / pairs**0.5 < 0).mean()
    assert seen == pytest.approx(0.8, abs=0.025)
    assert agreement.smallest_seen(2 * sd, design, pairs) == pytest.approx(2 * effect)


def test_what_pairs_are_worth_is_told_by_study():
    study = plan("close")
    rows = [row(f"t{i}", 0.0, sd=0.002, seed=i) for i in range(5)]
    (line,) = [line for line in agreement.worth([(study, rows), (plan("empty"), [])]).splitlines() if "close" in line]
    seeds, differences, apart, paired, independent, last = (float(x) for x in re.findall(r"[\d.]+", line))
    assert differences < seeds < apart and paired < independent and last < paired


def test_a_claim_is_in_percent_or_in_nats(tmp_path):
    text = 'preset = "nano"\n[design]\nlooks = [2]\nmargin = 0.1\n[treatments.t]\nflags = { seq = 1 }\n'
    path = tmp_path / "study.toml"
    path.write_text(text + "published_mn = -4.2\n")
    told = read_plan(path)
    effect = row("t", 0.0).effect
    assert Row(told, told.treatments[0], effect, "").claimed == pytest.approx(-4.2 / agreement.MN_A_PERCENT)
    assert "published_mn" not in told.sealed["treatments"][0]
    for claim, said in (
        ("published_mn = -4.2\npublished_percent = 1\n", "not both"),
        ("published_mn = true\n", "no num"),
    ):
        path.write_text(text + claim)
        with pytest.raises(StudyError, match=said):
            read_plan(path)


def test_shorter_than_five_there_is_no_rank_correlation():
    assert "none is given" in agreement.rank_correlation([1, 2, 3, 4], [1, 2, 3, 4])


def test_a_picture_where_there_is_something_to_draw(tmp_path):
    path = tmp_path / "evidence.png"
    assert not agreement.draw([row("t", -0.05)], path) and not path.exists()
    assert agreement.draw([row("t", -0.05, percent=-2), row("u", 0.05)], path)
    assert path.read_bytes()[:4] == b"\x89PNG"
