"""attention: every implementation against float64, gradients included; compilation, determinism, errors.

The Triton kernels run here in the interpreter through the public function; their grid of cases, with every
address checked, is in kernels/proof/families/attention.py and runs in test_proof.py.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import kernels.attention as module
from kernels.attention import attention, attention_plan, attention_reference, implementation
from kernels.proof import TOLERANCE
from kernels.runtime import INTERPRETED

EOS = 0
SCALE = 0.12
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton is imported")

LAYOUTS = {
    "one token documents": lambda T: range(T),
    "a document ends at a block border": lambda T: (0, 128, 256),
    "one document": lambda T: (),
    "short and long": lambda T: (0, 1, 2, 60, T - 1),
    "random": lambda T: torch.randperm(T, generator=torch.Generator().manual_seed(T))[: max(T // 50, 1)].tolist(),
}


def tokens_of(T, starts):
    tokens = torch.ones(T, dtype=torch.int32)
    tokens[[s for s in starts if 0 <= s < T]] = EOS
    return tokens


def draw(B, T, H, K, width, dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(B, T, h, width, generator=random).to(dtype) for h in (H, K, K, H)]


def with_gradients(run, q, k, v, do):
    """[o, dq, dk, dv] of o = run(q, k, v)."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = run(*leaves)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(o.dtype))]


def compare(impl, plan, q, k, v, do):
    """Error against float64 at most twice the same-dtype reference's, plus the table's tolerance; NaN fails."""
    truth = with_gradients(lambda *x: attention_reference(*x, plan, scale=SCALE), *(x.double() for x in (q, k, v, do)))
    same = with_gradients(lambda *x: attention_reference(*x, plan, scale=SCALE), q, k, v, do)
    got = with_gradients(lambda *x: attention(*x, plan, scale=SCALE, impl=impl), q, k, v, do)
    for name, true, usual, mine in zip(("o", "dq", "dk", "dv"), truth, same, got):
        assert mine.dtype == q.dtype and mine.shape == true.shape
        tolerance = TOLERANCE.get(q.dtype, 1e-14) * max(true.abs().max().item(), 1)
        allowed = 2 * (usual.double() - true).abs().max().item() + tolerance
        error = (mine.double() - true).abs().max().item()
        assert error <= allowed, f"{name}: {error} > {allowed}"


@pytest.mark.parametrize("window", [{}, {"window_blocks": 1}, {"window_blocks": 2}, {"window_tokens": 70}])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", [1, 127, 128, 129, 300])
def test_banded(T, layout, window):
    plan = attention_plan(tokens_of(T, LAYOUTS[layout](T)), eos_id=EOS, **window)
    compare("banded", plan, *draw(1, T, 2, 2, 16, torch.float32))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B, H, K, width", [(2, 4, 2, 64), (1, 3, 1, 128), (2, 2, 2, 24)])
def test_banded_shapes_and_dtypes(B, H, K, width, dtype):
    tokens = torch.randint(0, 60, (B, 200), generator=torch.Generator().manual_seed(3))
    plan = attention_plan(tokens, eos_id=EOS, window_blocks=2)
    compare("banded", plan, *draw(B, 200, H, K, width, dtype))


def test_banded_gradient_by_finite_differences():
    plan = attention_plan(tokens_of(9, (0, 4)), eos_id=EOS, window_tokens=3)
    q, k, v, _ = draw(1, 9, 2, 1, 4, torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: attention(*x, plan, scale=SCALE, impl="banded"), leaves)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_banded_on_random_layouts(data):
    T = data.draw(st.integers(1, 400))
    starts = data.draw(st.sets(st.integers(0, T - 1), max_size=30))
    window = data.draw(st.sampled_from([{}, {"window_blocks": 0}, {"window_blocks": 2}, {"window_tokens": 5}]))
    plan = attention_plan(tokens_of(T, starts), eos_id=EOS, **window)
    compare("banded", plan, *draw(1, T, 2, 1, 16, torch.float32, seed=T))


@interpreted
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_triton_on_random_layouts(data):
    T = data.draw(st.integers(1, 170))
    starts = data.draw(st.sets(st.integers(0, T - 1), max_size=8))
    window = data.draw(st.sampled_from([{}, {"window_blocks": 1}, {"window_tokens": 40}]))
    plan = attention_plan(tokens_of(T, starts), eos_id=EOS, **window)
    compare("triton", plan, *draw(1, T, 1, 1, 16, torch.float32, seed=T))


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("window", [{}, {"window_blocks": 1}, {"window_blocks": 2}, {"window_blocks": 3}])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T, H, K, width", [(1, 1, 1, 64), (129, 2, 1, 64), (300, 1, 1, 128), (520, 2, 2, 16)])
def test_triton_grid(T, H, K, width, layout, window):
    plan = attention_plan(tokens_of(T, LAYOUTS[layout](T)), eos_id=EOS, **window)
    compare("triton", plan, *draw(1, T, H, K, width, torch.float32))


