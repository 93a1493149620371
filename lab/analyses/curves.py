"""The loss of a run over its steps, from the JSON that the run left: of the lab or of train_gpt.py."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev
from typing import Any

from lab import LabError, plots
from lab.analyses.finding import Finding, write_finding
from lab.checkpoints import find_checkpoints

WINDOW = 0.2  # share of the steps, before and after a drop of the rate, whose training losses tell the noise


def run_json(place: str | Path) -> Path:
    """The JSON of the run that left the checkpoints at `place` (a file, a folder of them, a run's or series' folder).
    LabError if there is none."""
    folder = find_checkpoints(place)[0].parent
    path = folder.with_name(f"{folder.name.removesuffix('.checkpoints')}.json")
    if not path.is_file():
        raise LabError(f"there is no {path}, so nothing tells the losses of this run along its steps")
    return path


def told_by(path: Path) -> dict[str, Any]:
    """A run's JSON; LabError if it is not whole."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LabError(f"{path} is not whole JSON ({error})") from error


def training_losses(told: dict[str, Any]) -> list[tuple[int, float]]:
    """(step, loss) of the training losses that a run logged, evenly spaced as it logged them."""
    config = told["config"]
    every = config.get("log_every", 1)
    return [((i + 1) * every, loss) for i, loss in enumerate(told["train_loss"])]


def noise(told: dict[str, Any]) -> dict[str, float] | None:
    """Spread of the training loss just before and at the end after the rate went down (schedule=step), else None."""
    config = told["config"]
    if config.get("schedule") != "step":
        return None
    steps, drop = config["steps"], config["drop_at"] * config["steps"]
    points = training_losses(told)
    before = [loss for step, loss in points if drop - WINDOW * steps < step <= drop]
    after = [loss for step, loss in points if step > (1 - WINDOW) * steps]
    if min(len(before), len(after)) < 3:
        return None
    return {"before": stdev(before), "after": stdev(after)}


def curve(place: str | Path, out: Path) -> Finding:
    """Training and validation loss of a run, and the entropy floor where it is known."""
    told = told_by(run_json(place))
    train = training_losses(told)
    val = [(v["step"], v["loss"]) for v in told["validation"] if v["loss"] is not None]
    floor = told.get("floor")
    fig, ax = plots.figure(size=(9, 4))
    draw_curve(ax, train, val, floor)
    ax.set_title(f"{told['config'].get('model', told['config'].get('preset', ''))}, {told['run_name']}: loss by step")
    spread = noise(told)
    least = min(val, key=lambda p: p[1]) if val else None
    summary = f"Least validation loss {least[1]:.4f} at step {least[0]:,}" if least else "No finite validation loss"
    summary += f"; the grammar itself has {floor:.4f} there" if floor else ""
    if spread:
        summary += f"; spread of the training loss {spread['before']:.3f} before the drop, {spread['after']:.3f} after"
    data = {"train": train, "validation": val, "floor": floor, "noise": spread}
    return write_finding(out, "curve", summary + ".", data, fig)


def draw_curve(
    ax: Any, train: Sequence[tuple[int, float]], val: Sequence[tuple[int, float]], floor: float | None
) -> None:
    """Losses over steps; the axis holds what was learned, not the first steps' fall."""
    if train:
        ax.plot(*zip(*train), color=plots.color(4), linewidth=0.8, label="training, batch by batch")
    if val:
        ax.plot(*zip(*val), "o-", color=plots.color(0), markersize=3, label="validation")
    if floor:
        ax.axhline(floor, color=plots.color(1), linestyle="--", label=f"the grammar itself, {floor:.3f}")
    later = sorted(loss for _, loss in [*train, *val])
    if later:
        low = min([*later, floor] if floor else later)
        high = later[int(0.97 * (len(later) - 1))]
        ax.set_ylim(low - 0.05 * (high - low + 0.1), high + 0.1 * (high - low + 0.1))
    ax.set_xlabel("step")
    ax.set_ylabel("nats a token")
    ax.legend()
