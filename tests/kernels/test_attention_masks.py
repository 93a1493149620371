"""Masks, pair by pair: a literal, slow reading of docs/spec.md 2.7 against the plan's first_key."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import SCHEDULE_TOKENS, allowed_pairs, attention_plan

EOS = 7


def literal_mask(tokens: list[int], W: int, block: int) -> torch.Tensor:
    """(T, T) bool, word by word: "causal AND same document AND a sliding window counted in blocks. Among the key
    blocks that causality and documents allow, full ones (every pair allowed) keep the nearest W-1, partial ones
    keep the nearest max(W - number of full ones before that cut, 1)". Nothing clever: every pair is looked at.
    Its sequences are whole blocks; a ragged one is read as the beginning of one whose last document goes on."""
    length = len(tokens)
    tokens = tokens + [0] * (-length % block)
    T = len(tokens)
    document, count = [], 0
    for token in tokens:  # document number: running count of end-of-text, that token included
        count += token == EOS
        document.append(count)
    pair = [[j <= i and document[i] == document[j] for j in range(T)] for i in range(T)]
    blocks = [range(s, min(s + block, T)) for s in range(0, T, block)]
    mask = torch.zeros(T, T, dtype=torch.bool)
    for queries in blocks:
        full, partial = [], []
        for number, keys in enumerate(blocks):
            allowed = [pair[i][j] for i in queries for j in keys]
            if all(allowed):
                full.append(number)
            elif any(allowed):
                partial.append(number)
        kept = sorted(full, reverse=True)[: max(W - 1, 0)]
        kept += sorted(partial, reverse=True)[: max(W - len(full), 1)]
        for number in kept:
            for i in queries:
                for j in blocks[number]:
                    mask[i, j] = pair[i][j]
    return mask[:length, :length]


def tokens_of(length: int, starts) -> list[int]:
    return [EOS if i in set(starts) else 0 for i in range(length)]


def check(tokens, W, block):
    plan = attention_plan(torch.tensor(tokens), eos_id=EOS, window_blocks=W, block_tokens=block)
    assert torch.equal(allowed_pairs(plan)[0], literal_mask(tokens, W, block))


@pytest.mark.parametrize("W", [0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("starts", [(), (0,), (0, 1, 2, 3), (8,), (16, 32), (5, 17, 24, 25), tuple(range(50))])
@pytest.mark.parametrize("length", [1, 7, 8, 33, 50])
def test_named_layouts(length, starts, W):
    check(tokens_of(length, starts), W, block=8)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_random_layouts(data):
    block = data.draw(st.sampled_from([2, 3, 4, 8]))
    length = data.draw(st.integers(1, 8 * block + 3))
    starts = data.draw(st.sets(st.integers(0, length - 1), max_size=length))
    check(tokens_of(length, starts), data.draw(st.integers(0, 10)), block)


def test_blocks_of_128():
    for W in (1, 2, 4):
        check(tokens_of(400, (0, 100, 256, 300)), W, 128)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.data())
def test_plan_invariants(length, data):
    """first_key rises and never passes its query; end_query is its transpose; schedules are permutations."""
    starts = data.draw(st.sets(st.integers(0, length - 1), max_size=10))
    window = data.draw(st.sampled_from([{}, {"window_blocks": 1}, {"window_blocks": 2}, {"window_tokens": 9}]))
    plan = attention_plan(torch.tensor(tokens_of(length, starts)), eos_id=EOS, **window)
    first, end = plan.first_key_BT[0].long(), plan.end_query_BT[0].long()
    position = torch.arange(length)
    assert (first.diff() >= 0).all() and (end.diff() >= 0).all()
    assert (first <= position).all() and (first >= 0).all() and (end > position).all() and (end <= length).all()
    by_key = (position[:, None] >= position) & (position[:, None] < end)
    assert torch.equal(by_key, allowed_pairs(plan)[0])
    chunks = -(-length // SCHEDULE_TOKENS)
    work = [min((c + 1) * SCHEDULE_TOKENS, length) - int(first[c * SCHEDULE_TOKENS]) for c in plan.query_order_N]
    assert work == sorted(work, reverse=True)
    for order in (plan.query_order_N, plan.key_order_N):
        assert sorted(order.tolist()) == list(range(chunks))


def test_token_window_and_causal():
    position = torch.arange(40)
    distance = position[:, None] - position
    causal = allowed_pairs(attention_plan(length=40))[0]
    assert torch.equal(causal, distance >= 0)
    for window in (1, 3, 40, 100):
        mask = allowed_pairs(attention_plan(length=40, window_tokens=window))[0]
        assert torch.equal(mask, (distance >= 0) & (distance < window))


def test_starts_and_tokens_agree():
    starts = [0, 3, 130, 131, 299]
    by_tokens = attention_plan(torch.tensor(tokens_of(300, starts)), eos_id=EOS, window_blocks=2)
    for given_starts in (starts, torch.tensor(starts), starts[1:]):  # tokens before the first start are a document
        by_starts = attention_plan(document_starts=given_starts, length=300, window_blocks=torch.tensor(2))
        assert all(torch.equal(a, b) for a, b in zip(by_tokens[:4], by_starts[:4]))


def test_device_is_followed():
    for arguments in ({"document_starts": torch.tensor([0, 3], device="meta")}, {"device": "meta"}):
        plan = attention_plan(length=200, window_blocks=1, **arguments)
        assert {x.device.type for x in plan[:4]} == {"meta"}


def test_batch_is_each_sequence_alone():
    tokens = torch.randint(0, 12, (3, 333), generator=torch.Generator().manual_seed(1))
    together = attention_plan(tokens, eos_id=EOS, window_blocks=2)
    for b in range(3):
        alone = attention_plan(tokens[b], eos_id=EOS, window_blocks=2)
        assert torch.equal(together.first_key_BT[b], alone.first_key_BT[0])
        assert torch.equal(together.end_query_BT[b], alone.end_query_BT[0])


@pytest.mark.parametrize(
    "arguments, error, name",
    [
        ({}, ValueError, "length"),
        ({"length": 0}, ValueError, "length"),
        ({"length": 10, "document_starts": [0, 5, 4]}, ValueError, "document_starts"),
        ({"length": 10, "document_starts": [0, 5, 5]}, ValueError, "document_starts"),
        ({"length": 10, "document_starts": [0, 10]}, ValueError, "document_starts"),
        ({"length": 10, "document_starts": [-1, 3]}, ValueError, "document_starts"),
        ({"length": 10, "document_starts": torch.tensor([[0]])}, ValueError, "document_starts"),
        ({"length": 10, "window_blocks": -1}, ValueError, "window_blocks"),
        ({"length": 10, "window_blocks": torch.tensor(-1)}, ValueError, "window_blocks"),
        ({"length": 10, "window_blocks": 1.5}, TypeError, "window_blocks"),
        ({"length": 10, "window_blocks": True}, TypeError, "window_blocks"),
        ({"length": 10, "window_blocks": torch.tensor([1, 2])}, TypeError, "window_blocks"),
        ({"length": 10, "window_tokens": 0}, ValueError, "window_tokens"),
        ({"length": 10, "window_tokens": torch.tensor(0)}, ValueError, "window_tokens"),
        ({"length": 10, "window_tokens": 3, "window_blocks": 1}, ValueError, "window_blocks and window_tokens"),
        ({"length": 10, "window_blocks": 1, "block_tokens": 0}, ValueError, "block_tokens"),
        ({"tokens_BT": torch.zeros(3)}, TypeError, "tokens_BT"),
        ({"tokens_BT": [1, 2]}, TypeError, "tokens_BT"),
        ({"tokens_BT": torch.zeros(0, dtype=torch.int32)}, ValueError, "tokens_BT"),
        ({"tokens_BT": torch.zeros(4, dtype=torch.int32), "device": "meta"}, ValueError, "device"),
        ({"tokens_BT": torch.zeros(4, dtype=torch.int32), "length": 5}, ValueError, "length"),
        ({"tokens_BT": torch.zeros(4, dtype=torch.int32), "document_starts": [0]}, ValueError, "document_starts"),
    ],
)
def test_errors_name_the_argument(arguments, error, name):
    with pytest.raises(error, match=name):
        attention_plan(**arguments)
