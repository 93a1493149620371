"""Which runs of a series are to be started, and the one that starts them, records how they end and stops in time.

    tasks, crashed = choose(series, repeats=19, retry_crashed=False)
    Runner(series, launcher, decide=watch).run(tasks)

A launcher (`records.launch.Local`, `records.slurm.Slurm`) has `has_room()`, `start(job)`, `wait()` and `signal(n)`;
`decide` is asked before every start, and a reason that it returns cancels what has not been started.
"""

from __future__ import annotations

import shutil
import signal
import sys
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.echo import tell
from records.folder import EXIT_CRASHED, Series, SeriesError, set_aside
from records.launch import EXIT_BAD_INPUT, EXIT_IO, Job, Local, seal
from records.ledger import RunState
from records.logs import read_run_json
from trainer.program import changed_files, now, program_files

# -----------------------------------------------------------------------------------------------------------
# Which runs to start


def settle_lost(series: Series, wait_s: float = 90.0) -> None:
    """Write the end of every launch whose runner died before it could; waits for trainers that are ending.

    Raises SeriesError if a trainer of this series is still running when the time is over.
    """
    deadline = time.monotonic() + wait_s
    told = False
    while True:
        states = series.ledger.runs()
        alive = [s for s in states.values() if s.status == "running" and not s.attempts[-1].launch.get("job")]
        if not alive:
            break
        owner = alive[0].attempts[-1].start or alive[0].attempts[-1].launch
        where = f"{alive[0].run} of {series.folder} is still running as process {owner['pid']}"
        if time.monotonic() > deadline:
            raise SeriesError(f"{where}, left by a start that died; stop it, then give the same command again")
        if not told:
            tell(f"{where}, left by a start that died: waiting for it to end")
            told = True
        time.sleep(0.2)
    for state in states.values():
        if state.status != "lost":
            continue
        attempt = state.attempts[-1]
        result = read_run_json(series.runs_folder / f"{state.run}.json")
        fields = {"run": state.run, "attempt": attempt.number, "exit_code": None, "settled_later": True}
        if result.get("status") == "finished":
            seals = seal(series.folder, state.run, "finished")
            series.ledger.append("end", **fields, status="finished", final_loss=result.get("final_loss"), **seals)
            after_end(series, state.run, "finished")
        elif result.get("status") == "interrupted":
            series.ledger.append("end", **fields, status="interrupted")
        else:
            cause = result.get("error") or "no end was recorded: the trainer and its runner died"
            series.ledger.append("end", **fields, status="crashed", error=cause, lost=True)


def can_resume(series: Series, state: RunState) -> bool:
    """True if the last attempt left a checkpoint and did not end by itself (a NaN comes back on resuming)."""
    end = state.attempts[-1].end or {}
    code = end.get("exit_code")
    outside = state.status == "interrupted" or end.get("lost") or code == EXIT_IO or (code or 0) < 0 or code in (137,)
    return bool(outside and series.checkpoints(state.run))


@dataclass(frozen=True)
class Task:
    """A run that is to be started: attempt counts from 1."""

    run: str
    seed: int
    attempt: int
    resume: bool


def choose(
    series: Series, repeats: int, retry_crashed: bool, adopted: Container[str] = ()
) -> tuple[list[Task], list[RunState]]:
    """(runs to start, in order of seed; runs that stay crashed). Finished, dropped and `adopted` runs (a cluster
    has them already) are in neither."""
    states = series.ledger.runs()
    tasks, crashed = [], []
    for seed in range(repeats):
        run = run_name(seed)
        if run in adopted:
            continue
        state = states.get(run)
        if state is None or not state.attempts:
            if state is None or not state.dropped:
                tasks.append(Task(run, seed, 1, False))
            continue
        if state.status in ("finished", "dropped"):
            continue
        if state.status in ("running", "elsewhere"):
            raise SeriesError(
                f"{run} of {series.folder} was started on another machine and has no end yet. Wait, or "
                f"record its loss: python -m records.series lost {series.folder.name} {run} --reason WHY"
            )
        lost_with_checkpoint = (state.attempts[-1].end or {}).get("lost") and can_resume(series, state)
        if state.status == "crashed" and not retry_crashed and not lost_with_checkpoint:
            crashed.append(state)
            continue
        tasks.append(Task(run, seed, state.attempts[-1].number + 1, can_resume(series, state)))
    return tasks, crashed


def run_name(seed: int) -> str:
    """seed-000, seed-001, ..."""
    return f"seed-{seed:03d}"


def after_end(series: Series, run: str, status: str) -> None:
    """Remove checkpoints that nobody will resume, and the lock of a run that has ended."""
    if status == "interrupted":
        return
    if status == "finished":
        final_kept = series.identity.overrides.get("save_final", "true" if run == run_name(0) else "false")
        if final_kept.lower() in ("false", "0", "no", "off"):
            shutil.rmtree(series.runs_folder / f"{run}.checkpoints", ignore_errors=True)
    lock = series.runs_folder / f"{run}.lock"
    lock.with_name(f".{lock.name}").unlink(missing_ok=True)


