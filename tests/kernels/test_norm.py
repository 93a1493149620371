"""RMS norm against float64 and against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from kernels.norm import _CompiledRMSNorm, rms_norm, rms_norm_reference


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
    x, dy = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    torch.testing.assert_close(compiled(x), rms_norm(x))
    gradients = [torch.autograd.grad(run(x), x, dy)[0] for run in (compiled, rms_norm)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_compiled_is_as_near_to_float64_as_torchs(dtype):
    generator = torch.Generator().manual_seed(3)
    x, dy = (torch.randn(50, 96, generator=generator).mul(3).to(dtype) for _ in range(2))
    x.requires_grad_()
    exact = x.detach().double().requires_grad_()
    truth = exact / (exact.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    (right,) = torch.autograd.grad(truth, exact, dy.double())
    errors = []
    for run in (_CompiledRMSNorm.apply, rms_norm_reference):
        y = run(x)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert y.dtype == dx.dtype == dtype
        errors.append([(y - truth).norm().item(), (dx - right).norm().item()])
    assert errors[0][0] <= 1.1 * errors[1][0] and errors[0][1] <= 1.5 * errors[1][1], errors


def test_compiled_the_norms_result_is_kept_in_place_of_its_input():
    """Between forward and backward lives the result, which the next product keeps anyway."""
    kept = []

    def run(x, a, w):
        return rms_norm(x @ a) @ w

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager_decomp_partition")
    x, a, w = (torch.randn(shape, requires_grad=True) for shape in ((64, 5), (5, 16), (16, 8)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        compiled(x, a, w)
    (of_its_size,) = (t for t in kept if t.shape == (64, 16))
    torch.testing.assert_close(of_its_size, rms_norm(x @ a))
