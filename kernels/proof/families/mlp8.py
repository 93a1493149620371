"""Proof cases of the 8-bit products with the MLP's epilogues (kernels/mlp8.py).

All numbers are small integers and powers of two, so that sums, roots and scales are exact, and what is rounded to 8
bits at the end must be the same number."""

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric, meta
from kernels.proof.families.products8 import E4M3, E5M2, FLOAT8_DEVICES
from kernels.runtime import triton


def _inputs(M, N, K):
    def make(random):
        a, b = (torch.randint(4, 17, size, generator=random).float() for size in ((M, K), (N, K)))
        a[torch.rand(M, generator=random) < 0.4] *= -1  # whole rows: sums are larger than half precision can count
        act = torch.randint(0, 5, (M, N), generator=random).float().square()
        return {"a": a, "b": b, "act": act, "scales": torch.tensor([0.5, 4.0, 2.0**14])}

    return make


def _eights(module, given):
    """The factors, the activation turned and the result's scale, in the 8-bit numbers that they are."""
    of_product, of_act, of_out = given["scales"].float().unbind()
    one = torch.ones_like(of_product)
    a, b, act = (given[name].resolve_neg().to(E4M3) for name in ("a", "b", "act"))
    steep = module.Eight(given["a"].resolve_neg().to(E5M2), of_product)
    return module.Eight(a, of_product), steep, module.Eight(b, one), module.Eight(act.t(), of_act), of_out


def _both(product_8, added_product_8):
    """Forward, backward, and beside a residual."""

    def run(module, given):
        a, steep, b, act, of_out = _eights(module, given)
        out, turned = product_8(module)(a, b, of_out)
        slope, slope_turned = product_8(module)(steep, b, of_out, act)
        found = {"out": out, "turned": turned, "slope": slope, "slope turned": slope_turned}
        residual = given["act"].float()[: a.values.shape[0] - 3, : b.values.shape[0] - 5]
        found["added"] = added_product_8(module)(a, b, residual)
        found["added to a gradient"] = added_product_8(module)(steep, b, residual)
        return {name: x.float() for name, x in found.items()}

    return run


def _with_tile(**tile):
    def with_it(name):
        return lambda module: lambda *given: getattr(module, name)(*given, tile=module.Tile(**tile))

    return _both(with_it("launch_product_8"), with_it("launch_added_product_8"))


def _named(*names):
    return _both(*(lambda module, name=name: getattr(module, name) for name in names))


_kernel = _named("launch_product_8", "launch_added_product_8")
_reference = _named("product_8_reference", "added_product_8_reference")
_by_descriptors = _with_tile(rows=32, columns=32, warps=4, stages=1, depth=16, descriptors=True)


def _layouts(module, device):
    """Factors that are not dense are made so."""
    random = torch.Generator().manual_seed(0)
    given = {name: x.to(device) for name, x in _inputs(16, 32, 48)(random).items()}
    a, _, b, act, of_out = _eights(module, given)
    residual, strided = given["act"].float(), lambda x: x.t().contiguous().t()
    act = act._replace(values=act.values.contiguous())
    others = [x._replace(values=strided(x.values)) for x in (a, b, act)]
    for found, right in zip(
        module.launch_product_8(*others[:2], of_out, others[2]), module.launch_product_8(a, b, of_out, act)
    ):
        assert torch.equal(found.float(), right.float())
    sums = module.launch_added_product_8(*others[:2], strided(residual)), module.launch_added_product_8(a, b, residual)
    assert torch.equal(*sums)


def _large_residuals(module, device):
    """A residual of bfloat16's range comes back beside a product of zeros; half precision does not hold it."""
    residual = torch.tensor([[2.0**n for n in (-60, 17, 100)]], device=device).expand(20, 3).bfloat16()
    one = torch.ones((), device=device)
    a, b = (module.Eight(torch.zeros(size, 16, device=device).to(E4M3), one) for size in (20, 3))
    assert torch.equal(module.launch_added_product_8(a, b, residual), residual)


