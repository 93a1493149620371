"""From a study's logs to its study.json, README.md and effects.png. No number in them is typed by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.paths import write_text
from records.folder import SeriesError
from records.ledger import Ledger
from records.logs import read_run_json
from records.study_plan import AGAIN, BASE, StudyError, StudyPlan, Treatment
from stats.curve import crossing
from stats.errors import StatsError
from stats.paired import CONTINUE, DIVERGED, HELPS, HURTS, NO_EFFECT, UNDECIDED, Effect, judge, ratio
from stats.series import read_runs

COLOURS = {HELPS: "#1a7f37", HURTS: "#b3261e", NO_EFFECT: "#57606a", UNDECIDED: "#9a6700", CONTINUE: "#9a6700"}


@dataclass(frozen=True)
class Pairs:
    """The runs that have ended, by arm and pair (from 0).

    losses: the endpoint in nats, NaN for a run that diverged or crashed. step_ms: time a step. curves: {step: loss}."""

    losses: dict[str, dict[int, float]]
    step_ms: dict[str, dict[int, float]]
    curves: dict[str, dict[int, dict[int, float]]]
    base_failed: tuple[int, ...]
    minutes: float


def sealed_plan(folder: Path) -> StudyPlan:
    """The plan in a study's folder. Raises StudyError."""
    path = folder / "study.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        told = dict(record["plan"])
        extra = {name: dict(published=text) for name, text in record.get("published", {}).items()}
        for name, text in record.get("descriptions", {}).items():
            extra.setdefault(name, {})["about"] = text
        treatments = [Treatment(**{**t, **extra.get(t["name"], {})}) for t in told.pop("treatments")]
        told["looks"] = tuple(told["looks"])
        return StudyPlan(**told, treatments=tuple(treatments), about=record.get("about", ""))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StudyError(f"{path}: not a study's record ({error})") from None


def read_pairs(folder: Path, plan: StudyPlan) -> Pairs:
    """Every ended run, its log checked against its JSON. Raises SeriesError where they disagree."""
    states = Ledger(folder).runs()
    losses: dict = {arm: {} for arm in plan.arms}
    step_ms: dict = {arm: {} for arm in plan.arms}
    curves: dict = {arm: {} for arm in plan.arms}
    for arm in plan.arms:
        for pair in range(plan.looks[-1]):
            state = states.get(plan.run(arm, pair))
            if state is None or state.status not in ("finished", "crashed"):
                continue
            if state.status == "crashed":
                if not (state.attempts[-1].end or {}).get("lost"):
                    losses[arm][pair] = math.nan
                continue
            curve, ms = _read_run(folder / "runs" / f"{state.run}.txt")
            losses[arm][pair] = float(np.mean([curve[step] for step in sorted(curve)[-plan.endpoint :]]))
            curves[arm][pair] = curve
            if ms is not None:
                step_ms[arm][pair] = ms
    failed = tuple(pair for pair, loss in losses[BASE].items() if not math.isfinite(loss))
    ends = [e for e in Ledger(folder).events() if e["event"] == "end"]
    return Pairs(losses, step_ms, curves, failed, sum(e.get("seconds") or 0.0 for e in ends) / 60)


def _read_run(path: Path) -> tuple[dict[int, float], float | None]:
    """({step: validation loss}, milliseconds a step) of a finished run."""
    try:
        (run,) = read_runs(path)
    except (StatsError, ValueError) as error:
        raise SeriesError(f"{path} finished, but its log does not show it: {error}") from None
    result = read_run_json(path.with_suffix(".json"))
    last = run.validations[-1]
    if result and not math.isclose(last.loss, result.get("final_loss") or math.nan, abs_tol=1e-5):
        raise SeriesError(f"{path}: its last loss is {last.loss}, but its JSON says {result.get('final_loss')}")
    ms = last.time_s * 1000 / last.step if last.time_s and last.step else None
    return {point.step: point.loss for point in run.validations}, ms


def verdicts(plan: StudyPlan, pairs: Pairs, *, final: bool = False) -> dict[str, Effect]:
    """{treatment: what its pairs say}, base-again included."""
    found = {}
    for arm in list(plan.arms)[1:]:
        base, treated = [], []
        for pair in range(plan.looks[-1]):
            if pair not in pairs.losses[BASE] or pair not in pairs.losses[arm]:
                break  # in the order of the seeds: quick ones are never preferred
            base.append(pairs.losses[BASE][pair])
            treated.append(pairs.losses[arm][pair])
        found[arm] = judge(base, treated, plan.design, final=final)
    return found


