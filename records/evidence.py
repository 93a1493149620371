"""What holds at another size: docs/evidence.md, effects measured here beside the effects published elsewhere.

    python -m records.evidence            # from every records/studies/NAME.toml and its folder

Nothing in the page is typed by hand: the effects come from the studies' logs, the claims from their TOML files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.paths import write_text
from records.agreement import Row, against_published, at_several_sizes, draw, pairing, worth
from records.folder import REPO, SeriesError
from records.study_plan import AGAIN, StudyError, StudyPlan, Treatment, read_plan
from records.study_report import read_pairs, sealed_plan, verdicts, words
from stats.errors import StatsError
from trainer.options import command, setting

INTRODUCTION = """# Evidence: what holds at another size

The track's techniques were measured at 350M parameters, mostly, and often once. The studies in
[records/studies](../records/studies) measure them again at a size that a laptop trains, in pairs of equal seeds, with
intervals that hold for all treatments of a study together. An effect is treatment minus base, in nats of validation
loss: below zero is better. Published claims are changes of the steps needed for a fixed loss.
"""
PICTURE = """
![Effects at small size beside the published ones]({name})

Left of the line is better, in every panel. Green helps, red hurts, grey has no effect larger than the study's margin,
and ochre is undecided; lines are intervals that hold for all treatments of a study together.
"""
CHEAPER = """## What makes a small effect visible in fewer runs

`python -m bench.variance`: nano on the embedded corpus, {seeds} seeds, {steps} steps. Nats. All runs see the same data;
within pairs the initial weights are the same, too, where shapes agree. A standard deviation of {seeds} numbers is
itself known to about a quarter.

"""
LIMITS = """## What cannot be concluded

- An effect at {sizes} parameters in runs of {steps} steps, on the text of a study, is no effect at 350M on web text.
  Only the agreement of many techniques between sizes could say how far the small size predicts the large one.
- "No effect larger than x" and "undecided" are statements about these runs, not about the technique.
- Each treatment is one change to one base. What two of them do together was not measured unless a row says so.
- Many published effects are of a record that changed other things, too, and were measured against an earlier baseline.
"""


@dataclass(frozen=True)
class Ran:
    """A study that has run. sizes: parameters of its models."""

    plan: StudyPlan
    rows: list[Row]
    minutes: float
    sizes: tuple[int, ...]


def rows_of(toml: Path) -> Ran | None:
    """A study that has run; None if it has not. Raises StudyError, SeriesError."""
    folder = toml.with_suffix("")
    if not (folder / "study.json").exists():
        return None
    plan, claims = sealed_plan(folder), {t.name: t for t in read_plan(toml).treatments}
    pairs = read_pairs(folder, plan)
    found = []
    for name, effect in verdicts(plan, pairs).items():
        treatment = claims.get(name) or Treatment(name, {})
        found.append(Row(plan, treatment, effect, words(effect, plan)))
    found.sort(key=lambda row: (row.effect.estimate is None, row.effect.estimate or 0.0))
    sizes = json.loads((folder / "study.json").read_text(encoding="utf-8")).get("parameters", {})
    return Ran(plan, found, pairs.minutes, tuple(size for size in sizes.values() if size))


def page(studies: Sequence[Ran], variance: Path) -> str:
    """The text of docs/evidence.md. variance: what bench/variance.py measured, if it is there."""
    rows = [row for one in studies for row in one.rows]
    parts = [INTRODUCTION, against_published(rows), at_several_sizes(rows)]
    parts.append(worth([(one.plan, one.rows) for one in studies]))
    parts += [cheaper(variance), limits(studies)]
    for one in studies:
        plan, minutes = one.plan, one.minutes
        flags = " ".join(f"`--{key}={value}`" for key, value in plan.flags.items())
        table = ["| treatment | pairs | effect | interval | verdict | published |", "|-|-|-|-|-|-|"]
        for row in one.rows:
            e = row.effect
            interval = "-" if e.family_low is None else f"{e.family_low:+.4f} to {e.family_high:+.4f}"
            estimate = "-" if e.estimate is None else f"{e.estimate:+.4f}"
            name = f"{AGAIN} (other seeds)" if row.treatment.name == AGAIN else row.treatment.name
            table.append(
                f"| {name} | {e.launched} | {estimate} | {interval} | {row.text} | {row.treatment.published} |"
            )
        parts.append(f"## {plan.name}\n\n`--preset={plan.preset}` {flags}; {minutes:.0f} minutes of runs.\n")
        parts.append("\n".join(table) + "\n")
        parts.append(pairing([row.effect for row in one.rows if row.treatment.name != AGAIN]))
    parts.append("Written by `python -m records.evidence`.\n")
    return "\n".join(parts)


def cheaper(path: Path) -> str:
    """The table of bench/variance.py; "" where it has not run. Raises StudyError."""
    if not path.exists():
        return ""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))["result"]
        heads = list(told["rows"][0])
        lines = [f"| {' | '.join(heads)} |", "|-" * len(heads) + "|"]
        lines += [f"| {' | '.join(str(row[head]) for head in heads)} |" for row in told["rows"]]
        return CHEAPER.format(seeds=told["seeds"], steps=told["steps"]) + "\n".join(lines) + "\n"
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise StudyError(f"{path}: not what bench/variance.py wrote ({error}); run it again") from None


def limits(studies: Sequence[Ran]) -> str:
    """What the studies' sizes and lengths do not allow."""
    sizes = [size for one in studies for size in one.sizes]
    steps = sorted({int(one.plan.flags["num_iterations"]) for one in studies if "num_iterations" in one.plan.flags})
    told = f"{min(sizes) / 1e6:.1f}M to {max(sizes) / 1e6:.1f}M" if sizes else "few"
    return LIMITS.format(sizes=told, steps=" or ".join(map(str, steps)) or "few")


@dataclass(frozen=True)
class Options:
    """Where studies lie, and the page."""

    studies: Path = setting(REPO / "records" / "studies", "folder", "with studies' files")
    out: Path = setting(REPO / "docs" / "evidence.md", "file", "the page")
    variance: Path = setting(REPO / "bench" / "results" / "variance-cpu.json", "file", "of bench/variance.py")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; returns the exit code: 0 written, 2 a study cannot be read."""
    _, options = command(__doc__, argv, Options)
    try:
        found = [rows_of(path) for path in sorted(options.studies.glob("*.toml"))]
        ran = [one for one in found if one is not None]
        text = page(ran, options.variance)
    except (StudyError, SeriesError, StatsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    picture = options.out.with_suffix(".png")
    if draw([row for one in ran for row in one.rows], picture):
        text = text.replace("\n## ", PICTURE.format(name=picture.name) + "\n## ", 1)
    write_text(options.out, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
