"""One look for all pictures of the lab, in any alphabet.

Every text of a picture is drawn with the fonts of this machine that have its characters; a character that none of them
has stands as its code, <U+4E2D>, so that no label is an empty box.
"""

import functools
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # pictures are files; no window system is needed

import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.collections import PatchCollection  # noqa: F401  (for those who draw many rectangles)
from matplotlib.text import Text
from PIL import Image  # matplotlib brings it

from data.paths import atomic_file

# Okabe and Ito's palette, which most colour-blind readers can tell apart, without its yellow.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
SANS, MONO = "DejaVu Sans", "DejaVu Sans Mono"  # they come with matplotlib
MANY_BYTES, FEW_COLOURS = 100_000, 128  # a picture of more bytes gets along with so many colours
_NO_LETTERS = ("last resort", "lastresort", "adobe blank", "cm", "stixsize")  # boxes, or signs under wrong codes
_STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.fontsize": 8,
    "legend.edgecolor": "0.9",
    "font.size": 10,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 110,
    "font.family": SANS,
}
matplotlib.rcParams.update(_STYLE)  # not around a figure's making alone: titles and legends come after it


def color(i: int) -> str:
    """The i-th line's colour; they repeat after eight."""
    return _COLORS[i % len(_COLORS)]


def line(i: int) -> dict[str, Any]:
    """Colour and dashes of the i-th of many lines: no two of 24 are alike."""
    return {"color": color(i), "linestyle": ("-", "--", ":")[i // len(_COLORS) % 3]}


def shade(i: int, count: int) -> Any:
    """The i-th of `count` colours from early (dark) to late (light): for lines that have an order."""
    return plt.get_cmap("viridis")(0.9 * i / max(1, count - 1))


def masked_blues() -> Any:
    """White to blue, and grey where there is no number."""
    return plt.get_cmap("Blues").with_extremes(bad="0.88")


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4)) -> tuple[Any, Any]:
    """A figure and its axes (one axes object, a list, or a list of lists) in the lab's style; `size` in inches."""
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    if rows == columns == 1:
        return fig, axes[0][0]
    return fig, list(axes[0]) if rows == 1 else [list(r) for r in axes]


@functools.cache
def fonts() -> list[tuple[str, str]]:
    """(family, file) of the machine's fonts with letters: those of our style first, then upright and regular ones."""

    def rank(font: Any) -> tuple[bool, ...]:
        regular = font.weight in (400, "normal", "regular")
        return font.name != SANS, font.name != MONO, font.style != "normal", not regular

    known = [f for f in font_manager.fontManager.ttflist if not f.name.lower().startswith(_NO_LETTERS)]
    return [(f.name, f.fname) for f in sorted(known, key=rank)]


@functools.cache
def family_with(character: str) -> str:
    """The family of a font on this machine that has a glyph for `character`; '' if there is none."""
    for family, path in fonts():
        try:
            if font_manager.get_font(path).get_char_index(ord(character)):
                return family
        except (OSError, RuntimeError):  # a font that is gone, or broken
            continue
    return ""


def legible(text: str) -> str:
    """`text` with a dot for every control character, and its code for every character that no font here has."""
    if text.isascii() and text.isprintable():
        return text
    shown = (c if c.isprintable() or c == "\n" else "·" for c in text)
    return "".join(c if c == "\n" or family_with(c) else f"<U+{ord(c):04X}>" for c in shown)


def plain(text: str) -> str:
    """`text` for a picture: `legible`, and dollars as dollars, which matplotlib would read as mathematics."""
    return legible(text).replace("$", r"\$")


