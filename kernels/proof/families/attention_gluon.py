"""Proof cases of attention's forward kernel in Gluon (kernels/attention_gluon.py), which run in gluon_model.py."""

import itertools

import torch

from kernels.guards import dense
from kernels.proof import Demand, Family, Fault, Launch, Numeric, gluon_model
from kernels.runtime import LOG2_E

SCALE = 0.12


def _inputs(T, H, K, width, starts, B=1, **window):
    """Random q, k and v with a plan; `starts` are the documents' first tokens, a list each if there are sequences."""

    def make(random):
        from kernels.attention import attention_plan

        tokens = torch.ones(B, T, dtype=torch.int32)
        for b, where in enumerate(starts if B > 1 else [starts]):
            tokens[b, list(where)] = 0
        drawn = {n: torch.randn(B, T, heads, width, generator=random) for n, heads in (("q", H), ("k", K), ("v", K))}
        return {**drawn, "plan": attention_plan(tokens, eos_id=0, **window)}

    return make


def _forward(module, q, k, v, first, order, seed=0):
    """The module's launcher: on a device itself, on a CPU in the model, whose order of events follows from `seed`."""
    if q.device.type == "cpu":
        module = gluon_model.modelled(module)
        gluon_model.seeded(seed)
    return module.launch_forward(q, k, v, first, order, SCALE)


def _kernel(module, given):
    q, k, v, plan = (given[n] for n in ("q", "k", "v", "plan"))
    return dict(zip(("o", "lse"), _forward(module, q, k, v, dense(plan.first_key_BT), dense(plan.query_order_N))))


def _reference(module, given):
    from kernels.attention import allowed_pairs, attention_reference

    q, k, v, plan = (given[n] for n in ("q", "k", "v", "plan"))
    k_each = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    score = torch.einsum("bihd,bjhd->bhij", q, k_each).to(torch.promote_types(q.dtype, torch.float32)) * SCALE
    lse = score.masked_fill(~allowed_pairs(plan)[:, None], float("-inf")).logsumexp(-1) * LOG2_E
    return {"o": attention_reference(q, k, v, plan, scale=SCALE), "lse": lse}


def _numeric(name, *shape, quick=True, hostile=False, **window):
    return Numeric(name, _inputs(*shape, **window), _kernel, _reference, quick=quick, hostile=hostile)


def _drawn(device, *shape, **window):
    given = _inputs(*shape, **window)(torch.Generator().manual_seed(0))
    plan = given["plan"]
    tensors = given["q"], given["k"], given["v"], plan.first_key_BT, plan.query_order_N
    return [x.bfloat16().to(device) if x.is_floating_point() else x.to(device) for x in tensors]


def _any_order_of_events(module, device):
    """Whatever order partitions and copies run in, the result is the same to the bit, and nobody waits for ever."""
    given = _drawn(device, 900, 1, 1, 64, (720, 850))
    found = [_forward(module, *given, seed=seed) for seed in range(6)]
    for again in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], again)), "the result depends on the order of events"


