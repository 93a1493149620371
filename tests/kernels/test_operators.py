"""What holds of all public operators alike (kernels/proof/operators.py): values, layouts, NaN, refusals, autograd."""

import contextlib

import pytest
import torch
from torch._subclasses import FakeTensorMode

from kernels import guards
from kernels.proof.operators import (
    LAYOUTS,
    OPERATORS,
    check_layout,
    check_nan,
    check_values,
    every_tensor,
    mapped,
    module_of,
    outcome,
)
from kernels.runtime import INTERPRETED

IN_TRITON = ("triton", "specialised")
CASES = [
    (name, impl)
    for name, operator in OPERATORS.items()
    for impl in operator.implementations
    if impl not in IN_TRITON or INTERPRETED
]
FAST = [(name, impl) for name, impl in CASES if not (name.startswith(("attention", "prologue")) and impl in IN_TRITON)]
PUBLIC = [(name, impl) for name, impl in CASES if name != "attention, looped"]  # reached through `attention` only
operators = pytest.mark.parametrize("name, impl", CASES, ids=[f"{n}-{i}" for n, i in CASES])
differentiable = pytest.mark.parametrize(
    "name, impl",
    [c for c in CASES if OPERATORS[c[0]].leaves],
    ids=[f"{n}-{i}" for n, i in CASES if OPERATORS[n].leaves],
)
#: These are plain torch from end to end, so they have every derivative.
PLAIN = {("residual mix", "reference"), ("prologue", "reference"), ("attention, grouped", "reference")}
PLAIN |= {("rows of tables", "reference"), ("head outputs", "reference")}
#: The gradient of the projection is torch's own there.
PROJECTED_BY_TORCH = {("attention layer", "auto")}


def drawn(name, seed=0):
    return OPERATORS[name].inputs(torch.Generator().manual_seed(seed))


def results(name, impl, given):
    operator = OPERATORS[name]
    return outcome(operator, lambda g: operator.run(module_of(operator), g, impl), given)


