"""The loss, the MLP and Muon through their public functions; their kernels' own proof is in test_proof.py."""

import math

import pytest
import torch

from kernels import cross_entropy, muon
from kernels.communication import bytes_per_step, owners, touched_rows
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from kernels.mlp import relu_squared_mlp, relu_squared_mlp_reference
from kernels.muon import apply_update_, join_master, momentum_, orthogonalize, split_master
from kernels.residual import residual_mix, residual_mix_reference
from kernels.runtime import INTERPRETED

IMPLS = ["reference", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="no interpreter"))]


def random(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def with_gradients(function, leaves, upstream):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def agree(ours, exact, tolerance=3e-6):
    """NaN fails."""
    for got, wanted in zip(ours, exact, strict=True):
        assert (got - wanted).abs().max() <= tolerance * max(wanted.abs().max(), 1e-3)


@pytest.mark.parametrize("impl", [*IMPLS, "eager"])
@pytest.mark.parametrize("softcap", ["rsqrt", "sigmoid", None])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_equal_float64(impl, softcap, reduction):
    x, w = random(23, 9), random(70, 9, seed=1)
    targets = torch.randint(70, (23,), generator=torch.Generator().manual_seed(2))
    targets[4] = -100
    upstream = random(23, seed=3) if reduction == "none" else torch.tensor(0.7)
    options = dict(softcap=softcap, reduction=reduction)
    exact = with_gradients(
        lambda x, w: linear_cross_entropy_reference(x, w, targets, softcap, reduction),
        [x.double(), w.double()], upstream,
    )
    ours = with_gradients(
        lambda x, w: linear_cross_entropy(x, w, targets, impl=impl, chunk_tokens=10, **options), [x, w], upstream
    )
    agree(ours, exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", ["rsqrt", "sigmoid", None])
@pytest.mark.parametrize("scale", [1e4, 1e18])
def test_extreme_logits_stay_finite(impl, softcap, scale):
    x, w = random(6, 4, scale=scale).requires_grad_(), random(40, 4, seed=1).requires_grad_()
    loss = linear_cross_entropy(x, w, torch.arange(6), softcap=softcap, impl=impl)
    grads = torch.autograd.grad(loss, (x, w))
    assert torch.isfinite(loss) and all(torch.isfinite(g).all() for g in grads)


def test_padding_takes_part_and_no_target_is_nan():
    loss = linear_cross_entropy(random(5, 8), torch.zeros(128, 8), torch.arange(5))
    assert loss.item() == pytest.approx(math.log(128))
    assert linear_cross_entropy(random(2, 8), torch.zeros(128, 8), torch.tensor([-100, -100])).isnan()


@pytest.mark.skipif(not INTERPRETED, reason="no interpreter")
def test_without_gradients_no_gradient_is_made(monkeypatch):
    seen = []
    real = cross_entropy.launch_rows
    monkeypatch.setattr(cross_entropy, "launch_rows", lambda *a: seen.append(a[4]) or real(*a))
    with torch.no_grad():
        losses = linear_cross_entropy(random(9, 8), random(50, 8), torch.arange(9), reduction="none", impl="triton")
    assert seen == [False] and losses.shape == (9,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(softcap="tanh"), "softcap='tanh'"), (dict(reduction="max"), "reduction='max'"),
        (dict(fp8=True), "fp8=True"), (dict(impl="fast"), "impl='fast'"),
    ],
)  # fmt: skip
def test_wrong_options_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(random(5, 8), random(16, 8), torch.arange(5), **change)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(random(5, 8), random(16, 8), torch.arange(4))
    with pytest.raises(ValueError, match="w_in"):
        relu_squared_mlp(random(5, 8), random(16, 9), random(8, 16))
    with pytest.raises(ValueError, match="coefficients"):
        orthogonalize(random(4, 4), coefficients="best")
    with pytest.raises(ValueError, match="mantissa"):
        apply_update_(random(4), torch.zeros(4, dtype=torch.int16), random(4), lr=1.0, weight_decay=0.0)


@pytest.mark.parametrize("impl", IMPLS)
def test_mlp_equals_float64(impl):
    leaves = [random(37, 12), random(50, 12, seed=1), random(12, 50, seed=2)]
    dy = random(37, 12, seed=3)
    exact = with_gradients(relu_squared_mlp_reference, [x.double() for x in leaves], dy)
    agree(with_gradients(lambda *t: relu_squared_mlp(*t, impl=impl), leaves, dy), exact)


def test_residual_equals_float64():
    leaves = [random(3, 5, 8, seed=s) for s in range(3)] + [torch.tensor([0.9, -0.2, 0.4])]
    dy = random(3, 5, 8, seed=9)
    exact = with_gradients(residual_mix_reference, [x.double() for x in leaves], dy)
    agree(with_gradients(residual_mix, leaves, dy), exact)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(20, 33), (33, 20), (3, 16, 16)])
