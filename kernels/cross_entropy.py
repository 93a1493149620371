"""Fused linear layer, soft cap and cross-entropy: the language model's head and its loss.

    z = x w^T                              (N, V)   N tokens, D model width, V classes; the padding's classes
    too c = softcap(z)                         15 z / sqrt(z^2 + 225)  or  23 sigmoid((z + 5) / 7.5)  or  z
    loss_n = log sum_v exp(c_nv) - c_n,target_n

x is (N, D) in bfloat16 or float32; w is the float32 master (V, D), cast to x's dtype for the products;
targets are (N,) integers. Losses are float32, dx has x's dtype, dw is accumulated in float32.
"""

import torch

from kernels.runtime import implementation_of

SOFTCAPS = ("rsqrt", "sigmoid", None)
REDUCTIONS = ("mean", "sum", "none")
# Beyond this the soft cap is flat to the last float32 digit, while z*z would overflow from 1.8e19 on.
LOGIT_LIMIT = 1e6
# A chunk of logits that stays in a CPU core's second-level cache: measured best of 128 .. 4096 tokens at 256
# classes.
CPU_CHUNK_LOGITS = 1 << 18


def implementation(impl: str, tensor: torch.Tensor) -> str:
    """The name of what would run: triton | reference (chunks, own gradient) | eager (all logits)."""
    choices = ("triton", "reference", "eager")
    return implementation_of(impl, tensor, cpu="reference", choices=choices)


def _apply_softcap(z: torch.Tensor, softcap: str | None) -> torch.Tensor:
    """The soft cap on logits of any shape, differentiable by autograd."""
    if softcap is None:
        return z
    if softcap == "rsqrt":
        z = z.clamp(-LOGIT_LIMIT, LOGIT_LIMIT)
        return 15 * z * torch.rsqrt(z * z + 225)
    return 23 * torch.sigmoid((z + 5) / 7.5)


def _check(x_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, softcap, reduction) -> None:
    """Raise ValueError, naming the argument, for shapes or options that cannot work."""
    if softcap not in SOFTCAPS:
        raise ValueError(f"softcap={softcap!r} is unknown; choose one of {SOFTCAPS}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction={reduction!r} is unknown; choose one of {REDUCTIONS}")
    if x_ND.dim() != 2 or weight_VD.dim() != 2 or x_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"x {tuple(x_ND.shape)} and weight {tuple(weight_VD.shape)} must be (N, D) and (V, D)"
        )
    if targets_N.shape != x_ND.shape[:1]:
        raise ValueError(f"targets {tuple(targets_N.shape)} must be ({x_ND.shape[0]},), one class a row of x")


def softcapped_logits(
    x_ND: torch.Tensor, weight_VD: torch.Tensor, softcap: str | None = "rsqrt"
) -> torch.Tensor:
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
    c_NV = softcapped_logits(x_ND, weight_VD, softcap)
    return torch.nn.functional.cross_entropy(
        c_NV, targets_N.long(), reduction=reduction, ignore_index=ignore_index
    )


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


def _matmul_f32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b, accumulated and returned in at least float32 whatever the inputs' dtype."""
    if a.dtype in (torch.float32, torch.float64):
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _ChunkedLoss(torch.autograd.Function):
    """Loss and both gradients in one pass over chunks of tokens, in plain torch: the CPU's fast path.

    The gradients are computed in the forward pass, where the logits are, for an upstream gradient of one, and
    scaled in the backward pass. Memory: one chunk of logits, dx and dw.
    """

    @staticmethod
    def forward(ctx, x_ND, weight_VD, targets_N, softcap, mean, ignore_index, chunk_tokens):
        with_gradient = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        w_VD = weight_VD.to(x_ND.dtype)
        scale = _mean_scale(targets_N, ignore_index, _wide(x_ND)) if mean else None
        dx_ND = torch.empty_like(x_ND) if with_gradient else None
        dw_VD = torch.zeros_like(weight_VD, dtype=_wide(x_ND)) if with_gradient else None
        total = torch.zeros((), dtype=_wide(x_ND), device=x_ND.device)
        for start in range(0, x_ND.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            losses, gradient = _chunk_loss(
                x_ND[rows], w_VD, targets_N[rows], softcap, ignore_index, with_gradient
            )
            total += losses.sum()
            if with_gradient:
                gradient = gradient.to(x_ND.dtype)
                torch.mm(gradient, w_VD, out=dx_ND[rows])
                dw_VD += _matmul_f32(gradient.t(), x_ND[rows])
        if with_gradient:
            ctx.save_for_backward(dx_ND, dw_VD, scale)
            ctx.weight_dtype = weight_VD.dtype
        return total if scale is None else total * scale

    @staticmethod
    def backward(ctx, upstream):
        dx_ND, dw_VD, scale = ctx.saved_tensors
        factor = upstream if scale is None else upstream * scale
        return (dx_ND * factor.to(dx_ND.dtype), (dw_VD * factor).to(ctx.weight_dtype), *[None] * 5)


def _wide(x: torch.Tensor) -> torch.dtype:
    """The dtype of losses and sums for an input: float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _mean_scale(targets_N: torch.Tensor, ignore_index: int, dtype: torch.dtype) -> torch.Tensor:
    """1 / number of targets that count, as a tensor; NaN losses (0/0) when none does, as torch has it."""
    return 1.0 / (targets_N != ignore_index).sum().to(dtype)


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
    def backward(ctx, upstream_N):
        x_ND, weight_VD, targets_N = ctx.saved_tensors
        softcap, ignore_index, chunk_tokens = ctx.options
        w_VD = weight_VD.to(x_ND.dtype)
        dx_ND = torch.empty_like(x_ND)
        dw_VD = torch.zeros_like(weight_VD, dtype=_wide(x_ND))
        for start in range(0, x_ND.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            gradient = _chunk_loss(x_ND[rows], w_VD, targets_N[rows], softcap, ignore_index, True)[1]
            gradient = gradient.mul_(upstream_N[rows, None]).to(x_ND.dtype)
            torch.mm(gradient, w_VD, out=dx_ND[rows])
            dw_VD += _matmul_f32(gradient.t(), x_ND[rows])
        return dx_ND, dw_VD.to(weight_VD.dtype), None, None, None, None


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
    zero where ignored. chunk_tokens: rows of x whose logits are in
    memory at once (None: chosen for the device).
    impl: "auto" | "triton" | "reference" (plain torch in chunks) | "eager" (plain torch, all logits).
    Errors: ValueError for shapes or options that do not fit.
    """
    _check(x_ND, weight_VD, targets_N, softcap, reduction)
    impl = implementation(impl, x_ND)
    if impl == "eager":
        return linear_cross_entropy_reference(x_ND, weight_VD, targets_N, softcap, reduction, ignore_index)
    if impl == "triton":
        raise NotImplementedError("the Triton kernels of kernels/cross_entropy.py are being written")
    chunk_tokens = chunk_tokens or max(CPU_CHUNK_LOGITS // weight_VD.shape[0], 64)
    if reduction == "none":
        return _TokenLosses.apply(x_ND, weight_VD, targets_N, softcap, ignore_index, chunk_tokens)
    return _ChunkedLoss.apply(
        x_ND, weight_VD, targets_N, softcap, reduction == "mean", ignore_index, chunk_tokens
    )
