"""Proof cases of attention's backward kernels in Gluon (kernels/attention_gluon_backward.py), which run in
gluon_model.py; in one pass between the two kernels of kernels/attention.py that stand around it."""

import functools
import itertools
from unittest import mock

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric, gluon_model
from kernels.proof.families import attention as of_attention
from kernels.runtime import LOG2_E, triton

SCALE = of_attention.SCALE
#: What the code of such a kernel shows: registers change hands, barriers are waited for, and stores are fenced.
SPECIALISED = ("setmaxnreg", ""), (r"mbarrier\.try_wait", ""), (r"fence\.proxy\.async", "")


def _backward(module, *given, one_pass=False, seed=0, bulk=None, inputs=None, out=None, **_backward):
    """kernels/attention.py's launch of the module's kernels: on a device themselves, on a CPU in the model, whose order
    of events follows from `seed`. bulk: as BULK, if not as it is."""
    import kernels.attention

    if given[0].device.type == "cpu":
        module = gluon_model.modelled(module)
        gluon_model.seeded(seed)
    whole = mock.patch.object(kernels.attention, "attention_gluon_backward", module)
    with whole, mock.patch.object(module, "BULK", module.BULK if bulk is None else bulk):
        return kernels.attention._launch_gluon(*given, inputs, out, one_pass)