def base_slope(pairs: Pairs) -> float | None:
    """Nats a step at the end of the base's mean curve: a line through the validations of its last quarter."""
    curve = _mean_curve(pairs, BASE)
    if len(curve) < 2:
        return None
    steps = sorted(curve)
    late = [step for step in steps if step >= 0.75 * steps[-1]]
    late = late if len(late) >= 2 else steps[-2:]
    return float(np.polyfit(late, [curve[step] for step in late], 1)[0])


def _mean_curve(pairs: Pairs, arm: str) -> dict[int, float]:
    curves = list(pairs.curves[arm].values())
    if not curves:
        return {}
    common = set.intersection(*(set(curve) for curve in curves))
    return {step: float(np.mean([curve[step] for curve in curves])) for step in sorted(common)}


def row(arm: str, plan: StudyPlan, pairs: Pairs, effect: Effect, slope: float | None) -> dict:
    """One treatment's results as JSON."""
    both = [p for p in pairs.step_ms[arm] if p in pairs.step_ms[BASE]]
    timed = None
    if len(both) >= 2:
        timed = ratio([pairs.step_ms[BASE][p] for p in both], [pairs.step_ms[arm][p] for p in both])
    target, treated = _mean_curve(pairs, BASE), _mean_curve(pairs, arm)
    to_target = None
    if target and treated and timed:
        points = [(step, loss, None) for step, loss in treated.items()]
        steps = crossing(arm, points, target[max(target)]).steps
        to_target = None if steps is None else steps / max(target) * timed[0]
    saved = None
    if slope is not None and slope < 0 and effect.estimate is not None:
        saved = effect.estimate / slope
    return dict(
        treatment=arm,
        **dataclasses.asdict(effect),
        steps_saved=saved,
        step_time_ratio=timed,
        time_to_base_loss=to_target,
    )


def write_report(folder: Path, plan: StudyPlan, pairs: Pairs, *, final: bool = False) -> list[dict]:
    """Write study.json's results, README.md and effects.png anew; returns the rows, best effect first."""
    found, slope = verdicts(plan, pairs, final=final), base_slope(pairs)
    rows = [row(arm, plan, pairs, effect, slope) for arm, effect in found.items()]
    rows.sort(key=lambda r: (r["estimate"] is None, r["estimate"] if r["estimate"] is not None else 0.0))
    path = folder / "study.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    base = [loss for _, loss in sorted(pairs.losses[BASE].items())]
    record["results"] = dict(base_losses=base, base_slope_per_step=slope, minutes=pairs.minutes, treatments=rows)
    write_text(path, json.dumps(record, indent=1) + "\n")
    if base:
        write_text(folder / "README.md", readme(plan, record, rows))
        draw(folder / "effects.png", plan, rows)
    return rows


def told(plan: StudyPlan, found: Mapping[str, Effect]) -> list[str]:
    """A line for each treatment, for the terminal."""
    lines = []
    for arm, effect in found.items():
        if effect.launched:
            lines.append(f"{arm:28s} {effect.launched:2d} pairs  {_interval(effect):34s} {words(effect, plan)}")
    return lines


def _interval(effect: Effect) -> str:
    if effect.estimate is None:
        return "-"
    if effect.family_low is None:
        return f"{effect.estimate:+.4f}"
    return f"{effect.estimate:+.4f} ({effect.family_low:+.4f} to {effect.family_high:+.4f})"


def words(effect: Effect, plan: StudyPlan) -> str:
    """The verdict in words."""
    if effect.verdict == DIVERGED:
        return f"diverged {effect.diverged} of {effect.launched}"
    text = effect.verdict
    if text == NO_EFFECT:
        text = "no effect" if effect.sd == 0 else f"no effect larger than {plan.margin:g}"
    if text == UNDECIDED:
        more = f"{effect.more_pairs} more pairs" if effect.more_pairs else "more than 1000 more pairs"
        text = f"undecided: {more} at this estimate and scatter"
    if text == CONTINUE:
        text = "not yet decided"
    return text + (f"; diverged {effect.diverged} of {effect.launched}" if effect.diverged else "")


HEAD = (
    "Base: `{command}`; {n} runs, mean loss {mean:.4f}{spread}. Runs of one seed are pairs. Looks after {looks} pairs, "
    "fixed before the first run. The intervals hold for all {treatments} treatments together with probability "
    "{level:.0%}, whenever each stopped (Bonferroni; stats/paired.py): the chance of any wrong helps or hurts is "
    "{alpha:.0%} at most. A loss is the mean of a run's last {endpoint} validation(s). All runs took {minutes:.0f} "
    "minutes."
)
FOOT = (
    "Effect: treatment minus base, below zero is better. In sd: in standard deviations of the base between seeds. "
    "Steps saved: the effect over the slope of the base's mean curve in its last quarter. Time a step: ratio within "
    "pairs, 95 % interval; on a machine with other work it says little. Time to the base's loss: of the mean curve, "
    "times that ratio; - if it does not get there."
)
COLUMNS = (
    "treatment",
    "pairs",
    "effect, nats",
    "interval",
    "in sd",
    "steps saved",
    "time a step",
    "time to the base's loss",
    "verdict",
)


