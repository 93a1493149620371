"""The block's MLP: linear, relu squared, linear.

y = relu(x w_in^T)^2 w_out^T           x (N, D), w_in (F, D), w_out (D, F), y (N, D); F = 4 D (docs/spec.md 2.8)

With the norm before it (kernels/norm.py) and the residual beside it, y = x + mlp(r x), r = 1 / rms(x) a row's number:
a factor of rows may as well be taken on the product's result, so that r x never exists. The product, which reads whole
rows, finds r on its way; backward, dh' = r dh takes the place of dh, whence dw_in = dh'^T x and, with g = dh' w_in,
dx = dy + g - x r^2 mean(g x). The norm's two passes over N D forward are gone.

On a GPU the activation sits in the epilogue of the first product, and its derivative in that of the backward product
dh = (dy w_out) * 2 relu(h). Only a = relu(h)^2 is stored: relu(h) is its root. Products: 4 N D F FLOPs forward, 8 N D F
backward. Bytes beside operands and results of the products: none forward, one read of a (2 N F) backward; unfused, the
activation reads and writes 4 N F bytes twice in each direction. The products that have no epilogue are the library's.
"""

import torch

from kernels.guards import (
    KERNEL_DTYPES,
    dense,
    differentiable_once,
    expect,
    expect_floats,
    in_rows,
    launch,
    refuse_tangents,
    without_autocast,
)
from kernels.norm import rms_norm
from kernels.runtime import Tile, Tiles, copies_in_bulk, descriptor, implementation_of, persistent, tile_of, tl, triton

# ---- reference --------------------------------------------------------------------------------------------


def relu_squared_mlp_reference(x_ND: torch.Tensor, w_in_FD: torch.Tensor, w_out_DF: torch.Tensor) -> torch.Tensor:
    """The definition, in plain torch; autograd differentiates it."""
    return torch.relu(x_ND @ w_in_FD.t()).square() @ w_out_DF.t()


