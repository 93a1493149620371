"""The queue of trainings, on disk: nothing is lost when a page is closed, the studio ends or the power goes.

    <folder>/<id>/training.json    what is to run; never changed         wish.json   what the user wants of it
                  ledger.jsonl     every launch and its end (records/)   runs/       the trainer's log and JSON
                  attempts/        what a crashed attempt printed
    <folder>/runner.lock           held by the one process that works the queue off

One training runs at a time, in a process of its own. The runner (`python -m lab.studio.jobs FOLDER`) is a
process apart from the studio, so trainings go on while no page is open. Asked to pause or stop, the trainer
writes a checkpoint and ends, so that the clock in its log counts training only. A paused training keeps its
place and the queue waits for it; a stopped one makes room for the next, and queues up again when resumed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path

from data.paths import atomic_file
from lab.studio.places import REPO
from records.launch import Job, Slot
from records.ledger import Ledger, RunState, process_lives
from records.logs import read_run_json
from records.runner import run_name
from trainer.options import command
from trainer.program import now

POLL_S = 0.2
KILL_AFTER_S = 60.0  # a trainer that was asked to stop and does not is killed; its last checkpoint stays
WISHES = ("run", "pause", "stop")
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,80}\Z")
_BUSY = ("running", "pausing", "stopping")


class QueueError(ValueError):
    """A request that the queue cannot follow; the message says why."""


@dataclass(frozen=True)
class Training:
    """What is to run, as training.json keeps it."""

    title: str
    command: tuple[str, ...]  # after `python`; --output_dir and --run_name are added
    resume: tuple[str, ...]  # appended from the second launch on
    steps: int
    settings: dict = field(default_factory=dict)  # what the page asked for, to show it again
    floor: float | None = None  # nats below which no model can go, where known
    seed: int = 0
    created: str = ""


@dataclass(frozen=True)
class Entry:
    """A training in the queue: what it is, what is wished and what the ledger says."""

    id: str
    folder: Path
    training: Training
    wish: dict
    run: RunState | None

    @property
    def name(self) -> str:
        """The run's, as the trainer calls it: a training is a series of one run, in the layout that stats reads."""
        return run_name(self.training.seed)

    @property
    def launches(self) -> int:
        return len(self.run.attempts) if self.run else 0

    @property
    def state(self) -> str:
        """queued, running, pausing, paused, stopping, stopped, finished or failed."""
        status = self.run.attempts[-1].status if self.launches else "new"
        wish = self.wish["wish"]
        if status == "lost" and _lives(self.run.attempts[-1].launch):
            status = "running"  # the trainer has ended, and its runner is about to write how
        if status == "running":
            return {"run": "running", "pause": "pausing", "stop": "stopping"}[wish]
        if status == "finished":
            return "finished"
        if wish == "run" and self.wish["launches"] == self.launches:
            return "queued"
        if status in ("crashed", "elsewhere"):
            return "failed"
        return "paused" if wish == "pause" else "stopped"

    @property
    def message(self) -> str:
        """Why it failed, or ''."""
        if self.state != "failed":
            return ""
        end = self.run.attempts[-1].end or {}
        return str(end.get("error") or f"exit code {end.get('exit_code')}")

    @property
    def output(self) -> str:
        """The last lines that a failed training printed."""
        path = self.folder / "attempts" / f"{self.name}.{self.launches}.output"
        with contextlib.suppress(OSError):
            return path.read_bytes()[-4000:].decode("utf-8", "replace")
        return ""

    @property
    def log(self) -> Path:
        return self.folder / "runs" / f"{self.name}.txt"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "runs" / f"{self.name}.checkpoints"

    @property
    def summary(self) -> dict:
        """The trainer's JSON, {} before there is one."""
        return read_run_json(self.folder / "runs" / f"{self.name}.json")

    def command(self) -> list[str]:
        """The next launch's command line."""
        place = [f"--output_dir={self.folder}"]
        if self.training.command[0] == "train_gpt.py":
            place = [f"--output_dir={self.folder / 'runs'}", f"--run_name={self.name}"]
        again = self.training.resume if self.launches else ()
        return [sys.executable, *self.training.command, *place, *again]


