"""Analyses 3 and 4: samples along training, and how samples of one model differ."""

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from lab import LabError, plots
from lab.analyses.finding import Finding, write_finding
from lab.checkpoints import Checkpoint, same_vocabulary
from lab.sample import generate


def samples_along(
    checkpoints: Sequence[Checkpoint], prompt: str, out: Path, *, max_tokens: int = 120, seed: int = 0
) -> Finding:
    """What each checkpoint writes after the same prompt, from the same random numbers."""
    same_vocabulary(checkpoints)
    rows = []
    for checkpoint in checkpoints:
        sample = generate(checkpoint, prompt, max_tokens=max_tokens, temperature=0.8, seed=seed)[0]
        rows.append({"step": checkpoint.step, "text": sample.text, "ended": sample.ended})
    fig = text_figure([(f"step {r['step']:,}", r["text"]) for r in rows], f"After {prompt!r}, along training")
    summary = f"{len(rows)} checkpoints continue {prompt!r}; {sum(r['ended'] for r in rows)} end by themselves."
    return write_finding(out, "samples", summary, {"prompt": prompt, "samples": rows}, fig)


def text_figure(rows: Sequence[tuple[str, str]], title: str, width: int = 100, most_lines: int = 5) -> Any:
    """A picture of labelled texts, wrapped."""
    blocks = []
    for label, text in rows:
        lines = textwrap.wrap(text.replace("\n", " ↵ "), width) or [""]
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
        ax.text(0.11, y, block.replace("$", r"\$"), va="top", fontsize=9, family="DejaVu Sans Mono")
        y -= height
    ax.set_title(title.replace("$", r"\$"))
    return fig


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct-n (Li et al. 2016): different n-grams of characters over all n-grams of all texts; 0 if there are
    none."""
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
