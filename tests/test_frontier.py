"""Presets record18, f2, f3 and frontier against their description read literally (tests/frontier_model.py)."""

import dataclasses
import json
import math

import frontier_model
import numpy as np
import pytest
import torch
from frontier_model import T_, Literal, adam_rule, multiplier, plain_frequencies, rms, rotate, yarn
from small_runs import folder_of, in_worlds, losses, tokens

import train_gpt
from data.encoding import longest_prefixes
from kernels import heads
from kernels.cross_entropy import softcapped_logits
from kernels.muon import join_master, orthogonalize, orthogonalize_gram, split_master
from kernels.norm import rms_norm as norm
from kernels.runtime import INTERPRETED
from train_gpt import CHECKPOINT_FORMAT as FORMAT
from train_gpt import GPT, Trainer, parse_config
from trainer import adam, implementations, normuon, products, techniques
from trainer.checkpoints import load_tensors
from trainer.sample import Cache

CPU = torch.device("cpu")
NAMES = ("record18", "f3")


def small(preset, **changes):
    """All techniques of a preset at a size that a float64 twin can follow: 16 layers, D = 32."""
    # fmt: off
    fields = dict(
        model_dim=32, num_heads=2, vocab_size=200, eos_id=7, dtype="float32", products="bf16", matrix_dtype="",
        device="cpu", num_iterations=12, extension_steps=0, tokens_per_step=64, train_seq_len=32, batch_schedule="",
        val_seq_len=32, val_tokens=32, block_tokens=4, muon_momentum_cooldown=0,
    )
    # fmt: on
    fields |= dict(bigram_rows=640, dynamic_hidden=8) if preset != "record18" else {}
    fields |= dict(ngram_rows=320, sampled_softmax="128", tail_ema_steps=4) if preset == "frontier" else {}
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
        if model.tied:
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
    how = dict(window_blocks=trainer.window, **trainer.targets.at(step))
    ours = trainer.model(tokens[None].int(), targets[None], **how)
    assert ours.item() / len(tokens) == pytest.approx(loss, rel=1e-5)
    ours.backward()
    for name, found in grads(trainer.model).items():
        assert expected[name].abs().max() > 0, name
        assert (found - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


def optimizers_agree(trainer, preset):
    """Six steps on random gradients: Adam updates after every second one, tied, then tied for the last time,
    then alone."""
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


def nano(**changes):
    fields = dict(num_iterations=12, tokens_per_step=64, train_seq_len=32, val_seq_len=32, val_tokens=32, device="cpu")
    return train_gpt.check_config(dataclasses.replace(parse_config(["--preset=nano-frontier"]), **(fields | changes)))


@pytest.mark.parametrize("dtype, moves", [("float32", True), ("bfloat16", False)])
def test_large_biases_of_the_dynamic_skips_move_in_float32_alone(dtype, moves):
    """As #261 stores them, a step of its Adam (0.001) is less than half of a bfloat16's spacing at 4.34 and at 8.7."""
    trainer = Trainer(nano(dynamic_bias_dtype=dtype, adam_every=1), CPU)
    bias = trainer.model.techniques.dynamic.bias
    before = bias.detach().clone()
    random = torch.Generator().manual_seed(0)
    draw = lambda: torch.randint(1, 256, (32,), generator=random)  # noqa: E731
    with torch.no_grad():
        trainer.model.head_w.normal_(generator=random)
    for step in range(4):
        trainer.step(step, [(draw(), draw()) for _ in range(2)])
    changed = bias.detach() != before
    assert bias.dtype == getattr(torch, dtype)
    assert changed[before.abs() > 4].any() == moves and changed[before.abs() < 0.01].any()


@pytest.mark.parametrize("preset", NAMES)
def test_in_bfloat16_the_masters_lose_nothing(preset):
    """NorMuon with 16 more bits beside each weight: three steps against float32 masters, each orthogonalised in
    bfloat16; the weights that the model sees are the masters' upper halves."""
    trainer = Trainer(small(preset, dtype="bfloat16"), CPU)
    muon, generator = randomised(trainer.model) and trainer.muon, torch.Generator().manual_seed(2)
    masters = {n: p.detach().float().clone() for n, p in muon.named.items()}
    literal = Literal({n: p.clone() for n, p in masters.items()}, 12, f3=preset == "f3", heads=2, eos=7)
    with pytest.MonkeyPatch.context() as patch:
        whole = frontier_model.orthogonal
        patch.setattr(frontier_model, "orthogonal", lambda u: whole(u.bfloat16()).float())
        for step in range(3):
            for name, p in muon.named.items():
                p.grad = torch.randn(p.shape, generator=generator).bfloat16()
                f = frontier_model.rate_factor(step, 12)
                with torch.no_grad():
                    literal.normuon(name, p.grad.float(), 0.015 * f, 0.85 + 0.1 * step / 300)
            muon.step(step)
    for name, p in muon.named.items():
        high = p.detach().view(torch.int16).int() << 16
        ours = (high | (muon.mantissa[name].view(torch.int16).int() & 0xFFFF)).view(torch.float32)
        moved = (literal.w[name] - masters[name]).norm()
        near = 0.15 if "gates" in name else 0.06  # bfloat16, rounded in other places; a gate has two rows
        assert (ours - literal.w[name]).norm() <= near * moved, name
        assert torch.equal(p.detach(), (ours.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16))


def test_the_update_of_a_split_master_is_that_of_the_whole_one():
    """Bit for bit, and the formula: decay where the signs agree, by the weight before the update."""
    generator = torch.Generator().manual_seed(1)
    master, update = (torch.randn(40, 24, generator=generator) for _ in range(2))
    update[0], master[1] = 0, 0
    weight, mantissa = split_master(master)
    whole = master.clone()
    normuon.apply_cautious_(whole, None, update, 0.03, 0.01)
    normuon.apply_cautious_(weight, mantissa, update, 0.03, 0.01)
    assert torch.equal(join_master(weight, mantissa), whole)
    for p, u, new in zip(master.flatten().tolist(), update.flatten().tolist(), whole.flatten().tolist()):
        assert new == pytest.approx(p - 0.03 * u - (0.01 * p if u * p >= 0 else 0), abs=1e-6)


def test_rows_of_one_size_and_the_norm_as_before():
    """A gradient of zeros stays zeros: a value gate has one as long as its table is zero."""
    update, second = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 6, 1)
    out = normuon.balance_(second, update, 0.95)
    torch.testing.assert_close(out.norm(dim=(1, 2)), update.norm(dim=(1, 2)))
    torch.testing.assert_close(out.norm(dim=2), out.norm(dim=2).mean(1, keepdim=True).expand(2, 6))
    torch.testing.assert_close(second[..., 0], 0.05 * update.square().mean(2))
    assert not normuon.balance_(torch.zeros(1, 3, 1), torch.zeros(1, 3, 4), 0.95).any()


