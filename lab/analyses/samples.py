"""Analyses 3 and 4: samples along training, and how samples of one model differ."""

import html
import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from lab import LabError, plots
from lab.analyses.finding import Finding, write_finding
from lab.analyses.scoring import token_logits
from lab.checkpoints import Checkpoint, same_vocabulary
from lab.sample import generate

SYMBOL_TOKENS = 200  # of a sample, and of a document, whose symbols are counted


def samples_along(
    checkpoints: Sequence[Checkpoint],
    prompt: str,
    out: Path,
    *,
    max_tokens: int = 120,
    seed: int = 0,
    picture: bool = True,
) -> Finding:
    """What each checkpoint writes after the same prompt, from the same random numbers. Pages show it as text, and need
    no `picture`."""
    same_vocabulary(checkpoints)
    rows = []
    for checkpoint in checkpoints:
        sample = generate(checkpoint, prompt, max_tokens=max_tokens, temperature=0.8, seed=seed)[0]
        rows.append({"step": checkpoint.step, "text": sample.text, "ended": sample.ended})
    lines = [(f"step {r['step']:,}", r["text"]) for r in rows]
    fig = text_figure(lines, f"After {prompt!r}, along training") if picture else None
    summary = f"{len(rows)} checkpoints continue {prompt!r}; {sum(r['ended'] for r in rows)} end by themselves."
    lines = (f"<tr><td>{r['step']:,}<td>{html.escape(r['text'])}</tr>" for r in rows)
    table = f"<table class=samples><tr><th>step<th>text</tr>{''.join(lines)}</table>"
    return write_finding(out, "samples", summary, {"prompt": prompt, "samples": rows}, fig, table)


def text_figure(rows: Sequence[tuple[str, str]], title: str, width: int = 100, most_lines: int = 5) -> Any:
    """A picture of labelled texts, wrapped."""
    blocks = []
    for label, text in rows:
        text = plots.legible(text.replace("\n", " ↵ "))
        letters = max(1, width * len(text) // max(1, plots.columns(text)))  # fewer of those that are wide
        lines = textwrap.wrap(text, letters) or [""]
        cut = lines[:most_lines]
        blocks.append((label, "\n".join([*cut[:-1], cut[-1] + " ..."] if len(lines) > most_lines else cut)))
    heights = [b.count("\n") + 1.7 for _, b in blocks]
    fig, ax = plots.figure(size=(11, 0.2 * sum(heights) + 0.6))
    ax.axis("off")
    ax.set_ylim(-sum(heights), 0)
    ax.set_xlim(0, 1)
    y = 0.0
    for (label, block), height in zip(blocks, heights):
        ax.text(0, y, label, va="top", fontsize=9, color=plots.color(0), weight="bold")
        ax.text(0.11, y, plots.plain(block), va="top", fontsize=9, family=plots.MONO)
        y -= height
    ax.set_title(plots.plain(title))
    return fig


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n (Li et al. 2016): different n-grams of characters over all n-grams of all texts; 0 if there
    are none."""
    grams = [t[i : i + n] for t in texts for i in range(len(t) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def profile(text: str, n: int = 3) -> Counter:
    """Counts of a text's character n-grams, its ends padded with spaces."""
    padded = f" {text.lower()} "
    return Counter(padded[i : i + n] for i in range(max(0, len(padded) - n + 1)))


def cosine(a: Counter, b: Counter) -> float:
    """Cosine similarity of two profiles; 0 if one is empty."""
    dot = sum(n * b[g] for g, n in a.items() if g in b)
    norms = math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
    return dot / norms if norms else 0.0


def variability(checkpoint: Checkpoint, prompt: str, out: Path, *, count: int = 8, max_tokens: int = 120) -> Finding:
    """Several samples of one model: distinct-n, and self-similarity (mean cosine of character trigrams over pairs),
    at three temperatures."""
    if count < 2:
        raise LabError(f"variability needs at least two samples, not {count}")
    table = []
    for temperature in (0.5, 0.8, 1.0):
        drawn = generate(checkpoint, prompt, count=count, max_tokens=max_tokens, temperature=temperature, seed=1)
        texts = [s.written for s in drawn]
        profiles = [profile(t) for t in texts]
        pairs = [cosine(a, b) for a, b in combinations(profiles, 2)]
        numbers = {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3, 4)}
        row = {"temperature": temperature, "self_similarity": sum(pairs) / len(pairs), **numbers}
        row |= {"different": len(set(texts)), "mean_characters": sum(map(len, texts)) / count, "texts": texts}
        table.append(row)
    last = table[-1]
    rows = []
    for r in table:
        label = f"T={r['temperature']}"
        head = (
            f"distinct-2 {r['distinct_2']:.2f}, distinct-4 {r['distinct_4']:.2f}, similarity {r['self_similarity']:.2f}"
        )
        rows.append((label, head))
        rows += [("", prompt + t) for t in r["texts"][:4]]
    fig = text_figure(rows, f"Samples of {checkpoint.label} after {prompt!r}", most_lines=2)
    summary = (
        f"{count} samples at temperature 1: distinct-2 {last['distinct_2']:.2f}, distinct-4 {last['distinct_4']:.2f}, "
        f"self-similarity {last['self_similarity']:.2f}."
    )
    return write_finding(out, "variability", summary, {"prompt": prompt, "table": table}, fig)


