"""Fused linear layer, soft cap and cross-entropy: the language model's head and its loss.

    z = x w^T                              (N, V)   N tokens, D model width, V classes, the padding's too
    c = softcap(z)                         15 z / sqrt(z^2 + 225)  or  23 sigmoid((z + 5) / 7.5)  or  z
    loss_n = log sum_v exp(c_nv) - c_n,target_n

x is (N, D) in bfloat16 or float32; w is the float32 master (V, D), cast to x's dtype for the products; targets are
(N,) integers. Losses are float32, dx has x's dtype, dw is accumulated in float32.

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

from contextlib import nullcontext

import torch

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
from kernels.products8 import E5M2, MULTIPLE, in_8_bits, product
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
    z = torch.nn.functional.linear(x_ND, weight_VD.to(x_ND.dtype))
    return _apply_softcap(z.to(torch.promote_types(z.dtype, torch.float32)), softcap)


def linear_cross_entropy_reference(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    softcap: str | None = "rsqrt",
    reduction: str = "mean",
    ignore_index: int = -100,
) -> torch.Tensor:
    """The definition, in plain torch with all logits in memory; autograd differentiates it."""
    c_NV, targets_N = softcapped_logits(x_ND, weight_VD, softcap), targets_N.long()
    summed = "none" if reduction == "none" else "sum"
    losses = torch.nn.functional.cross_entropy(c_NV, targets_N, reduction=summed, ignore_index=ignore_index)
    return _mean(losses, targets_N, ignore_index) if reduction == "mean" else losses


def _mean(total: torch.Tensor, targets_N: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """total over the number of targets that count. If none does: NaN, as torch has it, but with a gradient of 0."""
    counted = (targets_N != ignore_index).sum()
    return torch.where(counted > 0, total / counted.clamp(min=1), torch.nan)


# ---- the plain-torch way in chunks ------------------------------------------------------------------------


def _wide(x: torch.Tensor) -> torch.dtype:
    """The dtype of losses and sums for an input: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _matmul_f32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, accumulated and returned in at least float32 whatever the inputs' dtype."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


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


def _chunk_loss(x, w, targets, softcap, ignore_index, with_gradient):
    """Losses (C,) of a chunk of C tokens and d(sum of losses)/dz (C, V), or None without gradient."""
    z = (x @ w.t()).to(_wide(x))
    c, slope = _softcap_(z, softcap)
    keep = targets != ignore_index
    safe = torch.where(keep, targets, 0).long()[:, None]
    c_target = c.gather(1, safe)
    # Capped logits lie within 23 of zero, so their exponentials need no subtracted maximum.
    shift = c.amax(1, keepdim=True) if softcap is None else None
    e = c.exp_() if shift is None else c.sub_(shift).exp_()
    total = e.sum(1, keepdim=True)
    log_total = total.log() if shift is None else total.log() + shift
    losses = torch.where(keep, (log_total - c_target)[:, 0], 0.0)
    if not with_gradient:
        return losses, None
    keep = keep[:, None].to(e.dtype)
    e.mul_(keep / total).scatter_add_(1, safe, -keep)
    return losses, e if slope is None else e.mul_(slope)