# --- numbers of the presets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["record18", "f2", "f3", "frontier"])
def test_parameters_are_those_of_the_description(preset):
    later, f3 = preset != "record18", preset in ("f3", "frontier")
    config = parse_config([f"--preset={preset}"])
    with torch.device("meta"):
        model = GPT(config)
    D, V = 1024, 50304
    expected = {"head_w": (V, D), "embed1.weight": (V, D), "embed2.weight": (V, D)}
    expected |= {f"value_embeds.{i}.weight": (V, D) for i in range(5)}
    for i in range(16):
        expected |= {f"blocks.{i}.qkvo_w": (4, D, D), f"blocks.{i}.mlp_in_w": (4 * D, D)}
        expected[f"blocks.{i}.mlp_out_w"] = (D, 4 * D)
    more = {"mixes": (16, 2), "smear_w": (1, 16), "skip_w": (3, 16), "output_gates": (16, 8, 16)}
    more["value_gates"] = (9 if f3 else 10, 8, 16)  # layer 15's gate is a network's
    more |= {"bigram_embed.weight": (251520, D), "bigram_mixes": (16,)} if later else {}
    if preset == "frontier":
        del more["output_gates"]  # a network's, as are the factors of exclusive attention
        more |= {"dynamic_gates.in_w": (2, 64, D), "dynamic_gates.out_w": (16 * 24, 64), "dynamic_gates.bias": (16, 16)}
        more |= {"head_mixing.in_w": (16, D), "head_mixing.out_w": (16, 16), "head_mixing.bias": (16,)}
        more |= {"dynamic_gates.scale": (1,), "ngrams.weight": (2**24, D)}
    expected |= {f"value_embeds.{i}.weight": (V, D) for i in range(5, 10)} if preset == "frontier" else {}
    more |= {"dynamic.in_w": (2, 64, D), "dynamic.out_w": (2, 16, 64), "dynamic.bias": (2, 2, 8)} if f3 else {}
    expected |= {"scalars": (56,)} | {f"techniques.{name}": shape for name, shape in more.items()}
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == expected
    assert sum(model.scalar_sizes.values()) - model.scalar_sizes["unused"] == (52 if f3 else 53)
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    numbers = {
        "scalars",
        "techniques.dynamic_gates.bias",
        "techniques.dynamic_gates.scale",
        "techniques.head_mixing.bias",
        "techniques.mixes",
        "techniques.bigram_mixes",
        "techniques.dynamic.bias",
    } & expected.keys()
    matrices = {name for name in expected if name.startswith("blocks.") or "_gates" in name}
    assert wide == numbers | (set() if later else matrices)
    assert model.skips == {9: 6, 10: 4, 11: 2} and model.techniques.long == model.techniques.offset == [0, 4, 11, 15]
    assert all(block.has_attention for block in model.blocks)


def test_initial_values_are_those_of_the_description():
    torch.manual_seed(0)
    model = GPT(small("f3", model_dim=128, num_heads=2, vocab_size=1000))
    D, t, w = 128, model.techniques, {name: p.detach() for name, p in model.named_parameters()}
    zeros = {name for name, p in w.items() if not p.any()}
    free = {"mixes", "smear_w", "skip_w", "output_gates", "value_gates", "bigram_embed.weight", "dynamic.out_w"}
    expected = {f"techniques.{name}" for name in free} | {f"value_embeds.{i}.weight" for i in range(5)}
    assert zeros == expected | {f"blocks.{i}.mlp_out_w" for i in range(16)}
    assert torch.equal(w["head_w"], w["embed1.weight"]) and w["head_w"].std().item() == pytest.approx(0.005, rel=0.02)
    assert w["embed2.weight"].std().item() == pytest.approx(1, rel=0.02)
    for i in range(16):
        assert not w[f"blocks.{i}.qkvo_w"][3].any()
        assert w[f"blocks.{i}.qkvo_w"][:3].std().item() == pytest.approx(D**-0.5, rel=0.02)
        assert w[f"blocks.{i}.mlp_in_w"].std().item() == pytest.approx(0.5 * D**-0.5, rel=0.02)
    assert w["techniques.bigram_mixes"].eq(0.05).all() and w["techniques.dynamic.in_w"].abs().max() <= D**-0.5
    assert w["techniques.dynamic.in_w"].std().item() == pytest.approx(D**-0.5 / 3**0.5, rel=0.05)
    kinds = model.scalars_by_kind()
    assert kinds["skips"].eq(-1.5).all() and kinds["mixes"].eq(torch.tensor(1.05)).all() and kinds["smear"].eq(0).all()
    assert kinds["values"].eq(torch.tensor([0.5, 1.0])).all() and "backout" not in kinds
    assert GPT(small("record18")).scalars_by_kind()["backout"].tolist() == [0.5]
    sc, bias = 0.2 / 3**0.5, torch.zeros(2, 2, 8)
    bias[0, :, 4], bias[0, :, 5], bias[0, 0, 7], bias[1, 1, 1] = 1.05 / sc, 1 / sc, 0.05 / sc, -4.34
    torch.testing.assert_close(t.dynamic.bias.detach(), bias)
    gate = 2 * torch.sigmoid(kinds["skips"][0]) * torch.sigmoid(torch.zeros(()))
    assert gate.item() == pytest.approx(0.18, abs=0.003)


