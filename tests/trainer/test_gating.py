"""Gates by the token and mixtures of heads (trainer/gating.py) against loops in float64."""

import math

import pytest
import torch

import train_gpt
from trainer import gating, techniques
from trainer.gating import REACH, DynamicGates, HeadMixing, mixed_heads, mixed_heads_of_few

B, T, H, Dh = 2, 250, 2, 4


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def config_of(*more):
    fields = (
        "--preset=nano-frontier --num_layers=3 --model_dim=32 --unet_skips=0>1 --long_window_layers=0,2 --device=cpu"
    )
    fields += " --key_offset=0,2 --late_attention_source=0 --dynamic_skips=0,1 --bigram_rows=256 --paired_heads=1"
    fields += " --ngram_rows=0 --dynamic_gates=-1 --head_mixing=false"
    return train_gpt.parse_config(list({word.partition("=")[0]: word for word in [*fields.split(), *more]}.values()))


def mixing_by_loops(q, k, v, w1, w2, first, scale):
    found = torch.zeros_like(v)
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if s >= first[b, t] and s > t - REACH]
            mixture = torch.zeros(len(seen), dtype=torch.float64)
            for i in range(H):
                logits = torch.stack([scale * (q[b, t, i] @ k[b, s, i]) for s in seen])
                mixture = mixture + w1[b, t, i] * logits.softmax(0)
            for h in range(H):
                found[b, t, h] = w2[b, t, h] * sum(mixture[j] * v[b, s, h] for j, s in enumerate(seen))
    return found


@pytest.fixture(scope="module")
def heads():
    q, k, v = (random(B, T, H, Dh, seed=i) for i in range(3))
    weights = random(B, T, H, seed=3), random(B, T, H, seed=4)
    opened = torch.tensor([[0, 60, 200], [0, 111, 224]])  # documents, and a window of 90 in the second sequence
    first = torch.stack([opened[b][(torch.arange(T)[:, None] >= opened[b]).sum(1) - 1] for b in range(B)])
    first[1] = first[1].maximum(torch.arange(T) - 89)
    return q, k, v, weights, first, mixing_by_loops(q, k, v, *weights, first, 0.3)


def test_heads_are_mixed_over_the_last_keys_that_a_query_sees(heads):
    q, k, v, weights, first, expected = heads
    torch.testing.assert_close(mixed_heads(q, k, v, weights, first, 0.3), expected)
    short = slice(0, 5)  # less than a block
    parts = (x[:, short] for x in (q, k, v))
    cut = tuple(w[:, short] for w in weights)
    torch.testing.assert_close(mixed_heads(*parts, cut, first[:, short], 0.3), expected[:, short])


def test_a_few_queries_at_the_end_find_the_same(heads):
    q, k, v, weights, first, expected = heads
    last, key = torch.arange(T - 3, T), torch.arange(T)
    allowed = (key <= last[:, None]) & (key > last[:, None] - REACH) & (key >= first[:, -3:, None])
    found = mixed_heads_of_few(q[:, -3:], k, v, tuple(w[:, -3:] for w in weights), allowed, 0.3)
    torch.testing.assert_close(found, expected[:, -3:])


