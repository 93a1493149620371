"""The head's loss: every way against float64 with both gradients, its laws, its limits and its memory."""

import math
import weakref
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernels import cross_entropy as module
from kernels.cross_entropy import (
    REDUCTIONS,
    SOFTCAPS,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    next_targets,
    softcapped_logits,
)
from kernels.runtime import INTERPRETED

IGNORED = -100
WAYS = [pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")), "reference"]


def draw(N=37, D=12, V=45, scale=1.0, seed=0):
    """x, w, targets (every fifth ignored) and an upstream gradient a token."""
    random = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, D, generator=random) * scale for n in (N, V))
    targets = torch.randint(V, (N,), generator=random)
    targets[::5] = IGNORED
    return x, w, targets, torch.randn(N, generator=random)


def with_gradients(run, x, w, upstream):
    """[loss, dx, dw]; `upstream` is a number a token, of which a scalar loss takes the first."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    loss = run(x, w)
    upstream = upstream.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, (x, w), upstream if loss.dim() else upstream[0])]


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("chunk_tokens", [16, 100])
def test_against_float64(impl, softcap, reduction, chunk_tokens):
    x, w, targets, upstream = draw()

    def eager(x, w):
        return linear_cross_entropy_reference(x, w, targets, softcap, reduction, IGNORED)

    def ours(x, w):
        return linear_cross_entropy(
            x, w, targets, softcap=softcap, reduction=reduction, chunk_tokens=chunk_tokens, impl=impl
        )

    truth = with_gradients(eager, x.double(), w.double(), upstream.double())
    same = with_gradients(eager, x, w, upstream)
    for name, true, usual, mine in zip(("loss", "dx", "dw"), truth, same, with_gradients(ours, x, w, upstream)):
        assert mine.dtype == torch.float32
        allowed = 2 * (usual - true).abs().max() + 4e-6 * true.abs().max()
        assert (mine - true).abs().max() <= allowed, name


@settings(deadline=None, max_examples=40)
@given(
    N=st.integers(1, 40),
    D=st.integers(1, 9),
    V=st.integers(1, 40),
    chunk=st.integers(1, 50),
    softcap=st.sampled_from(SOFTCAPS),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 99),
)
def test_any_shape_and_any_chunk_is_the_definition(N, D, V, chunk, softcap, reduction, seed):
    x, w, targets, upstream = (t.double() if t.is_floating_point() else t for t in draw(N, D, V, seed=seed))
    targets[-1] = V - 1  # torch's mean over no target at all is NaN

    def ours(x, w):
        return linear_cross_entropy(
            x, w, targets, softcap=softcap, reduction=reduction, chunk_tokens=chunk, impl="reference"
        )

    def eager(x, w):
        return linear_cross_entropy_reference(x, w, targets, softcap, reduction, IGNORED)

    for mine, true in zip(with_gradients(ours, x, w, upstream), with_gradients(eager, x, w, upstream)):
        torch.testing.assert_close(mine, true, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("impl", WAYS)
def test_a_zero_head_loses_the_logarithm_of_all_classes_padding_too(impl):
    x, _, targets, _ = draw(V=45)
    loss = linear_cross_entropy(x, torch.zeros(128, 12), targets, impl=impl)
    assert loss.item() == pytest.approx(math.log(128), abs=1e-6)


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("scale", [1e3, 1e10])
def test_extreme_logits_stay_finite(impl, softcap, scale):
    """Logits up to 1e21, whose squares overflow float32."""
    x, w, targets, upstream = draw(scale=scale)
    found = with_gradients(
        lambda x, w: linear_cross_entropy(x, w, targets, softcap=softcap, chunk_tokens=16, impl=impl), x, w, upstream
    )
    for value in found:
        assert torch.isfinite(value).all()
    if softcap:
        assert 0 <= found[0] <= 30 + math.log(w.shape[0])


@pytest.mark.parametrize("impl", WAYS)
def test_ignored_tokens_count_for_nothing(impl):
    x, w, targets, upstream = draw()
    kept = targets != IGNORED

    def loss(chosen, targets):
        return with_gradients(lambda x, w: linear_cross_entropy(x, w, targets, impl=impl), chosen, w, upstream)

    all_tokens, alone = loss(x, targets), loss(x[kept], targets[kept])
    torch.testing.assert_close(all_tokens[0], alone[0])
    torch.testing.assert_close(all_tokens[1][kept], alone[1])
    torch.testing.assert_close(all_tokens[2], alone[2])
    assert (all_tokens[1][~kept] == 0).all()
    nobody = torch.full_like(targets, IGNORED)
    assert linear_cross_entropy(x, w, nobody, reduction="sum", impl=impl) == 0
    assert linear_cross_entropy(x, w, nobody, impl=impl).isnan()


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_same_call_gives_the_same_bits(impl, reduction):
    x, w, targets, upstream = draw()

    def run(x, w):
        return linear_cross_entropy(x, w, targets, reduction=reduction, chunk_tokens=10, impl=impl)

    once, again = (with_gradients(run, x, w, upstream) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(once, again))


@pytest.mark.parametrize("impl", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiles_without_a_graph_break(impl, reduction):
    x, w, targets, upstream = draw()

    def run(x, w):
        return linear_cross_entropy(x, w, targets, reduction=reduction, chunk_tokens=16, impl=impl)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for mine, plain in zip(with_gradients(compiled, x, w, upstream), with_gradients(run, x, w, upstream)):
        torch.testing.assert_close(mine, plain)


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
def test_the_operators_keep_their_contracts():
    x, w, targets, upstream = draw(N=6, D=4, V=9)
    x, w = x.requires_grad_(), w.requires_grad_()
    columns, weights, how = next_targets(targets, 2), torch.tensor([1.0, 0.5]), ("rsqrt", IGNORED, 4, ())
    torch.library.opcheck(module._head_loss, (x, w, columns, weights, *how, True))
    torch.library.opcheck(module._head_loss, (x.detach(), w.detach(), columns, None, *how, False))
    torch.library.opcheck(module._head_token_losses, (x, w, columns, weights, *how))
    torch.library.opcheck(module._head_gradients, (upstream, x.detach(), w.detach(), columns, None, *how))


# ---- several targets a token -------------------------------------------------------------------------------


def test_next_targets_are_those_of_the_same_stream_and_none_past_its_end():
    found = next_targets(torch.tensor([[3, 1, 4], [1, 5, 9]]), 3)
    assert found[0].tolist() == [[3, 1, 4], [1, 4, IGNORED], [4, IGNORED, IGNORED]]
    assert found[1, 0].tolist() == [1, 5, 9], "nor any of another stream"
    assert next_targets(torch.tensor([7, 8]), 4, ignore_index=-1)[1].tolist() == [8, -1, -1, -1]


@pytest.mark.parametrize("impl", [*WAYS, "eager"])
def test_several_targets_are_the_weighted_sum_of_the_losses_of_each(impl):
    """Written out by the losses of one target, in float64; with a class that two columns of a token share."""
    x, w, targets, upstream = draw(N=14)
    targets[6:9] = 7
    columns, weights = next_targets(targets, 3), torch.tensor([1.0, 0.5, 0.25])

    def each(x, w, reduction="none"):
        losses = [linear_cross_entropy_reference(x, w, t, "sigmoid", "none") for t in columns.unbind(1)]
        losses = sum(weight * loss for weight, loss in zip(weights.double(), losses))
        total = losses.sum() / (columns != IGNORED).any(1).sum()
        return {"none": losses, "sum": losses.sum(), "mean": total}[reduction]

    for reduction in REDUCTIONS:
        how = dict(target_weights=weights, softcap="sigmoid", reduction=reduction, impl=impl)
        run = lambda x, w: linear_cross_entropy(x, w, columns, chunk_tokens=8, **how)  # noqa: E731, B023
        truth = with_gradients(partial(each, reduction=reduction), x.double(), w.double(), upstream.double())
        for mine, true in zip(with_gradients(run, x, w, upstream), truth):
            assert (mine - true).abs().max() <= 4e-6 * true.abs().max(), reduction


@pytest.mark.parametrize("impl", [*WAYS, "eager"])
def test_a_column_of_weight_0_or_of_nobody_is_not_there(impl):
    x, w, targets, upstream = draw(N=14)
    columns = torch.stack([targets, torch.randint(45, (14,)), torch.full((14,), IGNORED)], 1)
    run = dict(reduction="sum", impl=impl)
    weights = torch.tensor([1.0, 0.0, 0.7])
    for chosen, how in ((columns, weights), (columns[:, ::2], None)):
        both = with_gradients(
            lambda x, w, t=chosen, h=how: linear_cross_entropy(x, w, t, target_weights=h, **run), x, w, upstream
        )
        alone = with_gradients(lambda x, w: linear_cross_entropy(x, w, targets, **run), x, w, upstream)
        for a, b in zip(both, alone):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_a_changing_weight_compiles_nothing():
    import torch._dynamo.testing

    x, w, targets, upstream = draw()
    columns, weights = next_targets(targets, 2), torch.tensor([1.0, 0.5])
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    run = lambda x, w: linear_cross_entropy(x, w, columns, target_weights=weights, reduction="sum")  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for weight in (0.5, 0.2, 0.0):
        weights[1] = weight
        for mine, plain in zip(with_gradients(compiled, x, w, upstream), with_gradients(run, x, w, upstream)):
            torch.testing.assert_close(mine, plain)
    assert counter.frame_count == 1


def test_half_precision_gives_float32_losses_and_a_float32_head():
    x, w, targets, upstream = draw(N=64, D=32, V=100)
    run = dict(impl="reference", chunk_tokens=16)
    loss, dx, dw = with_gradients(lambda x, w: linear_cross_entropy(x, w, targets, **run), x.bfloat16(), w, upstream)
    assert (loss.dtype, dx.dtype, dw.dtype) == (torch.float32, torch.bfloat16, torch.float32)
    truth = with_gradients(
        lambda x, w: linear_cross_entropy_reference(x, w, targets), x.bfloat16().double(), w.double(), upstream
    )
    for mine, true in zip((loss, dx, dw), truth):
        assert (mine - true).norm() <= 2e-2 * true.norm()


def test_a_sum_of_products_overwrites_what_was_there_before_the_first():
    x, w, _, _ = draw(N=8, D=6, V=5)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = w[:, :6].to(dtype), x[:6].to(dtype)
        total = torch.full((5, 6), torch.nan)
        for first in (True, False):
            module._add_product_(total, a, b, first)
        torch.testing.assert_close(total, 2 * (a.float() @ b.float()))


def test_gradcheck():
    x, w, targets, _ = (t.double().requires_grad_() if t.is_floating_point() else t for t in draw(5, 3, 6))
    for reduction in REDUCTIONS:
        for softcap in SOFTCAPS:
            assert torch.autograd.gradcheck(
                partial(linear_cross_entropy, targets=targets, softcap=softcap, reduction=reduction, chunk_tokens=2),
                (x, w),
            )


def test_logits_for_sampling_are_capped_float32():
    x, w, _, _ = draw(scale=5.0)
    for softcap, least, most in (("rsqrt", -15, 15), ("sigmoid", 0, 23)):
        c = softcapped_logits(x[None].bfloat16(), w, softcap)
        assert c.shape == (1, 37, 45) and c.dtype == torch.float32 and least <= c.min() and c.max() <= most
    z = x @ w.t()
    torch.testing.assert_close(softcapped_logits(x, w), 15 * z / (z * z + 225).sqrt())
    torch.testing.assert_close(softcapped_logits(x, w, None), z)


def test_wrong_arguments_are_named():
    x, w, targets, _ = draw()
    for arguments, options, word in (
        ((x, w[:, :-1], targets), {}, "weight"),
        ((x, w, targets[:-1]), {}, "targets"),
        ((x[None], w, targets), {}, "x"),
        ((x, w, targets), dict(softcap="tanh"), "softcap"),
        ((x, w, targets), dict(reduction="max"), "reduction"),
        ((x, w, targets), dict(impl="cuda"), "impl"),
        ((x, w, targets), dict(fp8=True, impl="eager"), "fp8"),
        ((x, w, targets), dict(chunk_tokens=0), "chunk_tokens"),
        ((x, w, targets), dict(target_weights=torch.ones(2)), "target_weights"),
        ((x, w, targets), dict(target_weights=torch.ones(1, requires_grad=True)), "target_weights"),
        ((x, w, targets[:, None, None]), {}, "targets"),
    ):
        with pytest.raises(ValueError, match=word):
            linear_cross_entropy(*arguments, **options)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages made inside it that still live: now, and at most so far."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def _gone(self, key, size):
        self.now -= size
        self.known.discard(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if not isinstance(t, torch.Tensor):
                continue
            storage = t.untyped_storage()
            if storage._cdata in old or storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return result


@pytest.mark.parametrize("gradient", [True, False])
def test_counted_memory_at_the_size_of_the_run(monkeypatch, gradient):
    """Counted, not measured: the real launch code on meta tensors, with stand-ins for what needs a GPU."""
    N, D, V = 65536, 1024, 50304
    monkeypatch.setattr(module, "launch_rows", lambda *_, **__: None)
    monkeypatch.setattr(module, "_add_product_", lambda *_: None)  # in place, inside the library's product
    x = torch.empty(N, D, dtype=torch.bfloat16, device="meta")
    w, targets = torch.empty(V, D, device="meta"), torch.empty(N, dtype=torch.int64, device="meta")
    with LiveBytes() as counted:
        module.launch_head(x, w, targets, "rsqrt", IGNORED, module.MOST_CHUNK_TOKENS, (), gradient)
    logits, w_bf16, dw, dx = module.MOST_CHUNK_TOKENS * V * 2, V * D * 2, V * D * 4, N * D * 2
    least = logits + w_bf16 + (dw + dx if gradient else 0)
    assert least <= counted.most <= 1.3e9, f"{counted.most / 1e9:.2f} GB"
    assert counted.most <= 1.1 * least


def test_with_a_gradient_in_8_bits_the_logits_are_let_go_before_its_products(monkeypatch):
    """Counted likewise: at the peak one chunk's logits, their gradient, and that of half of the tokens turned."""
    N, D, V, C = 65536, 1024, 50304, 8192

    def both_ways(x, dtype, _largest):
        return [module.Eight(x.new_empty(shape, dtype=dtype), None) for shape in (x.shape, x.shape[::-1])]

    monkeypatch.setattr(module, "launch_rows", lambda *_, **__: None)
    monkeypatch.setattr(module, "launch_turn", lambda *_: None)
    monkeypatch.setattr(module, "both_ways", both_ways)
    monkeypatch.setattr(module, "scale_for", lambda *_: torch.empty((), device="meta"))
    monkeypatch.setattr(
        module, "product", lambda a, b, t, **_: a.values.new_empty(len(a.values), len(b.values), dtype=t)
    )
    x = torch.empty(N, D, dtype=torch.bfloat16, device="meta")
    w, targets = torch.empty(V, D, device="meta"), torch.empty(N, dtype=torch.int64, device="meta")
    with LiveBytes() as counted:
        module.launch_head(x, w, targets, "rsqrt", IGNORED, C, (1, 1, 1), True)
    both_x_and_w, dw, dx, logits, gradient = 2 * D * (N + V), V * D * 4, N * D * 2, C * V * 2, C * V
    waiting = module.TOKENS_A_PRODUCT * V
    least = both_x_and_w + dw + dx + logits + gradient + waiting
    assert least <= counted.most <= 1.02 * least, f"{counted.most / 1e9:.2f} GB for {least / 1e9:.2f}"


