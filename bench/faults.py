"""The fault campaign: break running trainings in every way of a list, and check what is left of them.

    python -m bench.faults --seed 1 --runs 100      # all kinds in turn; bench/results/faults-<device>.json
    python -m bench.faults --kind "disk full" --runs 5
    python -m bench.faults --page                   # docs/faults.md from the kept results

Each run trains a tiny model with the real program, hurts it once, then does what a user would do: give the
command again with `--resume=auto` once the cause is gone. It must end in one of two ways:

    resumed   it went on, and ends bit for bit as the undisturbed run: every loss in the log, every validation
              in the JSON, every tensor of the last checkpoint
    stopped   it ended with the exit code and a message that names the cause, and every checkpoint that its log
              had reported is there and whole; with the cause gone it then goes on as above

Processes are forked from one that has imported torch, so a run costs about a second. Several ranks run under
torch's elastic agent, the engine of `torchrun --max-restarts`; some runs use the `torchrun` command itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from bench.common import RESULTS, read_result, table, write_result
from bench.fault_injection import PLACES, Fault, arm, damage_shard
from trainer.files import checkpoints_of
from trainer.options import command, setting

REPO = Path(__file__).resolve().parent.parent
TINY = dict(
    preset="nano",
    num_iterations=10,
    tokens_per_step=256,
    train_seq_len=64,
    val_seq_len=128,
    val_tokens=256,
    val_loss_every=3,
    checkpoint_every=2,
    warmup_steps=0,
    num_layers=2,
    model_dim=16,
    num_heads=1,
    unet_skips="0>1",
    long_window_layers="0",
    block_tokens=16,
    window_max_tokens=64,
    device="cpu",
    run_name="run",
)
LIMIT_S = 240  # a start that takes longer hangs
RESUME = ("--resume=auto",)


# ------------------------------------------------------------------------------------------------------------
# Processes


@dataclass
class Ended:
    """How one start of the training ended. `code` is negative for a signal, None for a hang."""

    code: int | None
    output: str

    @property
    def message(self) -> str:
        """What the program says of its own end; the last line otherwise."""
        own = re.findall(r"^train_gpt\.py: (.*)$", self.output, re.MULTILINE)
        return own[0] if own else (self.output.strip().splitlines() or [""])[-1]


def fork(work: Callable[[], int], output: Path) -> int:
    """Start `work` in a process of its own, in a process group of its own; its exit code is what it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        faulthandler.dump_traceback_later(LIMIT_S * 0.9, file=2)  # a hang shows where it hangs
        code = work()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def wait(pid: int, output: Path) -> Ended:
    """Wait for a forked process, kill what is left of its group, return its end."""
    status = None
    for _ in range(LIMIT_S * 100):  # not by the clock: a machine that was suspended is no hang
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.01)
    else:
        os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return Ended(None, output.read_text(errors="replace"))
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return Ended(os.waitstatus_to_exitcode(status), output.read_text(errors="replace"))


def train(arguments: list[str], fault: Fault | None, folder: Path) -> int:
    """In a child: the program with a fault armed."""
    import train_gpt

    arm(fault, folder)
    return train_gpt.main(arguments)


def rank_of_agent(arguments: list[str], fault: Fault | None, folder: Path) -> None:
    """In a process of torch's elastic agent: the program as torchrun starts it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the agent's own handlers came along with the fork
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = train(arguments, fault, folder)
    sys.stdout.flush()
    if code:
        sys.exit(code)


def agent(nproc: int, restarts: int, arguments: list[str], fault: Fault | None, folder: Path) -> int:
    """In a child: `torchrun --nproc_per_node=nproc --max-restarts=restarts`, its processes forked from here."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc,
        max_restarts=restarts,
        monitor_interval=0.05,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        start_method="fork",
    )
    try:
        elastic_launch(config, rank_of_agent)(arguments, fault, folder)
    except ChildFailedError as error:
        return max(failure.exitcode for failure in error.failures.values()) or 1
    return 0


# ------------------------------------------------------------------------------------------------------------
# One run's place in the file system


