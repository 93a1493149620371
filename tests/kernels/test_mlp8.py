"""The MLP and linear layers by products in 8 bits: errors against float64 beside those in 16 bits, scales that hold."""

import functools
import math

import pytest
import torch

from kernels import mlp8, products8
from kernels.mlp import relu_squared_mlp_reference
from kernels.mlp8 import added_linear_8, normed_linear_8, normed_mlp_8, relu_squared_mlp_8
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
@pytest.mark.parametrize("with_weights", [True, False])
def test_norm_and_residual_against_float64(impl, with_weights):
    """The stream's own part is exact but for one rounding, so that errors are those of the MLP's part alone."""
    _, w_in, w_out, _ = of_mlp()
    s, dy = (3 * draw(N, D, seed=4)).bfloat16(), (1e-6 * draw(N, D, seed=3)).bfloat16()
    eight = tuple(products8.weights_in_8_bits([w], axis, impl)[0] for axis, w in ((1, w_in), (0, w_out)))
    stream = lambda s, *ws: s + relu_squared_mlp_reference(rms_norm_reference(s), *ws)  # noqa: E731
    truth = results(stream, dy.double(), *(t.double() for t in (s, w_in, w_out)))
    how = dict(weights=eight if with_weights else None, impl=impl)
    found = results(lambda *given: normed_mlp_8(*given, **how), dy, s, w_in, w_out)
    assert [t.dtype for t in found] == [torch.bfloat16] * 4
    for mine, true in zip(found, truth):
        assert 0 < (mine.double() - true).norm() <= 0.12 * true.norm()
    assert errors([found[0].double() - s.double()], [truth[0] - s.double()])[0] <= 0.1


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("with_weight", [True, False])
def test_a_linear_layer_beside_a_residual_against_float64(impl, with_weight):
    """The residual comes through exactly; a bound instead of a measured number costs little."""
    residual, x, w = draw(5, 14, 72), draw(5, 14, D, seed=1), draw(72, D, seed=2) * D**-0.5
    dy, (eight,) = 1e-6 * draw(5, 14, 72, seed=3), products8.weights_in_8_bits([w], 1, impl)
    truth = results(lambda r, x, w: r + x @ w.t(), dy.double(), residual.double(), x.double(), w.double())
    for bound in (0.0, torch.tensor(40.0)):
        how = dict(of_x=bound, weight=eight if with_weight else None, impl=impl)
        found = results(functools.partial(added_linear_8, **how), dy, residual, x, w)
        assert torch.equal(found[1], dy)
        assert errors([found[0] - residual], [truth[0] - residual.double()])[0] <= 0.05
        for mine, true in zip(found[2:], truth[2:]):
            assert 0.01 < errors([mine], [true])[0] <= 0.07
    residual[2, 3] = torch.nan
    spoiled = added_linear_8(residual, x, w, impl=impl)
    assert spoiled[2, 3].isnan().all() and spoiled.isnan().sum() == 72


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("with_weight", [True, False])
def test_a_linear_layer_behind_a_norm_against_float64(impl, with_weight):
    """Both results, and gradients through both: the norm's first columns are not in 8 bits."""
    x, w = 3 * draw(5, 14, D), draw(72, D, seed=1) * D**-0.5
    dy, dfirst = 1e-6 * draw(5, 14, 72, seed=2), 1e-6 * draw(5, 14, 6, seed=3)
    eight = products8.weights_in_8_bits([w], 1, impl)[0] if with_weight else None
    true = [x.double().requires_grad_(), w.double().requires_grad_()]
    y = true[0] * torch.rsqrt(true[0].square().mean(-1, keepdim=True))
    right = [y @ true[1].t(), y[..., :6]]
    right += torch.autograd.grad(right, true, [dy.double(), dfirst.double()])
    given = [x.requires_grad_(), w.requires_grad_()]
    found = list(normed_linear_8(x, w, 6, weight=eight, impl=impl))
    found += torch.autograd.grad(found, given, [dy, dfirst])
    assert errors([found[1]], [right[1]])[0] <= 1e-5
    for place in (0, 2, 3):
        assert 0.01 < errors([found[place]], [right[place]])[0] <= 0.07
    with torch.no_grad():
        x[2, 3] = torch.nan
        spoiled, first = normed_linear_8(x, w, 6, impl=impl)
    assert spoiled[2, 3].isnan().all() and spoiled.isnan().sum() == 72 and first.isnan().sum() == 6


@pytest.mark.parametrize("impl", WAYS)
def test_a_row_of_nan_in_the_stream_stays_a_row(impl):
    x, w_in, w_out, dy = of_mlp()
    usual = results(lambda *given: normed_mlp_8(*given, impl=impl), dy, x, w_in, w_out)
    x[7], x[9, 3] = torch.nan, torch.inf
    y, dx, *_ = results(lambda *given: normed_mlp_8(*given, impl=impl), dy, x, w_in, w_out)
    others = [n for n in range(N) if n not in (7, 9)]
    assert y[7].isnan().all() and not y[9].isfinite().any()
    assert torch.equal(y[others], usual[0][others])
    assert dx[7].isnan().any() and torch.equal(dx[others], usual[1][others])


