"""Attention over packed documents under a growing causal window, and the prologue that feeds it.

    o_i = sum_j softmax_j(scale * q_i . k_j) v_j   over the keys j with first_key[i] <= j <= i

Every mask of the trainer is the one integer first_key[i]. SPEC's window, counted in 128-token blocks with its
rules for partial and full blocks, collapses to it: query i of block b sees j >= max(start of its document,
128 * (b - max(W, 1) + 1)). For if block b lies in one document, its allowed blocks are the diagonal one
(partial), n full ones and at most one partial one beyond them, and the two counts together keep the nearest
max(W, 1); if block b spans documents, none is full, and the nearest max(W, 1) partial ones stay.
tests/kernels/test_attention_masks.py compares the two pair by pair. first_key never decreases, so the queries
that see key j are j .. end_query[j] - 1, and a tile's range of keys is read off its first and last rows.

Shapes: B packed sequences, T tokens, H query heads, K key heads (H a multiple of K), Dh head width, R = Dh/2.
Work, for P allowed pairs: 4*P*Dh FLOPs a head forward, 10*P*Dh backward. Bytes: q, k, v, o once each, and one
float32 logarithm a row and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels.runtime import implementation_of

#: Tokens of one entry of the schedules in a plan. Every query and key tile divides it or is a multiple of it.
SCHEDULE_TOKENS = 128
IMPLEMENTATIONS = ("triton", "banded", "flex", "reference")
_MASKED = -1e30  # finite, so that a tile whose rows are all masked makes no NaN; exp(_MASKED - score) is 0


class AttentionPlan(NamedTuple):
    """Which keys each query sees, for every layer that shares a window. All on the device of the tokens.

    first_key_BT: int32; query i sees the keys first_key[i] .. i. Never decreases along T.
    end_query_BT: int32; key j is seen by the queries j .. end_query[j] - 1. Never decreases along T.
    query_order_N, key_order_N: int32; the 128-token chunks (chunk c of sequence b is b * ceil(T/128) + c) by
        falling work, for tiles of queries and of keys: the last programs to start are short.
    """

    first_key_BT: torch.Tensor
    end_query_BT: torch.Tensor
    query_order_N: torch.Tensor
    key_order_N: torch.Tensor


def implementation(impl: str, tensor: torch.Tensor) -> str:
    """Name of what `attention(..., impl=impl)` runs on this tensor's device; the training log prints it."""
    return implementation_of(impl, tensor, cpu="banded", choices=IMPLEMENTATIONS)


# ---- plan --------------------------------------------------------------------------------------------------


def attention_plan(
    tokens_BT: torch.Tensor | None = None,
    *,
    document_starts: Sequence[int] | torch.Tensor | None = None,
    length: int | None = None,
    eos_id: int = 50256,
    window_blocks: int | torch.Tensor | None = None,
    window_tokens: int | torch.Tensor | None = None,
    block_tokens: int = 128,
) -> AttentionPlan:
    """Work out which keys each query sees, on the tokens' device and without a host synchronisation.

    Args:
        tokens_BT: token ids, (T,) or (B, T). `eos_id` opens a document and belongs to it.
        document_starts: instead of tokens: increasing positions at which a document opens in one sequence of
            `length` tokens. Tokens before the first one form a document of their own.
        length: T, when no tokens are given. Without documents the whole sequence is one.
        window_blocks: SPEC's W: a query sees its own block of `block_tokens` and W - 1 earlier ones. 0 (what
            SPEC's W // 2 may be) keeps the diagonal block, as 1 does. An int or a 0-d integer tensor; under
            torch.compile give a tensor, so that a growing window is data and never recompiles.
        window_tokens: instead: a query sees itself and `window_tokens` - 1 tokens before it. Neither: causal.

    Raises:
        ValueError, TypeError: naming the argument. A window inside a GPU tensor is not read (that would wait
            for the device): values below one act as one.
    """
    if window_blocks is not None and window_tokens is not None:
        raise ValueError("window_blocks and window_tokens exclude each other: give one")
    opens_BT, device = _document_openings(tokens_BT, document_starts, length, eos_id)
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
    return AttentionPlan(
        first_key_BT.to(torch.int32),
        end_query_BT.to(torch.int32),
        query_work.flatten().argsort(descending=True, stable=True).to(torch.int32),
        key_work.flatten().argsort(descending=True, stable=True).to(torch.int32),
    )


