"""The trainer's model, schedules, optimizers and configuration, against docs/spec.md read literally."""

import dataclasses
import math
import re

import numpy as np
import pytest
import torch
from spec_model import block_mask, spec_loss

import train_gpt
from train_gpt import GPT, Config, Trainer, UsageError, parse_config
from trainer import foreign, schedule
from trainer.processes import sequence_length_for
from trainer.sample import SampleOptions

CPU = torch.device("cpu")


def tiny(**changes) -> Config:
    """All of the medium architecture at a size that a float64 twin can follow: 16 layers, D = 32."""
    fields = dict(
        model_dim=32,
        num_heads=2,
        vocab_size=200,
        eos_id=7,
        dtype="float32",
        tokens_per_step=512,
        train_seq_len=512,
        val_seq_len=512,
        val_tokens=512,
        num_iterations=100,
        device="cpu",
    )
    return train_gpt.check_config(dataclasses.replace(Config(), **(fields | changes)))


def documents(length: int, vocab: int, eos: int, seed: int, mean: int = 90) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (length,), generator=generator)
    tokens[tokens == eos] = eos - 1
    tokens[torch.rand(length, generator=generator) < 1 / mean] = eos
    return tokens


def randomised(model: GPT, seed: int = 3) -> GPT:
    """No weight stays at its zero initial value, so that every path carries gradients."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.1 if name == "scalars" else 0.5 * model.config.model_dim**-0.5
            if "embed" not in name:
                p.add_(torch.randn(p.shape, generator=generator), alpha=scale)
    return model


# --- the model ---------------------------------------------------------------------------------------------------


def test_medium_has_exactly_the_parameters_of_spec():
    with torch.device("meta"):
        model = GPT(Config())
    L, D, V = 16, 1024, 50257
    counts = dict(
        embeddings=sum(p.numel() for n, p in model.named_parameters() if "embed" in n),
        attention=sum(p.numel() for n, p in model.named_parameters() if "qkvo" in n),
        mlp=sum(p.numel() for n, p in model.named_parameters() if "mlp" in n),
        head=model.head_w.numel(),
        scalars=model.scalars.numel(),
    )
    assert counts == dict(embeddings=7 * V * D, attention=15 * 4 * D * D, mlp=L * 8 * D * D, head=50304 * D, scalars=96)
    assert sum(counts.values()) == sum(p.numel() for p in model.parameters()) == 608_885_856
    types = {n: p.dtype for n, p in model.named_parameters()}
    assert {n for n, t in types.items() if t != torch.bfloat16} == {"head_w", "scalars"}
    assert not hasattr(model.blocks[7], "qkvo_w")
    assert [i for i, block in enumerate(model.blocks) if block.long_window] == [0, 4, 11, 15]
    assert model.skips == {9: 6, 10: 4, 11: 2}


def test_initial_values_are_those_of_spec():
    torch.manual_seed(0)
    model = GPT(tiny(model_dim=128, num_heads=4))
    std = 0.5 * 128**-0.5
    for block in model.blocks:
        assert torch.count_nonzero(block.mlp_out_w) == 0
        assert block.mlp_in_w.std().item() == pytest.approx(std, rel=0.02)
        assert block.mlp_in_w.abs().max() <= 3**0.5 * std
        if block.has_attention:
            assert torch.count_nonzero(block.qkvo_w[3]) == 0
            assert block.qkvo_w[:3].std().item() == pytest.approx(std, rel=0.02)
    assert model.embed2.weight.std().item() == pytest.approx(1, rel=0.02)
    scalars = model.scalars.detach()
    assert scalars[:16].eq(1).all() and scalars[64:].eq(0.5).all()
    assert scalars[16:64].view(16, 3).eq(torch.tensor([1.0, 0, 0])).all()


@pytest.mark.parametrize("window", [1, 2, 3, 27])
def test_loss_and_every_gradient_equal_the_literal_model(window):
    config = tiny()
    torch.manual_seed(1)
    model = randomised(GPT(config))
    tokens, targets = documents(700, 200, 7, seed=window), documents(700, 200, 7, seed=50)
    loss = model(tokens[None], targets[None], window_blocks=window)
    loss.backward()
    weights = {n: p.detach().double().requires_grad_() for n, p in model.named_parameters()}
    truth = spec_loss(
        weights,
        tokens,
        targets,
        layers=16,
        heads=2,
        window=window,
        eos_id=7,
        no_attention={7},
        long_layers={0, 4, 11, 15},
        skips={9: 6, 10: 4, 11: 2},
        tables=5,
    )
    truth.backward()
    assert loss.item() == pytest.approx(truth.item(), abs=3e-6)
    for name, p in model.named_parameters():
        wanted = weights[name].grad
        # NaN fails; the tolerance is relative to the tensor's own size
        assert (p.grad - wanted).abs().max() <= 2e-4 * wanted.abs().max() + 1e-9, name


def test_the_literal_mask_counts_blocks_as_spec_says():
    # One document: block 3's full blocks are 2, 1, 0; W = 2 keeps one full block and the diagonal.
    tokens = torch.ones(512, dtype=torch.int64)
    seen = block_mask(tokens, eos_id=0, window=2)
    assert seen[511].sum() == 256 and seen[384].sum() == 129
    assert block_mask(tokens, eos_id=0, window=0)[511].sum() == 128


def test_first_loss_is_that_of_a_zero_head(shared_data):
    """Real tokens, the medium vocabulary, width reduced: ln 50304 whatever the body computes."""
    from data.shards import open_shard

    real = torch.from_numpy(open_shard(shared_data / "tokens" / "train_000001.bin")[:1025].astype("int64"))
    config = dataclasses.replace(
        Config(),
        model_dim=64,
        num_heads=1,
        device="cpu",
        num_iterations=10,
        tokens_per_step=1024,
        train_seq_len=1024,
        warmup_steps=0,
    )
    trainer = Trainer(config, CPU)
    losses = [trainer.step(step, [(real[:-1].int(), real[1:])]).item() for step in range(3)]
    assert losses[0] == pytest.approx(math.log(50304), abs=2e-4)  # 10.8258, in bfloat16
    assert losses[2] < losses[0] - 0.25


def test_no_token_sees_its_future_or_another_document():
    config = tiny()
    model = randomised(GPT(config))
    tokens = documents(400, 200, 7, seed=5)
    tokens[0], tokens[260] = 7, 7
    seen = []
    hook = model.embed1.register_forward_hook(lambda _m, _i, out: seen.append(out.requires_grad_()) or out)
    for table in (model.embed2, *model.value_embeds):
        table.weight.requires_grad_(False)
    logits = model(tokens[None], window_blocks=4)
    hook.remove()
    position = 300
    (gradient,) = torch.autograd.grad(logits[0, position].square().sum(), seen[0])
    moved = gradient[0].abs().sum(-1) > 0
    opened = int((tokens[: position + 1] == 7).nonzero().max())
    assert moved.nonzero().flatten().tolist() == list(range(opened, position + 1))


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_who_hooks_on_to_a_table_sees_its_rows(impl):
    """The lab's microscope does; the kernel that makes several tables' gradients has no module to hook on to."""
    model = randomised(GPT(tiny()))
    model.impls["tables"] = impl
    tokens, seen = documents(64, 64, 7, seed=5)[None], {}
    tables = [model.embed1, model.embed2, *model.value_embeds]
    plain = model(tokens, window_blocks=4)
    for table in tables:
        table.register_forward_hook(lambda module, _inputs, output: seen.update({module: output}))
    assert torch.equal(model(tokens, window_blocks=4), plain)
    assert seen.keys() == set(tables)
    assert all(torch.equal(seen[table], table.weight[tokens]) for table in tables)


def test_batched_sequences_are_independent():
    model = randomised(GPT(tiny()))
    tokens = torch.stack([documents(256, 200, 7, seed=s) for s in (1, 2, 3)])
    together = model(tokens, window_blocks=2)
    alone = torch.cat([model(row[None], window_blocks=2) for row in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        dict(second_input_embedding=False),
        dict(value_embeddings=0),
        dict(unet_skips=""),
        dict(attention_free_layers=""),
        dict(half_truncated_rotary=False),
        dict(growing_window=False),
        dict(soft_cap="none"),
        dict(soft_cap="sigmoid"),
        dict(muon_coefficients="polar_express"),
        dict(dtype="bfloat16"),
    ],
    ids=lambda change: "{}={}".format(*next(iter(change.items()))),
)
def test_every_technique_can_be_switched_off(change):
    trainer = Trainer(tiny(**change, tokens_per_step=256, train_seq_len=256), CPU)
    tokens = documents(257, 200, 7, seed=1)
    batch = [(tokens[:-1].int(), tokens[1:])]
    losses = [trainer.step(step, batch).item() for step in range(4)]
    first = 0 if change.get("soft_cap") == "sigmoid" else math.log(256)
    assert losses[0] == pytest.approx(first, rel=1e-3) or first == 0
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def compiled_trainer():
    """A trainer as `--compile=on` makes it, with what traces and differentiates but generates no code."""
    import torch._dynamo.testing as testing

    counter = testing.CompileCounterWithBackend("aot_eager")
    small = dict(num_layers=4, unet_skips="1>3", long_window_layers="0", attention_free_layers="2", value_embeddings=1)
    config = tiny(**small, compile="on", val_seq_len=1024, val_tokens=1024)
    with pytest.MonkeyPatch.context() as patch:
        compile_model = torch.compile
        drop = lambda how: {k: v for k, v in how.items() if k != "options"}  # noqa: E731
        patch.setattr(torch, "compile", lambda model, **how: compile_model(model, backend=counter, **drop(how)))
        trainer = Trainer(config, CPU)
    randomised(trainer.model)
    return trainer, counter


def test_a_growing_window_compiles_one_graph(compiled_trainer):
    """One graph for training over all windows, one for validation; nothing is prepared here that a run prepares."""
    trainer, counter = compiled_trainer
    tokens, targets = documents(512, 200, 7, seed=1), documents(512, 200, 7, seed=2)
    for window in (1, 2, 3, 4):
        trainer.window.fill_(window)
        loss = trainer.forward(tokens[None], targets[None], window_blocks=trainer.window)
        loss.backward()
        plain = trainer.model(tokens[None], targets[None], window_blocks=window)
        assert loss.item() == pytest.approx(plain.item(), abs=1e-5)
    assert counter.frame_count == 1
    longer = documents(1024, 200, 7, seed=3)[None]
    with torch.no_grad():
        for _ in range(2):
            trainer.forward(longer, longer, window_blocks=trainer.window)
    assert counter.frame_count == 2
    trainer.forward(tokens[None], targets[None], window_blocks=trainer.window)
    assert counter.frame_count == 2, "validation makes training compile again"


def test_a_model_that_nothing_prepared_compiles_too():
    model = randomised(
        GPT(tiny(num_layers=1, unet_skips="", long_window_layers="0", attention_free_layers="", value_embeddings=0))
    )
    tokens = documents(64, 200, 7, seed=1)[None]
    loss = torch.compile(model, dynamic=False, fullgraph=True, backend="eager")(tokens, tokens, window_blocks=1)
    assert model.rotary_tables is None and loss.item() == pytest.approx(model(tokens, tokens, window_blocks=1).item())


# --- schedules -----------------------------------------------------------------------------------------------------


def test_schedules_follow_spec():
    config = Config()
    steps = [0, 1, 30, 569, 2845, 5120, 5690]
    windows = [schedule.window_blocks_at(step, config) for step in steps]
    literal = []
    for step in steps:
        x = step / 5690
        tokens = 3456 * (4 * x**3 - 6 * x**2 + 3 * x)
        literal.append(max(next(n for n in range(0, 10**6, 128) if n >= tokens - 1e-9) // 128, 1))
    assert windows == literal == [1, 1, 1, 7, 14, 21, 27]
    assert [schedule.learning_rate_factor(s, config) for s in (0, 1700)] == [1, 1]
    assert schedule.learning_rate_factor(5690 * 65 // 100, config) == pytest.approx(0.5, abs=1e-3)
    assert schedule.learning_rate_factor(5690, config) == 0
    assert schedule.muon_momentum_at(0, config) == 0.85
    assert schedule.muon_momentum_at(150, config) == pytest.approx(0.9)
    assert schedule.muon_momentum_at(5000, config) == 0.95
    early = dataclasses.replace(config, window_growth_frac=0.5)
    assert [schedule.window_blocks_at(step, early) for step in (0, 1422, 2845, 4000)] == [1, 14, 27, 27]


# --- optimizers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_muon_equals_spec_step_by_step(dtype):
    """Three steps against a literal loop with float32 masters. In bfloat16 the weights that the model sees are the
    masters' upper halves, and the masters must not have lost a bit."""
    coefficients = [
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ]
    kind = getattr(torch, dtype)
    config = tiny(dtype=dtype, muon_lr=0.02)
    trainer = Trainer(config, CPU)
    muon = trainer.muon
    masters = {n: p.detach().float().clone() for n, p in muon.named.items()}
    buffers = {n: torch.zeros_like(m) for n, m in masters.items()}
    generator = torch.Generator().manual_seed(2)
    for step in range(3):
        for name, p in muon.named.items():
            p.grad = torch.randn(p.shape, generator=generator).to(kind)
            momentum = 0.85 + 0.1 * step / 300
            g = p.grad.float()
            buffers[name] = momentum * buffers[name] + (1 - momentum) * g
            x = (momentum * buffers[name] + (1 - momentum) * g).to(kind)
            tall = x.size(-2) > x.size(-1)
            x = x.mT if tall else x
            x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
            for a, b, c in coefficients:
                gram = x @ x.mT
                x = a * x + (b * gram + c * gram @ gram) @ x
            x = (x.mT if tall else x).float()
            decay = 0.02 * 0.01 * (2 if "mlp" in name else 1)
            masters[name] = masters[name] * (1 - decay) - 0.02 * max(1, p.size(-2) / p.size(-1)) ** 0.5 * x
        muon.step(step)
    for name, p in muon.named.items():
        ours = p.detach().float()
        if dtype == "bfloat16":
            high = p.detach().view(torch.int16).int() << 16
            ours = (high | (muon.mantissa[name].view(torch.int16).int() & 0xFFFF)).view(torch.float32)
        error = (ours - masters[name]).abs().max()
        assert error <= (1e-5 if dtype == "float32" else 2e-3), (name, error)


