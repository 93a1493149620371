"""Proof cases of attention's three kernels (kernels/attention.py)."""

import torch
import torch.nn.functional as F

from kernels.proof import Demand, Family, Fault, Launch, Numeric
from kernels.proof.operators import LAYOUTS
from kernels.runtime import triton

SCALE = 0.12
NAMES = ("q", "k", "v")
#: Tiles for the interpreter, as (rows, keys): all three ways in which a tile of rows meets a tile of keys.
SQUARE, TALL, WIDE = (64, 64), (128, 32), (16, 64)


def _inputs(T, H, K, width, starts, B=1, of_values=0, **window):
    """Random q, k, v and the gradient at o, with a plan; `starts` are the documents' first tokens; `of_values`: the
    width of v and o, if it is another one."""

    def make(random):
        from kernels.attention import attention_plan

        tokens = torch.ones(B, T, dtype=torch.int32)
        for b, where in enumerate(starts if B > 1 else [starts]):
            tokens[b, list(where)] = 0
        wide = of_values or width
        draw = {
            n: torch.randn(B, T, heads, size, generator=random)
            for n, heads, size in (("q", H, width), ("k", K, width), ("v", K, wide), ("do", H, wide))
        }
        return {**draw, "plan": attention_plan(tokens, eos_id=0, **window)}

    return make


def _kernel(tile, descriptors=False):
    """Forward and backward with this tile for all three kernels."""

    def run(module, given):
        def like(block_m, block_n):
            return module.Tile(block_m, block_n, 4, 1, descriptors=descriptors)

        q, k, v, do, plan = (given[n] for n in ("q", "k", "v", "do", "plan"))
        o, lse = module.launch_forward(q, k, v, plan, SCALE, like(*tile))
        grads = module.launch_backward(do, q, k, v, o, lse, plan, SCALE, like(*tile), like(*reversed(tile)))
        return {"o": o, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads))}

    return run


def _reference(module, given):
    q, k, v = (given[n].detach().requires_grad_() for n in NAMES)
    o = module.attention_reference(q, k, v, given["plan"], scale=SCALE)
    grads = torch.autograd.grad(o, (q, k, v), given["do"])
    wide = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // k.shape[2]
    score = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2)).to(wide) * SCALE
    hidden = ~module.allowed_pairs(given["plan"])[:, None]
    lse = score.masked_fill(hidden, float("-inf")).logsumexp(-1) * 1.4426950408889634
    return {"o": o, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads))}


def _numeric(name, tile, *shape, descriptors=False, quick=True, hostile=False, **window):
    # a document of one token has dq = dk = 0 as the difference of two products of order one
    run = _inputs(*shape, **window), _kernel(tile, descriptors), _reference
    return Numeric(name, *run, quick=quick, least_scale=1.0, hostile=hostile)


def _specialised_kernel(module, given):
    """The forward kernel of specialised warps, which has one tile."""
    q, k, v, plan = (given[n] for n in ("q", "k", "v", "plan"))
    return dict(zip(("o", "lse"), module.launch_forward(q, k, v, plan, SCALE, forward="specialised")))


def _specialised_reference(module, given):
    return {n: x for n, x in _reference(module, given).items() if n in ("o", "lse")}


def _specialised(name, *shape, quick=True, hostile=False, **window):
    run = _inputs(*shape, **window), _specialised_kernel, _specialised_reference
    return Numeric(f"specialised warps: {name}", *run, quick=quick, hostile=hostile)


