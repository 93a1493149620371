"""Fused linear layer, soft cap and cross-entropy: the language model's head and its loss.

    z = x w^T                              (N, V)   N tokens, D model width, V classes, the padding's too
    c = softcap(z)                         15 z / sqrt(z^2 + 225)  or  23 sigmoid((z + 5) / 7.5)  or  z
    loss_n = log sum_v exp(c_nv) - c_n,target_n

x is (N, D) in bfloat16 or float32; w is the float32 master (V, D), cast to x's dtype for the products; targets are
(N,) integers. Losses are float32, dx has x's dtype, dw is accumulated in float32. With several targets a token, (N, K)
and weights w_k, its loss is sum_k w_k (log sum_v exp(c_nv) - c_n,target_nk), from the same one pass over the logits.

On a GPU the tokens go through in chunks: the library computes a chunk's logits in x's dtype; one kernel reads each
row of them from memory once, and leaves the loss, and in place of the logits their gradient; the library turns that
into dx and adds it to dw. So the logits cross the memory bus five times (written by one product, read and written by
the kernel, read by two products) and only a chunk of them exists. Products: 6 N D V FLOPs.

Memory beside x and w, for N = 65,536, D = 1024, V = 50,304 in bfloat16 and chunks of 8192 tokens: 824 MB of logits,
103 MB for w in bfloat16, 206 MB dw, 134 MB dx: 1.27 GB (counted from the launch code in
tests/kernels/test_cross_entropy.py, not measured), where all logits in float32 and their gradient take 26 GB.
A chunk reads and writes dw inside its product, 0.4 GB whatever its size; `chosen_chunk_tokens` makes chunks as large
as the device affords. `chunk_tokens` = N keeps all logits (6.6 GB) and writes dw once: whether that is faster on a
device `python -m bench.cross_entropy` tells, and has not told yet. For "mean" and "sum" the gradients are computed in
the forward pass, for an upstream gradient of one, and scaled in the backward pass; for "none" the backward pass
computes the logits again.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F

from kernels.guards import (
    KERNEL_DTYPES,
    dense,
    differentiable_once,
    expect,
    expect_floats,
    in_place,
    launch,
    refuse_tangents,
    without_autocast,
)
from kernels.products8 import DEVICES as FP8_DEVICES
from kernels.products8 import (
    E4M3,
    E5M2,
    MULTIPLE,
    Eight,
    available_on,
    both_ways,
    in_8_bits,
    launch_turn,
    product,
    saturated,
    scale_for,
)
from kernels.runtime import LOG2_E, device_kind, implementation_of, tl, triton

SOFTCAPS = ("rsqrt", "sigmoid", None)
REDUCTIONS = ("mean", "sum", "none")
# Beyond this the soft cap is flat to the last float32 digit, while z*z would overflow from 1.8e19 on.
LOGIT_LIMIT = 1e6
# A chunk of logits that stays in a CPU core's caches: measured best of 128 .. 2048 tokens at 256 classes.
CPU_CHUNK_LOGITS = 1 << 18
#: Rows of x whose logits are in memory at once on a GPU: at most, at least, and the share of its memory they may take.
MOST_CHUNK_TOKENS, LEAST_CHUNK_TOKENS, CHUNK_SHARE = 8192, 256, 1 / 80
#: Classes that one program holds in registers: 32 a thread, with 512 threads. Longer rows go through in blocks, twice.
#: The second reading finds the row in the second-level cache: two programs of 64 registers a thread fit a
#: multiprocessor, so that 264 rows of 100 KB are under way on an H100, 26 of the cache's 50 MB. Holding 50,304 classes
#: in registers spills 1264 bytes a thread (kernels/proof, sm_90, triton 3.9).
_MOST_IN_REGISTERS = 1 << 14
_REGISTERS = 1 << 16  # of an NVIDIA multiprocessor


# ---- reference --------------------------------------------------------------------------------------------


def _apply_softcap(z: torch.Tensor, softcap: str | None) -> torch.Tensor:
    """The soft cap on logits of any shape, differentiable by autograd."""
    if softcap is None:
        return z
    if softcap == "rsqrt":
        z = z.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        return 15 * z * torch.rsqrt(z * z + 225)
    return 23 * torch.sigmoid((z + 5) / 7.5)


def softcapped_logits(x_ND: torch.Tensor, weight_VD: torch.Tensor, softcap: str | None = "rsqrt") -> torch.Tensor:
    """Float32 (float64 for float64 x) capped logits (..., V), for sampling; x is (..., D)."""
    z = F.linear(x_ND, weight_VD.to(x_ND.dtype))
    return _apply_softcap(z.to(_wide(z)), softcap)


def linear_cross_entropy_reference(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets: torch.Tensor,
    softcap: str | None = "rsqrt",
    reduction: str = "mean",
    ignore_index: int = -100,
    target_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The definition, in plain torch with all logits in memory; autograd differentiates it."""
    log_p_NV = softcapped_logits(x_ND, weight_VD, softcap).log_softmax(1)
    targets_NK = _in_columns(targets)
    weights = [1.0] * targets_NK.shape[1] if target_weights is None else target_weights.to(log_p_NV.dtype).unbind()
    losses_N = log_p_NV.new_zeros(log_p_NV.shape[0])
    for weight, targets_N in zip(weights, targets_NK.unbind(1)):
        loss_N = F.nll_loss(log_p_NV, targets_N, reduction="none", ignore_index=ignore_index)
        # a weight of 0 leaves its target out, whatever the loss there is
        losses_N = losses_N + (loss_N if target_weights is None else torch.where(weight == 0, 0.0, weight * loss_N))
    return losses_N if reduction == "none" else _reduced(losses_N.sum(), targets_NK, reduction, ignore_index)


