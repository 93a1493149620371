"""Products in 8 bits: what is multiplied is kept as float8 with one scale a tensor, the sum is float32.

    a b^T  ~  scale_a scale_b  sum_k a8[m, k] b8[n, k],      x ~ scale x8

e4m3 (3 bits behind the leading one, up to 448) for activations and weights, e5m2 (2 bits, up to 57,344) for gradients,
whose range is wider than their precision matters (Micikevicius et al. 2022, arXiv:2209.05433). The products are
`torch._scaled_mm` on a GPU; a CPU multiplies the same 8-bit numbers in float32.

Scales are safe: powers of two, so that scaling rounds nothing; over finite numbers only, so that one NaN or infinite
row stays a row's matter; and never below float32's smallest normal number. Or they are fixed by a largest number that
the caller knows, which costs no pass over memory. Conversion saturates what is finite and makes NaN of what is not.

Both factors lie along the summed axis, hence a tensor that is summed over both of its axes is kept twice. One kernel
reads it once and writes both, 4 bytes a number from 2: `both_ways`. The weights of all layers are measured by one
kernel, scaled by another and written by a third, once a step and not once a use: `weights_in_8_bits`. The rounding of a
product's factors to 3 bits costs about 4 % of the result's spread, and so does that of each product behind it; the
tests hold it to that.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.guards import (
    KERNEL_DTYPES,
    dense,
    differentiable_once,
    expect,
    expect_floats,
    expect_operands,
    in_rows,
    launch,
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
    if x.is_cuda and x.dim() == 2 and not torch.compiler.is_compiling():  # as passes of torch's it would be five
        return launch_scales([x], dtype)[0].view(-1)[0]
    return _least_scale(torch.nan_to_num(x.detach(), nan=0.0, posinf=0.0, neginf=0.0).abs_().amax(), dtype)


#: Rows of a gradient that `sampled_scale` looks at, or up to twice as many, and the binades that it leaves free.
SAMPLED_ROWS, ROOM = 4096, 12


def _every(rows: int) -> int:
    return max(rows // SAMPLED_ROWS, 1)


@torch.library.custom_op("speedrun::sampled_scale", mutates_args=())
def _sampled_scale(x: torch.Tensor) -> torch.Tensor:
    return launch_scales([x], E5M2, every=_every(len(x)), room=ROOM)[0, 0, 0].clone()


@_sampled_scale.register_fake
def _(x):
    return x.new_empty((), dtype=torch.float32)


def sampled_scale(x: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """float32 (): a scale for the gradient x (M, K) in e5m2 from the largest number of 4,096 or more of its rows, which
    lie evenly apart: a pass over all of it would cost more than it tells. e5m2 has 31 binades, so that 12 stay free
    above that number: a row saturates only where it is 4,096 times as large as all of those that were looked at. If
    these are all zeros, all rows are looked at."""
    every = _every(len(x))
    if implementation(impl, x) != "triton" or x.numel() == 0:
        some = scale_for(x[::every], E5M2)
        return torch.where(some > _LEAST_SCALE, some, scale_for(x, E5M2)) * 2.0**ROOM
    return _sampled_scale(dense(x))


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
    TENSORS: tl.constexpr,
    STEP: tl.constexpr,
    TURNED: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """out (M_out, K_out) = x (M, K) / scale in 8 bits, 0 beyond x; TURNED: also its transpose.

    p_x, p_out, p_turned: TENSORS pointers each; their scales lie STEP numbers apart."""
    tiles = tl.cdiv(K_out, BK)
    o_m = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    o_k = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    o_x = o_m[:, None].to(tl.int64) * K + o_k[None, :]
    m_x = (o_m < M)[:, None] & (o_k < K)[None, :]
    o_out = o_m[:, None].to(tl.int64) * K_out + o_k[None, :]
    m_out = (o_m < M_out)[:, None] & (o_k < K_out)[None, :]
    o_turned = o_k[:, None].to(tl.int64) * M_out + o_m[None, :]
    m_turned = (o_k < K_out)[:, None] & (o_m < M_out)[None, :]
    for i in tl.static_range(TENSORS):
        b_x = tl.load(p_x[i] + o_x, mask=m_x, other=0.0).to(tl.float32)
        b_out = saturated(b_x / tl.load(p_scale + i * STEP), LIMIT).to(p_out[i].dtype.element_ty)
        tl.store(p_out[i] + o_out, b_out, mask=m_out)
        if TURNED:
            tl.store(p_turned[i] + o_turned, tl.trans(b_out), mask=m_turned)


@triton.jit
def _measure(
    p_x,
    p_parts,
    parts,
    lines,
    length,
    step,
    along,
    TENSORS: tl.constexpr,
    LINES: tl.constexpr,
    ALONG: tl.constexpr,
    BEFORE: tl.constexpr,
):
    """parts (TENSORS, parts, 2), from the BEFORE-th on: the largest finite |x| of a program's LINES lines, and the
    largest of their sums of squares. p_x: TENSORS pointers; a line's numbers lie `along` apart, lines `step`.

    BEFORE: of parts that are known already; where these found anything but zeros, it is not looked for any more."""
    o_line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    for i in tl.static_range(TENSORS):
        p_known = p_parts + i * parts * 2
        missing = length
        if BEFORE > 0:
            o = tl.arange(0, triton.next_power_of_2(BEFORE))
            known = tl.max(tl.load(p_known + 2 * o, mask=o < BEFORE, other=0.0), 0)
            missing = tl.where(known > 0, 0, length)
        b_most = tl.zeros([LINES, ALONG], tl.float32)
        b_squares = tl.zeros([LINES, ALONG], tl.float32)
        for start in range(0, missing, ALONG):
            o_along = start + tl.arange(0, ALONG)
            o_x = o_line[:, None].to(tl.int64) * step + o_along[None, :].to(tl.int64) * along
            m_x = (o_line < lines)[:, None] & (o_along < length)[None, :]
            b_x = tl.abs(tl.load(p_x[i] + o_x, mask=m_x, other=0.0).to(tl.float32))
            b_x = tl.where(b_x < float("inf"), b_x, 0.0)  # nor NaN
            b_most = tl.maximum(b_most, b_x)
            b_squares += b_x * b_x
        p_part = p_known + (BEFORE + tl.program_id(0)) * 2
        tl.store(p_part, tl.max(b_most))
        tl.store(p_part + 1, tl.max(tl.sum(b_squares, 1), 0))


@triton.jit
def _least(most, RANGE: tl.constexpr):
    """The least power of two with which that number fits into a type of 8 bits that goes up to 1.75 2^RANGE."""
    bits = most.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - RANGE + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    return (tl.maximum(exponent, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _scales(p_parts, p_scales, parts, length, RANGE: tl.constexpr, BLOCK: tl.constexpr):
    """scales (tensors, 3, 4), of each four the first: of tensor program_id the least power of two with which its
    largest number fits; the root of its lines' largest sum of squares; the e4m3 scale for `length` times that sum.
    From parts (tensors, parts, 2).

    RANGE: of the type of the first, see `_least`."""
    p_parts += tl.program_id(0) * parts * 2
    b_most = tl.zeros([BLOCK], tl.float32)
    b_square = tl.zeros([BLOCK], tl.float32)
    for start in range(0, parts, BLOCK):
        o = start + tl.arange(0, BLOCK)
        b_most = tl.maximum(b_most, tl.load(p_parts + 2 * o, mask=o < parts, other=0.0))
        b_square = tl.maximum(b_square, tl.load(p_parts + 2 * o + 1, mask=o < parts, other=0.0))
    p_scales += tl.program_id(0) * 12
    square = tl.max(b_square, 0)
    tl.store(p_scales, _least(tl.max(b_most, 0), RANGE))
    tl.store(p_scales + 4, tl.sqrt_rn(square))
    tl.store(p_scales + 8, _least(square * length, 8))


@triton.jit
def _turn(p_x, p_out, M, K, step, BM: tl.constexpr, BK: tl.constexpr):
    """out (K, M), whose rows lie `step` apart, the transpose of x (M, K), byte by byte."""
    tiles = tl.cdiv(K, BK)
    o_m = tl.program_id(0) // tiles * BM + tl.arange(0, BM)
    o_k = tl.program_id(0) % tiles * BK + tl.arange(0, BK)
    m_x = (o_m < M)[:, None] & (o_k < K)[None, :]
    b_x = tl.load(p_x + o_m[:, None].to(tl.int64) * K + o_k[None, :], mask=m_x, other=0)
    m_out = (o_k < K)[:, None] & (o_m < M)[None, :]
    tl.store(p_out + o_k[:, None].to(tl.int64) * step + o_m[None, :], tl.trans(b_x), mask=m_out)


def launch_turn(x: torch.Tensor, out: torch.Tensor) -> None:
    """out (K, M), of rows of dense bytes, becomes the transpose of x (M, K); both in the same 8 bits."""
    (M, K), block, x = x.shape, 64, dense(x)
    expect("the transpose", out, (K, M), x)
    expect_floats("the transpose", out, (x.dtype,))
    if out.stride(1) != 1 and M > 1:
        raise ValueError(f"the transpose's rows must be dense, and its strides are {out.stride()}")
    programs, how = triton.cdiv(M, block) * triton.cdiv(K, block), dict(BM=block, BK=block, num_warps=4)
    launch(_turn, (programs,), x.view(torch.uint8), out.view(torch.uint8), M, K, out.stride(0), **how)


def filled(size: int) -> int:
    """The next multiple of 16."""
    return -(-size // MULTIPLE) * MULTIPLE


def launch_scales(
    xs: Sequence[torch.Tensor], dtype: torch.dtype, axis: int = 1, every: int = 1, room: int = 0
) -> torch.Tensor:
    """float32 (L, 3, 4) of L tensors (M, K) alike, over finite numbers only, at [:, :, 0]: `scale_for` of each; the
    largest norm of one of its rows (axis 1) or columns (axis 0); the e4m3 scale for the square of that norm times their
    length. The rest is room, so that each begins on 16 bytes: Inductor takes what an operator makes of an input that
    does not for unaligned, too, however large it is.

    every: rows are looked at in steps of so many; at all of them if these are zeros. room: binades above the largest
    number that the scale leaves free."""
    if axis != 1 and every != 1:
        raise ValueError(f"every={every} with axis={axis}: only rows can be left out")
    for x in xs:
        expect("x", x, xs[0].shape, xs[0])
        expect_floats("x", x, (xs[0].dtype,))
    expect_floats("x", xs[0], KERNEL_DTYPES)
    xs = tuple(dense(x) for x in xs)
    M, K = xs[0].shape
    looked_at = [(-(-M // step), K, step * K, 1) for step in sorted({every, 1}, reverse=True)]
    if axis == 0:
        looked_at = [(K, M, 1, K)]
    # Few numbers an access where lines are columns; never so many parts that their last reduction counts.
    of_lines = max(32, triton.next_power_of_2(triton.cdiv(looked_at[-1][0], 4096)))
    programs = [triton.cdiv(lines, of_lines) for lines, *_ in looked_at]
    parts = torch.empty(len(xs), sum(programs), 2, dtype=torch.float32, device=xs[0].device)
    scales = torch.empty(len(xs), 3, 4, dtype=torch.float32, device=xs[0].device)
    how = dict(TENSORS=len(xs), LINES=of_lines, ALONG=128, num_warps=4)
    for n, shape in enumerate(looked_at):
        launch(_measure, (programs[n],), xs, parts, sum(programs), *shape, BEFORE=sum(programs[:n]), **how)
    bits = round(math.log2(torch.finfo(dtype).max / 1.75)) - room
    launch(_scales, (len(xs),), parts, scales, sum(programs), looked_at[0][1], RANGE=bits, BLOCK=1024, num_warps=4)
    return scales


def launch_conversions(xs: Sequence[torch.Tensor], dtype: torch.dtype, scales: torch.Tensor, turned: bool):
    """(`in_8_bits_reference` of each of L tensors (M, K) alike, their transposes or empty tensors) in one pass over
    them. scales: float32 () of one, or (L, ...), whose rows begin with the scale."""
    for x in xs:
        expect("x", x, xs[0].shape, xs[0])
        expect_floats("x", x, (xs[0].dtype,))
    expect_floats("x", xs[0], KERNEL_DTYPES)
    expect("scale", scales, (len(xs), *scales.shape[1:]) if scales.dim() else (), xs[0])
    expect_floats("scale", scales, (torch.float32,))
    xs, scales = tuple(dense(x) for x in xs), dense(scales)
    (M, K), block = xs[0].shape, 64
    sizes = filled(M), filled(K)
    out, other = (
        tuple(torch.empty(size, dtype=dtype, device=xs[0].device) for _ in xs)
        for size in (sizes, sizes[::-1] if turned else (0,))
    )
    programs = triton.cdiv(sizes[0], block) * triton.cdiv(sizes[1], block)
    step = scales.numel() // len(xs)
    how = dict(LIMIT=torch.finfo(dtype).max, TENSORS=len(xs), STEP=step, TURNED=turned, BM=block, BK=block, num_warps=4)
    launch(_convert, (programs,), xs, scales, out, other if turned else out, M, K, *sizes, **how)
    return out, other


def launch_in_8_bits(x: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor, turned: bool):
    """(`in_8_bits_reference`, its transpose or an empty tensor) in one pass over x (M, K)."""
    expect("scale", scale, (), x)
    (out,), (other,) = launch_conversions([x], dtype, scale, turned)
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
    x: torch.Tensor,
    dtype: torch.dtype = E4M3,
    largest: float | torch.Tensor = 0.0,
    impl: str = "auto",
    scale: torch.Tensor | None = None,
) -> tuple[Eight, Eight]:
    """(`in_8_bits` of x (M, K), the same turned (K, M)); scale: to be taken as it is, in place of `largest`."""
    _check(x, dtype)
    scale = scale_for(x, dtype, largest) if scale is None else scale
    if implementation(impl, x) != "triton":
        eight = Eight(in_8_bits_reference(x, dtype, scale), scale)
        return eight, eight.turned()
    return tuple(Eight(values, scale) for values in _in_8_bits(dense(x), scale, dtype == E5M2, True))


# ---- weights ----------------------------------------------------------------------------------------------


class Weight8(NamedTuple):
    """A weight (F, D) in 8 bits and the same turned (D, F). longest: float32 (), the largest norm of one of its rows or
    columns, of finite numbers. of_squares: float32 (), the e4m3 scale for what squares of products of that row reach
    with another one that a norm left, whose own norm is the root of its length."""

    eight: Eight
    turned: Eight
    longest: torch.Tensor
    of_squares: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        """All of it, each once, as Dynamo wants the inputs of a Function."""
        return [self.eight.values, self.turned.values, self.eight.scale, self.longest, self.of_squares]

    def times(self, factor: torch.Tensor) -> Weight8:
        """Of that multiple of the weight both `Eight`, which share a scale; the other numbers as they are."""
        scale = self.eight.scale * factor
        return self._replace(eight=self.eight._replace(scale=scale), turned=self.turned._replace(scale=scale))

    @classmethod
    def of(cls, values, turned, scale, longest, of_squares) -> Weight8:
        """From its `tensors`."""
        return cls(Eight(values, scale), Eight(turned, scale), longest, of_squares)


def launch_weights(ws: Sequence[torch.Tensor], axis: int) -> list[torch.Tensor]:
    """The L weights in 8 bits, the L turned ones, and `launch_scales` of them: three launches."""
    scales = launch_scales(ws, E4M3, axis)
    values, turned_ones = launch_conversions(ws, E4M3, scales, True)
    return [*values, *turned_ones, scales]


@torch.library.custom_op("speedrun::weights_in_8_bits", mutates_args=())
def _weights(ws: list[torch.Tensor], axis: int) -> list[torch.Tensor]:
    return launch_weights(ws, axis)


@_weights.register_fake
def _(ws, axis):
    sizes = filled(ws[0].shape[0]), filled(ws[0].shape[1])
    eight = [w.new_empty(size, dtype=E4M3) for size in (sizes, sizes[::-1]) for w in ws]
    return [*eight, ws[0].new_empty(len(ws), 3, 4, dtype=torch.float32)]


def _longest(w: torch.Tensor, axis: int) -> torch.Tensor:
    """float32 (): the largest norm along an axis, of finite numbers."""
    if w.numel() == 0:
        return w.new_zeros((), dtype=torch.float32)
    finite = torch.nan_to_num(w.float(), nan=0.0, posinf=0.0, neginf=0.0)
    return torch.linalg.vector_norm(finite, dim=axis).amax()


def weight_reference(w_FD: torch.Tensor, axis: int = 1) -> Weight8:
    """What `weights_in_8_bits` makes of one weight, in plain torch."""
    eight, longest = in_8_bits(w_FD, E4M3, impl="reference"), _longest(w_FD, axis)
    return Weight8(eight, eight.turned(), longest, _least_scale(longest.square() * w_FD.shape[axis], E4M3))


@torch.no_grad()
def weights_in_8_bits(
    ws: Sequence[torch.Tensor], axis: int = 1, impl: str = "auto", factors: torch.Tensor | None = None
) -> list[Weight8]:
    """Each of the weights, of one shape (F, D) and dtype, in e4m3 both ways with a measured scale of its own; no
    autograd. axis: along which the norms of `longest` are, 1 for rows. factors: float32 (L,), of which each goes into
    the scale of a weight, so that a multiple of it is meant; the other two numbers stay the weight's own.

    Raises: ValueError for weights of several shapes or an axis that is none, TypeError for dtypes."""
    if axis not in (0, 1):
        raise ValueError(f"axis={axis}: 1 for the norms of rows, 0 for those of columns")
    for w in ws:
        _check(w, E4M3)
        expect("a weight", w, ws[0].shape, ws[0])
    if factors is not None:
        expect("factors", factors, (len(ws),), ws[0])
    if not ws or implementation(impl, ws[0]) != "triton" or ws[0].numel() == 0:
        found = [weight_reference(w, axis) for w in ws]
        return found if factors is None else [w.times(factor) for w, factor in zip(found, factors)]
    *values, scales = _weights([dense(w) for w in ws], axis)
    turned_ones = values[len(ws) :]
    rows = [row[:, 0].unbind() for row in scales.unbind()]
    if factors is not None:  # each on 16 bytes again, see `launch_scales`
        scaled = F.pad(scales[:, 0, :1] * factors[:, None], (0, 3))[:, 0].unbind()
        rows = [(scale, *others) for scale, (_, *others) in zip(scaled, rows)]
    return [Weight8.of(value, other, *row) for value, other, row in zip(values, turned_ones, rows)]


# ---- products ---------------------------------------------------------------------------------------------


def product(
    a: Eight, b: Eight, dtype: torch.dtype, fast: bool = False, out: torch.Tensor | None = None
) -> torch.Tensor:
    """a b^T of a (M, K) and b (N, K) in `dtype`. fast: sums in the matrix units' own, shorter registers where a device
    has those, good enough for what is rounded to 16 bits next. out: where it goes, (M, N) dense, on a GPU only."""
    if a.values.is_cuda:
        # With both axes: Inductor gives them those itself, but cannot where a scale is one number of several.
        scales = dict(scale_a=a.scale.view(1, 1), scale_b=b.scale.view(1, 1))
        how = dict(**scales, out_dtype=dtype, use_fast_accum=fast)
        how |= {} if out is None else dict(out=out)
        return torch._scaled_mm(a.values, b.values.t(), **how)
    return (a.values.float() @ b.values.float().t()).mul_(a.scale * b.scale).to(dtype)


def kept_factors(
    ctx,
    x_ND,
    w_FD,
    largest,
    impl: str,
    weight: Sequence[torch.Tensor],
    eight: tuple[Eight, Eight] | None = None,
    *others: torch.Tensor,
) -> tuple[Eight, Eight]:
    """(x, w) in 8 bits, for a Function whose product is x w^T; both turned are kept for `gradients_of_factors`, and
    `others` after these four tensors.

    weight: the tensors of w's `Weight8`, or none. eight: x both ways, if it is there already."""
    w_8, w_turned = Weight8.of(*weight)[:2] if weight else both_ways(w_FD, E4M3, 0.0, impl)
    x_8, x_turned = eight or both_ways(x_ND, E4M3, largest, impl)
    ctx.save_for_backward(*x_turned, *w_turned, *others)
    ctx.shapes, ctx.dtypes, ctx.impl = (x_ND.shape, w_FD.shape), (x_ND.dtype, w_FD.dtype), impl
    ctx.no_gradients = [None] * (2 + len(weight))
    return x_8, w_8


