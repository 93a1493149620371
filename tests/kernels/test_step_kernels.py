"""The kernels of a step together: one graph, and a training that is the same with each of them."""

import dataclasses

import pytest
import torch

import train_gpt
from kernels import cross_entropy
from kernels.cross_entropy import linear_cross_entropy
from kernels.mlp import relu_squared_mlp
from kernels.residual import residual_mix
from kernels.runtime import INTERPRETED
from trainer.exchange import touched_rows


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(function, leaves):
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves)]


def test_everything_compiles_into_one_graph():
    def step(x, w_in, w_out, head, targets):
        y = residual_mix(relu_squared_mlp(x, w_in, w_out), x, x, torch.tensor([0.5, 0.3, 0.2]))
        return linear_cross_entropy(y, head, targets)

    leaves = [random(16, 8), random(32, 8, seed=1), random(8, 32, seed=2), random(128, 8, seed=3)]
    targets = torch.arange(16)
    plain = with_gradients(lambda *t: step(*t, targets), leaves)
    fused = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(with_gradients(lambda *t: fused(*t, targets), leaves), plain, strict=True):
        assert (got - wanted).abs().max() <= 3e-6 * max(wanted.abs().max(), 1e-3)


@pytest.mark.skipif(not INTERPRETED, reason="no interpreter")
def test_nano_trains_alike_with_interpreted_kernels():
    """Two steps with every Triton kernel and with the references: losses within 2e-4 nats."""
    base = train_gpt.parse_config(
        "--preset=nano --num_layers=2 --unet_skips= --long_window_layers=0 --model_dim=32 --num_heads=1 --device=cpu "
        "--train_seq_len=128 --tokens_per_step=128 --val_seq_len=128 --val_tokens=128 --warmup_steps=0".split()
    )
    tokens = torch.randint(1, 256, (129,), generator=torch.Generator().manual_seed(0))
    losses = {}
    for kernels in ("auto", "triton"):
        trainer = train_gpt.Trainer(dataclasses.replace(base, kernels=kernels), torch.device("cpu"))
        losses[kernels] = [trainer.step(s, [(tokens[:-1].int(), tokens[1:])]).item() for s in range(2)]
    assert max(abs(a - b) for a, b in zip(*losses.values())) <= 2e-4
    assert losses["triton"][1] < losses["triton"][0] - 0.05


@pytest.mark.skipif(not INTERPRETED, reason="no interpreter")
def test_without_gradients_no_gradient_is_made(monkeypatch):
    seen = []
    real = cross_entropy.launch_rows
    monkeypatch.setattr(cross_entropy, "launch_rows", lambda *a, **k: seen.append(a[4]) or real(*a, **k))
    with torch.no_grad():
        losses = linear_cross_entropy(random(9, 8), random(50, 8), torch.arange(9), reduction="none", impl="triton")
    assert seen == [False] and losses.shape == (9,)


def test_touched_rows_are_those_of_the_tokens():
    assert touched_rows([torch.tensor([3, 1]), torch.tensor([3, 7])], 10).tolist() == [1, 3, 7]
