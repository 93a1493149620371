"""Proof cases of the rows of logits that become losses and gradients (kernels/cross_entropy.py)."""

import torch

from kernels.proof import Demand, Family, Fault, Launch, Numeric
from kernels.proof.operators import same_layout

IGNORED = -100


def _inputs(N, V, scale=3.0):
    def make(random):
        targets = torch.randint(V, (N,), generator=random)
        targets[1::5] = IGNORED
        targets[-1] = V - 1
        return {"z": torch.randn(N, V, generator=random) * scale, "targets": targets}

    return make


def _kernel(softcap, block):
    def run(module, given):
        z = same_layout(given["z"])
        alone = module.launch_rows(same_layout(z), given["targets"], softcap, IGNORED, False, block)
        losses = module.launch_rows(z, given["targets"], softcap, IGNORED, True, block)
        return {"alone": alone, "losses": losses, "dz": z}

    return run


def _reference(softcap):
    def run(module, given):
        z = given["z"].detach().requires_grad_()
        wide = z.to(torch.promote_types(z.dtype, torch.float32))  # the kernel's arithmetic is float32
        losses = torch.nn.functional.cross_entropy(
            module._apply_softcap(wide, softcap), given["targets"], reduction="none", ignore_index=IGNORED
        )
        (dz,) = torch.autograd.grad(losses.sum(), z)
        return {"alone": losses, "losses": losses, "dz": dz}

    return run


def _numeric(name, N, V, softcap, block=None, quick=True, hostile=False, **options):
    run = _kernel(softcap, block), _reference(softcap)
    return Numeric(name, _inputs(N, V, **options), *run, quick=quick, hostile=hostile, changed=("z",))


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


def _launch(dtype, N=4096, V=50304, softcap="rsqrt"):
    def run():
        import kernels.cross_entropy as module

        z = torch.empty(N, V, dtype=dtype, device="meta")
        targets = torch.empty(N, dtype=torch.int64, device="meta")
        module.launch_rows(z, targets, softcap, IGNORED, True)
        module.launch_rows(z, targets, softcap, IGNORED, False)

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
        _numeric("rsqrt, tiny", 4, 40, "rsqrt", block=16, quick=False, hostile=True),
        _numeric("no cap, tiny", 4, 20, None, quick=False, hostile=True),
        _numeric("sigmoid, row in blocks", 4, 200, "sigmoid", block=32, quick=False),
        _numeric("no cap, extreme logits, in registers", 6, 100, None, scale=1e4, quick=False),
        _numeric("no cap, extreme logits, in blocks", 6, 100, None, block=16, scale=1e4, quick=False),
        _numeric("rsqrt, extreme logits", 6, 100, "rsqrt", scale=1e4, quick=False),
    ),
    launches=(
        Launch("bf16, a chunk of the head", _launch(torch.bfloat16), quick=True),
        Launch("bf16, sigmoid", _launch(torch.bfloat16, softcap="sigmoid")),
        Launch("bf16, no cap, a row in registers", _launch(torch.bfloat16, V=16000, softcap=None)),
        Launch("float32, bytes", _launch(torch.float32, V=256)),
    ),
    demands={
        "_row_loss": Demand(
            wide=("p_z",),
            shows=((r"max\.NaN", "CAP=1"), (r"min\.NaN", "CAP=1"), (r"barrier all|gpu\.barrier", "GRADIENT=True")),
        )
    },
    checks=(("a target that is no class", _no_class), ("a logit of -inf without a cap", _minus_infinity)),
    faults=(
        Fault("the target is not subtracted", "- log_total) - 1) * slope_target", "- log_total)) * slope_target"),
        Fault("the target's slope is left out", "- 1) * slope_target", "- 1)"),
        Fault("the cap's slope is left out", "* _LOG2_E) * b_slope", "* _LOG2_E)"),
        Fault("classes past the end are counted", 'tl.where(o < V, b_c, float("-inf"))', "b_c"),
        Fault(
            "classes past the end are read",
            "tl.load(p_z + o, mask=o < V, other=0.0)",
            "tl.load(p_z + o, mask=o < V + 1, other=0.0)",
        ),
        Fault(
            "classes past the end are written",
            "b_g.to(p_z.dtype.element_ty), mask=o < V)",
            "b_g.to(p_z.dtype.element_ty), mask=o < V + 1)",
        ),
        Fault("ignored rows have a gradient", 'tl.where(counted, log_total, float("inf"))', "log_total"),
        Fault("ignored rows have a target", "mask=counted & known)", "mask=(counted & known) | (row >= 0))"),
        Fault("ignored rows have a loss", "tl.where(counted, log_total - c_target, 0.0)", "log_total - c_target"),
        Fault("the target's logit is not capped", "log_total - c_target", "log_total - tl.load(p_z_target)"),
        Fault("the cap swallows NaN", ", propagate_nan=tl.PropagateNan.ALL", "", by="NaN"),
        Fault(
            "a target that is no class is followed",
            "tl.where(counted & known, target, 0)",
            "tl.where(counted, target, 0)",
            by="no class",
        ),
        Fault(
            "a target that is no class has a loss",
            'tl.where(known, log_total, float("nan"))',
            "log_total",
            by="no class",
        ),
        Fault("no cap has a slope", "return b_z, 1.0", "return b_z, b_z * 0 + 1", by="-inf"),
        Fault("targets are taken for dense", "dense(targets_N.long())", "targets_N", by="transposed"),
        Fault(
            "logits are taken for dense",
            'in_place("z", z_NV) if gradient else nullcontext(dense(z_NV))',
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
