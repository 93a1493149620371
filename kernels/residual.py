"""The residual mix: the stream and K tensors that all layers share, x <- f0 x + f1 x1 + ..., by factors of the layer.

The plain model shares two embeddings: l0 x + l1 x00 + l2 x01. All are (..., D) in one dtype; factors are float32, a
number each or one a token, (..., 1). Sums are taken in float32 and rounded once.

The mix itself has no Triton kernel, by count of bytes. For E = N D elements of 2 bytes it reads three tensors and
writes one (8 E): elementwise work, which torch.compile fuses with the norm that follows; a kernel of ours would force x
through memory again. So on a GPU "auto" is the reference, left to the compiler.

The gradients of the K shared tensors are sums over all L layers. Taken layer by layer, each reads these tensors and
their sums and writes the sums: 3 K L passes over E elements. `mixes_of_layers` keeps the L gradients dy instead, and
one kernel walks over them at the end: L + 2 K passes.

    dx_k[t] = sum_l f_lk[t] dy_l[t],   df_lk[t] = <dy_l[t], x_k[t]>       f_lk[t]: of layer l and tensor k at token t
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


def weighted_sum(x: torch.Tensor, *terms: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The sum of factor times tensor over the terms, tensors like x, in at least float32 and rounded once. A factor is
    a number or has one a token, (..., 1).

    The factors widen the products, not a cast of each tensor: that the compiler would keep for the backward pass in
    place of the tensor, twice as large."""
    wide = torch.promote_types(x.dtype, torch.float32)
    factors = (f.to(wide).view([1] * x.dim()) if f.dim() == 0 else f.to(wide) for f, _ in terms)
    return sum(factor * tensor for factor, (_, tensor) in zip(factors, terms)).to(x.dtype)


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


# ---- gradients of what all layers share, over all of them at once --------------------------------------------

#: Elements a program, and its warps: 8 of each tensor a thread. Tensors that may be shared at most.
_BLOCK, _WARPS, _SHARED = 2048, 8, 3
#: Numbers of a row that a program has at most.
_WIDEST = 8192


