"""A run's log and the JSON beside it, in the folder of a series: read, moved into form once, sealed."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from data.paths import write_text
from trainer.program import text_hash


def read_run_json(path: Path) -> dict:
    """A run's JSON, or {} if it is absent or broken (a trainer that died while writing it)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def trim_log(folder: Path, run: str) -> bool:
    """Move the source at a log's head to source/ (kept once), leaving one line; True if that was done.

    A log whose head is not the source that the run's JSON names stays as it is: no evidence is rewritten on
    a guess.
    """
    path = folder / "runs" / f"{run}.txt"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return False
    separator = re.search(r"^={60,}[ \t\r]*$", text, re.MULTILINE)
    if not separator or text.startswith("source sha256:"):
        return False
    source = text[: separator.start()]
    digest = text_hash(source)
    named = read_run_json(folder / "runs" / f"{run}.json").get("code_hash")
    if named is not None and named not in (digest, hashlib.sha256(source.encode()).hexdigest()):
        return False
    kept = folder / "source" / f"{digest[:16]}.py"
    if not kept.exists():
        write_text(kept, source.rstrip("\r\n") + "\n")
    write_text(path, f"source sha256:{digest} kept in source/{kept.name}\n" + text[separator.start() :])
    return True


def sealed(folder: Path, run: str) -> dict[str, str]:
    """{"log": sha256, "json": sha256} of what a run left, for the line of its end in the ledger."""
    found = {}
    for key, suffix in (("log", ".txt"), ("json", ".json")):
        path = folder / "runs" / f"{run}{suffix}"
        if path.is_file():
            found[key] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
