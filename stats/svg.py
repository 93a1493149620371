"""Axes, lines and dots straight into SVG text: what a report needs of a drawing library, at a hundredth of its time.

A page may hold hundreds of these pictures. They need no script, no font and no file from elsewhere, and equal data give
equal bytes.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

BLUE, RED, GREEN, GRAY, INK = "#2563a8", "#b3372f", "#2e7d4f", "#6b7280", "#1f2933"
LEFT, RIGHT, TOP, BOTTOM = 62, 10, 26, 40  # margins around the axes, pixels

Points = Sequence[tuple[float, float]]


@dataclass
class Axis:
    """One direction: what it shows, from where to where, and how it is named."""

    low: float
    high: float
    name: str = ""
    whole: bool = False  # ticks at whole numbers only
    log: bool = False  # low and high are positive
    hidden: bool = False  # no ticks, no line

    def __post_init__(self) -> None:
        if self.log:
            self.low, self.high = 10.0 ** math.floor(math.log10(self.low)), 10.0 ** math.ceil(math.log10(self.high))
        if not self.high > self.low:
            pad = abs(self.low) * 0.01 or 1.0
            self.low, self.high = self.low - pad, self.high + pad

    def share(self, value: float) -> float:
        """Where `value` lies: 0 at the low end, 1 at the high one; a little beyond for what lies outside."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log10(low), math.log10(high), math.log10(max(value, 1e-320))
        return min(4.0, max(-4.0, (value - low) / (high - low)))

    def ticks(self) -> list[tuple[float, str]]:
        """(value, text) of up to seven round places."""
        if self.hidden:
            return []
        if self.log:
            first, last = round(math.log10(self.low)), round(math.log10(self.high))
            every = max(1, math.ceil((last - first) / 6))
            return [(10.0**power, f"1e{power}" if power else "1") for power in range(last, first - 1, -every)]
        raw = (self.high - self.low) / 6
        scale = 10.0 ** math.floor(math.log10(raw))
        step = next(scale * nice for nice in (1, 2, 5, 10) if scale * nice >= raw)
        step = max(1.0, step) if self.whole else step
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [(index * step, f"{index * step:.{digits}f}") for index in range(first, last + 1)]