class _ChunkedLoss(torch.autograd.Function):
    """Summed loss and both gradients in one pass over chunks of tokens, in plain torch: the CPU's fast path.

    The gradients are computed in the forward pass, where the logits are, for an upstream gradient of one, and
    scaled in the backward pass. Memory: one chunk of logits, dx and dw.
    """

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_N, softcap, ignore_index, chunk_tokens, with_gradient):
        w_VD = weight_VD.to(x_ND.dtype)
        dx_ND = x_ND.new_empty(x_ND.shape) if with_gradient else None
        dw_VD = torch.zeros_like(weight_VD, dtype=_wide(x_ND)) if with_gradient else None
        total = torch.zeros((), dtype=_wide(x_ND), device=x_ND.device)
        for start in range(0, x_ND.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            losses, gradient = _chunk_loss(x_ND[rows], w_VD, targets_N[rows], softcap, ignore_index, with_gradient)
            total += losses.sum()
            if with_gradient:
                gradient = gradient.to(x_ND.dtype)
                torch.mm(gradient, w_VD, out=dx_ND[rows])
                dw_VD += _matmul_f32(gradient.t(), x_ND[rows])
        if with_gradient:
            ctx.save_for_backward(dx_ND, dw_VD)
            ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @differentiable_once("linear_cross_entropy")
    def backward(ctx, upstream):
        dx_ND, dw_VD = ctx.saved_tensors
        return _scaled(dx_ND, upstream), _scaled(dw_VD, upstream, ctx.weight_dtype), *[None] * 5


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """gradient * factor (a number) in at least float32, rounded once, to `dtype` or the gradient's own."""
    return (gradient.to(_wide(gradient)) * factor).to(dtype or gradient.dtype)


class _TokenLosses(torch.autograd.Function):
    """Per-token losses (N,) chunk by chunk; the backward pass computes the logits again, chunk by chunk."""

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_N, softcap, ignore_index, chunk_tokens):
        w_VD = weight_VD.to(x_ND.dtype)
        losses_N = torch.empty(x_ND.shape[0], dtype=_wide(x_ND), device=x_ND.device)
        for start in range(0, x_ND.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            losses_N[rows] = _chunk_loss(x_ND[rows], w_VD, targets_N[rows], softcap, ignore_index, False)[0]
        ctx.save_for_backward(x_ND, weight_VD, targets_N)
        ctx.options = (softcap, ignore_index, chunk_tokens)
        return losses_N

    @staticmethod
    @differentiable_once("linear_cross_entropy")
    def backward(ctx, upstream_N):
        x_ND, weight_VD, targets_N = ctx.saved_tensors
        softcap, ignore_index, chunk_tokens = ctx.options
        w_VD = weight_VD.to(x_ND.dtype)
        dx_ND = x_ND.new_empty(x_ND.shape)
        dw_VD = torch.zeros_like(weight_VD, dtype=_wide(x_ND))
        for start in range(0, x_ND.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            gradient = _chunk_loss(x_ND[rows], w_VD, targets_N[rows], softcap, ignore_index, True)[1]
            gradient = gradient.mul_(upstream_N[rows, None]).to(x_ND.dtype)
            torch.mm(gradient, w_VD, out=dx_ND[rows])
            dw_VD += _matmul_f32(gradient.t(), x_ND[rows])
        return dx_ND, dw_VD.to(weight_VD.dtype), None, None, None, None


# ---- Triton: a row of logits becomes its loss and its gradient --------------------------------------------
# Prefixes: p_ pointer, b_ block of values, o_ offset, m_ mask.


_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def _capped(b_z, CAP: tl.constexpr):
    """(soft-capped logits, the derivative of the cap) in float32."""
    if CAP == 1:  # rsqrt; a NaN stays one: a run that diverged must not look as if its logits were at the limit
        b_z = tl.maximum(b_z, -1e6, propagate_nan=tl.PropagateNan.ALL)
        b_z = tl.minimum(b_z, 1e6, propagate_nan=tl.PropagateNan.ALL)
        b_r = tl.rsqrt(b_z * b_z + 225)
        return 15 * b_z * b_r, 15 * 225 * b_r * b_r * b_r
    elif CAP == 2:  # sigmoid
        b_s = 1 / (1 + tl.exp2((b_z + 5) * (-_LOG2_E / 7.5)))
        return 23 * b_s, 23 / 7.5 * b_s * (1 - b_s)
    else:
        return b_z, 1.0  # not b_z * 0 + 1, which is NaN for a logit of -inf


@triton.jit
def _load_capped(p_z, o, V, CAP: tl.constexpr, MASKED: tl.constexpr):
    """(capped logits of the classes o, -inf from V on; the derivative of the cap)."""
    if MASKED:
        b_c, b_slope = _capped(tl.load(p_z + o, mask=o < V, other=0.0).to(tl.float32), CAP)
        return tl.where(o < V, b_c, float("-inf")), b_slope
    else:
        return _capped(tl.load(p_z + o).to(tl.float32), CAP)


@triton.jit
def _store_softmax(p_z, o, b_c, b_slope, log_total, V, MASKED: tl.constexpr):
    """z <- softmax(c) dc/dz, the loss's gradient but for the target's class."""
    b_g = tl.exp2((b_c - log_total) * _LOG2_E) * b_slope
    if MASKED:
        tl.store(p_z + o, b_g.to(p_z.dtype.element_ty), mask=o < V)
    else:
        tl.store(p_z + o, b_g.to(p_z.dtype.element_ty))


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
def _row_loss(
    p_z,
    p_target,
    p_loss,
    V,
    ignore_index,
    CAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    ONE: tl.constexpr,
    BLOCK: tl.constexpr,
    TAIL: tl.constexpr,
):
    """One row of logits (V,): loss = log sum exp(cap(z)) - cap(z[target]); if GRADIENT, z <- d loss / d z.

    ONE: the whole row is one block, kept in registers. Else it is V // BLOCK blocks without a mask, and what is left
    in a block of TAIL. An ignored row has loss 0 and gradient 0; a target that is no class has NaN for both."""
    row = tl.program_id(0).to(tl.int64)
    p_z += row * V
    target = tl.load(p_target + row)
    counted = target != ignore_index
    known = (target >= 0) & (target < V)
    p_z_target = p_z + tl.where(counted & known, target, 0)
    c_target, slope_target = _capped(tl.load(p_z_target).to(tl.float32), CAP)
    o = tl.arange(0, BLOCK)
    whole = V // BLOCK * BLOCK
    if ONE:
        b_c, b_slope = _load_capped(p_z, o, V, CAP, True)
        if CAP > 0:
            log_total = tl.log(tl.sum(tl.exp2(b_c * _LOG2_E), 0))
        else:
            most = tl.max(b_c, 0)
            log_total = most + tl.log(tl.sum(tl.exp(b_c - most), 0))
    else:
        b_most = tl.full([BLOCK], float("-inf"), tl.float32)
        b_total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, whole, BLOCK):
            b_c, b_slope = _load_capped(p_z, start + o, V, CAP, False)
            b_most, b_total = _add_exponentials(b_most, b_total, b_c, CAP)
        log_total = _log_sum(b_most, b_total, CAP)
        if TAIL > 0:
            o_tail = whole + tl.arange(0, TAIL)
            b_c_tail, b_slope_tail = _load_capped(p_z, o_tail, V, CAP, True)
            most = tl.maximum(tl.max(b_c_tail, 0), log_total)
            tail = tl.sum(tl.exp(b_c_tail - most), 0)
            log_total = most + tl.log(tail + tl.exp(log_total - most))
    log_total = tl.where(known, log_total, float("nan"))
    tl.store(p_loss + row, tl.where(counted, log_total - c_target, 0.0))
    if GRADIENT:
        log_total = tl.where(counted, log_total, float("inf"))  # every probability of an ignored row becomes 0
        if ONE:
            _store_softmax(p_z, o, b_c, b_slope, log_total, V, True)
        else:
            # the second reading of the row, from the second-level cache
            for start in range(0, whole, BLOCK):
                b_c, b_slope = _load_capped(p_z, start + o, V, CAP, False)
                _store_softmax(p_z, start + o, b_c, b_slope, log_total, V, False)
            if TAIL > 0:
                _store_softmax(p_z, o_tail, b_c_tail, b_slope_tail, log_total, V, True)
        # The target's class lacks its -1. One number, written again after all threads have written theirs, costs
        # less than asking of every class whether it is the target.
        tl.debug_barrier()
        g_target = (tl.exp(c_target - log_total) - 1) * slope_target
        tl.store(p_z_target, g_target.to(p_z.dtype.element_ty), mask=counted & known)


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
    targets_N,
    softcap: str | None,
    ignore_index: int,
    gradient: bool,
    block: int | None = None,
    losses: torch.Tensor | None = None,
):
    """float32 losses (N,); if `gradient`, z is overwritten by d(sum of losses)/dz.

    block: classes a program holds at once, a power of two; None: all of them, if registers suffice.
    losses: where they go, dense; None: a new tensor."""
    N, V = z_NV.shape
    expect_floats("z", z_NV, KERNEL_DTYPES)
    expect("targets", targets_N, (N,), z_NV)
    block = min(triton.next_power_of_2(V), block or _MOST_IN_REGISTERS)
    one = block >= V
    tail = 0 if one or V % block == 0 else triton.next_power_of_2(V % block)
    lanes = 64 if device_kind().startswith("gfx") else 32
    losses = torch.empty(N, dtype=torch.float32, device=z_NV.device) if losses is None else losses
    if losses.dtype != torch.float32 or not losses.is_contiguous():
        raise ValueError(f"losses go to a dense float32 tensor, got {losses.dtype} of strides {losses.stride()}")
    with in_place("z", z_NV) if gradient else nullcontext(dense(z_NV)) as walked:
        launch(
            _row_loss,
            (N,),
            walked,
            dense(targets_N.long()),
            losses,
            V,
            ignore_index,
            CAP=SOFTCAPS.index(softcap) + 1 if softcap else 0,
            GRADIENT=gradient,
            ONE=one,
            BLOCK=block,
            TAIL=tail,
            num_warps=max(min(block // 16, 512) // lanes, 4),
        )
    return losses


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """total <- a b if `first`, else total + a b, in float32: inside the product where the device can, so that only it
    touches `total`."""
    beta = 0 if first else 1
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, beta=beta, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


class _Plain:
    """The head's three products in x's dtype, for chunks of tokens."""

    def __init__(self, x_ND, weight_VD, gradient: bool):
        self.x, self.w, self.gradient = x_ND, weight_VD.to(x_ND.dtype), gradient

    def logits(self, rows: slice) -> torch.Tensor:
        """(C, V), dense."""
        return self.x[rows] @ self.w.t()

    def gradients_(self, g, rows: slice, dx, dw, unit: bool) -> None:
        """dx <- g w and dw += g^T x in place (dw <- g^T x for the first chunk); g (C, V) is the gradient at the logits,
        at most one if `unit`."""
        torch.mm(g, self.w, out=dx)
        _add_product_(dw, g.t(), self.x[rows], rows.start == 0)


class _Eight(_Plain):
    """The same in 8 bits. x and w are converted once, whatever the chunks; a gradient of the losses' sum is at most one
    (each soft cap's slope is, and so is a probability less its target), so that its scale is known beforehand."""

    def __init__(self, x_ND, weight_VD, gradient: bool):
        super().__init__(x_ND, weight_VD, gradient)
        self.x_8, self.w_8 = in_8_bits(self.x), in_8_bits(self.w)
        if gradient:
            self.x_turned, self.w_turned = self.x_8.turned(), self.w_8.turned()
        self.unit_scale = x_ND.new_tensor(2.0**-15, dtype=torch.float32)

    def _filled(self, rows: slice) -> slice:
        """The rows with those of zeros that fill them up to a multiple of 16."""
        count = len(range(*rows.indices(len(self.x))))
        return slice(rows.start, rows.start - -count // MULTIPLE * MULTIPLE)

    def logits(self, rows: slice) -> torch.Tensor:
        z = product(self.x_8.rows(self._filled(rows)), self.w_8, self.x.dtype)
        return z[: len(self.x[rows]), : len(self.w)].contiguous()

    def gradients_(self, g, rows: slice, dx, dw, unit: bool) -> None:
        g_8 = in_8_bits(g, E5M2, self.unit_scale if unit else None)
        dx.copy_(product(g_8, self.w_turned, dx.dtype)[: dx.shape[0], : dx.shape[1]])
        part = product(g_8.turned(), self.x_turned.columns(self._filled(rows)), dw.dtype)[: dw.shape[0], : dw.shape[1]]
        dw.copy_(part) if rows.start == 0 else dw.add_(part)


def launch_head(x_ND, weight_VD, targets_N, softcap, ignore_index, chunk_tokens, fp8, gradient, upstream_N=None):
    """(losses (N,), dx, dw), dw in float32; dx and dw are empty without `gradient`.

    chunk_tokens: 0 is `chosen_chunk_tokens` of x's device. The gradients are those of the losses' sum, weighted by
    `upstream_N` (N,) if given."""
    if not chunk_tokens:
        memory = torch.cuda.get_device_properties(x_ND.device).total_memory if x_ND.is_cuda else 0
        chunk_tokens = chosen_chunk_tokens(weight_VD.shape[0], x_ND.element_size(), memory)
    products = (_Eight if fp8 else _Plain)(x_ND, weight_VD, gradient)
    losses = torch.empty(x_ND.shape[0], dtype=torch.float32, device=x_ND.device)
    dx_ND = x_ND.new_empty(x_ND.shape) if gradient else x_ND.new_empty(0)
    # the first chunk writes dw and the others add to it; without any chunk it is 0
    dw_VD = x_ND.new_empty(weight_VD.shape, dtype=torch.float32) if gradient else weight_VD.new_empty(0)
    if x_ND.shape[0] == 0:
        dw_VD.zero_()
    for start in range(0, x_ND.shape[0], chunk_tokens):
        rows = slice(start, start + chunk_tokens)
        z = products.logits(rows)
        launch_rows(z, targets_N[rows], softcap or None, ignore_index, gradient, losses=losses[rows])
        if gradient:
            if upstream_N is not None:
                z *= upstream_N[rows, None]
            products.gradients_(z, rows, dx_ND[rows], dw_VD, upstream_N is None)
        del z  # before the next chunk's logits, or two chunks of them would exist
    return losses, dx_ND, dw_VD


# ---- torch operators --------------------------------------------------------------------------------------


@torch.library.custom_op("speedrun::head_loss", mutates_args=())
def _head_loss(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    softcap: str,
    ignore_index: int,
    chunk_tokens: int,
    fp8: bool,
    gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sum of the losses, dx, dw): the gradients of that sum, for an upstream gradient of one."""
    losses, dx, dw = launch_head(x_ND, weight_VD, targets_N, softcap, ignore_index, chunk_tokens, fp8, gradient)
    return losses.sum(), dx, dw


@_head_loss.register_fake
def _(x_ND, weight_VD, targets_N, softcap, ignore_index, chunk_tokens, fp8, gradient):
    total = x_ND.new_empty((), dtype=torch.float32)
    if not gradient:
        return total, x_ND.new_empty(0), weight_VD.new_empty(0)
    return total, x_ND.new_empty(x_ND.shape), x_ND.new_empty(weight_VD.shape, dtype=torch.float32)


def _head_setup(ctx, inputs, output):
    ctx.save_for_backward(output[1], output[2])
    ctx.weight_dtype = inputs[1].dtype
    ctx.mark_non_differentiable(output[1], output[2])


@differentiable_once("linear_cross_entropy")
def _head_grad(ctx, upstream, *_):
    dx_ND, dw_VD = ctx.saved_tensors
    return _scaled(dx_ND, upstream), _scaled(dw_VD, upstream, ctx.weight_dtype), *[None] * 6


_head_loss.register_autograd(_head_grad, setup_context=_head_setup)


@torch.library.custom_op("speedrun::head_token_losses", mutates_args=())
def _head_token_losses(
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    softcap: str,
    ignore_index: int,
    chunk_tokens: int,
    fp8: bool,
) -> torch.Tensor:
    """Losses (N,) whose backward pass takes a gradient a token."""
    return launch_head(x_ND, weight_VD, targets_N, softcap, ignore_index, chunk_tokens, fp8, False)[0]


@torch.library.custom_op("speedrun::head_gradients", mutates_args=())
def _head_gradients(
    upstream_N: torch.Tensor,
    x_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    softcap: str,
    ignore_index: int,
    chunk_tokens: int,
    fp8: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dw) of sum_n upstream_n loss_n."""
    arguments = (x_ND, weight_VD, targets_N, softcap, ignore_index, chunk_tokens, fp8)
    return launch_head(*arguments, True, upstream_N)[1:]


@_head_token_losses.register_fake
def _(x_ND, weight_VD, targets_N, softcap, ignore_index, chunk_tokens, fp8):
    return x_ND.new_empty(x_ND.shape[0], dtype=torch.float32)


@_head_gradients.register_fake
def _(upstream_N, x_ND, weight_VD, targets_N, softcap, ignore_index, chunk_tokens, fp8):
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(weight_VD.shape, dtype=torch.float32)


def _token_losses_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


@differentiable_once("linear_cross_entropy")
def _token_losses_grad(ctx, upstream_N):
    x_ND, weight_VD, targets_N = ctx.saved_tensors
    dx_ND, dw_VD = _head_gradients(upstream_N, x_ND, weight_VD, targets_N, *ctx.options)
    return dx_ND, dw_VD.to(weight_VD.dtype), *[None] * 5


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
    targets_N: torch.Tensor,
    *,
    softcap: str | None = "rsqrt",
    reduction: str = "mean",
    ignore_index: int = -100,
    chunk_tokens: int | None = None,
    fp8: bool = False,
    impl: str = "auto",
) -> torch.Tensor:
    """Cross-entropy of softcap(x w^T) without ever holding all logits.

    reduction: "mean" over the targets that are not `ignore_index`, "sum", or "none" for float32 losses (N,),
    zero where ignored.
    chunk_tokens: rows of x whose logits are in memory at once (None: chosen for the device).
    fp8: products of the head in 8 bits, on GPUs that have them.
    impl: "auto" | "triton" | "reference" (plain torch in chunks) | "eager" (plain torch, all logits).
    Errors: ValueError for shapes, devices or options that do not fit and, where asking costs no wait, for a target that
    is no class (on a GPU its loss and gradient are NaN); TypeError for dtypes.
    """
    _check(x_ND, weight_VD, targets_N, softcap, reduction, chunk_tokens)
    impl, targets_N = implementation(impl, x_ND), targets_N.long()
    if fp8 and impl != "triton":
        raise ValueError("fp8=True is a path of the Triton kernels; it needs a GPU that has 8-bit products")
    if impl == "triton":
        return _on_gpu(x_ND, weight_VD, targets_N, softcap, reduction, ignore_index, chunk_tokens, fp8)
    if x_ND.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_classes(targets_N, weight_VD.shape[0], ignore_index)
    if impl == "eager":
        return linear_cross_entropy_reference(x_ND, weight_VD, targets_N, softcap, reduction, ignore_index)
    # On a GPU few large chunks: a compiled graph has the steps of every one of them.
    chosen = MOST_CHUNK_TOKENS if x_ND.is_cuda else max(CPU_CHUNK_LOGITS // weight_VD.shape[0], 64)
    chunk_tokens = chunk_tokens or chosen
    if reduction == "none":
        return _TokenLosses.apply(x_ND, weight_VD, targets_N, softcap, ignore_index, chunk_tokens)
    gradient = _asks_for_gradients(x_ND, weight_VD)
    total = _ChunkedLoss.apply(x_ND, weight_VD, targets_N, softcap, ignore_index, chunk_tokens, gradient)
    return _mean(total, targets_N, ignore_index) if reduction == "mean" else total


def _asks_for_gradients(*tensors: torch.Tensor) -> bool:
    """Whether a loss of these will be differentiated: a validation pays for no gradient."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _on_gpu(x_ND, weight_VD, targets_N, softcap, reduction, ignore_index, chunk_tokens, fp8):
    """The Triton way of `linear_cross_entropy`."""
    if fp8 and device_kind() not in FP8_DEVICES:
        raise ValueError(f"fp8=True needs one of {', '.join(FP8_DEVICES)}, and this device is {device_kind()}")
    expect_floats("x", x_ND, KERNEL_DTYPES)
    refuse_tangents("linear_cross_entropy", x_ND, weight_VD)
    arguments = (dense(x_ND), weight_VD, targets_N, softcap or "", ignore_index, chunk_tokens or 0, fp8)
    if reduction == "none":
        return _head_token_losses(*arguments)
    total = _head_loss(*arguments, _asks_for_gradients(x_ND, weight_VD))[0]
    return _mean(total, targets_N, ignore_index) if reduction == "mean" else total


def _check(x_ND, weight_VD, targets_N, softcap, reduction, chunk_tokens) -> None:
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
    expect("targets", targets_N, x_ND.shape[:1], x_ND)
    if targets_N.is_floating_point() or targets_N.dtype == torch.bool:
        raise TypeError(f"targets have dtype {targets_N.dtype}; they are classes: integers")


def _check_classes(targets_N: torch.Tensor, classes: int, ignore_index: int) -> None:
    """Raise ValueError for a target that is neither a class nor ignored."""
    wrong = (targets_N != ignore_index) & ((targets_N < 0) | (targets_N >= classes))
    if wrong.any():
        where = int(wrong.nonzero()[0])
        raise ValueError(
            f"targets[{where}] = {int(targets_N[where])} is neither one of {classes} classes nor ignore_index="
            f"{ignore_index}"
        )
