"""Documents from files: text, JSONL or parquet, plain or packed, in pieces of bounded size.

    reader = Reader(documents="marker")
    for piece in reader.pieces("stories.txt.zst"): ...      # then reader.counts says what was met on the way

By its name a file is text (.txt, .text, .md, or no suffix), JSONL (.jsonl, .ndjson, .json: one object a line) or
parquet; .gz, .bz2, .xz and .zst are unpacked, all members, streams and frames of them; a .zip's members are read one
after the other, each by its own name. Any other suffix is refused rather than guessed.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import json
import lzma
import os
import re
import select
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

from data import paths
from data.encoding import MARKER, TokenizeError

PIECE_CHARS = 1 << 18  # a longer document is encoded in pieces of about this size
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zip")
KINDS = {"text": (".txt", ".text", ".md", ""), "jsonl": (".jsonl", ".ndjson", ".json"), "parquet": (".parquet",)}

_LONGEST_WORD = 1 << 22
_READ_BYTES = 1 << 20
_CUT = re.compile(r"(?<=\S)(?=[ \n])")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class Piece(NamedTuple):
    """A document or a part of one. `where` names its place, for errors; `starts`: a document begins here."""

    where: str
    starts: bool
    text: str


class Reader:
    """Reads documents as its arguments say, and counts what it met.

    Args:
        kind: text, jsonl, parquet, or auto: by the file's name.
        field: of the text in JSONL or parquet; `a.b` is field b of the object in field a.
        documents: what a document of a text is: file, line, blank (blank lines divide) or marker (lines equal to
            `marker` divide).
        on_bad: stop (TokenizeError) or skip, for a document that is no text.
        forbidden: a character that no document may hold, or "".

    counts: "bad" (documents passed over), "empty" (documents without a character), "marker_lines" (lines equal to
    `marker` that were taken as text). first_bad: why the first bad document was passed over.
    """

    def __init__(self, kind="auto", field="text", documents="file", marker=MARKER, on_bad="stop", forbidden=""):
        self.kind, self.field, self.documents, self.marker = kind, field, documents, marker
        self.on_bad, self.forbidden = on_bad, forbidden
        self.counts: Counter = Counter()
        self.first_bad = ""
        self._marker_line = re.compile(rf"^{re.escape(marker)}\r?$", re.MULTILINE)

    def pieces(self, path: str) -> Iterator[Piece]:
        """The documents of one file, cut into pieces, in order. Raises TokenizeError."""
        for source in _sources(path):
            kind = file_kind(source.name) if self.kind == "auto" else self.kind
            if kind == "parquet":
                found = self._parquet_documents(source)
            elif kind == "jsonl":
                found = self._jsonl_documents(source)
            elif self.documents == "file":
                yield from self._whole_file(source)
                continue
            else:
                found = self._text_documents(source)
            for where, text in found:
                if self._good(where, text):
                    self._count_markers(text)
                    yield from cut(where, text)

    def _bad(self, where: str, why: str) -> None:
        if self.on_bad == "stop":
            raise TokenizeError(f"{where}: {why}")
        self.counts["bad"] += 1
        self.first_bad = self.first_bad or f"{where}: {why}"

    def _good(self, where: str, text: str) -> bool:
        """Whether a whole document is text that can be encoded and not empty; counts it otherwise."""
        if found := _SURROGATE.search(text):
            escaped = "\udc80" <= found[0] <= "\udcff"  # how `_lines` passes on bytes that are no UTF-8
            what = (
                f"not UTF-8 text (byte {ord(found[0]) - 0xDC00:#04x})" if escaped else "half a surrogate pair; not text"
            )
            self._bad(where, f"{what} (character {found.start()})")
        elif self.forbidden and self.forbidden in text:
            self._bad(where, f"byte {ord(self.forbidden)} in the text, which marks the beginning of documents")
        elif not text:
            self.counts["empty"] += 1
        else:
            return True
        return False

    def _count_markers(self, text: str) -> None:
        if self.documents != "marker" and self.marker in text:
            self.counts["marker_lines"] += len(self._marker_line.findall(text))

    def _whole_file(self, source: Source) -> Iterator[Piece]:
        if self.on_bad == "skip":  # nothing of a bad file may be given away before its end is seen
            try:
                for _ in self._checked_chunks(source):
                    pass
            except TokenizeError as error:
                self._bad(source.label, str(error).removeprefix(f"{source.label}: "))
                return
        starts, held = True, ""
        for chunk in self._checked_chunks(source):
            held += chunk
            while (end := _cut_after(held, PIECE_CHARS)) < len(held):
                self._count_markers(held[:end])
                yield Piece(source.label, starts, held[:end])
                starts, held = False, held[end:]
        if held:
            self._count_markers(held)
            yield Piece(source.label, starts, held)
        elif starts:
            self.counts["empty"] += 1

    def _checked_chunks(self, source: Source) -> Iterator[str]:
        for chunk in _chunks(source):
            if self.forbidden and self.forbidden in chunk:
                raise TokenizeError(
                    f"{source.label}: byte {ord(self.forbidden)} in the text, which marks the beginning of documents; "
                    "remove it from the input"
                )
            yield chunk

    def _text_documents(self, source: Source) -> Iterator[tuple[str, str]]:
        first = 1
        lines: list[str] = []
        for number, line in _lines(source):
            if self.documents == "line":
                yield f"{source.label}, line {number}", line
            elif line == self.marker if self.documents == "marker" else not line.strip():
                if lines or self.documents == "marker":
                    yield f"{source.label}, line {first}", "\n".join(lines).strip("\n")
                first, lines = number + 1, []
            else:
                lines.append(line)
        if any(lines):
            yield f"{source.label}, line {first}", "\n".join(lines).strip("\n")

    def _jsonl_documents(self, source: Source) -> Iterator[tuple[str, str]]:
        advice = f"one object a line is needed; of an array make lines with: jq -c '.[]' {source.name} > lines.jsonl"
        for number, line in _lines(source):
            if not line.strip():
                continue
            where = f"{source.label}, line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                array = f"; {advice}" if line.lstrip().startswith("[") else ""
                self._bad(where, f"not JSON ({error}){array}")
                continue
            if not isinstance(record, dict):
                array = f"; {advice}" if isinstance(record, list) else ""
                self._bad(where, f"a JSON object is needed, found {type(record).__name__}{array}")
                continue
            yield from self._string(where, record)

    def _parquet_documents(self, source: Source) -> Iterator[tuple[str, str]]:
        path, field = source.label, self.field
        if source.packed:
            raise TokenizeError(f"{path}: parquet is read as a file of its own; unpack it first")
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise TokenizeError(f"{path}: reading parquet takes pyarrow; install it") from error
        try:
            with pyarrow.parquet.ParquetFile(paths.fetch(path)) as file:
                names = file.schema_arrow.names
                column = field if field in names else field.partition(".")[0]
                if column not in names:
                    raise TokenizeError(f"{path}: no column {field!r}; it has {', '.join(names)}; use --field")
                row = 0
                for batch in file.iter_batches(batch_size=256, columns=[column]):
                    for value in batch.column(0).to_pylist():
                        yield from self._string(f"{path}, row {row}", {column: value})
                        row += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise TokenizeError(f"{path}: cannot be read as parquet: {error}") from error

    def _string(self, where: str, record: dict) -> Iterator[tuple[str, str]]:
        """(where, the text in the field), or nothing if it is bad and bad ones are skipped."""
        value, names = record, [self.field] if self.field in record else self.field.split(".")
        for name in names:
            if not isinstance(value, dict) or name not in value:
                there = ", ".join(value) if isinstance(value, dict) else type(value).__name__
                self._bad(where, f"no field {self.field!r}; it has {there or 'none'}; use --field")
                return
            value = value[name]
        if isinstance(value, str):
            yield where, value
        else:
            self._bad(where, f"field {self.field!r} is {type(value).__name__}, a text is needed")


def file_kind(path: str) -> str:
    """text, jsonl or parquet, by the name; a suffix for compression is passed over. Raises TokenizeError."""
    suffix = _suffix(_unpacked_name(path))
    for kind, suffixes in KINDS.items():
        if suffix in suffixes:
            return kind
    known = " ".join(suffix for suffixes in KINDS.values() for suffix in suffixes if suffix)
    raise TokenizeError(
        f"{path}: {suffix} is not read by its name ({known}, each alone or with {' '.join(PACKED)}); "
        "--kind text takes it as plain text, tables are first made JSONL or parquet"
    )


def _suffix(name: str) -> str:
    return os.path.splitext(os.path.basename(name))[1].lower()


def _unpacked_name(path: str) -> str:
    return os.path.splitext(path)[0] if _suffix(path) in PACKED else path


# -----------------------------------------------------------------------------------------------------------
# Pieces of a document


def cut(where: str, text: str) -> Iterator[Piece]:
    """A document as pieces, each but the last PIECE_CHARS or a little longer."""
    starts, begin = True, 0
    while begin < len(text):
        end = _cut_after(text, begin + PIECE_CHARS)
        yield Piece(where, starts, text[begin:end])
        starts, begin = False, end


def _cut_after(text: str, place: int) -> int:
    """The first place from `place` on where a text may be cut without changing its tokens, else its end.

    A "word" of more than _LONGEST_WORD characters is cut anyway; it must not fill the memory.
    """
    last = min(place + _LONGEST_WORD, len(text))
    found = _CUT.search(text, min(place, last), last)
    return found.start() if found else last


# -----------------------------------------------------------------------------------------------------------
# Bytes of a file, unpacked


class Source(NamedTuple):
    """One file, or one member of a zip archive. `label` names it in messages, `name` tells its kind."""

    label: str
    name: str
    packed: bool
    open: Callable[[], contextlib.AbstractContextManager]


def _sources(path: str) -> Iterator[Source]:
    """The file itself, or the members of a zip archive, each of which may be packed in turn."""
    if _suffix(path) != ".zip":
        yield Source(path, path, _suffix(path) in PACKED, partial(_unpacked, path, partial(_open_raw, path)))
        return
    with _readable(path), _open_raw(path) as file, zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if not names:
        raise TokenizeError(f"{path}: an archive without a file in it")
    if inner := [name for name in names if _suffix(name) == ".zip"]:
        raise TokenizeError(f"{path}, {inner[0]}: an archive inside an archive; unpack the outer one first")
    for name in names:
        opened = partial(_unpacked, name, partial(_open_member, path, name))
        yield Source(f"{path}, {name}", name if _suffix(name) else _unpacked_name(path), True, opened)


def _open_raw(path: str) -> Any:
    """A local or remote file as it is."""
    if paths.is_remote(path):
        import fsspec

        return fsspec.open(path, "rb").open()
    file = open(path, "rb", buffering=0)
    return file if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else _Pipe(file)


@contextlib.contextmanager
def _open_member(path: str, name: str) -> Iterator:
    with _open_raw(path) as file, zipfile.ZipFile(file) as archive, archive.open(name) as member:
        yield member


@contextlib.contextmanager
def _unpacked(name: str, open_packed: Callable) -> Iterator:
    """The file that `open_packed` opens, unpacked by the suffix of `name`: every member, stream or frame of it."""
    unpack = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile, ".zst": _Zstandard}.get(_suffix(name))
    with open_packed() as file:
        if unpack is None:
            yield file
        else:
            with unpack(fileobj=file) if unpack is gzip.GzipFile else unpack(file) as content:
                yield content


class _Zstandard:
    """Zstandard frames, one after the other. The library's own reader takes a cut file for a whole one."""

    def __init__(self, file):
        import zstandard

        self._file, self._held = file, b""
        self._begin = zstandard.ZstdDecompressor().decompressobj
        self._frame = None

    def read(self, size: int) -> bytes:
        """Some bytes, about `size` of the packed ones unpacked; b"" at the end. EOFError inside a frame."""
        while block := self._held or self._file.read(size):
            self._frame, self._held = self._frame or self._begin(), b""
            content = self._frame.decompress(block)
            if self._frame.eof:
                self._held, self._frame = self._frame.unused_data, None
            if content:
                return content
        if self._frame is not None:
            raise EOFError("it ends inside a zstandard frame")
        return b""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._held = b""


