"""One look for all pictures of the lab."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures are files; no window system is needed

import matplotlib.pyplot as plt

# Okabe and Ito's palette, which most colour-blind readers can tell apart, without its yellow.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "font.size": 10,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 110,
    "font.family": "DejaVu Sans",
}


def color(i: int) -> str:
    """The i-th line's colour; they repeat after eight."""
    return _COLORS[i % len(_COLORS)]


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4)) -> tuple[Any, Any]:
    """A figure and its axes (one axes object, a list, or a list of lists) in the lab's style; `size` in
    inches."""
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    if rows == columns == 1:
        return fig, axes[0][0]
    return fig, list(axes[0]) if rows == 1 else [list(r) for r in axes]


def note(ax: Any, text: str) -> None:
    """A grey sentence in an empty panel."""
    ax.text(0.5, 0.5, text, ha="center", va="center", color="0.5", transform=ax.transAxes)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)


def save(fig: Any, path: Path) -> Path:
    """Write the picture and free its memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(_STYLE):
        fig.savefig(path)
    plt.close(fig)
    return path
