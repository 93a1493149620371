"""The block's MLP with all its products in 8 bits (kernels/products8.py): linear, relu squared, linear.

    a = relu(x w_in^T)^2,  y = a w_out^T         x (N, D), w_in (F, D), w_out (D, F), y (N, D)
    dh = (dy w_out) 2 sqrt(a),  dx = dh w_in,  dw_in = dh^T x,  dw_out = dy^T a

With the norm before it (kernels/norm.py) and the residual beside it, y = s + mlp(r s), r = 1 / rms(s) a row's number,
one kernel norms and leaves the norm in 8 bits, both ways round, in one pass (`launch_normed`): 2 N D bytes read and
2 N D written, where norm and conversion read 4 and write 4. The product at the end begins with s, so that the stream
takes no pass of its own. Backward, with g = dh w_in, ds = dy + r (g - r s mean(g r s)), which the compiler fuses with
its neighbours.

The two products that end at (N, F) leave their result in 8 bits, both ways round, from their epilogue: the activation
never exists in 16 bits. Bytes of (N, F) beside the library's products: 2 written forward, 1 read and 2 written
backward, where 16 bits take 2 and 2 + 2; every product behind reads half. Kept for the backward pass: a and the norm,
both turned only, which the backward epilogue reads as they lie, and s: N F + 3 N D bytes, where 16 bits keep 2 N F and
2 N D.

No scale is measured on the way: the rows of x come from a norm, so that they are no longer than sqrt(D), and

    max a <= D max_f |w_in_f|^2,     max |dh| <= max |dy| sqrt(D) max_f |w_out_f| 2 sqrt(max a)

hold whatever the data are; nothing saturates. The bounds are far above what occurs: e4m3 has 17 binades, of which a
typical activation, a D-th of the bound, leaves 8 below itself, and e5m2 has 31.
"""

from __future__ import annotations

import torch

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
from kernels.mlp import check_shapes
from kernels.products8 import (
    E4M3,
    E5M2,
    Eight,
    Weight8,
    both_ways,
    filled,
    gradients_of_factors,
    implementation,
    in_8_bits_reference,
    kept_factors,
    product,
    saturated,
    scale_for,
    weights_in_8_bits,
)
from kernels.runtime import Tile, Tiles, copies_in_bulk, descriptor, persistent, tile_of, tl, triton


def product_8_reference(a: Eight, b: Eight, of_out: torch.Tensor, act_turned: Eight | None = None):
    """What `launch_product_8` computes, in plain torch."""
    x = product(a, b, torch.float32)
    if act_turned is None:
        x = torch.relu(x).square_()
    else:
        x = x.mul_(2).mul_((act_turned.values.t().float() * act_turned.scale).sqrt_())
    values = in_8_bits_reference(x, E4M3 if act_turned is None else E5M2, of_out)
    return values, values.t().contiguous()


def added_product_8_reference(a: Eight, b: Eight, residual_MN: torch.Tensor) -> torch.Tensor:
    """What `launch_added_product_8` computes, in plain torch."""
    M, N = residual_MN.shape
    wide = torch.promote_types(residual_MN.dtype, torch.float32)
    return (residual_MN.to(wide) + product(a, b, torch.float32)[:M, :N]).to(residual_MN.dtype)


#: "default" is small enough for any device; "backward" stands where a thread would spill with the other tile.
TILES: Tiles = {
    ("default", "product", 1): Tile(64, 64, 4, 2, depth=32),
    ("sm_90", "product", 1): Tile(128, 256, 8, 3, depth=128, descriptors=True),
    ("sm_100", "product", 1): Tile(128, 256, 8, 3, depth=128, descriptors=True),
    ("sm_100", "backward", 1): Tile(128, 128, 8, 3, depth=128, descriptors=True),
}
_GROUP = 8  # tiles of rows that share tiles of columns while those are in the second-level cache


# ---- Triton -----------------------------------------------------------------------------------------------


