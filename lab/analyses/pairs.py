"""Pairs of tokens counted, beside what a model learned of them; and its embeddings in two dimensions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lab import LabError, plots
from lab.analyses.finding import Finding, write_finding
from lab.checkpoints import Checkpoint, same_vocabulary
from lab.tokens import UNKNOWN, Tokenizer

MOST_SYMBOLS = 30  # of a map whose cells can be read
MOST_EMBEDDINGS = 60  # tokens in the plane, among which neighbours are looked for
ROWS_AT_ONCE = 256  # given to the model; all rows of 5,000 tokens would need gigabytes


def count_pairs(documents: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """(V, V) counts of token a followed by token b, the mark before and after every document included; pairs with
    text that the vocabulary lacks are left out."""
    V = tokenizer.vocab_size
    counts = np.zeros((V, V), dtype=np.int64)
    for document in documents:
        ids = np.concatenate([[tokenizer.mark], tokenizer.encode(document, "keep"), [tokenizer.mark]])
        a, b = ids[:-1], ids[1:]
        known = (a >= 0) & (b >= 0)
        np.add.at(counts, (a[known], b[known]), 1)
    return counts


@torch.no_grad()
def learned_pairs(checkpoint: Checkpoint, tokens: Sequence[int]) -> Tensor:
    """P(next | token alone) for each of `tokens`, (len(tokens), V): the model given nothing but the opening mark
    and one token (the mark itself: nothing more)."""
    mark, parts = checkpoint.tokenizer.mark, []
    for start in range(0, len(tokens), ROWS_AT_ONCE):
        some = tokens[start : start + ROWS_AT_ONCE]
        p = checkpoint.model.logits(torch.tensor([[mark, t] for t in some])).float().softmax(-1)
        parts.append(torch.stack([p[i, 0 if t == mark else 1] for i, t in enumerate(some)]))
    return torch.cat(parts)


def divergence_of(checkpoint: Checkpoint, counts: np.ndarray) -> float:
    """Kullback-Leibler divergence of the model's table of single tokens from the counts of pairs, in nats: the mean
    over every token that was followed by another, as often as it was."""
    total = 0.0
    tokens = np.flatnonzero(counts.sum(1)).tolist()
    for start in range(0, len(tokens), ROWS_AT_ONCE):
        some = tokens[start : start + ROWS_AT_ONCE]
        often = counts[some].sum(1, keepdims=True)
        learned = learned_pairs(checkpoint, some).double().numpy()
        total += float((often[:, 0] * _divergence(counts[some] / often, learned)).sum())
    return max(0.0, total / counts.sum())  # of two equal tables rounding can leave a hair less than nothing


def pairs(checkpoint: Checkpoint, documents: Sequence[str], out: Path) -> Finding:
    """The count matrix of pairs as a heat map with pairs and counts, beside the model's own table of the same
    tokens; the commonest MOST_SYMBOLS tokens."""
    tokenizer = checkpoint.tokenizer
    if tokenizer.vocab_size > 5000:
        raise LabError(f"a table of {tokenizer.vocab_size:,} by {tokenizer.vocab_size:,} pairs is too large to count")
    counts = count_pairs(documents, tokenizer)
    often = np.argsort(-counts.sum(1), kind="stable")[:MOST_SYMBOLS]
    shown = sorted((int(t) for t in often if counts[t].sum()), key=lambda t: (t != tokenizer.mark, t))
    table = counts[np.ix_(shown, shown)]
    learned = learned_pairs(checkpoint, shown).double().numpy()
    divergence = divergence_of(checkpoint, counts)
    pieces = ["•" if t == tokenizer.mark else tokenizer.piece(t) for t in shown]
    fig, axes = plots.figure(1, 2, size=(22, 11.8))
    _heat(axes[0], table, pieces, lambda i, j: f"{pieces[i]}{pieces[j]}\n{table[i, j]}")
    axes[0].set_title(f"pairs counted: {int(counts.sum()):,}, of the {len(shown)} commonest tokens (• is the mark)")
    _heat(axes[1], learned[:, shown], pieces, lambda i, j: f"{100 * learned[i, shown[j]]:.1f}")
    axes[1].set_title(f"{checkpoint.name}, step {checkpoint.step:,}: P(next | this token alone), %")
    top = [(pieces[i], pieces[j], int(table[i, j])) for i, j in _largest(table, 10) if table[i, j]]
    told = ", ".join(f"{a}{b} {n:,}" for a, b, n in top[:5])
    summary = (
        f"Commonest pairs: {told}. The model's table of single tokens lies {divergence:.4f} nats a token above the "
        "counts (Kullback-Leibler)."
    )
    data = {
        "pairs": int(counts.sum()),
        "tokens": [{"id": t, "piece": p} for t, p in zip(shown, pieces)],
        "counts": table.tolist(),
        "learned": np.round(learned[:, shown], 6).tolist(),
        "divergence_nats": divergence,
        "top": top,
    }
    return write_finding(out, "pairs", summary, data, fig)


def _divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """sum_b p log(p / q) of each row."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(np.maximum(q, 1e-300))), 0.0).sum(1)


