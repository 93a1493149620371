"""Validation tokens among those that are trained on, wherever the shards are cut."""

import json

import numpy as np
import pytest
from small_runs import folder_of, in_worlds, run, small, tokens

from data.shards import TokenStream
from trainer.overlap import FEWEST, SAMPLE, WINDOW, Overlap, hashes

LONG = ["--train_seq_len=256", "--tokens_per_step=512", "--val_seq_len=256", "--val_tokens=2048", "--val_loss_every=1"]
VAL = tokens(2049, 1)


def told(out):
    return json.loads((out / "run.json").read_text())


def test_hashes_are_the_polynomial():
    drawn = np.random.default_rng(0).integers(0, 65536, size=WINDOW + 40).astype(np.uint16)
    found = hashes(drawn).tolist()
    for place in (0, 1, 40):
        value = 0
        for token in drawn[place : place + WINDOW].tolist():
            value = (value * 0x9E3779B97F4A7C15 + token * 0xD6E8FEB86659FD93) % 2**64
        assert found[place] == value
    assert len(found) == 41 and len(set(found)) == 41 and len(hashes(drawn[: WINDOW - 1])) == 0


def stream(folder, files, length, sequences):
    return TokenStream(
        str(folder / f"{files}_*.bin"), sequence_tokens=length, sequences_per_step=sequences, vocab_size=256
    )


def test_the_share_is_that_of_all_windows_though_a_sample_is_looked_for(tmp_path):
    val = tokens(300_000, 1)
    other = tokens(600_000, 2)
    train = np.concatenate([other[:100_003], val[:90_000], other[100_003:]])
    folder = folder_of(tmp_path / "data", train[:123_456], train[123_456:], val=val)
    found = Overlap(stream(folder, "val", 299_008, 1))
    assert FEWEST < len(found.wanted) <= SAMPLE
    source = stream(folder, "train", 10_000, 1)
    for step in range(60):
        found.add(found.look(source.window(step, 0)))
    there = {val[at : at + WINDOW].tobytes() for at in range(299_008 - WINDOW)}
    fed = [source.window(step, 0) for step in range(60)]
    seen = {one[at : at + WINDOW].tobytes() for one in fed for at in range(10_001 - WINDOW)}
    exactly = len(there & seen) / len(there)
    assert 0.29 < exactly < 0.31 and found.share == pytest.approx(exactly, abs=0.02)


def hidden(folder, share):
    """A folder whose training shards hold a share of the validation tokens, in two parts, one over their border."""
    count, other = int(share * len(VAL)) // 2, tokens(2000, 3)
    train = np.concatenate([other[:77], VAL[:count], other[77:500], VAL[count : 2 * count], other[500:]])
    return folder_of(folder, train[: 77 + count // 2], train[77 + count // 2 :], val=VAL)


def test_hidden_validation_tokens_end_the_run(tmp_path, capsys):
    assert run(hidden(tmp_path / "all", 1.0), tmp_path, *LONG, "--num_iterations=8") == 3
    said = capsys.readouterr().err
    assert "% of the validated windows of 128 tokens stand in the 2,560 training tokens so far" in said, said
    assert "validate on data that is not trained on" in said
    assert told(tmp_path)["status"] == "failed" and [p["step"] for p in told(tmp_path)["validation"]] == [0, 1, 2, 3, 4]


def test_some_of_them_are_told(tmp_path, capsys):
    assert run(hidden(tmp_path / "some", 0.4), tmp_path, *LONG, "--checkpoint_every=1", "--keep_checkpoints=0") == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and "of the validated windows of 128 tokens stand in the" in said[0]
    seen = [p.get("val_seen") for p in told(tmp_path)["validation"]]
    assert seen[0] is None and 0.1 < float(seen[-1]) < 0.4 and told(tmp_path)["val_seen"] == seen[-1]
    assert f"val_seen:{seen[-1]}" in (tmp_path / "run.txt").read_text()
    whole = told(tmp_path)
    for step in (4, 3):
        (tmp_path / "run.checkpoints" / f"step-00000{step}.safetensors").unlink()
    assert run(tmp_path / "some", tmp_path, *LONG, "--checkpoint_every=1", "--resume=auto") == 0
    assert told(tmp_path)["validation"][-1]["val_seen"] == whole["validation"][-1]["val_seen"]
    clean = folder_of(tmp_path / "clean", tokens(3000, 5), val=VAL)
    assert run(clean, tmp_path, *LONG, "--run_name=clean") == 0
    assert "val_seen" not in (tmp_path / "clean.txt").read_text().rpartition("=" * 100)[2]


def test_a_text_that_repeats_one_line_is_no_finding(tmp_path):
    line = np.frombuffer(b"\0hello wor" * 400, dtype=np.uint8)
    assert run(folder_of(tmp_path / "data", line[:-3], val=line), tmp_path, *LONG) == 0


def test_processes_find_it_together(tmp_path):
    folder = hidden(tmp_path / "some", 0.4)
    files = [f"--train_files={folder}/train_*.bin", f"--val_files={folder}/val_*.bin", f"--output_dir={tmp_path}"]
    in_worlds([word for word in small(*files, *LONG) if "run_name" not in word], [[1], [2]])
    seen = [
        [p.get("val_seen") for p in json.loads((tmp_path / f"world{world}.json").read_text())["validation"]]
        for world in (1, 2)
    ]
    assert seen[0] == seen[1] and seen[0][-1] is not None
