"""attention_inputs: every implementation against float64, gradients of q, k, v, ve and both scalars; errors.

The Triton kernels' own cases, with every address checked, are in kernels/proof/families/attention_inputs.py.
"""

import pytest
import torch
import torch.nn.functional as F

import kernels.attention_inputs as module
from kernels.attention import attention_inputs
from kernels.proof import TOLERANCE
from kernels.runtime import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton is imported")
IMPLEMENTATIONS = ["auto", "banded", "reference", pytest.param("triton", marks=interpreted)]
NAMES = ("q", "k", "v", "ve", "s")


def draw(B, T, H, K, width, dtype, with_ve=True, seed=0):
    random = torch.Generator().manual_seed(seed)

    def make(*shape):
        return torch.randn(*shape, generator=random)

    angle = torch.arange(T)[:, None] * torch.linspace(0, 1, width // 2)
    given = {
        "q": make(B, T, H, width),
        "k": make(B, T, K, width),
        "v": make(B, T, K, width),
        "ve": make(B, T, K, width) if with_ve else None,
    }
    given = {n: x if x is None else x.to(dtype) for n, x in given.items()}
    return {**given, "s": make(2), "cos_TR": angle.cos(), "sin_TR": angle.sin()}


def literal(q, k, v, ve, s, cos_TR, sin_TR):
    """The prologue of docs/spec.md 2.5 and 2.6, token by token and head by head."""

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotary(x):
        half = x.shape[-1] // 2
        out = torch.empty_like(x)
        for t in range(x.shape[1]):
            a, b = x[:, t, :, :half], x[:, t, :, half:]
            out[:, t] = torch.cat((a * cos_TR[t] + b * sin_TR[t], -a * sin_TR[t] + b * cos_TR[t]), dim=-1)
        return out

    mixed = s[0] * norm(v)
    return rotary(norm(q)), rotary(norm(k)), mixed if ve is None else mixed + s[1] * ve


def with_gradients(run, given, dtype=None):
    """Outputs and the gradients of a fixed random combination of them, by name."""
    given = {n: x if x is None or dtype is None else x.to(dtype) for n, x in given.items()}
    leaves = {n: given[n].detach().requires_grad_() for n in NAMES if given[n] is not None}
    out = run(**{**given, **leaves})
    random = torch.Generator().manual_seed(9)
    weights = [torch.randn(x.shape, generator=random).to(x.dtype) for x in out]
    grads = torch.autograd.grad(out, list(leaves.values()), weights)
    return {**dict(zip(("q_out", "k_out", "v_out"), out)), **{f"d{n}": g for n, g in zip(leaves, grads)}}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "B, T, H, K, width, with_ve",
    [(1, 37, 2, 2, 16, True), (2, 5, 4, 2, 32, False), (1, 18, 1, 1, 64, True), (1, 1, 2, 1, 128, True)],
)
def test_against_float64(B, T, H, K, width, with_ve, dtype, impl):
    if impl == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter is only mended for bfloat16 inside kernels.proof, whose cases cover it")
    given = draw(B, T, H, K, width, dtype, with_ve)
    truth = with_gradients(literal, given, torch.float64)
    same = with_gradients(module.attention_inputs_reference, given)
    got = with_gradients(lambda **x: attention_inputs(**x, impl=impl), given)
    assert got.keys() == truth.keys()
    for name, true in truth.items():
        assert got[name].shape == true.shape and got[name].dtype == (torch.float32 if name == "ds" else dtype)
        usual = (same[name].double() - true).abs().max().item()
        allowed = 2 * usual + TOLERANCE[dtype] * max(true.abs().max().item(), 1)
        error = (got[name].double() - true).abs().max().item()
        assert error <= allowed, f"{name}: {error} > {allowed}"


def test_norm_is_torchs():
    """The kernels' epsilon is the one that torch takes by default, in every dtype."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.full((1, 64), 1e-4, dtype=dtype)
        wide = x.float() / (x.float().square().mean() + torch.finfo(torch.float32).eps).sqrt()
        torch.testing.assert_close(F.rms_norm(x, (64,)).float(), wide, rtol=1e-2, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_slices_of_a_merged_projection(impl):
    given = draw(2, 20, 2, 2, 16, torch.float32)
    merged = torch.cat([given[n] for n in "qkv"], dim=2)
    sliced = dict(zip("qkv", merged.split(2, dim=2)))
    copies = attention_inputs(**given, impl=impl)
    views = attention_inputs(**{**given, **sliced}, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(copies, views))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_batch(impl):
    given = draw(1, 20, 2, 1, 16, torch.float32)
    flat = {n: x[0] if n in ("q", "k", "v", "ve") else x for n, x in given.items()}
    for a, b in zip(attention_inputs(**flat, impl=impl), attention_inputs(**given, impl=impl)):
        assert torch.equal(a, b[0])


@interpreted
def test_operator_contracts():
    """Fake, autograd and schema of the operator, by torch's own checker, with and without a value embedding."""
    for with_ve in (True, False):
        given = draw(1, 18, 2, 1, 16, torch.float32, with_ve)
        for name in NAMES:
            if given[name] is not None:
                given[name].requires_grad_()
        torch.library.opcheck(
            module._attention_inputs,
            tuple(given.values()),
            test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
        )
        plain = [None if x is None else x.detach() for x in given.values()]
        upstream = [x.clone() for x in plain[:3]]
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(module._attention_inputs_backward, (*upstream, *plain), test_utils=checks)


@pytest.mark.parametrize("impl", ["auto", pytest.param("triton", marks=interpreted)])
def test_compiled_without_a_break(impl):
    torch._dynamo.reset()
    given = draw(1, 18, 2, 1, 16, torch.float32)

    def run(**x):
        return attention_inputs(**x, impl=impl)

    eager = with_gradients(run, given)
    compiled = with_gradients(torch.compile(run, backend="aot_eager", fullgraph=True), given)
    for name, x in eager.items():
        torch.testing.assert_close(compiled[name], x, rtol=1e-5, atol=1e-6)


@interpreted
def test_two_runs_give_the_same_bits():
    given = draw(1, 50, 2, 2, 16, torch.float32)
    first, second = (with_gradients(lambda **x: attention_inputs(**x, impl="triton"), given) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"q": torch.zeros(20, 16)}, "q must be"),
        ({"k": torch.zeros(1, 20, 1, 16, dtype=torch.float16)}, "k is"),
        ({"k": torch.zeros(1, 19, 1, 16)}, "k has shape"),
        ({"v": torch.zeros(1, 20, 2, 16)}, "v has shape"),
        ({"ve": torch.zeros(1, 20, 1, 8)}, "ve has shape"),
        ({"ve": torch.zeros(1, 20, 1, 16, device="meta")}, "ve is"),
        ({"s": torch.zeros(3)}, "s must have shape"),
        ({"cos_TR": torch.zeros(19, 8)}, "cos_TR must have shape"),
        ({"sin_TR": torch.zeros(20, 16)}, "sin_TR must have shape"),
        ({"sin_TR": torch.zeros(20, 8, device="meta")}, "sin_TR must have shape"),
        ({"impl": "cuda"}, "impl="),
    ],
)
def test_errors_name_the_argument(change, name):
    with pytest.raises((ValueError, TypeError), match=name):
        attention_inputs(**{**draw(1, 20, 2, 1, 16, torch.float32), **change})
