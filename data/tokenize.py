"""Turn text, JSONL or parquet into token shards, with the GPT-2 BPE or as bytes.

    python -m data.tokenize stories.txt --out DIR --encoding bytes --documents marker --val-fraction 0.1
    python -m data.tokenize crawl/*.jsonl.gz --out DIR --encoding gpt2 --field text --shard-tokens 100000000
    python -m data.tokenize shakespeare.txt --out DIR --encoding bytes --val-fraction 0.1 --split characters
    python -m data.tokenize 'wiki/*.parquet' 'web/*.jsonl.zst' --weights 1,3 --shuffle 1 --out DIR --val-fraction 0.01

Each document is preceded by its end-of-text token: 50256 for gpt2, 0 for bytes. A document may continue in
the next shard. One process reads and writes; the others encode, a bounded number of pieces ahead, so memory
does not grow with the corpus, and any number of workers gives the same bytes. A long document is encoded in
pieces that are cut between a visible character and white space, where GPT-2's pattern always cuts, so the
tokens are those of the whole document. What can be read: data/reading.py.

--shuffle puts the documents of each part in a seeded random order, in two passes: tokens go to one of many
temporary files by a draw for each document, then each file's documents are ordered in memory (a few hundredths
of the part). --weights takes documents from several inputs in turn, so that their characters stay in these
proportions, until one input ends.

Shards are written to a hidden folder in DIR and moved to their names when all are complete; tokenize.json,
with counts and hashes, comes last: it is what `train_gpt.py --data=DIR` goes by. An interrupted run leaves
nothing behind.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data import paths, shards
from data.echo import program
from data.encoding import ENCODINGS, MARKER, TokenizeError, make_encoder, token_characters
from data.reading import KINDS, PACKED, Piece, Reader, file_kind

_BATCH_CHARS = 1 << 20  # what a worker gets at once
_BUCKETS = 128  # temporary files of a shuffle

# -----------------------------------------------------------------------------------------------------------
# Encoding


class Encoded(NamedTuple):
    """Tokens of some pieces of one part (train or val), separators included, and what they were made of."""

    part: str
    tokens: np.ndarray
    documents: int
    characters: int


def encode_batch(batch: list[tuple[str, Piece]], encoder: Callable, end_of_text: int) -> list[Encoded]:
    """Encode (part, piece) pairs; pieces of one part that follow one another are joined."""
    out: list[Encoded] = []
    separator = np.array([end_of_text], dtype=shards.TOKEN)
    held: list[np.ndarray] = []
    documents = characters = 0
    for index, (part, piece) in enumerate(batch):
        try:
            tokens = encoder(piece.text)
        except UnicodeEncodeError as error:
            raise TokenizeError(f"{piece.where}: half a surrogate pair (character {error.start}); not text") from error
        except TokenizeError as error:
            raise TokenizeError(f"{piece.where}: {error}") from error
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # what tiktoken's Rust code raises, no Exception
                raise
            raise TokenizeError(f"{piece.where}: the GPT-2 tokenizer gave up on this text: {error}") from error
        held += [separator, tokens] if piece.starts else [tokens]
        documents, characters = documents + piece.starts, characters + len(piece.text)
        if index + 1 == len(batch) or batch[index + 1][0] != part:
            out.append(Encoded(part, np.concatenate(held), documents, characters))
            held, documents, characters = [], 0, 0
    return out


_worker: Callable | None = None


def _start_worker(name: str, vocab: str | None) -> None:
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the workers
    _worker = partial(encode_batch, encoder=make_encoder(name, vocab), end_of_text=ENCODINGS[name].end_of_text)


def _work(batch: list[tuple[str, Piece]]) -> list[Encoded]:
    assert _worker is not None, "_start_worker comes first in every process of the pool"
    return _worker(batch)


def encode_all(
    pieces: Iterable[tuple[str, Piece]], name: str, vocab: str | None, workers: int
) -> Generator[Encoded, None, None]:
    """Encode pieces on `workers` processes (1: in this one), in order, at most two batches a worker ahead."""
    encoder = make_encoder(name, vocab)  # here first: its errors are plain, and tiktoken's cache is filled once
    if workers == 1:
        for batch in _batches(pieces):
            yield from encode_batch(batch, encoder, ENCODINGS[name].end_of_text)
        return
    import multiprocessing

    # Spawned: forking a process that has threads (progress bar, file systems) may lock up.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(name, vocab))
    try:
        waiting: deque = deque()
        for batch in _batches(pieces):
            waiting.append(pool.submit(_work, batch))
            if len(waiting) >= 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise TokenizeError("a worker died (killed, or out of memory?); try fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(pieces: Iterable[tuple[str, Piece]]) -> Iterator[list[tuple[str, Piece]]]:
    batch, size = [], 0
    for item in pieces:
        batch.append(item)
        size += len(item[1].text) + 64
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# -----------------------------------------------------------------------------------------------------------
# Several inputs


class Mixture:
    """Documents of several inputs in turn: always of the one that has given the fewest characters for its weight,
    until that one has no more. Iterate over it once; then `characters` says what each has given, `ended` which ended.
    """

    def __init__(self, inputs: Sequence[Iterator[Piece]], weights: Sequence[float]):
        self.inputs, self.weights = list(inputs), list(weights)
        self.characters, self.ended = [0] * len(self.inputs), -1

    def __iter__(self) -> Iterator[Piece]:
        heads = [next(pieces, None) for pieces in self.inputs]
        while True:
            at = min(range(len(heads)), key=lambda i: (self.characters[i] / self.weights[i], i))
            piece = heads[at]
            if piece is None:
                self.ended = at
                return
            while True:
                yield piece
                self.characters[at] += len(piece.text)
                piece = heads[at] = next(self.inputs[at], None)
                if piece is None or piece.starts:
                    break


# -----------------------------------------------------------------------------------------------------------
# Train and validation


def split_by_document(pieces: Iterable[Piece], fraction: float) -> Iterator[tuple[str, Piece]]:
    """Put a `fraction` of the documents, chosen by the hash of their first piece, into validation.

    The choice depends on the text alone: not on order, other documents or workers; copies stay together.
    """
    part, limit = "train", round(fraction * 2**64)
    for piece in pieces:
        if piece.starts:
            digest = hashlib.blake2b(piece.text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            part = "val" if int.from_bytes(digest, "little") < limit else "train"
        yield part, piece


def split_by_character(pieces: Iterable[Piece], train_characters: int) -> Iterator[tuple[str, Piece]]:
    """The first `train_characters` go into training, all others into validation; a document may be cut in two."""
    position = 0
    for piece in pieces:
        cut = min(max(train_characters - position, 0), len(piece.text))
        position += len(piece.text)
        if cut:
            yield "train", piece._replace(text=piece.text[:cut])
        if cut < len(piece.text):
            first = position - len(piece.text) + cut == train_characters
            yield "val", Piece(piece.where, piece.starts or first, piece.text[cut:])


# -----------------------------------------------------------------------------------------------------------
# Writing


class PartWriter:
    """Writes the shards of one part, PREFIX_000001.bin and so on (validation begins at 000000, as public sets do)."""

    def __init__(self, folder: Path, part: str, shard_tokens: int):
        self.folder, self.part, self.shard_tokens = folder, part, shard_tokens
        self.number = 0 if part == "val" else 1
        self.files: list[shards.ShardInfo] = []
        self.counts: Counter = Counter()
        self._writer: shards.ShardWriter | None = None

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens, beginning new shards where one is full."""
        while len(tokens):
            if self._writer is None:
                self._writer = shards.ShardWriter(self.folder / f"{self.part}_{self.number:06d}.bin")
                self.number += 1
            room = self.shard_tokens - self._writer.num_tokens
            self._writer.append(tokens[:room])
            self.counts["tokens"] += len(tokens[:room])
            tokens = tokens[room:]
            if self._writer.num_tokens == self.shard_tokens:
                self._complete()

    def close(self) -> None:
        """Complete the shard that was begun: the part is written."""
        self._complete()

    def _complete(self) -> None:
        if self._writer is not None:
            self.files.append(self._writer.close())
            self._writer = None

    def abandon(self) -> None:
        """Remove the shard that was begun."""
        if self._writer is not None:
            with contextlib.suppress(KeyboardInterrupt):
                self._writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
            self._writer = None


