"""Attention over packed documents under a growing causal window, and the prologue that feeds it.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j   over the keys j with first_key[i] <= j <= i

Every mask of the trainer is the one integer first_key[i]. The window of docs/spec.md 2.7, counted in 128-token
blocks with its rules for partial and full ones, collapses to it: query i of block b sees
j >= max(start of its document, 128 * (b - max(W, 1) + 1)).
For if block b lies in one document, its allowed blocks are the diagonal one
(partial), n full ones and at most one partial one beyond them, and the two counts together keep the nearest
max(W, 1); if block b spans documents, none is full, and the nearest max(W, 1) partial ones stay.
tests/kernels/test_attention_masks.py compares the two pair by pair. first_key never decreases, so the queries
that see key j are j .. end_query[j] - 1, and a tile's range of keys is read off its first and last rows.

Shapes: B packed sequences, T tokens, H query heads, K key heads (H a multiple of K), Dh head width, R = Dh/2.
Work, for P allowed pairs: 4*P*Dh FLOPs a head forward, 10*P*Dh backward; with values of another width Dv 2*P*(Dh + Dv)
and P*(6*Dh + 4*Dv). Bytes: q, k, v, o once each, and one float32 logarithm a row and head.
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from kernels import attention_gluon, attention_gluon_backward
from kernels.attention_banded import band_mask, banded_attention, chunked_attention
from kernels.attention_inputs import attention_inputs, check_width, with_batch
from kernels.gluon import HAVE_GLUON
from kernels.guards import dense, differentiable_once, expect, expect_floats, launch, refuse_tangents, without_autocast
from kernels.runtime import (
    LOG2_E,
    Tile,
    Tiles,
    copies_in_bulk,
    descriptor,
    device_kind,
    implementation_of,
    tile_of,
    tl,
    triton,
)

__all__ = [
    "AttentionPlan",
    "Tile",
    "allowed_pairs",
    "attention",
    "attention_inputs",
    "attention_plan",
    "attention_reference",
    "implementation",
]

#: Tokens of one entry of the schedules in a plan. Every query and key tile divides it or is a multiple of it.
SCHEDULE_TOKENS = 128
#: Our own kernels; each name has a forward kernel, and its backward ones or those of "triton".
FORWARDS = ("triton", "specialised", "gluon", "gluon_one_pass")
#: Those for Hopper, and the head widths that the trainer takes them at: at 64 the one of specialised warps asks for
#: more issue slots than there are, in every tile (docs/slots.md).
FOR_HOPPER = {"specialised": (128,), "gluon": attention_gluon.WIDTHS, "gluon_one_pass": attention_gluon.WIDTHS}
IMPLEMENTATIONS = (*FORWARDS, "banded", "flex", "reference")
_MASKED = -1e30  # finite, so that a tile whose rows are all masked makes no NaN; exp(_MASKED - score) is 0


class AttentionPlan(NamedTuple):
    """Which keys each query sees, for every layer that shares a window. All on the device of the tokens.

    first_key_BT: int32; query i sees the keys first_key[i] .. i. Never decreases along T.
    end_query_BT: int32; key j is seen by the queries j .. end_query[j] - 1. Never decreases along T.
    query_order_N, key_order_N: int32; the 128-token chunks (chunk c of sequence b is b * ceil(T/128) + c) by
        falling work, for tiles of queries and of keys: the last programs to start are short.
    band_mask: float32, what the CPU's path adds to the logits (kernels/attention_banded.py); None on a GPU, in a
        compiled graph, or where it would be large.
    block_mask: `flex_mask` of this plan, for FlexAttention; None: each call makes its own.
    """

    first_key_BT: torch.Tensor
    end_query_BT: torch.Tensor
    query_order_N: torch.Tensor
    key_order_N: torch.Tensor
    band_mask: torch.Tensor | None = None
    block_mask: Any = None


class LayerInputs(NamedTuple):
    """What the backward kernels need to go on through the layer's inputs to its projections.

    rms_q (B, H, T), rms_k (B, K, T): float32, the factors of the norms of q and k. v (B, T, K, Dh): raw, K_APART heads
    between tokens as for k. ve (B, T, K, Dh), dense, or None; s float32 (2,); cos_TR, sin_TR float32 (T, Dh / 2)."""

    rms_q: torch.Tensor
    rms_k: torch.Tensor
    v: torch.Tensor
    ve: torch.Tensor | None
    s: torch.Tensor
    cos_TR: torch.Tensor
    sin_TR: torch.Tensor


# ---- plan -------------------------------------------------------------------------------------------------


def attention_plan(
    tokens_BT: torch.Tensor | None = None,
    *,
    document_starts: Sequence[int] | torch.Tensor | None = None,
    length: int | None = None,
    eos_id: int = 50256,
    window_blocks: int | torch.Tensor | None = None,
    window_tokens: int | torch.Tensor | None = None,
    block_tokens: int = 128,
    device: torch.device | str | None = None,
) -> AttentionPlan:
    """Work out which keys each query sees, on the tokens' device and without a host synchronisation.

    Args:
        tokens_BT: token ids, (T,) or (B, T). `eos_id` opens a document and belongs to it.
        document_starts: instead of tokens: increasing positions at which a document opens in one sequence of
            `length` tokens. Tokens before the first one form a document of their own.
        length: T, when no tokens are given. Without documents the whole sequence is one.
        window_blocks: W of docs/spec.md 2.7: a query sees its own block of `block_tokens` and W - 1 earlier ones.
            0 (what W // 2 may be) keeps the diagonal block, as 1 does. An int or a 0-d integer tensor; under
            torch.compile give a tensor, so that a growing window is data and never recompiles.
        window_tokens: instead, exact and without blocks: a query sees itself and `window_tokens` - 1 tokens before it,
            so "at most w tokens back" is w + 1. An int or a 0-d integer tensor, as above. Neither: causal.
        device: where the plan is made when no tokens say so; by default that of `document_starts`, else the CPU.

    Raises:
        ValueError, TypeError: naming the argument. A window inside a GPU tensor is not read (that would wait
            for the device): values below one act as one.
    """
    if window_blocks is not None and window_tokens is not None:
        raise ValueError("window_blocks and window_tokens exclude each other: give one")
    opens_BT = _document_openings(tokens_BT, document_starts, length, eos_id, device)
    device = opens_BT.device
    T = opens_BT.shape[1]
    position_T = torch.arange(T, device=device)
    first_key_BT = torch.where(opens_BT, position_T, 0).cummax(dim=1).values
    if window_blocks is not None:
        if not isinstance(block_tokens, int) or block_tokens < 1:
            raise ValueError(f"block_tokens must be a positive int, got {block_tokens!r}")
        window = _window("window_blocks", window_blocks, least=0)
        # Not position // block * block: torch 2.13 compiles that for CPUs into a loop that drops the last,
        # ragged block when T is not a multiple of block_tokens.
        oldest_T = position_T - position_T % block_tokens - (window - 1) * block_tokens
        first_key_BT = torch.maximum(first_key_BT, oldest_T)
    elif window_tokens is not None:
        window = _window("window_tokens", window_tokens, least=1)
        first_key_BT = torch.maximum(first_key_BT, position_T - window + 1)
    # first_key rises along T, so the queries that see key j end where first_key first exceeds j.
    key_BT = position_T.expand_as(first_key_BT).contiguous()
    end_query_BT = torch.searchsorted(first_key_BT, key_BT, right=True)
    chunk = torch.arange(0, T, SCHEDULE_TOKENS, device=device)
    chunk_end = (chunk + SCHEDULE_TOKENS).clamp(max=T)
    query_work = chunk_end - first_key_BT[:, chunk]
    key_work = end_query_BT[:, chunk_end - 1] - chunk
    on_cpu = device.type == "cpu" and not torch.compiler.is_compiling()
    return AttentionPlan(
        first_key_BT.to(torch.int32),
        end_query_BT.to(torch.int32),
        query_work.flatten().argsort(descending=True, stable=True).to(torch.int32),
        key_work.flatten().argsort(descending=True, stable=True).to(torch.int32),
        band_mask(first_key_BT) if on_cpu else None,
    )


def _document_openings(tokens_BT, document_starts, length, eos_id, device) -> torch.Tensor:
    """(B, T) bool: does a document open here? From token ids, from start positions, or from a bare length."""
    if tokens_BT is not None:
        if document_starts is not None:
            raise ValueError("tokens_BT and document_starts exclude each other: give one")
        if not isinstance(tokens_BT, torch.Tensor) or tokens_BT.is_floating_point():
            raise TypeError("tokens_BT must be a tensor of integer token ids")
        if tokens_BT.ndim not in (1, 2) or tokens_BT.numel() == 0:
            raise ValueError(f"tokens_BT must be (T,) or (B, T) and not empty, got {tuple(tokens_BT.shape)}")
        if length is not None and length != tokens_BT.shape[-1]:
            raise ValueError(f"length={length} disagrees with tokens_BT of {tokens_BT.shape[-1]} tokens")
        if device is not None and torch.device(device).type != tokens_BT.device.type:
            raise ValueError(f"device={device} disagrees with tokens_BT, which are on {tokens_BT.device}")
        # as int64: an end of text that does not fit the tokens' dtype equals none of them
        return (tokens_BT.long() == eos_id).reshape(-1, tokens_BT.shape[-1])
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length must be a positive int when no tokens_BT are given, got {length!r}")
    if document_starts is None:
        return torch.zeros(1, length, dtype=torch.bool, device=device)
    starts = torch.as_tensor(document_starts)
    if starts.ndim != 1 or starts.is_floating_point():
        raise ValueError(
            f"document_starts must be a flat list of integers, got shape {tuple(starts.shape)} of {starts.dtype}"
        )
    starts = starts.long()
    sound = (starts[1:] > starts[:-1]).all() & (starts >= 0).all() & (starts < length).all()
    if starts.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(sound):
            raise ValueError(
                "document_starts must increase and lie in 0 .. length - 1; "
                f"got {starts.tolist()[:8]}... for length={length}"
            )
    else:
        torch._assert_async(sound, "document_starts must increase and lie in 0 .. length - 1")
    if device is not None:
        starts = starts.to(device)
    opens = torch.zeros(length, dtype=torch.bool, device=starts.device)
    return opens.index_fill(0, starts, True)[None]


def _window(name: str, window: int | torch.Tensor, least: int) -> int | torch.Tensor:
    """The window as a number of at least one; what the host can read without waiting is checked."""
    if isinstance(window, torch.Tensor):
        if window.numel() != 1 or window.is_floating_point() or window.is_complex() or window.dtype == torch.bool:
            raise TypeError(
                f"{name} must be an int or a tensor of one integer, got {tuple(window.shape)} of {window.dtype}"
            )
        if window.device.type == "cpu" and not torch.compiler.is_compiling() and int(window) < least:
            raise ValueError(f"{name} must be at least {least}, got {int(window)}")
        return window.reshape(()).long().clamp(min=1)  # 8 or 16 bits would not hold a window in tokens
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int or a tensor of one integer, got {window!r}")
    if window < least:
        raise ValueError(f"{name} must be at least {least}, got {window}")
    return torch.sym_max(window, 1)


# ---- references -------------------------------------------------------------------------------------------


def allowed_pairs(plan: AttentionPlan) -> torch.Tensor:
    """(B, T, T) bool: may query i (rows) see key j (columns)? Quadratic: for references, tests, pictures."""
    position = torch.arange(plan.first_key_BT.shape[1], device=plan.first_key_BT.device)
    return (position >= plan.first_key_BT[:, :, None]) & (position <= position[:, None])


def attention_reference(q_BTHDh, k_BTKDh, v_BTKDh, plan: AttentionPlan, *, scale: float) -> torch.Tensor:
    """The formula read literally, O(T^2): products in the inputs' dtype, softmax in float32 (float64 for
    float64 inputs). The truth that kernels are compared with, in float64 or in their own dtype."""
    group = q_BTHDh.shape[2] // k_BTKDh.shape[2]
    wide = torch.promote_types(q_BTHDh.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHDh, k_BTKDh, v_BTKDh))
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    score_BHTT = (q @ k.transpose(-1, -2)).to(wide) * scale
    score_BHTT = score_BHTT.masked_fill(~allowed_pairs(plan)[:, None], float("-inf"))
    return (score_BHTT.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def flex_mask(plan: AttentionPlan):
    """The plan as FlexAttention's BlockMask, with its full and partial blocks told apart."""
    from torch.nn.attention.flex_attention import BlockMask

    first_BT = plan.first_key_BT
    block, T = SCHEDULE_TOKENS, first_BT.shape[1]

    def may_see(b, h, i, j):
        return (j <= i) & (j >= first_BT[b, i])

    start = torch.arange(0, T, block, device=first_BT.device)
    last = (start + block - 1).clamp(max=T - 1)
    query, key = start[:, None], start[None, :]
    visited = (key <= query) & (key + block > first_BT[:, start, None])
    full = visited & (key < query) & (key >= first_BT[:, last, None])

    def ordered(chosen):
        chosen = chosen[:, None].int()
        return (
            chosen.sum(-1).int().contiguous(),
            chosen.argsort(dim=-1, descending=True, stable=True).int().contiguous(),
        )

    return BlockMask.from_kv_blocks(
        *ordered(visited & ~full), *ordered(full), BLOCK_SIZE=block, mask_mod=may_see, seq_lengths=(T, T)
    )