class _ReluSquaredMLP(torch.autograd.Function):
    """The reference with its derivative written out: 1.1 to 1.8 times as fast on a CPU, as it makes
    fewer passes.
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


#: "default" is small enough for any device. "backward", and "ragged" for factors whose rows are no multiples of 16
#: bytes, stand where a thread would spill with the other tile.
TILES: Tiles = {
    ("default", "product", 2): Tile(64, 64, 4, 2, depth=32),
    ("default", "product", 4): Tile(32, 32, 4, 2, depth=32),
    ("sm_80", "product", 2): Tile(128, 128, 8, 3, depth=64),
    ("sm_80", "ragged", 2): Tile(64, 128, 8, 2, depth=32),
    ("sm_90", "product", 2): Tile(128, 256, 8, 3, depth=64, descriptors=True),
    ("sm_100", "product", 2): Tile(128, 256, 8, 3, depth=64, descriptors=True),
    ("sm_100", "backward", 2): Tile(128, 128, 8, 3, depth=64, descriptors=True),
    ("sm_100", "ragged", 2): Tile(64, 128, 8, 2, depth=32),
    ("gfx942", "product", 2): Tile(128, 128, 8, 2, depth=32),
}
#: The norm's, of all dtypes: float32's.
_EPS = tl.constexpr(torch.finfo(torch.float32).eps)
_GROUP = 8  # tiles of rows that share tiles of columns while those are in the second-level cache


# ---- Triton -----------------------------------------------------------------------------------------------


@triton.jit
def _product(
    p_a,
    p_b,
    p_act,
    p_out,
    p_r,
    M,
    N,
    K,
    stride_n,
    stride_k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    FLATTEN: tl.constexpr,
    BACKWARD: tl.constexpr,
    NORMED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (M, N) = relu(a b^T)^2, or, BACKWARD, (a b^T) * 2 sqrt(act); a (M, K) dense, b[n, k] by its strides.

    A program takes every num_programs-th tile. FLATTEN: both loops are one to the compiler, so that the next tile's
    loads run under the epilogue of this one. NORMED: a b^T times r, a factor of rows; it is 1 / rms(a), and written,
    or, BACKWARD, read. DESCRIPTOR: p_a and p_b are tensor descriptors, p_b's of the dense one of b and b^T: b forward,
    b^T BACKWARD."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        group = tile // (GROUP * tiles_n)
        first = group * GROUP
        height = tl.minimum(tiles_m - first, GROUP)
        within = tile % (GROUP * tiles_n)
        row, column = (first + within % height) * BM, (within // height) * BN
        o_m = row + tl.arange(0, BM)
        o_n = column + tl.arange(0, BN)
        b_out = tl.zeros([BM, BN], tl.float32)
        b_square = tl.zeros([BM], tl.float32)
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
            if NORMED and not BACKWARD:
                b_wide = b_a.to(tl.float32)
                b_square += tl.sum(b_wide * b_wide, 1)
        o_out = o_m[:, None].to(tl.int64) * N + o_n[None, :]
        m_out = (o_m < M)[:, None] & (o_n < N)[None, :]
        if NORMED:
            if BACKWARD:
                b_r = tl.load(p_r + o_m, mask=o_m < M, other=0.0)
            else:
                b_r = tl.rsqrt(b_square / K + _EPS)
                if column == 0:
                    tl.store(p_r + o_m, b_r, mask=o_m < M)
            b_out *= b_r[:, None]
        if BACKWARD:
            b_out *= 2 * tl.sqrt(tl.load(p_act + o_out, mask=m_out, other=0.0).to(tl.float32))
        else:
            b_out = tl.maximum(b_out, 0.0, propagate_nan=tl.PropagateNan.ALL)
            b_out *= b_out
        tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


# ---- launchers --------------------------------------------------------------------------------------------


def _launch(a_MK, b_NK, act_MN=None, tile: Tile | None = None, r_M=None):
    """One product with its epilogue; with `act_MN`, the backward one, b_NK is a transposed view. r_M: float32, the
    factor of rows, which the forward one writes and the backward one reads."""
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
    if r_M is not None:
        expect("the factor of rows", r_M, (M,), a_MK)
        expect_floats("the factor of rows", r_M, (torch.float32,))
        r_M = dense(r_M)
    in_bulk = a_MK.numel() > 0 and copies_in_bulk(a_MK) and copies_in_bulk(as_stored)
    special = ["ragged"] * (not in_bulk) + ["backward"] * backward
    tile = tile or tile_of(TILES, "product", a_MK.dtype, special=special)
    out = torch.empty(M, N, dtype=a_MK.dtype, device=a_MK.device)
    tiles = triton.cdiv(M, tile.rows) * triton.cdiv(N, tile.columns)
    descriptors = tile.descriptors and in_bulk
    p_a, p_b = a_MK, b_NK
    if descriptors:
        p_a = descriptor(a_MK, [tile.rows, tile.depth])
        p_b = descriptor(as_stored, [tile.depth, tile.columns] if backward else [tile.columns, tile.depth])
    launch(
        _product,
        (persistent(tiles) if descriptors else tiles,),
        p_a,
        p_b,
        act_MN if backward else out,
        out,
        r_M,
        M,
        N,
        K,
        b_NK.stride(0),
        b_NK.stride(1),
        BM=tile.rows,
        BN=tile.columns,
        BK=tile.depth,
        GROUP=_GROUP,
        FLATTEN=descriptors,
        BACKWARD=backward,
        NORMED=r_M is not None,
        DESCRIPTOR=descriptors,
        PRECISION="ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def launch_activation(x_ND, w_in_FD, tile: Tile | None = None):
    """relu(x w_in^T)^2, (N, F)."""
    return _launch(x_ND, w_in_FD, tile=tile)


def launch_normed_activation(x_ND, w_in_FD, tile: Tile | None = None):
    """(relu(r x w_in^T)^2 (N, F), r = 1 / rms(x) float32 (N,))."""
    r_N = torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device)
    return _launch(x_ND, w_in_FD, tile=tile, r_M=r_N), r_N


def launch_slope(dy_ND, w_out_DF, a_NF, tile: Tile | None = None, r_N=None):
    """(dy w_out) * 2 sqrt(a), (N, F): the gradient at the first product's result; times r, where r is its factor."""
    return _launch(dy_ND, w_out_DF.t(), a_NF, tile, r_N)


