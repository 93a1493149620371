"""attention_layer: the one operator against the separate functions, its contracts, its errors.

Its kernels' own cases, with every address checked, are in kernels/proof/families/attention_layer.py.
"""

import pytest
import torch
import torch.nn.functional as F

import kernels.attention_layer as module
from kernels import products8
from kernels.attention import attention, attention_inputs, attention_plan
from kernels.attention_layer import attention_layer
from kernels.runtime import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton is imported")
H, K, WIDTH, SCALE = 2, 1, 16, 0.3
LEAVES = ("x", "w", "ve", "s")


def draw(B=2, T=18, D=12, with_ve=True):
    random = torch.Generator().manual_seed(0)

    def make(*shape):
        return torch.randn(*shape, generator=random)

    angle = torch.arange(T)[:, None] * torch.linspace(0, 1, WIDTH // 2)
    tokens = torch.ones(B, T, dtype=torch.int32)
    tokens[:, 7] = 0
    return {
        "x_BTD": make(B, T, D),
        "w_ED": make((H + 2 * K) * WIDTH, D) * D**-0.5,
        "ve_BTKDh": make(B, T, K, WIDTH) if with_ve else None,
        "s": make(2),
        "rotary": (angle.cos(), angle.sin()),
        "plan": attention_plan(tokens, eos_id=0, window_blocks=1),
    }


def run(given, layer=attention_layer, **impls):
    """o and the gradients at x, w, ve and s, by name; x has one from elsewhere, too."""
    leaves = {n: given[n].detach().requires_grad_() for n in list(given)[:4] if given[n] is not None}
    both = layer(**{**given, **leaves}, heads=H, width=WIDTH, scale=SCALE, **impls)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=random) for y in both]
    return {"o": both[0], **dict(zip(leaves, torch.autograd.grad(both, list(leaves.values()), weights)))}


def separate(x_BTD, w_ED, ve_BTKDh, s, rotary, plan, heads, width, scale):
    q, k, v = F.linear(x_BTD, w_ED).unflatten(2, (-1, width)).split((H, K, K), dim=2)
    q, k, v = attention_inputs(q, k, v, ve_BTKDh, s, *rotary)
    return attention(q, k, v, plan, scale=scale), x_BTD


def test_without_triton_it_is_the_separate_functions_bit_by_bit():
    given = draw()
    ours, apart = run(given), run(given, separate)
    assert ours.keys() == apart.keys() and all(torch.equal(ours[n], apart[n]) for n in ours)