def _largest(table: np.ndarray, count: int) -> list[tuple[int, int]]:
    order = np.argsort(-table, axis=None, kind="stable")[:count]
    return [divmod(int(i), table.shape[1]) for i in order]


def _heat(ax: Any, values: np.ndarray, pieces: Sequence[str], cell: Any) -> None:
    shown = np.sqrt(values)  # counts span decades; the square root keeps the middle ones apart
    ax.imshow(shown, cmap="Blues")
    small = 5 if len(pieces) > 15 else 8
    for i in range(len(pieces)):
        for j in range(len(pieces)):
            depth = shown[i, j] / (shown.max() or 1.0)
            colour = "white" if depth > 0.55 else "black" if depth > 0.1 else "0.5"
            ax.text(j, i, plots.plain(cell(i, j)), ha="center", va="center", fontsize=small, color=colour)
    names = [plots.plain(p) for p in pieces]
    ax.set_xticks(range(len(names)), names, fontsize=7)
    ax.set_yticks(range(len(names)), names, fontsize=7)
    ax.grid(False)


def embedding_of(checkpoint: Checkpoint) -> Tensor:
    """The first token embedding table, (V, E), whose row belongs to one token in every model; LabError for a rung
    without one."""
    tables = [t for t in checkpoint.model.token_embeddings() if isinstance(t, nn.Embedding)]
    if not tables:
        raise LabError(f"{checkpoint.name} has no embeddings; it is a table of counts")
    return tables[0].weight.detach().float()


def neighbours(vectors: Tensor, tokens: Sequence[int], count: int = 5) -> dict[int, list[tuple[int, float]]]:
    """{token: its nearest other tokens among `tokens`, with the cosine of the angle between them}."""
    unit = torch.nn.functional.normalize(vectors[list(tokens)], dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(-2.0)
    best = cosines.topk(min(count, len(tokens) - 1), dim=1)
    return {
        t: [(tokens[int(j)], float(c)) for j, c in zip(best.indices[i], best.values[i])] for i, t in enumerate(tokens)
    }


def in_the_plane(vectors: Tensor) -> tuple[Tensor, float]:
    """((N, 2) coordinates, share of the variance that they keep): the vectors themselves if they have two numbers,
    else their two principal components."""
    centred = vectors - vectors.mean(0)
    if vectors.shape[1] == 2:
        return vectors, 1.0
    _, size, axes = torch.linalg.svd(centred, full_matrices=False)
    return centred @ axes[:2].T, float((size[:2] ** 2).sum() / (size**2).sum().clamp_min(1e-30))


def embeddings(checkpoints: Sequence[Checkpoint], documents: Sequence[str], out: Path) -> Finding:
    """The commonest tokens' embeddings in two dimensions, and nearest neighbours by cosine, before and after
    training (the first and the last checkpoint)."""
    tokenizer = same_vocabulary(checkpoints)
    counts: dict[int, int] = {}
    for document in documents:
        for t, n in zip(*np.unique(tokenizer.encode(document, "keep"), return_counts=True)):
            counts[int(t)] = counts.get(int(t), 0) + int(n)
    counts.pop(UNKNOWN, None)
    tokens = sorted(counts, key=lambda t: -counts[t])[:MOST_EMBEDDINGS]
    if len(tokens) < 2:
        raise LabError("the text has fewer than two different tokens; there are no neighbours")
    fig, axes = plots.figure(1, 2, size=(13, 6.2))
    data: dict[str, Any] = {}
    for ax, (when, checkpoint) in zip(axes, (("before", checkpoints[0]), ("after", checkpoints[-1]))):
        vectors = embedding_of(checkpoint)
        plane, kept = in_the_plane(vectors[tokens])
        plots.label_points(ax, plane.tolist(), [tokenizer.piece(t) for t in tokens])
        ax.set_title(f"{when}: step {checkpoint.step:,}; two dimensions keep {kept:.0%} of the variance")
        near = neighbours(vectors, tokens)
        data[when] = {
            "step": checkpoint.step,
            "kept_variance": kept,
            "neighbours": {
                f"{t} {tokenizer.piece(t)}": [[tokenizer.piece(o), o, round(c, 4)] for o, c in near[t]] for t in tokens
            },
        }
    near = data["after"]["neighbours"]
    told = "; ".join(f"{key.split(' ', 1)[1]}: {', '.join(o for o, _, _ in near[key][:3])}" for key in list(near)[:4])
    several = checkpoints[-1].several_tokens("such a table has no row of a token and is not shown")
    among = f"the {len(tokens)} commonest of {len(counts)} tokens" if len(counts) > len(tokens) else "all tokens"
    summary = f"Nearest by cosine after training, among {among}: {told}.{several}"
    return write_finding(out, "embeddings", summary, data, fig)