def other_data(series: Series, run: str) -> str | None:
    """What is wrong if a run was validated on other data than those that finished before it; else None."""
    hashes: dict[str, str] = {}
    for state in series.ledger.runs().values():
        told = read_run_json(series.runs_folder / f"{state.run}.json").get("val_data_hash")
        if state.status == "finished" and told:
            hashes[state.run] = told
    first = next(iter(hashes), None)
    if run not in hashes or hashes[run] == hashes[first]:
        return None
    return (
        f"the validation data changed: {hashes[first]} in {first}, {hashes[run]} in {run}. These runs cannot be judged "
        "together, so no other was started; put the data back and start a new series with another --name"
    )


# -----------------------------------------------------------------------------------------------------------
# Running


def copy_away(folder: Path, url: str | None) -> bool:
    """Copy the series to `url`, if there is one. A store that does not answer stops no training: False, and a line."""
    if not url:
        return True
    from records.remote import CopyError, copy_series

    try:
        copy_series(folder, url)
    except CopyError as error:
        print(f"not copied: {error}; later: python -m records.remote {folder} {url}", file=sys.stderr, flush=True)
        return False
    return True


class Stopped(Exception):
    """A signal asked the series to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Runner:
    """Feeds tasks to a launcher, records how they end, passes signals on to the trainers."""

    def __init__(
        self, series: Series, launcher: Local, *, quiet: bool, timeout_s: float | None, decide=None, copy_to=None
    ):
        self.series, self.launcher = series, launcher
        self.quiet, self.timeout_s = quiet, timeout_s
        self.decide = decide or (lambda: None)  # returns a reason once the sequential test has decided
        self.copy_to = copy_to
        self.stop_signal: int | None = None
        self.pending_signals: list[int] = []
        self.give_up: str | None = None
        self.crashes = 0

    def run(self, tasks: Sequence[Task]) -> None:
        """Start every task and wait for all. Raises Stopped once the trainers have ended, or SeriesError."""
        queue = list(tasks)
        handlers = {n: signal.signal(n, self._on_signal) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._loop(queue)
        except BaseException:
            # Nothing may train on unrecorded because the runner has lost its disk.
            self.launcher.signal(signal.SIGTERM)
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.stop_signal is not None:
            raise Stopped(self.stop_signal)
        if self.give_up:
            raise SeriesError(self.give_up, EXIT_CRASHED)

    def _on_signal(self, number: int, frame) -> None:
        self.stop_signal = self.stop_signal or number
        self.pending_signals.append(number)

    def _loop(self, queue: list[Task]) -> None:
        while queue or self.launcher.active or getattr(self.launcher, "waiting", None):
            while self.pending_signals:
                self.launcher.signal(self.pending_signals.pop(0))
            if self.stop_signal is not None or self.give_up:
                queue.clear()
            if (queue or self.launcher.active) and (reason := self.decide()):
                self._cancel(queue, reason)
            while queue and self.launcher.has_room() and self.stop_signal is None:
                self._start(queue.pop(0))
            for job, end in self.launcher.wait():
                self._ended(job, end)

    def _cancel(self, queue: list[Task], reason: str) -> None:
        for task in queue:
            self.series.ledger.append("cancel", run=task.run, seed=task.seed, reason=reason)
        cancelled = len(queue)
        queue.clear()
        if hasattr(self.launcher, "cancel_pending"):
            cancelled += self.launcher.cancel_pending(reason)
        if cancelled:
            tell(f"{cancelled} queued runs cancelled: {reason}")

    def _start(self, task: Task) -> None:
        series = self.series
        if changed := changed_files(series.identity.code, program_files(series.trainer)):
            self.give_up = (
                f"{', '.join(changed)} changed while the series was running: {task.run} was not started. "
                "Put the code back to continue, or start a new series with another --name"
            )
            return
        if task.attempt > 1 and not task.resume:
            set_aside(series, task.run, task.attempt - 1)
        job = Job(
            series.folder,
            task.run,
            task.seed,
            series.command(task.run, task.seed, resume=task.resume),
            attempt=task.attempt,
            resume=task.resume,
            quiet=self.quiet,
            timeout_s=self.timeout_s,
        )
        again = f" (attempt {task.attempt}{', resumed' if task.resume else ''})" if task.attempt > 1 else ""
        tell(f"{now()} {task.run} started{again}")
        self.launcher.start(job)

    def _ended(self, job: Job, end: dict) -> None:
        status = end["status"]
        after_end(self.series, job.run, status)
        told = f"loss {end['final_loss']:.6f}" if end.get("final_loss") is not None else end.get("error", "")
        tell(f"{end['time']} {job.run} {status} after {end['seconds']:.1f} s {told}".rstrip())
        copy_away(self.series.folder, self.copy_to)
        if status == "finished" and (other := other_data(self.series, job.run)):
            self.give_up = other
        if status == "crashed":
            self.crashes += 1
            if end["exit_code"] in (*EXIT_BAD_INPUT, EXIT_IO):
                self.give_up = f"{job.run} crashed: {end.get('error')}. Every run would, so no other was started"
        elif status == "interrupted" and self.stop_signal is None:
            self.give_up = f"{job.run} was stopped from outside; give the same command again to continue it"
