"""One look for all pictures of the lab."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # pictures are files; no window system is needed

import matplotlib.pyplot as plt

from data.paths import atomic_file

# Okabe and Ito's palette, which most colour-blind readers can tell apart, without its yellow.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
MONO = "DejaVu Sans Mono"
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


def shade(i: int, count: int) -> Any:
    """The i-th of `count` colours from early (dark) to late (light): for lines that have an order."""
    return plt.get_cmap("viridis")(0.9 * i / max(1, count - 1))


def masked_blues() -> Any:
    """White to blue, and grey where there is no number."""
    return plt.get_cmap("Blues").with_extremes(bad="0.88")


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4)) -> tuple[Any, Any]:
    """A figure and its axes (one axes object, a list, or a list of lists) in the lab's style; `size` in
    inches."""
    with plt.rc_context(_STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    if rows == columns == 1:
        return fig, axes[0][0]
    return fig, list(axes[0]) if rows == 1 else [list(r) for r in axes]


def plain(text: str) -> str:
    """`text` for a picture: matplotlib would read dollars as mathematics, and has no glyphs for control characters."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text).replace("$", r"\$")


def bars(ax: Any, names: Sequence[str], values: Sequence[float], color_number: int = 0) -> None:
    """A bar a name, long names turned."""
    ax.bar(range(len(values)), values, color=color(color_number))
    long = max(map(len, names), default=0) > 2
    ax.set_xticks(range(len(names)), [plain(n) for n in names], rotation=90 if long else 0, fontsize=7 if long else 9)
    ax.set_xlim(-1, len(names))
    ax.grid(axis="x", visible=False)


def rectangle(x: float, y: float, width: float, height: float, colour: str) -> Any:
    """A filled patch in data coordinates."""
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=colour, edgecolor="none")


def note(ax: Any, text: str) -> None:
    """A grey sentence in an empty panel."""
    ax.text(0.5, 0.5, text, ha="center", va="center", color="0.5", transform=ax.transAxes)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)


def save(fig: Any, path: Path) -> Path:
    """Write the picture, all or nothing, and free its memory."""
    with plt.rc_context(_STYLE), atomic_file(path) as file:
        fig.savefig(file, format="png")
    plt.close(fig)
    return path