def next_targets(targets_BT: torch.Tensor, count: int, ignore_index: int = -100) -> torch.Tensor:
    """(..., T, count): each position's target and those of the count - 1 positions after it; none past the end.

    The targets of several tokens ahead (Gloeckle et al. 2024, arXiv:2404.19737), here all from the same logits."""
    later = [targets_BT[..., k:] for k in range(count)]
    width = targets_BT.shape[-1]
    return torch.stack([F.pad(t, (0, width - t.shape[-1]), value=ignore_index) for t in later], -1)


def _in_columns(targets: torch.Tensor) -> torch.Tensor:
    """(N, K) integers of 64 bits, from (N,) or (N, K)."""
    return (targets if targets.dim() == 2 else targets[:, None]).long()


def _reduced(total: torch.Tensor, targets_NK: torch.Tensor, reduction: str, ignore_index: int) -> torch.Tensor:
    """total, or for "mean" total over the number of tokens with a target that counts. If there is none: NaN, as torch
    has it, but with a gradient of 0."""
    if reduction == "sum":
        return total
    counted = (targets_NK != ignore_index).any(1).sum()
    return torch.where(counted > 0, total / counted.clamp(min=1), torch.nan)


def _wide(x: torch.Tensor) -> torch.dtype:
    """The dtype of losses and sums for an input: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """gradient * factor (a number) in at least float32, rounded once, to `dtype` or the gradient's own."""
    return (gradient.to(_wide(gradient)) * factor).to(dtype or gradient.dtype)


# ---- plain torch: rows of logits become their losses and their gradients ----------------------------------


