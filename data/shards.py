"""Token shards and streams of them.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count, the rest 0) and then that many
little-endian uint16 tokens: the format of llm.c and of the public FineWeb shards. Each document is PRECEDED
by the end-of-text token.

    write_shard("a.bin", tokens)                 # atomic
    read_header("a.bin").num_tokens              # checked
    stream = TokenStream("train_*.bin", sequence_tokens=2048, sequences_per_step=8, vocab_size=50257)
    inputs_T, targets_T = stream.batch(step=17, sequence=3)

Training reads use pread on an open file, not a memory map: a map of a file that somebody truncates kills the
process with SIGBUS, without a message, and a map cannot notice that the file was rewritten. A short read can
be reported, and one fstat a read notices a change. `open_shard` gives a memory map, for
looking around in a file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from data import paths
from data.steps import Lengths, WholeShards

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN = np.dtype("<u2")
MAX_TOKENS = 2**31 - 1  # the count is an int32

_OPEN_FILES = 16  # shards a stream keeps open at once
_HASHED_WHOLE_BYTES = 64 << 20  # larger shards are hashed by samples
_SAMPLES, _SAMPLE_BYTES = 16, 64 << 10


class ShardError(ValueError):
    """A shard or set of shards that cannot be used; the message names the file and the cause."""


class TooFewTokens(ShardError):
    """The shards `names` hold less than one step; `why` says it without their names."""

    def __init__(self, names: str, why: str):
        super().__init__(f"{names}: {why}")
        self.why = why


class ShardInfo(NamedTuple):
    """What a shard's checked header says."""

    path: str
    num_tokens: int


# -----------------------------------------------------------------------------------------------------------
# One shard


def read_header(path: str | os.PathLike) -> ShardInfo:
    """Read a shard's header and check it against the file's size. Of an fsspec URL only the header is read.

    Raises ShardError for a missing or short file, a wrong magic or version, and a count that disagrees with
    the size.
    """
    path = os.fspath(path)
    if not paths.is_remote(path) and os.path.isdir(paths.local_path(path)):
        raise ShardError(
            f"{path}: a folder; name the shards in it, for example '{os.path.join(path, '*.bin')}' "
            "(train_gpt.py --data=FOLDER takes training and validation from one)"
        )
    try:
        header, size = paths.read_range(path, 0, HEADER_BYTES), paths.file_size(path)
    except paths.PathError as error:
        raise ShardError(str(error)) from error
    return _check_header(path, header, size)


def _check_header(path: str, header: bytes, size: int) -> ShardInfo:
    if len(header) < HEADER_BYTES:
        raise ShardError(
            f"{path}: {size} bytes, too short for the {HEADER_BYTES}-byte header of a token shard{_guess(header)}"
        )
    magic, version, count = (int(x) for x in np.frombuffer(header, dtype="<i4", count=3))
    if magic != MAGIC:
        raise ShardError(f"{path}: magic number {magic}, expected {MAGIC}: not a token shard{_guess(header)}")
    if version != VERSION:
        raise ShardError(f"{path}: version {version}, this program reads version {VERSION}")
    if count < 0:
        raise ShardError(f"{path}: the header counts {count} tokens; the file is damaged")
    expected = HEADER_BYTES + TOKEN.itemsize * count
    if size != expected:
        what = "cut short" if size < expected else "longer than it should be"
        raise ShardError(
            f"{path}: {what}: the header counts {count} tokens, which takes {expected} bytes, but the file has {size}"
        )
    return ShardInfo(path, count)


def _guess(header: bytes) -> str:
    """What a file that is no shard may be, for the message."""
    if header.startswith(b"version https://git-lfs"):
        return " (it is a Git LFS pointer: fetch the file itself)"
    if header[:200].lstrip().lower().startswith((b"<!doctype", b"<html")):
        return " (it is a web page: the download failed)"
    magic = header[:4]
    if magic == MAGIC.to_bytes(4, "big"):
        return " (its bytes are big-endian)"
    if magic == (20240801).to_bytes(4, "little"):
        return " (it is a shard of 32-bit Llama 3 tokens)"
    if header and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in header[:64]):
        return " (it looks like text: make shards of it with python -m data.tokenize)"
    if header.startswith(b"PK\x03\x04"):
        return " (it is a zip archive, as .npz files are: unpack it)"
    if header.startswith(b"\x93NUMPY"):
        return " (it is a NumPy array: make a shard of it with python -m data.convert)"
    return (
        " (16-bit tokens without a header, as nanoGPT writes them, become a shard with python -m data.convert)"
        if len(header) % 2 == 0 and header
        else ""
    )