def gradients_of_factors(ctx, dy_NF) -> tuple:
    """(dx, dw, and None for what else `kept_factors` was given)."""
    x_values, x_scale, w_values, w_scale = ctx.saved_tensors[:4]
    dy_8, dy_turned = both_ways(dy_NF, E5M2, impl=ctx.impl, scale=sampled_scale(dy_NF, ctx.impl))
    dx = product(dy_8, Eight(w_values, w_scale), ctx.dtypes[0])
    dw = product(dy_turned, Eight(x_values, x_scale), ctx.dtypes[1])
    (N, D), (F, _) = ctx.shapes
    return dx[:N, :D].contiguous(), dw[:F, :D].contiguous(), *ctx.no_gradients


class _Linear(torch.autograd.Function):
    """weight: the tensors of a `Weight8`, or none."""

    @staticmethod
    def forward(ctx, x_ND, w_FD, largest, impl, *weight):
        x_8, w_8 = kept_factors(ctx, x_ND, w_FD, largest, impl, weight)
        return product(x_8, w_8, x_ND.dtype, fast=True)[: x_ND.shape[0], : w_FD.shape[0]].contiguous()

    @staticmethod
    @differentiable_once("products8.linear")
    def backward(ctx, dy_NF):
        return gradients_of_factors(ctx, dy_NF)


@without_autocast
def linear(
    x: torch.Tensor,
    w_FD: torch.Tensor,
    *,
    of_x: float | torch.Tensor = 0.0,
    weight: Weight8 | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """x w^T with all three products, forward and backward, in 8 bits; x (..., D), w (F, D), the result in x's dtype.

    of_x: the largest number of x if it is known, or a bound on it, which saves a pass over it: sqrt(D) for what a norm
    left. weight: w in 8 bits, if there is; else it is measured. Gradients have a `sampled_scale`. impl: of the
    conversions. Errors: ValueError for shapes or devices that do not fit, TypeError for dtypes."""
    if w_FD.dim() != 2 or x.shape[-1:] != w_FD.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} and w {tuple(w_FD.shape)} must be (..., D) and (F, D)")
    expect_operands("products8.linear", x=x, w=w_FD)
    y = _Linear.apply(in_rows(x), w_FD, of_x, impl, *(weight.tensors() if weight else ()))
    return y.view(*x.shape[:-1], w_FD.shape[0])
