"""Proof cases of the rows of logits that become losses and gradients (kernels/cross_entropy.py)."""

import torch
import torch.nn.functional as F

from kernels.proof import Demand, Family, Fault, Launch, Numeric, meta
from kernels.proof.families.products8 import FLOAT8_DEVICES
from kernels.proof.operators import same_layout

IGNORED = -100


def _inputs(N, V, scale=3.0, K=1, weights=None):
    def make(random):
        targets = torch.randint(V, (N, K), generator=random)
        targets[1::5, 0] = IGNORED
        targets[-1] = V - 1  # the last class; with several columns, a class that is the target of all of them
        given = {"z": torch.randn(N, V, generator=random) * scale, "targets": targets if K > 1 else targets[:, 0]}
        if weights is None:
            return given
        return {**given, "weights": torch.tensor(weights) if weights else torch.rand(N, K, generator=random) + 0.1}

    return make


def _kernel(softcap, block):
    def run(module, given):
        z, how = same_layout(given["z"]), (softcap, IGNORED)
        weights = given.get("weights")
        alone = module.launch_rows(same_layout(z), given["targets"], *how, False, block, weights=weights)
        losses = module.launch_rows(z, given["targets"], *how, True, block, weights=weights)
        return {"alone": alone, "losses": losses, "dz": z}

    return run


def _reference(softcap):
    def run(module, given):
        z = given["z"].detach().requires_grad_()
        wide = z.to(torch.promote_types(z.dtype, torch.float32))  # the kernel's arithmetic is float32
        targets = given["targets"] if given["targets"].ndim == 2 else given["targets"][:, None]
        weights = given.get("weights", torch.ones(targets.shape[1])).to(wide.dtype).expand(targets.shape)
        log_p = module._apply_softcap(wide, softcap).log_softmax(1)
        of_columns = [F.nll_loss(log_p, t, reduction="none", ignore_index=IGNORED) for t in targets.unbind(1)]
        losses = sum(weight * loss for weight, loss in zip(weights.unbind(1), of_columns))
        (dz,) = torch.autograd.grad(losses.sum(), z)
        return {"alone": losses, "losses": losses, "dz": dz}

    return run


def _numeric(name, N, V, softcap, block=None, quick=True, hostile=False, **options):
    run = _kernel(softcap, block), _reference(softcap)
    how = dict(quick=quick, hostile=hostile, changed=("z",), keep_float32=("weights",))
    return Numeric(name, _inputs(N, V, **options), *run, **how)


def _no_class(module, device):
    """A target that is no class has NaN for its loss and gradient, and no other row notices."""
    z = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    for block in (None, 16):
        for target in (40, 1 << 40, -1):
            mine, targets = z.to(device, copy=True), torch.tensor([0, 1, target, 39, IGNORED], device=device)
            losses = module.launch_rows(mine, targets, "rsqrt", IGNORED, True, block).cpu()
            mine = mine.cpu()
            bad = torch.tensor([False, False, True, False, False])
            assert torch.equal(losses.isnan(), bad), f"target {target}: losses {losses}"
            assert torch.equal(mine.isnan().all(1), bad) and torch.equal(mine.isnan().any(1), bad)


def _ignored_nan(module, device):
    """A row that counts for nothing has loss 0 whatever its logits are, by the definition."""
    z = torch.full((2, 40), torch.nan, device=device)
    losses = module.launch_rows(z, torch.tensor([IGNORED, 1], device=device), "rsqrt", IGNORED, True).cpu()
    assert losses[0] == 0 and losses[1].isnan(), losses


def _weight_of_zero(module, device):
    """A column whose weight is 0 is not there: a target in it may be no class, or have an infinite loss."""
    z = torch.randn(4, 40, generator=torch.Generator().manual_seed(0))
    z[:, 7] = float("-inf")
    targets = torch.tensor([[1, 7], [2, 99], [3, 4], [IGNORED, 5]])
    both, alone = z.to(device, copy=True), z.to(device, copy=True)
    weights = torch.tensor([1.0, 0.0], device=device)
    losses = module.launch_rows(both, targets.to(device), None, IGNORED, True, weights=weights)
    assert torch.equal(losses, module.launch_rows(alone, targets[:, 0].to(device), None, IGNORED, True))
    assert torch.equal(both, alone)


def _minus_infinity(module, device):
    """Without a cap, a logit of -inf is a class of probability 0 and has no gradient."""
    z = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    z[:, 7] = float("-inf")
    targets = torch.tensor([1, 2, 3])
    truth = torch.nn.functional.cross_entropy(z.double(), targets, reduction="none")
    for block in (None, 16):
        mine = z.to(device, copy=True)
        losses = module.launch_rows(mine, targets.to(device), None, IGNORED, True, block).cpu()
        mine = mine.cpu()
        torch.testing.assert_close(losses.double(), truth, rtol=1e-6, atol=1e-6)
        assert (mine[:, 7] == 0).all() and torch.isfinite(mine).all()
        assert (mine.sum(1).abs() <= 1e-6).all()