def _softcap_(z: torch.Tensor, softcap: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Soft cap in place; returns (capped logits in z's memory, the cap's derivative or None for 1)."""
    if softcap is None:
        return z, None
    if softcap == "rsqrt":
        z.clamp_(-LOGIT_LIMIT, LOGIT_LIMIT)
        r = (z * z).add_(225).rsqrt_()
        z.mul_(r).mul_(15)
        return z, r.pow_(3).mul_(15 * 225)
    s = z.add_(5).div_(7.5).sigmoid_()
    slope = (1 - s).mul_(s).mul_(23 / 7.5)
    return s.mul_(23), slope


def plain_rows(z_NV, targets_NK, softcap, ignore_index, gradient, *, losses, weights=None):
    """`launch_rows` in plain torch, on any device and in float64 too; `losses` are in at least float32."""
    c, slope = _softcap_(z_NV.to(losses.dtype), softcap)
    counted = targets_NK != ignore_index
    if weights is not None:
        counted = counted & (weights != 0)
    weight_NK = counted.to(c.dtype) if weights is None else torch.where(counted, weights.to(c.dtype), 0.0)
    safe = torch.where(counted, targets_NK, 0)
    weight_N1 = weight_NK.sum(1, keepdim=True)
    picked = torch.where(counted, weight_NK * c.gather(1, safe), 0.0).sum(1)
    # Capped logits lie within 23 of zero, so their exponentials need no subtracted maximum.
    shift = c.amax(1, keepdim=True) if softcap is None else None
    e = c.exp_() if shift is None else c.sub_(shift).exp_()
    total = e.sum(1, keepdim=True)
    log_total = total.log() if shift is None else total.log() + shift
    losses.copy_(torch.where(counted.any(1), (weight_N1 * log_total)[:, 0] - picked, 0.0))
    if gradient:
        e.mul_(weight_N1 / total).scatter_add_(1, safe, -weight_NK)
        gradient_NV = e if slope is None else e.mul_(slope)
        if gradient_NV.dtype != z_NV.dtype:  # else it lies where the logits lay
            z_NV.copy_(gradient_NV)


# ---- Triton: a row of logits becomes its loss and its gradient --------------------------------------------
# Prefixes: p_ pointer, b_ block of values, o_ offset, m_ mask.


_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _capped(b_z, weight, CAP: tl.constexpr):
    """(soft-capped logits, weight times the derivative of the cap) in float32."""
    if CAP == 1:  # rsqrt; a NaN stays one: a run that diverged must not look as if its logits were at the limit
        b_z = tl.maximum(b_z, -1e6, propagate_nan=tl.PropagateNan.ALL)
        b_z = tl.minimum(b_z, 1e6, propagate_nan=tl.PropagateNan.ALL)
        b_r = tl.rsqrt(b_z * b_z + 225)
        return 15 * b_z * b_r, 15 * 225 * weight * b_r * b_r * b_r
    elif CAP == 2:  # sigmoid
        b_s = 1 / (1 + tl.exp2((b_z + 5) * (-_LOG2_E / 7.5)))
        return 23 * b_s, 23 / 7.5 * weight * b_s * (1 - b_s)
    else:
        return b_z, weight  # not b_z * 0 + 1, which is NaN for a logit of -inf


@triton.jit
def _load_capped(p_z, o, V, weight, CAP: tl.constexpr, MASKED: tl.constexpr):
    """(capped logits of the classes o, -inf from V on; the weighted derivative of the cap)."""
    if MASKED:
        b_c, b_slope = _capped(tl.load(p_z + o, mask=o < V, other=0.0).to(tl.float32), weight, CAP)
        return tl.where(o < V, b_c, float("-inf")), b_slope
    else:
        return _capped(tl.load(p_z + o).to(tl.float32), weight, CAP)


@triton.jit
def _store_gradient(p_g, b_g, p_scale, mask, LIMIT: tl.constexpr):
    """Write b_g, or, LIMIT, b_g / scale in 8 bits, saturated at it."""
    if LIMIT > 0:
        b_g = saturated(b_g / tl.load(p_scale), LIMIT)
    tl.store(p_g, b_g.to(p_g.dtype.element_ty), mask=mask)


@triton.jit
def _store_softmax(p_g, o, b_c, b_slope, log_total, V, p_scale, MASKED: tl.constexpr, LIMIT: tl.constexpr):
    """g <- weight softmax(c) dc/dz, the loss's gradient but for the targets' classes."""
    b_g = tl.exp2((b_c - log_total) * _LOG2_E) * b_slope
    _store_gradient(p_g + o, b_g, p_scale, o < V if MASKED else None, LIMIT)


@triton.jit
def _add_exponentials(b_most, b_total, b_c, CAP: tl.constexpr):
    """(largest logit so far, sum of exp(logit - largest)), lane by lane, with the logits b_c added.

    Capped logits lie within 23 of zero: their exponentials need no largest, which saves half of them."""
    if CAP > 0:
        return b_most, b_total + tl.exp2(b_c * _LOG2_E)
    b_new = tl.maximum(b_most, b_c)
    # a lane that has seen no class yet keeps -inf; subtracting it from itself would be NaN
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
    return b_new, b_total * tl.exp(b_most - b_shift) + tl.exp(b_c - b_shift)


@triton.jit
def _log_sum(b_most, b_total, CAP: tl.constexpr):
    """log sum exp over all lanes of `_add_exponentials`."""
    if CAP > 0:
        return tl.log(tl.sum(b_total, 0))
    most = tl.max(b_most, 0)
    b_shift = tl.where(b_most == float("-inf"), most, b_most)
    return most + tl.log(tl.sum(b_total * tl.exp(b_shift - most), 0))


@triton.jit
def _targets(p_target, p_weight, row, V, ignore_index, K: tl.constexpr, COLUMNS: tl.constexpr, WEIGHTED: tl.constexpr):
    """Of a row's K targets: (classes, 0 where there is none; weights, 0 where there is none; which count; which of
    those are classes). A weight of 0 leaves its target out. WEIGHTED: 1 by one weight a column, 2 one a target."""
    o_k = tl.arange(0, COLUMNS)
    b_target = tl.load(p_target + row * K + o_k, mask=o_k < K, other=ignore_index)
    m_counted = b_target != ignore_index
    if WEIGHTED > 0:
        o_weight = row * K + o_k if WEIGHTED == 2 else o_k
        b_weight = tl.load(p_weight + o_weight, mask=o_k < K, other=0.0)
        m_counted = m_counted & (b_weight != 0)
    else:
        b_weight = tl.full([COLUMNS], 1.0, tl.float32)
    m_known = m_counted & (b_target >= 0) & (b_target < V)
    return tl.where(m_known, b_target, 0), tl.where(m_counted, b_weight, 0.0), m_counted, m_known


@triton.jit
def _row_loss(
    p_z,
    p_target,
    p_weight,
    p_loss,
    p_g,
    p_scale,
    V,
    ignore_index,
    K: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    LIMIT: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One row of logits (V,): loss = sum_k w_k (log sum exp(cap(z)) - cap(z[target_k])); if GRADIENT, g <- d loss / dz.

    g may be z. LIMIT, if not 0: g is in 8 bits, d loss / dz over a scale, saturated at LIMIT.
    ONE: the whole row is one block, kept in registers. Else it is V // BLOCK blocks without a mask, and what is left
    in a block of TAIL. A row without a target has loss 0 and gradient 0; one with a target that is no class has NaN for
    both. COLUMNS: a power of two from K on."""
    row = tl.program_id(0).to(tl.int64)
    p_z += row * V
    p_g += row * V
    b_target, b_weight, m_counted, m_known = _targets(p_target, p_weight, row, V, ignore_index, K, COLUMNS, WEIGHTED)
    weight = tl.sum(b_weight, 0)
    any_counted, all_known = tl.max(m_counted.to(tl.int32), 0), tl.min((m_known == m_counted).to(tl.int32), 0)
    b_z_target = tl.load(p_z + b_target).to(tl.float32)
    b_c_target, _ = _capped(b_z_target, 1.0, CAP)
    picked = tl.sum(tl.where(m_counted, b_weight * b_c_target, 0.0), 0)
    o = tl.arange(0, BLOCK)
    whole = V // BLOCK * BLOCK
    if ONE:
        b_c, b_slope = _load_capped(p_z, o, V, weight, CAP, True)
        if CAP > 0:
            log_total = tl.log(tl.sum(tl.exp2(b_c * _LOG2_E), 0))
        else:
            most = tl.max(b_c, 0)
            log_total = most + tl.log(tl.sum(tl.exp(b_c - most), 0))
    else:
        b_most = tl.full([BLOCK], float("-inf"), tl.float32)
        b_total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, whole, BLOCK):
            b_c, b_slope = _load_capped(p_z, start + o, V, weight, CAP, False)
            b_most, b_total = _add_exponentials(b_most, b_total, b_c, CAP)
        log_total = _log_sum(b_most, b_total, CAP)
        if TAIL > 0:
            o_tail = whole + tl.arange(0, TAIL)
            b_c_tail, b_slope_tail = _load_capped(p_z, o_tail, V, weight, CAP, True)
            most = tl.maximum(tl.max(b_c_tail, 0), log_total)
            tail = tl.sum(tl.exp(b_c_tail - most), 0)
            log_total = most + tl.log(tail + tl.exp(log_total - most))
    log_total = tl.where(all_known == 1, log_total, float("nan"))
    tl.store(p_loss + row, tl.where(any_counted == 1, weight * log_total - picked, 0.0))
    if GRADIENT:
        if ONE:
            _store_softmax(p_g, o, b_c, b_slope, log_total, V, p_scale, True, LIMIT)
        else:
            # the second reading of the row, from the second-level cache
            for start in range(0, whole, BLOCK):
                b_c, b_slope = _load_capped(p_z, start + o, V, weight, CAP, False)
                _store_softmax(p_g, start + o, b_c, b_slope, log_total, V, p_scale, False, LIMIT)
            if TAIL > 0:
                _store_softmax(p_g, o_tail, b_c_tail, b_slope_tail, log_total, V, p_scale, True, LIMIT)
        # The targets' classes lack their weights. Few numbers, written again after all threads have written theirs,
        # cost less than asking of every class whether it is a target; read again, so that they take no registers
        # meanwhile. A class that is the target of several columns lacks all their weights, and the first writes it.
        tl.debug_barrier()
        b_target, b_weight, m_counted, m_known = _targets(
            p_target, p_weight, row, V, ignore_index, K, COLUMNS, WEIGHTED
        )
        b_c_target, b_slope_target = _capped(b_z_target, 1.0, CAP)
        o_k = tl.arange(0, COLUMNS)
        m_same = (b_target[:, None] == b_target[None, :]) & (m_known[:, None] & m_known[None, :])
        b_own = tl.sum(tl.where(m_same, b_weight[:, None], 0.0), 0)
        earlier = tl.sum((m_same & (o_k[:, None] < o_k[None, :])).to(tl.int32), 0)
        b_g = (tl.exp(b_c_target - log_total) * weight - b_own) * b_slope_target
        _store_gradient(p_g + b_target, b_g, p_scale, m_known & (earlier == 0), LIMIT)


