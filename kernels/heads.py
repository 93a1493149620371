"""What techniques put between an attention layer's products and its attention, one pass over memory on either side.

Inputs, from the merged projection to what attention reads:

    q, k <- rotary(norm(q)), rotary(norm(k));   q <- f q;   v <- s[0] v + more + g ve

norm as in kernels/norm.py over a head, f the factor that YaRN gives queries, g a factor by the token and head, or s[1].
Options: v is normed first; `offset`: the still dimensions of every key come from the row before; `paired`: heads 2j and
2j + 1 are one head over 2 T rows, 2t and 2t + 1, each with its own angles. Outputs, from what attention found to what
the product back reads, with the token's own value v:

    o <- gate (o - tanh(alpha) (o . v / |v|^2) v)

Which technique is whose idea stands at its field's lines in trainer/techniques.py and at the references here.

Shapes: B sequences, T tokens, H heads of width Dv = 2 R for values and Dq = 2 Rq for queries and keys; qkv (B, T, E)
with E = H (2 Dq + Dv); cos, sin (T, Rq), or (2 T, Rq) of paired heads; ve, more (B, T, H Dv); g, gate (B, T, H); alpha
(H,) or (B, T, H); s float32 (2,). Bytes: each tensor once. For N = B T H Dv elements, Dq = Dv: inputs 6 N forward (7
with ve), 9 N backward (3 gradients, qkv, one gradient of qkv), and ve and its gradient; outputs 3 N forward, 5 N
backward. What the backward passes need of the forward ones they make again from qkv, o and v, which products and
attention keep anyway. FLOPs are negligible.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention_inputs import _norm_gradient
from kernels.attention_layer import _inverse_rms, _load_head, _store_head
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
from kernels.norm import rms_norm
from kernels.runtime import implementation_of, tl, triton

#: The names of `attention`; all of the plain-torch ones mean the reference here.
IMPLEMENTATIONS = ("triton", "banded", "flex", "reference")


class HeadInputs(NamedTuple):
    """Of `head_inputs`. q, k, v: what attention reads, (B, T, H, width), of paired heads (B, 2 T, H / 2, width). own:
    v once more, where it was asked for, to be given to `head_outputs`."""

    q: Tensor
    k: Tensor
    v: Tensor
    own: Tensor | None


class HeadOutputs(NamedTuple):
    """Of `head_outputs`. y: (B, T, H Dv). largest: float32 (), the largest finite number of y if it was asked for, else
    0: what `of_x` of the 8-bit products means by both."""

    y: Tensor
    largest: Tensor | float


# ---- in plain torch ----------------------------------------------------------------------------------------


def rotated(x_BTHDh: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary, half split, with its tables rounded to x's dtype."""
    cos, sin = (table.to(x_BTHDh.dtype)[:, None] for table in rotary)
    x1, x2 = x_BTHDh.chunk(2, dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin], -1)


def offset_keys(k_BTHDh: Tensor, before_B1HDh: Tensor | None = None) -> Tensor:
    """`key_offset` (#169): the dimensions of every key that rotary leaves alone (the second and the last quarter) come
    from the position before, so that a query finds what followed its like. Not cut at documents.

    before: the keys before the first ones, or None: the first one keeps its own."""
    first = k_BTHDh[:, :1] if before_B1HDh is None else before_B1HDh
    moved = torch.cat([first, k_BTHDh[:, :-1]], 1)
    own, theirs = (x.unflatten(-1, (2, 2, -1)) for x in (k_BTHDh, moved))  # halves, then turning and still ones
    return torch.stack([own[..., 0, :], theirs[..., 1, :]], -2).flatten(-3)


def interleaved(x_BTHDh: Tensor) -> Tensor:
    """`paired_heads` (#191): heads 2j and 2j + 1 as one head over 2 T positions, 2t and 2t + 1: (B, 2 T, H / 2, Dh).

    So each sees the keys of both, in half the window; rotary counts the new positions."""
    return x_BTHDh.unflatten(2, (-1, 2)).transpose(2, 3).flatten(1, 2)


def separated(x_BSHDh: Tensor) -> Tensor:
    """The way back from `interleaved`: (B, S / 2, 2 H, Dh)."""
    return x_BSHDh.unflatten(1, (-1, 2)).transpose(2, 3).flatten(2, 3)


