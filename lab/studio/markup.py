"""Pieces of the pages as HTML: text wraps, any alphabet can be read, and a screen reader has words for all of it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from lab.analyses import Finding

TOWARDS, AWAY = "59 130 246", "239 68 68"  # blue and red, as in the lab's pictures


def heading(title: str, sentence: str) -> str:
    """The page's name, and what one can do on it."""
    return f"<h1>{html.escape(title)}</h1><p class='lead'>{html.escape(sentence)}</p>"


def hint(text: str) -> str:
    """A quiet paragraph; `text` is HTML of ours."""
    return f"<p class='quiet'>{text}</p>"


def told_error(error: Exception) -> str:
    """An error that stands where its answer would have stood."""
    return f"<p class='failure' role='alert'>{html.escape(str(error))}</p>"


def printed(title: str, text: str) -> str:
    """What a command prints, as it prints it; it scrolls by itself, with the keyboard too."""
    label = html.escape(title, quote=True)
    return (
        f"<h2>{html.escape(title)}</h2><pre class='printed' tabindex='0' role='region' aria-label='{label}'>"
        f"{html.escape(text)}</pre>"
    )


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """Names and values side by side, as many in a row as fit."""
    items = (f"<div><dt>{html.escape(str(k))}</dt><dd>{html.escape(str(v))}</dd></div>" for k, v in pairs)
    return f"<dl class='facts'>{''.join(items)}</dl>"


def swatch(colour: str) -> str:
    """A small square of a line's colour, beside its name."""
    return f"<span class='swatch' style='background:{html.escape(colour, quote=True)}' aria-hidden='true'></span>"


