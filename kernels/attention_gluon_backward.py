"""Attention's backward kernels for Hopper, in Gluon, built as FlashAttention-3's (Shah et al. 2024).

They compute what `_attention_dq` and `_attention_dkdv` of kernels/attention.py do, which are their definition. None has
run on a GPU yet, and they are chosen by name only. There are two ways, of the same parts:

"gluon"            two passes of seven products: `_attention_dq_gluon` owns queries, makes dq and delta = rowsum(o do);
                   `_attention_dkdv_gluon` owns keys and makes dk and dv. The same bits in every run
"gluon_one_pass"   one pass of five products, `_attention_backward_gluon`, which makes the logits once. Its price:
                   gradients at queries are summed in device memory, in float32 and in no fixed order; what has to be
                   zeroed before and rounded after is traffic, counted in docs/slots.md. By count it is the better one
                   where a query sees some 900 keys or more, as it does not in documents as short as FineWeb's

A program that owns keys has 128 of one head. One warp loads; two groups of four warps multiply, 64 keys each:

    loader    keys and values once, then tile after tile of 64 queries with their gradients at o, their logarithms and
              deltas, into rings of STAGES buffers, as they get free
    group g   makes the transposed logits of its keys and their gradient ds, and adds to its dk and dv in registers

One that owns queries has 128, 64 a group, and walks back over tiles of 64 keys and values from the diagonal on.

In one pass a group also lays ds down in shared memory, where both groups need it: at head width 128 each makes one half
of the columns of dq = ds k, over all 128 keys; at 64 they take tiles by turns. One tile later than ds, so that neither
waits for the other's. The copy engine adds what they have made to the sums of dq, in bulk; under Tritons that have no
words for that (before 3.9) threads do, element by element, at more slots. Programs go through one head after another
and through its keys as they lie, so that those that run at once add to a few MB of sums, which the second-level cache
holds; only the last head's go by falling work.

A mask is made where a tile meets the diagonal or where a document or the window ends, behind a branch. A group leaves
out tiles none of whose pairs it is allowed: on the diagonal, and the last ones.

Shared memory at width 128: of keys' programs keys and values 64 KiB, queries and gradients at o 64 KiB, in one pass ds
32 KiB, dq 32 KiB; of queries' programs queries, o and its gradient 96 KiB, keys and values 64 KiB. Registers: 240 for
those who multiply, in which dk and dv take 128; hence the order of things, and two habits: what could be kept from
tile to tile for nothing but an address is made again (`none`, which is 0, and which the compiler cannot know), and
numbers of columns come from shared memory.
"""

from __future__ import annotations

from typing import Any

import torch