class ShufflingWriter(PartWriter):
    """A part whose documents come out in a random order that `seed` decides, whatever the pieces they arrive in."""

    def __init__(self, folder: Path, part: str, shard_tokens: int, end_of_text: int, seed: int):
        super().__init__(folder, part, shard_tokens)
        self.end_of_text, self.random = end_of_text, np.random.default_rng([seed, part == "val"])
        self.buckets: dict[int, BinaryIO] = {}
        self.bucket = 0

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens; each document goes, whole, to the temporary file that is drawn for it."""
        starts = np.flatnonzero(tokens == self.end_of_text)
        drawn = (self.random.random(len(starts)) * _BUCKETS).astype(int).tolist()
        bounds = [0, *starts.tolist(), len(tokens)]
        for bucket, begin, end in zip([self.bucket, *drawn], bounds, bounds[1:]):
            if begin < end:
                self._bucket(bucket).write(tokens[begin:end].tobytes())
            self.bucket = bucket

    def _bucket(self, number: int) -> BinaryIO:
        if number not in self.buckets:
            self.buckets[number] = open(self.folder / f".{self.part}-{number}", "w+b")
        return self.buckets[number]

    def close(self) -> None:
        """The second pass: order each file's documents and write them all."""
        for number in sorted(self.buckets):
            file = self.buckets.pop(number)
            with file:
                file.seek(0)
                tokens = np.frombuffer(file.read(), dtype=shards.TOKEN)
            os.unlink(file.name)
            starts = np.flatnonzero(tokens == self.end_of_text)
            ends = [*starts[1:].tolist(), len(tokens)]
            for at in self.random.permutation(len(starts)):
                super().append(tokens[starts[at] : ends[at]])
        self._complete()

    def abandon(self) -> None:
        while self.buckets:
            self.buckets.popitem()[1].close()
        super().abandon()


