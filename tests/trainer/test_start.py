"""Where a configuration comes from: a file, a checkpoint, the data; and how a run goes on from another."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import SMALL, folder_of, run, tokens

import train_gpt
from data.shards import ShardError, write_shard
from trainer.checkpoints import load_tensors
from trainer.options import UsageError
from trainer.streams import open_streams


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run of four steps with checkpoints of step 2 and 4: its folder."""
    folder = tmp_path_factory.mktemp("done")
    assert run(folder_of(folder / "data", tokens(2000)), folder, "--checkpoint_every=2") == 0
    return folder


def checkpoint(folder, step=4, name="run"):
    return folder / f"{name}.checkpoints" / f"step-{step:06d}.safetensors"


def told(folder, name="run"):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_file_of_fields(tmp_path):
    (tmp_path / "run.toml").write_text(
        '\ufeffpreset = "nano"\nseed = 3\n[optimizer]\nmuon_lr = 0.02\nlog_train_loss = false\n'
    )
    config = train_gpt.parse_config([f"--config={tmp_path / 'run.toml'}", "--seed=4"])
    assert (config.preset, config.seed, config.muon_lr, config.log_train_loss) == ("nano", 4, 0.02, False)
    assert config.model_dim == 64
    for text, message in (
        ("muon_lrr = 1", "unknown field 'muon_lrr'; did you mean muon_lr"),
        ("seed = [1]", "seed is list"),
        ("seed =", "Invalid value"),
        ('muon_lr = "fast"', "expected float"),
    ):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(UsageError, match=message):
            train_gpt.parse_config([f"--config={tmp_path / 'bad.toml'}"])
    with pytest.raises(UsageError, match="No such file"):
        train_gpt.parse_config(["--config=none.toml"])


def test_every_runs_json_is_such_a_file(done):
    config = train_gpt.parse_config([f"--config={done / 'run.json'}"])
    assert train_gpt.config_hash(config) == told(done)["config_hash"]
    assert config.run_name == "" and config.seed == told(done)["seed"]


def test_resuming_takes_the_configuration_from_the_checkpoint(done, tmp_path, capsys):
    finished = told(done)
    checkpoint(done).unlink()
    assert train_gpt.main([f"--resume={checkpoint(done, 2)}", "--warmup_steps=0"]) == 0
    assert told(done)["validation"][-1]["loss"] == finished["validation"][-1]["loss"]
    assert checkpoint(done).exists() and "resumed from the checkpoint of step 2" in (done / "run.txt").read_text()
    assert train_gpt.main([f"--resume={checkpoint(done, 2)}", "--muon_lr=0.5", "--run_name=other"]) == 3
    said = capsys.readouterr().err
    assert "these fields differ: muon_lr." in said and f"--init_from={checkpoint(done, 2)}" in said
    with pytest.raises(UsageError, match=r"--run_name names; the newest in .* is --run_name=run"):
        train_gpt.parse_config(["--preset=nano", "--resume=auto", f"--output_dir={done}"])


def test_a_run_is_named_wherever_a_checkpoint_is(done, tmp_path, monkeypatch, capsys):
    """A file, a folder of checkpoints, the log's path without its suffix, a name: for --resume and --init_from as for
    sample, evaluate and export."""
    monkeypatch.chdir(done.parent)
    newest = train_gpt.parse_config([f"--init_from={checkpoint(done)}"])
    for name in (checkpoint(done), done / "run.checkpoints", done, done / "run", "run"):
        more = [f"--output_dir={done}"] if name == "run" else []
        begun = train_gpt.parse_config([f"--init_from={name}", *more])
        assert (begun.init_hash, Path(begun.init_from)) == (newest.init_hash, checkpoint(done))
        gone_on = train_gpt.parse_config(["--resume", str(name), *more])
        assert (gone_on.run_name, Path(gone_on.output_dir)) == ("run", done)
        assert train_gpt.config_hash(gone_on) == told(done)["config_hash"]
    for field in ("resume", "init_from"):
        assert train_gpt.main([f"--{field}=nowhere", f"--output_dir={tmp_path}"]) == 3
        said = capsys.readouterr().err
        assert f"--{field}=nowhere: no checkpoint" in said and f"in {tmp_path} or local/runs" in said