@pytest.mark.parametrize("name, impl", FAST)
def test_values(name, impl):
    check_values(OPERATORS[name], impl, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name, impl", [c for c in CASES if OPERATORS[c[0]].half and c[1] not in IN_TRITON])
def test_values_in_half_precision(name, impl, dtype):
    check_values(OPERATORS[name], impl, dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, impl", FAST)
def test_layouts(name, impl, layout):
    check_layout(OPERATORS[name], impl, layout, at_once=impl in IN_TRITON)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, impl", [c for c in CASES if c not in FAST])
def test_layouts_of_attention_in_the_interpreter(name, impl, layout):
    """Its launchers have the same in every default run: kernels/proof, the case "tiny"."""
    check_layout(OPERATORS[name], impl, layout, at_once=True)


@pytest.mark.parametrize("name, impl", FAST)
def test_nan_reaches_what_it_reaches_in_the_definition(name, impl):
    check_nan(OPERATORS[name], impl)


@pytest.mark.parametrize("name, impl", PUBLIC)
def test_another_device_shape_or_dtype_is_named(name, impl):
    """Every tensor argument in turn: on another device, a row longer, of integers. All end in an error of ours.

    Values of attention may be wider than its queries and keys, so they get more tokens, or less width; numbers of rows
    may have any shape."""
    operator, given = OPERATORS[name], drawn(name)
    arguments = [n for n in every_tensor(given) if not n.startswith("upstream") and "band_mask" not in n]
    for argument in arguments:
        changes = {
            "device": lambda x: x.to("meta"),
            "shape": lambda x: torch.cat((x, x)) if x.ndim == 1 else torch.cat((x, x), -1),
        }
        if len(arguments) > 1 and argument != "g":
            for what, change in changes.items():
                if (argument, what) == ("rows", "shape"):
                    continue
                if (argument, what) == ("v", "shape"):
                    change = lambda x: torch.cat((x, x), 1)  # noqa: E731
                wrong = mapped(given, lambda n, x, c=change, a=argument: c(x) if n == a else x)
                with pytest.raises((ValueError, TypeError)) as told:
                    operator.run(module_of(operator), wrong, impl)
                assert any(word in str(told.value) for word in ("must", "shape", " on ", "is for")), what
    if name.startswith("attention") and "v" in arguments:
        wrong = mapped(given, lambda n, x: x[..., : x.size(-1) // 2] if n == "v" else x)
        with pytest.raises(ValueError, match=r"shape|width|must"):
            operator.run(module_of(operator), wrong, impl)


@pytest.mark.parametrize("name, impl", PUBLIC)
def test_numbers_that_are_not_floating_are_refused(name, impl):
    operator, given = OPERATORS[name], drawn(name)
    first = next(n for n in every_tensor(given) if not n.startswith("upstream"))
    if first == "high":
        pytest.skip("the halves of a split weight are integers")
    wrong = mapped(given, lambda n, x: x.to(torch.int32) if n == first else x)
    with pytest.raises(TypeError, match="dtype"):
        operator.run(module_of(operator), wrong, impl)


NO_ROWS = [
    "mlp",
    "mlp, 8 bits",
    "linear, 8 bits",
    "residual mix",
    "norm",
    "loss, mean, rsqrt",
    "loss, none, None",
    "momentum",
    "update",
    "orthogonalize",
]


@pytest.mark.parametrize("name, impl", [c for c in CASES if c[0] in NO_ROWS])
def test_nothing_in_nothing_out(name, impl):
    """No token: empty results, gradients of 0 at what is not empty, and NaN only for a mean over nothing."""
    batched = {"x", "x00", "x01", "targets", "upstream_y", "buffer", "grad", "weight", "update", "g"}
    given = {n: x[:0] if n in batched or (n == "upstream_loss" and x.ndim) else x for n, x in drawn(name).items()}
    for key, x in results(name, impl, given).items():
        if name == "loss, mean, rsqrt" and key == "loss":
            assert x.isnan()
        else:
            assert (x == 0).all(), key


@pytest.mark.parametrize(
    "impl", ["auto", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="-"))]
)
def test_a_prologue_without_tokens(impl):
    given = {
        n: x if x is None or n == "s" else x[:, :0] if x.ndim == 4 else x[:0] for n, x in drawn("prologue").items()
    }
    found = results("prologue", impl, given)
    assert found["dq"].shape == (2, 0, 2, 16) and (found["ds"] == 0).all()


@pytest.mark.parametrize("name, impl", FAST)
def test_autocast_does_not_reach_inside(name, impl):
    """The same bits and dtypes under autocast, forward and backward."""
    plain = results(name, impl, drawn(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = results(name, impl, drawn(name))
    for key, x in plain.items():
        if (name, impl) in PLAIN | PROJECTED_BY_TORCH and key.startswith("d"):
            continue  # the gradients of plain torch are torch's, outside of our hands
        assert under[key].dtype == x.dtype and torch.equal(under[key], x), key


@differentiable
def test_second_derivatives_are_right_or_refused(name, impl):
    """A penalty on the gradient is torch's where everything is plain torch, else an error that names the operator."""
    operator, given = OPERATORS[name], drawn(name)
    leaves = {n: given[n].detach().requires_grad_() for n in operator.leaves if given[n] is not None}
    out = sum(x.square().sum() for x in operator.run(module_of(operator), {**given, **leaves}, impl).values())
    grads = torch.autograd.grad(out, list(leaves.values()), create_graph=True)
    if (name, impl) in PLAIN:
        torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()), allow_unused=True)
        return
    assert all(g.requires_grad for g in grads), "a penalty on these would be forgotten in silence"
    with pytest.raises(RuntimeError, match="once only"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), list(leaves.values()))


@differentiable
def test_a_loss_whose_upstream_is_a_constant_refuses_second_derivatives_too(name, impl):
    operator, given = OPERATORS[name], drawn(name)
    leaves = {n: given[n].detach().requires_grad_() for n in operator.leaves if given[n] is not None}
    out = sum(x.sum() for x in operator.run(module_of(operator), {**given, **leaves}, impl).values())
    grads = torch.autograd.grad(out, list(leaves.values()), create_graph=True)
    if (name, impl) not in PLAIN:
        with pytest.raises(RuntimeError, match="once only"):
            (out + sum(g.square().sum() for g in grads)).backward()


@differentiable
def test_forward_mode_is_right_or_refused(name, impl):
    """Forward-mode derivatives: those of finite differences where torch has them, else torch's error."""
    operator, given = OPERATORS[name], drawn(name)
    leaf = operator.leaves[0]
    tangent = torch.randn(given[leaf].shape, generator=torch.Generator().manual_seed(5))

    def run(x):
        return next(iter(operator.run(module_of(operator), {**given, leaf: x}, impl).values()))

    with torch.autograd.forward_ad.dual_level():
        try:
            dual = run(torch.autograd.forward_ad.make_dual(given[leaf], tangent))
        except (RuntimeError, NotImplementedError) as refused:
            assert "forward" in str(refused).lower()
            return
        found = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert found is not None, "the tangent is lost in silence"
    step = 1e-3
    slope = (run(given[leaf] + step * tangent) - run(given[leaf] - step * tangent)) / (2 * step)
    torch.testing.assert_close(found, slope, rtol=2e-2, atol=2e-2)


# ---- the guards themselves ---------------------------------------------------------------------------------


class Kernel:
    """Stands for a Triton kernel: notes where and with what it was launched."""

    __name__ = "stand_in"

    def __init__(self):
        self.launched = []

    def __getitem__(self, programs):
        return lambda *arguments, **options: self.launched.append((programs, options))


def test_a_launch_takes_place_on_the_device_of_its_tensors(monkeypatch):
    entered, kernel = [], Kernel()

    @contextlib.contextmanager
    def device(where):
        entered.append(str(where))
        yield

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device", device)
    with FakeTensorMode():
        there, here = torch.empty(3, device="cuda:1"), torch.empty(3)
        guards.launch(kernel, (4,), there, 7, BLOCK=2)
        assert entered == ["cuda:1"] and kernel.launched == [((4,), {"BLOCK": 2})]
        with pytest.raises(ValueError, match=r"stand_in got tensors on .*cpu.*cuda:1"):
            guards.launch(kernel, (4,), there, here)
        guards.launch(kernel, (0,), there)
    assert len(kernel.launched) == 1, "no programs, no launch"


def test_in_place_comes_back():
    for layout in ("transposed", "sliced", "strided", "negative"):
        x = LAYOUTS[layout](torch.arange(12.0).view(3, 4))
        with guards.in_place("x", x) as walked:
            assert walked.is_contiguous() and not walked.is_neg()
            walked.add_(1)
        assert torch.equal(x.resolve_neg(), torch.arange(1.0, 13.0).view(3, 4)), layout
    overlapping = torch.zeros(20).as_strided((3, 4), (2, 1))
    for wrong in (torch.zeros(1, 3).expand(2, 3), overlapping, overlapping.t()):
        with pytest.raises(ValueError, match="is expanded or overlaps"), guards.in_place("x", wrong):
            pass
    leaf = torch.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="leaf that requires grad"), guards.in_place("x", leaf):
        pass
    with torch.no_grad(), guards.in_place("x", leaf) as walked:
        assert walked is leaf
