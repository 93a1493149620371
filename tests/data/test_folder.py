"""What lies beside shards, looking into them, and shards of other projects."""

import json

import numpy as np
import pytest

from data import convert, folder, look, shards
from data.encoding import ENCODINGS
from data.shards import ShardError


def test_a_text_becomes_a_folder_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    text, said = tmp_path / "story.txt", []
    text.write_text("Once upon a time. " * 100)
    made = folder.tokens_of(str(text), "bytes", said.append)
    parts = folder.open_folder(made)
    assert parts.facts.vocabulary == ENCODINGS["bytes"] and parts.val_tokens == 181 and len(said) == 2
    assert folder.tokens_of(str(text), "bytes", said.append) == made and len(said) == 2
    text.write_text("<|endoftext|>\n".join(f"story {i}\n" for i in range(60)))
    other = folder.tokens_of(str(text), "bytes", said.append)
    assert other != made and json.loads((other / "tokenize.json").read_text())["train"]["documents"] > 40
    text.write_text("the first\n<|endoftext|>\nthe second, and the last\n")
    # Too few for one of them to fall into validation.
    few = json.loads((folder.tokens_of(str(text), "bytes", said.append) / "tokenize.json").read_text())
    assert (few["train"]["documents"], few["split"], few["val"]["characters"]) == (2, "characters", 4)  # a tenth of 33
    lines = folder.tokens_of(str(text), "bytes", said.append, documents="line")
    (lines / "tokenize.json").unlink()
    (lines / ".tokenize-left").mkdir()  # by a process that was killed
    assert folder.tokens_of(str(text), "bytes", said.append, documents="line") == lines
    assert sorted(path.name for path in lines.iterdir()) == ["tokenize.json", "train_000001.bin", "val_000000.bin"]
    assert json.loads((lines / "tokenize.json").read_text())["documents"] == "line"


def test_contradictions_are_errors(tmp_path):
    path = str(tmp_path / "train_1.bin")
    tokens = np.frombuffer(b"\0abc" * 9, dtype=np.uint8)
    shards.write_shard(path, tokens)
    assert folder.check_encoding([path], tokens, 256, 0) == ""
    with pytest.raises(ShardError, match="bytes, rather than tokens of a vocabulary of 50257"):
        folder.check_encoding([path], tokens, 50257, 50256)
    assert "one document" in folder.check_encoding([path], tokens[1:2], 256, 0)
    for name, content in (("fineweb.json", "{}"), ("tokenize.json", '{"vocab_size": 50257, "end_of_text": 50256}')):
        (tmp_path / name).write_text(content)
        with pytest.raises(ShardError, match=f"{name}: its shards have 50257 tokens and end of text 50256"):
            folder.check_encoding([path], tokens, 256, 0)
    for content in ('{"vocab_size": 10, "end_of_text": 10}', "[]", "[" * 9999, '{"vocab_size": 1e999}', "\udcff", "1"):
        (tmp_path / "tokenize.json").write_text(content, errors="surrogateescape")
        with pytest.raises(ShardError, match=r"tokenize\.json: makes no sense"):
            folder.facts_beside([path])
    with pytest.raises(ShardError, match=r"val.*no such shards.*--val-fraction"):
        folder.open_folder(tmp_path)


def test_look(tmp_path, capsys):
    path = tmp_path / "train_1.bin"
    shards.write_shard(path, np.frombuffer("end\0first döc\0second".encode(), dtype=np.uint8))
    assert look.main([str(path), "--documents", "1"]) == 0
    told = capsys.readouterr().out
    assert "21 tokens" in told and "vocabulary 256, end of text 0 (a guess)" in told
    assert "2 documents, after 3 tokens of one that began before; tokens each: mean 8, least 6," in told
    assert "--- document 1, 10 tokens\nfirst döc\n" in told and "second" not in told
    for number in (10, 9):
        shards.write_shard(tmp_path / f"train_{number}.bin", np.zeros(number, dtype=np.uint8))
    assert look.main([str(tmp_path), "--documents", "0"]) == 0  # all shards of a folder, by number
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()[::3]] == [
        "21 tokens",
        "9 tokens",
        "10 tokens",
    ]
    (tmp_path / "empty").mkdir()
    assert look.main([str(tmp_path / "empty")]) == 3 and "a folder without shards" in capsys.readouterr().err
    with pytest.raises(ShardError, match=r"a folder; name the shards in it, for example '.*/\*\.bin'.*--data=FOLDER"):
        shards.read_header(tmp_path)
    (tmp_path / "no.bin").write_bytes(b"text " * 300)
    assert look.main([str(tmp_path / "no.bin")]) == 3 and "data.look: " in capsys.readouterr().err


def test_shards_of_other_projects(tmp_path, capsys):
    tokens = np.array([15496, 995, 50256, 40, 716, 50256], dtype=np.uint16)
    (tmp_path / "train.bin").write_bytes(tokens.tobytes())
    np.save(tmp_path / "val.npy", tokens.astype(np.int64))
    with pytest.raises(ShardError, match=r"nanoGPT writes them.*data\.convert"):
        shards.read_header(tmp_path / "train.bin")
    with pytest.raises(ShardError, match=r"a NumPy array.*data\.convert"):
        shards.read_header(tmp_path / "val.npy")
    files = [str(tmp_path / "train.bin"), str(tmp_path / "val.npy")]
    assert convert.main([*files, "--out", str(tmp_path / "out")]) == 0
    assert "train 7 tokens, val 7 tokens; train with: python train_gpt.py --data=" in capsys.readouterr().out
    parts = folder.open_folder(tmp_path / "out")
    assert parts.facts.vocabulary == ENCODINGS["gpt2"]
    for files_of_part in (parts.train_files, parts.val_files):
        (name,) = folder.paths.expand(files_of_part)
        assert np.array(shards.open_shard(name)).tolist() == [50256, *tokens.tolist()]
    np.save(tmp_path / "wide.npy", np.zeros((2, 2), dtype=np.int32))
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "no.bin").touch()
    np.save(tmp_path / "high.npy", np.array([50257]))
    np.save(tmp_path / "low.npy", np.array([-1]))
    np.savez(tmp_path / "many.npz", tokens)
    for name, message in (
        ("wide.npy", "one row of integers"),
        ("odd.bin", "odd number"),
        ("no.bin", "holds no tokens"),
        ("high.npy", "has id 50257"),
        ("low.npy", "do not fit 16 bits"),
    ):
        assert convert.main([str(tmp_path / name), "--out", str(tmp_path / "new")]) == 3
        assert message in capsys.readouterr().err
    with pytest.raises(ShardError, match=r"a zip archive, as \.npz files are"):
        shards.read_header(tmp_path / "many.npz")
    assert convert.main([files[0], files[0], "--out", str(tmp_path / "new")]) == 3
    assert "named 2 times" in capsys.readouterr().err
    assert convert.main([files[0], "--out", str(tmp_path / "half")]) == 0
    told = capsys.readouterr()
    assert told.out == "train 7 tokens\n" and "none of them is for val" in told.err
