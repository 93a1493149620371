"""A training as it goes on: losses so far, time gone and left, and the picture of both, from its log.

A log that is being written is only looked at here; verdicts on finished runs come from stats.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(
    r"^step:(\d+)/(\d+) (?:(train|val)_loss:(\S+) )?train_time:(\d+(?:\.\d+)?)ms step_avg:", re.MULTILINE
)
_RULER = "=" * 60
MOST_POINTS = 400  # a curve needs no more; older points are thinned


@dataclass(frozen=True)
class Progress:
    """Steps done and planned, (step, loss) pairs, and seconds of training so far and, by their pace, to go."""

    step: int = 0
    steps: int = 0
    train: tuple[tuple[int, float], ...] = ()
    val: tuple[tuple[int, float], ...] = ()
    seconds: float = 0.0
    seconds_left: float | None = None


def read_progress(log: Path) -> Progress:
    """What the log of a run says so far; an empty Progress if there is none yet."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return Progress()
    body = text[text.rfind(_RULER) + len(_RULER) :] if _RULER in text else ""
    train, val, clock = [], [], []
    steps = 0
    for step_text, total, kind, loss, ms in _LINE.findall(body):
        step, steps = int(step_text), int(total)
        clock.append((step, float(ms) / 1000))
        try:
            value = float(loss) if kind else math.nan
        except ValueError:
            continue
        if math.isfinite(value):
            (train if kind == "train" else val).append((step, value))
    if not clock:
        return Progress()
    step, seconds = clock[-1]
    first_step, first_seconds = clock[-min(len(clock), 50)]  # the recent pace, not the start's
    pace = (seconds - first_seconds) / (step - first_step) if step > first_step else None
    left = None if pace is None else pace * (steps - step)
    return Progress(step, steps, tuple(thinned(train)), tuple(val), seconds, left)


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MOST_POINTS points: the means of equal stretches of steps."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]


def clock_text(seconds: float | None) -> str:
    """4 s, 3:07 min, 1:02:00 h."""
    if seconds is None:
        return "unknown"
    total = round(seconds)
    if total < 60:
        return f"{total} s"
    if total < 3600:
        return f"{total // 60}:{total % 60:02d} min"
    return f"{total // 3600}:{total % 3600 // 60:02d}:{total % 60:02d} h"


def curves(progress: Progress, floor: float | None):
    """A matplotlib figure: training and validation loss over steps, and the entropy floor where known."""
    from matplotlib.figure import Figure

    from lab.plots import color

    figure = Figure(figsize=(7, 3.6), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.92")
    if progress.train:
        axes.plot(*zip(*progress.train), color=color(4), linewidth=1.2, label="training")
    if progress.val:
        axes.plot(*zip(*progress.val), color=color(0), marker="o", markersize=3.5, label="validation")
    if floor is not None:
        axes.axhline(floor, color=color(1), linestyle="--", linewidth=1, label=f"entropy of the corpus {floor:.3f}")
    axes.set(xlabel="step", ylabel="loss (nats a token)", xlim=(0, max(progress.steps, 1)))
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    return figure