class _Pipe:
    """A pipe or terminal, read in waits of a fraction of a second, between which signals are noticed.

    A read that blocks would not end if the kernel gave the signal to another thread (numpy's library has some).
    """

    def __init__(self, file: Any):
        self._file = file

    def read(self, size: int) -> bytes:
        while not select.select([self._file], [], [], 0.2)[0]:
            pass
        return self._file.read(size)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


@contextlib.contextmanager
def _readable(label: str) -> Iterator[None]:
    """Turn what reading and unpacking raise into a TokenizeError that names the file."""
    try:
        yield
    except (TokenizeError, UnicodeDecodeError):
        raise
    except (OSError, EOFError, ImportError) as error:  # gzip raises EOFError and BadGzipFile, an OSError
        raise TokenizeError(f"{label}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except Exception as error:  # zlib.error, lzma.LZMAError, zipfile's and zstandard's, remote file systems'
        raise TokenizeError(f"{label}: cannot be read: {type(error).__name__}: {error}") from error


def _blocks(source: Source) -> Iterator[bytes]:
    with _readable(source.label), source.open() as file:
        while block := file.read(_READ_BYTES):
            yield block


def _chunks(source: Source) -> Iterator[str]:
    """The text of a file in chunks; line ends stay as they are, a byte-order mark is dropped."""
    decoder, read = codecs.getincrementaldecoder("utf-8-sig")(), 0
    try:
        for block in _blocks(source):
            read += len(block)
            yield decoder.decode(block)
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:  # its object ends with the last byte that was read
        place = read - len(error.object) + error.start
        raise TokenizeError(f"{source.label}: not UTF-8 text at byte {place:,} ({error.reason})") from error


def _lines(source: Source) -> Iterator[tuple[int, str]]:
    """Numbered lines without their ends. Only line feeds end lines (carriage returns before them are dropped).

    A byte that is no UTF-8 becomes a surrogate (U+DC80 and up), so that its line can be refused or passed over."""
    number, held = 0, []
    for block in _blocks(source):
        first, *more = block.split(b"\n")
        held.append(first)
        for line in more:
            number += 1
            yield number, _decoded(number, b"".join(held))
            held = [line]
    if any(held):
        yield number + 1, _decoded(number + 1, b"".join(held))


def _decoded(number: int, line: bytes) -> str:
    text = line.decode("utf-8", "surrogateescape").removesuffix("\r")
    return text.removeprefix("\ufeff") if number == 1 else text
