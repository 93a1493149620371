"""Download FineWeb as GPT-2 token shards, as many as asked for, from the Hugging Face hub.

    python -m data.fineweb --shards 30       # 30 x 100M tokens for the medium preset, and the validation
    shard python -m data.fineweb --shards 1        # enough to try

Each shard takes 200 MB. A download that was interrupted goes on where it stopped. Every file is checked: its size and
sha256 against the hub's, its header against its size. Files that are there and good are kept; when all are, no network
is needed. What was checked is noted in fineweb.json, so that the next start need not hash the files again (--verify
does). HF_HUB_OFFLINE, HF_ENDPOINT and HF_TOKEN mean what they mean to huggingface_hub.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data import paths, shards
from data.echo import program

REPOSITORY = "kjj0/fineweb10B-gpt2"  # 103 shards of 100M tokens of FineWeb's 10B sample, and one for validation
MAX_SHARDS = 103
DEFAULT_FOLDER = Path(__file__).with_name("fineweb10B")
_NOTES = "fineweb.json"


class DownloadError(RuntimeError):
    """Files that could not be had; the message names them, the cause, and what to do."""


class HubFile(NamedTuple):
    """What the hub says about a file."""

    size_bytes: int
    sha256: str | None


def file_names(num_shards: int) -> list[str]:
    """The validation shard and the first `num_shards` training shards."""
    return ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06d}.bin" for i in range(1, num_shards + 1))]


def fetch_shards(
    num_shards: int,
    folder: Path,
    *,
    repository: str = REPOSITORY,
    revision: str = "main",
    verify: bool = False,
    say: Callable[[str], None] = print,
) -> list[shards.ShardInfo]:
    """Have the validation shard and `num_shards` training shards in `folder`, checked. Returns them in that order.

    verify: hash files again that were checked before. Raises DownloadError.
    """
    names = file_names(num_shards)
    folder.mkdir(parents=True, exist_ok=True)
    with paths.locked(folder / ".lock"):
        notes = _read_notes(folder)
        missing = [name for name in names if not _good(folder / name, notes.get(name), verify)]
        if missing:
            try:
                facts = _ask_hub(missing, folder, repository, revision)
            except DownloadError:
                if not all(name not in notes and _is_shard(folder / name) for name in missing):
                    raise
                say(f"{len(missing)} shards were put there by other means; without the hub only headers were checked")
                return [shards.read_header(folder / name) for name in names]
            wanted = {}
            for name in missing:
                if _good(folder / name, facts[name], True):  # complete, but unknown to us: made by other means
                    notes[name] = facts[name]
                else:
                    wanted[name] = facts[name]
            _write_notes(folder, notes)
            _check_space(folder, wanted)
            for number, (name, fact) in enumerate(wanted.items(), 1):
                say(f"{name} ({fact.size_bytes / 1e6:.0f} MB), {number} of {len(wanted)}")
                _download(name, fact, folder, repository, revision)
                notes[name] = fact
                _write_notes(folder, notes)
        say(f"{len(names)} shards in {folder}: {len(missing) and len(wanted)} downloaded, the others were there")
        return [shards.read_header(folder / name) for name in names]


def _is_shard(path: Path) -> bool:
    """True if the header is valid and agrees with the size."""
    try:
        shards.read_header(path)
    except shards.ShardError:
        return False
    return True


def _good(path: Path, fact: HubFile | None, hashed: bool) -> bool:
    """True if the file has the known size, a valid header and, if asked, the known hash."""
    if fact is None or not _is_shard(path) or path.stat().st_size != fact.size_bytes:
        return False
    return not hashed or fact.sha256 is None or paths.file_sha256(path) == fact.sha256


def _ask_hub(names: list[str], folder: Path, repository: str, revision: str) -> dict[str, HubFile]:
    """Size and hash of each file."""
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()  # our own line a file does instead
    try:
        found = huggingface_hub.HfApi().get_paths_info(repository, names, repo_type="dataset", revision=revision)
    except Exception as error:  # errors of huggingface_hub, and of requests or httpx below it
        raise DownloadError(
            f"{len(names)} of the shards are not in {folder} (the first: {names[0]}), and {_explain(error, repository)}"
        ) from error
    facts = {f.path: HubFile(f.size, f.lfs.sha256 if getattr(f, "lfs", None) else None) for f in found}
    if absent := [name for name in names if name not in facts]:
        raise DownloadError(f"{repository} has no {absent[0]}" + (f" and {len(absent) - 1} more" * (len(absent) > 1)))
    return facts


def _download(name: str, fact: HubFile, folder: Path, repository: str, revision: str) -> None:
    """Download one file and check it; a damaged one is downloaded once more, from its beginning."""
    import huggingface_hub

    for again in (False, True):
        try:
            huggingface_hub.hf_hub_download(
                repository, name, repo_type="dataset", revision=revision, local_dir=folder, force_download=again
            )
        except Exception as error:
            raise DownloadError(f"{name}: {_explain(error, repository)}") from error
        if _good(folder / name, fact, True):
            return
    (folder / name).unlink(missing_ok=True)
    raise DownloadError(
        f"{name}: what arrived twice is not a shard with the size and sha256 that the hub states; "
        "try again later, and look for a proxy that changes downloads"
    )


def _explain(error: Exception, repository: str) -> str:
    """A sentence on why the hub did not answer as hoped."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE forbids to download them; unset it, or copy the files there by other means"
    if isinstance(error, errors.GatedRepoError):
        return f"{repository} asks for an account; set HF_TOKEN"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no data set {repository} on the hub, or it needs HF_TOKEN"
    if isinstance(error, OSError) and error.errno is not None and error.strerror:
        return f"{error.filename or 'the disk'}: {error.strerror}"
    return (
        f"the hub did not answer ({type(error).__name__}); is there a network? What has arrived is kept, and the "
        "same command goes on from there"
    )


