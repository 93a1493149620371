"""Validation tokens that a run is trained on, however the shards are cut.

Whole shards that are equal are refused before the first step (trainer/streams.py). Beyond that every training sequence
is looked through as it is read: the hash of each `WINDOW` tokens in a row is looked up among hashes of the validated
tokens. Of these a sample of about `SAMPLE` is kept, chosen by their own values (content-defined sampling, as Manber
1994 finds similar files), so a window is in the sample or not wherever it stands, in validation and training alike.

What is noticed: the share of the validated windows that the steps so far were fed, from any file and at any offset, in
any number of pieces. What is not: pieces shorter than WINDOW, windows across the border of two sequences (none is seen
in sequences shorter than WINDOW), texts that were changed every few words, and tokens that no step has been fed yet.

Cost: for every token read eight multiplications of 64 bits on the thread that reads ahead, and one look-up for every
window in the sample; at the start the same for the validated tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data.shards import ShardError, TokenStream
from trainer.processes import gathered, rank, world_size

WINDOW = 128  # tokens, a power of two: texts of one kind hardly share any so long
SAMPLE = 1 << 14  # windows that are looked for, about
FEWEST = 16  # different ones, below which nothing is said: a text that repeats one line has hardly any
TOLD, REFUSED = 0.1, 0.5  # shares of the sample
_FACTOR = 0x9E3779B97F4A7C15  # odd: 2^64 over the golden ratio


def hashes(tokens: np.ndarray) -> np.ndarray:
    """uint64 (N - WINDOW + 1,): a hash of every WINDOW tokens in a row, of N tokens (N,); (0,) of fewer.

    A polynomial in an odd factor modulo 2^64 (Karp and Rabin 1987). Hashes of windows twice as long come from two
    neighbours: h_2m(i) = h_m(i) f^m + h_m(i + m)."""
    found, length, power = tokens.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93), 1, _FACTOR
    if len(tokens) < WINDOW:
        return found[:0]
    while length < WINDOW:
        found = found[:-length] * np.uint64(power) + found[length:]
        length, power = 2 * length, power * power % 2**64
    return found


class Overlap:
    """How much of the validated tokens a run has been fed. To be made on all processes together.

    val: the validated tokens, one step. look(window) may be called on any thread; `add` takes what it found."""

    def __init__(self, val: TokenStream):
        windows = val.sequences_per_step * max(0, val.sequence_tokens + 2 - WINDOW)
        self.shift = np.uint64(64 - max(0, (windows // SAMPLE).bit_length()))
        mine = range(rank(), val.sequences_per_step, world_size())
        parts = gathered([self._sampled(val.window(0, sequence)) for sequence in mine])
        self.wanted = np.unique(np.concatenate([part for of_rank in parts for part in of_rank]))
        self.seen = np.zeros(len(self.wanted), dtype=bool)
        self.told = False

    def _sampled(self, tokens: np.ndarray) -> np.ndarray:
        """The hashes of a sequence that are in the sample, by their highest bits once they are mixed."""
        found = hashes(tokens)
        if self.shift == 64:
            return found
        return found[(found * np.uint64(_FACTOR)) >> self.shift == 0]

    def look(self, window: np.ndarray) -> np.ndarray:
        """Which of the validated windows stand in a training sequence: indices, for `add`."""
        if not len(self.wanted):
            return np.empty(0, dtype=np.int64)
        found = self._sampled(window)
        place = np.minimum(np.searchsorted(self.wanted, found), len(self.wanted) - 1)
        return np.unique(place[self.wanted[place] == found])

    def add(self, indices: np.ndarray) -> None:
        self.seen[indices] = True

    @property
    def share(self) -> float:
        """Of the sample that was seen; 0 where it is too small to say."""
        return float(self.seen.mean()) if len(self.seen) >= FEWEST else 0.0

    @property
    def much(self) -> bool:
        """Whether the share is told."""
        return self.share >= TOLD

    def judge(self, tokens: int, say: Callable[[str], object]) -> None:
        """After so many training tokens: say once from `TOLD` on what was seen. Raises ShardError from `REFUSED` on."""
        what = f"{self.share:.0%} of the validated windows of {WINDOW} tokens stand in the {tokens:,} training tokens"
        if self.share >= REFUSED:
            raise ShardError(f"{what} so far, in whatever files; validate on data that is not trained on")
        if self.much and not self.told:
            self.told = True
            say(f"warning: {what} so far: validation is partly of what was trained on")