def _launch(N=65536, D=1024, F=4096, **options):
    def run():
        import kernels.mlp8 as module

        scale = meta(dtype=torch.float32)
        eight = lambda *size, dtype=E4M3: module.Eight(meta(*size, dtype=dtype), scale)  # noqa: E731
        tile = module.tile_of(module.TILES, "product", E4M3)._replace(**options) if options else None
        module.launch_product_8(eight(N, D), eight(F, D), scale, tile=tile)
        module.launch_product_8(eight(N, D, dtype=E5M2), eight(F, D), scale, eight(F, N), tile=tile)
        module.launch_added_product_8(eight(N, F), eight(D, F), meta(N, D), tile=tile)

    return run


def _launch_gradient(N=65536, D=1024, E=3072):
    """The product of a gradient in e5m2 beside another gradient."""

    def run():
        import kernels.mlp8 as module

        scale = meta(dtype=torch.float32)
        dy, w = (module.Eight(meta(rows, E, dtype=dtype), scale) for rows, dtype in ((N, E5M2), (D, E4M3)))
        module.launch_added_product_8(dy, w, meta(N, D))

    return run


def _stream(N, D):
    def make(random):
        s = torch.randn(N, D, generator=random) * 10 ** torch.randint(-2, 3, (N, 1), generator=random)
        return {"s": s, "scale": torch.tensor(D**0.5 / 448)}

    return make


def _normed(name):
    """In steps of 8 bits, so that one number that is rounded the other way is one step off."""

    def named(module, given):
        r, values, turned = getattr(module, name)(given["s"], given["scale"])
        steps = {"values": values.float(), "turned": turned.float()}
        return {"r": r} | {name: x.sign() * (x.abs() + 2**-6).log2() for name, x in steps.items()}

    return named


_kernel_normed, _reference_normed = _normed("launch_normed"), _normed("normed_reference")


def _rows_not_finite(module, device):
    """A row with NaN or an infinity has that, and no other has."""
    s = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)).to(device)
    one = torch.ones((), device=device)
    usual = module.launch_normed(s, one)
    s[5, 3], s[9, 32] = torch.nan, torch.inf
    found, others = module.launch_normed(s, one), [n for n in range(40) if n not in (5, 9)]
    assert found[1][5, :33].float().isnan().all() and found[1][9, 32].float().isnan()
    for mine, right in zip(found[:2], usual):
        assert torch.equal(mine[others].float(), right[others].float())
    assert torch.equal(found[2][:, others].float(), usual[2][:, others].float())


def _launch_normed(N=65536, D=1024):
    def run():
        import kernels.mlp8 as module

        module.launch_normed(meta(N, D), meta(dtype=torch.float32))

    return run


