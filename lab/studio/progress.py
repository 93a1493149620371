"""A training as it goes on: losses so far, time gone and left, and what a chart shows of them, from its log.

A log that is being written is only looked at here; verdicts on finished runs come from stats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
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


def curve_rows(progress: Progress, floor: float | None) -> list[tuple[int, float, str]]:
    """(step, loss, which line) of everything that the chart shows; the floor, where known, over the whole width."""
    rows = [(step, loss, "training") for step, loss in progress.train]
    rows += [(step, loss, "validation") for step, loss in progress.val]
    if floor is not None and rows:
        rows += [(step, floor, "floor") for step in (0, max(progress.steps, 1))]
    return rows


def loss_span(rows: Sequence[tuple[int, float, str]], steps: int) -> tuple[float, float]:
    """The losses between which a chart shows what matters: all of them, and once three tenths of the steps are done
    without the fall of the first tenth; and a little air."""
    late = [loss for step, loss, line in rows if step >= steps / 10 or line == "floor"]
    measured = [step for step, _, line in rows if line != "floor"]
    enough = max(measured, default=0) >= 0.3 * steps and sum(step >= steps / 10 for step in measured) >= 3
    losses = late if enough else [loss for _, loss, _ in rows]
    low, high = min(losses), max(losses)
    air = 0.05 * (high - low) or 0.05
    return low - air, high + air
