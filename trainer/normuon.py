"""NorMuon: Muon whose updates are brought to one size row by row (Li et al. 2025, arXiv:2510.05491; #144).

    m <- m + (1 - mu)(g - m),   u = g + mu (m - g),   X = orthogonalised u
    v <- v + (1 - beta2)(mean of squares of X's rows - v),   X <- X / sqrt(max(v, 1e-10)), of the same norm as before
    p <- p - l X - (decay * lr f) l p where X p >= 0,   l = lr f * the factor of its kind

The last is cautious decay (#154; after Chen et al. 2025, arXiv:2510.12402): it never works against the update, and it
is quadratic in the rate. A row is one of the matrix as the reference stores it: of the MLP's second matrix, which
lies transposed there, it is a column of ours. Each D x D part of the attention's weight is a matrix of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kernels.muon import apply_update_, momentum_, normalize_rows_, orthogonalize, orthogonalize_gram
from trainer.schedule import learning_rate_factor, muon_momentum_at, scheduled

KINDS = ("qkvo", "mlp_in", "mlp_out", "gates")  # of matrices, by a part of their names
NARROW = (".qk_w", ".vo_w")  # and where q and k are narrower than v, the two halves of "qkvo"
FAST, SLOW, SHARE = 0.85, 0.98, 0.4385  # momenta of `two_rate_from`, and the share of the fast one


def kind_of(name: str) -> str:
    """Of a matrix by its parameter's name, of KINDS."""
    return "qkvo" if name.endswith(NARROW) else next(kind for kind in KINDS if kind in name)


def factors(text: str) -> dict[str, float]:
    """{kind: factor} from 'qkvo=2,mlp_out=4'. Raises ValueError."""
    pairs = (word.partition("=") for word in text.split(",") if word.strip())
    found = {name.strip(): float(value) for name, _, value in pairs}
    if unknown := found.keys() - set(KINDS):
        raise ValueError(f"no matrices are called {', '.join(sorted(unknown))}")
    return found


def two_rates_(fast: Tensor, slow: Tensor, grad: Tensor, momentum: float) -> Tensor:
    """`two_rate_from` (#340): momentum that is the mean of a fast and a slow one, which change in place. Returns the
    update, as `kernels.muon.momentum_` does."""
    grad = grad.to(fast.dtype)
    fast.lerp_(grad, 1 - FAST)
    slow.lerp_(grad, 1 - SLOW)
    return grad.lerp(SHARE * fast + (1 - SHARE) * slow, momentum)


def balance_(second: Tensor, update: Tensor, beta2: float) -> Tensor:
    """NorMuon's second line: `update` (..., M, N) with rows of one size; `second` (..., M, 1), or (..., 1, N) for the
    columns, changes in place. float32."""
    if second.size(-1) == 1:
        return normalize_rows_(update, second.squeeze(-1), beta2=beta2)
    return normalize_rows_(update.mT, second.squeeze(-2), beta2=beta2).mT


def apply_cautious_(
    weight: Tensor, mantissa: Tensor | None, update: Tensor, lr: float, decay: float, impl: str = "auto"
) -> None:
    """weight <- weight - lr update - decay weight where update and weight agree in sign (or one is 0), in place; with a
    mantissa on the float32 master that both together are."""
    apply_update_(weight, mantissa, update, lr=lr, weight_decay=decay, cautious=True, impl=impl)


