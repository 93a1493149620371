"""Run a series of repeats into one folder, and judge it.

    python -m records.series --repeats 19 --preset=nano --name nano      # start, or continue where it stopped
    python -m records.series --repeats 19 --name nano --retry-crashed    # give crashed runs another attempt
    python -m records.series drop nano seed-003 --reason "power cut"     # leave an unfinished run out
    python -m records.series lost nano seed-003 --reason "host is gone"  # it ended and nobody wrote it down

Every flag that is not the series' own (see --help) goes to the trainer, the same for every run; the series
sets `--seed`, `--output_dir` and `--run_name` itself. Runs are seeds 0..N-1.

    records/<name>/
      record.json    what the series is, and its results      ledger.jsonl   every launch and its end
      README.md      generated from the logs                  losses.png     the loss curves
      source/        the trainer's source, once               runs/          a log and a JSON for each run
      attempts/      what earlier attempts of a run left behind, and the output of crashed ones

Rules. A finished run is never repeated. A crashed run stays crashed until `--retry-crashed` adds an
attempt, with the old one kept and counted. A run that was stopped is resumed from its checkpoint. The
configuration and the code of a series never change: the same name with others is an error. Only one start
may work on a series at a time.

Exit codes: the t-test's (0 the mean is below the threshold, 1 not significant, 3 cannot be judged, 4 the
sequential test needs more runs), or 2 usage, 5 input or output failed, 6 a run crashed, 130 and 143 stopped
by a signal. A single run has no verdict: 0 if it finished.
"""

from __future__ import annotations

import argparse
import difflib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from records.launch import (
    EXIT_BAD_INPUT,
    EXIT_IO,
    EXIT_NON_FINITE,
    Job,
    Local,
    default_nproc,
    read_run_json,
    slots,
    visible_gpus,
)
from records.ledger import Ledger, LedgerError, RunState, now
from records.slurm import SlurmError
from stats.errors import StatsError
from trainer.program import fingerprint
from trainer.program import program_files as code_files
from trainer.program import text_hash as source_hash

REPO = Path(__file__).resolve().parent.parent
SCHEMA = 1
EXIT_USAGE, EXIT_MORE_RUNS, EXIT_CRASHED = 2, 4, 6
# Fields of the trainer's config that do not decide what a run computes, or differ between runs.
RUN_FIELDS = frozenset(
    "seed output_dir run_name resume overwrite plan_hash data_dir checkpoint_every keep_checkpoints save_final".split()
)
SET_BY_SERIES = ("seed", "output_dir", "run_name", "resume", "overwrite", "plan_hash", "preset")
NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class SeriesError(Exception):
    """The series cannot start or go on; the message says what was found and what to do."""

    def __init__(self, message: str, exit_code: int = EXIT_USAGE):
        super().__init__(message)
        self.exit_code = exit_code


# -----------------------------------------------------------------------------------------------------------
# What a series is


def parse_overrides(words: Sequence[str]) -> dict[str, str]:
    """Trainer flags as {field: text}: `--a=1`, `--a 1` and a bare `--a` (true). Raises SeriesError."""
    overrides: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--") or word == "--":
            raise SeriesError(f"unexpected word {word!r}: flags are written --field=value")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals:
            text = queue.pop(0) if queue and not queue[0].startswith("--") else "true"
        if name in SET_BY_SERIES:
            raise SeriesError(f"--{name} is set by the series itself: leave it out")
        overrides[name] = text
    return overrides


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
        changed = sorted(k for k in self.code.keys() | other.code.keys() if self.code.get(k) != other.code.get(k))
        if changed:
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
        return sorted((self.runs_folder / f"{run}.checkpoints").glob("*.safetensors"))

    def command(self, run: str, seed: int, *, resume: bool) -> list[str]:
        """The trainer's command line for a run."""
        identity = self.identity
        launch = [sys.executable]
        if identity.nproc > 1:
            launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={identity.nproc}"]
        # Relative, since the log prints it and logs are published.
        output = os.path.relpath(self.runs_folder)
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
    path = folder / "record.json"
    temporary = folder / f".record.json.{os.getpid()}"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
        digest = source_hash(text)
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


# -----------------------------------------------------------------------------------------------------------
# Logs


