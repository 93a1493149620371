"""The smaller vocabulary against a slow count, and what is refused."""

import json
from collections import Counter

import numpy as np
import pytest

import train_gpt
from data import reduce, shards


def write(path, tokens):
    shards.write_shard(path, np.array(tokens, dtype=np.uint16))


def truth(train, val, size, end):
    """The same by hand: a count, a sort, a dictionary."""
    counts = Counter(token for token in train if token != end)
    kept = [end, *sorted(counts, key=lambda token: (-counts[token], token))[: size - 2]]
    numbers = {token: number for number, token in enumerate(kept)}
    return kept, *([numbers.get(token, size - 1) for token in part] for part in (train, val))


@pytest.mark.parametrize("most", [0, 700])
def test_the_most_frequent_stay(tmp_path, capsys, most, monkeypatch):
    monkeypatch.setattr(reduce, "_BLOCK_TOKENS", 64)
    random = np.random.default_rng(0)
    train = (random.zipf(1.3, 1000) % 300).tolist()
    train[::50] = [50256] * 20
    val = (random.zipf(1.3, 200) % 400).tolist()
    write(tmp_path / "train_1.bin", train[:600])
    write(tmp_path / "train_2.bin", train[600:])
    write(tmp_path / "val_0.bin", val)
    out = tmp_path / "out"
    command = [f"--train={tmp_path}/train_*.bin", f"--val={tmp_path}/val_*.bin", f"--out={out}", "--vocab-size=24"]
    assert reduce.main([*command, f"--max-tokens={most}"]) == 0
    kept, new_train, new_val = truth(train[: most or None], val, 24, 50256)
    told = json.loads((out / "tokenize.json").read_text())
    assert told["kept"] == kept and (told["vocab_size"], told["end_of_text"]) == (24, 0)
    assert shards.open_shard(out / "train_000001.bin").tolist() == new_train
    assert shards.open_shard(out / "val_000000.bin").tolist() == new_val
    assert told["train"]["rare"] == new_train.count(23) > 0 and told["val"]["rare"] == new_val.count(23) > 0
    assert f"{told['train']['rare'] / len(new_train):.1%} of them rarer" in capsys.readouterr().out


def test_bytes_keep_their_own_end_of_text(tmp_path):
    write(tmp_path / "train_1.bin", [0, 5, 5, 6, 0, 7])
    write(tmp_path / "val_0.bin", [0, 9, 5])
    (tmp_path / "tokenize.json").write_text('{"vocab_size": 256, "end_of_text": 0}')
    files = [str(tmp_path / name) for name in ("train_1.bin", "val_0.bin")]
    told = reduce.reduce([files[0]], [files[1]], tmp_path / "out", 4)
    assert told["kept"] == [0, 5, 6]
    assert shards.open_shard(tmp_path / "out" / "val_000000.bin").tolist() == [0, 3, 1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--vocab-size=9"], "5 different tokens; --vocab-size can be 6 at most"),
        (["--train=nowhere*.bin"], "nowhere*.bin"),
        (["--out=OUT", "--vocab-size=4"], "holds .bin files already"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, capsys, change, words):
    write(tmp_path / "train_1.bin", [50256, 1, 2, 3, 4])
    write(tmp_path / "val_0.bin", [50256, 1])
    command = [f"--train={tmp_path}/train_*.bin", f"--val={tmp_path}/val_*.bin", f"--out={tmp_path}/out"]
    assert reduce.main([*command, *(word.replace("OUT", str(tmp_path)) for word in change)]) == 3
    assert words in capsys.readouterr().err
    assert len(list(tmp_path.rglob("*.bin"))) == 2


@pytest.mark.parametrize(
    ("train", "val", "words"),
    [
        ([0, 5, 300], [0, 5], "train_1.bin: token 2 has id 300, outside the vocabulary of 256"),
        ([0, 5, 6], [0, 300], "val_0.bin: token 1 has id 300, outside the vocabulary of 256"),
        ([], [0, 5], "train_1.bin: holds no tokens"),
        ([0, 5, 6], [], "val_0.bin: holds no tokens"),
    ],
)
def test_shards_that_cannot_be_used_leave_nothing(tmp_path, capsys, train, val, words):
    write(tmp_path / "train_1.bin", train)
    write(tmp_path / "val_0.bin", val)
    (tmp_path / "tokenize.json").write_text('{"vocab_size": 256, "end_of_text": 0}')
    command = [f"--train={tmp_path}/train_*.bin", f"--val={tmp_path}/val_*.bin", f"--out={tmp_path}/out"]
    assert reduce.main([*command, "--vocab-size=3"]) == 3
    assert words in capsys.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_the_micro_preset_trains_on_them(tmp_path):
    """The note beside the shards is what `--data` goes by: vocabulary, end of text, both parts."""
    random = np.random.default_rng(1)
    drawn = random.zipf(1.5, 7500) % 900
    drawn[::100] = 50256
    write(tmp_path / "train_1.bin", drawn[:6000])
    write(tmp_path / "val_0.bin", drawn[6000:])
    files = [str(tmp_path / name) for name in ("train_1.bin", "val_0.bin")]
    reduce.reduce([files[0]], [files[1]], tmp_path / "out", 64)
    words = "--preset=micro --device=cpu --num_iterations=8 --tokens_per_step=256 --train_seq_len=256 --val_seq_len=512"
    words += (
        f" --val_tokens=1024 --num_layers=4 --unet_skips= --attention_free_layers=2 --data={tmp_path}/out --run_name=m"
    )
    assert train_gpt.main([*words.split(), "--long_window_layers=0,3", f"--output_dir={tmp_path}"]) == 0
    told = json.loads((tmp_path / "m.json").read_text())
    assert (told["config"]["vocab_size"], told["config"]["eos_id"]) == (64, 0)
    assert told["final_loss"] < np.log(64) - 0.3


@pytest.mark.parametrize(("preset", "whole", "blocks"), [("micro", 3735588, 1114112), ("nano-text", 4325400, 98304)])
def test_the_sizes_that_are_told_of_small_presets(preset, whole, blocks):
    model = train_gpt.GPT(train_gpt.parse_config([f"--preset={preset}"]))
    assert sum(p.numel() for p in model.parameters()) == whole
    assert sum(p.numel() for name, p in model.named_parameters() if "blocks" in name) == blocks