@triton.jit
def _product_8(
    p_a,
    p_b,
    p_act,
    p_scale_a,
    p_scale_b,
    p_scale_act,
    p_scale_out,
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
    ADDS: tl.constexpr,
    BACKWARD: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """out (M, N) = relu(a b^T)^2, or, BACKWARD, (a b^T) 2 sqrt(act), in 8 bits, and its transpose; a (M, K), b (N, K),
    act (N, M), turned as it is kept. ADDS: out = act + a b^T in act's 16 bits, act (M, N).

    A program takes every num_programs-th tile, FLATTEN as in kernels/mlp.py. DESCRIPTOR: p_a and p_b are tensor
    descriptors."""
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
        b_out *= tl.load(p_scale_a) * tl.load(p_scale_b)
        o_out = o_m[:, None].to(tl.int64) * N + o_n[None, :]
        m_out = (o_m < M)[:, None] & (o_n < N)[None, :]
        if ADDS:
            b_out += tl.load(p_act + o_out, mask=m_out, other=0.0).to(tl.float32)
            tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)
        else:
            o_turned = o_n[:, None].to(tl.int64) * M + o_m[None, :]
            m_turned = (o_n < N)[:, None] & (o_m < M)[None, :]
            if BACKWARD:
                b_act = tl.trans(tl.load(p_act + o_turned, mask=m_turned, other=0.0)).to(tl.float32)
                b_out *= 2 * tl.sqrt(b_act * tl.load(p_scale_act))
            else:
                b_out = tl.maximum(b_out, 0.0, propagate_nan=tl.PropagateNan.ALL)
                b_out *= b_out
            b_8 = saturated(b_out / tl.load(p_scale_out), LIMIT).to(p_out.dtype.element_ty)
            tl.store(p_out + o_out, b_8, mask=m_out)
            tl.store(p_turned + o_turned, tl.trans(b_8), mask=m_turned)


def _launch(a: Eight, b: Eight, act, scales, out, turned, sizes, tile: Tile | None, **how) -> None:
    """`_product_8` of the factors, with the operands of its epilogue."""
    (M, N, K), factors = sizes, [dense(x.values) for x in (a, b)]
    tile = tile or tile_of(TILES, "product", E4M3, special=["backward"] * (how["BACKWARD"] and not how["ADDS"]))
    descriptors = tile.descriptors and M * K > 0 and all(copies_in_bulk(x) for x in factors)
    if descriptors:
        factors = [descriptor(x, [rows, tile.depth]) for x, rows in zip(factors, (tile.rows, tile.columns))]
    tiles = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns)
    given = *factors, act, dense(a.scale), dense(b.scale), *scales, out, turned
    how |= dict(BM=tile.rows, BN=tile.columns, BK=tile.depth, GROUP=_GROUP, FLATTEN=descriptors)
    how |= dict(DESCRIPTOR=descriptors, num_warps=tile.warps, num_stages=tile.stages)
    launch(_product_8, (persistent(tiles) if descriptors else tiles,), *given, M, N, K, **how)


def _expect_eight(name: str, x: Eight, shape: tuple[int, int], like: torch.Tensor) -> None:
    expect(name, x.values, shape, like)
    expect(f"the scale of {name}", x.scale, (), like)
    expect_floats(f"the scale of {name}", x.scale, (torch.float32,))


def launch_product_8(
    a: Eight, b: Eight, of_out: torch.Tensor, act_turned: Eight | None = None, tile: Tile | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out (M, N), out^T) over the scale `of_out`, of a (M, K) and b (N, K): e4m3 forward, e5m2 with the activation
    `act_turned` (N, M) in e4m3, which makes it the backward one."""
    (M, K), N, backward = a.values.shape, b.values.shape[0], act_turned is not None
    _expect_eight("the first factor", a, (M, K), a.values)
    _expect_eight("the second factor", b, (N, K), a.values)
    expect("the result's scale", of_out, (), a.values)
    expect_floats("the result's scale", of_out, (torch.float32,))
    dtype = E5M2 if backward else E4M3
    out, turned = (torch.empty(shape, dtype=dtype, device=a.values.device) for shape in ((M, N), (N, M)))
    act, of_act = out, of_out
    if act_turned is not None:
        _expect_eight("the activation", act_turned, (N, M), a.values)
        act, of_act = dense(act_turned.values), dense(act_turned.scale)
    how = dict(ADDS=False, BACKWARD=backward, LIMIT=torch.finfo(dtype).max)
    _launch(a, b, act, (of_act, dense(of_out)), out, turned, (M, N, K), tile, **how)
    return out, turned


def launch_added_product_8(a: Eight, b: Eight, residual_MN: torch.Tensor, tile: Tile | None = None) -> torch.Tensor:
    """residual + a b^T, (M, N) in the residual's dtype, rounded once; a (M or more, K), b (N or more, K)."""
    (M, N), (rows, K), columns = residual_MN.shape, a.values.shape, b.values.shape[0]
    _expect_eight("the first factor", a, (max(rows, M), K), a.values)
    _expect_eight("the second factor", b, (max(columns, N), K), a.values)
    expect("the residual", residual_MN, (M, N), a.values)
    expect_floats("the residual", residual_MN, KERNEL_DTYPES)
    out = torch.empty(M, N, dtype=residual_MN.dtype, device=a.values.device)
    # BACKWARD, of which ADDS asks nothing: so only the activation's own code is asked for its NaN (kernels/proof).
    scales, how = (a.scale, a.scale), dict(ADDS=True, BACKWARD=True, LIMIT=0.0)
    _launch(a, b, dense(residual_MN), scales, out, out, (M, N, K), tile, **how)
    return out


