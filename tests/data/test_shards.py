"""Shards and streams: format errors, laws of random access, files that change while they are read."""

import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import shards
from data.shards import ShardError, TokenStream


def make(folder, *parts, vocab=1000):
    """Shards of random tokens with the given lengths, and their concatenation."""
    rng = np.random.default_rng(len(parts))
    tokens = [rng.integers(0, vocab, n) for n in parts]
    for number, part in enumerate(tokens):
        shards.write_shard(folder / f"t_{number:06d}.bin", part)
    return np.concatenate(tokens)


def stream(folder, **options):
    defaults = {"sequence_tokens": 8, "sequences_per_step": 2, "vocab_size": 1000}
    return TokenStream(str(folder / "t_*.bin"), **{**defaults, **options})


# One shard


@given(tokens=st.lists(st.integers(0, 65535), max_size=50))
def test_round_trip(tmp_path_factory, tokens):
    path = tmp_path_factory.mktemp("shard") / "a.bin"
    info = shards.write_shard(path, np.array(tokens, dtype=np.int64))
    assert info == shards.read_header(path) == (str(path), len(tokens))
    assert shards.open_shard(path, 65536).tolist() == tokens


def test_bytes_on_disk(tmp_path):
    shards.write_shard(tmp_path / "a.bin", np.array([1, 258]))
    data = (tmp_path / "a.bin").read_bytes()
    assert data[:12] == bytes.fromhex("88d834010100000002000000")  # 20240520, 1, 2 in little-endian int32
    assert data[12:1024] == bytes(1012)
    assert data[1024:] == b"\x01\x00\x02\x01"


def header(magic=20240520, version=1, count=3):
    values = np.zeros(256, dtype="<i4")
    values[:3] = magic, version, count
    return values.tobytes()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "too short"),
        (header()[:1023], "too short"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>" + bytes(2000), "web page"),
        (b"Once upon a time " * 100, "looks like text"),
        (header(magic=20240521) + bytes(6), "magic number 20240521, expected 20240520"),
        (header(magic=20240801, version=7) + bytes(12), "Llama 3"),
        (np.frombuffer(header(), "<i4").astype(">i4").tobytes() + bytes(6), "big-endian"),
        (header(version=2) + bytes(6), "version 2, this program reads version 1"),
        (header(count=-1), "counts -1 tokens"),
        (header() + bytes(5), "cut short"),
        (header() + bytes(7), "longer than it should be"),
        (header(count=2**31 - 1) + bytes(6), "cut short"),
    ],
)
def test_bad_shards_name_file_and_cause(tmp_path, data, message):
    path = tmp_path / "bad.bin"
    path.write_bytes(data)
    for read in (shards.read_header, shards.open_shard):
        with pytest.raises(ShardError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)


@given(data=st.binary(max_size=1100), keep=st.integers(0, 12))
def test_no_file_gives_anything_but_a_shard_or_our_error(tmp_path_factory, data, keep):
    path = tmp_path_factory.mktemp("any") / "x.bin"
    path.write_bytes(header()[:keep] + data)
    try:
        info = shards.read_header(path)
    except ShardError as error:
        assert str(path) in str(error)
    else:
        assert path.stat().st_size == 1024 + 2 * info.num_tokens


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ShardError, match="no such file"):
        shards.read_header(tmp_path / "none.bin")
    with pytest.raises(ShardError, match="a folder; name the shards in it"):
        shards.read_header(tmp_path)


@pytest.mark.parametrize("tokens", [np.array([-1]), np.array([65536]), np.array([1.5]), np.zeros((2, 2), dtype=int)])
def test_write_refuses_what_does_not_fit_and_keeps_the_old_file(tmp_path, tokens):
    path = tmp_path / "a.bin"
    shards.write_shard(path, np.array([7]))
    with pytest.raises(ShardError, match=r"a\.bin"):
        shards.write_shard(path, tokens)
    assert shards.open_shard(path).tolist() == [7]
    assert os.listdir(tmp_path) == ["a.bin"]


def test_interrupted_writer_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with shards.ShardWriter(tmp_path / "a.bin") as writer:
            writer.append(np.arange(10))
            raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_vocabulary_is_checked_with_place(tmp_path):
    shards.write_shard(tmp_path / "t_0.bin", np.r_[np.zeros(100, dtype=int), 300, np.zeros(100, dtype=int)])
    with pytest.raises(ShardError, match=r"token 100 has id 300, outside the vocabulary of 256"):
        shards.open_shard(tmp_path / "t_0.bin", vocab_size=256)
    found = stream(tmp_path, vocab_size=256)
    found.batch(5, 1)
    with pytest.raises(ShardError, match=r"t_0\.bin: token 100 has id 300"):
        found.batch(6, 0)


