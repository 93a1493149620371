"""RMS norm against float64 and against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from kernels.norm import rms_norm, rms_norm_reference


@pytest.mark.parametrize("shape", [(1, 7), (3, 1), (2, 5, 3, 16), (1, 300, 64)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_value_and_gradient(shape, scale):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * scale).requires_grad_()
    dy = torch.randn(shape, generator=generator)
    y = rms_norm(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    exact = x.detach().double().requires_grad_()
    truth = exact / (exact.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    (gradient,) = torch.autograd.grad(truth, exact, dy.double())
    plain = rms_norm_reference(x)
    (plain_dx,) = torch.autograd.grad(plain, x, dy)
    # where the gradient cancels (one column), its error is still that of the terms that cancel, of size dy / x
    for ours, theirs, exactly, size in ((y, plain, truth, 1), (dx, plain_dx, gradient, 1 / scale)):
        error, allowed = (ours - exactly).abs().max(), (theirs - exactly).abs().max()
        assert error <= 2 * allowed + 2e-6 * max(exactly.abs().max(), size)


def test_zero_rows_stay_finite_and_other_dtypes_are_torchs():
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x).sum().backward()
    assert torch.isfinite(x.grad).all()
    half = torch.randn(3, 8).bfloat16()
    assert torch.equal(rms_norm(half), F.rms_norm(half, (8,)))
    assert torch.autograd.gradcheck(rms_norm, torch.randn(3, 5, dtype=torch.float64, requires_grad=True))


def test_compiles_without_a_graph_break():
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 8)
    torch.testing.assert_close(compiled(x), rms_norm(x))
