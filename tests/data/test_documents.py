"""Sequences that begin at documents, and sequences that grow, against loops that read the descriptions literally."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import documents
from data.documents import DocumentStream
from data.shards import ShardError, TokenStream, open_shard, write_shard
from data.steps import Lengths, WholeShards

EOS = 9


def shards_of(folder, parts):
    for number, part in enumerate(parts):
        write_shard(folder / f"t_{number:06d}.bin", np.asarray(part, dtype=np.int64))
    return str(folder / "t_*.bin")


def stream(files, length, count=2, most=0):
    how = dict(sequence_tokens=length, sequences_per_step=count, vocab_size=100, eos_id=EOS)
    return DocumentStream(files, **how, document_tokens=most)


def literal_steps(parts, length_at, count, most, steps):
    """The first `steps` steps as lists of packed sequences, token by token, shards again and again; None where a whole
    round through them fills not one step. `length_at`: tokens of a step's sequences, without the last target."""
    found, rounds_without = [], 0
    while len(found) < steps:
        before = len(found)
        for part in parts:
            opened = [i for i, token in enumerate(part) if token == EOS]
            docs = [part[a:b] for a, b in zip(opened, [*opened[1:], len(part)])]
            place = 0
            while len(found) < steps:
                step, here = [], place
                for _ in range(count):
                    packed = []
                    while len(packed) <= length_at(len(found)) and here < len(docs):
                        document = docs[here][:most] if most else docs[here]
                        packed += list(document)[: length_at(len(found)) + 1 - len(packed)]
                        here += 1
                    step.append(packed)
                if len(step[-1]) <= length_at(len(found)):
                    break
                found.append(step)
                place = here
        rounds_without = 0 if len(found) > before else rounds_without + 1
        if rounds_without:
            return None
    return found


