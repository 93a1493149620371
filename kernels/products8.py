"""Products in 8 bits: what is multiplied is kept as float8 with one scale a tensor, the sum is float32.

    a b^T  ~  scale_a scale_b  sum_k a8[m, k] b8[n, k],      x ~ scale x8

e4m3 (3 bits behind the leading one, up to 448) for activations and weights, e5m2 (2 bits, up to 57,344) for gradients,
whose range is wider than their precision matters (Micikevicius et al. 2022, arXiv:2209.05433). The products are
`torch._scaled_mm` on a GPU; a CPU multiplies the same 8-bit numbers in float32.

Scales are safe: powers of two, so that scaling rounds nothing; over finite numbers only, so that one NaN or infinite
row stays a row's matter; and never below float32's smallest normal number. Or they are fixed by a largest number that
the caller knows, which costs no pass over memory. Conversion saturates what is finite and makes NaN of what is not.

Both factors lie along the summed axis, hence a tensor that is summed over both of its axes is kept twice. One kernel
reads it once and writes both, 4 bytes a number from 2: `both_ways`. The rounding of a product's factors to 3 bits
costs about 4 % of the result's spread, and so does that of each product behind it; the tests hold it to that.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.guards import (
    KERNEL_DTYPES,
    dense,
    differentiable_once,
    expect,
    expect_floats,
    launch,
    refuse_tangents,
    without_autocast,
)
from kernels.runtime import device_kind, implementation_of, tl, triton

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

    def plain(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """What is meant, as ordinary numbers."""
        return self.values.to(dtype) * self.scale.to(dtype)


def available_on(device: torch.device) -> bool:
    """Whether products in 8 bits can be had there: on GPUs that have them, and on a CPU as float32 products of the same
    8-bit numbers."""
    return device.type == "cpu" or (device.type == "cuda" and device_kind() in DEVICES)


# ---- scales -----------------------------------------------------------------------------------------------


def _least_scale(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 (): the least power of two with which that number fits into `dtype`."""
    least = (largest.float() / torch.finfo(dtype).max).clamp(min=_LEAST_SCALE)
    return torch.exp2(torch.log2(least).ceil())