def readme(plan: StudyPlan, record: dict, rows: list[dict]) -> str:
    """The study's page."""
    results, published = record["results"], record.get("published", {})
    base = np.asarray(results["base_losses"])
    flags = "".join(f" --{key}={value}" for key, value in plan.flags.items())
    head = HEAD.format(
        command=f"--preset={plan.preset}{flags}",
        n=len(base),
        mean=base.mean(),
        spread=f", standard deviation between seeds {base.std(ddof=1):.4f}" if len(base) > 1 else "",
        looks=", ".join(map(str, plan.looks)),
        treatments=len(rows),
        level=1 - plan.alpha,
        alpha=plan.alpha,
        endpoint=plan.endpoint,
        minutes=results["minutes"],
    )
    columns = [*COLUMNS, *(["published elsewhere"] if published else [])]
    table = [f"| {' | '.join(columns)} |", "|" + "-|" * len(columns)]
    for r in rows:
        cells = _cells(r, plan) + ([published.get(r["treatment"], "")] if published else [])
        table.append(f"| {' | '.join(cells)} |")
    about = [f"- **{name}**: {text}" for name, text in record.get("descriptions", {}).items()]
    parts = [f"# {plan.name}", plan.about, head, "![effects](effects.png)", "\n".join(table), FOOT, "\n".join(about)]
    parts.append("Written by `python -m records.study report` from the logs in runs/.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(r: dict, plan: StudyPlan) -> list[str]:
    effect = Effect(**{field.name: r[field.name] for field in dataclasses.fields(Effect)})
    timed = r["step_time_ratio"]
    return [
        f"{AGAIN} (other seeds)" if r["treatment"] == AGAIN else r["treatment"],
        str(r["launched"]),
        _number(r["estimate"], "+.4f"),
        "-" if r["family_low"] is None else f"{r['family_low']:+.4f} to {r['family_high']:+.4f}",
        _number(r["in_base_sds"], "+.1f"),
        _number(r["steps_saved"], "+.0f"),
        "-" if timed is None else f"{timed[0]:.2f} ({timed[1]:.2f} to {timed[2]:.2f})",
        _number(r["time_to_base_loss"], ".2f"),
        words(effect, plan),
    ]


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)


def draw(path: Path, plan: StudyPlan, rows: list[dict]) -> None:
    """Effects with both intervals, best first; what diverged stands at the edge with its count."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [r for r in rows if r["estimate"] is not None and r["family_low"] is not None]
    if not shown:
        return
    figure, axis = pyplot.subplots(figsize=(8, 1.2 + 0.34 * len(rows)), layout="constrained")
    axis.axvspan(
        -plan.margin, plan.margin, color="#d0d7de", alpha=0.5, lw=0, label=f"within ±{plan.margin:g}: called none"
    )
    for place, r in enumerate(rows):
        colour = COLOURS.get(r["verdict"], "#000000")
        if r["family_low"] is None:
            axis.annotate(f"diverged {r['diverged']} of {r['launched']}", (0, place), color="#b3261e", va="center")
            continue
        axis.plot([r["family_low"], r["family_high"]], [place, place], color=colour, lw=1)
        axis.plot([r["low"], r["high"]], [place, place], color=colour, lw=3.5, solid_capstyle="butt")
        axis.plot([r["estimate"]], [place], "o", color=colour, ms=5)
        axis.annotate(
            r["verdict"], (1.01, place), xycoords=("axes fraction", "data"), color=colour, va="center", fontsize=8
        )
    reach = max(abs(r["estimate"]) for r in shown) * 1.25 + plan.margin
    far = max(min(max(abs(r["family_low"]), abs(r["family_high"])), 3 * reach) for r in shown)
    axis.set_xlim(-far * 1.05, far * 1.05)
    axis.set_yticks(range(len(rows)), [f"{r['treatment']} ({r['launched']})" for r in rows], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0, color="#24292f", lw=0.8)
    axis.set_xlabel("effect on the validation loss, nats (left: better); thick 95 %, thin: all treatments together")
    axis.set_title(plan.name, loc="left", fontsize=10)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.legend(fontsize=7, loc="lower right", frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