# Streams


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_batches_are_windows_of_the_endless_concatenation(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("stream")
    parts = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    tokens = make(folder, *parts)
    length, count = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    if len(tokens) - 1 < length * count:
        with pytest.raises(ShardError, match="too few"):
            stream(folder, sequence_tokens=length, sequences_per_step=count)
        return
    found = stream(folder, sequence_tokens=length, sequences_per_step=count)
    endless = np.tile(tokens, 3 + 60 * length * count // len(tokens))
    for step in data.draw(st.lists(st.integers(0, 50), max_size=6)):  # any order: access is random
        for sequence in range(count):
            at = (step * count + sequence) * length
            inputs, targets = found.batch(step, sequence)
            assert inputs.dtype == np.int32 and targets.dtype == np.int64
            assert np.array_equal(inputs, endless[at : at + length])
            assert np.array_equal(targets, endless[at + 1 : at + 1 + length])
        assert found.epoch(step) == step * count * length // len(tokens)
    found.close()


def public_loader(parts, step_tokens, steps):
    """What the public speedrun's loader reads, in our words: a shard is left when less than a step + 2 remains."""
    number, place, out = 0, 0, []
    while len(out) < steps:
        tokens = parts[number % len(parts)]
        if place + step_tokens + 1 >= len(tokens):
            number, place = number + 1, 0
            continue
        out.append(tokens[place : place + step_tokens + 1])
        place += step_tokens
    return out


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(20, 70), min_size=1, max_size=4), steps=st.integers(1, 12))
def test_dropped_tails_match_the_public_loader(tmp_path_factory, lengths, steps):
    folder = tmp_path_factory.mktemp("tails")
    tokens = make(folder, *lengths)
    parts = np.split(tokens, np.cumsum(lengths)[:-1])
    found = stream(folder, drop_shard_tail=True)
    for step, expected in enumerate(public_loader(parts, 16, steps)):
        joined = np.concatenate([found.batch(step, 0)[0], found.batch(step, 1)[0], found.batch(step, 1)[1][-1:]])
        assert np.array_equal(joined, expected)
        assert found.epoch(step) == step // found.steps_per_epoch
    found.close()


def test_real_shard_sizes_drop_as_in_the_reference_run(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "read_header", lambda path: shards.ShardInfo(path, 100_000_000))
    for number in range(30):
        (tmp_path / f"t_{number:06d}.bin").touch()
    found = stream(tmp_path, sequence_tokens=65536, sequences_per_step=8, drop_shard_tail=True)
    assert found.steps_per_epoch == 30 * 190  # the reference's 5690 steps need 30 shards
    assert stream(tmp_path, sequence_tokens=65536, sequences_per_step=8).steps_per_epoch == 5722


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_any_number_of_processes_reads_the_same(tmp_path, world_size):
    tokens = make(tmp_path, 100, 57)
    read = {}
    for rank in range(world_size):
        mine = stream(tmp_path, sequences_per_step=8)
        read.update({(1, s): mine.batch(1, s)[0] for s in range(rank, 8, world_size)})
    assert np.array_equal(np.concatenate([read[1, s] for s in range(8)]), tokens[64:128])


def test_end_of_a_stream_that_does_not_cycle(tmp_path):
    make(tmp_path, 20, 13)
    found = stream(tmp_path, cycle=False)
    assert found.steps_per_epoch == 2
    found.batch(1, 1)  # needs all 33 tokens
    with pytest.raises(ShardError, match="33 tokens there are; they last for 2 steps"):
        found.batch(2, 0)
    with pytest.raises(IndexError):
        found.batch(0, 2)


def test_lists_of_files_keep_their_order(tmp_path):
    tokens = make(tmp_path, 30, 30)
    first, second = (str(tmp_path / f"t_00000{i}.bin") for i in (0, 1))
    options = {"sequence_tokens": 10, "sequences_per_step": 1, "vocab_size": 1000}
    swapped = TokenStream([second, first], **options)
    assert np.array_equal(swapped.batch(0, 0)[0], tokens[30:40])
    assert np.array_equal(TokenStream(f"{second}, {first}", **options).batch(3, 0)[0], tokens[:10])
    with pytest.raises(ShardError, match="named 2 times"):
        TokenStream([first, str(tmp_path / "t_*.bin")], **options)
    with pytest.raises(ShardError, match="no file matches"):
        TokenStream(str(tmp_path / "u_*.bin"), **options)
    with pytest.raises(ShardError, match="at least 1"):
        TokenStream(first, sequence_tokens=0, sequences_per_step=1, vocab_size=5)


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_OPEN_FILES", 3)
    tokens = make(tmp_path, *[17] * 9)
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    found = stream(tmp_path)
    for step in [0, 8, 3, 7, 1, 5, 2, 6, 4, 0]:
        assert np.array_equal(found.batch(step, 1)[0], tokens[16 * step + 8 : 16 * step + 16])
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 3


# Files that change while a run reads them