def trim_log(folder: Path, run: str) -> bool:
    """Move the source at a log's head to source/ (kept once), leaving one line; True if that was done.

    A log whose head is not the source that the run's JSON names stays as it is: no evidence is rewritten on
    a guess.
    """
    path = folder / "runs" / f"{run}.txt"
    try:
        with open(path, encoding="utf-8", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError):
        return False
    separator = re.search(r"^={60,}[ \t\r]*$", text, re.MULTILINE)
    if not separator or text.startswith("source sha256:"):
        return False
    source = text[: separator.start()]
    digest = source_hash(source)
    named = read_run_json(folder / "runs" / f"{run}.json").get("code_hash")
    if named is not None and named not in (digest, hashlib.sha256(source.encode()).hexdigest()):
        return False
    kept = folder / "source" / f"{digest[:16]}.py"
    if not kept.exists():
        kept.parent.mkdir(exist_ok=True)
        write_whole(kept, source.rstrip("\r\n") + "\n")
    write_whole(path, f"source sha256:{digest} kept in source/{kept.name}\n" + text[separator.start() :])
    return True


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one at every moment."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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
            print(f"{where}, left by a start that died: waiting for it to end", flush=True)
            told = True
        time.sleep(0.2)
    for state in states.values():
        if state.status != "lost":
            continue
        attempt = state.attempts[-1]
        result = read_run_json(series.runs_folder / f"{state.run}.json")
        fields = {"run": state.run, "attempt": attempt.number, "exit_code": None, "settled_later": True}
        if result.get("status") == "finished":
            series.ledger.append("end", **fields, status="finished", final_loss=result.get("final_loss"))
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
    """Trim an ended run's log (an interrupted one will grow on); remove checkpoints nobody will resume."""
    if status == "interrupted":
        return
    trim_log(series.folder, run)
    if status == "finished":
        final_kept = series.identity.overrides.get("save_final", "true" if run == run_name(0) else "false")
        if final_kept.lower() in ("false", "0", "no", "off"):
            shutil.rmtree(series.runs_folder / f"{run}.checkpoints", ignore_errors=True)
    (series.runs_folder / f".{run}.lock").unlink(missing_ok=True)


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
            print(f"{cancelled} queued runs cancelled: {reason}", flush=True)

    def _start(self, task: Task) -> None:
        series = self.series
        now_code = code_files(series.trainer)
        changed = sorted(
            k for k in now_code.keys() | series.identity.code.keys() if now_code.get(k) != series.identity.code.get(k)
        )
        if changed:
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
        print(f"{now()} {task.run} started{again}", flush=True)
        self.launcher.start(job)

    def _ended(self, job: Job, end: dict) -> None:
        status = end["status"]
        after_end(self.series, job.run, status)
        told = f"loss {end['final_loss']:.6f}" if end.get("final_loss") is not None else end.get("error", "")
        print(f"{end['time']} {job.run} {status} after {end['seconds']:.1f} s {told}".rstrip(), flush=True)
        copy_away(self.series.folder, self.copy_to)
        if status == "crashed":
            self.crashes += 1
            if end["exit_code"] in (*EXIT_BAD_INPUT, EXIT_IO):
                self.give_up = f"{job.run} crashed: {end.get('error')}. Every run would, so no other was started"
        elif status == "interrupted" and self.stop_signal is None:
            self.give_up = f"{job.run} was stopped from outside; give the same command again to continue it"


# -----------------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> argparse.ArgumentParser:
    """The series' own flags."""
    parser = argparse.ArgumentParser(
        prog="python -m records.series",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--repeats", type=int, metavar="N", help="runs in all, seeds 0..N-1 (1; with --sequential the plan's)")
    add("--preset", help="the trainer's preset (medium with GPUs, nano without)")
    add("--name", help="the series' folder (the preset, with the changed fields); auto: with a hash of the code")
    add("--nproc", type=int, metavar="K", help="processes, that is GPUs, a run (8, 4, 2 or 1, as the machine has)")
    add("--root", default=str(REPO / "records"), metavar="DIR", help="where series' folders lie (records/)")
    add("--retry-crashed", action="store_true", help="give every crashed run another attempt")
    add("--sequential", action="store_true", help="stop as soon as the sequential test has decided")
    add("--plan", metavar="FILE", help="for --sequential: a plan made by `python -m stats plan`")
    add("--margin", type=float, metavar="NATS", help="for --sequential: true distance below the threshold")
    add("--sigma", type=float, metavar="NATS", help="for --sequential: noise of the loss between runs")
    add("--timeout-s", type=float, metavar="S", help="a run that takes longer is stopped and counts as crashed")
    add("--launcher", choices=("local", "slurm"), help="local: side by side on this machine; slurm: a job array")
    add("--parallel", type=int, default=0, metavar="P", help="runs side by side (as many as the machine holds)")
    add("--partition", help="for slurm: where to queue")
    add("--minutes", type=int, default=60, help="for slurm: time limit of a run (60)")
    add("--gpus", type=int, help="for slurm: GPUs a run (--nproc with GPUs on this machine or --preset=medium, else 0)")
    add("--slurm", action="append", default=[], metavar="KEY=VALUE", help="for slurm: any other sbatch option")
    add("--cluster", choices=("slurm", "local"), help="for slurm: submitit's executor; local tries it without SLURM")
    add("--alpha", type=float, default=0.01, help="significance level of the verdict (0.01, the track's)")
    add("--copy-to", metavar="URL", help="copy the series there after every run (s3://..., any fsspec URL, a folder)")
    add("--no-judge", action="store_true", help="run only; no report and no verdict")
    add("--trainer", default=str(REPO / "train_gpt.py"), help=argparse.SUPPRESS)
    return parser


def default_name(preset: str, overrides: dict[str, str]) -> str:
    """The preset, followed by the changed fields: `nano`, `nano-num_iterations-50`."""
    words = [preset] + [f"{key}-{Path(text).name or text}" for key, text in sorted(overrides.items())]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words))[:100].rstrip("-.")


