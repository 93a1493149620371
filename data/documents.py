"""Streams whose sequences begin at documents, and which leave out the end of long ones.

    stream = DocumentStream("train_*.bin", sequence_tokens=65536, sequences_per_step=8, vocab_size=50257,
                            eos_id=50256, document_tokens=4096)

Documents are taken in file order, each from the token that opens it and at most `document_tokens` of it. A sequence is
filled with T + 1 tokens (T inputs, and the last one's target): the document with which it is full is cut to fit, what
is left of it is dropped, and the next sequence begins with the next document. A shard that has not enough documents
left for a whole step is left, and so is what lies before a shard's first document. As the public speedrun's loader does
since "align documents" (#108, @varunneal and @classiclarryd); what is a sequence here is one of its eight processes
there, so any number of processes sees the same sequences.

Where a step begins depends on all documents before it, which takes one look through the shards up to it. It is done
when a shard is reached, in the thread that reads ahead.
"""

from __future__ import annotations

import bisect
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.shards import TOKEN, ShardError, ShardInfo, TokenStream
from data.steps import Lengths

_BLOCK_TOKENS = 1 << 22  # read at a time, looking for documents
_INDEXES = 2  # shards whose documents are kept in memory: the one that is read, and one more


class Documents:
    """The documents of one shard: where they begin, and how many tokens of each are kept."""

    def __init__(self, starts: np.ndarray, num_tokens: int):
        self.starts = starts
        self.sizes = np.diff(starts, append=num_tokens)
        self._ends: dict[int, np.ndarray] = {}

    def ends(self, most: int) -> np.ndarray:
        """Tokens kept of the first 0, 1, 2, ... documents together, if at most so many of each are."""
        if most not in self._ends:
            self._ends[most] = np.concatenate([[0], np.cumsum(np.minimum(self.sizes, most))])
        return self._ends[most]

    def filled(self, first: int, tokens: int, most: int) -> int | None:
        """The document after those with which a sequence of so many tokens, from document `first` on, is full; None:
        there are not enough."""
        ends = self.ends(most)
        after = int(np.searchsorted(ends, ends[first] + tokens))
        return after if after < len(ends) else None


class Visit(NamedTuple):
    """The steps, from `first_step` on, that a shard has documents for: the first document of each, and the one after
    the last of them."""

    first_step: int
    epoch: int
    shard: int
    documents: list[int]

    @property
    def end(self) -> int:
        """The first step after them."""
        return self.first_step + len(self.documents) - 1


class DocumentStream(TokenStream):
    """A TokenStream of sequences that begin at documents.

    document_tokens: the most that is kept of a document, or [(first step, the most from it on), ...]; 0: all of it.
    eos_id: the token that opens every document. Others as of TokenStream; shards are always left at a step's border.

    Which shards a number of steps needs is known only when they have been read: `shards_until` names all of them, and
    `steps_per_epoch` is the most there can be. Raises ShardError."""

    def __init__(
        self,
        files: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        sequence_tokens: int | Sequence[tuple[int, int]],
        sequences_per_step: int,
        vocab_size: int,
        eos_id: int,
        document_tokens: int | Sequence[tuple[int, int]] = 0,
    ):
        self.eos_id = eos_id
        self.most = Lengths(document_tokens or [(0, np.iinfo(np.int64).max)])
        self._visits: list[Visit] = []
        self._first_steps: list[int] = []
        self._kept: OrderedDict[int, Documents] = OrderedDict()
        self._walking = threading.Lock()
        super().__init__(
            files,
            sequence_tokens=sequence_tokens,
            sequences_per_step=sequences_per_step,
            vocab_size=vocab_size,
            drop_shard_tail=True,
        )
        self._visit_of(0)  # data that hold not one step are refused now

    def _lay_out(self) -> int:
        return self.lengths.within((self.num_tokens - 1) // self.sequences_per_step)

    def epoch(self, step: int) -> int:
        """How many times all shards had been gone through before `step` began."""
        return self._visit_of(step)[0].epoch

    def shards_until(self, steps: int) -> list[ShardInfo]:
        """All shards."""
        return [shard for shard in self.shards if shard.num_tokens]

    def _window(self, step: int, sequence: int) -> np.ndarray:
        visit, documents = self._visit_of(step)
        first, most = visit.documents[step - visit.first_step], self.most.at(step)
        length = self.lengths.at(step) + 1
        *_, begin, end = self._fill(documents, first, step, sequence + 1)
        sizes = np.minimum(documents.sizes[begin:end], most)
        sizes[-1] -= sizes.sum() - length
        offsets = documents.starts[begin:end] - documents.starts[begin]
        tokens = self._read(visit.shard, int(documents.starts[begin]), int(offsets[-1] + sizes[-1]))
        return np.concatenate([tokens[at : at + size] for at, size in zip(offsets, sizes)])

    def _fill(self, documents: Documents, first: int, step: int, sequences: int) -> list[int]:
        """The first document of each of so many sequences of a step, and the one after the last of them; shorter where
        the shard has not enough."""
        found, tokens, most = [first], self.lengths.at(step) + 1, self.most.at(step)
        while len(found) <= sequences and (after := documents.filled(found[-1], tokens, most)) is not None:
            found.append(after)
        return found

    def _visit_of(self, step: int) -> tuple[Visit, Documents]:
        """The visit to a shard that has this step, and the shard's documents."""
        with self._walking:
            while not self._visits or step >= self._visits[-1].end:
                self._go_on()
            visit = self._visits[bisect.bisect_right(self._first_steps, step) - 1]
            return visit, self._documents(visit.shard)

    def _go_on(self) -> None:
        """Add the next shard's visit. Raises ShardError where no shard has enough for a step."""
        last = self._visits[-1] if self._visits else Visit(0, 0, -1, [0])
        begin, sequences = last.epoch * len(self.shards) + last.shard + 1, self.sequences_per_step
        for number in range(begin, begin + len(self.shards)):
            epoch, shard = divmod(number, len(self.shards))
            documents, firsts, step = self._documents(shard), [0], last.end
            while len(filled := self._fill(documents, firsts[-1], step, sequences)) > sequences:
                firsts.append(filled[-1])
                step += 1
            if len(firsts) > 1:
                self._visits.append(Visit(last.end, epoch, shard, firsts))
                self._first_steps.append(last.end)
                return
        raise ShardError(
            f"{self._names()}: no shard has documents (token {self.eos_id}) for a step of {sequences} sequences "
            f"of {self.lengths.at(last.end)} tokens, at most {self.most.at(last.end)} of each document"
        )

    def _documents(self, shard: int) -> Documents:
        if shard not in self._kept:
            count, found = self.shards[shard].num_tokens, []
            for start in range(0, count, _BLOCK_TOKENS):
                with self._lock:
                    block = self._opened(shard).read(start, min(_BLOCK_TOKENS, count - start))
                found.append(np.flatnonzero(block == TOKEN.type(self.eos_id)) + start)
            self._kept[shard] = Documents(np.concatenate(found) if found else np.empty(0, dtype=np.int64), count)
            if len(self._kept) > _INDEXES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(shard)
        return self._kept[shard]
