"""Proof cases of the attention layer as one operator (kernels/attention_layer.py): its own kernel, and how attention's
backward kernels go on through norm, rotary and mix."""

import torch
import torch.nn.functional as F

from kernels.proof import Demand, Family, Fault, Launch, Numeric
from kernels.proof.families import attention
from kernels.proof.operators import LAYOUTS

SCALE = 0.12
LEAVES = ("x", "w", "ve", "s")


def _inputs(B, T, H, K, width, D, starts, with_ve=True, **window):
    def make(random):
        from kernels.attention import attention_plan

        tokens = torch.ones(B, T, dtype=torch.int32)
        tokens[:, list(starts)] = 0
        angle = torch.arange(T)[:, None] * torch.linspace(0, 1, width // 2)
        return {
            "x": torch.randn(B, T, D, generator=random),
            "w": torch.randn((H + 2 * K) * width, D, generator=random) * D**-0.5,
            "ve": torch.randn(B, T, K, width, generator=random) if with_ve else None,
            "s": torch.randn(2, generator=random),
            "cos": angle.cos(),
            "sin": angle.sin(),
            "do": torch.randn(B, T, H, width, generator=random),
            "dx": torch.randn(B, T, D, generator=random),
            "plan": attention_plan(tokens, eos_id=0, **window),
        }

    return make


def _kernel(module, given):
    x, w, ve, s, cos, sin, do, dx, plan = given.values()
    heads, width = do.shape[2:]
    saved = module.launch_layer(x, w, ve, s, cos, sin, plan, heads, width, SCALE)
    grads = module.launch_layer_backward(do, x, w, ve, s, cos, sin, saved, plan, SCALE, dx)
    return {"o": saved[0], **{f"d{n}": g for n, g in zip(LEAVES, grads) if g is not None}}


def _kernel_of_strided_factors(module, given):
    """The same with the saved factors of the norms apart in memory, which the backward launcher makes dense."""
    x, w, ve, s, cos, sin, do, dx, plan = given.values()
    heads, width = do.shape[2:]
    o, lse, qkv, *factors, v = module.launch_layer(x, w, ve, s, cos, sin, plan, heads, width, SCALE)
    saved = (o, lse, qkv, *(LAYOUTS["strided"](r) for r in factors), v)
    grads = module.launch_layer_backward(do, x, w, ve, s, cos, sin, saved, plan, SCALE, dx)
    return {"o": o, **{f"d{n}": g for n, g in zip(LEAVES, grads) if g is not None}}


def _reference(module, given):
    from kernels.attention import attention_reference
    from kernels.attention_inputs import attention_inputs_reference

    leaves = {n: given[n].detach().requires_grad_() for n in LEAVES if given[n] is not None}
    heads, width = given["do"].shape[2:]
    qkv = F.linear(leaves["x"], leaves["w"]).unflatten(2, (-1, width))
    q, k, v = module._slices(qkv, heads)
    q, k, v = attention_inputs_reference(q, k, v, leaves.get("ve"), leaves["s"], given["cos"], given["sin"])
    o = attention_reference(q, k, v, given["plan"], scale=SCALE)
    grads = torch.autograd.grad((o, leaves["x"] * 1), list(leaves.values()), (given["do"], given["dx"]))
    return {"o": o, **{f"d{n}": g for n, g in zip(leaves, grads)}}


def _numeric(name, *shape, quick=True, kernel=_kernel, hostile=False, **options):
    given = _inputs(*shape, **options)
    more = dict(keep_float32=("s", "cos", "sin"), quick=quick, least_scale=1.0, hostile=hostile)
    return Numeric(name, given, kernel, _reference, **more)


def _launch(dtype, T=65536, H=8, K=8, width=128, with_ve=True):
    def run():
        import kernels.attention_layer as module
        from kernels.attention import AttentionPlan

        def meta(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        row, order = meta(1, T, dtype=torch.int32), meta(-(-T // 128), dtype=torch.int32)
        plan, D = AttentionPlan(row, row, order, order), H * width
        x, w = meta(1, T, D), meta((H + 2 * K) * width, D)
        ve = meta(1, T, K, width) if with_ve else None
        tables = [meta(*shape, dtype=torch.float32) for shape in ((2,), (T, width // 2), (T, width // 2))]
        saved = module.launch_layer(x, w, ve, *tables, plan, H, width, SCALE)
        module.launch_layer_backward(meta(1, T, H, width), x, w, ve, *tables, saved, plan, SCALE)

    return run


FAMILY = Family(
    name="attention_layer",
    module="kernels.attention_layer",
    kernels=("_prepare", "_attention_forward", "_attention_dq", "_attention_dkdv"),
    numeric=(
        _numeric("documents inside a window, ragged end", 1, 150, 2, 2, 16, 24, (0, 3, 70, 128), window_blocks=1),
        _numeric("two sequences, four heads on two, no value embedding", 2, 37, 4, 2, 32, 20, (5,), with_ve=False),
        _numeric("width 128, fewer tokens than a tile", 1, 3, 2, 1, 128, 16, (), quick=False),
        _numeric("tiny", 2, 5, 2, 1, 16, 8, (3,), kernel=_kernel_of_strided_factors, quick=False, hostile=True),
    ),
    launches=(
        Launch("bf16, 8 heads of 128", _launch(torch.bfloat16), quick=True),
        Launch("bf16, no value embedding", _launch(torch.bfloat16, with_ve=False)),
        Launch("bf16, 8 heads of 64 on 2", _launch(torch.bfloat16, T=5000, K=2, width=64)),
        Launch("float32, 4 heads of 32", _launch(torch.float32, T=1000, H=4, K=4, width=32), demanding=False),
    ),
    demands={
        "_prepare": Demand(wide=("p_qkv", "p_ve", "p_v", "p_rms_q", "p_rms_k")),
        **{kernel: attention.FAMILY.demands[kernel] for kernel in attention.FAMILY.kernels},
    },
    faults=(
        Fault(
            "the factors of queries' norms are taken for dense",
            "LayerInputs(dense(rms_q)",
            "LayerInputs(rms_q",
            by="tiny",
        ),
        Fault("the factors of keys' norms are taken for dense", "dense(rms_k), raw", "rms_k, raw", by="tiny"),
        Fault("the value embedding is taken for dense", "        ve = dense(ve)\n", "", by="transposed"),
        Fault("the input is taken for dense", "(dense(x_BTD).view(B * T, D)", "(x_BTD.view(B * T, D)", by="transposed"),
        Fault("the gradient that the input has from elsewhere is lost", "if dx_BTD is None", "if True"),
        Fault("a token past the end is touched", "o_token < tokens", "o_token < tokens + 1"),
        Fault("every sequence but the first has wrong angles", "(o_token % T)[:, None]", "o_token[:, None]"),
        Fault(
            "rotation the wrong way round",
            "b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin",
            "b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin",
        ),
        Fault("the second half is read from the first", "tl.load(p + R,", "tl.load(p,"),
        Fault("keys stay as they are", "range(0, HEADS + KV_HEADS)", "range(0, HEADS)"),
        Fault("values are not normed", "(_inverse_rms(b_1, b_2, R) * s_0)[:, None]", "s_0"),
        Fault("the value embedding is not mixed in", "b_1 + s_1 * b_e1, b_2 + s_1 * b_e2", "b_1, b_2"),
        Fault("keys' factors of norms lie where queries' do", "+ h - HEADS) * T", "+ h) * T"),
        Fault("the second sequence's factors overwrite the first one's", "o_wide // T * HEADS", "0 * HEADS"),
        Fault("the mixed values are not made again", "v, _, _ = launch_prepare", "_, _, v = _slices(qkv, heads)  #"),
        Fault("the mixed values are not kept", "v.new_empty(0) if ve is None else v", "_slices(qkv_BTEDh, heads)[2]"),
        Fault("the mean is over half a head", "/ (2 * R)", "/ R"),
    ),
)
