"""What goes on inside a network at the start and during training: is the first loss what it should be, are
units saturated, do gradients and updates have a healthy size? As numbers (JSON) and as pictures (PNG).
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lab.models import LanguageModel
from lab.runlog import write_json

BINS = 60
SATURATED = 0.97  # a tanh beyond this passes less than 6 % of its gradient on


def _histogram(x: Tensor) -> dict[str, Any]:
    """Density over BINS bins within three and a half standard deviations, with mean, std and extent."""
    x = x.detach().float().flatten()
    mean, std = float(x.mean()), float(x.std())
    reach = max(3.5 * std, 1e-12)
    low, high = mean - reach, mean + reach
    counts = torch.histc(x, BINS, low, high)
    density = counts / (x.numel() * (high - low) / BINS)
    return {"mean": mean, "std": std, "low": low, "high": high, "density": [round(v, 6) for v in density.tolist()]}


class Diagnostics:
    """Collects pictures of a model while it trains: `look` before an update, `updated` after it, `write`
    at the end."""

    def __init__(self, model: LanguageModel, vocab_size: int):
        self.model, self.vocab_size = model, vocab_size
        self.moments: list[dict[str, Any]] = []
        self._before: dict[str, Tensor] = {}

    def look(self, step: int, idx: Tensor, targets: Tensor) -> dict[str, Any]:
        """Forward and backward on a batch, without touching the gradients of training: loss, activations,
        gradients."""
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
        weights = {
            n: {"std": float(p.detach().float().std()), "gradient_std": float(p.grad.float().std())}
            for n, p in model.named_parameters()
            if p.grad is not None and p.numel() > 1
        }
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for n, b in model.named_buffers():
                b.copy_(buffers[n])
        torch.set_rng_state(generator)
        self._before = {n: p.detach().clone() for n, p in model.named_parameters()}
        moment = {
            "step": step,
            "loss": float(loss.detach()),
            "expected_initial_loss": math.log(self.vocab_size),
            "layers": layers,
            "weights": weights,
        }
        self.moments.append(moment)
        return moment

    def updated(self, step: int) -> None:
        """After the update that follows `look`: log10 of the update's size over the weight's, for every
        matrix."""
        for name, p in self.model.named_parameters():
            if p.ndim < 2 or name not in self.moments[-1]["weights"]:
                continue
            before = self._before[name].float()
            update, size = float((p.detach().float() - before).std()), float(before.std())
            ratio = math.log10(update / size) if update > 0 and size > 0 else None
            self.moments[-1]["weights"][name]["log10_update_to_weight"] = ratio
        self._before = {}

    def write(self, folder: Path, name: str) -> tuple[Path, Path]:
        """<folder>/<name>.json and .png; returns their paths."""
        json_path, png_path = folder / f"{name}.json", folder / f"{name}.png"
        write_json(json_path, {"moments": self.moments})
        if self.moments:
            draw(self.moments, png_path)
        return json_path, png_path


def draw(moments: list[dict[str, Any]], path: Path) -> None:
    """Six panels: activations and gradients at the start and at the end, saturation and update ratios
    over time."""
    from lab import plots

    fig, axes = plots.figure(2, 3, size=(13, 7))
    for column, (moment, when) in enumerate(((moments[0], "first step"), (moments[-1], "last look"))):
        for row, what in enumerate(("activation", "gradient")):
            ax = axes[row][column]
            for i, (name, layer) in enumerate(moment["layers"].items()):
                h = layer[what]
                width = (h["high"] - h["low"]) / BINS
                x = [h["low"] + (k + 0.5) * width for k in range(BINS)]
                ax.plot(x, h["density"], color=plots.color(i), label=name)
            ax.set_title(f"{what}s, {when} (step {moment['step']})")
            ax.set_yticks([])
            if moment["layers"]:
                ax.legend()
            else:
                plots.note(ax, "no hidden layer")
    _draw_saturation(axes[0][2], moments, plots)
    _draw_ratios(axes[1][2], moments, plots)
    first = moments[0]
    fig.suptitle(
        f"initial loss {first['loss']:.3f}, uniform guessing would have {first['expected_initial_loss']:.3f} nats"
    )
    plots.save(fig, path)


def _draw_saturation(ax, moments, plots) -> None:
    names = [n for n, layer in moments[0]["layers"].items() if layer["squashed"]]
    for i, name in enumerate(names):
        share = [100 * m["layers"][name]["saturated"] for m in moments]
        ax.plot([max(m["step"], 0.5) for m in moments], share, "o-", color=plots.color(i), label=name)
    ax.set_title(f"saturated units (|output| above {SATURATED}), %")
    ax.set_xscale("log")
    ax.set_xlabel("step")
    if names:
        ax.legend()
    else:
        plots.note(ax, "no squashing units")


def _draw_ratios(ax, moments, plots) -> None:
    names = [n for n, w in moments[0]["weights"].items() if "log10_update_to_weight" in w][:10]
    for i, name in enumerate(names):
        points = [(m["step"], m["weights"].get(name, {}).get("log10_update_to_weight")) for m in moments]
        points = [(max(s, 0.5), r) for s, r in points if r is not None]
        ax.plot([s for s, _ in points], [r for _, r in points], "o-", color=plots.color(i), label=name)
    ax.axhline(-3, color="0.6", linestyle="--", linewidth=1)
    ax.set_title("log10 of update to weight (-3 is a usual aim)")
    ax.set_xscale("log")
    ax.set_xlabel("step")
    if names:
        ax.legend(fontsize=7)
    else:
        plots.note(ax, "no trained matrices")
