"""Analysis 2: the architecture, drawn from the model itself."""

import html
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lab import plots
from lab.analyses.finding import Finding, write_finding
from lab.checkpoints import Checkpoint

MOST_BOXES = 26


def describe(checkpoint: Checkpoint, length: int = 16) -> list[dict[str, Any]]:
    """The model's parts in the order in which they are written: name, kind, parameters, their shapes, output shape.
    Lists and sequences are opened; equal parts that follow each other are counted once, `times`."""
    model = checkpoint.model
    shapes: dict[str, list[int]] = {}

    def catch(name):
        def hook(module, inputs, output):  # returns nothing: a value would replace the module's output
            shapes.setdefault(name, list(getattr(output, "shape", [])))

        return hook

    hooks = [module.register_forward_hook(catch(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model.logits(torch.ones(1, length, dtype=torch.long))
    finally:
        for hook in hooks:
            hook.remove()
    parts: list[dict[str, Any]] = []
    _collect(model, "", parts, shapes)
    merged: list[dict[str, Any]] = []
    for part in parts:
        same = merged and all(merged[-1][k] == part[k] for k in ("kind", "shapes", "output"))
        if same and part["parameters"]:
            merged[-1]["times"] += 1
            merged[-1]["parameters"] += part["parameters"]
            merged[-1]["last"] = part["name"]
        else:
            merged.append(part)
    return merged


def _collect(module: nn.Module, prefix: str, parts: list[dict[str, Any]], shapes: dict[str, list[int]]) -> None:
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        container = isinstance(child, nn.ModuleList | nn.Sequential) or type(child).__name__ == "GPT"
        if container:
            _collect(child, f"{full}.", parts, shapes)
            continue
        own = dict(child.named_parameters())
        parts.append(_part(full, type(child).__name__, own, shapes.get(full, [])))
    for name, p in module.named_parameters(recurse=False):
        parts.append(_part(f"{prefix}{name}", "Parameter", {name: p}, []))
    for name, b in module.named_buffers(recurse=False):
        parts.append(_part(f"{prefix}{name}", "Buffer (counted)", {}, list(b.shape)))


def _part(name: str, kind: str, parameters: dict[str, torch.Tensor], output: list[int]) -> dict[str, Any]:
    shapes = {n: list(p.shape) for n, p in parameters.items()}
    count = sum(p.numel() for p in parameters.values())
    return {
        "name": name,
        "last": name,
        "kind": kind,
        "parameters": count,
        "shapes": shapes,
        "output": output,
        "times": 1,
    }


def architecture(checkpoint: Checkpoint, out: Path) -> Finding:
    """Boxes from the input (top) to the output, with parameter counts, weight shapes and output shapes."""
    parts = describe(checkpoint)
    shown = parts[:MOST_BOXES]
    total = checkpoint.model.num_parameters()
    fig, ax = plots.figure(size=(9.5, 0.62 * (len(shown) + 2) + 0.6))
    ax.set_xlim(0, 10)
    ax.set_ylim(-len(shown) - 1.5, 1)
    ax.axis("off")
    _box(ax, 0, f"tokens (1, 16), vocabulary {checkpoint.tokenizer.vocab_size:,}", "", "#eeeeee")
    for i, part in enumerate(shown, 1):
        name = part["name"] if part["times"] == 1 else f"{part['name']} .. {part['last']}  ×{part['times']}"
        weights = ", ".join(f"{n} {'×'.join(map(str, s))}" for n, s in part["shapes"].items())
        output = f" → {'×'.join(map(str, part['output']))}" if part["output"] else ""
        count = f"{part['parameters']:,}" if part["parameters"] else "no parameters"
        tint = "#d7e8f5" if part["parameters"] else "#f4f4f4"
        _box(ax, -i, f"{name}: {part['kind']}{output}", f"{count}{'; ' if weights else ''}{weights}"[:118], tint)
    end = f"logits over {checkpoint.tokenizer.vocab_size:,} tokens"
    _box(
        ax, -len(shown) - 1, end, f"{len(parts) - len(shown)} parts more" if len(parts) > len(shown) else "", "#eeeeee"
    )
    ax.set_title(f"{checkpoint.label} ({checkpoint.name}): {total:,} parameters")
    several = checkpoint.several_tokens("it has no row of a token")
    count = sum(p["times"] for p in parts)
    summary = f"{checkpoint.name}: {total:,} parameters in {count} part{'' if count == 1 else 's'}.{several}"
    data = {"checkpoint": checkpoint.path.name, "parameters": total, "parts": parts}
    return write_finding(out, "architecture", summary, data, fig, as_table(parts))


def as_table(parts: list[dict[str, Any]]) -> str:
    """The parts as an HTML table, which can be read on a telephone."""
    rows = []
    for part in parts:
        name = part["name"] if part["times"] == 1 else f"{part['name']} .. {part['last']} (×{part['times']})"
        weights = ", ".join(f"{n} {'×'.join(map(str, s))}" for n, s in part["shapes"].items())
        output = "×".join(map(str, part["output"]))
        cells = (name, part["kind"], f"{part['parameters']:,}" if part["parameters"] else "", output, weights)
        first, *others = map(html.escape, cells)
        rows.append(f"<tr><th scope=row>{first}</th>{''.join(f'<td>{one}</td>' for one in others)}</tr>")
    head = "".join(f"<th scope=col>{name}</th>" for name in ("part", "kind", "parameters", "puts out", "weights"))
    whole = f"<table class=parts><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class=scrolls tabindex=0 role=region aria-label="the parts of the model">{whole}</div>'


def _box(ax: Any, y: float, title: str, details: str, tint: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    ax.add_patch(FancyBboxPatch((0.2, y - 0.33), 9.6, 0.66, "round,pad=0.02", facecolor=tint, edgecolor="0.6"))
    ax.text(0.35, y + (0.13 if details else 0), title, va="center", fontsize=9)
    if details:
        ax.text(0.35, y - 0.17, details, va="center", fontsize=7, color="0.35")
