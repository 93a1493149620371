"""The pictures of a report, as SVG text that a page can hold: no file, no script, no font from elsewhere."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from stats.errors import UsageError
from stats.plans import Plan
from stats.sequential import Decision, boundaries
from stats.ttest import TTest
from stats.values import Run

BLUE, RED, GRAY = "#2563a8", "#b3372f", "#6b7280"


def _axes(width: float = 6.4, height: float = 3.4) -> tuple[Any, Any]:
    """(figure, axes) in the report's style; drawn without pyplot, so that nothing global changes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    return figure, axes


def _svg(figure: Any, label: str) -> str:
    """The figure as one <svg> element with a text for those who cannot see it."""
    import html

    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": label, "font.family": "sans-serif"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Identifiers are unique within a figure only; a page holds several.
    prefix = re.sub(r"\W+", "-", label)
    text = re.sub(r'(id="|"#|url\(#)', rf"\g<1>{prefix}-", text)
    return text.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)


def _line_name(axes: Any, text: str, height: float) -> None:
    """Names a horizontal line, on its left end."""
    place = ("axes fraction", "data")
    axes.annotate(text, (0.01, height), xycoords=place, ha="left", va="bottom", color=RED, fontsize=8)


def loss_curves(runs: Sequence[Run], threshold: float, label: str) -> str:
    """Validation loss over steps, from a tenth of the run on: the start would flatten the end."""
    figure, axes = _axes()
    last = max((run.validations[-1].step for run in runs if run.validations), default=0)
    for run in runs:
        points = [p for p in run.validations if p.step >= last / 10 and np.isfinite(p.loss)] or run.validations[-1:]
        axes.plot(
            [p.step for p in points],
            [p.loss for p in points],
            color=BLUE,
            linewidth=1.1,
            alpha=max(0.15, min(0.9, 3 / len(runs))),
            marker="." if len(points) < 3 else None,
        )
    axes.axhline(threshold, color=RED, linewidth=1, linestyle="--")
    _line_name(axes, f"threshold {threshold:g}", threshold)
    axes.set(xlabel="step", ylabel="validation loss (nats)", title=f"{len(runs)} loss curves")
    return _svg(figure, f"loss curves of {label}")


def distribution(test: TTest, losses: Sequence[float], label: str) -> str:
    """Every final loss, their mean with its upper bound, and the threshold."""
    figure, axes = _axes(height=2.9)
    _draw_losses(axes, test, losses)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return _svg(figure, f"final losses of {label}")


def _draw_losses(axes: Any, test: TTest, losses: Sequence[float]) -> None:
    # A fixed pattern of heights keeps equal losses apart; it means nothing.
    heights = [((i * 0.618034) % 1) for i in range(len(losses))]
    axes.plot(losses, heights, "o", color=BLUE, alpha=0.65, markersize=6, markeredgewidth=0)
    axes.axvline(test.sample_mean, color=BLUE, linewidth=1.6, label=f"mean {test.sample_mean:.6g}")
    axes.axvspan(
        test.sample_mean,
        test.upper_conf_bound_mean,
        color=BLUE,
        alpha=0.15,
        linewidth=0,
        label=f"upper {1 - test.alpha:.0%} bound {test.upper_conf_bound_mean:.6g}",
    )
    axes.axvline(test.threshold, color=RED, linewidth=1, linestyle="--", label=f"threshold {test.threshold:g}")
    axes.set(xlabel="final validation loss (nats)", ylim=(-0.15, 1.15), title=f"{len(losses)} final losses")
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.ticklabel_format(axis="x", useOffset=False)
    axes.tick_params(axis="x", labelsize=8)


def draw_test(test: TTest, losses: Sequence[float], path: str) -> None:
    """The t-test as a picture file: every loss, their mean with its bound, the threshold. Raises UsageError."""
    try:
        figure, axes = _axes(height=2.9)
    except ImportError as error:
        raise UsageError(f"a picture needs {error.name}: pip install matplotlib") from None
    _draw_losses(axes, test, losses)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {path}: {error}") from None


def p_path(p_values: Sequence[tuple[int, float]], alpha: float, label: str) -> str:
    """p after each run: what somebody who peeks would have seen."""
    figure, axes = _axes(height=2.8)
    runs, shown = [n for n, _ in p_values], [max(p, 1e-300) for _, p in p_values]
    axes.semilogy(runs, shown, color=BLUE, marker="o", markersize=3.5, linewidth=1.1)
    axes.minorticks_off()  # over many decades they are most of the work, and say nothing
    axes.axhline(alpha, color=RED, linewidth=1, linestyle="--")
    _line_name(axes, f"alpha {alpha:g}", alpha)
    axes.set(xlabel="runs, in the order of launch", ylabel="one-sided p", title="p after each run")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return _svg(figure, f"p after each run of {label}")


def sequential_path(decision: Decision, plan: Plan, label: str) -> str:
    """t after each run between the plan's bounds."""
    figure, axes = _axes(height=3.2)
    last = max(decision.n + 3, min(plan.cap, 2 * decision.n))
    looks = [look for look in boundaries(plan) if look.n <= last]
    shown = [look.t for look in decision.path]
    top = 1.25 * max([6.0, *(t for t in shown if np.isfinite(t))])
    bottom = min([-2.0, *(t for t in shown if np.isfinite(t))]) * 1.1
    style = dict(linewidth=1.2, marker="_" if len(looks) < 8 else None)
    n = [look.n for look in looks]
    axes.plot(
        n, np.clip([look.t_accept for look in looks], bottom, top * 2), color="#2e7d4f", label="accept above", **style
    )
    axes.plot(n, np.clip([look.t_futile for look in looks], bottom * 2, top), color=RED, label="futile below", **style)
    axes.plot([look.n for look in decision.path], shown, color=BLUE, marker="o", markersize=4, linewidth=1.2, label="t")
    axes.axhline(0, color=GRAY, linewidth=0.6)
    axes.set(
        xlabel="runs, in the order of launch",
        ylabel="t (positive: below the threshold)",
        ylim=(bottom, top),
        title=f"sequential test: {decision.verdict}",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    return _svg(figure, f"sequential test of {label}")


def p_curve(p_values: Sequence[float], label: str) -> str:
    """The p-values of all series that pass 0.05, in bins of 0.01: honest effects pile up on the left; stopping at the
    first pass piles them up just below the level that is wanted."""
    figure, axes = _axes(height=2.6)
    significant = [p for p in p_values if p < 0.05]
    axes.hist(significant, bins=np.linspace(0, 0.05, 6), color=BLUE, rwidth=0.9)
    axes.set(
        xlabel="p of a series", ylabel="series", title=f"p-curve: {len(significant)} of {len(p_values)} below 0.05"
    )
    axes.yaxis.get_major_locator().set_params(integer=True)
    return _svg(figure, f"p-curve of {label}")
