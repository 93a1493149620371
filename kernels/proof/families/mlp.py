"""Proof cases of the MLP's products with their epilogues (kernels/mlp.py)."""

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric
from kernels.proof.operators import LAYOUTS


def _inputs(N, D, F):
    def make(random):
        shapes = dict(x=(N, D), w_in=(F, D), w_out=(D, F), dy=(N, D))
        given = {name: torch.randn(*shape, generator=random) * D**-0.25 for name, shape in shapes.items()}
        return {**given, "act": torch.rand(N, F, generator=random)}

    return make


def _kernel(module, given, tile=None):
    a = module.launch_activation(given["x"], given["w_in"], tile)
    slopes = {
        name: module.launch_slope(given["dy"], given["w_out"], x, tile)
        for name, x in (("dh", a), ("given", given["act"]))
    }
    return {"a": a, **slopes}


def _normed(module, given, tile=None):
    a, r = module.launch_normed_activation(given["x"], given["w_in"], tile)
    apart = LAYOUTS["strided"](r)  # which the launcher makes dense
    return {"a": a, "r": r, "dh": module.launch_slope(given["dy"], given["w_out"], given["act"], tile, apart)}


def _normed_by_descriptors(module, given):
    return _normed(module, given, module.Tile(32, 64, 4, 1, depth=16, descriptors=True))


def _by_descriptors(module, given):
    return _kernel(module, given, module.Tile(32, 64, 4, 1, depth=16, descriptors=True))


def _reference(module, given):
    r = (given["x"] @ given["w_in"].t()).relu()
    product = given["dy"] @ given["w_out"]
    return {"a": r * r, "dh": product * 2 * r, "given": product * 2 * given["act"].sqrt()}


def _normed_reference(module, given):
    x = given["x"]
    wide = torch.promote_types(x.dtype, torch.float32)
    r = torch.rsqrt(x.to(wide).square().mean(-1) + torch.finfo(torch.float32).eps)
    h = (x * r[:, None]).to(x.dtype) @ given["w_in"].t()
    dh = (given["dy"] @ given["w_out"]) * 2 * given["act"].sqrt() * r[:, None]
    return {"a": h.relu().square(), "r": r, "dh": dh.to(x.dtype)}


def _launch(dtype, N=65536, D=1024, F=4096, normed=False):
    def run():
        import kernels.mlp as module

        def meta(*shape):
            return torch.empty(*shape, dtype=dtype, device="meta")

        if normed:
            a, r = module.launch_normed_activation(meta(N, D), meta(F, D))
        else:
            a, r = module.launch_activation(meta(N, D), meta(F, D)), None
        module.launch_slope(meta(N, D), meta(D, F), a, r_N=r)

    return run