class ShardWriter:
    """Writes one shard piece by piece; it appears under its name only when `close` succeeds.

    Used as a context manager: an exception inside the block leaves nothing behind.
    """

    def __init__(self, path: str | os.PathLike):
        self.path, self.num_tokens = Path(path), 0
        self._stack = contextlib.ExitStack()
        self._file = self._stack.enter_context(paths.atomic_file(self.path))
        self._file.write(bytes(HEADER_BYTES))

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens: any integer array with values in 0..65535."""
        tokens = _as_tokens(self.path, tokens)
        if self.num_tokens + len(tokens) > MAX_TOKENS:
            raise ShardError(f"{self.path}: a shard holds at most {MAX_TOKENS} tokens")
        self._file.write(tokens.tobytes())
        self.num_tokens += len(tokens)

    def close(self) -> ShardInfo:
        """Write the header, sync, and put the file in its place."""
        self._file.seek(0)
        self._file.write(make_header(self.num_tokens))
        self._stack.close()
        return ShardInfo(str(self.path), self.num_tokens)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            self.close()
        else:
            self._stack.__exit__(kind, error, trace)


def make_header(num_tokens: int) -> bytes:
    """The 1024-byte header of a shard of `num_tokens` tokens."""
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, num_tokens
    return header.tobytes()


def write_shard(path: str | os.PathLike, tokens: np.ndarray) -> ShardInfo:
    """Write a shard atomically: a reader sees the old file or the new one, never a half."""
    with ShardWriter(path) as writer:
        writer.append(tokens)
    return ShardInfo(str(path), writer.num_tokens)


def _as_tokens(path: object, tokens: np.ndarray) -> np.ndarray:
    tokens = np.asarray(tokens)
    if tokens.ndim != 1:
        raise ShardError(f"{path}: tokens of shape {tokens.shape}; one dimension is needed")
    if tokens.dtype == TOKEN or tokens.size == 0:
        return tokens.astype(TOKEN)
    if tokens.dtype.kind not in "iu":
        raise ShardError(f"{path}: tokens of type {tokens.dtype}; integers are needed")
    if int(tokens.min()) < 0 or int(tokens.max()) > 65535:
        raise ShardError(f"{path}: token ids {tokens.min()}..{tokens.max()} do not fit 16 bits (0..65535)")
    return tokens.astype(TOKEN)


def open_shard(path: str | os.PathLike, vocab_size: int | None = None) -> np.ndarray:
    """The tokens of a shard as a read-only memory map (uint16), a remote one through the cache.

    With `vocab_size` the whole file is checked for ids outside the vocabulary. For looking around: training
    reads through TokenStream, which survives a file that shrinks.
    """
    info = read_header(path)
    if info.num_tokens == 0:
        return np.empty(0, dtype=TOKEN)
    local = paths.fetch(info.path)
    tokens = np.memmap(local, dtype=TOKEN, mode="r", offset=HEADER_BYTES, shape=(info.num_tokens,))
    if vocab_size is not None:
        for start in range(0, len(tokens), 1 << 22):
            check_vocabulary(info.path, tokens[start : start + (1 << 22)], start, vocab_size)
    return tokens


def check_vocabulary(path: str, tokens: np.ndarray, start: int, vocab_size: int) -> None:
    """Raise ShardError unless all `tokens`, read from position `start` of `path`, are below vocab_size."""
    if len(tokens) and int(tokens.max()) >= vocab_size:
        where = int(np.argmax(tokens >= vocab_size))
        raise ShardError(
            f"{path}: token {start + where} has id {int(tokens[where])}, outside the vocabulary of "
            f"{vocab_size}; the shard was made with another tokenizer, or is damaged"
        )


class _OpenShard:
    """A shard held open for pread. The file must stay as it was when its header was checked."""

    def __init__(self, info: ShardInfo):
        self.info = info
        try:
            local = paths.fetch(info.path)
            self.file = os.open(local, os.O_RDONLY)
        except (paths.PathError, OSError) as error:
            raise ShardError(f"{info.path}: cannot be opened: {getattr(error, 'strerror', error)}") from error
        self.stamp = self._stamp()
        found = _check_header(info.path, os.pread(self.file, HEADER_BYTES, 0), self.stamp[0])
        if found.num_tokens != info.num_tokens:
            raise ShardError(f"{info.path}: had {info.num_tokens} tokens when the run began, now {found.num_tokens}")

    def _stamp(self) -> tuple[int, int]:
        status = os.fstat(self.file)
        return status.st_size, status.st_mtime_ns

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) as uint16; ShardError if the file changed since it was opened."""
        path, offset = self.info.path, HEADER_BYTES + TOKEN.itemsize * start
        wanted, blocks = TOKEN.itemsize * count, []
        try:
            while wanted and (block := os.pread(self.file, wanted, offset)):
                blocks.append(block)
                offset, wanted = offset + len(block), wanted - len(block)
        except OSError as error:
            raise ShardError(f"{path}: cannot be read: {error.strerror}") from error
        size, _ = now = self._stamp()
        if wanted or now != self.stamp:
            how = f"from {self.stamp[0]} to {size} bytes" if size != self.stamp[0] else "its time of writing moved"
            raise ShardError(
                f"{path}: the file changed while it was being read ({how}); put the original back and "
                "resume from the last checkpoint"
            )
        return np.frombuffer(blocks[0] if len(blocks) == 1 else b"".join(blocks), dtype=TOKEN)

    def close(self) -> None:
        os.close(self.file)