def _flex(q, k, v, plan, scale):
    """torch's FlexAttention on the same plan: what the fused kernel is measured against."""
    from torch.nn.attention.flex_attention import flex_attention

    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = flex_attention(q, k, v, block_mask=plan.block_mask or flex_mask(plan), scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)


# ---- tiles ------------------------------------------------------------------------------------------------


#: For head widths up to 128. "default" fits the shared memory of every device that torch supports (99 KiB
#: on NVIDIA, 64 KiB on AMD). Hopper's: 128 rows of queries, as 64 would read k and v twice as often, 8 TB/s from
#: the second-level cache at 500 TFLOP/s; keys as many as do not make the hot loop spill. None has been timed on a
#: GPU yet: `python -m bench.attention --tune` times CANDIDATES there.
TILES: Tiles = {
    ("default", "forward", 2): Tile(64, 64, 4, 2),
    ("default", "dq", 2): Tile(64, 32, 4, 2),
    ("default", "dkdv", 2): Tile(32, 64, 4, 2),
    ("default", "forward", 4): Tile(32, 32, 8, 1),
    ("default", "dq", 4): Tile(32, 32, 8, 1),
    ("default", "dkdv", 4): Tile(32, 32, 8, 1),
    ("sm_80", "forward", 2): Tile(128, 32, 8, 3),
    ("sm_80", "dq", 2): Tile(128, 32, 8, 2),
    ("sm_80", "dkdv", 2): Tile(64, 64, 8, 2),
    ("sm_80", "forward", 4): Tile(16, 16, 8, 1),
    ("sm_80", "dq", 4): Tile(16, 16, 8, 1),
    ("sm_80", "dkdv", 4): Tile(16, 16, 8, 1),
    ("sm_90", "forward", 2): Tile(128, 64, 8, 2, descriptors=True),
    ("sm_90", "dq", 2): Tile(128, 64, 8, 2, descriptors=True),
    ("sm_90", "dkdv", 2): Tile(64, 128, 8, 2, descriptors=True),
    ("sm_100", "forward", 2): Tile(128, 64, 8, 2, descriptors=True),
    ("sm_100", "dq", 2): Tile(128, 64, 8, 3, descriptors=True),
    ("sm_100", "dkdv", 2): Tile(64, 128, 8, 1, descriptors=True),
    ("sm_100", "forward", 4): Tile(16, 16, 8, 1),
    ("sm_100", "dq", 4): Tile(16, 16, 8, 1),
    ("sm_100", "dkdv", 4): Tile(16, 16, 8, 1),
    ("gfx942", "forward", 2): Tile(128, 64, 4, 1),
    ("gfx942", "dq", 2): Tile(64, 32, 4, 1),
    ("gfx942", "dkdv", 2): Tile(32, 64, 4, 1),
}

#: The launch of `_attention_forward_specialised`. Tiles are the schedule's chunks, so that the first tile of keys is
#: the diagonal. Four warps: of them the compiler makes two groups that multiply and one that loads; of eight, nothing.
SPECIALISED = Tile(SCHEDULE_TOKENS, SCHEDULE_TOKENS, 4, 2, descriptors=True)

