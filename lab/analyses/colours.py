"""Text coloured by loss, token by token: of one checkpoint, or of two side by side (where did it get better?)."""

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lab import LabError, plots
from lab.analyses.finding import Finding, write_finding
from lab.analyses.scoring import token_logits
from lab.checkpoints import Checkpoint, same_vocabulary

DARK_NATS = 6.0  # a token of this loss, or more, has the darkest colour
MOST_TOKENS = 4000
COLUMNS, MOST_LINES = 110, 40  # of the picture; the page shows all


@dataclass(frozen=True)
class Coloured:
    """One token as a model read it: what it cost, and what the model would rather have read."""

    id: int
    piece: str
    nats: float
    entropy_nats: float
    top: tuple[tuple[str, float], ...]


def read_tokens(checkpoint: Checkpoint, text: str | Sequence[str], top: int = 5) -> list[Coloured]:
    """Every token of a text (or of several documents, whose marks are guessed too, and shown as •), its loss, and the
    `top` likeliest tokens in its place. Text that the vocabulary lacks raises UnknownTextError."""
    ids = checkpoint.encode_documents(text)[1 : MOST_TOKENS + 1]  # `coloured` tells of the rest
    if not ids:
        raise LabError("there is no text to colour; give one with --prompt or --text")
    logp = token_logits(checkpoint, ids).log_softmax(-1)
    entropies = -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)
    best = logp.topk(min(top, logp.shape[-1]))
    mark = checkpoint.tokenizer.mark
    piece = lambda t: "•" if t == mark else checkpoint.tokenizer.piece(t)  # noqa: E731
    return [
        Coloured(
            token,
            piece(token),
            -float(logp[place, token]),
            float(entropies[place]),
            tuple((piece(t), p) for t, p in zip(best.indices[place].tolist(), best.values[place].exp().tolist())),
        )
        for place, token in enumerate(ids)
    ]


def shade(nats: float) -> str:
    """A colour from white (no loss) to orange (DARK_NATS and more)."""
    return _mix((255, 255, 255), (230, 120, 30), min(1.0, max(0.0, nats) / DARK_NATS))


def shade_difference(nats: float) -> str:
    """Blue where the second model is better (a negative difference), orange where it is worse."""
    end = (230, 120, 30) if nats > 0 else (60, 130, 220)
    return _mix((255, 255, 255), end, min(1.0, abs(nats) / (DARK_NATS / 2)))


def _mix(a: tuple[int, int, int], b: tuple[int, int, int], share: float) -> str:
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in zip(a, b))


STYLE = """.coloured{white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9;color:#111;
font-family:ui-monospace,Menlo,Consolas,monospace}
.coloured span{position:relative;border-radius:3px}
.coloured span>i{display:none;position:absolute;z-index:5;left:0;top:1.6em;background:#222;color:#fff;padding:.4em .6em;
font:13px/1.4 ui-monospace,monospace;white-space:pre;border-radius:4px}
.coloured span:hover>i,.coloured span:focus>i{display:block}
@media(max-width:600px){.coloured span{position:static}
.coloured span>i{position:fixed;left:0;right:0;top:auto;bottom:0;border-radius:0}}"""


def as_html(tokens: Sequence[Coloured], spaced: bool, before: Sequence[Coloured] | None = None) -> str:
    """The text as one block of spans, each with its alternatives on hover and on focus; with `before`, another
    reading of the same tokens, coloured by the difference. `spaced`: tokens are words. STYLE belongs to it."""
    parts = []
    for place, token in enumerate(tokens):
        lines = [f"{token.piece}  {token.nats:.2f} nats, p {torch.tensor(-token.nats).exp():.1%}"]
        colour = shade(token.nats)
        if before is not None:
            change = token.nats - before[place].nats
            lines.append(f"before {before[place].nats:.2f} nats ({change:+.2f})")
            colour = shade_difference(change)
        lines += [f"{p:6.1%}  {piece}" for piece, p in token.top]
        shown = token.piece.replace("\u2423", " ") + ("\n" if token.piece == "\u21b5" else "")
        hover = html.escape("\n".join(lines))
        parts.append(f'<span tabindex=0 style="background:{colour}">{html.escape(shown)}<i>{hover}</i></span>')
    return f"<div class=coloured>{(' ' if spaced else '').join(parts)}</div>"