FAMILY = Family(
    name="mlp",
    module="kernels.mlp",
    kernels=("_product",),
    numeric=(
        Numeric("ragged in all three axes", _inputs(70, 37, 130), _kernel, _reference),
        Numeric("whole tiles", _inputs(64, 32, 64), _kernel, _reference, quick=False),
        Numeric("one token", _inputs(1, 5, 20), _kernel, _reference, quick=False),
        Numeric("tiny", _inputs(6, 5, 9), _kernel, _reference, quick=False, hostile=True),
        Numeric("ragged, by descriptors", _inputs(70, 40, 136), _by_descriptors, _reference),
        Numeric("more groups of rows than one", _inputs(600, 16, 40), _kernel, _reference, quick=False),
        Numeric("normed, ragged", _inputs(70, 37, 130), _normed, _normed_reference),
        Numeric("normed, by descriptors", _inputs(70, 40, 136), _normed_by_descriptors, _normed_reference),
        Numeric("normed, tiny", _inputs(6, 5, 9), _normed, _normed_reference, quick=False, hostile=True),
    ),
    launches=(
        Launch("bf16, a training step", _launch(torch.bfloat16), quick=True),
        Launch("bf16, a training step, normed", _launch(torch.bfloat16, normed=True), quick=True),
        Launch("bf16, a validation sequence", _launch(torch.bfloat16, N=262144), devices=("sm_90",)),
        # widths that 16 bytes do not divide: masked loads of single numbers, which spill; no model has them
        Launch("bf16, ragged", _launch(torch.bfloat16, N=1000, D=100, F=300), demanding=False),
        Launch("float32", _launch(torch.float32, N=1000, D=64, F=256), demanding=False),
    ),
    demands={
        "_product": Demand(
            instructions=("HGMMA", "UTMALDG"),
            wide=("p_a", "p_b", "p_act", "p_out"),  # not p_r, one number a row
            shows=((r"max\.NaN", "BACKWARD=False"),),
        )
    },
    faults=(
        Fault("rows are not normed", "b_r = tl.rsqrt(b_square / K + _EPS)", "b_r = b_square * 0 + 1", by="normed"),
        Fault("squares of the last step alone", "b_square += tl.sum", "b_square = tl.sum", by="normed"),
        Fault("the mean is over one too many", "b_square / K", "b_square / (K + 1)", by="normed"),
        Fault(
            "the slope lacks the rows' factor", "b_r = tl.load(p_r + o_m, mask=o_m < M, other=0.0)", "b_r = o_m * 0 + 1"
        ),
        Fault("every tile of columns writes the rows' factor", "if column == 0:", "if True:", by="normed"),
        Fault("the rows' factor is taken for dense", "r_M = dense(r_M)", "r_M = r_M", by="normed"),
        Fault("the activation is not squared", "b_out *= b_out", "b_out *= 1"),
        Fault("the activation swallows NaN", ", propagate_nan=tl.PropagateNan.ALL", "", by="NaN"),
        Fault(
            "the first factor is taken for dense",
            "a_MK, as_stored = dense(a_MK),",
            "a_MK, as_stored = a_MK,",
            by="transposed",
        ),
        Fault(
            "the second factor is taken for dense",
            "dense(b_NK.t() if backward else b_NK)",
            "b_NK.t() if backward else b_NK",
            by="transposed",
        ),
        Fault("the activation is taken for dense", "act_MN = dense(act_MN)", "act_MN = act_MN", by="transposed"),
        Fault("negative values pass", "tl.maximum(b_out, 0.0, propagate_nan=tl.PropagateNan.ALL)", "b_out"),
        Fault("the slope lacks its two", "b_out *= 2 * tl.sqrt", "b_out *= tl.sqrt"),
        Fault(
            "rows past the end are read",
            "(o_m < M)[:, None] & (o_k < K)[None, :]",
            "(o_m < M + 1)[:, None] & (o_k < K)[None, :]",
        ),
        Fault(
            "depth past the end is read",
            "(o_n < N)[:, None] & (o_k < K)[None, :]",
            "(o_n < N)[:, None] & (o_k < K + 1)[None, :]",
        ),
        Fault(
            "columns past the end are written",
            "m_out = (o_m < M)[:, None] & (o_n < N)[None, :]",
            "m_out = (o_m < M)[:, None] & (o_n < N + 1)[None, :]",
        ),
        Fault("a program passes over every second of its tiles", "tl.num_programs(0)", "2 * tl.num_programs(0)"),
        Fault("two programs take the same tile", "first + within % height", "first"),
        Fault(
            "a row of the result is one too long",
            "o_m[:, None].to(tl.int64) * N",
            "o_m[:, None].to(tl.int64) * (N + 1)",
        ),
        Fault("a descriptor's rows are the first", "p_a.load([row, k])", "p_a.load([0, k])"),
        Fault("a descriptor's columns are the first", "p_b.load([column, k])", "p_b.load([0, k])"),
        Fault("the transposed factor's descriptor does not move", "p_b.load([k, column])", "p_b.load([0, column])"),
        Fault("the second factor's strides are exchanged", "o_k[None, :] * stride_k", "o_k[None, :] * stride_n"),
    ),
)
