"""Analysis 10: which prompt tokens drove a target token.

Two attributions of the target's logit to the token embeddings. Gradient times activation, in the manner of Grad-CAM
(Selvaraju et al. 2017): cheap, local. Integrated gradients (Sundararajan et al. 2017): the gradient averaged along
the straight path from a baseline (every token's vectors replaced by the mark's) to the prompt; its attributions add
up to the change of the logit (completeness). captum's implementation is the check, where it is installed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lab import LabError, plots
from lab.analyses.finding import Finding, write_finding
from lab.checkpoints import Checkpoint

MOST_DRAWN, ROW_DRAWN = 180, 60  # tokens of a picture, and of a row in it


class EmbeddedModel:
    """A model cut open at its token embeddings: `values` of a prompt, and the target's logit as a function of them."""

    def __init__(self, checkpoint: Checkpoint, ids: Sequence[int]):
        self.model, self.tables = checkpoint.model, checkpoint.model.token_embeddings()
        if not self.tables:
            raise LabError(f"{checkpoint.name} has no embeddings to attribute to; it is a table of counts")
        self.idx = torch.tensor([list(ids)])
        self.mark = checkpoint.tokenizer.mark

    def values(self) -> tuple[list[Tensor], list[Tensor]]:
        """(outputs of every table for the prompt, the same with every token of it read as the mark)."""
        return self._outputs(self.idx), self._outputs(torch.full_like(self.idx, self.mark))

    @torch.no_grad()
    def _outputs(self, idx: Tensor) -> list[Tensor]:
        outputs: list[Tensor] = [torch.empty(0)] * len(self.tables)

        def catch(i):
            def hook(module, inputs, output):
                outputs[i] = output.detach()

            return hook

        hooks = [table.register_forward_hook(catch(i)) for i, table in enumerate(self.tables)]
        try:
            self.model.logits(idx)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    def logit(self, values: Sequence[Tensor], target: int) -> Tensor:
        """The target's logit after the prompt, (B,), with the tables' outputs replaced by `values` (B, T, ...)."""
        count = values[0].shape[0]
        hooks = [
            table.register_forward_hook(lambda module, inputs, output, v=v: v) for table, v in zip(self.tables, values)
        ]
        try:
            return self.model.logits(self.idx.expand(count, -1))[:, -1, target]
        finally:
            for hook in hooks:
                hook.remove()

    def by_token(self, parts: Sequence[Tensor]) -> tuple[list[float], float]:
        """Attributions (1, T, ..., E) of all tables summed to one number a prompt token; and what fell on the padding
        before the prompt, which models with a fixed context read."""
        length = self.idx.shape[1]
        total, outside = np.zeros(length), 0.0
        for part in parts:
            per_place = part.sum(-1)[0].double()
            if per_place.ndim == 1:
                total += per_place.numpy()
                continue
            last = per_place[-1].numpy()  # a window of n tokens, the newest last; only the last position matters
            for j, value in enumerate(last):
                place = length - len(last) + j
                if place >= 0:
                    total[place] += value
                else:
                    outside += value
        return total.tolist(), float(outside)


@dataclass(frozen=True)
class Attribution:
    """One number a prompt token (the mark first). `completeness_error`: sum of attributions minus change of logit."""

    tokens: list[str]
    target: str
    target_id: int
    gradient_activation: list[float]
    integrated: list[float]
    padding: float
    logit: float
    baseline_logit: float
    completeness_error: float


