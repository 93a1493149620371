"""The block's MLP with all its products in 8 bits (kernels/products8.py): linear, relu squared, linear.

    a = relu(x w_in^T)^2,  y = a w_out^T         x (N, D), w_in (F, D), w_out (D, F), y (N, D)
    dh = (dy w_out) 2 sqrt(a),  dx = dh w_in,  dw_in = dh^T x,  dw_out = dy^T a

The two products that end at (N, F) leave their result in 8 bits, both ways round, from their epilogue: the activation
never exists in 16 bits. Bytes of (N, F) beside the library's products: 2 written forward, 1 read and 2 written
backward, where 16 bits take 2 and 2 + 2; every product behind reads half. Kept for the backward pass: a both ways and
x turned, 2 N F + N D bytes in place of 2 N F + 2 N D.

No scale is measured on the way: the rows of x come from a norm, so that they are no longer than sqrt(D), and

    max a <= D max_f |w_in_f|^2,     max |dh| <= max |dy| sqrt(D) max_f |w_out_f| 2 sqrt(max a)

hold whatever the data are; nothing saturates. The bounds are far above what occurs: e4m3 has 17 binades, of which a
typical activation, a D-th of the bound, leaves 8 below itself, and e5m2 has 31.
"""

from __future__ import annotations

import math

import torch

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
from kernels.products8 import (
    E4M3,
    E5M2,
    Eight,
    both_ways,
    implementation,
    in_8_bits_reference,
    product,
    saturated,
    scale_for,
)
from kernels.runtime import Tile, Tiles, copies_in_bulk, descriptor, persistent, tile_of, tl, triton


def product_8_reference(a_MK, b_NK, scales_3, act_MN=None):
    """What `launch_product_8` computes, in plain torch."""
    of_product, of_act, of_out = scales_3.unbind()
    x = product(Eight(a_MK, of_product), Eight(b_NK, torch.ones_like(of_product)), torch.float32)
    if act_MN is None:
        x = torch.relu(x).square_()
    else:
        x = x.mul_(2).mul_((act_MN.float() * of_act).sqrt_())
    dtype = E4M3 if act_MN is None else E5M2
    values = in_8_bits_reference(x, dtype, of_out)
    return values, values.t().contiguous()


#: "default" is small enough for any device.
TILES: Tiles = {
    ("default", "product", 1): Tile(64, 64, 4, 2, depth=32),
    ("sm_90", "product", 1): Tile(128, 256, 8, 3, depth=128, descriptors=True),
    ("sm_100", "product", 1): Tile(128, 256, 8, 3, depth=128, descriptors=True),
}
_GROUP = 8  # tiles of rows that share tiles of columns while those are in the second-level cache


# ---- Triton -----------------------------------------------------------------------------------------------


