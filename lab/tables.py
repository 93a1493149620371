"""Rows of outside files: CSV and JSON lines, each error with its file and line."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab import LabError

MOST_FIELD_CHARS = 1 << 27  # of one CSV cell; Python's own limit of 131,072 is less than a long story


def read_utf8(path: str | Path) -> str:
    """The text of a file; LabError if it cannot be read, is not UTF-8 or is empty."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise LabError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise LabError(f"{path}, line {line}: not UTF-8; convert the file") from error
    if not text.strip():
        raise LabError(f"{path} is empty")
    return text


def json_lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, object) of every line of a file of JSON lines; `where` names file and line. LabError for a line that
    is no object."""
    for number, line in enumerate(read_utf8(path).replace("\r\n", "\n").split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            told = json.loads(line)
        except ValueError as error:
            raise LabError(f"{where}: not JSON ({error})") from error
        if not isinstance(told, dict):
            raise LabError(f'{where}: an object {{"...": ...}} is needed, not {line[:40]!r}')
        yield where, told


def csv_rows(path: str | Path, delimiter: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
    """(where, {column: cell}) of every row of a CSV file with a header. LabError for rows of another length."""
    csv.field_size_limit(MOST_FIELD_CHARS)
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader)
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not row:
                continue
            if len(row) != len(header):
                raise LabError(f"{where}: {len(row)} cells under a header of {len(header)} ({', '.join(header)[:80]})")
            yield where, dict(zip(header, row))
    except csv.Error as error:
        raise LabError(f"{path}, line {reader.line_num}: not CSV ({error})") from error


def text_of(where: str, row: dict[str, Any], column: str) -> str:
    """The text in `column`; LabError names the row and the columns that are there."""
    value = row.get(column)
    if not isinstance(value, str):
        there = ", ".join(map(str, row)) or "nothing"
        raise LabError(f"{where}: no text under {column!r}; there is {there[:120]}")
    return value


def read_table(path: str | Path, column: str) -> list[str]:
    """The texts of one column of a CSV or JSON-lines file, in order."""
    rows = csv_rows(path) if str(path).lower().endswith(".csv") else json_lines(path)
    return [text_of(where, row, column) for where, row in rows]