def test_adam_has_spec_rates_and_no_decay():
    """Three updates against the formula in float64; the rate falls with the schedule, a parameter without a
    gradient stays."""
    config = tiny()
    adam = Trainer(config, CPU).adam
    rates = {name: 1 / 320 if name == "head_w" else 0.015 if name == "scalars" else 0.3 for name in adam.named}
    wanted = {name: p.detach().double().numpy().copy() for name, p in adam.named.items()}
    first, second = ({name: 0.0 for name in wanted} for _ in range(2))
    still, *moved = list(adam.named)
    draw = np.random.default_rng(0)
    for number, step in enumerate((0, 1, config.num_iterations - 1), 1):
        for name in moved:
            g = draw.normal(size=adam.named[name].shape).astype(np.float32)
            adam.named[name].grad = torch.from_numpy(g)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g.astype(np.float64) ** 2
            m, v = first[name] / (1 - 0.8**number), second[name] / (1 - 0.95**number)
            wanted[name] -= rates[name] * schedule.learning_rate_factor(step, config) * m / (np.sqrt(v) + 1e-10)
        adam.step(step)
    assert all(p.grad is None for p in adam.named.values())
    for name, p in adam.named.items():
        np.testing.assert_allclose(p.detach().numpy(), wanted[name], rtol=2e-5, atol=2e-6, err_msg=name)
    assert adam.state()["adam.step.head_w"] == 3 and adam.state()[f"adam.step.{still}"] == 0