def coloured(
    checkpoints: Sequence[Checkpoint], text: str | Sequence[str], out: Path, *, top: int = 5, picture: bool = True
) -> Finding:
    """The text as one checkpoint reads it, or two (the earlier one first); pages show it as text, with what else was
    expected on hover, so that a page needs no `picture`."""
    if not 1 <= len(checkpoints) <= 2:
        raise LabError(f"text is coloured by one checkpoint or two, not {len(checkpoints)}")
    tokenizer = same_vocabulary(checkpoints)
    read = [read_tokens(c, text, top) for c in checkpoints]
    tokens, before = read[-1], read[0] if len(read) == 2 else None
    means = [sum(t.nats for t in tokens) / len(tokens) for tokens in read]
    rows = [("loss", [(t.piece, shade(t.nats)) for t in tokens])]
    if before is not None:
        changes = [shade_difference(t.nats - b.nats) for t, b in zip(tokens, before)]
        rows.append(("change", [(t.piece, colour) for t, colour in zip(tokens, changes)]))
    summary = f"{len(tokens)} tokens at {means[-1]:.3f} nats a token under {checkpoints[-1].reading()}"
    if before is not None:
        better = sum(t.nats < b.nats for t, b in zip(tokens, before))
        summary += f"; {means[0]:.3f} under {checkpoints[0].reading()}; {better} of them got better"
    if rest := len(checkpoints[-1].encode_documents(text)) - 1 - len(tokens):
        summary += f"; the {rest:,} tokens after them are left out"
    worst = max(tokens, key=lambda t: t.nats)
    summary += f". The greatest surprise is {worst.piece!r} with {worst.nats:.1f} nats."
    data: dict[str, Any] = {"tokens": [asdict(t) for t in tokens], "mean_nats": means}
    if before is not None:
        data["before"] = [asdict(t) for t in before]
    legend = f"White costs nothing, orange {DARK_NATS:g} nats and more."
    if before is not None:
        earlier, later = (html.escape(f"{c.label}, step {c.step:,}") for c in checkpoints)
        legend = f"Blue: {later} pays less for this token than {earlier}; orange: it pays more."
    legend += " Hover over a token, or reach it with the tab key, for what else was expected."
    text = as_html(tokens, tokenizer.kind == "word", before)
    shown = f"<style>{STYLE}</style><p class=legend>{legend}</p>{text}"
    return write_finding(out, "coloured", summary, data, _picture(rows) if picture else None, shown)


def _picture(rows: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> Any:
    """Tokens on coloured ground, wrapped; one block a row of `rows`."""
    blocks = []
    for label, cells in rows:
        lines: list[list[tuple[int, str, str]]] = [[]]
        at = 0
        for piece, colour in cells:
            piece = plots.legible(piece)
            if at + plots.columns(piece) > COLUMNS:
                lines.append([])
                at = 0
            lines[-1].append((at, piece, colour))
            at += plots.columns(piece)
            if piece == "\u21b5":
                lines.append([])
                at = 0
        blocks.append((label, lines[:MOST_LINES], len(lines) > MOST_LINES))
    height = sum(len(lines) + 2 for _, lines, _ in blocks)
    fig, ax = plots.figure(size=(12, 0.23 * height + 0.3))
    fig.set_layout_engine("none")  # there is nothing to lay out, and every letter would be measured for it
    ax.set_position((0.01, 0, 0.98, 1))
    ax.axis("off")
    grounds = []
    ax.set_xlim(0, COLUMNS)
    ax.set_ylim(-height, 0)
    y = -1.0
    for label, lines, cut in blocks:
        titles = {"loss": f"loss: white 0, orange {DARK_NATS:g} nats and more", "change": "change: blue is better"}
        ax.text(0, y, titles[label] + (" (cut)" if cut else ""), fontsize=9, color="0.35")
        for line in lines:
            y -= 1
            for at, piece, colour in line:
                wide = plots.columns(piece)
                grounds.append(plots.rectangle(at, y - 0.25, wide, 0.95, colour))
                ax.text(at + wide / 2, y, plots.plain(piece), fontsize=8, ha="center", family=plots.MONO)
        y -= 1.5
    ax.add_collection(plots.PatchCollection(grounds, match_original=True))
    return fig
