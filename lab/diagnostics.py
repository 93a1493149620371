"""What goes on inside a network at the start and during training: is the first loss what it should be, are
units saturated, do gradients and updates have a healthy size? As numbers (JSON) and as pictures (PNG).
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab import plots
from lab.models import LanguageModel
from lab.runlog import write_json

BINS = 60
MOST_LINES = 24  # of a panel: so many can be told apart
SATURATED = 0.97  # a tanh beyond this passes less than 6 % of its gradient on


def _histogram(x: Tensor) -> dict[str, Any]:
    """Density over BINS bins within three and a half standard deviations, but not beyond the least and the greatest
    value (a tanh ends at 1), with mean, std and extent."""
    x = x.detach().float().flatten()
    mean, std = float(x.mean()), float(x.std())
    reach = max(3.5 * std, 1e-12)
    low, high = max(mean - reach, float(x.min())), min(mean + reach, float(x.max()))
    if high - low < 1e-12:
        low, high = mean - 1e-12, mean + 1e-12
    counts = torch.histc(x, BINS, low, high)
    density = counts / (x.numel() * (high - low) / BINS)
    return {"mean": mean, "std": std, "low": low, "high": high, "density": [round(v, 6) for v in density.tolist()]}


def _weight(p: nn.Parameter) -> dict[str, Any]:
    std, slope = float(p.detach().float().std()), float(p.grad.float().std())
    ratio = math.log10(slope / std) if slope > 0 and std > 0 else None
    return {"std": std, "gradient_std": slope, "log10_gradient_to_weight": ratio}


def _norm(module: nn.Module) -> dict[str, float]:
    """Mean and spread of a norm's gain and bias over its features."""
    gain, bias = module.gain.detach().float(), module.bias.detach().float()
    return {
        "gain_mean": float(gain.mean()),
        "gain_std": float(gain.std()),
        "bias_mean": float(bias.mean()),
        "bias_std": float(bias.std()),
    }


class Diagnostics:
    """Collects pictures of a model while it trains: `before` an update, `updated` after it, `write` at the end.

    `moments` are whole looks (activations, gradients, weights, norms); `ratios` follow every `ratio_every`-th update:
    its size over the weight's, matrix by matrix."""

    def __init__(self, model: LanguageModel, vocab_size: int, ratio_every: int = 1):
        self.model, self.vocab_size, self.ratio_every = model, vocab_size, ratio_every
        self.moments: list[dict[str, Any]] = []
        self.ratios: list[dict[str, Any]] = []
        self._before: dict[str, Tensor] = {}

    def before(self, step: int, idx: Tensor, targets: Tensor, *, whole: bool) -> None:
        """Before the update of `step`: a `whole` look, or if the update is one to be measured, the weights alone."""
        if whole:
            self.look(step, idx, targets)
        if whole or step % self.ratio_every == 0:
            self._before = {n: p.detach().clone() for n, p in self.model.named_parameters() if p.ndim >= 2}

    def look(self, step: int, idx: Tensor, targets: Tensor) -> dict[str, Any]:
        """Forward and backward on a batch, without touching the gradients of training: loss, activations, gradients."""
        model = self.model
        caught: dict[str, Tensor] = {}

        def catch(name):
            def hook(module, inputs, output):
                if output.requires_grad:
                    output.retain_grad()
                caught[name] = output

            return hook

        generator = torch.get_rng_state()  # dropout draws here must not shift those of training
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        hooks = [module.register_forward_hook(catch(name)) for name, module in model.activations()]
        try:
            _, loss = model(idx, targets)
            loss.backward()
        finally:
            for hook in hooks:
                hook.remove()
        layers = {}
        for name, output in caught.items():
            layers[name] = {
                "activation": _histogram(output),
                "gradient": _histogram(output.grad),
                "saturated": float((output.detach().abs() > SATURATED).float().mean()),
                "squashed": "tanh" in name or "state" in name,
            }
        weights = {n: _weight(p) for n, p in model.named_parameters() if p.grad is not None and p.numel() > 1}
        norms = {n: _norm(m) for n, m in model.named_modules() if hasattr(m, "gain") and hasattr(m, "bias")}
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(buffers[n])
        torch.set_rng_state(generator)
        moment = {
            "step": step,
            "loss": float(loss.detach()),
            "expected_initial_loss": math.log(self.vocab_size),
            "layers": layers,
            "weights": weights,
            "norms": norms,
        }
        self.moments.append(moment)
        return moment

    def updated(self, step: int) -> None:
        """After the update that follows `before`: log10 of the update's size over the weight's, for every matrix."""
        found = {}
        for name, before in self._before.items():
            now, was = dict(self.model.named_parameters())[name].detach().float(), before.float()
            update, size = float((now - was).std()), float(was.std())
            found[name] = math.log10(update / size) if update > 0 and size > 0 else None
        if found:
            self.ratios.append({"step": step, "log10_update_to_weight": found})
        self._before = {}

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """<folder>/<name>.json and .png; returns their paths."""
        json_path, png_path = folder / f"{name}.json", folder / f"{name}.png"
        write_json(json_path, {"moments": self.moments, "ratios": self.ratios})
        if self.moments:
            draw(self.moments, self.ratios, png_path)
        return json_path, png_path


