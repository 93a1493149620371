"""Proof cases of the conversion to 8 bits (kernels/products8.py)."""

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOAT8_DEVICES = ("sm_90", "sm_100")


def _inputs(M, K):
    def make(random):
        """Everything that is special to a float8: ties, numbers between its least ones, beyond its largest."""
        x = torch.randn(M, K, generator=random) * 10 ** torch.randint(-3, 4, (M, 1), generator=random)
        x[0, :4] = torch.tensor([17.0, 1.5 * 2**-9, 2**-10, 464.0])
        x[1, :3] = torch.tensor([-3e4, 3e4, 2.0**-17])
        return {"x": x, "scale": torch.tensor(0.5)}

    return make


def _kernel(module, given):
    found = {}
    for name, dtype in (("e4m3", E4M3), ("e5m2", E5M2)):
        values, turned = module.launch_in_8_bits(given["x"], dtype, given["scale"], True)
        alone, nothing = module.launch_in_8_bits(given["x"], dtype, given["scale"], False)
        assert nothing.numel() == 0
        found |= {name: values.float(), f"{name} turned": turned.float(), f"{name} alone": alone.float()}
        found[f"{name} turned later"] = module.launch_turn(values).float()
    return found


def _reference(module, given):
    found = {}
    for name, dtype in (("e4m3", E4M3), ("e5m2", E5M2)):
        values = module.in_8_bits_reference(given["x"], dtype, given["scale"]).float()
        found |= {name: values, f"{name} turned": values.t(), f"{name} alone": values}
        found[f"{name} turned later"] = values.t()
    return found


def _not_finite(module, device):
    """Infinities become NaN, which saturation must not hide; NaN stays; the largest finite numbers saturate."""
    x = torch.tensor([[torch.inf, -torch.inf, torch.nan, 3e38, -3e38]], device=device)
    for dtype in (E4M3, E5M2):
        values, turned = module.launch_in_8_bits(x, dtype, torch.ones((), device=device), True)
        most = torch.finfo(dtype).max
        for found in (values[0, :5].float().cpu(), turned[:5, 0].float().cpu()):
            assert found[:3].isnan().all() and found[3:].tolist() == [most, -most], found


def _formats(module, device):
    """The format that is asked for, from the public functions on, turned and not, as on the plain way."""
    x = torch.linspace(-3, 3, 20, device=device).view(4, 5)
    for dtype in (E4M3, E5M2):
        both = (module.both_ways(x, dtype, impl=impl) for impl in ("triton", "reference"))
        found, right = ([eight.values for eight in way] for way in both)
        found.append(module.in_8_bits(x, dtype, impl="triton").values)
        for values, true in zip(found, (*right, right[0])):
            assert values.dtype == dtype and torch.equal(values.float(), true.float()), dtype


def _launch(dtype, kind, M, K):
    def run():
        import kernels.products8 as module

        x, scale = torch.empty(M, K, dtype=dtype, device="meta"), torch.empty((), device="meta")
        values, _ = module.launch_in_8_bits(x, kind, scale, True)
        module.launch_turn(values)

    return run


FAMILY = Family(
    name="products8",
    module="kernels.products8",
    kernels=("_convert", "_turn"),
    numeric=(
        Numeric("ragged", _inputs(70, 37), _kernel, _reference, keep_float32=("scale",)),
        Numeric("whole tiles", _inputs(64, 128), _kernel, _reference, quick=False, keep_float32=("scale",)),
        Numeric("tiny", _inputs(4, 5), _kernel, _reference, quick=False, hostile=True, keep_float32=("scale",)),
    ),
    launches=(
        Launch("activations", _launch(torch.bfloat16, E4M3, 65536, 1024), devices=FLOAT8_DEVICES, quick=True),
        Launch("gradients", _launch(torch.bfloat16, E5M2, 65536, 1024), devices=FLOAT8_DEVICES),
        Launch("the head's weights", _launch(torch.float32, E4M3, 50304, 1024), devices=FLOAT8_DEVICES),
    ),
    demands={"_convert": Demand(wide=("p_x", "p_out", "p_turned")), "_turn": Demand(wide=("p_x", "p_out"))},
    checks=(("what is not finite", _not_finite), ("formats", _formats)),
    faults=(
        Fault("x is taken for dense", "    x = dense(x)\n", "", by="transposed"),
        Fault("the transpose is not turned", "tl.trans(b_out), mask=m_turned", "b_out, mask=m_turned"),
        Fault("the scale multiplies", "b_x / tl.load(p_scale)", "b_x * tl.load(p_scale)"),
        Fault(
            "nothing saturates", "return tl.clamp(b_x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)", "return b_x"
        ),
        Fault("infinities saturate", 'float("nan"), b_x)', "b_x, b_x)", by="not finite"),
        Fault("NaN saturates", "LIMIT, propagate_nan=tl.PropagateNan.ALL)", "LIMIT)", by="not finite"),
        Fault("rows past the end are read", "m_x = (o_m < M)", "m_x = (o_m < M + 1)"),
        Fault("columns past the end are read", "(o_k < K)[None, :]\n    b_x", "(o_k < K + 1)[None, :]\n    b_x"),
        Fault("turned later, not turned", "tl.trans(b_x), mask=m_out", "b_x, mask=m_out"),
        Fault(
            "turned later, columns past the end are written",
            "m_out = (o_k < K)[:, None]",
            "m_out = (o_k <= K)[:, None]",
        ),
        Fault("turned later, its rows are one too long", "* M + o_m", "* (M + 1) + o_m"),
        Fault("rows past the end are written", "m_out = (o_m < M_out)", "m_out = (o_m <= M_out)"),
        Fault("the filling is left out", "m_out = (o_m < M_out)[:, None] & (o_k < K_out)[None, :]", "m_out = m_x"),
        Fault("all tiles are the first row's", "tl.program_id(0) // tiles * BM", "tl.program_id(0) * 0 * BM"),
        Fault("a transpose's rows are one too long", "* M_out + o_m", "* (M_out + 1) + o_m"),
    ),
)
