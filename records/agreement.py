"""What several studies say together: one technique at several sizes, beside its published effect; what pairs are worth.

A proxy is a preset with the tokens that it is trained on. Effects of two proxies are compared in sign and in rank only:
a nat of bytes and a nat of words are not the same thing."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy

from records.study_plan import AGAIN, StudyPlan, Treatment
from records.study_report import COLOURS
from stats.paired import HELPS, HURTS, NO_EFFECT, Design, Effect

FEWEST = 5  # techniques measured both ways below which a rank correlation says nothing
#: Loss that one percent of the steps is worth near a run's end, 0.001 nats: 1.5 to 2.3 over four pairs of published
#: series (#259, #264, #315 of the track, and its optimizer track; 8 to 20 runs each side), and their middle.
MN_RANGE = (1.5, 2.3)
MN_A_PERCENT = sum(MN_RANGE) / 2


@dataclass(frozen=True)
class Row:
    """One treatment of one study. `text`: its verdict in words."""

    plan: StudyPlan
    treatment: Treatment
    effect: Effect
    text: str

    @property
    def proxy(self) -> str:
        """Preset and tokens, as Markdown."""
        files = self.plan.flags.get("train_files", "")
        return f"`{self.plan.preset}` on {f'`{files}`' if files else 'its own text'}"

    @property
    def decided(self) -> bool:
        return self.effect.verdict in (HELPS, HURTS)

    @property
    def claimed(self) -> float | None:
        """The published change of the steps needed, percent; a claim in nats as that many steps (MN_A_PERCENT)."""
        told = self.treatment
        if told.published_percent is None and told.published_mn is not None:
            return told.published_mn / MN_A_PERCENT
        return told.published_percent

    @property
    def short(self) -> str:
        """Effect, interval, verdict: "-0.053 (-0.096 to -0.010) helps"."""
        e = self.effect
        if e.estimate is None or e.family_low is None:
            return e.verdict
        return f"{e.estimate:+.3f} ({e.family_low:+.3f} to {e.family_high:+.3f}) {e.verdict}"


def by_proxy(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """{proxy: {technique: row}}; of a technique that two studies of one proxy have, the row with more pairs."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row.treatment.name == AGAIN or row.effect.estimate is None:
            continue
        kept = found.setdefault(row.proxy, {})
        if row.treatment.name not in kept or kept[row.treatment.name].effect.pairs < row.effect.pairs:
            kept[row.treatment.name] = row
    return found


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> str:
    """Spearman's, with an interval by resampling; or why there is none."""
    if len(x) < FEWEST:
        return f"With fewer than {FEWEST} of them a rank correlation says nothing, so none is given."
    rho = float(scipy.stats.spearmanr(x, y).statistic)
    random, drawn = np.random.default_rng(0), []
    for _ in range(2000):
        chosen = random.integers(len(x), size=len(x))
        a, b = np.asarray(x)[chosen], np.asarray(y)[chosen]
        if np.ptp(a) > 0 and np.ptp(b) > 0:
            drawn.append(scipy.stats.spearmanr(a, b).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return (
        f"Rank correlation {rho:+.2f} (95 % interval by resampling treatments {low:+.2f} to {high:+.2f}, which "
        f"covers too little at this number)."
    )


def against_published(rows: Sequence[Row]) -> str:
    """Signs and ranks of what was measured both ways, proxy by proxy."""
    parts = ["## Small against published\n"]
    for proxy, found in by_proxy(rows).items():
        both = [row for row in found.values() if row.claimed is not None]
        if not both:
            continue
        decided = [row for row in both if row.decided]
        same = [row for row in decided if (row.effect.estimate < 0) == (row.claimed < 0)]
        other = sorted(row.treatment.name for row in decided if row not in same)
        text = (
            f"{proxy}: {len(both)} treatments were measured here and have a published claim in numbers; {len(decided)} "
            f"of them have a decided sign here, and {len(same)} of those agree with the claim in sign"
            f"{' (not: ' + ', '.join(other) + ')' if other else ''}."
        )
        parts.append(f"{text} {rank_correlation([r.effect.estimate for r in both], [r.claimed for r in both])}\n")
    if len(parts) == 1:
        parts.append("No treatment so far has a published claim in numbers.\n")
    return "\n".join(parts)


def at_several_sizes(rows: Sequence[Row]) -> str:
    """The techniques that more than one proxy has measured, or one proxy and a publication."""
    proxies = by_proxy(rows)
    names = sorted({name for found in proxies.values() for name in found})
    seen = {name: {proxy: found[name] for proxy, found in proxies.items() if name in found} for name in names}
    seen = {name: at for name, at in seen.items() if len(at) + any(r.claimed is not None for r in at.values()) > 1}
    if not seen:
        return ""
    used = [proxy for proxy in proxies if any(proxy in at for at in seen.values())]
    lines = [
        f"| technique | {' | '.join(used)} | published, % of the steps | what it shows |",
        "|-" * (len(used) + 3) + "|",
    ]
    for name, at in seen.items():
        claim = next((row.claimed for row in at.values() if row.claimed is not None), None)
        cells = [at[proxy].short if proxy in at else "" for proxy in used]
        lines.append(
            f"| {name} | {' | '.join(cells)} | {'' if claim is None else f'{claim:+.1f}'} | {shown(at, claim)} |"
        )
    parts = ["## One technique at several sizes\n", "\n".join(lines) + "\n"]
    for one, two in itertools.combinations(used, 2):
        shared = [name for name in proxies[one] if name in proxies[two]]
        if shared:
            x, y = ([proxies[p][name].effect.estimate for name in shared] for p in (one, two))
            parts.append(f"{one} and {two}: {len(shared)} techniques in common. {rank_correlation(x, y)}\n")
    return "\n".join(parts)


def shown(at: Mapping[str, Row], claim: float | None) -> str:
    """In words: where a technique has a sign, and whether the signs agree."""
    decided = {proxy: row.effect.estimate for proxy, row in at.items() if row.decided}
    if not decided:
        none = all(row.effect.verdict == NO_EFFECT for row in at.values())
        return "no effect here" if none else "no sign here"
    signs = {value < 0 for value in decided.values()}
    if len(signs) > 1:
        return "**opposite signs here**"
    words = "in all" if len(decided) == len(at) else "in " + " and ".join(decided) + " alone"
    words = "decided here" if len(at) == 1 else f"decided {words}"
    if claim is None:
        return words
    return f"{words}, {'as' if (claim < 0) == signs.pop() else '**against**'} the published sign"


def draw(rows: Sequence[Row], path: Path) -> bool:
    """One panel a proxy with the techniques' effects and intervals, and one with the published changes, in their
    order; as a picture. Returns whether there was anything to draw."""
    proxies = {
        name: found for name, found in by_proxy(rows).items() if any(r.claimed is not None for r in found.values())
    }
    claims = {n: r.claimed for found in proxies.values() for n, r in found.items() if r.claimed is not None}
    if not claims:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted(claims, key=claims.__getitem__)
    wide, high = 2.4 + 2.3 * (len(proxies) + 1), 1.3 + 0.27 * len(names)
    figure, axes = pyplot.subplots(1, len(proxies) + 1, figsize=(wide, high), sharey=True, layout="constrained")
    for axis, (proxy, found) in zip(axes, proxies.items()):
        for place, name in enumerate(names):
            if name in found and (e := found[name].effect).family_low is not None:
                colour = COLOURS.get(e.verdict, "#000000")
                axis.plot([e.family_low, e.family_high], [place, place], color=colour, lw=1)
                axis.plot([e.estimate], [place], "o", color=colour, ms=4)
        axis.set_title(proxy.replace("`", ""), fontsize=8)
        axis.set_xlabel("nats", fontsize=8)
    for place, name in enumerate(names):
        axes[-1].plot([0, claims[name]], [place, place], color="#24292f", lw=2, solid_capstyle="butt")
    axes[-1].set_title("published, at their own sizes", fontsize=8)
    axes[-1].set_xlabel("% of the steps", fontsize=8)
    axes[0].set_yticks(range(len(names)), names, fontsize=8)
    axes[0].invert_yaxis()
    for axis in axes:
        axis.axvline(0, color="#24292f", lw=0.6)
        axis.tick_params(axis="x", labelsize=7)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return True


# -----------------------------------------------------------------------------------------------------------
# Pairs


def pairing(effects: Sequence[Effect]) -> str:
    """What equal seeds were worth in one study.

    The interval is Fisher's of a correlation, as wide as for the treatment with the most pairs alone: all treatments
    share the base's runs, so that together they hardly tell more."""
    told = [e for e in effects if e.variance_ratio is not None and e.correlation is not None and e.pairs > 3]
    if not told:
        return ""
    ratio = float(np.median([e.variance_ratio for e in told]))
    weights = [e.pairs - 3 for e in told]
    middle = float(np.average(np.arctanh(np.clip([e.correlation for e in told], -0.999, 0.999)), weights=weights))
    low, high = (float(np.tanh(middle + side * 1.96 / max(weights) ** 0.5)) for side in (-1, 1))
    verdict = "so few pairs do not tell whether it saves runs"
    if low > 0 or high < 0:
        verdict = f"it {'saves' if low > 0 else 'costs'} runs here"
    return (
        f"Pairing by seed: the variance of a difference is {ratio:.2f} (median) of what independent runs would give; "
        f"correlation of the runs of a pair {np.tanh(middle):+.2f} ({low:+.2f} to {high:+.2f}): {verdict}.\n"
    )


def smallest_seen(sd: float, design: Design, pairs: int, power: float = 0.8) -> float:
    """The smallest effect, nats, that one look of `design` after so many pairs decides with this probability, if their
    differences scatter by sd: the noncentral t."""
    quantile = dataclasses.replace(design, looks=(pairs,)).quantile(pairs, corrected=True)
    missed = lambda shift: float(scipy.stats.nct.sf(quantile, pairs - 1, shift)) - power  # noqa: E731
    return float(scipy.optimize.brentq(missed, 0.0, 20 + 5 * quantile)) * sd / pairs**0.5


def worth(studies: Sequence[tuple[StudyPlan, Sequence[Row]]]) -> str:
    """At which effects pairs save runs: a table of the studies."""
    lines = [
        "| study | seeds | differences | if independent | first look sees | if independent | last look sees |",
        "|-|-|-|-|-|-|-|",
    ]
    for plan, rows in studies:
        told = [row.effect for row in rows if row.treatment.name != AGAIN and row.effect.sd and row.effect.base_sd]
        if not told:
            continue
        base, paired = (float(np.median([getattr(e, key) for e in told])) for key in ("base_sd", "sd"))
        first, last, apart = plan.looks[0], plan.looks[-1], 2**0.5 * base
        seen = [smallest_seen(sd, plan.design, n) for sd, n in ((paired, first), (apart, first), (paired, last))]
        lines.append(f"| {plan.name} | {' | '.join(f'{value:.3f}' for value in (base, paired, apart, *seen))} |")
    return WORTH + "\n".join(lines) + "\n"


WORTH = """## At which effects pairs save runs

Standard deviations in nats (medians over a study's treatments): of the base between seeds, of the differences within
pairs, and what differences of independent runs would have. Then the smallest effect that a study's first look would
decide in four of five studies if it were the only look, with pairs as they were and with independent runs, and likewise
its last look. An effect above both numbers of the first look costs the same runs either way; between them pairing saves
every run after the first look.

"""