def test_another_run_starts_from_weights(done, tmp_path, capsys):
    old = load_tensors(checkpoint(done), train_gpt.CHECKPOINT_FORMAT)[1]
    more = [f"--output_dir={tmp_path}", "--run_name=new", "--num_iterations=2", "--muon_lr=0", "--embed_lr=0"]
    more += ["--head_lr=0", "--scalar_lr=0", f"--init_from={checkpoint(done)}", "--warmup_steps=1"]
    assert train_gpt.main(more) == 0
    new = load_tensors(checkpoint(tmp_path, 2, "new"), train_gpt.CHECKPOINT_FORMAT)[1]
    for name, tensor in old.items():
        if name.startswith("model."):
            assert torch.equal(new[name], tensor), name
    assert told(tmp_path, "new")["validation"][0]["loss"] == pytest.approx(told(done)["final_loss"], abs=0.05)
    assert f"weights from step 4 of run run ({checkpoint(done)})" in (tmp_path / "new.txt").read_text()
    assert train_gpt.main([*more, "--init_optimizer", "--overwrite"]) == 0
    assert float(load_tensors(checkpoint(tmp_path, 2, "new"), "train_gpt-1")[1]["adam.step.head_w"]) == 6
    assert train_gpt.main([*more, "--overwrite", "--model_dim=32"]) == 3
    assert "do not fit the model" in capsys.readouterr().err
    plain = train_gpt.parse_config([*SMALL])
    assert train_gpt.parse_config([*SMALL, f"--init_from={checkpoint(done)}"]).init_hash != plain.init_hash


def test_a_run_may_stop_early_and_go_on(done, tmp_path):
    data = folder_of(tmp_path / "data", tokens(2000))
    assert run(data, tmp_path, "--stop_after=2") == 0
    assert told(tmp_path)["status"] == "stopped" and told(tmp_path)["final_loss"] is None
    assert [point["step"] for point in told(tmp_path)["validation"]] == [0, 2]
    assert train_gpt.main([f"--resume={checkpoint(tmp_path, 2)}"]) == 0
    assert told(tmp_path)["status"] == "finished"
    assert told(tmp_path)["validation"][-1]["loss"] == told(done)["validation"][-1]["loss"]


def test_a_text_is_all_the_data_that_is_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "story.txt").write_text("Once upon a time there was a small model. " * 40)
    small = [word for word in SMALL if not word.startswith("--val")]
    assert train_gpt.main([*small, f"--data={tmp_path / 'story.txt'}", f"--output_dir={tmp_path}"]) == 0
    config = told(tmp_path)["config"]
    assert (config["vocab_size"], config["eos_id"], config["val_seq_len"], config["val_tokens"]) == (256, 0, 160, 160)
    assert told(tmp_path)["status"] == "finished"
    (tmp_path / "tiny.txt").write_text("Once upon a time.")
    assert train_gpt.main([*small, f"--data={tmp_path / 'tiny.txt'}", "--overwrite", f"--output_dir={tmp_path}"]) == 3
    said = capsys.readouterr().err
    assert f"--data={tmp_path / 'tiny.txt'}: too few for one step of --tokens_per_step=128" in said
    assert "(16 tokens are" in said and "give more, or smaller steps" in said and "cache" not in said


def test_a_folder_says_all_of_its_data(tmp_path):
    data = folder_of(tmp_path / "data", tokens(2000), val=tokens(30_000, 1))
    (data / "tokenize.json").write_text('{"vocab_size": 256, "end_of_text": 0}')
    config = train_gpt.parse_config([f"--data={data}", "--preset=nano-plain"])
    assert (config.val_seq_len, config.val_tokens) == (8192, 3 * 8192)
    config = train_gpt.parse_config([f"--data={data}"])
    assert (config.vocab_size, config.eos_id, config.val_seq_len) == (256, 0, 29_952)  # whole blocks of 128
    for words, message in (
        (["--vocab_size=50257"], "tokenize.json: says vocab_size 256, not --vocab_size=50257"),
        (["--train_files=x"], "leave --train_files out"),
    ):
        with pytest.raises(ValueError, match=message):
            train_gpt.parse_config([f"--data={data}", *words])
    write_shard(data / "val_0.bin", np.zeros(1, dtype=np.uint16))
    with pytest.raises(ValueError, match=f"--data={data}: 1 tokens for validation are too few"):
        train_gpt.parse_config([f"--data={data}"])
    with pytest.raises(ValueError, match="no such folder or file"):
        train_gpt.parse_config(["--preset=nano", "--data=nowhere.txt"])


def test_a_text_is_tokenised_offline_with_the_vocabulary_that_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "story.txt").write_text("Once upon a time. " * 4000)
    with pytest.raises(ShardError, match=r"story\.txt: .*nowhere/encoder\.json: No such file or directory; --vocab"):
        train_gpt.parse_config(["--preset=small", f"--data={tmp_path / 'story.txt'}", f"--vocab={tmp_path}/nowhere"])


