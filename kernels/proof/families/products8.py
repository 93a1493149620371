"""Proof cases of the conversion to 8 bits, of one tensor and of several, and of its scales (kernels/products8.py)."""

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric, meta

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


def _turned_later(module, values):
    """By rows of a wider tensor, whose other columns stay as they are."""
    M, K = values.shape
    wide = torch.zeros(K, M + 16, dtype=values.dtype)
    module.launch_turn(values, wide[:, :M])
    assert not wide[:, M:].float().any(), "columns behind the transpose have changed"
    return wide[:, :M].float()


def _kernel(module, given):
    found = {}
    for name, dtype in (("e4m3", E4M3), ("e5m2", E5M2)):
        values, turned = module.launch_in_8_bits(given["x"], dtype, given["scale"], True)
        alone, nothing = module.launch_in_8_bits(given["x"], dtype, given["scale"], False)
        assert nothing.numel() == 0
        found |= {name: values.float(), f"{name} turned": turned.float(), f"{name} alone": alone.float()}
        found[f"{name} turned later"] = _turned_later(module, values)
    return found


def _reference(module, given):
    found = {}
    for name, dtype in (("e4m3", E4M3), ("e5m2", E5M2)):
        values = module.in_8_bits_reference(given["x"], dtype, given["scale"]).float()
        found |= {name: values, f"{name} turned": values.t(), f"{name} alone": values}
        found[f"{name} turned later"] = values.t()
    return found


def _several(M, K):
    """Tensors of very different size, whose largest numbers lie in the first and in the last of their elements."""

    def make(random):
        xs = [torch.randn(M, K, generator=random) * 10.0**n for n in (-3, 0, 2)]
        xs[0][-1, -1], xs[1][0, 0], xs[2][-1, 0] = 0.01, -4.5, 448.0
        return {"xs": xs}

    return make


def _some_rows_of_zeros(xs):
    """All but the last tensor with every third row of zeros."""
    xs = [x.clone() for x in xs]
    for x in xs[:-1]:
        x[::3] = 0
    return xs


def _kernel_of_several(module, given):
    found = {}
    for axis in (0, 1):
        scales = module.launch_scales(given["xs"], E4M3, axis)
        found |= {f"norm {axis}": scales[:, 1, 0], f"scale {axis}": scales[:, 0, 0], f"squares {axis}": scales[:, 2, 0]}
    found["scale in e5m2"] = module.launch_scales(given["xs"], E5M2)[:, 0, 0]
    found["of some rows"] = module.launch_scales(given["xs"], E5M2, every=3, room=5)[:, 0, 0]
    found["of some rows, zeros"] = module.launch_scales(_some_rows_of_zeros(given["xs"]), E5M2, every=3, room=5)[
        :, 0, 0
    ]
    values, turned = module.launch_conversions(given["xs"], E4M3, scales, True)
    for n, (value, other) in enumerate(zip(values, turned)):
        found |= {f"values {n}": value.float(), f"turned {n}": other.float()}
    return found


def _reference_of_several(module, given):
    found = {}
    for axis in (0, 1):
        found |= {f"norm {axis}": torch.stack([x.norm(dim=axis).max() for x in given["xs"]])}
        squares = [x.shape[axis] * x.norm(dim=axis).max() ** 2 for x in given["xs"]]
        found |= {f"squares {axis}": torch.stack([module.scale_for(x.float(), E4M3, x) for x in squares])}
        found |= {f"scale {axis}": torch.stack([module.scale_for(x.float(), E4M3) for x in given["xs"]])}
    found["scale in e5m2"] = torch.stack([module.scale_for(x.float(), E5M2) for x in given["xs"]])
    found["of some rows"] = torch.stack([32 * module.scale_for(x.float()[::3], E5M2) for x in given["xs"]])
    zeroed = [*_some_rows_of_zeros(given["xs"])[:-1], given["xs"][-1][::3]]
    found["of some rows, zeros"] = torch.stack([32 * module.scale_for(x.float(), E5M2) for x in zeroed])
    for n, (x, scale) in enumerate(zip(given["xs"], found["scale 1"])):
        value = module.in_8_bits_reference(x, E4M3, scale).float()
        found |= {f"values {n}": value, f"turned {n}": value.t()}
    return found


def _finite_only(module, device):
    """What is not finite is left out of scales and norms, each tensor's of its own; nothing at all has a scale."""
    xs = [torch.ones(3, 40, device=device) * 2.0**n for n in (0, 3)]
    right = module.launch_scales(xs, E4M3)[:, :2, 0].tolist()
    xs[0][1], xs[1][2, 5], xs[1][2, 6] = torch.nan, torch.inf, -torch.inf
    assert module.launch_scales(xs, E4M3)[:, :2, 0].tolist() == right
    nothing = [torch.full((4, 4), torch.nan, device=device), torch.zeros(4, 4, device=device)]
    assert module.launch_scales(nothing, E5M2)[:, :2, 0].tolist() == [[2.0**-126, 0.0]] * 2


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