def _in_8_bits(module, device):
    """A gradient that is written in 8 bits is the one in 32, rounded; z stays, and so do the losses."""
    from kernels.products8 import E5M2, Eight, in_8_bits_reference

    random = torch.Generator().manual_seed(0)
    z, targets = 3 * torch.randn(6, 90, generator=random), torch.randint(90, (6, 2), generator=random)
    targets[1, 0] = IGNORED
    for block in (None, 16):
        whole, kept = z.to(device, copy=True), z.to(device, copy=True)
        scale = torch.tensor(2.0**-13, device=device)
        into = Eight(torch.empty(z.shape, dtype=E5M2, device=device), scale)
        arguments = targets.to(device), "rsqrt", IGNORED, True, block
        losses = module.launch_rows(whole, *arguments)
        assert torch.equal(module.launch_rows(kept, *arguments, into=into), losses) and torch.equal(kept.cpu(), z)
        found, right = into.values.float().cpu(), in_8_bits_reference(whole.cpu(), E5M2, scale.cpu())[:6, :90].float()
        assert (found != right).float().mean() <= 0.005 and right.abs().max() > 1000
        torch.testing.assert_close(
            found, right, rtol=0.26, atol=2.0**-16
        )  # to the next number, where one is near a tie


def _launch(dtype, N=4096, V=50304, softcap="rsqrt", K=0, eight=False):
    def run():
        import kernels.cross_entropy as module
        from kernels.products8 import E5M2, Eight

        z = meta(N, V, dtype=dtype)
        targets = meta(*([N, K] if K else [N]), dtype=torch.int64)
        weights = meta(K, dtype=torch.float32) if K else None
        if eight:
            into = Eight(meta(N, V, dtype=E5M2), meta(dtype=torch.float32))
            module.launch_rows(z, targets, softcap, IGNORED, True, weights=weights, into=into)
            return
        module.launch_rows(z, targets, softcap, IGNORED, True, weights=weights)
        module.launch_rows(z, targets, softcap, IGNORED, False, weights=weights)

    return run


