"""Starting trainers: one process (or one torchrun) a run, on a share of the machine, its end in the ledger.

A `Job` is one launch of one run. It writes the ledger's launch line before the process exists and the end line when it
is over, whatever the end was; `Local` runs several side by side, each pinned to its GPUs or cores.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from records.ledger import Ledger, process_start
from records.logs import read_run_json, sealed, trim_log
from trainer.program import host_hash

EXIT_BAD_INPUT = (2, 3)  # the trainer's: usage, bad data or checkpoint. Every seed would end alike.
EXIT_NON_FINITE = 4
EXIT_IO = 5
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM, -signal.SIGINT, -signal.SIGTERM)
KILL_GRACE_S = 60.0  # a run over its time limit gets this long to write a checkpoint before it is killed


@dataclass(frozen=True)
class Slot:
    """A share of the machine: GPU indices, or CPU cores; both empty means everything, unpinned."""

    gpus: tuple[str, ...] = ()
    cores: tuple[int, ...] = ()

    def environment(self) -> dict[str, str]:
        """Variables that keep a process within its share."""
        if self.gpus:
            return {"CUDA_VISIBLE_DEVICES": ",".join(self.gpus), "HIP_VISIBLE_DEVICES": ",".join(self.gpus)}
        if self.cores:
            return {"OMP_NUM_THREADS": str(len(self.cores))}
        return {}


def visible_gpus() -> list[str]:
    """Identifiers of the GPUs that this process may use, asked of the driver (no import of torch)."""
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        listed = os.environ.get(variable)
        if listed is not None:
            return [name.strip() for name in listed.split(",") if name.strip() not in ("", "-1")]
    if shutil.which("nvidia-smi"):
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20)
            gpus = [line for line in done.stdout.splitlines() if line.startswith("GPU ")]
            if gpus:
                return [str(i) for i in range(len(gpus))]
    amd = 0
    for node in sorted(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties")):
        with contextlib.suppress(OSError):
            amd += bool(re.search(r"^simd_count [1-9]", node.read_text(), re.MULTILINE))  # 0: a processor
    return [str(i) for i in range(amd)]


def default_nproc(gpus: Sequence[str]) -> int:
    """Processes a run: the largest of 8, 4, 2, 1 that the GPUs allow (a step has 8 sequences); 1 without GPUs."""
    return max([n for n in (1, 2, 4, 8) if n <= len(gpus)], default=1)


def slots(parallel: int | None, nproc: int) -> list[Slot]:
    """Shares for runs side by side. parallel None: one run at a time, unpinned; 0: as many as the machine holds.

    Raises ValueError if the machine is too small for `parallel` runs.
    """
    if parallel is None:
        return [Slot()]
    gpus = visible_gpus()
    affinity = getattr(os, "sched_getaffinity", None)
    cores = sorted(affinity(0)) if affinity else list(range(os.cpu_count() or 1))
    have = len(gpus) if gpus else len(cores)
    parallel = parallel or max(1, have // nproc)
    if parallel * nproc > have:
        kind = "GPUs" if gpus else "cores"
        need = f"{parallel} runs of {nproc} processes side by side need {parallel * nproc} {kind}"
        raise ValueError(f"{need}; this machine has {have}")
    if gpus:
        return [Slot(gpus=tuple(gpus[i * nproc : (i + 1) * nproc])) for i in range(parallel)]
    share = len(cores) // parallel
    return [Slot(cores=tuple(cores[i * share : (i + 1) * share])) for i in range(parallel)]


def _die_with_parent(cores: Sequence[int]) -> Callable[[], None]:
    """For the child before it is the trainer: SIGTERM when the runner dies, so that no orphan trains on."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def prepare() -> None:
        if libc is not None:
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)

    return prepare


def seal(folder: Path, run: str, status: str) -> dict:
    """What the line of an end adds: the hashes of a finished run's log and JSON, after the log has its last form.

    Only in the folder of a series or a study; a run that can be resumed will go on writing.
    """
    if status == "interrupted" or not any((folder / name).exists() for name in ("record.json", "study.json")):
        return {}
    trim_log(folder, run)
    return {"sealed": sealed(folder, run)} if status == "finished" else {}