def _zeros_of_several_programs(module, device):
    """Zeros that three programs have looked at, a number that is no power of two, send as many as it takes to the rest;
    one number that one of them has found does not."""
    x = torch.zeros(3 * 3 * 32, 5, device=device)
    x[1] = 1000.0
    assert module.launch_scales([x], E5M2, every=3)[0, 0, 0] == module.scale_for(x, E5M2)
    x[96] = 1.0
    assert module.launch_scales([x], E5M2, every=3)[0, 0, 0] == module.scale_for(x[::3], E5M2)


def _layouts(module, device):
    """Tensors that are not dense have the scales and the numbers of dense ones."""
    xs = [x.to(device) for x in _several(20, 40)(torch.Generator().manual_seed(0))["xs"]]
    strided = [x.t().contiguous().t() for x in xs]
    for how in (dict(axis=0), dict(axis=1), dict(every=3)):
        found, right = (module.launch_scales(given, E4M3, **how)[:, :, 0] for given in (strided, xs))
        assert torch.equal(found, right), how
    scales = module.launch_scales(xs, E4M3)
    apart = torch.stack((scales, scales + 1), -1)[..., 0]
    right = module.launch_conversions(xs, E4M3, scales, True)
    for given in ((strided, scales), (xs, apart)):
        for found, true in zip(module.launch_conversions(given[0], E4M3, given[1], True), right):
            assert all(torch.equal(x.float(), y.float()) for x, y in zip(found, true))


def _launch(dtype, kind, M, K):
    def run():
        import kernels.products8 as module

        x, scale = meta(M, K, dtype=dtype), meta(dtype=torch.float32)
        values, _ = module.launch_in_8_bits(x, kind, scale, True)
        module.launch_turn(values, meta(K, M, dtype=kind))
        module.launch_scales([x], kind)

    return run


