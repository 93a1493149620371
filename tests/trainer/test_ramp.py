"""Runs whose batch grows, on sequences that begin at documents: from the command line to log, checkpoint and hash."""

import hashlib
import json

import pytest
import torch
from small_runs import folder_of, in_worlds, losses, run, small, tokens

import train_gpt
from trainer import schedule

RAMP = """--num_iterations=12 --batch_schedule=32,64,96 --lr_schedule=1,2 --window_schedule=1,2,3 --yarn_until=0 --mtp=3
--align_documents --max_document_tokens=40 --validation_window=4 --val_loss_every=3 --log_train_loss
--block_tokens=4""".split()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("ramp") / "data", tokens(900), tokens(700, 2))


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert run(files, out, *RAMP) == 0
    return out


def told(folder, name="run"):
    return json.loads((folder / f"{name}.json").read_text())


def literal_stream(parts, steps):
    """The sequences of so many steps, token by token: two a step, of 16, 32, 48 and then 64 tokens, and a target."""
    found, shard, place = [], 0, 0
    while len(found) < 2 * steps:
        opened = [i for i, token in enumerate(parts[shard]) if token == 0]
        docs = [list(parts[shard][a:b])[:40] for a, b in zip(opened, [*opened[1:], len(parts[shard])])]
        step, here = [], place
        for _ in range(2):
            length, packed = [16, 32, 48, 64][min(len(found) // 2, 3)], []
            while len(packed) <= length and here < len(docs):
                packed += docs[here][: length + 1 - len(packed)]
                here += 1
            step.append(packed)
        if len(step[-1]) <= length:
            shard, place = (shard + 1) % len(parts), 0
            continue
        found, place = found + step, here
    return found


def test_log_and_json_tell_the_tokens_that_were_fed(whole):
    points = told(whole)["validation"]
    assert [(point["step"], point["train_tokens"]) for point in points] == [
        (0, 0), (3, 192), (6, 192 + 3 * 128), (9, 192 + 6 * 128), (12, 192 + 9 * 128),
    ]  # fmt: skip
    chain = hashlib.blake2b(b"", digest_size=16).digest()
    for packed in literal_stream([tokens(900), tokens(700, 2)], 12):
        raw = b"".join(int(token).to_bytes(2, "little") for token in packed)
        chain = hashlib.blake2b(chain + hashlib.blake2b(raw, digest_size=16).digest(), digest_size=16).digest()
    assert points[-1]["data_hash"] == chain.hex()


@pytest.mark.parametrize("stop", [1, 2, 7])
def test_a_run_goes_on_at_any_step_as_if_it_had_not_stopped(files, whole, tmp_path, stop):
    assert run(files, tmp_path, *RAMP, f"--stop_after={stop}") == 0
    assert run(files, tmp_path, *RAMP, "--resume=auto") == 0
    here, there = told(tmp_path), told(whole)
    assert here["train_loss"] == there["train_loss"] and here["data_hash"] == there["data_hash"]
    assert [point["loss"] for point in here["validation"] if point["step"] % 3 == 0] == [
        point["loss"] for point in there["validation"]
    ]


def test_two_processes_train_as_one(files, whole, tmp_path):
    given = [f"--train_files={files}/train_*.bin", f"--val_files={files}/val_*.bin", f"--output_dir={tmp_path}"]
    in_worlds([word for word in small(*RAMP, *given) if "=" in word] + ["--align_documents=on"], [[2]])
    assert told(tmp_path, "world2")["data_hash"] == told(whole)["data_hash"]
    pairs = zip(losses(tmp_path / "world2.txt"), losses(whole / "run.txt"), strict=True)
    assert all(a[:2] == b[:2] and float(a[2]) == pytest.approx(float(b[2]), abs=2e-5) for a, b in pairs)


def test_the_last_validation_has_its_own_window(files, whole, monkeypatch):
    """Windows of a step, and of the validation after it; the model's forward is asked, not the schedule."""
    words = small(*RAMP, f"--train_files={files}/train_*.bin", f"--val_files={files}/val_*.bin", "--val_tokens=64")
    config = train_gpt.parse_config(words)
    trainer, seen = train_gpt.Trainer(config, torch.device("cpu")), []
    monkeypatch.setattr(
        trainer, "forward", lambda *_a, window_blocks, **_k: seen.append(int(window_blocks)) or torch.zeros(())
    )
    _, val = train_gpt.open_streams(config)
    for step in (0, 1, 11, 12):
        train_gpt.validate(trainer, val, step)
    assert seen == [1, 2, 3, 4]


class NeverStop:
    heard = staticmethod(lambda: 0)


def one_layer(files, *more):
    words = small(*RAMP, f"--train_files={files}/train_*.bin", f"--val_files={files}/val_*.bin", "--warmup_steps=1")
    config = train_gpt.parse_config(
        small(*words, "--num_layers=1", "--attention_free_layers=", "--unet_skips=none", *more)
    )
    return config, train_gpt.Trainer(config, torch.device("cpu"))


def train_all(trainer):
    """All steps of a run and its validations."""
    train, val = train_gpt.open_streams(trainer.config)
    for step in range(trainer.config.num_iterations):
        batches = [tuple(map(torch.from_numpy, train.batch(step, sequence))) for sequence in range(2)]
        assert len(batches[0][0]) == schedule.sequence_tokens_at(step, trainer.config)
        trainer.step(step, batches)
        train_gpt.validate(trainer, val, step)


def test_warm_up_meets_every_shape_of_the_run(files):
    config, trainer = one_layer(files)
    seen: set = set()

    def forward(tokens, targets, target_weights=(), **how):
        seen.add((tuple(tokens.shape), len(target_weights), torch.is_grad_enabled()))
        return trainer.model(tokens, targets, target_weights=target_weights if len(target_weights) else None, **how)

    trainer.forward = forward
    before = {name: t.clone() for name, t in trainer.state().items()}
    train_gpt.warm_up(trainer, NeverStop())
    warm = set(seen)
    assert len(warm) == len(schedule.shapes(config)) + 1 == 5  # four to train, one to validate
    assert all(torch.equal(t, before[name]) for name, t in trainer.state().items())
    train_all(trainer)
    assert seen == warm


@pytest.mark.slow
def test_nothing_compiles_after_the_warm_up(files, monkeypatch):
    """Counted by Dynamo, with a backend that does not compile."""
    from torch._dynamo.testing import CompileCounter

    counter, make = CompileCounter(), torch.compile
    counted = lambda f: make(f, backend=counter, dynamic=False, fullgraph=True)  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f, **_: counted(f) if isinstance(f, torch.nn.Module) else f)
    _, trainer = one_layer(files, "--compile=on")
    train_gpt.warm_up(trainer, NeverStop())
    assert counter.frame_count == 5
    train_all(trainer)
    assert counter.frame_count == 5, "a step compiled inside the clock"


def test_documents_cut_shorter_at_first_are_what_the_model_is_fed(files):
    words = small(*RAMP, f"--train_files={files}/train_*.bin", f"--val_files={files}/val_*.bin")
    config = train_gpt.parse_config([*words, "--early_document_tokens=20"])
    train, _ = train_gpt.open_streams(config)
    longest = [max(map(len, b"".join(b"x" if t else b"|" for t in train.window(s, 0)).split(b"|"))) for s in (3, 4)]
    assert longest == [19, 39]  # tokens between openings: documents have 50


def test_speed_and_time_left_count_tokens_not_steps(monkeypatch, capsys):
    from trainer.log import Progress

    until = lambda step: min(step, 4) * 100 + max(step - 4, 0) * 400  # noqa: E731  (100 tokens a step, then 400)
    progress = Progress(10, 0, until, flops_per_token=2.0, ceiling=1600.0)
    monkeypatch.setattr(progress, "due", lambda: True)
    progress.update(1, 1000.0, torch.tensor(3.0))
    assert capsys.readouterr().out == ""  # one step alone has no speed
    progress.update(6, 3000.0, torch.tensor(2.5))  # 3 x 100 + 2 x 400 tokens in 2 s, 4 x 400 are left
    assert "progress: step 6 of 10, loss 2.5000, 550 tokens/s, MFU 69%, 3 s left" in capsys.readouterr().out
