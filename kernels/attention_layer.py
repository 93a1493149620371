"""Attention from the stream to its heads' outputs, as one operator: projection, inputs, attention.

    q, k, v = x w^T;   q, k <- rotary(norm(q)), rotary(norm(k));   v <- s[0] norm(v) + s[1] ve;   o = attention(q, k, v)

Taken together for the sake of bytes. The projection lies in one tensor qkv (B, T, H + 2 K, Dh). Forward, one kernel
norms and rotates q and k in place, notes the factors of their norms, and writes the mixed v; qkv is kept for the
backward pass, the mixed v only where it has a value embedding: else the same kernel makes it again. Backward,
attention's own kernels go on through rotary, norms and mix before they write (the derivative of y = x r needs only y
and r), each into its slice of one gradient tensor, which both products read. So with E = B T H Dh elements and K = H,
beside products and attention: 7 E read and written forward, 3 E backward and 2 E for v made again, where separate
operators take 7 E, 11 E and 6 E for putting the three gradients together; and kept are 3 E (qkv) or 4 E in place of 6 E
(q, k, v before and after). x goes through: the gradient that it has from elsewhere is the first summand of the product
that makes its own, which saves a pass over three tensors.

Shapes: x (B, T, D), w ((H + 2 K) Dh, D), ve (B, T, K, Dh), s float32 (2,), cos, sin float32 (T, R) with R = Dh / 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels import products8
from kernels.attention import (
    FORWARDS,
    AttentionPlan,
    LayerInputs,
    attention,
    check_plan,
    check_scale,
    launch_backward,
    launch_forward,
)
from kernels.attention import implementation as attention_implementation
from kernels.attention_inputs import attention_inputs, check_width
from kernels.guards import dense, differentiable_once, expect, expect_floats, launch, refuse_tangents, without_autocast
from kernels.mlp8 import added_product
from kernels.runtime import tl, triton

# ---- Triton -----------------------------------------------------------------------------------------------
# Prefixes: p_ pointer, o_ offset, b_ block of values, m_ mask. One program takes ROWS tokens through all heads, so
# that a token's angles are read once. A head is handled as its two halves, which is what rotary pairs up. Everything is
# float32 in registers and rounded once, on the way out.

#: Tokens a program and its warps.
_ROWS, _WARPS = 16, 4
_EPS = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def _load_head(p_x, m_token, R: tl.constexpr):
    """Both halves of a head of each token, (ROWS, R) in float32; zeros where masked out. p_x (ROWS,): their starts."""
    p = p_x[:, None] + tl.arange(0, R)[None, :]
    b_1 = tl.load(p, mask=m_token[:, None], other=0.0)
    b_2 = tl.load(p + R, mask=m_token[:, None], other=0.0)
    return b_1.to(tl.float32), b_2.to(tl.float32)


@triton.jit
def _store_head(p_x, b_1, b_2, m_token, R: tl.constexpr):
    """Write what `_load_head` reads."""
    p = p_x[:, None] + tl.arange(0, R)[None, :]
    tl.store(p, b_1.to(p_x.dtype.element_ty), mask=m_token[:, None])
    tl.store(p + R, b_2.to(p_x.dtype.element_ty), mask=m_token[:, None])


@triton.jit
def _inverse_rms(b_1, b_2, R: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of each row of two halves."""
    return tl.rsqrt((tl.sum(b_1 * b_1, 1) + tl.sum(b_2 * b_2, 1)) / (2 * R) + _EPS)


