"""Rows of embedding tables that are picked by several tokens: hashed n-grams.

A table that sees the last few tokens gives the model, at the price of one look-up, what its first layers otherwise
learn to put together. The idea is the track's bigram table (modded-nanogpt #201, #252); hashed n-gram features as such
are older (fastText: Bojanowski et al. 2016, arXiv:1607.04606)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MULTIPLIER, PRIME = 1_000_003, 2**31 - 1  # a polynomial of the tokens modulo a prime; every product is below 2^52


@dataclass(frozen=True)
class NGramRows:
    """The rows of a table that the last `length` tokens pick, the present one included. With length 1 a token picks
    the row of its own number, and the table has one for each of the vocabulary; else it has `rows`.

    Tokens before a document's beginning count as `eos_id`: what was packed before it does not matter."""

    length: int
    rows: int
    vocab_size: int
    eos_id: int

    def __len__(self) -> int:
        """Rows of the table."""
        return self.vocab_size if self.length == 1 else self.rows

    def __call__(self, tokens: Tensor) -> Tensor:
        """int64 (..., T), each in [0, len(self)). tokens: (..., T), of any integer type."""
        if self.length == 1:
            return tokens
        T, document, mixed = tokens.size(-1), (tokens == self.eos_id).cumsum(-1), tokens.to(torch.int64)
        for back in range(1, self.length):
            earlier, theirs = (F.pad(x, (back, 0), value=-1)[..., :T] for x in (tokens, document))
            mixed = (mixed * MULTIPLIER + torch.where(theirs == document, earlier, self.eos_id)) % PRIME
        return mixed % self.rows
