"""Analyses 5 to 8: losses recomputed, models by corpora, and what a model learns of another corpus in 200 steps."""

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

from lab import LabError, plots
from lab.analyses.finding import Finding, write_finding
from lab.analyses.scoring import limit_documents, row_tokens_of, score, told_limit
from lab.checkpoints import Checkpoint, same_vocabulary
from lab.datasets import row_batches, tokenize_documents
from lab.sample import generate
from lab.train import evaluate

TELL_S = 10.0  # seconds between lines on what takes long


def losses(
    checkpoints: Sequence[Checkpoint], documents: Mapping[str, Sequence[str]], out: Path, *, chars: int = 100_000
) -> Finding:
    """Train and validation loss recomputed from the checkpoints, on the first `chars` characters of each split."""
    same_vocabulary(checkpoints)
    table = []
    for checkpoint in checkpoints:
        row = {"step": checkpoint.step}
        for name in ("train", "val"):
            row[name] = score(checkpoint, limit_documents(documents[name], chars)).nats_per_token
        table.append(row)
    fig, ax = plots.figure()
    for i, name in enumerate(("train", "val")):
        steps = plots.places_of([r["step"] for r in table])
        ax.plot(steps, [r[name] for r in table], "o-", color=plots.color(i), label=name)
    plots.step_axis(ax)
    ax.set_ylabel("nats a token")
    ax.set_title(f"{checkpoints[-1].label}: losses recomputed from checkpoints")
    ax.legend()
    last = table[-1]
    summary = (
        f"At step {last['step']:,}: train {last['train']:.4f} nats a token on {told_limit(documents['train'], chars)}, "
        f"validation {last['val']:.4f} on {told_limit(documents['val'], chars)}."
    )
    return write_finding(out, "losses", summary, {"table": table, "limit_chars": chars}, fig)


def domains(
    models: Mapping[str, Checkpoint], corpora: Mapping[str, Sequence[str]], out: Path, *, chars: int = 100_000
) -> Finding:
    """Every model on every corpus, in nats a token and bits a byte. Characters that a vocabulary lacks are charged
    8 bits a byte and reported. Row: model; column: corpus (held-out documents)."""
    names, texts = list(models), list(corpora)
    limited = {t: limit_documents(corpora[t], chars) for t in texts}
    cells = {m: {t: dataclasses.asdict(score(models[m], limited[t], strict=False)) for t in texts} for m in names}
    verdicts = {key: diagonal_is_least(cells, key) for key in ("nats_per_token", "bits_per_byte")}
    fig, axes = plots.figure(1, 2, size=(12, 1.6 + 0.9 * len(names)))
    for ax, (key, title) in zip(axes, (("nats_per_token", "nats a token"), ("bits_per_byte", "bits a byte"))):
        values = [[c[key] if judged(c) else math.nan for c in cells[m].values()] for m in names]
        ax.imshow(values, cmap=plots.masked_blues(), aspect="auto", vmin=0)
        middle = max(v for row in values for v in row if not math.isnan(v)) * 0.6
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                words = "all unknown" if math.isnan(value) else f"{value:.2f}"
                ax.text(j, i, words, ha="center", va="center", color="white" if value > middle else "black")
        ax.set_xticks(range(len(texts)), texts)
        ax.set_yticks(range(len(names)), names)
        ax.set_xlabel("corpus")
        ax.set_ylabel("model")
        ax.set_title(title)
        ax.grid(False)
    every = [c for row in cells.values() for c in row.values()]
    unknown = max(c["unknown_share"] for c in every if judged(c))
    left = sum(not judged(c) for c in every)
    cells_are = "1 cell is" if left == 1 else f"{left} cells are"
    not_judged = f"; {cells_are} not judged, as all of the text is unknown there" if left else ""
    summary = (
        f"{len(names)} models by {len(texts)} corpora; every diagonal value the least of its row and column: "
        f"nats {'yes' if verdicts['nats_per_token'] else 'no'}, bits a byte "
        f"{'yes' if verdicts['bits_per_byte'] else 'no'}; at most {unknown:.1%} of a text unknown to a vocabulary"
        f"{not_judged}. Scored of each: {'; '.join(f'{t}, {told_limit(corpora[t], chars)}' for t in texts)}."
    )
    data = {"cells": cells, "diagonal_is_least": verdicts, "limit_chars": chars}
    return write_finding(out, "domains", summary, data, fig)


def judged(cell: Mapping[str, Any]) -> bool:
    """Whether a cell says anything: where all of a text is unknown to the vocabulary only end marks were scored."""
    return cell["unknown_share"] < 1.0


def diagonal_is_least(cells: Mapping[str, Mapping[str, Mapping[str, Any]]], key: str) -> bool:
    """Whether each model with a corpus of its own name scores least there, along its row and its column, among the
    cells that can be `judged`."""

    def least(model: str, beside: Iterable[Mapping[str, Any]]) -> bool:
        return all(cells[model][model][key] <= cell[key] for cell in beside if judged(cell))

    shared = [m for m in cells if m in cells[m] and judged(cells[m][m])]
    return all(least(m, cells[m].values()) and least(m, (row[m] for row in cells.values())) for m in shared)