class NorMuon:
    """The optimizer of the blocks' matrices where `normuon_beta2` is given; the interface of train_gpt.Muon.

    A bfloat16 weight keeps the lower 16 bits of its float32 master beside it; a float32 weight is its own."""

    def __init__(self, named: Mapping[str, nn.Parameter], config: Any, impl: str):
        c = self.config = config
        self.impl, self.named = impl, dict(named)
        self.dtype, self.factors = getattr(torch, c.dtype), factors(c.muon_lr_factors)
        zeros = lambda p, dtype: torch.zeros(p.shape, dtype=dtype, device=p.device)  # noqa: E731
        self.momentum = {n: zeros(p, torch.float32) for n, p in named.items()}
        halves = {n: p for n, p in named.items() if p.dtype == torch.bfloat16}
        self.mantissa = {n: zeros(p, torch.int16) for n, p in halves.items()}
        begin = c.two_rate_from * scheduled(c)
        self.two_rates_from = math.ceil(begin) if begin else -1
        self.slow = {n: zeros(p, torch.float32) for n, p in named.items()} if begin else {}
        self.second = {n: zeros(self._row_sums(n, m), torch.float32) for n, m in self.momentum.items()}
        shapes: dict[tuple, list[str]] = {}
        for name, p in named.items():
            shapes.setdefault(tuple(sorted(p.shape[-2:])), []).append(name)
        self.groups = list(shapes.values())

    @staticmethod
    def _row_sums(name: str, x: Tensor) -> Tensor:
        return x[..., :1, :] if kind_of(name) == "mlp_out" else x[..., :1]

    @torch.no_grad()
    def step(self, step: int) -> None:
        """One update from the `.grad` of every parameter; `step` sets rate and momentum."""
        c = self.config
        lr, momentum = c.muon_lr * learning_rate_factor(step, c), muon_momentum_at(step, c)
        for names in self.groups:
            pieces = [piece for n in names for piece in self.cut(n, self.momentum_of(n, step, momentum))]
            orthogonal = iter(self.orthogonal(pieces))
            for name in names:
                p, seconds = self.named[name], self.cut(name, self.second[name])
                balanced = [balance_(second, next(orthogonal), c.normuon_beta2) for second in seconds]
                update = torch.cat([piece.reshape(-1, *p.shape[-2:]) for piece in balanced]).view(p.shape)
                rate = lr * self.factors.get(kind_of(name), 1.0)
                decay = c.muon_weight_decay * lr * rate
                apply_cautious_(p, self.mantissa.get(name), update, rate, decay, self.impl)

    def momentum_of(self, name: str, step: int, momentum: float) -> Tensor:
        """The update of a parameter before it is orthogonalised."""
        fast, grad = self.momentum[name], self.named[name].grad
        if not 0 <= self.two_rates_from <= step:
            return momentum_(fast, grad, momentum, impl=self.impl)
        if step == self.two_rates_from:
            self.slow[name].copy_(fast)
        return two_rates_(fast, self.slow[name], grad, momentum)

    def cut(self, name: str, x: Tensor) -> list[Tensor]:
        """The matrices that a parameter consists of, as batches of one shape each; x: its update, or one that has one
        number a row. With `muon_head_pairs` (#253) q and k are matrices of two heads each."""
        if self.config.muon_head_pairs and kind_of(name) == "qkvo" and not name.endswith(".vo_w"):
            rows = 2 * x.size(-2) // self.config.num_heads
            return [x[:2].reshape(-1, rows, x.size(-1)), *([x[2:]] if len(x) > 2 else [])]
        return [x.view(-1, *x.shape[-2:])]

    def orthogonal(self, pieces: list[Tensor]) -> list[Tensor]:
        """Each batch of matrices orthogonalised; tall ones are turned, so that one batch holds all of a shape."""
        how = dict(coefficients=self.config.muon_coefficients, dtype=self.dtype, impl=self.impl)
        wide = [x.mT if x.size(-2) > x.size(-1) else x for x in pieces]
        found = list(wide)
        for shape in dict.fromkeys(x.shape[-2:] for x in wide):
            places = [i for i, x in enumerate(wide) if x.shape[-2:] == shape]
            batch = torch.cat([wide[i] for i in places]) if len(places) > 1 else wide[places[0]]
            if self.config.gram_newton_schulz and shape[-1] >= 2 * shape[-2] and shape[-1] > self.config.model_dim:
                half = torch.float16 if self.dtype == torch.bfloat16 else self.dtype
                turned = orthogonalize_gram(batch, self.config.muon_coefficients, half)
            else:
                turned = orthogonalize(batch, **how)
            for i, out in zip(places, turned.split([wide[i].size(0) for i in places])):
                found[i] = out
        return [out.mT if x.size(-2) > x.size(-1) else out for x, out in zip(pieces, found)]

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for checkpoints; live, not copies."""
        kinds = dict(momentum=self.momentum, mantissa=self.mantissa, second=self.second, slow=self.slow)
        return {f"muon.{kind}.{name}": t for kind, tensors in kinds.items() for name, t in tensors.items()}