@dataclass
class Sandbox:
    """Folders of one run: shards of its own, its output, what its processes print."""

    folder: Path
    nproc: int = 1
    communication: str = "plain"  # of several ranks
    ends: list[Ended] = field(default_factory=list)

    @property
    def out(self) -> Path:
        """The run's output folder."""
        return self.folder / "out"

    @property
    def checkpoints(self) -> list[Path]:
        """The run's checkpoints, the newest first."""
        return checkpoints_of(self.out / "run.checkpoints")

    def arguments(self, *more: str) -> list[str]:
        """The program's command line."""
        shards = self.folder / "shards"
        fields = TINY | dict(
            train_files=f"{shards}/train_*.bin",
            val_files=f"{shards}/val_*.bin",
            output_dir=str(self.out),
            communication=self.communication,
        )
        given = {word.partition("=")[0].removeprefix("--") for word in more}  # a flag may be given once
        return [f"--{name}={value}" for name, value in fields.items() if name not in given] + list(more)

    def begin(self, *more: str, fault: Fault | None = None, restarts: int = 0) -> tuple[int, Path]:
        """Start the run; returns process and output file."""
        output = self.folder / f"output-{len(list(self.folder.glob('output-*')))}"
        output.touch()
        if self.nproc == 1:
            work = functools.partial(train, self.arguments(*more), fault, self.folder)
        else:
            work = functools.partial(agent, self.nproc, restarts, self.arguments(*more), fault, self.folder)
        return fork(work, output), output

    def start(self, *more: str, fault: Fault | None = None, restarts: int = 0) -> Ended:
        """Start the run and wait for its end."""
        self.ends.append(wait(*self.begin(*more, fault=fault, restarts=restarts)))
        return self.ends[-1]


def make_shards(folder: Path) -> None:
    """Two training shards and one for validation: words with a skewed distribution, so that there is something
    to learn."""
    import numpy as np

    from data.shards import write_shard

    generator = np.random.default_rng(0)
    words = [bytes(generator.integers(97, 123, size=generator.integers(2, 7)).astype(np.uint8)) for _ in range(40)]
    text = b" ".join(words[i] for i in generator.zipf(1.5, 2000).clip(1, 40) - 1)
    tokens = np.frombuffer(text, np.uint8).astype(np.uint16).copy()
    tokens[::100] = 0
    for name, part in {"train_0": slice(0, 900), "train_1": slice(900, 4000), "val_0": slice(4000, 4600)}.items():
        write_shard(folder / f"{name}.bin", tokens[part])


# ------------------------------------------------------------------------------------------------------------
# What must hold


@dataclass
class Trace:
    """Everything about a finished run that must not depend on what happened to it."""

    losses: list[tuple[str, ...]]
    validation: list[tuple[int, float]]
    tensors: dict[str, bytes]


def trace_of(out: Path) -> Trace:
    """Read a finished run. Raises whatever is wrong with it."""
    from stats.runs import parse_log
    from stats.values import final_validation
    from train_gpt import CHECKPOINT_FORMAT
    from trainer.checkpoints import load_tensors

    text = (out / "run.txt").read_text()
    body = text.rpartition("=" * 100)[2]
    losses = re.findall(r"^step:(\d+)/\d+ (val_loss|train_loss):(\S+)", body, re.MULTILINE)
    summary = json.loads((out / "run.json").read_text())
    if summary["status"] != "finished":
        raise ValueError(f"the JSON says {summary['status']}")
    validation = [(point["step"], point["loss"]) for point in summary["validation"]]
    with open(out / "run.txt", "rb") as file:
        (run,) = parse_log(file, "run.txt")
    if abs(final_validation(run).loss - validation[-1][1]) > 1e-6:  # raises for whatever does not fit in the log
        raise ValueError("log and JSON disagree")
    newest = max((out / "run.checkpoints").glob("step-*"))
    _, tensors = load_tensors(newest, CHECKPOINT_FORMAT)
    data = {name: f"{t.dtype}{tuple(t.shape)}".encode() + t.numpy().tobytes() for name, t in tensors.items()}
    return Trace(losses, validation, data)


