"""Attention's forward kernel for Hopper, in Gluon, as FlashAttention-3 is built (Shah et al. 2024, arXiv:2407.08608).

It computes what `_attention_forward` of kernels/attention.py does, which is its definition and which runs in Triton's
interpreter; this one has not run on a GPU yet and is chosen by name only.

A program owns 128 queries of one head. One warp loads; two groups of four warps multiply, 64 queries each:

    loader    queries once, then tile after tile of 128 keys and values into rings of STAGES buffers, as they get free
    group g   waits for a buffer, multiplies from it, says that it is free; the groups meet nowhere else, but in full
              tiles they take turns, so that one takes exponentials while the tensor cores work for the other

Tiles of keys go back from the one before the queries' own: tile t has the keys row - 128 (t + 1) ...; the queries' own
keys come last. For each group the first `full` tiles are allowed in every pair, and nothing is masked there. The
product of the logits of one tile is issued together with the values' product of the tile before, whose softmax is done:
so the softmax of a tile and a product always go on side by side. What is left, where a document or the window begins
and on the diagonal, is walked in halves of 64 keys with a mask, and halves without an allowed pair are left out.

Shared memory at width 128: queries 32 KiB, two buffers each of keys and values 128 KiB. Registers: 240 for those who
multiply, 24 for the loader. What the loops ask of the schedulers is counted in docs/slots.md, beside the plain kernel.
"""

from __future__ import annotations

import torch