FAMILY = Family(
    name="mlp8",
    module="kernels.mlp8",
    kernels=("_product_8", "_norm_8"),
    numeric=(
        Numeric("ragged tiles", _inputs(80, 144, 48), _kernel, _reference, dtypes=(torch.float32,)),
        Numeric("by descriptors", _inputs(48, 80, 32), _by_descriptors, _reference, dtypes=(torch.float32,)),
        Numeric("one tile", _inputs(16, 16, 16), _kernel, _reference, dtypes=(torch.float32,), hostile=True),
        Numeric("norm", _stream(70, 40), _kernel_normed, _reference_normed, keep_float32=("scale",)),
        Numeric("a tiny norm", _stream(3, 5), _kernel_normed, _reference_normed, keep_float32=("scale",), hostile=True),
    ),
    launches=(
        Launch("a training step", _launch(), devices=FLOAT8_DEVICES, quick=True),
        Launch(
            "a training step, pointers",
            _launch(rows=64, columns=64, warps=4, stages=2, depth=32, descriptors=False),
            devices=("sm_90",),
            demanding=False,
        ),
        Launch("a gradient beside another one", _launch_gradient(), devices=FLOAT8_DEVICES),
        Launch("the norm of a training step", _launch_normed(), devices=FLOAT8_DEVICES, quick=True),
        Launch("the norm of long rows", _launch_normed(4096, 4096), devices=FLOAT8_DEVICES),
    ),
    demands={
        "_norm_8": Demand(wide=("p_s", "p_out", "p_turned")),
        "_product_8": Demand(
            instructions=("QGMMA", "UTMALDG"),
            stack_bytes=744 if triton.__version__.startswith("3.6.") else 0,  # nothing spills from 3.7 on
            wide=("p_a", "p_b", "p_act", "p_out", "p_turned"),
            shows=((r"max\.NaN", "BACKWARD=False"),),
        ),
    },
    checks=(
        ("strided factors", _layouts),
        ("rows that are not finite", _rows_not_finite),
        ("large residuals", _large_residuals),
    ),
    faults=(
        Fault(
            "a residual is taken in half precision",
            "b_out += tl.load(p_act + o_out, mask=m_out, other=0.0).to(tl.float32)",
            "b_out += tl.load(p_act + o_out, mask=m_out, other=0.0).to(tl.float16)",
            by="large residuals",
        ),
        Fault("the residual is left out", "b_out += tl.load(p_act", "b_out += 0 * tl.load(p_act"),
        Fault("the residual is another row's", "tl.load(p_act + o_out, mask=m_out", "tl.load(p_act, mask=m_out"),
        Fault("the residual is taken for dense", "dense(residual_MN), scales", "residual_MN, scales", by="strided"),
        Fault("the mean is over the tile", "/ D + _EPS", "/ WIDTH + _EPS"),
        Fault("the mean is a sum", "/ D + _EPS", "+ _EPS"),
        Fault("rows are not scaled", "b_s * b_r[:, None] / tl.load(p_scale)", "b_s / tl.load(p_scale)"),
        Fault("the norm's scale multiplies", "b_r[:, None] / tl.load(p_scale)", "b_r[:, None] * tl.load(p_scale)"),
        Fault("the norm's transpose is not turned", "tl.trans(b_8), mask=(o_d", "b_8, mask=(o_d"),
        Fault(
            "the norm's filling is left out",
            "mask=(o_n < N_out)[:, None] & (o_d < D_out)",
            "mask=(o_n < N)[:, None] & (o_d < D)",
        ),
        Fault("rows past the end are normed", "    m = (o_n < N)[:, None]", "    m = (o_n < N + 1)[:, None]"),
        Fault("columns past the end are normed", "& (o_d < D)[None, :]\n    b_s", "& (o_d < D + 1)[None, :]\n    b_s"),
        Fault("all programs norm the first rows", "tl.program_id(0) * ROWS +", "0 * ROWS +"),
        Fault("s is taken for dense", "given = dense(s_ND), r_N", "given = s_ND, r_N", by="transposed"),
        Fault(
            "the activation lies as the result does",
            "tl.trans(tl.load(p_act + o_turned, mask=m_turned, other=0.0))",
            "tl.load(p_act + o_out, mask=m_out, other=0.0)",
        ),
        Fault("the activation is not squared", "b_out *= b_out", "b_out *= 1"),
        Fault("negative values pass", "tl.maximum(b_out, 0.0, propagate_nan=tl.PropagateNan.ALL)", "b_out"),
        Fault(
            "the activation swallows NaN",
            "tl.maximum(b_out, 0.0, propagate_nan=tl.PropagateNan.ALL)",
            "tl.maximum(b_out, 0.0)",
            by="NaN",
        ),
        Fault("the slope lacks its two", "b_out *= 2 * tl.sqrt(", "b_out *= tl.sqrt("),
        Fault("the product's scale is left out", "b_out *= tl.load(p_scale_a) * tl.load(p_scale_b)\n", "b_out *= 1\n"),
        Fault("the activation's scale is the product's", "b_act * tl.load(p_scale_act)", "b_act * tl.load(p_scale_a)"),
        Fault("the result's scale is the activation's", "b_out / tl.load(p_scale_out)", "b_out / tl.load(p_scale_act)"),
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
            "m_turned = (o_n < N)[:, None] & (o_m < M)",
            "m_turned = (o_n < N)[:, None] & (o_m < M + 1)",
        ),
        Fault("a program passes over every second of its tiles", "tl.num_programs(0)", "2 * tl.num_programs(0)"),
        Fault("two programs take the same tile", "first + within % height", "first"),
        Fault("a descriptor's rows are the first", "p_a.load([row, k])", "p_a.load([0, k])"),
        Fault("a descriptor does not move", "p_b.load([column, k])", "p_b.load([column, 0])"),
        Fault("sums are in half precision", "tl.zeros([BM, BN], tl.float32)", "tl.zeros([BM, BN], tl.float16)"),
        Fault(
            "factors are taken for dense",
            "[dense(x.values) for x in (a, b)]",
            "[x.values for x in (a, b)]",
            by="strided",
        ),
    ),
)
