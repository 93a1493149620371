"""What holds at another size: docs/evidence.md, effects measured here beside the effects published elsewhere.

    python -m records.evidence            # from every records/studies/NAME.toml and its folder

Nothing in the page is typed by hand: the effects come from the studies' logs, the claims from their TOML files.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy

from data.paths import write_text
from records.folder import REPO, SeriesError
from records.study_plan import AGAIN, StudyError, StudyPlan, Treatment, read_plan
from records.study_report import read_pairs, sealed_plan, verdicts, words
from stats.errors import StatsError
from stats.paired import HELPS, HURTS, Effect
from trainer.options import command, setting

FEWEST = 5  # techniques measured both ways below which a rank correlation says nothing
INTRODUCTION = """# Evidence: what holds at another size

The track's techniques were measured at 350M parameters, mostly, and often once. The studies in
[records/studies](../records/studies) measure them again at a size that a laptop trains, in pairs of equal seeds, with
intervals that hold for all treatments of a study together. An effect is treatment minus base, in nats of validation
loss: below zero is better. Published claims are changes of the steps needed for a fixed loss.
"""
LIMITS = """## What cannot be concluded

- An effect at 0.2M to 2.3M parameters, on a generated language or on Shakespeare and in runs of 100 or 300 steps, is no
  effect at 350M on web text. Only the agreement of many techniques between sizes could say how far the small size
  predicts the large one.
- "No effect larger than x" and "undecided" are statements about these runs, not about the technique.
- Each treatment is one change to one base. What two of them do together was not measured unless a row says so.
"""


@dataclass(frozen=True)
class Row:
    """One treatment of one study."""

    study: str
    treatment: Treatment
    effect: Effect
    text: str


def rows_of(toml: Path) -> tuple[StudyPlan, list[Row], float] | None:
    """(plan, rows, minutes) of a study that has run; None if it has not. Raises StudyError, SeriesError."""
    folder = toml.with_suffix("")
    if not (folder / "study.json").exists():
        return None
    plan, claims = sealed_plan(folder), {t.name: t for t in read_plan(toml).treatments}
    pairs = read_pairs(folder, plan)
    found = []
    for name, effect in verdicts(plan, pairs).items():
        treatment = claims.get(name) or Treatment(name, {})
        found.append(Row(plan.name, treatment, effect, words(effect, plan)))
    found.sort(key=lambda row: (row.effect.estimate is None, row.effect.estimate or 0.0))
    return plan, found, pairs.minutes


def page(studies: Sequence[tuple[StudyPlan, list[Row], float]]) -> str:
    """The text of docs/evidence.md."""
    parts = [INTRODUCTION]
    for plan, rows, minutes in studies:
        flags = " ".join(f"`--{key}={value}`" for key, value in plan.flags.items())
        table = ["| treatment | pairs | effect | interval | verdict | published |", "|-|-|-|-|-|-|"]
        for row in rows:
            e = row.effect
            interval = "-" if e.family_low is None else f"{e.family_low:+.4f} to {e.family_high:+.4f}"
            estimate = "-" if e.estimate is None else f"{e.estimate:+.4f}"
            name = f"{AGAIN} (other seeds)" if row.treatment.name == AGAIN else row.treatment.name
            table.append(
                f"| {name} | {e.launched} | {estimate} | {interval} | {row.text} | {row.treatment.published} |"
            )
        parts.append(f"## {plan.name}\n\n`--preset={plan.preset}` {flags}; {minutes:.0f} minutes of runs.\n")
        parts.append("\n".join(table) + "\n")
        parts.append(pairing([row.effect for row in rows if row.treatment.name != AGAIN]))
    both = [row for _, rows, _ in studies for row in rows if row.treatment.published_percent is not None]
    parts += [agreement([row for row in both if row.effect.estimate is not None]), LIMITS]
    parts.append("Written by `python -m records.evidence`.\n")
    return "\n".join(parts)


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


def agreement(rows: Sequence[Row]) -> str:
    """Signs and ranks of what was measured both ways."""
    head = "## Small against published\n"
    if not rows:
        return f"{head}\nNo treatment so far has a published claim in numbers.\n"
    decided = [row for row in rows if row.effect.verdict in (HELPS, HURTS)]
    same = sum((row.effect.estimate < 0) == (row.treatment.published_percent < 0) for row in decided)
    text = (
        f"{head}\n{len(rows)} treatments were measured here and have a published claim in numbers; {len(decided)} of "
        f"them have a decided sign here, and {same} of those agree with the claim in sign."
    )
    if len(rows) < FEWEST:
        return f"{text} With fewer than {FEWEST} of them a rank correlation says nothing, so none is given.\n"
    here = [row.effect.estimate for row in rows]
    claimed = [row.treatment.published_percent for row in rows]
    rho = float(scipy.stats.spearmanr(here, claimed).statistic)
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        chosen = random.integers(len(rows), size=len(rows))
        x, y = np.asarray(here)[chosen], np.asarray(claimed)[chosen]
        if np.ptp(x) > 0 and np.ptp(y) > 0:
            drawn.append(scipy.stats.spearmanr(x, y).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return (
        f"{text} Rank correlation {rho:+.2f} (95 % interval by resampling treatments {low:+.2f} to {high:+.2f}, which "
        f"covers too little at this number).\n"
    )


@dataclass(frozen=True)
class Options:
    """Where studies lie, and the page."""

    studies: Path = setting(REPO / "records" / "studies", "folder", "with studies' files")
    out: Path = setting(REPO / "docs" / "evidence.md", "file", "the page")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit code: 0 written, 2 a study cannot be read."""
    _, options = command(__doc__, argv, Options)
    try:
        found = [rows_of(path) for path in sorted(options.studies.glob("*.toml"))]
    except (StudyError, SeriesError, StatsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_text(options.out, page([one for one in found if one is not None]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