def _document_openings(tokens_BT, document_starts, length, eos_id) -> tuple[torch.Tensor, torch.device]:
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
        return (tokens_BT == eos_id).reshape(-1, tokens_BT.shape[-1]), tokens_BT.device
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"length must be a positive int when no tokens_BT are given, got {length!r}")
    if document_starts is None:
        return torch.zeros(1, length, dtype=torch.bool), torch.device("cpu")
    starts = torch.as_tensor(document_starts)
    if starts.ndim != 1 or starts.is_floating_point():
        raise ValueError(f"document_starts must be a flat list of integers, got shape {tuple(starts.shape)} "
                         f"of {starts.dtype}")
    sound = (starts[1:] > starts[:-1]).all() & (starts >= 0).all() & (starts < length).all()
    if starts.device.type == "cpu" and not torch.compiler.is_compiling():
        if not bool(sound):
            raise ValueError("document_starts must increase and lie in 0 .. length - 1; "
                             f"got {starts.tolist()[:8]}... for length={length}")
    else:
        torch._assert_async(sound, "document_starts must increase and lie in 0 .. length - 1")
    opens = torch.zeros(length, dtype=torch.bool, device=starts.device)
    return opens.index_fill(0, starts.long(), True)[None], starts.device


def _window(name: str, window: int | torch.Tensor, least: int) -> int | torch.Tensor:
    """The window as a number of at least one; what the host can read without waiting is checked."""
    if isinstance(window, torch.Tensor):
        if window.numel() != 1 or window.is_floating_point():
            raise TypeError(f"{name} must be an int or a tensor of one integer, got {tuple(window.shape)} "
                            f"of {window.dtype}")
        if window.device.type == "cpu" and not torch.compiler.is_compiling() and int(window) < least:
            raise ValueError(f"{name} must be at least {least}, got {int(window)}")
        return window.reshape(()).clamp(min=1)
    if isinstance(window, bool) or not isinstance(window, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int or a tensor of one integer, got {window!r}")
    if window < least:
        raise ValueError(f"{name} must be at least {least}, got {window}")
    return torch.sym_max(window, 1)


# ---- references --------------------------------------------------------------------------------------------


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


def attention_inputs_reference(q, k, v, ve, s, cos_TR, sin_TR):
    """The prologue of `attention_inputs`, in plain torch."""
    def rotate(x):
        c, d = cos_TR[:, None], sin_TR[:, None]
        x1, x2 = F.rms_norm(x, x.shape[-1:]).chunk(2, dim=-1)
        return torch.cat((x1 * c + x2 * d, x2 * c - x1 * d), dim=-1).to(x.dtype)

    mixed = s[0].to(v.dtype) * F.rms_norm(v, v.shape[-1:])
    if ve is not None:
        mixed = mixed + s[1].to(v.dtype) * ve
    return rotate(q), rotate(k), mixed


# ---- banded: the CPU's path --------------------------------------------------------------------------------


def _bands(first_key_BT: torch.Tensor, dtype: torch.dtype):
    """Yield (sequence, first query, end query, first key, additive mask) for each chunk of queries."""
    T = first_key_BT.shape[1]
    position = torch.arange(T)
    masked = max(_MASKED, torch.finfo(dtype).min)
    oldest = first_key_BT[:, ::SCHEDULE_TOKENS].tolist()
    for b, row in enumerate(oldest):
        for start, low in zip(range(0, T, SCHEDULE_TOKENS), row):
            end = min(start + SCHEDULE_TOKENS, T)
            keys, queries = position[low:end], position[start:end, None]
            hidden = (keys > queries) | (keys < first_key_BT[b, start:end, None])
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, masked)
            yield b, start, end, low, mask[None, None]


