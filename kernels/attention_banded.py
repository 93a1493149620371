"""Attention on a CPU: chunks of queries against bands of keys, in proportion to T x window, never T x T.

Two ways through the same arithmetic, both on torch's fused CPU attention:

- `chunked_attention`, in eager float32 training: every chunk's band is padded to the widest one, and all of them are
  one batch. Few, large operations; the additive mask is made once a plan and shared by its layers.
- `banded_attention`, a custom operator for everything else (compiled graphs, grouped heads, other dtypes, masks too
  large to keep): a loop over chunks, each with exactly its own band.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.guards import dense, differentiable_once, refuse_tangents

#: Queries of one chunk in the batch, and of one turn of the loop.
CHUNK_TOKENS, LOOP_TOKENS = 64, 128
#: A plan keeps its mask while that is no larger than this.
MASK_BYTES = 64 << 20
_MASKED = -1e30  # finite, so that a row that is all masked makes no NaN; exp(_MASKED - score) is 0


def _without_weights(o: torch.Tensor, lse: torch.Tensor, masked: float) -> torch.Tensor:
    """o, with NaN in place of rows whose logits are all -inf, as in the definition; o (..., Dh), lse (...).

    A finite mask is above those: the row would be the mean of what it must not see. A mask of float16's least number
    is not told from logits."""
    if masked == _MASKED and bool((lse < _MASKED / 2).any()):
        o = o.masked_fill((lse < _MASKED / 2)[..., None], torch.nan)
    return o


def band_mask(first_key_BT: torch.Tensor) -> torch.Tensor | None:
    """Additive float32 mask (B * chunks, 1, CHUNK_TOKENS, band) of a plan on the CPU, or None if it would be large.

    The band of a chunk ends with the chunk and has a whole number of chunks. Reads first_key, so it cannot be part of
    a compiled graph."""
    B, T = first_key_BT.shape
    C, chunks = CHUNK_TOKENS, -(-T // CHUNK_TOKENS)
    start = torch.arange(chunks) * C
    reach = int((start - first_key_BT[:, ::C]).max())
    band = C * (1 + -(-max(reach, 0) // C))
    if B * chunks * C * band * 4 > MASK_BYTES:
        return None
    first = F.pad(first_key_BT, (0, chunks * C - T)).view(B, chunks, C, 1)
    key = (start[:, None] + torch.arange(C - band, C)).view(1, chunks, 1, band)
    query = torch.arange(chunks * C).view(1, chunks, C, 1)
    hidden = (key > query) | (key < first)
    return torch.zeros(B, chunks, C, band).masked_fill_(hidden, _MASKED).flatten(0, 1)[:, None]


class _Chunked(torch.autograd.Function):
    """All chunks as one batch; the gradient of a key is summed over the bands that hold it in a fixed order."""

    @staticmethod
    def forward(ctx, q, k, v, mask, scale):
        B, T, _, _ = q.shape
        queries, keys, values = _chunks(q, 0), _chunks(k, mask.size(-1)), _chunks(v, mask.size(-1))
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=mask, scale=scale
        )
        o = _without_weights(o, lse, _MASKED)
        ctx.save_for_backward(queries, keys, values, mask, o, lse)
        ctx.scale, ctx.shape = scale, (B, T)
        return _together(o, B, T)

    @staticmethod
    @differentiable_once("attention")
    def backward(ctx, do):
        queries, keys, values, mask, o, lse = ctx.saved_tensors
        B, T = ctx.shape
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _chunks(do, 0), queries, keys, values, o, lse, 0.0, False, attn_mask=mask, scale=ctx.scale
        )
        return _together(dq, B, T), _folded(dk, B, T), _folded(dv, B, T), None, None


def _chunks(x_BTHDh: torch.Tensor, band: int) -> torch.Tensor:
    """(B * chunks, H, tokens, Dh): each chunk, or the `band` tokens that end with it (zeros before the start)."""
    x_BTHDh = dense(x_BTHDh)  # torch's kernel takes the last axis to be dense, and does not look
    T, C, before = x_BTHDh.size(1), CHUNK_TOKENS, max(band - CHUNK_TOKENS, 0)
    if before or T % C:
        x_BTHDh = F.pad(x_BTHDh, (0, 0, 0, 0, before, -T % C))
    # turned before it is flattened, which may copy: a copy has a dense last axis
    return x_BTHDh.unfold(1, before + C, C).transpose(3, 4).flatten(0, 1)


def _together(x: torch.Tensor, B: int, T: int) -> torch.Tensor:
    """(B, T, H, Dh) from chunks (B * chunks, H, C, Dh)."""
    return x.transpose(1, 2).reshape(B, -1, *x.shape[1::2])[:, :T]


def _folded(x: torch.Tensor, B: int, T: int) -> torch.Tensor:
    """(B, T, H, Dh), each token summed over the bands that hold it, from (B * chunks, H, band, Dh)."""
    pieces = x.view(B, -1, x.size(1), x.size(2) // CHUNK_TOKENS, CHUNK_TOKENS, x.size(3))
    last = pieces.size(3) - 1
    total = pieces[:, :, :, last]
    if last:
        total = total.clone()
    for back in range(1, last + 1):  # the chunk that is `back` before the band's own
        total[:, :-back] += pieces[:, back:, :, last - back]
    return _together(total.flatten(0, 1), B, T)


def chunked_attention(q, k, v, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of (B, T, H, Dh) float32 tensors on the CPU under the mask of `band_mask`."""
    return _Chunked.apply(q, k, v, mask, scale)