@pytest.mark.parametrize("preset", ["record18", "f2", "f3"])
def test_optimizers_have_the_rates_of_the_description(preset):
    trainer, f3 = Trainer(small(preset), CPU), preset != "record18"
    c = trainer.config
    for name, (rate, b1, b2, decay) in trainer.adam.constants.items():
        expected = adam_rule(name, f3)
        assert (rate, b1, b2, decay) == (*expected[:3], pytest.approx(0.005 * expected[3])), name
    assert c.adam_eps == 1e-8 and c.adam_every == 2 and c.adam_moments == ("float32" if f3 else "weights")
    assert (c.muon_lr, c.muon_weight_decay, c.normuon_beta2) == (0.015, 1.2, 0.95)
    gates = {name for name in trainer.muon.named if "gates" in name}
    assert gates == (set() if f3 else {"techniques.output_gates", "techniques.value_gates"})
    for name in trainer.muon.named:
        assert trainer.muon.factors.get(normuon.kind_of(name), 1) == multiplier(name, f3), name
    assert {*trainer.muon.named, *trainer.adam.named} == {name for name, _ in trainer.model.named_parameters()}


def test_what_frontier_adds_has_the_rates_of_its_kind():
    trainer = Trainer(small("frontier"), CPU)
    network, bias = (0.001, 0.9, 0.99, 0.005), (0.001, 0.9, 0.99, 0.0)
    expected = {"dynamic_gates.in_w": network, "dynamic_gates.out_w": network, "dynamic_gates.bias": bias}
    expected |= {"head_mixing.in_w": network, "head_mixing.out_w": network, "head_mixing.bias": bias}
    expected |= {"dynamic_gates.scale": (0.02, 0.9, 0.99, 0.0)}
    for name, rates in expected.items():
        assert trainer.adam.constants[T_ + name] == pytest.approx(rates), name
    named = {name for name, _ in trainer.model.named_parameters()}
    assert {*trainer.muon.named, *trainer.adam.named, T_ + "ngrams.weight"} == named  # which has its own, in rows
    assert trainer.config.ngram_lr == 0.3 and trainer.rows.beta2 == 0.95
    assert {name.partition(".")[2] for name in trainer.rows.state()} == {
        f"{k}.techniques.ngrams.weight" for k in ("second", "count")
    }


def test_the_first_loss_is_that_of_almost_equal_classes():
    """ln 50304 + 0.01, as published: the tied head is not quite zero."""
    c = small("record18", vocab_size=50257, eos_id=50256, model_dim=64, num_heads=1)
    torch.manual_seed(0)
    tokens, targets = documents(33, 1, 50257, 50256)[:-1], documents(33, 1, 50257, 50256)[1:]
    with torch.no_grad():
        loss = GPT(c)(tokens[None], targets[None], window_blocks=3).item()
    assert loss == pytest.approx(math.log(50304), abs=0.02)


# --- planted faults: each turns one of the comparisons red -----------------------------------------------------------


def smear_reads_the_normed_embedding(monkeypatch):
    whole = techniques.smeared
    monkeypatch.setattr(techniques, "smeared", lambda e, *rest: whole(norm(e), *rest))


def gates_read_other_dimensions(monkeypatch):
    monkeypatch.setattr(techniques, "gate", lambda x, w: torch.sigmoid(x[..., :16].roll(1, -1) @ w.T))


def keys_alias(monkeypatch):
    def offset_keys(k, before=None):
        k = k.clone()
        quarter = k.size(-1) // 4
        for d in (slice(quarter, 2 * quarter), slice(3 * quarter, None)):
            k[..., d] = k[:, :1, :, d]  # what copying position by position in place ends in
        return k

    monkeypatch.setattr(heads, "offset_keys", offset_keys)


def bigram_of_the_next_token(monkeypatch):
    picks = techniques.BigramRows.__call__
    monkeypatch.setattr(techniques.BigramRows, "__call__", lambda self, t: picks(self, t.roll(-1, -1)))


def values_scaled_twice(monkeypatch):
    valued = heads.valued
    monkeypatch.setattr(heads, "valued", lambda v, *rest: valued(0.5 * v, *rest))


FAULTS = dict(
    record18=[smear_reads_the_normed_embedding, gates_read_other_dimensions, keys_alias, values_scaled_twice],
    f3=[bigram_of_the_next_token],
)


@pytest.mark.parametrize("preset, plant", [(preset, plant) for preset, plants in FAULTS.items() for plant in plants])
def test_a_fault_in_the_model_is_seen(preset, plant, monkeypatch):
    trainer = Trainer(small(preset), CPU)
    randomised(trainer.model)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        model_agrees(trainer, preset)


def decay_without_the_rate(monkeypatch):
    apply = normuon.apply_cautious_
    monkeypatch.setattr(
        normuon, "apply_cautious_", lambda w, m, u, lr, decay, *how: apply(w, m, u, lr, decay / lr, *how)
    )


def decay_against_the_weight(monkeypatch):
    apply = normuon.apply_cautious_
    monkeypatch.setattr(normuon, "apply_cautious_", lambda w, m, u, lr, decay, *how: apply(w, m, u, lr, -decay, *how))


def columns_for_rows(monkeypatch):
    monkeypatch.setattr(normuon.NorMuon, "_row_sums", staticmethod(lambda name, x: x[..., :1]))


def the_split_forgets_the_moments(monkeypatch):
    follow = adam.Adam.follow
    monkeypatch.setattr(adam.Adam, "follow", lambda self, step, *rest: follow(self, min(step, 2), *rest))


def the_split_comes_late(monkeypatch):
    monkeypatch.setattr(adam.Adam, "tied", lambda self, step: step <= self.split + 2)


def adam_forgets_the_even_step(monkeypatch):
    update = Trainer.update

    def forgetful(self, step):
        update(self, step)
        self.model.zero_grad(set_to_none=True)

    monkeypatch.setattr(Trainer, "update", forgetful)


@pytest.mark.parametrize(
    "plant",
    [
        decay_without_the_rate,
        decay_against_the_weight,
        columns_for_rows,
        the_split_forgets_the_moments,
        the_split_comes_late,
        adam_forgets_the_even_step,
    ],
)
def test_a_fault_in_an_optimizer_is_seen(plant, monkeypatch):
    plant(monkeypatch)
    trainer = Trainer(small("record18"), CPU)
    randomised(trainer.model)
    with pytest.raises(AssertionError):
        optimizers_agree(trainer, "record18")


# --- causality ------------------------------------------------------------------------------------------------------


