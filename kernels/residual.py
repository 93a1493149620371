"""The dual embedding residual: x <- l0 x + l1 x00 + l2 x01, and its gradients.

x, x00, x01 are (..., D) in one dtype; lambdas is a float32 (3,) tensor, or three factors a token, (..., 1) each. Sums
are taken in float32 and rounded once.

The mix itself has no Triton kernel, by count of bytes. For E = N D elements of 2 bytes it reads three tensors and
writes one (8 E): elementwise work, which torch.compile fuses with the norm that follows; a kernel of ours would force x
through memory again. So on a GPU "auto" is the reference, left to the compiler.

The gradients of x00 and x01 are sums over all L layers. Taken layer by layer, each reads both tensors and both sums and
writes both sums: 6 L passes over E elements. `mixes_of_layers` keeps the L gradients dy instead, and one kernel walks
over them at the end: L + 4 passes.

    dx00 = sum_l l1_l dy_l,   dx01 = sum_l l2_l dy_l,   dl1_l = <dy_l, x00>,   dl2_l = <dy_l, x01>
"""

from collections.abc import Callable, Sequence

import torch

from kernels.guards import KERNEL_DTYPES, dense, differentiable_once, expect, expect_floats, launch, without_autocast
from kernels.norm import summed_product
from kernels.runtime import implementation_of, tl, triton


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


# ---- both embeddings' gradients, over all layers at once -------------------------------------------------------

#: Elements a program, and its warps: 16 of each tensor a thread.
_BLOCK, _WARPS = 2048, 4


@triton.jit
def _gather_gradients(
    p_dy, p_x00, p_x01, p_factors, p_dx00, p_dx01, p_dots, elements, LAYERS: tl.constexpr, BLOCK: tl.constexpr
):
    """dx00 and dx01 of BLOCK elements, and this program's part of the factors' gradients, dots (programs, LAYERS, 2).

    p_dy: LAYERS pointers; factors (LAYERS, 2)."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < elements
    b_x00 = tl.load(p_x00 + o, mask=m, other=0.0).to(tl.float32)
    b_x01 = tl.load(p_x01 + o, mask=m, other=0.0).to(tl.float32)
    b_dx00 = tl.zeros([BLOCK], tl.float32)
    b_dx01 = tl.zeros([BLOCK], tl.float32)
    p_dots += tl.program_id(0).to(tl.int64) * LAYERS * 2
    for layer in tl.static_range(LAYERS):
        b_dy = tl.load(p_dy[layer] + o, mask=m, other=0.0).to(tl.float32)
        b_dx00 += tl.load(p_factors + 2 * layer) * b_dy
        b_dx01 += tl.load(p_factors + 2 * layer + 1) * b_dy
        tl.store(p_dots + 2 * layer, tl.sum(b_dy * b_x00, 0))
        tl.store(p_dots + 2 * layer + 1, tl.sum(b_dy * b_x01, 0))
    tl.store(p_dx00 + o, b_dx00.to(p_dx00.dtype.element_ty), mask=m)
    tl.store(p_dx01 + o, b_dx01.to(p_dx01.dtype.element_ty), mask=m)


def launch_gather(dy: Sequence[torch.Tensor], x00: torch.Tensor, x01: torch.Tensor, factors_L2: torch.Tensor):
    """(dx00, dx01, dfactors (L, 2) float32) of the formula above from the L gradients dy, all of x00's shape."""
    expect_floats("x00", x00, KERNEL_DTYPES)
    expect("factors", factors_L2, (len(dy), 2), x00)
    for name, x in (("x01", x01), *((f"dy[{layer}]", d) for layer, d in enumerate(dy))):
        expect(name, x, x00.shape, x00)
        expect_floats(name, x, (x00.dtype,))
    given = dense(x00), dense(x01), dense(factors_L2.float())
    dx00, dx01 = (torch.empty(x00.shape, dtype=x00.dtype, device=x00.device) for _ in range(2))
    programs, layers = triton.cdiv(x00.numel(), _BLOCK), len(dy)
    dots = torch.empty(programs, layers, 2, dtype=torch.float32, device=x00.device)
    rest = (*given, dx00, dx01, dots, x00.numel())
    how = dict(LAYERS=layers, BLOCK=_BLOCK, num_warps=_WARPS)
    launch(_gather_gradients, (programs,), tuple(dense(d) for d in dy), *rest, **how)
    return dx00, dx01, dots.sum(0)