@torch.library.custom_op("speedrun::product_8", mutates_args=())
def _operator(
    a_MK: torch.Tensor,
    of_a: torch.Tensor,
    b_NK: torch.Tensor,
    of_b: torch.Tensor,
    of_out: torch.Tensor,
    act_NM: torch.Tensor | None,
    of_act: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    act = None if act_NM is None or of_act is None else Eight(act_NM, of_act)
    return launch_product_8(Eight(a_MK, of_a), Eight(b_NK, of_b), of_out, act)


@_operator.register_fake
def _(a_MK, of_a, b_NK, of_b, of_out, act_NM, of_act):
    M, N, dtype = a_MK.shape[0], b_NK.shape[0], E4M3 if act_NM is None else E5M2
    return a_MK.new_empty(M, N, dtype=dtype), a_MK.new_empty(N, M, dtype=dtype)


@torch.library.custom_op("speedrun::added_product_8", mutates_args=())
def _added(
    a_MK: torch.Tensor, of_a: torch.Tensor, b_NK: torch.Tensor, of_b: torch.Tensor, residual_MN: torch.Tensor
) -> torch.Tensor:
    return launch_added_product_8(Eight(a_MK, of_a), Eight(b_NK, of_b), residual_MN)


@_added.register_fake
def _(a_MK, of_a, b_NK, of_b, residual_MN):
    return residual_MN.new_empty(residual_MN.shape)


def added_product(a: Eight, b: Eight, residual_MN: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    """residual + a b^T, (M, N) in the residual's dtype, in one pass; no autograd."""
    if implementation(impl, residual_MN) == "triton":
        return _added(*a, *b, residual_MN)
    return added_product_8_reference(a, b, residual_MN)


# ---- the norm before it -----------------------------------------------------------------------------------

#: The norm's, of all dtypes: float32's.
_EPS = tl.constexpr(torch.finfo(torch.float32).eps)
#: Numbers that a program has at once, and a warp of it; rows a program at most, and as wide as there may be.
_AT_ONCE, _OF_A_WARP, _MOST_ROWS, _WIDEST = 32768, 2048, 64, 16384


def normed_reference(s_ND, scale):
    """What `launch_normed` computes, in plain torch."""
    wide = s_ND.to(torch.promote_types(s_ND.dtype, torch.float32))
    r_N = torch.rsqrt(wide.square().mean(-1) + torch.finfo(torch.float32).eps)
    values = in_8_bits_reference(wide * r_N[:, None], E4M3, scale)
    return r_N, values, values.t().contiguous()


@triton.jit
def _norm_8(
    p_s, p_r, p_scale, p_out, p_turned, N, D, N_out, D_out, LIMIT: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """r (N,) = 1 / rms of the rows of s (N, D), out (N_out, D_out) = r s / scale in 8 bits, 0 beyond, and its
    transpose. A program has ROWS whole rows."""
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    b_s = tl.load(p_s + o_n[:, None].to(tl.int64) * D + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    b_r = tl.rsqrt(tl.sum(b_s * b_s, 1) / D + _EPS)
    tl.store(p_r + o_n, b_r, mask=o_n < N)
    b_8 = saturated(b_s * b_r[:, None] / tl.load(p_scale), LIMIT).to(p_out.dtype.element_ty)
    o_out = o_n[:, None].to(tl.int64) * D_out + o_d[None, :]
    tl.store(p_out + o_out, b_8, mask=(o_n < N_out)[:, None] & (o_d < D_out)[None, :])
    o_turned = o_d[:, None].to(tl.int64) * N_out + o_n[None, :]
    tl.store(p_turned + o_turned, tl.trans(b_8), mask=(o_d < D_out)[:, None] & (o_n < N_out)[None, :])


def launch_normed(s_ND, scale):
    """(1 / rms of the rows of s (N, D), float32 (N,); their norm over `scale` in e4m3, axes filled up to 16s; its
    transpose)."""
    N, D = s_ND.shape
    expect_floats("s", s_ND, KERNEL_DTYPES)
    expect("scale", scale, (), s_ND)
    expect_floats("scale", scale, (torch.float32,))
    r_N = torch.empty(N, dtype=torch.float32, device=s_ND.device)
    sizes = filled(N), filled(D)
    out, turned = (torch.empty(size, dtype=E4M3, device=s_ND.device) for size in (sizes, sizes[::-1]))
    width = triton.next_power_of_2(sizes[1])
    rows = min(max(_AT_ONCE // width, 1), _MOST_ROWS)
    how = dict(LIMIT=torch.finfo(E4M3).max, ROWS=rows, WIDTH=width)
    how |= dict(num_warps=min(max(rows * width // _OF_A_WARP, 4), 16))
    given = dense(s_ND), r_N, dense(scale), out, turned
    launch(_norm_8, (triton.cdiv(sizes[0], rows),), *given, N, D, *sizes, **how)
    return r_N, out, turned


@torch.library.custom_op("speedrun::normed_8", mutates_args=())
def _normed(s_ND: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch_normed(s_ND, scale)


@_normed.register_fake
def _(s_ND, scale):
    sizes = filled(s_ND.shape[0]), filled(s_ND.shape[1])
    eight = (s_ND.new_empty(size, dtype=E4M3) for size in (sizes, sizes[::-1]))
    return scale.new_empty(s_ND.shape[0]), *eight


# ---- the MLP ----------------------------------------------------------------------------------------------


def _with_epilogue(
    a: Eight, b: Eight, of_out: torch.Tensor, act_turned: Eight | None, impl: str
) -> tuple[Eight, Eight]:
    """The product of a and b with its epilogue, both ways round, in the scale `of_out`."""
    if implementation(impl, a.values) == "triton":
        values = _operator(*a, *b, of_out, *(act_turned or (None, None)))
    else:
        values = product_8_reference(a, b, of_out, act_turned)
    return tuple(Eight(x, of_out) for x in values)


def _weights8(w_in_FD, w_out_DF, eight, impl: str) -> tuple[Weight8, Weight8]:
    """Both weights in 8 bits, from their tensors if there are any."""
    if not eight:
        return weights_in_8_bits([w_in_FD], 1, impl)[0], weights_in_8_bits([w_out_DF], 0, impl)[0]
    return Weight8.of(*eight[:5]), Weight8.of(*eight[5:])


def _hidden(x: Eight, w_in: Weight8, impl: str) -> tuple[Eight, Eight]:
    """a (N, F) and a turned from the normed rows x."""
    return _with_epilogue(x, w_in.eight, w_in.of_squares, None, impl)


def _backward(dy_ND, kept, ctx):
    """(dx, dw_in, dw_out) of the MLP from what `_keep` kept."""
    longest_in, longest_out, *values = kept
    x_turned, w_in_turned, w_out_turned, a_turned = (Eight(*values[i : i + 2]) for i in range(0, 8, 2))
    (N, D, F), (of_x, of_w_in, of_w_out) = ctx.sizes, ctx.dtypes
    dy, dy_turned = both_ways(dy_ND, E5M2, 0.0, ctx.impl)
    # max |dy| sqrt(D) |w_out| 2 sqrt(max a), as the docstring above has it
    most = dy.scale * (torch.finfo(E5M2).max * 2 * D) * longest_in * longest_out
    dh, dh_turned = _with_epilogue(dy, w_out_turned, scale_for(dy_ND, E5M2, most), a_turned, ctx.impl)
    dx = product(dh, w_in_turned, of_x)[:N, :D].contiguous()
    dw_in = product(dh_turned, x_turned, of_w_in)[:F, :D].contiguous()
    return dx, dw_in, product(dy_turned, a_turned, of_w_out)[:D, :F].contiguous()


def _keep(ctx, x_ND, w_in_FD, w_out_DF, impl: str, tensors, w_in: Weight8, w_out: Weight8, x_turned, a_turned) -> None:
    """`tensors`, and what `_backward` asks for."""
    eights = x_turned, w_in.turned, w_out.turned, a_turned
    longest = w_in.longest, w_out.longest
    ctx.save_for_backward(*tensors, *longest, *(tensor for eight in eights for tensor in eight))
    ctx.sizes, ctx.dtypes = (*x_ND.shape, w_in_FD.shape[0]), (x_ND.dtype, w_in_FD.dtype, w_out_DF.dtype)
    ctx.impl = impl


class _MLP8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_in_FD, w_out_DF, impl):
        (N, D), (w_in, w_out) = x_ND.shape, _weights8(w_in_FD, w_out_DF, (), impl)
        x, x_turned = both_ways(x_ND, E4M3, D**0.5, impl)
        a, a_turned = _hidden(x, w_in, impl)
        _keep(ctx, x_ND, w_in_FD, w_out_DF, impl, [], w_in, w_out, x_turned, a_turned)
        return product(a, w_out.eight, x_ND.dtype, fast=True)[:N, :D].contiguous()

    @staticmethod
    @differentiable_once("relu_squared_mlp_8")
    def backward(ctx, dy_ND):
        return *_backward(dy_ND, ctx.saved_tensors, ctx), None


class _NormedMLP8(torch.autograd.Function):
    """eight: the tensors of both weights' `Weight8`, or none."""

    @staticmethod
    def forward(ctx, s_ND, w_in_FD, w_out_DF, impl, *eight):
        D, (w_in, w_out) = s_ND.shape[1], _weights8(w_in_FD, w_out_DF, eight, impl)
        scale = scale_for(s_ND, E4M3, D**0.5)
        run = _normed if implementation(impl, s_ND) == "triton" else normed_reference
        r_N, *values = run(s_ND, scale)
        x, x_turned = (Eight(value, scale) for value in values)
        a, a_turned = _hidden(x, w_in, impl)
        _keep(ctx, s_ND, w_in_FD, w_out_DF, impl, [s_ND, r_N], w_in, w_out, x_turned, a_turned)
        ctx.no_gradients = [None] * (1 + len(eight))
        return added_product(a, w_out.eight, s_ND, impl)

    @staticmethod
    @differentiable_once("normed_mlp_8")
    def backward(ctx, dy_ND):
        s_ND, r_N, *kept = ctx.saved_tensors
        g_ND, *dws = _backward(dy_ND, kept, ctx)
        g, y = g_ND.to(r_N.dtype), s_ND.to(r_N.dtype) * r_N[:, None]
        ds = dy_ND.to(r_N.dtype) + r_N[:, None] * (g - y * (g * y).mean(-1, keepdim=True))
        return ds.to(s_ND.dtype), *dws, *ctx.no_gradients


def _check(x_ND: torch.Tensor, w_in_FD: torch.Tensor, w_out_DF: torch.Tensor, name: str) -> torch.Tensor:
    """x's rows, or an error that names the first argument that does not fit."""
    check_shapes(x_ND, w_in_FD, w_out_DF)
    expect_operands(name, x=x_ND, w_in=w_in_FD, w_out=w_out_DF)
    return in_rows(x_ND)


@without_autocast
def relu_squared_mlp_8(
    x_ND: torch.Tensor, w_in_FD: torch.Tensor, w_out_DF: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """relu(x w_in^T)^2 w_out^T by products in 8 bits; x (..., D), each row no longer than sqrt(D), what a norm leaves.

    Longer rows are taken for as long: what is beyond the scales saturates. The result has x's dtype, gradients those of
    what they belong to. impl: of conversions and epilogues. Errors: ValueError for shapes or devices that do not fit,
    TypeError for dtypes."""
    rows = _check(x_ND, w_in_FD, w_out_DF, "relu_squared_mlp_8")
    return _MLP8.apply(rows, w_in_FD, w_out_DF, impl).view(x_ND.shape)


@without_autocast
def normed_mlp_8(
    x_ND: torch.Tensor,
    w_in_FD: torch.Tensor,
    w_out_DF: torch.Tensor,
    *,
    weights: tuple[Weight8, Weight8] | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """x + relu_squared_mlp_8(rms_norm(x), w_in, w_out).

    weights: w_in and w_out in 8 bits (`weights_in_8_bits`, w_out's norms along axis 0), or None. Other arguments and
    errors as in `relu_squared_mlp_8`."""
    rows = _check(x_ND, w_in_FD, w_out_DF, "normed_mlp_8")
    eight = [tensor for weight in weights or () for tensor in weight.tensors()]
    if implementation(impl, rows) == "triton" and rows.shape[1] > _WIDEST:
        raise ValueError(f"x {tuple(x_ND.shape)}: rows of more than {_WIDEST} numbers do not fit into a program")
    return _NormedMLP8.apply(rows, w_in_FD, w_out_DF, impl, *eight).view(x_ND.shape)


# ---- a linear layer beside a residual ---------------------------------------------------------------------


class _AddedLinear8(torch.autograd.Function):
    """weight: the tensors of a `Weight8`, or none."""

    @staticmethod
    def forward(ctx, residual_ND, x_NE, w_DE, largest, impl, *weight):
        return added_product(*kept_factors(ctx, x_NE, w_DE, largest, impl, weight), residual_ND, impl)

    @staticmethod
    @differentiable_once("added_linear_8")
    def backward(ctx, dy_ND):
        return dy_ND, *gradients_of_factors(ctx, dy_ND)


@without_autocast
def added_linear_8(
    residual: torch.Tensor,
    x: torch.Tensor,
    w_DE: torch.Tensor,
    *,
    of_x: float | torch.Tensor = 0.0,
    weight: Weight8 | None = None,
    impl: str = "auto",
) -> torch.Tensor:
    """residual (..., D) + x w^T in the residual's dtype, rounded once; else as `products8.linear`."""
    if w_DE.dim() != 2 or x.shape != (*residual.shape[:-1], w_DE.shape[1]) or residual.shape[-1:] != w_DE.shape[:1]:
        raise ValueError(
            f"residual {tuple(residual.shape)}, x {tuple(x.shape)} and w {tuple(w_DE.shape)} must be (..., D), "
            "(..., E) and (D, E)"
        )
    expect_operands("added_linear_8", residual=residual, x=x, w=w_DE)
    return _AddedLinear8.apply(
        in_rows(residual), in_rows(x), w_DE, of_x, impl, *(weight.tensors() if weight else ())
    ).view(residual.shape)


# ---- a linear layer behind a norm -------------------------------------------------------------------------


class _NormedLinear8(torch.autograd.Function):
    """weight: the tensors of a `Weight8`, or none."""

    @staticmethod
    def forward(ctx, s_ND, w_FD, columns, impl, *weight):
        scale = scale_for(s_ND, E4M3, s_ND.shape[1] ** 0.5)
        run = _normed if implementation(impl, s_ND) == "triton" else normed_reference
        r_N, *values = run(s_ND, scale)
        of_norm = tuple(Eight(value, scale) for value in values)
        x, w = kept_factors(ctx, s_ND, w_FD, 0.0, impl, weight, of_norm, s_ND, r_N)
        first_NC = (s_ND[:, :columns] * r_N[:, None]).to(s_ND.dtype)
        return product(x, w, s_ND.dtype, fast=True)[: s_ND.shape[0], : w_FD.shape[0]].contiguous(), first_NC

    @staticmethod
    @differentiable_once("normed_linear_8")
    def backward(ctx, dy_NF, dfirst_NC):
        s_ND, r_N = ctx.saved_tensors[4:]
        g_ND, dw_FD, *nones = gradients_of_factors(ctx, dy_NF)
        more = torch.nn.functional.pad(dfirst_NC, (0, g_ND.shape[1] - dfirst_NC.shape[1]))
        g, y = g_ND.to(r_N.dtype) + more, s_ND * r_N[:, None]
        ds = r_N[:, None] * (g - y * (g * y).mean(-1, keepdim=True))
        return ds.to(s_ND.dtype), dw_FD, *nones


@without_autocast
def normed_linear_8(
    x: torch.Tensor, w_FD: torch.Tensor, columns: int = 0, *, weight: Weight8 | None = None, impl: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x) w^T, the first so many columns of rms_norm(x)) of x (..., D) and w (F, D); the products as in
    `products8.linear`. The norm is written in 8 bits only, so that a pass over x is saved."""
    if w_FD.dim() != 2 or x.shape[-1:] != w_FD.shape[1:]:
        raise ValueError(f"x {tuple(x.shape)} and w {tuple(w_FD.shape)} must be (..., D) and (F, D)")
    expect_operands("normed_linear_8", x=x, w=w_FD)
    if implementation(impl, x) == "triton" and x.shape[-1] > _WIDEST:
        raise ValueError(f"x {tuple(x.shape)}: rows of more than {_WIDEST} numbers do not fit into a program")
    found = _NormedLinear8.apply(in_rows(x), w_FD, columns, impl, *(weight.tensors() if weight else ()))
    return tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in found)