def _layer_inputs(B, T, H, K, width, starts, with_ve, **window):
    """A merged projection, what the layer mixes in, and the gradient at o."""

    def make(random):
        from kernels.attention import attention_plan

        tokens = torch.ones(B, T, dtype=torch.int32)
        tokens[:, list(starts)] = 0
        angle = torch.arange(T)[:, None] * torch.linspace(0, 1, width // 2)
        shapes = {"qkv": (B, T, H + 2 * K, width), "do": (B, T, H, width), "ve": (B, T, K, width), "s": (2,)}
        drawn = {n: torch.randn(*shape, generator=random) for n, shape in shapes.items()}
        drawn |= {"cos": angle.cos(), "sin": angle.sin(), "plan": attention_plan(tokens, eos_id=0, **window)}
        return drawn if with_ve else drawn | {"ve": None}

    return make


def _slices(given, qkv):
    heads = given["do"].shape[2]
    kv_heads = (qkv.shape[2] - heads) // 2
    return qkv.split((heads, kv_heads, kv_heads), dim=2)


def _prologue(given):
    from kernels.attention_inputs import attention_inputs_reference

    rest = (given[n] for n in ("ve", "s", "cos", "sin"))
    return attention_inputs_reference(*_slices(given, given["qkv"]), *rest)


def _layer_kernel(module, given):
    """Backward through the layer's inputs: q and k lie normed and rotated in the merged tensor, v raw."""
    q, k, v = _prologue(given)
    merged, gradient = given["qkv"].clone(), torch.empty_like(given["qkv"])
    parts = _slices(given, merged)
    factors = [x.float().square().mean(-1).add(torch.finfo(torch.float32).eps).rsqrt().mT.contiguous() for x in parts]
    for part, x in zip(parts, (q, k)):
        part.copy_(x)
    q, k, raw = parts
    v, plan = v.contiguous(), given["plan"]
    o, lse = module.launch_forward(q, k, v, plan, SCALE)
    inputs = module.LayerInputs(*factors[:2], raw, *(given[n] for n in ("ve", "s", "cos", "sin")))
    out = _slices(given, gradient)
    *_, dve, ds = module.launch_backward(given["do"], q, k, v, o, lse, plan, SCALE, inputs=inputs, out=out)
    return {"dqkv": gradient, "ds": ds} | ({} if dve is None else {"dve": dve})


def _layer_reference(module, given):
    leaves = {n: given[n].detach().requires_grad_() for n in ("qkv", "s", "ve") if given[n] is not None}
    q, k, v = _prologue({**given, **leaves})
    o = module.attention_reference(q, k, v, given["plan"], scale=SCALE)
    grads = torch.autograd.grad(o, list(leaves.values()), given["do"])
    return {f"d{n}": g for n, g in zip(leaves, grads)}


def _layer(name, *shape, with_ve=True, **window):
    given = _layer_inputs(*shape, with_ve, **window)
    kept = ("s", "cos", "sin")
    # ds is two numbers, each a sum over all tokens whose terms cancel: their root mean square is no average over many
    more = dict(keep_float32=kept, least_scale=1.0, tolerance=4.0)
    return Numeric(name, given, _layer_kernel, _layer_reference, **more)


def _launch(dtype, T=65536, B=1, H=8, K=8, width=128, descriptors=None, layer=False):
    """The launch of a training step of this shape, with the device's own tiles; `layer`: back through its inputs."""

    def run():
        import kernels.attention as module

        def meta(heads):
            return torch.empty(B, T, heads, width, dtype=dtype, device="meta")

        def tile(kernel):
            own = module.tile_of(module.TILES, kernel, dtype)
            return own if descriptors is None else own._replace(descriptors=descriptors)

        row = torch.empty(B, T, dtype=torch.int32, device="meta")
        order = torch.empty(B * -(-T // 128), dtype=torch.int32, device="meta")
        plan = module.AttentionPlan(row, row, order, order)
        q, k, v, do = meta(H), meta(K), meta(K), meta(H)
        more = {}
        if layer:
            (q, k, raw), out = (meta(H + 2 * K).split((H, K, K), dim=2) for _ in range(2))
            shapes = (B, H, T), (B, K, T), (2,), (T, width // 2), (T, width // 2)
            rms_q, rms_k, s, cos, sin = (torch.empty(x, dtype=torch.float32, device="meta") for x in shapes)
            more = dict(inputs=module.LayerInputs(rms_q, rms_k, raw, meta(K), s, cos, sin), out=out)
        o, lse = module.launch_forward(q, k, v, plan, SCALE, tile("forward"))
        module.launch_backward(do, q, k, v, o, lse, plan, SCALE, tile("dq"), tile("dkdv"), **more)

    return run


def _candidate(number, descriptors):
    """The `number`-th candidate tile of each kernel, where it has so many."""

    def run():
        import kernels.attention as module

        def tile(kernel):
            shapes = module.CANDIDATES[kernel]
            return module.Tile(*shapes[min(number, len(shapes) - 1)], descriptors=descriptors)

        T, shape = 65536, (1, 65536, 8, 128)
        row, order = (torch.empty(*s, dtype=torch.int32, device="meta") for s in ((1, T), (T // 128,)))
        plan = module.AttentionPlan(row, row, order, order)
        q, k, v, do = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for _ in range(4))
        o, lse = module.launch_forward(q, k, v, plan, SCALE, tile("forward"))
        module.launch_backward(do, q, k, v, o, lse, plan, SCALE, tile("dq"), tile("dkdv"))

    return run


def _sequences_apart(module, device):
    """Two sequences whose distance is not that of their tokens give what dense ones give."""
    from kernels.attention import attention_plan

    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 5, 1, 16, generator=random).to(device) for _ in range(3))
    plan = attention_plan(torch.ones(2, 5, dtype=torch.int32, device=device), eos_id=0)
    apart = [LAYOUTS["rows apart"](x) for x in (q, k, v)]
    expected, found = (module.launch_forward(*x, plan, SCALE)[0] for x in ((q, k, v), apart))
    assert torch.equal(found, expected), "o differs if the sequences lie unevenly apart"


def _specialised_launch(K=8, width=128, apart=False, dtype=torch.bfloat16):
    """The forward launch of a training step with specialised warps; `apart`: slices of a merged projection."""

    def run():
        import kernels.attention as module

        T, H = 65536, 8
        q, k, v = torch.empty(1, T, H + 2 * K, width, dtype=dtype, device="meta").split((H, K, K), dim=2)
        if not apart:
            q, k, v = (x.contiguous() for x in (q, k, v))
        row, order = (torch.empty(*s, dtype=torch.int32, device="meta") for s in ((1, T), (T // 128,)))
        module.launch_forward(q, k, v, module.AttentionPlan(row, row, order, order), SCALE, forward="specialised")

    return run


def _logits_of_minus_infinity(module, device):
    """A row whose own logit is -inf, so that its first tile holds no other, has its weights on its other keys."""
    from kernels.attention import attention_plan

    q, v = (torch.ones(1, 130, 1, 16, device=device, dtype=torch.float16) for _ in range(2))
    k = torch.zeros_like(q)
    k[:, 128:] = -torch.inf
    plan = attention_plan(length=130, device=device)
    o, _ = module.launch_forward(q, k, v, plan, SCALE, forward="specialised")
    assert torch.equal(o, v), "logits of -inf spoil a row"


def _large_logits(module, device):
    """Logits of thousands: a running maximum in another scale than theirs leaves no weight at all."""
    from kernels.attention import attention_plan

    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 130, 1, 16, generator=random).half().to(device) for _ in range(3))
    plan = attention_plan(length=130, device=device)
    right = module.attention_reference(1024 * q.double(), k.double(), v.double(), plan, scale=SCALE)
    for forward in ("triton", "specialised"):
        o, _ = module.launch_forward(1024 * q, k, v, plan, SCALE, forward=forward)
        assert (o.double() - right).square().mean() <= 1e-4 * right.square().mean(), f"{forward}: weights are lost"


def _precision_is_torchs(module, device):
    """Float32 products are rounded to tf32 where torch's setting allows it, and nothing else ever is."""
    before = torch.get_float32_matmul_precision()
    try:
        for setting, fast in (("highest", "ieee"), ("high", "ieee" if torch.version.hip else "tf32")):
            torch.set_float32_matmul_precision(setting)
            for dtype, wanted in ((torch.float32, fast), (torch.bfloat16, "ieee"), (torch.float16, "ieee")):
                assert module._precision(dtype) == wanted, f"{dtype} under {setting}: {module._precision(dtype)}"
    finally:
        torch.set_float32_matmul_precision(before)


def _around_inputs(B, T, H, width):
    """What the two kernels around the one pass read."""

    def make(random):
        angle = torch.arange(T)[:, None] * torch.linspace(0, 1, width // 2)
        shapes = {"o": (B, T, H, width), "do": (B, T, H, width), "lse": (B, H, T), "sums": (B, H, T, width)}
        drawn = {n: torch.randn(*shape, generator=random) for n, shape in shapes.items()}
        return {**drawn, "x": torch.randn(B, T, H, width, generator=random), "cos": angle.cos(), "sin": angle.sin()}

    return make


def _rms_factor(x):
    return x.float().square().mean(-1).add(torch.finfo(torch.float32).eps).rsqrt()


def _around_kernel(module, given):
    """Rows before and dq after, as they are and at the projection x."""
    from kernels.attention_inputs import attention_inputs_reference

    o, do, lse, sums, x, cos, sin = given.values()
    rows, zeros = module.launch_rows(o, do, lse)
    # q lies beside other heads, its factors not: as in a merged projection
    y = torch.cat((attention_inputs_reference(x, x, x, None, cos.new_ones(2), cos, sin)[0], x), 2)[:, :, : x.shape[2]]
    plain, at_projection = torch.empty_like(o), torch.empty_like(torch.cat((x, x), 2))[:, :, : x.shape[2]]
    module.launch_dq_rounded(sums, x, plain, SCALE)
    inputs = module.LayerInputs(_rms_factor(x).mT.contiguous(), None, None, None, None, cos, sin)
    module.launch_dq_rounded(sums, y, at_projection, SCALE, inputs)
    (lse, past), delta = rows[0].split((o.shape[1], rows.shape[3] - o.shape[1]), dim=2), rows[1]
    return {"lse": lse, "past": 1 / past, "delta": delta, "zeros": zeros, "dq": plain, "dx": at_projection}


def _around_reference(module, given):
    from kernels.attention_inputs import attention_inputs_reference

    o, do, lse, sums, x, cos, sin = given.values()
    more = -lse.shape[2] % 128
    dq = sums.transpose(1, 2) * SCALE
    x = x.detach().requires_grad_()
    y = attention_inputs_reference(x, x, x, None, cos.new_ones(2), cos, sin)[0]
    return {
        "lse": lse,
        "past": lse.new_zeros(*lse.shape[:2], more),  # one over infinity
        "delta": F.pad((o.to(lse.dtype) * do.to(lse.dtype)).sum(-1).mT, (0, more)),
        "zeros": torch.zeros_like(sums),
        "dq": dq.to(o.dtype),
        "dx": torch.autograd.grad(y, x, dq.to(y.dtype))[0],
    }


def _around(name, *shape):
    kept = ("lse", "sums", "cos", "sin")
    return Numeric(name, _around_inputs(*shape), _around_kernel, _around_reference, keep_float32=kept, least_scale=1.0)


FAMILY = Family(
    name="attention",
    module="kernels.attention",
    kernels=(
        "_attention_forward",
        "_attention_forward_specialised",
        "_attention_dq",
        "_attention_dkdv",
        "_attention_rows",
        "_attention_dq_rounded",
    ),
    numeric=(
        _numeric(
            "documents inside a window, ragged end, square tiles",
            SQUARE,
            200,
            2,
            1,
            16,
            (0, 3, 4, 70, 128, 199),
            window_blocks=2,
        ),
        _numeric("one document, window of one block, tall tiles", TALL, 300, 1, 1, 16, (0,), window_blocks=1),
        _numeric("one document, token window, tokens end with a tile", WIDE, 144, 1, 1, 16, (), window_tokens=100),
        _numeric(
            "two sequences, four heads on two, descriptors, causal",
            SQUARE,
            130,
            4,
            2,
            16,
            ((), (1, 2, 129)),  # one document: a tile of keys has interior tiles for both its query heads
            B=2,
            descriptors=True,
        ),
        _numeric(
            "values twice as wide as keys, four heads on two, descriptors",
            TALL,
            150,
            4,
            2,
            16,
            (0, 3, 70, 149),
            of_values=32,
            descriptors=True,
            window_blocks=1,
        ),
        _numeric("values four times as wide", SQUARE, 140, 2, 2, 16, (0, 90), of_values=64, quick=False),
        _layer("through the layer's inputs, two sequences of documents", 2, 25, 2, 1, 16, (0, 20), window_blocks=1),
        _layer("through the layer's inputs, two sequences, no value embedding", 2, 19, 2, 2, 16, (4,), with_ve=False),
        _around("around one pass: two sequences, ragged end", 2, 135, 3, 16),
        _specialised("documents inside a window, ragged end", 300, 2, 1, 16, (0, 3, 4, 70, 140, 299), window_blocks=2),
        _specialised("two sequences, four heads on two", 150, 4, 2, 16, ((), (1, 2, 129)), B=2, window_tokens=140),
        _specialised("tokens end with a tile, full tiles", 384, 1, 1, 32, ()),
        _specialised("tiny", 18, 2, 1, 16, (3,), quick=False, hostile=True, window_tokens=9),
        _specialised(
            "width 128, window of three blocks", 520, 4, 2, 128, (0, 100, 256, 257), quick=False, window_blocks=3
        ),
        _numeric("width 64, one-token documents", SQUARE, 70, 2, 2, 64, range(0, 70, 1), quick=False, window_blocks=1),
        _numeric(
            "width 128, window of three blocks, four heads on two",
            TALL,
            520,
            4,
            2,
            128,
            (0, 100, 256, 257),
            quick=False,
            window_blocks=3,
        ),
        _numeric(
            "width 64, descriptors, a document that ends at a block border",
            TALL,
            400,
            2,
            1,
            64,
            (128, 384),
            descriptors=True,
            quick=False,
            window_blocks=2,
        ),
        _numeric("tiny", (16, 16), 18, 2, 1, 16, (3,), quick=False, hostile=True, window_tokens=9),
        _numeric("one token", SQUARE, 1, 1, 1, 32, (0,), quick=False, window_blocks=1),
        _numeric("a whole number of tiles, causal", SQUARE, 256, 1, 1, 32, (), quick=False),
    ),
    checks=(
        ("sequences unevenly apart", _sequences_apart),
        ("specialised warps: logits of minus infinity", _logits_of_minus_infinity),
        ("specialised warps: large logits", _large_logits),
        ("float32 products follow torch's own setting", _precision_is_torchs),
    ),
    launches=(
        Launch("bf16, 8 heads of 128", _launch(torch.bfloat16), quick=True),
        Launch("bf16, 8 heads of 128, through the layer's inputs", _launch(torch.bfloat16, layer=True), quick=True),
        Launch(
            "bf16, 8 heads of 128, pointers",
            _launch(torch.bfloat16, descriptors=False),
            devices=("sm_90", "sm_100"),
            demanding=False,
        ),
        Launch("bf16, 8 heads of 128, specialised", _specialised_launch(), devices=("sm_90",), quick=True),
        Launch("bf16, 8 heads of 128, specialised, merged", _specialised_launch(apart=True), devices=("sm_90",)),
        Launch("bf16, 8 heads of 64 on 2, specialised", _specialised_launch(K=2, width=64), devices=("sm_90",)),
        Launch(
            "fp16, 8 heads of 16, specialised", _specialised_launch(width=16, dtype=torch.float16), devices=("sm_90",)
        ),
        Launch("bf16, 8 heads of 64", _launch(torch.bfloat16, width=64)),
        Launch(
            "bf16, 4 heads of 128, pairs of 8 heads", _launch(torch.bfloat16, T=131072, H=4, K=4), devices=("sm_90",)
        ),
        Launch("bf16, two ragged sequences, 8 heads of 128 on 2", _launch(torch.bfloat16, T=5000, B=2, K=2)),
        Launch("fp16, 4 heads of 32", _launch(torch.float16, H=4, K=4, width=32), demanding=False),
        Launch("float32, 8 heads of 128", _launch(torch.float32, T=1000), demanding=False),
        Launch("float32, 4 heads of 16", _launch(torch.float32, T=4096, H=4, K=4, width=16), demanding=False),
    ),
    candidates=tuple(
        Launch(f"candidate {number}, {'descriptors' if descriptors else 'pointers'}", _candidate(number, descriptors))
        for number in range(7)
        for descriptors in (True, False)
    ),
    demands={
        "_attention_rows": Demand(wide=("p_o", "p_do", "p_lse", "p_rows", "p_sums")),
        "_attention_dq_rounded": Demand(wide=("p_sums", "p_q", "p_dq", "p_rms")),
        "_attention_forward": Demand(instructions=("HGMMA", "UTMALDG"), wide=("p_q", "p_k", "p_v", "p_o", "p_lse")),
        # registers change hands: without that the compiler has made nothing of the loop, in silence
        "_attention_forward_specialised": Demand(
            instructions=("HGMMA", "UTMALDG"),
            wide=("p_o", "p_lse"),
            shows=(("setmaxnreg", ""), (r"tt\.make_tensor_descriptor", "")),
        ),
        "_attention_dq": Demand(
            instructions=("HGMMA", "UTMALDG"), wide=tuple("p_q p_k p_v p_o p_do p_lse p_dq p_delta p_rms".split())
        ),
        # two accumulators of 128 x 128 leave no register to spare: older Tritons spill up to 144 bytes a thread
        "_attention_dkdv": Demand(
            instructions=("HGMMA", "UTMALDG"),
            stack_bytes=160 if triton.__version__.startswith(("3.6.", "3.7.")) else 0,
            wide=tuple("p_q p_k p_v p_do p_lse p_delta p_dk p_dv p_rms p_raw p_ve p_dve".split()),
        ),
    },
    faults=(
        Fault(
            "values are read as if they were as wide as keys",
            "b_v = _load_tile(p_v, batch, key, kv_head, T, V_APART, DV, BN, True, False)\n    b_dk",
            "b_v = _load_tile(p_v, batch, key, kv_head, T, V_APART, DH, BN, True, False)\n    b_dk",
        ),
        Fault(
            "the gradient at o is read as if it were as wide as keys",
            "b_do = _load_tile(p_do, batch, row, head, T, HEADS, DV, BM, MASKED, DESCRIPTOR)",
            "b_do = _load_tile(p_do, batch, row, head, T, HEADS, DH, BM, MASKED, DESCRIPTOR)",
        ),
        Fault(
            "upstream gradients are taken for dense",
            "(do, v, o, lse), plan = (dense(x)",
            "(do, v, o, lse), plan = (x",
            by="transposed",
        ),
        Fault(
            "inputs are taken for dense",
            "(q, k, v), plan = (_heads_in_order(x)",
            "(q, k, v), plan = (x",
            by="transposed",
        ),
        Fault(
            "a plan is taken for dense",
            "return AttentionPlan(*(dense(x) for x in plan[:4]))",
            "return plan",
            by="tiny: strided",
        ),
        Fault(
            "queries see one token into the future", "o_j[None, :] <= o_i[:, None]", "o_j[None, :] <= o_i[:, None] + 1"
        ),
        Fault(
            "a key's own query does not see it, backward", "o_i[None, :] >= o_j[:, None]", "o_i[None, :] > o_j[:, None]"
        ),
        Fault(
            "the oldest key of each query is lost",
            "o_j[None, :] >= b_first[:, None]",
            "o_j[None, :] > b_first[:, None]",
        ),
        Fault("a key's last query is one too many", "o_i[None, :] < b_end[:, None]", "o_i[None, :] <= b_end[:, None]"),
        Fault(
            "a partly allowed tile counts as interior",
            "tl.maximum(row - oldest_of_all, 0) // BN",
            "tl.cdiv(tl.maximum(row - oldest_of_all, 0), BN)",
        ),
        Fault(
            "interior by the first query instead of the last",
            "oldest_of_all = tl.load(p_first + end - 1)",
            "oldest_of_all = tl.load(p_first + row)",
            by="documents inside a window",
        ),
        Fault(
            "the far edge is one tile short",
            "edge = tl.cdiv(tl.maximum(row - interior * BN - oldest, 0), BN)",
            "edge = tl.maximum(row - interior * BN - oldest, 0) // BN",
            by="token window",
        ),
        Fault(
            "the far edge starts one tile late",
            "t < interior + edge, row - (t + 1) * BN",
            "t < interior + edge, row - (t + 2) * BN",
            by="token window",
        ),
        Fault(
            "only the first diagonal tile",
            "return tl.cdiv(end - row, BN), interior, edge",
            "return 1, interior, edge",
            by="window of one block",
        ),
        Fault(
            "backward: interior by the last key instead of the first",
            "end_of_first = tl.load(p_end + key)",
            "end_of_first = tl.load(p_end + tl.minimum(key + BN, T) - 1)",
            by="four heads on two",
        ),
        Fault(
            "backward: edge tiles lost",
            "edge = tl.cdiv(tl.maximum(end_of_last - start - interior * BM, 0), BM)",
            "edge = 0",
            by="token window",
        ),
        Fault("backward: interior starts on the diagonal", "start = key + tl.cdiv(BN, BM) * BM", "start = key"),
        Fault(
            "rows past the end are written", "mask=(row + o_row < T)[:, None])", "mask=(row + o_row < T + 1)[:, None])"
        ),
        Fault(
            "rows past the end are read",
            "((row + o_row >= 0) & (row + o_row < T))[:, None]",
            "(row + o_row >= 0)[:, None]",
        ),
        Fault(
            "rows before the start are read",
            "((row + o_row >= 0) & (row + o_row < T))[:, None]",
            "(row + o_row < T)[:, None]",
        ),
        Fault(
            "the head's stride is that of its neighbour in time",
            "+ row) * HEADS + head) * DH",
            "+ row) * HEADS) * DH + head",
        ),
        Fault(
            "query heads read the wrong key head",
            "kv_head = head // (HEADS // KV_HEADS)",
            "kv_head = head % KV_HEADS",
            by="four heads on two",
        ),
        Fault(
            "interior tiles forget the later query heads of their group",
            "range(0, GROUP * interior)",
            "range(0, interior)",
            by="four heads on two",
        ),
        Fault(
            "edge tiles forget the later query heads of their group",
            "range(0, GROUP * (diagonal + edge))",
            "range(0, diagonal + edge)",
            by="four heads on two",
        ),
        Fault("a tile behind the last token is worked on", "if row >= T:", "if row > T:", by="tokens end with a tile"),
        Fault(
            "a tile of keys behind the last is worked on", "if key >= T:", "if key > T:", by="tokens end with a tile"
        ),
        Fault(
            "sequences of uneven distance are taken for even",
            "(B == 1 or x.stride(0) == T * x.stride(1))",
            "(B != 1 or x.stride(0) == T * x.stride(1))",
            by="unevenly apart",
        ),
        Fault(
            "float32 products are rounded where torch says not to",
            'torch.get_float32_matmul_precision() != "highest"',
            'torch.get_float32_matmul_precision() == "highest"',
            by="torch's own setting",
        ),
        Fault(
            "specialised: the mask stands still",
            "        b_from += BN\n        b_until += BN\n",
            "",
            by="specialised warps: documents",
        ),
        Fault(
            "specialised: the last key that a row sees is lost",
            "o_column[None, :] <= b_until[:, None]",
            "o_column[None, :] < b_until[:, None]",
            by="specialised warps: documents",
        ),
        Fault(
            "specialised: the oldest tile is left out",
            "tl.cdiv(row - oldest, BN) + 1",
            "tl.cdiv(row - oldest, BN)",
            by="specialised warps: documents",
        ),
        Fault(
            "specialised: the oldest key of each query is lost",
            "o_column[None, :] >= b_from[:, None]",
            "o_column[None, :] > b_from[:, None]",
            by="specialised warps: documents",
        ),
        Fault(
            "specialised: the second sequence reads the first one's queries",
            "o_q = (batch.to(tl.int64) * T * Q_APART + head) * DH",
            "o_q = head * DH",
            by="specialised warps: two sequences",
        ),
        Fault(
            "specialised: a row with nothing but -inf so far is NaN",
            'tl.where(b_new == float("-inf"), 0.0, b_new)  # logits',
            "b_new  # logits",
            by="minus infinity",
        ),
        Fault("the second sequence uses the first one's plan", "p_first += batch * T", "p_first += batch"),
        Fault("the running maximum is not carried", "b_keep = tl.exp2(b_max - b_shift)", "b_keep = tl.exp2(b_max * 0)"),
        Fault("delta is left out", "b_ds = b_p * (b_dp - b_delta[None, :])", "b_ds = b_p * b_dp"),
        Fault("two programs take the same rows", "tile % (CHUNK // ROWS) * ROWS", "0"),
        Fault("the logarithm is stored in base e", "b_max + tl.log2(b_sum)", "b_max + tl.log(b_sum)"),
        Fault("the norm's derivative forgets its own change", "b_1 = (b_1 - b_y1 * b_mean) * b_r", "b_1 = b_1 * b_r"),
        Fault("rotations are undone the wrong way round", "(b_1 * b_cos - b_2 * b_sin)", "(b_1 * b_cos + b_2 * b_sin)"),
        Fault("projections' gradients of rows past the end are written", "m_row = (o_row < T)", "m_row = (o_row <= T)"),
        Fault("the norm's factor is that of the first sequence", "p_rms += (batch.to(tl.int64)", "p_rms += (0"),
        Fault("the values' norm keeps no mean", "(b_1 - b_y1 * b_mean) * b_r).to", "b_1 * b_r).to"),
        Fault("the values' gradient lacks their factor", "(b_r * tl.load(p_s))[:, None]", "b_r[:, None]"),
        Fault("the value embedding's gradient lacks its factor", "(b_1 * s_1).to", "b_1.to"),
        Fault("scalars' gradients of two programs lie on each other", "p_ds += tl.program_id(0) * 2", "p_ds += 0"),
        Fault(
            "the raw values are read as if dense",
            "p_ds, p_raw, p_ve, p_s, b_dv, batch, key, kv_head, T, K_APART",
            "p_ds, p_raw, p_ve, p_s, b_dv, batch, key, kv_head, T, V_APART",
        ),
        Fault(
            "the value embedding's gradient lies as the projection's",
            "+ row) * V_APART + head) * DH",
            "+ row) * APART + head) * DH",
        ),
        Fault(
            "rows past the end weigh something",
            'mask=o_i < T, other=float("inf"))',
            "mask=o_i < T, other=0.0)",
            by="around",
        ),
        Fault(
            "deltas lie where the first sequence's are",
            "+ place) * rows + o_i, b_delta",
            "+ head) * rows + o_i, b_delta",
            by="around",
        ),
        Fault(
            "what dq is added to is not zero",
            "p, tl.zeros([BM, DH], tl.float32), mask=(o_i",
            "p, tl.zeros([BM, DH], tl.float32) + 1, mask=(o_i",
            by="around",
        ),
        Fault(
            "the rounded dq lacks the logit scale",
            "other=0.0) * scale\n    if LAYER",
            "other=0.0)\n    if LAYER",
            by="around",
        ),
        Fault(
            "dq is rounded for the first sequence only",
            "tl.arange(0, DH)[None, :]\n    b_dq = tl.load(p,",
            "tl.arange(0, DH)[None, :] - batch * HEADS * T * DH\n    b_dq = tl.load(p,",
            by="around",
        ),
        Fault("another head's norms", "p_rms + place * T, p_cos", "p_rms + batch * T, p_cos", by="around"),
    ),
)