def symbols(checkpoint: Checkpoint, documents: Sequence[str], out: Path, *, count: int = 40) -> Finding:
    """How often the model writes each character, beside how often the corpus has it: `count` samples without a prompt
    at temperature 1, where the two should agree. Both are cut at SYMBOL_TOKENS: how a document begins says more of
    its beginning than of the rest."""
    tokenizer = checkpoint.tokenizer
    drawn = generate(checkpoint, "", count=count, max_tokens=SYMBOL_TOKENS, seed=4)
    beginnings = (tokenizer.encode(d, "keep")[:SYMBOL_TOKENS] for d in documents)
    read = (tokenizer.decode(int(t) for t in ids if t >= 0) for ids in beginnings)
    written = Counter(c for s in drawn for c in s.written if c != "\ufffd")  # bytes that are half a character
    corpus = Counter(c for text in read for c in text if c != "\ufffd")
    if not written:
        raise LabError("the model wrote nothing but end marks; there is nothing to count")
    shown = [c for c, _ in (corpus + written).most_common(40)]
    names = [{" ": "␣", "\n": "↵"}.get(c, c) for c in shown]
    fig, ax = plots.figure(size=(12, 3.8))
    for i, (label, counts) in enumerate((("corpus", corpus), ("written", written))):
        values = [100 * counts[c] / sum(counts.values()) for c in shown]
        ax.bar([x + 0.4 * i for x in range(len(shown))], values, width=0.4, color=plots.color(i), label=label)
    ax.set_xticks([x + 0.2 for x in range(len(shown))], [plots.plain(n) for n in names])
    ax.set_ylabel("% of all characters")
    ax.legend()
    every = corpus.keys() | written.keys()
    distance = 0.5 * sum(abs(corpus[c] / sum(corpus.values()) - written[c] / sum(written.values())) for c in every)
    ax.set_title(f"{checkpoint.label}: symbols written and read, in the first {SYMBOL_TOKENS} tokens of each text")
    table = [{"symbol": c, "corpus": corpus[c], "written": written[c]} for c in shown]
    summary = (
        f"{sum(written.values()):,} characters written: {distance:.1%} of them would have to be others for their "
        "frequencies to be the corpus's (total variation)."
    )
    return write_finding(out, "symbols", summary, {"table": table, "total_variation": distance}, fig)


@torch.no_grad()
def positions(checkpoint: Checkpoint, prompt: str, out: Path, *, count: int = 12, top: int = 6) -> Finding:
    """What the model expects at several generated positions in a row: the likeliest tokens at each, the one that was
    drawn (temperature 0.8), and the entropy."""
    drawn = generate(checkpoint, prompt, max_tokens=count, temperature=0.8, seed=5)[0]
    mark = checkpoint.tokenizer.mark
    written = [*drawn.ids, mark] if drawn.ended else drawn.ids
    start = checkpoint.encode_prompt(prompt)[1:]
    logits = token_logits(checkpoint, [*start, *written])[len(start) :]
    piece = checkpoint.tokenizer.piece
    table = []
    for token, row in zip(written, logits):
        p = row.softmax(-1)
        best = p.topk(min(top, len(p)))
        likeliest = [[piece(int(t)), float(v), int(t)] for t, v in zip(best.indices, best.values)]
        entropy = float(-(p * p.clamp_min(1e-30).log()).sum())
        told = {"drawn": piece(token), "drawn_id": token, "p": float(p[token])}
        table.append(told | {"entropy_nats": entropy, "top": likeliest})
    fig, ax = plots.figure(size=(max(6, 0.9 * len(table) + 1), 3.6))
    values = [[r["top"][k][1] if k < len(r["top"]) else 0.0 for r in table] for k in range(top)]
    ax.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for j, r in enumerate(table):
        for k, (name, p, token) in enumerate(r["top"]):
            weight = "bold" if token == r["drawn_id"] else "normal"  # two tokens may look alike
            text = f"{plots.short(name, 8)}\n{p:.0%}"
            colour = "white" if p > 0.6 else "black"
            ax.text(j, k, text, ha="center", va="center", fontsize=7, color=colour, weight=weight)
    ax.set_xticks(range(len(table)), [f"{plots.plain(r['drawn'])}\n{r['entropy_nats']:.2f}" for r in table], fontsize=8)
    ax.set_yticks([])
    ax.set_xlabel("token drawn, and the entropy before it")
    ax.grid(False)
    ax.set_title(f"after {plots.plain(repr(prompt[-40:]))}, place by place")
    surest = min(table, key=lambda r: r["entropy_nats"])
    summary = f"{len(table)} places after {prompt!r}: surest before {surest['drawn']!r}."
    return write_finding(out, "positions", summary, {"prompt": prompt, "table": table}, fig)