# ---- torch operators --------------------------------------------------------------------------------------


@torch.library.custom_op("speedrun::relu_squared_mlp", mutates_args=())
def _mlp(x_ND: torch.Tensor, w_in_FD: torch.Tensor, w_out_DF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a_NF = launch_activation(x_ND, w_in_FD)
    return a_NF @ w_out_DF.t(), a_NF


@torch.library.custom_op("speedrun::relu_squared_mlp_backward", mutates_args=())
def _mlp_backward(
    dy_ND: torch.Tensor, x_ND: torch.Tensor, w_in_FD: torch.Tensor, w_out_DF: torch.Tensor, a_NF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dw_out_DF = dy_ND.t() @ a_NF
    dh_NF = launch_slope(dy_ND, w_out_DF, a_NF)
    return dh_NF @ w_in_FD, dh_NF.t() @ x_ND, dw_out_DF


@_mlp.register_fake
def _(x_ND, w_in_FD, w_out_DF):
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(x_ND.shape[0], w_in_FD.shape[0])


@_mlp_backward.register_fake
def _(dy_ND, x_ND, w_in_FD, w_out_DF, a_NF):
    return x_ND.new_empty(x_ND.shape), w_in_FD.new_empty(w_in_FD.shape), w_out_DF.new_empty(w_out_DF.shape)


def _mlp_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])


@differentiable_once("relu_squared_mlp")
def _mlp_grad(ctx, dy_ND, _):
    return _mlp_backward(dy_ND, *ctx.saved_tensors)


_mlp.register_autograd(_mlp_grad, setup_context=_mlp_setup)


@torch.library.custom_op("speedrun::normed_mlp", mutates_args=())
def _normed_mlp(
    x_ND: torch.Tensor, w_in_FD: torch.Tensor, w_out_DF: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x + mlp(norm(x)), the activation, 1 / rms(x))."""
    a_NF, r_N = launch_normed_activation(x_ND, w_in_FD)
    return torch.addmm(x_ND, a_NF, w_out_DF.t()), a_NF, r_N


@torch.library.custom_op("speedrun::normed_mlp_backward", mutates_args=())
def _normed_mlp_backward(
    dy_ND: torch.Tensor,
    x_ND: torch.Tensor,
    w_in_FD: torch.Tensor,
    w_out_DF: torch.Tensor,
    a_NF: torch.Tensor,
    r_N: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(g, dw_in, dw_out) of the docstring above."""
    dw_out_DF = dy_ND.t() @ a_NF
    dh_NF = launch_slope(dy_ND, w_out_DF, a_NF, r_N=r_N)
    return dh_NF @ w_in_FD, dh_NF.t() @ x_ND, dw_out_DF


@_normed_mlp.register_fake
def _(x_ND, w_in_FD, w_out_DF):
    (N, D), F = x_ND.shape, w_in_FD.shape[0]
    return x_ND.new_empty(N, D), x_ND.new_empty(N, F), x_ND.new_empty(N, dtype=torch.float32)


@_normed_mlp_backward.register_fake
def _(dy_ND, x_ND, w_in_FD, w_out_DF, a_NF, r_N):
    return x_ND.new_empty(x_ND.shape), w_in_FD.new_empty(w_in_FD.shape), w_out_DF.new_empty(w_out_DF.shape)