from kernels.gluon import (
    descriptor,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from kernels.guards import dense, launch
from kernels.runtime import LOG2_E

#: Queries of a group; keys of a half tile.
HALF = 64
#: Queries of a program; keys of a tile. An entry of the plan's order is as long.
TILE = 2 * HALF
STAGES = 2
#: Head widths that it is made for.
WIDTHS = (64, 128)


# ---- Gluon ------------------------------------------------------------------------------------------------
# Prefixes as in kernels/attention.py: p_ pointer, o_ offset, b_ block of values; d_ tensor descriptor.


@gluon.jit
def _before(key, row, TILE: gl.constexpr):
    """Whole tiles between the key and the queries that begin at `row`."""
    return max(row - key, 0) // TILE


@gluon.jit
def _tile_key(t, tiles, row, TILE: gl.constexpr):
    """First key of the t-th tile: the `tiles` before the queries, nearest first, then the queries' own."""
    return gl.where(t < tiles, row - (t + 1) * TILE, row)


@gluon.jit
def _half_is_seen(key, oldest, first_row, HALF: gl.constexpr):
    """Whether one of the queries first_row .. first_row + HALF - 1 sees a key of key .. key + HALF - 1, both multiples
    of HALF; `oldest`: what the first of the queries sees from on."""
    return (key <= first_row) & (key + HALF > oldest)


@gluon.jit
def _loader(
    descriptors,
    buffers,
    place,
    kv_head,
    tiles,
    BYTES: gl.constexpr,
    HALF: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The warp that loads; BYTES: of a tile."""
    d_q, d_k, d_v = descriptors
    q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free = buffers
    batch, head, row = place
    mbarrier.expect(q_full, BYTES)
    for group in gl.static_range(2):
        load_tile(d_q, [batch, row + group * HALF, head, 0], q_full, q_smem.index(group))
    for t in range(0, tiles + 1):
        key = _tile_key(t, tiles, row, TILE)
        slot = t % STAGES
        before = (t // STAGES) & 1 ^ 1
        mbarrier.wait(k_free.index(slot), before)
        mbarrier.expect(k_full.index(slot), BYTES)
        load_tile(d_k, [batch, key, kv_head, 0], k_full.index(slot), k_smem.index(slot))
        mbarrier.wait(v_free.index(slot), before)
        mbarrier.expect(v_full.index(slot), BYTES)
        load_tile(d_v, [batch, key, kv_head, 0], v_full.index(slot), v_smem.index(slot))


@gluon.jit
def _weights(b_s, b_max, b_sum, scale_log2):
    """(weights of the logits b_s, maximum, sum, factor of what was summed before)."""
    b_new = gl.maximum(b_max, gl.max(b_s, 1) * scale_log2)
    b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_new, 1))
    b_keep = gl.exp2(b_max - b_new)
    return b_p, b_new, b_sum * b_keep + gl.sum(b_p, 1), b_keep


@gluon.jit
def _half_tile(
    b_acc,
    b_max,
    b_sum,
    b_i,
    b_first,
    q_smem,
    k_smem,
    v_smem,
    key,
    scale_log2,
    o_layout: gl.constexpr,
    HALF: gl.constexpr,
):
    """HALF keys into the running softmax, masked."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    b_zero = gl.zeros([HALF, HALF], gl.float32, s_layout)
    b_s = warpgroup_mma(q_smem, k_smem.permute((1, 0)), b_zero, use_acc=False)
    b_j = gl.expand_dims(key + gl.arange(0, HALF, gl.SliceLayout(0, s_layout)), 0)
    m_seen = b_j <= gl.expand_dims(gl.convert_layout(b_i, rows), 1)
    m_seen = m_seen & (b_j >= gl.expand_dims(gl.convert_layout(b_first, rows), 1))
    b_s = gl.where(m_seen, b_s, float("-inf"))
    b_max = gl.convert_layout(b_max, rows)
    b_p, b_max, b_sum, b_keep = _weights(b_s, b_max, gl.convert_layout(b_sum, rows), scale_log2)
    b_acc = b_acc * gl.expand_dims(gl.convert_layout(b_keep, gl.SliceLayout(1, o_layout)), 1)
    b_p = gl.convert_layout(b_p.to(v_smem.dtype), gl.DotOperandLayout(0, o_layout, 2))
    return warpgroup_mma(b_p, v_smem, b_acc), b_max, b_sum


@gluon.jit
def _group(
    WHO: gl.constexpr,
    outputs,
    buffers,
    turns,
    place,
    tiles,
    common,
    scale_log2,
    T,
    HEADS: gl.constexpr,
    DH: gl.constexpr,
    HALF: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    LEAST: gl.constexpr,
):
    """A group of four warps that multiplies: queries row + WHO * HALF and the HALF - 1 behind.

    common: tiles that are full for both groups, in which they take turns."""
    p_o, p_lse, p_first = outputs
    q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free = buffers
    batch, head, row = place
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    dtype: gl.constexpr = k_smem.dtype
    first_row = row + WHO * HALF
    b_i = first_row + gl.arange(0, HALF, s_rows)
    b_first = gl.load(p_first + b_i, mask=b_i < T, other=0)
    oldest = gl.load(p_first + min(first_row, T - 1))
    full = _before(gl.load(p_first + min(first_row + HALF, T) - 1), row, TILE)
    b_max = gl.full([HALF], LEAST, gl.float32, s_rows)
    b_sum = gl.zeros([HALF], gl.float32, s_rows)
    b_acc = gl.zeros([HALF, DH], gl.float32, o_layout)
    b_zero = gl.zeros([HALF, TILE], gl.float32, s_layout)
    mbarrier.wait(q_full, 0)
    b_q = q_smem.index(WHO).reshape([HALF, DH])
    if full > 0:
        mbarrier.wait(k_full.index(0), 0)
        b_k = k_smem.index(0).reshape([TILE, DH])
        b_s = warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False)
        mbarrier.arrive(k_free.index(0), count=1)
        b_p, b_max, b_sum, b_keep = _weights(b_s, b_max, b_sum, scale_log2)
        b_p = gl.convert_layout(b_p.to(dtype), p_layout)
        for t in range(1, full):
            slot = t % STAGES
            before = (t - 1) % STAGES
            mbarrier.wait(k_full.index(slot), (t // STAGES) & 1)
            mbarrier.wait(turns.index(WHO), (t & 1) ^ WHO, pred=t < common)
            b_k = k_smem.index(slot).reshape([TILE, DH])
            s_going = warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(before), ((t - 1) // STAGES) & 1)
            b_v = v_smem.index(before).reshape([TILE, DH])
            o_going = warpgroup_mma(b_p, b_v, b_acc, is_async=True)
            mbarrier.arrive(turns.index(1 - WHO), count=1, pred=t < common)
            b_s = warpgroup_mma_wait(1, deps=[s_going])
            mbarrier.arrive(k_free.index(slot), count=1)
            b_next, b_max, b_sum, b_keep = _weights(b_s, b_max, b_sum, scale_log2)
            b_acc = warpgroup_mma_wait(0, deps=[o_going])
            mbarrier.arrive(v_free.index(before), count=1)
            b_acc = b_acc * gl.expand_dims(gl.convert_layout(b_keep, o_rows), 1)
            b_p = gl.convert_layout(b_next.to(dtype), p_layout)
        before = (full - 1) % STAGES
        mbarrier.wait(v_full.index(before), ((full - 1) // STAGES) & 1)
        b_acc = warpgroup_mma(b_p, v_smem.index(before).reshape([TILE, DH]), b_acc)
        mbarrier.arrive(v_free.index(before), count=1)
    for t in range(full, tiles + 1):
        slot = t % STAGES
        mbarrier.wait(k_full.index(slot), (t // STAGES) & 1)
        mbarrier.wait(v_full.index(slot), (t // STAGES) & 1)
        for half in gl.static_range(2):
            key = _tile_key(t, tiles, row, TILE) + half * HALF
            if _half_is_seen(key, oldest, first_row, HALF):
                b_k = k_smem.index(slot).reshape([TILE, DH]).slice(half * HALF, HALF)
                b_v = v_smem.index(slot).reshape([TILE, DH]).slice(half * HALF, HALF)
                known = b_acc, b_max, b_sum, b_i, b_first
                b_acc, h_max, h_sum = _half_tile(*known, b_q, b_k, b_v, key, scale_log2, o_layout, HALF)
                b_max, b_sum = gl.convert_layout(h_max, s_rows), gl.convert_layout(h_sum, s_rows)
        mbarrier.arrive(k_free.index(slot), count=1)
        mbarrier.arrive(v_free.index(slot), count=1)
    o_row = gl.arange(0, HALF, o_rows)
    b_o = b_acc / gl.expand_dims(gl.convert_layout(b_sum, o_rows), 1)
    p_o += ((batch.to(gl.int64) * T + first_row) * HEADS + head) * DH
    o_tile = gl.expand_dims(o_row, 1) * (HEADS * DH) + gl.expand_dims(gl.arange(0, DH, gl.SliceLayout(0, o_layout)), 0)
    gl.store(p_o + o_tile, b_o.to(dtype), mask=gl.expand_dims(first_row + o_row < T, 1))
    gl.store(p_lse + (batch.to(gl.int64) * HEADS + head) * T + b_i, b_max + gl.log2(b_sum), mask=b_i < T)


@gluon.jit
def _attention_forward_gluon(
    d_q,
    d_k,
    d_v,
    p_o,
    p_lse,
    p_first,
    p_order,
    scale_log2,
    T,
    chunks,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    DH: gl.constexpr,
    BYTES: gl.constexpr,
    HALF: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    LEAST: gl.constexpr,
):
    """o and its rows' base-2 log-sum-exp, (B, HEADS, T), for TILE queries of one head."""
    q_smem = gl.allocate_shared_memory(d_q.dtype, [2, 1, HALF, 1, DH], d_q.layout)
    k_smem = gl.allocate_shared_memory(d_k.dtype, [STAGES, 1, TILE, 1, DH], d_k.layout)
    v_smem = gl.allocate_shared_memory(d_v.dtype, [STAGES, 1, TILE, 1, DH], d_v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)  # both groups
        mbarrier.init(v_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    chunk = gl.load(p_order + gl.program_id(0) // HEADS)
    head = gl.program_id(0) % HEADS
    batch = chunk // chunks
    row = chunk % chunks * TILE
    kv_head = head // (HEADS // KV_HEADS)
    p_first += batch * T
    tiles = _before(gl.load(p_first + row) - (TILE - 1), row, TILE)
    common = _before(gl.load(p_first + min(row + TILE, T) - 1), row, TILE)
    buffers = q_smem, k_smem, v_smem, q_full, k_full, k_free, v_full, v_free
    outputs, place = (p_o, p_lse, p_first), (batch, head, row)
    gl.warp_specialize(
        [
            (
                _group,
                (0, outputs, buffers, turns, place, tiles, common, scale_log2, T, HEADS, DH, HALF, TILE, STAGES, LEAST),
            ),
            (
                _group,
                (1, outputs, buffers, turns, place, tiles, common, scale_log2, T, HEADS, DH, HALF, TILE, STAGES, LEAST),
            ),
            (_loader, ((d_q, d_k, d_v), buffers, place, kv_head, tiles, BYTES, HALF, TILE, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


# ---- launcher ---------------------------------------------------------------------------------------------


def walked(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Each of the tensors (B, T, heads, Dh) as the copy engine takes it: rows dense, addresses and distances multiples
    of 16 bytes.

    Raises: ValueError for a head width that is not in WIDTHS."""
    if tensors[0].shape[3] not in WIDTHS:
        widths = " and ".join(map(str, WIDTHS))
        raise ValueError(f"q has head width {tensors[0].shape[3]}; the Gluon kernels are for {widths}")

    def fits(x):
        steps = [x.data_ptr(), *(step * x.element_size() for step in x.stride()[:3])]
        return x.stride(3) == 1 and not any(step % 16 for step in steps) and not x.is_neg()

    return [x if fits(x) else dense(x).clone() for x in tensors]


def launch_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_key_BT: torch.Tensor,
    query_order_N: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, contiguous, and the rows' base-2 log-sum-exp, float32 (B, H, T)); q, k, v (B, T, heads, Dh) of any strides,
    the tables int32 and dense, of one plan.

    Raises: ValueError for a head width that is not in WIDTHS."""
    (B, T, H, width), K = q.shape, k.shape[2]
    o, lse = q.new_empty(q.shape), q.new_empty(B, H, T, dtype=torch.float32)
    chunks = -(-T // TILE)
    launch(
        _attention_forward_gluon,
        (B * chunks * H,),
        *(descriptor(x, [1, rows, 1, width]) for x, rows in zip(walked(q, k, v), (HALF, TILE, TILE))),
        o,
        lse,
        first_key_BT,
        query_order_N,
        scale * LOG2_E,
        T,
        chunks,
        HEADS=H,
        KV_HEADS=K,
        DH=width,
        BYTES=TILE * width * q.element_size(),
        HALF=HALF,
        TILE=TILE,
        STAGES=STAGES,
        LEAST=torch.finfo(torch.float32).min,  # finite, so that a logit of -inf, as a mask makes it, weighs nothing
        num_warps=4,
        enable_fp_fusion=True,
    )
    return o, lse