class Progress:
    """A bar on a terminal; elsewhere a line every ten seconds. Counts characters of input."""

    def __init__(self, total_bytes: int | None):
        self.start = self.told = time.monotonic()
        self.tokens = self.characters = 0
        self.bar = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenize")

    def add(self, characters: int, tokens: int) -> None:
        self.characters, self.tokens = self.characters + characters, self.tokens + tokens
        if self.bar is not None:
            self.bar.update(characters)
            self.bar.set_postfix_str(f"{self.tokens:,} tokens", refresh=False)
        elif time.monotonic() - self.told > 10:
            self.told = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self.start
        rate = self.characters / max(seconds, 1e-9) / 1e6
        return f"tokenize: {self.characters:,} characters, {self.tokens:,} tokens, {seconds:.0f} s, {rate:.2f} M/s"

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


class Settings(NamedTuple):
    """What `tokenize` does; the command line's options, see --help."""

    out: str
    encoding: str = "gpt2"
    vocab: str | None = None
    kind: str = "auto"
    field: str = "text"
    documents: str = "file"
    marker: str = MARKER
    val_fraction: float = 0.0
    split: str = "documents"
    shard_tokens: int = 100_000_000
    max_tokens: int | None = None
    workers: int = 1
    overwrite: bool = False
    on_bad: str = "stop"
    shuffle: int | None = None
    weights: tuple[float, ...] = ()


class EmptyPart(TokenizeError):
    """Nothing was found for training, or for validation where some was to go there."""


class SettingError(TokenizeError):
    """A setting that makes no sense; the message begins with its option."""


def check_settings(inputs: list[str], settings: Settings) -> None:
    """Raise SettingError for the first setting out of its limits."""
    s = settings
    limits = {
        f"--val-fraction {s.val_fraction}: at least 0 and below 1": 0 <= s.val_fraction < 1,
        f"--shard-tokens {s.shard_tokens}: from 1 to {shards.MAX_TOKENS}": 0 < s.shard_tokens <= shards.MAX_TOKENS,
        f"--max-tokens {s.max_tokens}: at least 1": s.max_tokens is None or s.max_tokens > 0,
        f"--workers {s.workers}: at least 1": s.workers > 0,
        f"--shuffle {s.shuffle}: a seed is 0 or more": s.shuffle is None or s.shuffle >= 0,
        f"--weights: {len(s.weights)} for {len(inputs)} inputs; give one for each": len(s.weights) in (0, len(inputs)),
        "--weights: numbers above 0; leave an input out rather than giving it 0": all(
            0 < weight < math.inf for weight in s.weights
        ),
        "--marker: a line that is not empty": s.documents != "marker" or (s.marker.strip() and "\n" not in s.marker),
    }
    for message, held in limits.items():
        if not held:
            raise SettingError(message)


