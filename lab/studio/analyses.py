"""Looks into a run's checkpoints that the Models page offers, each as (matplotlib figure or None, HTML)."""

from __future__ import annotations

import html
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lab.studio.catalogue import Models, steps_of
from lab.studio.places import Refused
from lab.studio.progress import curves, read_progress
from lab.studio.writing import guess

if TYPE_CHECKING:
    from lab.checkpoints import Checkpoint

MOST_CHECKPOINTS = 12  # along a training; more would only take longer
TOP = 7
SAMPLE_TOKENS = 150


def along(path: Path) -> list[Path]:
    """The checkpoints of a run by step, at most MOST_CHECKPOINTS of them, first and last included."""
    found = [step for step in steps_of(path) if step.stem != "best"]
    if len(found) <= MOST_CHECKPOINTS:
        return found
    return [found[round(i * (len(found) - 1) / (MOST_CHECKPOINTS - 1))] for i in range(MOST_CHECKPOINTS)]


def losses(models: Models, checkpoint: Checkpoint, prompt: str) -> tuple[Any, str]:
    """Training and validation loss as the run's log tells them."""
    log = checkpoint.path.parent.with_name(checkpoint.path.parent.name.removesuffix(".checkpoints") + ".txt")
    progress = read_progress(log)
    if not progress.steps:
        raise Refused("there is no log beside this checkpoint")
    best = min(progress.val, key=lambda point: point[1], default=None)
    words = f"Least validation loss {best[1]:.4f} at step {best[0]:,}." if best else "No validation yet."
    return curves(progress, None), f"<p>{words}</p>"


def samples(models: Models, checkpoint: Checkpoint, prompt: str) -> tuple[Any, str]:
    """What each checkpoint writes after the same prompt with the same seed."""
    from lab.sample import generate

    texts = []
    for path in along(checkpoint.path):
        (made,) = generate(models.load(path), prompt, max_tokens=SAMPLE_TOKENS, temperature=0.8, seed=1)
        texts.append((step_label(path), made))
    return None, _listed(texts)


def variability(models: Models, checkpoint: Checkpoint, prompt: str) -> tuple[Any, str]:
    """Several samples of one checkpoint."""
    from lab.sample import generate

    made = generate(checkpoint, prompt, count=6, max_tokens=SAMPLE_TOKENS, temperature=0.8)
    return None, _listed([(f"{number}", one) for number, one in enumerate(made, 1)])


def _listed(texts: list[tuple[str, Any]]) -> str:
    return "".join(
        f"<div class='sample'><span>{label}</span><div>{html.escape(one.text.strip())}{'' if one.ended else ' ...'}"
        "</div></div>"
        for label, one in texts
    )


def next_token(models: Models, checkpoint: Checkpoint, prompt: str) -> tuple[Any, str]:
    """The likeliest next tokens after the prompt, and the entropy there, along training."""
    from matplotlib.figure import Figure

    from lab.plots import color

    ids = tuple(checkpoint.encode_prompt(prompt)[1:])
    paths = along(checkpoint.path)
    size = checkpoint.tokenizer.vocab_size
    found = [guess(models.load(path), ids, len(ids), count=size) for path in paths]
    steps = [_step(path) for path in paths]
    figure = Figure(figsize=(7, 5), layout="constrained", dpi=110)
    top, bottom = figure.subplots(2, sharex=True)
    for number, (piece, _) in enumerate(found[-1].top[:TOP]):
        shares = [dict(one.top)[piece] for one in found]
        top.plot(steps, shares, color=color(number), marker=".", label=piece)
    top.set(ylabel="probability", ylim=(0, 1), title=f"After {prompt[-40:]!r}")
    top.legend(frameon=False, fontsize=8, ncols=2)
    bottom.plot(steps, [one.entropy_nats for one in found], color=color(0), marker=".")
    bottom.set(xlabel="step", ylabel="entropy (nats)")
    bottom.set_ylim(bottom=0)
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92")
    first, last = found[0].entropy_nats, found[-1].entropy_nats
    return figure, f"<p>Entropy {first:.3f} nats at step {steps[0]:,}, {last:.3f} at step {steps[-1]:,}.</p>"


def _step(path: Path) -> int:
    name = path.stem.rpartition("-")[2]
    return int(name) if name.isdigit() else 0


def step_label(path: Path) -> str:
    """'best by validation', or the step in a checkpoint's name."""
    return "best by validation" if path.stem == "best" else f"step {_step(path):,}"


ANALYSES: dict[str, Callable[[Models, Any, str], tuple[Any, str]]] = {
    "Loss along training": losses,
    "Samples along training": samples,
    "Several samples": variability,
    "Next token along training": next_token,
}
