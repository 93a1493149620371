"""Proof cases of the 8-bit products with the MLP's epilogues (kernels/mlp8.py).

All numbers are small integers and powers of two, so that sums, roots and scales are exact, and what is rounded to 8
bits at the end must be the same number."""

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric
from kernels.proof.families.products8 import E4M3, E5M2, FLOAT8_DEVICES
from kernels.runtime import triton


def _inputs(M, N, K):
    def make(random):
        a, b = (torch.randint(4, 17, size, generator=random).float() for size in ((M, K), (N, K)))
        a[torch.rand(M, generator=random) < 0.4] *= -1  # whole rows: sums are larger than half precision can count
        act = torch.randint(0, 5, (M, N), generator=random).float().square()
        return {"a": a, "b": b, "act": act, "scales": torch.tensor([0.5, 4.0, 2.0**14])}

    return make


def _both(product_8):
    """Forward and backward of the 8-bit numbers that the given ones are."""

    def run(module, given):
        a, b, act = (given[name].resolve_neg().to(E4M3) for name in ("a", "b", "act"))
        scales = given["scales"].float()
        out, turned = product_8(module)(a, b, scales)
        slope, slope_turned = product_8(module)(given["a"].resolve_neg().to(E5M2), b, scales, act)
        found = {"out": out, "turned": turned, "slope": slope, "slope turned": slope_turned}
        return {name: x.float() for name, x in found.items()}

    return run


def _with_tile(**tile):
    return _both(lambda module: lambda *given: module.launch_product_8(*given, tile=module.Tile(**tile)))


_kernel = _both(lambda module: module.launch_product_8)
_reference = _both(lambda module: module.product_8_reference)
_by_descriptors = _with_tile(rows=32, columns=32, warps=4, stages=1, depth=16, descriptors=True)


def _layouts(module, device):
    """Factors that are not dense are made so."""
    random = torch.Generator().manual_seed(0)
    given = {name: x.to(device) for name, x in _inputs(16, 32, 48)(random).items()}
    a, b, act = (given[name].resolve_neg().to(E4M3) for name in ("a", "b", "act"))
    turned = [x.t().contiguous().t() for x in (a, b, act)]
    for found, right in zip(
        module.launch_product_8(*turned[:2], given["scales"], turned[2]),
        module.launch_product_8(a, b, given["scales"], act),
    ):
        assert torch.equal(found.float(), right.float())


def _launch(N=65536, D=1024, F=4096, **options):
    def run():
        import kernels.mlp8 as module

        empty = lambda *size, dtype: torch.empty(size, dtype=dtype, device="meta")  # noqa: E731
        scales, w, act = empty(3, dtype=torch.float32), empty(F, D, dtype=E4M3), empty(N, F, dtype=E4M3)
        tile = module.tile_of(module.TILES, "product", E4M3)._replace(**options)
        module.launch_product_8(empty(N, D, dtype=E4M3), w, scales, tile=tile)
        module.launch_product_8(empty(N, D, dtype=E5M2), w, scales, act, tile=tile)

    return run


FAMILY = Family(
    name="mlp8",
    module="kernels.mlp8",
    kernels=("_product_8",),
    numeric=(
        Numeric("ragged tiles", _inputs(80, 144, 48), _kernel, _reference, dtypes=(torch.float32,)),
        Numeric("by descriptors", _inputs(48, 80, 32), _by_descriptors, _reference, dtypes=(torch.float32,)),
        Numeric("one tile", _inputs(16, 16, 16), _kernel, _reference, dtypes=(torch.float32,), hostile=True),
    ),
    launches=(
        Launch("a training step", _launch(), devices=FLOAT8_DEVICES, quick=True),
        Launch(
            "a training step, pointers",
            _launch(rows=64, columns=64, warps=4, stages=2, depth=32, descriptors=False),
            devices=("sm_90",),
            demanding=False,
        ),
    ),
    demands={
        "_product_8": Demand(
            instructions=("QGMMA", "UTMALDG"),
            stack_bytes=744 if triton.__version__.startswith("3.6.") else 0,  # nothing spills from 3.7 on
            wide=("p_a", "p_b", "p_act", "p_out", "p_turned"),
            shows=((r"max\.NaN", "BACKWARD=False"),),
        )
    },
    checks=(("strided factors", _layouts),),
    faults=(
        Fault("the activation is not squared", "b_out *= b_out", "b_out *= 1"),
        Fault("negative values pass", "tl.maximum(b_out, 0.0, propagate_nan=tl.PropagateNan.ALL)", "b_out"),
        Fault(
            "the activation swallows NaN",
            "tl.maximum(b_out, 0.0, propagate_nan=tl.PropagateNan.ALL)",
            "tl.maximum(b_out, 0.0)",
            by="NaN",
        ),
        Fault("the slope lacks its two", "b_out *= 2 * tl.sqrt(b_act)", "b_out *= tl.sqrt(b_act)"),
        Fault("the product's scale is left out", "b_out *= tl.load(p_scales)\n", "b_out *= 1\n"),
        Fault("the activation's scale is the product's", "tl.load(p_scales + 1)", "tl.load(p_scales)"),
        Fault("the result's scale is the activation's", "tl.load(p_scales + 2)", "tl.load(p_scales + 1)"),
        Fault("the transpose is not turned", "tl.trans(b_8), mask", "b_8, mask"),
        Fault(
            "rows past the end are read",
            "(o_m < M)[:, None] & (o_k < K)[None, :], (o_n",
            "(o_m < M + 1)[:, None] & (o_k < K)[None, :], (o_n",
        ),
        Fault(
            "depth past the end is read",
            "(o_n < N)[:, None] & (o_k < K)[None, :]",
            "(o_n < N)[:, None] & (o_k < K + 1)[None, :]",
        ),
        Fault(
            "columns past the end are written",
            "m_out = (o_m < M)[:, None] & (o_n < N)",
            "m_out = (o_m < M)[:, None] & (o_n < N + 1)",
        ),
        Fault(
            "a transpose is written past its end",
            "mask=(o_n < N)[:, None] & (o_m < M)",
            "mask=(o_n < N)[:, None] & (o_m < M + 1)",
        ),
        Fault("a program passes over every second of its tiles", "tl.num_programs(0)", "2 * tl.num_programs(0)"),
        Fault("two programs take the same tile", "first + within % height", "first"),
        Fault("a descriptor's rows are the first", "p_a.load([row, k])", "p_a.load([0, k])"),
        Fault("a descriptor does not move", "p_b.load([column, k])", "p_b.load([column, 0])"),
        Fault("sums are in half precision", "tl.zeros([BM, BN], tl.float32)", "tl.zeros([BM, BN], tl.float16)"),
        Fault("factors are taken for dense", "None if x is None else dense(x)", "x", by="strided"),
    ),
)
