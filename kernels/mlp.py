"""The block's MLP: linear, relu squared, linear.

y = relu(x w_in^T)^2 w_out^T           x (N, D), w_in (F, D), w_out (D, F), y (N, D); F = 4 D (docs/spec.md 2.8)

On a GPU the activation sits in the epilogue of the first product, and its derivative in that of the backward product
dh = (dy w_out) * 2 relu(h). Only a = relu(h)^2 is stored: relu(h) is its root. Products: 4 N D F FLOPs forward, 8 N D F
backward. Bytes beside operands and results of the products: none forward, one read of a (2 N F) backward; unfused, the
activation reads and writes 4 N F bytes twice in each direction. The products that have no epilogue are the library's.
"""

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
from kernels.runtime import Tile, Tiles, copies_in_bulk, descriptor, implementation_of, tile_of, tl, triton

# ---- reference --------------------------------------------------------------------------------------------


def relu_squared_mlp_reference(x_ND: torch.Tensor, w_in_FD: torch.Tensor, w_out_DF: torch.Tensor) -> torch.Tensor:
    """The definition, in plain torch; autograd differentiates it."""
    return torch.relu(x_ND @ w_in_FD.t()).square() @ w_out_DF.t()


class _ReluSquaredMLP(torch.autograd.Function):
    """The reference with its derivative written out: 1.1 to 1.8 times as fast on a CPU, as it makes fewer
    passes.
    """

    @staticmethod
    def forward(ctx, x_ND, w_in_FD, w_out_DF):
        r_NF = (x_ND @ w_in_FD.t()).relu_()  # torch's relu keeps NaN
        a_NF = r_NF * r_NF
        ctx.save_for_backward(x_ND, w_in_FD, w_out_DF, r_NF, a_NF)
        return a_NF @ w_out_DF.t()

    @staticmethod
    @differentiable_once("relu_squared_mlp")
    def backward(ctx, dy_ND):
        x_ND, w_in_FD, w_out_DF, r_NF, a_NF = ctx.saved_tensors
        dh_NF = (dy_ND @ w_out_DF).mul_(r_NF).mul_(2)
        dx_ND = dh_NF @ w_in_FD if ctx.needs_input_grad[0] else None
        return dx_ND, dh_NF.t() @ x_ND, dy_ND.t() @ a_NF


# ---- tiles ------------------------------------------------------------------------------------------------


#: "default" is small enough for any device.
TILES: Tiles = {
    ("default", "product", 2): Tile(64, 64, 4, 2, depth=32),
    ("default", "product", 4): Tile(32, 32, 4, 2, depth=32),
    ("sm_80", "product", 2): Tile(128, 128, 8, 3, depth=64),
    ("sm_90", "product", 2): Tile(128, 256, 8, 3, depth=64, descriptors=True),
    ("sm_100", "product", 2): Tile(128, 256, 8, 3, depth=64, descriptors=True),
    ("gfx942", "product", 2): Tile(128, 128, 8, 2, depth=32),
}
_GROUP = 8  # tiles of rows that share tiles of columns while those are in the second-level cache


# ---- Triton -----------------------------------------------------------------------------------------------