def differences(out: Path, wanted: Trace) -> list[str]:
    """What distinguishes the finished run in `out` from the undisturbed one; empty if nothing does."""
    try:
        found = trace_of(out)
    except Exception as error:
        return [f"the run cannot be read: {type(error).__name__}: {error}"]
    problems = []
    if found.losses != wanted.losses:
        problems.append(f"losses in the log: {found.losses} instead of {wanted.losses}")
    if found.validation != wanted.validation:
        problems.append(f"validations in the JSON: {found.validation} instead of {wanted.validation}")
    if found.tensors.keys() != wanted.tensors.keys():
        problems.append("the last checkpoint has other tensors")
    else:
        other = [name for name, data in wanted.tensors.items() if found.tensors[name] != data]
        problems += [f"tensors of the last checkpoint: {', '.join(other)}"] if other else []
    left = [path.name for path in out.rglob("*") if path.name.endswith((".part", ".partial"))]
    return problems + ([f"left behind: {', '.join(left)}"] if left else [])


def promised(out: Path) -> list[int]:
    """Steps of the checkpoints that the log has reported as saved and that the run keeps, the newest first."""
    log = out / "run.txt"
    text = log.read_text(errors="replace").rpartition("=" * 100)[2] if log.exists() else ""
    steps = sorted({int(step) for step in re.findall(r"^checkpoint:(\d+) .*\n", text, re.MULTILINE)}, reverse=True)
    return steps[:2]


def broken_promises(out: Path) -> list[str]:
    """Reported checkpoints that are not there or not whole."""
    from train_gpt import CHECKPOINT_FORMAT
    from trainer.checkpoints import CheckpointError, load_tensors

    problems = []
    for step in promised(out)[:1]:  # an older one may just have made way for one that is not reported yet
        try:
            load_tensors(out / "run.checkpoints" / f"step-{step:06d}.safetensors", CHECKPOINT_FORMAT)
        except CheckpointError as error:
            problems.append(f"reported as saved, but {error}")
    return problems


@dataclass
class Outcome:
    """What became of one run."""

    kind: str
    fault: dict
    ending: str = ""  # resumed or stopped
    message: str = ""  # of a stopped run
    codes: list = field(default_factory=list)
    restarted_at: list = field(default_factory=list)  # steps of the checkpoints that starts went on from
    problems: list = field(default_factory=list)


class Campaign:
    """The undisturbed runs, and the way from a kind to an outcome."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shards = folder / "shards"
        self.wanted: dict[tuple[int, str], Trace] = {}
        self.seconds: dict[int, float] = {}
        self.size_bytes = 0
        self.count = 0
        make_shards(self.shards)

    def sandbox(self, name: str, nproc: int = 1, communication: str = "plain") -> Sandbox:
        """Fresh folders."""
        folder = self.folder / name
        shutil.copytree(self.shards, folder / "shards")
        return Sandbox(folder, nproc, communication)

    def reference(self, nproc: int, communication: str) -> Trace:
        """The undisturbed run with so many processes; trained at first need."""
        key = nproc, communication
        if key not in self.wanted:
            box = self.sandbox(f"undisturbed-{nproc}-{communication}", nproc, communication)
            before = time.monotonic()
            end = box.start()
            self.seconds[nproc] = time.monotonic() - before
            if end.code != 0:
                raise RuntimeError(f"the undisturbed run of {nproc} processes failed:\n{end.output}")
            self.wanted[key] = trace_of(box.out)
            self.size_bytes = sum(path.stat().st_size for path in box.out.rglob("*") if path.is_file())
        return self.wanted[key]

    def run(self, kind: str, seed: str) -> Outcome:
        """One run of `kind`; `seed` decides every detail of it."""
        draw = random.Random(seed)
        outcome = Outcome(kind, {})
        case = KINDS[kind]
        self.count += 1
        communication = draw.choice(["plain", "overlap"]) if case.nproc > 1 else "plain"
        box = self.sandbox(f"run-{self.count}", case.nproc, communication)
        wanted = self.reference(case.nproc, communication)
        try:
            with contextlib.ExitStack() as stack:
                case.hurt(self, box, draw, outcome, stack)
                outcome.problems += differences(box.out, wanted)
        except Unexpected as error:
            outcome.problems.append(str(error))
        outcome.codes = [end.code for end in box.ends]
        outcome.ending = outcome.ending or "resumed"
        text = "\n".join(end.output for end in box.ends)
        outcome.restarted_at = resumed_at(text)
        if outcome.problems:
            outcome.problems.append(text[-4000:])
        else:
            shutil.rmtree(box.folder, ignore_errors=True)
        return outcome


def resumed_at(output: str) -> list[int]:
    """Steps of the checkpoints from which the starts that printed `output` went on."""
    return [int(step) for step in re.findall(r"^resumed from the checkpoint of step (\d+)", output, re.MULTILINE)]


class Unexpected(Exception):
    """A start ended in a way that is neither of the two."""


def goes_on(box: Sandbox, *more: str) -> None:
    """The user's second command: it must finish, and must not start further back than what was reported."""
    reported = max(promised(box.out), default=0)
    end = box.start(*RESUME, *more)
    if end.code != 0:
        raise Unexpected(f"resuming ended with {end.code}: {end.message}")
    went_on_at = max(resumed_at(end.output), default=0)
    if went_on_at < reported:
        raise Unexpected(f"resumed from step {went_on_at}, though step {reported} had been reported as saved")


