"""Gradients that set out while the backward pass still runs, compiled or not.

A compiled backward pass hands over all gradients at its end, so hooks on parameters hear of the head's, which are made
first, as late as of the embedding's. Here a group of weights goes through `leaving` on its way into the model, and an
operator in the backward pass is told of the group's gradients as soon as all of them are there. It changes nothing; it
says that it may change them, which keeps compilers from taking it away.

The operator tells whoever `listen` gave a number: trainer/exchange.py, which starts the group's message or, where
gradients of several sequences add up first, does nothing.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from kernels.guards import differentiable_once


class Listener(Protocol):
    def leave(self, group: int, gradients: list[Tensor]) -> None:
        """Of the last sequence alone, complete; to be read, not changed."""


class Groups(NamedTuple):
    """Names of weights whose gradients leave together, group by group, and the number of who listens."""

    names: tuple[tuple[str, ...], ...]
    listener: int


_listeners: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def listen(listener: Listener, names: tuple[tuple[str, ...], ...]) -> Groups:
    """The groups as `leaving` takes them; `listener` hears of them for as long as it lives."""
    number = next(_numbers)
    _listeners[number] = listener
    return Groups(names, number)


@torch.library.custom_op("speedrun::leave", mutates_args=("gradients",))
def _leave(gradients: list[Tensor], listener: int, group: int) -> None:
    if (found := _listeners.get(listener)) is not None:
        found.leave(group, gradients)


class _Leaving(torch.autograd.Function):
    @staticmethod
    def forward(ctx, listener, group, *weights):
        ctx.to = listener, group
        return tuple(weight.view_as(weight) for weight in weights)

    @staticmethod
    @differentiable_once("leaving")
    def backward(ctx, *gradients):
        _leave(list(gradients), *ctx.to)
        return None, None, *gradients


def leaving(weights: Mapping[str, Tensor], groups: Groups | None) -> dict[str, Tensor]:
    """The weights by name, as the model takes them: where gradients will be made, those of a group that is among them
    whole tell of theirs together."""
    found = dict(weights)
    if groups is None or not torch.is_grad_enabled():
        return found
    for number, names in enumerate(groups.names):
        if names and all(name in found for name in names):
            found |= dict(zip(names, _Leaving.apply(groups.listener, number, *(found[name] for name in names))))
    return found
