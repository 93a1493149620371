"""What only a GPU can show about attention: the compiled kernels' numbers, at sizes the interpreter cannot reach."""

import pytest
import torch

from kernels.attention import attention, attention_inputs, attention_plan, attention_reference
from kernels.attention_gluon import WIDTHS
from kernels.proof import TOLERANCE
from kernels.runtime import device_kind

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]
SCALE = 0.12


def draw(B, T, H, K, width, dtype):
    random = torch.Generator(device="cuda").manual_seed(0)
    return [torch.randn(B, T, h, width, generator=random, device="cuda").to(dtype) for h in (H, K, K, H)]


def with_gradients(run, inputs, do):
    leaves = [x.detach().requires_grad_() for x in inputs]
    o = run(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("B, T, H, K, width", [(1, 1000, 4, 4, 128), (2, 2049, 4, 2, 64), (1, 130, 2, 2, 32)])
@pytest.mark.parametrize("window", [{}, {"window_blocks": 1}, {"window_blocks": 5}, {"window_tokens": 300}])
def test_against_float64(B, T, H, K, width, dtype, window):
    tokens = torch.randint(0, 200, (B, T), generator=torch.Generator().manual_seed(1)).cuda()
    plan = attention_plan(tokens, eos_id=0, **window)
    *inputs, do = draw(B, T, H, K, width, dtype)

    def reference(q, k, v):
        return attention_reference(q, k, v, plan, scale=SCALE)

    truth = with_gradients(reference, [x.double() for x in inputs], do)
    same = with_gradients(reference, inputs, do)
    got = with_gradients(lambda q, k, v: attention(q, k, v, plan, scale=SCALE), inputs, do)
    again = with_gradients(lambda q, k, v: attention(q, k, v, plan, scale=SCALE), inputs, do)
    for name, true, usual, mine, twin in zip(("o", "dq", "dk", "dv"), truth, same, got, again):
        allowed = 2 * (usual.double() - true).abs().max() + TOLERANCE[dtype] * true.abs().max().clamp(min=1)
        error = (mine.double() - true).abs().max()
        assert error <= allowed, f"{name}: {error} > {allowed}"
        assert torch.equal(mine, twin), f"{name}: two runs differ"


@pytest.mark.skipif(torch.cuda.is_available() and device_kind() != "sm_90", reason="needs Hopper (sm_90)")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T, H, K, width", [(65536, 8, 8, 128), (2049, 4, 2, 64), (130, 2, 2, 32)])
@pytest.mark.parametrize("window", [{}, {"window_blocks": 1}, {"window_blocks": 27}])
@pytest.mark.parametrize("impl", ["specialised", "gluon"])
def test_kernels_for_hopper_are_as_near_as_the_plain_one(impl, T, H, K, width, dtype, window):
    """Against float64 where that fits, and everywhere against the plain kernel; a race would differ from run to run."""
    if impl == "gluon" and width not in WIDTHS:
        pytest.skip("the Gluon kernel is for widths of 64 and 128")
    tokens = torch.randint(0, 700, (1, T), generator=torch.Generator().manual_seed(1)).cuda()
    plan = attention_plan(tokens, eos_id=0, **window)
    q, k, v, _ = draw(1, T, H, K, width, dtype)
    plain, mine, again = (attention(q, k, v, plan, scale=SCALE, impl=which) for which in ("triton", impl, impl))
    assert torch.equal(mine, again), "two runs differ"
    if T > 4096:
        torch.testing.assert_close(mine, plain, rtol=2e-2, atol=TOLERANCE[dtype])
        return
    truth = attention_reference(q.double(), k.double(), v.double(), plan, scale=SCALE)
    usual, error = ((x.double() - truth).square().mean().sqrt() for x in (plain, mine))
    assert error <= 1.1 * usual + 1e-6, f"{error} of the {impl} kernel, {usual} of the plain one"


@pytest.mark.skipif(torch.cuda.is_available() and device_kind() != "sm_90", reason="needs Hopper (sm_90)")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("T, H, K, width", [(65536, 8, 8, 128), (2049, 4, 2, 64), (130, 2, 2, 128)])
@pytest.mark.parametrize("window", [{}, {"window_blocks": 1}, {"window_blocks": 27}])
@pytest.mark.parametrize("impl", ["gluon", "gluon_one_pass"])
def test_gradients_for_hopper_are_as_near_as_the_plain_ones(impl, T, H, K, width, dtype, window):
    """As for outputs. They repeat to the bit, but dq in one pass: summed in no fixed order, it differs by its float32
    sums."""
    tokens = torch.randint(0, 700, (1, T), generator=torch.Generator().manual_seed(1)).cuda()
    plan = attention_plan(tokens, eos_id=0, **window)
    *inputs, do = draw(1, T, H, K, width, dtype)
    plain, mine, again = (
        with_gradients(lambda q, k, v, which=which: attention(q, k, v, plan, scale=SCALE, impl=which), inputs, do)
        for which in ("triton", impl, impl)
    )
    for name, x, twin in zip(("o", "dq", "dk", "dv"), mine, again):
        if name == "dq" and impl == "gluon_one_pass":
            torch.testing.assert_close(x, twin, rtol=2e-2, atol=TOLERANCE[dtype])
        else:
            assert torch.equal(x, twin), f"{name}: two runs differ"
    if T > 4096:
        for x, usual in zip(mine, plain):
            torch.testing.assert_close(x, usual, rtol=2e-2, atol=4 * TOLERANCE[dtype])
        return

    def reference(q, k, v):
        return attention_reference(q, k, v, plan, scale=SCALE)

    truth = with_gradients(reference, [x.double() for x in inputs], do)
    for name, true, usual, x in zip(("o", "dq", "dk", "dv"), truth, plain, mine):
        allowed, error = ((y.double() - true).square().mean().sqrt() for y in (usual, x))
        assert error <= 1.1 * allowed + 1e-6, f"{name}: {error} of {impl}, {allowed} of the plain kernels"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prologue_against_the_reference(dtype):
    q, k, v, _ = draw(2, 777, 4, 4, 128, dtype)
    ve, s = torch.randn_like(v), torch.tensor([0.5, 0.5], device="cuda")
    angle = torch.arange(777, device="cuda")[:, None] * torch.linspace(0, 1, 64, device="cuda")
    out = {
        impl: attention_inputs(q, k, v, ve, s, angle.cos(), angle.sin(), impl=impl) for impl in ("triton", "reference")
    }
    for mine, usual in zip(out["triton"], out["reference"]):
        torch.testing.assert_close(mine, usual, rtol=2e-2, atol=TOLERANCE[dtype] * 4)


def test_compiled_with_a_growing_window():
    import torch._dynamo.testing

    *inputs, do = draw(1, 4096, 4, 4, 128, torch.bfloat16)
    tokens = torch.randint(0, 700, (1, 4096), device="cuda")

    def loss(tokens, window, q, k, v):
        plan = attention_plan(tokens, eos_id=0, window_blocks=window)
        return (attention(q, k, v, plan, scale=SCALE) * do).sum()

    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for window in (1, 3, 9):
        w = torch.tensor(window, device="cuda")
        torch.testing.assert_close(compiled(tokens, w, *inputs), loss(tokens, w, *inputs), rtol=1e-3, atol=1e-2)
    assert counter.frame_count == 1