token = st.one_of(st.just(EOS), st.integers(0, 99), st.integers(0, 99))


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.lists(token, max_size=60), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    count=st.integers(1, 3),
    most=st.sampled_from([0, 1, 2, 5]),
    order=st.permutations(range(9)),
)
def test_every_step_is_the_literal_loaders(tmp_path_factory, parts, lengths, count, most, order):
    pieces = [(2 * number, tokens) for number, tokens in enumerate(lengths)]
    at = lambda step: lengths[min(step // 2, len(lengths) - 1)]  # noqa: E731
    files = shards_of(tmp_path_factory.mktemp("documents"), parts)
    literal = literal_steps(parts, at, count, most, 9)
    if literal is None:
        with pytest.raises(ShardError, match=r"no shard has documents|too few"):
            found = stream(files, pieces, count, most)
            found.window(8, 0)
        return
    found = stream(files, pieces, count, most)
    for step in order:  # access is random
        for sequence in range(count):
            assert found.window(step, sequence).tolist() == literal[step][sequence], (step, sequence)
            inputs, targets = found.batch(step, sequence)
            assert inputs.tolist() == literal[step][sequence][:-1] and targets.tolist() == literal[step][sequence][1:]
    assert found.tokens_until(9) == sum(len(packed) - 1 for step in literal for packed in step)
    found.close()


def test_a_document_that_is_cut_is_followed_by_the_next_ones_opening(tmp_path):
    part = [5, EOS, 1, 2, 3, EOS, 4, EOS, 6, 7, 8, 11, EOS, 12, 13, EOS, 14, 15]
    found = stream(shards_of(tmp_path, [part]), 4, 2, most=3)
    assert found.window(0, 0).tolist() == [EOS, 1, 2, EOS, 4]  # the 3 is over the 3 tokens, the 5 before all documents
    assert found.window(0, 1).tolist() == [EOS, 6, 7, EOS, 12]  # what is left of the last one, 13, is dropped
    assert found.window(1, 0).tolist() == [EOS, 1, 2, EOS, 4]  # the last document alone fills no sequence
    assert (found.epoch(0), found.epoch(1)) == (0, 1)


def test_a_long_document_may_be_cut_shorter_at_first(tmp_path):
    part = ([EOS, 1, 2, 3, 4, 5] * 30)[:-1]
    found = stream(shards_of(tmp_path, [part]), 5, 1, most=[(0, 2), (2, 4), (3, 6)])
    assert [found.window(step, 0).tolist() for step in range(4)] == [
        [EOS, 1] * 3, [EOS, 1] * 3, [EOS, 1, 2, 3, EOS, 1], [EOS, 1, 2, 3, 4, 5],
    ]  # fmt: skip


def test_shards_are_looked_through_once_and_in_pieces(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    parts = [np.where(rng.random(4000) < 0.05, EOS, rng.integers(10, 100, 4000)) for _ in range(5)]
    files = shards_of(tmp_path, parts)
    whole = [stream(files, 64).window(step, 1) for step in range(140)]
    monkeypatch.setattr(documents, "_BLOCK_TOKENS", 333)
    found, looked = stream(files, 64), []
    look = documents.Documents.__init__
    monkeypatch.setattr(
        documents.Documents, "__init__", lambda self, *given: look(self, *given) or looked.append(len(given[0]))
    )
    read = [found.window(step, 1) for step in range(100)]
    assert all(np.array_equal(a, b) for a, b in zip(read, whole))
    assert len(looked) <= 5, "a shard's documents are sought again and again"
    assert np.array_equal(stream(files, 64).window(139, 1), whole[139])


def test_what_is_wrong_with_documents_is_told(tmp_path):
    with pytest.raises(ShardError, match=r"no shard has documents \(token 9\) for a step of 2 sequences of 8 tokens"):
        stream(shards_of(tmp_path, [[1] * 200]), 8)
    files = shards_of(tmp_path, [[EOS, *[1] * 8, EOS, *[1] * 8, EOS]])
    assert stream(files, 8).window(3, 1).tolist() == [EOS, *[1] * 8]
    with pytest.raises(ShardError, match="at most 4 of each document"):
        stream(files, 8, most=4)
    with pytest.raises(ShardError, match="outside the vocabulary"):
        stream(shards_of(tmp_path, [[EOS, 1, 200, 3, EOS, 5, 6, 7, EOS]]), 3).window(0, 0)


def test_two_threads_may_read(tmp_path):
    rng = np.random.default_rng(1)
    files = shards_of(tmp_path, [np.where(rng.random(3000) < 0.05, EOS, rng.integers(10, 100, 3000)) for _ in range(4)])
    alone, shared, failed = stream(files, 50), stream(files, 50), []

    def read(steps):
        try:
            for step in steps:
                assert np.array_equal(shared.window(step, 0), alone_windows[step])
        except BaseException as error:
            failed.append(error)

    alone_windows = [alone.window(step, 0) for step in range(80)]
    threads = [threading.Thread(target=read, args=(range(i, 80, 3),)) for i in range(3)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert not failed


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True),
    count=st.integers(1, 3),
    drop=st.booleans(),
)
def test_sequences_that_grow_follow_one_another(tmp_path_factory, sizes, lengths, count, drop):
    """Step n begins where step n - 1 ends; with `drop_shard_tail` a shard is left as the public loader leaves it."""
    rng = np.random.default_rng(len(sizes))
    parts = [rng.integers(0, 100, size) for size in sizes]
    files = shards_of(tmp_path_factory.mktemp("growing"), parts)
    pieces = [(3 * number, tokens) for number, tokens in enumerate(lengths)]
    at = lambda step: lengths[min(step // 3, len(lengths) - 1)]  # noqa: E731
    how = dict(sequence_tokens=pieces, sequences_per_step=count, vocab_size=100, drop_shard_tail=drop)
    endless, place, number, epoch = np.concatenate([*parts] * 400), 0, 0, 0
    room = max(sizes) >= count * max(lengths) + 2 if drop else sum(sizes) > count * lengths[0]
    if not room:
        with pytest.raises(ShardError, match="too few"):
            TokenStream(files, **how)
        return
    found = TokenStream(files, **how)
    for step in range(25):
        while drop and place + count * at(step) + 1 >= sizes[number]:
            number, place = (number + 1) % len(sizes), 0
            epoch += number == 0
        assert found.epoch(step) == (epoch if drop else place // sum(sizes))
        for sequence in range(count):
            wanted = (parts[number] if drop else endless)[place : place + at(step) + 1]
            assert np.array_equal(found.window(step, sequence), wanted)
            place += at(step)
    found.close()


def test_lengths_count_as_a_loop_does():
    lengths = Lengths([(0, 3), (2, 5), (7, 1)])
    at = [3, 3, 5, 5, 5, 5, 5, 1, 1, 1]
    assert [lengths.at(step) for step in range(10)] == at
    assert [lengths.until(step) for step in range(11)] == [sum(at[:step]) for step in range(11)]
    for tokens in range(40):
        assert lengths.within(tokens) == max(n for n in range(60) if lengths.until(n) <= tokens)
    for wrong in ([], [(1, 3)], [(0, 3), (0, 4)], [(0, 3), (5, 0)], [(0, 1), (5, 2), (4, 3)], 0):
        with pytest.raises(ValueError, match="at least 1 token"):
            Lengths(wrong)


def test_where_steps_lie_is_known_however_far_they_are():
    place = WholeShards([100, 5, 62], Lengths([(0, 3), (10, 10)]), 2).place
    near = [place(step) for step in range(60)]  # 4 steps of 20 tokens fit into the first shard, 3 into the last
    assert [(shard, start) for _, shard, start in near[40:53]] == [(s, at) for _, s, at in near[47:60]]
    passes, like = divmod(10**9 - 40, 7)
    epoch, *where = near[40 + like]
    assert place(10**9) == (epoch + passes, *where)


def test_real_documents(shared_data):
    """The published tokens: sequences of a run's first phase begin at documents, none of which is longer than 4096."""
    files = str(shared_data / "tokens" / "train_*.bin")
    found = DocumentStream(
        files, sequence_tokens=16384, sequences_per_step=8, vocab_size=50257, eos_id=50256, document_tokens=4096
    )
    tokens = open_shard(shared_data / "tokens" / "train_000001.bin")[: 1 << 21].astype(np.int64)
    opened = np.flatnonzero(tokens == 50256)
    place, sequence = 0, []
    for wanted in range(8):
        sequence = []
        while len(sequence) <= 16384:
            end = min(opened[place + 1], opened[place] + 4096)
            sequence += tokens[opened[place] : end].tolist()
            place += 1
        assert found.window(0, wanted).tolist() == sequence[:16385]