def draw(moments: list[dict[str, Any]], ratios: list[dict[str, Any]], path: Path) -> None:
    """Eight panels: activations and gradients at the start and at the end; over time saturation, norms, and the
    sizes of gradients and updates over those of the weights."""
    fig, axes = plots.figure(2, 4, size=(17, 7))
    for column, (moment, when) in enumerate(((moments[0], "first step"), (moments[-1], "last step"))):
        for row, what in enumerate(("activation", "gradient")):
            ax = axes[row][column]
            draw_histograms(ax, moment, what)
            ax.set_title(f"{what}s, {when} ({moment['step']})")
    draw_lines(axes[0][2], saturation_lines(moments), f"saturated units (|output| above {SATURATED}), %")
    draw_lines(axes[1][2], norm_lines(moments), "gain and bias of the norms, mean")
    draw_lines(axes[0][3], gradient_lines(moments), "log10 of gradient to weight")
    draw_lines(axes[1][3], ratio_lines(ratios), "log10 of update to weight (-3 is a usual aim)")
    axes[1][3].axhline(-3, color="0.6", linestyle="--", linewidth=1)
    first = moments[0]
    fig.suptitle(
        f"initial loss {first['loss']:.3f}, uniform guessing would have {first['expected_initial_loss']:.3f} nats"
    )
    plots.save(fig, path)


Lines = dict[str, list[tuple[int, float]]]  # name -> (step, value) points


def draw_histograms(ax: Any, moment: dict[str, Any], what: str) -> None:
    """Density of every layer's `what`: activation or gradient. A layer through which nothing flows (yet, where the
    output layer starts at zero) has none."""
    for i, (name, layer) in enumerate(moment["layers"].items()):
        h = layer[what]
        if not h["std"]:
            continue
        width = (h["high"] - h["low"]) / BINS
        x = [h["low"] + (k + 0.5) * width for k in range(BINS)]
        ax.plot(x, h["density"], **plots.line(i), label=name)
    ax.set_yticks([])
    if ax.lines:
        plots.few_numbers(ax)
        ax.legend()
    else:
        plots.note(ax, f"all {what}s are equal" if moment["layers"] else "no hidden layer")


def draw_lines(ax: Any, lines: Lines, title: str) -> None:
    """Values over steps, one line a name, MOST_LINES of them; the start is drawn at half a step."""
    ax.set_title(title)
    if not lines:
        plots.note(ax, "nothing of that kind in this model")
        return
    ax.set_xscale("log")
    ax.set_xlabel("step")
    marker = "o" if max(map(len, lines.values())) < 30 else ""
    for i, (name, points) in enumerate(list(lines.items())[:MOST_LINES]):
        x, y = [max(s, 0.5) for s, _ in points], [v for _, v in points]
        ax.plot(x, y, marker=marker, markersize=4, **plots.line(i), label=_short(name))
    cut = f"the first {MOST_LINES} of {len(lines)}" if len(lines) > MOST_LINES else None
    how: dict[str, Any] = {}
    if len(ax.lines) > 5:  # so many names would cover the lines; here they stand above them
        how = {"loc": "upper center", "ncols": 3, "handlelength": 1.4, "columnspacing": 0.8}
        low, high = ax.get_ylim()
        ax.set_ylim(low, low + (high - low) / (0.95 - 0.05 * math.ceil(len(ax.lines) / 3)))
    ax.legend(fontsize=5.5, title=cut, title_fontsize=5.5, **how)


def _short(name: str) -> str:
    """A parameter's name without what all have in common."""
    return re.sub(r"^gpt\.|blocks\.|\.weight$|_w$", "", name)


def saturation_lines(moments: list[dict[str, Any]]) -> Lines:
    """Percent of saturated units of every layer that squashes."""
    names = [n for n, layer in moments[0]["layers"].items() if layer["squashed"]]
    return {n: [(m["step"], 100 * m["layers"][n]["saturated"]) for m in moments] for n in names}


def gradient_lines(moments: list[dict[str, Any]]) -> Lines:
    """log10 of the gradient's size over the weight's, of every matrix that has a gradient."""
    found: Lines = {}
    for m in moments:
        for name, w in m["weights"].items():
            if w["log10_gradient_to_weight"] is not None:
                found.setdefault(name, []).append((m["step"], w["log10_gradient_to_weight"]))
    return found


def norm_lines(moments: list[dict[str, Any]]) -> Lines:
    """Mean gain and bias of every norm that has them."""
    found: Lines = {}
    for m in moments:
        for name, norm in m["norms"].items():
            for part in ("gain", "bias"):
                found.setdefault(f"{name} {part}", []).append((m["step"], norm[f"{part}_mean"]))
    return found


def ratio_lines(ratios: list[dict[str, Any]]) -> Lines:
    """log10 of the update's size over the weight's, of every matrix."""
    found: Lines = {}
    for moment in ratios:
        for name, ratio in moment["log10_update_to_weight"].items():
            if ratio is not None:
                found.setdefault(name, []).append((moment["step"], ratio))
    return found
