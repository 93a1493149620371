"""The MLP and linear layers by products in 8 bits: errors against float64 beside those in 16 bits, scales that hold."""

import pytest
import torch

from kernels import mlp8, products8
from kernels.mlp import relu_squared_mlp_reference
from kernels.mlp8 import relu_squared_mlp_8
from kernels.norm import rms_norm_reference
from kernels.products8 import E4M3, E5M2
from kernels.runtime import INTERPRETED

#: Of torch.library.opcheck: its other checks compare results, which torch cannot where they are float8.
CHECKS = ("test_faketensor",)
WAYS = [pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")), "reference"]
N, D, F = 90, 64, 208


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def of_mlp(spread=1.0):
    """x as a norm leaves it, both weights, an upstream gradient; in bfloat16."""
    rows = torch.linspace(1 / spread, spread, F)[:, None]
    given = rms_norm_reference(draw(N, D)), draw(F, D, seed=1) * rows * D**-0.5, draw(D, F, seed=2) * F**-0.5
    return [x.bfloat16() for x in (*given, 1e-6 * draw(N, D, seed=3))]


def results(function, upstream, *leaves):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


def errors(found, truth):
    return [((x.double() - true).norm() / true.norm()).item() for x, true in zip(found, truth)]


@pytest.mark.parametrize("impl", WAYS)
def test_the_mlp_against_float64_beside_the_same_in_16_bits(impl):
    """A factor of 3 bits costs 2.6 % of the result's spread, both 4 %, squaring doubles it; the gradients have one more
    product behind them, by factors of 2 bits."""
    x, w_in, w_out, dy = of_mlp()
    truth = results(relu_squared_mlp_reference, dy.double(), *(t.double() for t in (x, w_in, w_out)))
    plain = errors(results(relu_squared_mlp_reference, dy, x, w_in, w_out), truth)
    found = results(lambda *given: relu_squared_mlp_8(*given, impl=impl), dy, x, w_in, w_out)
    for mine, usual, most in zip(errors(found, truth), plain, (0.08, 0.12, 0.12, 0.1)):
        assert 3 * usual < mine <= most
    assert [t.dtype for t in found] == [torch.bfloat16] * 4


def test_rows_of_very_different_size_keep_their_precision():
    """The one scale of the activation follows the longest row of w_in, 16 times the shortest."""
    x, w_in, w_out, dy = of_mlp(spread=4.0)
    truth = results(relu_squared_mlp_reference, dy.double(), *(t.double() for t in (x, w_in, w_out)))
    found = results(relu_squared_mlp_8, dy, x, w_in, w_out)
    assert max(errors(found, truth)) <= 0.12


def test_nothing_saturates_at_the_bounds():
    """x along a row of w_in, and dy along a column of w_out: both bounds are reached at once, and a result above."""
    x, w_in, w_out, _ = of_mlp()
    x[:] = 1.0
    w_in[3], w_out[:, 3], dy = 1.0, 1.0, torch.full((N, D), 1e-3).bfloat16()
    truth = results(relu_squared_mlp_reference, dy.double(), *(t.double() for t in (x, w_in, w_out)))
    assert max(errors(results(relu_squared_mlp_8, dy, x, w_in, w_out), truth)) <= 0.05


@pytest.mark.parametrize("impl", WAYS)
def test_a_row_of_nan_stays_a_row(impl):
    x, w_in, w_out, dy = of_mlp()
    usual = relu_squared_mlp_8(x, w_in, w_out, impl=impl)
    x[7] = torch.nan
    y, dx, dw_in, _ = results(lambda *given: relu_squared_mlp_8(*given, impl=impl), dy, x, w_in, w_out)
    others = torch.arange(N) != 7
    assert y[7].isnan().all() and torch.equal(y[others], usual[others])
    assert dx[7].isnan().any() and dx[others].isfinite().all() and dw_in.isnan().any()


@pytest.mark.parametrize("impl", WAYS)
def test_a_linear_layer_against_float64(impl):
    x, w, dy = draw(5, 14, D), draw(72, D, seed=1), 1e-6 * draw(5, 14, 72, seed=2)
    truth = results(lambda x, w: x @ w.t(), dy.double(), x.double(), w.double())
    found = results(lambda x, w: products8.linear(x, w, impl=impl), dy, x.bfloat16(), w)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for mine, most in zip(errors(found, truth), (0.045, 0.07, 0.07)):
        assert 0.01 < mine <= most
    bounded = products8.linear(x.clamp(-3, 3), w, of_x=3.0, impl=impl)
    assert errors([bounded], [x.clamp(-3, 3).double() @ w.double().t()])[0] <= 0.045


def test_sizes_that_16_does_not_divide_and_no_rows():
    x, w = draw(3, 19), draw(5, 19, seed=1)
    for found in (products8.linear(x, w), products8.linear(torch.cat([x, x]), w)[:3]):
        assert errors([found], [x.double() @ w.double().t()])[0] <= 0.08
    empty = results(products8.linear, torch.zeros(0, 5), x[:0], w)
    assert empty[0].shape == (0, 5) and (empty[2] == 0).all()
    x, w_in, w_out, _ = of_mlp()
    without_hidden = results(relu_squared_mlp_8, torch.ones(N, D), x, w_in[:0], w_out[:, :0])
    assert all((found == 0).all() for found in without_hidden)
    empty = results(relu_squared_mlp_8, torch.zeros(0, D), x[:0], w_in, w_out)
    assert empty[0].shape == (0, D) and all((g == 0).all() for g in empty[1:])


def test_compiled_they_are_one_graph():
    x, w_in, w_out, _ = of_mlp()

    def run(*given):
        return products8.linear(relu_squared_mlp_8(*given), w_in, of_x=40.0)

    torch._dynamo.reset()
    fused = torch.compile(run, fullgraph=True, backend="aot_eager")
    upstream = draw(N, F, seed=5)
    for got, wanted in zip(results(fused, upstream, x, w_in, w_out), results(run, upstream, x, w_in, w_out)):
        torch.testing.assert_close(got, wanted)


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
def test_the_operators_keep_their_contracts():
    for e5m2, turned in ((False, True), (True, False)):
        torch.library.opcheck(products8._in_8_bits, (draw(18, 20), torch.tensor(0.5), e5m2, turned), test_utils=CHECKS)
    a, b, act = (draw(*size).to(E4M3) for size in ((16, 32), (48, 32), (16, 48)))
    scales = torch.ones(3)
    torch.library.opcheck(mlp8._operator, (a, b, scales, None), test_utils=CHECKS)
    torch.library.opcheck(
        mlp8._operator, (a.float().to(E5M2), b, scales, act.float().abs().to(E4M3)), test_utils=CHECKS
    )


def test_wrong_arguments_are_named():
    x, w_in, w_out, _ = of_mlp()
    for call, word in (
        (lambda: relu_squared_mlp_8(x, w_in, w_out[:, :-1]), "w_out"),
        (lambda: products8.linear(x, w_in[:, :-1]), "w"),
        (lambda: products8.linear(x, w_in.to("meta")), "w"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
    with pytest.raises(TypeError, match="float64"):
        products8.linear(x.double(), w_in)
    with pytest.raises(RuntimeError, match="once only"):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(products8.linear(leaf, w_in).sum(), leaf, create_graph=True)
        dx.sum().backward()