def legend(colours: Iterable[tuple[str, str]]) -> str:
    """(name, colour) of the lines of a chart; Gradio's own legend is cut off."""
    items = "".join(f"<span>{swatch(colour)}{html.escape(name)}</span>" for name, colour in colours)
    return f"<p class='legend'>{items}</p>"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], caption: str = "") -> str:
    """A table whose first column names its rows; it scrolls by itself where the page is narrow."""
    top = "".join(f"<th scope='col'>{html.escape(str(cell))}</th>" for cell in head)
    body = "".join(
        f"<tr><th scope='row'>{html.escape(str(first))}</th>"
        + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    said = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    whole = f"<table>{said}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scrolls' tabindex='0' role='region' aria-label='table'>{whole}</div>"


def texts(rows: Iterable[tuple[str, str]]) -> str:
    """Labelled texts, one under the other."""
    return "".join(
        f"<div class='sample'><span>{html.escape(label)}</span><div>{html.escape(text)}</div></div>"
        for label, text in rows
    )


def bars(pairs: Iterable[tuple[str, float]], caption: str) -> str:
    """Tokens with their probabilities, the likeliest first."""
    rows = "".join(
        f"<tr><th scope='row'>{html.escape(piece)}</th><td><div class='bar' style='width:{100 * p:.1f}%'></div></td>"
        f"<td>{100 * p:.1f} %</td></tr>"
        for piece, p in pairs
    )
    return f"<table class='bars'><caption>{html.escape(caption)}</caption><tbody>{rows}</tbody></table>"


def driven(pieces: Sequence[str], scores: Sequence[float], target: str) -> str:
    """Tokens coloured by what they did to the target: blue pushed towards it, red away, as in the pictures."""
    greatest = max(map(abs, scores), default=0.0) or 1.0
    spans = []
    for piece, score in zip(pieces, scores):
        share = score / greatest
        tint = f"rgb({TOWARDS if share > 0 else AWAY} / {0.55 * abs(share):.2f})"
        spans.append(f"<span style='background:{tint}' title='{share:+.2f}'>{html.escape(piece)}</span>")
    legend = f"Blue pushed towards {html.escape(repr(target))}, red away from it; the strongest counts 1."
    return f"<div class='driven'>{' '.join(spans)}</div><p class='quiet'>{legend}</p>"


def token_buttons(pieces: Sequence[str], given: int) -> str:
    """The tokens of a text as buttons, the first `given` of them the user's own; see TOKENS_SCRIPT."""
    buttons = "".join(
        f"<button type='button' data-place='{place}' tabindex='{0 if place == 0 else -1}' aria-pressed='false'"
        f"{'' if place < given else ' class=written'}>{html.escape(piece)}</button>"
        for place, piece in enumerate(pieces)
    )
    label = "Tokens: the arrow keys move, Enter asks"
    return f"<div class='tokens' role='group' aria-label='{label}'>{buttons}</div>"


# One tab stop for all tokens; arrows move within, as in any toolbar.
TOKENS_SCRIPT = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-place]');
  if (!button) return;
  element.querySelectorAll('button[data-place]').forEach(b => {
    b.setAttribute('aria-pressed', b === button); b.tabIndex = b === button ? 0 : -1; });
  trigger('click', {place: Number(button.dataset.place)});
});
element.addEventListener('keydown', event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  const all = [...element.querySelectorAll('button[data-place]')], at = all.indexOf(event.target);
  if (!step || at < 0) return;
  const next = all[Math.min(Math.max(at + step, 0), all.length - 1)];
  all[at].tabIndex = -1; next.tabIndex = 0; next.focus(); event.preventDefault();
});
"""


def address(path: Path) -> str:
    """Where the page finds a file of ours; a newer one of the same name has another address."""
    return f"gradio_api/file={quote(str(path))}?{path.stat().st_mtime_ns}"


def download(path: Path, words: str = "") -> str:
    """A link that saves a file."""
    name = html.escape(path.name, quote=True)
    return f"<a href='{address(path)}' download='{name}'>{html.escape(words) or f'Save {name}'}</a>"


def picture(path: Path, words: str) -> str:
    """A picture of ours with `words` for those who cannot see it, and the way to keep it."""
    image = f"<img src='{address(path)}' alt='{html.escape(words, quote=True)}'>"
    return f"<figure class='drawn'>{image}<figcaption>{download(path, 'Keep the picture')}</figcaption></figure>"


def finding(found: Finding) -> str:
    """What an analysis found: its line, and then text as text; only what is drawn is shown as a picture."""
    line = f"<p>{html.escape(found.summary)}</p>"
    if found.name in _AS_TEXT:
        return line + _AS_TEXT[found.name](found.data)
    if found.html:
        kept = f"<p class='quiet'>{download(found.png_path, 'Keep it as a picture')}</p>"
        return line + found.html + kept
    return line + picture(found.png_path, f"{found.name.replace('_', ' ')}: {found.summary}")


def _samples(data: dict) -> str:
    return texts((f"step {row['step']:,}", row["text"]) for row in data["samples"])


def _variability(data: dict) -> str:
    head = ["temperature", "distinct-1", "distinct-2", "distinct-3", "distinct-4", "self-similarity", "different"]
    keys = ["distinct_1", "distinct_2", "distinct_3", "distinct_4", "self_similarity"]
    rows = [[r["temperature"], *(f"{r[k]:.2f}" for k in keys), r["different"]] for r in data["table"]]
    drawn = [(f"T = {r['temperature']}", data["prompt"] + text) for r in data["table"] for text in r["texts"][:4]]
    return table(head, rows) + texts(drawn)


def _attribution(data: dict) -> str:
    parts = (("Integrated gradients", "integrated"), ("Gradient times activation", "gradient_activation"))
    return "".join(f"<h2>{title}</h2>{driven(data['tokens'], data[key], data['target'])}" for title, key in parts)


def _next_token(data: dict) -> str:
    most = max(len(row["top"]) for row in data["table"])
    rows = [
        [f"{row['step']:,}", f"{row['entropy_nats']:.2f}", *(f"{piece} {p:.0%}" for piece, p, _ in row["top"])]
        for row in data["table"]
    ]
    head = ["step", "entropy (nats)", *(f"{n}." for n in range(1, most + 1))]
    return table(head, rows, f"What is expected after {data['prompt']!r}")


def _positions(data: dict) -> str:
    rows = [
        [row["drawn"], f"{row['entropy_nats']:.2f}", *(f"{piece} {p:.0%}" for piece, p, _ in row["top"])]
        for row in data["table"]
    ]
    head = ["drawn", "entropy (nats)", *(f"{n}." for n in range(1, len(data["table"][0]["top"]) + 1))]
    return table(head, rows, f"Place by place after {data['prompt']!r}")


def _logit_lens(data: dict) -> str:
    rows = [[row["layer"], *(f"{piece} {p:.0%}" for piece, p in row["likeliest"])] for row in data["table"]]
    return table(["after reading", *data["tokens"]], rows, "What each layer would say next")


_AS_TEXT = {
    "samples": _samples,
    "variability": _variability,
    "attribution": _attribution,
    "next_token": _next_token,
    "positions": _positions,
    "logit_lens": _logit_lens,
}
