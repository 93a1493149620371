"""The MLP: every way against float64 with all gradients, its shapes, and what it keeps for the backward pass."""

import pytest
import torch

from kernels import mlp as module
from kernels.mlp import normed_mlp, relu_squared_mlp, relu_squared_mlp_reference
from kernels.norm import rms_norm_reference
from kernels.runtime import INTERPRETED

WAYS = [pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")), "reference"]


def draw(N=45, D=20, F=70):
    random = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=random) for shape in ((N, D), (F, D), (D, F), (N, D))]


def with_gradients(run, x, w_in, w_out, dy):
    leaves = [t.detach().requires_grad_() for t in (x, w_in, w_out)]
    y = run(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("shape", [(45, 20, 70), (1, 3, 5), (64, 32, 128)])
def test_against_float64(impl, shape):
    inputs = draw(*shape)
    truth = with_gradients(relu_squared_mlp_reference, *(t.double() for t in inputs))
    same = with_gradients(relu_squared_mlp_reference, *inputs)
    ours = with_gradients(lambda *a: relu_squared_mlp(*a, impl=impl), *inputs)
    again = with_gradients(lambda *a: relu_squared_mlp(*a, impl=impl), *inputs)
    for name, true, usual, mine, twin in zip(("y", "dx", "dw_in", "dw_out"), truth, same, ours, again):
        assert (mine - true).abs().max() <= 2 * (usual - true).abs().max() + 4e-6 * true.abs().max(), name
        assert torch.equal(mine, twin), name


@pytest.mark.parametrize("impl", WAYS)
def test_with_norm_and_residual_against_float64(impl):
    """Rows of very different lengths: the norm's factor is taken on the product's result, and has to be each row's."""

    def reference(x, w_in, w_out):
        return x + relu_squared_mlp_reference(rms_norm_reference(x), w_in, w_out)

    x, *others = draw()
    inputs = x * torch.logspace(-3, 3, len(x))[:, None], *others
    truth = with_gradients(reference, *(t.double() for t in inputs))
    same = with_gradients(reference, *inputs)
    ours = with_gradients(lambda *a: normed_mlp(*a, impl=impl), *inputs)
    for name, true, usual, mine in zip(("y", "dx", "dw_in", "dw_out"), truth, same, ours):
        errors = [(t.double() - true).norm(dim=-1) for t in (mine, usual)]
        assert (errors[0] <= 2 * errors[1] + 4e-6 * true.norm(dim=-1)).all(), name


@pytest.mark.parametrize("impl", WAYS)
def test_nothing_passes_where_the_activation_is_off(impl):
    x, w_in, w_out, dy = draw()
    y, dx, dw_in, dw_out = with_gradients(lambda *a: relu_squared_mlp(*a, impl=impl), x.abs(), -w_in.abs(), w_out, dy)
    assert all((t == 0).all() for t in (y, dx, dw_in, dw_out))


@pytest.mark.parametrize("impl", WAYS)
def test_leading_axes_and_views(impl):
    x, w_in, w_out, _ = draw(N=24)
    y = relu_squared_mlp(x, w_in, w_out, impl=impl)
    assert torch.equal(relu_squared_mlp(x.view(2, 3, 4, 20), w_in, w_out, impl=impl), y.view(2, 3, 4, 20))
    turned = relu_squared_mlp(x.t().contiguous().t(), w_in.t().contiguous().t(), w_out, impl=impl)
    torch.testing.assert_close(turned, y)


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("mlp", [relu_squared_mlp, normed_mlp])
def test_compiles_without_a_graph_break(impl, mlp):
    inputs = draw()

    def run(*a):
        return mlp(*a, impl=impl)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, plain in zip(with_gradients(compiled, *inputs), with_gradients(run, *inputs)):
        assert (mine - plain).norm() <= 1e-6 * plain.norm()


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
def test_the_operator_keeps_its_contract_and_only_the_squared_activation():
    x, w_in, w_out, dy = draw(N=9)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(module._mlp, (x, w_in, w_out), test_utils=checks)
    a, r = module.launch_normed_activation(x, w_in)
    torch.library.opcheck(module._mlp_backward, (dy, x, w_in, w_out, a), test_utils=checks)
    torch.library.opcheck(module._normed_mlp, (x, w_in, w_out), test_utils=checks)
    torch.library.opcheck(module._normed_mlp_backward, (dy, x, w_in, w_out, a, r), test_utils=checks)
    kept = []

    def keep(t):
        kept.append(tuple(t.shape))
        return t

    leaves = [t.requires_grad_() for t in (x, w_in, w_out)]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        relu_squared_mlp(*leaves, impl="triton")
    assert sorted(kept) == sorted([(9, 20), (70, 20), (20, 70), (9, 70)])


def test_gradcheck_and_errors():
    x, w_in, w_out, _ = (t.double().requires_grad_() for t in draw(4, 3, 5))
    assert torch.autograd.gradcheck(relu_squared_mlp, (x, w_in, w_out))
    for wrong in ((x[:, :2], w_in, w_out), (x, w_in, w_in), (x, w_in[:3], w_out)):
        with pytest.raises(ValueError, match="w_in"):
            relu_squared_mlp(*wrong)
    with pytest.raises(ValueError, match="impl"):
        relu_squared_mlp(x, w_in, w_out, impl="cuda")
