"""The weights' average over the end of a run, `tail_ema` (#347, #325; averages of weights: Polyak and Juditsky 1992).

Over the last `tail_ema_steps` steps  a <- decay a + (1 - decay) w,  begun with the weights after the first of them.
After the last one  w <- (1 - share) w + share a,  brought back to the norm that w had: of each matrix of the blocks,
and row by row of head and input embedding, as their rows may lie on several processes. float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels.muon import join_master, put_master_

AVERAGED = ("head_w", "embed1.weight")  # beside the blocks' matrices


class TailAverage:
    """matrices, others: what this process updates, by name. mantissa: the lower bits of bfloat16 matrices."""

    def __init__(self, config: Any, matrices: Mapping[str, Tensor], others: Mapping[str, Tensor], mantissa: Mapping):
        c = config
        self.last, self.first, self.decay = c.num_iterations - 1, c.num_iterations - c.tail_ema_steps, c.tail_ema
        self.named = {**matrices, **{n: p for n, p in others.items() if n in AVERAGED}}
        self.mantissa = mantissa
        self.share = {n: c.tail_ema_tables if n in AVERAGED else c.tail_ema_matrices for n in self.named}
        self.mean = {n: torch.zeros(p.shape, dtype=torch.float32, device=p.device) for n, p in self.named.items()}

    def master(self, name: str) -> Tensor:
        """The weight in float32."""
        p, low = self.named[name].detach(), self.mantissa.get(name)
        return p.float() if low is None else join_master(p, low)

    def take(self, step: int, exchange: Any) -> None:
        """After the update of a step, with trainer.exchange: its weights enter the average; after the last step it
        enters them, and everyone learns of it."""
        if step == self.last:
            exchange.wait_weights()  # what is on its way would overwrite the new ones
        if self.after(step):
            exchange.publish_matrices()
            exchange.publish_head()

    @torch.no_grad()
    def after(self, step: int) -> bool:
        """After the update of a step; whether it was the last one, so that the weights are new ones."""
        for name, mean in self.mean.items():
            if step == self.first:
                mean.copy_(self.master(name))
            elif step > self.first:
                mean.lerp_(self.master(name), 1 - self.decay)
        if step == self.last:
            for name in self.named:
                self.mix(name)
        return step == self.last

    def mix(self, name: str) -> None:
        """Put the mixture of weight and average in the weight's place."""
        p, old, axes = self.named[name], self.master(name), -1 if name in AVERAGED else (-2, -1)
        new = old.lerp(self.mean[name], self.share[name])
        before, after = (torch.linalg.vector_norm(x, dim=axes, keepdim=True) for x in (old, new))
        new = new * (before / after.clamp(min=torch.finfo(torch.float32).tiny))
        if name in self.mantissa:
            put_master_(p, self.mantissa[name], new)
        else:
            p.copy_(new)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for checkpoints; live, not copies."""
        return {f"ema.mean.{name}": t for name, t in self.mean.items()}