def _every_small_plan(module, device):
    """Every rising table of first keys of up to six tokens, with tiles of four tokens in place of 128."""
    from kernels.attention import AttentionPlan, attention_reference

    if device != "cpu":
        return  # tiles of that size are the model's
    module = gluon_model.modelled(module)
    module.HALF, module.TILE = 2, 4
    random = torch.Generator().manual_seed(0)
    for T in (1, 3, 5, 6):
        q, k, v = (torch.randn(1, T, 1, 64, generator=random) for _ in range(3))
        order = torch.arange(-(-T // 4), dtype=torch.int32)
        for first in itertools.product(*(range(i + 1) for i in range(T))):
            if list(first) == sorted(first):
                plan = AttentionPlan(torch.tensor([first], dtype=torch.int32), *[order] * 3)
                o, _ = module.launch_forward(q, k, v, plan.first_key_BT, order, SCALE)
                right = attention_reference(q, k, v, plan, scale=SCALE)
                assert torch.allclose(o, right, atol=1e-5), f"first keys {first}"


def _logits_of_minus_infinity(module, device):
    """A row whose own logit is -inf, so that its first tile holds no other, has its weights on its other keys."""
    q, k, v, first, order = _drawn(device, 330, 1, 1, 64, ())
    q[:], v[:], k[:] = 1, 1, 0
    k[:, 128:] = -torch.inf
    k[:, :5] = -torch.inf
    o, _ = _forward(module, q, k, v, first, order)
    assert torch.equal(o[:, 5:], v[:, 5:]), "logits of -inf spoil a row"
    assert o[:, :5].isnan().all(), "a row without weights is NaN, as in the definition"


def _large_logits(module, device):
    """Logits of hundreds, exactly: a running maximum in another scale than theirs leaves no weight at all."""
    from kernels.attention import AttentionPlan, attention_reference

    q, k, v, first, order = _drawn(device, 330, 1, 1, 64, (200,))
    o, _ = _forward(module, 64 * q, k, v, first, order)
    plan = AttentionPlan(first, first, order, order)
    right = attention_reference(64 * q.double(), k.double(), v.double(), plan, scale=SCALE)
    assert (o.double() - right).square().mean() <= 1e-4 * right.square().mean(), "large logits lose their weights"


def _launch(K=8, width=128, apart=False, dtype=torch.bfloat16):
    """The forward launch of a training step; `apart`: slices of a merged projection."""

    def run():
        import kernels.attention_gluon as module

        T, H = 65536, 8
        q, k, v = torch.empty(1, T, H + 2 * K, width, dtype=dtype, device="meta").split((H, K, K), dim=2)
        if not apart:
            q, k, v = (x.contiguous() for x in (q, k, v))
        first, order = (torch.empty(*s, dtype=torch.int32, device="meta") for s in ((1, T), (T // 128,)))
        module.launch_forward(q, k, v, first, order, SCALE)

    return run


FAMILY = Family(
    name="attention_gluon",
    module="kernels.attention_gluon",
    kernels=("_attention_forward_gluon",),
    numeric=(
        _numeric("documents inside a window, ragged end", 300, 2, 1, 64, (0, 3, 4, 70, 140, 299), window_blocks=2),
        _numeric("full tiles in turns, one document", 700, 1, 1, 64, ()),
        _numeric("full tiles before one where a document begins", 520, 1, 1, 64, (50,)),
        _numeric("two sequences, four heads on two", 270, 4, 2, 64, ((), (1, 2, 129)), B=2, window_tokens=140),
        _numeric("tiny", 18, 2, 1, 64, (3,), quick=False, hostile=True, window_tokens=9),
        _numeric("width 128, window of three blocks", 900, 2, 1, 128, (0, 257), quick=False, window_blocks=3),
        _numeric("one token", 1, 1, 1, 64, (0,), quick=False),
    ),
    checks=(
        ("any order of events", _any_order_of_events),
        ("every small plan", _every_small_plan),
        ("logits of minus infinity", _logits_of_minus_infinity),
        ("large logits", _large_logits),
    ),
    launches=(
        Launch("bf16, 8 heads of 128", _launch(), devices=("sm_90",), quick=True),
        Launch("bf16, 8 heads of 128, merged", _launch(apart=True), devices=("sm_90",)),
        Launch("bf16, 8 heads of 64 on 2", _launch(K=2, width=64), devices=("sm_90",)),
        Launch("fp16, 8 heads of 128 on 4", _launch(K=4, dtype=torch.float16), devices=("sm_90",)),
    ),
    demands={
        # the second half of a tile: 64 rows of 128 bytes behind the first, as the copy engine has laid them
        "_attention_forward_gluon": Demand(
            instructions=("HGMMA", "UTMALDG"),
            wide=("p_o", "p_lse"),
            shows=(("setmaxnreg", ""), (r"mbarrier\.try_wait", ""), (", 8192;", "")),
        )
    },
    faults=(
        Fault("tiles are full one too early", "max(row - key, 0) // TILE", "(max(row - key, 0) + TILE - 1) // TILE"),
        Fault("tiles go the other way", "row - (t + 1) * TILE, row)", "row - (tiles - t) * TILE, row)"),
        Fault("the oldest tile is left out", "- (TILE - 1), row, TILE)", "- 0, row, TILE)"),
        Fault("halves on the diagonal are left out", "(key <= first_row)", "(key < first_row)"),
        Fault("the oldest half is left out", "(key + HALF > oldest)", "(key > oldest)"),
        Fault("queries see one token into the future", "m_seen = b_j <= gl", "m_seen = b_j <= 1 + gl"),
        Fault("the oldest key of each query is lost", "(b_j >= gl", "(b_j > gl"),
        Fault("both groups take the same queries", "b_q = q_smem.index(WHO)", "b_q = q_smem.index(0)"),
        Fault("the loader does not wait for a free buffer", "& 1 ^ 1", "& 1"),
        Fault(
            "the loader takes a buffer that is still read",
            "        mbarrier.wait(k_free.index(slot), before)\n",
            "",
            by="any order",
        ),
        Fault(
            "keys are read before they are there",
            "            mbarrier.wait(k_full.index(slot), (t // STAGES) & 1)\n",
            "",
        ),
        Fault(
            "values are read before they are there",
            "            mbarrier.wait(v_full.index(before), ((t - 1) // STAGES) & 1)\n",
            "",
            by="any order",
        ),
        Fault(
            "values are given back before they are read",
            "            b_acc = warpgroup_mma_wait(0, deps=[o_going])\n"
            "            mbarrier.arrive(v_free.index(before), count=1)\n",
            "            mbarrier.arrive(v_free.index(before), count=1)\n"
            "            b_acc = warpgroup_mma_wait(0, deps=[o_going])\n",
            by="any order",
        ),
        Fault("logits are used while they are multiplied", "warpgroup_mma_wait(1, deps", "warpgroup_mma_wait(2, deps"),
        Fault("keys are never given back", "            mbarrier.arrive(k_free.index(slot), count=1)\n", ""),
        Fault("a buffer is free when one group has read it", "k_free.index(i), count=2)", "k_free.index(i), count=1)"),
        Fault("turns are never passed on", "turns.index(1 - WHO), count=1", "turns.index(WHO), count=1"),
        Fault("the groups count their turns apart", "(t & 1) ^ WHO, pred=t < common", "(t & 1) ^ WHO, pred=t < full"),
        Fault("the running maximum is not carried", "gl.exp2(b_max - b_new)", "gl.exp2(b_max * 0)"),
        Fault(
            "what was summed keeps its old scale",
            "            b_acc = b_acc * gl.expand_dims",
            "            gl.expand_dims",
        ),
        Fault("a maximum begins at minus infinity", "LEAST=torch.finfo(torch.float32).min", "LEAST=float('-inf')"),
        Fault("rows past the end are written", "first_row + o_row < T, 1)", "first_row + o_row < T + 1, 1)"),
        Fault(
            "the logarithm is stored in base e", "b_max + gl.log2(b_sum)", "b_max + gl.log2(b_sum) / 1.4426950408889634"
        ),
        Fault("the second sequence uses the first one's plan", "p_first += batch * T", "p_first += batch"),
        Fault("query heads read the wrong key head", "head // (HEADS // KV_HEADS)", "head % KV_HEADS"),
        Fault("the second sequence writes over the first", "p_o += ((batch.to(gl.int64) * T", "p_o += ((0 * T"),
        Fault("half of a tile's bytes are waited for", "BYTES=TILE * width", "BYTES=HALF * width"),
        Fault(
            "the schedule is the tokens' order",
            "chunk = gl.load(p_order + gl.program_id(0) // HEADS)",
            "chunk = gl.load(p_order)",
        ),
    ),
)
