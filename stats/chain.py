"""A ledger whose lines hold together: each names the hash of everything before it.

    {"event": "end", ..., "before": "<hash of all bytes above this line>"}

A line that is changed, taken out or moved breaks every link below it. The hash of the whole file is its *head*. Whoever
can write the file can also write all its links anew, so a chain proves order only against a head that was published
in time: `cut_at` finds the place up to which a ledger still is what it was then.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator

from stats.values import Problem

KEY = "before"
HEX_DIGITS = 32
HEAD = re.compile(r"[0-9a-f]{16,64}")


def link(before: bytes) -> str:
    """The hash of `before`, the bytes of all lines above the next one. Of a whole ledger: its head."""
    return hashlib.sha256(before).hexdigest()[:HEX_DIGITS]


def lines_of(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(number from 1, offset, line with its newline) of every whole line; one that is still being written is none."""
    offset = 0
    for number, line in enumerate(data.splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            yield number, offset, line
        offset += len(line)


def check_links(data: bytes) -> tuple[int, list[Problem]]:
    """(lines that carry a link, what does not hold). A ledger may have begun before there were links; from the first
    one on every line needs its own."""
    linked, problems = 0, []
    for number, offset, line in lines_of(data):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        told = event.get(KEY) if isinstance(event, dict) else None
        if told is None:
            if linked:
                problems.append(Problem(number, "this line carries no link to the lines above it: it was put in later"))
            continue
        linked += 1
        if told != link(data[:offset]):
            problems.append(Problem(number, "the lines above are not those that stood there when it was written"))
    return linked, problems


def cut_at(data: bytes, head: str) -> int | None:
    """The number of lines that `head` was published of; None if no beginning of this ledger has that head."""
    ends = [0, *(offset + len(line) for _, offset, line in lines_of(data))]
    return next((n for n, end in enumerate(ends) if hashlib.sha256(data[:end]).hexdigest().startswith(head)), None)
