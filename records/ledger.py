"""The ledger of a series: what was started, how it ended, what was left out and why; only ever added to.

One JSON object a line. Events:
  begin   threshold, plan, stop_step, identity     what was fixed before the first launch
  launch  run, seed, attempt, pid, host, resume    written before the process exists: none goes unrecorded
  start   run, attempt, pid, pid_start             the trainer's process
  end     run, attempt, status, exit_code, error   status: finished | crashed | interrupted; of a finished run also
          final_loss and `sealed`, the sha256 of its log and its JSON
  drop    run, reason                              left out of the verdict by a person, who says why
  cancel  run, reason                              queued, then not needed: the sequential test had decided
  judge   n, decision, p_value                     somebody looked at the test: looks count, so they are kept
  submit  run, seed, attempt, job                  in a cluster's queue; its launch is written where it starts
  torn    text                                     what a writer had written of its line when it died

Any number of processes on any number of hosts may append at once (O_APPEND under flock, then fsync). A line
that a dying writer left half done is skipped with a warning, and the next writer turns it into a torn event. Each
line carries in `before` the hash of all lines above it (`stats.chain`).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from stats.chain import KEY, link
from trainer.program import host_hash, now

NAME = "ledger.jsonl"
EVENTS = ("begin", "launch", "start", "end", "drop", "cancel", "judge", "torn", "submit")
ENDS = ("finished", "crashed", "interrupted")


class LedgerError(OSError):
    """The ledger could not be written or read; the message says where, why and what to do."""


def process_start(pid: int) -> str | None:
    """A token that changes when a process id is used again (boot id, start tick); None where unknown."""
    try:
        ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, IndexError):
        return None
    return f"{boot[:8]}-{ticks}"


def process_lives(pid: int, start: str | None) -> bool:
    """True if process `pid` of this host exists and is the one that `start` was noted for; no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    try:
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            return False
    except (OSError, IndexError):
        pass
    return start is None or process_start(pid) in (None, start)


@dataclass
class Attempt:
    """One launch of a run, with the start and end lines that belong to it."""

    number: int
    launch: dict
    start: dict | None = None
    end: dict | None = None

    @property
    def status(self) -> str:
        """The recorded end; without one: running, lost (no such process), elsewhere (another host's)."""
        if self.end is not None:
            return self.end["status"]
        if self.launch.get("host") != host_hash():
            return "elsewhere"
        owner = self.start or self.launch
        return "running" if process_lives(owner.get("pid", -1), owner.get("pid_start")) else "lost"


@dataclass
class RunState:
    """What the ledger knows of one run."""

    run: str
    seed: int | None = None
    attempts: list[Attempt] = field(default_factory=list)
    dropped: dict | None = None
    cancelled: dict | None = None
    submitted: dict | None = None  # to a cluster's queue

    @property
    def status(self) -> str:
        """The last attempt's status; 'cancelled' if it was never launched; 'dropped' wins over everything."""
        if self.dropped:
            return "dropped"
        if self.attempts:
            return self.attempts[-1].status
        return "cancelled" if self.cancelled else "unknown"


