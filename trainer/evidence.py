"""Which tokens a run was fed: hashes of content, whatever files it lay in, wherever they were, whoever read it.

A sequence of a step is T + 1 tokens (inputs, and the targets one further), whose digest is data.shards.window_digest.
The hash of a stream is a chain over the digests in the order of steps and sequences,

    h_0 = blake2b(b""),  h_(k+1) = blake2b(h_k || digest_k)      16 bytes each, 32 hexadecimal digits

so it can go on from a checkpoint, and every process hashes only what it was fed itself: the digests are brought
together when a hash is wanted. Log, JSON and checkpoint tell it in this one form: `val_data_hash` of the validated
tokens, `data_hash` and `train_tokens` of the training tokens so far with every validation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from data.paths import read_range
from data.shards import HEADER_BYTES, TOKEN, ShardInfo, TokenStream, window_digest
from trainer.checkpoints import CheckpointError
from trainer.overlap import Overlap
from trainer.processes import gathered, on_rank_0, rank, world_size


def _hash(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


class TokenRecord:
    """The running hash of a stream over the steps done so far, the same on every process.

    `feed` is called, on the process that a sequence was fed to, when it is fed; `advance`, on all of them together,
    brings the hash to the end of so many steps. val: the validated tokens, if they are to be looked for among those
    that are fed (trainer/overlap.py); say: told once that they are."""

    def __init__(self, stream: TokenStream, val: TokenStream | None = None, say: Callable[[str], object] = print):
        self.stream, self.steps, self.say = stream, 0, say
        self.overlap = None if val is None else Overlap(val)
        self._chain = _hash(b"")
        self._fed: dict[tuple[int, int], tuple[bytes, Any]] = {}

    @property
    def hash(self) -> str:
        """32 hexadecimal digits."""
        return self._chain.hex()

    @property
    def tokens(self) -> int:
        """Tokens that the hash covers, each sequence's inputs counted."""
        return self.stream.tokens_until(self.steps)

    def told(self) -> dict[str, int | str]:
        """As log and JSON tell it; `val_seen` only where it is much."""
        seen = {"val_seen": f"{self.overlap.share:.3f}"} if self.overlap and self.overlap.much else {}
        return {"train_tokens": self.tokens, "data_hash": self.hash, **seen}

    def of(self, window: np.ndarray) -> tuple[bytes, Any]:
        """The digest of a sequence, and which of the validated windows it has."""
        return window_digest(window), self.overlap.look(window) if self.overlap else None

    def feed(self, step: int, sequence: int, told: tuple[bytes, Any]) -> None:
        self._fed[step, sequence] = told

    def advance(self, step: int) -> None:
        """To the end of `step` steps, all of whose sequences have been fed. Collective. Raises ShardError where most of
        the validated tokens are among them."""
        if step == self.steps:
            return
        fed = {place: one for part in gathered(self._fed) for place, one in part.items()}
        wanted = [(s, q) for s in range(self.steps, step) for q in range(self.stream.sequences_per_step)]
        for place in wanted:
            digest, found = fed[place]
            self._chain = _hash(self._chain + digest)
            if self.overlap:
                self.overlap.add(found)
        self._fed, self.steps = {}, step
        if self.overlap is not None:
            on_rank_0(partial(self.overlap.judge, self.tokens, self.say))

    def read(self, steps: int) -> None:
        """Read the stream again, each process its share, up to the end of `steps` steps. Collective."""
        for step in range(self.steps, steps):
            for sequence in range(rank(), self.stream.sequences_per_step, world_size()):
                self.feed(step, sequence, self.of(self.stream.window(step, sequence)))
        self.advance(steps)


def hash_of(stream: TokenStream, steps: int = 1) -> str:
    """The hash of the first `steps` steps of a stream. Collective."""
    record = TokenRecord(stream)
    record.read(steps)
    return record.hash


def check_same_data(told: dict[str, str], step: int, record: TokenRecord, val: TokenStream, here: str) -> None:
    """Bring `record` to `step`, where a checkpoint was written that tells its path and hashes in `told`. Collective.

    here: the hash of this run's validated tokens. Raises CheckpointError if either differs. Checkpoints from before
    the tokens were hashed tell a hash of files, which is compared as such."""
    record.read(step)
    pairs = {"data_hash": (record.hash, record.stream), "val_data_hash": (here, val)}
    for name, (found, stream) in pairs.items():
        wanted = told.get(name, "")
        if ":" in wanted:
            found = stream.data_hash()
        if found != wanted:
            what = "validation tokens" if name == "val_data_hash" else f"first {record.tokens:,} training tokens"
            raise CheckpointError(
                f"{told['path']}: made with other data; the {what} of {stream.shards[0].path} are not what it saw "
                f"(hash {found[:16]}, {wanted[:16] or 'none'} in the checkpoint)"
            )


def same_content(train: TokenStream, val: TokenStream) -> tuple[str, str] | None:
    """A training shard and a validation shard with the same tokens, or None. Whole files are compared, those of one
    length only; trainer/overlap.py finds what is cut otherwise, once it is fed."""
    for one in val.shards:
        for other in train.shards:
            if one.num_tokens == other.num_tokens and _equal(one, other):
                return other.path, one.path
    return None


def _equal(one: ShardInfo, other: ShardInfo, block: int = 1 << 22) -> bool:
    starts = range(HEADER_BYTES, HEADER_BYTES + TOKEN.itemsize * one.num_tokens, block)
    return all(read_range(one.path, at, at + block) == read_range(other.path, at, at + block) for at in starts)
