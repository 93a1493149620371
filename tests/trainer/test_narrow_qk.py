"""`narrow_qk`: a model with narrow and wide layers against a literal one in float64; its updates, caches, worlds."""

import dataclasses
import math

import frontier_model
import pytest
import torch
from frontier_model import plain_frequencies, rms, rotate, sees
from small_runs import folder_of, in_worlds, losses, tokens
from torch._dynamo.testing import CompileCounter

import train_gpt
from kernels import heads
from kernels.attention import attention, attention_plan
from kernels.runtime import INTERPRETED
from train_gpt import CHECKPOINT_FORMAT as FORMAT
from train_gpt import GPT, Trainer
from trainer import normuon, schedule, techniques
from trainer.checkpoints import load_tensors
from trainer.sample import Cache

CPU = torch.device("cpu")
L, D, H, NARROW, EOS, VOCAB = 3, 64, 4, 8, 7, 200  # heads of 16; those of layers 0 and 2 have q and k of 8

SMALL = f"""--preset=nano-plain --num_layers={L} --model_dim={D} --num_heads={H} --unet_skips= --long_window_layers=0
--block_tokens=8 --vocab_size={VOCAB} --eos_id={EOS} --value_embeddings=0 --second_input_embedding=false
--exact_windows=true --num_iterations=12 --tokens_per_step=128 --train_seq_len=32 --val_seq_len=32 --val_tokens=64
--narrow_qk={NARROW} --narrow_qk_layers=0,2 --narrow_qk_scale=0.7 --attention_scale=0.4 --device=cpu
--val_loss_every=4 --warmup_steps=2 --run_name=run""".split()


def config_of(*more):
    return train_gpt.parse_config(list({word.partition("=")[0]: word for word in [*SMALL, *more]}.values()))


def randomised(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.1 if p.dim() == 1 else 0.5 * D**-0.5)
    return model


def drawn(length=33, seed=1, vocab=VOCAB, eos=EOS):
    found = torch.randint(8, vocab, (length,), generator=torch.Generator().manual_seed(seed))
    found[::13] = eos
    return found


