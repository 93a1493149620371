"""Every form of input that is offered, with two members, streams or frames; every other is refused."""

import bz2
import gzip
import io
import json
import lzma
import zipfile

import numpy as np
import pytest

from data import reading, shards, tokenize
from data.encoding import MARKER, TokenizeError, _gpt2_encoding, encoding_for, gpt2_encoder, token_bytes
from data.reading import Reader
from data.tokenize import Settings


def zstd(*parts):
    zstandard = pytest.importorskip("zstandard")
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def documents(path, content=None, **how):
    """All documents of a file, whole."""
    if content is not None:
        path.write_bytes(content)
    out = []
    for piece in Reader(**how).pieces(str(path)):
        out += [piece.text] if piece.starts else [out.pop() + piece.text]
    return out


@pytest.mark.parametrize(
    "suffix, pack",
    [
        (".gz", lambda *parts: b"".join(map(gzip.compress, parts))),
        (".bz2", lambda *parts: b"".join(map(bz2.compress, parts))),
        (".xz", lambda *parts: b"".join(map(lzma.compress, parts))),
        (".zst", zstd),
    ],
)
def test_packed_files_of_two_parts_are_read_whole(tmp_path, suffix, pack):
    path = tmp_path / f"a.txt{suffix}"
    assert documents(path, pack(b"one ", "zwö".encode())) == ["one zwö"]
    lines = [json.dumps({"text": "x" * 40_000 + str(i)}).encode() + b"\n" for i in range(60)]
    path = tmp_path / f"a.jsonl{suffix}"
    whole = pack(b"".join(lines[:30]), b"".join(lines[30:]))
    assert documents(path, whole) == ["x" * 40_000 + str(i) for i in range(60)]
    with pytest.raises(TokenizeError, match=f"a.jsonl{suffix}: cannot be read"):
        documents(path, whole[:-5])
    with pytest.raises(TokenizeError, match=f"a.jsonl{suffix}: cannot be read"):
        documents(path, b"something else")


def test_a_zip_is_read_member_by_member(tmp_path):
    members = {
        "b.txt": "second in name",
        "in/": "",
        "in/a.jsonl": '{"text": "x"}\n{"text": "y"}',
        "__MACOSX/b.txt": "no",
    }
    assert documents(tmp_path / "a.zip", zipped(members)) == ["second in name", "x", "y"]
    assert documents(tmp_path / "a.zip", zipped({"a.txt.gz": gzip.compress(b"packed twice")})) == ["packed twice"]
    assert documents(tmp_path / "a.jsonl.zip", zipped({"part": '{"text": "x"}'})) == ["x"]
    with pytest.raises(TokenizeError, match=r"a\.zip, b\.txt: not UTF-8 text at byte 0"):
        documents(tmp_path / "a.zip", zipped({"a.txt": "good", "b.txt": b"\xff"}))
    with pytest.raises(TokenizeError, match=r"table\.csv: \.csv is not read by its name"):
        documents(tmp_path / "a.zip", zipped({"table.csv": "a,b"}))
    with pytest.raises(TokenizeError, match=r"a\.zip, in\.txt\.zip: an archive inside an archive"):
        documents(tmp_path / "a.zip", zipped({"a.txt": "good", "in.txt.zip": zipped({"b.txt": "inside"})}))
    with pytest.raises(TokenizeError, match="an archive without a file"):
        documents(tmp_path / "a.zip", zipped({}))


@pytest.mark.parametrize(
    "name", ["a.csv", "a.tsv", "a.arrow", "a.feather", "a.pdf", "a.tar", "a.tgz", "a.7z", "a.csv.gz"]
)
def test_names_that_are_not_offered_are_refused(tmp_path, name):
    (tmp_path / name).write_text("a,b\n")
    with pytest.raises(TokenizeError, match="is not read by its name"):
        tokenize.tokenize([str(tmp_path / name)], Settings(out=str(tmp_path / "out"), encoding="bytes"))
    if not name.endswith(".gz"):
        assert documents(tmp_path / name, kind="text") == ["a,b\n"]


