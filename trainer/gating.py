"""What small networks say of each token: gates of attention (`dynamic_gates`), mixtures of heads (`head_mixing`); #315.

Both are by the token what other techniques learn once for all tokens. Shapes as in train_gpt.py; H heads, S keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.norm import rms_norm as norm

REACH = 112  # keys back, the own one included, over which heads are mixed

# ---- dynamic_gates ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gates:
    """Of a layer, in at least float32. alpha, output: (B, T, H), with H = 0 where the model has neither; first, pairs:
    (B, T, 1), what the weights of first embedding and bigram table get beside their own."""

    alpha: Tensor
    output: Tensor
    first: Tensor
    pairs: Tensor


class DynamicGates(nn.Module):
    """`dynamic_gates`: two networks of `dynamic_hidden` units, m = sc W2 gelu(W1 x) + b, with a learnt sc that begins
    at 0.1 and W2 at 0. The first reads the input embedding x0 and speaks for the layers before the one that the field
    names, the second reads the stream that enters that one and speaks for it and those after.

    They take the place of `xsa`'s factors (b 0 at first) and of `output_gates` (no sigmoid; b 0.25), and add to the
    weights of first embedding and bigram table, which are a bias already."""

    def __init__(self, config: Any):
        super().__init__()
        c, dtype, H = config, getattr(torch, config.dtype), config.num_heads
        self.config, self.middle = c, c.dynamic_gates
        self.sizes = [H * c.xsa, H * c.output_gates, 1, 1]
        self.sizes += [-sum(self.sizes) % 8]  # products whose sides are multiples of 8 need no padding
        rows = c.num_layers * sum(self.sizes)
        self.in_w = nn.Parameter(torch.empty(2, c.dynamic_hidden, c.model_dim, dtype=dtype))
        self.out_w = nn.Parameter(torch.empty(rows, c.dynamic_hidden, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(c.num_layers, self.sizes[0] + self.sizes[1], dtype=torch.float32))
        self.scale = nn.Parameter(torch.empty(1, dtype=torch.float32))

    def reset_parameters(self) -> None:
        c = self.config
        self.in_w.uniform_(-(c.model_dim**-0.5), c.model_dim**-0.5)
        self.out_w.zero_()
        self.bias.zero_()
        self.bias[:, self.sizes[0] :] = 0.25
        self.scale.fill_(0.1)

    def forward(self, network: int, x_BTD: Tensor) -> list[Gates]:
        """Gates of the layers that a network speaks for, in their order."""
        per, L = sum(self.sizes), self.config.num_layers
        layers = slice(0, self.middle) if network == 0 else slice(self.middle, L)
        w_GF = self.out_w[per * layers.start : per * layers.stop]
        m = F.linear(F.gelu(F.linear(x_BTD, self.in_w[network])), w_GF)
        m = m.to(torch.promote_types(m.dtype, torch.float32)) * self.scale
        biases = F.pad(self.bias[layers], (0, per - self.bias.size(1)))
        found = (m.unflatten(-1, (-1, per)) + biases).unbind(-2)
        return [Gates(*row.split(self.sizes, -1)[:4]) for row in found]


# ---- head_mixing -----------------------------------------------------------------------------------------------------


class HeadMixing(nn.Module):
    """`head_mixing` (#315; dynamically composed heads: Xiao et al. 2024, arXiv:2405.08553): in the last layer head h
    gets  w2_h (sum_i w1_i P_i) v_h  more, P_i being head i's attention over the last 112 keys that its query sees,
    softmax over these alone. w1, normed over heads, and w2 come from what the layer's attention reads, through a
    network of 2 H units; w1 begins at 1, w2 at 0."""

    def __init__(self, config: Any):
        super().__init__()
        H, dtype = config.num_heads, getattr(torch, config.dtype)
        self.in_w = nn.Parameter(torch.empty(2 * H, config.model_dim, dtype=dtype))
        self.out_w = nn.Parameter(torch.empty(2 * H, 2 * H, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(2 * H, dtype=torch.float32))

    def reset_parameters(self) -> None:
        H, D = len(self.bias) // 2, self.in_w.size(-1)
        self.in_w.uniform_(-(D**-0.5), D**-0.5)
        self.out_w.zero_()
        self.bias[:H], self.bias[H:] = 1.0, 0.0

    def forward(self, y_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """w1 and w2, (B, T, H) each, in at least float32."""
        m = F.linear(F.gelu(F.linear(y_BTD, self.in_w)), self.out_w)
        w1, w2 = (m.to(torch.promote_types(m.dtype, torch.float32)) + self.bias).chunk(2, -1)
        return norm(w1), w2


def mixed_heads(
    q_BTHDh: Tensor, k_BTHDh: Tensor, v_BTHDh: Tensor, weights: tuple[Tensor, Tensor], first_BT: Tensor, scale: float
) -> Tensor:
    """What `head_mixing` adds to the heads, (B, T, H, Dh). first: of each query the first key that it sees.

    In blocks of 112 queries, each against its own block of keys and the one before."""
    w1_BTH, w2_BTH = weights
    T = q_BTHDh.size(1)
    q, k, v, w1, first = (_blocks(x) for x in (q_BTHDh, k_BTHDh, v_BTHDh, w1_BTH, first_BT[..., None]))
    k, v = (torch.cat([F.pad(x[:, :-1], (0, 0) * 3 + (1, 0)), x], 2) for x in (k, v))
    block = REACH * torch.arange(q.size(1), device=q.device)[:, None, None]
    within = torch.arange(2 * REACH, device=q.device)
    asked, key = block + within[:REACH, None], block - REACH + within
    allowed = (key >= 0) & (key <= asked) & (key > asked - REACH) & (key >= first)
    mixture = _mixture(torch.einsum("bnihd,bnjhd->bnhij", q, k), w1.mT, allowed[:, :, None], scale)
    found = torch.einsum("bnij,bnjhd->bnihd", mixture.to(v.dtype), v).flatten(1, 2)[:, :T]
    return (w2_BTH[..., None] * found).to(q_BTHDh.dtype)


def mixed_heads_of_few(
    q_BTHDh: Tensor, k_BSHDh: Tensor, v_BSHDh: Tensor, weights: tuple[Tensor, Tensor], allowed_BTS: Tensor, scale: float
) -> Tensor:
    """The same for a few queries at the end of many keys; allowed: those among the last 112 that a query sees."""
    w1_BTH, w2_BTH = weights
    mixture = _mixture(torch.einsum("bihd,bjhd->bhij", q_BTHDh, k_BSHDh), w1_BTH.mT, allowed_BTS[:, None], scale)
    found = torch.einsum("bij,bjhd->bihd", mixture.to(v_BSHDh.dtype), v_BSHDh)
    return (w2_BTH[..., None] * found).to(q_BTHDh.dtype)


def _blocks(x: Tensor) -> Tensor:
    """(B, N, 112, ...) of (B, T, ...), filled up with zeros."""
    missing = -x.size(1) % REACH
    return F.pad(x, (0, 0) * (x.dim() - 2) + (0, missing)).unflatten(1, (-1, REACH))


def _mixture(products: Tensor, w1: Tensor, allowed: Tensor, scale: float) -> Tensor:
    """sum over heads of w1 P: (..., H, I, J) products and (..., H, I) weights to (..., I, J)."""
    logits = (scale * products.to(w1.dtype)).masked_fill(~allowed, -torch.inf)
    return (logits.softmax(-1) * w1[..., None]).sum(-3)