def series_from(options: argparse.Namespace, overrides: dict[str, str]) -> tuple[Path, Identity]:
    """(folder, wanted identity); a name alone continues that series with the flags it was started with."""
    if options.repeats is not None and options.repeats < 1:
        raise SeriesError(f"--repeats {options.repeats}: at least 1")
    trainer = Path(options.trainer)
    if not trainer.is_file():
        raise SeriesError(f"no trainer at {trainer}")
    gpus = visible_gpus()
    preset = options.preset or ("medium" if gpus else "nano")
    nproc = options.nproc or default_nproc(gpus)
    if nproc < 1:
        raise SeriesError(f"--nproc {nproc}: at least 1")
    code = code_files(trainer)
    name = options.name or default_name(preset, overrides)
    if name == "auto":  # another program is another series: changed code never meets old runs
        name = f"{default_name(preset, overrides)}-{fingerprint(code)[:8]}"
    if not NAME_PATTERN.fullmatch(name):
        raise SeriesError(f"--name {name!r}: letters, digits, '.', '_' and '-', at most 100, no leading sign")
    folder = Path(options.root) / name
    if options.name and not overrides and options.preset is None and (record := read_record(folder)):
        was = Identity(**record["identity"])
        preset, overrides, nproc = was.preset, was.overrides, options.nproc or was.nproc
    return folder, Identity(name, preset, overrides, nproc, code)