def test_one_batch_is_learned_by_heart():
    config = tiny(
        num_layers=4,
        unet_skips="1>3",
        long_window_layers="0",
        attention_free_layers="",
        value_embeddings=1,
        tokens_per_step=128,
        train_seq_len=128,
        num_iterations=300,
    )
    trainer = Trainer(config, CPU)
    tokens = documents(129, 200, 7, seed=1)
    losses = [trainer.step(step, [(tokens[:-1].int(), tokens[1:])]).item() for step in range(300)]
    assert losses[-1] < 0.1


# --- configuration -------------------------------------------------------------------------------------------------


def test_fields_are_typed_and_named():
    config = parse_config(["--preset=nano", "--num_iterations", "7", "--second_input_embedding=off", "--seed=3"])
    assert (config.num_iterations, config.second_input_embedding, config.seed) == (7, False, 3)
    assert parse_config([]) == Config()
    assert parse_config(["--resume", "--run_name=x"]).resume == "auto"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_iteration=5"], "did you mean --num_iterations"),
        (["--num_iterations=five"], "num_iterations=five: expected int"),
        (["--num_iterations=0"], "num_iterations=0: at least 1"),
        (["--block_tokens=1000000000000000000000000000000"], "below 2"),
        (["--attention_scale=0"], "attention_scale=0.0: above 0"),
        (["--cooldown_frac=nan"], "above 0"),
        (["--target_loss=inf"], "finite"),
        (["--cooldown_frac=1.5"], "cooldown_frac"),
        (["--preset=huge"], "there are medium"),
        (["--train_seq_len=100"], "tokens_per_step=524288 is not a multiple of --train_seq_len=100"),
        (["--dtype=float16"], "one of bfloat16, float32"),
        (["--unet_skips=9>6"], "earlier to a later"),
        (["--unet_skips=a>b"], "written 6>9,4>10"),
        (["--num_layers=8"], "num_layers=8"),
        (["--run_name=../x"], "plain file name"),
        (["--run_name=a\nb"], "--run_name: character 1 ('\\n') is none that a name may have"),
        (["--plan_hash=\udcff"], "--plan_hash: character 0"),
        (["--output_dir=a\0b"], "--output_dir: character 1"),
        (["--output_dir=s3://bucket/runs"], "--output_dir=s3://bucket/runs: a folder of this machine is needed"),
        (["--data_dir=gs://b"], "--data_dir=gs://b: a folder of this machine"),
        (["--patience=1e30"], "--patience=1e+30: at least 1 and at most 10000000"),
        (["--long_window_layers=0;3"], "--long_window_layers=0;3: layers are written 0,4,11"),
        (["--attention_free_layers=99"], "--attention_free_layers=99: layers from 0 to 15"),
        (["--paired_heads=x", "--preset=nano-frontier"], "--paired_heads=x: layers are written"),
        (["stray"], "unknown argument 'stray'"),
        (["--batch_size=8"], "--tokens_per_step tokens, in sequences of --train_seq_len"),
        (["--max-iters", "5"], "--num_iterations"),
        (["--dropout=0.1"], "the model has none"),
        (["--muon_lr=-0.1"], "muon_lr=-0.1: at least 0"),
        (["--muon_momentum=1.5"], "muon_momentum=1.5: at least 0 and below 1"),
        (["--adam_beta2=1"], "adam_beta2=1.0: at least 0 and below 1"),
        (["--seed=1", "--seed=2"], "seed is given twice, as '1' and as '2'"),
        (["--patience=0"], "patience=0.0: at least 1"),
        (["--second_input_embedding=maybe"], "true or false"),
        (["--eos_id=60000"], "not below"),
    ],
)
def test_nonsense_is_refused_with_the_field_named(arguments, message, capsys):
    with pytest.raises(UsageError, match=re.escape(message)):
        parse_config(arguments)
    assert train_gpt.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_lists_every_field(capsys):
    assert train_gpt.main(["--help"]) == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(Config):
        assert f"--{field.name}=" in text and field.metadata["unit"] in text


