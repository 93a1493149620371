"""A model's architecture, drawn from the model itself: its parts in the order in which they run, with parameter
counts and the shapes that come out of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lab.checkpoints import Checkpoint

LOOKED_AT = 16  # tokens of the input that is sent through


@dataclass(frozen=True)
class Part:
    """A module, or parameters that the model holds itself; `count` of them in a row if they are alike."""

    name: str
    kind: str
    parameters: int
    shape: str  # of the output, '' if it is never called
    count: int = 1


def parts_of(checkpoint: Checkpoint) -> list[Part]:
    """The parts of a model, equal neighbours (the blocks of a transformer) taken together."""
    import torch

    model = checkpoint.model
    leaves = dict(_leaves(model, ""))
    shapes: dict[str, str] = {}

    def note(name):
        def hook(module, inputs, output):
            shapes[name] = " x ".join(map(str, output.shape[1:])) if torch.is_tensor(output) else ""

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in leaves.items()]
    try:
        with torch.no_grad():
            logits = model(torch.full((1, LOOKED_AT), checkpoint.tokenizer.mark))[0]
    finally:
        for hook in hooks:
            hook.remove()
    order = [*shapes, *(name for name in leaves if name not in shapes)]  # as called; what is not called, last
    parts = []
    for name in order:
        module = leaves[name]
        count = sum(p.numel() for p in module.parameters())
        parts.append(Part(name, type(module).__name__, count, shapes.get(name, "")))
    held = [(n, p) for n, p in model.named_parameters() if not any(_owns(leaf, n) for leaf in leaves)]
    parts += [Part(name, "parameter", p.numel(), " x ".join(map(str, p.shape))) for name, p in held]
    parts.append(Part("logits", "output", 0, " x ".join(map(str, logits.shape[1:]))))
    return _together(parts)


def _leaves(module, prefix: str):
    """Modules without children, by name; what others hold themselves is a part of its own."""
    children = list(module.named_children())
    if prefix and not children:
        yield prefix, module
    for name, child in children:
        yield from _leaves(child, f"{prefix}.{name}" if prefix else name)


def _owns(leaf: str, parameter: str) -> bool:
    return parameter.startswith(f"{leaf}.")


def _together(parts: list[Part]) -> list[Part]:
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        stem = re.sub(r"\d+\Z", "*", part.name)
        alike = last and stem.endswith("*") and re.sub(r"[\d*]+\Z", "*", last.name) == stem
        if alike and (last.kind, last.parameters, last.shape) == (part.kind, part.parameters, part.shape):
            found[-1] = Part(stem, part.kind, part.parameters, part.shape, last.count + 1)
        else:
            found.append(part)
    return found


def diagram(checkpoint: Checkpoint):
    """A matplotlib figure of `parts_of`, from the input down to the logits."""
    from matplotlib.figure import Figure

    from lab.plots import color

    parts = parts_of(checkpoint)
    vocabulary = f"{LOOKED_AT} of {checkpoint.tokenizer.vocab_size:,}"
    boxes = [("tokens", vocabulary, "input", 0), *((_title(p), p.shape, p.kind, p.parameters * p.count) for p in parts)]
    figure = Figure(figsize=(6.4, 0.62 * len(boxes) + 0.5), layout="constrained", dpi=110)
    axes = figure.add_subplot()
    axes.set(xlim=(0, 10), ylim=(-len(boxes) + 0.4, 0.6))
    axes.axis("off")
    shades = {kind: color(i) for i, kind in enumerate(dict.fromkeys(kind for _, _, kind, _ in boxes))}
    for row, (title, shape, kind, count) in enumerate(boxes):
        box = dict(boxstyle="round,pad=0.1", facecolor=shades[kind], alpha=0.16, edgecolor=shades[kind])
        axes.add_patch(_box(0.3, -row - 0.26, 9.4, 0.52, box))
        axes.text(0.5, -row, title, va="center", fontsize=9, weight="bold")
        axes.text(5.0, -row, shape, va="center", ha="left", fontsize=9)
        axes.text(9.5, -row, f"{count:,}" if count else "", va="center", ha="right", fontsize=9)
        if row:
            axes.annotate("", (2.2, -row + 0.34), (2.2, -row + 0.66), arrowprops=dict(arrowstyle="->", color="0.5"))
    total = checkpoint.model.num_parameters()
    axes.set_title(f"{checkpoint.name}: {total:,} parameters   (part, shape that comes out, parameters)", fontsize=9)
    return figure


def _title(part: Part) -> str:
    return f"{part.name}  {part.kind}" + (f"  ×{part.count}" if part.count > 1 else "")


def _box(x: float, y: float, width: float, height: float, style: dict):
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch((x, y), width, height, **style)