class Job:
    """One launch of one run: `start`, then `poll` until it returns the end, which is then in the ledger."""

    def __init__(
        self,
        folder: Path,
        run: str,
        seed: int,
        command: Sequence[str],
        *,
        attempt: int,
        resume: bool,
        quiet: bool = False,
        timeout_s: float | None = None,
        extra: dict | None = None,
    ):
        self.folder, self.run, self.seed = folder, run, seed
        self.command, self.attempt, self.resume = list(command), attempt, resume
        self.quiet, self.timeout_s, self.extra = quiet, timeout_s, extra or {}
        self.ledger = Ledger(folder)
        self.process: subprocess.Popen | None = None
        self.stop_requested: int | None = None
        self.timed_out_at: float | None = None
        self.signals_sent = 0
        self.output = folder / "attempts" / f"{run}.{attempt}.output"

    @property
    def json_path(self) -> Path:
        """The JSON that the trainer writes beside its log."""
        return self.folder / "runs" / f"{self.run}.json"

    def start(self, slot: Slot) -> None:
        """Note the launch, then start the trainer. Raises LedgerError (then nothing was started)."""
        self.ledger.append(
            "launch",
            run=self.run,
            seed=self.seed,
            attempt=self.attempt,
            resume=self.resume,
            host=host_hash(),
            pid=os.getpid(),
            pid_start=process_start(os.getpid()),
            **self.extra,
        )
        self.started = time.monotonic()
        self.output.parent.mkdir(exist_ok=True)
        sink = open(self.output, "wb")
        # Quiet runs write only into the file; a lone run shows its lines as they come, and errors in both.
        out, err = (sink, subprocess.STDOUT) if self.quiet else (None, subprocess.PIPE)
        if not self.quiet and sys.stderr.isatty():
            err = None  # the trainer draws its progress there, which needs the terminal itself
        try:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=os.environ | slot.environment(),
                start_new_session=True,
                preexec_fn=_die_with_parent(slot.cores),
            )
        except OSError as error:
            self.ledger.append(
                "end",
                run=self.run,
                attempt=self.attempt,
                status="crashed",
                exit_code=None,
                error=f"could not be started: {error.strerror}",
            )
            sink.close()
            raise
        self.copier = None
        if self.process.stderr is not None:
            self.copier = threading.Thread(target=_tee, args=(self.process.stderr, sink), daemon=True)
            self.copier.start()
        else:
            sink.close()
        pid = self.process.pid
        self.ledger.append("start", run=self.run, attempt=self.attempt, pid=pid, pid_start=process_start(pid))

    def signal(self, number: int) -> None:
        """Pass a signal on: the trainer writes a checkpoint and ends. From the third on, kill the whole group."""
        if self.process is None or self.process.poll() is not None:
            return
        self.stop_requested = self.stop_requested or number
        self.signals_sent += 1
        with contextlib.suppress(ProcessLookupError):
            if self.signals_sent > 2 or number == signal.SIGKILL:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                os.kill(self.process.pid, number)

    def poll(self) -> dict | None:
        """None while the trainer runs; then, once, the end as it stands in the ledger."""
        seconds = time.monotonic() - self.started
        if not self._ended():
            self._enforce_time_limit(seconds)
            return None
        code = self.process.wait()
        if self.copier is not None:
            self.copier.join(timeout=5)
        status, error = self._judge(code)
        result = read_run_json(self.json_path)
        fields = {"run": self.run, "attempt": self.attempt, "status": status, "exit_code": code}
        fields["seconds"] = round(seconds, 3)
        if status == "finished":
            fields["final_loss"] = _finite(result.get("final_loss"))
            self.output.unlink(missing_ok=True)
        elif error:
            fields["error"] = error
        return self.ledger.append("end", **fields, **seal(self.folder, self.run, status))

    def _ended(self) -> bool:
        """True once the trainer is over; what is left of its process group (ranks of a dead torchrun) is killed."""
        pid = self.process.pid
        if hasattr(os, "waitid"):
            # Looked at before it is reaped, so that its number cannot mean somebody else's group yet.
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return False
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            return True
        return self.process.poll() is not None

    def _enforce_time_limit(self, seconds: float) -> None:
        """Past its limit a run is asked to stop, and killed a minute later."""
        if self.timeout_s is None or seconds < self.timeout_s:
            return
        if self.timed_out_at is None:
            self.timed_out_at = seconds
            os.kill(self.process.pid, signal.SIGTERM)
        elif seconds > self.timed_out_at + KILL_GRACE_S:
            os.killpg(self.process.pid, signal.SIGKILL)

    def _judge(self, code: int) -> tuple[str, str | None]:
        """(status, cause) of an exit code together with what the trainer wrote into its JSON."""
        result = read_run_json(self.json_path)
        said = result.get("status")
        if code == 0 and said == "finished":
            return "finished", None
        if self.timed_out_at is not None:
            return "crashed", f"over the time limit of {self.timeout_s:g} s"
        if self.stop_requested or code in STOPPED or (said == "interrupted" and code != 0):
            return "interrupted", None
        if code == 0:
            return "crashed", f"exit code 0, but {self.json_path.name} says {said or 'nothing'}"
        cause = result.get("error") or _last_line(self.output)
        if code < 0:
            return "crashed", f"killed by {signal.Signals(-code).name}" + (f": {cause}" if cause else "")
        return "crashed", cause or f"exit code {code}"


def _finite(value: object) -> float | None:
    """A finite number as float, else None (JSON has no NaN)."""
    if isinstance(value, (int, float)) and abs(value) < float("inf"):
        return float(value)
    return None


def _tee(source, sink) -> None:
    """Copy a trainer's error stream to ours and to a file, to name the cause if it crashes."""
    with source, sink:
        for line in source:
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
            sink.write(line)
            sink.flush()


def _last_line(path: Path, limit_bytes: int = 8192) -> str | None:
    """The last line of a file that says something, at most 300 characters; None if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - limit_bytes))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return None
    lines = [line for line in lines if line]
    return lines[-1][:300] if lines else None


class Local:
    """Runs jobs on this machine, at most one a slot, in the order given."""

    def __init__(self, shares: Sequence[Slot], poll_s: float = 0.1):
        self.free = list(shares)
        self.poll_s = poll_s
        self.active: dict[str, tuple[Job, Slot]] = {}

    def has_room(self) -> bool:
        """True if another job can start now."""
        return bool(self.free)

    def start(self, job: Job) -> None:
        """Start `job` on a free share."""
        slot = self.free.pop(0)
        try:
            job.start(slot)
        except BaseException:
            self.free.insert(0, slot)
            raise
        self.active[job.run] = (job, slot)

    def wait(self) -> list[tuple[Job, dict]]:
        """Sleep a moment, then return the jobs that have ended, with their ends."""
        time.sleep(self.poll_s)
        ended = []
        for run, (job, slot) in list(self.active.items()):
            end = job.poll()
            if end is not None:
                del self.active[run]
                self.free.append(slot)
                ended.append((job, end))
        return ended

    def signal(self, number: int) -> None:
        """Pass a signal on to every running trainer."""
        for job, _ in self.active.values():
            job.signal(number)