def test_orthogonalisation_pulls_singular_values_to_one(impl, shape):
    g = random(*shape)
    for coefficients, low, high in (("spec", 0.7, 1.25), ("polar_express", 0.8, 1.2)):
        ours = orthogonalize(g, coefficients=coefficients, dtype=torch.float32, impl=impl)
        exact = muon.orthogonalize_reference(g.double(), coefficients, torch.float64)
        agree([ours], [exact], 2e-4)  # small singular values, where rounding is, are multiplied by hundreds
        left, values, right = torch.linalg.svd(g.double(), full_matrices=False)
        mapped = torch.linalg.svdvals(exact)
        assert mapped.max() < high and mapped[values > 0.05 * values.amax()].min() > low
        # the polynomial acts on singular values alone: the singular vectors are those of g
        inner = left.mT @ exact @ right.mT
        assert (inner - torch.diag_embed(inner.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-9


@pytest.mark.parametrize("impl", IMPLS)
def test_split_weights_are_a_float32_master(impl):
    master = random(700, seed=4)
    weight, mantissa = split_master(master)
    weight, mantissa = weight.clone(), mantissa.view(torch.int16).clone()
    assert torch.equal(join_master(weight, mantissa), master)
    for step in range(5):  # updates far below bfloat16's resolution are not lost
        update = random(700, seed=step)
        apply_update_(weight, mantissa, update, lr=1e-5, weight_decay=1e-4, impl=impl)
        master = master * (1 - 1e-4) - 1e-5 * update
    assert (join_master(weight, mantissa) - master).abs().max() <= 2e-6
    assert (weight.float() - master).abs().max() <= 2**-7 * master.abs().max()
    buffer, grad = random(9, seed=1), random(9, seed=2)
    exact = 0.9 * buffer.double() + 0.1 * grad.double()
    step = momentum_(buffer, grad, 0.9, impl=impl)
    agree([buffer, step], [exact, 0.9 * exact + 0.1 * grad.double()], 1e-6)


def test_everything_compiles_into_one_graph():
    def step(x, w_in, w_out, head, targets):
        y = residual_mix(relu_squared_mlp(x, w_in, w_out), x, x, torch.tensor([0.5, 0.3, 0.2]))
        return linear_cross_entropy(y, head, targets)

    leaves = [random(16, 8), random(32, 8, seed=1), random(8, 32, seed=2), random(128, 8, seed=3)]
    targets = torch.arange(16)
    plain = with_gradients(lambda *t: step(*t, targets), leaves, torch.tensor(1.0))
    fused = torch.compile(step, fullgraph=True, backend="aot_eager")
    agree(with_gradients(lambda *t: fused(*t, targets), leaves, torch.tensor(1.0)), plain)


@pytest.mark.skipif(not INTERPRETED, reason="no interpreter")
def test_nano_trains_alike_with_interpreted_kernels():
    """Three steps with every Triton kernel and with the references: losses within 2e-4 nats."""
    import dataclasses

    import train_gpt

    base = train_gpt.parse_config(
        "--preset=nano --num_layers=2 --unet_skips= --long_window_layers=0 --model_dim=32 --num_heads=1 --device=cpu "
        "--train_seq_len=128 --tokens_per_step=128 --val_seq_len=128 --val_tokens=128 --warmup_steps=0".split()
    )
    tokens = torch.randint(1, 256, (129,), generator=torch.Generator().manual_seed(0))
    losses = {}
    for kernels in ("auto", "triton"):
        trainer = train_gpt.Trainer(dataclasses.replace(base, kernels=kernels), torch.device("cpu"))
        losses[kernels] = [trainer.step(s, [(tokens[:-1].int(), tokens[1:])]).item() for s in range(3)]
    assert max(abs(a - b) for a, b in zip(*losses.values())) <= 2e-4
    assert losses["triton"][2] < losses["triton"][0] - 0.1


def test_owners_are_balanced_and_bytes_counted():
    matrices = {f"{i}": torch.empty(4, 64, 64, device="meta") for i in range(15)}
    matrices |= {f"m{i}": torch.empty(256, 64, device="meta") for i in range(32)}
    for world in (1, 2, 8):
        found = owners(matrices, world)
        counts = [list(found.values()).count(rank) for rank in range(world)]
        assert set(found) == set(matrices) and min(counts) > 0
    tables = {"e": torch.empty(1000, 8, device="meta")}
    told = bytes_per_step(matrices, tables, torch.empty(128, 64), 8, rows=250)
    assert told["overlap"]["tables"] == told["plain"]["tables"] / 4 == 2 * 7 / 8 * 1000 * 8 * 4 / 4
    assert bytes_per_step(matrices, tables, torch.empty(128, 64), 1, rows=250)["plain"]["matrices"] == 0
    assert touched_rows([torch.tensor([3, 1]), torch.tensor([3, 7])], 10).tolist() == [1, 3, 7]
