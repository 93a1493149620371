"""Where files live: local folders, or any fsspec URL (s3://, gs://, memory://, ...) behind a local cache.

Every reader of shards goes through the functions here, so that a file far away behaves like a file at hand:

    expand("s3://bucket/train_*.bin")   -> the sorted URLs that match
    read_range(url, 0, 1024)            -> some bytes, without a download
    fetch(url)                          -> the path of a local copy, downloaded once for all processes

The cache lies in `SPEEDRUN_CACHE`, else `$XDG_CACHE_HOME/speedrun`, else `~/.cache/speedrun`. Its entries are
keyed by URL, size and the store's own version mark (ETag, generation or time), so a changed object is
downloaded anew. They are never deleted here: to free the space, delete the folder. Credentials are whatever
fsspec's back end finds (environment variables, configuration files); back ends other than local, memory and
HTTP are installed separately (s3fs, gcsfs).
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_COPY_BYTES = 4 << 20  # one read of a download
_COMMAS = re.compile(r",(?![^\[\]]*\])")  # but none inside brackets
_SCHEME = re.compile(r"^([A-Za-z][A-Za-z0-9+.\-]+)(::|://)")  # two letters or more: C:\ is a drive, not a scheme


class PathError(ValueError):
    """A path or URL that cannot be listed, read or fetched; the message names it and the cause."""


def is_remote(path: str | os.PathLike) -> bool:
    """True for an fsspec URL; `file://` URLs count as local."""
    found = _SCHEME.match(os.fspath(path))
    return found is not None and found.group(1) != "file"


def expand(patterns: str | os.PathLike | Sequence[str | os.PathLike]) -> list[str]:
    """The files that `patterns` name: each a path, URL or glob; a string may hold several, divided by commas.

    Matches of one pattern are sorted by name, numbers in them by value (part2 before part10); patterns keep their
    order. Raises PathError for a pattern that
    matches nothing, and for a file that is named twice (overlapping globs would repeat data silently).
    """
    if isinstance(patterns, (str, os.PathLike)):
        text = os.fspath(patterns)
        patterns = [text] if os.path.exists(text) else [part.strip() for part in _COMMAS.split(text) if part.strip()]
    files: list[str] = []
    for pattern in (os.fspath(one) for one in patterns):
        matches = _matches(pattern)
        if not matches:
            raise PathError(f"{pattern}: no such file, or no file matches this pattern (searched from {os.getcwd()})")
        files.extend(matches)
    if not files:
        raise PathError("no files were named")
    for name in files:
        if files.count(name) > 1:
            raise PathError(f"{name}: named {files.count(name)} times; name each file once")
    return files


def escaped(folder: str | os.PathLike) -> str:
    """A local folder as the beginning of a pattern: its marks and commas stand for themselves."""
    return glob.escape(os.fspath(folder)).replace(",", "[,]")


def _matches(pattern: str) -> list[str]:
    if not is_remote(pattern):
        local = local_path(pattern)
        found = [local] if os.path.exists(local) else [p for p in glob.glob(local) if not os.path.isdir(p)]
        return sorted(found, key=natural)
    with _blamed(pattern):
        file_system, path = _file_system(pattern)
        if not any(mark in path for mark in "*?["):
            return [pattern] if file_system.exists(path) else []
        return sorted(map(file_system.unstrip_protocol, file_system.glob(path)), key=natural)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts names as people count: digits by their value, all else as text."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"([0-9]+)", name)]


def file_size(path: str) -> int:
    """Bytes of a local or remote file."""
    with _blamed(path):
        if not is_remote(path):
            return os.stat(local_path(path)).st_size
        file_system, inner = _file_system(path)
        return int(file_system.info(inner)["size"])


def read_range(path: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a local or remote file, cut at its end; nothing is cached."""
    with _blamed(path):
        if is_remote(path):
            file_system, inner = _file_system(path)
            stop = min(stop, int(file_system.info(inner)["size"]))  # some stores refuse ranges past the end
            return file_system.cat_file(inner, start=start, end=stop) if start < stop else b""
        with open(local_path(path), "rb") as file:
            file.seek(start)
            return file.read(stop - start)


def cache_folder() -> Path:
    """Folder of the local copies of remote files."""
    if folder := os.environ.get("SPEEDRUN_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "speedrun"


def fetch(path: str) -> Path:
    """A local file with the content of `path`: itself if it is local, else its copy in the cache.

    Safe between processes (one downloads, the others wait) and against interruption (a copy appears whole or
    not at all). Raises PathError when the download fails or the copy has another size than the store reports.
    """
    if not is_remote(path):
        return Path(local_path(path))
    with _blamed(path):
        file_system, inner = _file_system(path)
        info = file_system.info(inner)
        mark = next(
            (info[key] for key in ("ETag", "etag", "generation", "LastModified", "mtime", "created") if info.get(key)),
            "",
        )
        key = hashlib.sha256(f"{path}\n{info['size']}\n{mark}".encode()).hexdigest()[:24]
        copy = cache_folder() / "files" / key / os.path.basename(inner)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with locked(copy.parent / "lock"):
            if not copy.exists():
                with atomic_file(copy) as target, file_system.open(inner, "rb") as source:
                    while block := source.read(_COPY_BYTES):
                        target.write(block)
                    if target.tell() != info["size"]:
                        raise PathError(f"{path}: {target.tell()} bytes arrived of {info['size']}; try again")
        return copy


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike, mode: str = "wb") -> Iterator:
    """Open a temporary file beside `path` that takes its place, synced, when the block ends well.

    On any exception, KeyboardInterrupt included, the temporary file is removed and `path` stays as it was.
    Names of temporary files start with a dot and end in `.part`, so that no glob for shards finds them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        encoding, newline = (None, None) if "b" in mode else ("utf-8", "\n")
        os.close(handle)
        with open(
            temporary, mode, encoding=encoding, newline=newline
        ) as file:  # by name, so that file.name can be handed to other writers
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes files private; a data set is shared as usual
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write does not say of its own accord which file it was
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a file so that it is the old one or the new one at every moment."""
    with atomic_file(path, "w") as file:
        file.write(text)


def file_sha256(path: str | os.PathLike) -> str:
    """sha256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_COPY_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make a renaming last through a power cut, where the file system lets folders be synced."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    """The process's umask, which can only be read by setting it: strict meanwhile, for other threads."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def locked(path: str | os.PathLike) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` between processes; the kernel frees it if its holder dies."""
    import fcntl

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def local_path(path: str) -> str:
    path = os.fspath(path)
    return os.path.expanduser(path[7:] if path.startswith("file://") else path)


def _file_system(url: str) -> tuple[Any, str]:
    import fsspec

    return fsspec.core.url_to_fs(url)


@contextlib.contextmanager
def _blamed(path: str) -> Iterator[None]:
    """Turn whatever a file system raises into a PathError that names the file."""
    try:
        yield
    except PathError:
        raise
    except FileNotFoundError:
        raise PathError(f"{path}: no such file") from None
    except ImportError as error:
        raise PathError(f"{path}: {error}") from error
    except Exception as error:  # back ends raise their own kinds (botocore, gcsfs, aiohttp)
        if isinstance(error, OSError) and error.strerror:
            raise PathError(f"{path}: {error.strerror}") from error
        raise PathError(f"{path}: {type(error).__name__}: {error}") from error
