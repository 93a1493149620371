"""Two recipes: do their losses and times differ, by how much, and could they be called equivalent?

Welch's t-test on losses and on times; a paired test where runs pair up by seed or by host; equivalence within a margin
by two one-sided tests (TOST). Whatever is asked (losses, times or both, of each candidate) is corrected together, so
that the chance of any false claim is at most alpha. A large p is "no evidence of a difference", never "the same": only
the TOST can speak for sameness, and only within its margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import scipy

from stats.correct import below_p, dunnett_p, holm_p, tost_p
from stats.curve import curve
from stats.errors import DataError, UsageError
from stats.plans import make_plan
from stats.samples import Sample, unlike_losses
from stats.sequential import ACCEPT, CONTINUE, FUTILE, Decision, decide
from stats.ttest import TRACK_THRESHOLD, Summary, check_alpha, checked_losses, summarize


@dataclass(frozen=True, slots=True)
class Difference:
    """Candidate minus baseline, and the test that it is zero."""

    estimate: float
    low: float  # two-sided confidence interval at 1 - alpha
    high: float
    t_stat: float
    df: float
    p_value: float  # two-sided
    holm_p: float  # the same, corrected for all that was asked (Holm's or Dunnett's way)
    hedges_g: float | None  # in pooled standard deviations, small-sample corrected


@dataclass(frozen=True, slots=True)
class Paired:
    """The same difference within pairs."""

    by: str  # seed or host
    pairs: int
    correlation: float | None
    estimate: float
    low: float
    high: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Equivalence:
    """Two one-sided tests that the difference lies within +-margin."""

    margin: float
    p_value: float
    holm_p: float  # the same, corrected for all that was asked
    equivalent: bool


@dataclass(frozen=True, slots=True)
class Group:
    """One side of a comparison."""

    name: str
    steps: int | None
    loss: Summary
    time_s: Summary | None
    threshold_p: float | None  # one-sided t-test of this group's losses against the threshold


@dataclass(frozen=True, slots=True)
class Comparison:
    """One candidate against the baseline."""

    baseline: Group
    candidate: Group
    alpha: float
    loss: Difference
    time_s: Difference | None
    paired_loss: Paired | None
    paired_time_s: Paired | None
    loss_equivalence: Equivalence | None
    time_equivalence: Equivalence | None
    loss_in_steps: float | None  # the difference at the slope of the baseline's curve; negative: reached earlier
    conclusions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Every candidate against one baseline; p-values corrected together."""

    threshold: float
    asked: tuple[str, ...]  # loss, time_s: what the corrected p-values and the exit code are about
    comparisons: tuple[Comparison, ...]
    table: str  # the community's table, in Markdown
    notes: tuple[str, ...]

    @property
    def found_something(self) -> bool:
        """True if a loss or time that was asked about differs at alpha, or was shown to be equivalent."""
        return any(
            (difference is not None and difference.holm_p < one.alpha)
            or (equivalence is not None and equivalence.equivalent)
            for one in self.comparisons
            for what in self.asked
            for difference, equivalence in [_claims(one, what)]
        )


def _claims(one: Comparison, what: str) -> tuple[Difference | None, Equivalence | None]:
    """The tests of `what` (loss or time_s)."""
    return (one.loss, one.loss_equivalence) if what == "loss" else (one.time_s, one.time_equivalence)


QUESTIONS = ("loss", "time_s")
_CORRECTIONS = {"holm": "Holm's step-down method", "dunnett": "Dunnett's test, which assumes one spread for all"}


