"""Products in 8 bits: what is multiplied is kept as float8 with one scale a tensor, the sum is float32.

    a b^T  ~  scale_a scale_b  sum_k a8[m, k] b8[n, k],      x ~ scale x8

e4m3 (3 bits behind the leading one, up to 448) for activations and weights, e5m2 (2 bits, up to 57,344) for gradients,
whose range is wider than their precision matters (Micikevicius et al. 2022, arXiv:2209.05433). The products are
`torch._scaled_mm`, which a CPU has too: same calls, same scales, same layouts.

Scales are safe: powers of two, so that scaling rounds nothing; over finite numbers only, so that one NaN or infinite
row stays a row's matter; and never below float32's smallest normal number. Or they are fixed by a largest number that
the caller knows, which costs no pass over memory. Conversion saturates what is finite and makes NaN of what is not.
Both factors lie along the summed axis, hence a tensor that is summed over both of its axes is kept twice, converted
once: `Eight.turned`. The conversion is a few passes of plain torch, not yet a kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
#: Devices that have these products.
DEVICES = ("sm_89", "sm_90", "sm_100", "sm_120")
#: The devices' products want the summed axis, and torch both axes of the second factor, in multiples of this.
MULTIPLE = 16
_LEAST_SCALE = torch.finfo(torch.float32).tiny


class Eight(NamedTuple):
    """values (M, K) float8, rows dense or evenly apart; scale: float32 (), values * scale is what is meant."""

    values: torch.Tensor
    scale: torch.Tensor

    def turned(self) -> Eight:
        """(K, M), rows dense."""
        return Eight(self.values.t().contiguous(), self.scale)

    def rows(self, which: slice) -> Eight:
        return Eight(self.values[which], self.scale)

    def columns(self, which: slice) -> Eight:
        return Eight(self.values[:, which], self.scale)


def _least_scale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 (): the least power of two with which that number fits into `dtype`."""
    least = (largest.float() / torch.finfo(dtype).max).clamp(min=_LEAST_SCALE)
    return torch.exp2(torch.log2(least).ceil())


def scale_for(x: torch.Tensor, dtype: torch.dtype = E4M3, largest: float | torch.Tensor = 0.0) -> torch.Tensor:
    """float32 (): the least power of two with which x's largest finite number fits into `dtype`.

    largest: as a number, it is the one that exactly fits, whatever x has, unless it is 0; as a tensor (), it stands in
    place of x's."""
    if isinstance(largest, torch.Tensor):
        return _least_scale(largest, dtype)
    if largest:
        return torch.full((), largest / torch.finfo(dtype).max, dtype=torch.float32, device=x.device)
    return _least_scale(torch.nan_to_num(x.detach(), nan=0.0, posinf=0.0, neginf=0.0).abs_().amax(), dtype)


def in_8_bits(x: torch.Tensor, dtype: torch.dtype = E4M3, largest: float | torch.Tensor = 0.0) -> Eight:
    """x (M, K) in 8 bits, with both axes filled up with zeros to multiples of 16; largest: see `scale_for`."""
    scale, limit = scale_for(x, dtype, largest), torch.finfo(dtype).max
    scaled = (x.float() / scale).clamp_(-limit, limit)
    saturated = scaled.masked_fill_(torch.isinf(x), torch.nan).to(dtype)
    missing = [-size % MULTIPLE for size in x.shape]
    if any(missing):  # as bytes: torch fills up no float8
        saturated = F.pad(saturated.view(torch.uint8), (0, missing[1], 0, missing[0])).view(dtype)
    return Eight(saturated.contiguous(), scale)


def product(a: Eight, b: Eight, dtype: torch.dtype) -> torch.Tensor:
    """a b^T of a (M, K) and b (N, K) in `dtype`."""
    return torch._scaled_mm(a.values, b.values.t(), scale_a=a.scale, scale_b=b.scale, out_dtype=dtype)