@pytest.mark.parametrize("impl", WAYS)
def test_all_weights_together_are_each_on_its_own(impl):
    """Scale, values and norms of each, a power of two and finite however spoiled another one is."""
    ws = [draw(40, 24, seed=n).bfloat16() * 10.0**n for n in range(4)]
    ws[1][3, 5], ws[1][7, 0], ws[2][:] = torch.nan, -torch.inf, 0.0
    for axis in (0, 1):
        for found, w in zip(products8.weights_in_8_bits(ws, axis, impl), ws):
            right = products8.weight_reference(w, axis)
            finite = w.double().where(w.isfinite(), 0.0)
            longest = finite.norm(dim=axis).max()
            assert found.eight.scale == products8.scale_for(w) and torch.log2(found.eight.scale) % 1 == 0
            assert abs(found.longest.double() - longest) <= 1e-6 * longest
            most = (w.shape[axis] * longest**2).clamp(min=448 * 2.0**-126)
            assert 224 < most / found.of_squares <= 448 and torch.log2(found.of_squares) % 1 == 0
            for mine, wanted in zip(found.tensors()[:2], right.tensors()[:2]):
                assert torch.equal(mine.view(torch.uint8), wanted.view(torch.uint8)) or mine.float().isnan().any()
            assert torch.equal(found.eight.values.t().float().nan_to_num(), found.turned.values.float().nan_to_num())
            assert found.eight.values.float().isnan().sum() == (~w.isfinite()).sum()
    for largest in (448.0, 449.0, 1e-30, 1.75 * 2.0**40, 3e38):
        w = torch.full((16, 16), largest)
        assert products8.weights_in_8_bits([w], 1, impl)[0].eight.scale == 2.0 ** max(
            -126, math.ceil(math.log2(w[0, 0].double().item() / 448))
        ), largest


@pytest.mark.parametrize("impl", WAYS)
def test_a_factor_of_a_weight_goes_into_its_scale(impl):
    """The same 8 bits, whose product is that of the multiple; a number below zero and none at all too."""
    ws, factors = [draw(40, 24, seed=n) for n in range(3)], torch.tensor([0.3, -2.0, 0.0])
    plain = products8.weights_in_8_bits(ws, 1, impl)
    for found, usual, factor in zip(products8.weights_in_8_bits(ws, 1, impl, factors), plain, factors):
        assert torch.equal(found.eight.values.float(), usual.eight.values.float())
        assert found.longest == usual.longest and found.of_squares == usual.of_squares
        for mine, other in zip(found[:2], usual[:2]):
            torch.testing.assert_close(mine.plain(), factor * other.plain())
    with pytest.raises(ValueError, match="factors"):
        products8.weights_in_8_bits(ws, 1, impl, factors[:2])


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
    scales, act_turned = [torch.ones(()) for _ in range(4)], act.t().float().abs().to(E4M3)
    torch.library.opcheck(mlp8._operator, (a, scales[0], b, *scales[1:3], None, None), test_utils=CHECKS)
    backward = a.float().to(E5M2), scales[0], b, *scales[1:3], act_turned, scales[3]
    torch.library.opcheck(mlp8._operator, backward, test_utils=CHECKS)
    torch.library.opcheck(mlp8._added, (a, scales[0], b, scales[1], draw(13, 45)), test_utils=CHECKS)
    torch.library.opcheck(mlp8._normed, (draw(18, 20), torch.tensor(0.5)), test_utils=CHECKS)
    for axis in (0, 1):
        torch.library.opcheck(products8._weights, ([draw(18, 20), draw(18, 20, seed=1)], axis), test_utils=CHECKS)


def test_wrong_arguments_are_named():
    x, w_in, w_out, _ = of_mlp()
    for call, word in (
        (lambda: relu_squared_mlp_8(x, w_in, w_out[:, :-1]), "w_out"),
        (lambda: products8.linear(x, w_in[:, :-1]), "w"),
        (lambda: products8.linear(x, w_in.to("meta")), "w"),
        (lambda: added_linear_8(x[:-1], x, w_in), "residual"),
        (lambda: added_linear_8(x, x, w_in), "residual"),
        (lambda: products8.weights_in_8_bits([w_in, w_out]), "a weight"),
        (lambda: products8.weights_in_8_bits([w_in], 2), "axis=2"),
    ):
        with pytest.raises(ValueError, match=word):
            call()
    with pytest.raises(TypeError, match="float64"):
        products8.linear(x.double(), w_in)
    with pytest.raises(RuntimeError, match="once only"):
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(products8.linear(leaf, w_in).sum(), leaf, create_graph=True)
        dx.sum().backward()


@pytest.mark.parametrize("impl", WAYS)
def test_rows_that_no_program_holds_are_refused_by_the_kernels_alone(impl):
    x, w = torch.ones(2, mlp8._WIDEST + 16), torch.zeros(16, mlp8._WIDEST + 16)
    if impl == "reference":
        assert torch.equal(normed_mlp_8(x, w, w.t(), impl=impl), x)
        assert not normed_linear_8(x, w, impl=impl)[0].any()
        return
    for run in (lambda: normed_mlp_8(x, w, w.t(), impl=impl), lambda: normed_linear_8(x, w, impl=impl)):
        with pytest.raises(ValueError, match="do not fit"):
            run()