@torch.library.custom_op("speedrun::banded_attention", mutates_args=(), device_types="cpu")
def _banded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_key_BT: torch.Tensor,
            scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Each chunk of queries against its own band of keys: time in proportion to T x window, nothing T x T."""
    B, T, H, _ = q.shape
    group = H // k.shape[2]
    o = torch.empty_like(q)
    lse = torch.empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))
    for b, start, end, low, mask in _bands(first_key_BT, q.dtype):
        q_c, k_c, v_c = _band_views(q, k, v, b, start, end, low, group)
        o_c, lse_c = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q_c, k_c, v_c, attn_mask=mask,
                                                                                scale=scale)
        o[b, start:end] = o_c[0].transpose(0, 1)
        lse[b, :, start:end] = lse_c[0]
    return o, lse


def _band_views(q, k, v, b, start, end, low, group):
    """(1, H, queries or keys, Dh) views of one chunk; key heads repeated for their group of query heads."""
    q_c, k_c, v_c = (x[b, s:end].transpose(0, 1)[None] for x, s in ((q, start), (k, low), (v, low)))
    if group > 1:
        k_c, v_c = (x.repeat_interleave(group, dim=1) for x in (k_c, v_c))
    return q_c, k_c, v_c


@torch.library.custom_op("speedrun::banded_attention_backward", mutates_args=(), device_types="cpu")
def _banded_backward(do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor,
                     lse: torch.Tensor, first_key_BT: torch.Tensor,
                     scale: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `_banded`; sums over chunks in float32 and in a fixed order, so the bits repeat."""
    group, K = q.shape[2] // k.shape[2], k.shape[2]
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype) for x in (k, v))
    for b, start, end, low, mask in _bands(first_key_BT, q.dtype):
        q_c, k_c, v_c = _band_views(q, k, v, b, start, end, low, group)
        o_c, do_c = (x[b, start:end].transpose(0, 1)[None] for x in (o, do))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do_c, q_c, k_c, v_c, o_c, lse[b:b + 1, :, start:end], 0.0, False, attn_mask=mask, scale=scale)
        dq[b, start:end] = grads[0][0].transpose(0, 1)
        for total, part in ((dk, grads[1]), (dv, grads[2])):
            total[b, low:end] += part[0].unflatten(0, (K, group)).sum(1).transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_banded.register_fake
def _(q, k, v, first_key_BT, scale):
    B, T, H, _ = q.shape
    return torch.empty_like(q), q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))


@_banded_backward.register_fake
def _(do, q, k, v, o, lse, first_key_BT, scale):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _banded_setup(ctx, inputs, output):
    q, k, v, first_key_BT, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, first_key_BT)
    ctx.mark_non_differentiable(output[1])


def _banded_grad(ctx, do, _dlse):
    q, k, v, o, lse, first_key_BT = ctx.saved_tensors
    return *_banded_backward(do.contiguous(), q, k, v, o, lse, first_key_BT, ctx.scale), None, None


_banded.register_autograd(_banded_grad, setup_context=_banded_setup)


# ---- FlexAttention -----------------------------------------------------------------------------------------