from kernels.attention_gluon import HALF, STAGES, TILE, walked
from kernels.gluon import (
    add_tile,
    descriptor,
    fence_async_shared,
    gl,
    gluon,
    load_tile,
    mbarrier,
    tiles_read,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from kernels.guards import launch
from kernels.runtime import LOG2_E

#: Whether the copy engine adds tiles to dq's sums in bulk, from shared memory; else threads add what they hold.
BULK = add_tile is not None

# ---- Gluon ------------------------------------------------------------------------------------------------
# Prefixes as in kernels/attention.py: p_ pointer, o_ offset, b_ block of values; d_ tensor descriptor. Rows of a tile
# of logits are keys here, and columns are queries.


@gluon.jit
def _loader(
    descriptors,
    smem,
    barriers,
    place,
    tiles,
    HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    KEY_BYTES: gl.constexpr,
    ROW_BYTES: gl.constexpr,
    HALF: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The warp that loads; KEY_BYTES: of the keys and values of both groups, ROW_BYTES: of one tile in a ring."""
    d_q, d_k, d_v, d_do, d_lse, d_delta = descriptors
    k_smem, v_smem = smem[0]
    q_smem, do_smem, lse_smem, delta_smem = smem[1]
    kv_full, q_full, q_free, do_full, do_free = barriers[0]
    batch, kv_head, key = place
    mbarrier.expect(kv_full, KEY_BYTES)
    for group in gl.static_range(2):
        load_tile(d_k, [batch, key + group * HALF, kv_head, 0], kv_full, k_smem.index(group))
        load_tile(d_v, [batch, key + group * HALF, kv_head, 0], kv_full, v_smem.index(group))
    for n in range(0, GROUP * tiles):
        head = kv_head * GROUP + n // tiles
        row = key + n % tiles * HALF
        slot = n % STAGES
        before = (n // STAGES) & 1 ^ 1
        mbarrier.wait(q_free.index(slot), before)
        mbarrier.expect(q_full.index(slot), ROW_BYTES)
        load_tile(d_q, [batch, row, head, 0], q_full.index(slot), q_smem.index(slot))
        load_tile(d_lse, [batch * HEADS + head, row], q_full.index(slot), lse_smem.index(slot))
        mbarrier.wait(do_free.index(slot), before)
        mbarrier.expect(do_full.index(slot), ROW_BYTES)
        load_tile(d_do, [batch, row, head, 0], do_full.index(slot), do_smem.index(slot))
        load_tile(d_delta, [batch * HEADS + head, row], do_full.index(slot), delta_smem.index(slot))


@gluon.jit
def _add_to_dq(
    n,
    none,
    sums,
    smem,
    barriers,
    place,
    tiles,
    end_of_lower,
    T,
    WHO: gl.constexpr,
    KV_HEADS: gl.constexpr,
    BULK: gl.constexpr,
    GROUP: gl.constexpr,
    DH: gl.constexpr,
    HALF: gl.constexpr,
):
    """This group's share of dq (without the logit scale) of the n-th tile, whose ds lies in shared memory: of both
    groups' keys, or of those of one where the tile sees no others. sums: a descriptor if BULK, else a pointer."""
    k_smem, ds_smem, dq_smem = smem[0][0], smem[2], smem[3]
    ds_full, ds_free = barriers[1]
    batch, kv_head, key = place
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    pair = n & 1
    mbarrier.wait(ds_full.index(pair), (n // 2) & 1)
    head = kv_head
    row = key + n * HALF
    if GROUP > 1:
        head = kv_head * GROUP + n // tiles
        row = key + n % tiles * HALF
    b_dq = gl.zeros([HALF, HALF], gl.float32, d_layout)
    if (row > key) & (row < end_of_lower):
        going = b_dq
        for group in gl.static_range(2):
            b_k = k_smem.index(group + none).reshape([HALF, DH])
            if DH > HALF:
                b_k = b_k.slice(WHO * HALF, HALF, dim=1)
            b_ds = ds_smem.index(pair * 2 + group).permute((1, 0))
            going = warpgroup_mma(b_ds, b_k, going, use_acc=group > 0, is_async=True)
        b_dq = warpgroup_mma_wait(0, deps=[going])
    else:
        seen = gl.where(row > key, 1, 0)
        b_k = k_smem.index(seen).reshape([HALF, DH])
        if DH > HALF:
            b_k = b_k.slice(WHO * HALF, HALF, dim=1)
        b_dq = warpgroup_mma(ds_smem.index(pair * 2 + seen).permute((1, 0)), b_k, b_dq, use_acc=False)
    mbarrier.arrive(ds_free.index(pair), count=1)
    if BULK:
        tiles_read(0)
        dq_smem.index(WHO).reshape([HALF, HALF]).store(b_dq)
        fence_async_shared()
        if DH > HALF:
            add_tile(sums, [batch, head, row, WHO * HALF], dq_smem.index(WHO))
        else:
            add_tile(sums, [batch, head, row, 0], dq_smem.index(WHO))
    else:
        o_row = gl.arange(0, HALF, gl.SliceLayout(1, d_layout))
        p_sums = sums + ((batch.to(gl.int64) * (KV_HEADS * GROUP) + head) * T + row) * DH
        if DH > HALF:
            p_sums += WHO * HALF
        o_tile = gl.expand_dims(o_row * DH, 1) + gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(0, d_layout)), 0)
        gl.atomic_add(p_sums + o_tile, b_dq, mask=gl.expand_dims(row + o_row < T, 1), sem="relaxed")


@gluon.jit
def _halves(b_x, ROWS: gl.constexpr, DH: gl.constexpr):
    """Both halves of each row, (ROWS, DH / 2): what rotary pairs up. They stay in the registers where they are."""
    b_1, b_2 = gl.split(gl.permute(gl.reshape(b_x, [ROWS, 2, DH // 2]), (0, 2, 1)))
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DH // 2, 16])
    return gl.convert_layout(b_1, layout), gl.convert_layout(b_2, layout)


@gluon.jit
def _store_at_projection(p_x, p_y, b_g, p_rms, p_cos, p_sin, o_x, o_half, key, T, ROWS: gl.constexpr, DH: gl.constexpr):
    """As its namesake in kernels/attention.py; o_x: of the first element of the first row, o_half: (rows, DH / 2)."""
    R: gl.constexpr = DH // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DH // 2, 16])
    o_row = key + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    m_row = gl.expand_dims(o_row < T, 1)
    b_1, b_2 = _halves(b_g, ROWS, DH)
    b_y1 = gl.load(p_y + o_x + o_half, mask=m_row, other=0.0).to(gl.float32)
    b_y2 = gl.load(p_y + o_x + R + o_half, mask=m_row, other=0.0).to(gl.float32)
    b_mean = gl.expand_dims((gl.sum(b_1 * b_y1, 1) + gl.sum(b_2 * b_y2, 1)) / DH, 1)
    b_r = gl.expand_dims(gl.load(p_rms + o_row, mask=o_row < T, other=0.0), 1)
    b_1 = (b_1 - b_y1 * b_mean) * b_r
    b_2 = (b_2 - b_y2 * b_mean) * b_r
    o_angle = gl.expand_dims(o_row * R, 1) + gl.expand_dims(gl.arange(0, R, gl.SliceLayout(0, layout)), 0)
    b_cos = gl.load(p_cos + o_angle, mask=m_row, other=0.0)
    b_sin = gl.load(p_sin + o_angle, mask=m_row, other=0.0)
    gl.store(p_x + o_x + o_half, (b_1 * b_cos - b_2 * b_sin).to(p_x.dtype.element_ty), mask=m_row)
    gl.store(p_x + o_x + R + o_half, (b_1 * b_sin + b_2 * b_cos).to(p_x.dtype.element_ty), mask=m_row)


@gluon.jit
def _store_at_values(
    pointers, b_g, where, key, T, ROWS: gl.constexpr, DH: gl.constexpr, HAS_VE: gl.constexpr, EPS: gl.constexpr
):
    """As its namesake in kernels/attention.py; where: offsets as in `_store_at_projection`, of dv and of dve."""
    p_x, p_dve, p_ds, p_y, p_ve, p_s = pointers
    o_x, o_ve, o_half, o_ve_half = where
    R: gl.constexpr = DH // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DH // 2, 16])
    m_row = gl.expand_dims(key + gl.arange(0, ROWS, gl.SliceLayout(1, layout)) < T, 1)
    b_1, b_2 = _halves(b_g, ROWS, DH)
    b_y1 = gl.load(p_y + o_x + o_half, mask=m_row, other=0.0).to(gl.float32)
    b_y2 = gl.load(p_y + o_x + R + o_half, mask=m_row, other=0.0).to(gl.float32)
    b_r = gl.rsqrt((gl.sum(b_y1 * b_y1, 1) + gl.sum(b_y2 * b_y2, 1)) / DH + EPS)
    b_along = (gl.sum(b_1 * b_y1, 1) + gl.sum(b_2 * b_y2, 1)) * b_r
    gl.store(p_ds, gl.sum(b_along, 0))
    b_mean = gl.expand_dims(b_along * b_r / DH, 1)
    b_r = gl.expand_dims(b_r * gl.load(p_s), 1)
    gl.store(p_x + o_x + o_half, ((b_1 - b_y1 * b_mean) * b_r).to(p_x.dtype.element_ty), mask=m_row)
    gl.store(p_x + o_x + R + o_half, ((b_2 - b_y2 * b_mean) * b_r).to(p_x.dtype.element_ty), mask=m_row)
    if HAS_VE:
        s_1 = gl.load(p_s + 1)
        b_along = gl.sum(b_1 * gl.load(p_ve + o_ve + o_ve_half, mask=m_row, other=0.0).to(gl.float32), 1)
        gl.store(p_dve + o_ve + o_ve_half, (b_1 * s_1).to(p_dve.dtype.element_ty), mask=m_row)
        b_along += gl.sum(b_2 * gl.load(p_ve + o_ve + R + o_ve_half, mask=m_row, other=0.0).to(gl.float32), 1)
        gl.store(p_dve + o_ve + R + o_ve_half, (b_2 * s_1).to(p_dve.dtype.element_ty), mask=m_row)
        gl.store(p_ds + 1, gl.sum(b_along, 0))
    else:
        gl.store(p_ds + 1, 0.0)


@gluon.jit
def _group_of_keys(
    WHO: gl.constexpr,
    given,
    KV_HEADS: gl.constexpr,
    GROUP: gl.constexpr,
    K_APART: gl.constexpr,
    DH: gl.constexpr,
    HALF: gl.constexpr,
    STAGES: gl.constexpr,
    LAYER: gl.constexpr,
    HAS_VE: gl.constexpr,
    EPS: gl.constexpr,
    SUMS: gl.constexpr,
    BULK: gl.constexpr,
):
    """A group of four warps that multiplies: keys key + WHO * HALF and the HALF - 1 behind."""
    outputs, layer, sums, smem, barriers, place, tiles, scale, scale_log2, T = given
    p_dk, p_dv, p_end = outputs
    k_smem, v_smem = smem[0]
    q_smem, do_smem, lse_smem, delta_smem = smem[1]
    ds_smem, at_smem = smem[2], smem[4]
    kv_full, q_full, q_free, do_full, do_free = barriers[0]
    ds_full, ds_free = barriers[1]
    batch, kv_head, key = place
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    columns: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = k_smem.dtype
    first_key = key + WHO * HALF
    b_j = first_key + gl.arange(0, HALF, rows)
    b_seen = gl.load(p_end + b_j, mask=b_j < T, other=0) - b_j
    b_seen = gl.maximum(b_seen, 0)  # queries from its own on that see a key; none see one past the end
    end_of_first = gl.load(p_end + min(first_key, T - 1))
    end_of_lower = gl.load(p_end + min(key + HALF, T) - 1)  # of the queries that see one of the lower group's keys
    b_dk = gl.zeros([HALF, DH], gl.float32, o_layout)
    b_dv = gl.zeros([HALF, DH], gl.float32, o_layout)
    b_zero = gl.zeros([HALF, HALF], gl.float32, s_layout)
    mbarrier.wait(kv_full, 0)
    for n in range(0, GROUP * tiles):
        none = n >> 30
        slot = n % STAGES
        phase = (n // STAGES) & 1
        row = key + n * HALF
        if GROUP > 1:
            row = key + n % tiles * HALF
        pair = n & 1
        if (row > key) if WHO else (row < end_of_lower):
            mbarrier.wait(q_full.index(slot), phase)
            b_q = q_smem.index(slot).reshape([HALF, DH])
            b_k = k_smem.index(WHO + none).reshape([HALF, DH])
            b_s = warpgroup_mma(b_k, b_q.permute((1, 0)), b_zero, use_acc=False)
            b_lse = lse_smem.index(slot).reshape([HALF]).load(columns)
            b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_lse, 0))
            if (row < first_key + HALF) | (row + HALF > end_of_first):
                b_since = gl.expand_dims(at_smem.load(columns), 0) - gl.expand_dims(b_j - row, 1)
                m_seen = (b_since >= 0) & (b_since < gl.expand_dims(b_seen, 1))
                b_p = gl.where(m_seen, b_p, 0.0)
            mbarrier.wait(do_full.index(slot), phase)
            b_do = do_smem.index(slot).reshape([HALF, DH])
            b_v = v_smem.index(WHO + none).reshape([HALF, DH])
            b_dp = warpgroup_mma(b_v, b_do.permute((1, 0)), b_zero, use_acc=False)
            b_delta = delta_smem.index(slot).reshape([HALF]).load(columns)
            b_ds = (b_p * (b_dp - gl.expand_dims(b_delta, 0))).to(dtype)
            dv_going = warpgroup_mma(gl.convert_layout(b_p.to(dtype), p_layout), b_do, b_dv, is_async=True)
            if SUMS:
                mbarrier.wait(ds_free.index(pair), (n // 2) & 1 ^ 1)
                ds_smem.index(pair * 2 + WHO).store(b_ds)
                fence_async_shared()
                mbarrier.arrive(ds_full.index(pair), count=1)
            dk_going = warpgroup_mma(gl.convert_layout(b_ds, p_layout), b_q, b_dk, is_async=True)
            b_dv = warpgroup_mma_wait(1, deps=[dv_going])
            mbarrier.arrive(do_free.index(slot), count=1)
            b_dk = warpgroup_mma_wait(0, deps=[dk_going])
            mbarrier.arrive(q_free.index(slot), count=1)
        else:
            mbarrier.wait(q_full.index(slot), phase)
            mbarrier.wait(do_full.index(slot), phase)
            if SUMS:
                mbarrier.wait(ds_free.index(pair), (n // 2) & 1 ^ 1)
                mbarrier.arrive(ds_full.index(pair), count=1)
            mbarrier.arrive(do_free.index(slot), count=1)
            mbarrier.arrive(q_free.index(slot), count=1)
        if SUMS and (n > 0) & ((DH > HALF) | (pair == WHO)):
            _add_to_dq(
                n - 1, none, sums, smem, barriers, place, tiles, end_of_lower, T, WHO, KV_HEADS, BULK, GROUP, DH, HALF
            )
    if SUMS:
        n = GROUP * tiles
        if (DH > HALF) | ((n & 1) == WHO):
            _add_to_dq(
                n - 1, 0, sums, smem, barriers, place, tiles, end_of_lower, T, WHO, KV_HEADS, BULK, GROUP, DH, HALF
            )
    first = batch.to(gl.int64) * T + first_key
    o_x = (first * K_APART + kv_head) * DH
    if LAYER:
        p_k, p_rms, p_cos, p_sin, p_raw, p_ve, p_s, p_dve, p_ds = layer
        half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DH // 2, 16])
        o_row = gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(1, half)) * DH, 1)
        o_column = gl.expand_dims(gl.arange(0, DH // 2, gl.SliceLayout(0, half)), 0)
        o_half, o_ve_half = o_row * K_APART + o_column, o_row * KV_HEADS + o_column
        p_ds += (gl.program_id(0) * 2 + WHO) * 2
        o_ve = (first * KV_HEADS + kv_head) * DH
        value_pointers, where = (p_dv, p_dve, p_ds, p_raw, p_ve, p_s), (o_x, o_ve, o_half, o_ve_half)
        _store_at_values(value_pointers, b_dv, where, first_key, T, HALF, DH, HAS_VE, EPS)
        p_rms += (batch.to(gl.int64) * KV_HEADS + kv_head) * T
        _store_at_projection(p_dk, p_k, b_dk * scale, p_rms, p_cos, p_sin, o_x, o_half, first_key, T, HALF, DH)
    else:
        o_row = gl.arange(0, HALF, gl.SliceLayout(1, o_layout))
        o_column = gl.expand_dims(gl.arange(0, DH, gl.SliceLayout(0, o_layout)), 0)
        o_tile = gl.expand_dims(o_row * (K_APART * DH), 1) + o_column
        m_row = gl.expand_dims(first_key + o_row < T, 1)
        gl.store(p_dk + o_x + o_tile, (b_dk * scale).to(dtype), mask=m_row)
        gl.store(p_dv + o_x + o_tile, b_dv.to(dtype), mask=m_row)
    if BULK:
        tiles_read(0)


@gluon.jit
def _of_keys(
    given,
    batch,
    kv_head,
    key,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    K_APART: gl.constexpr,
    DH: gl.constexpr,
    KEY_BYTES: gl.constexpr,
    ROW_BYTES: gl.constexpr,
    HALF: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    LAYER: gl.constexpr,
    HAS_VE: gl.constexpr,
    EPS: gl.constexpr,
    SUMS: gl.constexpr,
    BULK: gl.constexpr,
):
    """The program of the keys from `key` on of one key head; SUMS: also their part of dq, added to its sums."""
    GROUP: gl.constexpr = HEADS // KV_HEADS
    descriptors, sums, outputs, layer, scale, scale_log2, T = given
    d_q, d_k, d_v, d_do, d_lse, d_delta = descriptors
    p_dk, p_dv, p_end = outputs
    k_smem = gl.allocate_shared_memory(d_k.dtype, [2, 1, HALF, 1, DH], d_k.layout)
    v_smem = gl.allocate_shared_memory(d_v.dtype, [2, 1, HALF, 1, DH], d_v.layout)
    q_smem = gl.allocate_shared_memory(d_q.dtype, [STAGES, 1, HALF, 1, DH], d_q.layout)
    do_smem = gl.allocate_shared_memory(d_do.dtype, [STAGES, 1, HALF, 1, DH], d_do.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, HALF], d_lse.layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, 1, HALF], d_delta.layout)
    ds_smem, dq_smem = k_smem, k_smem
    if SUMS:
        ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([HALF, HALF], d_k.dtype)
        ds_smem = gl.allocate_shared_memory(d_k.dtype, [4, HALF, HALF], ds_layout)
    if BULK:
        dq_smem = gl.allocate_shared_memory(gl.float32, [2, 1, 1, HALF, HALF], sums.layout)
    at_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    at_smem = gl.allocate_shared_memory(gl.int32, [HALF], at_layout)
    at_smem.store(gl.arange(0, HALF, gl.BlockedLayout([1], [32], [4], [0])))
    kv_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ds_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ds_free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(kv_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
        mbarrier.init(q_free.index(i), count=2)  # both groups
        mbarrier.init(do_free.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(ds_full.index(i), count=2)
        mbarrier.init(ds_free.index(i), count=2 if DH > HALF else 1)  # those that multiply from it
    fence_async_shared()
    p_end += batch * T
    tiles = (gl.load(p_end + min(key + TILE, T) - 1) - key + HALF - 1) // HALF
    smem = (k_smem, v_smem), (q_smem, do_smem, lse_smem, delta_smem), ds_smem, dq_smem, at_smem
    barriers = (kv_full, q_full, q_free, do_full, do_free), (ds_full, ds_free)
    place = batch, kv_head, key
    taken = (p_dk, p_dv, p_end), layer, sums, smem, barriers, place, tiles, scale, scale_log2, T
    gl.warp_specialize(
        [
            (_group_of_keys, (0, taken, KV_HEADS, GROUP, K_APART, DH, HALF, STAGES, LAYER, HAS_VE, EPS, SUMS, BULK)),
            (_group_of_keys, (1, taken, KV_HEADS, GROUP, K_APART, DH, HALF, STAGES, LAYER, HAS_VE, EPS, SUMS, BULK)),
            (_loader, (descriptors, smem, barriers, place, tiles, HEADS, GROUP, KEY_BYTES, ROW_BYTES, HALF, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


@gluon.jit
def _attention_backward_gluon(
    d_q,
    d_k,
    d_v,
    d_do,
    d_lse,
    d_delta,
    sums,
    p_dk,
    p_dv,
    p_end,
    p_order,
    p_k,
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
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    K_APART: gl.constexpr,
    DH: gl.constexpr,
    KEY_BYTES: gl.constexpr,
    ROW_BYTES: gl.constexpr,
    HALF: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    LAYER: gl.constexpr,
    HAS_VE: gl.constexpr,
    EPS: gl.constexpr,
    BULK: gl.constexpr,
):
    """dk and dv for TILE keys of one key head, and their part of dq, (B, HEADS, T, DH) without the logit scale.

    LAYER: dk and dv are the gradients at the projections, before norm, rotary and mix; also dve, and this program's
    share of both scalars' gradients, (programs, 2 groups, 2)."""
    layer = p_k, p_rms, p_cos, p_sin, p_raw, p_ve, p_s, p_dve, p_ds
    given = (d_q, d_k, d_v, d_do, d_lse, d_delta), sums, (p_dk, p_dv, p_end), layer, scale, scale_log2, T
    tile = gl.program_id(0) % (gl.num_programs(0) // KV_HEADS)
    kv_head = gl.program_id(0) // (gl.num_programs(0) // KV_HEADS)
    chunk = gl.where(kv_head == KV_HEADS - 1, gl.load(p_order + tile), tile)
    _of_keys(
        given,
        chunk // chunks,
        kv_head,
        chunk % chunks * TILE,
        HEADS,
        KV_HEADS,
        K_APART,
        DH,
        KEY_BYTES,
        ROW_BYTES,
        HALF,
        TILE,
        STAGES,
        LAYER,
        HAS_VE,
        EPS,
        True,
        BULK,
    )


@gluon.jit
def _attention_dkdv_gluon(
    d_q,
    d_k,
    d_v,
    d_do,
    d_lse,
    d_delta,
    p_dk,
    p_dv,
    p_end,
    p_order,
    p_k,
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
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    K_APART: gl.constexpr,
    DH: gl.constexpr,
    KEY_BYTES: gl.constexpr,
    ROW_BYTES: gl.constexpr,
    HALF: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    LAYER: gl.constexpr,
    HAS_VE: gl.constexpr,
    EPS: gl.constexpr,
):
    """What `_attention_backward_gluon` does, without dq."""
    layer = p_k, p_rms, p_cos, p_sin, p_raw, p_ve, p_s, p_dve, p_ds
    given = (d_q, d_k, d_v, d_do, d_lse, d_delta), d_q, (p_dk, p_dv, p_end), layer, scale, scale_log2, T
    chunk = gl.load(p_order + gl.program_id(0) // KV_HEADS)
    _of_keys(
        given,
        chunk // chunks,
        gl.program_id(0) % KV_HEADS,
        chunk % chunks * TILE,
        HEADS,
        KV_HEADS,
        K_APART,
        DH,
        KEY_BYTES,
        ROW_BYTES,
        HALF,
        TILE,
        STAGES,
        LAYER,
        HAS_VE,
        EPS,
        False,
        False,
    )


@gluon.jit
def _loader_of_keys(
    descriptors,
    smem,
    barriers,
    place,
    tiles,
    QUERY_BYTES: gl.constexpr,
    KEY_BYTES: gl.constexpr,
    HALF: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The warp that loads for queries; QUERY_BYTES: of queries, o and its gradient of both groups, KEY_BYTES: of a tile
    of keys."""
    d_q, d_k, d_v, d_do, d_o = descriptors
    q_smem, do_smem, o_smem = smem[0]
    k_smem, v_smem = smem[1]
    q_full, k_full, v_full, kv_free = barriers
    batch, head, kv_head, row = place
    mbarrier.expect(q_full, QUERY_BYTES)
    for group in gl.static_range(2):
        load_tile(d_o, [batch, row + group * HALF, head, 0], q_full, o_smem.index(group))
        load_tile(d_do, [batch, row + group * HALF, head, 0], q_full, do_smem.index(group))
        load_tile(d_q, [batch, row + group * HALF, head, 0], q_full, q_smem.index(group))
    for n in range(0, tiles):
        key = row + HALF - n * HALF
        slot = n % STAGES
        before = (n // STAGES) & 1 ^ 1
        mbarrier.wait(kv_free.index(slot), before)
        mbarrier.expect(k_full.index(slot), KEY_BYTES)
        load_tile(d_k, [batch, key, kv_head, 0], k_full.index(slot), k_smem.index(slot))
        mbarrier.expect(v_full.index(slot), KEY_BYTES)
        load_tile(d_v, [batch, key, kv_head, 0], v_full.index(slot), v_smem.index(slot))


@gluon.jit
def _group_of_queries(
    WHO: gl.constexpr,
    given,
    HEADS: gl.constexpr,
    Q_APART: gl.constexpr,
    DH: gl.constexpr,
    HALF: gl.constexpr,
    STAGES: gl.constexpr,
    LAYER: gl.constexpr,
):
    """A group of four warps that multiplies: queries row + WHO * HALF and the HALF - 1 behind."""
    pointers, layer, smem, barriers, place, tiles, scale, scale_log2, T, rows = given
    p_lse, p_rows, p_dq, p_first = pointers
    q_smem, do_smem, o_smem = smem[0]
    k_smem, v_smem = smem[1]
    q_full, k_full, v_full, kv_free = barriers
    batch, head, _kv_head, row = place
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DH, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    of_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    dtype: gl.constexpr = k_smem.dtype
    first_row = row + WHO * HALF
    b_i = first_row + gl.arange(0, HALF, of_rows)
    b_first = gl.load(p_first + b_i, mask=b_i < T, other=0)
    oldest = gl.load(p_first + min(first_row, T - 1))
    oldest_of_all = gl.load(p_first + min(first_row + HALF, T) - 1)
    mbarrier.wait(q_full, 0)
    b_q = q_smem.index(WHO).reshape([HALF, DH])
    b_do = do_smem.index(WHO).reshape([HALF, DH])
    b_delta = b_do.load(o_layout).to(gl.float32) * o_smem.index(WHO).reshape([HALF, DH]).load(o_layout).to(gl.float32)
    b_delta = gl.convert_layout(gl.sum(b_delta, 1), of_rows)
    of_head = batch.to(gl.int64) * HEADS + head
    b_lse = gl.load(p_lse + of_head * T + b_i, mask=b_i < T, other=float("inf"))
    gl.store(p_rows + of_head * rows + b_i, b_lse)
    gl.store(p_rows + (gl.num_programs(0).to(gl.int64) * (2 * HALF) + of_head * rows) + b_i, b_delta)
    b_dq = gl.zeros([HALF, DH], gl.float32, o_layout)
    b_zero = gl.zeros([HALF, HALF], gl.float32, s_layout)
    for n in range(0, tiles):
        slot = n % STAGES
        phase = (n // STAGES) & 1
        key = row + HALF - n * HALF
        mbarrier.wait(k_full.index(slot), phase)
        if (key <= first_row) & (key + HALF > oldest):
            b_k = k_smem.index(slot).reshape([HALF, DH])
            s_going = warpgroup_mma(b_q, b_k.permute((1, 0)), b_zero, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(slot), phase)
            b_v = v_smem.index(slot).reshape([HALF, DH])
            dp_going = warpgroup_mma(b_do, b_v.permute((1, 0)), b_zero, use_acc=False, is_async=True)
            b_s = warpgroup_mma_wait(1, deps=[s_going])
            b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_lse, 1))
            if (key == first_row) | (key < oldest_of_all):
                b_j = gl.expand_dims(key + gl.arange(0, HALF, gl.SliceLayout(0, s_layout)), 0)
                m_seen = (b_j <= gl.expand_dims(b_i, 1)) & (b_j >= gl.expand_dims(b_first, 1))
                b_p = gl.where(m_seen, b_p, 0.0)
            b_dp = warpgroup_mma_wait(0, deps=[dp_going])
            b_ds = (b_p * (b_dp - gl.expand_dims(b_delta, 1))).to(dtype)
            b_dq = warpgroup_mma(gl.convert_layout(b_ds, p_layout), b_k, b_dq)
        else:
            mbarrier.wait(v_full.index(slot), phase)
        mbarrier.arrive(kv_free.index(slot), count=1)
    o_x = ((batch.to(gl.int64) * T + first_row) * Q_APART + head) * DH
    if LAYER:
        p_q, p_rms, p_cos, p_sin = layer
        half: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DH // 2, 16])
        o_row = gl.expand_dims(gl.arange(0, HALF, gl.SliceLayout(1, half)) * (Q_APART * DH), 1)
        o_half = o_row + gl.expand_dims(gl.arange(0, DH // 2, gl.SliceLayout(0, half)), 0)
        p_rms += of_head * T
        _store_at_projection(p_dq, p_q, b_dq * scale, p_rms, p_cos, p_sin, o_x, o_half, first_row, T, HALF, DH)
    else:
        o_row = gl.arange(0, HALF, gl.SliceLayout(1, o_layout))
        o_column = gl.expand_dims(gl.arange(0, DH, gl.SliceLayout(0, o_layout)), 0)
        o_tile = gl.expand_dims(o_row * (Q_APART * DH), 1) + o_column
        gl.store(p_dq + o_x + o_tile, (b_dq * scale).to(dtype), mask=gl.expand_dims(first_row + o_row < T, 1))


@gluon.jit
def _attention_dq_gluon(
    d_q,
    d_k,
    d_v,
    d_do,
    d_o,
    p_lse,
    p_rows,
    p_dq,
    p_first,
    p_order,
    p_q,
    p_rms,
    p_cos,
    p_sin,
    scale,
    scale_log2,
    T,
    rows,
    HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    Q_APART: gl.constexpr,
    DH: gl.constexpr,
    QUERY_BYTES: gl.constexpr,
    KEY_BYTES: gl.constexpr,
    HALF: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    LAYER: gl.constexpr,
):
    """dq for TILE queries of one head, and lse and delta = rowsum(o * do) into p_rows (2, B, HEADS, rows), from the
    T-th on infinity and 0.

    LAYER: dq is the gradient at the projection, before norm and rotary."""
    q_smem = gl.allocate_shared_memory(d_q.dtype, [2, 1, HALF, 1, DH], d_q.layout)
    do_smem = gl.allocate_shared_memory(d_do.dtype, [2, 1, HALF, 1, DH], d_do.layout)
    o_smem = gl.allocate_shared_memory(d_o.dtype, [2, 1, HALF, 1, DH], d_o.layout)
    k_smem = gl.allocate_shared_memory(d_k.dtype, [STAGES, 1, HALF, 1, DH], d_k.layout)
    v_smem = gl.allocate_shared_memory(d_v.dtype, [STAGES, 1, HALF, 1, DH], d_v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    kv_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(q_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(kv_free.index(i), count=2)  # both groups
    fence_async_shared()
    chunk = gl.load(p_order + gl.program_id(0) // HEADS)
    head = gl.program_id(0) % HEADS
    batch = chunk // (rows // TILE)
    row = chunk % (rows // TILE) * TILE
    p_first += batch * T
    tiles = (row - gl.load(p_first + row) + HALF - 1) // HALF + 2
    smem = (q_smem, do_smem, o_smem), (k_smem, v_smem)
    barriers = q_full, k_full, v_full, kv_free
    place = batch, head, head // (HEADS // KV_HEADS), row
    pointers, layer = (p_lse, p_rows, p_dq, p_first), (p_q, p_rms, p_cos, p_sin)
    given = pointers, layer, smem, barriers, place, tiles, scale, scale_log2, T, rows
    descriptors = d_q, d_k, d_v, d_do, d_o
    gl.warp_specialize(
        [
            (_group_of_queries, (0, given, HEADS, Q_APART, DH, HALF, STAGES, LAYER)),
            (_group_of_queries, (1, given, HEADS, Q_APART, DH, HALF, STAGES, LAYER)),
            (_loader_of_keys, (descriptors, smem, barriers, place, tiles, QUERY_BYTES, KEY_BYTES, HALF, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


# ---- launchers --------------------------------------------------------------------------------------------


def launch_dq(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor,
    first_key_BT: torch.Tensor,
    query_order_N: torch.Tensor,
    scale: float,
    apart: int,
    inputs: Any = None,
) -> torch.Tensor:
    """Writes dq; do, q, k, v and o: (B, T, heads, Dh) of any strides, lse (B, H, T), dense. dq: `apart` heads from
    token to token, as q has with `inputs`; these as in `launch_backward` of kernels/attention.py.

    Returns: float32 (2, B, H, T in whole TILEs), of every row the base-2 log-sum-exp and delta = sum(o * do), past the
    end infinity and 0.
    Raises: ValueError for a head width that is not in WIDTHS."""
    (B, T, H, width), K = q.shape, k.shape[2]
    chunks = -(-T // TILE)
    rows = lse.new_empty(2, B, H, chunks * TILE)
    layer = (None,) * 4 if inputs is None else (q, inputs.rms_q, inputs.cos_TR, inputs.sin_TR)
    launch(
        _attention_dq_gluon,
        (B * chunks * H,),
        *(descriptor(x, [1, HALF, 1, width]) for x in walked(q, k, v, do, o)),
        lse,
        rows,
        dq,
        first_key_BT,
        query_order_N,
        *layer,
        scale,
        scale * LOG2_E,
        T,
        chunks * TILE,
        HEADS=H,
        KV_HEADS=K,
        Q_APART=apart,
        DH=width,
        QUERY_BYTES=3 * TILE * width * q.element_size(),
        KEY_BYTES=HALF * width * q.element_size(),
        HALF=HALF,
        TILE=TILE,
        STAGES=STAGES,
        LAYER=inputs is not None,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return rows


def launch_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor,
    dv: torch.Tensor,
    end_query_BT: torch.Tensor,
    key_order_N: torch.Tensor,
    scale: float,
    apart: int,
    inputs: Any = None,
    dve: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Writes dk and dv; adds to dq, if given zeros (B, H, T, Dh) in float32, without the logit scale.

    do, q, k, v: (B, T, heads, Dh) of any strides; rows: what `launch_dq` returns. dk and dv: `apart` heads from token
    to token, as k has with `inputs`; these as in `launch_backward` of kernels/attention.py, which writes dve, too.

    Returns: with `inputs` the gradient at s, (2,).
    Raises: ValueError for a head width that is not in WIDTHS."""
    (B, T, H, width), K = q.shape, k.shape[2]
    chunks = -(-T // TILE)
    layer: tuple[torch.Tensor | None, ...] = (None,) * 9
    if inputs is not None:
        ds = rows.new_empty(B * chunks * K, 2, 2)
        layer = (k, inputs.rms_k, inputs.cos_TR, inputs.sin_TR, inputs.v, inputs.ve, inputs.s, dve, ds)
    sums, how = (), {}
    if dq is not None:
        sums, how = (descriptor(dq, [1, 1, HALF, HALF]) if BULK else dq,), dict(BULK=BULK)
    launch(
        _attention_dkdv_gluon if dq is None else _attention_backward_gluon,
        (B * chunks * K,),
        *(descriptor(x, [1, HALF, 1, width]) for x in walked(q, k, v, do)),
        *(descriptor(x, [1, HALF]) for x in rows.flatten(1, 2)),
        *sums,
        dk,
        dv,
        end_query_BT,
        key_order_N,
        *layer,
        scale,
        scale * LOG2_E,
        T,
        chunks,
        HEADS=H,
        KV_HEADS=K,
        K_APART=apart,
        DH=width,
        KEY_BYTES=4 * HALF * width * q.element_size(),
        ROW_BYTES=HALF * (width * q.element_size() + rows.element_size()),
        HALF=HALF,
        TILE=TILE,
        STAGES=STAGES,
        LAYER=inputs is not None,
        HAS_VE=dve is not None,
        EPS=torch.finfo(torch.float32).eps,
        **how,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return None if inputs is None else ds.sum((0, 1))