def stopped(outcome: Outcome, box: Sandbox, codes: set[int], cause: str) -> bool:
    """Check that the last start ended with one of `codes`, naming the cause, nothing lost. False: it was not hit."""
    end = box.ends[-1]
    if end.code == 0:
        return False
    if end.code not in codes:
        raise Unexpected(f"ended with {end.code}, expected {sorted(codes)}: {end.message}")
    if not re.search(cause, end.message):
        raise Unexpected(f"the message {end.message!r} does not name the cause ({cause})")
    if "Traceback" in end.output:
        raise Unexpected("a traceback beside the message")
    outcome.problems += broken_promises(box.out)
    outcome.ending, outcome.message = "stopped", end.message.replace(str(box.folder), "...")
    return True


# ------------------------------------------------------------------------------------------------------------
# The kinds


@dataclass(frozen=True)
class Kind:
    """One way to hurt a run. `hurt` leaves a finished run, or raises Unexpected."""

    hurt: Callable[[Campaign, Sandbox, random.Random, Outcome, contextlib.ExitStack], None]
    nproc: int = 1


def draw_place(draw: random.Random) -> dict:
    """A place and one of its passes."""
    place = draw.choice(list(PLACES))
    return dict(place=place, call=draw.randint(1, PLACES[place]))


def hit_at_a_place(action: str, everyone: bool = False):
    """A signal at a place in the program. One process: resumed by hand; more: restarted by the agent."""

    def hurt(campaign, box, draw, outcome, stack):
        where = draw_place(draw)
        rank_0_only = where["place"].startswith(("in a checkpoint", "in a log", "in the summary"))
        rank = 0 if rank_0_only else draw.randrange(box.nproc)
        fault = Fault(action, rank=rank, everyone=everyone, **where)
        outcome.fault = asdict(fault)
        if box.nproc > 1:
            end = box.start(*RESUME, fault=fault, restarts=2)
            if end.code != 0:
                raise Unexpected(f"with restarts it ended with {end.code}: {end.message}")
            return
        end = box.start(fault=fault)
        allowed = {"kill -9": {-9}, "SIGTERM": {143, -15}, "SIGINT": {130, -2}}[action]
        if end.code not in allowed | {0}:
            raise Unexpected(f"ended with {end.code} after {action}: {end.message}")
        outcome.problems += broken_promises(box.out)
        if end.code != 0:
            goes_on(box)

    return hurt


def hit_at_a_moment(number: int, whole_group: bool = True):
    """A signal at a random moment, import to end; with an agent, to it and all its ranks, as scancel or Ctrl-C do."""

    def hurt(campaign, box, draw, outcome, stack):
        delay_s = draw.random() * campaign.seconds[box.nproc]
        outcome.fault = dict(action=signal.Signals(number).name, after_s=round(delay_s, 3))
        pid, output = box.begin(*RESUME, restarts=1)
        deadline = time.monotonic() + LIMIT_S
        while len(list(box.folder.glob("pid-*"))) < box.nproc and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(delay_s)
        with contextlib.suppress(ProcessLookupError):
            (os.killpg if whole_group else os.kill)(pid, number)
        box.ends.append(wait(pid, output))
        if box.ends[-1].code is None:
            raise Unexpected("it hangs")
        outcome.problems += broken_promises(box.out)
        goes_on(box)

    return hurt


