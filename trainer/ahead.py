"""Gradients taken ahead of the weights, `ema_nesterov` (#308, #309; arXiv:2605.25395).

With x the weights, A an optimizer's update and m a mean of what its updates did,

    x' = A(x + beta m),    m' = gamma m + (1 - gamma)(x' - x),    gamma = 0.99

so that a step goes on along m, too, and the gradient is taken where that leads. beta is `ema_nesterov` times the
learning rate's factor over its largest one, from 15 to 75 % of the scheduled steps, and 0 elsewhere. m begins at 0 with
the weights after a parameter's first update.

Between steps a parameter is x + beta m itself, with the beta of the next step: so it is sent as it is, and whoever
updates it (one process a matrix, each its rows of the head, all of them all else) keeps x and m for it. What is
validated and saved between 15 and 75 % is that point, then x. A tied input embedding follows the head, and begins
with its first update after they have parted. Where Adam updates every few steps, its parameters stand still in
between. float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kernels.muon import join_master, put_master_
from trainer.schedule import highest_rate_factor, learning_rate_factor, scheduled, split_step

GAMMA, BEGIN, END = 0.99, 0.15, 0.75


def ahead_at(step: int, config: Any) -> float:
    """beta of a step."""
    inside = BEGIN <= step / scheduled(config) < END
    return config.ema_nesterov * learning_rate_factor(step, config) / highest_rate_factor(config) if inside else 0.0


class Ahead:
    """matrices, others: what this process updates, by name. mantissa: the lower bits of bfloat16 matrices."""

    def __init__(self, config: Any, matrices: Mapping[str, Tensor], others: Mapping[str, Tensor], mantissa: Mapping):
        self.config, self.named, self.mantissa = config, {**matrices, **others}, mantissa
        zeros = lambda p: torch.zeros(p.shape, dtype=torch.float32, device=p.device)  # noqa: E731
        self.weight, self.mean = ({n: zeros(p) for n, p in self.named.items()} for _ in range(2))
        first = dict.fromkeys(matrices, 0) | dict.fromkeys(others, config.adam_every - 1)
        if "embed1.weight" in first:
            first["embed1.weight"] += split_step(config) + 1
        self.first = first  # update of each

    @torch.no_grad()
    def after(self, step: int, updated: Mapping[str, Tensor]) -> None:
        """After the update of some of the parameters in a step, before they are sent."""
        beta = ahead_at(step + 1, self.config)
        for name in updated:
            p, low = self.named[name].detach(), self.mantissa.get(name)
            new = p.float() if low is None else join_master(p, low)
            weight, mean = self.weight[name], self.mean[name]
            if step <= self.first[name]:
                mean.zero_()
            else:
                mean.lerp_(new - weight, 1 - GAMMA)
            weight.copy_(new)
            if beta and low is None:
                p.copy_(new + beta * mean)
            elif beta:
                put_master_(p, low, new + beta * mean)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for checkpoints; live, not copies."""
        kinds = dict(weight=self.weight, mean=self.mean)
        return {f"ahead.{kind}.{name}": t for kind, tensors in kinds.items() for name, t in tensors.items()}