def test_a_shard_that_shrinks_is_an_error_not_a_crash(tmp_path):
    make(tmp_path, 100_000)
    found = stream(tmp_path)
    found.batch(0, 0)
    os.truncate(tmp_path / "t_000000.bin", 2000)  # reading a memory map there would now kill the process
    with pytest.raises(
        ShardError, match=r"t_000000\.bin: the file changed while it was being read \(from 201024 to 2000"
    ):
        found.batch(5000, 0)
    with pytest.raises(ShardError, match="changed"):
        found.batch(0, 0)  # these bytes are still there, but what else is gone?


def test_a_shard_that_is_rewritten_in_place_is_an_error(tmp_path):
    make(tmp_path, 500)
    found = stream(tmp_path)
    found.batch(0, 0)
    path = tmp_path / "t_000000.bin"
    data = path.read_bytes()
    with open(path, "r+b") as file:
        file.write(data[:1024] + bytes(len(data) - 1024))
    os.utime(path, ns=(1, 1))  # file systems with coarse times may show none of it otherwise
    with pytest.raises(ShardError, match="changed"):
        found.batch(0, 1)


def test_a_shard_that_is_replaced_goes_on_being_the_old_one(tmp_path):
    tokens = make(tmp_path, 500)
    found = stream(tmp_path)
    found.batch(0, 0)
    shards.write_shard(tmp_path / "t_000000.bin", np.zeros(500, dtype=int))
    assert np.array_equal(found.batch(3, 0)[0], tokens[48:56])


def test_a_shard_that_changed_before_it_was_opened(tmp_path):
    make(tmp_path, 500, 500)
    found = stream(tmp_path)
    shards.write_shard(tmp_path / "t_000001.bin", np.zeros(400, dtype=int))
    with pytest.raises(ShardError, match="had 500 tokens when the run began, now 400"):
        found.batch(40, 0)
    (tmp_path / "t_000000.bin").unlink()
    with pytest.raises(ShardError, match=r"t_000000\.bin: cannot be opened: No such file"):
        found.batch(0, 0)


# Prefetch


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "shard-prefetch"]


def test_prefetch_gives_the_batches_in_order(tmp_path):
    make(tmp_path, 90, 41)
    found = stream(tmp_path)
    order = [(step, s) for step in (4, 0, 9) for s in (1, 0)]
    got = list(found.prefetch(iter(order), depth=2))
    assert len(got) == 6
    for (step, s), (inputs, targets) in zip(order, got):
        expected = found.batch(step, s)
        assert inputs.numpy().dtype == np.int32 and targets.numpy().dtype == np.int64
        assert np.array_equal(inputs.numpy(), expected[0]) and np.array_equal(targets.numpy(), expected[1])
    assert not prefetch_threads()


def test_prefetch_hands_errors_over_and_ends_its_thread(tmp_path):
    make(tmp_path, 33)
    found = stream(tmp_path, cycle=False)
    batches = found.prefetch(((step, 0) for step in range(10)), depth=1)
    next(batches), next(batches)
    with pytest.raises(ShardError, match="2 steps"):
        next(batches)
    endless = found.prefetch(((0, 0) for _ in iter(int, 1)), depth=2)
    next(endless)
    assert prefetch_threads()
    endless.close()
    assert not prefetch_threads()


# Hashes


def test_data_hash_is_of_content_and_order_not_of_place(tmp_path, monkeypatch):
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir(), b.mkdir()
    make(a, 300, 400), make(b, 300, 400)
    first = stream(a).data_hash()
    assert first.startswith("sha256:") and first == stream(b).data_hash()
    assert shards.data_hash(stream(a).shards[::-1]) != first
    monkeypatch.setattr(shards, "_HASHED_WHOLE_BYTES", 0)
    monkeypatch.setattr(shards, "_SAMPLE_BYTES", 16)
    sampled = stream(a).data_hash()
    assert sampled.startswith("sampled-sha256:") and sampled == stream(b).data_hash()
    tokens = np.array(shards.open_shard(a / "t_000001.bin"))
    tokens[-1] ^= 1  # the last sample ends with the file
    shards.write_shard(a / "t_000001.bin", tokens)
    assert stream(a).data_hash() != sampled


# Real shards


def test_real_shards_continue_documents(shared_data):
    folder = shared_data / "tokens"
    one = shards.open_shard(folder / "train_000001.bin", 50257)
    two = shards.open_shard(folder / "train_000002.bin", 50257)
    assert (len(one), len(two)) == (20_000_000, 10_000_000)
    assert one[0] == 50256 and two[0] != 50256
    found = TokenStream(str(folder / "train_*.bin"), sequence_tokens=65536, sequences_per_step=8, vocab_size=50257)
    at = (38 * 8 + 1) * 65536  # this sequence reaches over the boundary
    assert at < len(one) < at + 65536
    inputs, targets = found.batch(38, 1)
    assert np.array_equal(inputs, np.concatenate([one[at:], two[: at + 65536 - len(one)]]))
    assert np.array_equal(inputs[1:], targets[:-1])