def causal_case(preset, **changes):
    """(model, tokens of two documents, the same with other ones after `at`, where the second document opens, at)."""
    made = nano if preset.startswith("nano") else lambda **more: small(preset, **more)
    more = dict(ngram_rows=512, dynamic_gates=2, head_mixing=True) if preset == "nano-more" else {}
    model = Trainer(made(**changes, **more), CPU).model
    T, opened, at, vocab, eos = 64, 30, 40, model.config.vocab_size, model.config.eos_id
    tokens = documents(T, 5, vocab=vocab, eos=eos)
    tokens[opened] = eos
    tokens[opened + 1 : at + 1] = torch.arange(50, 50 + at - opened)
    other = torch.cat([tokens[: at + 1], documents(T - at - 1, 6, vocab=vocab, eos=eos)])
    return randomised(model), tokens, other, opened, at


@pytest.mark.parametrize("preset", ["record18", "f2", "f3", "frontier", "nano-frontier", "nano-more"])
def test_no_logit_depends_on_a_later_token(preset):
    model, tokens, other, _, at = causal_case(preset)
    with torch.no_grad():
        logits, others = (model(t[None], window_blocks=20)[0] for t in (tokens, other))
    torch.testing.assert_close(logits[: at + 1], others[: at + 1], rtol=0, atol=1e-6)
    assert not torch.allclose(logits[at + 1 :], others[at + 1 :], atol=1e-2)


@pytest.mark.parametrize("preset", ["record18", "f2", "f3", "frontier", "nano-frontier", "nano-more"])
def test_documents_do_not_see_each_other(preset):
    """A position's logits have a gradient by its own document's embeddings, and by that of the one token
    before it, which smear lets through. Moved keys let more through, as they are told to: at a border they are
    another document's."""
    for offset, first in (("", lambda opened: opened - 1), (None, lambda opened: 0)):
        model, tokens, _, opened, at = causal_case(preset, **({} if offset is None else {"key_offset": offset}))
        seen = []
        hook = model.embed1.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out))
        logits = model(tokens[None], window_blocks=20)[0, at]
        hook.remove()
        (gradient,) = torch.autograd.grad(logits.square().sum(), seen[0])
        moved = (gradient[0].abs().sum(-1) > 0).nonzero().flatten().tolist()
        assert moved == list(range(first(opened), at + 1))


# --- past the published runs ----------------------------------------------------------------------------------------


def plain_small(**changes):
    """Medium's architecture at the size of `small`, four layers."""
    fields = dict(
        num_layers=4, unet_skips="1>3", long_window_layers="0,3", attention_free_layers="", value_embeddings=1
    )
    fields |= dict(model_dim=32, num_heads=4, vocab_size=200, eos_id=7, dtype="float32", device="cpu", block_tokens=8)
    fields |= dict(num_iterations=12, tokens_per_step=32, train_seq_len=32, val_seq_len=32, val_tokens=32)
    return train_gpt.check_config(dataclasses.replace(train_gpt.Config(), **(fields | changes)))


def test_techniques_that_do_nothing_leave_the_plain_model():
    """The pass with room for techniques, told to do what medium does, is medium's."""
    plain, other = (randomised(Trainer(plain_small(**more), CPU).model) for more in ({}, {"xsa": True}))
    other.techniques.xsa_w.data.zero_()
    other.load_state_dict(plain.state_dict(), strict=False)
    tokens = documents(50, 1)[None]
    found = [model(tokens, tokens, window_blocks=2) for model in (plain, other)]
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    for loss in found:
        loss.backward()
    for name, p in plain.named_parameters():
        torch.testing.assert_close(p.grad, other.get_parameter(name).grad, rtol=1e-4, atol=1e-6)


def test_exclusive_attention_is_its_formula():
    o, v = (torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in (1, 2))
    alpha, found = torch.tensor([0.0, 0.7, -2.0], dtype=torch.float64), o.clone()
    for b, t, h in np.ndindex(2, 5, 3):
        share = float(o[b, t, h] @ v[b, t, h]) / float(v[b, t, h] @ v[b, t, h])
        found[b, t, h] = o[b, t, h] - math.tanh(alpha[h]) * share * v[b, t, h]
    torch.testing.assert_close(heads.exclusive(o, v, alpha), found)
    everything = heads.exclusive(o, v, torch.full((3,), 30.0, dtype=torch.float64))
    assert (everything * v).sum(-1).abs().max() < 1e-12, "nothing along the own value is left"


def test_paired_heads_are_one_head_over_twice_the_positions():
    """One layer against a loop over pairs, positions and keys."""
    config = plain_small(num_layers=1, unet_skips="", long_window_layers="", paired_heads="0", value_embeddings=0)
    model = randomised(Trainer(config, CPU).model)
    tokens, H, Dh, T = documents(40, 3, mean=12), 4, 8, 40
    with torch.no_grad():
        x = torch.randn(1, T, 32, generator=torch.Generator().manual_seed(1))
        cos, sin = (table[: 2 * T] for table in model.rotary(2 * T))
        plan = model.plan(techniques.doubled(tokens[None], 7), 2)
        impls = products.of_layers(model.impls, model.blocks)(0)
        given = (cos, sin), plan, impls, model, None, (None, None)
        ours = model.techniques.attend(model.blocks[0], x, None, model.scalars_by_kind()["values"][0], *given)
    w = model.blocks[0].qkvo_w.detach().double()
    q, k, v = (rms((x[0].double() @ part.T).view(T, H, Dh)) for part in w[:3])
    found, document = torch.zeros(T, H, Dh, dtype=torch.float64), (tokens == 7).cumsum(0)
    turn = lambda z, place: rotate(z[None, None].expand(place + 1, 1, Dh), plain_frequencies(Dh))[-1, 0]  # noqa: E731
    for t, h in np.ndindex(T, H):
        place, logits, values = 2 * t + h % 2, [], []
        for s, other in np.ndindex(t + 1, 2):
            key = 2 * s + other
            if key <= place and key // 8 > place // 8 - 2 and document[s] == document[t]:
                one, two = turn(q[t, h], place), turn(k[s, h - h % 2 + other], key)
                logits.append(config.attention_scale * (one @ two))
                values.append(v[s, h - h % 2 + other])
        found[t, h] = torch.stack(logits).softmax(0) @ torch.stack(values)
    expected = float(model.scalars_by_kind()["values"][0, 0]) * found.view(T, 32)
    torch.testing.assert_close(ours.y[0].double(), expected, rtol=1e-3, atol=1e-5)