@pytest.mark.parametrize("name", ["a,b", "x[1]", "50% [a, b]", "star*"])
def test_folders_and_texts_may_have_any_name(name, tmp_path, monkeypatch):
    """None of their characters is a pattern's, and no comma divides them."""
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / name))
    data = folder_of(tmp_path / f"data {name}", tokens(2000), val=tokens(30_000, 1))
    (data / "tokenize.json").write_text('{"vocab_size": 256, "end_of_text": 0}')
    (tmp_path / f"{name}.txt").write_text("Once upon a time. " * 4000)
    for given in (data, tmp_path / f"{name}.txt"):
        train, val = open_streams(train_gpt.parse_config([f"--data={given}", *SMALL]))
        assert len(train.shards) == len(val.shards) == 1


def test_a_tilde_is_the_users_folder(done, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(done))
    config = train_gpt.parse_config(["--preset=nano", "--output_dir=~/runs", "--init_from=~/run"])
    assert config.output_dir == f"{done}/runs" and Path(config.init_from) == checkpoint(done)
    (tmp_path / "run.toml").write_text('resume = "~/run.checkpoints"')
    assert train_gpt.parse_config([f"--config={tmp_path / 'run.toml'}"]).run_name == "run"


def test_all_validation_tokens_that_there_are(tmp_path, capsys):
    """Too few are an error that names the flags; 0, or the word all, takes them in whole sequences."""
    data = folder_of(tmp_path / "data", tokens(2000))
    assert run(data, tmp_path, "--val_tokens=64000") == 3
    said = capsys.readouterr().err
    for part in (
        f"--val_files={data}/val_*.bin",
        "--val_tokens=64000",
        "--val_seq_len=64",
        "--val_tokens=0",
        "200 tok",
    ):
        assert part in said, said
    assert run(data, tmp_path, "--val_tokens=all", "--num_iterations=1") == 0
    assert told(tmp_path)["config"]["val_tokens"] == 192  # 3 x 64, and a target for the last
    assert '"val_tokens": 192,' in (tmp_path / "run.txt").read_text()
    assert train_gpt.main(["evaluate", str(tmp_path / "run"), "--val_tokens=all", "--val_seq_len=50"]) == 0
    assert "(150 tokens" in capsys.readouterr().out
    assert run(data, tmp_path, "--val_tokens=0", "--val_seq_len=256", "--overwrite") == 3
    assert "too few for one sequence of --val_seq_len=256" in capsys.readouterr().err
    assert run(data, tmp_path, "--tokens_per_step=4096") == 3
    said = capsys.readouterr().err
    assert f"--train_files={data}/train_*.bin" in said and "--tokens_per_step=4096" in said
    (data / "tokenize.json").write_text('{"vocab_size": 256, "end_of_text": 0}')
    config = train_gpt.parse_config([*SMALL[:4], f"--data={data}", "--val_tokens=all"])
    assert (config.val_seq_len, config.val_tokens) == (192, 0)  # the number comes when the run starts
    with pytest.raises(UsageError, match="--val_seq_len=abc: expected int"):
        train_gpt.parse_config([f"--data={data}", "--val_seq_len=abc"])


def test_data_weights_and_a_run_to_go_on_with_may_be_named_in_a_file(done, tmp_path):
    """What brings further fields with it does so from a file as from the command line."""
    data = folder_of(tmp_path / "data", tokens(2000), val=tokens(30_000, 1))
    (data / "tokenize.json").write_text('{"vocab_size": 256, "end_of_text": 0}')
    path = tmp_path / "run.toml"

    def parsed(text):
        path.write_text(text)
        return train_gpt.parse_config([f"--config={path}"])

    assert parsed(f'preset = "nano"\ndata = "{data}"') == dataclasses.replace(
        train_gpt.parse_config(["--preset=nano", f"--data={data}"]), config=str(path)
    )
    started = train_gpt.parse_config([f"--init_from={checkpoint(done)}"])
    assert parsed(f'init_from = "{checkpoint(done)}"').init_hash == started.init_hash != ""
    gone_on = parsed(f'resume = "{checkpoint(done)}"')
    assert train_gpt.config_hash(gone_on) == told(done)["config_hash"] and gone_on.run_name == "run"
    assert parsed('preset = "nano"\nrun_name = "mine"\nresume = true').resume == "auto"
    for text, message in (
        ("resume = true", "goes on with the run that --run_name names"),
        (f'data = "{data}"\ntrain_files = "x"', "leave --train_files out"),
        (f'data = "{data}"\nvocab_size = 50257', "says vocab_size 256"),
        ('data = "nowhere.txt"', "no such folder or file"),
        ('config = "other.toml"', "names a further file"),
        ("batch_size = 3", "a step has --tokens_per_step tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            parsed(text)
