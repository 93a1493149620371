"""`train_gpt.py evaluate`: the loss of the run's own validation, by token, byte and document."""

import json

import numpy as np
import pytest
from small_runs import folder_of, run, tokens

import train_gpt
from trainer.evaluate import by_document


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    assert run(folder_of(folder / "data", tokens(2000)), folder, "--muon_lr=0.01") == 0
    return folder


def evaluate(capsys, folder, *words):
    code = train_gpt.main(["evaluate", str(folder / "run"), "--device=cpu", *words])
    told = capsys.readouterr()
    return (json.loads(told.out) if "--json" in words else told.out) if code == 0 else (code, told.err)


def test_the_loss_is_that_of_the_last_validation(done, capsys):
    told = evaluate(capsys, done, "--json")
    summary = json.loads((done / "run.json").read_text())
    assert told["loss"] == pytest.approx(summary["final_loss"], abs=1e-6)
    assert told["val_data_hash"] == summary["val_data_hash"] and told["tokens"] == 128
    targets = tokens(200, 1)[1:129]
    assert told["bytes"] == np.count_nonzero(targets)
    assert told["bits_per_byte"] == pytest.approx(told["loss"] * 128 / told["bytes"] / np.log(2))
    assert f"loss {told['loss']:.6f} nats a token, {told['bits_per_byte']:.6f} bits a byte" in evaluate(capsys, done)


def test_documents_add_up(done, tmp_path, capsys):
    file = tmp_path / "told.json"
    text = evaluate(capsys, done, "--by_document", f"--json={file}")
    told = json.loads(file.read_text())
    documents = told["documents"]
    assert [d["start"] for d in documents] == [0, 50, 100] and text.count("document at") == 3
    assert sum(d["tokens"] for d in documents) == 128 and sum(d["bytes"] for d in documents) == told["bytes"]
    assert sum(d["loss"] * d["tokens"] for d in documents) / 128 == pytest.approx(told["loss"])
    rows = by_document(np.array([5, 0, 1, 0, 2, 3]), np.arange(6.0), None, 0)
    assert [(d["start"], d["tokens"], d["loss"]) for d in rows] == [(0, 1, 0.0), (1, 2, 1.5), (3, 3, 4.0)]


def test_other_data(done, tmp_path, capsys):
    other = folder_of(tmp_path / "other", tokens(300, 4), val=tokens(500, 8))
    by_files = evaluate(capsys, done, f"--val_files={other}/val_0.bin", "--val_tokens=448", "--json")
    assert by_files["tokens"] == 448 and by_files["loss"] != evaluate(capsys, done, "--json")["loss"]
    assert evaluate(capsys, done, f"--data={other}", "--json")["tokens"] == 128
    (other / "tokenize.json").write_text('{"vocab_size": 50257, "end_of_text": 50256}')
    for words, code, message in (
        ([f"--val_files={other}/val_0.bin"], 3, "its shards have 50257 tokens"),
        ([f"--val_files={other}/none.bin"], 3, "no such file"),
        (["--val_tokens=5"], 2, "is not one sequence"),
        (["--val_tokens=100"], 2, "--val_tokens=100 is not a multiple of --val_seq_len=64"),
        (["--json=/nowhere/told.json"], 2, "--json=/nowhere/told.json: a file in a folder that is there"),
        ([f"--json={tmp_path}"], 2, "a file in a folder that is there"),
        (["--val_files=a", "--data=b"], 2, "give one of them"),
    ):
        found, text = evaluate(capsys, done, *words)
        assert found == code and message in text