class Queue:
    """The trainings below `folder`, from any process."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def add(self, training: Training) -> str:
        """Queue a training; returns its id. The runner is not started: see `work`."""
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
        name = re.sub(r"[^a-z0-9]+", "-", training.title.lower()).strip("-")[:40]
        id = f"{stamp}-{name}-{uuid.uuid4().hex[:4]}"
        told = asdict(training) | {"created": now()}
        _write(self.folder / id / "wish.json", _wish("run", 0))
        _write(self.folder / id / "training.json", told)  # last: from here on the entry exists
        return id

    def entry(self, id: str) -> Entry:
        """The training named `id`; QueueError if there is none."""
        folder = self.folder / str(id)
        if not _ID.match(str(id)) or not (folder / "training.json").is_file():
            raise QueueError(f"there is no training {str(id)[:80]!r}; refresh the list")
        told = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        told["command"], told["resume"] = tuple(told["command"]), tuple(told["resume"])
        wish = read_run_json(folder / "wish.json") or _wish("stop", 0)
        training = Training(**told)
        runs = Ledger(folder).runs() if (folder / "ledger.jsonl").exists() else {}
        return Entry(folder.name, folder, training, wish, runs.get(run_name(training.seed)))

    def entries(self) -> list[Entry]:
        """All trainings, in the order in which they were queued (a resumed one from then on)."""
        found = []
        for path in self.folder.glob("*/training.json"):
            with contextlib.suppress(QueueError, OSError, ValueError):
                found.append(self.entry(path.parent.name))
        return sorted(found, key=lambda entry: (entry.wish["since"], entry.id))

    def next(self) -> Entry | None:
        """What the runner starts next: the first queued training, unless a paused one before it waits."""
        for entry in self.entries():
            if entry.state in ("paused", *_BUSY):
                return None
            if entry.state == "queued":
                return entry
        return None

    def wish(self, id: str, wish: str) -> str:
        """Ask for a training to run, pause or stop; returns what will happen. QueueError if it cannot."""
        entry = self.entry(id)
        state = entry.state
        allowed = {
            "pause": ("queued", "running"),
            "stop": ("queued", "running", "pausing", "paused"),
            "run": ("paused", "stopped", "failed"),
        }
        if wish not in WISHES or state not in allowed[wish]:
            words = {"run": "resumed", "pause": "paused", "stop": "stopped"}.get(wish, wish)
            raise QueueError(f"{entry.training.title} is {state}: it cannot be {words}")
        since = entry.wish["since"]
        if wish == "run" and state != "paused":
            since = time.time()
        _write(entry.folder / "wish.json", _wish(wish, entry.launches, since))
        return {"run": "queued again", "pause": "pausing", "stop": "stopping"}[wish]

    def remove(self, id: str) -> Path:
        """Move a training that is not running, with everything it wrote, to the trash beside the queue; returns where
        it lies now."""
        entry = self.entry(id)
        if entry.state in _BUSY:
            raise QueueError(f"{entry.training.title} is {entry.state}; stop it first")
        trash = self.folder.with_name("trash")
        trash.mkdir(exist_ok=True)
        return entry.folder.rename(trash / entry.id)

    def put_back(self, id: str) -> None:
        """Take a training back from the trash; one that waited stays stopped until it is resumed."""
        removed = self.folder.with_name("trash") / str(id)
        if not _ID.match(str(id)) or not removed.is_dir():
            raise QueueError(f"{str(id)[:80]!r} is not in the trash")
        _write(removed / "wish.json", read_run_json(removed / "wish.json") | {"wish": "stop"})
        removed.rename(self.folder / removed.name)

    def work(self) -> None:
        """Start a runner if there is something to run and nobody works on it."""
        if self.next() is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with _lock(self.folder) as ours:
            if not ours:
                return
        with open(self.folder / "runner.log", "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", "lab.studio.jobs", str(self.folder)],
                cwd=REPO,
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )


def _lives(event: dict) -> bool:
    """Whether the process that wrote a ledger's event is still there."""
    return process_lives(event.get("pid", -1), event.get("pid_start"))


def _wish(wish: str, launches: int, since: float | None = None) -> dict:
    return {"wish": wish, "launches": launches, "since": time.time() if since is None else since}


def _write(path: Path, value: dict) -> None:
    with atomic_file(path, "w") as file:
        json.dump(value, file, indent=1)


@contextlib.contextmanager
def _lock(folder: Path, wait_s: float = 0.0):
    """True if this process now is the only runner of `folder`, until the block ends."""
    with open(folder / "runner.lock", "a") as file:
        until = time.monotonic() + wait_s
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() >= until:
                    yield False
                    return
                time.sleep(POLL_S)
        yield True


class Runner:
    """Works a queue off: one training at a time, the user's wishes followed while it runs."""

    def __init__(self, queue: Queue):
        self.queue, self.leaving = queue, 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._asked)

    def _asked(self, number, frame) -> None:
        self.leaving = number

    def work(self) -> None:
        """Until nothing is queued, a paused training comes first, or a signal asks this process to end."""
        while not self.leaving and (entry := self.queue.next()):
            try:
                self.run(entry)
            except OSError as error:  # the disk is full, a folder cannot be written
                with contextlib.suppress(OSError, QueueError):
                    self.queue.wish(entry.id, "stop")
                print(f"{now()} {entry.id}: {error}", flush=True)
                return

    def run(self, entry: Entry) -> None:
        """One launch of one training, to its end."""
        (entry.folder / "runs").mkdir(exist_ok=True)
        job = Job(
            entry.folder,
            entry.name,
            entry.training.seed,
            entry.command(),
            attempt=entry.launches + 1,
            resume=entry.launches > 0,
            quiet=True,
        )
        job.start(Slot())
        asked_at = None
        while job.poll() is None:
            time.sleep(POLL_S)
            wish = read_run_json(entry.folder / "wish.json").get("wish", "run")
            if asked_at is None and (self.leaving or wish != "run"):
                job.signal(signal.SIGTERM)
                asked_at = time.monotonic()
            elif asked_at is not None and time.monotonic() - asked_at > KILL_AFTER_S:
                job.signal(signal.SIGKILL)


@dataclass(frozen=True)
class Options:
    """One word: the folder of the queue."""


def main(folder: str) -> int:
    """Work the queue in `folder` off, unless another process does."""
    queue = Queue(folder)
    with contextlib.suppress(OSError):
        os.nice(5)  # the pages and whatever else the user does come first
    # A runner that is just leaving still holds the lock; its last look may have missed what is new.
    with _lock(queue.folder, wait_s=3.0) as ours:
        if ours:
            Runner(queue).work()
    return 0


if __name__ == "__main__":
    sys.exit(main(command(__doc__, None, Options, (1, 1))[0][0]))