def test_chunks_fit_the_device():
    sizes = {gb: module.chosen_chunk_tokens(50304, 2, gb * 2**30) for gb in (8, 24, 48, 79, 139)}
    assert sizes == {8: 1024, 24: 2048, 48: 4096, 79: 8192, 139: 8192}
    for gb, rows in sizes.items():
        assert rows & (rows - 1) == 0 and rows * 50304 * 2 <= gb * 2**30 * module.CHUNK_SHARE
    assert module.chosen_chunk_tokens(50304, 4, 79 * 2**30) == 4096, "twice the bytes, half the rows"
    assert module.chosen_chunk_tokens(10**6, 4, 0) == module.LEAST_CHUNK_TOKENS


@pytest.mark.parametrize("known", [0, 1.0], ids=["measured", "known"])
@pytest.mark.parametrize("N, V", [(71, 90), (87, 96), (80, 96), (64, 96), (40, 96)])
@pytest.mark.parametrize("most", [32768, 64, 16], ids=["all wait", "two chunks wait", "none waits"])
def test_the_head_in_8_bits_trains_nearly_as_in_float64(monkeypatch, known, N, V, most):
    """The whole launch, the loss in the interpreter: losses within 3 % of the spread of the logits, gradients 15 %.

    Sizes that 16 does and does not divide, chunks of 32 rows of which the last may be ragged; where the gradient's
    largest number is known, gradients of several chunks wait for one product."""
    monkeypatch.setattr(module, "TOKENS_A_PRODUCT", most)
    x, w, targets, _ = draw(N=N, D=40, V=V)
    targets[::7] = IGNORED
    losses, dx, dw = module.launch_head(x.bfloat16(), w, targets, "rsqrt", IGNORED, 32, (0, 0, known), True)
    x, w = x.double().requires_grad_(), w.double().requires_grad_()
    truth = module.linear_cross_entropy_reference(x, w, targets, "rsqrt", "none", IGNORED)
    truth.sum().backward()
    spread = module.softcapped_logits(x, w).std()
    assert (losses - truth).abs().mean() <= 0.03 * spread and (losses[::7] == 0).all()
    for found, right in ((dx, x.grad), (dw, w.grad)):
        assert 0 < (found.double() - right).norm() <= 0.15 * right.norm()