def _flex(q, k, v, plan, scale):
    """torch's FlexAttention on the same plan: what the fused kernel is measured against."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    block, T = SCHEDULE_TOKENS, q.shape[1]
    first_BT = plan.first_key_BT

    def may_see(b, h, i, j):
        return (j <= i) & (j >= first_BT[b, i])

    start = torch.arange(0, T, block, device=q.device)
    last = (start + block - 1).clamp(max=T - 1)
    query, key = start[:, None], start[None, :]
    visited = (key <= query) & (key + block > first_BT[:, start, None])
    full = visited & (key < query) & (key >= first_BT[:, last, None])

    def ordered(chosen):
        chosen = chosen[:, None].int()
        return (chosen.sum(-1).int().contiguous(),
                chosen.argsort(dim=-1, descending=True, stable=True).int().contiguous())

    mask = BlockMask.from_kv_blocks(*ordered(visited & ~full), *ordered(full), BLOCK_SIZE=block,
                                    mask_mod=may_see, seq_lengths=(T, T))
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


# ---- public functions --------------------------------------------------------------------------------------


def attention(q_BTHDh: torch.Tensor, k_BTKDh: torch.Tensor, v_BTKDh: torch.Tensor, plan: AttentionPlan, *,
              scale: float, impl: str = "auto") -> torch.Tensor:
    """Attention of packed documents, differentiable in q, k and v.

    Args:
        q_BTHDh: (B, T, H, Dh) or (T, H, Dh); float32, float16, bfloat16 (and float64 off the GPU).
        k_BTKDh, v_BTKDh: the same with K key heads; query head h reads key head h // (H // K).
        plan: of `attention_plan`, for the same B and T and on the same device.
        scale: factor on the logits q . k.
        impl: "auto" is "triton" on a GPU and "banded" on a CPU; "flex" and "reference" can be chosen.

    Returns: o, with the shape, dtype and device of q.
    Raises: ValueError or TypeError naming the argument.
    """
    chosen = implementation(impl, q_BTHDh)
    q, k, v = (_with_batch(n, x) for n, x in (("q", q_BTHDh), ("k", k_BTKDh), ("v", v_BTKDh)))
    _check_attention(q, k, v, plan)
    if chosen == "reference":
        o = attention_reference(q, k, v, plan, scale=scale)
    elif chosen == "flex":
        o = _flex(q, k, v, plan, scale)
    elif chosen == "banded":
        o, _ = _banded(q, k, v, plan.first_key_BT, float(scale))
    else:
        raise NotImplementedError("the Triton kernel is being written")
    return o.reshape(q_BTHDh.shape)


def _with_batch(name: str, x: torch.Tensor) -> torch.Tensor:
    """x as (B, T, heads, Dh)."""
    if not isinstance(x, torch.Tensor) or x.ndim not in (3, 4):
        raise ValueError(f"{name} must be a (T, heads, Dh) or (B, T, heads, Dh) tensor, got "
                         f"{tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__}")
    return x[None] if x.ndim == 3 else x


def _check_attention(q, k, v, plan) -> None:
    """Raise an error that names the first argument that does not fit."""
    B, T, H, Dh = q.shape
    if q.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"q has dtype {q.dtype}; float32, float16 and bfloat16 are supported")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name} has dtype {x.dtype} but q has {q.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}")
        if (x.shape[0], x.shape[1], x.shape[3]) != (B, T, Dh) or x.shape != k.shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; with q {tuple(q.shape)} it must be "
                             f"({B}, {T}, key heads, {Dh}), the same for k and v")
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads, which does not divide the {H} heads of q")
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"plan must come from attention_plan, got {type(plan).__name__}")
    if tuple(plan.first_key_BT.shape) != (B, T):
        raise ValueError(f"plan is for (B, T) = {tuple(plan.first_key_BT.shape)} but q has ({B}, {T})")
    if plan.first_key_BT.device != q.device:
        raise ValueError(f"plan is on {plan.first_key_BT.device} but q is on {q.device}")


def attention_inputs(q, k, v, ve, s, cos_TR, sin_TR, *, impl: str = "auto"):
    """What stands between the projections and attention, differentiable in q, k, v, ve and s.

        q, k <- rotary(norm(q)), rotary(norm(k));   v <- s[0] * norm(v) + s[1] * ve

    norm is the RMS norm over a head without a gain; rotary is half split: (x1 cos + x2 sin, x2 cos - x1 sin).

    Args:
        q: (B, T, H, Dh) or (T, H, Dh). k, v, ve: the same with K heads; ve None means v <- s[0] * norm(v).
        s: float32 (2,). cos_TR, sin_TR: float32 (T, Dh / 2).
        impl: as in `attention`; every plain-torch name means the reference.

    Returns: (q, k, v) in the inputs' shapes and dtype.
    Raises: ValueError or TypeError naming the argument.
    """
    chosen = implementation(impl, q)
    _check_inputs(q, k, v, ve, s, cos_TR, sin_TR)
    if chosen != "triton":
        return attention_inputs_reference(q, k, v, ve, s, cos_TR, sin_TR)
    raise NotImplementedError("the Triton kernel is being written")


def _check_inputs(q, k, v, ve, s, cos_TR, sin_TR) -> None:
    """Raise an error that names the first argument that does not fit."""
    for name, x in (("q", q), ("k", k), ("v", v), ("ve", ve)):
        if x is None and name == "ve":
            continue
        _with_batch(name, x)
        if x.dtype != q.dtype or x.device != q.device:
            raise TypeError(f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}")
        wanted = (*q.shape[:-2], q.shape[-2] if name == "q" else k.shape[-2], q.shape[-1])
        if tuple(x.shape) != wanted:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {wanted}")
    if q.shape[-1] % 2:
        raise ValueError(f"q has head width {q.shape[-1]}; rotary needs an even one")
    for name, x in (("cos_TR", cos_TR), ("sin_TR", sin_TR)):
        if tuple(x.shape) != (q.shape[-3], q.shape[-1] // 2):
            raise ValueError(f"{name} has shape {tuple(x.shape)}, expected {(q.shape[-3], q.shape[-1] // 2)}")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}")
    if tuple(s.shape) != (2,) or s.device != q.device:
        raise ValueError(f"s must have shape (2,) and be on {q.device}, got {tuple(s.shape)} on {s.device}")