def _bands(first_key_BT: torch.Tensor, dtype: torch.dtype):
    """Yield (sequence, first query, end query, first key, additive mask) for each chunk of queries."""
    T = first_key_BT.shape[1]
    position = torch.arange(T)
    masked = max(_MASKED, torch.finfo(dtype).min)
    oldest = first_key_BT[:, ::LOOP_TOKENS].tolist()
    for b, row in enumerate(oldest):
        for start, low in zip(range(0, T, LOOP_TOKENS), row):
            end = min(start + LOOP_TOKENS, T)
            keys, queries = position[low:end], position[start:end, None]
            hidden = (keys > queries) | (keys < first_key_BT[b, start:end, None])
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, masked)
            yield b, start, end, low, mask[None, None]


def _cpu_operator(function):
    """The function as torch's operator speedrun::<its name> on the CPU. Not by `torch.library.custom_op`: where that
    first runs it imports torch's compiler, which eager training does not need, 1.6 s of every process."""
    name = f"speedrun::{function.__name__.lstrip('_')}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "cpu", function)
    return getattr(torch.ops.speedrun, function.__name__.lstrip("_"))


@_cpu_operator
def _banded_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_key_BT: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each chunk of queries against its own band of keys: time in proportion to T x window, nothing T x T."""
    q, k, v, first_key_BT = (dense(x) for x in (q, k, v, first_key_BT))
    B, T, H, _ = q.shape
    group = H // k.shape[2]
    o = torch.empty_like(q)
    lse = torch.empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))
    for b, start, end, low, mask in _bands(first_key_BT, q.dtype):
        q_c, k_c, v_c = _band_views(q, k, v, b, start, end, low, group)
        o_c, lse_c = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q_c, k_c, v_c, attn_mask=mask, scale=scale
        )
        o_c = _without_weights(o_c, lse_c, max(_MASKED, torch.finfo(q.dtype).min))
        o[b, start:end] = o_c[0].transpose(0, 1)
        lse[b, :, start:end] = lse_c[0]
    return o, lse


def _band_views(q, k, v, b, start, end, low, group):
    """(1, H, queries or keys, Dh) views of one chunk; key heads repeated for their group of query heads."""
    q_c, k_c, v_c = (x[b, s:end].transpose(0, 1)[None] for x, s in ((q, start), (k, low), (v, low)))
    if group > 1:
        k_c, v_c = (x.repeat_interleave(group, dim=1) for x in (k_c, v_c))
    return q_c, k_c, v_c


@_cpu_operator
def _banded_attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    first_key_BT: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `_banded_attention`; sums over chunks in float32 and in a fixed order, so the bits repeat."""
    do, q, k, v, o, lse = (dense(x) for x in (do, q, k, v, o, lse))
    group, K = q.shape[2] // k.shape[2], k.shape[2]
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros(x.shape, dtype=lse.dtype) for x in (k, v))
    for b, start, end, low, mask in _bands(first_key_BT, q.dtype):
        q_c, k_c, v_c = _band_views(q, k, v, b, start, end, low, group)
        o_c, do_c = (x[b, start:end].transpose(0, 1)[None] for x in (o, do))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do_c, q_c, k_c, v_c, o_c, lse[b : b + 1, :, start:end], 0.0, False, attn_mask=mask, scale=scale
        )
        dq[b, start:end] = grads[0][0].transpose(0, 1)
        for total, part in ((dk, grads[1]), (dv, grads[2])):
            total[b, low:end] += part[0].unflatten(0, (K, group)).sum(1).transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@torch.library.register_fake("speedrun::banded_attention")
def _(q, k, v, first_key_BT, scale):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.promote_types(q.dtype, torch.float32))


@torch.library.register_fake("speedrun::banded_attention_backward")
def _(do, q, k, v, o, lse, first_key_BT, scale):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _banded_setup(ctx, inputs, output):
    q, k, v, first_key_BT, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, first_key_BT)
    ctx.mark_non_differentiable(output[1])


@differentiable_once("attention")
def _banded_grad(ctx, do, _dlse):
    q, k, v, o, lse, first_key_BT = ctx.saved_tensors
    return *_banded_attention_backward(do, q, k, v, o, lse, first_key_BT, ctx.scale), None, None


torch.library.register_autograd("speedrun::banded_attention", _banded_grad, setup_context=_banded_setup)


def banded_attention(q, k, v, first_key_BT: torch.Tensor, scale: float) -> torch.Tensor:
    """Attention of (B, T, H, Dh) and (B, T, K, Dh) tensors on the CPU, any dtype; differentiable."""
    refuse_tangents("attention", q, k, v)
    o, _ = _banded_attention(q, k, v, first_key_BT, scale)
    return o
