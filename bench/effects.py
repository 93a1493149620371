"""How many steps `frontier` may need: what its fields were published to save or cost, and what the proxies saw of them.

An argument, not a projection. `EFFECTS` lists every field in which `frontier` differs from f3, whose published runs
reach the target in the preset's steps. Shares are of a run's steps: positive where steps are saved, negative where a
field costs loss that steps must buy back. Losses become steps at the exchange rate that four published comparisons
give: 1 % of the steps is 1.5 to 2.3 mn (0.001 nats). The least of a range goes by the rate and the effect that are
worse for us, the most by those that are better. Effects of studies (records/studies) are read from their study.json
whenever the projection is made; a study that is not there yet is not told of.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.common import REPO
from records.agreement import MN_RANGE

STUDIES = REPO / "records" / "studies"


class Effect(NamedTuple):
    """A field's effect: the least and the most share of the steps that it saves, how that was published, and the names
    that studies give to its treatment."""

    fields: str
    least: float
    most: float
    published: str
    treatments: tuple[str, ...] = ()


def steps_of(mn: float, of: str) -> float:
    """Share of the steps that a loss lower by `mn` saves; of: "least" or "most" (which for a cost, below zero, are the
    larger and the smaller one)."""
    low, high = (mn / rate / 100 for rate in reversed(MN_RANGE))
    return min(low, high) if of == "least" else max(low, high)


EFFECTS = (
    Effect("xsa", 30 / 1480, 30 / 1480, "-30 of 1480 steps, -4.5 mn (n 10/10, #264)", ("xsa",)),
    Effect("paired_heads", 65 / 1840, 65 / 1840, "-65 of about 1840 steps (n 5, #191)", ("paired_heads",)),
    Effect("untied_values", 25 / 1600, 25 / 1600, "-25 of 1600 steps (n 10/10, #209)", ("untied_values",)),
    Effect(
        "muon_head_pairs",
        steps_of(1.2, "least"),
        10 / 1490,
        "-1.2 mn (n 8/8, #253), -10 of 1490 steps",
        ("muon_head_pairs",),
    ),
    Effect(
        "two_rate_from",
        steps_of(1.9, "least"),
        40 / 3250,
        "-40 of 3250 steps, -1.9 mn (n 10/8, #340), optimizer track",
        ("two_rate",),
    ),
    Effect(
        "dynamic_gates, head_mixing",
        50 / 1385,
        100 / 1385,
        "-50 to -100 of 1385 steps, -7.6 mn (n 11/9, #315), with other changes; mixing alone -4.0 mn (n 10/10)",
        ("dynamic_gates", "head_mixing"),
    ),
    Effect(
        "ngram_rows",
        0.05,
        145 / 1285,
        "guessed 5 to 10 %; -145 of 1285 steps (n 12/12, #366) for 80 M rows in host memory",
        ("ngram_table",),
    ),
    Effect(
        "tail_ema, lr_floor",
        12 / 1300,
        30 / 2750,
        "-12 of 1300 steps (n 16/16, #347); -30 of 2750 (n 20/10, #325), optimizer track",
        ("tail_average",),
    ),
    Effect(
        "products",
        steps_of(-1.0, "least") - 13 / 1390 + steps_of(-0.4, "least"),
        steps_of(-0.5, "most") - 13 / 1390 + steps_of(-0.4, "most"),
        "MLP +0.5 to +1 mn (#306, #344); QKVO +13 of about 1390 steps and +0.4 mn (n 10/13, #322)",
        ("eight_bits",),
    ),
    Effect(
        "sampled_softmax",
        steps_of(-2.4, "least"),
        steps_of(-2.4, "most"),
        "+2.4 mn, with other changes (n 2/7, #360)",
        ("sampled_growing", "sampled_softmax"),
    ),
    Effect(
        "yarn_until",
        steps_of(-1.35, "least"),
        0.0,
        "+1.35 mn (n 2/5, #248) with the 8-bit head, which f3 has, and a lower rate of Muon",
    ),
)


def proxies(folder: Path = STUDIES) -> dict[str, list[dict[str, Any]]]:
    """{fields of an effect: what each finished study says of its treatments}: study, preset, treatment, pairs, estimate
    and the interval that holds for all treatments of the study together (nats), steps saved as a share of the study's,
    verdict."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/study.json")):
        told = json.loads(path.read_text(encoding="utf-8"))
        steps = int(told["plan"]["flags"].get("num_iterations", 0))
        for row in (told.get("results") or {}).get("treatments", ()):
            for effect in EFFECTS:
                if row["treatment"] in effect.treatments and row.get("estimate") is not None:
                    seen = {name: row[name] for name in ("treatment", "pairs", "estimate", "family_low", "family_high")}
                    saved = row.get("steps_saved")
                    share = saved / steps if saved is not None and steps else None
                    about = dict(study=path.parent.name, preset=told["plan"]["preset"], share=share)
                    found.setdefault(effect.fields, []).append(seen | about | {"verdict": row["verdict"]})
    return found


def kept_steps(scale: float, of: str, costs: str = "least", effects: Sequence[Effect] = EFFECTS) -> float:
    """Share of the steps that remain. Gains, the least or the most of them, count `scale` times, as they were found on
    weaker baselines and overlap; costs, at their "least" (the worse) or "most" end, count whole."""
    remains = 1.0
    for effect in effects:
        gain, cost = getattr(effect, of), getattr(effect, costs)
        remains *= 1 - (scale * gain if effect.most > 0 else cost)
    return remains


CASES = (  # words, scale of the gains, which end of the gains, which end of the costs
    ("costs alone, at their worse end", 0.0, "least", "least"),
    ("half of the least gains, worse costs", 0.5, "least", "least"),
    ("half of the most gains, worse costs", 0.5, "most", "least"),
    ("all of the least gains, worse costs", 1.0, "least", "least"),
    ("all of the most gains, better costs", 1.0, "most", "most"),
)


def argued(steps: int, seconds: float, effects: Sequence[Effect] = EFFECTS) -> list[dict[str, Any]]:
    """Steps and seconds of `frontier`, which takes `seconds` for `steps`, if its fields' published effects hold."""
    rows = []
    for words, scale, of, costs in CASES:
        needed = round(steps * kept_steps(scale, of, costs, effects))
        rows.append({"of the published effects": words, "steps": needed, "s": round(seconds * needed / steps)})
    return rows


def scale_needed(share: float, of: str, effects: Sequence[Effect] = EFFECTS) -> float | None:
    """How much of the gains must hold, with costs at their worse end, for `share` of the steps to be enough; None: not
    even twice the gains are."""
    low, high = 0.0, 2.0
    if kept_steps(high, of, effects=effects) > share:
        return None
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if kept_steps(middle, of, effects=effects) > share else (low, middle)
    return high


def nats(row: dict[str, Any]) -> str:
    """One study's effect in words: xsa on nano +0.0023 (-0.0091 to +0.0136), n 8."""
    interval = f"{row['family_low']:+.4f} to {row['family_high']:+.4f}"
    return f"{row['treatment']} on {row['preset']} {row['estimate']:+.4f} ({interval}), n {row['pairs']}"
