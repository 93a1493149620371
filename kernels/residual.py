"""The dual embedding residual: x <- l0 x + l1 x00 + l2 x01, and its gradients.

x, x00, x01 are (..., D) in one dtype; lambdas is a float32 (3,) tensor. Sums are taken in
float32 and rounded once.

There is no Triton kernel here, by count of bytes. For E = N D elements of 2 bytes, forward reads three tensors and
writes one (8 E), backward reads four and writes three (14 E): elementwise work and three sums, which torch.compile
fuses into one pass each, together with the norm that follows; a kernel of ours would force x through memory again. So
on a GPU "auto" is the reference, left to the compiler; run eagerly there, it takes about three times the bytes.
"""

import torch

from kernels.runtime import implementation_of


def residual_mix_reference(
    x: torch.Tensor, x00: torch.Tensor, x01: torch.Tensor, lambdas_3: torch.Tensor
) -> torch.Tensor:
    """The definition, in plain torch; autograd differentiates it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    l0, l1, l2 = lambdas_3.to(wide).unbind()
    return (l0 * x.to(wide) + l1 * x00.to(wide) + l2 * x01.to(wide)).to(x.dtype)


class _ResidualMix(torch.autograd.Function):
    """The reference with its derivative written out, for the CPU: three dot products and no temporary."""

    @staticmethod
    def forward(ctx, x, x00, x01, lambdas_3):
        ctx.save_for_backward(x, x00, x01, lambdas_3)
        l0, l1, l2 = lambdas_3.to(x.dtype).unbind()
        return (x * l0).addcmul_(x00, l1).addcmul_(x01, l2)

    @staticmethod
    def backward(ctx, dy):
        x, x00, x01, lambdas_3 = ctx.saved_tensors
        l0, l1, l2 = lambdas_3.to(x.dtype).unbind()
        flat = dy.reshape(-1)
        dots = [torch.dot(flat, part.reshape(-1)) for part in (x, x00, x01)]
        return dy * l0, dy * l1, dy * l2, torch.stack(dots).to(lambdas_3.dtype)


def implementation(impl: str, tensor: torch.Tensor) -> str:
    """The name of what would run for that tensor: always the reference, see above."""
    return implementation_of(
        "reference" if impl in ("auto", "triton") else impl, tensor, cpu="reference", choices=("reference",)
    )


def residual_mix(
    x: torch.Tensor, x00: torch.Tensor, x01: torch.Tensor, lambdas_3: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """l0 x + l1 x00 + l2 x01 with lambdas (3,) float32.

    Errors: ValueError if the shapes or dtypes of x, x00, x01 differ or lambdas is not (3,).
    """
    if not (x.shape == x00.shape == x01.shape and x.dtype == x00.dtype == x01.dtype) or lambdas_3.shape != (3,):
        raise ValueError(
            f"x, x00, x01 must agree and lambdas be (3,); got {tuple(x.shape)}, {tuple(x00.shape)}, "
            f"{tuple(x01.shape)}, {tuple(lambdas_3.shape)}"
        )
    implementation(impl, x)
    if x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        return _ResidualMix.apply(x, x00, x01, lambdas_3)
    return residual_mix_reference(x, x00, x01, lambdas_3)
