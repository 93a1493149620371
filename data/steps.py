"""Arithmetic of steps and tokens, without files: how long a step's sequences are, and where in which shard it lies."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple


class Lengths:
    """Tokens of a sequence, step by step: one number for all steps, or [(first step, tokens from it on), ...].

    Raises ValueError where that is no such list: the first step is 0, steps rise, tokens are at least 1."""

    def __init__(self, pieces: int | Sequence[tuple[int, int]]):
        pieces = [(0, pieces)] if isinstance(pieces, int) else list(pieces)
        self.first = [first for first, _ in pieces]
        self.tokens = [tokens for _, tokens in pieces]
        if not pieces or self.first[0] != 0 or sorted(set(self.first)) != self.first or min(self.tokens) < 1:
            raise ValueError(f"lengths {pieces}: (step, tokens) pairs from step 0 on, with at least 1 token")
        self._until = [0]  # tokens before each piece
        for (first, tokens), (end, _) in itertools.pairwise(pieces):
            self._until.append(self._until[-1] + (end - first) * tokens)

    def _piece(self, step: int) -> int:
        return bisect.bisect_right(self.first, step) - 1

    def at(self, step: int) -> int:
        """Tokens of a sequence of this step."""
        return self.tokens[self._piece(step)]

    def until(self, step: int) -> int:
        """Tokens of one sequence a step, summed over the first `step` steps."""
        piece = self._piece(step)
        return self._until[piece] + (step - self.first[piece]) * self.tokens[piece]

    def end(self, step: int) -> float:
        """The first step after `step` whose sequences have another length; infinity: none."""
        piece = self._piece(step) + 1
        return self.first[piece] if piece < len(self.first) else math.inf

    def within(self, tokens: int) -> int:
        """The most steps that together have at most so many tokens, one sequence a step."""
        piece = bisect.bisect_right(self._until, tokens) - 1
        return self.first[piece] + (tokens - self._until[piece]) // self.tokens[piece] if tokens >= 0 else 0


class Run(NamedTuple):
    """Steps of one length that lie one behind the other in one shard, from token `start` of it on."""

    first_step: int
    epoch: int
    shard: int
    start: int
    step_tokens: int


class WholeShards:
    """Where each step lies if none may cross from one shard into the next: a shard is left when less than a step and
    two tokens remains in it, as the public speedrun's loader does.

    shards: tokens of each. Raises ValueError if no shard has room for a step of a length that occurs."""

    def __init__(self, shards: Sequence[int], lengths: Lengths, sequences: int):
        self.runs: list[Run] = []
        step, epoch, self.steps_per_epoch = 0, 0, 0
        while True:
            begin, settled = step, step >= lengths.first[-1]  # from here on every pass is like this one
            for shard, tokens in enumerate(shards):
                step = self._fill(step, epoch, shard, tokens, lengths, sequences)
            if step == begin:
                raise ValueError(f"no shard has room for a step of {sequences} x {lengths.at(step)} tokens")
            epoch, self.steps_per_epoch = epoch + 1, self.steps_per_epoch or step
            if settled:
                break
        self._first = [run.first_step for run in self.runs]
        self._pass_begin, self._pass_end = begin, step

    def _fill(self, step: int, epoch: int, shard: int, tokens: int, lengths: Lengths, sequences: int) -> int:
        """Add the steps from `step` on that lie in a shard; returns the first that does not."""
        start = 0
        while True:
            step_tokens = sequences * lengths.at(step)
            count = int(min((tokens - start - 2) // step_tokens, lengths.end(step) - step))
            if count < 1:
                return step
            self.runs.append(Run(step, epoch, shard, start, step_tokens))
            step, start = step + count, start + count * step_tokens

    def place(self, step: int) -> tuple[int, int, int]:
        """(passes over all shards before this step, its shard, the token it begins with)."""
        passes = 0
        if step >= self._pass_end:
            passes, step = divmod(step - self._pass_begin, self._pass_end - self._pass_begin)
            step += self._pass_begin
        run = self.runs[bisect.bisect_right(self._first, step) - 1]
        return run.epoch + passes, run.shard, run.start + (step - run.first_step) * run.step_tokens

    def shards_until(self, steps: int) -> list[int]:
        """The shards that the first `steps` steps lie in, each once."""
        return sorted({run.shard for run in self.runs if run.first_step < max(steps, 1)})