@interpreted
@pytest.mark.parametrize("with_ve", [True, False])
@pytest.mark.parametrize("impl, inputs_impl", [("triton",) * 2, ("triton", "reference"), ("specialised", "triton")])
def test_as_one_operator_it_computes_the_same(with_ve, impl, inputs_impl):
    given = draw(with_ve=with_ve)
    one, apart = run(given, impl=impl, inputs_impl=inputs_impl), run(given)
    assert one.keys() == apart.keys()
    for name, x in apart.items():
        torch.testing.assert_close(one[name], x, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@interpreted
@pytest.mark.parametrize("with_ve", [True, False])
def test_in_8_bits_it_is_the_separate_functions_in_8_bits(with_ve):
    """The same 8-bit numbers forward; gradients within what rounding to 2 bits leaves, and near those in 32 bits."""
    given = draw(with_ve=with_ve)
    (eight,) = products8.weights_in_8_bits([given["w_ED"].detach()])
    one, apart = run(given, impl="triton", inputs_impl="triton", eight=eight), run(given, eight=eight)
    exact = run(given)
    torch.testing.assert_close(one["o"], apart["o"], rtol=1e-4, atol=1e-5)
    for name, x in one.items():
        assert (x - apart[name]).norm() <= 0.01 * x.norm(), name
        if name != "s":  # sums that cancel: what rounding leaves of them tells little
            assert 0 < (x - exact[name]).norm() <= 0.2 * x.norm(), name


@interpreted
def test_operators_keep_torchs_contracts():
    """Fake kernels, autograd and schemas, by torch's own checker, and one graph under torch.compile."""
    for with_ve in (True, False):
        given = draw(1, 10, with_ve=with_ve)
        for name in list(given)[:4]:
            if given[name] is not None:
                given[name].requires_grad_()
        how = H, WIDTH, SCALE, "triton" if with_ve else "specialised"
        arguments = (*list(given.values())[:4], *given["rotary"], *given["plan"][:4], *how)
        checks = ("test_schema", "test_faketensor")
        with torch.no_grad():
            torch.library.opcheck(module._layer, arguments, test_utils=checks)
            saved = list(module._layer(*arguments))
            backward = (torch.ones_like(saved[0]), *arguments[:6], saved, list(given["plan"][:4]), SCALE)
            for dx in (None, torch.ones_like(arguments[0])):
                torch.library.opcheck(module._layer_backward, (*backward, dx, "triton"), test_utils=checks)
            factors = [*products8.both_ways(arguments[0].flatten(0, 1))[0], *products8.both_ways(arguments[1])[0]]
            tables, plan = (*arguments[2:4], *given["rotary"]), list(given["plan"][:4])
            in_8_bits = factors, arguments[0], *tables, plan, arguments[1].shape[0], *how
            torch.library.opcheck(module._layer_8, in_8_bits, test_utils=checks[1:])  # the other compares float8
            backward = (torch.ones_like(saved[0]), *tables, saved, plan, SCALE, "triton")
            torch.library.opcheck(module._attended_backward, backward, test_utils=checks)


@interpreted
def test_each_result_may_be_left_unused():
    """Only o, or only the x that comes back, has a gradient."""
    given = draw(1, 10)
    x = given["x_BTD"].requires_grad_()
    how = dict(heads=H, width=WIDTH, scale=SCALE, impl="triton", inputs_impl="triton")
    o, same = attention_layer(**given, **how)
    (of_o,) = torch.autograd.grad(o.sum(), x, retain_graph=True)
    (of_x,) = torch.autograd.grad(same.sum(), x, retain_graph=True)
    (of_both,) = torch.autograd.grad(o.sum() + same.sum(), x)
    torch.testing.assert_close(of_x, torch.ones_like(x))
    torch.testing.assert_close(of_o + 1, of_both)


@interpreted
def test_compiled_without_a_break():
    torch._dynamo.reset()
    given = draw(1, 10)
    compiled = torch.compile(attention_layer, backend="aot_eager", fullgraph=True)
    one, fused = (run(given, layer, impl="triton", inputs_impl="triton") for layer in (attention_layer, compiled))
    for name, x in one.items():
        torch.testing.assert_close(fused[name], x, rtol=1e-5, atol=1e-6)


@interpreted
@pytest.mark.parametrize(
    "change, word",
    [
        ({"w_ED": torch.zeros(63, 12)}, "w "),
        ({"w_ED": torch.zeros(2 * WIDTH, 12)}, "key heads"),
        ({"w_ED": torch.zeros(4 * WIDTH, 12, dtype=torch.float16)}, "w has dtype"),
        ({"ve_BTKDh": torch.zeros(2, 18, 2, WIDTH)}, "ve is"),
        ({"s": torch.zeros(3)}, "s is"),
        ({"rotary": (torch.zeros(17, 8), torch.zeros(18, 8))}, "cos is"),
        ({"rotary": (torch.zeros(18, 8), torch.zeros(18, 8, dtype=torch.float64))}, "sin is"),
        ({"plan": attention_plan(length=18)}, "plan.first_key_BT must"),
        ({"plan": None}, "plan must come"),
    ],
)
def test_errors_name_the_argument(change, word):
    with pytest.raises((ValueError, TypeError), match=word):
        attention_layer(**{**draw(), **change}, heads=H, width=WIDTH, scale=SCALE, impl="triton", inputs_impl="triton")