def test_untied_values_give_each_layer_a_table_of_its_own():
    c = plain_small(num_layers=5, value_embeddings=2, untied_values=True)
    model = randomised(Trainer(c, CPU).model)
    assert len(model.value_embeds) == 4
    seen, real = {}, techniques.Techniques.attend
    with pytest.MonkeyPatch.context() as patch:

        def attend(self, block, x, ve, *rest):
            seen[block.layer] = ve
            return real(self, block, x, ve, *rest)

        patch.setattr(techniques.Techniques, "attend", attend)
        tokens = documents(20, 1)[None]
        model(tokens)
    for layer, table in {0: 0, 1: 1, 3: 2, 4: 3}.items():
        assert torch.equal(seen[layer], model.value_embeds[table](tokens))
    assert seen[2] is None


def normuon_of(**changes):
    config = plain_small(normuon_beta2=0.95, muon_coefficients="record18", cautious_decay=True, **changes)
    trainer = Trainer(config, CPU)
    return randomised(trainer.model) and trainer.muon


def test_two_rate_momentum_starts_from_the_old_one():
    muon, generator = normuon_of(two_rate_from=0.25), torch.Generator().manual_seed(1)
    name, fast, slow = "blocks.1.mlp_in_w", None, None
    old = torch.zeros(128, 32, dtype=torch.float64)
    for step in range(6):
        for p in muon.named.values():
            p.grad = torch.randn(p.shape, generator=generator)
        g, mu = muon.named[name].grad.double(), 0.85 + 0.1 * step / 300
        if step < 3:
            old = old + (1 - mu) * (g - old)
            m = old
        else:
            fast, slow = (old, old) if step == 3 else (fast, slow)
            fast, slow = fast + 0.15 * (g - fast), slow + 0.02 * (g - slow)
            m = 0.4385 * fast + 0.5615 * slow
        found = {n: muon.momentum_of(n, step, mu) for n in muon.named}
        torch.testing.assert_close(found[name].double(), g + mu * (m - g), rtol=1e-5, atol=1e-6)


def test_head_pairs_are_orthogonalised_apart():
    muon, whole = normuon_of(muon_head_pairs=True), normuon_of()
    for one in (muon, whole):
        generator = torch.Generator().manual_seed(1)
        for p in one.named.values():
            p.grad = torch.randn(p.shape, generator=generator)
    name, before = "blocks.2.qkvo_w", muon.named["blocks.2.qkvo_w"].detach().clone().double()
    g = muon.named[name].grad.double()
    muon.step(0), whole.step(0)
    u = 0.15 * g + 0.85 * 0.0 + (0.15 * 0.85) * g  # mu 0.85, from zero momentum: g + mu ((1 - mu) g - g)
    for part in range(4):
        pieces = [u[part][:16], u[part][16:]] if part < 2 else [u[part]]  # two heads of eight rows each
        rows = []
        for piece in pieces:
            X = frontier_model.orthogonal(piece)
            v = 0.05 * X.square().mean(1, keepdim=True)
            scaled = X / v.sqrt()
            rows.append(scaled * X.norm() / scaled.norm())
        X, lr = torch.cat(rows), muon.config.muon_lr
        decay = muon.config.muon_weight_decay * lr * lr
        expected = before[part] - lr * X - decay * before[part] * (X * before[part] >= 0)
        torch.testing.assert_close(muon.named[name][part].double(), expected, rtol=1e-3, atol=1e-5)
    assert not torch.equal(muon.named[name][0], whole.named[name][0])
    torch.testing.assert_close(muon.named[name][3], whole.named[name][3], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 16, 64), (1, 64, 16), (8, 8)])
