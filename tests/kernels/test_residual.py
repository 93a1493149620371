"""The residual mix: value and all four gradients against float64, dtypes, compilation, errors."""

import pytest
import torch

from kernels.residual import factors_of_layers, residual_mix, residual_mix_reference


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


def test_factors_of_layers_mean_the_same_for_the_compiler():
    """One number a layer, or one a token: the same stream and the same gradients, those of the factors as (L, 3)."""
    (x, x00, x01, lambdas), dy = draw()
    lambdas_L3 = torch.stack([lambdas, lambdas.flip(0), -lambdas])

    def run(x, x00, x01, lambdas_L3):
        for factors in factors_of_layers(lambdas_L3, x):
            x = residual_mix(x, x00, x01, factors)
        return x

    inputs = [x, x00, x01, lambdas_L3]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, plain in zip(with_gradients(compiled, inputs, dy), with_gradients(run, inputs, dy)):
        torch.testing.assert_close(mine, plain)


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