def _launch_sampled(M, K):
    def run():
        import kernels.products8 as module

        x = meta(M, K)
        module.launch_scales([x], E5M2, every=M // module.SAMPLED_ROWS, room=module.ROOM)
        module.launch_in_8_bits(x, E5M2, meta(dtype=torch.float32), True)

    return run


def _launch_of_weights(layers, F, D, axis):
    def run():
        import kernels.products8 as module

        module.launch_weights([meta(F, D) for _ in range(layers)], axis)

    return run


FAMILY = Family(
    name="products8",
    module="kernels.products8",
    kernels=("_convert", "_turn", "_measure", "_scales"),
    numeric=(
        Numeric("ragged", _inputs(70, 37), _kernel, _reference, keep_float32=("scale",)),
        Numeric("whole tiles", _inputs(64, 128), _kernel, _reference, quick=False, keep_float32=("scale",)),
        Numeric("three weights", _several(70, 150), _kernel_of_several, _reference_of_several, dtypes=(torch.float32,)),
        Numeric("tiny weights", _several(3, 5), _kernel_of_several, _reference_of_several, dtypes=(torch.float32,)),
        Numeric("tiny", _inputs(4, 5), _kernel, _reference, quick=False, hostile=True, keep_float32=("scale",)),
    ),
    launches=(
        Launch("activations", _launch(torch.bfloat16, E4M3, 65536, 1024), devices=FLOAT8_DEVICES, quick=True),
        Launch("gradients", _launch(torch.bfloat16, E5M2, 65536, 1024), devices=FLOAT8_DEVICES),
        Launch("the head's weights", _launch(torch.float32, E4M3, 50304, 1024), devices=FLOAT8_DEVICES),
        Launch("gradients of q, k and v", _launch_sampled(65536, 3072), devices=FLOAT8_DEVICES),
        Launch("one weight into the MLP", _launch_of_weights(1, 4096, 1024, 1), devices=FLOAT8_DEVICES),
        Launch("one weight out of it", _launch_of_weights(1, 1024, 4096, 0), devices=FLOAT8_DEVICES),
        Launch("16 layers' weights into the MLP", _launch_of_weights(16, 4096, 1024, 1), devices=FLOAT8_DEVICES),
        Launch("16 layers' weights out of it", _launch_of_weights(16, 1024, 4096, 0), devices=FLOAT8_DEVICES),
        Launch("15 layers' q, k and v", _launch_of_weights(15, 3072, 1024, 1), devices=FLOAT8_DEVICES),
        Launch("15 layers' projections back", _launch_of_weights(15, 1024, 1024, 1), devices=FLOAT8_DEVICES),
    ),
    demands={
        "_convert": Demand(wide=("p_x", "p_out", "p_turned")),
        "_turn": Demand(wide=("p_x", "p_out")),
        "_measure": Demand(wide=("p_x",)),
        "_scales": Demand(),
    },
    checks=(
        ("finite numbers only", _finite_only),
        ("what is not finite", _not_finite),
        ("formats", _formats),
        ("zeros of several programs", _zeros_of_several_programs),
        ("layouts", _layouts),
    ),
    faults=(
        Fault(
            "what is measured is taken for dense",
            "    xs = tuple(dense(x) for x in xs)\n",
            "    xs = tuple(xs)\n",
            by="layouts",
        ),
        Fault(
            "x is taken for dense",
            "tuple(dense(x) for x in xs), dense(scales)",
            "tuple(xs), dense(scales)",
            by="transposed",
        ),
        Fault(
            "all tensors are the first",
            "p_x[i] + o_x, mask=m_x, other=0.0).to(tl.float32)\n        b_out",
            "p_x[0] + o_x, mask=m_x, other=0.0).to(tl.float32)\n        b_out",
        ),
        Fault("all tensors have the first one's scale", "p_scale + i * STEP", "p_scale"),
        Fault(
            "the last tensor is not converted",
            "for i in tl.static_range(TENSORS):\n        b_x = tl.load(p_x[i]",
            "for i in tl.static_range(max(TENSORS - 1, 1)):\n        b_x = tl.load(p_x[i]",
        ),
        Fault("lines past the end are measured", "m_x = (o_line < lines)", "m_x = (o_line < lines + 1)"),
        Fault(
            "numbers past a line's end are measured", "(o_along < length)[None, :]", "(o_along < length + 1)[None, :]"
        ),
        Fault(
            "what is not finite counts",
            'b_x < float("inf"), b_x, 0.0',
            'b_x < float("inf"), b_x, b_x',
            by="finite numbers",
        ),
        Fault("negative numbers do not count", "b_x = tl.abs(tl.load(p_x[i]", "b_x = (tl.load(p_x[i]"),
        Fault("all programs measure the first lines", "tl.program_id(0) * LINES +", "0 * LINES +"),
        Fault("a norm is of one number", "b_squares += b_x * b_x", "b_squares = b_x * b_x"),
        Fault("the first rows are looked at", "K, step * K, 1)", "K, K, 1)"),
        Fault("rows are looked at past the end", "-(-M // step)", "M"),
        Fault("all rows are looked at in any case", "tl.where(known > 0, 0, length)", "length"),
        Fault("rows of zeros are all that is looked at", "tl.where(known > 0, 0, length)", "0"),
        Fault("one tensor's zeros are all tensors'", "p_known = p_parts + i * parts * 2", "p_known = p_parts"),
        Fault("no room is left", ") - room", ")"),
        Fault("lines are columns", "(K, M, 1, K)", "(K, M, K, 1)"),
        Fault(
            "most parts are not looked at",
            "tl.load(p_parts + 2 * o, mask=o < parts",
            "tl.load(p_parts + 2 * o, mask=o < 1",
        ),
        Fault("squares are not of so long rows", "square * length", "square"),
        Fault("a scale is half as large", "tl.maximum(exponent, 1)", "tl.maximum(exponent - 1, 1)"),
        Fault("a number that just fits has a larger scale", "> 0x600000", ">= 0x600000"),
        Fault("the least scale is not held", "tl.maximum(exponent, 1)", "exponent", by="finite numbers"),
        Fault("scales are e4m3's", "RANGE=bits, BLOCK", "RANGE=8, BLOCK"),
        Fault("all scales are the first one's", "p_parts += tl.program_id(0) * parts * 2", "p_parts += 0"),
        Fault("the transpose is not turned", "tl.trans(b_out), mask=m_turned", "b_out, mask=m_turned"),
        Fault("the scale multiplies", "b_x / tl.load(p_scale + i", "b_x * tl.load(p_scale + i"),
        Fault(
            "nothing saturates", "return tl.clamp(b_x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)", "return b_x"
        ),
        Fault("infinities saturate", 'float("nan"), b_x)', "b_x, b_x)", by="not finite"),
        Fault("NaN saturates", "LIMIT, propagate_nan=tl.PropagateNan.ALL)", "LIMIT)", by="not finite"),
        Fault(
            "rows past the end are read",
            "m_x = (o_m < M)[:, None] & (o_k < K)[None, :]\n    o_out",
            "m_x = (o_m < M + 1)[:, None] & (o_k < K)[None, :]\n    o_out",
        ),
        Fault("columns past the end are read", "(o_k < K)[None, :]\n    o_out", "(o_k < K + 1)[None, :]\n    o_out"),
        Fault("turned later, not turned", "tl.trans(b_x), mask=m_out", "b_x, mask=m_out"),
        Fault(
            "turned later, columns past the end are written",
            "m_out = (o_k < K)[:, None]",
            "m_out = (o_k <= K)[:, None]",
        ),
        Fault("turned later, its rows are one too long", "* step + o_m", "* (step + 1) + o_m"),
        Fault("rows past the end are written", "m_out = (o_m < M_out)", "m_out = (o_m <= M_out)"),
        Fault("the filling is left out", "m_out = (o_m < M_out)[:, None] & (o_k < K_out)[None, :]", "m_out = m_x"),
        Fault("all tiles are the first row's", "tl.program_id(0) // tiles * BM", "tl.program_id(0) * 0 * BM"),
        Fault("a transpose's rows are one too long", "* M_out + o_m", "* (M_out + 1) + o_m"),
    ),
)
