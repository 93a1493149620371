"""The tokenizer: exact tokens, every input form, splits, errors, interruption."""

import bz2
import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import encoding, reading, shards, tokenize
from data.encoding import MARKER, TokenizeError
from data.tokenize import Settings


def read(folder, part="train"):
    """The tokens of all shards of one part."""
    files = sorted(folder.glob(f"{part}_*.bin"))
    return np.concatenate([np.array(shards.open_shard(f)) for f in files]).tolist() if files else []


def as_bytes(*documents):
    return [token for document in documents for token in b"\0" + document.encode()]


def run(folder, name, content, **options):
    """Tokenize one file to bytes; returns its training tokens."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    options.setdefault("encoding", "bytes")
    tokenize.tokenize([str(path)], Settings(out=str(folder / "out"), overwrite=True, **options))
    return read(folder / "out")


# Forms of input


@pytest.mark.parametrize(
    "documents, content, expected",
    [
        ("file", "One\n\ntwo\n", ["One\n\ntwo\n"]),
        ("file", "\ufeffwith a mark", ["with a mark"]),
        ("line", "a\n\nb b\r\nc", ["a", "b b", "c"]),
        ("blank", "\na\nb\n\n\n \nc\n", ["a\nb", "c"]),
        ("marker", f"a\n\nb\n{MARKER}\nc {MARKER} d\n{MARKER}\n{MARKER}\n", ["a\n\nb", f"c {MARKER} d"]),
    ],
)
def test_documents_of_a_text(tmp_path, documents, content, expected):
    assert run(tmp_path, "a.txt", content, documents=documents) == as_bytes(*expected)


def test_jsonl(tmp_path):
    lines = '{"text": "caf\\u00e9", "id": 1}\n\n{"body": 2, "text": "b"}\r\n'
    assert run(tmp_path, "a.jsonl", lines) == as_bytes("café", "b")
    assert run(tmp_path, "b.json", '{"body": "x"}', field="body") == as_bytes("x")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    texts = [f"document {i}" for i in range(700)]
    table = pyarrow.table({"id": list(range(700)), "text": texts})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    assert run(tmp_path, "a.parquet", (tmp_path / "a.parquet").read_bytes()) == as_bytes(*texts)
    for field, message in (("body", "no column 'body'; it has id, text"), ("id", "row 0: field 'id' is int")):
        with pytest.raises(TokenizeError, match=message):
            run(tmp_path, "a.parquet", (tmp_path / "a.parquet").read_bytes(), field=field)


@pytest.mark.parametrize("pack, suffix", [(gzip.compress, "gz"), (bz2.compress, "bz2")])
def test_packed_files(tmp_path, pack, suffix):
    assert run(tmp_path, f"a.txt.{suffix}", pack(b"hello")) == as_bytes("hello")
    lines = pack(b'{"text": "hello"}')
    assert run(tmp_path, f"a.jsonl.{suffix}", lines) == as_bytes("hello")
    with pytest.raises(TokenizeError, match=rf"a\.jsonl\.{suffix}: cannot be read"):
        run(tmp_path, f"a.jsonl.{suffix}", lines[:-6])


def test_several_files_and_remote_ones(tmp_path, monkeypatch):
    import fsspec

    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").pipe("/tok/b.txt", b"remote")
    (tmp_path / "a.txt").write_text("local")
    inputs = [str(tmp_path / "*.txt"), "memory://tok/*.txt"]
    tokenize.tokenize(inputs, Settings(out=str(tmp_path / "out"), encoding="bytes"))
    assert read(tmp_path / "out") == as_bytes("local", "remote")


# Shards, splits, pieces, workers


@settings(max_examples=40, deadline=None)
@given(
    documents=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), min_size=1).filter(str.strip),
        min_size=1,
        max_size=8,
    ),
    shard=st.integers(1, 40),
)
def test_shards_hold_the_tokens_whatever_their_size(tmp_path_factory, documents, shard):
    folder = tmp_path_factory.mktemp("shards")
    lines = "".join(json.dumps({"text": d}) + "\n" for d in documents)
    assert run(folder, "a.jsonl", lines, shard_tokens=shard) == as_bytes(*documents)
    sizes = [shards.read_header(f).num_tokens for f in sorted((folder / "out").glob("*.bin"))]
    assert sizes[:-1] == [shard] * (len(sizes) - 1) and 0 < sizes[-1] <= shard
    assert sorted(f.name for f in (folder / "out").glob("*.bin"))[0] == "train_000001.bin"


@settings(max_examples=40, deadline=None)
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1),
    fraction=st.floats(0, 0.99),
    piece=st.integers(1, 9),
)
def test_split_by_character_is_a_cut(tmp_path_factory, text, fraction, piece):
    folder, size = tmp_path_factory.mktemp("cut"), reading.PIECE_CHARS
    text = text.removeprefix("\ufeff") or "x"
    reading.PIECE_CHARS = piece
    try:
        at = int(len(text) * (1 - fraction))
        if at in (0, len(text)) and fraction:
            with pytest.raises(TokenizeError, match=r"no text for training|no document fell into validation"):
                run(folder, "a.txt", text, val_fraction=fraction, split="characters")
            return
        assert run(folder, "a.txt", text, val_fraction=fraction, split="characters") == as_bytes(text[:at])
        assert read(folder / "out", "val") == (as_bytes(text[at:]) if at < len(text) else [])
    finally:
        reading.PIECE_CHARS = size


def test_split_by_document_depends_on_the_text_alone(tmp_path):
    documents = [f"document {i}" for i in range(400)]
    one = run(tmp_path, "a.txt", "\n".join(documents), documents="line", val_fraction=0.25)
    val = read(tmp_path / "out", "val")
    assert sorted(bytes(one + val).split(b"\0")[1:]) != [] and len(one) + len(val) == len(as_bytes(*documents))
    assert 60 < bytes(val).count(0) < 140
    shuffled = run(tmp_path, "b.txt", "\n".join(documents[::-1]), documents="line", val_fraction=0.25)
    assert sorted(bytes(shuffled).split(b"\0")) == sorted(bytes(one).split(b"\0"))
    with pytest.raises(TokenizeError, match="too few documents"):
        run(tmp_path, "c.txt", "one", val_fraction=1e-9)


def test_max_tokens_and_counts(tmp_path):
    assert run(tmp_path, "a.txt", "abcdefghij", max_tokens=4) == as_bytes("abc")
    run(tmp_path, "b.txt", "äb\ncd", documents="line")
    facts = json.loads((tmp_path / "out" / "tokenize.json").read_text())
    assert facts["train"] == {"tokens": 7, "documents": 2, "characters": 4}
    info = shards.read_header(tmp_path / "out" / "train_000001.bin")
    assert facts["shards"] == {"train_000001.bin": shards.data_hash([info])}


def test_workers_do_not_change_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize, "_BATCH_CHARS", 300)
    text = "\n".join(f"line {i} " + "x" * (i % 50) for i in range(300))
    one = run(tmp_path / "a", "a.txt", text, documents="line", val_fraction=0.2)
    two = run(tmp_path / "b", "a.txt", text, documents="line", val_fraction=0.2, workers=2)
    assert one == two
    with pytest.raises(TokenizeError, match=r"line 3: byte 0"):
        run(tmp_path / "c", "a.txt", "a\nb\nc\0\nd", documents="line", workers=2)


# GPT-2


@pytest.fixture(scope="module")
def vocab(shared_data):
    return str(shared_data / "tokenizer")


@pytest.fixture(scope="module")
def gpt2(vocab):
    return encoding.gpt2_encoder(vocab)


def test_known_tokens(gpt2):
    assert gpt2("Hello world").tolist() == [15496, 995]
    assert gpt2(MARKER).tolist() == [27, 91, 437, 1659, 5239, 91, 29]
    assert gpt2("").tolist() == []


def test_real_documents_reproduce_the_real_shard(tmp_path, shared_data, vocab):
    arguments = [str(shared_data / "text/webdocs_val.jsonl"), "--out", str(tmp_path), "--vocab", vocab]
    assert tokenize.main([*arguments, "--max-tokens", "1600000", "--workers", "1"]) == 0
    expected = (shared_data / "tokens/val_000000.bin").read_bytes()
    assert (tmp_path / "train_000001.bin").read_bytes() == expected


SPACES = st.sampled_from(
    [" ", "  ", "\n", " \n", "\n\n", "\t", "\u00a0", "\u2003 ", "\x1c", "'s", "x", "42", "é", "!?"]
)


@settings(max_examples=150, deadline=None)
@given(text=st.lists(SPACES | st.text(max_size=4), max_size=30).map("".join), piece=st.integers(1, 12))
def test_cut_documents_have_the_same_tokens(gpt2, text, piece):
    size = reading.PIECE_CHARS
    reading.PIECE_CHARS = piece
    try:
        text = text.encode("utf-8", "ignore").decode()
        pieces = list(reading.cut("here", text))
    finally:
        reading.PIECE_CHARS = size
    assert "".join(p.text for p in pieces) == text
    assert [p.starts for p in pieces] == [True, *[False] * (len(pieces) - 1)][: len(pieces)]
    tokens = [t for p in pieces for t in gpt2(p.text).tolist()]
    assert tokens == gpt2(text).tolist()


def test_vocabulary_errors(tmp_path, monkeypatch):
    with pytest.raises(TokenizeError, match=r"encoder\.json: No such file"):
        encoding.gpt2_encoder(str(tmp_path))
    (tmp_path / "encoder.json").write_text("{}")
    with pytest.raises(TokenizeError, match="not GPT-2's vocabulary: sha256"):
        encoding.gpt2_encoder(str(tmp_path))
    import tiktoken

    def no_network(name):
        raise ConnectionError("unreachable")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(TokenizeError, match=r"could not be downloaded.*--vocab"):
        encoding.gpt2_encoder()


# Errors


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"ok" * 600_000 + b"\xff", "a.txt: not UTF-8 text at byte 1,200,000"),
        ("a.txt", b"ok \xc3", "not UTF-8 text at byte 3"),
        ("a.txt", b"nul \0", "byte 0 in the text"),
        ("a.txt", b"", "no text for training"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl", b'["text"]', "line 1: a JSON object is needed, found list"),
        ("a.jsonl", b'{"body": "a"}', "line 1: no field 'text'; it has body"),
        ("a.jsonl", b'{"text": null}', "line 1: field 'text' is NoneType"),
        ("a.jsonl", b'{"text": "a\\ud800"}', "line 1: half a surrogate pair"),
        ("a.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("a.txt.gz", b"no gzip", "cannot be read"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(tmp_path, name, content, message):
    with pytest.raises(TokenizeError, match=message):
        run(tmp_path, name, content)
    assert os.listdir(tmp_path / "out") == []


def test_folders_and_missing_files(tmp_path):
    settings = Settings(out=str(tmp_path / "out"))
    for name, message in ((str(tmp_path), "a folder; name the files"), ("none.txt", "no such file")):
        with pytest.raises(TokenizeError, match=message):
            tokenize.tokenize([name], settings)


def test_old_shards_are_kept_or_replaced_whole(tmp_path):
    run(tmp_path, "a.txt", "old " * 20, shard_tokens=10)
    before = sorted(os.listdir(tmp_path / "out"))
    assert len(before) > 5
    with pytest.raises(TokenizeError, match="holds shards already"):
        tokenize.tokenize([str(tmp_path / "a.txt")], Settings(out=str(tmp_path / "out"), encoding="bytes"))
    with pytest.raises(TokenizeError):
        run(tmp_path, "b.txt", b"\xff")
    assert sorted(os.listdir(tmp_path / "out")) == before
    assert run(tmp_path, "c.txt", "new") == as_bytes("new")
    assert sorted(os.listdir(tmp_path / "out")) == ["tokenize.json", "train_000001.bin"]


def test_command_line(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello\nworld")
    good = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--encoding", "bytes"]
    assert tokenize.main(good) == 0
    assert "train: 12 tokens, 1 documents, 11 characters" in capsys.readouterr().out
    assert tokenize.main(good) == 3
    assert capsys.readouterr().err.startswith("data.tokenize: ")
    assert tokenize.main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "a.txt"), "--encoding", "bytes"]) == 3
    for wrong in (
        ["--val-fraction", "1"],
        ["--shard-tokens", "0"],
        ["--max-tokens", "0"],
        ["--workers", "-1"],
        ["--workers", "0"],
        ["--shuffle", "-1"],
        ["--weights", "1,2"],
        ["--weights", "0"],
        ["--weights", "nan"],
        ["--weights", "x"],
        ["--val-fraction", "nan"],
        ["--documents", "marker", "--marker", ""],
        ["--x"],
    ):
        with pytest.raises(SystemExit) as exit:
            tokenize.main([*good, "--overwrite", *wrong])
        assert exit.value.code == 2, wrong
        assert [word for word in wrong if word.startswith("--")][-1] in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit) as exit:
        tokenize.main(["--help"])
    assert exit.value.code == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(tmp_path, number):
    pipe = tmp_path / "endless.txt"
    os.mkfifo(pipe)
    command = [
        sys.executable,
        "-m",
        "data.tokenize",
        str(pipe),
        "--out",
        str(tmp_path / "out"),
        "--encoding",
        "bytes",
        "--shard-tokens",
        "100000",
    ]
    # A shell may have started us with SIGINT ignored, which children inherit.
    usual = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=usual)
    with open(pipe, "wb") as feed:  # opens when the program reads
        feed.write(b"word " * 800_000)
        feed.flush()
        deadline = time.monotonic() + 30
        while not list((tmp_path / "out").rglob("train_000009.bin")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and err == "data.tokenize: interrupted; nothing was written\n"
    assert os.listdir(tmp_path / "out") == []