def test_a_mixture_too_far_back_is_seen(heads, monkeypatch):
    q, k, v, weights, first, expected = heads
    monkeypatch.setattr(gating, "REACH", REACH + 1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(mixed_heads(q, k, v, weights, first, 0.3), expected)


def test_weights_of_a_mixture_are_those_of_the_formula():
    mixing, x = HeadMixing(config_of("--head_mixing")).double(), random(1, 7, 32)
    with torch.no_grad():
        mixing.reset_parameters()
        w1, w2 = mixing(x)
        torch.testing.assert_close(w1, torch.ones_like(w1), rtol=1e-6, atol=0)
        assert not w2.any(), "at first nothing is added"
        mixing.out_w.copy_(random(4, 4, seed=1))
        w1, w2 = mixing(x)
        for t in range(7):
            hidden = mixing.in_w @ x[0, t]
            hidden = torch.tensor([0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in hidden.tolist()])
            m = mixing.out_w @ hidden.double() + torch.tensor([1.0, 1.0, 0.0, 0.0])
            torch.testing.assert_close(w1[0, t], m[:2] / m[:2].square().mean().sqrt(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(w2[0, t], m[2:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("xsa, output", [(True, True), (True, False), (False, True)])
def test_gates_are_those_of_the_formula(xsa, output):
    config = config_of("--dynamic_gates=1", f"--xsa={xsa}", f"--output_gates={output}")
    gates, x = DynamicGates(config).double(), random(1, 5, 32)
    with torch.no_grad():
        gates.reset_parameters()
        (start,) = gates(0, x)
        assert not xsa or not start.alpha.any()
        assert not output or bool((start.output == 0.25).all())
        assert not start.first.any() and not start.pairs.any()
        gates.out_w.copy_(random(*gates.out_w.shape, seed=1)), gates.bias.copy_(random(*gates.bias.shape, seed=2))
        gates.scale.fill_(0.3)
        layers = [*gates(0, x), *gates(1, x)]
        per, used = 8, 2 * xsa + 2 * output + 2
        for layer, found in enumerate(layers):
            rows = gates.out_w[layer * per : layer * per + used]
            for t in range(5):
                hidden = gates.in_w[0 if layer == 0 else 1] @ x[0, t]
                hidden = torch.tensor([0.5 * z * (1 + math.erf(z / math.sqrt(2))) for z in hidden.tolist()])
                m = (0.3 * (rows @ hidden.double())).tolist()
                m = [a + b for a, b in zip(m, [*gates.bias[layer].tolist(), 0.0, 0.0])]
                parts = torch.cat([part[0, t] for part in vars(found).values()])
                assert parts.tolist() == pytest.approx(m, rel=1e-5, abs=1e-6)


def test_gates_that_are_the_same_for_all_tokens_are_the_learned_ones():
    """A model with xsa and open gates, and one whose networks say the same of every token; then by the network."""
    tokens = torch.randint(256, (1, 60), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    plain = train_gpt.GPT(config_of("--xsa"))
    torch.manual_seed(0)
    gated = train_gpt.GPT(config_of("--xsa", "--dynamic_gates=2"))
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)), alpha=0.1)
        plain.techniques.output_gates.zero_()  # all open by a half
        gated.load_state_dict(plain.state_dict(), strict=False)
        dynamic = gated.techniques.dynamic_gates
        dynamic.bias.copy_(torch.cat([plain.techniques.xsa_w, torch.full((3, 2), 0.5)], 1))
        torch.testing.assert_close(gated(tokens), plain(tokens), rtol=1e-4, atol=1e-5)
        dynamic.out_w.normal_()
        first = gated(tokens)
        assert not torch.allclose(first, plain(tokens), atol=1e-3)
        dynamic.in_w[1].zero_()  # the second network, of layer 2 alone
        assert not torch.allclose(first, gated(tokens), atol=1e-3)


def test_the_network_of_the_middle_reads_the_stream_that_enters(monkeypatch):
    seen = []
    real = DynamicGates.forward
    monkeypatch.setattr(DynamicGates, "forward", lambda self, n, x: seen.append((n, x)) or real(self, n, x))
    entered = []
    mixed = techniques.Techniques.skipped
    monkeypatch.setattr(
        techniques.Techniques, "skipped", lambda self, x, *rest: entered.append(x) or mixed(self, x, *rest)
    )
    model = train_gpt.GPT(config_of("--dynamic_gates=1"))
    model(torch.randint(256, (1, 20)))
    assert [n for n, _ in seen] == [0, 1] and torch.equal(seen[1][1], entered[0])  # the skip enters layer 1, too


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dynamic_gates=0"], "dynamic_gates=0: -1, or a layer from 1 to 2"),
        (["--dynamic_gates=3"], "a layer from 1 to 2"),
        (["--head_mixing", "--attention_free_layers=2"], "the last layer is without attention"),
    ],
)
def test_places_that_are_none_are_refused(arguments, message):
    with pytest.raises(train_gpt.UsageError, match=message):
        config_of(*arguments)
