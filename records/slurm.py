"""Runs of a series as a SLURM job array, through submitit.

The scheduler is SLURM; this only asks it and keeps the ledger true. Every run is one array task whose worker writes
the launch and the end into the series' ledger itself, from whichever host it gets; the series' own process watches
the ledger, and asks `squeue` about runs that stay silent. A series that was cut off adopts, when started again, the
jobs that still are in SLURM's queue. When the sequential test has decided, pending tasks are cancelled and running
ones may finish.

With `--cluster local` submitit starts the workers on this machine at once, which is how this is tried without SLURM.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.echo import tell
from records.folder import SeriesError
from records.launch import Job, Slot, seal
from records.ledger import Attempt, Ledger
from records.logs import read_run_json

SILENT_S = 15.0  # a job that left SLURM's queue so long ago and wrote no end has died
QUEUE_EVERY_S = 5.0


class SlurmError(SeriesError):
    """SLURM or submitit cannot be used as asked; the message says why."""


@dataclass(frozen=True)
class Request:
    """What each run asks of the cluster. `more`: further sbatch options by name."""

    minutes: int = 60
    partition: str | None = None
    gpus: int = 0
    cores: int = 1
    at_once: int = 256
    cluster: str | None = None  # slurm or local (submitit's names); None: slurm
    more: dict[str, str] = field(default_factory=dict)


@dataclass
class Submitted:
    """A run that SLURM has: the ledger will tell what becomes of it."""

    job: Job
    id: str  # as squeue names it: 123_4
    handle: object = None  # submitit's job; None if it was adopted
    gone_since: float | None = None


def work(folder: str, run: str, seed: int, command: list[str], cwd: str, attempt: int, resume: bool) -> str:
    """On the compute node: one launch, with its start and its end in the ledger. Returns the status."""
    os.chdir(cwd)
    name = os.environ.get("SLURM_ARRAY_JOB_ID")
    name = f"{name}_{os.environ['SLURM_ARRAY_TASK_ID']}" if name else os.environ.get("SLURM_JOB_ID", "local")
    job = Job(Path(folder), run, seed, command, attempt=attempt, resume=resume, quiet=True, extra={"job": name})
    asked: list[int] = []
    # SIGTERM comes from scancel, SIGUSR2 from submitit before the time limit: a checkpoint, then the end.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
        signal.signal(number, lambda number, frame: asked.append(number))
    job.start(Slot())
    while (end := job.poll()) is None:
        if asked:
            asked.clear()
            job.signal(signal.SIGTERM)
        time.sleep(0.1)
    return end["status"]


def queue(job_ids: Sequence[str]) -> dict[str, str] | None:
    """{task: state} of those of our tasks that SLURM still has; None if SLURM does not answer."""
    if not job_ids:
        return {}
    arrays = ",".join(sorted({task.partition("_")[0] for task in job_ids}))
    command = ["squeue", "-h", "-r", "-t", "all", "-j", arrays, "-o", "%i %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    listed = dict(line.split()[:2] for line in done.stdout.splitlines() if len(line.split()) >= 2)
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "DEADLINE")
    return {task: state for task, state in listed.items() if task in job_ids and state not in over}


class Slurm:
    """A launcher like `records.launch.Local`; the runs are on the cluster."""

    def __init__(self, folder: Path, request: Request, poll_s: float = 0.5):
        try:
            import submitit
        except ImportError:
            raise SlurmError("--launcher=slurm needs submitit: pip install submitit") from None
        cluster = request.cluster or "slurm"
        if cluster == "slurm" and shutil.which("sbatch") is None:
            raise SlurmError("--launcher=slurm: there is no sbatch on this machine")
        self.folder, self.request, self.poll_s, self.cluster = folder, request, poll_s, cluster
        self.ledger = Ledger(folder)
        self.active: dict[str, Submitted] = {}
        self.waiting: list[Job] = []
        self.asked_at = 0.0
        scratch = folder / ".slurm"
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / ".gitignore").write_text("*\n")
        # Workers import this package wherever SLURM starts them.
        here = str(Path(__file__).resolve().parent.parent)
        paths = [here, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(p for p in paths if p))
        self.executor = submitit.AutoExecutor(scratch, cluster=cluster)
        parameters: dict = {"name": re.sub(r"[^A-Za-z0-9_-]", "-", folder.name), "timeout_min": request.minutes}
        parameters |= {"tasks_per_node": 1, "nodes": 1, "cpus_per_task": request.cores, "gpus_per_node": request.gpus}
        if cluster == "slurm":
            parameters["slurm_array_parallelism"] = request.at_once
            if request.partition:
                parameters["slurm_partition"] = request.partition
            if request.more:
                parameters["slurm_additional_parameters"] = request.more
        self.executor.update_parameters(**parameters)

    def has_room(self) -> bool:
        """True: SLURM's queue holds what the machines do not."""
        return True

    def start(self, job: Job) -> None:
        """Keep `job` for the array that the next `wait` submits."""
        self.waiting.append(job)

    def adopt(self) -> set[str]:
        """Take over runs that an earlier start submitted and SLURM still has; their names."""
        candidates: dict[str, dict] = {}
        for event in self.ledger.events():
            if event["event"] == "submit":
                candidates[event["run"]] = event
            elif event["event"] in ("end", "cancel"):
                candidates.pop(event.get("run"), None)
        found = queue([event["job"] for event in candidates.values()]) if self.cluster == "slurm" else {}
        if found is None:
            raise SlurmError("squeue does not answer, and runs of this series may still be in its queue; try later")
        states = self.ledger.runs()
        for run, event in candidates.items():
            launched = any(a.number == event["attempt"] for a in states[run].attempts)
            # Launched, without an end and not in the queue: its silence is settled as that of our own.
            if event["job"] in found or launched:
                job = Job(self.folder, run, event["seed"], [], attempt=event["attempt"], resume=False)
                self.active[run] = Submitted(job, event["job"])
        return set(self.active)

    def _submit(self) -> None:
        """One job array of everything that waits."""
        jobs, self.waiting = self.waiting, []
        try:
            with self.executor.batch():
                handles = [
                    self.executor.submit(
                        work,
                        str(self.folder.resolve()),
                        job.run,
                        job.seed,
                        job.command,
                        os.getcwd(),
                        job.attempt,
                        job.resume,
                    )
                    for job in jobs
                ]
        except Exception as error:  # submitit raises its own and subprocess's errors
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise SlurmError(f"SLURM did not take the job array: {said[-1]}") from None
        for job, handle in zip(jobs, handles):
            self.ledger.append("submit", run=job.run, seed=job.seed, attempt=job.attempt, job=handle.job_id)
            self.active[job.run] = Submitted(job, handle.job_id, handle)
        tell(f"submitted {len(jobs)} runs as {handles[0].job_id.partition('_')[0]}")

    def _attempt(self, one: Submitted) -> Attempt | None:
        """The launch of this submission, once the ledger has it."""
        state = self.ledger.runs().get(one.job.run)
        found = [a for a in state.attempts if a.number == one.job.attempt] if state else []
        return found[-1] if found else None

    def wait(self) -> list[tuple[Job, dict]]:
        """Submit what waits, sleep a moment, then return the runs that have ended, with their ends."""
        if self.waiting:
            self._submit()
        time.sleep(self.poll_s)
        ended = []
        states = self.ledger.runs()
        for run, one in list(self.active.items()):
            attempts = [a for a in states[run].attempts if a.number == one.job.attempt] if run in states else []
            if attempts and attempts[-1].end:
                del self.active[run]
                ended.append((one.job, {"seconds": 0.0, "exit_code": None} | attempts[-1].end))
        return ended + self._settle_silent()

    def _gone(self) -> list[Submitted]:
        """Runs that SLURM no longer has, for long enough that their last words would have arrived."""
        if time.monotonic() - self.asked_at < QUEUE_EVERY_S:
            return []
        self.asked_at = time.monotonic()
        if self.cluster == "slurm":
            listed = queue([one.id for one in self.active.values()])
            if listed is None:
                return []
            alive = {run for run, one in self.active.items() if one.id in listed}
        else:
            alive = {run for run, one in self.active.items() if one.handle and not one.handle.done()}
        gone = []
        for run, one in self.active.items():
            if run in alive:
                one.gone_since = None
            else:
                one.gone_since = one.gone_since or time.monotonic()
                if time.monotonic() - one.gone_since >= SILENT_S:
                    gone.append(one)
        return gone

    def _settle_silent(self) -> list[tuple[Job, dict]]:
        """Write the end of runs whose worker died without one (node failure, kill -9, out of memory)."""
        ended = []
        for one in self._gone():
            run = one.job.run
            if (attempt := self._attempt(one)) is not None and attempt.end is not None:
                continue  # its end has just arrived
            if attempt is None:
                self.ledger.append("launch", run=run, seed=one.job.seed, attempt=one.job.attempt, job=one.id)
            said = read_run_json(self.folder / "runs" / f"{run}.json").get("status") if attempt else None
            status = said if said in ("interrupted", "finished") else "crashed"
            fields = {"run": run, "attempt": one.job.attempt, "status": status, "exit_code": None, "seconds": 0.0}
            if status == "crashed":
                fields |= {"error": f"SLURM job {one.id} is gone and left no end", "lost": True}
            del self.active[run]
            end = self.ledger.append("end", **fields, **seal(self.folder, run, status))
            ended.append((one.job, end))
        return ended

    def cancel_pending(self, reason: str) -> int:
        """Cancel what SLURM has not started, note it in the ledger; returns how many."""
        pending = [one for one in self.active.values() if self._attempt(one) is None]
        if self.cluster != "slurm" or not pending:
            return 0
        subprocess.run(["scancel", "-t", "PENDING", *(one.id for one in pending)], capture_output=True, timeout=60)
        time.sleep(1)
        listed = queue([one.id for one in pending])
        cancelled = 0
        for one in pending:
            # Between our question and scancel a task may have begun; then it runs on and will end by itself.
            if listed is not None and one.id not in listed and self._attempt(one) is None:
                self.ledger.append("cancel", run=one.job.run, seed=one.job.seed, reason=reason)
                del self.active[one.job.run]
                cancelled += 1
        return cancelled

    def signal(self, number: int) -> None:
        """Stop: pending tasks are withdrawn, running ones get SIGTERM, write a checkpoint and end."""
        if self.cluster == "slurm":
            self.cancel_pending("the series was stopped")
            running = [one.id for one in self.active.values()]
            if running:
                # To the job's step, that is the worker, but not to the shell and the srun around it, whose death
                # would take the worker along before it has written the end.
                subprocess.run(["scancel", "-s", "TERM", *running], capture_output=True, timeout=60)
            return
        for one in self.active.values():
            attempt = self._attempt(one)
            if attempt is not None and attempt.end is None:
                with contextlib.suppress(ProcessLookupError, KeyError):
                    os.kill(attempt.launch["pid"], signal.SIGTERM)
