"""Analysis 1: character and token frequency of a corpus."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lab import plots
from lab.analyses.finding import Finding, write_finding
from lab.tokens import Tokenizer

TOP = 80


def token_counts(documents: Sequence[str], tokenizer: Tokenizer) -> Counter[int]:
    """How often each token id occurs; -1 counts what the vocabulary lacks."""
    return Counter(int(t) for d in documents for t in tokenizer.encode(d, "keep"))


def frequency(documents: Sequence[str], tokenizer: Tokenizer, out: Path) -> Finding:
    """The 80 most frequent characters and tokens, with the entropy of each distribution in bits. Tokens are counted
    by id, since two may look alike (bytes that are only parts of characters)."""
    characters = Counter(c for d in documents for c in d)
    tokens = token_counts(documents, tokenizer)
    pieces = {t: "<unknown>" if t < 0 else tokenizer.piece(t) for t in tokens}
    shown = {c: {" ": "␣", "\n": "↵", "\t": "⇥"}.get(c, c) for c in characters}
    fig, axes = plots.figure(2, 1, size=(13, 7))
    data = {}
    for (ax,), (what, counts, names) in zip(axes, (("characters", characters, shown), ("tokens", tokens, pieces))):
        total = sum(counts.values())
        top = counts.most_common(TOP)
        entropy = -sum(n / total * math.log2(n / total) for n in counts.values())
        rows = [{"id": key, "piece": names[key], "count": n} for key, n in top]
        data[what] = {"total": total, "distinct": len(counts), "entropy_bits": entropy, "top": rows}
        plots.bars(ax, [row["piece"] for row in rows], [100 * n / total for _, n in top])
        ax.set_ylabel("% of all")
        ax.set_title(f"{what}: {total:,}, {len(counts):,} different, entropy {entropy:.2f} bits")
    c, t = data["characters"], data["tokens"]
    summary = (
        f"{c['total']:,} characters ({c['distinct']} different), {t['total']:,} tokens ({t['distinct']} different)."
    )
    return write_finding(out, "frequency", summary, data, fig)
