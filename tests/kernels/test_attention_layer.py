"""attention_layer: the one operator against the separate functions, its contracts, its errors.

Its kernels' own cases, with every address checked, are in kernels/proof/families/attention_layer.py.
"""

import pytest
import torch
import torch.nn.functional as F

import kernels.attention_layer as module
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
    """o and the gradients at x, w, ve and s, by name."""
    leaves = {n: given[n].detach().requires_grad_() for n in list(given)[:4] if given[n] is not None}
    o = layer(**{**given, **leaves}, heads=H, width=WIDTH, scale=SCALE, **impls)
    weights = torch.randn(o.shape, generator=torch.Generator().manual_seed(1))
    return {"o": o, **dict(zip(leaves, torch.autograd.grad(o, list(leaves.values()), weights)))}


def separate(x_BTD, w_ED, ve_BTKDh, s, rotary, plan, heads, width, scale):
    q, k, v = F.linear(x_BTD, w_ED).unflatten(2, (-1, width)).split((H, K, K), dim=2)
    q, k, v = attention_inputs(q, k, v, ve_BTKDh, s, *rotary)
    return attention(q, k, v, plan, scale=scale)


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
def test_operators_keep_torchs_contracts():
    """Fake kernels, autograd and schemas, by torch's own checker, and one graph under torch.compile."""
    for with_ve in (True, False):
        given = draw(1, 10, with_ve=with_ve)
        for name in list(given)[:4]:
            if given[name] is not None:
                given[name].requires_grad_()
        arguments = (
            *list(given.values())[:4],
            *given["rotary"],
            *given["plan"][:4],
            H,
            WIDTH,
            SCALE,
            "triton" if with_ve else "specialised",
        )
        checks = ("test_schema", "test_faketensor", "test_autograd_registration")
        torch.library.opcheck(module._layer, arguments, test_utils=checks)
        with torch.no_grad():
            saved = list(module._layer(*arguments))
            backward = (torch.ones_like(saved[0]), *arguments[:6], saved, list(given["plan"][:4]), SCALE)
            torch.library.opcheck(module._layer_backward, backward, test_utils=("test_schema", "test_faketensor"))


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
