"""Numbers and tables as text: readable on a terminal, and valid Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def number(value: float | None, digits: int = 7) -> str:
    """A number with `digits` significant digits; a dash for None."""
    return "-" if value is None else f"{value:.{digits}g}"


def p_text(p: float) -> str:
    """A p-value with three significant digits; never `0`."""
    return f"{p:.3g}" if p > 0 else "< 1e-300"


def table(header: Sequence[object], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns; all but the first are right-aligned."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(header))]
    lines = []
    for row in cells:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))]
        lines.append("| " + " | ".join(padded) + " |")
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines.insert(1, "| " + " | ".join(rule) + " |")
    return "\n".join(lines)