def _check_space(folder: Path, wanted: dict[str, HubFile]) -> None:
    needed, free = sum(fact.size_bytes for fact in wanted.values()), shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free; ask for fewer "
            "shards, or name another folder with --out"
        )


def _read_notes(folder: Path) -> dict[str, HubFile]:
    """Files that were checked before: name -> size and hash. Damaged notes are the same as none."""
    try:
        notes = json.loads((folder / _NOTES).read_text(encoding="utf-8"))["files"]
        return {name: HubFile(int(size), digest) for name, (size, digest) in notes.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _write_notes(folder: Path, notes: dict[str, HubFile]) -> None:
    with paths.atomic_file(folder / _NOTES, "w") as file:
        json.dump({"schema": 1, "files": notes}, file, indent=1)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m data.fineweb",
        description="Download FineWeb as GPT-2 token shards: the validation shard and the first N training shards.",
        epilog="Exit codes: 0 done, 2 wrong usage, 3 not all files could be had, 130 interrupted.",
    )
    parser.add_argument(
        "--shards",
        type=int,
        default=30,
        metavar="N",
        help=f"training shards of 100M tokens (200 MB) each, 0 to {MAX_SHARDS}; default: %(default)s",
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER, metavar="DIR", help="default: data/fineweb10B")
    parser.add_argument("--repository", default=REPOSITORY, metavar="OWNER/NAME", help="default: %(default)s")
    parser.add_argument("--revision", default="main", help="branch, tag or commit; default: %(default)s")
    parser.add_argument("--verify", action="store_true", help="hash all files again")
    options = parser.parse_args(argv)
    if not 0 <= options.shards <= MAX_SHARDS:
        parser.error(f"--shards must be from 0 to {MAX_SHARDS}")
    try:
        fetch_shards(
            options.shards,
            options.out,
            repository=options.repository,
            revision=options.revision,
            verify=options.verify,
            say=lambda line: print(line, flush=True),
        )
    except (DownloadError, shards.ShardError) as error:
        print(f"data.fineweb: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"data.fineweb: {error.filename or options.out}: {error.strerror or error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("data.fineweb: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(program("data.fineweb", main))
