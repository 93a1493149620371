"""The ways through a GPT as a drawing: the stream from layer to layer, and what joins it besides: the input embeddings
at every layer, value embeddings at some, and skips from earlier layers. What else a model has is said in words."""

from __future__ import annotations

import html
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train_gpt import GPT

ROW, LEFT, WIDTH = 34, 150, 130  # pixels: height of a layer, where its box begins, how wide it is
_STREAM, _EMBEDDING, _VALUE, _SKIP = "currentColor", "#3b82f6", "#059669", "#d97706"


def value_layers(count: int, layers: int, untied: bool = False) -> dict[int, int]:
    """{layer: value table} of the first and the last `count` layers; these have the same tables in the same order, or
    with `untied` ones of their own."""
    first = {table: table for table in range(count)}
    return first | {layers - count + table: table + (count if untied else 0) for table in range(count)}


def gpt_paths(gpt: GPT) -> str:
    """An SVG of the model's paths, with a sentence for those who cannot see it."""
    layers, skips = len(gpt.blocks), dict(gpt.skips)
    inputs = ["first embedding"] + (["second embedding"] if gpt.embed2 is not None else [])
    inputs += ["bigram table"] if gpt.config.bigram_rows else []
    values = value_layers(gpt.config.value_embeddings, layers, gpt.config.untied_values)
    top = 24 + ROW * len(inputs)
    middle = [top + ROW * layer + ROW // 2 for layer in range(layers)]
    parts = _inputs(inputs, middle)
    parts += [_box(LEFT, y - 11, WIDTH, f"layer {layer}") for layer, y in enumerate(middle)]
    parts += [_line(LEFT + WIDTH // 2, a + 11, LEFT + WIDTH // 2, b - 11, _STREAM) for a, b in pairwise(middle)]
    for layer, table in values.items():
        y = middle[layer]
        parts.append(_line(LEFT + WIDTH + 120, y - 7, LEFT + WIDTH, y - 7, _VALUE))
        parts.append(_text(LEFT + WIDTH + 124, y - 3, f"values {table}"))
    for number, (target, source) in enumerate(sorted(skips.items())):
        x = LEFT + WIDTH + 24 + 24 * number
        a, b = middle[source] + 6, middle[target] + 6
        parts.append(f"<path d='M{LEFT + WIDTH} {a} H{x} V{b} H{LEFT + WIDTH}' {_stroke(_SKIP)}/>")
    end = middle[-1] + ROW
    parts.append(_line(LEFT + WIDTH // 2, middle[-1] + 11, LEFT + WIDTH // 2, end - 11, _STREAM))
    parts.append(_box(LEFT, end - 11, WIDTH, "norm, logits"))
    words = _words(gpt, inputs, values, skips)
    size = f"viewBox='0 0 {LEFT + WIDTH + 200} {end + 20}'"
    label = html.escape(words, quote=True)
    drawing = f"<svg class='paths' role='img' aria-label='{label}' {size}>{_MARKER}{''.join(parts)}</svg>"
    return f"<figure>{drawing}<figcaption>{html.escape(words)}</figcaption></figure>"


def _words(gpt: GPT, inputs: list[str], values: dict[int, int], skips: dict[int, int]) -> str:
    from lab.models.gpt import GPTRung  # takes torch along, so only where a model is open
    from trainer.techniques import techniques_of

    several = GPTRung.of(gpt).rows_of_several_tokens()
    more = [name for name in techniques_of(gpt.config) if name != "bigram_rows"]
    embeddings = "both input embeddings" if "second embedding" in inputs else "the input embedding"
    bigram = " and a bigram table" if "bigram table" in inputs else ""
    said = [f"{len(gpt.blocks)} layers; {embeddings}{bigram} mixed in at each"]
    if values:
        said.append(f"value embeddings at {', '.join(map(str, sorted(values)))}")
    if skips:
        said.append("skips " + ", ".join(f"{source} to {target}" for target, source in sorted(skips.items())))
    said += [f"a row of the {name} is picked by {n} tokens" for name, n in several.items()]
    if more:
        said.append(f"not drawn: {', '.join(more)}")
    return "; ".join(said) + "."


def _inputs(names: list[str], middle: list[int]) -> list[str]:
    """The embeddings on top, each with a rail on the left from which it joins every layer."""
    parts = []
    for number, name in enumerate(names):
        y, x, beside = 24 + ROW * number, 20 + 30 * number, round(8 * (number - (len(names) - 1) / 2))
        rail = f"<path d='M{LEFT} {y} H{x} V{middle[-1] + beside}' {_stroke(_EMBEDDING, tip=False)}/>"
        parts += [_box(LEFT, y - 11, WIDTH, name), rail]
        parts += [_line(x, at + beside, LEFT, at + beside, _EMBEDDING) for at in middle]
    start = 24 + ROW * (len(names) - 1) + 11
    return [*parts, _line(LEFT + WIDTH // 2, start, LEFT + WIDTH // 2, middle[0] - 11, _STREAM)]


_MARKER = (
    "<defs><marker id='tip' viewBox='0 0 6 6' refX='6' refY='3' markerWidth='5' markerHeight='5' orient='auto'>"
    "<path d='M0 0 L6 3 L0 6 z' fill='context-stroke'/></marker></defs>"
)


def _stroke(colour: str, tip: bool = True) -> str:
    end = " marker-end='url(#tip)'" if tip else ""
    return f"fill='none' stroke='{colour}' stroke-width='1.5'{end}"


def _line(x1: int, y1: int, x2: int, y2: int, colour: str) -> str:
    return f"<path d='M{x1} {y1} L{x2} {y2}' {_stroke(colour)}/>"


def _text(x: int, y: int, words: str, anchor: str = "start") -> str:
    return f"<text x='{x}' y='{y}' fill='currentColor' text-anchor='{anchor}'>{html.escape(words)}</text>"


def _box(x: int, y: int, width: int, words: str) -> str:
    frame = f"<rect x='{x}' y='{y}' width='{width}' height='22' rx='4' fill='none' stroke='currentColor'/>"
    return frame + _text(x + width // 2, y + 15, words, anchor="middle")