def tokenize(inputs: list[str], settings: Settings) -> dict:
    """Write shards of `inputs` (paths, globs, URLs) as `settings` says; returns what tokenize.json holds.

    Raises TokenizeError, and leaves no file behind then.
    """
    check_settings(inputs, settings)
    files = _expanded(inputs, settings)
    out = Path(settings.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        old = _old_files(out)
        if old and not settings.overwrite:
            raise TokenizeError(f"{out}: holds shards already ({old[0].name}); give another --out, or --overwrite")
        with tempfile.TemporaryDirectory(dir=out, prefix=".tokenize-", ignore_cleanup_errors=True) as folder:
            facts = _write_parts(files, settings, Path(folder))
            for file in old:
                file.unlink()
            for name in facts["shards"]:
                os.replace(Path(folder) / name, out / name)
        with paths.atomic_file(out / "tokenize.json", "w") as file:
            json.dump(facts, file, indent=1)
        return facts
    except (OSError, shards.ShardError) as error:
        cause = f"{error.filename or out}: {error.strerror}" if isinstance(error, OSError) else str(error)
        raise TokenizeError(f"cannot write: {cause}") from error


def _old_files(out: Path) -> list[Path]:
    return sorted([*out.glob("train_*.bin"), *out.glob("val_*.bin"), *out.glob("tokenize.json")])


def _expanded(inputs: list[str], settings: Settings) -> list[list[str]]:
    """The files of each input, each file in one of them only."""
    try:
        paths.expand(inputs)  # refuses a file that two of them name
        found = [paths.expand([name]) for name in inputs]
    except paths.PathError as error:
        raise TokenizeError(str(error)) from error
    for file in chain.from_iterable(found):
        if not paths.is_remote(file) and os.path.isdir(file):
            raise TokenizeError(f"{file}: a folder; name the files in it, for example '{file}/*.jsonl'")
        if settings.kind == "auto":
            file_kind(file)  # before anything is read
    return found


def _pieces(inputs: list[list[str]], settings: Settings) -> tuple[Iterable[Piece], Reader]:
    """All documents of all inputs, and the reader that counts what it meets."""
    forbidden = "\0" if settings.encoding == "bytes" else ""
    how = settings.kind, settings.field, settings.documents, settings.marker, settings.on_bad, forbidden
    reader = Reader(*how)
    streams = [(piece for file in files for piece in reader.pieces(file)) for files in inputs]
    if settings.weights:
        return Mixture(streams, settings.weights), reader
    return (piece for stream in streams for piece in stream), reader


def _write_parts(inputs: list[list[str]], settings: Settings, folder: Path) -> dict:
    """Read, split, encode, and write shards to `folder`."""
    pieces, reader = _pieces(inputs, settings)
    if settings.split == "characters":
        characters = sum(len(piece.text) for piece in _pieces(inputs, settings)[0])
        parts = split_by_character(pieces, int(characters * (1 - settings.val_fraction)))
    else:
        parts = split_by_document(pieces, settings.val_fraction)
    writers = {part: _writer(folder, part, settings) for part in ("train", "val")}
    progress = Progress(_total_bytes([file for files in inputs for file in files]))
    encoded = encode_all(parts, settings.encoding, settings.vocab, settings.workers)
    try:
        room = settings.max_tokens
        for part, tokens, documents, characters in encoded:
            if room is not None and len(tokens) > room:
                tokens = tokens[:room]
                documents, characters = _counted(tokens, settings)
            writers[part].append(tokens)
            writers[part].counts.update(documents=documents, characters=characters)
            progress.add(characters, len(tokens))
            if room is not None and (room := room - len(tokens)) == 0:
                break
        for writer in writers.values():
            writer.close()
    finally:
        encoded.close()
        progress.close()
        for writer in writers.values():
            writer.abandon()
    met = dict(reader.counts) | ({"first_bad": reader.first_bad} if reader.first_bad else {})
    if isinstance(pieces, Mixture):
        met["characters_by_input"], met["ended"] = pieces.characters, pieces.ended
    return _facts(inputs, settings, writers, met)


def _writer(folder: Path, part: str, settings: Settings) -> PartWriter:
    if settings.shuffle is None:
        return PartWriter(folder, part, settings.shard_tokens)
    end_of_text = ENCODINGS[settings.encoding].end_of_text
    return ShufflingWriter(folder, part, settings.shard_tokens, end_of_text, settings.shuffle)


def _counted(tokens: np.ndarray, settings: Settings) -> tuple[int, int]:
    """Documents and characters that begin in `tokens`."""
    vocabulary = ENCODINGS[settings.encoding]
    documents = int(np.count_nonzero(tokens == vocabulary.end_of_text))
    return documents, int(token_characters(vocabulary.size, settings.vocab)[tokens].sum())


def _facts(inputs: list[list[str]], settings: Settings, writers: dict[str, PartWriter], met: dict) -> dict:
    counts = {part: dict(writer.counts) for part, writer in writers.items() if writer.files}
    if "train" not in counts:
        raise EmptyPart("no text for training was found: the inputs are empty, or all went into validation")
    if settings.val_fraction and "val" not in counts:
        raise EmptyPart(
            "no document fell into validation: there are too few documents for --val-fraction "
            f"{settings.val_fraction}; a text can be cut in two with --split characters"
        )
    infos = [info for writer in writers.values() for info in writer.files]
    return {
        "schema": 1,
        "inputs": [file for files in inputs for file in files],
        "encoding": settings.encoding,
        "vocab_size": ENCODINGS[settings.encoding].size,
        "end_of_text": ENCODINGS[settings.encoding].end_of_text,
        "documents": settings.documents,
        "shuffle": settings.shuffle,
        "weights": list(settings.weights),
        "met": met,
        "split": settings.split,
        "val_fraction": settings.val_fraction,
        "cut_by_max_tokens": settings.max_tokens is not None,
        **counts,
        "shards": {Path(info.path).name: shards.data_hash([info]) for info in infos},
    }


def _total_bytes(files: list[str]) -> int | None:
    """Bytes of all inputs, or None where that says nothing about the text in them."""
    if any(file.endswith((*PACKED, ".parquet")) for file in files):
        return None
    with contextlib.suppress(paths.PathError):
        return sum(map(paths.file_size, files))
    return None


# -----------------------------------------------------------------------------------------------------------
# Command line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m data.tokenize",
        description="Turn text, JSONL or parquet into token shards.",
        epilog="Exit codes: 0 done, 2 wrong usage, 3 bad input or output, 130 interrupted.",
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help=f"files, globs or URLs; {', '.join(PACKED)} are unpacked"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--encoding", choices=ENCODINGS, default="gpt2", help="default: %(default)s")
    parser.add_argument("--vocab", metavar="DIR", help="folder with GPT-2's encoder.json, for machines without network")
    parser.add_argument(
        "--kind", choices=("auto", *KINDS), default="auto", help="what the inputs are; default: by their names"
    )
    parser.add_argument(
        "--field", default="text", help="of the text in JSONL or parquet, a.b for b within a; default: %(default)s"
    )
    parser.add_argument(
        "--on-bad", choices=("stop", "skip"), default="stop", help="at a document that is no text; default: %(default)s"
    )
    parser.add_argument(
        "--documents",
        choices=("file", "line", "blank", "marker"),
        default="file",
        help="what a document of a text file is: all of it, a line, what blank lines divide, or what "
        "lines equal to --marker divide; default: %(default)s",
    )
    parser.add_argument("--marker", default=MARKER, help="default: %(default)s")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="part that goes into validation, at least 0 and below 1; default: %(default)s",
    )
    parser.add_argument(
        "--split",
        choices=("documents", "characters"),
        default="documents",
        help="choose documents for validation by hash, or cut off the last characters of the whole "
        "input (which is read twice); default: %(default)s",
    )
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after so many tokens (before any shuffling)")
    parser.add_argument("--shuffle", type=int, metavar="SEED", help="shuffle the documents; default: as they come")
    parser.add_argument(
        "--weights", type=_weights, default=(), metavar="W,W,...", help="one an INPUT: their shares of the characters"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that encode; default: one a core, and 1 for bytes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are in DIR")
    return parser


def _weights(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _remarks(facts: dict, inputs: list[str]) -> Iterator[str]:
    """What a user should know beyond the counts."""
    met = facts["met"]
    if met.get("bad"):
        yield f"{met['bad']:,} bad documents were skipped; the first: {met['first_bad']}"
    if met.get("empty"):
        yield f"{met['empty']:,} empty documents were left out"
    if met.get("marker_lines"):
        yield (
            f"warning: {met['marker_lines']:,} lines equal to the end-of-text marker were taken as text by --documents "
            f"{facts['documents']}; with --documents marker they divide documents"
        )
    if met.get("ended", -1) >= 0:
        shares = ", ".join(f"{name}: {count:,}" for name, count in zip(inputs, met["characters_by_input"]))
        yield f"{inputs[met['ended']]} ended first; characters of each input: {shares}"


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    # Bytes cost less to encode than to send to another process.
    workers = options.workers if options.workers is not None else 1 if options.encoding == "bytes" else _cores()
    fields = {**vars(options), "workers": workers}
    inputs = fields.pop("inputs")
    start = time.perf_counter()
    try:
        facts = tokenize(inputs, Settings(**fields))
    except SettingError as error:
        parser.error(str(error))
    except TokenizeError as error:
        print(f"data.tokenize: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("data.tokenize: interrupted; nothing was written", file=sys.stderr)
        return 130
    for part in ("train", "val"):
        if part in facts:
            count = facts[part]
            print(
                f"{part}: {count['tokens']:,} tokens, {count['documents']:,} documents, "
                f"{count['characters']:,} characters"
            )
    for line in _remarks(facts, inputs):
        print(f"data.tokenize: {line}", file=sys.stderr)
    print(f"{len(facts['shards'])} shards in {options.out} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # end as on Ctrl-C, and clean up
    sys.exit(program("data.tokenize", main))
