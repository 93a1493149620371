"""The residual mix: value and all four gradients against float64, dtypes, compilation, errors."""

import pytest
import torch

import kernels.residual as module
from kernels.residual import factors_of_layers, mixes_of_layers, residual_mix, residual_mix_reference, weighted_sum
from kernels.runtime import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton is imported")


def draw(shape=(2, 7, 16), dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    x, x00, x01, dy = (torch.randn(shape, generator=random).to(dtype) for _ in range(4))
    return [x, x00, x01, torch.tensor([0.9, 0.2, -0.3])], dy


def with_gradients(run, inputs, dy):
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("shape", [(2, 7, 16), (1, 1), (3, 500)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_float64(shape, dtype):
    inputs, dy = draw(shape, dtype)
    truth = with_gradients(residual_mix_reference, [t.double() for t in inputs], dy)
    same = with_gradients(residual_mix_reference, inputs, dy)
    ours = with_gradients(residual_mix, inputs, dy)
    tolerance = 4e-6 if dtype == torch.float32 else 1.6e-2
    for name, true, usual, mine in zip(("y", "dx", "dx00", "dx01", "dlambdas"), truth, same, ours):
        # the lambdas' gradients are sums that may cancel: their rounding is that of the terms
        size = max(true.abs().max(), dy.numel() ** 0.5 if name == "dlambdas" else 0)
        assert mine.dtype == (torch.float32 if name == "dlambdas" else dtype)
        assert (mine - true).abs().max() <= 2 * (usual - true).abs().max() + tolerance * size, name


def test_first_values_leave_x_alone():
    inputs, _ = draw()
    inputs[3] = torch.tensor([1.0, 0.0, 0.0])
    assert torch.equal(residual_mix(*inputs), inputs[0])


def test_compiles_without_a_graph_break_and_gradcheck():
    inputs, dy = draw()
    compiled = torch.compile(residual_mix, fullgraph=True, backend="aot_eager")
    for mine, plain in zip(with_gradients(compiled, inputs, dy), with_gradients(residual_mix, inputs, dy)):
        torch.testing.assert_close(mine, plain)
    assert torch.autograd.gradcheck(residual_mix, [t.double().requires_grad_() for t in draw((2, 3))[0]])


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_mixes_of_layers_are_their_formula(impl, by_token, count):
    """Eagerly and for the compiler, layer by layer or with the gradients of what is shared left to the end: the stream
    and every gradient against float64. It begins as the model's does, with the first of the shared tensors."""
    random = torch.Generator().manual_seed(0)
    *shared, dy = torch.randn(count + 1, 2, 7, 16, generator=random).unbind()
    factors, gates = torch.randn(3, 1 + count, generator=random), torch.randn(3, 2, 7, 1, generator=random)

    def more_of(layer, gates):  # only the first and the last tensor have factors by the token
        return [gates[layer] if k in (0, count - 1) else None for k in range(count)]

    def run(factors, gates, *shared):
        x, more = shared[0], [more_of(layer, gates) for layer in range(3)] if by_token else ()
        for mix in mixes_of_layers(factors, shared, by_token=more, impl=impl):
            x = mix(x)
        return x

    def literal(factors, gates, *shared):
        x = shared[0]
        for layer, (own, *others) in enumerate(factors):
            more = more_of(layer, gates) if by_token else [None] * count
            whole = [f if m is None else f + m for f, m in zip(others, more)]
            x = own * x + sum(f * x_k for f, x_k in zip(whole, shared))
        return x + 0 * gates.sum()

    torch.compiler.reset()
    inputs = [factors, gates, *shared]
    truth = with_gradients(literal, [x.double() for x in inputs], dy)
    compiled = torch.compile(lambda *given: run(*given) + 0 * given[1].sum(), fullgraph=True, backend="aot_eager")
    for function in (lambda *given: run(*given) + 0 * given[1].sum(), compiled):
        for mine, true in zip(with_gradients(function, inputs, dy), truth):
            torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            torch.testing.assert_close(function(*inputs).double(), truth[0], rtol=1e-4, atol=1e-4)


def test_a_weighted_sum_is_rounded_once():
    """Of 16-bit numbers by float32 factors, a number or one a token: their sum in float64, rounded."""
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 3, 5, 8, generator=random).bfloat16().unbind()
    factors = torch.tensor(1.2345), torch.randn(3, 5, 1, generator=random)
    true = factors[0].double() * x.double() + factors[1].double() * y.double()
    found = weighted_sum(x, (factors[0], x), (factors[1], y))
    assert found.dtype == torch.bfloat16
    assert (found != true.bfloat16()).double().mean() < 0.01


def test_factors_of_layers_are_rows_or_one_a_token():
    lambdas_L3 = torch.arange(6.0).view(2, 3)
    rows = factors_of_layers(lambdas_L3, torch.zeros(2, 5, 4))
    assert torch.equal(torch.stack(list(rows)), lambdas_L3)


@interpreted
def test_what_gathers_the_gradients_keeps_torchs_contracts():
    (x, x00, x01, _), dy = draw()
    checks, factors = ("test_schema", "test_faketensor"), torch.ones(3, 2, 14)
    torch.library.opcheck(module._gather, ([dy, x, dy], [x00, x01], factors), test_utils=checks)
    for given, name in (
        (([dy, dy[:1]], [x00, x01], factors[:2]), "dy.1."),
        (([dy], [x00, x01], factors), "factors"),
        (([dy, dy.double()], [x00, x01], factors[:2]), "dy.1."),
        (([dy] * 3, [x00, x01.double()], factors), "shared.1."),
        (([dy] * 3, [x00, x01], factors.double()), "factors"),
        (([dy], [x00] * 4, torch.ones(1, 4, 14)), "4 shared"),
    ):
        with pytest.raises((ValueError, TypeError), match=name):
            module.launch_gather(*given)


def test_what_does_not_fit_is_refused():
    (x, x00, x01, lambdas), _ = draw()
    for wrong, name in (
        ((x, x00[:1], x01, lambdas), "x00"),
        ((x, x00, x01.double(), lambdas), "x01"),
        ((x, x00, x01, lambdas[:2]), "lambdas"),
        ((x, x00, x01, tuple(lambdas)), "lambdas"),
        ((x, x00, x01, [x[..., :1]] * 2), "three"),
    ):
        with pytest.raises(ValueError, match=name):
            residual_mix(*wrong)
    with pytest.raises(ValueError, match="impl"):
        residual_mix(x, x00, x01, lambdas, impl="cuda")
