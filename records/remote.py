"""Copy a series to another place: an object store, a mounted share, anything that fsspec reaches.

    python -m records.remote records/nano s3://bucket/records     # -> s3://bucket/records/nano/...
    ./run.sh --repeats 19 --copy-to s3://bucket/records           # after every run, and at the end

A copy adds and replaces, and deletes nothing. The target keeps a manifest of hashes, written last: files that it has
already are not sent again, and a copy that was cut off is repaired by the next one. Checkpoints stay at home.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.options import command

MANIFEST = "manifest.json"
# They have no folders: making one would create a bucket, perhaps one that is merely misspelt.
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci"}


class CopyError(Exception):
    """The series could not be copied; the message names the place and the cause."""


def files_of(folder: Path) -> dict[str, Path]:
    """{name in the copy: path} of what a series consists of: no checkpoints, no locks, nothing hidden."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") or part.endswith(".checkpoints") for part in name.parts)
        if path.is_file() and not hidden and path.suffix != ".safetensors" and name.as_posix() != MANIFEST:
            found[name.as_posix()] = path
    return found


def copy_series(folder: str | Path, url: str) -> list[str]:
    """Bring `<url>/<series>` up to date; returns the names that were sent. Raises CopyError."""
    import fsspec

    folder = Path(folder).resolve()
    if not (folder / "record.json").exists():
        raise CopyError(f"{folder} is no series: it has no record.json")
    try:
        system, root = fsspec.core.url_to_fs(url)
        target = f"{root.rstrip('/')}/{folder.name}"
        protocols = {system.protocol} if isinstance(system.protocol, str) else set(system.protocol)
        in_object_store = bool(protocols & OBJECT_STORES)
        known = _read_manifest(system, target)
        sent = []
        for name, path in files_of(folder).items():
            data = path.read_bytes()
            digest = hashlib.sha256(data).hexdigest()
            if known.get(name) == digest:
                continue
            where = f"{target}/{name}"
            if not in_object_store:
                system.makedirs(where.rpartition("/")[0], exist_ok=True)
            system.pipe_file(where, data)
            if system.size(where) != len(data):
                raise CopyError(f"{url}: {name} arrived with {system.size(where)} of {len(data)} bytes")
            known[name] = digest
            sent.append(name)
        if sent:
            system.pipe_file(f"{target}/{MANIFEST}", json.dumps(known, indent=1, sort_keys=True).encode())
    except CopyError:
        raise
    except ImportError as error:
        raise CopyError(f"{url}: {error}") from None
    except Exception as error:  # every back end has its own kinds of errors
        raise CopyError(f"{url}: cannot copy {folder.name}: {type(error).__name__}: {error}") from error
    return sent


def _read_manifest(system, target: str) -> dict[str, str]:
    """Hashes of what the target has; none if there is no manifest or it is broken."""
    system.invalidate_cache()
    try:
        manifest = json.loads(system.cat_file(f"{target}/{MANIFEST}"))
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


@dataclass(frozen=True)
class Options:
    """Two words: the series' folder, and the folder or URL in which one of its name is made."""


def main(argv: Sequence[str] | None = None) -> int:
    """Copy one series; returns the exit code (0, or 5 if it could not be copied)."""
    (folder, url), _ = command(__doc__, argv, Options, (2, 2))
    try:
        sent = copy_series(Path(folder), url)
    except CopyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 5
    print(f"{len(sent)} files sent to {url.rstrip('/')}/{Path(folder).resolve().name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