def test_every_name_that_others_have_is_answered_with_ours(capsys):
    for known, kind in ((foreign.TRAIN, Config), (foreign.SAMPLE, SampleOptions)):
        ours = {field.name for field in dataclasses.fields(kind)}
        for name, answer in known.items():
            assert name not in ours, "a field of ours never reaches the answer"
            assert set(re.findall(r"--(\w+)", answer)) <= ours | {"nproc_per_node"}, answer
    for name in ("max-grad-norm", "Num_Train_Epochs", "input_bin"):  # Hugging Face's and llm.c's, however spelled
        assert train_gpt.main([f"--{name}=1"]) == 2
        answer = foreign.TRAIN[name.lower().replace("-", "_")]
        assert f"unknown argument '--{name}=1'; {answer}" in capsys.readouterr().err


def test_a_flag_without_its_value_is_no_value(capsys):
    for words, message in (
        (["--run_name", "--overwrite"], "--run_name needs a value: --run_name=... (name)"),
        (["--seed"], "--seed needs a value: --seed=... (number)"),
        (["sample", "x", "--prompt"], "--prompt needs a value: --prompt=... (text)"),
        (["evaluate", "x", "--data", "--json"], "--data needs a value: --data=... (path)"),
    ):
        assert train_gpt.main(words) == 2
        assert message in capsys.readouterr().err