def exclusive(o_BTHDh: Tensor, v_BTHDh: Tensor, alpha_H: Tensor) -> Tensor:
    """`xsa` (#264): o - tanh(alpha) (o . v / |v|^2) v with the token's own value v: what attention found in others.

    alpha: (H,), or by the token (B, T, H)."""
    wide = torch.promote_types(o_BTHDh.dtype, torch.float32)
    o, v = o_BTHDh.to(wide), v_BTHDh.to(wide)
    along = (o * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp(min=1e-12)
    return (o - torch.tanh(alpha_H)[..., None] * along * v).to(o_BTHDh.dtype)


def valued(v: Tensor, s: Tensor | None, more: Tensor | None, ve: Tensor | None, factor: Tensor | None) -> Tensor:
    """A layer's values (B, T, H, Dv): s[0] v, and what is added to them; factor as g of the docstring above."""
    v = v if s is None else s[0].to(v.dtype) * v
    if more is not None:
        v = v + more.view_as(v)
    if ve is None:
        return v
    ve = ve.view_as(v)
    if factor is not None:
        return v + factor.to(v.dtype)[..., None] * ve
    return v + (ve if s is None else s[1].to(v.dtype) * ve)


def head_inputs_reference(
    qkv_BTE, rotary, ve, factor, more, s, query_factor, heads, width, value_norm, offset, paired, keys_before=None
) -> HeadInputs:
    """`head_inputs` in plain torch. keys_before: of the keys, those before the first ones (`offset_keys`)."""
    B, T, E = qkv_BTE.shape
    qk, v = qkv_BTE.split([E - heads * width, heads * width], -1)
    qk, v = rms_norm(qk.view(B, T, 2 * heads, -1)), v.view(B, T, heads, width)  # the queries' heads, then the keys'
    v = valued(rms_norm(v) if value_norm else v, s, more, ve, factor)
    if paired:
        qk, v = interleaved(qk), interleaved(v)
    q, k = rotated(qk, rotary).chunk(2, dim=2)
    if query_factor is not None:
        q = q * query_factor
    if offset:
        k = offset_keys(k, None if keys_before is None else keys_before(k))
    return HeadInputs(q, k, v, v)


def head_outputs_reference(o, own, alpha, gate, paired) -> Tensor:
    """`head_outputs` in plain torch."""
    if paired:
        o = separated(o)
    if alpha is not None:
        o = exclusive(o, own, alpha)
    if gate is not None:
        o = o * gate.to(o.dtype)[..., None]
    return o.flatten(2)


# ---- Triton ------------------------------------------------------------------------------------------------
# Prefixes: p_ pointer, o_ offset, b_ block of values, m_ mask. One program takes ROWS tokens through all heads, so that
# a token's angles are read once. A head is handled as its two halves, which is what rotary pairs up; PAIR is 2 for
# paired heads, else 1. Everything is float32 in registers and rounded once, on the way out.

#: Tokens a program and its warps.
_ROWS, _WARPS = 16, 4
_EPS = tl.constexpr(torch.finfo(torch.float32).eps)
#: What |v|^2 is at least taken for.
_LEAST_SQUARE = tl.constexpr(1e-12)


@triton.jit
def _normed_head(p_x, m_token, R: tl.constexpr):
    """`_load_head`, divided by its root mean square."""
    b_1, b_2 = _load_head(p_x, m_token, R)
    b_r = _inverse_rms(b_1, b_2, R)[:, None]
    return b_1 * b_r, b_2 * b_r


@triton.jit
def _angles(p_cos, p_sin, o_row, apart, m_token, R: tl.constexpr):
    """cos and sin (ROWS, R) of rows of the tables."""
    o = o_row.to(tl.int64)[:, None] * apart + tl.arange(0, R)[None, :]
    b_cos = tl.load(p_cos + o, mask=m_token[:, None], other=0.0)
    b_sin = tl.load(p_sin + o, mask=m_token[:, None], other=0.0)
    return b_cos, b_sin


@triton.jit
def _head_inputs(
    p_qkv,
    p_ve,
    p_factor,
    p_more,
    p_s,
    p_cos,
    p_sin,
    p_query_factor,
    p_q,
    p_k,
    p_v,
    tokens,
    T,
    factor_apart,
    angles_apart,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    RQ: tl.constexpr,
    ROWS: tl.constexpr,
    PAIR: tl.constexpr,
    OFFSET: tl.constexpr,
    VALUE_NORM: tl.constexpr,
    HAS_VE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_MORE: tl.constexpr,
    HAS_S: tl.constexpr,
    HAS_QUERY_FACTOR: tl.constexpr,
):
    """q, k and v as attention reads them, of ROWS of the B * T tokens. Those apart: rows of factors, of angles."""
    o_token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_token = o_token < tokens
    o_wide = o_token.to(tl.int64)
    o_place = o_token % T
    p_raw = p_qkv + o_wide * (HEADS * (4 * RQ + 2 * R))
    if OFFSET:
        o_before = tl.where(o_place > 0, o_wide - 1, o_wide)
        p_before = p_qkv + o_before * (HEADS * (4 * RQ + 2 * R))
        m_turns = (tl.arange(0, RQ) < RQ // 2)[None, :]
    for half in tl.static_range(PAIR):
        b_cos, b_sin = _angles(p_cos, p_sin, PAIR * o_place + half, angles_apart, m_token, RQ)
        for pair in range(0, HEADS // PAIR):
            o_raw = (PAIR * pair + half) * 2 * RQ
            o_out = o_wide * (HEADS * 2 * RQ) + (half * (HEADS // PAIR) + pair) * 2 * RQ
            b_1, b_2 = _normed_head(p_raw + o_raw, m_token, RQ)
            if HAS_QUERY_FACTOR:
                b_factor = tl.load(p_query_factor)
                b_1, b_2 = b_1 * b_factor, b_2 * b_factor
            _store_head(p_q + o_out, b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin, m_token, RQ)
        if OFFSET:
            b_cos_before, b_sin_before = _angles(
                p_cos, p_sin, tl.where(o_place > 0, o_place - 1, 0), angles_apart, m_token, RQ
            )
            b_cos = tl.where(m_turns, b_cos, b_cos_before)
            b_sin = tl.where(m_turns, b_sin, b_sin_before)
        for pair in range(0, HEADS // PAIR):
            o_raw = (HEADS + PAIR * pair + half) * 2 * RQ
            o_out = o_wide * (HEADS * 2 * RQ) + (half * (HEADS // PAIR) + pair) * 2 * RQ
            b_1, b_2 = _normed_head(p_raw + o_raw, m_token, RQ)
            if OFFSET:
                b_before_1, b_before_2 = _normed_head(p_before + o_raw, m_token, RQ)
                b_1 = tl.where(m_turns, b_1, b_before_1)
                b_2 = tl.where(m_turns, b_2, b_before_2)
            _store_head(p_k + o_out, b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin, m_token, RQ)
    for head in range(0, HEADS):
        o_v = o_wide * (HEADS * 2 * R) + head * 2 * R
        p_head = p_raw + HEADS * 4 * RQ + head * 2 * R
        if VALUE_NORM:
            b_1, b_2 = _normed_head(p_head, m_token, R)
        else:
            b_1, b_2 = _load_head(p_head, m_token, R)
        if HAS_S:
            s_0 = tl.load(p_s)
            b_1, b_2 = b_1 * s_0, b_2 * s_0
        if HAS_MORE:
            b_more_1, b_more_2 = _load_head(p_more + o_v, m_token, R)
            b_1, b_2 = b_1 + b_more_1, b_2 + b_more_2
        if HAS_VE:
            b_e1, b_e2 = _load_head(p_ve + o_v, m_token, R)
            if HAS_FACTOR:
                b_g = tl.load(p_factor + o_wide * factor_apart + head, mask=m_token, other=0.0).to(tl.float32)[:, None]
                b_e1, b_e2 = b_e1 * b_g, b_e2 * b_g
            elif HAS_S:
                s_1 = tl.load(p_s + 1)
                b_e1, b_e2 = b_e1 * s_1, b_e2 * s_1
            b_1, b_2 = b_1 + b_e1, b_2 + b_e2
        o_out = o_wide * (HEADS * 2 * R) + (head % PAIR * (HEADS // PAIR) + head // PAIR) * 2 * R
        _store_head(p_v + o_out, b_1, b_2, m_token, R)


@triton.jit
def _head_inputs_backward(
    p_gq,
    p_gk,
    p_gv,
    p_gown,
    p_qkv,
    p_ve,
    p_factor,
    p_s,
    p_cos,
    p_sin,
    p_query_factor,
    p_dqkv,
    p_dve,
    p_dfactor,
    p_dmore,
    p_ds,
    tokens,
    T,
    factor_apart,
    angles_apart,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    RQ: tl.constexpr,
    ROWS: tl.constexpr,
    PAIR: tl.constexpr,
    OFFSET: tl.constexpr,
    VALUE_NORM: tl.constexpr,
    HAS_VE: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    HAS_MORE: tl.constexpr,
    HAS_S: tl.constexpr,
    HAS_QUERY_FACTOR: tl.constexpr,
    HAS_OWN: tl.constexpr,
):
    """Gradients at qkv, ve, its factors and `more`, and this program's share of that of s, (programs, 2).

    gown: the gradient at v from elsewhere, by the token. HAS_MORE: dmore is written; without gown it is gv."""
    o_token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_token = o_token < tokens
    o_wide = o_token.to(tl.int64)
    o_place = o_token % T
    o_row = o_wide * (HEADS * (4 * RQ + 2 * R))
    for half in tl.static_range(PAIR):
        b_cos, b_sin = _angles(p_cos, p_sin, PAIR * o_place + half, angles_apart, m_token, RQ)
        for pair in range(0, HEADS // PAIR):
            o_raw = o_row + (PAIR * pair + half) * 2 * RQ
            o_out = o_wide * (HEADS * 2 * RQ) + (half * (HEADS // PAIR) + pair) * 2 * RQ
            b_g1, b_g2 = _load_head(p_gq + o_out, m_token, RQ)
            if HAS_QUERY_FACTOR:
                b_factor = tl.load(p_query_factor)
                b_g1, b_g2 = b_g1 * b_factor, b_g2 * b_factor
            b_1, b_2 = _load_head(p_qkv + o_raw, m_token, RQ)
            b_1, b_2 = _norm_gradient(b_g1 * b_cos - b_g2 * b_sin, b_g1 * b_sin + b_g2 * b_cos, b_1, b_2, _EPS, RQ)
            _store_head(p_dqkv + o_raw, b_1, b_2, m_token, RQ)
        for pair in range(0, HEADS // PAIR):
            o_raw = o_row + (HEADS + PAIR * pair + half) * 2 * RQ
            o_out = o_wide * (HEADS * 2 * RQ) + (half * (HEADS // PAIR) + pair) * 2 * RQ
            b_g1, b_g2 = _load_head(p_gk + o_out, m_token, RQ)
            if OFFSET:  # what is still went to the row after, and the first row's to itself as well
                m_after = m_token & (o_place + 1 < T)
                b_after_1, b_after_2 = _load_head(p_gk + o_out + HEADS * 2 * RQ, m_after, RQ)
                m_turns = (tl.arange(0, RQ) < RQ // 2)[None, :]
                m_first = (o_place == 0)[:, None]
                b_g1 = tl.where(m_turns, b_g1, tl.where(m_first, b_after_1 + b_g1, b_after_1))
                b_g2 = tl.where(m_turns, b_g2, tl.where(m_first, b_after_2 + b_g2, b_after_2))
            b_1, b_2 = _load_head(p_qkv + o_raw, m_token, RQ)
            b_1, b_2 = _norm_gradient(b_g1 * b_cos - b_g2 * b_sin, b_g1 * b_sin + b_g2 * b_cos, b_1, b_2, _EPS, RQ)
            _store_head(p_dqkv + o_raw, b_1, b_2, m_token, RQ)
    b_ds0 = tl.zeros([ROWS], tl.float32)
    b_ds1 = tl.zeros([ROWS], tl.float32)
    for head in range(0, HEADS):
        o_v = o_wide * (HEADS * 2 * R) + head * 2 * R
        o_raw = o_row + HEADS * 4 * RQ + head * 2 * R
        o_out = o_wide * (HEADS * 2 * R) + (head % PAIR * (HEADS // PAIR) + head // PAIR) * 2 * R
        b_g1, b_g2 = _load_head(p_gv + o_out, m_token, R)
        if HAS_OWN:
            b_1, b_2 = _load_head(p_gown + o_v, m_token, R)
            b_g1, b_g2 = b_g1 + b_1, b_g2 + b_2
        if HAS_MORE:
            _store_head(p_dmore + o_v, b_g1, b_g2, m_token, R)
        if HAS_VE:
            b_e1, b_e2 = _load_head(p_ve + o_v, m_token, R)
            b_dot = tl.sum(b_g1 * b_e1, 1) + tl.sum(b_g2 * b_e2, 1)
            if HAS_FACTOR:
                b_g = tl.load(p_factor + o_wide * factor_apart + head, mask=m_token, other=0.0).to(tl.float32)[:, None]
                _store_head(p_dve + o_v, b_g1 * b_g, b_g2 * b_g, m_token, R)
                tl.store(p_dfactor + o_wide * HEADS + head, b_dot.to(p_dfactor.dtype.element_ty), mask=m_token)
            elif HAS_S:
                s_1 = tl.load(p_s + 1)
                _store_head(p_dve + o_v, b_g1 * s_1, b_g2 * s_1, m_token, R)
                b_ds1 += b_dot
            else:
                _store_head(p_dve + o_v, b_g1, b_g2, m_token, R)
        if VALUE_NORM or HAS_S:
            b_1, b_2 = _load_head(p_qkv + o_raw, m_token, R)
            if HAS_S:
                b_dot = tl.sum(b_g1 * b_1, 1) + tl.sum(b_g2 * b_2, 1)
                if VALUE_NORM:
                    b_dot *= _inverse_rms(b_1, b_2, R)
                b_ds0 += b_dot
                s_0 = tl.load(p_s)
                b_g1, b_g2 = b_g1 * s_0, b_g2 * s_0
            if VALUE_NORM:
                b_g1, b_g2 = _norm_gradient(b_g1, b_g2, b_1, b_2, _EPS, R)
        _store_head(p_dqkv + o_raw, b_g1, b_g2, m_token, R)
    if HAS_S:
        o_part = tl.program_id(0) * 2
        tl.store(p_ds + o_part, tl.sum(b_ds0, 0))
        tl.store(p_ds + o_part + 1, tl.sum(b_ds1, 0))


@triton.jit
def _tanh(b_x):
    """tanh, by a sigmoid."""
    return 2 * tl.sigmoid(2 * b_x) - 1


@triton.jit
def _most(p_out, b_x):
    """The largest finite number of each row as p_out will have it."""
    b_x = tl.abs(b_x.to(p_out.dtype.element_ty).to(tl.float32))
    return tl.max(tl.where(b_x < float("inf"), b_x, 0.0), 1)


@triton.jit
def _head_outputs(
    p_o,
    p_own,
    p_alpha,
    p_gate,
    p_out,
    p_most,
    tokens,
    alpha_apart,
    gate_apart,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    PAIR: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    MEASURED: tl.constexpr,
):
    """What the product back reads, of ROWS of the B * T tokens; alpha_apart, gate_apart: from one token to the next, 0
    for an alpha that all have. MEASURED: and the largest finite number of it, (programs,)."""
    o_token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_token = o_token < tokens
    o_wide = o_token.to(tl.int64)
    b_most = tl.zeros([ROWS], tl.float32)
    for head in range(0, HEADS):
        o_out = o_wide * (HEADS * 2 * R) + head * 2 * R
        o_in = o_wide * (HEADS * 2 * R) + (head % PAIR * (HEADS // PAIR) + head // PAIR) * 2 * R
        b_1, b_2 = _load_head(p_o + o_in, m_token, R)
        if EXCLUSIVE:
            b_v1, b_v2 = _load_head(p_own + o_out, m_token, R)
            b_square = tl.maximum(tl.sum(b_v1 * b_v1, 1) + tl.sum(b_v2 * b_v2, 1), _LEAST_SQUARE)
            b_along = (tl.sum(b_1 * b_v1, 1) + tl.sum(b_2 * b_v2, 1)) / b_square
            b_alpha = tl.load(p_alpha + o_wide * alpha_apart + head, mask=m_token, other=0.0).to(tl.float32)
            b_less = (_tanh(b_alpha) * b_along)[:, None]
            b_1, b_2 = b_1 - b_less * b_v1, b_2 - b_less * b_v2
        if HAS_GATE:
            b_gate = tl.load(p_gate + o_wide * gate_apart + head, mask=m_token, other=0.0).to(tl.float32)[:, None]
            b_1, b_2 = b_1 * b_gate, b_2 * b_gate
        _store_head(p_out + o_out, b_1, b_2, m_token, R)
        if MEASURED:
            b_most = tl.maximum(b_most, tl.maximum(_most(p_out, b_1), _most(p_out, b_2)))
    if MEASURED:
        tl.store(p_most + tl.program_id(0), tl.max(b_most, 0))


@triton.jit
def _head_outputs_backward(
    p_g,
    p_o,
    p_own,
    p_alpha,
    p_gate,
    p_do,
    p_down,
    p_dalpha,
    p_dgate,
    tokens,
    alpha_apart,
    gate_apart,
    HEADS: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    PAIR: tl.constexpr,
    EXCLUSIVE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    ALPHA_BY_TOKEN: tl.constexpr,
):
    """Gradients at o, own values, alpha and gate; of an alpha that all tokens have this program's share, (programs,
    HEADS).

    With a = tanh(alpha), n = |v|^2, c = o.v / n, z = o - a c v and y = gate z: do = dz - a (dz.v / n) v,
    dv = -a (c dz + (dz.v / n) (o - 2 c v)), dalpha = -(1 - a^2) c dz.v; what is less than the least n has no 2 c v."""
    o_token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_token = o_token < tokens
    o_wide = o_token.to(tl.int64)
    for head in range(0, HEADS):
        o_out = o_wide * (HEADS * 2 * R) + head * 2 * R
        o_in = o_wide * (HEADS * 2 * R) + (head % PAIR * (HEADS // PAIR) + head // PAIR) * 2 * R
        b_g1, b_g2 = _load_head(p_g + o_out, m_token, R)
        if EXCLUSIVE or HAS_GATE:
            b_1, b_2 = _load_head(p_o + o_in, m_token, R)
            b_dot = tl.sum(b_g1 * b_1, 1) + tl.sum(b_g2 * b_2, 1)
        if EXCLUSIVE:
            b_v1, b_v2 = _load_head(p_own + o_out, m_token, R)
            b_square = tl.sum(b_v1 * b_v1, 1) + tl.sum(b_v2 * b_v2, 1)
            b_n = tl.maximum(b_square, _LEAST_SQUARE)
            b_along = (tl.sum(b_1 * b_v1, 1) + tl.sum(b_2 * b_v2, 1)) / b_n
            b_gv = tl.sum(b_g1 * b_v1, 1) + tl.sum(b_g2 * b_v2, 1)
            b_alpha = tl.load(p_alpha + o_wide * alpha_apart + head, mask=m_token, other=0.0).to(tl.float32)
            b_a = _tanh(b_alpha)
            b_dot -= b_a * b_along * b_gv
        if HAS_GATE:
            b_gate = tl.load(p_gate + o_wide * gate_apart + head, mask=m_token, other=0.0).to(tl.float32)
            tl.store(p_dgate + o_wide * HEADS + head, b_dot.to(p_dgate.dtype.element_ty), mask=m_token)
            b_g1, b_g2 = b_g1 * b_gate[:, None], b_g2 * b_gate[:, None]
        if EXCLUSIVE:
            if HAS_GATE:
                b_gv *= b_gate
            b_dalpha = -(1 - b_a * b_a) * b_along * b_gv
            if ALPHA_BY_TOKEN:
                tl.store(p_dalpha + o_wide * HEADS + head, b_dalpha.to(p_dalpha.dtype.element_ty), mask=m_token)
            else:
                tl.store(p_dalpha + tl.program_id(0) * HEADS + head, tl.sum(b_dalpha, 0))
            b_share = b_gv / b_n
            b_twice = tl.where(b_square > _LEAST_SQUARE, 2 * b_along, 0.0)[:, None]
            b_dv1 = b_along[:, None] * b_g1 + b_share[:, None] * (b_1 - b_twice * b_v1)
            b_dv2 = b_along[:, None] * b_g2 + b_share[:, None] * (b_2 - b_twice * b_v2)
            _store_head(p_down + o_out, -b_a[:, None] * b_dv1, -b_a[:, None] * b_dv2, m_token, R)
            b_less = (b_a * b_share)[:, None]
            b_g1, b_g2 = b_g1 - b_less * b_v1, b_g2 - b_less * b_v2
        _store_head(p_do + o_in, b_g1, b_g2, m_token, R)


# ---- launchers ---------------------------------------------------------------------------------------------


def _by_token(x_BTH: Tensor) -> Tensor:
    """x (B, T, H) itself if a token's numbers are adjacent and tokens evenly apart, as in a slice of what a network
    says of all layers, else a copy."""
    x_BTH = x_BTH.resolve_neg()
    B, T, _ = x_BTH.shape
    even = B == 1 or x_BTH.stride(0) == T * x_BTH.stride(1)
    return x_BTH if x_BTH.stride(2) == 1 and even else x_BTH.contiguous()


class _Inputs(NamedTuple):
    """What the inputs' kernels are given beside qkv and gradients: tensors that they can walk, or None."""

    ve: Tensor | None
    factor: Tensor | None
    more: Tensor | None
    s: Tensor | None
    cos: Tensor
    sin: Tensor
    query_factor: Tensor | None

    def walked(self) -> _Inputs:
        whole = {n: dense(x) for n, x in self._asdict().items() if x is not None and n not in ("factor", "cos", "sin")}
        cos, sin = self.cos.resolve_neg(), self.sin.resolve_neg()
        if cos.stride(1) != 1 or cos.stride() != sin.stride():  # columns of wider tables are walked as they are
            cos, sin = cos.contiguous(), sin.contiguous()
        return self._replace(**whole, cos=cos, sin=sin, factor=None if self.factor is None else _by_token(self.factor))


def _inputs_constants(qkv_BTE, given: _Inputs, heads: int, width: int, value_norm: bool, offset: bool, paired: bool):
    """(tokens, T and strides; the compile-time arguments)."""
    B, T, E = qkv_BTE.shape
    apart = 0 if given.factor is None else given.factor.stride(1)
    constants = dict(
        HEADS=heads,
        R=width // 2,
        RQ=(E // heads - width) // 4,
        ROWS=_ROWS,
        PAIR=1 + paired,
        OFFSET=offset,
        VALUE_NORM=value_norm,
        HAS_VE=given.ve is not None,
        HAS_FACTOR=given.factor is not None,
        HAS_S=given.s is not None,
        HAS_QUERY_FACTOR=given.query_factor is not None,
        num_warps=_WARPS,
    )
    return (B * T, T, apart, given.cos.stride(0)), constants


def launch_head_inputs(
    qkv_BTE, ve, factor, more, s, cos, sin, query_factor, heads: int, width: int, value_norm, offset, paired
):
    """Run the inputs' forward kernel. Returns q, k, v of `HeadInputs`, dense."""
    (B, T, E), pair, given = qkv_BTE.shape, 1 + paired, _Inputs(ve, factor, more, s, cos, sin, query_factor).walked()
    scalars, constants = _inputs_constants(qkv_BTE, given, heads, width, value_norm, offset, paired)
    narrow = (E // heads - width) // 2
    out = [qkv_BTE.new_empty(B, pair * T, heads // pair, w) for w in (narrow, narrow, width)]
    programs = triton.cdiv(B * T, _ROWS)
    launch(_head_inputs, (programs,), dense(qkv_BTE), *given, *out, *scalars, HAS_MORE=more is not None, **constants)
    return out


def launch_head_inputs_backward(
    grads, qkv_BTE, ve, factor, s, cos, sin, query_factor, heads: int, width: int, value_norm, offset, paired, has_more
):
    """Run the inputs' backward kernel on the gradients at q, k, v and own (None: there is none). Returns dqkv, dve,
    dfactor, dmore, ds; None for what is not there, and for dmore where it is the gradient at v.

    The gradient of s is summed from one float32 pair a program, in a fixed order."""
    (B, T, _), given = qkv_BTE.shape, _Inputs(ve, factor, None, s, cos, sin, query_factor).walked()
    scalars, constants = _inputs_constants(qkv_BTE, given, heads, width, value_norm, offset, paired)
    gq, gk, gv, gown = (None if g is None else dense(g) for g in grads)
    has_own = gown is not None
    programs = triton.cdiv(B * T, _ROWS)
    dqkv = torch.empty(qkv_BTE.shape, dtype=qkv_BTE.dtype, device=qkv_BTE.device)
    dve, dfactor = (None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (ve, factor))
    dmore = qkv_BTE.new_empty(B, T, heads * width) if has_more and has_own else None
    ds = None if s is None else torch.empty(programs, 2, dtype=torch.float32, device=s.device)
    ve, factor, _, *rest = given
    launch(
        _head_inputs_backward,
        (programs,),
        *(gq, gk, gv, gown, dense(qkv_BTE), ve, factor, *rest),
        *(dqkv, dve, dfactor, dmore, ds),
        *scalars,
        HAS_MORE=dmore is not None,
        HAS_OWN=has_own,
        **constants,
    )
    return dqkv, dve, dfactor, dmore, None if ds is None else ds.sum(0)


def _outputs_constants(o, alpha, gate, paired: bool):
    """(tensors and strides that the outputs' kernels can walk; the compile-time arguments)."""
    pair, (B, S, H, width) = 1 + paired, o.shape
    by_token = alpha is not None and alpha.dim() == 3
    alpha = None if alpha is None else _by_token(alpha) if by_token else dense(alpha)
    gate = None if gate is None else _by_token(gate)
    strides = [x.stride(1) if x is not None and x.dim() == 3 else 0 for x in (alpha, gate)]
    constants = dict(HEADS=pair * H, R=width // 2, ROWS=_ROWS, PAIR=pair, num_warps=_WARPS)
    constants |= dict(EXCLUSIVE=alpha is not None, HAS_GATE=gate is not None)
    return alpha, gate, (B * S // pair, *strides), constants


def launch_head_outputs(o, own, alpha, gate, paired: bool, measured: bool):
    """Run the outputs' forward kernel on o (B, T, H, Dv), of paired heads (B, 2 T, H / 2, Dv). Returns (B, T, H Dv) and
    the largest finite numbers of its parts, float32 (programs,), or nothing if it is not `measured`."""
    alpha, gate, scalars, constants = _outputs_constants(o, alpha, gate, paired)
    programs = triton.cdiv(scalars[0], _ROWS)
    out = o.new_empty(o.shape[0], o.shape[1] // (1 + paired), constants["HEADS"] * o.shape[3])
    most = torch.empty(programs if measured else 0, dtype=torch.float32, device=o.device)
    own = None if own is None else dense(own)
    given = dense(o), own, alpha, gate, out, most
    launch(_head_outputs, (programs,), *given, *scalars, MEASURED=measured, **constants)
    return out, most


def launch_head_outputs_backward(g_BTD, o, own, alpha, gate, paired: bool):
    """Run the outputs' backward kernel on the gradient at the outputs. Returns do, down, dalpha, dgate; None for what
    is not there."""
    like = alpha
    dgate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    alpha, gate, scalars, constants = _outputs_constants(o, alpha, gate, paired)
    programs = triton.cdiv(scalars[0], _ROWS)
    do, down = (None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (o, own))
    own = None if own is None else dense(own)
    by_token = like is not None and like.dim() == 3
    dalpha = None
    if like is not None:
        shape = like.shape if by_token else (programs, *like.shape)
        dalpha = torch.empty(shape, dtype=like.dtype if by_token else torch.float32, device=o.device)
    given = dense(g_BTD), dense(o), own, alpha, gate, do, down, dalpha, dgate
    launch(_head_outputs_backward, (programs,), *given, *scalars, ALPHA_BY_TOKEN=by_token, **constants)
    if dalpha is not None and not by_token:
        dalpha = dalpha.sum(0).to(like.dtype)
    return do, down, dalpha, dgate


# ---- torch operators ---------------------------------------------------------------------------------------


@torch.library.custom_op("speedrun::head_inputs", mutates_args=())
def _inputs(
    qkv: Tensor,
    ve: Tensor | None,
    factor: Tensor | None,
    more: Tensor | None,
    s: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_factor: Tensor | None,
    heads: int,
    width: int,
    value_norm: bool,
    offset: bool,
    paired: bool,
) -> list[Tensor]:
    return launch_head_inputs(
        qkv, ve, factor, more, s, cos, sin, query_factor, heads, width, value_norm, offset, paired
    )


@torch.library.custom_op("speedrun::head_inputs_backward", mutates_args=())
def _inputs_backward(
    grads: list[Tensor],
    qkv: Tensor,
    ve: Tensor | None,
    factor: Tensor | None,
    s: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    query_factor: Tensor | None,
    heads: int,
    width: int,
    value_norm: bool,
    offset: bool,
    paired: bool,
    has_more: bool,
) -> list[Tensor]:
    grads = grads + [None] * (4 - len(grads))  # type: ignore[list-item]
    given = qkv, ve, factor, s, cos, sin, query_factor
    found = launch_head_inputs_backward(grads, *given, heads, width, value_norm, offset, paired, has_more)
    return [g for g in found if g is not None]


@torch.library.custom_op("speedrun::head_outputs", mutates_args=())
def _outputs(
    o: Tensor, own: Tensor | None, alpha: Tensor | None, gate: Tensor | None, paired: bool, measured: bool
) -> tuple[Tensor, Tensor]:
    return launch_head_outputs(o, own, alpha, gate, paired, measured)


@torch.library.custom_op("speedrun::head_outputs_backward", mutates_args=())
def _outputs_backward(
    g: Tensor, o: Tensor, own: Tensor | None, alpha: Tensor | None, gate: Tensor | None, paired: bool
) -> list[Tensor]:
    return [x for x in launch_head_outputs_backward(g, o, own, alpha, gate, paired) if x is not None]


@_inputs.register_fake
def _(qkv, ve, factor, more, s, cos, sin, query_factor, heads, width, value_norm, offset, paired):
    (B, T, E), pair = qkv.shape, 1 + paired
    narrow = (E // heads - width) // 2
    return [qkv.new_empty(B, pair * T, heads // pair, w) for w in (narrow, narrow, width)]


@_inputs_backward.register_fake
def _(grads, qkv, ve, factor, s, cos, sin, query_factor, heads, width, value_norm, offset, paired, has_more):
    more = qkv.new_empty(*qkv.shape[:2], heads * width) if has_more and len(grads) == 4 else None
    return [x.new_empty(x.shape) for x in (qkv, ve, factor, more, s) if x is not None]


@_outputs.register_fake
def _(o, own, alpha, gate, paired, measured):
    pair, (B, S, H, width) = 1 + paired, o.shape
    programs = -(-B * S // pair // _ROWS) if measured else 0
    return o.new_empty(B, S // pair, pair * H * width), o.new_empty(programs, dtype=torch.float32)


@_outputs_backward.register_fake
def _(g, o, own, alpha, gate, paired):
    return [x.new_empty(x.shape) for x in (o, own, alpha, gate) if x is not None]


def _with_gaps(found: list[Tensor], there: list[bool]) -> list[Tensor | None]:
    """What an operator returned, at the places of what is there; None at the others."""
    return [found[sum(there[:place])] if is_there else None for place, is_there in enumerate(there)]


class _HeadInputs(torch.autograd.Function):
    """The operator, and with_own v once more: what own values get from elsewhere comes to the backward pass by itself.
    Not where nobody asks: the compiler would make zeros of what is not used."""

    @staticmethod
    def forward(ctx, qkv, ve, factor, more, s, cos, sin, query_factor, with_own, *how):
        ctx.how, ctx.has_more = how, more is not None
        ctx.save_for_backward(qkv, ve, factor, s, cos, sin, query_factor)
        q, k, v = _inputs(qkv, ve, factor, more, s, cos, sin, query_factor, *how)
        ctx.set_materialize_grads(False)
        ctx.shapes = q.shape, k.shape, v.shape
        return (q, k, v, v.view_as(v)) if with_own else (q, k, v)

    @staticmethod
    @differentiable_once("head_inputs")
    def backward(ctx, *grads):
        qkv, ve, factor, s, *rest = ctx.saved_tensors
        given = [qkv.new_zeros(shape) if g is None else g for g, shape in zip(grads, ctx.shapes)]
        given += [g for g in grads[3:] if g is not None]
        found = _inputs_backward(given, qkv, ve, factor, s, *rest, *ctx.how, ctx.has_more)
        has_own = len(given) > 3
        there = [True, ve is not None, factor is not None, ctx.has_more and has_own, s is not None]
        dqkv, dve, dfactor, dmore, ds = _with_gaps(found, there)
        dmore = given[2].flatten(2) if ctx.has_more and not has_own else dmore
        return dqkv, dve, dfactor, dmore, ds, *[None] * 9


class _HeadOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, own, alpha, gate, paired, measured):
        ctx.save_for_backward(o, own, alpha, gate)
        ctx.paired = paired
        return _outputs(o, own, alpha, gate, paired, measured)

    @staticmethod
    @differentiable_once("head_outputs")
    def backward(ctx, g, _):
        given = ctx.saved_tensors
        found = _outputs_backward(g, *given, ctx.paired)
        return *_with_gaps(found, [x is not None for x in given]), None, None


# ---- public functions --------------------------------------------------------------------------------------


def implementation(impl: str, tensor: Tensor, width: int, narrow: int = 0) -> str:
    """What runs for that tensor, "triton" or "reference". width: of a head; narrow: of its queries, if that is another.

    Triton's tiles are powers of two: heads of other widths, and float64, are left to plain torch. Raises ValueError for
    a name that is none, or that cannot run there."""
    chosen = implementation_of(impl, tensor, cpu="reference", choices=IMPLEMENTATIONS)
    fit = tensor.dtype in KERNEL_DTYPES and all(w in (8, 16, 32, 64, 128) for w in (width, narrow or width))
    return "triton" if chosen == "triton" and fit else "reference"


@without_autocast
def head_inputs(
    qkv_BTE: Tensor,
    rotary: tuple[Tensor, Tensor],
    *,
    heads: int,
    width: int,
    ve_BTD: Tensor | None = None,
    factor_BTH: Tensor | None = None,
    more_BTD: Tensor | None = None,
    s_2: Tensor | None = None,
    query_factor: Tensor | None = None,
    value_norm: bool = True,
    offset: bool = False,
    paired: bool = False,
    with_own: bool = False,
    keys_before: Callable[[Tensor], Tensor | None] | None = None,
    impl: str = "auto",
) -> HeadInputs:
    """What attention reads, from the merged projection; see the top. Differentiable once in all but `rotary` and
    `query_factor`.

    Args:
        qkv_BTE: queries of all heads, keys, values, E = heads (2 Dq + width) in a row. rotary: cos and sin (T, Dq / 2),
            of paired heads (2 T, Dq / 2), in float32; columns of wider tables need no copy.
        width: of a head's values.
        ve_BTD, more_BTD: added to values, the first times factor_BTH, or without that times s_2[1].
        s_2: float32 (2,), or None: ones. query_factor: float32 (), or None: 1.
        with_own: whether `own` is wanted.
        keys_before: for a text that grows, of these keys those before the first ones; only of the reference.
        impl: one of `attention`'s names, of which those but "triton" mean plain torch; see `implementation`.

    Raises: ValueError or TypeError naming the argument."""
    narrow = _check_inputs(qkv_BTE, rotary, heads, width, ve_BTD, factor_BTH, more_BTD, s_2, query_factor)
    if paired and (heads % 2 or offset or with_own):
        raise ValueError(
            f"paired, of {heads} heads: an even number, and neither offset ({offset}) nor own ({with_own})"
        )
    if offset and narrow % 4:
        raise ValueError(f"offset moves quarters of a head, and {narrow} columns have none")
    how, given = (heads, width, value_norm, offset, paired), (ve_BTD, factor_BTH, more_BTD, s_2)
    for name, table in zip(("cos", "sin"), rotary):
        expect(name, table, ((1 + paired) * qkv_BTE.shape[1], narrow // 2), qkv_BTE)
        expect_floats(name, table)
    if keys_before is not None or implementation(impl, qkv_BTE, width, narrow) == "reference":
        found = head_inputs_reference(qkv_BTE, rotary, *given, query_factor, *how, keys_before)
        return found if with_own else found._replace(own=None)
    refuse_tangents("head_inputs", qkv_BTE, *given)
    small = [None if x is None else x.float() for x in (s_2, *rotary, query_factor)]
    q, k, v, *own = _HeadInputs.apply(qkv_BTE, *given[:3], *small, with_own, *how)
    return HeadInputs(q, k, v, *own or [None])


@without_autocast
def head_outputs(
    o: Tensor,
    own_BTHDv: Tensor | None = None,
    alpha: Tensor | None = None,
    gate_BTH: Tensor | None = None,
    *,
    paired: bool = False,
    measured: bool = False,
    impl: str = "auto",
) -> HeadOutputs:
    """What the product back reads of what attention found, o (B, T, H, Dv) or, of paired heads, (B, 2 T, H / 2, Dv);
    see the top. Differentiable once in all.

    own_BTHDv, alpha: the token's own values, and (H,) or (B, T, H) how much of what lies along them is taken away, or
    None. gate_BTH: factors, or None. measured: whether the kernel notes the largest number. impl: as in `head_inputs`.
    Raises: ValueError or TypeError naming the argument."""
    expect_floats("o", o)
    if o.dim() != 4 or (paired and o.shape[1] % 2):
        raise ValueError(f"o must be (B, T, H, Dv), or (B, 2 T, H / 2, Dv) of paired heads, got {tuple(o.shape)}")
    B, T, H, width = o.shape[0], o.shape[1] // (1 + paired), o.shape[2] * (1 + paired), o.shape[3]
    if (alpha is None) != (own_BTHDv is None):
        raise ValueError("alpha and own: both or neither")
    if alpha is not None and own_BTHDv is not None:
        expect("own", own_BTHDv, (B, T, H, width), o)
        expect_floats("own", own_BTHDv, (o.dtype,))
        expect("alpha", alpha, (H,) if alpha.dim() == 1 else (B, T, H), o)
        expect_floats("alpha", alpha)
    if gate_BTH is not None:
        expect("gate", gate_BTH, (B, T, H), o)
        expect_floats("gate", gate_BTH)
    if alpha is None and gate_BTH is None and not paired:
        return HeadOutputs(o.flatten(2), 0.0)
    if implementation(impl, o, width) == "reference":
        return HeadOutputs(head_outputs_reference(o, own_BTHDv, alpha, gate_BTH, paired), 0.0)
    refuse_tangents("head_outputs", o, own_BTHDv, alpha, gate_BTH)
    y, most = _HeadOutputs.apply(o, own_BTHDv, alpha, gate_BTH, paired, measured)
    return HeadOutputs(y, most.detach().amax() if measured and len(most) else 0.0)


def _check_inputs(qkv_BTE, rotary, heads: int, width: int, ve, factor, more, s, query_factor) -> int:
    """The width of a head's queries. Raises an error that names the first argument that does not fit."""
    expect_floats("qkv", qkv_BTE)
    if qkv_BTE.dim() != 3:
        raise ValueError(f"qkv must be (B, T, E), got {tuple(qkv_BTE.shape)}")
    B, T, E = qkv_BTE.shape
    narrow = (E // heads - width) // 2
    if heads * (2 * narrow + width) != E or narrow < 2 or narrow % 2 or width % 2:
        raise ValueError(f"qkv has {E} columns, which are not {heads} heads of queries, keys and values of {width}")
    if factor is not None and ve is None:
        raise ValueError("factor is of ve, which is not there")
    if query_factor is not None and query_factor.requires_grad:
        raise ValueError("query_factor must not require a gradient: there is none for it")
    wanted = {
        "ve": (ve, (B, T, heads * width), (qkv_BTE.dtype,)),
        "factor": (factor, (B, T, heads), ()),
        "more": (more, (B, T, heads * width), (qkv_BTE.dtype,)),
        "s": (s, (2,), ()),
        "query_factor": (query_factor, (), ()),
    }
    for name, (tensor, shape, dtypes) in wanted.items():
        if tensor is not None:
            expect(name, tensor, shape, qkv_BTE)
            expect_floats(name, tensor, dtypes)
    return narrow