FAMILY = Family(
    name="cross_entropy",
    module="kernels.cross_entropy",
    kernels=("_row_loss",),
    numeric=(
        _numeric("rsqrt, ragged row in registers", 11, 300, "rsqrt"),
        _numeric("sigmoid, row in registers", 6, 256, "sigmoid"),
        _numeric("no cap, row in registers", 6, 77, None),
        _numeric("rsqrt, row in blocks", 6, 300, "rsqrt", block=64),
        _numeric("no cap, row in blocks", 6, 130, None, block=64),
        _numeric("rsqrt, row in whole blocks", 6, 256, "rsqrt", block=64),
        _numeric("sigmoid, three targets of given weights", 7, 130, "sigmoid", block=32, K=3, weights=(1.0, 0.5, 0.25)),
        _numeric("no cap, two targets, a weight each", 6, 60, None, K=2, weights=()),
        _numeric("two targets, tiny", 4, 20, "rsqrt", K=2, weights=(), quick=False, hostile=True),
        _numeric("rsqrt, tiny", 4, 40, "rsqrt", block=16, quick=False, hostile=True),
        _numeric("no cap, tiny", 4, 20, None, quick=False, hostile=True),
        _numeric("sigmoid, row in blocks", 4, 200, "sigmoid", block=32, quick=False),
        _numeric("no cap, extreme logits, in registers", 6, 100, None, scale=1e4, quick=False),
        _numeric("no cap, extreme logits, in blocks", 6, 100, None, block=16, scale=1e4, quick=False),
        _numeric("rsqrt, extreme logits", 6, 100, "rsqrt", scale=1e4, quick=False),
    ),
    launches=(
        Launch("bf16, a chunk of the head", _launch(torch.bfloat16), quick=True),
        Launch("bf16, in 8 bits", _launch(torch.bfloat16, eight=True), devices=FLOAT8_DEVICES, quick=True),
        Launch("bf16, sigmoid", _launch(torch.bfloat16, softcap="sigmoid")),
        Launch("bf16, sigmoid, three targets", _launch(torch.bfloat16, softcap="sigmoid", K=3)),
        Launch("bf16, sigmoid, a weighted target", _launch(torch.bfloat16, softcap="sigmoid", K=1)),
        Launch(
            "bf16, sigmoid, a weighted target, in 8 bits",
            _launch(torch.bfloat16, softcap="sigmoid", K=1, eight=True),
            devices=FLOAT8_DEVICES,
        ),
        Launch("bf16, no cap, a row in registers", _launch(torch.bfloat16, V=16000, softcap=None)),
        Launch("float32, bytes", _launch(torch.float32, V=256)),
    ),
    demands={
        "_row_loss": Demand(
            wide=("p_z", "p_g"),
            shows=((r"max\.NaN", "CAP=1"), (r"min\.NaN", "CAP=1"), (r"barrier all|gpu\.barrier", "GRADIENT=True")),
        )
    },
    checks=(
        ("a target that is no class", _no_class),
        ("a logit of -inf without a cap", _minus_infinity),
        ("an ignored row of NaN", _ignored_nan),
        ("a weight of 0", _weight_of_zero),
        ("a gradient in 8 bits", _in_8_bits),
    ),
    faults=(
        Fault("a gradient in 8 bits lacks its scale", "b_g / tl.load(p_scale)", "b_g", by="8 bits"),
        Fault("a gradient in 8 bits goes to the first row", "p_g += row * V", "p_g += 0", by="8 bits"),
        Fault("the target is not subtracted", "* weight - b_own) * b_slope", "* weight) * b_slope"),
        Fault("the target's slope is left out", "- b_own) * b_slope_target", "- b_own)"),
        Fault("the cap's slope is left out", "* _LOG2_E) * b_slope", "* _LOG2_E)"),
        Fault("classes past the end are counted", 'tl.where(o < V, b_c, float("-inf"))', "b_c"),
        Fault(
            "classes past the end are read",
            "tl.load(p_z + o, mask=o < V, other=0.0)",
            "tl.load(p_z + o, mask=o < V + 1, other=0.0)",
        ),
        Fault("classes past the end are written", "p_scale, o < V if MASKED", "p_scale, o < V + 1 if MASKED"),
        Fault("ignored rows have a gradient", "tl.where(m_counted, b_weight, 0.0), m_counted", "b_weight, m_counted"),
        Fault(
            "ignored rows have a target", "m_known & (earlier == 0), LIMIT", "(b_target >= 0) & (earlier == 0), LIMIT"
        ),
        Fault(
            "ignored rows have a loss",
            "tl.where(any_counted == 1, weight * log_total - picked, 0.0)",
            "weight * log_total - picked",
            by="ignored row",
        ),
        Fault("weights do not reach the softmax", "225 * weight", "225"),
        Fault("weights do not reach the softmax without a cap", "return b_z, weight", "return b_z, 1.0"),
        Fault("all columns have the first one's weight", "row * K + o_k if WEIGHTED == 2 else o_k", "0 * o_k"),
        Fault("all rows have the first one's weights", "row * K + o_k if WEIGHTED == 2 else o_k", "o_k"),
        Fault(
            "a class lacks one column's weight only",
            "tl.where(m_same, b_weight[:",
            "tl.where(o_k[:, None] == o_k, b_weight[:",
        ),
        Fault("a class of several columns is written by all", "m_known & (earlier == 0), LIMIT", "m_known, LIMIT"),
        Fault(
            "a weight of 0 counts", "m_counted = m_counted & (b_weight != 0)", "m_counted = m_counted", by="weight of 0"
        ),
        Fault("there is a column too many", "mask=o_k < K, other=ignore_index", "mask=o_k < K + 1, other=ignore_index"),
        Fault("weights are taken for dense", "dense(weights.float())", "weights.float()", by="two targets, tiny"),
        Fault("the target's logit is not capped", "b_weight * b_c_target", "b_weight * b_z_target"),
        Fault("the cap swallows NaN", ", propagate_nan=tl.PropagateNan.ALL", "", by="NaN"),
        Fault(
            "a target that is no class is followed",
            "tl.where(m_known, b_target, 0)",
            "tl.where(m_counted, b_target, 0)",
            by="no class",
        ),
        Fault(
            "a target that is no class has a loss",
            'tl.where(all_known == 1, log_total, float("nan"))',
            "log_total",
            by="no class",
        ),
        Fault("no cap has a slope", "return b_z, weight", "return b_z, b_z * 0 + weight", by="-inf"),
        Fault("targets are taken for dense", "dense(targets_NK)", "targets_NK", by="transposed"),
        Fault(
            "logits are taken for dense",
            'in_place("z", z_NV) if gradient and into is None else nullcontext(dense(z_NV))',
            "nullcontext(z_NV)",
            by="transposed",
        ),
        Fault("all rows are the first", "p_z += row * V", "p_z += 0 * V"),
        Fault("blocks forget what came before", "b_total * tl.exp(b_most - b_shift) + ", ""),
        Fault("blocks of capped logits forget what came before", "b_most, b_total + tl.exp2", "b_most, tl.exp2"),
        Fault("the tail is not counted", "tl.log(tail + ", "tl.log(0 * tail + "),
        Fault(
            "the tail's gradient is left out",
            "            if TAIL > 0:\n                _store",
            "            if TAIL > 1 << 20:\n                _store",
        ),
        Fault("the last whole block is left out", "whole = V // BLOCK * BLOCK", "whole = (V - 1) // BLOCK * BLOCK"),
    ),
)