@triton.jit
def _gather_gradients(
    p_dy,
    p_x,
    p_factors,
    p_dx,
    p_dots,
    tokens,
    D,
    step_layer,
    step_shared,
    step_token,
    LAYERS: tl.constexpr,
    SHARED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """dx (SHARED pointers) of ROWS tokens, and dots (LAYERS, SHARED, tokens), the factors' gradients.

    p_dy: LAYERS pointers, p_x: SHARED of them, to (tokens, D) each; factors (LAYERS, SHARED, tokens) by their steps."""
    o_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_d = tl.arange(0, WIDTH)
    m_t = o_t < tokens
    o = o_t[:, None].to(tl.int64) * D + o_d[None, :]
    m = m_t[:, None] & (o_d < D)[None, :]
    b_x0 = tl.load(p_x[0] + o, mask=m, other=0.0).to(tl.float32)
    b_dx0 = tl.zeros([ROWS, WIDTH], tl.float32)
    if SHARED > 1:
        b_x1 = tl.load(p_x[1] + o, mask=m, other=0.0).to(tl.float32)
        b_dx1 = tl.zeros([ROWS, WIDTH], tl.float32)
    if SHARED > 2:
        b_x2 = tl.load(p_x[2] + o, mask=m, other=0.0).to(tl.float32)
        b_dx2 = tl.zeros([ROWS, WIDTH], tl.float32)
    p_factors += o_t.to(tl.int64) * step_token
    p_dots += o_t.to(tl.int64)
    for layer in tl.static_range(LAYERS):
        b_dy = tl.load(p_dy[layer] + o, mask=m, other=0.0).to(tl.float32)
        p_factor = p_factors + layer * step_layer
        p_dot = p_dots + layer * SHARED * tl.cast(tokens, tl.int64)
        b_dx0 += tl.load(p_factor, mask=m_t, other=0.0)[:, None] * b_dy
        tl.store(p_dot, tl.sum(b_dy * b_x0, 1), mask=m_t)
        if SHARED > 1:
            b_dx1 += tl.load(p_factor + step_shared, mask=m_t, other=0.0)[:, None] * b_dy
            tl.store(p_dot + tokens, tl.sum(b_dy * b_x1, 1), mask=m_t)
        if SHARED > 2:
            b_dx2 += tl.load(p_factor + 2 * step_shared, mask=m_t, other=0.0)[:, None] * b_dy
            tl.store(p_dot + 2 * tokens, tl.sum(b_dy * b_x2, 1), mask=m_t)
    tl.store(p_dx[0] + o, b_dx0.to(p_dx[0].dtype.element_ty), mask=m)
    if SHARED > 1:
        tl.store(p_dx[1] + o, b_dx1.to(p_dx[1].dtype.element_ty), mask=m)
    if SHARED > 2:
        tl.store(p_dx[2] + o, b_dx2.to(p_dx[2].dtype.element_ty), mask=m)


def launch_gather(
    dy: Sequence[torch.Tensor], shared: Sequence[torch.Tensor], factors_LKN: torch.Tensor
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(dx of each shared tensor, dfactors (L, K, N) float32) of the formula above from the L gradients dy, all of the
    shared tensors' shape (..., D) with N rows. factors: float32, of any strides, also expanded over the tokens."""
    x, (L, K) = shared[0], (len(dy), len(shared))
    expect_floats("shared[0]", x, KERNEL_DTYPES)
    tokens, D = x.numel() // max(x.shape[-1], 1), x.shape[-1]
    if not 1 <= K <= _SHARED or D > _WIDEST:
        raise ValueError(f"{K} shared tensors of {D} columns: 1 to {_SHARED} of at most {_WIDEST}")
    expect("factors", factors_LKN, (L, K, tokens), x)
    expect_floats("factors", factors_LKN, (torch.float32,))
    for kind, several in (("shared", shared), ("dy", dy)):
        for n, t in enumerate(several):
            expect(f"{kind}[{n}]", t, x.shape, x)
            expect_floats(f"{kind}[{n}]", t, (x.dtype,))
    dx = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in shared)
    dots = torch.empty(L, K, tokens, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(D)
    rows = max(_BLOCK // width, 1)
    how = dict(LAYERS=L, SHARED=K, ROWS=rows, WIDTH=width, num_warps=max(_WARPS * width // _BLOCK, _WARPS))
    factors = factors_LKN.resolve_neg()
    given = tuple(dense(d) for d in dy), tuple(dense(t) for t in shared), factors, dx, dots
    launch(_gather_gradients, (triton.cdiv(tokens, rows),), *given, tokens, D, *factors.stride(), **how)
    return list(dx), dots


def gather_reference(dy: Sequence[torch.Tensor], shared: Sequence[torch.Tensor], factors_LKN: torch.Tensor):
    """What `launch_gather` computes, in plain torch."""
    x = shared[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    factors = factors_LKN.to(wide).unflatten(2, x.shape[:-1]).unsqueeze(-1)
    dx = [sum(row[k] * d.to(wide) for row, d in zip(factors, dy)).to(x.dtype) for k in range(len(shared))]
    dots = [torch.stack([(d.to(wide) * x.to(wide)).sum(-1).flatten() for x in shared]) for d in dy]
    return dx, torch.stack(dots)


@torch.library.custom_op("speedrun::gather_gradients", mutates_args=())
def _gather(dy: list[torch.Tensor], shared: list[torch.Tensor], factors_LKN: torch.Tensor) -> list[torch.Tensor]:
    dx, dots = launch_gather(dy, shared, factors_LKN)
    return [*dx, dots]


@_gather.register_fake
def _(dy, shared, factors_LKN):
    return [*(x.new_empty(x.shape) for x in shared), factors_LKN.new_empty(factors_LKN.shape)]


class _Tickets(torch.autograd.Function):
    """L tensors that nobody reads: their gradients are those of the L mixes, which meet in the backward pass."""

    @staticmethod
    def forward(ctx, factors_LKN, *shared):
        ctx.save_for_backward(factors_LKN, *shared)
        return tuple(shared[0].new_empty(shared[0].shape) for _ in factors_LKN)

    @staticmethod
    @differentiable_once("mixes_of_layers")
    def backward(ctx, *dy):
        factors_LKN, *shared = ctx.saved_tensors
        if implementation_of("auto", shared[0], cpu="reference", choices=()) == "triton":
            *dx, dfactors = _gather(list(dy), shared, factors_LKN)
        else:
            dx, dfactors = gather_reference(dy, shared, factors_LKN)
        return dfactors.to(factors_LKN.dtype), *dx


class _MixOfTicket(torch.autograd.Function):
    """The mix of one layer, with the gradients of x and its factor; those of what is shared go to the ticket."""

    @staticmethod
    def forward(ctx, x, ticket, own, factors, *shared):
        ctx.save_for_backward(x, own)
        terms = zip(factors.unflatten(1, (*x.shape[:-1], 1)).unbind(), shared)
        return weighted_sum(x, (own, x), *terms)

    @staticmethod
    @differentiable_once("mixes_of_layers")
    def backward(ctx, dy):
        x, own = ctx.saved_tensors
        wide = dy.to(torch.promote_types(dy.dtype, torch.float32))
        down = (wide * x).sum(-1, keepdim=True)
        return (own * wide).to(dy.dtype), dy, down.to(own.dtype), *[None] * (len(ctx.needs_input_grad) - 3)


def mixes_of_layers(
    factors_LK: torch.Tensor,
    shared: Sequence[torch.Tensor],
    *,
    by_token: Sequence[Sequence[torch.Tensor | None]] = (),
    impl: str = "auto",
) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """Of each of L layers x -> f[0] x + f[1] shared[0] + ..., with its row f of the factors (L, 1 + K).

    by_token: of each layer what its K last factors get beside these, (..., 1) each or None. For the compiler, where
    there will be gradients, those of what is shared and of its factors are left to one pass at the end (see above),
    unless impl is "reference"."""
    K, wide = len(shared), shared[0].shape[-1] > _WIDEST or len(shared) > _SHARED
    if impl == "reference" or wide or not (torch.compiler.is_compiling() and torch.is_grad_enabled()):
        rows = factors_of_layers(factors_LK, shared[0])
        more = by_token or [[None] * K] * len(rows)
        return [_mix_of(row, shared, some, impl) for row, some in zip(rows, more)]
    own = factors_of_layers(factors_LK[:, :1], shared[0])  # alone: of what nobody uses a gradient is zeros in memory
    # A view that begins at the second number would make Inductor take the pass's large results for unaligned too.
    factors = factors_LK[:, 1:, None].expand(-1, -1, shared[0][..., 0].numel())
    if by_token:
        none = factors.new_zeros(1).expand(factors.size(2))
        columns = [torch.stack([none if f is None else f.flatten() for f in some]) for some in by_token]
        factors = factors + torch.stack(columns)
    else:
        factors = factors_LK[:, 1:, None].clone().expand(factors.shape)
    tickets = _Tickets.apply(factors, *shared)
    shared = [x.detach() for x in shared]  # and no longer the first layer's stream, which is one of them
    return [
        lambda x, ticket=ticket, l0=l0, of_layer=of_layer: _MixOfTicket.apply(x, ticket, l0, of_layer, *shared)
        for ticket, (l0,), of_layer in zip(tickets, own, factors.detach().unbind())
    ]


def _mix_of(row, shared, by_token, impl: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The mix of one layer as it is written."""
    own, *others = row
    if len(shared) == 2 and all(f is None for f in by_token):
        return lambda x: residual_mix(x, *shared, row, impl=impl)
    factors = [f if more is None else f + more for f, more in zip(others, by_token)]
    return lambda x: weighted_sum(x, (own, x), *zip(factors, shared))