@triton.jit
def _prepare(
    p_qkv,
    p_ve,
    p_s,
    p_cos,
    p_sin,
    p_v,
    p_rms_q,
    p_rms_k,
    tokens,
    T,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_VE: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """v (tokens, KV_HEADS, 2 R) from qkv's raw one; with ROTATE also q and k normed and rotated in place, and 1 / rms
    of each of their heads."""
    o_token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_token = o_token < tokens
    o_wide = o_token.to(tl.int64)
    p_head = p_qkv + o_wide * ((HEADS + 2 * KV_HEADS) * 2 * R)
    if ROTATE:
        o_angle = (o_token % T)[:, None] * R + tl.arange(0, R)[None, :]
        b_cos = tl.load(p_cos + o_angle, mask=m_token[:, None], other=0.0)
        b_sin = tl.load(p_sin + o_angle, mask=m_token[:, None], other=0.0)
        for h in range(0, HEADS + KV_HEADS):
            b_1, b_2 = _load_head(p_head + h * 2 * R, m_token, R)
            b_r = _inverse_rms(b_1, b_2, R)
            if h < HEADS:
                p_rms = p_rms_q + (o_wide // T * HEADS + h) * T + o_token % T
            else:
                p_rms = p_rms_k + (o_wide // T * KV_HEADS + h - HEADS) * T + o_token % T
            tl.store(p_rms, b_r, mask=m_token)
            b_1, b_2 = b_1 * b_r[:, None], b_2 * b_r[:, None]
            _store_head(p_head + h * 2 * R, b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin, m_token, R)
    p_raw = p_head + (HEADS + KV_HEADS) * 2 * R
    s_0 = tl.load(p_s)
    for h in range(0, KV_HEADS):
        b_1, b_2 = _load_head(p_raw + h * 2 * R, m_token, R)
        b_r = (_inverse_rms(b_1, b_2, R) * s_0)[:, None]
        b_1, b_2 = b_1 * b_r, b_2 * b_r
        o_v = o_wide * (KV_HEADS * 2 * R) + h * 2 * R
        if HAS_VE:
            s_1 = tl.load(p_s + 1)
            b_e1, b_e2 = _load_head(p_ve + o_v, m_token, R)
            b_1, b_2 = b_1 + s_1 * b_e1, b_2 + s_1 * b_e2
        _store_head(p_v + o_v, b_1, b_2, m_token, R)


# ---- launchers --------------------------------------------------------------------------------------------


def launch_prepare(qkv_BTEDh, ve, s, cos_TR, sin_TR, heads: int, rotate: bool):
    """The mixed v (B, T, K, Dh) of qkv (B, T, H + 2 K, Dh), dense; with `rotate` q and k change in place.

    Returns: (v, 1 / rms of q's heads (B, H, T) float32, of k's (B, K, T)); the last two are None without `rotate`."""
    B, T, all_heads, width = qkv_BTEDh.shape
    kv_heads = (all_heads - heads) // 2
    if not qkv_BTEDh.is_contiguous():
        raise ValueError(f"qkv of strides {qkv_BTEDh.stride()} must be dense: q and k change in place")
    for name, x, shape in (("s", s, (2,)), ("cos", cos_TR, (T, width // 2)), ("sin", sin_TR, (T, width // 2))):
        expect(name, x, shape, qkv_BTEDh)
    s, cos_TR, sin_TR = (dense(x.float()) for x in (s, cos_TR, sin_TR))
    if ve is not None:
        expect("ve", ve, (B, T, kv_heads, width), qkv_BTEDh)
        ve = dense(ve)
    v = qkv_BTEDh.new_empty(B, T, kv_heads, width)
    rms = [s.new_empty(B, h, T) if rotate else None for h in (heads, kv_heads)]
    launch(
        _prepare,
        (triton.cdiv(B * T, _ROWS),),
        qkv_BTEDh,
        ve,
        s,
        cos_TR,
        sin_TR,
        v,
        *rms,
        B * T,
        T,
        HEADS=heads,
        KV_HEADS=kv_heads,
        R=width // 2,
        ROWS=_ROWS,
        HAS_VE=ve is not None,
        ROTATE=rotate,
        num_warps=_WARPS,
    )
    return v, *rms


def _slices(qkv_BTEDh, heads: int):
    """q, k and v of a merged tensor."""
    kv_heads = (qkv_BTEDh.shape[2] - heads) // 2
    return qkv_BTEDh.split((heads, kv_heads, kv_heads), dim=2)


def launch_attended(
    qkv_BTEDh, ve, s, cos_TR, sin_TR, plan: AttentionPlan, heads: int, scale: float, forward: str = "triton"
):
    """(o (B, T, H, Dh), its rows' base-2 log-sum-exp, qkv with q and k normed and rotated, both factors of norms, the
    mixed v or nothing) from the projection qkv, which changes in place.

    With a value embedding v takes three passes to make again, without one two: the first is worth its memory."""
    v, rms_q, rms_k = launch_prepare(qkv_BTEDh, ve, s, cos_TR, sin_TR, heads, True)
    q, k, _ = _slices(qkv_BTEDh, heads)
    o, lse = launch_forward(q, k, v, plan, scale, forward=forward)
    return o, lse, qkv_BTEDh, rms_q, rms_k, v.new_empty(0) if ve is None else v


def launch_attended_backward(
    do, ve, s, cos_TR, sin_TR, saved, plan: AttentionPlan, scale: float, backward: str = "triton"
):
    """(dqkv (B, T, H + 2 K, Dh), dve or None, ds) from the gradient at o and `saved`, what
    `launch_attended` returned; backward: as in `launch_backward`."""
    o, lse, qkv, rms_q, rms_k, v = saved
    heads = do.shape[2]
    if ve is None:
        v, _, _ = launch_prepare(qkv, ve, s, cos_TR, sin_TR, heads, False)
    q, k, raw = _slices(qkv, heads)
    dqkv = torch.empty_like(qkv)
    tables = (dense(x.float()) for x in (s, cos_TR, sin_TR))
    inputs = LayerInputs(dense(rms_q), dense(rms_k), raw, None if ve is None else dense(ve), *tables)
    how = dict(inputs=inputs, out=_slices(dqkv, heads), backward=backward)
    *_, dve, ds = launch_backward(do, q, k, v, o, lse, plan, scale, **how)
    return dqkv, dve, ds


def launch_layer(
    x_BTD,
    w_ED,
    ve,
    s,
    cos_TR,
    sin_TR,
    plan: AttentionPlan,
    heads: int,
    width: int,
    scale: float,
    forward: str = "triton",
):
    """`launch_attended` of the projection x w^T."""
    B, T, D = x_BTD.shape
    qkv = (dense(x_BTD).view(B * T, D) @ dense(w_ED).t()).view(B, T, -1, width)
    return launch_attended(qkv, ve, s, cos_TR, sin_TR, plan, heads, scale, forward)


def launch_layer_backward(
    do,
    x_BTD,
    w_ED,
    ve,
    s,
    cos_TR,
    sin_TR,
    saved,
    plan: AttentionPlan,
    scale: float,
    dx_BTD=None,
    backward: str = "triton",
):
    """(dx, dw, dve or None, ds) from the gradient at o and `saved`, what `launch_layer` returned; dx plus `dx_BTD`."""
    dqkv, dve, ds = launch_attended_backward(do, ve, s, cos_TR, sin_TR, saved, plan, scale, backward)
    x_ND, dqkv_NE = dense(x_BTD).flatten(0, 1), dqkv.view(-1, w_ED.shape[0])
    if dx_BTD is None:
        dx_ND = dqkv_NE @ dense(w_ED)
    else:
        expect("the gradient at x", dx_BTD, x_BTD.shape, x_BTD)
        dx_ND = torch.addmm(dense(dx_BTD).flatten(0, 1), dqkv_NE, dense(w_ED))
    return dx_ND.view(x_BTD.shape), dqkv_NE.t() @ x_ND, dve, ds


# ---- torch operators --------------------------------------------------------------------------------------


@torch.library.custom_op("speedrun::attention_layer", mutates_args=())
def _layer(
    x_BTD: torch.Tensor,
    w_ED: torch.Tensor,
    ve: torch.Tensor | None,
    s: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    first_key_BT: torch.Tensor,
    end_query_BT: torch.Tensor,
    query_order_N: torch.Tensor,
    key_order_N: torch.Tensor,
    heads: int,
    width: int,
    scale: float,
    forward: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    plan = AttentionPlan(first_key_BT, end_query_BT, query_order_N, key_order_N)
    return launch_layer(x_BTD, w_ED, ve, s, cos_TR, sin_TR, plan, heads, width, scale, forward)


@torch.library.custom_op("speedrun::attention_layer_backward", mutates_args=())
def _layer_backward(
    do: torch.Tensor,
    x_BTD: torch.Tensor,
    w_ED: torch.Tensor,
    ve: torch.Tensor | None,
    s: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    saved: list[torch.Tensor],
    plan: list[torch.Tensor],
    scale: float,
    dx_BTD: torch.Tensor | None,
    backward: str,
) -> list[torch.Tensor]:
    given = do, x_BTD, w_ED, ve, s, cos_TR, sin_TR, saved, AttentionPlan(*plan), scale, dx_BTD, backward
    return [g for g in launch_layer_backward(*given) if g is not None]


@_layer.register_fake
def _fake_layer(x_BTD, w_ED, ve, s, cos_TR, sin_TR, first, end, query_order, key_order, heads, width, scale, forward):
    B, T, _ = x_BTD.shape
    all_heads = w_ED.shape[0] // width
    kv_heads = (all_heads - heads) // 2
    rows = [s.new_empty(B, h, T) for h in (heads, heads, kv_heads)]
    v = x_BTD.new_empty(0 if ve is None else ve.shape)
    return x_BTD.new_empty(B, T, heads, width), rows[0], x_BTD.new_empty(B, T, all_heads, width), *rows[1:], v


@_layer_backward.register_fake
def _(do, x_BTD, w_ED, ve, s, cos_TR, sin_TR, saved, plan, scale, dx_BTD, backward):
    return [x.new_empty(x.shape) for x in (x_BTD, w_ED, ve, s) if x is not None]


@torch.library.custom_op("speedrun::attention_layer_8", mutates_args=())
def _layer_8(
    factors: list[torch.Tensor],
    like_BTD: torch.Tensor,
    ve: torch.Tensor | None,
    s: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    plan: list[torch.Tensor],
    features: int,
    heads: int,
    width: int,
    scale: float,
    forward: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `_layer`, from the projection's factors in 8 bits: x (N, D), its scale, w (features, D), its scale."""
    (B, T, _), (x, w) = like_BTD.shape, (products8.Eight(*factors[i : i + 2]) for i in (0, 2))
    qkv = products8.product(x, w, like_BTD.dtype, fast=True)[: B * T, :features].contiguous().view(B, T, -1, width)
    return launch_attended(qkv, ve, s, cos_TR, sin_TR, AttentionPlan(*plan), heads, scale, forward)


@torch.library.custom_op("speedrun::attended_backward", mutates_args=())
def _attended_backward(
    do: torch.Tensor,
    ve: torch.Tensor | None,
    s: torch.Tensor,
    cos_TR: torch.Tensor,
    sin_TR: torch.Tensor,
    saved: list[torch.Tensor],
    plan: list[torch.Tensor],
    scale: float,
    backward: str,
) -> list[torch.Tensor]:
    grads = launch_attended_backward(do, ve, s, cos_TR, sin_TR, saved, AttentionPlan(*plan), scale, backward)
    return [g for g in grads if g is not None]


@_layer_8.register_fake
def _(factors, like_BTD, ve, s, cos_TR, sin_TR, plan, features, heads, width, scale, forward):
    w_ED = like_BTD.new_empty(features, 0)
    return _fake_layer(like_BTD, w_ED, ve, s, cos_TR, sin_TR, *plan, heads, width, scale, forward)


@_attended_backward.register_fake
def _(do, ve, s, cos_TR, sin_TR, saved, plan, scale, backward):
    return [x.new_empty(x.shape) for x in (saved[2], ve, s) if x is not None]


class _Layer(torch.autograd.Function):
    """The operator, and x as it is: what x gets from elsewhere comes to the backward pass, too."""

    @staticmethod
    def forward(ctx, x_BTD, w_ED, ve, *rest):
        *tensors, _heads, _width, ctx.scale, ctx.chosen = rest
        o, *kept = _layer(x_BTD, w_ED, ve, *rest)
        ctx.has_ve = ve is not None
        ctx.save_for_backward(x_BTD, w_ED, *([ve] if ctx.has_ve else []), *tensors, o, *kept)
        ctx.set_materialize_grads(False)
        return o, x_BTD.view_as(x_BTD)

    @staticmethod
    @differentiable_once("attention_layer")
    def backward(ctx, do, dx_BTD):
        x_BTD, w_ED, *rest = ctx.saved_tensors
        ve = rest.pop(0) if ctx.has_ve else None
        tables, plan, saved = rest[:3], rest[3:7], rest[7:]
        do = torch.zeros_like(saved[0]) if do is None else do
        given = do, x_BTD, w_ED, ve, *tables, saved, plan, ctx.scale, dx_BTD, ctx.chosen
        dx, dw, *dve, ds = _layer_backward(*given)
        return dx, dw, (dve[0] if dve else None), ds, *[None] * 10


class _Layer8(torch.autograd.Function):
    """`_Layer` with its three products in 8 bits (kernels/products8.py); w in 8 bits both ways comes last."""

    @staticmethod
    def forward(ctx, x_BTD, w_ED, ve, s, cos_TR, sin_TR, *rest):
        *plan, heads, width, ctx.scale, ctx.chosen = rest[:8]
        w, w_turned, *_ = products8.Weight8.of(*rest[8:])
        x, x_turned = products8.both_ways(x_BTD.flatten(0, 1))
        how = w_ED.shape[0], heads, width, ctx.scale, ctx.chosen
        kept = _layer_8([*x, *w], x_BTD, ve, s, cos_TR, sin_TR, plan, *how)
        ctx.save_for_backward(*([] if ve is None else [ve]), s, cos_TR, sin_TR, *plan, *kept, *x_turned, *w_turned)
        ctx.shapes, ctx.dtypes, ctx.has_ve = (x_BTD.shape, w_ED.shape), (x_BTD.dtype, w_ED.dtype), ve is not None
        ctx.set_materialize_grads(False)
        return kept[0], x_BTD.view_as(x_BTD)

    @staticmethod
    @differentiable_once("attention_layer")
    def backward(ctx, do, dx_BTD):
        *rest, x_values, x_scale, w_values, w_scale = ctx.saved_tensors
        ve = rest.pop(0) if ctx.has_ve else None
        tables, plan, saved = rest[:3], rest[3:7], rest[7:]
        do = torch.zeros_like(saved[0]) if do is None else do
        dqkv, *dve, ds = _attended_backward(do, ve, *tables, saved, plan, ctx.scale, ctx.chosen)
        (of_x, (E, D)), (x_dtype, w_dtype) = ctx.shapes, ctx.dtypes
        dqkv_NE = dqkv.view(-1, E)
        dy, dy_turned = products8.both_ways(dqkv_NE, products8.E5M2, scale=products8.sampled_scale(dqkv_NE))
        w_turned, N = products8.Eight(w_values, w_scale), dqkv.numel() // E
        if dx_BTD is None:
            dx_ND = products8.product(dy, w_turned, x_dtype)[:N, :D].contiguous()
        else:
            dx_ND = added_product(dy, w_turned, dx_BTD.reshape(N, D))
        dw = products8.product(dy_turned, products8.Eight(x_values, x_scale), w_dtype)[:E, :D].contiguous()
        return dx_ND.view(of_x), dw, (dve[0] if dve else None), ds, *[None] * 15


# ---- public functions -------------------------------------------------------------------------------------


def projected(x_BTD, w_ED, ve_BTKDh, s, rotary, *, heads: int, width: int, impl: str = "auto", eight=None):
    """(q, k, v) of the formula above, before attention; arguments as in `attention_layer`."""
    y_BTE = products8.linear(x_BTD, w_ED, weight=eight) if eight else F.linear(x_BTD, w_ED)
    q, k, v = _slices(y_BTE.unflatten(2, (-1, width)), heads)
    return attention_inputs(q, k, v, ve_BTKDh, s, *rotary, impl=impl)


@without_autocast
def attention_layer(
    x_BTD: torch.Tensor,
    w_ED: torch.Tensor,
    ve_BTKDh: torch.Tensor | None,
    s: torch.Tensor,
    rotary: tuple[torch.Tensor, torch.Tensor],
    plan: AttentionPlan,
    *,
    heads: int,
    width: int,
    scale: float,
    impl: str = "auto",
    inputs_impl: str = "auto",
    eight: products8.Weight8 | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o (B, T, H, Dh) of the formula above, x), differentiable once in x, w, ve and s. Whoever goes on with the x that
    comes back has its gradient added on the way rather than in a pass of its own.

    Args:
        x_BTD: (B, T, D). w_ED: ((H + 2 K) Dh, D), the projections to queries, keys and values, in x's dtype.
        ve_BTKDh: embeddings to mix into the values, or None. s: float32 (2,), the factors of that mix.
        rotary: cos and sin, float32 (T, Dh / 2). plan: of `attention_plan`, for the same B and T.
        heads, width: H and Dh; scale: factor on the logits.
        impl, inputs_impl: as in `attention` and `attention_inputs`. Both "triton", as "auto" is on a GPU, or
            "specialised" or "gluon" and "triton": one operator.
        eight: w in 8 bits (`products8.weights_in_8_bits`), if the projection's products, forward and backward, are.

    Raises: ValueError or TypeError naming the argument.
    """
    if x_BTD.dim() != 3:
        raise ValueError(f"x must be (B, T, D), got {tuple(x_BTD.shape)}")
    expect_floats("x", x_BTD)
    expect("w", w_ED, w_ED.shape, x_BTD)
    expect_floats("w", w_ED, (x_BTD.dtype,))
    D = x_BTD.shape[2]
    if w_ED.dim() != 2 or w_ED.shape[1] != D or w_ED.shape[0] % width or (w_ED.shape[0] // width - heads) % 2:
        raise ValueError(f"w {tuple(w_ED.shape)} must be ((heads + 2 K) * width, {D}) for {heads} heads of {width}")
    chosen, of_inputs = (attention_implementation(name, x_BTD) for name in (impl, inputs_impl))
    if chosen not in FORWARDS or of_inputs != "triton":
        how = dict(heads=heads, width=width, impl=inputs_impl, eight=eight)
        inputs = projected(x_BTD, w_ED, ve_BTKDh, s, rotary, **how)
        return attention(*inputs, plan, scale=scale, impl=impl), x_BTD
    _check(x_BTD, w_ED, ve_BTKDh, s, rotary, plan, heads, width, scale)
    refuse_tangents("attention_layer", x_BTD, w_ED, ve_BTKDh, s)
    ve = None if ve_BTKDh is None else dense(ve_BTKDh)
    small = [dense(t) for t in (s, *rotary, *plan[:4])]
    run, weight = (_Layer8.apply, eight.tensors()) if eight else (_Layer.apply, [])
    return run(dense(x_BTD), dense(w_ED), ve, *small, heads, width, float(scale), chosen, *weight)


def _check(x_BTD, w_ED, ve, s, rotary, plan, heads: int, width: int, scale: float) -> None:
    """Raise an error that names the first argument that does not fit."""
    (B, T, _), kv_heads = x_BTD.shape, (w_ED.shape[0] // width - heads) // 2
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"w has {kv_heads} key heads, which do not divide the {heads} heads of queries")
    check_scale(scale)
    if x_BTD.numel() == 0:
        raise ValueError(f"x is empty: {tuple(x_BTD.shape)}")
    check_width(x_BTD.new_empty(0, width))
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"plan must come from attention_plan, got {type(plan).__name__}")
    wanted = {
        "w": (w_ED, x_BTD.dtype, w_ED.shape),
        "ve": (ve, x_BTD.dtype, (B, T, kv_heads, width)),
        "s": (s, torch.float32, (2,)),
        "cos": (rotary[0], torch.float32, (T, width // 2)),
        "sin": (rotary[1], torch.float32, (T, width // 2)),
    }
    check_plan(plan, x_BTD)
    for name, (tensor, dtype, shape) in wanted.items():
        if tensor is not None and (tensor.dtype, tensor.device, tuple(tensor.shape)) != (dtype, x_BTD.device, shape):
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}; with x {tuple(x_BTD.shape)} it "
                f"must be {dtype} {tuple(shape)} on {x_BTD.device}"
            )
