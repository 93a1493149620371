"""Learning watched from inside, from the checkpoints along training: layers, spelling, entropy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lab import LabError, plots
from lab.analyses.finding import Finding, write_finding
from lab.analyses.scoring import limit_documents, row_tokens_of, token_logits
from lab.checkpoints import Checkpoint, same_vocabulary
from lab.datasets import pack_rows, tokenize_documents
from lab.diagnostics import BINS, Diagnostics, draw_lines, gradient_lines, norm_lines, saturation_lines
from lab.sample import TRIES, generate, telling
from lab.words import split_words

MOST_LAYERS = 8  # drawn; the numbers have all
WRITTEN_TOKENS = 60  # of what a checkpoint writes beside its layers


def inside(checkpoints: Sequence[Checkpoint], documents: Sequence[str], out: Path, *, tokens: int = 2048) -> Finding:
    """Activations and gradients of every layer on the same `tokens` tokens at every checkpoint, and over training:
    saturation, gradient to weight, change of the weights since the checkpoint before, gain and bias of norms; beside
    them what each checkpoint writes."""
    tokenizer = same_vocabulary(checkpoints)
    unknown = "error" if tokenizer.kind == "word" else "keep"
    chosen = tokenize_documents(limit_documents(documents, 4 * tokens), tokenizer, unknown)
    row = min(row_tokens_of(checkpoints[-1]), tokens)
    idx, targets = (part[: max(1, tokens // row)] for part in pack_rows(chosen, row))
    moments, changes = [], []
    for before, checkpoint in zip([None, *checkpoints], checkpoints):
        if not list(checkpoint.model.parameters()):
            raise LabError(f"{checkpoint.name} has no weights to watch; it is counted")
        moments.append(Diagnostics(checkpoint.model, tokenizer.vocab_size).look(checkpoint.step, idx, targets))
        if before is not None and before.step < checkpoint.step:
            changes.append({"step": checkpoint.step, "since": before.step, "change": _change(before, checkpoint)})
    how = {"count": TRIES, "max_tokens": WRITTEN_TOKENS, "temperature": 0.8, "seed": 1}
    drawn = [telling(generate(c, "", **how)) for c in checkpoints]
    texts = [{"step": c.step, "text": s.text + ("" if s.ended else " ...")} for c, s in zip(checkpoints, drawn)]
    last = moments[-1]
    flat = [n for n, layer in last["layers"].items() if layer["squashed"] and layer["saturated"] > 0.5]
    summary = (
        f"{len(moments)} checkpoints on the same {idx.numel():,} tokens: loss {moments[0]['loss']:.3f} to "
        f"{last['loss']:.3f}; more than half saturated at the end: {', '.join(flat) or 'no layer'}."
    )
    data = {"moments": moments, "changes": changes, "samples": texts}
    return write_finding(out, "inside", summary, data, _small(moments, changes, texts))


def _change(before: Checkpoint, after: Checkpoint) -> dict[str, float]:
    """Size of the change of every matrix over its size before."""
    old = dict(before.model.named_parameters())
    found = {}
    for name, p in after.model.named_parameters():
        size = float(old[name].detach().float().norm())
        if p.ndim >= 2 and size:
            found[name] = float((p.detach().float() - old[name].detach().float()).norm()) / size
    return found


def _small(moments: list[dict[str, Any]], changes: list[dict[str, Any]], texts: list[dict[str, Any]]) -> Any:
    """Small multiples: a column a layer with activations above and gradients below, then a row of lines; at the foot
    what was written."""
    layers = list(moments[-1]["layers"])[:MOST_LAYERS]
    columns = max(4, len(layers))
    fig, axes = plots.figure(4, columns, size=(3 * columns, 8 + 0.2 * len(texts)))
    for ax in axes[3]:
        ax.axis("off")
    for i, row in enumerate(texts):
        words = f"step {row['step']:<9,} {row['text'].replace(chr(10), ' ')}"
        place = (0, 0.95 - (i + 0.5) / max(6, len(texts)))
        cut = plots.short(words, 33 * columns)
        axes[3][0].text(*place, cut, fontsize=8, family=plots.MONO).set_in_layout(False)
    for row, what in enumerate(("activation", "gradient")):
        for ax, name in zip(axes[row], [*layers, *[None] * columns]):
            if name is None:
                ax.axis("off")
                continue
            for i, moment in enumerate(moments):
                h = moment["layers"][name][what]
                width, peak = (h["high"] - h["low"]) / BINS, max(h["density"])
                if not h["std"]:
                    continue  # nothing flows yet where the output layer starts at zero
                x = [h["low"] + (k + 0.5) * width for k in range(BINS)]
                y = [density / peak for density in h["density"]]
                ax.plot(x, y, color=plots.shade(i, len(moments)), label=f"step {moment['step']:,}")
            ax.set_title(f"{name}: {what}s")
            ax.set_yticks([])
            plots.few_numbers(ax)
    if layers and axes[0][0].lines:
        axes[0][0].legend(fontsize=6)
    change: dict[str, list[tuple[int, float]]] = {}
    for entry in changes:
        for name, value in entry["change"].items():
            change.setdefault(name, []).append((entry["step"], value))
    draw_lines(axes[2][0], saturation_lines(moments), "saturated units, %")
    draw_lines(axes[2][1], gradient_lines(moments), "log10 of gradient to weight")
    draw_lines(axes[2][2], change, "change since the last checkpoint")
    draw_lines(axes[2][3], norm_lines(moments), "gain and bias of norms, mean")
    for ax in axes[2][4:]:
        ax.axis("off")
    return fig


def spelling(
    checkpoints: Sequence[Checkpoint],
    train: Sequence[str],
    out: Path,
    *,
    prompt: str = "",
    count: int = 20,
    max_tokens: int = 100,
    names: bool = False,
) -> Finding:
    """Share of the words in `count` samples of each checkpoint that the training text has too (`names`: whole
    documents instead, without those that are copied: then what counts is the share of copies)."""
    same_vocabulary(checkpoints)
    known = set(train) if names else {w.lower() for d in train for w in split_words(d) if w[0].isalpha()}
    table = []
    for checkpoint in checkpoints:
        drawn = generate(checkpoint, prompt, count=count, max_tokens=max_tokens, temperature=0.8, seed=3)
        texts = [s.written for s in drawn if s.written]
        words = texts if names else [w.lower() for t in texts for w in split_words(t) if w[0].isalpha()]
        share = sum(w in known for w in words) / len(words) if words else 0.0
        table.append({"step": checkpoint.step, "words": len(words), "known_share": share, "examples": words[:12]})
    fig, ax = plots.figure(size=(7, 3.6))
    steps = plots.places_of([r["step"] for r in table])
    ax.plot(steps, [100 * r["known_share"] for r in table], "o-", color=plots.color(0))
    what = "names that are names of the training text" if names else "words that the training text has"
    plots.step_axis(ax)
    ax.set_ylim(-2, 102)
    ax.set_ylabel("%")
    ax.set_title(f"Spelling along training: {what}")
    summary = f"Of {count} samples each, {what}: {table[0]['known_share']:.0%} at step {table[0]['step']:,}, "
    summary += f"{table[-1]['known_share']:.0%} at step {table[-1]['step']:,}."
    return write_finding(out, "spelling", summary, {"prompt": prompt, "table": table}, fig)


@torch.no_grad()
def entropy(checkpoints: Sequence[Checkpoint], documents: Sequence[str], out: Path, *, chars: int = 5000) -> Finding:
    """Mean entropy of the next-token distribution on held-out text along training, beside the loss there: a model
    that knows what it does not know has the two alike (calibration)."""
    tokenizer = same_vocabulary(checkpoints)
    unknown = "error" if tokenizer.kind == "word" else "keep"
    encoded = [tokenizer.encode(d, unknown) for d in limit_documents(documents, chars)]
    table = []
    for checkpoint in checkpoints:
        total, nats, places = 0.0, 0.0, 0
        for ids in encoded:
            targets = [*(int(i) for i in ids if i >= 0), tokenizer.mark]
            logp = token_logits(checkpoint, targets).log_softmax(-1)
            total -= float((logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum())
            nats -= float(logp[range(len(targets)), targets].sum())
            places += len(targets)
        table.append({"step": checkpoint.step, "entropy_nats": total / places, "loss": nats / places})
    fig, ax = plots.figure(size=(7, 3.6))
    steps = plots.places_of([r["step"] for r in table])
    ax.plot(steps, [r["entropy_nats"] for r in table], "o-", color=plots.color(0), label="entropy of what it expects")
    ax.plot(steps, [r["loss"] for r in table], "o-", color=plots.color(1), label="loss: surprise at what came")
    plots.step_axis(ax)
    ax.set_ylim(bottom=0)
    ax.set_ylabel("nats a token, held-out text")
    ax.legend()
    ax.set_title(f"Mean entropy along training, {places:,} places")
    last = table[-1]
    summary = (
        f"On {places:,} held-out places the last checkpoint expects {last['entropy_nats']:.3f} nats and pays "
        f"{last['loss']:.3f}: {'over' if last['loss'] > last['entropy_nats'] else 'under'}confident by "
        f"{abs(last['loss'] - last['entropy_nats']):.3f}."
    )
    return write_finding(out, "entropy", summary, {"table": table}, fig)