#: What `--tune` tries, by kernel, with and without descriptors: (rows, columns, warps, stages).
CANDIDATES = {
    "forward": (
        (128, 128, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 4, 2),
        (128, 32, 4, 3),
        (64, 128, 4, 2),
        (64, 64, 4, 2),
    ),
    "dq": ((128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 4, 2), (64, 128, 4, 2), (64, 64, 4, 2)),
    "dkdv": ((64, 128, 8, 2), (64, 128, 8, 1), (32, 128, 8, 2), (32, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 2)),
}


# ---- Triton -----------------------------------------------------------------------------------------------
# Prefixes: p_ pointer (or tensor descriptor), o_ offset, b_ block of values, m_ mask. Logits are kept in
# base 2: scale_log2 = scale * log2(e), so that exp is the device's own exp2. A program owns one tile of
# rows and walks the other axis in two loops: the edge tiles (the diagonal, and the far end where documents
# or the window cut), masked, and the interior tiles, where every pair is allowed and neither masks nor
# bounds are computed.


#: Torch's default epsilon of a norm, in every dtype: that of float32.
_EPS = tl.constexpr(torch.finfo(torch.float32).eps)


@triton.jit
def _place(p_order, chunks, HEADS: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """(sequence, head, first row) of this program: heads first, then the chunks by falling work."""
    pid = tl.program_id(0)
    tile = pid // HEADS
    chunk = tl.load(p_order + tile // (CHUNK // ROWS))
    row = (chunk % chunks) * CHUNK + tile % (CHUNK // ROWS) * ROWS
    return chunk // chunks, pid % HEADS, row


@triton.jit
def _load_tile(
    p_x,
    batch,
    row,
    head,
    T,
    HEADS: tl.constexpr,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Rows row .. row + ROWS - 1 of one head of x (B, T, HEADS, DH); zeros outside 0 .. T - 1 if MASKED."""
    if DESCRIPTOR:
        return p_x.load([batch, row, head, 0]).reshape(ROWS, DH)
    else:
        o_row = tl.arange(0, ROWS)
        p = p_x + ((batch.to(tl.int64) * T + row) * HEADS + head) * DH
        p = p + o_row[:, None] * (HEADS * DH) + tl.arange(0, DH)[None, :]
        if MASKED:
            return tl.load(p, mask=((row + o_row >= 0) & (row + o_row < T))[:, None], other=0.0)
        else:
            return tl.load(p)


@triton.jit
def _store_tile(p_x, b_x, batch, row, head, T, HEADS: tl.constexpr, DH: tl.constexpr, ROWS: tl.constexpr):
    """Write what `_load_tile` reads, leaving out rows past the end."""
    o_row = tl.arange(0, ROWS)
    p = p_x + ((batch.to(tl.int64) * T + row) * HEADS + head) * DH
    p = p + o_row[:, None] * (HEADS * DH) + tl.arange(0, DH)[None, :]
    tl.store(p, b_x.to(p_x.dtype.element_ty), mask=(row + o_row < T)[:, None])


@triton.jit
def _halves(b_x, ROWS: tl.constexpr, DH: tl.constexpr):
    """Both halves of each row, (ROWS, DH / 2): what rotary pairs up."""
    return tl.split(tl.permute(tl.reshape(b_x, [ROWS, 2, DH // 2]), [0, 2, 1]))


# The next two follow the loops with both accumulators still in registers. They take rows by halves and read again what
# the loops had, and offsets within a tile stay 32 bits wide behind one 64-bit start: otherwise a thread spills.


@triton.jit
def _store_at_projection(
    p_x, p_y, b_g, p_rms, p_cos, p_sin, batch, row, head, T, APART: tl.constexpr, DH: tl.constexpr, ROWS: tl.constexpr
):
    """Write the gradient at x, of which y = rotary(x r) was made, from the float32 gradient g at y; y lies as x does.

    Rotations keep products of rows, so that the norm's derivative is taken before they are undone."""
    R: tl.constexpr = DH // 2
    o_row = row + tl.arange(0, ROWS)
    m_row = (o_row < T)[:, None]
    o_first = ((batch.to(tl.int64) * T + row) * APART + head) * DH
    p_x += o_first
    p_y += o_first
    o_x = tl.arange(0, ROWS)[:, None] * (APART * DH) + tl.arange(0, R)[None, :]
    b_1, b_2 = _halves(b_g, ROWS, DH)
    b_y1 = tl.load(p_y + o_x, mask=m_row, other=0.0).to(tl.float32)
    b_y2 = tl.load(p_y + o_x + R, mask=m_row, other=0.0).to(tl.float32)
    b_mean = ((tl.sum(b_1 * b_y1, 1) + tl.sum(b_2 * b_y2, 1)) / DH)[:, None]
    b_r = tl.load(p_rms + o_row, mask=o_row < T, other=0.0)[:, None]
    b_1 = (b_1 - b_y1 * b_mean) * b_r
    b_2 = (b_2 - b_y2 * b_mean) * b_r
    o_angle = o_row[:, None] * R + tl.arange(0, R)[None, :]
    b_cos = tl.load(p_cos + o_angle, mask=m_row, other=0.0)
    b_sin = tl.load(p_sin + o_angle, mask=m_row, other=0.0)
    tl.store(p_x + o_x, (b_1 * b_cos - b_2 * b_sin).to(p_x.dtype.element_ty), mask=m_row)
    tl.store(p_x + o_x + R, (b_1 * b_sin + b_2 * b_cos).to(p_x.dtype.element_ty), mask=m_row)


@triton.jit
def _store_at_values(
    p_x,
    p_dve,
    p_ds,
    p_y,
    p_ve,
    p_s,
    b_g,
    batch,
    row,
    head,
    T,
    APART: tl.constexpr,
    V_APART: tl.constexpr,
    DH: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_VE: tl.constexpr,
):
    """Write the gradients at the raw values y, at ve and at s from the float32 gradient g at v = s0 y r + s1 ve.

    Rows past the end are read as zeros and add nothing to those at s, p_ds (2,)."""
    R: tl.constexpr = DH // 2
    m_row = (row + tl.arange(0, ROWS) < T)[:, None]
    o_first = ((batch.to(tl.int64) * T + row) * APART + head) * DH
    p_x += o_first
    p_y += o_first
    o_x = tl.arange(0, ROWS)[:, None] * (APART * DH) + tl.arange(0, R)[None, :]
    b_1, b_2 = _halves(b_g, ROWS, DH)
    b_y1 = tl.load(p_y + o_x, mask=m_row, other=0.0).to(tl.float32)
    b_y2 = tl.load(p_y + o_x + R, mask=m_row, other=0.0).to(tl.float32)
    b_r = tl.rsqrt((tl.sum(b_y1 * b_y1, 1) + tl.sum(b_y2 * b_y2, 1)) / DH + _EPS)
    b_along = (tl.sum(b_1 * b_y1, 1) + tl.sum(b_2 * b_y2, 1)) * b_r
    tl.store(p_ds, tl.sum(b_along, 0))
    b_mean = (b_along * b_r / DH)[:, None]
    b_r = (b_r * tl.load(p_s))[:, None]
    tl.store(p_x + o_x, ((b_1 - b_y1 * b_mean) * b_r).to(p_x.dtype.element_ty), mask=m_row)
    tl.store(p_x + o_x + R, ((b_2 - b_y2 * b_mean) * b_r).to(p_x.dtype.element_ty), mask=m_row)
    if HAS_VE:
        o_first = ((batch.to(tl.int64) * T + row) * V_APART + head) * DH
        p_ve += o_first
        p_dve += o_first
        o_ve = tl.arange(0, ROWS)[:, None] * (V_APART * DH) + tl.arange(0, R)[None, :]
        s_1 = tl.load(p_s + 1)
        b_along = tl.sum(b_1 * tl.load(p_ve + o_ve, mask=m_row, other=0.0).to(tl.float32), 1)
        tl.store(p_dve + o_ve, (b_1 * s_1).to(p_dve.dtype.element_ty), mask=m_row)
        b_along += tl.sum(b_2 * tl.load(p_ve + o_ve + R, mask=m_row, other=0.0).to(tl.float32), 1)
        tl.store(p_dve + o_ve + R, (b_2 * s_1).to(p_dve.dtype.element_ty), mask=m_row)
        tl.store(p_ds + 1, tl.sum(b_along, 0))
    else:
        tl.store(p_ds + 1, 0.0)


@triton.jit
def _key_range(p_first, row, T, BM: tl.constexpr, BN: tl.constexpr):
    """(diagonal tiles, interior tiles, far edge tiles) of keys for the queries row .. row + BM - 1.

    Tiles are laid out from the diagonal backwards: the diagonal ones start at `row`, interior tile t of
    0 .. interior - 1 at row - BN * (t + 1), and the edge ones go on from there."""
    end = tl.minimum(row + BM, T)
    oldest = tl.load(p_first + row)
    oldest_of_all = tl.load(p_first + end - 1)
    interior = tl.maximum(row - oldest_of_all, 0) // BN
    edge = tl.cdiv(tl.maximum(row - interior * BN - oldest, 0), BN)
    return tl.cdiv(end - row, BN), interior, edge


@triton.jit
def _tile_key(t, row, interior, edge, BN: tl.constexpr):
    """First key of the t-th tile that a tile of queries visits: interior, far edge, then diagonal ones."""
    return tl.where(t < interior + edge, row - (t + 1) * BN, row + (t - interior - edge) * BN)


@triton.jit
def _forward_step(
    b_acc,
    b_sum,
    b_max,
    b_s,
    b_q,
    b_first,
    p_k,
    p_v,
    batch,
    row,
    key,
    next_key,
    kv_head,
    T,
    scale_log2,
    K_APART: tl.constexpr,
    V_APART: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys, whose logits b_s are known, into the running softmax (maximum, sum and weighted values).

    The next tile's logits come first: the tensor cores work on them while this tile's exponentials are taken."""
    b_k = _load_tile(p_k, batch, next_key, kv_head, T, K_APART, DH, BN, True, DESCRIPTOR)
    b_next = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    if MASKED:
        o_i = row + tl.arange(0, BM)
        o_j = key + tl.arange(0, BN)
        m_ij = (o_j[None, :] <= o_i[:, None]) & (o_j[None, :] >= b_first[:, None])
        b_s = tl.where(m_ij, b_s, float("-inf"))
    b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
    if MASKED:  # a row may have no key yet: a finite shift keeps inf - inf out, and its weights come out as 0
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    else:
        b_shift = b_new
    b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
    b_keep = tl.exp2(b_max - b_shift)
    b_sum = b_sum * b_keep + tl.sum(b_p, 1)
    b_v = _load_tile(p_v, batch, key, kv_head, T, V_APART, DV, BN, MASKED, DESCRIPTOR)
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_keep[:, None], input_precision=PRECISION)
    return b_acc, b_sum, b_new, b_next


@triton.jit
def _attention_forward(
    p_q,
    p_k,
    p_v,
    p_o,
    p_lse,
    p_first,
    p_order,
    scale_log2,
    T,
    chunks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    Q_APART: tl.constexpr,
    K_APART: tl.constexpr,
    V_APART: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """o and its rows' base-2 log-sum-exp, (B, HEADS, T), for one tile of queries of one head."""
    batch, head, row = _place(p_order, chunks, HEADS, BM, CHUNK)
    if row >= T:
        return
    kv_head = head // (HEADS // KV_HEADS)
    o_i = row + tl.arange(0, BM)
    p_first += batch * T
    b_first = tl.load(p_first + o_i, mask=o_i < T, other=0)
    diagonal, interior, edge = _key_range(p_first, row, T, BM, BN)
    b_q = _load_tile(p_q, batch, row, head, T, Q_APART, DH, BM, True, False)
    b_acc = tl.zeros([BM, DV], tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    key = _tile_key(0, row, interior, edge, BN)
    b_k = _load_tile(p_k, batch, key, kv_head, T, K_APART, DH, BN, True, DESCRIPTOR)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    for t in range(0, interior):
        key = row - (t + 1) * BN
        next_key = _tile_key(t + 1, row, interior, edge, BN)
        b_acc, b_sum, b_max, b_s = _forward_step(
            b_acc,
            b_sum,
            b_max,
            b_s,
            b_q,
            b_first,
            p_k,
            p_v,
            batch,
            row,
            key,
            next_key,
            kv_head,
            T,
            scale_log2,
            K_APART,
            V_APART,
            DH,
            DV,
            BM,
            BN,
            False,
            DESCRIPTOR,
            PRECISION,
        )
    for t in range(interior, interior + edge + diagonal):  # the last one's next tile is loaded in vain
        key = _tile_key(t, row, interior, edge, BN)
        next_key = _tile_key(t + 1, row, interior, edge, BN)
        b_acc, b_sum, b_max, b_s = _forward_step(
            b_acc,
            b_sum,
            b_max,
            b_s,
            b_q,
            b_first,
            p_k,
            p_v,
            batch,
            row,
            key,
            next_key,
            kv_head,
            T,
            scale_log2,
            K_APART,
            V_APART,
            DH,
            DV,
            BM,
            BN,
            True,
            DESCRIPTOR,
            PRECISION,
        )
    _store_tile(p_o, b_acc / b_sum[:, None], batch, row, head, T, HEADS, DV, BM)
    tl.store(p_lse + (batch.to(tl.int64) * HEADS + head) * T + o_i, b_max + tl.log2(b_sum), mask=o_i < T)


@triton.jit
def _attention_forward_specialised(
    p_q,
    p_k,
    p_v,
    p_o,
    p_lse,
    p_first,
    p_order,
    scale_log2,
    T,
    chunks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    Q_APART: tl.constexpr,
    K_APART: tl.constexpr,
    V_APART: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What `_attention_forward` computes, in a form of which Triton makes specialised warps on Hopper: two groups of
    four warps take 64 rows each, and one more loads; the groups meet only at the buffers of keys and values.

    What the compiler takes (3.6 to 3.9) is narrow, and this is why the loop is one: no return before it, no `if` in
    it, no second loop behind it, q by a descriptor made here, and nothing loaded without one that reaches a product
    but through the loop's variables. So the mask is one of those: the columns of a tile that a row may see, which
    move by BN from tile to tile. It walks back from the diagonal, where every row sees at least itself."""
    batch, head, row = _place(p_order, chunks, HEADS, BM, CHUNK)
    kv_head = head // (HEADS // KV_HEADS)
    o_i = row + tl.arange(0, BM)
    p_first += batch * T
    oldest = tl.load(p_first + row)
    o_q = (batch.to(tl.int64) * T * Q_APART + head) * DH
    p_rows = tl.make_tensor_descriptor(p_q + o_q, shape=[T, DH], strides=[Q_APART * DH, 1], block_shape=[BM, DH])
    b_q = p_rows.load([row, 0])
    b_from = tl.load(p_first + o_i, mask=o_i < T, other=0) - row
    b_until = tl.arange(0, BM)
    b_acc = tl.zeros([BM, DV], tl.float32)
    b_sum = tl.zeros([BM], tl.float32)
    b_max = tl.full([BM], float("-inf"), tl.float32)
    for t in tl.range(0, tl.cdiv(row - oldest, BN) + 1, warp_specialize=True):
        key = row - t * BN
        b_k = p_k.load([batch, key, kv_head, 0]).reshape(BN, DH)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        o_column = tl.arange(0, BN)
        m_ij = (o_column[None, :] >= b_from[:, None]) & (o_column[None, :] <= b_until[:, None])
        b_s = tl.where(m_ij, b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)  # logits of -inf alone, up to here
        b_p = tl.exp2(b_s * scale_log2 - b_shift[:, None])
        b_keep = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_keep + tl.sum(b_p, 1)
        b_v = p_v.load([batch, key, kv_head, 0]).reshape(BN, DV)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_keep[:, None], input_precision=PRECISION)
        b_max = b_new
        b_from += BN
        b_until += BN
    _store_tile(p_o, b_acc / b_sum[:, None], batch, row, head, T, HEADS, DV, BM)
    tl.store(p_lse + (batch.to(tl.int64) * HEADS + head) * T + o_i, b_max + tl.log2(b_sum), mask=o_i < T)


@triton.jit
def _dq_step(
    b_dq,
    b_q,
    b_do,
    b_lse,
    b_delta,
    b_first,
    p_k,
    p_v,
    batch,
    row,
    key,
    kv_head,
    T,
    scale_log2,
    K_APART: tl.constexpr,
    V_APART: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys into dq (still without the logit scale)."""
    b_k = _load_tile(p_k, batch, key, kv_head, T, K_APART, DH, BN, MASKED, DESCRIPTOR)
    b_v = _load_tile(p_v, batch, key, kv_head, T, V_APART, DV, BN, MASKED, DESCRIPTOR)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_p = tl.exp2(b_s * scale_log2 - b_lse[:, None])
    if MASKED:
        o_i = row + tl.arange(0, BM)
        o_j = key + tl.arange(0, BN)
        m_ij = (o_j[None, :] <= o_i[:, None]) & (o_j[None, :] >= b_first[:, None])
        b_p = tl.where(m_ij, b_p, 0.0)
    b_ds = b_p * (b_dp - b_delta[:, None])
    return tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)


@triton.jit
def _attention_dq(
    p_q,
    p_k,
    p_v,
    p_o,
    p_do,
    p_lse,
    p_dq,
    p_delta,
    p_first,
    p_order,
    p_rms,
    p_cos,
    p_sin,
    scale,
    scale_log2,
    T,
    chunks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    Q_APART: tl.constexpr,
    K_APART: tl.constexpr,
    V_APART: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LAYER: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq for one tile of queries of one head, and delta = rowsum(o * do), which the other kernel reads.

    LAYER: dq is the gradient at the projection, before norm and rotary."""
    batch, head, row = _place(p_order, chunks, HEADS, BM, CHUNK)
    if row >= T:
        return
    kv_head = head // (HEADS // KV_HEADS)
    o_i = row + tl.arange(0, BM)
    p_first += batch * T
    o_row = (batch.to(tl.int64) * HEADS + head) * T + o_i
    b_first = tl.load(p_first + o_i, mask=o_i < T, other=0)
    b_lse = tl.load(p_lse + o_row, mask=o_i < T, other=0.0)
    diagonal, interior, edge = _key_range(p_first, row, T, BM, BN)
    b_o = _load_tile(p_o, batch, row, head, T, HEADS, DV, BM, True, False)
    b_do = _load_tile(p_do, batch, row, head, T, HEADS, DV, BM, True, False)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_delta + o_row, b_delta, mask=o_i < T)
    b_q = _load_tile(p_q, batch, row, head, T, Q_APART, DH, BM, True, False)
    b_dq = tl.zeros([BM, DH], tl.float32)
    for t in range(interior, interior + edge + diagonal):
        key = _tile_key(t, row, interior, edge, BN)
        b_dq = _dq_step(
            b_dq,
            b_q,
            b_do,
            b_lse,
            b_delta,
            b_first,
            p_k,
            p_v,
            batch,
            row,
            key,
            kv_head,
            T,
            scale_log2,
            K_APART,
            V_APART,
            DH,
            DV,
            BM,
            BN,
            True,
            DESCRIPTOR,
            PRECISION,
        )
    for t in range(0, interior):
        key = row - (t + 1) * BN
        b_dq = _dq_step(
            b_dq,
            b_q,
            b_do,
            b_lse,
            b_delta,
            b_first,
            p_k,
            p_v,
            batch,
            row,
            key,
            kv_head,
            T,
            scale_log2,
            K_APART,
            V_APART,
            DH,
            DV,
            BM,
            BN,
            False,
            DESCRIPTOR,
            PRECISION,
        )
    if LAYER:
        p_rms += (batch.to(tl.int64) * HEADS + head) * T
        _store_at_projection(p_dq, p_q, b_dq * scale, p_rms, p_cos, p_sin, batch, row, head, T, Q_APART, DH, BM)
    else:
        _store_tile(p_dq, b_dq * scale, batch, row, head, T, Q_APART, DH, BM)


@triton.jit
def _dkdv_step(
    b_dk,
    b_dv,
    b_k,
    b_v,
    b_end,
    p_q,
    p_do,
    p_lse,
    p_delta,
    batch,
    row,
    key,
    head,
    T,
    scale_log2,
    HEADS: tl.constexpr,
    Q_APART: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    MASKED: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of queries into dk (still without the logit scale) and dv; logits are held transposed."""
    o_i = row + tl.arange(0, BM)
    o_row = (batch.to(tl.int64) * HEADS + head) * T + o_i
    b_q = _load_tile(p_q, batch, row, head, T, Q_APART, DH, BM, MASKED, DESCRIPTOR)
    b_do = _load_tile(p_do, batch, row, head, T, HEADS, DV, BM, MASKED, DESCRIPTOR)
    if MASKED:
        b_lse = tl.load(p_lse + o_row, mask=o_i < T, other=0.0)
        b_delta = tl.load(p_delta + o_row, mask=o_i < T, other=0.0)
    else:
        b_lse = tl.load(p_lse + o_row)
        b_delta = tl.load(p_delta + o_row)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
    b_p = tl.exp2(b_s * scale_log2 - b_lse[None, :])
    if MASKED:
        o_j = key + tl.arange(0, BN)
        m_ji = (o_i[None, :] >= o_j[:, None]) & (o_i[None, :] < b_end[:, None])
        b_p = tl.where(m_ji, b_p, 0.0)
    # dv before dp: the other order holds one more tile in registers and spills
    b_dv = tl.dot(b_p.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
    b_ds = b_p * (b_dp - b_delta[None, :])
    b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


@triton.jit
def _attention_dkdv(
    p_q,
    p_k,
    p_v,
    p_do,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    p_end,
    p_order,
    p_rms,
    p_cos,
    p_sin,
    p_raw,
    p_ve,
    p_s,
    p_dve,
    p_ds,
    scale,
    scale_log2,
    T,
    chunks,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    Q_APART: tl.constexpr,
    K_APART: tl.constexpr,
    V_APART: tl.constexpr,
    DH: tl.constexpr,
    DV: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LAYER: tl.constexpr,
    HAS_VE: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk and dv for one tile of keys of one key head, summed over its query heads in a fixed order.

    LAYER: dk and dv are the gradients at the projections, before norm, rotary and mix; also dve, and this program's
    share of both scalars' gradients, (programs, 2)."""
    batch, kv_head, key = _place(p_order, chunks, KV_HEADS, BN, CHUNK)
    if key >= T:
        if LAYER:
            tl.store(p_ds + tl.program_id(0) * 2, 0.0)
            tl.store(p_ds + tl.program_id(0) * 2 + 1, 0.0)
        return
    o_j = key + tl.arange(0, BN)
    p_end += batch * T
    b_end = tl.load(p_end + o_j, mask=o_j < T, other=0)
    end_of_first = tl.load(p_end + key)
    end_of_last = tl.load(p_end + tl.minimum(key + BN, T) - 1)
    diagonal = tl.cdiv(tl.minimum(key + BN, end_of_last) - key, BM)
    start = key + tl.cdiv(BN, BM) * BM
    interior = tl.maximum(end_of_first - start, 0) // BM
    edge = tl.cdiv(tl.maximum(end_of_last - start - interior * BM, 0), BM)
    b_k = _load_tile(p_k, batch, key, kv_head, T, K_APART, DH, BN, True, False)
    b_v = _load_tile(p_v, batch, key, kv_head, T, V_APART, DV, BN, True, False)
    b_dk = tl.zeros([BN, DH], tl.float32)
    b_dv = tl.zeros([BN, DV], tl.float32)
    # the query heads of this key head, in one loop: a loop around it would keep more registers
    GROUP: tl.constexpr = HEADS // KV_HEADS
    for n in range(0, GROUP * (diagonal + edge)):
        head = kv_head * GROUP + n // (diagonal + edge) if GROUP > 1 else kv_head
        t = n % (diagonal + edge) if GROUP > 1 else n
        row = tl.where(t < diagonal, key + t * BM, start + (interior + t - diagonal) * BM)
        b_dk, b_dv = _dkdv_step(
            b_dk,
            b_dv,
            b_k,
            b_v,
            b_end,
            p_q,
            p_do,
            p_lse,
            p_delta,
            batch,
            row,
            key,
            head,
            T,
            scale_log2,
            HEADS,
            Q_APART,
            DH,
            DV,
            BM,
            BN,
            True,
            DESCRIPTOR,
            PRECISION,
        )
    for n in range(0, GROUP * interior):
        head = kv_head * GROUP + n // interior if GROUP > 1 else kv_head
        t = n % interior if GROUP > 1 else n
        row = start + t * BM
        b_dk, b_dv = _dkdv_step(
            b_dk,
            b_dv,
            b_k,
            b_v,
            b_end,
            p_q,
            p_do,
            p_lse,
            p_delta,
            batch,
            row,
            key,
            head,
            T,
            scale_log2,
            HEADS,
            Q_APART,
            DH,
            DV,
            BM,
            BN,
            False,
            DESCRIPTOR,
            PRECISION,
        )
    if LAYER:
        p_ds += tl.program_id(0) * 2
        _store_at_values(
            p_dv, p_dve, p_ds, p_raw, p_ve, p_s, b_dv, batch, key, kv_head, T, K_APART, V_APART, DH, BN, HAS_VE
        )
        p_rms += (batch.to(tl.int64) * KV_HEADS + kv_head) * T
        _store_at_projection(p_dk, p_k, b_dk * scale, p_rms, p_cos, p_sin, batch, key, kv_head, T, K_APART, DH, BN)
    else:
        _store_tile(p_dk, b_dk * scale, batch, key, kv_head, T, K_APART, DH, BN)
        _store_tile(p_dv, b_dv, batch, key, kv_head, T, K_APART, DV, BN)


# The two that stand around the one pass of kernels/attention_gluon_backward.py. Both are traffic and nothing else.


@triton.jit
def _attention_rows(
    p_o, p_do, p_lse, p_rows, p_sums, T, rows, HEADS: tl.constexpr, DH: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr
):
    """Of BM rows of one head, of `rows` a head: lse and delta = rowsum(o * do) into p_rows (2, B, HEADS, rows), from
    the T-th on infinity and 0; and zeros into p_sums (B, HEADS, T, DH)."""
    pid = tl.program_id(0)
    tiles = rows // BM
    head = pid % HEADS
    batch = pid // HEADS // tiles
    row = pid // HEADS % tiles * BM
    o_i = row + tl.arange(0, BM)
    b_o = _load_tile(p_o, batch, row, head, T, HEADS, DV, BM, True, False)
    b_do = _load_tile(p_do, batch, row, head, T, HEADS, DV, BM, True, False)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    place = batch.to(tl.int64) * HEADS + head
    b_lse = tl.load(p_lse + place * T + o_i, mask=o_i < T, other=float("inf"))
    sequences = tl.num_programs(0) // HEADS // tiles
    tl.store(p_rows + place * rows + o_i, b_lse)
    tl.store(p_rows + (sequences.to(tl.int64) * HEADS + place) * rows + o_i, b_delta)
    p = p_sums + (place * T + row) * DH + tl.arange(0, BM)[:, None] * DH + tl.arange(0, DH)[None, :]
    tl.store(p, tl.zeros([BM, DH], tl.float32), mask=(o_i < T)[:, None])


@triton.jit
def _attention_dq_rounded(
    p_sums,
    p_q,
    p_dq,
    p_rms,
    p_cos,
    p_sin,
    scale,
    T,
    tiles,
    HEADS: tl.constexpr,
    Q_APART: tl.constexpr,
    DH: tl.constexpr,
    BM: tl.constexpr,
    LAYER: tl.constexpr,
):
    """dq of BM rows of one head from its float32 sums (B, HEADS, T, DH) without the logit scale.

    LAYER: dq is the gradient at the projection, before norm and rotary."""
    pid = tl.program_id(0)
    head = pid % HEADS
    batch = pid // HEADS // tiles
    row = pid // HEADS % tiles * BM
    o_i = row + tl.arange(0, BM)
    place = batch.to(tl.int64) * HEADS + head
    p = p_sums + (place * T + row) * DH + tl.arange(0, BM)[:, None] * DH + tl.arange(0, DH)[None, :]
    b_dq = tl.load(p, mask=(o_i < T)[:, None], other=0.0) * scale
    if LAYER:
        _store_at_projection(p_dq, p_q, b_dq, p_rms + place * T, p_cos, p_sin, batch, row, head, T, Q_APART, DH, BM)
    else:
        _store_tile(p_dq, b_dq, batch, row, head, T, Q_APART, DH, BM)


# ---- launchers --------------------------------------------------------------------------------------------


def _precision(dtype: torch.dtype) -> str:
    """How float32 products are rounded: torch's own setting, and always in full where there is no tf32."""
    fast = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if fast and not torch.version.hip else "ieee"


def _operand(x: torch.Tensor, rows: int, tile: Tile):
    """x (B, T, heads, Dh) as a kernel's walked operand: itself, or a descriptor of tiles of `rows` tokens."""
    if not tile.descriptors:
        return x
    if not copies_in_bulk(x):  # heads are 16 wide or more, so that it is the address
        x = x.clone()
    return descriptor(x, [1, rows, 1, x.shape[-1]])


def _walked(plan: AttentionPlan, q: torch.Tensor) -> AttentionPlan:
    """The plan's four tables as the kernels walk them; a plan cut by hand may have strides."""
    check_plan(plan, q)
    return AttentionPlan(*(dense(x) for x in plan[:4]))


def check_plan(plan: AttentionPlan, q: torch.Tensor) -> None:
    """Raise ValueError or TypeError naming the table that does not fit q (B, T, heads, Dh)."""
    B, T, chunks = q.shape[0], q.shape[1], q.shape[0] * triton.cdiv(q.shape[1], SCHEDULE_TOKENS)
    for name, shape in zip(plan._fields, ((B, T), (B, T), (chunks,), (chunks,))):
        expect(f"plan.{name}", getattr(plan, name), shape, q)
        if getattr(plan, name).dtype != torch.int32:
            raise TypeError(f"plan.{name} has dtype {getattr(plan, name).dtype}; attention_plan makes it int32")


def _grid(x: torch.Tensor, rows: int) -> tuple[int]:
    """Programs for every `rows` rows and head of x (B, T, heads, Dh), rounded up to whole chunks."""
    B, T, heads, _ = x.shape
    return (B * triton.cdiv(T, SCHEDULE_TOKENS) * (SCHEDULE_TOKENS // rows) * heads,)


def _heads_in_order(x: torch.Tensor) -> torch.Tensor:
    """x (B, T, heads, Dh) itself where a number of heads leads from each token to the next, as in a slice of a merged
    projection; else a copy of which that holds."""
    (B, T, heads, width), x = x.shape, x.resolve_neg()
    in_order = x.stride(3) == 1 and x.stride(2) == width and x.stride(1) % width == 0
    apart = x.stride(1) >= heads * width and (B == 1 or x.stride(0) == T * x.stride(1))
    return x if in_order and apart else dense(x)


def _heads_apart(x: torch.Tensor) -> int:
    """Heads in memory from a token of x (B, T, heads, Dh) to the next.

    Raises: ValueError if that is no number, or sequences are not as far apart as their tokens."""
    if x.is_contiguous():
        return x.shape[2]
    if _heads_in_order(x) is not x:
        raise ValueError(f"a tensor of strides {x.stride()} has no whole number of heads from one token to the next")
    return x.stride(1) // x.shape[3]


def _constants(q, k, v, tile: Tile) -> dict:
    """The compile-time arguments that all three kernels share. APART: heads in memory from a token to the next; DH: the
    width of heads of q and k, DV: of v and o."""
    return {
        "HEADS": q.shape[2],
        "KV_HEADS": k.shape[2],
        "Q_APART": _heads_apart(q),
        "K_APART": _heads_apart(k),
        "V_APART": _heads_apart(v),
        "DH": q.shape[3],
        "DV": v.shape[3],
        "CHUNK": SCHEDULE_TOKENS,
        "BM": tile.rows,
        "BN": tile.columns,
        "DESCRIPTOR": tile.descriptors,
        "PRECISION": _precision(q.dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "enable_fp_fusion": True,
    }


def _with_room(device: torch.device, run: Callable[[], None]) -> None:
    """run(), which launches a kernel that makes a descriptor: that lies in device memory, for which Triton asks.
    Outside of the call Triton's allocator is what it was."""

    def inside():
        triton.set_allocator(lambda size, _alignment, _stream: torch.empty(size, dtype=torch.int8, device=device))
        run()

    contextvars.copy_context().run(inside)


def launch_forward(
    q, k, v, plan: AttentionPlan, scale: float, tile: Tile | None = None, forward: str = "triton"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the forward kernel. q, k, v (B, T, heads, Dh), the heads of v of another width if need be; slices of a merged
    projection are walked as they lie.

    forward: which kernel, of FORWARDS; "specialised" and "gluon" have a tile of their own, whatever `tile` is.
    Returns: o, contiguous, and the rows' base-2 log-sum-exp, float32 (B, H, T)."""
    (q, k, v), plan = (_heads_in_order(x) for x in (q, k, v)), _walked(plan, q)
    if forward.startswith("gluon"):
        return attention_gluon.launch_forward(q, k, v, plan.first_key_BT, plan.query_order_N, scale)
    specialised = forward == "specialised"
    tile = SPECIALISED if specialised else tile or tile_of(TILES, "forward", q.dtype)
    B, T, H, _ = q.shape
    o, lse = q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, H, T, dtype=torch.float32)
    if specialised and not copies_in_bulk(q):  # a descriptor is made of it as well
        q = q.clone()
    walked = q, _operand(k, tile.columns, tile), _operand(v, tile.columns, tile)
    rest = o, lse, plan.first_key_BT, plan.query_order_N, scale * LOG2_E, T, triton.cdiv(T, SCHEDULE_TOKENS)
    grid, constants = _grid(q, tile.rows), _constants(q, k, v, tile)
    if specialised:
        _with_room(q.device, lambda: launch(_attention_forward_specialised, grid, *walked, *rest, **constants))
    else:
        launch(_attention_forward, grid, *walked, *rest, **constants)
    return o, lse


def launch_backward(
    do,
    q,
    k,
    v,
    o,
    lse,
    plan: AttentionPlan,
    scale: float,
    tile_dq: Tile | None = None,
    tile_dkdv: Tile | None = None,
    inputs: LayerInputs | None = None,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    backward: str = "triton",
):
    """Run the backward kernels; returns dq, dk, dv.

    q, k and v (B, T, heads, Dh); out: where dq, dk and dv go, laid out as q, k and k are: so slices of a merged
    projection are walked as they lie.
    inputs: the three are then the gradients at the layer's projections; returns also dve (or None) and ds (2,).

    backward: of which forward kernel's name; "gluon" has two passes of its own, "gluon_one_pass" one where results need
    not repeat, for heads of one width that is in FOR_HOPPER.

    But for that one there are two, and no atomics: dq is summed by the owner of the queries, dk and dv by the owner of
    the keys, each in a fixed order, so that two runs give the same bits. The price is that the logits are computed
    twice."""
    if backward.startswith("gluon") and q.shape[3] == v.shape[3] and q.shape[3] in FOR_HOPPER[backward]:
        return _launch_gluon(do, q, k, v, o, lse, plan, scale, inputs, out, in_one_pass(backward))
    tile_dq = tile_dq or tile_of(TILES, "dq", q.dtype)
    tile = tile_dkdv or tile_of(TILES, "dkdv", q.dtype)
    (do, v, o, lse), plan = (dense(x) for x in (do, v, o, lse)), _walked(plan, q)
    q, k, dq, dk, dv = _with_gradients(q, k, v, out)
    T = q.shape[1]
    chunks = triton.cdiv(T, SCHEDULE_TOKENS)
    delta = torch.empty_like(lse)
    rotary = (None, None) if inputs is None else (inputs.cos_TR, inputs.sin_TR)
    launch(
        _attention_dq,
        _grid(q, tile_dq.rows),
        q,
        _operand(k, tile_dq.columns, tile_dq),
        _operand(v, tile_dq.columns, tile_dq),
        o,
        do,
        lse,
        dq,
        delta,
        plan.first_key_BT,
        plan.query_order_N,
        None if inputs is None else inputs.rms_q,
        *rotary,
        scale,
        scale * LOG2_E,
        T,
        chunks,
        LAYER=inputs is not None,
        **_constants(q, k, v, tile_dq),
    )
    grid = _grid(k, tile.columns)
    dve, ds, of_values = None, None, (None,) * 5
    if inputs is not None:
        dve = None if inputs.ve is None else torch.empty_like(inputs.ve)
        ds = lse.new_empty(*grid, 2)
        of_values = (inputs.v, inputs.ve, inputs.s, dve, ds)
    launch(
        _attention_dkdv,
        grid,
        _operand(q, tile.rows, tile),
        k,
        v,
        _operand(do, tile.rows, tile),
        lse,
        delta,
        dk,
        dv,
        plan.end_query_BT,
        plan.key_order_N,
        None if inputs is None else inputs.rms_k,
        *rotary,
        *of_values,
        scale,
        scale * LOG2_E,
        T,
        chunks,
        LAYER=inputs is not None,
        HAS_VE=dve is not None,
        **_constants(q, k, v, tile),
    )
    return (dq, dk, dv) if inputs is None else (dq, dk, dv, dve, ds.sum(0))


def _with_gradients(q, k, v, out):
    """(q, k, dq, dk, dv) as backward kernels walk them: dense, or q and k as they lie where `out` lies alike."""
    if out is None:
        q, k = dense(q), dense(k)
        return q, k, torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    if [_heads_apart(x) for x in out] != [_heads_apart(x) for x in (q, k, k)]:
        raise ValueError("out must lie in memory as q, k and k do")
    return q, k, *out


def in_one_pass(impl: str) -> bool:
    """Whether the backward pass of that implementation takes one pass: gradients at queries are then summed in no fixed
    order, and where a run asks for results that repeat, it takes the two of "gluon"."""
    return impl == "gluon_one_pass" and not torch.are_deterministic_algorithms_enabled()


#: Rows of a program of the two kernels around the one pass, and its warps.
_ROWS_AROUND, _WARPS_AROUND = 32, 4


def launch_rows(o, do, lse) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-sum-exp and delta of each row, float32 (2, B, H, T in whole chunks), past the end infinity and 0; zeros,
    float32 (B, H, T, Dh)) from o and do, dense (B, T, H, Dh), and lse (B, H, T)."""
    B, T, H, width = o.shape
    rows = triton.cdiv(T, SCHEDULE_TOKENS) * SCHEDULE_TOKENS
    of_rows, sums = lse.new_empty(2, B, H, rows), lse.new_empty(B, H, T, width)
    constants = dict(HEADS=H, DH=width, DV=width, BM=_ROWS_AROUND, num_warps=_WARPS_AROUND)
    launch(_attention_rows, (B * (rows // _ROWS_AROUND) * H,), o, do, lse, of_rows, sums, T, rows, **constants)
    return of_rows, sums


def launch_dq_rounded(sums, q, dq, scale: float, inputs: LayerInputs | None = None) -> None:
    """dq from its sums without the logit scale, float32 (B, H, T, Dh); q and dq (B, T, H, Dh) lie alike."""
    B, H, T, width = sums.shape
    tiles = triton.cdiv(T, _ROWS_AROUND)
    layer = (None,) * 3 if inputs is None else (inputs.rms_q, inputs.cos_TR, inputs.sin_TR)
    constants = dict(HEADS=H, Q_APART=_heads_apart(dq), DH=width, BM=_ROWS_AROUND, num_warps=_WARPS_AROUND)
    grid, rest = (B * tiles * H,), (scale, T, tiles)
    launch(_attention_dq_rounded, grid, sums, q, dq, *layer, *rest, LAYER=inputs is not None, **constants)


def _launch_gluon(
    do, q, k, v, o, lse, plan: AttentionPlan, scale: float, inputs: LayerInputs | None, out, one_pass: bool
):
    """`launch_backward` by the kernels in Gluon: in two passes, or in one with what comes before it and after it."""
    (do, v, o, lse), plan = (dense(x) for x in (do, v, o, lse)), _walked(plan, q)
    q, k, dq, dk, dv = _with_gradients(q, k, v, out)
    of_gluon, sums = attention_gluon_backward, None
    if one_pass:
        rows, sums = launch_rows(o, do, lse)
    else:
        tables = plan.first_key_BT, plan.query_order_N
        rows = of_gluon.launch_dq(do, q, k, v, o, lse, dq, *tables, scale, _heads_apart(dq), inputs)
    dve = None if inputs is None or inputs.ve is None else torch.empty_like(inputs.ve)
    given = do, q, k, v, rows, sums, dk, dv, plan.end_query_BT, plan.key_order_N
    ds = of_gluon.launch_backward(*given, scale, _heads_apart(dk), inputs, dve)
    if one_pass:
        launch_dq_rounded(sums, q, dq, scale, inputs)
    return (dq, dk, dv) if inputs is None else (dq, dk, dv, dve, ds)


# ---- torch operators --------------------------------------------------------------------------------------


@torch.library.custom_op("speedrun::attention", mutates_args=())
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_key_BT: torch.Tensor,
    end_query_BT: torch.Tensor,
    query_order_N: torch.Tensor,
    key_order_N: torch.Tensor,
    scale: float,
    forward: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    plan = AttentionPlan(first_key_BT, end_query_BT, query_order_N, key_order_N)
    return launch_forward(q, k, v, plan, scale, forward=forward)


@torch.library.custom_op("speedrun::attention_backward", mutates_args=())
def _attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    first_key_BT: torch.Tensor,
    end_query_BT: torch.Tensor,
    query_order_N: torch.Tensor,
    key_order_N: torch.Tensor,
    scale: float,
    backward: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    plan = AttentionPlan(first_key_BT, end_query_BT, query_order_N, key_order_N)
    return launch_backward(do, q, k, v, o, lse, plan, scale, backward=backward)


@_attention.register_fake
def _(q, k, v, first_key_BT, end_query_BT, query_order_N, key_order_N, scale, forward):
    B, T, H, _ = q.shape
    return q.new_empty(B, T, H, v.shape[3]), q.new_empty(B, H, T, dtype=torch.float32)


@_attention_backward.register_fake
def _(do, q, k, v, o, lse, first_key_BT, end_query_BT, query_order_N, key_order_N, scale, backward):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _attention_setup(ctx, inputs, output):
    q, k, v, *plan, ctx.scale, ctx.chosen = inputs
    ctx.save_for_backward(q, k, v, *output, *plan)
    ctx.mark_non_differentiable(output[1])


@differentiable_once("attention")
def _attention_grad(ctx, do, _dlse):
    q, k, v, o, lse, *plan = ctx.saved_tensors
    grads = _attention_backward(do, q, k, v, o, lse, *plan, ctx.scale, ctx.chosen)
    return *grads, *[None] * 6


_attention.register_autograd(_attention_grad, setup_context=_attention_setup)


# ---- public functions -------------------------------------------------------------------------------------


def implementation(impl: str, tensor: torch.Tensor) -> str:
    """Name of what `attention(..., impl=impl)` runs on this tensor's device; the training log prints it.

    Raises: ValueError for what cannot run there."""
    if impl not in FOR_HOPPER:
        return implementation_of(impl, tensor, cpu="banded", choices=IMPLEMENTATIONS)
    in_gluon = impl.startswith("gluon")
    if in_gluon and tensor.device.type == "cpu":
        raise ValueError(
            f"impl='{impl}' needs a GPU: Triton's interpreter cannot run Gluon; choose 'banded' or 'triton'"
        )
    implementation_of("triton", tensor, cpu="banded", choices=IMPLEMENTATIONS)  # what that needs, these need too
    if tensor.device.type == "cuda" and (device_kind() != "sm_90" or tensor.dtype.itemsize != 2):
        raise ValueError(
            f"impl='{impl}' is for 16 bits on Hopper (sm_90), not for {tensor.dtype} on {device_kind()}; "
            "choose 'triton'"
        )
    if in_gluon and not HAVE_GLUON:
        raise ValueError(f"impl='{impl}' needs triton 3.6 or newer, whose Gluon it is written in; choose 'triton'")
    return impl


def check_forward(impl: str, width: int) -> None:
    """Raise ValueError if a forward kernel that was asked for by name is not to be had at that head width."""
    if width not in FOR_HOPPER.get(impl, (width,)):
        widths = " and ".join(map(str, FOR_HOPPER[impl]))
        raise ValueError(f"impl='{impl}' is for head widths of {widths}, not {width}; choose 'triton'")


@without_autocast
def attention(
    q_BTHDh: torch.Tensor,
    k_BTKDh: torch.Tensor,
    v_BTKDh: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    impl: str = "auto",
) -> torch.Tensor:
    """Attention of packed documents, differentiable in q, k and v.

    Args:
        q_BTHDh: (B, T, H, Dh) or (T, H, Dh); float32, float16, bfloat16 (and float64 off the GPU).
        k_BTKDh, v_BTKDh: the same with K key heads; query head h reads key head h // (H // K). The heads of v may be
            wider than those of q and k, which are then filled up with zeros: in Triton's kernels to a power of two (a
            width of 64 stays 64 beside values of 128, 96 costs as much as 128), on a CPU to the width of v.
        plan: of `attention_plan`, for the same B and T and on the same device.
        scale: factor on the logits q . k.
        impl: "auto" is "triton" on a GPU and "banded" on a CPU; "flex" and "reference" can be chosen, and
            on Hopper in 16 bits "specialised", the forward kernel of specialised warps, with the same gradients, and
            "gluon", that of kernels/attention_gluon.py, with gradients of its own, "gluon_one_pass" with these in one
            pass. None has run on a GPU yet; `python -m bench.gpu first` compares them with "triton" there.

    Returns: o, with the shape (but v's width), dtype and device of q.
    Raises: ValueError or TypeError naming the argument.
    """
    chosen = implementation(impl, q_BTHDh)
    q, k, v = (with_batch(n, x) for n, x in (("q", q_BTHDh), ("k", k_BTKDh), ("v", v_BTKDh)))
    _check_attention(q, k, v, plan, scale)
    shape = *q_BTHDh.shape[:-1], v.shape[3]
    if q.shape[3] < v.shape[3] and chosen not in ("reference", "flex"):
        chosen = "triton" if chosen in FOR_HOPPER else chosen  # theirs are heads of one width
        width = width_taken(q.shape[3]) if chosen == "triton" else v.shape[3]
        q, k = (F.pad(x, (0, width - q.shape[3])) for x in (q, k))  # zeros change no logit
    if chosen == "reference":
        o = attention_reference(q, k, v, plan, scale=scale)
    elif chosen == "flex":
        o = _flex(q, k, v, plan, scale)
    elif chosen == "banded" and plan.band_mask is not None and q.dtype == torch.float32 and q.shape == k.shape:
        o = chunked_attention(q, k, v, plan.band_mask, float(scale))
    elif chosen == "banded":
        o = banded_attention(q, k, v, plan.first_key_BT, float(scale))
    else:
        check_width(q)
        check_width(v)
        refuse_tangents("attention", q, k, v)
        o, _ = _attention(dense(q), dense(k), dense(v), *plan[:4], float(scale), chosen)
    return o.reshape(shape)


def width_taken(width: int) -> int:
    """The width that Triton's kernels take queries and keys of this one as, where values are wider."""
    return max(16, triton.next_power_of_2(width))


def check_scale(scale: float) -> None:
    """Raise TypeError or ValueError unless the factor on the logits is a positive number."""
    if isinstance(scale, torch.Tensor):
        raise TypeError("scale must be a number: a tensor would get no gradient. To learn it, multiply q by it")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")


def _check_attention(q, k, v, plan, scale) -> None:
    """Raise an error that names the first argument that does not fit."""
    B, T, H, Dh = q.shape
    check_scale(scale)
    if q.numel() == 0:
        raise ValueError(f"q is empty: {tuple(q.shape)}")
    expect_floats("q", q)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype} but q has {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}")
        width = max(Dh, x.shape[3]) if name == "v" else Dh
        if x.shape[:2] != (B, T) or x.shape[3] != width or x.shape[:3] != k.shape[:3]:
            raise ValueError(
                f"{name} has shape {tuple(x.shape)}; with q {tuple(q.shape)} it must be ({B}, {T}, key heads, "
                f"{Dh}{' or more' if name == 'v' else ''}), with as many heads for k and v"
            )
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, which does not divide the {H} heads of q")
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"plan must come from attention_plan, got {type(plan).__name__}")
    if tuple(plan.first_key_BT.shape) != (B, T):
        raise ValueError(f"plan is for (B, T) = {tuple(plan.first_key_BT.shape)} but q has ({B}, {T})")
    check_plan(plan, q)