class Ledger:
    """Append to and read `<series>/ledger.jsonl`."""

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / NAME

    def append(self, event: str, **fields: object) -> dict:
        """Add one line, on disk when this returns. Raises LedgerError (nothing is left half written)."""
        if event not in EVENTS:
            raise ValueError(f"event {event!r}: one of {', '.join(EVENTS)}")
        record = {"event": event, **fields, "time": now()}
        json.dumps(record, allow_nan=False)  # what cannot be told must not reach the file
        try:
            self._append(record)
        except OSError as error:
            raise LedgerError(
                error.errno,
                f"{self.path}: cannot add {event} of {fields.get('run', 'series')}: {error.strerror}. "
                "Make room or make the folder writable, then give the same command again",
            ) from error
        return record

    def _append(self, record: dict) -> None:
        """Write the line of `record`, linked to all lines before it, at the end; or nothing."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            before = _read_all(descriptor)
            torn = before[before.rfind(b"\n") + 1 :]
            before = before[: len(before) - len(torn)]
            data = b""
            if torn:
                os.ftruncate(descriptor, len(before))
                data = _linked({"event": "torn", "text": torn.decode(errors="replace"), "time": now()}, before)
            data += _linked(record, before + data)
            try:
                written = 0
                while written < len(data):
                    written += os.write(descriptor, data[written:])
                os.fsync(descriptor)
            except OSError:
                os.ftruncate(descriptor, len(before))
                with contextlib.suppress(OSError):
                    os.write(descriptor, torn)
                raise
        finally:
            os.close(descriptor)

    def head(self) -> str:
        """The hash of all that the ledger says so far: published, it proves later that nothing above it changed."""
        return link(self.path.read_bytes() if self.path.exists() else b"")

    def events(self) -> list[dict]:
        """All events in the order of writing; half-written or foreign lines are skipped with a warning."""
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        except OSError as error:
            raise LedgerError(error.errno, f"{self.path}: cannot be read: {error.strerror}") from error
        events = []
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                event = None
            if not isinstance(event, dict) or event.get("event") not in EVENTS:
                warnings.warn(f"{self.path}, line {number}: not an event, skipped: {line[:80]!r}", stacklevel=2)
                continue
            events.append(event)
        return events

    def runs(self) -> dict[str, RunState]:
        """State of every run that the ledger names, in order of first mention."""
        return run_states(self.events())


def _read_all(descriptor: int) -> bytes:
    """The whole file behind an open descriptor."""
    parts, offset = [], 0
    while part := os.pread(descriptor, 1 << 20, offset):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _linked(record: dict, before: bytes) -> bytes:
    """The line of an event, with its link to the bytes before it."""
    return (json.dumps(record | {KEY: link(before)}, allow_nan=False) + "\n").encode()


def run_states(events: Iterable[dict]) -> dict[str, RunState]:
    """Fold events into one RunState a run. An end without a launch line counts as an attempt of its own."""
    states: dict[str, RunState] = {}
    for event in events:
        run = event.get("run")
        if not isinstance(run, str):
            continue
        state = states.setdefault(run, RunState(run))
        kind = event["event"]
        if isinstance(event.get("seed"), int):
            state.seed = event["seed"]
        if kind == "launch":
            state.cancelled = state.dropped = None
            state.attempts.append(Attempt(event.get("attempt", len(state.attempts) + 1), event))
        elif kind in ("start", "end"):
            if kind == "end" and event.get("status") not in ENDS:
                continue
            setattr(_attempt(state, event), kind, event)
        elif kind == "submit":
            state.submitted, state.cancelled = event, None
        elif kind == "drop":
            state.dropped = event
        elif kind == "cancel":
            state.cancelled = event
    return states


def _attempt(state: RunState, event: dict) -> Attempt:
    """The attempt that a start or end line belongs to; made up if its launch line is missing."""
    for attempt in reversed(state.attempts):
        if attempt.number == event.get("attempt", attempt.number):
            return attempt
    made_up = Attempt(event.get("attempt", 1), {"event": "launch", "run": state.run, "missing": True})
    state.attempts.append(made_up)
    return made_up


def ledger_summary(events: Iterable[dict]) -> dict:
    """Counts for a report: launches, runs by final status, resumed launches, looks at the test."""
    events = list(events)
    states = run_states(events)
    counts = dict.fromkeys(("finished", "crashed", "interrupted", "lost", "running", "elsewhere"), 0)
    for state in states.values():
        if state.attempts:
            counts[state.attempts[-1].status] += 1
    ends = [e for e in events if e["event"] == "end"]
    return {
        "runs": sum(bool(s.attempts) for s in states.values()),
        "launches": sum(len(s.attempts) for s in states.values()),
        "runs_by_status": {status: n for status, n in counts.items() if n},
        "crashed": [
            (s.run, (s.attempts[-1].end or {}).get("error"))
            for s in states.values()
            if s.attempts and s.status == "crashed"
        ],
        "crashed_launches": sum(e.get("status") == "crashed" for e in ends),
        "resumed_launches": sum(bool(e.get("resume")) for e in events if e["event"] == "launch"),
        "dropped": {s.run: s.dropped.get("reason", "") for s in states.values() if s.dropped},
        "cancelled": {s.run: s.cancelled.get("reason", "") for s in states.values() if s.cancelled},
        "looks": sum(e["event"] == "judge" for e in events),
    }