# -----------------------------------------------------------------------------------------------------------
# Streams


class Record(Protocol):
    """What is told of every sequence that a stream has given away."""

    def of(self, window: np.ndarray) -> Any:
        """What is to be kept of its T + 1 tokens; called on the thread that reads."""

    def feed(self, step: int, sequence: int, told: Any) -> None:
        """It is being given away; told: what `of` returned."""


class TokenStream:
    """Random access to a row of shards as one stream of tokens, in steps of S sequences of T tokens.

    Sequence s of step n is stream[(n*S + s)*T : (n*S + s)*T + T + 1]: T inputs, and the targets one token
    further. So every process finds its part by step and sequence alone, any number of processes sees the same
    data, and resuming needs no state. Documents that continue in the next shard stay whole.

    sequence_tokens: T, or [(first step, T from it on), ...] where sequences get longer over the run: then step n begins
    where the steps before it end. The attribute of that name is the last T.

    files: paths, globs or fsspec URLs, see `data.paths.expand`; globs are sorted.

    drop_shard_tail: mimic the public speedrun code, whose steps never cross from one shard into the next: it
    goes on to the next shard when fewer than S*T + 2 tokens are left, and drops those.

    cycle: after the last token comes the first one again (`epoch` counts); otherwise asking for more is a ShardError.

    Headers are checked here, ids below `vocab_size` with every batch. Raises ShardError.
    """

    def __init__(
        self,
        files: str | os.PathLike | Sequence[str | os.PathLike],
        *,
        sequence_tokens: int | Sequence[tuple[int, int]],
        sequences_per_step: int,
        vocab_size: int,
        drop_shard_tail: bool = False,
        cycle: bool = True,
    ):
        try:
            self.lengths = Lengths(sequence_tokens)
        except ValueError as error:
            raise ShardError(str(error)) from error
        if sequences_per_step < 1:
            raise ShardError(f"{sequences_per_step} sequences make no step; at least 1")
        try:
            self.shards = [read_header(path) for path in paths.expand(files)]
        except paths.PathError as error:
            raise ShardError(str(error)) from error
        self.sequence_tokens, self.sequences_per_step = self.lengths.tokens[-1], sequences_per_step
        self.vocab_size, self.drop_shard_tail, self.cycle = vocab_size, drop_shard_tail, cycle
        self.num_tokens = sum(shard.num_tokens for shard in self.shards)
        self._first_token = np.cumsum([0, *(shard.num_tokens for shard in self.shards)])
        self.steps_per_epoch = self._lay_out()  # whole steps in the first pass over the data
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._lock = threading.Lock()

    def _lay_out(self) -> int:
        """Decide where steps lie, as far as headers tell it; returns the number of whole steps in the first pass."""
        within = ""
        if self.drop_shard_tail:
            sizes = [shard.num_tokens for shard in self.shards]
            with contextlib.suppress(ValueError):
                self._whole = WholeShards(sizes, self.lengths, self.sequences_per_step)
                return self._whole.steps_per_epoch
            within = " within one shard"
        elif steps := self.lengths.within((self.num_tokens - 1) // self.sequences_per_step):
            return steps
        raise TooFewTokens(
            self._names(),
            f"{self.num_tokens} tokens are too few for one step of {self.sequences_per_step} x "
            f"{max(self.lengths.tokens)} tokens and one target{within}",
        )

    def tokens_until(self, step: int) -> int:
        """Tokens of the first `step` steps, each sequence's inputs counted."""
        return self.lengths.until(step) * self.sequences_per_step

    def _names(self) -> str:
        first, count = self.shards[0].path, len(self.shards)
        return first if count == 1 else f"{first} and {count - 1} more"

    def epoch(self, step: int) -> int:
        """How many times the data had been used up, wholly, before `step` began."""
        if self.drop_shard_tail:
            return self._whole.place(step)[0]
        return self.tokens_until(step) // self.num_tokens

    def shards_until(self, steps: int) -> list[ShardInfo]:
        """The shards that the first `steps` steps read from, in order, each once."""
        if self.drop_shard_tail:
            return [self.shards[shard] for shard in self._whole.shards_until(steps)]
        read = self.tokens_until(steps) + 1
        used = int(np.searchsorted(self._first_token, min(read, self.num_tokens), side="left"))
        return [shard for shard in self.shards[: max(used, 1)] if shard.num_tokens]

    def batch(self, step: int, sequence: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs (T,) int32 and targets (T,) int64 of one sequence of one step."""
        return _inputs_and_targets(self.window(step, sequence))

    def window(self, step: int, sequence: int) -> np.ndarray:
        """The T + 1 tokens (uint16) of one sequence of one step, checked against the vocabulary."""
        if not 0 <= sequence < self.sequences_per_step or step < 0:
            raise IndexError(f"step {step}, sequence {sequence}: a step has {self.sequences_per_step} sequences")
        return self._window(step, sequence)

    def _window(self, step: int, sequence: int) -> np.ndarray:
        if not self.cycle and step >= self.steps_per_epoch:
            raise ShardError(
                f"{self._names()}: step {step} asks for more than the {self.num_tokens} tokens there are; "
                f"they last for {self.steps_per_epoch} steps"
            )
        length = self.lengths.at(step)
        if self.drop_shard_tail:
            _, shard, start = self._whole.place(step)
            return self._read(shard, start + sequence * length, length + 1)
        return self._read_across(self.tokens_until(step) + sequence * length, length + 1)

    def _read_across(self, position: int, length: int) -> np.ndarray:
        """`length` tokens from `position` of the endless concatenation of all shards."""
        pieces = []
        while length:
            position %= self.num_tokens
            shard = int(np.searchsorted(self._first_token, position, side="right")) - 1
            count = min(length, int(self._first_token[shard + 1]) - position)
            pieces.append(self._read(shard, position - int(self._first_token[shard]), count))
            position, length = position + count, length - count
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _read(self, shard: int, start: int, count: int) -> np.ndarray:
        with self._lock:  # the prefetch thread and the caller may both read
            tokens = self._opened(shard).read(start, count)
        check_vocabulary(self.shards[shard].path, tokens, start, self.vocab_size)
        return tokens

    def _opened(self, shard: int) -> _OpenShard:
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        opened = self._open[shard] = _OpenShard(self.shards[shard])
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        self._fetch_ahead((shard + 1) % len(self.shards))
        return opened

    def _fetch_ahead(self, shard: int) -> None:
        """Download the next shard meanwhile, if it is remote; a failure shows when the shard is opened."""
        path = self.shards[shard].path
        if paths.is_remote(path) and shard not in self._open:

            def download():
                with contextlib.suppress(Exception):
                    paths.fetch(path)

            threading.Thread(target=download, name="shard-download", daemon=True).start()

    def prefetch(
        self,
        order: Iterable[tuple[int, int]],
        *,
        depth: int = 4,
        pin_memory: bool = False,
        record: Record | None = None,
    ) -> Iterator:
        """Yield CPU tensors (inputs_T int32, targets_T int64) for each (step, sequence) of `order`.

        A thread reads. depth: sequences read ahead. pin_memory: page-locked tensors, so that copies to
        a GPU overlap with work there. record: told of each.
        What the thread raises is raised here, at the sequence that it concerns. Closing the iterator ends the thread.
        """
        import torch  # here, so that the tokenizer and its workers start without it

        device = torch.cuda.current_device() if pin_memory else None
        ready: queue.Queue = queue.Queue(maxsize=max(depth, 1))
        stop = threading.Event()

        def put(item: Any) -> None:
            while not stop.is_set():
                with contextlib.suppress(queue.Full):
                    return ready.put(item, timeout=0.1)

        def work() -> None:
            try:
                if device is not None:  # a new thread would page-lock through GPU 0, whichever is this process's
                    torch.cuda.set_device(device)
                for step, sequence in order:
                    window = self.window(step, sequence)
                    tensors = [torch.from_numpy(part) for part in _inputs_and_targets(window)]
                    read = record.of(window) if record else None
                    put((step, sequence, read, tuple(t.pin_memory() if pin_memory else t for t in tensors)))
                    if stop.is_set():
                        return
                put(None)
            except BaseException as error:  # handed to the consumer, which raises it
                put(error)

        thread = threading.Thread(target=work, name="shard-prefetch", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                *place, tensors = item
                if record:
                    record.feed(*place)
                yield tensors
        finally:
            stop.set()
            thread.join(timeout=5)

    def data_hash(self) -> str:
        """`data_hash` of the stream's shards, in order."""
        return data_hash(self.shards)

    def close(self) -> None:
        """Close the files; the stream opens them again when it is read."""
        with self._lock:
            while self._open:
                self._open.popitem()[1].close()


def _inputs_and_targets(window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return window[:-1].astype(np.int32), window[1:].astype(np.int64)


def window_digest(window: np.ndarray) -> bytes:
    """16 bytes: blake2b of the tokens of one sequence, its last target included, as little-endian 16-bit numbers."""
    return hashlib.blake2b(np.ascontiguousarray(window, dtype=TOKEN).data, digest_size=16).digest()


def data_hash(shards: Iterable[ShardInfo]) -> str:
    """A hash of files, in order, independent of where they lie: what tokenize.json keeps of each shard, and what
    checkpoints and logs told before the tokens themselves were hashed (trainer/evidence.py).

    Shards up to 64 MiB are hashed whole. Of a larger one the hash covers the header, the size, and 16 blocks
    of 64 KiB spread evenly from its first byte to its last: 30 shards of FineWeb take a second instead of
    half a minute, other data, another order or a cut file is noticed, and a change of a few tokens between
    the samples is not. The prefix says which it was: `sha256:` if every byte counted, else `sampled-sha256:`.
    """
    total, sampled = hashlib.sha256(), False
    for shard in shards:
        size = HEADER_BYTES + TOKEN.itemsize * shard.num_tokens
        total.update(f"{size}\n".encode())
        try:
            if size <= _HASHED_WHOLE_BYTES:
                local = paths.fetch(shard.path)
                for start in range(0, size, 1 << 22):
                    total.update(paths.read_range(str(local), start, start + (1 << 22)))
                continue
            sampled = True
            for index in range(_SAMPLES):
                start = (size - _SAMPLE_BYTES) * index // (_SAMPLES - 1)
                total.update(paths.read_range(shard.path, start, start + _SAMPLE_BYTES))
        except paths.PathError as error:
            raise ShardError(str(error)) from error
    return f"{'sampled-' if sampled else ''}sha256:{total.hexdigest()}"
