"""Proof cases of both embeddings' gradients over all layers (kernels/residual.py)."""

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric


def _inputs(layers, *shape):
    def make(random):
        def draw(*size):
            return torch.randn(*size, generator=random)

        dy = [draw(*shape) for _ in range(layers)]
        return {"dy": dy, "x00": draw(*shape), "x01": draw(*shape), "factors": draw(layers, 2)}

    return make


def _named(grads):
    return dict(zip(("dx00", "dx01", "dfactors"), grads))


def _kernel(module, given):
    return _named(module.launch_gather(*given.values()))


def _reference(module, given):
    return _named(module.gather_reference(*given.values()))


def _numeric(name, *sizes, **options):
    return Numeric(name, _inputs(*sizes), _kernel, _reference, keep_float32=("factors",), **options)


def _launch(dtype, layers=16, N=65536, D=1024):
    def run():
        import kernels.residual as module

        def meta(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        dy = [meta(1, N, D) for _ in range(layers)]
        module.launch_gather(dy, meta(1, N, D), meta(1, N, D), meta(layers, 2, dtype=torch.float32))

    return run


FAMILY = Family(
    name="residual",
    module="kernels.residual",
    kernels=("_gather_gradients",),
    numeric=(
        _numeric("several programs, a ragged end", 5, 3, 37, 61),
        _numeric("whole programs", 2, 4, 1024, quick=False),
        _numeric("one layer, fewer elements than a program has", 1, 2, 9),
        _numeric("tiny", 3, 2, 5, 4, quick=False, hostile=True),
    ),
    launches=(
        Launch("bf16, a training step", _launch(torch.bfloat16), quick=True),
        Launch("bf16, one layer", _launch(torch.bfloat16, 1)),
        Launch("float32, 3 layers", _launch(torch.float32, 3, 1000, 100)),
    ),
    demands={"_gather_gradients": Demand(wide=("p_x00", "p_x01", "p_dx00", "p_dx01", "p_dots"))},
    faults=(
        Fault("elements past the end are touched", "m = o < elements", "m = o < elements + 1"),
        Fault("every program has the first block", "tl.program_id(0).to(tl.int64) * BLOCK +", "0 * BLOCK +"),
        Fault("the last layer is left out", "tl.static_range(LAYERS)", "tl.static_range(LAYERS - 1)"),
        Fault("every layer's gradient is the first one's", "p_dy[layer] + o", "p_dy[0] + o"),
        Fault("the second embedding has the first one's factors", "p_factors + 2 * layer + 1", "p_factors + 2 * layer"),
        Fault("both factors' gradients are the first one's", "b_dy * b_x01", "b_dy * b_x00"),
        Fault(
            "every program writes the first one's part",
            "p_dots += tl.program_id(0).to(tl.int64) * LAYERS * 2",
            "p_dots += 0",
        ),
        Fault("half of the parts are summed", "dots.sum(0)", "dots[::2].sum(0)"),
        Fault("a gradient is taken for dense", "tuple(dense(d) for d in dy)", "tuple(dy)", by="transposed"),
        Fault("an embedding is taken for dense", "given = dense(x00),", "given = x00,", by="transposed"),
        Fault("the factors are taken for dense", "dense(factors_L2.float())", "factors_L2.float()", by="transposed"),
        Fault("a result is half as large", "b_dx01.to(", "(0.5 * b_dx01).to("),
    ),
)
