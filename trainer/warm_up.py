"""Before the clock starts: a few steps on random tokens, of which no trace stays.

So the reference runs of the speedrun do it (https://github.com/KellerJordan/modded-nanogpt): what is compiled and
allocated in the first steps of a process is no part of the time that training takes."""

from __future__ import annotations

from typing import Any

import torch

from trainer import schedule
from trainer.processes import StopRequest, rank
from trainer.streams import to_device


def compiler_options(tune: bool) -> dict[str, bool]:
    """Of torch.compile. Inductor's search for an order that holds less memory would move what tells of gradients in the
    backward pass (trainer/leaving.py) to its end; without it the peak of `medium` is the same."""
    return dict(coordinate_descent_tuning=tune, reorder_for_peak_memory=False)


def warm_up(trainer: Any, stop: StopRequest) -> None:
    """Train on random tokens so that everything is compiled and allocated, then put all state back.

    Every length of sequences and number of targets occurs, as each is a graph; so do the first and the last window and
    a validation. The state waits on the host: the GPU's peak is the training's own. A signal ends it at once."""
    c, device = trainer.config, trainer.device
    if not c.warmup_steps:
        return
    before = {name: t.to("cpu", copy=True) for name, t in trainer.state().items()}
    random = torch.Generator().manual_seed(c.seed)
    least = min([c.vocab_size, *schedule.listed_classes(c)])  # no more different targets than any step has classes
    draw = lambda length: torch.randint(least, (length,), generator=random)  # noqa: E731
    mine = len(schedule.my_sequences(c, rank(), trainer.world_size))
    last = max(0, c.num_iterations - 1 - c.num_iterations % schedule.whole_steps(c))  # with all optimizers
    steps = [last, *schedule.shapes(c).values()]
    for i in range(max(c.warmup_steps, len(steps) if len(steps) > 2 else 1)):
        if stop.heard():
            break
        step = steps[i % len(steps)]
        length = schedule.sequence_tokens_at(step, c)
        trainer.step(step, [(draw(length), draw(length)) for _ in range(mine)])
    with torch.no_grad():
        trainer.exchange.wait_weights()
        drawn = draw(c.val_seq_len), draw(c.val_seq_len)
        tokens, targets = to_device(drawn, device)
        trainer.forward(tokens[None], targets[None], window_blocks=trainer.window, **trainer.rows.fetch(drawn[0]))
    trainer.model.zero_grad(set_to_none=True)
    trainer.rows.forget()
    for name, live in trainer.state().items():
        live.copy_(before[name])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
