"""The rows that n-grams pick, against a loop over positions; packed documents do not see each other."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.ngrams import MULTIPLIER, PRIME, NGramRows

EOS = 0


def slowly(tokens, length, rows):
    """One position after the other: the last `length` tokens, EOS for those before the document."""
    found = []
    for at, token in enumerate(tokens):
        back = [at - i for i in range(length)]
        start = max((i for i in range(at + 1) if tokens[i] == EOS), default=0)
        mixed = token
        for i in back[1:]:
            mixed = (mixed * MULTIPLIER + (tokens[i] if i >= start else EOS)) % PRIME
        found.append(mixed % rows)
    return found


@given(st.lists(st.integers(0, 50256), min_size=1, max_size=40), st.integers(2, 5), st.integers(1, 10**6))
def test_rows_are_those_of_a_loop(tokens, length, rows):
    picks = NGramRows(length, rows, 50257, EOS)
    found = picks(torch.tensor(tokens, dtype=torch.int32))
    assert found.tolist() == slowly(tokens, length, rows) and len(picks) == rows
    assert picks(torch.tensor([tokens, tokens[::-1]]))[1].tolist() == slowly(tokens[::-1], length, rows)


def test_a_single_token_picks_its_own_row():
    tokens = torch.tensor([3, 0, 255])
    assert NGramRows(1, 7, 256, EOS)(tokens) is tokens and len(NGramRows(1, 7, 256, EOS)) == 256


@pytest.mark.parametrize("length", [2, 3, 4])
def test_a_document_does_not_see_the_one_before(length):
    picks, random = NGramRows(length, 9973, 256, EOS), torch.Generator().manual_seed(0)
    first, second = (torch.randint(1, 256, (20,), generator=random) for _ in range(2))
    opened = torch.tensor([EOS])
    packed = picks(torch.cat([first, opened, second]))
    assert packed[20:].equal(picks(torch.cat([opened, second])))
    assert len(packed.unique()) > 38  # hashed rows are spread: 41 positions, next to no two in one row