def compare(
    baseline: Sample,
    candidates: Sequence[Sample],
    alpha: float = 0.05,
    *,
    loss_margin: float | None = None,
    time_margin_s: float | None = None,
    threshold: float = TRACK_THRESHOLD,
    correction: str = "holm",
    asked: Sequence[str] = QUESTIONS,
) -> Comparisons:
    """Each candidate against the baseline. Margins (nats, seconds) add the equivalence tests.

    `asked`: loss, time_s or both. All of that is one family: the chance of any false claim is at most alpha. What is
    not asked is told as well, uncorrected, and claims nothing. Raises DataError for a side with fewer than two losses
    or without variance; UsageError for an alpha, a margin or a correction that makes no sense.
    """
    check_alpha(alpha)
    for margin in (loss_margin, time_margin_s):
        if margin is not None and not (margin > 0 and math.isfinite(margin)):
            raise UsageError(f"a margin must be positive, not {margin}")
    if not candidates:
        raise UsageError("nothing to compare with: name a baseline and at least one candidate")
    for sample in (baseline, *candidates):
        try:
            checked_losses(sample.losses)
        except DataError as error:
            raise DataError(f"{sample.name}: {error.cause}") from None
    if "unit" in unlike_losses([sample.runs for sample in (baseline, *candidates)]):
        raise DataError("losses in different units (nats a token, bits a byte): they cannot be compared")
    if correction not in _CORRECTIONS:
        raise UsageError(f"correction {correction!r}: {' or '.join(_CORRECTIONS)}")
    if correction == "dunnett" and (loss_margin is not None or time_margin_s is not None):
        raise UsageError("Dunnett's test knows no equivalence: take --correction holm, or leave out the margins")
    groups = [_group(sample, threshold) for sample in (baseline, *candidates)]
    losses = [welch(candidate.losses, baseline.losses, alpha) for candidate in candidates]
    times = [welch(candidate.times_s, baseline.times_s, alpha) for candidate in candidates]
    slope = _end_slope(baseline)
    found = []
    for candidate, group, loss, time_s in zip(candidates, groups[1:], losses, times):
        assert loss is not None, "checked_losses: every side has losses that scatter"
        one = Comparison(
            baseline=groups[0],
            candidate=group,
            alpha=alpha,
            loss=loss,
            time_s=time_s,
            paired_loss=_paired(baseline, candidate, alpha, "loss"),
            paired_time_s=_paired(baseline, candidate, alpha, "time_s"),
            loss_equivalence=_equivalence(candidate.losses, baseline.losses, loss_margin, alpha),
            time_equivalence=_equivalence(candidate.times_s, baseline.times_s, time_margin_s, alpha),
            loss_in_steps=loss.estimate / abs(slope) if slope else None,
            conclusions=(),
        )
        found.append(one)
    correct = _dunnett_together if correction == "dunnett" else _holm_together
    found = [replace(one, conclusions=_conclusions(one, asked)) for one in correct(found, asked, baseline, candidates)]
    notes = _notes(baseline, candidates, found, asked, correction)
    return Comparisons(threshold, tuple(asked), tuple(found), community_table(groups, found), notes)


def _holm_together(
    found: Sequence[Comparison], asked: Sequence[str], baseline: Sample, candidates: Sequence[Sample]
) -> list[Comparison]:
    """With p-values corrected by Holm's method over all candidates and all that is asked of them. That two recipes do
    not differ and that they differ by the margin cannot both be true, so that at most half of the hypotheses are."""
    units = [(index, what) for index in range(len(found)) for what in asked if _claims(found[index], what)[0]]
    tests = [(unit, test) for unit in units for test in _claims(found[unit[0]], unit[1]) if test is not None]
    corrected = holm_p([test.p_value for _, test in tests], len(units))
    told = list(found)
    for ((index, what), test), p in zip(tests, corrected):
        told[index] = _corrected(told[index], what, test, p)
    return told


def _corrected(one: Comparison, what: str, test: Difference | Equivalence, p: float) -> Comparison:
    """`one` with the corrected p of one of its tests."""
    if isinstance(test, Difference):
        difference = replace(test, holm_p=p)
        return replace(one, loss=difference) if what == "loss" else replace(one, time_s=difference)
    same = replace(test, holm_p=p, equivalent=p < one.alpha)
    return replace(one, loss_equivalence=same) if what == "loss" else replace(one, time_equivalence=same)


