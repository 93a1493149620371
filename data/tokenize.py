"""Turn text, JSONL or parquet into token shards, with the GPT-2 BPE or as bytes.

    python -m data.tokenize stories.txt --out DIR --encoding bytes --documents marker --val-fraction 0.1
    python -m data.tokenize crawl/*.jsonl.gz --out DIR --encoding gpt2 --field text --shard-tokens 100000000
    python -m data.tokenize shakespeare.txt --out DIR --encoding bytes --val-fraction 0.1 --split characters

Each document is preceded by its end-of-text token: 50256 for gpt2, 0 for bytes. A document may continue in
the next shard. One process reads and writes; the others encode, a bounded number of pieces ahead, so memory
does not grow with the corpus, and any number of workers gives the same bytes. A long document is encoded in
pieces that are cut between a visible character and white space, where GPT-2's pattern always cuts, so the
tokens are those of the whole document.

Shards are written to a hidden folder in DIR and moved to their names when all are complete; tokenize.json,
with counts and hashes, comes last. An interrupted run leaves nothing behind.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import hashlib
import json
import os
import re
import select
import signal
import stat
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import paths, shards

ENCODINGS = {"gpt2": (50257, 50256), "bytes": (256, 0)}  # name: vocabulary, end-of-text token
MARKER = "<|endoftext|>"

_PIECE_CHARS = 1 << 18  # a longer document is encoded in pieces of about this size
_LONGEST_WORD = 1 << 22
_BATCH_CHARS = 1 << 20  # what a worker gets at once
_READ_BYTES = 1 << 20
# GPT-2's split into words, from the release of its vocabulary; an alternation of the contractions is equivalent.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
_CUT = re.compile(r"(?<=\S)(?=[ \n])")


class TokenizeError(ValueError):
    """Input that cannot be tokenized, or output that cannot be written; the message names the place and the cause."""


class Piece(NamedTuple):
    """A document or a part of one. `where` names its place, for errors; `starts`: a document begins here."""

    where: str
    starts: bool
    text: str


# -----------------------------------------------------------------------------------------------------------
# Reading


def read_pieces(path: str, *, kind: str, field: str, documents: str, marker: str) -> Iterator[Piece]:
    """The documents of one file, cut into pieces, in order. Raises TokenizeError."""
    if kind == "parquet":
        found = _parquet_documents(path, field)
    elif kind == "jsonl":
        found = _jsonl_documents(path, field)
    elif documents == "file":
        yield from _whole_file(path)
        return
    else:
        found = _text_documents(path, documents, marker)
    for where, text in found:
        yield from _cut(where, text)


def _cut(where: str, text: str) -> Iterator[Piece]:
    """A document as pieces, each but the last _PIECE_CHARS or a little longer."""
    starts, begin = True, 0
    while begin < len(text):
        end = _cut_after(text, begin + _PIECE_CHARS)
        yield Piece(where, starts, text[begin:end])
        starts, begin = False, end


def _cut_after(text: str, place: int) -> int:
    """The first place from `place` on where a text may be cut without changing its tokens, else its end.

    A "word" of more than _LONGEST_WORD characters is cut anyway; it must not fill the memory.
    """
    last = min(place + _LONGEST_WORD, len(text))
    found = _CUT.search(text, min(place, last), last)
    return found.start() if found else last


def _chunks(path: str) -> Iterator[str]:
    """The text of a file, decompressed by its suffix, in chunks; line ends stay as they are, a BOM is dropped."""
    decoder, read = codecs.getincrementaldecoder("utf-8-sig")(), 0
    try:
        with _open(path) as file:
            while block := file.read(_READ_BYTES):
                read += len(block)
                yield decoder.decode(block)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:  # its object ends with the last byte that was read
        place = read - len(error.object) + error.start
        raise TokenizeError(f"{path}: not UTF-8 text at byte {place:,} ({error.reason})") from error
    except (OSError, EOFError, ImportError) as error:  # gzip raises EOFError and BadGzipFile, an OSError
        raise TokenizeError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except Exception as error:  # zlib.error, lzma.LZMAError and what remote file systems raise
        raise TokenizeError(f"{path}: cannot be read: {type(error).__name__}: {error}") from error


def _open(path: str):
    """A file to read bytes from, unpacked by its suffix."""
    if paths.is_remote(path) or path.endswith(_PACKED):
        import fsspec

        return fsspec.open(path, "rb", compression="infer")
    file = open(path, "rb", buffering=0)
    return file if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else _Pipe(file)


class _Pipe:
    """A pipe or terminal, read in waits of a fraction of a second, between which signals are noticed.

    A read that blocks would not end if the kernel gave the signal to another thread (numpy's library has some).
    """

    def __init__(self, file):
        self._file = file

    def read(self, size: int) -> bytes:
        while not select.select([self._file], [], [], 0.2)[0]:
            pass
        return self._file.read(size)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._file.close()


def _whole_file(path: str) -> Iterator[Piece]:
    starts, held = True, ""
    for chunk in _chunks(path):
        held += chunk
        while (end := _cut_after(held, _PIECE_CHARS)) < len(held):
            yield Piece(path, starts, held[:end])
            starts, held = False, held[end:]
    if held:
        yield Piece(path, starts, held)


def _lines(path: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends. Only line feeds end lines (carriage returns before them are dropped)."""
    number, held = 0, []
    for chunk in _chunks(path):
        first, *more = chunk.split("\n")
        held.append(first)
        for line in more:
            number += 1
            yield number, "".join(held).removesuffix("\r")
            held = [line]
    if any(held):
        yield number + 1, "".join(held).removesuffix("\r")


def _text_documents(path: str, documents: str, marker: str) -> Iterator[tuple[str, str]]:
    first, lines = 1, []
    for number, line in _lines(path):
        if documents == "line":
            yield f"{path}, line {number}", line
        elif line == marker if documents == "marker" else not line.strip():
            yield f"{path}, line {first}", "\n".join(lines).strip("\n")
            first, lines = number + 1, []
        else:
            lines.append(line)
    yield f"{path}, line {first}", "\n".join(lines).strip("\n")


def _jsonl_documents(path: str, field: str) -> Iterator[tuple[str, str]]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TokenizeError(f"{where}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise TokenizeError(f"{where}: a JSON object is needed, found {type(record).__name__}")
        yield where, _string(where, field, record)


def _parquet_documents(path: str, field: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise TokenizeError(f"{path}: reading parquet takes pyarrow; install it") from error
    try:
        with pyarrow.parquet.ParquetFile(paths.fetch(path)) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise TokenizeError(f"{path}: no column {field!r}; it has {', '.join(names)}; use --field")
            row = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(0).to_pylist():
                    yield f"{path}, row {row}", _string(f"{path}, row {row}", field, {field: value})
                    row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise TokenizeError(f"{path}: cannot be read as parquet: {error}") from error


def _string(where: str, field: str, record: dict) -> str:
    if field not in record:
        raise TokenizeError(f"{where}: no field {field!r}; it has {', '.join(record) or 'none'}; use --field")
    value = record[field]
    if not isinstance(value, str):
        raise TokenizeError(f"{where}: field {field!r} is {type(value).__name__}, a text is needed")
    return value


def file_kind(path: str) -> str:
    """text, jsonl or parquet, by the name; a suffix for compression is passed over."""
    name = re.sub(r"\.(gz|bz2|xz|zst|zip)$", "", path.lower())
    if name.endswith((".jsonl", ".ndjson", ".json")):
        return "jsonl"
    return "parquet" if name.endswith(".parquet") else "text"


# -----------------------------------------------------------------------------------------------------------
# Encoding


def bytes_encoder(text: str) -> np.ndarray:
    """UTF-8 bytes as tokens. Byte 0 is taken: it separates documents."""
    data = text.encode("utf-8")
    if b"\0" in data:
        raise TokenizeError("byte 0 in the text, which marks the beginning of documents; remove it from the input")
    return np.frombuffer(data, dtype=np.uint8).astype(shards.TOKEN)


def gpt2_encoder(vocab: str | None = None) -> Callable[[str], np.ndarray]:
    """GPT-2's byte-pair encoder; `<|endoftext|>` in a text is ordinary text.

    vocab: folder with GPT-2's encoder.json, checked by its hash. Without it tiktoken uses its cache or
    downloads.
    """
    encoding = _gpt2_encoding(vocab)

    def encode(text: str) -> np.ndarray:
        text.encode("utf-8")  # lone surrogates: the same error as for bytes, where tiktoken would replace them
        return np.array(encoding.encode_ordinary(text), dtype=shards.TOKEN)

    return encode


def _gpt2_encoding(vocab: str | None):
    import tiktoken

    if vocab is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # requests' many kinds, and a wrong hash
            raise TokenizeError(
                f"the GPT-2 vocabulary could not be downloaded ({type(error).__name__}); with --vocab DIR it is read "
                "from encoder.json in a folder"
            ) from error
    path = Path(vocab) / "encoder.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizeError(f"{path}: {error.strerror}; --vocab names the folder that holds encoder.json") from error
    if (digest := hashlib.sha256(data).hexdigest()) != _ENCODER_SHA256:
        raise TokenizeError(f"{path}: not GPT-2's vocabulary: sha256 {digest}, expected {_ENCODER_SHA256}")
    byte_of = _bytes_by_character()
    # In this vocabulary a token's number is its rank among the merges, so the merges' own file is not needed.
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in json.loads(data).items() if token != MARKER}
    return tiktoken.Encoding(
        "gpt2",
        pat_str=_GPT2_PATTERN,
        mergeable_ranks=ranks,
        special_tokens={MARKER: ENCODINGS["gpt2"][1]},
        explicit_n_vocab=ENCODINGS["gpt2"][0],
    )


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's file writes bytes as characters: visible Latin-1 as themselves, the other 68 from U+0100 on, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in visible}
    for byte in range(256):
        if byte not in visible:
            table[chr(0x100 + len(table) - len(visible))] = byte
    return table


def make_encoder(name: str, vocab: str | None) -> Callable[[str], np.ndarray]:
    """The function that turns a text into token ids (uint16)."""
    return bytes_encoder if name == "bytes" else gpt2_encoder(vocab)


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
    _worker = partial(encode_batch, encoder=make_encoder(name, vocab), end_of_text=ENCODINGS[name][1])


def _work(batch: list[tuple[str, Piece]]) -> list[Encoded]:
    return _worker(batch)


def encode_all(pieces: Iterable[tuple[str, Piece]], name: str, vocab: str | None, workers: int) -> Iterator[Encoded]:
    """Encode pieces on `workers` processes (1: in this one), in order, at most two batches a worker ahead."""
    encoder = make_encoder(name, vocab)  # here first: its errors are plain, and tiktoken's cache is filled once
    if workers == 1:
        for batch in _batches(pieces):
            yield from encode_batch(batch, encoder, ENCODINGS[name][1])
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
                self.close()

    def close(self) -> None:
        """Complete the shard that was begun."""
        if self._writer is not None:
            self.files.append(self._writer.close())
            self._writer = None

    def abandon(self) -> None:
        """Remove the shard that was begun."""
        if self._writer is not None:
            with contextlib.suppress(KeyboardInterrupt):
                self._writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
            self._writer = None


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


def tokenize(inputs: list[str], settings: Settings) -> dict:
    """Write shards of `inputs` (paths, globs, URLs) as `settings` says; returns what tokenize.json holds.

    Raises TokenizeError, and leaves no file behind then.
    """
    try:
        files = paths.expand(inputs)
    except paths.PathError as error:
        raise TokenizeError(str(error)) from error
    for file in files:
        if not paths.is_remote(file) and os.path.isdir(file):
            raise TokenizeError(f"{file}: a folder; name the files in it, for example '{file}/*.jsonl'")
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


def _write_parts(files: list[str], settings: Settings, folder: Path) -> dict:
    """Read, split, encode, and write shards to `folder`."""

    def pieces() -> Iterator[Piece]:
        for file in files:
            kind = file_kind(file) if settings.kind == "auto" else settings.kind
            yield from read_pieces(
                file, kind=kind, field=settings.field, documents=settings.documents, marker=settings.marker
            )

    train_characters = None
    if settings.split == "characters":
        characters = sum(len(piece.text) for piece in pieces())
        train_characters = int(characters * (1 - settings.val_fraction))
        parts = split_by_character(pieces(), train_characters)
    else:
        parts = split_by_document(pieces(), settings.val_fraction)
    writers = {part: PartWriter(folder, part, settings.shard_tokens) for part in ("train", "val")}
    progress = Progress(_total_bytes(files))
    encoded = encode_all(parts, settings.encoding, settings.vocab, settings.workers)
    try:
        room = settings.max_tokens
        for part, tokens, documents, characters in encoded:
            tokens = tokens[:room]
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
    return _facts(files, settings, writers)


def _facts(files: list[str], settings: Settings, writers: dict[str, PartWriter]) -> dict:
    counts = {part: dict(writer.counts) for part, writer in writers.items() if writer.files}
    if "train" not in counts:
        raise TokenizeError("no text for training was found: the inputs are empty, or all went into validation")
    if settings.val_fraction and "val" not in counts:
        raise TokenizeError(
            "no document fell into validation: there are too few documents for --val-fraction "
            f"{settings.val_fraction}; a text can be cut in two with --split characters"
        )
    infos = [info for writer in writers.values() for info in writer.files]
    return {
        "schema": 1,
        "inputs": files,
        "encoding": settings.encoding,
        "vocab_size": ENCODINGS[settings.encoding][0],
        "end_of_text": ENCODINGS[settings.encoding][1],
        "split": settings.split,
        "val_fraction": settings.val_fraction,
        "cut_by_max_tokens": settings.max_tokens is not None,
        **counts,
        "shards": {Path(info.path).name: shards.data_hash([info]) for info in infos},
    }


def _total_bytes(files: list[str]) -> int | None:
    """Bytes of all inputs, or None where that says nothing about the text in them."""
    if any(file_kind(file) == "parquet" or file.endswith(_PACKED) for file in files):
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
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, globs or URLs; .gz, .bz2, .xz are unpacked")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--encoding", choices=ENCODINGS, default="gpt2", help="default: %(default)s")
    parser.add_argument("--vocab", metavar="DIR", help="folder with GPT-2's encoder.json, for machines without network")
    parser.add_argument(
        "--kind",
        choices=("auto", "text", "jsonl", "parquet"),
        default="auto",
        help="what the inputs are; default: by their names",
    )
    parser.add_argument(
        "--field", default="text", help="field or column of the text in JSONL or parquet; default: %(default)s"
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
    parser.add_argument("--max-tokens", type=int, metavar="N", help="stop after so many tokens")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that encode; default: one a core, and 1 for bytes"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that are in DIR")
    return parser


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if not 0 <= options.val_fraction < 1:
        parser.error("--val-fraction must be at least 0 and below 1")
    if not 0 < options.shard_tokens <= shards.MAX_TOKENS:
        parser.error(f"--shard-tokens must be from 1 to {shards.MAX_TOKENS}")
    if options.max_tokens is not None and options.max_tokens < 1:
        parser.error("--max-tokens must be at least 1")
    # Bytes cost less to encode than to send to another process.
    workers = options.workers or (1 if options.encoding == "bytes" else _cores())
    if workers < 1:
        parser.error("--workers must be at least 1")
    fields = {**vars(options), "workers": workers}
    inputs = fields.pop("inputs")
    start = time.perf_counter()
    try:
        facts = tokenize(inputs, Settings(**fields))
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
    print(f"{len(facts['shards'])} shards in {options.out} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)  # end as on Ctrl-C, and clean up
    sys.exit(main())