def test_steps_through_the_gram_matrix_are_the_same_steps(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for coefficients in ("record18", "spec"):
        plain = orthogonalize(g, coefficients=coefficients, dtype=torch.float64)
        torch.testing.assert_close(orthogonalize_gram(g, coefficients, torch.float64), plain, rtol=1e-9, atol=1e-9)
        half = orthogonalize_gram(g.bfloat16(), coefficients)
        assert half.dtype == torch.bfloat16 and (half.double() - plain).norm() <= 0.1 * plain.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_last_weights_are_mixed_with_their_average(dtype):
    """Six steps, the average over the last four; what the optimizers left after each is written down beside it."""
    trainer = Trainer(nano(tail_ema=0.9, tail_ema_steps=4, num_iterations=6, dtype=dtype), CPU)
    randomised(trainer.model)
    names, after = ["head_w", "embed1.weight", "blocks.2.qkvo_w", "blocks.3.mlp_out_w"], []
    whole, average = trainer.average.after, trainer.average
    trainer.average.after = lambda step: after.append({n: average.master(n).double() for n in names}) or whole(step)
    generator = torch.Generator().manual_seed(1)
    for step in range(6):
        batch = [torch.randint(200, (33,), generator=generator) for _ in range(2)]
        trainer.step(step, [(tokens[:-1].int(), tokens[1:]) for tokens in batch])
    for name in names:
        mean = after[2][name]
        for later in after[3:]:
            mean = 0.9 * mean + 0.1 * later[name]
        share, axes = (0.65, -1) if name in names[:2] else (0.5, (-2, -1))
        last = after[5][name]
        new = (1 - share) * last + share * mean
        new = new * last.norm(dim=axes, keepdim=True) / new.norm(dim=axes, keepdim=True)
        near = 1e-5 if dtype == "float32" or name not in names[:2] else 4e-3  # tables have no bits below
        torch.testing.assert_close(average.master(name).double(), new, rtol=near, atol=1e-6)
        assert not torch.equal(last, new)
    assert {n for n in trainer.state() if n.startswith("ema.")} == {n for n in trainer.layout() if n.startswith("ema.")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_taken_ahead_of_the_weights(dtype):
    """Twenty steps of random gradients, Adam on every second: what an update leaves is x', and the next one begins at
    x' + beta m', by the formula in float64; beta by its own words. The tied table begins after the split."""
    trainer = Trainer(nano(ema_nesterov=0.6, num_iterations=20, lr_schedule="1,2", dtype=dtype), CPU)
    randomised(trainer.model)
    ahead, c, x, m, moved = trainer.ahead, trainer.config, {}, {}, set()

    def value(name):
        p, low = ahead.named[name].detach(), ahead.mantissa.get(name)
        return p.double() if low is None else join_master(p, low).double()

    def after(step, updated):
        new = {n: value(n).clone() for n in updated}
        train_gpt.Ahead.after(ahead, step, updated)
        f = frontier_factor(step + 1, c)
        beta = 0.6 * f / 2 if 0.15 <= (step + 1) / 20 < 0.75 else 0.0
        for n in updated:
            fresh = n not in x or (n == "embed1.weight" and step <= trainer.adam.split + 2)
            m[n] = torch.zeros_like(new[n]) if fresh else 0.99 * m[n] + 0.01 * (new[n] - x[n])
            x[n] = new[n]
            near = 4e-3 if ahead.named[n].dtype == torch.bfloat16 and n not in ahead.mantissa else 1e-5
            torch.testing.assert_close(value(n), x[n] + beta * m[n], rtol=near, atol=1e-6)
            moved.update({(n, beta > 0)} if not torch.equal(value(n), new[n]) else ())

    ahead.after, generator = after, torch.Generator().manual_seed(1)
    for step in range(20):
        for p in trainer.model.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        trainer.update(step)
    assert {n for n, _ in moved} >= {"head_w", "embed1.weight", "blocks.2.qkvo_w", "scalars"}
    assert all(inside for _, inside in moved), "x itself is where beta is 0"


def frontier_factor(step, c):
    """Of `--lr_schedule=1,2`, read literally."""
    most, cooling = (1.0 if step <= 20 / 12 else 2.0), 1 - c.cooldown_frac
    x = step / 20
    return most if x < cooling else most * (1 - x) / c.cooldown_frac + c.lr_floor * (1 - (1 - x) / c.cooldown_frac)


def test_prefixes_are_the_longest_tokens_that_a_token_begins_with():
    pieces = [b"a", b"b", b"ab", b"abc", b"abcde", b"", b"ca", b"xy"]
    assert longest_prefixes(pieces).tolist() == [-100, -100, 0, 2, 3, -100, -100, -100]


def test_a_prefix_is_one_more_target(monkeypatch):
    """In the first part of the run with its whole weight, falling in the second, then gone; against plain torch."""
    table = np.array([-100 if token % 3 else token // 2 for token in range(200)])
    monkeypatch.setattr(techniques, "prefix_tokens", lambda size, vocab: table)
    trainer = Trainer(plain_small(mtp=3, loss_sum=True, prefix_loss=0.25, num_iterations=120), CPU)
    model, at = randomised(trainer.model), trainer.targets.at
    found = {step: [round(w, 6) for w in at(step)["target_weights"].tolist()] for step in (0, 5, 10, 15, 20)}
    expected = {0: [1, 0.5, 0.25, 0.25], 5: [1, 0.5, 0.125, 0.25], 10: [1, 0.5, 0.25], 15: [1, 0.25, 0.125], 20: [1]}
    assert found == expected
    drawn = documents(33, 1)
    tokens, targets = drawn[:-1], drawn[1:]
    loss = model(tokens[None], targets[None], window_blocks=2, **at(15)).item()
    with torch.no_grad():
        log_p = softcapped_logits(model.hidden(tokens[None], 2)[0], model.head_w).double().log_softmax(-1)
    by_hand = 0.0
    for t in range(32):
        by_hand -= float(log_p[t, targets[t]])
        by_hand -= 0.25 * float(log_p[t, targets[t + 1]]) if t + 1 < 32 else 0
        by_hand -= 0.125 * float(log_p[t, table[targets[t]]]) if table[targets[t]] >= 0 else 0
    assert loss == pytest.approx(by_hand, rel=1e-5)
    validated = model(tokens[None], targets[None], window_blocks=2).item()  # on the next token alone
    assert validated == pytest.approx(-float(log_p[torch.arange(32), targets].mean()), rel=1e-5)


# --- what a run does with them ---------------------------------------------------------------------------------------


def test_text_token_by_token_is_that_of_the_whole_sequence():
    """With a cache: smear, bigram and moved keys need the token before; so do borders of documents."""
    model = randomised(Trainer(nano(ngram_rows=512, dynamic_gates=2, head_mixing=True), CPU).model).eval()
    tokens, cache = documents(40, 8, vocab=256, eos=0)[None], Cache()
    with torch.no_grad():
        whole = model(tokens)
        parts = [model(part, cache=cache) for part in tokens.split([17, 1, 1, 1, 7, 13], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_windows_and_yarn_of_a_step_are_those_of_the_run():
    """At every step the model's tables are the step's, in place; a last validation changes the window alone."""
    trainer = Trainer(small("f3", yarn_until=0), CPU)
    tables, model = trainer.model.rotary_tables, trainer.model
    for step in (0, 1, 5, 12, 2):
        trainer.set_window(step)
        frequencies, scale = yarn(min(step, 11), 12, plain_frequencies(16), until=0, block=4)
        angles = torch.arange(40)[:, None].double() * torch.tensor(frequencies, dtype=torch.float64)
        torch.testing.assert_close(model.rotary(32)[0][:40].double(), angles.cos(), rtol=0, atol=1e-4)
        assert model.rotary(32)[0] is tables[0] and model.query_factor.item() == pytest.approx(scale / 0.1)


RUN = """--preset=nano-frontier --num_iterations=8 --tokens_per_step=256 --train_seq_len=64 --val_seq_len=64
--val_tokens=128 --val_loss_every=2 --checkpoint_every=2 --keep_checkpoints=0 --warmup_steps=2 --num_layers=3
--model_dim=32 --unet_skips=0>1 --long_window_layers=0,2 --key_offset=0,2 --late_attention_source=0 --dynamic_skips=0,1
--bigram_rows=512 --paired_heads=1 --tail_ema=0.9 --tail_ema_steps=3 --ema_nesterov=0.6 --ngram_rows=512
--dynamic_gates=1 --head_mixing=true --sampled_softmax=128 --narrow_qk=8 --narrow_qk_layers=0,2 --device=cpu
--run_name=run""".split()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("frontier") / "data", tokens(9000), val=tokens(600, 1))


def words(shards, out, *more):
    files = [f"--train_files={shards}/train_*.bin", f"--val_files={shards}/val_*.bin", f"--output_dir={out}"]
    return list({word.partition("=")[0]: word for word in [*RUN, *files, *more]}.values())


def test_a_run_resumes_bit_for_bit_before_and_after_the_split(shards, tmp_path):
    """Warm-up leaves no trace, either: of gradients that wait for the next step, above all."""
    assert train_gpt.main(words(shards, tmp_path)) == 0
    first, folder = losses(tmp_path / "run.txt"), tmp_path / "run.checkpoints"
    states = {step: load_tensors(folder / f"step-{step:06d}.safetensors", FORMAT)[1] for step in (2, 4, 8)}
    assert torch.equal(states[2]["model.embed1.weight"], states[2]["model.head_w"])
    assert not torch.equal(states[8]["model.embed1.weight"], states[8]["model.head_w"])
    for step in (2, 6):
        for path in folder.glob("*.safetensors"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()
        assert train_gpt.main(words(shards, tmp_path, "--resume=auto", "--warmup_steps=0")) == 0
        assert losses(tmp_path / "run.txt") == first
        again = load_tensors(folder / "step-000008.safetensors", FORMAT)[1]
        assert all(torch.equal(again[name], tensor) for name, tensor in states[8].items())


def test_two_processes_train_as_one_does(shards, tmp_path):
    """Plain and overlapped; what waits for the next step is sent with it, the rows of both steps' tokens."""
    plain, overlap = ["--communication=plain", "--run_name=plain"], ["--communication=overlap", "--run_name=overlap"]
    in_worlds(words(shards, tmp_path), [[1, "--run_name=one"], [2, *plain], [2, *overlap]], double=True)
    one, plain, overlap = (losses(tmp_path / f"{name}.txt") for name in ("one", "plain", "overlap"))
    assert plain == overlap and [row[:2] for row in one] == [row[:2] for row in plain]
    assert max(abs(float(a[2]) - float(b[2])) for a, b in zip(one, plain)) <= 1e-6
    states = [
        load_tensors(tmp_path / f"{n}.checkpoints/step-000008.safetensors", FORMAT)[1] for n in ("plain", "overlap")
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_what_knows_only_the_plain_model_says_so(shards, tmp_path, capsys):
    assert train_gpt.main(words(shards, tmp_path, "--num_iterations=2", "--warmup_steps=0", "--tail_ema=0")) == 0
    path = str(next((tmp_path / "run.checkpoints").glob("*.safetensors")))
    assert train_gpt.main(["export", path, str(tmp_path / "folder")]) == 2
    assert "smear" in capsys.readouterr().err
    assert train_gpt.main(["export", path, str(tmp_path / "weights.safetensors")]) == 0
    assert train_gpt.main(["sample", path, "--max_new_tokens=4", "--device=cpu"]) == 0
    capsys.readouterr()
    assert train_gpt.main(["evaluate", path, "--json", "--device=cpu"]) == 0
    told, run = json.loads(capsys.readouterr().out), json.loads((tmp_path / "run.json").read_text())
    assert told["loss"] == pytest.approx(run["final_loss"], abs=1e-5)
    own = [word for word in words(shards, tmp_path) if word.partition("=")[0] in ("--train_files", "--val_files")]
    own += [f"--output_dir={tmp_path}", "--run_name=second", "--device=cpu", "--warmup_steps=0"]
    assert train_gpt.main([f"--init_from={path}", *own]) == 0  # begins after the split, so that the two part
    second = next((tmp_path / "second.checkpoints").glob("*.safetensors"))
    first, second = (load_tensors(p, FORMAT)[1] for p in (path, second))
    assert torch.equal(first["model.embed1.weight"], first["model.head_w"])
    assert not torch.equal(second["model.embed1.weight"], second["model.head_w"])


# fmt: off
ALONE = [
    dict(norm_before_attention=True), dict(value_norm=False), dict(output_scalar=True), dict(mix_lr=0.02),
    dict(resid_init=1.05), dict(smear=True), dict(skip_gates=True), dict(backout_layer=2), dict(value_gates=True),
    dict(output_gates=True, gate_optimizer="adam"), dict(key_offset="0,3"), dict(exact_windows=True),
    dict(bigram_rows=64), dict(late_attention_source=1), dict(dynamic_skips="0,1"), dict(untied_values=True),
    dict(xsa=True), dict(paired_heads="1,2"), dict(yarn_until=0, window_schedule="1,2,3,4"), dict(mtp=3, loss_sum=True),
    dict(adam_every=2), dict(tie_embeddings_frac=0.3), dict(adam_moments="float32"), dict(value_init_std=0.0),
    dict(normuon_beta2=0.95, two_rate_from=0.2, gram_newton_schulz=True, muon_head_pairs=True),
    dict(tail_ema=0.9, tail_ema_steps=6), dict(matrix_dtype="bfloat16"), dict(output_gates=True), dict(ngram_rows=64),
    dict(ema_nesterov=0.6), dict(head_mixing=True), dict(dynamic_gates=2, output_gates=True, xsa=True),
    dict(matrix_optimizer="adamw", muon_lr=0.003),
]
# fmt: on


@pytest.mark.parametrize("change", ALONE, ids=lambda change: ",".join(change))
def test_every_technique_trains_on_the_plain_model_alone(change):
    """Each field is one change to medium: it starts at the loss of equal classes, and learns a batch."""
    config = plain_small(**{"muon_lr": 0.02, "embed_lr": 0.05, **change})
    trainer = Trainer(config, CPU)
    tokens = documents(33, 1)
    with torch.no_grad():
        first = trainer.model(tokens[None, :-1], tokens[None, 1:], window_blocks=2).item()
    assert first == pytest.approx(math.log(256), rel=1e-3)
    losses = [trainer.step(step, [(tokens[:-1].int(), tokens[1:])]).item() for step in range(12)]
    weights = train_gpt.schedule.target_weights(0, config)
    assert losses[0] == pytest.approx(math.log(256) * sum(w * (32 - k) / 32 for k, w in enumerate(weights)), rel=1e-3)
    with torch.no_grad():
        assert trainer.model(tokens[None, :-1], tokens[None, 1:], window_blocks=2).item() < first - 0.5


@pytest.mark.skipif(not INTERPRETED, reason="no interpreter")
@pytest.mark.parametrize(
    "more", [{}, dict(dynamic_gates=-1, output_scalar=False, value_norm=True)], ids=["frontier", "f3"]
)
def test_layers_whose_heads_go_through_kernels_are_those_of_the_references(more):
    """Loss and every gradient: offset keys, paired heads, gated values and outputs, exclusive attention, YaRN."""
    fields = dict(num_layers=3, model_dim=32, unet_skips="0>1", long_window_layers="0,2", key_offset="0")
    fields |= dict(late_attention_source=0, dynamic_skips="0,1", bigram_rows=256, paired_heads="1", yarn_until=0)
    model = randomised(Trainer(nano(**fields | more), CPU).model)
    model.at_step(400)
    tokens, found = documents(33, 1, vocab=256, eos=0)[None], {}
    for impl in ("reference", "triton"):
        model.impls["attention_inputs"] = impl
        model.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:], window_blocks=2)
        loss.backward()
        with_one = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found[impl] = {"loss": loss.detach()} | with_one
    assert found["triton"].keys() == found["reference"].keys() and model.query_factor.item() != 1
    for name, x in found["reference"].items():
        torch.testing.assert_close(found["triton"][name], x, rtol=1e-4, atol=2e-5 * float(x.abs().max()), msg=name)


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="no interpreter")
@both
def test_layers_whose_heads_go_through_kernels_equal_the_literal_model(trainer, preset):
    trainer.model.impls["attention_inputs"] = "triton"
    model_agrees(trainer, preset)


@pytest.mark.skipif(not INTERPRETED, reason="no interpreter")
def test_products_in_8_bits_take_the_largest_number_that_the_kernel_noted(monkeypatch):
    fields = dict(num_layers=2, unet_skips="0>1", long_window_layers="0", key_offset="0", late_attention_source=-1)
    fields |= dict(dynamic_skips="", dynamic_gates=1, head_mixing=False, bigram_rows=256, paired_heads="1")
    model = randomised(Trainer(nano(**fields, products="fp8"), CPU).model)
    tokens, seen, whole = documents(33, 1, vocab=256, eos=0)[None], [], products.added_linear_8

    def added_linear_8(residual, x, w, of_x=0.0, **how):
        seen.append((x.abs().amax().item(), float(of_x)))
        return whole(residual, x, w, of_x=of_x, **how)

    monkeypatch.setattr(products, "added_linear_8", added_linear_8)
    losses = []
    for impl in ("reference", "triton"):
        model.impls["attention_inputs"] = impl
        losses.append(model(tokens[:, :-1], tokens[:, 1:], window_blocks=2).item())
    assert [of_x for _, of_x in seen[:2]] == [0, 0] and all(largest == of_x > 0 for largest, of_x in seen[2:])
    assert len(seen) == 4 and abs(losses[0] - losses[1]) < 5e-3


def test_the_log_names_what_heads_go_through():
    asked, half = implementations.asked("auto", "cpu"), torch.bfloat16
    config = small("f3", narrow_qk=12, narrow_qk_layers="0")
    assert techniques.head_widths(config) == [(16, 12)] + [(16, 16)] * 15
    assert techniques.head_widths(parse_config([])) == []
    told = lambda widths: implementations.running(asked, CPU, half, "bf16", widths)["attention_inputs"]  # noqa: E731
    assert told([]) == "banded" and told([(16, 16)]) == "reference, with techniques"
    if INTERPRETED:
        asked["attention_inputs"] = "triton"
        assert told(techniques.head_widths(config)) == "reference and triton, with techniques"


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRETED, reason="no interpreter")
def test_frontier_trains_alike_with_interpreted_kernels():
    """Three steps with every Triton kernel and with the references: losses within 2e-4 nats."""
    fields = dict(num_layers=3, model_dim=32, unet_skips="0>1", long_window_layers="0,2", key_offset="0,2")
    fields |= dict(late_attention_source=0, dynamic_skips="0,1", bigram_rows=256, paired_heads="1")
    found, drawn = {}, documents(65, 1, vocab=256, eos=0)
    for kernels in ("auto", "triton"):
        trainer = Trainer(nano(**fields, kernels=kernels), CPU)
        batch = [(drawn[:32].int(), drawn[1:33]), (drawn[32:64].int(), drawn[33:])]
        found[kernels] = [trainer.step(step, batch).item() for step in range(3)]
    assert max(abs(a - b) for a, b in zip(*found.values())) <= 5e-4 and found["triton"][2] < found["triton"][0] - 0.05


@pytest.mark.slow
def test_four_and_eight_processes_train_as_one_does(shards, tmp_path):
    """With a batch that grows, and every technique."""
    ramp = "--tokens_per_step=512", "--batch_schedule=128,256,384"
    args = [*words(shards, tmp_path, *ramp), "--communication=overlap"]
    in_worlds(args, [[1], [4], [8]], double=True)
    one, *others = (losses(tmp_path / f"world{world}.txt") for world in (1, 4, 8))
    for other in others:
        assert max(abs(float(a[2]) - float(b[2])) for a, b in zip(one, other, strict=True)) <= 1e-6


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--skip_gates", "--unet_skips="], "there are no skips"),
        (["--value_gates", "--value_embeddings=0"], "there are no value embeddings"),
        (["--key_offset=99"], "layers from 0 to 15"),
        (["--dynamic_skips=4"], "an early layer and a later one"),
        (["--adam_every=2", "--num_iterations=5689"], "num_iterations=5689: a multiple of --adam_every=2"),
        (["--muon_lr_factors=qk=2"], "no matrices are called qk"),
        (["--adam_betas=head=0.9"], "KIND=NUMBER:NUMBER"),
        (["--fp8_scales=1,2"], "three positive numbers"),
        (["--backout_layer=16"], "only --num_layers=16"),
    ],
)
def test_techniques_that_do_not_go_together_are_refused(arguments, message):
    with pytest.raises(train_gpt.UsageError, match=message):
        parse_config(arguments)