class _NormedMLP(torch.autograd.Function):
    """The operator; what is left of the norm's derivative is for the compiler to fuse with its neighbours."""

    @staticmethod
    def forward(ctx, x_ND, w_in_FD, w_out_DF):
        y_ND, a_NF, r_N = _normed_mlp(x_ND, w_in_FD, w_out_DF)
        ctx.save_for_backward(x_ND, w_in_FD, w_out_DF, a_NF, r_N)
        return y_ND

    @staticmethod
    @differentiable_once("normed_mlp")
    def backward(ctx, dy_ND):
        x_ND, _, _, _, r_N = ctx.saved_tensors
        g_ND, dw_in_FD, dw_out_DF = _normed_mlp_backward(dy_ND, *ctx.saved_tensors)
        x, g = x_ND.float(), g_ND.float()
        dx = dy_ND.float() + (g - x * (r_N.square()[:, None] * (g * x).mean(-1, keepdim=True)))
        return dx.to(x_ND.dtype), dw_in_FD, dw_out_DF


# ---- public functions -------------------------------------------------------------------------------------


def implementation(impl: str, tensor: torch.Tensor) -> str:
    """The name of what would run for that tensor: triton | reference."""
    return implementation_of(impl, tensor, cpu="reference", choices=("triton", "reference"))


def check_shapes(x_ND, w_in_FD, w_out_DF) -> None:
    """Raise ValueError unless the three fit each other."""
    if w_in_FD.shape != w_out_DF.shape[::-1] or w_in_FD.dim() != 2 or x_ND.shape[-1:] != w_in_FD.shape[1:]:
        raise ValueError(
            f"x {tuple(x_ND.shape)}, w_in {tuple(w_in_FD.shape)} and w_out {tuple(w_out_DF.shape)} "
            "must be (..., D), (F, D) and (D, F)"
        )


def _check(x_ND, w_in_FD, w_out_DF) -> None:
    """Raise an error that names the first argument that does not fit."""
    check_shapes(x_ND, w_in_FD, w_out_DF)
    for name, x in (("x", x_ND), ("w_in", w_in_FD), ("w_out", w_out_DF)):
        expect(name, x, x.shape, x_ND)
        expect_floats(name, x)


@without_autocast
def relu_squared_mlp(
    x_ND: torch.Tensor, w_in_FD: torch.Tensor, w_out_DF: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """relu(x w_in^T)^2 w_out^T; x may have leading axes. Weights are cast to x's dtype for the products.

    Errors: ValueError for shapes or devices that do not fit, TypeError for dtypes.
    """
    _check(x_ND, w_in_FD, w_out_DF)
    rows = in_rows(x_ND)
    w_in_FD, w_out_DF = w_in_FD.to(x_ND.dtype), w_out_DF.to(x_ND.dtype)
    if implementation(impl, x_ND) == "triton":
        expect_floats("x", x_ND, KERNEL_DTYPES)
        refuse_tangents("relu_squared_mlp", x_ND, w_in_FD, w_out_DF)
        y_ND, _ = _mlp(dense(rows), dense(w_in_FD), dense(w_out_DF))
        return y_ND.view(x_ND.shape)
    return _ReluSquaredMLP.apply(rows, w_in_FD, w_out_DF).view(x_ND.shape)


@without_autocast
def normed_mlp(
    x_ND: torch.Tensor, w_in_FD: torch.Tensor, w_out_DF: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """x + relu_squared_mlp(rms_norm(x), w_in, w_out), arguments and errors as there."""
    if implementation(impl, x_ND) != "triton":
        return x_ND + relu_squared_mlp(rms_norm(x_ND), w_in_FD, w_out_DF, impl=impl)
    expect_floats("x", x_ND, KERNEL_DTYPES)
    _check(x_ND, w_in_FD, w_out_DF)
    refuse_tangents("normed_mlp", x_ND, w_in_FD, w_out_DF)
    rows = dense(in_rows(x_ND))
    weights = (dense(w.to(x_ND.dtype)) for w in (w_in_FD, w_out_DF))
    return _NormedMLP.apply(rows, *weights).view(x_ND.shape)
