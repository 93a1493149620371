"""Analysis 1: character and token frequency of a corpus."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lab import plots
from lab.analyses.finding import Finding, write_finding
from lab.tokens import Tokenizer

TOP = 80


def frequency(documents: Sequence[str], tokenizer: Tokenizer, out: Path) -> Finding:
    """The 80 most frequent characters and tokens, with the entropy of each distribution in bits."""
    characters = Counter(c for d in documents for c in d)
    tokens = Counter(int(t) for d in documents for t in tokenizer.encode(d, "keep"))
    named = Counter({"<unknown>" if t < 0 else tokenizer.piece(t): n for t, n in tokens.items()})
    shown = Counter({{" ": "␣", "\n": "↵"}.get(c, c): n for c, n in characters.items()})
    fig, axes = plots.figure(2, 1, size=(13, 7))
    data = {}
    for (ax,), (what, counts) in zip(axes, (("characters", shown), ("tokens", named))):
        total = sum(counts.values())
        top = counts.most_common(TOP)
        entropy = -sum(n / total * math.log2(n / total) for n in counts.values())
        data[what] = {"total": total, "distinct": len(counts), "entropy_bits": entropy, "top": dict(top)}
        ax.bar(range(len(top)), [100 * n / total for _, n in top], color=plots.color(0))
        small = max(len(name) for name, _ in top) > 2
        names = [name.replace("$", r"\$") for name, _ in top]
        ax.set_xticks(range(len(top)), names, rotation=90 if small else 0, fontsize=7 if small else 9)
        ax.set_xlim(-1, len(top))
        ax.set_ylabel("% of all")
        ax.set_title(f"{what}: {total:,}, {len(counts):,} different, entropy {entropy:.2f} bits")
        ax.grid(axis="x", visible=False)
    c, t = data["characters"], data["tokens"]
    summary = (
        f"{c['total']:,} characters ({c['distinct']} different), {t['total']:,} tokens ({t['distinct']} different)."
    )
    return write_finding(out, "frequency", summary, data, fig)
