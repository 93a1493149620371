"""RMS norm over the last axis, without a gain (Zhang and Sennrich 2019, arXiv:1910.07467).

    y = x * r,   r = 1 / sqrt(mean(x^2) + eps),   eps = torch.finfo(x.dtype).eps, the framework's default
    dx = r * (dy - y * mean(dy * y))

The derivative is written out everywhere. Run eagerly on a CPU, torch's own function is a row of elementwise operations,
each a pass over memory and an entry in the autograd graph: written out it takes a third of the time. Compiled, the
passes are left to the compiler, which fuses them with their neighbours, and the derivative from (y, r) means that x
need not be kept for it: y is kept anyway for the product that follows, and a row's r is one number.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from kernels.guards import differentiable_once, expect_floats, without_autocast


def rms_norm_reference(x: torch.Tensor) -> torch.Tensor:
    """The definition, by torch."""
    return F.rms_norm(x, (x.size(-1),))


def normed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, r) of the docstring above in three passes over x; no autograd."""
    r = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    r = r.square_().div_(x.size(-1)).add_(torch.finfo(x.dtype).eps).rsqrt_()
    return x * r, r


def norm_gradient(dy: torch.Tensor, y: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """dx of the docstring above in three passes."""
    mean = torch.linalg.vecdot(dy, y).unsqueeze(-1).div_(-y.size(-1))
    return torch.addcmul(dy, y, mean).mul_(r)


#: Numbers that `summed_product` adds one after another at most; what is wider it adds in pairs throughout.
_SUMMED_AT_ONCE = 8192


def summed_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The sum of a * b over all elements, as one number.

    By rows, whose sums torch then adds in pairs: one dot product over a million numbers adds them one after another
    and is off by hundreds of roundings."""
    if a.numel() == 0:
        return a.new_zeros(())
    width = a.size(-1) if a.size(-1) <= _SUMMED_AT_ONCE else 1
    return torch.linalg.vecdot(a.reshape(-1, width), b.reshape(-1, width)).sum()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y, r = normed(x)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @differentiable_once("rms_norm")
    def backward(ctx, dy):
        return (norm_gradient(dy, *ctx.saved_tensors),)


class _CompiledRMSNorm(torch.autograd.Function):
    """The same formula as the compiler likes it: no function of torch's that it would not fuse, and half precision
    widened in between, as torch's own norm has it."""

    @staticmethod
    def forward(ctx, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + torch.finfo(wide.dtype).eps)
        y = (wide * r).to(x.dtype)
        ctx.save_for_backward(y, r)
        return y

    @staticmethod
    @differentiable_once("rms_norm")
    def backward(ctx, dy):
        y, r = ctx.saved_tensors
        wide_y, wide_dy = y.to(r.dtype), dy.to(r.dtype)
        return (((wide_dy - wide_y * (wide_dy * wide_y).mean(-1, keepdim=True)) * r).to(dy.dtype),)


@without_autocast
def rms_norm(x: torch.Tensor) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis; any shape and floating dtype, differentiable once.

    Errors: TypeError for numbers that are not floating."""
    expect_floats("x", x)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return _RMSNorm.apply(x) if x.dtype in (torch.float32, torch.float64) else rms_norm_reference(x)
    return _CompiledRMSNorm.apply(x)
