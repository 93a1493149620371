"""A series' folder: what the series is, its record, its logs, and who may work on it.

with sole_start(folder):
    series = open_series(folder, identity, trainer)     made, or checked to be the same series
    series.ledger, series.command("seed-000", 0, resume=False)
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.paths import write_text
from records.ledger import Ledger
from trainer.program import changed_files, now, text_hash

REPO = Path(__file__).resolve().parent.parent
SCHEMA = 1
EXIT_USAGE, EXIT_MORE_RUNS, EXIT_CRASHED = 2, 4, 6


class SeriesError(Exception):
    """The series cannot start or go on; the message says what was found and what to do."""

    def __init__(self, message: str, exit_code: int = EXIT_USAGE):
        super().__init__(message)
        self.exit_code = exit_code


# -----------------------------------------------------------------------------------------------------------
# What a series is


@dataclass(frozen=True)
class Identity:
    """What makes runs comparable; a series never changes it."""

    name: str
    preset: str
    overrides: dict[str, str]
    nproc: int
    code: dict[str, str] = field(repr=False)

    def differences(self, other: Identity) -> list[str]:
        """What `other` does differently, in words."""
        found = []
        for what in ("preset", "nproc"):
            mine, theirs = getattr(self, what), getattr(other, what)
            if mine != theirs:
                found.append(f"--{what} was {mine}, now {theirs}")
        for key in sorted(self.overrides.keys() | other.overrides.keys()):
            mine, theirs = self.overrides.get(key, "not given"), other.overrides.get(key, "not given")
            if mine != theirs:
                found.append(f"--{key} was {mine}, now {theirs}")
        if changed := changed_files(self.code, other.code):
            found.append("changed code: " + ", ".join(changed))
        return found


@dataclass(frozen=True)
class Series:
    """A series' folder, with what it is and the ledger of what happened."""

    folder: Path
    identity: Identity
    trainer: Path
    plan_hash: str = ""

    @property
    def ledger(self) -> Ledger:
        """The ledger of this series."""
        return Ledger(self.folder)

    @property
    def runs_folder(self) -> Path:
        """Where logs and their JSON lie."""
        return self.folder / "runs"

    def checkpoints(self, run: str) -> list[Path]:
        """Checkpoints that a run left, oldest first."""
        found = (self.runs_folder / f"{run}.checkpoints").glob("*.safetensors")
        return sorted(found, key=lambda path: (len(path.name), path.name))  # by number, beyond six digits too

    def command(self, run: str, seed: int, *, resume: bool) -> list[str]:
        """The trainer's command line for a run."""
        return self.command_of(self.identity, self.runs_folder, run, seed, resume=resume)

    def command_of(self, identity: Identity, into: Path, run: str, seed: int, *, resume: bool) -> list[str]:
        """The trainer's command line for a run of that configuration, which writes into that folder."""
        launch = [sys.executable]
        if identity.nproc > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={identity.nproc}"]
        # Relative, since the log prints it and logs are published.
        output = os.path.relpath(into)
        command = [*launch, str(self.trainer), f"--preset={identity.preset}"]
        command += [f"--{key}={text}" for key, text in identity.overrides.items()]
        command += [f"--seed={seed}", f"--output_dir={output}", f"--run_name={run}"]
        if "save_final" not in identity.overrides and seed > 0:
            command.append("--save_final=false")  # one trained model is for keeping; nineteen fill a disk
        if self.plan_hash:
            command.append(f"--plan_hash={self.plan_hash}")
        if resume:
            command.append("--resume=auto")
        return command


def write_record(folder: Path, record: dict) -> None:
    """Replace record.json whole or not at all."""
    write_text(folder / "record.json", json.dumps(record, indent=1) + "\n")


def read_record(folder: Path) -> dict | None:
    """record.json, None if there is none. Raises SeriesError if it is broken."""
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if isinstance(record["identity"], dict) else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise SeriesError(f"{path}: not a series' record ({error}); restore it or use another --name") from None


def open_series(folder: Path, wanted: Identity, trainer: Path) -> Series:
    """Create the folder, or check that the series in it is the same one. Raises SeriesError if not."""
    record = read_record(folder)
    if record is None:
        if Ledger(folder).events():
            raise SeriesError(f"{folder} has a ledger but no record.json; restore it or use another --name")
        for part in ("runs", "source"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        text = trainer.read_text(encoding="utf-8")
        digest = text_hash(text)
        (folder / "source" / f"{digest[:16]}.py").write_text(text.rstrip("\r\n") + "\n", encoding="utf-8")
        write_record(
            folder,
            {"schema": SCHEMA, "created": now(), "identity": asdict(wanted), "code_hash": digest, "plan_hash": ""},
        )
        return Series(folder, wanted, trainer)
    was = Identity(**record["identity"])
    different = was.differences(wanted)
    if different:
        raise SeriesError(
            f"{folder} is another series: {'; '.join(different)}. "
            "Give the same flags and code to continue it, or another --name to start a new one"
        )
    return Series(folder, was, trainer, record.get("plan_hash", ""))


@contextmanager
def sole_start(folder: Path) -> Iterator[None]:
    """Hold the series for this process. Raises SeriesError if another start holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    while True:
        lock = open(path, "a+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            lock.close()
            raise SeriesError(
                f"{folder} is in use by another start (process {holder}); wait for it, or use another --name"
            ) from None
        # The holder before us may have removed the file between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
            break
        lock.close()
    lock.truncate(0)
    lock.write(f"{os.getpid()}\n")
    lock.flush()
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.close()


def set_aside(series: Series, run: str, attempt: int) -> None:
    """Move what an earlier attempt left out of runs/: the next one starts clean, and nothing is lost."""
    aside = series.folder / "attempts"
    aside.mkdir(exist_ok=True)
    for suffix in (".txt", ".json"):
        path = series.runs_folder / f"{run}{suffix}"
        if path.exists():
            os.replace(path, aside / f"{run}.{attempt}{suffix}")
    old = series.runs_folder / f"{run}.checkpoints"
    if old.exists():
        shutil.rmtree(old)  # of an attempt that cannot be resumed, or need not be