def _dunnett_together(
    found: Sequence[Comparison], asked: Sequence[str], baseline: Sample, candidates: Sequence[Sample]
) -> list[Comparison]:
    """With p-values of Dunnett's test over the candidates, those of each question times the number of questions."""
    told = list(found)
    for what in asked:
        values = [sample.losses if what == "loss" else sample.times_s for sample in (baseline, *candidates)]
        tests = {index: test for index, one in enumerate(found) if (test := _claims(one, what)[0])}
        p_values = [test.p_value for test in tests.values()]
        if len(tests) > 1:
            p_values = dunnett_p([values[index + 1] for index in tests], values[0])
        for (index, test), p in zip(tests.items(), p_values):
            told[index] = _corrected(told[index], what, test, min(1.0, len(asked) * p))
    return told


FEW_RUNS = 5


def _notes(
    baseline: Sample, candidates: Sequence[Sample], found: Sequence[Comparison], asked: Sequence[str], correction: str
) -> tuple[str, ...]:
    """What has to be known to read the table: mixtures, few runs, other machines, the correction."""
    samples = (baseline, *candidates)
    notes = [f"{sample.name}: {note}" for sample in samples for note in sample.notes]
    for sample in samples:
        if len(sample.losses) < FEW_RUNS:
            runs = len(sample.losses)
            notes.append(f"{sample.name}: only {runs} runs, so the test rests on normality that they cannot show")
    if unlike := unlike_losses([sample.runs for sample in samples]):
        notes.append(f"different {unlike}: a difference of the losses is theirs as well")
    machines = {(run.hardware, run.world_size) for sample in samples for run in sample.runs if run.hardware}
    if len(machines) > 1:
        told = "; ".join(f"{name}, {count or '?'} processes" for name, count in sorted(machines, key=str))
        notes.append(f"different machines ({told}): a difference of the times is theirs as well")
    claims = sum(_claims(one, what)[0] is not None for one in found for what in asked)
    if claims > 1:
        notes.append(f"p-values of {claims} questions are corrected together by {_CORRECTIONS[correction]}")
    return tuple(notes)


def _end_slope(sample: Sample) -> float | None:
    """Nats a step at the end of the mean curve; None where there is none."""
    try:
        return curve(sample.runs, float(np.mean(sample.losses))).slope_per_step
    except DataError:
        return None


@dataclass(frozen=True, slots=True)
class SequentialComparison:
    """Whether two recipes differ, asked after every pair of runs."""

    verdict: str  # LOWER, HIGHER, FUTILE or CONTINUE, of the candidate's loss
    pairs: int
    paired_by: str
    below: Decision  # that the candidate lies lower by the margin
    above: Decision  # that it lies higher
    words: str


def compare_sequentially(
    baseline: Sample, candidate: Sample, margin: float, sigma: float, alpha: float = 0.05
) -> SequentialComparison:
    """The sequential t-test on the differences of pairs, in the order of the baseline's runs: stop when decided.

    `margin`: the difference that is worth finding, `sigma`: the standard deviation of one run, both in nats. Two
    one-sided tests at alpha / 2. Pairs are runs of one seed, else runs of one rank in the order of launch.
    """
    seeds = [_by_key(sample, "seed", "loss") for sample in (baseline, candidate)]
    once = all(seeds) and all(len(runs) == 1 for side in seeds for runs in side.values())
    if once and seeds[0].keys() & seeds[1].keys():
        by, pairs = "seed", [(seeds[0][seed][0], seeds[1][seed][0]) for seed in seeds[0] if seed in seeds[1]]
    else:
        by, pairs = "order", list(zip(baseline.losses, candidate.losses))
    differences = [after - before for before, after in pairs]
    plan = make_plan(0.0, margin, sigma * math.sqrt(2), "sigma of one run, times sqrt 2", alpha=alpha / 2)
    below, above = (decide([sign * one for one in differences[: plan.cap]], plan) for sign in (1.0, -1.0))
    verdict = "LOWER" if below.verdict == ACCEPT else "HIGHER" if above.verdict == ACCEPT else FUTILE
    if verdict == FUTILE and CONTINUE in (below.verdict, above.verdict):
        verdict = CONTINUE
    names = f"{candidate.name} against {baseline.name}"
    words = {
        "LOWER": f"{names}: the loss is lower, decided after {below.n} pairs",
        "HIGHER": f"{names}: the loss is higher, decided after {above.n} pairs",
        FUTILE: f"{names}: these pairs show no difference of {margin:g} nats",
        CONTINUE: f"{names}: not decided after {len(pairs)} pairs; go on, to at most {plan.cap}",
    }
    return SequentialComparison(verdict, len(pairs), by, below, above, words[verdict])


