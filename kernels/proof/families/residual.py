"""Proof cases of the gradients, over all layers, of what these share (kernels/residual.py)."""

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric


def _inputs(layers, count, by_token, *shape):
    def make(random):
        def draw(*size):
            return torch.randn(*size, generator=random)

        tokens = torch.Size(shape[:-1]).numel()
        found = {f"dy{n}": draw(*shape) for n in range(layers)} | {f"x{n}": draw(*shape) for n in range(count)}
        factors = draw(layers, count, tokens if by_token else 1).expand(-1, -1, tokens)
        return found | {"factors": factors}

    return make


def _by(name):
    def run(module, given):
        dy, shared = ([x for key, x in given.items() if key.rstrip("0123456789") == kind] for kind in ("dy", "x"))
        dx, dfactors = getattr(module, name)(dy, shared, given["factors"])
        return {f"dx{n}": x for n, x in enumerate(dx)} | {"dfactors": dfactors}

    return run


_kernel, _reference = _by("launch_gather"), _by("gather_reference")


def _numeric(name, *sizes, **options):
    return Numeric(name, _inputs(*sizes), _kernel, _reference, keep_float32=("factors",), **options)


def _launch(dtype, layers=16, count=2, by_token=False, N=65536, D=1024):
    def run():
        import kernels.residual as module

        def meta(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        several = [[meta(1, N, D) for _ in range(n)] for n in (layers, count)]
        factors = meta(layers, count, N if by_token else 1, dtype=torch.float32).expand(-1, -1, N)
        module.launch_gather(*several, factors)

    return run


FAMILY = Family(
    name="residual",
    module="kernels.residual",
    kernels=("_gather_gradients",),
    numeric=(
        _numeric("two tensors, several programs, ragged ends", 5, 2, False, 3, 37, 61),
        _numeric("three tensors, factors by the token", 3, 3, True, 2, 21, 61),
        _numeric("one tensor, whole programs", 2, 1, True, 4, 1024, quick=False),
        _numeric("one layer, fewer elements than a program has", 1, 2, False, 2, 9),
        _numeric("rows wider than a program's elements", 2, 3, True, 3, 2500, quick=False),
        _numeric("tiny", 3, 3, True, 2, 5, 4, quick=False, hostile=True),
    ),
    launches=(
        Launch("bf16, a training step", _launch(torch.bfloat16), quick=True),
        Launch("bf16, one layer", _launch(torch.bfloat16, 1)),
        Launch("bf16, one layer of 768", _launch(torch.bfloat16, 1, D=768)),
        Launch("bf16, 16 layers, three tensors", _launch(torch.bfloat16, 16, 3)),
        Launch("bf16, 15 layers, three tensors", _launch(torch.bfloat16, 15, 3)),
        Launch("bf16, 9 layers, three tensors, by the token", _launch(torch.bfloat16, 9, 3, True), quick=True),
        Launch("bf16, 6 layers, three tensors, by the token", _launch(torch.bfloat16, 6, 3, True)),
        Launch("bf16, one layer, three tensors", _launch(torch.bfloat16, 1, 3)),
        Launch("float32, 3 layers", _launch(torch.float32, 3, N=1000, D=100)),
    ),
    demands={"_gather_gradients": Demand(wide=("p_x", "p_dx", "p_dots"))},
    faults=(
        Fault("a token past the end is touched", "m_t = o_t < tokens", "m_t = o_t < tokens + 1"),
        Fault("a column past the end is touched", "o_d < D)[None, :]", "o_d < D + 1)[None, :]"),
        Fault("every program has the first tokens", "o_t = tl.program_id(0) * ROWS +", "o_t ="),
        Fault("the last layer is left out", "tl.static_range(LAYERS)", "tl.static_range(LAYERS - 1)"),
        Fault("every layer's gradient is the first one's", "p_dy[layer] + o", "p_dy[0] + o"),
        Fault("the second tensor has the first one's factors", "p_factor + step_shared", "p_factor"),
        Fault("the third tensor has the second one's factors", "p_factor + 2 * step_shared", "p_factor + step_shared"),
        Fault("a factor is the first token's", "p_factors += o_t.to(tl.int64) * step_token", "p_factors += 0 * o_t"),
        Fault("a factor is the first layer's", "p_factors + layer * step_layer", "p_factors + 0 * layer"),
        Fault("both factors' gradients are the first one's", "b_dy * b_x1", "b_dy * b_x0"),
        Fault("the third factor's gradient is the second one's", "b_dy * b_x2", "b_dy * b_x1"),
        Fault("every layer's dots go to the first one's", "layer * SHARED * tl", "0 * SHARED * tl"),
        Fault("a gradient is taken for dense", "tuple(dense(d) for d in dy)", "tuple(dy)", by="transposed"),
        Fault("a tensor is taken for dense", "tuple(dense(t) for t in shared)", "tuple(shared)", by="transposed"),
        Fault("a result is half as large", "b_dx2.to(", "(0.5 * b_dx2).to("),
    ),
)