# ---- launchers --------------------------------------------------------------------------------------------


def chosen_chunk_tokens(classes: int, element_bytes: int, device_bytes: int) -> int:
    """Rows of logits at once on a GPU with `device_bytes` of memory: a power of two.

    By the whole memory, not by what is free at the moment: the order in which dw is summed follows from the chunks, and
    a run and its repetition must have the same. 80 GB take 8192 rows of 50,304 classes, 48 GB 4096, 24 GB 2048."""
    rows = int(device_bytes * CHUNK_SHARE / (classes * element_bytes))
    rows = 1 << max(rows, 1).bit_length() - 1
    return min(max(rows, LEAST_CHUNK_TOKENS), MOST_CHUNK_TOKENS)


def launch_rows(
    z_NV,
    targets,
    softcap: str | None,
    ignore_index: int,
    gradient: bool,
    block: int | None = None,
    losses: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    into: Eight | None = None,
):
    """float32 losses (N,); if `gradient`, z is overwritten by d(sum of losses)/dz, or, with `into`, that is written
    there, in 8 bits and its scale. targets: (N,) or (N, K).

    block: classes a program holds at once, a power of two; None: all of them, if registers suffice.
    losses: where they go, dense; None: a new tensor. weights: of the targets, (K,) or (N, K); None: 1."""
    (N, V), targets_NK = z_NV.shape, _in_columns(targets)
    K = targets_NK.shape[1]
    expect_floats("z", z_NV, KERNEL_DTYPES)
    expect("targets", targets_NK, (N, K), z_NV)
    if weights is not None:
        expect("target_weights", weights, (N, K) if weights.dim() == 2 else (K,), z_NV)
        weights = dense(weights.float())
    block = min(triton.next_power_of_2(V), block or _MOST_IN_REGISTERS)
    one = block >= V
    tail = 0 if one or V % block == 0 else triton.next_power_of_2(V % block)
    lanes = 64 if device_kind().startswith("gfx") else 32
    threads = max(min(block // 16, 512), 4 * lanes)
    two_fit = {} if lanes == 64 else {"maxnreg": min(_REGISTERS // (2 * threads), 255)}
    losses = torch.empty(N, dtype=torch.float32, device=z_NV.device) if losses is None else losses
    if losses.dtype != torch.float32 or not losses.is_contiguous():
        raise ValueError(f"losses go to a dense float32 tensor, got {losses.dtype} of strides {losses.stride()}")
    if into is not None:
        expect("the gradient in 8 bits", into.values, (N, V), z_NV)
        if not into.values.is_contiguous():
            raise ValueError(f"the gradient in 8 bits must be dense, not of strides {into.values.stride()}")
    with in_place("z", z_NV) if gradient and into is None else nullcontext(dense(z_NV)) as walked:
        launch(
            _row_loss,
            (N,),
            walked,
            dense(targets_NK),
            losses if weights is None else weights,
            losses,
            walked if into is None else into.values,
            losses if into is None else into.scale,
            V,
            ignore_index,
            K=K,
            COLUMNS=triton.next_power_of_2(K),
            WEIGHTED=0 if weights is None else weights.dim(),
            CAP=SOFTCAPS.index(softcap) + 1 if softcap else 0,
            GRADIENT=gradient,
            LIMIT=0.0 if into is None else torch.finfo(into.values.dtype).max,
            ONE=one,
            BLOCK=block,
            TAIL=tail,
            num_warps=threads // lanes,
            **two_fit,
        )
    return losses


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """total <- a b if `first`, else total + a b, in float32: inside the product where the device can, so that only it
    touches `total`."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda and torch.compiler.is_compiling():
        part = torch.mm(a, b, out_dtype=total.dtype)
        total.copy_(part) if first else total.add_(part)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


class _Plain:
    """The head's three products in x's dtype, for chunks of tokens, which begin at multiples of `multiple`."""

    multiple = 1

    def __init__(self, x_ND, weight_VD, gradient: bool):
        self.x, self.w, self.gradient = x_ND, weight_VD.to(x_ND.dtype), gradient

    def logits(self, rows: slice) -> torch.Tensor:
        """(C, V), dense."""
        return self.x[rows] @ self.w.t()

    def room(self, z: torch.Tensor) -> Eight | None:
        """Where the gradient at the logits z is to go in 8 bits; None: in their place."""
        return None

    def gradients_(self, g, rows: slice, dx, dw) -> None:
        """dx <- g w and dw += g^T x in place (dw <- g^T x for the first chunk); g (C, V) is the gradient at
        the logits."""
        torch.mm(g, self.w, out=dx)
        _add_product_(dw, g.t(), self.x[rows], rows.start == 0)


#: Tokens whose gradients at the logits, turned in 8 bits, wait for one product with their inputs: each product more
#: reads and writes dw once more. At 50,304 classes they take 1.6 GB.
TOKENS_A_PRODUCT = 32768


class _Eight(_Plain):
    """The same in 8 bits. x and w are converted once, whatever the chunks.

    largest: of x, w and the gradient at the logits, 0 where unknown, which is then measured. Where the gradient's is
    known, so that all chunks share its scale, dw is one product for several of them."""

    multiple = MULTIPLE

    def __init__(self, x_ND, weight_VD, gradient: bool, largest):
        self.x, self.w, self.gradient = x_ND, weight_VD, gradient
        of_x, of_w, self.of_g = largest
        if gradient:
            self.x_8, self.x_turned = both_ways(x_ND, E4M3, of_x)
            self.w_8, self.w_turned = both_ways(weight_VD, E4M3, of_w)
        else:
            self.x_8, self.w_8 = in_8_bits(x_ND, E4M3, of_x), in_8_bits(weight_VD, E4M3, of_w)
        known = isinstance(self.of_g, torch.Tensor) or self.of_g > 0
        self.scale = scale_for(x_ND, E5M2, self.of_g) if gradient and known else None
        self.waiting: Eight | None = None  # gradients of rows from `first` on, turned
        self.first = 0

    def _filled(self, rows: slice) -> slice:
        """The rows with those of zeros that fill them up to a multiple of 16."""
        count = len(range(*rows.indices(len(self.x))))
        return slice(rows.start, rows.start - -count // MULTIPLE * MULTIPLE)

    def logits(self, rows: slice) -> torch.Tensor:
        z = product(self.x_8.rows(self._filled(rows)), self.w_8, self.x.dtype, fast=True)
        return z[: len(self.x[rows]), : len(self.w)].contiguous()

    def room(self, z: torch.Tensor) -> Eight | None:
        if self.scale is None or any(size % MULTIPLE for size in z.shape):
            return None
        return Eight(torch.empty(z.shape, dtype=E5M2, device=z.device), self.scale)

    def gradients_(self, g, rows: slice, dx, dw) -> None:
        if isinstance(g, Eight):
            _into(dx, g, self.w_turned)
            self._wait(g, rows, dw)
        else:
            self._multiply(dw)
            g_8, g_turned = both_ways(g, E5M2, self.of_g)
            _into(dx, g_8, self.w_turned)
            _into(dw, g_turned, self.x_turned.columns(self._filled(rows)), add=rows.start > 0)

    def _wait(self, g: Eight, rows: slice, dw) -> None:
        """Put the gradient of the rows beside those that wait, and multiply them where there is no room for more."""
        (tokens, classes), left = g.values.shape, len(self.x) - rows.start
        if self.waiting is None:
            ragged = left % tokens  # a last chunk that comes in another form waits with nobody
            room = min(max(TOKENS_A_PRODUCT // tokens, 1) * tokens, left - (ragged if ragged % MULTIPLE else 0))
            self.waiting = Eight(g.values.new_empty(classes, room), g.scale)
            self.first = rows.start
        begin = rows.start - self.first
        launch_turn(g.values, self.waiting.values[:, begin : begin + tokens])
        if begin + tokens == self.waiting.values.shape[1]:
            self._multiply(dw)

    def _multiply(self, dw) -> None:
        """dw += g^T x, or dw <- g^T x for the first ones, of what waits."""
        if self.waiting is not None:
            waiting, self.waiting = self.waiting, None
            columns = slice(self.first, self.first + waiting.values.shape[1])
            _into(dw, waiting, self.x_turned.columns(columns), add=self.first > 0)


def _into(out: torch.Tensor, a: Eight, b: Eight, add: bool = False) -> None:
    """out <- a b^T, or `add`ed to it, cut to out's size."""
    whole = out.shape == (len(a.values), len(b.values)) and out.is_contiguous()
    if whole and out.is_cuda and not add and not torch.compiler.is_compiling():
        product(a, b, out.dtype, out=out)
        return
    part = product(a, b, out.dtype)[: out.shape[0], : out.shape[1]]
    out.add_(part) if add else out.copy_(part)


def _in_chunks(rows_of, products, targets_NK, softcap, ignore_index, chunk_tokens, weights=None):
    """(losses (N,), dx, dw): the head's products and what `rows_of` makes of logits, chunk by chunk.

    weights: (K,) or (N, K), of the targets. Losses and dw are in at least float32; dx and dw are empty if the products
    are without gradient."""
    x_ND, gradient = products.x, products.gradient
    N, wide = x_ND.shape[0], _wide(x_ND)
    losses = torch.empty(N, dtype=wide, device=x_ND.device)
    dx_ND = x_ND.new_empty(x_ND.shape if gradient else 0)
    # the first chunk writes dw and the others add to it; without any chunk it is 0
    dw_VD = x_ND.new_empty((products.w.shape[0], x_ND.shape[1]) if gradient else 0, dtype=wide)
    if N == 0:
        dw_VD.zero_()
    chunk_tokens = -(-chunk_tokens // products.multiple) * products.multiple
    for start in range(0, N, chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        z = products.logits(rows)
        own = weights if weights is None or weights.dim() == 1 else weights[rows]
        how = dict(losses=losses[rows], weights=own)
        into = products.room(z) if gradient and rows_of is launch_rows else None
        if into is not None:
            how["into"] = into
        rows_of(z, targets_NK[rows], softcap, ignore_index, gradient, **how)
        g = z if into is None else into
        del z, into, how  # with a gradient in 8 bits the logits are done with before its products
        if gradient:
            products.gradients_(g, rows, dx_ND[rows], dw_VD)
        del g  # before the next chunk's logits, or two chunks would exist
    return losses, dx_ND, dw_VD


def _times(upstream_N: torch.Tensor, weights_K: torch.Tensor | None, columns: int) -> torch.Tensor:
    """(N, K): the weights of each token's targets in sum_n upstream_n loss_n."""
    return upstream_N[:, None].expand(-1, columns) if weights_K is None else upstream_N[:, None] * weights_K


def _products_for(x_ND, weight_VD, gradient: bool, largest, weights=None):
    """The head's products: in 8 bits if `largest` is not empty, see `_Eight`.

    weights: of the targets. If they are those of columns, what is differentiated is the losses' sum, and then the
    largest gradient at the logits is known: their sum, as each soft cap's slope is at most one."""
    if len(largest) == 0:
        return _Plain(x_ND, weight_VD, gradient)
    of_x, of_w, of_g = largest
    if of_g == 0 and weights is None:
        of_g = 1.0
    elif of_g == 0 and weights.dim() == 1:
        of_g = weights.abs().sum()
    return _Eight(x_ND, weight_VD, gradient, (of_x, of_w, of_g))


def launch_head(
    x_ND, weight_VD, targets, softcap, ignore_index, chunk_tokens, fp8, gradient, upstream_N=None, weights_K=None
):
    """(losses (N,), dx, dw), dw in float32; dx and dw are empty without `gradient`.

    chunk_tokens: 0 is `chosen_chunk_tokens` of x's device. fp8: empty, or `largest` of `_Eight`. The gradients are
    those of the losses' sum, weighted by `upstream_N` (N,) if given; the losses are not then what they are else."""
    if not chunk_tokens:
        memory = torch.cuda.get_device_properties(x_ND.device).total_memory if x_ND.is_cuda else 0
        chunk_tokens = chosen_chunk_tokens(weight_VD.shape[0], x_ND.element_size(), memory)
    targets_NK = _in_columns(targets)
    weights = weights_K if upstream_N is None else _times(upstream_N, weights_K, targets_NK.shape[1])
    products = _products_for(x_ND, weight_VD, gradient, fp8, weights)
    return _in_chunks(launch_rows, products, targets_NK, softcap or None, ignore_index, chunk_tokens, weights)


# ---- plain torch, differentiable --------------------------------------------------------------------------


class _ChunkedLoss(torch.autograd.Function):
    """Summed loss and both gradients in one pass over chunks of tokens, in plain torch: the CPU's fast path.

    The gradients are computed in the forward pass, where the logits are, for an upstream gradient of one, and
    scaled in the backward pass. Memory: one chunk of logits, dx and dw.
    """

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_NK, weights_K, how, fp8, with_gradient):
        products = _products_for(x_ND, weight_VD, with_gradient, fp8, weights_K)
        losses, dx_ND, dw_VD = _in_chunks(plain_rows, products, targets_NK, *how, weights_K)
        ctx.save_for_backward(dx_ND, dw_VD)
        ctx.weight_dtype = weight_VD.dtype
        return losses.sum()

    @staticmethod
    @differentiable_once("linear_cross_entropy")
    def backward(ctx, upstream):
        dx_ND, dw_VD = ctx.saved_tensors
        return _scaled(dx_ND, upstream), _scaled(dw_VD, upstream, ctx.weight_dtype), *[None] * 5


class _TokenLosses(torch.autograd.Function):
    """Per-token losses (N,) chunk by chunk; the backward pass computes the logits again, chunk by chunk."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_NK, weights_K, how, fp8):
        ctx.save_for_backward(x_ND, weight_VD, targets_NK, weights_K)
        ctx.how, ctx.fp8 = how, fp8
        products = _products_for(x_ND, weight_VD, False, fp8)
        return _in_chunks(plain_rows, products, targets_NK, *how, weights_K)[0]

    @staticmethod
    @differentiable_once("linear_cross_entropy")
    def backward(ctx, upstream_N):
        x_ND, weight_VD, targets_NK, weights_K = ctx.saved_tensors
        weights = _times(upstream_N, weights_K, targets_NK.shape[1])
        products = _products_for(x_ND, weight_VD, True, ctx.fp8, weights)
        _, dx_ND, dw_VD = _in_chunks(plain_rows, products, targets_NK, *ctx.how, weights)
        return dx_ND, dw_VD.to(weight_VD.dtype), *[None] * 4


# ---- torch operators --------------------------------------------------------------------------------------


@torch.library.custom_op("speedrun::head_loss", mutates_args=())
def _head_loss(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_NK: torch.Tensor,
    weights_K: torch.Tensor | None,
    softcap: str,
    ignore_index: int,
    chunk_tokens: int,
    fp8: Sequence[float],
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of the losses, dx, dw): the gradients of that sum, for an upstream gradient of one."""
    arguments = (x_ND, weight_VD, targets_NK, softcap, ignore_index, chunk_tokens, fp8, gradient)
    losses, dx, dw = launch_head(*arguments, weights_K=weights_K)
    return losses.sum(), dx, dw


@_head_loss.register_fake
def _(x_ND, weight_VD, targets_NK, weights_K, softcap, ignore_index, chunk_tokens, fp8, gradient):
    total = x_ND.new_empty((), dtype=torch.float32)
    if not gradient:
        return total, x_ND.new_empty(0), x_ND.new_empty(0, dtype=torch.float32)
    return total, x_ND.new_empty(x_ND.shape), x_ND.new_empty(weight_VD.shape, dtype=torch.float32)


def _head_setup(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2])
    ctx.weight_dtype = inputs[1].dtype
    ctx.mark_non_differentiable(output[1], output[2])


@differentiable_once("linear_cross_entropy")
def _head_grad(ctx, upstream, *_):
    dx_ND, dw_VD = ctx.saved_tensors
    return _scaled(dx_ND, upstream), _scaled(dw_VD, upstream, ctx.weight_dtype), *[None] * 7


_head_loss.register_autograd(_head_grad, setup_context=_head_setup)


@torch.library.custom_op("speedrun::head_token_losses", mutates_args=())
def _head_token_losses(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_NK: torch.Tensor,
    weights_K: torch.Tensor | None,
    softcap: str,
    ignore_index: int,
    chunk_tokens: int,
    fp8: Sequence[float],
) -> torch.Tensor:
    """Losses (N,) whose backward pass takes a gradient a token."""
    arguments = (x_ND, weight_VD, targets_NK, softcap, ignore_index, chunk_tokens, fp8, False)
    return launch_head(*arguments, weights_K=weights_K)[0]


@torch.library.custom_op("speedrun::head_gradients", mutates_args=())
def _head_gradients(
    upstream_N: torch.Tensor,
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_NK: torch.Tensor,
    weights_K: torch.Tensor | None,
    softcap: str,
    ignore_index: int,
    chunk_tokens: int,
    fp8: Sequence[float],
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dw) of sum_n upstream_n loss_n."""
    arguments = (x_ND, weight_VD, targets_NK, softcap, ignore_index, chunk_tokens, fp8, True)
    return launch_head(*arguments, upstream_N, weights_K)[1:]


@_head_token_losses.register_fake
def _(x_ND, weight_VD, targets_NK, weights_K, softcap, ignore_index, chunk_tokens, fp8):
    return x_ND.new_empty(x_ND.shape[0], dtype=torch.float32)


@_head_gradients.register_fake
def _(upstream_N, x_ND, weight_VD, targets_NK, weights_K, softcap, ignore_index, chunk_tokens, fp8):
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(weight_VD.shape, dtype=torch.float32)


def _token_losses_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4])
    ctx.options = inputs[4:]


@differentiable_once("linear_cross_entropy")
def _token_losses_grad(ctx, upstream_N):
    x_ND, weight_VD, *others = ctx.saved_tensors
    dx_ND, dw_VD = _head_gradients(upstream_N, x_ND, weight_VD, *others, *ctx.options)
    return dx_ND, dw_VD.to(weight_VD.dtype), *[None] * 6


_head_token_losses.register_autograd(_token_losses_grad, setup_context=_token_losses_setup)


# ---- public functions -------------------------------------------------------------------------------------


def implementation(impl: str, tensor: torch.Tensor) -> str:
    """The name of what would run: triton | reference (chunks, own gradient) | eager (all logits)."""
    choices = ("triton", "reference", "eager")
    return implementation_of(impl, tensor, cpu="reference", choices=choices)


@without_autocast
def linear_cross_entropy(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets: torch.Tensor,
    *,
    target_weights: torch.Tensor | None = None,
    softcap: str | None = "rsqrt",
    reduction: str = "mean",
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    fp8: bool | tuple[float, float, float] = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of softcap(x w^T) without ever holding all logits.

    targets: integers (N,), or (N, K) for K targets a token, all from the same logits: its loss is then the sum of
    theirs. `next_targets` makes the columns of several tokens ahead; a token without a target in some column has
    `ignore_index` there.
    target_weights: (K,), of the columns, not divided by their sum; None: 1. A tensor, so that a weight that changes
    compiles nothing. A weight of 0 leaves its column out. It gets no gradient.
    reduction: "mean" over the tokens with a target that is not `ignore_index`, "sum", or "none" for float32 losses
    (N,), zero where all is ignored.
    chunk_tokens: rows of x whose logits are in memory at once (None: chosen for the device); in 8 bits the next
    multiple of 16.
    fp8: products of the head in 8 bits, on GPUs that have them and, slowly, on a CPU: True, or the largest numbers of
    x, the weight and the gradient at the logits of the losses' sum, which fix the scales (0 for one to be measured).
    impl: "auto" | "triton" | "reference" (plain torch in chunks) | "eager" (plain torch, all logits).
    Errors: ValueError for shapes, devices or options that do not fit and, where asking costs no wait, for a target that
    is no class (on a GPU its loss and gradient are NaN); TypeError for dtypes.
    """
    _check(x_ND, weight_VD, targets, target_weights, softcap, reduction, chunk_tokens)
    impl, targets_NK = implementation(impl, x_ND), _in_columns(targets)
    largest = (0.0, 0.0, 0.0) if fp8 is True else tuple(float(size) for size in fp8 or ())
    if largest and impl == "eager":
        raise ValueError("fp8 goes with impl='triton' or 'reference': the definition has no products in 8 bits")
    if largest and not available_on(x_ND.device):
        raise ValueError(f"fp8 needs one of {', '.join(FP8_DEVICES)} or a CPU, and this device is {device_kind()}")
    given = (x_ND, weight_VD, targets_NK, target_weights)
    if impl == "triton":
        return _on_gpu(*given, softcap, reduction, ignore_index, chunk_tokens, largest)
    if x_ND.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_classes(targets_NK, weight_VD.shape[0], ignore_index)
    if impl == "eager":
        return linear_cross_entropy_reference(*given[:3], softcap, reduction, ignore_index, target_weights)
    # On a GPU few large chunks: a compiled graph has the steps of every one of them.
    chosen = MOST_CHUNK_TOKENS if x_ND.is_cuda else max(CPU_CHUNK_LOGITS // weight_VD.shape[0], 64)
    how = softcap, ignore_index, chunk_tokens or chosen
    if reduction == "none":
        return _TokenLosses.apply(*given, how, largest)
    total = _ChunkedLoss.apply(*given, how, largest, _asks_for_gradients(x_ND, weight_VD))
    return _reduced(total, targets_NK, reduction, ignore_index)


def _asks_for_gradients(*tensors: torch.Tensor) -> bool:
    """Whether a loss of these will be differentiated: a validation pays for no gradient."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _on_gpu(x_ND, weight_VD, targets_NK, weights_K, softcap, reduction, ignore_index, chunk_tokens, largest):
    """The Triton way of `linear_cross_entropy`."""
    expect_floats("x", x_ND, KERNEL_DTYPES)
    refuse_tangents("linear_cross_entropy", x_ND, weight_VD)
    how = (softcap or "", ignore_index, chunk_tokens or 0, largest)
    arguments = (dense(x_ND), weight_VD, targets_NK, weights_K, *how)
    if reduction == "none":
        return _head_token_losses(*arguments)
    total = _head_loss(*arguments, _asks_for_gradients(x_ND, weight_VD))[0]
    return _reduced(total, targets_NK, reduction, ignore_index)


def _check(x_ND, weight_VD, targets, target_weights, softcap, reduction, chunk_tokens) -> None:
    """Raise ValueError, naming the argument, for shapes or options that cannot work."""
    if softcap not in SOFTCAPS:
        raise ValueError(f"softcap={softcap!r} is unknown; choose one of {SOFTCAPS}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; choose one of {REDUCTIONS}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1 (or None: chosen for the device)")
    if x_ND.dim() != 2 or weight_VD.dim() != 2 or x_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"x {tuple(x_ND.shape)} and weight {tuple(weight_VD.shape)} must be (N, D) and (V, D)")
    if weight_VD.shape[0] == 0:
        raise ValueError(f"weight {tuple(weight_VD.shape)} has no class")
    for name, x in (("x", x_ND), ("weight", weight_VD)):
        expect(name, x, x.shape, x_ND)
        expect_floats(name, x)
    columns = targets.shape[1:] if targets.dim() == 2 else ()
    expect("targets", targets, (*x_ND.shape[:1], *columns), x_ND)
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise TypeError(f"targets have dtype {targets.dtype}; they are classes: integers")
    if target_weights is not None:
        expect("target_weights", target_weights, columns or (1,), x_ND)
        expect_floats("target_weights", target_weights)
        if target_weights.requires_grad:
            raise ValueError("target_weights ask for a gradient, and linear_cross_entropy has none for them: detach()")


def _check_classes(targets_NK: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for a target that is neither a class nor ignored."""
    wrong = (targets_NK != ignore_index) & ((targets_NK < 0) | (targets_NK >= classes))
    if wrong.any():
        token, column = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"targets[{token}] = {int(targets_NK[token, column])} is neither one of {classes} classes nor "
            f"ignore_index={ignore_index}"
        )
