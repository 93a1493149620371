"""Which tokens were trained on: the hash is of content, as it was fed, and a resume compares it."""

import dataclasses
import json
import re

import pytest
from small_runs import SMALL, folder_of, run, tokens

import train_gpt
from data.shards import TokenStream, read_header
from stats.series import read_runs
from trainer.checkpoints import load_tensors, save_tensors
from trainer.evidence import TokenRecord, hash_of
from trainer.streams import corpus_folder


def told(out):
    return json.loads((out / "run.json").read_text())


def stream(files, **changes):
    how = dict(sequence_tokens=64, sequences_per_step=2, vocab_size=256) | changes
    return TokenStream(files, **how)


def test_the_hash_is_of_tokens_not_of_files(tmp_path):
    whole = tokens(2000)
    first = stream(str(folder_of(tmp_path / "a", whole) / "train_*.bin"))
    cut = stream(str(folder_of(tmp_path / "b", whole[:333], whole[333:], tokens(999, 5)) / "train_*.bin"))
    assert hash_of(first, 5) == hash_of(cut, 5) != hash_of(first, 4)
    for changed in (0, 300, 640):  # the last is the target of the last sequence
        other = whole.copy()
        other[changed] ^= 1
        assert hash_of(stream(str(folder_of(tmp_path / f"c{changed}", other) / "train_*.bin")), 5) != hash_of(first, 5)
    other = whole.copy()
    other[641] ^= 1
    assert hash_of(stream(str(folder_of(tmp_path / "d", other) / "train_*.bin")), 5) == hash_of(first, 5)


def test_what_is_fed_is_what_is_hashed(tmp_path):
    files = str(folder_of(tmp_path / "a", tokens(1000)) / "train_*.bin")
    record, source = TokenRecord(stream(files)), stream(files)
    for place in source.prefetch([(s, q) for s in range(3) for q in range(2)], record=record):
        assert len(place) == 2
    record.advance(3)
    assert (record.tokens, record.hash) == (384, hash_of(source, 3))
    other = TokenRecord(stream(files))
    for step, sequence in ((0, 0), (0, 0)):  # one sequence twice, one never
        other.feed(step, sequence, (b"", None))
    with pytest.raises(KeyError):
        other.advance(1)


def test_runs_on_the_same_tokens_elsewhere_are_the_same_run(tmp_path):
    whole = tokens(2000)
    outs = [tmp_path / "one", tmp_path / "two"]
    assert run(folder_of(tmp_path / "a", whole), outs[0]) == 0
    assert run(folder_of(tmp_path / "b", whole[:100], whole[100:], tokens(50, 3)), outs[1]) == 0
    one, two = map(told, outs)
    for key in ("config_hash", "data_hash", "val_data_hash", "train_tokens", "final_loss"):
        assert one[key] == two[key], key
    assert [p["train_tokens"] for p in one["validation"]] == [0, 256, 512]
    (found,) = read_runs(outs[1] / "run.txt")
    assert (found.data_hash, found.val_data_hash) == (one["data_hash"], one["val_data_hash"]) and not found.problems
    assert two["environment"]["data"]["train_shards"] == [["train_0.bin", 100], ["train_1.bin", 1900]]
    assert dict(found.validations[-1].extra) == {"train_tokens": "512", "data_hash": one["data_hash"]}


def test_resuming_compares_the_steps_done(tmp_path, capsys):
    whole, out = tokens(2000), tmp_path / "out"
    assert run(folder_of(tmp_path / "a", whole), out, "--checkpoint_every=2") == 0
    finished = told(out)
    (out / "run.checkpoints" / "step-000004.safetensors").unlink()
    later = whole.copy()
    later[300:] = tokens(1700, 7)  # beyond the two steps done: 256 tokens and a target
    other = whole.copy()
    other[200] ^= 1
    refused = folder_of(tmp_path / "b", other)
    assert run(refused, out, "--resume=auto") == 3
    assert "made with other data; the first 256 training tokens" in capsys.readouterr().err
    assert run(folder_of(tmp_path / "c", whole, val=tokens(200, 9)), out, "--resume=auto") == 3
    assert "the validation tokens of" in capsys.readouterr().err
    assert told(out) == finished  # what was refused has changed nothing
    assert run(folder_of(tmp_path / "d", whole[:77], whole[77:]), out, "--resume=auto") == 0
    assert told(out)["data_hash"] == finished["data_hash"] and told(out)["final_loss"] == finished["final_loss"]
    (out / "run.checkpoints" / "step-000004.safetensors").unlink()
    assert run(folder_of(tmp_path / "e", later), out, "--resume=auto") == 0
    assert told(out)["data_hash"] != finished["data_hash"]


