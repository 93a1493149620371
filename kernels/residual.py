"""The dual embedding residual: x <- l0 x + l1 x00 + l2 x01, and its gradients.

x, x00, x01 are (..., D) in one dtype; lambdas is a float32 (3,) tensor, or three factors a token, (..., 1) each. Sums
are taken in float32 and rounded once.

There is no Triton kernel here, by count of bytes. For E = N D elements of 2 bytes, forward reads three tensors and
writes one (8 E), backward reads four and writes three (14 E): elementwise work and three sums, which torch.compile
fuses into one pass each, together with the norm that follows; a kernel of ours would force x through memory again. So
on a GPU "auto" is the reference, left to the compiler; run eagerly there, it takes about three times the bytes.
"""

from collections.abc import Sequence

import torch

from kernels.guards import differentiable_once, expect, expect_floats, without_autocast
from kernels.norm import summed_product
from kernels.runtime import implementation_of


def factors_of_layers(factors_LK: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor | tuple[torch.Tensor, ...]]:
    """The K learned factors of each of L layers, for tensors like x (..., D): rows (K,), or, for the compiler where
    there will be gradients, K tensors (..., 1), equal for all tokens.

    The compiler sums a gradient over the width in a pass over memory that is made anyway, and those of all factors over
    tokens at the end, at once. The sum over all elements that a mere number asks for is two launches a factor."""
    if not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        return list(factors_LK.unbind())
    L, K = factors_LK.shape
    for_tokens = factors_LK.reshape(L * K, *[1] * x.dim()).expand(-1, *x.shape[:-1], 1).unbind()
    return [for_tokens[layer * K : (layer + 1) * K] for layer in range(L)]


def residual_mix_reference(
    x: torch.Tensor, x00: torch.Tensor, x01: torch.Tensor, lambdas: torch.Tensor | Sequence[torch.Tensor]
) -> torch.Tensor:
    """The definition, in plain torch; autograd differentiates it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    l0, l1, l2 = (factor.to(wide) for factor in lambdas)
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
    x: torch.Tensor,
    x00: torch.Tensor,
    x01: torch.Tensor,
    lambdas: torch.Tensor | Sequence[torch.Tensor],
    *,
    impl: str = "auto",
) -> torch.Tensor:
    """l0 x + l1 x00 + l2 x01 with lambdas (3,) float32, or three factors a token, of x's shape with a last axis of 1.

    Errors: ValueError if the shapes, dtypes or devices of x, x00, x01 differ or lambdas are none of both; TypeError for
    numbers that are not floating.
    """
    expect_floats("x", x)
    for name, other in (("x00", x00), ("x01", x01)):
        expect(name, other, x.shape, x)
        if other.dtype != x.dtype:
            raise ValueError(f"{name} has dtype {other.dtype} but x has {x.dtype}")
    one_each = isinstance(lambdas, torch.Tensor)
    if not one_each and len(lambdas) != 3:
        raise ValueError(f"lambdas are {len(lambdas)} factors; there must be three")
    for factor in [lambdas] if one_each else lambdas:
        expect("lambdas", factor, (3,) if one_each else (*x.shape[:-1], 1), x)
        expect_floats("lambdas", factor)
    wide = x.dtype in (torch.float32, torch.float64)
    if one_each and implementation(impl, x) == "written" and wide and not torch.compiler.is_compiling():
        return _ResidualMix.apply(x, x00, x01, lambdas)
    return residual_mix_reference(x, x00, x01, lambdas)