@dataclass
class Picture:
    """A picture in the making; `svg` gives its text."""

    title: str
    x: Axis
    y: Axis
    width: int = 460
    height: int = 250
    shapes: list[str] = field(default_factory=list)
    keys: list[tuple[str, str]] = field(default_factory=list)  # (colour, text) of the legend
    names: list[str] = field(default_factory=list)

    def at(self, x: float, y: float) -> tuple[float, float]:
        """The pixel of a point."""
        foot = BOTTOM + (16 if self.keys else 0)
        across, up = self.width - LEFT - RIGHT, self.height - TOP - foot
        return LEFT + self.x.share(x) * across, self.height - foot - self.y.share(y) * up

    def line(self, points: Points, color: str, width: float = 1.3, opacity: float = 1.0, dots: float = 0) -> None:
        """A line through points, with dots of that radius on them."""
        pixels = [self.at(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        if len(pixels) > 1:
            told = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
            style = f'fill="none" stroke="{color}" stroke-width="{width:g}" stroke-opacity="{opacity:.3g}"'
            self.shapes.append(f'<polyline points="{told}" {style} stroke-linejoin="round"/>')
        if dots or len(pixels) == 1:
            self._dots(pixels, color, dots or 2.5, opacity)

    def dots(self, points: Points, color: str, radius: float = 3.5, opacity: float = 1.0) -> None:
        """Dots alone."""
        self._dots([self.at(x, y) for x, y in points], color, radius, opacity)

    def _dots(self, pixels: Points, color: str, radius: float, opacity: float) -> None:
        for x, y in pixels:
            style = f'fill="{color}" fill-opacity="{opacity:.3g}"'
            self.shapes.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" {style}/>')

    def box(self, low: tuple[float, float], high: tuple[float, float], color: str, opacity: float = 1.0) -> None:
        """A filled box between two corners."""
        (x0, y0), (x1, y1) = self.at(*low), self.at(*high)
        size = f'x="{min(x0, x1):.1f}" y="{min(y0, y1):.1f}" width="{abs(x1 - x0):.1f}" height="{abs(y1 - y0):.1f}"'
        self.shapes.append(f'<rect {size} fill="{color}" fill-opacity="{opacity:.3g}"/>')

    def level(self, value: float, color: str, name: str = "", upright: bool = False, dashed: bool = True) -> None:
        """A line across the axes, with its name on its left end."""
        ends = [(value, self.y.low), (value, self.y.high)] if upright else [(self.x.low, value), (self.x.high, value)]
        (x0, y0), (x1, y1) = (self.at(*end) for end in ends)
        dash = ' stroke-dasharray="5 3"' if dashed else ""
        place = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
        self.shapes.append(f'<line {place} stroke="{color}" stroke-width="1.5"{dash}/>')
        if name:
            self.names.append(_text(x0 + 4, y0 - 4, name, color=color))

    def name(self, place: tuple[float, float], text: str, color: str = INK) -> None:
        """Words that begin at a point."""
        x, y = self.at(*place)
        self.names.append(_text(x, y, text, color=color))

    def key(self, color: str, text: str) -> None:
        """An entry of the legend. Add them before what is drawn: the legend takes its room from the axes."""
        self.keys.append((color, text))

    def svg(self, label: str) -> str:
        """One <svg> element; `label` is for those who cannot see it, and must be unique on a page."""
        name = re.sub(r"\W+", "-", label)
        (left, foot), (right, top) = self.at(self.x.low, self.y.low), self.at(self.x.high, self.y.high)
        clip = f'<clipPath id="{name}"><rect x="{left:.1f}" y="{top:.1f}" '
        clip += f'width="{right - left:.1f}" height="{foot - top:.1f}"/></clipPath>'
        parts = [
            f'<svg role="img" aria-label="{html.escape(label)}" xmlns="http://www.w3.org/2000/svg" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="sans-serif" font-size="10" fill="{INK}">',
            clip,
            *self._frame(left, foot, right, top),
            f'<g clip-path="url(#{name})">',
            *self.shapes,
            "</g>",
            *self.names,
            *self._legend(),
            "</svg>",
        ]
        return "\n".join(parts)

    def _frame(self, left: float, foot: float, right: float, top: float) -> list[str]:
        """Title, ticks with their faint lines, the axes and their names."""
        found = [_text((left + right) / 2, 16, self.title, size=12, anchor="middle")]
        for value, told in self.x.ticks():
            x, _ = self.at(value, self.y.low)
            found.append(_rule(x, foot, x, top, GRAY, 0.2))
            found.append(_text(x, foot + 13, told, anchor="middle"))
        for value, told in self.y.ticks():
            _, y = self.at(self.x.low, value)
            found.append(_rule(left, y, right, y, GRAY, 0.2))
            found.append(_text(left - 5, y + 3.5, told, anchor="end"))
        found.append(_rule(left, foot, right, foot, INK))
        found.append(_text((left + right) / 2, foot + 28, self.x.name, anchor="middle"))
        if not self.y.hidden:
            found.append(_rule(left, foot, left, top, INK))
        if self.y.name:
            middle = (foot + top) / 2
            found.append(_text(12, middle, self.y.name, anchor="middle", turn=f"rotate(-90 12 {middle:.1f})"))
        return found

    def _legend(self) -> list[str]:
        found, x, y = [], float(LEFT), self.height - 6
        for color, text in self.keys:
            found.append(f'<rect x="{x:.1f}" y="{y - 7}" width="12" height="5" fill="{color}"/>')
            found.append(_text(x + 16, y, text))
            x += 30 + 6.0 * len(text)  # of DejaVu Sans, the widest of the usual fonts
        return found


def _rule(x0: float, y0: float, x1: float, y1: float, color: str, opacity: float = 1.0) -> str:
    place = f'x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
    return f'<line {place} stroke="{color}" stroke-width="0.8" stroke-opacity="{opacity:g}"/>'


def _text(
    x: float, y: float, text: str, size: int = 10, anchor: str = "start", color: str = INK, turn: str = ""
) -> str:
    turned = f' transform="{turn}"' if turn else ""
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" fill="{color}"{turned}'
    return f"<text {place}>{html.escape(text)}</text>"