def test_fields_within_fields(tmp_path):
    lines = b'{"a": {"b": "x"}, "a.b": "whole name"}\n{"a": {"b": "y"}}\n'
    assert documents(tmp_path / "a.jsonl", lines, field="a.b") == ["whole name", "y"]
    with pytest.raises(TokenizeError, match=r"line 1: no field 'a\.c'; it has b"):
        documents(tmp_path / "a.jsonl", b'{"a": {"b": "x"}}', field="a.c")
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(
        pyarrow.table({"meta": [{"text": "x", "n": 1}, {"text": "y", "n": 2}]}), tmp_path / "a.parquet"
    )
    assert documents(tmp_path / "a.parquet", field="meta.text") == ["x", "y"]


def test_a_json_array_is_told_what_to_do(tmp_path):
    for content in (b'[{"text": "a"}, {"text": "b"}]', b'[\n {"text": "a"}\n]'):
        with pytest.raises(TokenizeError, match=r"line 1: .*jq -c '\.\[\]' .*a\.json > lines\.jsonl"):
            documents(tmp_path / "a.json", content)


def test_bad_documents_stop_or_are_skipped_and_counted(tmp_path):
    bad = [b'{"text": 1}', b"no json", b'{"text": "\xff"}', b'{"text": "a\\ud800"}', b'{"text": "b\\u0000"}']
    lines = b"\n".join([b'{"text": "good"}', *bad, b'{"text": ""}'])
    (tmp_path / "a.jsonl").write_bytes(lines)
    reader = Reader(on_bad="skip", forbidden="\0")
    assert [piece.text for piece in reader.pieces(str(tmp_path / "a.jsonl"))] == ["good"]
    assert reader.counts == {"bad": 5, "empty": 1} and "line 2: field 'text' is int" in reader.first_bad
    with pytest.raises(TokenizeError, match="line 2: field 'text' is int"):
        documents(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_bytes(b"x" * 3_000_000 + b"\xff")
    reader = Reader(on_bad="skip")
    assert list(reader.pieces(str(tmp_path / "b.txt"))) == [] and reader.counts == {"bad": 1}
    assert documents(tmp_path / "c.txt", b"a\n\xff\nc", documents="line", on_bad="skip") == ["a", "c"]


def test_the_command_line_tells_what_it_met(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(f"one\n{MARKER}\ntwo\n{MARKER}\n")
    arguments = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--encoding", "bytes", "--overwrite"]
    assert tokenize.main(arguments) == 0
    assert (
        "warning: 2 lines equal to the end-of-text marker were taken as text by --documents file"
        in capsys.readouterr().err
    )
    assert tokenize.main([*arguments, "--documents", "marker"]) == 0
    assert "marker" not in capsys.readouterr().err
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": "x"}\nbad\n')
    arguments[0] = str(tmp_path / "a.jsonl")
    assert tokenize.main([*arguments, "--on-bad", "skip"]) == 0
    told = capsys.readouterr()
    assert "train: 2 tokens, 1 documents, 1 characters" in told.out
    assert "1 bad documents were skipped; the first: " in told.err and "1 empty documents" in told.err


@pytest.mark.parametrize("encoding", ["bytes", "gpt2"])
def test_counts_are_of_what_was_written(tmp_path, shared_data, encoding):
    (tmp_path / "a.txt").write_text("\n".join(f"äöü number {i}" for i in range(1000)))
    facts = tokenize.tokenize(
        [str(tmp_path / "a.txt")],
        Settings(
            out=str(tmp_path / "out"),
            encoding=encoding,
            documents="line",
            max_tokens=95,
            vocab=str(shared_data / "tokenizer"),
        ),
    )
    tokens = np.array(shards.open_shard(tmp_path / "out" / "train_000001.bin"))
    vocabulary = tokenize.ENCODINGS[encoding]
    text = encoding_for(vocabulary.size, str(shared_data / "tokenizer")).decode(
        tokens[tokens != vocabulary.end_of_text].tolist()
    )
    assert facts["train"]["documents"] == (tokens == vocabulary.end_of_text).sum()
    assert facts["train"] == {
        "tokens": 95,
        "documents": facts["train"]["documents"],
        "characters": len(text.rstrip("\ufffd")),
    }


def test_a_million_blanks_do_not_stop_gpt2(shared_data):
    vocab = str(shared_data / "tokenizer")
    encode, plain = gpt2_encoder(vocab), _gpt2_encoding(vocab)
    for blank in (" ", "\n", " \u2003"):
        text = "a" + blank * 1_000_000 + "b"
        assert plain.decode(encode(text).tolist()) == text
    for blank in (" ", "\n", "\t"):  # just as long as tiktoken can do in one piece
        text = "a" + blank * 300_000 + " b"
        assert encode(text).tolist() == plain.encode_ordinary(text)


def test_bytes_a_token(shared_data):
    lengths = token_bytes(50257, str(shared_data / "tokenizer"))
    encoding = encoding_for(50257, str(shared_data / "tokenizer"))
    text = "naïve 🦆 quack, 42 times"
    assert lengths[encoding.encode(text)].sum() == len(text.encode()) and lengths[50256] == 0
    assert token_bytes(256).tolist() == [0] + [1] * 255


# Order and proportion


def spread(tmp_path, **options):
    """Numbers of the documents in the order that they were written."""
    (tmp_path / "a.txt").write_text("\n".join(f"{i:04d} " + "x" * (i % 90) for i in range(2000)))
    options = {"encoding": "bytes", "documents": "line", "overwrite": True} | options
    tokenize.tokenize([str(tmp_path / "a.txt")], Settings(out=str(tmp_path / "out"), **options))
    files = sorted((tmp_path / "out").glob("train_*.bin"))
    whole = b"".join(np.array(shards.open_shard(f)).astype(np.uint8).tobytes() for f in files)
    return [int(document[:4]) for document in whole.split(b"\0")[1:]]


def test_shuffled_documents(tmp_path, monkeypatch):
    plain, one = spread(tmp_path), spread(tmp_path, shuffle=1)
    assert plain == list(range(2000)) and one != plain and sorted(one) == plain
    assert abs(np.corrcoef(plain, one)[0, 1]) < 0.08  # 3.5 standard deviations of a random order
    assert spread(tmp_path, shuffle=2) != one
    monkeypatch.setattr(tokenize, "_BATCH_CHARS", 999)
    monkeypatch.setattr(reading, "PIECE_CHARS", 10)
    assert spread(tmp_path, shuffle=1, workers=2, shard_tokens=777) == one
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_inputs_are_mixed_by_weight(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("\n".join("a" * 50 for _ in range(1000)))
    (tmp_path / "b.txt").write_text("\n".join("b" * 200 for _ in range(1000)))
    arguments = [
        str(tmp_path / "a.txt"),
        str(tmp_path / "b.txt"),
        "--out",
        str(tmp_path / "out"),
        "--encoding",
        "bytes",
    ]
    assert tokenize.main([*arguments, "--documents", "line", "--weights", "1,3"]) == 0
    tokens = np.array(shards.open_shard(tmp_path / "out" / "train_000001.bin"))
    for part in np.array_split(tokens, 5):
        assert abs((part == ord("a")).sum() / (part > 0).sum() - 0.25) < 0.01
    assert (tokens == ord("a")).sum() == 50_000  # all of the input that ended first
    assert "a.txt ended first; characters of each input" in capsys.readouterr().err
    for wrong, message in (
        ("1", "--weights: 1 for 2 inputs"),
        ("1,0", "above 0"),
        ("1,nan", "above 0"),
        ("inf,1", "above 0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            tokenize.main([*arguments, "--overwrite", "--weights", wrong])
        assert message in capsys.readouterr().err


def test_a_seed_below_zero_is_refused(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    words = [str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--encoding", "bytes", "--shuffle", "-1"]
    with pytest.raises(SystemExit, match="2"):
        tokenize.main(words)
    assert "a seed is 0 or more" in capsys.readouterr().err and not (tmp_path / "out").exists()