def _forward(q, k, v, plan):
    """(o, lse), by the formula; lse in float32."""
    import kernels.attention as whole

    score = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(q.shape[2] // k.shape[2], 2)).float() * SCALE
    lse = score.masked_fill(~whole.allowed_pairs(plan)[:, None], -torch.inf).logsumexp(-1) * LOG2_E
    return whole.attention_reference(q, k, v, plan, scale=SCALE), lse


def _kernel(module, given, **how):
    q, k, v, do, plan = (given[n] for n in ("q", "k", "v", "do", "plan"))
    o, lse = _forward(q, k, v, plan)
    return dict(zip(("dq", "dk", "dv"), _backward(module, do, q, k, v, o, lse, plan, SCALE, **how)))


_in_one_pass = functools.partial(_kernel, one_pass=True)
_of_threads = functools.partial(_kernel, one_pass=True, bulk=False)


def _reference(module, given):
    import kernels.attention

    found = of_attention._reference(kernels.attention, given)
    return {name: found[name] for name in ("dq", "dk", "dv")}


def _numeric(name, *shape, quick=True, hostile=False, kernel=_in_one_pass, **window):
    # a document of one token has dq = dk = 0 as the difference of two products of order one
    run = of_attention._inputs(*shape, **window), kernel, _reference
    return Numeric(name, *run, quick=quick, hostile=hostile, least_scale=1.0)


class _InGluon:
    """kernels/attention.py to the cases of attention's family, its backward pass being the module's."""

    def __init__(self, module, **how):
        import kernels.attention

        self.module, self.whole, self.how = module, kernels.attention, how

    def __getattr__(self, name):
        return getattr(self.whole, name)

    def launch_backward(self, *given, **options):
        return _backward(self.module, *given, **options, **self.how)


def _layer_kernel(module, given, one_pass):
    return of_attention._layer_kernel(_InGluon(module, one_pass=one_pass), given)


def _layer_reference(module, given):
    return of_attention._layer_reference(_InGluon(module), given)


def _layer(name, *shape, with_ve=True, one_pass=True, quick=True, **window):
    given = of_attention._layer_inputs(*shape, with_ve, **window)
    # ds is two numbers, each a sum over all tokens whose terms cancel: their root mean square is no average over many
    more = dict(keep_float32=("s", "cos", "sin"), least_scale=1.0, tolerance=4.0, quick=quick)
    kernel = functools.partial(_layer_kernel, one_pass=one_pass)
    return Numeric(name, given, kernel, _layer_reference, **more)


def _given(device, *shape, dtype=torch.bfloat16, **window):
    """What a backward launch takes, up to the plan."""
    drawn = of_attention._inputs(*shape, **window)(torch.Generator().manual_seed(0))
    q, k, v, do = (drawn[n].to(dtype).to(device) for n in ("q", "k", "v", "do"))
    plan = type(drawn["plan"])(*(x if x is None else x.to(device) for x in drawn["plan"]))
    return do, q, k, v, *_forward(q, k, v, plan), plan, SCALE


def _any_order_of_events(module, device):
    """Whatever order partitions and copies run in, the result is the same to the bit, and nobody waits for ever. Within
    a program: on a device several add to one tile, in an order of their own."""
    for width, seeds, one_pass in ((64, 8, True), (128, 4, True), (64, 6, False)):
        given = _given(device, 260, 1, 1, width, (200,))
        found = [_backward(module, *given, one_pass=one_pass, seed=seed) for seed in range(seeds)]
        for again in found[1:] if device == "cpu" or not one_pass else ():
            assert all(torch.equal(x, y) for x, y in zip(found[0], again)), "the result depends on the order of events"


def _every_small_plan(module, device):
    """Every rising table of first keys of up to five tokens, with tiles of four keys and two queries, and of four
    queries and two keys."""
    import kernels.attention

    if device != "cpu":
        return  # tiles of that size are the model's
    module = gluon_model.modelled(module)
    random = torch.Generator().manual_seed(0)
    for width, T in itertools.product((2, 4), (1, 3, 5)):  # as wide as half a tile of keys, and twice as wide
        module.HALF, module.TILE, module.walked = 2, 4, lambda *tensors: [x.contiguous() for x in tensors]
        q, k, v, do = (torch.randn(1, T, 1, width, generator=random).double() for _ in range(4))
        order = torch.arange(-(-T // 4), dtype=torch.int32)
        for first in itertools.product(*(range(i + 1) for i in range(T))):
            if list(first) != sorted(first):
                continue
            end = [sum(f <= j for f in first) for j in range(T)]
            tables = (torch.tensor([x], dtype=torch.int32) for x in (first, end))
            plan = kernels.attention.AttentionPlan(*tables, order, order)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            o = kernels.attention.attention_reference(*leaves, plan, scale=SCALE)
            right = torch.autograd.grad(o, leaves, do)
            score = (q[:, :, 0] @ k[:, :, 0].mT * SCALE).detach()
            lse = score.masked_fill(~kernels.attention.allowed_pairs(plan), -torch.inf).logsumexp(-1) * LOG2_E
            given, o = [x.detach() for x in (do, q, k, v)], o.detach()
            dq, summed = torch.empty_like(q), torch.zeros(1, 1, T, width).double()
            rows = module.launch_dq(*given, o, lse.float()[None], dq, plan.first_key_BT, order, SCALE, 1)
            assert torch.allclose(rows[0, 0, 0, :T], lse[0].float()) and (rows[0, ..., T:] == torch.inf).all()
            assert torch.allclose(rows[1, 0, 0, :T], (o * do).sum(-1)[0, :, 0].float()) and not rows[1, ..., T:].any()
            for sums in (None, summed):
                dk, dv = (torch.empty_like(x) for x in (k, v))
                module.launch_backward(*given, rows, sums, dk, dv, plan.end_query_BT, order, SCALE, 1)
                found = dq if sums is None else sums.transpose(1, 2) * SCALE, dk, dv
                for name, x, true in zip(("dq", "dk", "dv"), found, right):
                    assert torch.allclose(x, true, atol=1e-5), f"{name} of width {width}, first keys {first}"


def _large_logits(module, device):
    """Logits of hundreds: gradients stay finite, and keys past the end, whose logits are 0, add nothing."""
    do, q, k, v, *_, plan, _ = _given(device, 330, 1, 1, 64, (200,))
    names = "dq", "dk", "dv"
    o, lse = _forward(64 * q.double(), k.double(), v.double(), plan)
    given = do, 64 * q, k, v, o.to(q.dtype), lse, plan, SCALE
    found = [(name, x) for one in (True, False) for name, x in zip(names, _backward(module, *given, one_pass=one))]
    exact = {n: x.double() for n, x in (("q", 64 * q), ("k", k), ("v", v), ("do", do))} | {"plan": plan}
    exact = _reference(module, exact)
    for name, x in found:
        error, size = ((y.double()).square().mean() for y in (x - exact[name], exact[name]))
        assert error <= 1e-2 * size, f"{name}: large logits lose their gradients"


def _launch(K=8, width=128, layer=False, with_ve=True, dtype=torch.bfloat16, T=65536, B=1, one_pass=True, bulk=None):
    """The backward launch of a training step; `layer`: back through its inputs, as slices of a merged projection.
    bulk: as BULK, if not as it is."""

    def run():
        import kernels.attention as module
        import kernels.attention_gluon_backward as of_gluon

        H = 8

        def meta(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        (q, k, raw), out = meta(B, T, H + 2 * K, width).split((H, K, K), dim=2), None
        inputs, f = None, torch.float32
        if layer:
            tables = [meta(*x, dtype=f) for x in ((B, H, T), (B, K, T), (2,), (T, width // 2), (T, width // 2))]
            ve = meta(B, T, K, width) if with_ve else None
            inputs = module.LayerInputs(*tables[:2], raw, ve, *tables[2:])
            out = meta(B, T, H + 2 * K, width).split((H, K, K), dim=2)
        row, order = meta(B, T, dtype=torch.int32), meta(B * -(-T // 128), dtype=torch.int32)
        plan = module.AttentionPlan(row, row, order, order)
        do, v, o, lse = meta(B, T, H, width), meta(B, T, K, width), meta(B, T, H, width), meta(B, H, T, dtype=f)
        with mock.patch.object(of_gluon, "BULK", of_gluon.BULK if bulk is None else bulk):
            module._launch_gluon(do, q, k, v, o, lse, plan, SCALE, inputs, out, one_pass)

    return run


FAMILY = Family(
    name="attention_gluon_backward",
    module="kernels.attention_gluon_backward",
    kernels=("_attention_backward_gluon", "_attention_dq_gluon", "_attention_dkdv_gluon"),
    numeric=(
        _numeric("documents inside a window, ragged end", 200, 1, 1, 64, (0, 3, 4, 70, 140, 199), window_blocks=1),
        _numeric("one document, full tiles", 200, 1, 1, 64, ()),
        _numeric("two sequences, two heads on one", 135, 2, 1, 64, ((), (1, 2, 129)), B=2, window_tokens=130),
        _numeric("width 128, documents inside a window", 150, 1, 1, 128, (0, 3, 70), window_blocks=2),
        _numeric(
            "added by threads, two sequences, two heads on one",
            150,
            2,
            1,
            64,
            ((0, 3, 70), (129,)),
            B=2,
            kernel=_of_threads,
            window_blocks=2,
        ),
        _numeric("added by threads, width 128", 150, 2, 2, 128, (0, 70), kernel=_of_threads, window_blocks=2),
        _numeric(
            "two passes: documents inside a window, ragged end",
            200,
            1,
            1,
            64,
            (0, 3, 4, 70, 140, 199),
            kernel=_kernel,
            window_blocks=1,
        ),
        _numeric("two passes: one document", 330, 1, 1, 64, (), kernel=_kernel),
        _numeric(
            "two passes: two sequences, four heads on two",
            135,
            4,
            2,
            64,
            ((), (1, 2, 129)),
            B=2,
            kernel=_kernel,
            window_tokens=130,
        ),
        _numeric("two passes: width 128", 150, 2, 2, 128, (0, 3, 70), kernel=_kernel, window_blocks=2),
        _layer("two passes: a layer, two sequences", 2, 67, 2, 1, 64, (0, 50), one_pass=False, window_blocks=1),
        _layer("through the layer's inputs, two sequences of documents", 2, 67, 2, 1, 64, (0, 50), window_blocks=1),
        _layer("through the layer's inputs, no value embedding", 2, 37, 2, 2, 128, (4,), with_ve=False),
        _numeric("tiny", 18, 2, 1, 64, (3,), quick=False, hostile=True, window_tokens=9),
        _numeric("two passes: tiny", 18, 2, 1, 64, (3,), kernel=_kernel, quick=False, hostile=True, window_tokens=9),
        _numeric("width 128, window of three blocks", 700, 2, 1, 128, (0, 257), quick=False, window_blocks=3),
        _numeric("one token", 1, 1, 1, 64, (0,), quick=False),
        _numeric("two passes: one token", 1, 1, 1, 64, (0,), kernel=_kernel, quick=False),
    ),
    checks=(
        ("any order of events", _any_order_of_events),
        ("every small plan", _every_small_plan),
        ("large logits", _large_logits),
    ),
    launches=(
        Launch("two passes: bf16, 8 heads of 128", _launch(one_pass=False), devices=("sm_90",), quick=True),
        Launch(
            "two passes: bf16, 8 heads of 128, through the layer's inputs",
            _launch(layer=True, one_pass=False),
            devices=("sm_90",),
            quick=True,
        ),
        Launch(
            "two passes: bf16, no value embedding",
            _launch(layer=True, with_ve=False, one_pass=False),
            devices=("sm_90",),
        ),
        Launch(
            "two passes: bf16, 8 heads of 64 on 2, through the layer's inputs",
            _launch(K=2, width=64, layer=True, one_pass=False),
            devices=("sm_90",),
        ),
        Launch(
            "two passes: bf16, two ragged sequences, 8 heads of 128 on 2",
            _launch(K=2, T=5000, B=2, one_pass=False),
            devices=("sm_90",),
        ),
        Launch(
            "two passes: fp16, 8 heads of 64",
            _launch(width=64, dtype=torch.float16, one_pass=False),
            devices=("sm_90",),
        ),
        Launch("bf16, 8 heads of 128", _launch(), devices=("sm_90",), quick=True),
        Launch("bf16, 8 heads of 128, through the layer's inputs", _launch(layer=True), devices=("sm_90",), quick=True),
        Launch("bf16, no value embedding", _launch(layer=True, with_ve=False), devices=("sm_90",)),
        Launch("bf16, 8 heads of 64 on 2, through the layer's inputs", _launch(K=2, width=64, layer=True), ("sm_90",)),
        Launch("bf16, two ragged sequences, 8 heads of 128 on 2", _launch(K=2, T=5000, B=2), devices=("sm_90",)),
        Launch(
            "bf16, 8 heads of 128, added by threads", _launch(layer=True, bulk=False), devices=("sm_90",), quick=True
        ),
        Launch("fp16, 8 heads of 64", _launch(width=64, dtype=torch.float16), devices=("sm_90",)),
    ),
    demands={
        "_attention_backward_gluon": Demand(
            instructions=("HGMMA", "UTMALDG"),
            wide=tuple("p_dk p_dv p_k p_rms p_raw p_ve p_dve".split()),
            shows=(
                *SPECIALISED,
                (r"cp\.reduce\.async\.bulk", "BULK=True"),
                (r"(red|atom)\.global\.\S*add\S*\.f32", "BULK=False"),
            ),
        ),
        "_attention_dkdv_gluon": Demand(
            instructions=("HGMMA", "UTMALDG"),
            wide=tuple("p_dk p_dv p_k p_rms p_raw p_ve p_dve".split()),
            shows=SPECIALISED[:2],
        ),
        "_attention_dq_gluon": Demand(
            instructions=("HGMMA", "UTMALDG"),
            stack_bytes=16 if triton.__version__.startswith("3.7.") else 0,  # outside of the loop of tiles
            wide=tuple("p_lse p_rows p_dq p_q p_rms".split()),
            shows=SPECIALISED[:2],
        ),
        **{kernel: of_attention.FAMILY.demands[kernel] for kernel in ("_attention_rows", "_attention_dq_rounded")},
    },
    faults=(
        Fault("queries before a key see it", "(b_since >= 0) & ", "", by="one document"),
        Fault("queries see one token into the future", "(b_since >= 0)", "(b_since >= -1)", by="one document"),
        Fault(
            "the last query that sees a key is lost",
            "(b_since < gl.expand",
            "(b_since < gl.expand_dims(b_seen, 1) - 1) & (b_since < gl.expand",
        ),
        Fault("the diagonal is not masked", "(row < first_key + HALF) |", "(row < first_key) |", by="one document"),
        Fault("where a document ends is not masked", "| (row + HALF > end_of_first)", "", by="two sequences"),
        Fault(
            "keys past the end are seen", "b_seen = gl.maximum(b_seen, 0)", "b_seen = gl.maximum(b_seen, T - b_j + 64)"
        ),
        Fault("the last tile of queries is left out", "- key + HALF - 1) // HALF", "- key) // HALF"),
        Fault(
            "the upper group takes no second tile",
            "if (row > key) if WHO",
            "if (row > key + HALF) if WHO",
            by="one document",
        ),
        Fault(
            "the lower group leaves its last tile out", "else (row < end_of_lower)", "else (row + HALF < end_of_lower)"
        ),
        Fault(
            "dq is made of the keys that a tile does not see",
            "seen = gl.where(row > key, 1, 0)",
            "seen = gl.where(row > key, 0, 1)",
        ),
        Fault(
            "what one group has left out goes into dq", "if (row > key) & (row < end_of_lower)", "if row < end_of_lower"
        ),
        Fault("dq lacks the last tile", "n - 1, 0, sums", "n, 0, sums", by="one document"),
        Fault("both groups take the same keys", "k_smem.index(WHO + none)", "k_smem.index(none)", by="one document"),
        Fault("both groups take the same values", "v_smem.index(WHO + none)", "v_smem.index(none)", by="one document"),
        Fault("delta is left out", "(b_dp - gl.expand_dims(b_delta, 0))", "b_dp", by="one document"),
        Fault("the logits' logarithm is left out", "b_s * scale_log2 - gl.expand_dims(b_lse, 0)", "b_s * scale_log2"),
        Fault("dk lacks the logit scale", "(b_dk * scale).to", "b_dk.to", by="one document"),
        Fault("dk at the projection lacks the logit scale", "b_dk * scale, p_rms", "b_dk, p_rms", by="through"),
        Fault(
            "the halves of dk turn the wrong way",
            "(b_1 * b_cos - b_2 * b_sin)",
            "(b_1 * b_cos + b_2 * b_sin)",
            by="through",
        ),
        Fault(
            "a norm's derivative lacks the mean", "b_1 = (b_1 - b_y1 * b_mean) * b_r", "b_1 = b_1 * b_r", by="through"
        ),
        Fault(
            "both groups write one share of ds",
            "(gl.program_id(0) * 2 + WHO) * 2",
            "gl.program_id(0) * 4",
            by="through",
        ),
        Fault(
            "values are found as far apart as keys", "o_ve = (first * KV_HEADS", "o_ve = (first * K_APART", by="through"
        ),
        Fault("dve lacks its factor", "(b_2 * s_1)", "b_2", by="through"),
        Fault(
            "half of dq is added to the wrong columns",
            "row, WHO * HALF], dq_smem",
            "row, 0], dq_smem",
            by="width 128, doc",
        ),
        Fault(
            "half of dq is made of the wrong keys' columns",
            "b_k.slice(WHO * HALF",
            "b_k.slice(0 * HALF",
            by="width 128, doc",
        ),
        Fault("one group's ds is left out of dq", "use_acc=group > 0", "use_acc=False", by="one document"),
        Fault(
            "groups take the same turns with dq",
            "(DH > HALF) | (pair == WHO)",
            "(DH > HALF) | (pair == 0)",
            by="one document",
        ),
        Fault("dq goes to the tile after its own", "n - 1, none, sums", "n, none, sums", by="one document"),
        Fault(
            "ds is read before the other group has written it",
            "    mbarrier.wait(ds_full.index(pair), (n // 2) & 1)\n",
            "",
            by="any order",
        ),
        Fault(
            "ds is overwritten while it is read",
            "                mbarrier.wait(ds_free.index(pair), (n // 2) & 1 ^ 1)\n",
            "",
            by="any order",
        ),
        Fault("one group's ds is enough", "ds_full.index(i), count=2)", "ds_full.index(i), count=1)", by="any order"),
        Fault("ds is free when one group has read it", "count=2 if DH > HALF else 1", "count=1", by="width 128, doc"),
        Fault(
            "ds is handed on without a fence",
            "                fence_async_shared()\n                mbarrier.arrive(ds_full",
            "                mbarrier.arrive(ds_full",
            by="any order",
        ),
        Fault(
            "threads add past the end",
            "row + o_row < T, 1), sem",
            "row + o_row < T + 9, 1), sem",
            by="added by threads",
        ),
        Fault(
            "threads add to the first sequence",
            "sums + ((batch.to(gl.int64) * (KV_HEADS * GROUP)",
            "sums + ((0 * (KV_HEADS * GROUP)",
            by="added by threads",
        ),
        Fault("threads add to the wrong half", "p_sums += WHO * HALF", "p_sums += 0", by="added by threads, width"),
        Fault(
            "dq is added without a fence",
            "        fence_async_shared()\n        if DH",
            "        if DH",
            by="one document",
        ),
        Fault(
            "dq is overwritten before it is added",
            "        tiles_read(0)\n        dq_smem",
            "        dq_smem",
            by="any order",
        ),
        Fault(
            "a program ends before dq is added",
            "mask=m_row)\n    if BULK:\n        tiles_read(0)",
            "mask=m_row)",
            by="any order",
        ),
        Fault(
            "queries are given back before they are read",
            "            b_dk = warpgroup_mma_wait(0, deps=[dk_going])\n"
            "            mbarrier.arrive(q_free.index(slot), count=1)\n",
            "            mbarrier.arrive(q_free.index(slot), count=1)\n"
            "            b_dk = warpgroup_mma_wait(0, deps=[dk_going])\n",
            by="any order",
        ),
        Fault(
            "sums are used while they are multiplied",
            "warpgroup_mma_wait(1, deps=[dv",
            "warpgroup_mma_wait(2, deps=[dv",
        ),
        Fault("queries are never given back", "            mbarrier.arrive(q_free.index(slot), count=1)\n", ""),
        Fault(
            "queries are read before they are there",
            "            mbarrier.wait(q_full.index(slot), phase)\n",
            "",
            by="any order",
        ),
        Fault(
            "gradients at o are read before they are there",
            "            mbarrier.wait(do_full.index(slot), phase)\n",
            "",
            by="any order",
        ),
        Fault("keys are read before they are there", "    mbarrier.wait(kv_full, 0)\n", "", by="any order"),
        Fault(
            "the loader does not wait for a free buffer",
            "& 1 ^ 1\n        mbarrier.wait(q_free",
            "& 1\n        mbarrier.wait(q_free",
        ),
        Fault(
            "queries of one head are taken for all of a group",
            "head = kv_head * GROUP + n // tiles\n        row = key + n % tiles * HALF\n        slot",
            "head = kv_head * GROUP\n        row = key + n % tiles * HALF\n        slot",
            by="two sequences",
        ),
        Fault(
            "dq of a second head is added to the first one's",
            "head = kv_head * GROUP + n // tiles\n        row = key + n % tiles * HALF\n    b_dq",
            "head = kv_head * GROUP\n        row = key + n % tiles * HALF\n    b_dq",
            by="two sequences",
        ),
        Fault(
            "the second sequence uses the first one's plan", "p_end += batch * T", "p_end += batch", by="two sequences"
        ),
        Fault(
            "rows of another head",
            "[batch * HEADS + head, row], q_full",
            "[batch * HEADS, row], q_full",
            by="two sequences",
        ),
        Fault(
            "the second sequence writes over the first",
            "first = batch.to(gl.int64) * T",
            "first = 0 * T",
            by="two sequences",
        ),
        Fault(
            "rows past the end are written",
            "first_key + o_row < T, 1)",
            "first_key + o_row < T + 1, 1)",
            by="one document",
        ),
        Fault("the last head's order is not the plan's", "gl.load(p_order + tile), tile)", "gl.load(p_order), tile)"),
        Fault(
            "keys of any strides go to the copy engine",
            "in walked(q, k, v, do))",
            "in (q, k, v, do))",
            by="tiny: offset",
        ),
        Fault("half of the keys' bytes are waited for", "KEY_BYTES=4 * HALF", "KEY_BYTES=2 * HALF", by="any order"),
        Fault(
            "two passes: the order is not the plan's",
            "gl.load(p_order + gl.program_id(0) // KV_HEADS)",
            "gl.load(p_order)",
            by="two passes: one",
        ),
        Fault(
            "two passes: dq's order is not the plan's",
            "gl.load(p_order + gl.program_id(0) // HEADS)",
            "gl.load(p_order)",
            by="two passes: one",
        ),
        Fault(
            "queries' strides go to the copy engine",
            "in walked(q, k, v, do, o))",
            "in (q, k, v, do, o))",
            by="two passes: tiny: offset",
        ),
        Fault("a query sees one token into the future", "(b_j <= gl.ex", "(b_j <= 1 + gl.ex", by="two passes: one doc"),
        Fault("the oldest key of each query is lost", "(b_j >= gl.ex", "(b_j > gl.ex", by="two passes: doc"),
        Fault("queries' diagonal is not masked", "(key == first_row) | (key <", "(key <", by="two passes: one doc"),
        Fault("queries' oldest keys are not masked", " | (key < oldest_of_all)", "", by="two passes: doc"),
        Fault(
            "queries' edge by the first of them",
            "gl.load(p_first + min(first_row + HALF, T) - 1)",
            "gl.load(p_first + min(first_row, T - 1))",
            by="two passes: doc",
        ),
        Fault("the oldest tile of keys is left out", "+ HALF - 1) // HALF + 2", ") // HALF + 2", by="two passes: doc"),
        Fault("a group leaves its oldest tile out", "(key + HALF > oldest)", "(key > oldest)", by="two passes: doc"),
        Fault("a group leaves the diagonal out", "if (key <= first_row)", "if (key < first_row)", by="two passes: one"),
        Fault("both groups take the same queries", "b_q = q_smem.index(WHO)", "b_q = q_smem.index(0)", by="two passes"),
        Fault(
            "both groups take one gradient at o",
            "b_do = do_smem.index(WHO)",
            "b_do = do_smem.index(0)",
            by="two passes",
        ),
        Fault("both groups take the same o", "o_smem.index(WHO)", "o_smem.index(0)", by="two passes"),
        Fault("queries' delta is left out", "(b_dp - gl.expand_dims(b_delta, 1))", "b_dp", by="two passes"),
        Fault("dq lacks the logit scale", "(b_dq * scale).to", "b_dq.to", by="two passes"),
        Fault("dq at the projection lacks the logit scale", "b_dq * scale, p_rms", "b_dq, p_rms", by="two passes: a"),
        Fault("dq's norms are those of the first head", "p_rms += of_head * T", "p_rms += 0 * T", by="two passes: a"),
        Fault("rows past the end weigh something", 'other=float("inf"))', "other=0.0)", by="every small"),
        Fault(
            "deltas lie where the logarithms are",
            "(gl.num_programs(0).to(gl.int64) * (2 * HALF) + of_head * rows)",
            "of_head * rows",
            by="two passes",
        ),
        Fault(
            "deltas of the second sequence lie in the first one's place",
            "* (2 * HALF) + of_head * rows)",
            "* (2 * HALF) + head * rows)",
            by="two passes: two",
        ),
        Fault(
            "queries read the wrong key head",
            "head // (HEADS // KV_HEADS), row",
            "head % KV_HEADS, row",
            by="two passes: two",
        ),
        Fault(
            "queries' second sequence has the first one's plan",
            "p_first += batch * T",
            "p_first += batch",
            by="two passes: two",
        ),
        Fault(
            "queries: the loader does not wait for a free buffer",
            "& 1 ^ 1\n        mbarrier.wait(kv_free",
            "& 1\n        mbarrier.wait(kv_free",
            by="two passes",
        ),
        Fault(
            "queries: keys are read before they are there",
            "        mbarrier.wait(k_full.index(slot), phase)\n",
            "",
            by="any order",
        ),
        Fault(
            "queries: values are read before they are there",
            "            mbarrier.wait(v_full.index(slot), phase)\n            b_v",
            "            b_v",
            by="any order",
        ),
        Fault("queries are multiplied before they are there", "    mbarrier.wait(q_full, 0)\n", "", by="any order"),
        Fault(
            "queries: keys are never given back",
            "        mbarrier.arrive(kv_free.index(slot), count=1)\n",
            "",
            by="two passes",
        ),
        Fault(
            "queries: keys are free when one group has read them",
            "kv_free.index(i), count=2)",
            "kv_free.index(i), count=1)",
            by="two passes",
        ),
        Fault(
            "a third of the queries' bytes are waited for", "QUERY_BYTES=3 * TILE", "QUERY_BYTES=TILE", by="any order"
        ),
    ),
)
