"""Muon's arithmetic: momentum, orthogonalisation and the weight update.

    buffer <- m buffer + (1 - m) grad ;  u = m buffer + (1 - m) grad           (Nesterov)
    X = u / (|u| + 1e-7), transposed if tall; five times  X <- a X + (b A + c A A) X,  A = X X^T
    weight <- weight (1 - weight_decay) - lr X

A bfloat16 weight with a 16-bit mantissa beside it is a float32 master cut in two: the weight holds the upper
16 bits (so it is the master rounded towards zero), the mantissa the lower 16.
"""

import torch

from kernels.runtime import implementation_of

# (a, b, c) of each step. "spec" is SPEC.md's; "polar_express" is the optimal composition for singular values
# in [1e-3, 1] (Amsel, Persson, Musco, Gower, "The Polar Express", arXiv 2505.16932, 2025), five steps.
COEFFICIENTS = {
    "spec": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}


def implementation(impl: str, tensor: torch.Tensor) -> str:
    """The name of what would run for that tensor: triton | reference."""
    return implementation_of(impl, tensor, cpu="reference", choices=("triton", "reference"))


def orthogonalize_reference(
    g_BMN: torch.Tensor, coefficients: str = "spec", dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """The definition, in plain torch, computed in `dtype`; g is (..., M, N), the result is like g."""
    x = g_BMN.to(dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=_norm_dtype(dtype)) + 1e-7).to(
        dtype
    )
    rows = x.reshape(-1, *x.shape[-2:])
    for a, b, c in COEFFICIENTS[coefficients]:
        product = torch.bmm(rows, rows.mT)
        polynomial = torch.baddbmm(product, product, product, beta=b, alpha=c)
        rows = torch.baddbmm(rows, polynomial, rows, beta=a)
    x = rows.view(x.shape)
    return (x.mT if tall else x).to(g_BMN.dtype)


def _norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms are summed in at least float32."""
    return torch.promote_types(dtype, torch.float32)


def orthogonalize(
    g_BMN: torch.Tensor,
    *,
    coefficients: str = "spec",
    dtype: torch.dtype = torch.bfloat16,
    impl: str = "auto",
) -> torch.Tensor:
    """Nearly the orthogonal polar factor of each matrix of g (..., M, N): singular values pulled to about
    one.

    coefficients: a key of COEFFICIENTS. dtype: of the arithmetic; bfloat16 is SPEC's.
    Errors: ValueError for unknown coefficients or fewer than two axes.
    """
    if coefficients not in COEFFICIENTS:
        raise ValueError(f"coefficients={coefficients!r} is unknown; choose one of {sorted(COEFFICIENTS)}")
    if g_BMN.dim() < 2:
        raise ValueError(f"orthogonalize needs matrices (..., M, N), got shape {tuple(g_BMN.shape)}")
    if implementation(impl, g_BMN) == "triton":
        raise NotImplementedError("the Triton kernels of kernels/muon.py are being written")
    return orthogonalize_reference(g_BMN, coefficients, dtype)


def momentum_(
    buffer: torch.Tensor, grad: torch.Tensor, momentum: float, *, impl: str = "auto"
) -> torch.Tensor:
    """buffer <- m buffer + (1 - m) grad in place (float32); returns m buffer + (1 - m) grad, float32."""
    if implementation(impl, buffer) == "triton":
        raise NotImplementedError("the Triton kernels of kernels/muon.py are being written")
    grad = grad.to(buffer.dtype)
    buffer.lerp_(grad, 1 - momentum)
    return grad.lerp(buffer, momentum)


def split_master(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bfloat16 weight, uint16 mantissa) whose bits together are the float32 `master`."""
    halves = master.contiguous().view(torch.int32)
    weight = (halves >> 16).to(torch.int16).view(torch.bfloat16)
    return weight, halves.to(torch.int16).view(torch.uint16)


def join_master(weight: torch.Tensor, mantissa: torch.Tensor) -> torch.Tensor:
    """The float32 master of a bfloat16 weight and its uint16 (or int16) mantissa."""
    high = weight.contiguous().view(torch.int16).to(torch.int32) << 16
    low = mantissa.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    return (high | low).view(torch.float32)


def apply_update_(
    weight: torch.Tensor,
    mantissa: torch.Tensor | None,
    update: torch.Tensor,
    *,
    lr: float,
    weight_decay: float,
    impl: str = "auto",
) -> None:
    """master <- master (1 - weight_decay) - lr update, in place.

    weight_decay is the whole factor: SPEC's is base lr x 0.01 (x 2 for MLP matrices). lr is the effective
    one, with its sqrt(max(1, rows / columns)). With `mantissa` (uint16 or int16) the weight is the bfloat16
    upper half of the master; without, it is the float32 master itself.
    Errors: ValueError for a mantissa beside a weight that is not bfloat16.
    """
    if mantissa is not None and weight.dtype != torch.bfloat16:
        raise ValueError(f"a mantissa goes with a bfloat16 weight, got {weight.dtype}; pass mantissa=None")
    if implementation(impl, weight) == "triton":
        raise NotImplementedError("the Triton kernels of kernels/muon.py are being written")
    if mantissa is None:
        weight.mul_(1 - weight_decay).add_(update, alpha=-lr)
        return
    master = join_master(weight, mantissa).mul_(1 - weight_decay).add_(update, alpha=-lr)
    new_weight, new_mantissa = split_master(master)
    weight.copy_(new_weight)
    mantissa.view(torch.int16).copy_(new_mantissa.view(torch.int16))