def _group(sample: Sample, threshold: float) -> Group:
    steps = {point.step for point in sample.finals}
    times = sample.times_s
    return Group(
        sample.name,
        steps.pop() if len(steps) == 1 else None,
        summarize(sample.losses),
        summarize(times) if times else None,
        below_p(sample.losses, threshold),
    )


def welch(candidate: Sequence[float], baseline: Sequence[float], alpha: float) -> Difference | None:
    """Welch's test of candidate minus baseline; None where there are not two values a side, or no scatter at all."""
    a, b = np.asarray(candidate, float), np.asarray(baseline, float)
    if min(len(a), len(b)) < 2 or np.ptp(a) + np.ptp(b) == 0:
        return None
    parts = [side.var(ddof=1) / len(side) for side in (a, b)]
    error = math.sqrt(sum(parts))
    df = sum(parts) ** 2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, (a, b)))  # Welch 1947
    estimate = float(a.mean() - b.mean())
    half = float(scipy.special.stdtrit(df, 1 - alpha / 2)) * error
    p_value = 2 * float(scipy.special.stdtr(df, -abs(estimate) / error))
    freedom = len(a) + len(b) - 2
    pooled = math.sqrt(((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / freedom)
    return Difference(
        estimate=estimate,
        low=estimate - half,
        high=estimate + half,
        t_stat=estimate / error,
        df=df,
        p_value=p_value,
        holm_p=p_value,
        hedges_g=estimate / pooled * (1 - 3 / (4 * freedom - 1)),
    )


def holm(differences: list[Difference | None]) -> list[Difference | None]:
    """With p-values corrected by Holm's step-down method over all that have one."""
    tested = [difference for difference in differences if difference is not None]
    if len(tested) < 2:
        return differences
    corrected = iter(holm_p([difference.p_value for difference in tested]))
    return [None if one is None else replace(one, holm_p=next(corrected)) for one in differences]


def _paired(baseline: Sample, candidate: Sample, alpha: float, what: str) -> Paired | None:
    """The paired t-test by seed, or else by host; None if fewer than two pairs exist.

    Runs pair by seed where every seed occurs once a side. Several runs of one host are averaged first.
    """
    values = [_by_key(sample, "seed", what) for sample in (baseline, candidate)]
    by = "seed"
    if not all(values) or any(len(runs) > 1 for side in values for runs in side.values()):
        by, values = "host", [_by_key(sample, "host", what) for sample in (baseline, candidate)]
    common = sorted(values[0].keys() & values[1].keys(), key=str)
    if len(common) < 2:
        return None
    b, a = (np.array([np.mean(side[key]) for key in common]) for side in values)
    if np.ptp(a - b) == 0:
        return None
    result = scipy.stats.ttest_rel(a, b)
    interval = result.confidence_interval(1 - alpha)
    correlated = len(common) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
    correlation = float(np.corrcoef(a, b)[0, 1]) if correlated else None
    return Paired(
        by,
        len(common),
        correlation,
        float((a - b).mean()),
        float(interval.low),
        float(interval.high),
        float(result.pvalue),
    )


def _by_key(sample: Sample, key: str, what: str) -> dict[object, list[float]]:
    """{seed or host: values}; empty if some run does not tell its."""
    found: dict[object, list[float]] = {}
    for run, point in zip(sample.runs, sample.finals):
        value = getattr(point, what)
        if getattr(run, key) is None or value is None:
            return {}
        found.setdefault(getattr(run, key), []).append(value)
    return found


def _equivalence(
    candidate: Sequence[float], baseline: Sequence[float], margin: float | None, alpha: float
) -> Equivalence | None:
    if margin is None or min(len(candidate), len(baseline)) < 2:
        return None
    p_value = tost_p(candidate, baseline, margin)
    return Equivalence(margin, p_value, p_value, p_value < alpha)


def _conclusions(one: Comparison, asked: Sequence[str]) -> tuple[str, ...]:
    found = []
    for what, name, unit, less, more in (
        ("loss", "loss", "nats", "lower", "higher"),
        ("time_s", "time", "s", "shorter", "longer"),
    ):
        difference, equivalence = _claims(one, what)
        if difference is None:
            if what == "time_s" and what in asked:
                told = min(side.time_s.n if side.time_s else 0 for side in (one.baseline, one.candidate))
                why = "no variance: all of them are equal" if told > 1 else "fewer than two runs a side tell it"
                found.append(f"time: not compared; {why}")
            continue
        size = f"{less if difference.estimate < 0 else more} by {abs(difference.estimate):.4g} {unit}"
        interval = f"{1 - one.alpha:.0%} interval {difference.low:+.4g} to {difference.high:+.4g} {unit}"
        if what not in asked:
            found.append(f"{name}: not asked; these runs are {size} ({interval})")
            continue
        p = f"p = {difference.holm_p:.3g}"
        if difference.holm_p < one.alpha:
            found.append(f"{name}: {one.candidate.name} is {size} ({interval}, {p})")
        else:
            text = f"no evidence of a difference ({p}; these runs are {size} and compatible with the {interval})"
            found.append(f"{name}: {text}")
        if equivalence:
            verdict = "equivalent" if equivalence.equivalent else "not shown to be equivalent"
            within = f"within +-{equivalence.margin:g} {unit}"
            found.append(f"{name}: {verdict} {within} (TOST p = {equivalence.holm_p:.3g})")
    return tuple(found)


def community_table(groups: Sequence[Group], comparisons: Sequence[Comparison]) -> str:
    """The table that records of the track print. `+/-` and `Time p` are against the first row (Welch,
    two-sided); the last p is the row's own one-sided t-test against the threshold."""
    from stats.text import table

    rows = []
    for group, one in zip(groups, [None, *comparisons]):
        time, time_difference = group.time_s, one.time_s if one else None
        rows.append(
            [
                group.name,
                group.loss.n,
                group.steps or "-",
                f"{time.mean:.3f}" if time else "-",
                _digits(time.sample_std if time else None, ".3f"),
                _digits(time_difference.estimate if time_difference else None, "+.3f"),
                _digits(time_difference.p_value if time_difference else None, ".3g"),
                f"{group.loss.mean:.6f}",
                _digits(group.loss.sample_std, ".6f"),
                _digits(one.loss.estimate if one else None, "+.6f"),
                _digits(group.threshold_p, ".3g"),
            ]
        )
    header = [
        "",
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
    return table(header, rows)


def _digits(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def render(result: Comparisons) -> str:
    """Table and conclusions in plain text."""
    lines = [result.table, "", f"+/- and Time p against the first row (Welch); p: mean loss < {result.threshold}"]
    for one in result.comparisons:
        lines += ["", f"{one.candidate.name} against {one.baseline.name}"]
        lines += [f"  {conclusion}" for conclusion in one.conclusions]
        steps = "" if one.loss_in_steps is None else f", {one.loss_in_steps:+.4g} steps at the end's slope"
        effect = f"{one.loss.estimate:+.4g} nats, {one.loss.hedges_g:+.3g} standard deviations (Hedges' g)"
        lines.append(f"  effect on the loss: {effect}{steps}")
        for what, paired in (("loss", one.paired_loss), ("time", one.paired_time_s)):
            if paired:
                r = "" if paired.correlation is None else f", correlation {paired.correlation:.2f}"
                lines.append(
                    f"  {what}, {paired.pairs} pairs by {paired.by}{r}: {paired.estimate:+.4g} "
                    f"({paired.low:+.4g} to {paired.high:+.4g}), p = {paired.p_value:.3g}"
                )
    return "\n".join(lines + [f"note: {note}" for note in result.notes])