def literal_loss(w, ids, targets, window):
    """The plain model with a narrow layer 0 and 2, a sentence a line."""
    s, T = w["scalars"], len(ids)
    mixes, values = s[L : 4 * L].view(L, 3), s[4 * L : 6 * L].view(L, 2)  # after weights of skips
    x = x0 = rms(w["embed1.weight"][ids])
    for i in range(L):
        x = mixes[i, 0] * x + mixes[i, 1] * x0
        narrow = i in (0, 2)
        if narrow:
            (wq, wk), (wv, wo) = w[f"blocks.{i}.qk_w"], w[f"blocks.{i}.vo_w"]
        else:
            wq, wk, wv, wo = w[f"blocks.{i}.qkvo_w"]
        width, scale = (NARROW, 0.7) if narrow else (D // H, 0.4)
        q, k = ((x @ part.T).view(T, H, width) for part in (wq, wk))
        q, k = (rotate(rms(part), plain_frequencies(width)) for part in (q, k))
        v = values[i, 0] * rms((x @ wv.T).view(T, H, D // H))
        back = 8 * (window if i == 0 else window // 2)
        logits = scale * torch.einsum("ihd,jhd->hij", q, k)
        weight = logits.masked_fill(~sees(ids, EOS, back), -math.inf).softmax(-1)
        x = x + torch.einsum("hij,jhd->ihd", weight, v).reshape(T, D) @ wo.T
        x = x + (rms(x) @ w[f"blocks.{i}.mlp_in_w"].T).relu().square() @ w[f"blocks.{i}.mlp_out_w"].T
    z = rms(x) @ w["head_w"].T
    return torch.nn.functional.cross_entropy(15 * z / (z * z + 225).sqrt(), targets)


def model_agrees(*more):
    model = randomised(Trainer(config_of(*more), CPU).model)
    ids, targets = drawn()[:-1], drawn()[1:]
    loss = model(ids[None].int(), targets[None], window_blocks=2)
    loss.backward()
    doubles = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    expected = literal_loss(doubles, ids, targets, 2)
    found = dict(zip(doubles, torch.autograd.grad(expected, list(doubles.values()))))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, p in model.named_parameters():
        used = name != "scalars"
        assert found[name].abs().max() > 0, name
        gap = (p.grad - found[name]).abs().max() if used else (p.grad - found[name]).norm()
        assert gap <= 2e-4 * (found[name].abs().max() if used else found[name].norm()), name


@pytest.mark.parametrize("kernels", ["auto", "reference", pytest.param("triton", marks=pytest.mark.skipif(
    not INTERPRETED, reason="no interpreter"))])  # fmt: skip
def test_loss_and_every_gradient_equal_the_literal_model(kernels):
    model_agrees(f"--kernels={kernels}")


def the_scale_of_the_wide(monkeypatch):
    whole = techniques.attention
    monkeypatch.setattr(techniques, "attention", lambda q, k, v, plan, scale, impl: whole(q, k, v, plan, scale=0.4))


def frequencies_of_the_wide(monkeypatch):
    whole = GPT.frequencies

    def first_ones_of_the_wide(self, device):
        found = whole(self, device)
        found[D // H // 2 :] = found[: NARROW // 2]
        return found

    monkeypatch.setattr(GPT, "frequencies", first_ones_of_the_wide)


def keys_for_queries(monkeypatch):
    whole = techniques.projections

    def swapped(block):
        (*qk, v), out = whole(block)
        return [*(part.flip(0) for part in qk), v], out

    monkeypatch.setattr(techniques, "projections", swapped)


def norms_over_the_wide(monkeypatch):
    whole = heads.rms_norm
    grown = lambda x: whole(x) * (2**0.5 if x.size(-1) == NARROW else 1)  # noqa: E731
    monkeypatch.setattr(heads, "rms_norm", grown)


@pytest.mark.parametrize(
    "plant", [the_scale_of_the_wide, frequencies_of_the_wide, keys_for_queries, norms_over_the_wide]
)
def test_a_fault_in_it_is_seen(plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        model_agrees()


def test_parameters_and_initial_values():
    """Of a narrow layer of `frontier`: two times 8 heads of 64 rows, and values as wide as ever."""
    with torch.device("meta"):
        wide, narrow = (GPT(train_gpt.parse_config(["--preset=frontier", *more])) for more in ([], ["--narrow_qk=64"]))
        some = GPT(train_gpt.parse_config(["--preset=frontier", "--narrow_qk=96", "--narrow_qk_layers=1,2"]))
    shapes = {n: tuple(p.shape) for n, p in narrow.named_parameters()}
    for i in range(16):
        assert shapes.pop(f"blocks.{i}.qk_w") == (2, 512, 1024) and shapes.pop(f"blocks.{i}.vo_w") == (2, 1024, 1024)
        shapes[f"blocks.{i}.qkvo_w"] = (4, 1024, 1024)
    assert shapes == {n: tuple(p.shape) for n, p in wide.named_parameters()}
    count = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert count(wide) - count(narrow) == 16 * 2 * 512 * 1024
    assert count(wide) - count(some) == 2 * 2 * 256 * 1024 and tuple(some.blocks[2].qk_w.shape) == (2, 768, 1024)
    assert [hasattr(block, "qkvo_w") for block in some.blocks[:4]] == [True, False, False, True]
    made = GPT(config_of("--model_dim=256", "--num_heads=2", "--attention_init_std=1.0"))
    assert made.blocks[0].qk_w.std().item() == pytest.approx(256**-0.5, rel=0.05)
    assert made.blocks[0].vo_w[0].std().item() == pytest.approx(256**-0.5, rel=0.02)
    assert not made.blocks[0].vo_w[1].any()
    saved = train_gpt.flops_per_token(wide) - train_gpt.flops_per_token(narrow)
    assert saved == 6 * 16 * 2 * 512 * 1024


@pytest.mark.parametrize("pairs", [False, True])
def test_normuon_takes_narrow_matrices_one_by_one_or_by_pairs_of_heads(pairs):
    more = "--normuon_beta2=0.95", "--muon_coefficients=record18", f"--muon_head_pairs={pairs}", "--muon_lr=0.02"
    trainer = Trainer(config_of(*more, "--muon_lr_factors=qkvo=3,mlp_out=2"), CPU)
    muon, generator = randomised(trainer.model) and trainer.muon, torch.Generator().manual_seed(1)
    before = {n: p.detach().double().clone() for n, p in muon.named.items()}
    for p in muon.named.values():
        p.grad = torch.randn(p.shape, generator=generator)
    muon.step(0)
    assert {normuon.kind_of(n) for n in muon.named if "mlp" not in n} == {"qkvo"}
    for name, cuts in (("blocks.0.qk_w", 2 if pairs else 1), ("blocks.0.vo_w", 1), ("blocks.1.qkvo_w", 0)):
        for part, g in enumerate(muon.named[name].grad.double()):
            u = (0.15 + 0.85 * 0.15) * g
            pieces = u.chunk(cuts or (2 if pairs and part < 2 else 1))
            rows = []
            for piece in pieces:
                X = frontier_model.orthogonal(piece)
                scaled = X / (0.05 * X.square().mean(1, keepdim=True)).sqrt()
                rows.append(scaled * X.norm() / scaled.norm())
            X, old, lr = torch.cat(rows), before[name][part], 0.02
            new = old - 3 * lr * X - muon.config.muon_weight_decay * lr * 3 * lr * old * (X * old >= 0)
            torch.testing.assert_close(muon.named[name][part].double(), new, rtol=1e-3, atol=1e-5)


# --- with the techniques of the frontier -----------------------------------------------------------------------------

NANO = """--preset=nano-frontier --num_iterations=8 --tokens_per_step=256 --train_seq_len=64 --val_seq_len=64
--val_tokens=128 --val_loss_every=2 --checkpoint_every=2 --keep_checkpoints=0 --warmup_steps=2 --num_layers=3
--model_dim=32 --unet_skips=0>1 --long_window_layers=0,2 --key_offset=0,2 --late_attention_source=0 --dynamic_skips=0,1
--bigram_rows=512 --paired_heads=1 --ngram_rows=512 --dynamic_gates=1 --head_mixing=true --narrow_qk=8
--narrow_qk_scale=0.5 --device=cpu --run_name=run""".split()


def nano(*more):
    return train_gpt.parse_config(list({word.partition("=")[0]: word for word in [*NANO, *more]}.values()))


def test_no_logit_depends_on_a_later_token_or_another_document():
    """Paired heads, moved keys and the mixture are narrow, too. The document before lets one token through: smear."""
    model = randomised(Trainer(nano("--key_offset="), CPU).model)
    ids = drawn(64, 5, 256, 0)
    other = torch.cat([ids[:41], drawn(23, 6, 256, 0)])
    with torch.no_grad():
        logits, others = (model(t[None], window_blocks=20)[0] for t in (ids, other))
    torch.testing.assert_close(logits[:41], others[:41], rtol=0, atol=1e-6)
    assert not torch.allclose(logits[41:], others[41:], atol=1e-2)
    seen = []
    hook = model.embed1.register_forward_hook(lambda _m, _i, out: seen.append(out))
    logits = model(ids[None], window_blocks=20)[0, 45]
    hook.remove()
    (gradient,) = torch.autograd.grad(logits.square().sum(), seen[0])
    assert (gradient[0].abs().sum(-1) > 0).nonzero().flatten().tolist() == list(range(38, 46))


def test_text_token_by_token_is_that_of_the_whole_sequence():
    model = randomised(Trainer(nano(), CPU).model).eval()
    ids, cache = drawn(40, 8, 256, 0)[None], Cache()
    with torch.no_grad():
        whole = model(ids)
        parts = [model(part, cache=cache) for part in ids.split([17, 1, 1, 1, 7, 13], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def test_yarn_turns_narrow_heads_by_their_own_frequencies():
    trainer = Trainer(nano("--num_iterations=12"), CPU)
    for step in (0, 3, 11):
        trainer.set_window(step)
        both = [*plain_frequencies(16), *plain_frequencies(8)]
        frequencies, _ = schedule.yarn_at(step, trainer.config, both)
        angles = torch.arange(40)[:, None].double() * torch.tensor(frequencies, dtype=torch.float64)
        torch.testing.assert_close(trainer.model.rotary(32)[0][:40].double(), angles.cos(), rtol=0, atol=1e-4)


def test_bfloat16_is_one_graph_to_train_and_one_to_validate(monkeypatch):
    counter, make = CompileCounter(), torch.compile
    counted = lambda f: make(f, backend=counter, dynamic=False, fullgraph=True)  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f, **_: counted(f) if isinstance(f, torch.nn.Module) else f)
    trainer = Trainer(nano("--dtype=bfloat16", "--compile=on", "--mtp=1", "--val_seq_len=128"), CPU)
    for step in range(4):
        sequences = [drawn(65, 10 * step + i, 256, 0) for i in range(4)]
        loss = trainer.step(step, [(ids[:-1].int(), ids[1:]) for ids in sequences])
    assert counter.frame_count == 1 and math.isfinite(loss.item())


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("narrow") / "data", tokens(9000), val=tokens(600, 1))


def words(shards, out, *more):
    files = [f"--train_files={shards}/train_*.bin", f"--val_files={shards}/val_*.bin", f"--output_dir={out}"]
    return list({word.partition("=")[0]: word for word in [*NANO, *files, *more]}.values())


def test_a_run_resumes_bit_for_bit(shards, tmp_path):
    assert train_gpt.main(words(shards, tmp_path)) == 0
    first, folder = losses(tmp_path / "run.txt"), tmp_path / "run.checkpoints"
    last = load_tensors(folder / "step-000008.safetensors", FORMAT)[1]
    assert "muon.momentum.blocks.1.qk_w" in last
    for path in folder.glob("*.safetensors"):
        if int(path.stem.removeprefix("step-")) > 4:
            path.unlink()
    assert train_gpt.main(words(shards, tmp_path, "--resume=auto", "--warmup_steps=0")) == 0
    assert losses(tmp_path / "run.txt") == first
    again = load_tensors(folder / "step-000008.safetensors", FORMAT)[1]
    assert all(torch.equal(again[name], tensor) for name, tensor in last.items())


def test_two_and_four_processes_train_as_one_does(shards, tmp_path):
    ways = [[1], [2, "--communication=overlap"], [4, "--communication=plain"]]
    in_worlds(words(shards, tmp_path), ways, double=True)
    one, *others = (losses(tmp_path / f"world{world}.txt") for world in (1, 2, 4))
    for other in others:
        assert [row[:2] for row in other] == [row[:2] for row in one]
        assert max(abs(float(a[2]) - float(b[2])) for a, b in zip(one, other)) <= 1e-6


# --- attention of unequal widths, and what is refused ----------------------------------------------------------------


@pytest.mark.parametrize("impl", ["banded", pytest.param("triton", marks=pytest.mark.skipif(
    not INTERPRETED, reason="no interpreter"))])  # fmt: skip
@pytest.mark.parametrize("width", [8, 16])
def test_attention_of_wide_values_is_the_definition(impl, width):
    """Values and gradients, grouped heads among them, against the definition in float64."""
    generator = torch.Generator().manual_seed(1)
    plan = attention_plan(drawn(70)[None], eos_id=EOS, window_tokens=20)
    shapes = [(1, 70, 4, width), (1, 70, 2, width), (1, 70, 2, 32), (1, 70, 4, 32)]
    *qkv, do = (torch.randn(shape, generator=generator) for shape in shapes)
    found = {}
    for name, dtype in ((impl, torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in qkv]
        o = attention(*leaves, plan, scale=0.3, impl=name)
        assert o.shape == do.shape
        found[name] = [o, *torch.autograd.grad(o, leaves, do.to(dtype))]
    for ours, expected in zip(*found.values()):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


def test_shapes_that_do_not_fit_are_refused():
    plan = attention_plan(drawn(16)[None], eos_id=EOS)
    q, k, v = (torch.zeros(1, 16, 2, width) for width in (16, 16, 8))
    with pytest.raises(ValueError, match=r"v has shape .* 16 or more"):
        attention(q, k, v, plan, scale=1.0)
    with pytest.raises(ValueError, match="k has shape"):
        attention(q, v, k, plan, scale=1.0)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--narrow_qk=128"], "narrow_qk=128: 0, or a multiple of 4 from 8 to less than .* 128"),
        (["--narrow_qk=66"], "a multiple of 4"),
        (["--narrow_qk_layers=1,2"], "no queries and keys are narrow; see --narrow_qk"),
        (["--narrow_qk_scale=0.2"], "no queries and keys are narrow"),
        (["--narrow_qk=64", "--narrow_qk_layers=16"], "layers from 0 to 15"),
    ],
)
def test_widths_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(train_gpt.UsageError, match=message):
        train_gpt.parse_config(arguments)


def test_what_knows_only_the_plain_model_names_it():
    assert "narrow_qk" in techniques.techniques_of(dataclasses.replace(train_gpt.Config(), narrow_qk=64))
