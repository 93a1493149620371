"""Inside a model: attention maps, what each layer would say, and the learned scalars along training."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import train_gpt
from lab import LabError, plots
from lab.analyses.finding import Finding, write_finding
from lab.checkpoints import Checkpoint, same_vocabulary
from lab.models.gpt import GPTRung
from trainer.sample import Cache

MOST_MAP_TOKENS = 64  # a map of more cannot be read
MOST_LENS_TOKENS = 24


@dataclass(frozen=True)
class AttentionMap:
    """Weights (H, T, T) of one layer, rows are queries; `allowed` (T, T): what window and documents let be seen."""

    layer: int
    weights: Tensor
    allowed: Tensor
    long_window: bool


class _Watching(Cache):
    """A cache that keeps the map of every attention which passes through it. Paired heads have none of tokens: each
    of their queries and keys is half of one."""

    def __init__(self, gpt: train_gpt.GPT):
        super().__init__()
        self.gpt, self.maps = gpt, []

    def attend(self, layer, q_BTHDh, k_BTHDh, v_BTHDh, first_key_BS, scale, per_token=1, mixing=None):
        if per_token == 1:
            self.maps.append(self._map(layer, q_BTHDh, k_BTHDh, first_key_BS, scale))
        return super().attend(layer, q_BTHDh, k_BTHDh, v_BTHDh, first_key_BS, scale, per_token, mixing)

    def _map(self, layer, q_BTHDh, k_BTHDh, first_key_BS, scale) -> AttentionMap:
        score_HTT = torch.einsum("thd,shd->hts", q_BTHDh[0].float(), k_BTHDh[0].float()) * scale
        place = torch.arange(self.length)
        allowed_TT = (place >= first_key_BS[0][:, None]) & (place <= place[:, None])
        weights = score_HTT.masked_fill(~allowed_TT, -torch.inf).softmax(-1)
        return AttentionMap(layer, weights, allowed_TT, self.gpt.blocks[layer].long_window)


@torch.no_grad()
def attention_maps(checkpoint: Checkpoint, ids: Sequence[int]) -> list[AttentionMap]:
    """Of every layer whose heads attend to tokens, for one row of them (the mark is not added). LabError for other
    rungs, and where there is no such layer."""
    if not isinstance(checkpoint.model, GPTRung):
        raise LabError(f"{checkpoint.name} has no attention to look at")
    watching = _Watching(checkpoint.model.gpt)
    checkpoint.model.gpt(torch.tensor([list(ids)]), cache=watching)
    if not watching.maps:
        raise LabError("no layer of this model has a map of tokens: all attend with paired heads, or not at all")
    return watching.maps


def attention(checkpoint: Checkpoint, text: str | Sequence[str], out: Path) -> Finding:
    """Every layer's heads as maps over a text or documents (their first MOST_MAP_TOKENS tokens); grey: outside of
    window or document."""
    ids = checkpoint.encode_documents(text)[: min(MOST_MAP_TOKENS, checkpoint.context)]
    maps = attention_maps(checkpoint, ids)
    pieces = ["•" if i == checkpoint.tokenizer.mark else checkpoint.tokenizer.piece(i) for i in ids]
    heads = maps[0].weights.shape[0]
    side = min(4.2, max(2.2, 0.12 * len(ids)))
    fig, axes = plots.figure(len(maps), heads, size=(side * heads + 0.6, side * len(maps) + 0.6))
    grid = [[axes]] if len(maps) == heads == 1 else [axes] if len(maps) == 1 else axes
    for row, one in zip(grid, maps):
        for head, ax in enumerate(row):
            _draw_map(ax, one.weights[head], one.allowed, pieces)
            window = "long window" if one.long_window else "short window"
            ax.set_title(f"layer {one.layer}, head {head}, {window}", fontsize=8)
    firsts = [float(one.weights[:, :, 0].mean()) for one in maps]
    own = [float(one.weights.diagonal(dim1=1, dim2=2).mean()) for one in maps]
    summary = (
        f"{len(maps)} layers of {heads} heads over {len(ids)} tokens: the mark gets {firsts[0]:.0%} of the attention "
        f"in the first layer and {firsts[-1]:.0%} in the last, a token itself {own[0]:.0%} and {own[-1]:.0%}."
        f"{_left_out(checkpoint)}"
    )
    layers = [{"layer": m.layer, "long_window": m.long_window, "weights": rounded(m.weights)} for m in maps]
    data = {"tokens": pieces, "layers": layers, "to_mark": firsts, "to_itself": own}
    return write_finding(out, "attention", summary, data, fig)


def _left_out(checkpoint: Checkpoint) -> str:
    paired = checkpoint.model.gpt.config.paired_heads
    return f" Layers {paired}, of paired heads, are left out." if paired else ""


def rounded(x: Tensor) -> Any:
    """Nested lists of numbers with four digits: enough for a picture, and half the size."""
    return torch.round(x, decimals=4).tolist()


def _draw_map(ax: Any, weights_TT: Tensor, allowed_TT: Tensor, pieces: Sequence[str]) -> None:
    roots = weights_TT.sqrt().masked_fill(~allowed_TT, float("nan"))  # a tenth of the attention can be seen, too
    ax.imshow(roots, cmap=plots.masked_blues(), vmin=0, vmax=1)
    names = [plots.short(p, 7) for p in pieces]
    ax.set_xticks(range(len(pieces)), names, fontsize=5, rotation=90 if max(map(len, names)) > 1 else 0)
    ax.set_yticks(range(len(pieces)), names, fontsize=5)
    ax.tick_params(length=0, pad=1)
    ax.grid(False)


@dataclass(frozen=True)
class Said:
    """What the model would say if it ended after a layer: at every place the likeliest token, and the loss."""

    layer: str
    logits: Tensor  # (T, V)


@torch.no_grad()
def lens(checkpoint: Checkpoint, ids: Sequence[int]) -> list[Said]:
    """The logit lens (nostalgebraist 2020): the output layer applied to what each layer puts out. Layers whose width
    the output cannot read are left out; LabError if none is left."""
    model, idx = checkpoint.model, torch.tensor([list(ids)])
    caught: dict[str, Tensor] = {}

    def catch(name):
        def hook(module, inputs, output):
            caught[name] = output.detach()

        return hook

    hooks = [module.register_forward_hook(catch(name)) for name, module in model.activations()]
    try:
        last = model.logits(idx)
    finally:
        for hook in hooks:
            hook.remove()
    said = []
    for name, x in caught.items():
        logits = model.readout(x) if x.shape[:2] == idx.shape else None
        if logits is not None:
            said.append(Said(name, logits[0].float()))
    if not said:
        raise LabError(f"{checkpoint.name} has no layers that its output could read one by one")
    return [*said, Said("output", last[0].float())]


def logit_lens(checkpoint: Checkpoint, text: str | Sequence[str], out: Path) -> Finding:
    """A table: layers up the side, the text's first tokens along, in each cell what that layer would say next."""
    longest = MOST_LENS_TOKENS if checkpoint.model.context else min(MOST_LENS_TOKENS, checkpoint.row_tokens)
    ids = checkpoint.encode_documents(text)[:longest]
    said = lens(checkpoint, ids)
    piece = checkpoint.tokenizer.piece
    fig, ax = plots.figure(size=(max(6, 0.55 * len(ids) + 1.5), 0.45 * len(said) + 1.4))
    p_LTV = torch.stack([s.logits.softmax(-1) for s in said])
    best = p_LTV.max(-1)
    ax.imshow(best.values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i in range(len(said)):
        for j in range(len(ids)):
            colour = "white" if best.values[i, j] > 0.6 else "black"
            word = plots.short(piece(int(best.indices[i, j])), 7)
            ax.text(j, i, word, ha="center", va="center", fontsize=7, color=colour)
    ax.set_yticks(range(len(said)), [s.layer for s in said])
    ax.set_xticks(range(len(ids)), [plots.short(piece(i), 7) for i in ids], fontsize=7)
    ax.set_xlabel("token read")
    ax.grid(False)
    ax.set_title("what each layer would say next (darker: surer)")
    table, agreed = [], best.indices == best.indices[-1]
    for i, s in enumerate(said):
        words = [[piece(int(t)), float(p)] for t, p in zip(best.indices[i], best.values[i])]
        table.append({"layer": s.layer, "likeliest": words, "agrees_with_output": float(agreed[i].float().mean())})
    told = ", ".join(f"{row['layer']} {row['agrees_with_output']:.0%}" for row in table[:-1])
    summary = f"Share of {len(ids)} places at which a layer already says what the model says in the end: {told}."
    data = {"tokens": [piece(i) for i in ids], "table": table}
    return write_finding(out, "logit_lens", summary, data, fig)


def scalars(checkpoints: Sequence[Checkpoint], out: Path) -> Finding:
    """The learned lambdas, value gates and skips of a GPT, layer by layer, along training."""
    same_vocabulary(checkpoints)
    if not all(isinstance(c.model, GPTRung) for c in checkpoints):
        raise LabError(f"{checkpoints[-1].name} has no learned scalars; the GPT has")
    table = [{"step": c.step, **c.model.scalars()} for c in checkpoints]
    kinds = [k for k in table[-1] if k != "step"]
    places = plots.places_of([c.step for c in checkpoints])
    layers = checkpoints[-1].model.gpt.config.num_layers
    fig, axes = plots.figure(1, len(kinds), size=(3.4 * len(kinds), 3.4))
    for ax, kind in zip(axes, kinds):
        for layer in table[-1][kind]:
            values = [row[kind][layer] for row in table]
            ax.plot(places, values, ".-", color=plots.shade(layer, layers), label=layer)
        ax.set_title(kind)
        plots.step_axis(ax)
    axes[0].legend(title="layer", fontsize=7)
    first, last = table[0], table[-1]
    _, kind, layer = max((abs(last[kind][i] - was), kind, i) for kind in kinds for i, was in first[kind].items())
    summary = (
        f"From step {first['step']:,} to {last['step']:,} the scalar that moved most is {kind} of layer {layer}: from "
        f"{first[kind][layer]:.2f} to {last[kind][layer]:.2f}."
    )
    return write_finding(out, "scalars", summary, {"table": table}, fig)
