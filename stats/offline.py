"""Offline files of Weights & Biases, `wandb/offline-run-*/run-<id>.wandb`: what a run logged before it was synced.

The file is a log of records in LevelDB's format (blocks of 32 KiB; a record is one chunk or several, each with a
checksum), and a record is a message of the library's own definition, which reads it here:
https://github.com/google/leveldb/blob/main/doc/log_format.md
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from stats.errors import DataError, NoReader
from stats.runs import EmptyLog
from stats.tables import meaning_of, runs_of_rows, understood
from stats.values import Run

SUFFIX = ".wandb"
_MAGIC = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_BLOCK, _CHUNK = 32 << 10, struct.Struct("<IHB")  # bytes; checksum, length, kind
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
#: Fields of a configuration that belong to one run, or to the library, and change nothing of what is computed.
_OF_ONE_RUN = frozenset("_wandb run_name wandb_run_name name output_dir out_dir logging_dir data_seed".split())


def read_offline(path: str | Path) -> list[Run]:
    """The run of one such file.

    Raises NoReader without the library, EmptyLog where no loss was logged, DataError for a damaged file.
    """
    path = Path(path)
    try:
        from wandb.proto import wandb_internal_pb2 as messages
    except ImportError:
        raise NoReader(
            "an offline file of Weights & Biases; reading it needs `pip install wandb`, or `wandb sync` it and export "
            "the run's history as CSV",
            path,
        ) from None
    rows: list[dict] = []
    config: dict[str, Any] = {}
    started, name, host, state = False, path.stem, None, "running, or killed"
    for number, data in enumerate(_records(path.read_bytes(), path), 1):
        record = messages.Record()
        try:
            record.ParseFromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "run":
                started, name, host = True, record.run.display_name or record.run.run_id, record.run.host or None
                config |= _values(record.run.config.update)
            elif kind == "config":
                config |= _values(record.config.update)
            elif kind == "history":
                rows.append({"line": None, **dict(sorted(_values(record.history.item).items()))})
            elif kind == "exit":
                code = record.exit.exit_code
                state = "finished" if code == 0 else f"crashed (exit code {code})"
        except ValueError as error:  # json's, and in newer releases the messages' own
            raise DataError(f"record {number} is not what Weights & Biases writes: {error}", path) from None
        except Exception as error:  # protobuf's DecodeError has no class of the standard library above it
            raise DataError(f"record {number} cannot be decoded: {type(error).__name__}", path) from None
    if not started:
        raise EmptyLog("no run in it: it is starting, or was killed before it had", path)
    taken, others = understood(dict.fromkeys(key for row in rows for key in row), str(path))
    if "loss" not in taken.values():
        logged = ", ".join(map(repr, others[:8])) or "nothing"
        raise EmptyLog(f"none of what was logged ({logged}) is a validation loss; the run is {state}", path)
    (run,) = runs_of_rows([{"run": name, **row} for row in rows], str(path))
    return [_with_facts(run, config, state, host)]


def _with_facts(run: Run, config: dict[str, Any], state: str, host: str | None) -> Run:
    """`run` with what the file tells beside its history."""
    told = {meaning_of(key): key for key in reversed(config)}
    seed, planned = (config.get(told.get(meaning, "")) for meaning in ("seed", "planned_steps"))
    origin = (run.origin or "").replace("table: run from 'run', ", "offline file of Weights & Biases: ")
    facts: dict[str, Any] = {"dialect": "wandb", "host": host, "state": state}
    if isinstance(seed, int):
        facts["seed"] = seed
        origin += f"; seed from its configuration's {told['seed']!r}"
    if isinstance(planned, int) and planned > 0:
        facts["planned_steps"] = planned
        origin += f"; planned steps from its configuration's {told['planned_steps']!r}"
    facts["config"] = {key: value for key, value in config.items() if key not in _OF_ONE_RUN | {told.get("seed")}}
    return replace(run, origin=origin, **facts)


def _values(items: Any) -> dict[str, Any]:
    """{name: value} of the items of a message; the parts of a nested name are joined by points."""
    return {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items if item.value_json}


def _records(data: bytes, path: Path) -> Iterator[bytes]:
    """The records of a file. One that was being written when the file ends, or was read, has not happened yet."""
    if data[: len(_MAGIC)] != _MAGIC:
        raise DataError("not an offline file of Weights & Biases, or of a release that writes another format", path)
    at, parts = len(_MAGIC), list[bytes]()
    while len(data) - at >= _CHUNK.size:
        if (left := _BLOCK - at % _BLOCK) < _CHUNK.size:  # the end of a block is filled with zeros
            at += left
            continue
        checksum, length, kind = _CHUNK.unpack_from(data, at)
        body = data[at + _CHUNK.size : at + _CHUNK.size + length]
        if len(body) < length:
            return
        whole = kind in (_FULL, _FIRST) if not parts else kind in (_MIDDLE, _LAST)
        if not whole or zlib.crc32(body, zlib.crc32(bytes([kind]))) != checksum:
            raise DataError(f"damaged at byte {at}: a chunk's checksum or place is wrong", path)
        parts.append(body)
        at += _CHUNK.size + length
        if kind in (_FULL, _LAST):
            yield b"".join(parts)
            parts = []