def mounted(box: Sandbox, size_bytes: int, stack: contextlib.ExitStack) -> Callable[[str], None]:
    """Make the output folder a file system of its own; returns a function that remounts it with other options."""
    box.out.mkdir(exist_ok=True)

    def mount(*options: str) -> None:
        subprocess.run(["mount", *options, str(box.out)], check=True, capture_output=True)

    mount("-t", "tmpfs", "-o", f"size={size_bytes // 1024}k", "tmpfs")
    stack.callback(subprocess.run, ["umount", "-l", str(box.out)], check=False, capture_output=True)
    return lambda options: mount("-o", f"remount,{options}")


@functools.cache
def can_mount() -> bool:
    """True if this process may mount file systems."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", folder], capture_output=True, check=True)
        return done.returncode == 0


def disk_full(campaign, box, draw, outcome, stack):
    """The disk is too small by a random amount; then somebody makes room."""
    size = int(campaign.size_bytes * draw.uniform(0.05, 1.3))
    outcome.fault = dict(action="disk full", size_bytes=size, means="file system" if can_mount() else "file size limit")
    if can_mount():
        remount = mounted(box, size, stack)
        end = box.start()
        hit = stopped(outcome, box, {5}, "No space left on device")
        remount("size=100m")
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 3, before[1]))
        end = box.start()
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        hit = stopped(outcome, box, {5}, "File too large")
    if hit:
        goes_on(box)
    elif end.code != 0:
        raise Unexpected(f"ended with {end.code}")


def read_only(campaign, box, draw, outcome, stack):
    """The folder is read-only, at the first start or when the run is resumed; then it is writable again."""
    at_first = draw.random() < 0.5
    outcome.fault = dict(action="read-only", at="the first start" if at_first else "the second start")
    box.out.mkdir()
    if can_mount():
        remount = mounted(box, 100 << 20, stack)
        switch = lambda writable: remount("rw" if writable else "ro")  # noqa: E731
    else:
        switch = lambda writable: box.out.chmod(0o700 if writable else 0o500)  # noqa: E731
    if not at_first:
        box.start(fault=Fault("kill -9", "in a step, before the update", draw.randint(3, 9)))
    switch(False)
    box.start(*RESUME)
    if not stopped(outcome, box, {5}, "Read-only file system|Permission denied"):
        raise Unexpected("it trained into a read-only folder")
    switch(True)
    goes_on(box)


def damaged_checkpoint(how: str, every: bool = False):
    """Killed, and then the newest checkpoint (or each one) turns out to be damaged."""

    def hurt(campaign, box, draw, outcome, stack):
        call = draw.randint(5, 9)
        box.start(fault=Fault("kill -9", "in a step, before the update", call))
        outcome.fault = dict(action=how, after_step=call, which="all" if every else "the newest")
        for path in box.checkpoints if every else box.checkpoints[:1]:
            data = bytearray(path.read_bytes())
            if how == "cut short":
                data = data[: draw.randrange(len(data))]
            else:
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
        newest = box.checkpoints[0]
        if not every:
            end = box.start(*RESUME)
            if end.code != 0 or f"warning: {newest}" not in end.output:
                raise Unexpected(f"ended with {end.code}, no warning of {newest.name}: {end.message}")
            return
        box.start(*RESUME)
        end = box.ends[-1]
        if end.code != 3 or "checkpoints is whole; move them away" not in end.message:
            raise Unexpected(f"ended with {end.code}: {end.message}")
        outcome.ending, outcome.message = "stopped", end.message.replace(str(box.folder), "...")
        shutil.rmtree(newest.parent)  # what the message says
        box.start(*RESUME)

    return hurt


def damaged_shard(action: str):
    """A shard is changed while it is read; the run is resumed with the shard still wrong, then with it put right."""

    def hurt(campaign, box, draw, outcome, stack):
        name = draw.choice(["train_0.bin", "train_1.bin", "val_0.bin"])
        target = box.folder / "shards" / name
        fault = Fault(action, call=draw.randint(1, 8), target=str(target), amount=draw.random())
        outcome.fault = asdict(fault) | dict(target=name)
        box.start(fault=fault)
        cause = rf"{re.escape(str(target))}.*(changed while|cut short|too short|or is damaged)"
        stopped(outcome, box, {3}, cause)  # or it had read all that it wanted of the shard
        damage_shard(fault) if not box.ends[-1].code else None
        if box.ends[-1].code:
            box.start(*RESUME)
            still = cause if action == "shrink" else rf"{cause}|made with other data"
            if not stopped(outcome, box, {3}, still):
                raise Unexpected(f"it went on with a shard that is not the one it began with ({name})")
        shutil.copyfile(campaign.shards / name, target)
        if box.ends[-1].code:
            goes_on(box)

    return hurt


def nan_gradient(campaign, box, draw, outcome, stack):
    """One element of a gradient is NaN: stopped at once, then resumed from the checkpoint before."""
    fault = Fault("NaN", call=draw.randint(1, 10), rank=draw.randrange(box.nproc), amount=draw.random())
    outcome.fault = asdict(fault)
    if box.nproc > 1:
        end = box.start(*RESUME, fault=fault, restarts=1)
        if end.code != 0 or not re.search(r"loss (at step \d+ )?is nan|not finite", end.output):
            raise Unexpected(f"with a restart it ended with {end.code}: {end.message}")
        return
    box.start(fault=fault)
    if not stopped(outcome, box, {4}, r"loss (at step \d+ )?is nan|weight is not finite"):
        raise Unexpected("it trained on with NaN")
    goes_on(box)


def two_starts(campaign, box, draw, outcome, stack):
    """The same command twice at the same time: one trains, the other is refused."""
    flag = draw.choice(["", "--resume=auto", "--overwrite"])
    delay_s = draw.random() * campaign.seconds[1] * 0.9
    outcome.fault = dict(action="two starts", flag=flag, delay_s=round(delay_s, 3))
    first = box.begin(*filter(None, [flag]))
    time.sleep(delay_s)
    second = box.begin(*filter(None, [flag]))
    box.ends += [wait(*first), wait(*second)]
    cause = "another process is writing|exists; choose"
    refused = [end for end in box.ends if end.code == 2 and re.search(cause, end.message)]
    fine = [end for end in box.ends if end.code == 0]
    outcome.ending = "stopped" if refused else "resumed"
    outcome.message = refused[0].message.replace(str(box.folder), "...") if refused else ""
    if not fine or len(fine) + len(refused) != 2:
        raise Unexpected(f"ended with {[end.code for end in box.ends]}: {[end.message for end in box.ends]}")


def wrong_clock(campaign, box, draw, outcome, stack):
    """The wall clock runs backwards from 2001 on, in the run and in its files; killed and resumed meanwhile."""
    outcome.fault = dict(action="clock")
    killed_at = draw.randint(3, 9)
    box.start(fault=Fault("kill -9", "in a step, before the update", killed_at))
    for age, path in enumerate(box.checkpoints):
        os.utime(path, (1e9 + 1e6 * age, 1e9 + 1e6 * age))  # the oldest has the latest date
    end = box.start(*RESUME, fault=Fault("clock", start=2))
    if end.code != 0:
        raise Unexpected(f"ended with {end.code}: {end.message}")
    body = (box.out / "run.txt").read_text().rpartition("=" * 100)[2]
    times_ms = [int(ms) for ms in re.findall(r"^step:.* train_time:(-?\d+)ms", body, re.MULTILINE)]
    if times_ms != sorted(times_ms) or times_ms[0] < 0:
        raise Unexpected(f"training times that do not grow: {times_ms}")


def torchrun(action: str, everyone: bool):
    """The torchrun command itself; its processes start Python anew, so a run of these takes half a minute."""

    def hurt(campaign, box, draw, outcome, stack):
        place = draw.choice(["in a step, before the update", "in a validation", "in a checkpoint, half written"])
        fault = Fault(action, place, draw.randint(1, 4), rank=0, everyone=everyone)
        outcome.fault = asdict(fault)
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--max-restarts=2",
            "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0",
            "-m",
            "bench.fault_injection",
            json.dumps(asdict(fault)),
            str(box.folder),
            *box.arguments(*RESUME),
        ]
        done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=2 * LIMIT_S)
        box.ends.append(Ended(done.returncode, done.stdout + done.stderr))
        if done.returncode:
            raise Unexpected(f"torchrun ended with {done.returncode}")

    return hurt


KINDS: dict[str, Kind] = {
    "kill -9 at a place in the program": Kind(hit_at_a_place("kill -9")),
    "kill -9 at a random moment": Kind(hit_at_a_moment(signal.SIGKILL)),
    "SIGTERM at a place in the program": Kind(hit_at_a_place("SIGTERM")),
    "SIGINT at a place in the program": Kind(hit_at_a_place("SIGINT")),
    "kill -9 of one rank of two, restarted": Kind(hit_at_a_place("kill -9"), 2),
    "kill -9 of both ranks, restarted": Kind(hit_at_a_place("kill -9", everyone=True), 2),
    "SIGTERM of one rank of two, restarted": Kind(hit_at_a_place("SIGTERM"), 2),
    "SIGTERM of both ranks, restarted": Kind(hit_at_a_place("SIGTERM", everyone=True), 2),
    "kill -9 of both ranks and their agent": Kind(hit_at_a_moment(signal.SIGKILL), 2),
    "SIGTERM of the agent alone": Kind(hit_at_a_moment(signal.SIGTERM, whole_group=False), 2),
    "Ctrl-C: SIGINT of the ranks and their agent": Kind(hit_at_a_moment(signal.SIGINT), 2),
    "disk full": Kind(disk_full),
    "read-only folder": Kind(read_only),
    "newest checkpoint cut short": Kind(damaged_checkpoint("cut short")),
    "newest checkpoint with a flipped bit": Kind(damaged_checkpoint("bit flipped")),
    "every checkpoint damaged": Kind(damaged_checkpoint("bit flipped", every=True)),
    "shard that shrinks while it is read": Kind(damaged_shard("shrink")),
    "shard rewritten while it is read": Kind(damaged_shard("rewrite")),
    "NaN in a gradient": Kind(nan_gradient),
    "NaN in a gradient of one rank of two, restarted": Kind(nan_gradient, 2),
    "two starts with one name": Kind(two_starts),
    "wrong clock": Kind(wrong_clock),
    "torchrun command, kill -9 of one rank": Kind(torchrun("kill -9", everyone=False), 2),
    "torchrun command, SIGTERM of all ranks": Kind(torchrun("SIGTERM", everyone=True), 2),
}
SLOW_KINDS = tuple(kind for kind in KINDS if kind.startswith("torchrun command"))


def campaign(
    seed: int, runs: int, kinds: list[str], folder: Path, show=print, minutes: float = float("inf")
) -> list[Outcome]:
    """`runs` runs, or as many as begin within `minutes`, the kinds in turn; every 25th turn is a slow kind's."""
    import train_gpt  # once, here, for every process that is forked; and so are the program's files parsed once
    from trainer.program import program_files

    program_files(train_gpt.__file__)

    quick, slow = [k for k in kinds if k not in SLOW_KINDS], [k for k in kinds if k in SLOW_KINDS]
    work = Campaign(folder)
    outcomes, end = [], time.monotonic() + 60 * minutes
    for number in range(runs):
        if time.monotonic() > end:
            break
        turn_of_slow = slow and (not quick or number % 25 == 24)
        kind = slow[(number // 25) % len(slow)] if turn_of_slow else quick[number % len(quick)]
        outcome = work.run(kind, f"{seed}-{number}-{kind}")
        outcomes.append(outcome)
        trouble = f"; PROBLEM: {outcome.problems[0]}" if outcome.problems else ""
        show(f"{number + 1}/{runs} {kind}: {outcome.ending}{trouble}")
    return outcomes


# ------------------------------------------------------------------------------------------------------------
# The page


def page(result: dict, fuzz: dict | None, load: dict | None) -> str:
    """docs/faults.md from the kept results."""
    outcomes = result["result"]["outcomes"]
    rows = []
    for kind in dict.fromkeys(o["kind"] for o in outcomes):
        mine = [o for o in outcomes if o["kind"] == kind]
        messages = sorted({re.sub(r"\d{3,}|step-\d+", "N", o["message"]) for o in mine if o["message"]}, key=len)
        rows.append(
            {
                "fault": kind,
                "runs": len(mine),
                "resumed": sum(o["ending"] == "resumed" for o in mine),
                "stopped": sum(o["ending"] == "stopped" for o in mine),
                "neither": sum(bool(o["problems"]) for o in mine),
                "what it says": messages[0].replace("|", "/")[:150] if messages else "",
            }
        )
    good = sum(not o["problems"] for o in outcomes)
    env = result["environment"]
    lines = [
        "# Faults: what was tried, and what happened",
        "",
        "Generated by `python -m bench.faults --page`; do not edit.",
        "",
        f"`{result['command']}` on {result['date']} ({env['cpu']}, torch {env['torch']}): "
        f"**{good} of {len(outcomes)} runs ended in one of the two allowed ways.**",
        "",
        "- *resumed*: went on after a restart or after `--resume=auto`, and ended bit for bit as the undisturbed run "
        "(every loss in the log, every validation, every tensor of the last checkpoint).",
        "- *stopped*: ended with an exit code and a message that names the cause, every checkpoint that had been "
        "reported as saved being there and whole; with the cause removed it then went on and ended bit for bit as the "
        "undisturbed run.",
        "",
        "Each run trains a model of two layers for 10 steps on the CPU, with a checkpoint every second step. Places "
        "are drawn from: " + "; ".join(PLACES) + ". Not tried: GPUs and NCCL, a network that fails, power cuts.",
        "",
        table(rows),
        "",
    ]
    if fuzz:
        lines += [
            "## Hostile inputs",
            "",
            "`python -m bench.fuzz --kind KIND`. Each case is generated (hypothesis, seeded): either a right "
            "answer or an error of ours with a message; no exception of a library, no hang, no memory blow-up. What "
            "was found on the way, and mended before these runs, is told in [LOG.md](LOG.md).",
            "",
            table(fuzz["result"]["kinds"], ["input", "cases", "answers", "errors of ours", "failures", "date"]),
            "",
        ]
    if load:
        told = load["result"]
        rows = [
            {"reader": n, "calls": r["n"], "median ms": round(r["median_ms"]), "slowest ms": round(r["max_ms"])}
            for n, r in told["readers"].items()
            if r
        ]
        lines += [
            "## Under load",
            "",
            f"`{load['command']}` on {load['date'][:10]}: a series of {told['runs']} runs, two at a time, alone and "
            "while these readers work on its folder without a pause. The median run took "
            f"{told['run_alone_s']:.1f} s alone and {told['run_loaded_s']:.1f} s under load "
            f"({told['slow_down']:.2f} times), the series {told['series_alone_s']:.0f} and "
            f"{told['series_loaded_s']:.0f} s. Wrong answers, failed readers or differing losses: "
            f"{len(told['problems'])}. Verdict, the same alone, under load and in the studio: "
            f"{told['verdict']['decision']}.",
            "",
            table(rows),
            "",
        ]
    return "\n".join(lines)


def write_page() -> Path:
    """docs/faults.md; returns its path."""
    result = read_result("faults")
    if result is None:
        raise SystemExit(f"no results in {RESULTS.relative_to(REPO)}: run the campaign first")
    path = REPO / "docs" / "faults.md"
    path.write_text(page(result, read_result("fuzz"), read_result("load")), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Options:
    """Which runs are hurt."""

    seed: int = setting(1, "seed", "of what happens when")
    runs: int = setting(100, "runs", "in all", at_least=1)
    minutes: float | None = setting(None, "minutes", "after which no run begins", above=0)
    kind: tuple = setting((), "kind", "only this one", choices=KINDS)
    json: str | None = setting(None, "file", "for the outcomes, in place of bench/results/")
    keep: str | None = setting(None, "folder", "for the runs' files, kept; else a temporary one")
    page: bool = setting(False, "flag", "write docs/faults.md from the kept results, run nothing")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if every run ended as it may."""
    _, options = command(__doc__, arguments, Options)
    if options.page:
        print(write_page().relative_to(REPO))
        return 0
    os.environ["OMP_NUM_THREADS"] = "1"
    with contextlib.ExitStack() as stack:
        folder = Path(options.keep or stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-")))
        show = functools.partial(print, flush=True)
        outcomes = campaign(
            options.seed, options.runs, options.kind or list(KINDS), folder, show, options.minutes or float("inf")
        )
    bad = [o for o in outcomes if o.problems]
    told = dict(seed=options.seed, good=len(outcomes) - len(bad), outcomes=[asdict(o) for o in outcomes])
    if options.json:
        Path(options.json).write_text(json.dumps(told, indent=1))
    elif not options.kind:
        print(f"kept in {write_result('faults', told).relative_to(REPO)}")
        write_page()
    for outcome in bad:
        print(f"\n{outcome.kind} {outcome.fault}\n  " + "\n  ".join(outcome.problems), file=sys.stderr)
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} runs resumed bit for bit or stopped with their cause")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