def test_help_is_given_wherever_it_is_asked_for(capsys):
    assert train_gpt.main(["--preset=nano", "--help"]) == 0
    assert "--num_iterations=5690" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stray", "message"),
    [
        ("WORLD_SIZE=2", "which is no group of processes"),
        ("WORLD_SIZE= RANK=", "which is no group of processes"),
        ("WORLD_SIZE=two RANK=0", "which is no group of processes"),
        ("WORLD_SIZE=² RANK=² MASTER_ADDR=x MASTER_PORT=²", "which is no group of processes"),
        ("WORLD_SIZE=2 RANK=7 MASTER_ADDR=x", "which is no group of processes"),
        ("WORLD_SIZE=2 RANK=0 MASTER_ADDR=localhost MASTER_PORT=99999", "no group came together (port must"),
        ("WORLD_SIZE=2 RANK=1 MASTER_ADDR=localhost MASTER_PORT=1", "--patience=1): start several with torchrun"),
    ],
)
def test_stray_variables_of_torchrun_are_one_sentence(stray, message, capsys, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for word in stray.split():
        monkeypatch.setenv(*word.split("="))
    assert train_gpt.main(["--preset=nano", "--device=cpu", "--patience=1"]) == 2
    said = capsys.readouterr().err
    assert message in said and "start several with torchrun, or unset them" in said and said.count("\n") == 1


def test_variables_that_name_no_group_do_no_harm(capsys, monkeypatch, tmp_path):
    """A stray RANK is nobody's; one that is no number is not read either."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for stray in ("abc", "3", ""):
        monkeypatch.setenv("RANK", stray)
        assert train_gpt.main([f"--resume={tmp_path}/nowhere"]) == 3
        assert "nowhere: no checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["two", "1", "-1"])
def test_a_local_rank_that_no_gpu_has_is_told(number, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", number)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert train_gpt.main(["--preset=nano"]) == 2
    assert f"LOCAL_RANK={number} in the environment is no GPU's number: torch sees 1 here" in capsys.readouterr().err


def test_the_series_hash_ignores_seed_and_machine_only():
    base = config_hash = train_gpt.config_hash(Config())
    assert train_gpt.config_hash(dataclasses.replace(Config(), seed=5, output_dir="elsewhere")) == base
    assert train_gpt.config_hash(dataclasses.replace(Config(), muon_lr=0.02)) != config_hash


@pytest.mark.parametrize(("world", "length"), [(8, 65536), (16, 32768), (32, 16384)])
def test_more_processes_than_sequences_cut_the_sequences(world, length):
    assert sequence_length_for(world, 524288, 65536) == length
    with pytest.raises(UsageError, match="do not divide over 3"):
        sequence_length_for(3, 524288, 65536)


def test_processes_share_the_sequences_of_a_step():
    for world in (1, 2, 4, 8):
        shares = [list(schedule.my_sequences(Config(), rank, world)) for rank in range(world)]
        assert sorted(sequence for share in shares for sequence in share) == list(range(8))


def test_every_cited_section_of_the_specification_is_there(repo):
    sections = set(re.findall(r"^(?:## )?(\d+(?:\.\d+)?)\.? ", (repo / "docs" / "spec.md").read_text(), re.MULTILINE))
    cited = {}
    for folder in (".", "kernels", "trainer", "data", "tests", "tests/kernels"):
        for path in (repo / folder).glob("*.py"):
            text = path.read_text()
            assert not re.search(r"\bSPEC\b(?!\\b)", text) or path.name == "test_train_gpt.py", path
            cited |= {n: path for n in re.findall(r"docs/spec\.md (\d+(?:\.\d+)?)", text)}
    assert len(cited) >= 5 and not {n: p for n, p in cited.items() if n not in sections}