def check_flags(words: Sequence[str], parser: argparse.ArgumentParser) -> None:
    """Catch a mistyped flag of ours before it travels to the trainer as one of its own."""
    own = [flag[2:] for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    for word in words:
        name = word[2:].partition("=")[0] if word.startswith("--") else ""
        near = difflib.get_close_matches(name, own, n=1, cutoff=0.85)
        if near and near[0].replace("-", "_") != name:
            raise SeriesError(f"unknown flag --{name}; did you mean --{near[0]}?")


def run_command(argv: Sequence[str]) -> int:
    """Start or continue a series, then report and judge."""
    parser = build_parser()
    options, rest = parser.parse_known_args(argv)
    check_flags(rest, parser)
    folder, wanted = series_from(options, parse_overrides(rest))
    with sole_start(folder):
        series = open_series(folder, wanted, Path(options.trainer))
        settle_lost(series)
        series, plan = with_plan(series, options)
        return run_and_judge(series, options, plan)


def with_plan(series: Series, options: argparse.Namespace):
    """(series, its plan or None). A series is sequential from its first run on or never. Raises SeriesError."""
    if not options.sequential:
        if any(value is not None for value in (options.plan, options.margin, options.sigma)):
            raise SeriesError("--plan, --margin and --sigma belong to --sequential")
        if series.plan_hash:
            raise SeriesError(f"{series.folder} has a plan: continue it with --sequential")
        return series, None
    if not series.plan_hash and series.ledger.events():
        raise SeriesError(f"{series.folder} began without a plan: a sequential series needs another --name")
    from records.sequential import plan_of, target_loss

    identity = series.identity
    try:
        plan = plan_of(
            series.folder,
            options.plan,
            lambda: target_loss(series.trainer, identity.preset, identity.overrides),
            options.margin,
            options.sigma,
        )
    except (StatsError, ValueError) as error:
        raise SeriesError(str(error)) from None
    if series.plan_hash not in ("", plan.hash):
        raise SeriesError(f"{series.folder / 'plan.json'} is not the plan that this series began with")
    record = read_record(series.folder)
    write_record(series.folder, record | {"plan_hash": plan.hash})
    return replace(series, plan_hash=plan.hash), plan


def make_launcher(series: Series, options: argparse.Namespace):
    """Where the runs go: one after the other, side by side, or to a cluster. Raises SeriesError."""
    nproc = series.identity.nproc
    try:
        if options.launcher != "slurm":
            return Local(slots(options.parallel if options.launcher == "local" else None, nproc))
        from records.slurm import Request, Slurm

        gpus = options.gpus
        if gpus is None:
            gpus = nproc if visible_gpus() or series.identity.preset != "nano" else 0
        more = dict(word.partition("=")[::2] for word in options.slurm)
        request = Request(
            minutes=options.minutes,
            partition=options.partition,
            gpus=gpus,
            cores=max(1, nproc if not gpus else 4 * nproc),
            at_once=options.parallel or 256,
            cluster=options.cluster,
            more=more,
        )
        return Slurm(series.folder, request)
    except ValueError as error:
        raise SeriesError(str(error)) from None


def run_and_judge(series: Series, options: argparse.Namespace, plan=None) -> int:
    """The series' work, with the folder held."""
    repeats = options.repeats or (plan.cap if plan else 1)
    if plan and repeats > plan.cap:
        raise SeriesError(f"--repeats {repeats}: the plan allows {plan.cap} runs at most")
    launcher = make_launcher(series, options)
    adopted = launcher.adopt() if options.launcher == "slurm" else set()
    tasks, crashed = choose(series, repeats, options.retry_crashed, adopted)
    print(f"{series.folder}: {repeats} runs wanted, {len(tasks)} to start, {len(crashed)} stay crashed", flush=True)
    for state in crashed:
        end = state.attempts[-1].end or {}
        print(f"  {state.run} crashed: {end.get('error')} (again with --retry-crashed)", flush=True)
    decided = None
    if plan:
        from records.sequential import Watch

        decided = Watch(series.folder, plan)
    runner = Runner(
        series,
        launcher,
        quiet=options.launcher is not None,
        timeout_s=options.timeout_s,
        decide=decided,
        copy_to=options.copy_to,
    )
    try:
        runner.run(tasks)
    except (Stopped, SeriesError) as stop:
        if not options.no_judge:
            from records import report

            report.write_report(series.folder, options.alpha)
        copy_away(series.folder, options.copy_to)
        if isinstance(stop, Stopped):
            print(f"stopped by {stop}; the same command continues where it stopped", file=sys.stderr)
            return 128 + stop.number
        raise
    verdict = 0
    if not options.no_judge:
        from records import report

        verdict = report.judge(series.folder, alpha=options.alpha)
    if not copy_away(series.folder, options.copy_to):
        return EXIT_IO
    return verdict if not (runner.crashes or crashed) else EXIT_CRASHED


def amend_command(verb: str, argv: Sequence[str]) -> int:
    """`drop`: leave an unfinished run out of the verdict. `lost`: note that a run ended unrecorded. With
    a reason."""
    parser = argparse.ArgumentParser(prog=f"python -m records.series {verb}", description=amend_command.__doc__)
    parser.add_argument("name", help="the series")
    parser.add_argument("run", help="seed-003, say")
    parser.add_argument("--reason", required=True, help="why; published with the series")
    parser.add_argument("--root", default=str(REPO / "records"), metavar="DIR")
    options = parser.parse_args(argv)
    folder, run, reason = Path(options.root) / options.name, options.run, options.reason.strip()
    if read_record(folder) is None:
        raise SeriesError(f"no series at {folder}")
    state = Ledger(folder).runs().get(run)
    if state is None:
        raise SeriesError(f"{folder} has no run {run}")
    if not reason:
        raise SeriesError("--reason is empty: say why, it is published with the series")
    if verb == "drop":
        if state.status == "finished":
            raise SeriesError(
                f"{run} finished, and stays in the verdict: dropping a run after seeing its loss "
                "makes every p-value wrong"
            )
        if state.status == "crashed" and state.attempts[-1].end.get("exit_code") == EXIT_NON_FINITE:
            raise SeriesError(
                f"{run} ended because its loss was not finite: that is a result, and stays in the verdict"
            )
        Ledger(folder).append("drop", run=run, reason=reason)
        print(f"{run} is left out of {folder.name}: {reason}")
        return 0
    if state.status not in ("elsewhere", "lost"):
        raise SeriesError(f"{run} is {state.status}: only a run without an end can be lost")
    fields = {"run": run, "attempt": state.attempts[-1].number, "exit_code": None, "settled_later": True}
    Ledger(folder).append("end", **fields, status="crashed", error=f"lost: {reason}", lost=True)
    print(f"{run} of {folder.name} is recorded as lost: {reason}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] in (["drop"], ["lost"]):
            return amend_command(argv[0], argv[1:])
        return run_command(argv)
    except SeriesError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except SlurmError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except StatsError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except LedgerError as error:
        print(f"error: {error.strerror}", file=sys.stderr)
        return EXIT_IO
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; check the folder's rights and free space", file=sys.stderr)
        return EXIT_IO


if __name__ == "__main__":
    sys.exit(main())
