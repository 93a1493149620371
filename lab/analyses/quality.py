"""Analysis 11: how good are the texts? Perplexity, novelty, grammaticality, repetition."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lab import LabError, plots
from lab.analyses.finding import Finding, write_finding
from lab.analyses.samples import profile
from lab.analyses.scoring import score, token_losses
from lab.checkpoints import Checkpoint
from lab.sample import generate
from lab.words import split_words


def longest_shared_run(text: str, corpus: str) -> int:
    """Length in characters of the longest piece of `text` that stands in `corpus` word for word."""
    longest = 0
    for start in range(len(text)):
        while start + longest < len(text) and text[start : start + longest + 1] in corpus:
            longest += 1
    return longest


class Nearest:
    """The document most like a text, by cosine distance of counts of character trigrams."""

    def __init__(self, documents: Sequence[str]):
        """One row a document, of length 1, in a sparse matrix, so that a text is held against all of them at once."""
        from scipy.sparse import csr_array

        self.column: dict[str, int] = {}
        columns, counts, starts = [], [], [0]
        for document in documents:
            grams = profile(document)
            columns += [self.column.setdefault(gram, len(self.column)) for gram in grams]
            counts.append(np.fromiter(grams.values(), float, len(grams)))
            counts[-1] /= max(np.linalg.norm(counts[-1]), 1e-30)
            starts.append(len(columns))
        shape = (len(documents), max(1, len(self.column)))
        self.rows = csr_array((np.concatenate(counts), columns, starts), shape=shape)

    def __call__(self, text: str) -> tuple[float, int]:
        """(distance, index of the document); among equals the last."""
        grams = profile(text)
        own = np.zeros(self.rows.shape[1])
        for gram, count in grams.items():
            if gram in self.column:
                own[self.column[gram]] = count
        likeness = self.rows @ own / max(math.sqrt(sum(n * n for n in grams.values())), 1e-30)
        index = len(likeness) - 1 - int(likeness[::-1].argmax())
        return 1.0 - float(likeness[index]), index


def repetition(words: Sequence[str], n: int = 3) -> float:
    """Share of word n-grams that the text has used before."""
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


_ENDS_WELL = re.compile(r"[.!?\u0964\u3002][\"'\u201d\u2019\u00bb)]*$")


def _begins_well(sentence: str) -> bool:
    """With a digit or a letter that is no small one, maybe in quotes; most alphabets have no small ones."""
    first = sentence.lstrip("\"'(\u201c\u2018\u00ab")[:1]
    return first.isalnum() and not first.islower()


class GrammarProxy:
    """A stand-in for grammaticality: how much of a text's word pairs good text is known to use, halved with how well
    its sentences begin and end. 1 is flawless. It sees word order only as far as neighbours go."""

    def __init__(self, documents: Sequence[str]):
        self.pairs: set[tuple[str, str]] = set()
        for document in documents:
            words = [w.lower() for w in split_words(document)]
            self.pairs.update(pairwise(words))

    def score(self, text: str) -> float:
        """From 0 to 1; 0 for a text without words."""
        words = [w.lower() for w in split_words(text)]
        if len(words) < 2:
            return 0.0
        known = sum(p in self.pairs for p in pairwise(words)) / (len(words) - 1)
        sentences = [s for s in re.split(r"(?<=[.!?\u0964])\s+|(?<=\u3002)", text.strip()) if s]
        formed = [
            _begins_well(s) and bool(re.search(r"[.!?\u0964\u3002][\"'\u201d\u2019\u00bb)]*$", s)) for s in sentences
        ]
        balanced = text.count('"') % 2 == 0
        return 0.5 * known + 0.5 * (0.8 * sum(formed) / len(formed) + 0.2 * balanced)


def assess(texts: Sequence[str], train: Sequence[str], checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """The numbers of each text against all training documents. `perplexity` is of a token; where words are tokens,
    `unknown_share` and `bits_per_byte` beside it say what that one hides (see `Score`)."""
    known = list(train)
    corpus, nearest, proxy = "\0".join(known), Nearest(known), GrammarProxy(known)
    rows = []
    for text in texts:
        ids = checkpoint.tokenizer.encode(text, "error")
        if not len(ids):
            continue
        distance, index = nearest(text)
        scored = score(checkpoint, [text], strict=False)
        shared = longest_shared_run(text, corpus)
        rows.append(
            {
                "text": text,
                "perplexity": math.exp(float(token_losses(checkpoint, ids.tolist()).mean())),
                "bits_per_byte": scored.bits_per_byte,
                "unknown_share": scored.unknown_share,
                "novelty_distance": distance,
                "nearest": known[index][:300],
                "longest_shared_run": shared,
                "copied_share": shared / len(text) if text else 0.0,
                "grammaticality": proxy.score(text),
                "repetition": repetition([w.lower() for w in split_words(text)]),
            }
        )
    return rows


MEASURES = ("perplexity", "novelty_distance", "longest_shared_run", "grammaticality", "repetition")
OF_WORDS = ("grammaticality", "repetition")  # of neighbouring words, which a text of one word has not


def quality(
    checkpoint: Checkpoint,
    train: Sequence[str],
    held_out: Sequence[str],
    out: Path,
    *,
    count: int = 8,
    prompt: str = "",
    max_tokens: int = 200,
) -> Finding:
    """Generated texts beside held-out real ones, measure by measure; real text is the yardstick. Where every text is
    one word, a name, the measures of neighbouring words are left out."""
    drawn = generate(checkpoint, prompt, count=count, max_tokens=max_tokens, temperature=0.8, seed=2)
    size = max(20, sum(len(s.text) for s in drawn) // count)
    sets = {"generated": [s.text for s in drawn if s.text], "held out": [d[:size] for d in held_out[:count]]}
    known = set(train)
    rows = {name: assess(texts, train, checkpoint) for name, texts in sets.items()}
    if not rows["generated"]:
        raise LabError("the model wrote nothing but end marks; give a prompt")
    single = all(len(split_words(text)) < 2 for texts in sets.values() for text in texts)
    measures = [m for m in MEASURES if not (single and m in OF_WORDS)]
    told = (*measures, "bits_per_byte", "unknown_share")
    means = {n: {m: sum(r[m] for r in rs) / len(rs) for m in told} for n, rs in rows.items() if rs}
    copies = sum(t in known for t in sets["generated"])
    fig, axes = plots.figure(1, len(measures), size=(2.8 * len(measures), 3.4))
    for ax, measure in zip(axes, measures):
        for i, (name, rs) in enumerate(rows.items()):
            ax.bar(i, means[name][measure], color=plots.color(i), width=0.6)
            ax.plot([i] * len(rs), [r[measure] for r in rs], "o", color="0.3", markersize=3)
        ax.set_xticks(range(len(rows)), list(rows))
        ax.set_title(measure.replace("_", " "))
        ax.grid(axis="x", visible=False)
    g = means["generated"]
    words = checkpoint.tokenizer.kind == "word"
    unknown = f" ({g['unknown_share']:.1%} unknown words; {g['bits_per_byte']:.2f} bits a byte)" if words else ""
    summary = (
        f"{count} texts: perplexity {g['perplexity']:.1f} a token{unknown}, cosine distance to the nearest of "
        f"{len(train):,} training texts {g['novelty_distance']:.2f}, longest shared run {g['longest_shared_run']:.0f} "
        f"characters{''.join(f', {m} {g[m]:.2f}' for m in OF_WORDS if m in g)}; {copies} are training texts word for "
        "word."
    )
    data = {"means": means, "texts": rows, "copies": copies, "held_against": len(train)}
    return write_finding(out, "quality", summary, data, fig)