def gather_reference(dy: Sequence[torch.Tensor], x00: torch.Tensor, x01: torch.Tensor, factors_L2: torch.Tensor):
    """What `launch_gather` computes, in plain torch."""
    wide = torch.promote_types(x00.dtype, torch.float32)
    dx = [sum(factor * d.to(wide) for factor, d in zip(factors_L2[:, i].to(wide), dy)) for i in range(2)]
    dots = [[(d.to(wide) * x.to(wide)).sum() for x in (x00, x01)] for d in dy]
    return *(d.to(x00.dtype) for d in dx), torch.stack([torch.stack(pair) for pair in dots])


@torch.library.custom_op("speedrun::gather_gradients", mutates_args=())
def _gather(
    dy: list[torch.Tensor], x00: torch.Tensor, x01: torch.Tensor, factors_L2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return launch_gather(dy, x00, x01, factors_L2)


@_gather.register_fake
def _(dy, x00, x01, factors_L2):
    return x00.new_empty(x00.shape), x00.new_empty(x00.shape), factors_L2.new_empty(len(dy), 2, dtype=torch.float32)


class _Tickets(torch.autograd.Function):
    """L tensors that nobody reads: their gradients are those of the L mixes, which meet in the backward pass."""

    @staticmethod
    def forward(ctx, x00, x01, factors_L2):
        ctx.save_for_backward(x00, x01, factors_L2)
        return tuple(x00.new_empty(x00.shape) for _ in factors_L2)

    @staticmethod
    @differentiable_once("mixes_of_layers")
    def backward(ctx, *dy):
        x00, x01, factors_L2 = ctx.saved_tensors
        run = _gather if implementation_of("auto", x00, cpu="reference", choices=()) == "triton" else gather_reference
        dx00, dx01, dfactors = run(list(dy), x00, x01, factors_L2)
        return dx00, dx01, dfactors.to(factors_L2.dtype)


class _MixOfTicket(torch.autograd.Function):
    """The mix of one layer, with the gradients of x and its factor; those of x00 and x01 go to the ticket."""

    @staticmethod
    def forward(ctx, x, ticket, x00, x01, l0, factors_2):
        ctx.save_for_backward(x, l0)
        # As the reference, but widened by the factors: a cast that all layers share would be kept in place of x00.
        l1, l2 = (factor.view([1] * x.dim()) for factor in factors_2.unbind())
        return (l0 * x + l1 * x00 + l2 * x01).to(x.dtype)

    @staticmethod
    @differentiable_once("mixes_of_layers")
    def backward(ctx, dy):
        x, l0 = ctx.saved_tensors
        wide = dy.to(torch.promote_types(dy.dtype, torch.float32))
        dl0 = (wide * x.to(wide.dtype)).sum(-1, keepdim=True)
        return (l0 * wide).to(dy.dtype), dy, None, None, dl0.to(l0.dtype), None


def mixes_of_layers(
    factors_L3: torch.Tensor, x00: torch.Tensor, x01: torch.Tensor, *, impl: str = "auto"
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Of each of L layers x -> l0 x + l1 x00 + l2 x01, with its three factors. For the compiler, where there
    will be gradients, those of x00, x01 and their factors are left to one pass at the end (see above), unless
    impl is "reference"."""
    if impl == "reference" or not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        rows = factors_of_layers(factors_L3, x00)
        return [lambda x, row=row: residual_mix(x, x00, x01, row, impl=impl) for row in rows]
    # A view that begins at the second number would make Inductor take the pass's large results for unaligned too.
    own, shared = factors_of_layers(factors_L3[:, :1], x00), factors_L3[:, 1:].clone()
    tickets = _Tickets.apply(x00, x01, shared)
    x00, x01 = x00.detach(), x01.detach()  # and no longer the first layer's stream, which is x00
    return [
        lambda x, ticket=ticket, l0=l0, row=row: _MixOfTicket.apply(x, ticket, x00, x01, l0, row)
        for ticket, (l0,), row in zip(tickets, own, shared.detach().unbind())
    ]
