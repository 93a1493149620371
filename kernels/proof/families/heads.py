"""Proof cases of what techniques put around attention: the inputs' and the outputs' kernels (kernels/heads.py)."""

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric
from kernels.runtime import triton

INPUTS = ("qkv", "ve", "factor", "more", "s")
OUTPUTS = ("o", "own", "alpha", "gate")
KEPT = ("s", "cos", "sin", "query_factor", "alpha")


def _inputs(B, T, H, width, narrow=0, *, add=(), own=True, value_norm=False, offset=False, paired=False):
    """add: what there is of "ve", "factor", "more", "s", "query_factor". Factors are a slice of what all layers have,
    angles columns of wider tables, as in the model."""

    def make(random):
        def draw(*shape):
            return torch.randn(*shape, generator=random)

        pair, of_queries, D = 1 + paired, narrow or width, H * width
        angle = torch.arange(pair * T)[:, None] * torch.linspace(0.3, 1, of_queries // 2)
        wide = torch.cat([angle + 1, angle], 1)
        cos, sin = (table[:, of_queries // 2 :] for table in (wide.cos(), wide.sin()))
        grads = [draw(B, pair * T, H // pair, w) for w in (of_queries, of_queries, width)]
        drawn = {
            "qkv": draw(B, T, 2 * H * of_queries + D),
            "ve": draw(B, T, D),
            "factor": draw(B, T, 3 * H)[..., H : 2 * H],
            "more": draw(B, T, D),
            "s": draw(2),
            "query_factor": torch.tensor(1.3),
        }
        return {
            **{n: x if n == "qkv" or n in add else None for n, x in drawn.items()},
            **{"cos": cos, "sin": sin, "grads": grads, "gown": draw(B, T, H, width) if own else None},
            **{"how": (H, width, value_norm, offset, paired)},
        }

    return make


def _run_inputs(module, given):
    beside = [given[n] for n in ("cos", "sin", "query_factor")]
    qkv, ve, factor, more, s = (given[n] for n in INPUTS)
    out = module.launch_head_inputs(qkv, ve, factor, more, s, *beside, *given["how"])
    grads = [*given["grads"], given["gown"]]
    found = list(
        module.launch_head_inputs_backward(grads, qkv, ve, factor, s, *beside, *given["how"], more is not None)
    )
    if more is not None and found[3] is None:
        found[3] = given["grads"][2].flatten(2)
    return dict(zip("qkv", out)) | {f"d{n}": x for n, x in zip(INPUTS, found) if x is not None}


def _inputs_reference(module, given):
    leaves = {n: given[n].detach().requires_grad_() for n in INPUTS if given[n] is not None}
    rotary, beside = (given["cos"], given["sin"]), [leaves.get(n) for n in INPUTS[1:]]
    q, k, v, own = module.head_inputs_reference(leaves["qkv"], rotary, *beside, given["query_factor"], *given["how"])
    ends, grads = [q, k, v], list(given["grads"])
    if given["gown"] is not None:
        ends, grads = [*ends, own], [*grads, given["gown"]]
    found = torch.autograd.grad(ends, list(leaves.values()), grads)
    return {"q": q, "k": k, "v": v, **{f"d{n}": x for n, x in zip(leaves, found)}}


def _outputs(B, T, H, width, *, alpha="", gate=False, paired=False, small=1.0):
    """alpha: "head", "token" or ''; small: factor on half of the tokens' values."""

    def make(random):
        def draw(*shape):
            return torch.randn(*shape, generator=random)

        pair = 1 + paired
        own = draw(B, T, H, width)
        own[:, ::2] *= small
        return {
            "o": draw(B, pair * T, H // pair, width),
            "own": own if alpha else None,
            "alpha": {"head": draw(H), "token": draw(B, T, 3 * H)[..., :H]}.get(alpha),
            "gate": draw(B, T, 3 * H)[..., H : 2 * H] if gate else None,
            "g": draw(B, T, H * width),
            "paired": paired,
        }

    return make


def _run_outputs(module, given):
    args = [given[n] for n in OUTPUTS]
    found = module.launch_head_outputs_backward(given["g"], *args, given["paired"])
    grads = {f"d{n}": x for n, x in zip(OUTPUTS, found) if x is not None}
    y, most = module.launch_head_outputs(*args, given["paired"], True)
    plain, nothing = module.launch_head_outputs(*args, given["paired"], False)
    assert torch.equal(y.nan_to_num(), plain.nan_to_num()) and len(nothing) == 0
    return {"y": y, "largest": most.amax(), **grads}


def _outputs_reference(module, given):
    leaves = {n: given[n].detach().requires_grad_() for n in OUTPUTS if given[n] is not None}
    y = module.head_outputs_reference(*(leaves.get(n) for n in OUTPUTS), given["paired"])
    found = torch.autograd.grad(y, list(leaves.values()), given["g"])
    largest = y.detach().nan_to_num(0, 0, 0).abs().amax()
    largest = largest.to(torch.promote_types(y.dtype, torch.float32))
    return {"y": y, "largest": largest, **{f"d{n}": x for n, x in zip(leaves, found)}}


def _what_is_not_finite_is_not_the_largest(module, device):
    o = torch.zeros(1, 3, 2, 16)
    o[0, 0, 0, 3], o[0, 1, 1, 15], o[0, 2, 0, 2], o[0, 2, 1, 7] = torch.nan, torch.inf, -5.0, 4.0
    y, most = module.launch_head_outputs(o.to(device), None, None, None, False, True)
    assert most.amax() == 5 and y.isnan().sum() == y.isinf().sum() == 1


def _numeric(name, made, *, quick=True, hostile=False, **more):
    run = (_run_inputs, _inputs_reference) if name.startswith("inputs") else (_run_outputs, _outputs_reference)
    return Numeric(name, made, *run, keep_float32=KEPT, quick=quick, hostile=hostile, **more)


def _launch(dtype, T=65536, H=8, width=128, narrow=0, add=("ve", "factor", "query_factor"), alpha="token", **options):
    """A layer's inputs and outputs; options: as of `_inputs`, and "dense": factors and gates are tensors of their own,
    no columns of a network's output; "of_factor": so is the factor, of that dtype; "measured": the largest output is
    noted, as products in 8 bits ask for."""

    def run():
        import kernels.heads as module

        def meta(*shape, dtype=dtype):
            return torch.empty(shape, dtype=dtype, device="meta")

        own, paired = options.get("own", True), options.get("paired", False)
        pair, R, D = 1 + paired, (narrow or width) // 2, H * width
        how = H, width, options.get("value_norm", False), options.get("offset", False), paired
        tables = [meta(pair * T, 2 * R, dtype=torch.float32)[:, :R] for _ in range(2)]
        beside = *tables, meta(dtype=torch.float32) if "query_factor" in add else None
        qkv, dense = meta(1, T, 4 * H * R + D), options.get("dense", False)
        gates = [meta(1, T, H) if dense else meta(1, T, 4 * H, dtype=torch.float32)[..., H : 2 * H] for _ in range(2)]
        all_of_it = dict(
            ve=meta(1, T, D),
            factor=gates[0].to(options.get("of_factor", gates[0].dtype)),
            more=meta(1, T, D),
            s=meta(2, dtype=torch.float32),
        )
        ve, factor, more, s = (x if n in add else None for n, x in all_of_it.items())
        module.launch_head_inputs(qkv, ve, factor, more, s, *beside, *how)
        grads = [meta(1, pair * T, H // pair, w) for w in (2 * R, 2 * R, width)] + [
            meta(1, T, H, width) if own else None
        ]
        module.launch_head_inputs_backward(grads, qkv, ve, factor, s, *beside, *how, more is not None)
        alphas = {"token": gates[0], "head": meta(H, dtype=torch.float32), "": None}[alpha]
        given = grads[2], grads[3] if alpha else None, alphas, gates[1], paired
        module.launch_head_outputs(*given, options.get("measured", "query_factor" in add))
        module.launch_head_outputs_backward(meta(1, T, D), *given)

    return run


def _faults(by, *changes):
    """Faults that the check `by` is put to first. changes: (what is wrong, text of the source, what it becomes)."""
    return tuple(Fault(*change, by=by) for change in changes)


FAMILY = Family(
    name="heads",
    module="kernels.heads",
    kernels=("_head_inputs", "_head_inputs_backward", "_head_outputs", "_head_outputs_backward"),
    numeric=(
        _numeric(
            "inputs, keys offset, everything added",
            _inputs(2, 21, 2, 16, add=("ve", "factor", "more", "query_factor"), offset=True),
        ),
        _numeric(
            "inputs, paired heads", _inputs(1, 19, 4, 32, add=("ve", "factor", "query_factor"), own=False, paired=True)
        ),
        _numeric(
            "inputs, narrow queries, values normed",
            _inputs(2, 9, 2, 32, 8, add=("ve", "s"), own=False, value_norm=True),
        ),
        _numeric("inputs, values as they are, offset", _inputs(3, 1, 1, 32, 16, add=("more",), own=False, offset=True)),
        _numeric("inputs, an embedding alone, width 128", _inputs(1, 5, 2, 128, add=("ve",)), quick=False),
        _numeric("inputs, width 64, scaled", _inputs(1, 17, 2, 64, add=("s", "ve", "factor")), quick=False),
        _numeric(
            "inputs, tiny",
            _inputs(2, 3, 2, 16, add=("ve", "factor", "more", "s", "query_factor"), value_norm=True, offset=True),
            quick=False,
            hostile=True,
        ),
        _numeric("outputs, alpha and gate by the token", _outputs(2, 21, 2, 16, alpha="token", gate=True)),
        _numeric("outputs, alpha by the head", _outputs(1, 37, 3, 32, alpha="head")),
        _numeric("outputs, gates of paired heads", _outputs(1, 19, 4, 16, gate=True, paired=True)),
        _numeric("outputs, paired heads", _outputs(2, 5, 2, 64, paired=True), quick=False),
        _numeric(
            "outputs, values of nearly nothing",
            _outputs(1, 5, 2, 16, alpha="head", small=1e-9),
            dtypes=(torch.float32, torch.bfloat16),
        ),
        _numeric("outputs, tiny", _outputs(2, 3, 2, 16, alpha="token", gate=True), quick=False, hostile=True),
        _numeric("outputs, one alpha, tiny", _outputs(2, 3, 2, 16, alpha="head"), quick=False, hostile=True),
    ),
    launches=(
        Launch("bf16, 8 heads of 128", _launch(torch.bfloat16), quick=True),
        Launch("bf16, keys offset, no embedding", _launch(torch.bfloat16, add=("query_factor",), offset=True)),
        Launch("bf16, keys offset, everything", _launch(torch.bfloat16, add=("ve", "factor", "more"), offset=True)),
        Launch("bf16, paired heads", _launch(torch.bfloat16, alpha="", own=False, paired=True)),
        Launch("bf16, record 18", _launch(torch.bfloat16, add=("ve", "factor"), alpha="", own=False)),
        Launch("bf16, frontier, no embedding", _launch(torch.bfloat16, add=("query_factor",))),
        Launch("bf16, frontier, gated embedding", _launch(torch.bfloat16, of_factor=torch.bfloat16)),
        Launch(
            "bf16, frontier, keys offset, gated embedding",
            _launch(torch.bfloat16, of_factor=torch.bfloat16, offset=True),
        ),
        Launch(
            "bf16, frontier, the last layer",
            _launch(torch.bfloat16, add=("ve", "factor", "more", "query_factor"), offset=True),
        ),
        Launch(
            "bf16, frontier, paired heads",
            _launch(torch.bfloat16, add=("query_factor",), alpha="", own=False, paired=True),
        ),
        Launch(
            "bf16, frontier, paired heads, gated embedding, validated",
            _launch(torch.bfloat16, alpha="", own=False, paired=True, of_factor=torch.bfloat16, measured=False),
        ),
        Launch(
            "bf16, f3, no embedding",
            _launch(torch.bfloat16, add=("query_factor",), alpha="", own=False, dense=True, measured=False),
        ),
        Launch("bf16, f3, gated embedding", _launch(torch.bfloat16, alpha="", own=False, dense=True, measured=False)),
        Launch(
            "bf16, f3, keys offset, gated embedding",
            _launch(torch.bfloat16, alpha="", own=False, dense=True, offset=True, measured=False),
        ),
        Launch(
            "bf16, f3, the last layer",
            _launch(torch.bfloat16, add=("ve", "factor", "more", "query_factor"), alpha="", own=False, offset=True),
        ),
        Launch(
            "bf16, one block of frontier",
            _launch(torch.bfloat16, add=("query_factor",), alpha="", own=False, offset=True, dense=True),
        ),
        Launch(
            "bf16, one block of frontier, validated",
            _launch(
                torch.bfloat16, add=("query_factor",), alpha="", own=False, offset=True, dense=True, measured=False
            ),
        ),
        Launch(
            "bf16, narrow queries, values normed",
            _launch(torch.bfloat16, narrow=64, add=("ve", "s"), alpha="head", value_norm=True),
        ),
        Launch("bf16, 16 heads of 64", _launch(torch.bfloat16, H=16, width=64)),
        Launch("float32, 2 heads of 32", _launch(torch.float32, T=1000, H=2, width=32), demanding=False),
    ),
    demands={
        "_head_inputs": Demand(
            stack_bytes=8 if triton.__version__.startswith("3.7.") else 0,  # for narrow queries
            wide=("p_qkv", "p_ve", "p_factor", "p_more", "p_cos", "p_sin", "p_q", "p_k", "p_v"),
        ),
        "_head_inputs_backward": Demand(
            wide=(
                "p_gq",
                "p_gk",
                "p_gv",
                "p_gown",
                "p_qkv",
                "p_ve",
                "p_factor",
                "p_cos",
                "p_sin",
                "p_dqkv",
                "p_dve",
                "p_dfactor",
                "p_dmore",
            )
        ),
        "_head_outputs": Demand(wide=("p_o", "p_own", "p_gate", "p_out")),
        "_head_outputs_backward": Demand(wide=("p_g", "p_o", "p_own", "p_gate", "p_do", "p_down", "p_dgate")),
    },
    checks=(("what is not finite is not the largest", _what_is_not_finite_is_not_the_largest),),
    faults=(
        *_faults(
            "as they are",
            ("a token past the end is touched", "o_token < tokens", "o_token < tokens + 1"),
            ("every sequence but the first has wrong angles", "o_place = o_token % T", "o_place = o_token"),
            (
                "the first row of a sequence takes the last one's",
                "tl.where(o_place > 0, o_wide - 1, o_wide)",
                "o_wide - 1",
            ),
            ("a sequence's last key gets the next one's gradient", "m_token & (o_place + 1 < T)", "m_token"),
            ("the first key's own gradient is lost", "tl.where(m_first, b_after_1 + b_g1, b_after_1)", "b_after_1"),
            ("keys are the queries", "(HEADS + PAIR * pair + half)", "(PAIR * pair + half)"),
            ("a pair is left out", "range(0, HEADS // PAIR)", "range(0, HEADS // PAIR - 1)"),
            ("values are the keys", "HEADS * 4 * RQ + head", "HEADS * 2 * RQ + head"),
            ("values without what is added", "b_1 + b_more_1, b_2 + b_more_2", "b_1, b_2"),
        ),
        *_faults(
            "gates of paired",
            ("every program has the first tokens", "tl.program_id(0) * ROWS + ", ""),
            ("values of a pair follow each other", "(head % PAIR * (HEADS // PAIR) + head // PAIR)", "head"),
            ("gates are taken for rows of their own", "o_wide * gate_apart", "o_wide * HEADS"),
            ("the gate is not applied", "b_1, b_2 = b_1 * b_gate, b_2 * b_gate", "pass"),
            ("numbers below 0 are not large", "b_x = tl.abs(b_x.to(", "b_x = (b_x.to("),
            ("gradients pass the gate", "b_g1, b_g2 = b_g1 * b_gate[:, None], b_g2 * b_gate[:, None]", "pass"),
            ("gradients of a pair follow each other", "p_do + o_in", "p_do + o_out"),
            ("what attention found lies as it goes out", "p_o + o_in", "p_o + o_out"),
        ),
        *_faults(
            "everything",
            ("the row before is the row itself", "o_wide - 1, o_wide)", "o_wide, o_wide)"),
            ("what turns comes from the row before", "(tl.arange(0, RQ) < RQ // 2)", "(tl.arange(0, RQ) >= RQ // 2)"),
            ("a third of a half is still", "(tl.arange(0, RQ) < RQ // 2)", "(tl.arange(0, RQ) < RQ // 2 + 1)"),
            (
                "what comes from the row before has this one's angles",
                "tl.where(o_place > 0, o_place - 1, 0)",
                "o_place",
            ),
            ("a key's still half stays", "b_2 = tl.where(m_turns, b_2, b_before_2)", "pass"),
            ("the gradient of the row before", "o_out + HEADS * 2 * RQ, m_after", "o_out - HEADS * 2 * RQ, m_after"),
            ("queries without their factor", "b_1, b_2 = b_1 * b_factor, b_2 * b_factor", "pass"),
            ("queries' gradients without their factor", "b_g1, b_g2 = b_g1 * b_factor, b_g2 * b_factor", "pass"),
            ("the embedding without its factor", "b_e1 * b_g, b_e2 * b_g", "b_e1, b_e2"),
            ("every head has the first one's factor", "factor_apart + head, mask", "factor_apart, mask"),
            ("factors are taken for rows of their own", "o_wide * factor_apart", "o_wide * HEADS"),
            ("what own values get from elsewhere is lost", "b_g1 + b_1, b_g2 + b_2", "b_g1, b_g2"),
            (
                "what is added to values gets the gradient times a scalar",
                "p_dmore + o_v, b_g1,",
                "p_dmore + o_v, 2 * b_g1,",
            ),
            ("an embedding's gradient without its factor", "b_g1 * b_g, b_g2 * b_g", "b_g1, b_g2"),
        ),
        *_faults(
            "inputs, paired",
            ("both of a pair have the first one's angles", "PAIR * o_place + half", "PAIR * o_place"),
            ("pairs have angles of single rows", "PAIR * o_place + half", "o_place"),
            ("heads of a pair follow each other", "(half * (HEADS // PAIR) + pair)", "(PAIR * pair + half)"),
            ("the first of a pair is read twice", "(PAIR * pair + half) * 2 * RQ", "(PAIR * pair) * 2 * RQ"),
        ),
        *_faults(
            "narrow",
            (
                "rotation the wrong way round",
                "b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin",
                "b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin",
            ),
            (
                "gradients are rotated onwards",
                "b_g1 * b_cos - b_g2 * b_sin, b_g1 * b_sin + b_g2 * b_cos",
                "b_g1 * b_cos + b_g2 * b_sin, b_g2 * b_cos - b_g1 * b_sin",
            ),
            ("the embedding without its scalar", "b_e1 * s_1, b_e2 * s_1", "b_e1, b_e2"),
            (
                "half of a factor's gradient",
                "b_dot = tl.sum(b_g1 * b_e1, 1) + tl.sum(b_g2 * b_e2, 1)",
                "b_dot = tl.sum(b_g1 * b_e1, 1)",
            ),
            ("an embedding's gradient without its scalar", "b_g1 * s_1, b_g2 * s_1", "b_g1, b_g2"),
            ("the scalar's gradient is of raw values", "b_dot *= _inverse_rms(b_1, b_2, R)", "pass"),
            (
                "values' gradient forgets their norm",
                "b_g1, b_g2 = _norm_gradient(b_g1, b_g2, b_1, b_2, _EPS, R)",
                "pass",
            ),
            ("values' gradient forgets their scalar", "b_g1, b_g2 = b_g1 * s_0, b_g2 * s_0", "pass"),
            ("a scalar's gradient overwrites that of the next program", "p_ds + o_part + 1", "p_ds + o_part + 2"),
            ("half of the scalars' parts are summed", "ds.sum(0)", "ds[::2].sum(0)"),
        ),
        *_faults(
            "nearly nothing",
            ("what is along the own value goes by alpha itself", "(_tanh(b_alpha) * b_along)", "(b_alpha * b_along)"),
            ("tanh of twice alpha", "2 * tl.sigmoid(2 * b_x) - 1", "2 * tl.sigmoid(4 * b_x) - 1"),
            ("every head has the first one's alpha", "alpha_apart + head, mask", "alpha_apart, mask"),
            ("alphas are taken for rows of their own", "o_wide * alpha_apart", "o_wide * HEADS"),
            ("the largest of the last head", "tl.maximum(b_most, tl.maximum(", "(tl.maximum("),
            ("the largest of half a head", "_most(p_out, b_2)", "_most(p_out, b_1)"),
            ("alpha's gradient forgets tanh", "-(1 - b_a * b_a)", "-1"),
            ("own values' gradient forgets their length", "b_1 - b_twice * b_v1", "b_1"),
            (
                "a value of nearly nothing has a length",
                "tl.where(b_square > _LEAST_SQUARE, 2 * b_along, 0.0)",
                "(2 * b_along)",
            ),
            ("the least length is missing", "tl.maximum(b_square, _LEAST_SQUARE)", "b_square"),
            ("what lies along the own value passes", "b_g1 - b_less * b_v1, b_g2 - b_less * b_v2", "b_g1, b_g2"),
        ),
        *_faults("finite", ("a NaN is the largest", 'tl.where(b_x < float("inf"), b_x, 0.0)', "b_x")),
        *_faults(
            "alpha and gate",
            ("a gate's gradient is of what attention found", "b_dot -= b_a * b_along * b_gv", "pass"),
            ("alpha's gradient forgets the gate", "b_gv *= b_gate", "pass"),
        ),
        *_faults("alpha by the head", ("half of an alpha's parts are summed", "dalpha.sum(0)", "dalpha[::2].sum(0)")),
        *_faults(
            "rows apart",
            (
                "factors of sequences are taken for evenly apart",
                "even = B == 1 or x_BTH.stride(0) == T * x_BTH.stride(1)",
                "even = True",
            ),
        ),
        *_faults(
            "strided",
            ("factors of heads are taken for adjacent", "if x_BTH.stride(2) == 1 and even", "if even"),
            ("angles are taken for adjacent", "cos.stride(1) != 1 or ", ""),
            ("one alpha a head is taken for dense", "else dense(alpha)", "else alpha"),
        ),
        *_faults(
            "transposed",
            ("gradients are taken for dense", "None if g is None else dense(g) for g in grads", "g for g in grads"),
            ("the projection is taken for dense", "dense(qkv_BTE)", "qkv_BTE"),
            ("what is added is taken for dense", "n: dense(x) for", "n: x for"),
            ("own values are taken for dense", "own = None if own is None else dense(own)", "pass"),
            ("what attention found is taken for dense", "dense(o)", "o"),
            ("the outputs' gradient is taken for dense", "dense(g_BTD)", "g_BTD"),
        ),
    ),
)