def columns(text: str) -> int:
    """How many letters of a typewriter `text` is wide: Chinese ones count two, accents none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) > 0 for c in text)


def short(text: str, most: int) -> str:
    """The first characters of `text` that are at most so many columns wide (one at least), as `plain` has them."""
    shown = ""
    for character in text:
        if shown and columns(shown + legible(character)) > most:
            break
        shown += legible(character)
    return plain(shown)


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


def spread(points: Sequence[tuple[float, float]], apart: float, rounds: int = 500) -> np.ndarray:
    """(N, 2) places near `points` of which no two are nearer than `apart` (as far as `rounds` of pushing go): where
    letters can be read though their points lie on each other."""
    places = np.array(points, dtype=float).reshape(-1, 2)
    places += 1e-3 * apart * np.random.default_rng(0).standard_normal(places.shape)  # those in one place part, too
    for _ in range(rounds):
        away = places[:, None] - places[None]
        distance = np.linalg.norm(away, axis=-1) + np.eye(len(places)) * 2 * apart
        push = np.clip(apart - distance, 0, None) / distance
        if not push.any():
            break
        # half of the way each, and of the mean over all that are too near: a crowd must not burst
        places += 0.5 * (away * push[..., None]).sum(1) / np.maximum(1, (push > 0).sum(1))[:, None]
    return places


def label_points(ax: Any, points: Sequence[tuple[float, float]], names: Sequence[str], size: int = 9) -> None:
    """A dot a point and its name on it, or beside it with a line between, where names would lie on each other."""
    ax.scatter(*zip(*points), s=4, color="0.8")
    ax.margins(0.06)
    ax.figure.draw_without_rendering()  # sets the limits, and with them what a pixel is
    pixels = ax.transData.transform(points)
    apart = 1.6 * size * ax.figure.dpi / 72
    for name, point, pixel, place in zip(names, points, pixels, spread(pixels, apart)):
        moved = np.linalg.norm(place - pixel) > 0.5 * apart
        line = {"arrowstyle": "-", "color": "0.8", "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0} if moved else None
        offset = (place - pixel) * 72 / ax.figure.dpi
        how = dict(textcoords="offset points", ha="center", va="center", fontsize=size, annotation_clip=False)
        ax.annotate(plain(name), point, offset, arrowprops=line, **how)


def note(ax: Any, text: str) -> None:
    """A grey sentence in an empty panel."""
    ax.text(0.5, 0.5, text, ha="center", va="center", color="0.5", transform=ax.transAxes)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)


def places_of(steps: Sequence[int]) -> list[float]:
    """Where steps stand on a logarithmic axis, see `step_axis`: 0, which has no place there, at half of the first
    other one, so that it does not lie on a checkpoint of step 1."""
    return [step or min(filter(None, steps), default=1) / 2 for step in steps]


def step_axis(ax: Any, of: str = "step") -> None:
    """A logarithmic axis of steps whose places are those of `places_of`."""
    ax.set_xscale("log")
    ax.set_xlabel(f"{of} (0 is drawn left of the first)")


def few_numbers(ax: Any) -> None:
    """At most five numbers below a panel, with a power of ten in common where they are small or great: side by side in
    a row of panels, 0.00025 and its like would lie on each other."""
    ax.locator_params(axis="x", nbins=4)
    ax.ticklabel_format(axis="x", style="sci", scilimits=(-2, 3))


def _give_fonts(fig: Any) -> None:
    """Every text of a figure, whoever wrote it: legible, and drawn with fonts that have its characters."""
    for axis in (axis for ax in fig.axes for axis in (ax.xaxis, ax.yaxis)):
        names = [label.get_text() for label in axis.get_ticklabels()]
        if names != (shown := [legible(name) for name in names]):
            axis.set_ticklabels(shown)  # these are written anew with every drawing, so changing the texts is in vain
    for text in fig.findobj(Text):
        text.set_text(words := legible(text.get_text()))
        if words.isascii():
            continue
        own = text.get_fontfamily()
        more = dict.fromkeys(family_with(c) for c in words if c != "\n")
        text.set_fontfamily([*own, *(family for family in more if family not in own)])


def save(fig: Any, path: Path) -> Path:
    """Write the picture, all or nothing, and free its memory."""
    _give_fonts(fig)
    drawn = io.BytesIO()
    fig.savefig(drawn, format="png")
    plt.close(fig)
    if drawn.tell() > MANY_BYTES:
        drawn = few_colours(drawn)
    with atomic_file(path) as file:
        file.write(drawn.getbuffer())
    return path


def few_colours(drawn: io.BytesIO) -> io.BytesIO:
    """A PNG with FEW_COLOURS colours chosen for it: it looks the same, and takes a fraction of the bytes (a map of 30
    by 30 pairs 555 kB otherwise, for the sake of the many shades at the edges of its letters)."""
    smaller = io.BytesIO()
    Image.open(drawn).convert("RGB").quantize(FEW_COLOURS, dither=Image.Dither.NONE).save(smaller, "PNG")
    return smaller
