"""`--products`: what trains in 8 bits, what the log says of it, and its older name."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch

import train_gpt
from kernels import cross_entropy, mlp8, products8
from trainer import implementations, products
from trainer.options import from_json
from trainer.techniques import projections

TINY = (
    "--preset=nano --num_layers=2 --attention_free_layers=1 --unet_skips= --long_window_layers=0 --model_dim=32 "
    "--num_heads=1 --device=cpu --train_seq_len=64 --tokens_per_step=64 --val_seq_len=64 --val_tokens=64 "
    "--warmup_steps=0"
).split()


def two_steps(*arguments):
    trainer = train_gpt.Trainer(train_gpt.parse_config([*TINY, *arguments]), torch.device("cpu"))
    tokens = torch.randint(1, 256, (65,), generator=torch.Generator().manual_seed(0))
    losses = [trainer.step(s, [(tokens[:-1].int(), tokens[1:])]).item() for s in range(2)]
    return losses, trainer, tokens


@pytest.fixture(scope="module")
def plain():
    return two_steps()[0]


@pytest.mark.parametrize("chosen, linears, mlps", [("fp8_head", 0, 0), ("fp8_mlp", 0, 2), ("fp8", 2, 2)])
def test_training_by_8_bits_goes_nearly_the_same_way_and_a_validation_is_in_full(
    chosen, linears, mlps, plain, monkeypatch
):
    seen = {"linear": 0, "mlp": 0, "head": 0}

    def counted(name, function):
        def run(*arguments, **options):
            seen[name] += 1
            return function(*arguments, **options)

        return run

    monkeypatch.setattr(products8, "linear", counted("linear", products8.linear))
    monkeypatch.setattr(products, "added_linear_8", counted("linear", mlp8.added_linear_8))
    monkeypatch.setattr(products, "normed_mlp_8", counted("mlp", mlp8.normed_mlp_8))
    monkeypatch.setattr(cross_entropy._Eight, "logits", counted("head", cross_entropy._Eight.logits))
    losses, trainer, tokens = two_steps(f"--products={chosen}")
    assert seen == {"linear": 2 * linears, "mlp": 2 * mlps, "head": 2}
    assert losses[1] < losses[0] - 0.05 and 0 < abs(losses[1] - plain[1]) <= 0.02
    before = dict(seen)
    with torch.no_grad():
        trainer.forward(tokens[None, :-1], tokens[None, 1:], window_blocks=trainer.window)
    assert seen == before


def test_the_log_says_what_runs_and_a_device_without_8_bits_is_no_error(monkeypatch):
    device = torch.device("cpu")
    running = lambda asked: implementations.running(  # noqa: E731
        implementations.asked("reference", "cpu", asked), device, torch.float32, asked
    )
    assert "8 bits" not in " ".join(running("bf16").values())
    assert running("fp8_head")["loss"] == "reference, products in 8 bits"
    assert "8 bits" not in running("fp8_head")["mlp"] and "8 bits" in running("fp8_mlp")["mlp"]
    assert "8 bits" in running("fp8")["attention"]
    monkeypatch.setattr(products8, "available_on", lambda device: False)
    assert implementations.asked("auto", "cpu", "fp8")["products"] == "bf16"
    assert running("fp8")["loss"].endswith("asked for products in 8 bits, fp8: this device has none)")


def test_the_older_name_is_understood(tmp_path):
    parse = train_gpt.parse_config
    for words, now in (
        (["--fp8_head"], "fp8_head"),
        (["--fp8-head=false"], "bf16"),
        (["--products", "fp8"], "fp8"),
        ([], "bf16"),
    ):
        assert parse([*TINY, *words]).products == now
    file = tmp_path / "of_a_run.json"
    file.write_text(json.dumps({"config": {"preset": "nano", "fp8_head": True}}))
    assert parse([f"--config={file}"]).products == "fp8_head"
    assert from_json(train_gpt.Config, '{"fp8_head": true}').products == "fp8_head"
    with pytest.raises(train_gpt.UsageError, match="products"):
        parse(["--products=fp4"])


def test_a_residual_inside_the_product_is_the_sum_of_both():
    """What a GPU takes in place of product and sum: value and gradients against float64, of strided inputs too."""
    drawn = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=drawn, dtype=torch.float64)  # noqa: E731
    inputs = draw(2, 5, 6), draw(2, 5, 8)[..., ::2], draw(6, 4)
    upstream = draw(2, 5, 6)

    def value_and_gradients(function, dtype):
        given = [x.to(dtype).requires_grad_() for x in inputs]
        value = function(*given)
        return [value, *torch.autograd.grad(value, given, upstream.to(dtype))]

    truth = value_and_gradients(lambda r, x, w: r + x @ w.T, torch.float64)
    for ours, right in zip(value_and_gradients(products.added_in_the_product, torch.float32), truth):
        assert ours.shape == right.shape
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chosen", ["bf16", "fp8"])
def test_factors_of_weights_and_their_gradients(chosen):
    """Two blocks of several shapes of weights: x (f w)^T and its gradients, in 16 bits exactly, in 8 nearly."""
    drawn = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=drawn)  # noqa: E731
    mlp = dict(mlp_in_w=draw(64, 32), mlp_out_w=draw(32, 64))
    blocks = [mlp | dict(qkvo_w=draw(4, 32, 32)), mlp | dict(qk_w=draw(2, 16, 32), vo_w=draw(2, 32, 32))]
    factors, x = torch.tensor([[0.5, -2.0], [1.5, 0.7]]), draw(64, 32)
    for tensor in (factors, *(w for block in blocks for name, w in block.items() if name not in mlp)):
        tensor.requires_grad_()
    parts = {n: projections(block) for n, block in enumerate(blocks)}
    modules = [SimpleNamespace(named_parameters=block.items) for block in blocks]
    at = products.of_layers(dict(products=chosen), modules, projections, factors, torch.float32)
    impls_L = [at(0), at(1)]
    for n, (inwards, w_o) in parts.items():
        for place, kind, ws in ((0, "qkv", inwards), (1, "o", [w_o])):
            given = [factors, *(w for name, w in blocks[n].items() if name not in mlp)]
            into = {"qkv": products.linear, "o": functools.partial(products.added, torch.zeros(64, 32))}[kind]
            ours = into(x, impls_L[n][f"w_{kind}"], impls_L[n])
            right = (x.double() @ torch.cat(ws).double().T) * factors[n, place].double()
            upstream = draw(*ours.shape)
            found = [ours, *torch.autograd.grad(ours, given, upstream, retain_graph=True, materialize_grads=True)]
            of_right = torch.autograd.grad(right, given, upstream.double(), materialize_grads=True, retain_graph=True)
            for mine, true in zip(found, [right, *of_right], strict=True):
                size = max(true.norm(), (right * upstream).norm())  # of a factor's: of what it sums up, signs left out
                assert (mine - true).norm() <= (1e-5 if chosen == "bf16" else 0.15) * size