def scale_for(x: torch.Tensor, dtype: torch.dtype = E4M3, largest: float | torch.Tensor = 0.0) -> torch.Tensor:
    """float32 (): the least power of two with which x's largest finite number fits into `dtype`.

    largest: as a number, it is the one that exactly fits, whatever x has, unless it is 0; as a tensor (), it stands in
    place of x's. Raises: ValueError for a number that is none, or below 0."""
    if isinstance(largest, torch.Tensor):
        return _least_scale(largest, dtype)
    if not 0 <= largest < math.inf:
        raise ValueError(f"a known largest number must be finite and above 0, or 0 for a measured one; got {largest}")
    if largest:
        return torch.full((), largest / torch.finfo(dtype).max, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return torch.ones((), dtype=torch.float32, device=x.device)
    return _least_scale(torch.nan_to_num(x.detach(), nan=0.0, posinf=0.0, neginf=0.0).abs_().amax(), dtype)


# ---- conversion -------------------------------------------------------------------------------------------


def in_8_bits_reference(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor) -> torch.Tensor:
    """x / scale in `dtype`, saturated; NaN where x is not finite; both axes filled up with zeros to 16s."""
    limit = torch.finfo(dtype).max
    saturated = (x.float() / scale).clamp_(-limit, limit).masked_fill_(torch.isinf(x), torch.nan).to(dtype)
    missing = [-size % MULTIPLE for size in x.shape]
    if any(missing):  # as bytes: torch fills up no float8
        saturated = F.pad(saturated.view(torch.uint8), (0, missing[1], 0, missing[0])).view(dtype)
    return saturated.contiguous()


@triton.jit
def saturated(b_x, LIMIT: tl.constexpr):
    """b_x within +-LIMIT where it is finite, NaN where it is not."""
    b_x = tl.where(tl.abs(b_x) == float("inf"), float("nan"), b_x)
    return tl.clamp(b_x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _convert(
    p_x,
    p_scale,
    p_out,
    p_turned,
    M,
    K,
    M_out,
    K_out,
    LIMIT: tl.constexpr,
    TURNED: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """out (M_out, K_out) = x (M, K) / scale in 8 bits, 0 beyond x; TURNED: also its transpose."""
    tiles = tl.cdiv(K_out, BK)
    o_m = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    o_k = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    m_x = (o_m < M)[:, None] & (o_k < K)[None, :]
    b_x = tl.load(p_x + o_m[:, None].to(tl.int64) * K + o_k[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_out = saturated(b_x / tl.load(p_scale), LIMIT).to(p_out.dtype.element_ty)
    m_out = (o_m < M_out)[:, None] & (o_k < K_out)[None, :]
    tl.store(p_out + o_m[:, None].to(tl.int64) * K_out + o_k[None, :], b_out, mask=m_out)
    if TURNED:
        m_turned = (o_k < K_out)[:, None] & (o_m < M_out)[None, :]
        tl.store(p_turned + o_k[:, None].to(tl.int64) * M_out + o_m[None, :], tl.trans(b_out), mask=m_turned)


@triton.jit
def _turn(p_x, p_out, M, K, BM: tl.constexpr, BK: tl.constexpr):
    """out (K, M), the transpose of x (M, K), byte by byte."""
    tiles = tl.cdiv(K, BK)
    o_m = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    o_k = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    m_x = (o_m < M)[:, None] & (o_k < K)[None, :]
    b_x = tl.load(p_x + o_m[:, None].to(tl.int64) * K + o_k[None, :], mask=m_x, other=0)
    m_out = (o_k < K)[:, None] & (o_m < M)[None, :]
    tl.store(p_out + o_k[:, None].to(tl.int64) * M + o_m[None, :], tl.trans(b_x), mask=m_out)


def launch_turn(x: torch.Tensor) -> torch.Tensor:
    """The transpose of x (M, K) in 8 bits, dense."""
    (M, K), block, x = x.shape, 64, dense(x)
    out = torch.empty(K, M, dtype=x.dtype, device=x.device)
    programs = triton.cdiv(M, block) * triton.cdiv(K, block)
    launch(_turn, (programs,), x.view(torch.uint8), out.view(torch.uint8), M, K, BM=block, BK=block, num_warps=4)
    return out


def turned(x: Eight) -> Eight:
    """x (M, K) the other way round, (K, M), by a kernel; the scale is the same."""
    return Eight(launch_turn(x.values), x.scale)


def filled(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // MULTIPLE) * MULTIPLE


def launch_in_8_bits(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor, turned: bool):
    """(`in_8_bits_reference`, its transpose or an empty tensor) in one pass over x (M, K)."""
    expect_floats("x", x, KERNEL_DTYPES)
    expect("scale", scale, (), x)
    x = dense(x)
    (M, K), block = x.shape, 64
    sizes = filled(M), filled(K)
    out = torch.empty(sizes, dtype=dtype, device=x.device)
    other = torch.empty(sizes[::-1] if turned else 0, dtype=dtype, device=x.device)
    programs = triton.cdiv(sizes[0], block) * triton.cdiv(sizes[1], block)
    how = dict(LIMIT=torch.finfo(dtype).max, TURNED=turned, BM=block, BK=block, num_warps=4)
    launch(_convert, (programs,), x, scale, out, other if turned else out, M, K, *sizes, **how)
    return out, other


@torch.library.custom_op("speedrun::in_8_bits", mutates_args=())
def _in_8_bits(x: torch.Tensor, scale: torch.Tensor, e5m2: bool, turned: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_in_8_bits(x, E5M2 if e5m2 else E4M3, scale, turned)


@_in_8_bits.register_fake
def _(x, scale, e5m2, turned):
    sizes, dtype = (filled(x.shape[0]), filled(x.shape[1])), E5M2 if e5m2 else E4M3
    return x.new_empty(sizes, dtype=dtype), x.new_empty(sizes[::-1] if turned else 0, dtype=dtype)


def implementation(impl: str, tensor: torch.Tensor) -> str:
    """The name of what converts that tensor: triton | reference."""
    return implementation_of(impl, tensor, cpu="reference", choices=("triton", "reference"))


def _check(x: torch.Tensor, dtype: torch.dtype) -> None:
    if x.dim() != 2:
        raise ValueError(f"x must be (M, K), got {tuple(x.shape)}")
    expect_floats("x", x, KERNEL_DTYPES)
    if dtype not in (E4M3, E5M2):
        raise TypeError(f"dtype must be one of 8 bits, {E4M3} or {E5M2}, got {dtype}")


def in_8_bits(
    x: torch.Tensor, dtype: torch.dtype = E4M3, largest: float | torch.Tensor = 0.0, impl: str = "auto"
) -> Eight:
    """x (M, K) in 8 bits, with both axes filled up with zeros to multiples of 16; largest: see `scale_for`.

    Raises: ValueError for another shape, TypeError for x's dtype or a format that is not of 8 bits."""
    _check(x, dtype)
    scale = scale_for(x, dtype, largest)
    if implementation(impl, x) == "triton":
        return Eight(_in_8_bits(dense(x), scale, dtype == E5M2, False)[0], scale)
    return Eight(in_8_bits_reference(x, dtype, scale), scale)


def both_ways(
    x: torch.Tensor, dtype: torch.dtype = E4M3, largest: float | torch.Tensor = 0.0, impl: str = "auto"
) -> tuple[Eight, Eight]:
    """(`in_8_bits` of x (M, K), the same turned (K, M))."""
    _check(x, dtype)
    if implementation(impl, x) != "triton":
        eight = in_8_bits(x, dtype, largest, impl)
        return eight, eight.turned()
    scale = scale_for(x, dtype, largest)
    return tuple(Eight(values, scale) for values in _in_8_bits(dense(x), scale, dtype == E5M2, True))


# ---- products ---------------------------------------------------------------------------------------------


def product(a: Eight, b: Eight, dtype: torch.dtype, fast: bool = False) -> torch.Tensor:
    """a b^T of a (M, K) and b (N, K) in `dtype`. fast: sums in the matrix units' own, shorter registers where a device
    has those, good enough for what is rounded to 16 bits next."""
    if a.values.is_cuda:
        scales = dict(scale_a=a.scale, scale_b=b.scale)
        return torch._scaled_mm(a.values, b.values.t(), **scales, out_dtype=dtype, use_fast_accum=fast)
    return (a.values.float() @ b.values.float().t()).mul_(a.scale * b.scale).to(dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_FD, of_x, impl):
        (x_8, x_turned), (w_8, w_turned) = both_ways(x_ND, E4M3, of_x, impl), both_ways(w_FD, E4M3, 0.0, impl)
        ctx.save_for_backward(*x_turned, *w_turned)
        ctx.shapes, ctx.dtypes, ctx.impl = (x_ND.shape, w_FD.shape), (x_ND.dtype, w_FD.dtype), impl
        return product(x_8, w_8, x_ND.dtype, fast=True)[: x_ND.shape[0], : w_FD.shape[0]].contiguous()

    @staticmethod
    @differentiable_once("products8.linear")
    def backward(ctx, dy_NF):
        x_values, x_scale, w_values, w_scale = ctx.saved_tensors
        dy_8, dy_turned = both_ways(dy_NF, E5M2, 0.0, ctx.impl)
        dx = product(dy_8, Eight(w_values, w_scale), ctx.dtypes[0])
        dw = product(dy_turned, Eight(x_values, x_scale), ctx.dtypes[1])
        (N, D), (E, _) = ctx.shapes
        return dx[:N, :D].contiguous(), dw[:E, :D].contiguous(), None, None


@without_autocast
def linear(x: torch.Tensor, w_FD: torch.Tensor, *, of_x: float = 0.0, impl: str = "auto") -> torch.Tensor:
    """x w^T with all three products, forward and backward, in 8 bits; x (..., D), w (F, D), the result in x's dtype.

    of_x: the largest number of x if it is known, which saves a pass over it: sqrt(D) for what a norm left. Weights and
    gradients are measured. impl: of the conversions. Errors: ValueError for shapes or devices that do not fit,
    TypeError for dtypes."""
    if w_FD.dim() != 2 or x.shape[-1:] != w_FD.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} and w {tuple(w_FD.shape)} must be (..., D) and (F, D)")
    for name, tensor in (("x", x), ("w", w_FD)):
        expect(name, tensor, tensor.shape, x)
        expect_floats(name, tensor, KERNEL_DTYPES)
    refuse_tangents("products8.linear", x, w_FD)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return _Linear.apply(rows, w_FD, of_x, impl).view(*x.shape[:-1], w_FD.shape[0])
