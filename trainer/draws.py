"""Initial values that depend on a run's seed and on the name of what is drawn, not on what was drawn before it.

With one seed, two configurations begin with equal weights wherever they have a parameter of one name and shape, also
where one of them has parameters that the other lacks. That makes two runs of one seed a pair (stats/paired.py)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch


class Draws:
    """Made from the seed that torch was last given (`torch.manual_seed`), it gives each name a seed of its own.

    torch's generators, of all devices, are left as the last name's drawing leaves them: a second model that is made
    without another `torch.manual_seed` has other values."""

    def __init__(self):
        self.seed = torch.initial_seed()

    def __call__(self, name: str, fill: Callable[..., Any], *arguments: float) -> None:
        """Call `fill` (a tensor's `normal_`, a module's `reset_parameters`) with what it draws seeded by the name."""
        told = hashlib.blake2b(f"{self.seed} {name}".encode(), digest_size=8).digest()
        torch.manual_seed(int.from_bytes(told, "little") >> 1)
        fill(*arguments)
