"""Presets record18, f2, f3 and frontier against their description read literally (tests/frontier_model.py)."""

import dataclasses

import pytest
import torch
from frontier_model import Literal

import train_gpt
from train_gpt import Trainer, parse_config

CPU = torch.device("cpu")
NAMES = ("record18", "f3")


def small(preset, **changes):
    """All techniques of a preset at a size that a float64 twin can follow: 16 layers, D = 32."""
    fields = dict(
        model_dim=32, num_heads=2, vocab_size=200, eos_id=7, dtype="float32", matrix_dtype="", device="cpu",
        num_iterations=12, extension_steps=0, tokens_per_step=64, train_seq_len=32, batch_schedule="",
        val_seq_len=32, val_tokens=32, block_tokens=4, muon_momentum_cooldown=0,
    )  # fmt: skip
    fields |= dict(bigram_rows=640, dynamic_hidden=8) if preset != "record18" else {}
    return train_gpt.check_config(dataclasses.replace(parse_config([f"--preset={preset}"]), **(fields | changes)))


def documents(length, seed, vocab=200, eos=7, mean=15):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (length,), generator=generator)
    tokens[tokens == eos] = eos - 1
    tokens[torch.rand(length, generator=generator) < 1 / mean] = eos
    return tokens


def pairs(count, seed):
    drawn = [documents(33, seed + i) for i in range(count)]
    return [(tokens[:-1], tokens[1:]) for tokens in drawn]


def randomised(model, seed=3):
    """No weight stays zero, so that every path carries gradients; what is tied stays so."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.1 if p.dim() == 1 or "bias" in name or "mixes" in name else 0.5 * model.config.model_dim**-0.5
            p.add_(torch.randn(p.shape, generator=generator), alpha=1.0 if "value_embeds" in name else scale)
        model.embed1.weight.copy_(model.head_w)
    return model


def doubles(model):
    return {name: p.detach().double() for name, p in model.named_parameters()}


def literal_of(trainer, preset):
    return Literal(doubles(trainer.model), 12, f3=preset == "f3", heads=2, eos=7)


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def agree(model, literal, step):
    """Weights after a step. A gradient that is zero but for rounding has no sign, and decay goes by the sign."""
    for name, expected in literal.w.items():
        far = (expected - model.get_parameter(name)).abs() > 2e-3 * max(1e-2, expected.abs().max())
        assert far.double().mean() <= (2e-3 if "embed" in name else 0), (step, name, far.sum())


def model_agrees(trainer, preset, step=2):
    """Loss and every gradient of one step's first sequence."""
    literal, ((tokens, targets),) = literal_of(trainer, preset), pairs(1, seed=step)
    loss, expected = literal.gradients(step, [(tokens, targets)], trainer.config.yarn_until, block=4)
    trainer.set_window(step)
    how = dict(window_blocks=trainer.window, **trainer.loss_at(step))
    ours = trainer.model(tokens[None].int(), targets[None], **how)
    assert ours.item() / len(tokens) == pytest.approx(loss, rel=1e-5)
    ours.backward()
    for name, found in grads(trainer.model).items():
        assert expected[name].abs().max() > 0, name
        assert (found - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


def optimizers_agree(trainer, preset):
    """Six steps on random gradients: Adam updates after every second one, tied, then tied for the last time, then
    alone."""
    literal, generator = literal_of(trainer, preset), torch.Generator().manual_seed(5)
    model, c = trainer.model, trainer.config
    assert train_gpt.schedule.split_step(c) == literal.split == 3
    for step in range(6):
        drawn = {n: 0.1 * torch.randn(p.shape, generator=generator) for n, p in model.named_parameters()}
        for name, p in model.named_parameters():
            p.grad = drawn[name].clone() if p.grad is None else p.grad + drawn[name]
        trainer.update(step)
        literal.update(step, {name: g.double() for name, g in drawn.items()})
        agree(model, literal, step)
    assert not torch.equal(model.embed1.weight, model.head_w)


@pytest.fixture
def trainer(request):
    made = Trainer(small(request.param), CPU)
    randomised(made.model)
    return made


both = pytest.mark.parametrize("trainer, preset", [(name, name) for name in NAMES], indirect=["trainer"], ids=NAMES)


@both
def test_loss_and_every_gradient_equal_the_literal_model(trainer, preset):
    model_agrees(trainer, preset)


@both
def test_optimizers_equal_the_literal_ones(trainer, preset):
    optimizers_agree(trainer, preset)


@both
def test_three_steps_equal_the_literal_run(trainer, preset):
    literal = literal_of(trainer, preset)
    for step in range(3):
        batch = pairs(2, seed=10 * step)
        loss, gradients = literal.gradients(step, batch, trainer.config.yarn_until, block=4)
        ours = trainer.step(step, [(tokens.int(), targets) for tokens, targets in batch])
        assert ours.item() == pytest.approx(loss, rel=2e-5)
        literal.update(step, gradients)
        agree(trainer.model, literal, step)