def test_checkpoints_that_told_a_hash_of_files_still_go_on(tmp_path):
    files, out = folder_of(tmp_path / "a", tokens(2000)), tmp_path / "out"
    assert run(files, out, "--checkpoint_every=2") == 0
    path = out / "run.checkpoints" / "step-000002.safetensors"
    texts, tensors = load_tensors(path, train_gpt.CHECKPOINT_FORMAT)
    (out / "run.checkpoints" / "step-000004.safetensors").unlink()
    for name, pattern in (("data_hash", "train_0"), ("val_data_hash", "val_0")):
        texts[name] = stream(str(files / f"{pattern}.bin"), sequences_per_step=1).data_hash()
    del texts["train_tokens"]
    save_tensors(path, tensors, texts)
    assert run(files, out, "--resume=auto") == 0
    save_tensors(path, tensors, texts | {"data_hash": "sha256:" + "0" * 64})
    (out / "run.checkpoints" / "step-000004.safetensors").unlink()
    assert run(files, out, "--resume=auto") == 3


def test_training_and_validation_are_different_data(tmp_path, capsys):
    files = folder_of(tmp_path / "a", tokens(2000), tokens(200, 1))
    assert run(files, tmp_path / "out") == 3
    assert re.search(r"train_1\.bin and \S*val_0\.bin hold the same tokens", capsys.readouterr().err)
    assert run(files, tmp_path / "out", f"--val_files={files}/train_0.bin") == 3
    assert "train_0.bin: both --train_files and --val_files name it" in capsys.readouterr().err


def test_data_that_repeat_and_shards_in_order_are_told(tmp_path, capsys):
    parts = [tokens(130, seed) for seed in range(11)]
    files = folder_of(tmp_path / "a", *parts)
    assert run(files, tmp_path / "out", "--num_iterations=22") == 0
    assert "the data last for 11 of 22 steps: 2 passes over them" in capsys.readouterr().out
    data = told(tmp_path / "out")["environment"]["data"]
    assert data["steps_in_one_pass"] == 11 and data["passes"] == 2
    assert [name for name, _ in data["train_shards"]] == [f"train_{i}.bin" for i in range(11)]  # 10 after 9
    assert f"data:{json.dumps(data, sort_keys=True)}\n" in (tmp_path / "out" / "run.txt").read_text()
    used = stream(str(files / "train_*.bin")).shards_until
    assert [len(used(steps)) for steps in (0, 1, 2, 3, 11, 99)] == [1, 1, 2, 3, 11, 11]
    assert used(1) == [read_header(files / "train_0.bin")]
    dropping = stream(str(files / "train_*.bin"), drop_shard_tail=True).shards_until
    assert [len(dropping(steps)) for steps in (1, 2, 11, 99)] == [1, 2, 11, 11]


def test_other_vocabularies_are_refused(tmp_path, capsys):
    files = folder_of(tmp_path / "a", tokens(2000))
    (files / "tokenize.json").write_text('{"vocab_size": 50257, "end_of_text": 50256}')
    assert run(files, tmp_path / "out") == 3
    assert "tokenize.json: its shards have 50257 tokens" in capsys.readouterr().err
    (files / "tokenize.json").unlink()
    assert run(files, tmp_path / "out", "--vocab_size=50257", "--eos_id=50256") == 3
    assert "bytes, rather than tokens of a vocabulary of 50257" in capsys.readouterr().err


def test_the_configuration_is_the_same_wherever_the_data_lie():
    one = train_gpt.parse_config([*SMALL, "--train_files=/mnt/a/*.bin", "--data_dir=/x"])
    two = dataclasses.replace(one, train_files="s3://b/*.bin", val_files="elsewhere", data_dir="/y")
    assert train_gpt.config_hash(one) == train_gpt.config_hash(two)


def test_tails_of_shards_are_dropped_as_the_specification_says():
    """By the medium preset, and by no other that says nothing of it (docs/spec.md)."""
    assert train_gpt.parse_config([]).drop_shard_tail and train_gpt.parse_config(["--preset=small"]).drop_shard_tail
    assert not train_gpt.parse_config(["--preset=nano"]).drop_shard_tail


def test_the_embedded_corpus_of_a_checkout_that_is_read_only_lies_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    assert corpus_folder(tmp_path) == tmp_path / "data" / "embedded"
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).startswith(str(tmp_path / "data")))
    assert corpus_folder(tmp_path) == tmp_path / "cache" / "embedded"
    (tmp_path / "data" / "embedded").mkdir()
    assert corpus_folder(tmp_path) == tmp_path / "data" / "embedded", "what is there can be read"