@triton.jit
def _product_8(
    p_a,
    p_b,
    p_act,
    p_scales,
    p_out,
    p_turned,
    M,
    N,
    K,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    BACKWARD: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """out (M, N) = relu(a b^T)^2, or, BACKWARD, (a b^T) 2 sqrt(act), in 8 bits, and its transpose; a (M, K), b (N, K).

    A program takes every num_programs-th tile, FLATTEN as in kernels/mlp.py. scales (3,): of the product, of act, of
    out. DESCRIPTOR: p_a and p_b are tensor descriptors."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        first = tile // (GROUP * tiles_n) * GROUP
        height = tl.minimum(tiles_m - first, GROUP)
        within = tile % (GROUP * tiles_n)
        row, column = (first + within % height) * BM, (within // height) * BN
        o_m = row + tl.arange(0, BM)
        o_n = column + tl.arange(0, BN)
        b_out = tl.zeros([BM, BN], tl.float32)
        for k in range(0, K, BK):
            if DESCRIPTOR:
                b_a, b_b = p_a.load([row, k]), p_b.load([column, k])
            else:
                o_k = k + tl.arange(0, BK)
                m_a, m_b = (o_m < M)[:, None] & (o_k < K)[None, :], (o_n < N)[:, None] & (o_k < K)[None, :]
                b_a = tl.load(p_a + o_m[:, None].to(tl.int64) * K + o_k[None, :], mask=m_a, other=0.0)
                b_b = tl.load(p_b + o_n[:, None].to(tl.int64) * K + o_k[None, :], mask=m_b, other=0.0)
            b_out = tl.dot(b_a, tl.trans(b_b), b_out)
        b_out *= tl.load(p_scales)
        o_out = o_m[:, None].to(tl.int64) * N + o_n[None, :]
        m_out = (o_m < M)[:, None] & (o_n < N)[None, :]
        if BACKWARD:
            b_act = tl.load(p_act + o_out, mask=m_out, other=0.0).to(tl.float32) * tl.load(p_scales + 1)
            b_out *= 2 * tl.sqrt(b_act)
        else:
            b_out = tl.maximum(b_out, 0.0, propagate_nan=tl.PropagateNan.ALL)
            b_out *= b_out
        b_8 = saturated(b_out / tl.load(p_scales + 2), LIMIT).to(p_out.dtype.element_ty)
        tl.store(p_out + o_out, b_8, mask=m_out)
        o_turned = o_n[:, None].to(tl.int64) * M + o_m[None, :]
        tl.store(p_turned + o_turned, tl.trans(b_8), mask=(o_n < N)[:, None] & (o_m < M)[None, :])


def launch_product_8(a_MK, b_NK, scales_3, act_MN=None, tile: Tile | None = None):
    """(out (M, N), out^T): e4m3 forward, e5m2 with the activation `act_MN` (e4m3), which makes it the backward one."""
    (M, K), N, backward = a_MK.shape, b_NK.shape[0], act_MN is not None
    expect("the second factor", b_NK, (N, K), a_MK)
    expect("scales", scales_3, (3,), a_MK)
    expect_floats("scales", scales_3, (torch.float32,))
    if backward:
        expect("the activation", act_MN, (M, N), a_MK)
    given = [None if x is None else dense(x) for x in (a_MK, b_NK, act_MN, scales_3)]
    dtype = E5M2 if backward else E4M3
    out, turned = (torch.empty(shape, dtype=dtype, device=a_MK.device) for shape in ((M, N), (N, M)))
    tile = tile or tile_of(TILES, "product", E4M3)
    descriptors = tile.descriptors and M * K > 0 and all(copies_in_bulk(x) for x in given[:2])
    factors = given[:2]
    if descriptors:
        factors = [descriptor(x, [rows, tile.depth]) for x, rows in zip(factors, (tile.rows, tile.columns))]
    tiles = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns)
    launch(
        _product_8,
        (persistent(tiles) if descriptors else tiles,),
        *factors,
        given[2] if backward else out,
        given[3],
        out,
        turned,
        M,
        N,
        K,
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        GROUP=_GROUP,
        FLATTEN=descriptors,
        BACKWARD=backward,
        DESCRIPTOR=descriptors,
        LIMIT=torch.finfo(dtype).max,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out, turned


@torch.library.custom_op("speedrun::product_8", mutates_args=())
def _operator(
    a_MK: torch.Tensor, b_NK: torch.Tensor, scales_3: torch.Tensor, act_MN: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    return launch_product_8(a_MK, b_NK, scales_3, act_MN)


@_operator.register_fake
def _(a_MK, b_NK, scales_3, act_MN):
    M, N, dtype = a_MK.shape[0], b_NK.shape[0], E4M3 if act_MN is None else E5M2
    return a_MK.new_empty(M, N, dtype=dtype), a_MK.new_empty(N, M, dtype=dtype)


# ---- the MLP ----------------------------------------------------------------------------------------------


def _with_epilogue(a: Eight, b: Eight, of_out: torch.Tensor, act: Eight | None, impl: str) -> tuple[Eight, Eight]:
    """The product of a and b with its epilogue, both ways round, in the scale `of_out`."""
    scales = torch.stack([a.scale * b.scale, a.scale if act is None else act.scale, of_out])
    run = _operator if implementation(impl, a.values) == "triton" else product_8_reference
    values = run(a.values, b.values, scales, None if act is None else act.values)
    return tuple(Eight(x, of_out) for x in values)


def _longest(w: torch.Tensor, axis: int) -> torch.Tensor:
    """float32 (): the largest norm along an axis."""
    if w.numel() == 0:
        return w.new_zeros((), dtype=torch.float32)
    return torch.linalg.vector_norm(w, dim=axis, dtype=torch.float32).amax()


class _MLP8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_in_FD, w_out_DF, impl):
        (N, D), norm = x_ND.shape, x_ND.shape[1] ** 0.5
        x, x_turned = both_ways(x_ND, E4M3, norm, impl)
        (w_in, w_in_turned), (w_out, w_out_turned) = (both_ways(w, E4M3, 0.0, impl) for w in (w_in_FD, w_out_DF))
        most = (norm * _longest(w_in_FD, 1)).square()
        a, a_turned = _with_epilogue(x, w_in, scale_for(x_ND, E4M3, most), None, impl)
        slope = 2 * most.sqrt() * norm * _longest(w_out_DF, 0)  # max |dh| over max |dy|
        kept = (x_turned, w_in_turned, w_out_turned, a, a_turned)
        ctx.save_for_backward(slope, *(tensor for eight in kept for tensor in eight))
        ctx.sizes, ctx.dtypes, ctx.impl = (N, D, w_in_FD.shape[0]), (x_ND.dtype, w_in_FD.dtype, w_out_DF.dtype), impl
        return product(a, w_out, x_ND.dtype, fast=True)[:N, :D].contiguous()

    @staticmethod
    @differentiable_once("relu_squared_mlp_8")
    def backward(ctx, dy_ND):
        slope, *kept = ctx.saved_tensors
        x_turned, w_in_turned, w_out_turned, a, a_turned = (Eight(*kept[i : i + 2]) for i in range(0, 10, 2))
        (N, D, F), (of_x, of_w_in, of_w_out) = ctx.sizes, ctx.dtypes
        dy, dy_turned = both_ways(dy_ND, E5M2, 0.0, ctx.impl)
        most = dy.scale * torch.finfo(E5M2).max * slope
        dh, dh_turned = _with_epilogue(dy, w_out_turned, scale_for(dy_ND, E5M2, most), a, ctx.impl)
        dx = product(dh, w_in_turned, of_x)[:N, :D].contiguous()
        dw_in = product(dh_turned, x_turned, of_w_in)[:F, :D].contiguous()
        return dx, dw_in, product(dy_turned, a_turned, of_w_out)[:D, :F].contiguous(), None


@without_autocast
def relu_squared_mlp_8(
    x_ND: torch.Tensor, w_in_FD: torch.Tensor, w_out_DF: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """relu(x w_in^T)^2 w_out^T by products in 8 bits; x (..., D), each row no longer than sqrt(D), what a norm leaves.

    Longer rows are taken for as long: what is beyond the scales saturates. The result has x's dtype, gradients those of
    what they belong to. impl: of conversions and epilogues. Errors: ValueError for shapes or devices that do not fit,
    TypeError for dtypes."""
    if w_in_FD.shape != w_out_DF.shape[::-1] or w_in_FD.dim() != 2 or x_ND.shape[-1:] != w_in_FD.shape[1:]:
        raise ValueError(
            f"x {tuple(x_ND.shape)}, w_in {tuple(w_in_FD.shape)} and w_out {tuple(w_out_DF.shape)} "
            "must be (..., D), (F, D) and (D, F)"
        )
    for name, x in (("x", x_ND), ("w_in", w_in_FD), ("w_out", w_out_DF)):
        expect(name, x, x.shape, x_ND)
        expect_floats(name, x, KERNEL_DTYPES)
    refuse_tangents("relu_squared_mlp_8", x_ND, w_in_FD, w_out_DF)
    rows = x_ND.reshape(math.prod(x_ND.shape[:-1]), x_ND.shape[-1])
    return _MLP8.apply(rows, w_in_FD, w_out_DF, impl).view(x_ND.shape)