def integrated_gradients(opened: EmbeddedModel, target: int, points: int = 128) -> list[Tensor]:
    """Attribution of every table output: (value - baseline) times the gradient averaged over a Gauss-Legendre grid."""
    values, base = opened.values()
    nodes, weights = np.polynomial.legendre.leggauss(points)
    total = [torch.zeros_like(v, dtype=torch.float64) for v in values]
    for chunk in np.array_split(np.arange(points), max(1, points // 32)):
        alphas = torch.tensor((nodes[chunk] + 1) / 2, dtype=torch.float32)
        path = []
        for v, b in zip(values, base):
            shape = (-1, *[1] * (v.ndim - 1))
            path.append((b + alphas.view(shape) * (v - b)).requires_grad_())
        gradients = torch.autograd.grad(opened.logit(path, target).sum(), path, allow_unused=True)
        w = torch.tensor(weights[chunk] / 2)
        for t, g in zip(total, gradients):
            if g is not None:
                t += (g.double() * w.view(-1, *[1] * (g.ndim - 1))).sum(0, keepdim=True)
    return [t * (v - b).double() for t, v, b in zip(total, values, base)]


def captum_integrated_gradients(opened: EmbeddedModel, target: int, points: int = 128) -> list[Tensor]:
    """The same by captum; LabError where it is not installed."""
    try:
        from captum.attr import IntegratedGradients
    except ImportError as error:
        raise LabError("captum is not installed; pip install -r requirements-lab.txt") from error
    values, base = opened.values()
    method = IntegratedGradients(lambda *inputs: opened.logit(inputs, target))
    found = method.attribute(
        tuple(values), baselines=tuple(base), n_steps=points, method="gausslegendre", internal_batch_size=32
    )
    return list(found)


def attribute(checkpoint: Checkpoint, prompt: str, target: str | None = None, points: int = 128) -> Attribution:
    """Attribute the logit of `target` (one token; default: the likeliest) after `prompt` to the prompt's tokens."""
    ids = checkpoint.within(checkpoint.encode_prompt(prompt))
    opened = EmbeddedModel(checkpoint, ids)
    values, base = opened.values()
    with torch.no_grad():
        token = int(checkpoint.model.logits(torch.tensor([ids]))[0, -1].argmax())
    if target is not None:
        wanted = checkpoint.tokenizer.encode(target)
        if len(wanted) != 1:
            raise LabError(f"the target {target!r} is {len(wanted)} tokens of this vocabulary; give exactly one")
        token = int(wanted[0])
        if token == getattr(checkpoint.tokenizer, "unknown_id", None):
            raise LabError(f"the target {target!r} is not among the words that the model knows; give one of those")
    leaves = [v.clone().requires_grad_() for v in values]
    logit = opened.logit(leaves, token)
    gradients = torch.autograd.grad(logit.sum(), leaves, allow_unused=True)
    products = [v * g for v, g in zip(values, gradients) if g is not None]
    local, _ = opened.by_token(products)
    integrated, padding = opened.by_token(integrated_gradients(opened, token, points))
    with torch.no_grad():
        start = float(opened.logit(base, token)[0])
    end = float(logit.detach()[0])
    error = sum(integrated) + padding - (end - start)
    pieces = [checkpoint.tokenizer.piece(i) for i in ids]
    return Attribution(pieces, checkpoint.tokenizer.piece(token), token, local, integrated, padding, end, start, error)


def attribution(checkpoint: Checkpoint, prompt: str, out: Path, *, target: str | None = None) -> Finding:
    """Both attributions drawn over the prompt, and the largest disagreement with captum if it is installed."""
    found = attribute(checkpoint, prompt, target)
    data: dict[str, Any] = {"prompt": prompt, **vars(found)}
    check = ""
    try:
        ids = checkpoint.within(checkpoint.encode_prompt(prompt))
        opened = EmbeddedModel(checkpoint, ids)
        theirs, _ = opened.by_token(captum_integrated_gradients(opened, found.target_id))
        data["largest_difference_to_captum"] = max(abs(a - b) for a, b in zip(theirs, found.integrated))
        check = f"; captum differs by at most {data['largest_difference_to_captum']:.1e}"
    except LabError:
        data["largest_difference_to_captum"] = None
    strongest = max(zip(map(abs, found.integrated), found.tokens))[1]
    several = checkpoint.several_tokens("what it does is counted at the last of them")
    summary = (
        f"{found.target!r} after {prompt!r} is driven most by {strongest!r}; integrated gradients add up to the change "
        f"of the logit within {abs(found.completeness_error):.1e}{check}.{several}{checkpoint.told_within(prompt)}"
    )
    return write_finding(out, "attribution", summary, data, _picture(found))


def _picture(found: Attribution) -> Any:
    """Both attributions over the last MOST_DRAWN tokens, in rows of ROW_DRAWN, however long the prompt is."""
    tokens = [plots.plain(t) for t in found.tokens[-MOST_DRAWN:]]
    starts = range(0, len(tokens), ROW_DRAWN)
    shown = (("gradient x activation", found.gradient_activation), ("integrated gradients", found.integrated))
    width = max(7, 0.32 * min(len(tokens), ROW_DRAWN) + 2)
    fig, axes = plots.figure(2 * len(starts), 1, size=(width, 4.2 * len(starts)))
    rest = len(found.tokens) - len(tokens)
    for at, start in enumerate(starts):
        for part, (name, numbers) in enumerate(shown):
            (ax,) = axes[part * len(starts) + at]
            reach = max(map(abs, numbers)) or 1.0
            row, names = (list(x[-MOST_DRAWN:][start : start + ROW_DRAWN]) for x in (numbers, tokens))
            ax.imshow([row], cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
            ax.set_xticks(range(len(row)), names)
            if max(map(len, tokens[1:]), default=1) > 1:
                ax.tick_params(axis="x", rotation=60)
            ax.set_yticks([])
            ax.grid(False)
            if at == 0:
                cut = f" ({rest} tokens before are not drawn)" if rest else ""
                ax.set_title(f"{name}: blue pushed towards {plots.plain(repr(found.target))}, red away from it{cut}")
    return fig


def by_layer(checkpoint: Checkpoint, ids: Sequence[int], target: int) -> dict[str, list[float]]:
    """{layer: one number a token}: gradient times activation of what each layer puts out there, for the target's
    logit after the last token; in a model with a residual stream, of what the layer adds to it (the stream itself is
    normed when it is read, so that its own length moves nothing). Layers whose output is not one vector a place are
    left out."""
    caught: dict[str, tuple[Tensor, Tensor]] = {}

    def catch(name):
        def hook(module, inputs, output):
            output.retain_grad()
            added = output - inputs[0] if checkpoint.model.residual else output
            caught[name] = output, added.detach()

        return hook

    model, idx = checkpoint.model, torch.tensor([list(ids)])
    hooks = [module.register_forward_hook(catch(name)) for name, module in model.activations()]
    try:
        model.logits(idx)[0, -1, target].backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    fits = lambda x: x.shape[:2] == idx.shape and x.ndim == 3 and x.grad is not None  # noqa: E731
    return {name: (added * x.grad).sum(-1)[0].tolist() for name, (x, added) in caught.items() if fits(x)}


def attribution_layers(checkpoint: Checkpoint, prompt: str, out: Path) -> Finding:
    """Where in depth and place the likeliest next token comes from: gradient times activation, layer by layer."""
    ids = checkpoint.within(checkpoint.encode_prompt(prompt))
    with torch.no_grad():
        target = int(checkpoint.model.logits(torch.tensor([ids]))[0, -1].argmax())
    found = by_layer(checkpoint, ids, target)
    if not found:
        raise LabError(f"{checkpoint.name} has no layers to attribute to")
    piece = checkpoint.tokenizer.piece
    pieces = [piece(i) for i in ids]
    names = [plots.plain(p) for p in pieces[-ROW_DRAWN:]]
    fig, ax = plots.figure(size=(max(7, 0.32 * len(names) + 2), 0.5 * len(found) + 1.4))
    reach = max(abs(v) for row in found.values() for v in row) or 1.0
    ax.imshow([row[-ROW_DRAWN:] for row in found.values()], cmap="RdBu", vmin=-reach, vmax=reach, aspect="auto")
    ax.set_xticks(range(len(names)), names, fontsize=8, rotation=90 if max(map(len, names[1:]), default=1) > 1 else 0)
    ax.set_yticks(range(len(found)), list(found))
    ax.grid(False)
    rest = len(pieces) - len(names)
    cut = f" ({rest} tokens before are not drawn)" if rest else ""
    ax.set_title(f"blue pushed towards {plots.plain(repr(piece(target)))}, red away from it{cut}")
    ends = {name: abs(row[-1]) / (sum(map(abs, row)) or 1.0) for name, row in found.items()}
    told = ", ".join(f"{name} {share:.0%}" for name, share in ends.items())
    summary = f"Share of the attribution that has reached the last place: {told}.{checkpoint.told_within(prompt)}"
    data = {"prompt": prompt, "tokens": pieces, "target": piece(target), "target_id": target, "layers": found}
    return write_finding(out, "attribution_layers", summary, data, fig)
