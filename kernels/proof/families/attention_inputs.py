"""Proof cases of the prologue: norms, rotary and the mix of v (kernels/attention_inputs.py)."""

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric

NAMES = ("q", "k", "v", "ve", "s", "cos", "sin")


def _inputs(B, T, H, K, width, merged=False, with_ve=True):
    def make(random):
        def draw(*shape):
            return torch.randn(*shape, generator=random)

        qkv = draw(B, T, H + 2 * K, width)
        q, k, v = qkv.split((H, K, K), dim=2)  # slices of a merged projection, as in the model
        if not merged:
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        angle = torch.arange(T)[:, None] * torch.linspace(0, 1, width // 2)
        return {
            "q": q,
            "k": k,
            "v": v,
            "ve": draw(B, T, K, width) if with_ve else None,
            "s": draw(2),
            "cos": angle.cos(),
            "sin": angle.sin(),
            "grads": [draw(B, T, heads, width) for heads in (H, K, K)],
        }

    return make


def _kernel(module, given):
    args = [given[n] for n in NAMES]
    out = module.launch_inputs_forward(*args)
    grads = module.launch_inputs_backward(given["grads"], *args)
    names = ("q", "k", "v", "dq", "dk", "dv", "dve", "ds")
    return {n: x for n, x in zip(names, (*out, *grads)) if x is not None}


def _reference(module, given):
    args = [None if given[n] is None else given[n].detach() for n in NAMES]
    for x in args[:5]:
        if x is not None:
            x.requires_grad_()
    out = module.attention_inputs_reference(*args)
    leaves = {f"d{n}": x for n, x in zip(NAMES[:5], args) if x is not None}
    grads = torch.autograd.grad(out, list(leaves.values()), given["grads"])
    return {**dict(zip("qkv", out)), **dict(zip(leaves, grads))}


def _numeric(name, *shape, quick=True, hostile=False, **options):
    run = _inputs(*shape, **options), _kernel, _reference
    return Numeric(name, *run, keep_float32=("s", "cos", "sin"), quick=quick, hostile=hostile)


def _launch(dtype, H=8, K=8, width=128, with_ve=True):
    def run():
        import kernels.attention_inputs as module

        def meta(*shape, dtype=dtype):
            return torch.empty(*shape, dtype=dtype, device="meta")

        q, k, v = meta(1, 4096, H + 2 * K, width).split((H, K, K), dim=2)
        rest = (
            meta(1, 4096, K, width) if with_ve else None,
            meta(2, dtype=torch.float32),
            meta(4096, width // 2, dtype=torch.float32),
            meta(4096, width // 2, dtype=torch.float32),
        )
        module.launch_inputs_forward(q, k, v, *rest)
        module.launch_inputs_backward([meta(1, 4096, h, width) for h in (H, K, K)], q, k, v, *rest)

    return run


FAMILY = Family(
    name="attention_inputs",
    module="kernels.attention_inputs",
    kernels=("_inputs_forward", "_inputs_backward"),
    numeric=(
        _numeric("slices of a merged projection, ragged T", 1, 37, 2, 2, 32, merged=True),
        _numeric("two sequences, grouped heads, no value embedding", 2, 19, 4, 2, 16, with_ve=False),
        _numeric("width 128, fewer tokens than a tile", 1, 3, 2, 1, 128),
        _numeric("tiny", 2, 3, 2, 1, 16, quick=False, hostile=True),
    ),
    launches=(
        Launch("bf16, 8 heads of 128", _launch(torch.bfloat16), quick=True),
        Launch("bf16, no value embedding", _launch(torch.bfloat16, with_ve=False)),
        Launch("bf16, 8 heads of 64 on 2", _launch(torch.bfloat16, K=2, width=64)),
        Launch("float32, 4 heads of 32", _launch(torch.float32, H=4, K=4, width=32), demanding=False),
    ),
    demands={
        "_inputs_forward": Demand(wide=("p_q", "p_k", "p_v", "p_ve", "p_qo", "p_ko", "p_vo")),
        "_inputs_backward": Demand(
            wide=("p_gq", "p_gk", "p_gv", "p_q", "p_k", "p_v", "p_ve", "p_dq", "p_dk", "p_dv", "p_dve")
        ),
    },
    faults=(
        Fault(
            "sequences are taken for evenly apart",
            "even = B == 1 or x.stride(0) == T * x.stride(1)",
            "even = True",
            by="rows apart",
        ),
        Fault(
            "heads are taken for adjacent",
            "adjacent = x.stride(3) == 1 and x.stride(2) == width",
            "adjacent = True",
            by="transposed",
        ),
        Fault(
            "upstream gradients are taken for dense",
            "grads = [dense(g) for g in grads]",
            "grads = list(grads)",
            by="transposed",
        ),
        Fault(
            "scalars and tables are taken for dense",
            "return [dense(x.float()) for x in (s, cos_TR, sin_TR)]",
            "return [x.float() for x in (s, cos_TR, sin_TR)]",
            by="transposed",
        ),
        Fault("a token past the end is touched", "o_token < tokens", "o_token < tokens + 1"),
        Fault("every sequence but the first has wrong angles", "(o_token % T)", "o_token"),
        Fault(
            "rotation the wrong way round",
            "b_1 * b_cos + b_2 * b_sin, b_2 * b_cos - b_1 * b_sin",
            "b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin",
        ),
        Fault(
            "k is read with the stride of a contiguous tensor",
            "o_token, stride_k, m_token",
            "o_token, KV_HEADS * 2 * R, m_token",
        ),
        Fault("the second half is read from the first", "tl.load(p + R,", "tl.load(p,"),
        Fault("the norm's gradient forgets its own change", "(b_g1 - b_y1 * b_mean) * b_r", "b_g1 * b_r"),
        Fault(
            "a scalar's gradient overwrites that of the next program",
            "tl.program_id(0) * 2 + 1",
            "tl.program_id(0) * 2 + 2",
        ),
        Fault("a head is skipped", "for h in range(0, HEADS):", "for h in range(1, HEADS):"),
        Fault("the mean is over half a head", "/ (2 * R)", "/ R"),
    ),
)
