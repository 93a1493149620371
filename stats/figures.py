"""The pictures of a report, as SVG text that a page can hold; and one of them as a file for who asks for a PNG."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from stats.errors import UsageError
from stats.plans import Plan
from stats.sequential import Decision, boundaries
from stats.svg import BLUE, GRAY, GREEN, RED, Axis, Picture
from stats.ttest import TTest
from stats.values import Run

P_BIN, P_BINS = 0.01, 5  # of the p-curve


def loss_curves(runs: Sequence[Run], threshold: float, label: str) -> str:
    """Validation loss over steps, from a tenth of the run on: the start would flatten the end."""
    last = max((run.validations[-1].step for run in runs if run.validations), default=0)
    curves = []
    for run in runs:
        finite = [(point.step, point.loss) for point in run.validations if math.isfinite(point.loss)]
        curves.append([point for point in finite if point[0] >= last / 10] or finite[-1:])
    steps = [step for curve in curves for step, _ in curve] or [0]
    losses = [loss for curve in curves for _, loss in curve] + [threshold]
    pad = 0.04 * (max(losses) - min(losses))
    picture = Picture(
        f"{len(runs)} loss curves",
        Axis(min(steps), max(steps), "step", whole=True),
        Axis(min(losses) - pad, max(losses) + pad, "validation loss (nats)"),
    )
    opacity = max(0.15, min(0.9, 3 / max(1, len(runs))))
    for curve in curves:
        picture.line(curve, BLUE, 1.2, opacity, dots=2.0 if len(curve) < 3 else 0)
    picture.level(threshold, RED, f"threshold {threshold:g}")
    return picture.svg(f"loss curves of {label}")


def distribution(test: TTest, losses: Sequence[float], label: str) -> str:
    """Every final loss, their mean with its upper bound, and the threshold."""
    mean, bound = test.sample_mean, test.upper_conf_bound_mean
    shown = [*losses, mean, bound, test.threshold]
    pad = 0.05 * (max(shown) - min(shown))
    picture = Picture(
        f"{len(losses)} final losses",
        Axis(min(shown) - pad, max(shown) + pad, "final validation loss (nats)"),
        Axis(-0.15, 1.15, hidden=True),
        height=215,
    )
    picture.key(BLUE, f"mean {mean:.6g}, upper {1 - test.alpha:.0%} bound {bound:.6g}")
    picture.key(RED, f"threshold {test.threshold:g}")
    picture.box((mean, -0.15), (bound, 1.15), BLUE, 0.15)
    # A fixed pattern of heights keeps equal losses apart; it means nothing.
    heights = _heights(len(losses))
    picture.dots(list(zip(losses, heights)), BLUE, opacity=0.65)
    picture.level(mean, BLUE, upright=True, dashed=False)
    picture.level(test.threshold, RED, upright=True)
    return picture.svg(f"final losses of {label}")


def _heights(count: int) -> list[float]:
    return [(index * 0.618034) % 1 for index in range(count)]


def draw_test(test: TTest, losses: Sequence[float], path: str) -> None:
    """`distribution` as a file: SVG without any library, whatever else matplotlib knows. Raises UsageError."""
    try:
        if path.lower().endswith(".svg"):
            Path(path).write_text(distribution(test, losses, test.series or "these runs") + "\n", encoding="utf-8")
        else:
            _draw_with_matplotlib(test, losses, path)
    except ImportError as error:
        raise UsageError(f"a picture needs {error.name}: pip install matplotlib, or name an .svg") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {path}: {error}") from None


def _draw_with_matplotlib(test: TTest, losses: Sequence[float], path: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.9), layout="constrained")
    axes = figure.add_subplot()
    mean, bound = test.sample_mean, test.upper_conf_bound_mean
    axes.plot(losses, _heights(len(losses)), "o", color=BLUE, alpha=0.65, markersize=6, markeredgewidth=0)
    axes.axvline(mean, color=BLUE, linewidth=1.6, label=f"mean {mean:.6g}")
    axes.axvspan(mean, bound, color=BLUE, alpha=0.15, label=f"upper {1 - test.alpha:.0%} bound {bound:.6g}")
    axes.axvline(test.threshold, color=RED, linewidth=1, linestyle="--", label=f"threshold {test.threshold:g}")
    axes.set(xlabel="final validation loss (nats)", ylim=(-0.15, 1.15), yticks=[], title=f"{len(losses)} final losses")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.ticklabel_format(axis="x", useOffset=False)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=150)


def p_path(p_values: Sequence[tuple[int, float]], alpha: float, label: str) -> str:
    """p after each run: what somebody who peeks would have seen."""
    points = [(n, max(p, 1e-300)) for n, p in p_values]
    lowest, highest = min(alpha, *(p for _, p in points)), max(alpha, *(p for _, p in points))
    picture = Picture(
        "p after each run",
        Axis(points[0][0], points[-1][0], "runs, in the order of launch", whole=True),
        Axis(lowest * 0.8, min(1.0, highest * 1.2), "one-sided p", log=True),
        height=215,
    )
    picture.line(points, BLUE, dots=2.2)
    picture.level(alpha, RED, f"alpha {alpha:g}")
    return picture.svg(f"p after each run of {label}")


def sequential_path(decision: Decision, plan: Plan, label: str) -> str:
    """t after each run between the plan's bounds."""
    last = max(decision.n + 3, min(plan.cap, 2 * decision.n))
    looks = [look for look in boundaries(plan) if look.n <= last]
    shown = [look.t for look in decision.path if math.isfinite(look.t)]
    top, bottom = 1.25 * max([6.0, *shown]), 1.1 * min([-2.0, *shown])
    picture = Picture(
        f"sequential test: {decision.verdict}",
        Axis(2, last, "runs, in the order of launch", whole=True),
        Axis(bottom, top, "t (positive: below the threshold)"),
        height=240,
    )
    for color, told in ((GREEN, "accept above"), (RED, "futile below"), (BLUE, "t")):
        picture.key(color, told)
    dots = 2.0 if len(looks) < 8 else 0
    picture.line([(look.n, min(look.t_accept, 2 * top)) for look in looks], GREEN, dots=dots)
    picture.line([(look.n, max(look.t_futile, 2 * bottom)) for look in looks], RED, dots=dots)
    picture.level(0, GRAY, dashed=False)
    picture.line([(look.n, look.t) for look in decision.path], BLUE, dots=2.6)
    return picture.svg(f"sequential test of {label}")


def p_curve(p_values: Sequence[float], label: str) -> str:
    """The p-values of all series that pass 0.05, in bins of 0.01: honest effects pile up on the left; stopping at the
    first pass piles them up just below the level that is wanted."""
    significant = [p for p in p_values if p < P_BIN * P_BINS]
    counts = Counter(min(int(p / P_BIN), P_BINS - 1) for p in significant)
    picture = Picture(
        f"p-curve: {len(significant)} of {len(p_values)} below 0.05",
        Axis(0, P_BIN * P_BINS, "p of a series"),
        Axis(0, max([1, *counts.values()]), "series", whole=True),
        height=200,
    )
    for index, count in sorted(counts.items()):
        picture.box((P_BIN * (index + 0.05), 0), (P_BIN * (index + 0.95), count), BLUE)
    return picture.svg(f"p-curve of {label}")