@interpreted
@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_triton_search(data):
    T = data.draw(st.integers(1, 400))
    starts = data.draw(st.sets(st.integers(0, T - 1), max_size=20))
    window = data.draw(st.sampled_from([{}, {"window_blocks": 2}, {"window_tokens": data.draw(st.integers(1, T))}]))
    plan = attention_plan(tokens_of(T, starts), eos_id=EOS, **window)
    compare("triton", plan, *draw(1, T, 2, 1, 16, torch.float32, seed=T))


@interpreted
def test_triton_without_batch_and_uncontiguous():
    """(T, H, Dh) views into a merged projection give what (1, T, H, Dh) copies give."""
    merged = torch.randn(90, 6, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = merged.chunk(3, dim=1)
    plan = attention_plan(tokens_of(90, (0, 33)), eos_id=EOS, window_blocks=1)
    for impl in ("triton", "banded"):
        flat = attention(q, k, v, plan, scale=SCALE, impl=impl)
        full = attention(*(x[None].clone() for x in (q, k, v)), plan, scale=SCALE, impl=impl)
        assert flat.shape == q.shape and torch.equal(flat, full[0])


def test_masked_keys_do_not_matter():
    """Changing a key and value that a query may not see leaves its output's bits alone."""
    plan = attention_plan(tokens_of(300, (0, 100)), eos_id=EOS, window_blocks=1)
    q, k, v, _ = draw(1, 300, 1, 1, 16, torch.float32)
    for impl in ("banded", "reference"):
        before = attention(q, k, v, plan, scale=SCALE, impl=impl)
        k2, v2 = k.clone(), v.clone()
        k2[:, 150], v2[:, 150] = 100.0, -100.0
        after = attention(q, k2, v2, plan, scale=SCALE, impl=impl)
        changed = (before != after).any(-1)[0, :, 0]
        assert changed.nonzero().flatten().tolist() == list(range(150, 256))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("T, K", [(256, 2), (300, 1)])
def test_flex_forward(T, K):
    """FlexAttention has no backward on a CPU, so only its output is compared here."""
    plan = attention_plan(tokens_of(T, (0, 5, 128, 200)), eos_id=EOS, window_blocks=2)
    q, k, v, _ = draw(1, T, 2, K, 16, torch.float32)
    expected = attention_reference(q, k, v, plan, scale=SCALE)
    torch.testing.assert_close(attention(q, k, v, plan, scale=SCALE, impl="flex"), expected)


@pytest.mark.parametrize("impl", ["banded", pytest.param("triton", marks=interpreted)])
def test_two_runs_give_the_same_bits(impl):
    T = 260 if impl == "banded" else 140
    plan = attention_plan(tokens_of(T, (0, 50, 51)), eos_id=EOS, window_blocks=2)
    inputs = draw(1, T, 4, 2, 16, torch.float32)
    first, second = (with_gradients(lambda *x: attention(*x, plan, scale=SCALE, impl=impl), *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("impl", ["banded", pytest.param("triton", marks=interpreted)])
def test_compiled_without_a_break_and_growing_without_recompiling(impl):
    import torch._dynamo.testing

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(tokens, window, q, k, v, do):
        plan = attention_plan(tokens, eos_id=EOS, window_blocks=window)
        return (attention(q, k, v, plan, scale=SCALE, impl=impl) * do).sum()

    T = 300 if impl == "banded" else 140
    tokens = tokens_of(T, (0, 40))[None]
    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    q, k, v, do = draw(1, T, 2, 1, 16, torch.float32)
    for window in (1, 2, 3):
        grads = []
        for run in (compiled, loss):
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            grads.append(torch.autograd.grad(run(tokens, torch.tensor(window), *leaves, do), leaves))
        assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert counter.frame_count == 1


def test_plan_compiled_for_the_cpu():
    """Inductor's own code, where `position // block * block` once lost the ragged last block."""
    torch._dynamo.reset()

    def plan(tokens, window):
        return attention_plan(tokens, eos_id=EOS, window_blocks=window)

    tokens = torch.randint(0, 40, (2, 333), generator=torch.Generator().manual_seed(0))
    compiled = torch.compile(plan, fullgraph=True)
    for window in (1, 2, 4):
        got, expected = compiled(tokens, torch.tensor(window)), plan(tokens, window)
        assert all(torch.equal(a, b) for a, b in zip(got[:4], expected[:4]))


@interpreted
def test_operator_contracts():
    """Fake, autograd and schema of the operators, by torch's own checker."""
    plan = attention_plan(tokens_of(20, (0, 7)), eos_id=EOS, window_blocks=1)
    q, k, v, _ = draw(1, 20, 2, 1, 16, torch.float32)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(module._attention, (*leaves, *plan[:4], SCALE, "specialised"), test_utils=tests)
    with torch.no_grad():
        o, lse = module._attention(*leaves, *plan[:4], SCALE, "triton")
        given = o, *(x.detach() for x in leaves), o.clone(), lse, *plan[:4], SCALE, "triton"
        torch.library.opcheck(module._attention_backward, given, test_utils=tests[:2])
    torch.library.opcheck(
        torch.ops.speedrun.banded_attention.default, (*leaves, plan.first_key_BT, SCALE), test_utils=tests
    )


def test_what_runs():
    assert implementation("auto", torch.zeros(1)) == "banded"
    for name in ("flex", "reference", "banded"):
        assert implementation(name, torch.zeros(1)) == name
    with pytest.raises(ValueError, match="impl='fast'"):
        implementation("fast", torch.zeros(1))


@pytest.mark.parametrize(
    "kind, dtype, runs", [("sm_90", "bfloat16", True), ("sm_90", "float32", False), ("sm_80", "bfloat16", False)]
)
@pytest.mark.parametrize("impl", ["specialised", "gluon"])
def test_kernels_for_hopper_are_refused_elsewhere(monkeypatch, impl, kind, dtype, runs):
    """Asked of a tensor that says it is on a GPU; never what "auto" chooses."""
    tensor = SimpleNamespace(device=torch.device("cuda"), dtype=getattr(torch, dtype))
    monkeypatch.setattr(module, "device_kind", lambda: kind)
    assert implementation("auto", tensor) == "triton"
    if runs:
        assert implementation(impl, tensor) == impl
    else:
        with pytest.raises(ValueError, match="for 16 bits on Hopper"):
            implementation(impl, tensor)


def test_gluon_is_refused_without_a_gpu_without_gluon_and_at_other_widths(monkeypatch):
    with pytest.raises(ValueError, match="interpreter cannot run Gluon"):
        implementation("gluon", torch.zeros(1, dtype=torch.bfloat16))
    monkeypatch.setattr(module, "device_kind", lambda: "sm_90")
    monkeypatch.setattr(module, "HAVE_GLUON", False)
    with pytest.raises(ValueError, match=r"triton 3\.6 or newer"):
        implementation("gluon", SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16))
    q = torch.zeros(1, 5, 1, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="head width 32"):
        module.launch_forward(q, q, q, attention_plan(length=5), 0.1, forward="gluon")


def test_every_device_has_tiles_that_divide_the_schedule():
    for (kind, kernel, _), tile in module.TILES.items():
        own = tile.columns if kernel == "dkdv" else tile.rows
        assert module.SCHEDULE_TOKENS % own == 0, (kind, kernel)
    for kernel in ("forward", "dq", "dkdv"):
        assert module.tile_of(module.TILES, kernel, torch.bfloat16, "sm_123") == module.TILES["default", kernel, 2]
        assert module.tile_of(module.TILES, kernel, torch.float32, "sm_90") == module.TILES["default", kernel, 4]


def good():
    q, k, v, _ = draw(1, 20, 2, 1, 16, torch.float32)
    return {"q_BTHDh": q, "k_BTKDh": k, "v_BTKDh": v, "plan": attention_plan(length=20), "scale": SCALE}


@pytest.mark.parametrize(
    "change, error, name",
    [
        ({"q_BTHDh": torch.zeros(20, 16)}, ValueError, "q must be"),
        ({"q_BTHDh": torch.zeros(1, 20, 2, 16, dtype=torch.int32)}, TypeError, "q has dtype"),
        ({"k_BTKDh": torch.zeros(1, 20, 1, 16, dtype=torch.float16)}, TypeError, "k has dtype"),
        ({"k_BTKDh": torch.zeros(1, 20, 1, 16, device="meta")}, ValueError, "k is on"),
        ({"v_BTKDh": torch.zeros(1, 20, 1, 8)}, ValueError, "v has shape"),
        ({"v_BTKDh": torch.zeros(1, 20, 2, 16)}, ValueError, "v has shape"),
        ({"k_BTKDh": torch.zeros(1, 19, 1, 16)}, ValueError, "k has shape"),
        ({"k_BTKDh": torch.zeros(1, 20, 3, 16), "v_BTKDh": torch.zeros(1, 20, 3, 16)}, ValueError, "k has 3 heads"),
        ({"plan": attention_plan(length=21)}, ValueError, "plan is for"),
        ({"plan": None}, TypeError, "plan must"),
        (
            {"plan": module.AttentionPlan(*(x.to("meta") for x in attention_plan(length=20)[:4]))},
            ValueError,
            "plan.first_key_BT must",
        ),
        ({"scale": 0.0}, ValueError, "scale"),
        ({"scale": float("nan")}, ValueError, "scale"),
        ({"impl": "cuda"}, ValueError, "impl"),
    ],
)
def test_errors_name_the_argument(change, error, name):
    with pytest.raises(error, match=name):
        attention(**{**good(), **change})


@interpreted
@pytest.mark.parametrize("width, dtype", [(24, torch.float32), (16, torch.float64), (256, torch.float32)])
def test_triton_refuses_what_it_does_not_support(width, dtype):
    q, k, v, _ = draw(1, 20, 2, 1, width, dtype)
    with pytest.raises(ValueError, match="q has head width"):
        attention(q, k, v, attention_plan(length=20), scale=SCALE, impl="triton")
