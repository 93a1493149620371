"""The dual embedding residual: x <- l0 x + l1 x00 + l2 x01, and its gradients.

x, x00, x01 are (..., D) in one dtype; lambdas is a float32 (3,) tensor. Sums are taken in
float32 and rounded once.

There is no Triton kernel here, by count of bytes. For E = N D elements of 2 bytes, forward reads three tensors and
writes one (8 E), backward reads four and writes three (14 E): elementwise work and three sums, which torch.compile
fuses into one pass each, together with the norm that follows; a kernel of ours would force x through memory again. So
on a GPU "auto" is the reference, left to the compiler; run eagerly there, it takes about three times the bytes.
"""

import torch

from kernels.guards import differentiable_once, expect, expect_floats, without_autocast
from kernels.norm import summed_product
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
    @differentiable_once("residual_mix")
    def backward(ctx, dy):
        x, x00, x01, lambdas_3 = ctx.saved_tensors
        l0, l1, l2 = lambdas_3.to(x.dtype).unbind()
        dots = [summed_product(dy, part) for part in (x, x00, x01)]
        return dy * l0, dy * l1, dy * l2, torch.stack(dots).to(lambdas_3.dtype)


def implementation(impl: str, tensor: torch.Tensor) -> str:
    """The name of what would run for that tensor: on a GPU always the reference, see above; "auto" on a CPU is the
    reference with its derivative written out."""
    on_gpu = "reference" if tensor.device.type == "cuda" else "written"
    impl = on_gpu if impl in ("auto", "triton") else impl
    return implementation_of(impl, tensor, cpu="written", choices=("written", "reference"))


@without_autocast
def residual_mix(
    x: torch.Tensor, x00: torch.Tensor, x01: torch.Tensor, lambdas_3: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """l0 x + l1 x00 + l2 x01 with lambdas (3,) float32.

    Errors: ValueError if the shapes, dtypes or devices of x, x00, x01 differ or lambdas is not (3,); TypeError for
    numbers that are not floating.
    """
    expect_floats("x", x)
    for name, other in (("x00", x00), ("x01", x01)):
        expect(name, other, x.shape, x)
        if other.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {other.dtype} but x has {x.dtype}")
    expect("lambdas_3", lambdas_3, (3,), x)
    expect_floats("lambdas_3", lambdas_3)
    wide = x.dtype in (torch.float32, torch.float64)
    if implementation(impl, x) == "written" and wide and not torch.compiler.is_compiling():
        return _ResidualMix.apply(x, x00, x01, lambdas_3)
    return residual_mix_reference(x, x00, x01, lambdas_3)
