"""A run's own record: the clock, the log in the speedrun's dialect, its JSON summary, and what shows progress.

The log begins with the source that ran, then the environment between two rulers, then

    step:125/5690 train_loss:4.31 train_time:28446ms step_avg:227.57ms      one line a step
    step:125/5690 val_loss:4.290908 train_time:28446ms step_avg:227.57ms    one line a validation

A validation's line goes on with `key:value` words: train_tokens and data_hash (trainer/evidence.py).
"""

from __future__ import annotations

import contextlib
import glob
import json
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import torch

from data.echo import mute, tell
from data.paths import atomic_file
from trainer.options import UsageError
from trainer.program import now

RULER = "=" * 100


class Clock:
    """Training time. It stops for validation and checkpoints, and waits for the device when it starts or stops."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0
        self.started: float | None = None

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def start(self) -> None:
        self._wait()
        self.started = time.perf_counter()

    def stop(self) -> float:
        """Total milliseconds of training so far; the clock stands still from here."""
        self._wait()
        if self.started is not None:
            self.seconds += time.perf_counter() - self.started
        self.started = None
        return self.seconds * 1000

    def read(self) -> float:
        """Total milliseconds so far, without waiting for the device or stopping."""
        return (self.seconds + (time.perf_counter() - self.started if self.started else 0.0)) * 1000


class RunLog:
    """One run's log (`<name>.txt`) and summary (`<name>.json`) in a folder.

    Args:
        config: all fields of the run; `config["seed"]` is used.
        environment: of `describe_environment`.
        source: the text of the program that runs.
        config_hash: one value for all runs of a series.
        total_steps: of the run; by default `config["num_iterations"]`.
        writes: False on the ranks that only follow.
        echo: print validations and other news too, not only log them.
    """

    exists_advice = "choose another --run_name, --resume=auto to continue it, or --overwrite"

    def __init__(
        self,
        folder: str | Path,
        name: str,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        source: str,
        config_hash: str,
        total_steps: int | None = None,
        writes: bool = True,
        echo: bool = True,
    ):
        self.folder, self.name, self.writes, self.echo = Path(folder), name, writes, writes and echo
        self.total_steps = config["num_iterations"] if total_steps is None else total_steps
        self.config, self.environment = dict(config), dict(environment)
        self.source, self.config_hash = source, config_hash
        self.text_path, self.json_path = self.folder / f"{name}.txt", self.folder / f"{name}.json"
        self.validation: list[dict] = []
        self.train_losses: list[float] = []
        self.listeners: list[Callable[[int, dict[str, float]], None]] = []  # told of every line's step and numbers
        self.started = now()
        self.untouched = False  # while a run that is to go on is still as it was left
        self.file: TextIO | None = None
        self.lock: TextIO | None = None

    def open(self, *, resuming: bool = False, overwrite: bool = False) -> None:
        """Begin the log, or continue it. Raises UsageError if a run of that name exists or is being written by
        another process, OSError if the folder cannot be written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        for path in (self.text_path, self.json_path):
            for left in self.folder.glob(f".{glob.escape(path.name)}.*.part"):  # by a process killed while it wrote
                left.unlink(missing_ok=True)
        if self.text_path.exists() and not (resuming or overwrite):
            raise UsageError(f"{self.text_path} exists; {self.exists_advice}")
        if not (resuming and self.text_path.exists()):
            with atomic_file(self.text_path, "w") as file:  # a log that exists has a whole header
                file.write(self._header())
        self.file = open(self.text_path, "a")
        self.untouched = resuming and self.json_path.exists()

    @contextlib.contextmanager
    def failure_told(self) -> Iterator[None]:
        """Log and JSON say of an error in the block that the run failed, and why; it is raised all the same."""
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(OSError):
                self.summary("failed", error=f"{type(error).__name__}: {error}")
                self.line(f"failed: {error}", echo=False)
            raise
        finally:
            self.close()  # now, not when it is collected: the next start in this process finds no lock

    def close(self) -> None:
        """Let go of the log and its lock; the process's end does the same."""
        for file in (self.file, self.lock):
            if file is not None:
                file.close()
        self.file = self.lock = None

    def _take_lock(self) -> None:
        """Two starts under one name must not mix their lines: the second one is refused."""
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            return
        self.lock = open(self.folder / f".{self.name}.lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"{self.text_path}: another process is writing this run") from None

    def _header(self) -> str:
        e = self.environment
        told = [
            self.source.rstrip("\n"),
            RULER,
            f"Running Python {e['python']}",
            f"Running PyTorch {e['torch']} compiled for {e['compute']}",
            f"Running Triton version {e['triton']}",
            f"Running on device_name={e['hardware']} with world_size={e['world_size']}",
            f"Assembled by ptxas {e['assembler']}",
            *(f"{key}:{value}" for key, value in e["hashes"].items() if value),
            "implementations:" + json.dumps(e["implementations"], sort_keys=True),
            *(["data:" + json.dumps(e["data"], sort_keys=True)] if "data" in e else []),
            "config:" + json.dumps(self.config, sort_keys=True),
            RULER,
        ]
        return "\n".join(told) + "\n"

    def line(self, text: str, *, echo: bool = True) -> None:
        """Append to the log, and print it."""
        if self.file is not None:
            try:
                self.file.write(text + "\n")
                self.file.flush()
            except OSError as error:
                with contextlib.suppress(OSError):
                    self.file.close()  # tries to write what is left; without this it would complain at exit
                self.file = None
                raise OSError(error.errno, error.strerror, str(self.text_path)) from error
        if echo and self.echo:
            say(text)

    def cut_back_to(self, step: int) -> None:
        """On resuming: take lines of steps after `step` out, since those steps are about to be done again. Raises
        UsageError for a log that is damaged."""
        self.untouched = False
        if self.file is None:
            return
        self.file.close()
        self.file = None
        header, body = self._parts()
        kept, gone = [], 0
        for text in body[: body.rfind("\n") + 1].splitlines():  # a last line without an end was cut by the disk
            number = text.removeprefix("step:").partition("/")[0] if text.startswith("step:") else ""
            beyond = number.isdigit() and int(number) > step
            gone += beyond
            if not beyond:
                kept.append(text)
        how = f"resumed from the checkpoint of step {step}" if step >= 0 else "no checkpoint: from the beginning"
        note = f"{how}; lines of later steps taken out: {gone}"
        with atomic_file(self.text_path, "w") as file:
            file.write(header + RULER + "\n" + "\n".join([*kept, note]) + "\n")
        self.file = open(self.text_path, "a")
        if self.echo:
            say(note)

    def _parts(self) -> tuple[str, str]:
        """Header and body of the log as it lies there. Raises UsageError if it is damaged."""
        advice = "move it away, and the run goes on in a new log"
        try:
            header, ruler, body = self.text_path.read_text(encoding="utf-8").rpartition(RULER + "\n")
        except UnicodeDecodeError as error:
            raise UsageError(f"{self.text_path}: damaged, byte {error.start} is no UTF-8 text; {advice}") from error
        if not ruler:
            raise UsageError(f"{self.text_path}: damaged, its header has no end; {advice}")
        return header, body

    def trained(self, step: int, clock_ms: float, loss: float | None, **words: str) -> None:
        """The line of a training step; `step` counts from 1. `words` follow the usual ones."""
        told = "" if loss is None else f" train_loss:{loss:.6f}"
        if loss is not None:
            self.train_losses.append(loss)
        times = f"train_time:{clock_ms:.0f}ms step_avg:{clock_ms / step:.2f}ms"
        more = "".join(f" {key}:{value}" for key, value in words.items())
        self.line(f"step:{step}/{self.total_steps}{told} {times}{more}", echo=False)
        known = {} if loss is None else {"train_loss": loss}
        self._tell(step, known | {"step_avg_ms": clock_ms / step} | {k: float(v) for k, v in words.items()})

    def _tell(self, step: int, values: dict[str, float]) -> None:
        for hear in self.listeners:
            hear(step, values)

    def validated(self, step: int, clock_ms: float, loss: float, **words: Any) -> None:
        """The line of a validation after `step` training steps. `words` follow the usual ones, and are in the JSON's
        entry; those of the last validation are at its top, too."""
        average = clock_ms / max(step, 1)
        times = dict(train_time_s=clock_ms / 1000, step_avg_ms=average)
        self.validation.append(dict(step=step, loss=loss, **times, **words))
        told = [f"train_time:{clock_ms:.0f}ms step_avg:{average:.2f}ms", *(f"{k}:{v}" for k, v in words.items())]
        self.line(f"step:{step}/{self.total_steps} val_loss:{loss:.6f} {' '.join(told)}")
        self._tell(step, {"val_loss": loss, "train_time_s": clock_ms / 1000})

    def peak_memory(self, device: torch.device) -> int:
        """Log the peak of memory so far, of the GPU or of the process; returns it in MiB."""
        if device.type == "cuda":
            peak, reserved = torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
            self.line(f"peak memory allocated: {peak} MiB reserved: {reserved} MiB")
            return peak
        import resource  # not on Windows

        unit = 20 if sys.platform == "darwin" else 10  # bytes there, KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> unit
        self.line(f"peak memory resident: {peak} MiB")
        return peak

    def summary(self, status: str, error: str = "", **more: Any) -> dict[str, Any] | None:
        """(Re)write the JSON beside the log, and return it. `status`: running, finished, interrupted or failed. A
        resume that is refused leaves the JSON of the run as it was: None."""
        if not self.writes or self.untouched:
            return None
        last = self.validation[-1] if self.validation else None
        finished = status == "finished" and last is not None
        told = dict(
            schema=1,
            status=status,
            run_name=self.name,
            seed=self.config["seed"],
            config=self.config,
            config_hash=self.config_hash,
            **self.environment["hashes"],
            **{k: v for k, v in (last or {}).items() if k not in ("step", "loss", "train_time_s", "step_avg_ms")},
            environment=self.environment,
            validation=self.validation,
            train_loss=[round(loss, 6) for loss in self.train_losses],
            final_loss=last["loss"] if last and finished else None,
            train_time_s=last["train_time_s"] if last else None,
            start_time=self.started,
            end_time=now(),
            error=error,
            **more,
        )
        with atomic_file(self.json_path, "w") as file:
            json.dump(told, file, indent=1, sort_keys=True)
        return told


def matmul_ceiling(device: torch.device, dtype: torch.dtype, processes: int = 1) -> float:
    """FLOP/s of large square products of all GPUs, measured in a moment: the ceiling that MFU refers to.

    0 on a CPU: other work on its cores would be measured with it, and the same run would be told 1 % or 22 %."""
    if device.type != "cuda":
        return 0.0
    n = 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    clock, best = Clock(device), 0.0
    for _ in range(4):
        before = clock.seconds
        clock.start()
        for _ in range(3):
            a @ a
        clock.stop()
        best = max(best, 3 * 2 * n**3 / (clock.seconds - before))
    return best * processes


class Progress:
    """A bar on a terminal (loss, tokens/s, model FLOP utilisation, time left); a plain line now and then in a pipe.

    Args:
        tokens_until: tokens of so many steps from the first on, all processes together.
        ceiling: FLOP/s that count as 100 %, of `matmul_ceiling`; 0: not known, no utilisation is shown.
        shows: False on the ranks that only follow.
    """

    bar = None  # the one bar of this process, which `say` prints above

    def __init__(
        self,
        total: int,
        start: int,
        tokens_until: Callable[[int], int],
        flops_per_token: float,
        ceiling: float,
        shows: bool = True,
    ):
        self.total, self.first, self.shows = total, start, shows
        self.tokens_until, self.flops, self.ceiling = tokens_until, flops_per_token, ceiling
        self.shown = time.perf_counter()
        self.begin_ms: float | None = None  # the clock at the end of the first step, begin_step, that was told of
        self.begin_step = start
        if shows and sys.stderr.isatty():
            from tqdm import tqdm

            Progress.bar = tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)

    def due(self) -> bool:
        """Whether it is time to show something: reading the loss makes the program wait for the GPU."""
        return self.shows and time.perf_counter() - self.shown >= (1 if Progress.bar is not None else 15)

    def update(self, step: int, clock_ms: float, loss: torch.Tensor) -> None:
        """After training step number `step` (from 1)."""
        if self.begin_ms is None:
            self.begin_ms, self.begin_step = clock_ms, step
        if not self.due() or clock_ms <= self.begin_ms:  # no time has gone by yet that a speed could be of
            return
        self.shown = time.perf_counter()
        tokens = self.tokens_until(step) - self.tokens_until(self.begin_step)
        tokens_s = tokens / ((clock_ms - self.begin_ms) / 1000)
        speed = f"loss {loss.item():.4f}, {tokens_s:,.0f} tokens/s"
        if self.ceiling:
            share = tokens_s * self.flops / self.ceiling
            speed += f", MFU {share:.0%}" if share <= 1 else ", MFU unknown"  # other work slowed the ceiling down
        if Progress.bar is not None:
            try:
                Progress.bar.n = step
                Progress.bar.set_postfix_str(speed)
            except (OSError, ValueError):
                Progress.bar = None
                mute(sys.stderr)
        else:
            left = (self.tokens_until(self.total) - self.tokens_until(step)) / tokens_s
            say(f"progress: step {step} of {self.total}, {speed}, {left:,.0f} s left")

    def close(self) -> None:
        if Progress.bar is not None:
            with contextlib.suppress(OSError, ValueError):
                Progress.bar.close()
            Progress.bar = None


def say(text: str) -> None:
    """Print, above the progress bar if there is one. If nobody can read it, the run goes on: the log has it all."""
    if Progress.bar is None:
        return tell(text)
    try:
        Progress.bar.write(text)
    except (OSError, ValueError):
        mute(sys.stdout)


def unique_name(preset: str) -> str:
    """A run's name: preset, time and a random suffix."""
    return f"{preset}-{now()[:19].replace(':', '')}-{uuid.uuid4().hex[:6]}"