def fine_tune(
    checkpoint: Checkpoint,
    train: Sequence[str],
    val: Sequence[str],
    *,
    steps: int = 200,
    every: int = 50,
    rate: float = 1e-3,
    batch_tokens: int = 2048,
    prompt: str = "",
    seed: int = 0,
    watched: Mapping[str, Sequence[str]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[dict[str, Any]]:
    """Train a copy of the model on other documents with AdamW; loss and a sample at 0, `every`, ..., `steps`, and
    the loss on each of the `watched` texts. `progress` is told each of these lines, and where steps take long, how far
    it is every TELL_S seconds. The vocabulary stays, so its unknown characters are neither learned nor scored."""
    model = copy.deepcopy(checkpoint.model)
    if not list(model.parameters()):
        raise LabError(f"{checkpoint.name} has no parameters to fine-tune; it is counted")
    tuned = dataclasses.replace(checkpoint, model=model)
    row = min(row_tokens_of(checkpoint), batch_tokens)
    tokens = {n: tokenize_documents(d, checkpoint.tokenizer, _keep(checkpoint)) for n, d in (("t", train), ("v", val))}
    seen = {n: tokenize_documents(d, checkpoint.tokenizer, _keep(checkpoint)) for n, d in (watched or {}).items()}
    batches = row_batches(tokens["t"], row, max(1, batch_tokens // row), seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    table, spoke = [], time.monotonic()
    for step in range(steps + 1):
        if step % every == 0:
            model.eval()
            sample = generate(tuned, prompt, max_tokens=100, temperature=0.8, seed=seed)[0]
            loss = evaluate(model, tokens["v"], row)
            others = {name: evaluate(model, t, row) for name, t in seen.items()}
            table.append({"step": step, "loss": loss, "sample": sample.text, **others})
            if progress:
                told = "".join(f", {name} {value:.3f}" for name, value in others.items())
                progress(f"fine-tuning: step {step} of {steps}, loss {loss:.3f}{told}")
            spoke = time.monotonic()
        elif progress and time.monotonic() - spoke >= TELL_S:
            progress(f"fine-tuning: step {step} of {steps}")
            spoke = time.monotonic()
        if step < steps:
            model.train()
            loss = model(*next(batches))[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return table


def unknown_share(checkpoint: Checkpoint, documents: Sequence[str]) -> float:
    """Share of the tokens of a text that the vocabulary lacks: -1, or the unknown word."""
    ids = tokenize_documents(documents, checkpoint.tokenizer, "keep").ids
    return float((ids < 0).mean()) if len(ids) else 0.0


def _keep(checkpoint: Checkpoint) -> str:
    return "error" if checkpoint.tokenizer.kind == "word" else "keep"


def fewshot(
    checkpoints: Sequence[Checkpoint],
    train: Sequence[str],
    val: Sequence[str],
    out: Path,
    *,
    corpus: str = "another corpus",
    steps: int = 200,
    every: int = 50,
    chars: int = 50_000,
    prompt: str = "",
    progress: Callable[[str], None] | None = None,
) -> Finding:
    """Fine-tune each checkpoint (the final one alone, or earlier ones too) on another corpus and watch it adapt."""
    scored = told_limit(val, chars)
    val = limit_documents(val, chars)
    how: dict[str, Any] = {"steps": steps, "every": every, "prompt": prompt, "progress": progress}
    runs = []
    for c in checkpoints:
        if progress and len(checkpoints) > 1:
            how["progress"] = lambda line, step=c.step: progress(f"from step {step:,}: {line}")
        runs.append({"from_step": c.step, "table": fine_tune(c, train, val, **how)})
    fig, axes = plots.figure(1, 2, size=(12, 4.2))
    for i, run in enumerate(runs):
        points = run["table"]
        label = f"from step {run['from_step']:,}"
        axes[0].plot([p["step"] for p in points], [p["loss"] for p in points], "o-", color=plots.color(i), label=label)
    axes[0].set_xlabel("fine-tuning steps")
    axes[0].set_ylabel(f"validation loss on {corpus}, nats a token")
    axes[0].set_title(f"{checkpoints[-1].label} fine-tuned on {corpus}")
    axes[0].legend()
    starts = plots.places_of([r["from_step"] for r in runs])
    for i, (place, label) in enumerate(((0, "before"), (-1, f"after {steps} steps"))):
        axes[1].plot(starts, [r["table"][place]["loss"] for r in runs], "o-", color=plots.color(i), label=label)
    plots.step_axis(axes[1], "step of the checkpoint it starts from")
    axes[1].set_title("does longer pre-training help?")
    axes[1].legend()
    last = runs[-1]["table"]
    summary = (
        f"From step {runs[-1]['from_step']:,}, {steps} steps on {corpus} take the loss from {last[0]['loss']:.3f} to "
        f"{last[-1]['loss']:.3f} nats a token of its validation text ({scored})."
    )
    name = "fewshot" if len(runs) == 1 else "fewshot_early"
    return write_finding(out, name, summary, {"corpus": corpus, "runs": runs, "limit_chars": chars}, fig)


@torch.no_grad()
def next_token(checkpoints: Sequence[Checkpoint], prompt: str, out: Path, *, top: int = 7) -> Finding:
    """Analysis 9: the distribution after a prompt over checkpoints: the likeliest `top` of the last checkpoint, each
    checkpoint's own, and the entropy along training."""
    tokenizer = same_vocabulary(checkpoints)
    table, distributions = [], []
    for checkpoint in checkpoints:
        idx = torch.tensor([checkpoint.within(checkpoint.encode_prompt(prompt))])
        p = checkpoint.model.logits(idx)[0, -1].float().softmax(-1)
        distributions.append(p)
        likeliest = p.topk(min(top, len(p)))
        entropy = float(-(p * p.clamp_min(1e-30).log()).sum())
        pairs = [[tokenizer.piece(int(t)), float(v), int(t)] for v, t in zip(likeliest.values, likeliest.indices)]
        table.append({"step": checkpoint.step, "entropy_nats": entropy, "top": pairs})
    fig, axes = plots.figure(1, 2, size=(12, 4.2))
    steps = plots.places_of([r["step"] for r in table])
    final = distributions[-1].topk(min(top, len(distributions[-1]))).indices.tolist()
    for i, t in enumerate(final):
        label = plots.plain(tokenizer.piece(t))
        axes[0].plot(steps, [float(p[t]) for p in distributions], "o-", color=plots.color(i), label=label)
    axes[0].set_ylabel("probability")
    axes[0].set_title(f"next token after {plots.plain(repr(prompt[-40:]))}")
    axes[0].legend(ncols=2)
    axes[1].plot(steps, [r["entropy_nats"] for r in table], "o-", color=plots.color(0))
    axes[1].axhline(math.log(tokenizer.vocab_size), color="0.6", linestyle="--", label="uniform")
    axes[1].set_ylim(bottom=0)
    axes[1].set_title("entropy, nats")
    axes[1].legend()
    for ax in axes:
        plots.step_axis(ax)
    last = table[-1]
    words = ", ".join(f"{piece} {p:.0%}" for piece, p, _ in last["top"][:3])
    summary = f"After {prompt!r} the last checkpoint expects {words}; entropy {last['entropy_nats']:.2f} nats."
    summary += checkpoints[-1].told_within(prompt)
    return write_finding(out, "next_token", summary, {"prompt": prompt, "table": table}, fig)


def forgetting(
    models: Mapping[str, Checkpoint],
    corpora: Mapping[str, Mapping[str, Sequence[str]]],
    out: Path,
    *,
    steps: int = 200,
    every: int = 50,
    chars: int = 20_000,
    progress: Callable[[str], None] | None = None,
) -> Finding:
    """What a model of one corpus loses of it while it learns another: the losses on both, for every ordered pair.
    `corpora` gives the train and val documents of every model's own corpus, under the model's name."""
    if len(models) < 2:
        raise LabError("forgetting needs at least two models, name=RUN each")
    held_out = {name: limit_documents(corpora[name]["val"], chars) for name in models}
    scored = [f"{name}, {told_limit(corpora[name]['val'], chars)}" for name in models]
    table = []
    for first, second in permutations(models, 2):
        told = (lambda line, a=first, b=second: progress(f"{a} > {b}: {line}")) if progress else None
        points = fine_tune(
            models[first],
            corpora[second]["train"],
            held_out[second],
            steps=steps,
            every=every,
            watched={"first": held_out[first]},
            progress=told,
        )
        kept = [{"step": p["step"], "first": p["first"], "second": p["loss"]} for p in points]
        share = unknown_share(models[first], held_out[second])
        table.append({"first": first, "second": second, "unknown_share": share, "points": kept})
    columns = len(models) - 1
    fig, axes = plots.figure(len(models), columns, size=(4.2 * columns + 0.6, 2.9 * len(models)))
    for ax, pair in zip((ax for row in axes for ax in row), table):
        strange = pair["unknown_share"] == 1.0  # then only ends of documents were scored, which says nothing
        for i, (key, name) in enumerate((("first", pair["first"]), ("second", pair["second"]))[: 1 if strange else 2]):
            points = pair["points"]
            ax.plot([p["step"] for p in points], [p[key] for p in points], "o-", color=plots.color(i), label=name)
        ax.set_title(f"{pair['first']}, then {pair['second']}{', all unknown' if strange else ''}")
        ax.set_xlabel("steps on the second")
        ax.set_ylabel("nats a token")
        ax.locator_params(axis="x", integer=True)
        ax.legend()
    unread = max(pair["unknown_share"] for pair in table)
    worst = max(table, key=lambda pair: pair["points"][-1]["first"] - pair["points"][0]["first"])
    summary = (
        f"{steps} steps on another corpus: most is forgotten of {worst['first']} under {worst['second']}, from "
        f"{worst['points'][0]['first']:.3f} to {worst['points'][-1]['first']:.3f} nats a token. Scored of each "
        f"validation text: {'; '.join(scored)}; at most {unread:.1%} of a text is unknown to a vocabulary."
    )
    return write_finding(out, "forgetting", summary, {"pairs": table, "limit_chars": chars}, fig)