@triton.jit
def _product(
    p_a,
    p_b,
    p_act,
    p_out,
    M,
    N,
    K,
    stride_n,
    stride_k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    BACKWARD: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (M, N) = relu(a b^T)^2, or, BACKWARD, (a b^T) * 2 sqrt(act); a (M, K) dense, b[n, k] by its strides.

    DESCRIPTOR: p_a and p_b are tensor descriptors, p_b's of the dense one of b and b^T: b forward, b^T BACKWARD."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = tl.program_id(0) // (GROUP * tiles_n)
    first = group * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tl.program_id(0) % (GROUP * tiles_n)
    row, column = (first + within % height) * BM, (within // height) * BN
    o_m = row + tl.arange(0, BM)
    o_n = column + tl.arange(0, BN)
    b_out = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        if DESCRIPTOR:
            b_a = p_a.load([row, k])
            b_b = p_b.load([k, column]) if BACKWARD else tl.trans(p_b.load([column, k]))
        else:
            o_k = k + tl.arange(0, BK)
            p_rows = p_a + o_m[:, None].to(tl.int64) * K
            p_columns = p_b + o_n[:, None].to(tl.int64) * stride_n
            b_a = tl.load(p_rows + o_k[None, :], mask=(o_m < M)[:, None] & (o_k < K)[None, :], other=0.0)
            m_b = (o_n < N)[:, None] & (o_k < K)[None, :]
            b_b = tl.trans(tl.load(p_columns + o_k[None, :] * stride_k, mask=m_b, other=0.0))
        b_out = tl.dot(b_a, b_b, b_out, input_precision=PRECISION)
    o_out = o_m[:, None].to(tl.int64) * N + o_n[None, :]
    m_out = (o_m < M)[:, None] & (o_n < N)[None, :]
    if BACKWARD:
        b_out *= 2 * tl.sqrt(tl.load(p_act + o_out, mask=m_out, other=0.0).to(tl.float32))
    else:
        b_out = tl.maximum(b_out, 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_out *= b_out
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


# ---- launchers --------------------------------------------------------------------------------------------


def _launch(a_MK, b_NK, act_MN=None, tile: Tile | None = None):
    """One product with its epilogue; with `act_MN`, the backward one, b_NK is a transposed view."""
    backward = act_MN is not None
    (M, K), N = a_MK.shape, b_NK.shape[0]
    expect("the second factor", b_NK, (N, K), a_MK)
    expect_floats("the first factor", a_MK, KERNEL_DTYPES)
    expect_floats("the second factor", b_NK, (a_MK.dtype,))
    a_MK, as_stored = dense(a_MK), dense(b_NK.t() if backward else b_NK)
    b_NK = as_stored.t() if backward else as_stored
    if backward:
        expect("the activation", act_MN, (M, N), a_MK)
        act_MN = dense(act_MN)
    tile = tile or tile_of(TILES, "product", a_MK.dtype)
    out = torch.empty(M, N, dtype=a_MK.dtype, device=a_MK.device)
    programs = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns)
    descriptors = tile.descriptors and a_MK.numel() > 0 and copies_in_bulk(a_MK) and copies_in_bulk(as_stored)
    p_a, p_b = a_MK, b_NK
    if descriptors:
        p_a = descriptor(a_MK, [tile.rows, tile.depth])
        p_b = descriptor(as_stored, [tile.depth, tile.columns] if backward else [tile.columns, tile.depth])
    launch(
        _product,
        (programs,),
        p_a,
        p_b,
        act_MN if backward else out,
        out,
        M,
        N,
        K,
        b_NK.stride(0),
        b_NK.stride(1),
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        GROUP=_GROUP,
        BACKWARD=backward,
        DESCRIPTOR=descriptors,
        PRECISION="ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def launch_activation(x_ND, w_in_FD, tile: Tile | None = None):
    """relu(x w_in^T)^2, (N, F)."""
    return _launch(x_ND, w_in_FD, tile=tile)


def launch_slope(dy_ND, w_out_DF, a_NF, tile: Tile | None = None):
    """(dy w_out) * 2 sqrt(a), (N, F): the gradient at the first product's result."""
    return _launch(dy_ND, w_out_DF.t(), a_NF, tile)


# ---- torch operators --------------------------------------------------------------------------------------


@torch.library.custom_op("speedrun::relu_squared_mlp", mutates_args=())
def _mlp(
    x_ND: torch.Tensor, w_in_FD: torch.Tensor, w_out_DF: torch.Tensor, residual_ND: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    a_NF = launch_activation(x_ND, w_in_FD)
    product = a_NF @ w_out_DF.t() if residual_ND is None else torch.addmm(residual_ND, a_NF, w_out_DF.t())
    return product, a_NF


@torch.library.custom_op("speedrun::relu_squared_mlp_backward", mutates_args=())
def _mlp_backward(
    dy_ND: torch.Tensor, x_ND: torch.Tensor, w_in_FD: torch.Tensor, w_out_DF: torch.Tensor, a_NF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dw_out_DF = dy_ND.t() @ a_NF
    dh_NF = launch_slope(dy_ND, w_out_DF, a_NF)
    return dh_NF @ w_in_FD, dh_NF.t() @ x_ND, dw_out_DF


@_mlp.register_fake
def _(x_ND, w_in_FD, w_out_DF, residual_ND):
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(x_ND.shape[0], w_in_FD.shape[0])


@_mlp_backward.register_fake
def _(dy_ND, x_ND, w_in_FD, w_out_DF, a_NF):
    return x_ND.new_empty(x_ND.shape), w_in_FD.new_empty(w_in_FD.shape), w_out_DF.new_empty(w_out_DF.shape)


def _mlp_setup(ctx, inputs, output):
    *given, residual_ND = inputs
    ctx.adds = residual_ND is not None
    ctx.save_for_backward(*given, output[1])
    ctx.mark_non_differentiable(output[1])


@differentiable_once("relu_squared_mlp")
def _mlp_grad(ctx, dy_ND, _):
    return *_mlp_backward(dy_ND, *ctx.saved_tensors), dy_ND if ctx.adds else None


_mlp.register_autograd(_mlp_grad, setup_context=_mlp_setup)


# ---- public functions -------------------------------------------------------------------------------------


def implementation(impl: str, tensor: torch.Tensor) -> str:
    """The name of what would run for that tensor: triton | reference."""
    return implementation_of(impl, tensor, cpu="reference", choices=("triton", "reference"))


@without_autocast
def relu_squared_mlp(
    x_ND: torch.Tensor,
    w_in_FD: torch.Tensor,
    w_out_DF: torch.Tensor,
    residual_ND: torch.Tensor | None = None,
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """relu(x w_in^T)^2 w_out^T, or residual plus that; x may have leading axes. Weights are cast to x's dtype for the
    products. residual: like x; a product that begins with it saves a pass over it and the result.

    Errors: ValueError for shapes or devices that do not fit, TypeError for dtypes.
    """
    if w_in_FD.shape != w_out_DF.shape[::-1] or w_in_FD.dim() != 2 or x_ND.shape[-1:] != w_in_FD.shape[1:]:
        raise ValueError(
            f"x {tuple(x_ND.shape)}, w_in {tuple(w_in_FD.shape)} and w_out {tuple(w_out_DF.shape)} "
            "must be (..., D), (F, D) and (D, F)"
        )
    for name, x in (("x", x_ND), ("w_in", w_in_FD), ("w_out", w_out_DF)):
        expect(name, x, x.shape, x_ND)
        expect_floats(name, x)
    if residual_ND is not None:
        expect("residual", residual_ND, x_ND.shape, x_ND)
        expect_floats("residual", residual_ND, (x_ND.dtype,))
    rows = x_ND.reshape(math.prod(x_ND.shape[:-1]), x_ND.shape[-1])
    w_in_FD, w_out_DF = w_in_FD.to(x_ND.dtype), w_out_DF.to(x_ND.dtype)
    if implementation(impl, x_ND) == "triton":
        expect_floats("x", x_ND, KERNEL_DTYPES)
        refuse_tangents("relu_squared_mlp", x_ND, w_in_FD, w_out_DF, residual_ND)
        added = None if residual_ND is None else dense(residual_ND.reshape(rows.shape))
        y_ND, _ = _mlp(dense(rows), dense(w_in_FD), dense(w_out_DF), added)
        return y_ND.view(x_ND.shape)
    y_ND = _ReluSquaredMLP.apply(rows, w_in_FD, w_out_DF).view(x_ND.shape)
    return y_ND if residual_ND is None else residual_ND + y_ND
