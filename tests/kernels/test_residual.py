"""The residual mix: value and all four gradients against float64, dtypes, compilation, errors."""

import pytest
import torch

import kernels.residual as module
from kernels.residual import factors_of_layers, mixes_of_layers, residual_mix, residual_mix_reference
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
def test_mixes_of_layers_mean_the_same_for_the_compiler(impl):
    """Layer by layer, or with the embeddings' gradients left to the end: the same stream, and the same gradients. It
    begins as the model's does, with the first embedding."""
    (_, x00, x01, lambdas), dy = draw()
    lambdas_L3 = torch.stack([lambdas, lambdas.flip(0), -lambdas])

    def run(x00, x01, lambdas_L3):
        x = x00
        for mix in mixes_of_layers(lambdas_L3, x00, x01, impl=impl):
            x = mix(x)
        return x

    inputs = [x00, x01, lambdas_L3]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, plain in zip(with_gradients(compiled, inputs, dy), with_gradients(run, inputs, dy)):
        torch.testing.assert_close(mine, plain)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*inputs), run(*inputs))


def test_factors_of_layers_are_rows_or_one_a_token():
    lambdas_L3 = torch.arange(6.0).view(2, 3)
    rows = factors_of_layers(lambdas_L3, torch.zeros(2, 5, 4))
    assert torch.equal(torch.stack(list(rows)), lambdas_L3)


@interpreted
def test_what_gathers_the_gradients_keeps_torchs_contracts():
    (x, x00, x01, _), dy = draw()
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(module._gather, ([dy, x, dy], x00, x01, torch.ones(3, 2)), test_utils=checks)
    for wrong, name in (([dy, dy[:1]], "dy.1."), ([dy], "factors"), ([dy, dy.double()], "dy.1.")):
        with pytest.raises((ValueError, TypeError), match=name):
            module.launch_gather(wrong, x00, x01, torch.ones(2, 2))


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
