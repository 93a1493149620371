"""Faults that a training process does to itself at a chosen place: the child side of `python -m bench.faults`.

The product has no hooks for this. A forked child that has imported `train_gpt` patches one of its functions so
that, at the n-th call, the fault happens there; then it calls `train_gpt.main` as a user's process would.
"""

from __future__ import annotations

import datetime
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Where a process can be hit, with the calls among which the campaign draws one. "before" and "after" are
# relative to the work that the name speaks of.
PLACES: dict[str, int] = {
    "before the first step": 1,
    "in a step, before the update": 9,
    "in a step, between the two optimizers": 9,
    "in a validation": 4,
    "in a checkpoint, half written": 4,
    "in a checkpoint, before the rename": 4,
    "in a checkpoint, after the rename": 4,
    "in a log line, half written": 18,
    "in the summary, before the rename": 5,
}
ACTIONS = {"kill -9": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}


@dataclass(frozen=True)
class Fault:
    """What happens to which rank at which call of a place. It happens in one start of the run only."""

    action: str  # a key of ACTIONS, "NaN", "shrink", "rewrite"
    place: str = ""
    call: int = 1
    rank: int = 0
    everyone: bool = False  # signals: to all ranks of the run, not to this one alone
    start: int = 1  # the first, second, ... start of the run
    target: str = ""  # the shard of "shrink" and "rewrite"
    amount: float = 0.5  # of the shard that stays; where in the gradient the NaN is


def starts_so_far(folder: Path, rank: int) -> int:
    """Count this start of `rank` in a file of the run's folder; 1 the first time."""
    with open(folder / f"starts-{rank}", "ab+") as file:
        file.write(b"x")
        file.flush()
        return file.tell()


def arm(fault: Fault | None, folder: Path) -> None:
    """Make `fault` happen in this process, if it is the one and this is the start that are meant."""
    rank = int(os.environ.get("RANK", 0))
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    start = starts_so_far(folder, rank)
    if fault is None or rank != fault.rank or start != fault.start:
        return
    if fault.action == "clock":
        turn_the_clock_back()
    elif fault.action in ACTIONS:
        _at(fault.place, fault.call, lambda: _signal(fault, folder))
    elif fault.action == "NaN":
        _nan_in_a_gradient(fault)
    else:
        _at("in a step, before the update", fault.call, lambda: damage_shard(fault))


def _signal(fault: Fault, folder: Path) -> None:
    """Send the signal to this process, or to every rank's; this one last, since it may not come back."""
    number = ACTIONS[fault.action]
    pids = {int(path.read_text()) for path in folder.glob("pid-*")} if fault.everyone else set()
    for pid in pids - {os.getpid()}:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass
    os.kill(os.getpid(), number)


def damage_shard(fault: Fault) -> None:
    """Shorten a shard, or rewrite it with other tokens, as another program might while it is being read."""
    path = Path(fault.target)
    if fault.action == "shrink":
        os.truncate(path, int(path.stat().st_size * fault.amount))
        return
    data = bytearray(path.read_bytes())
    data[1024:] = bytes(reversed(data[1024:]))
    path.write_bytes(data)


def _at(place: str, call: int, act: Callable[[], None]) -> None:
    """Call `act` in the `call`-th pass through `place`."""
    import safetensors.torch

    import train_gpt

    passes = 0

    def due() -> bool:
        nonlocal passes
        passes += 1
        return passes == call

    def before(owner, name: str, applies=lambda *a: True, after: bool = False) -> None:
        real = getattr(owner, name)

        def patched(*arguments, **named):
            now = applies(*arguments) and due()
            if now and not after:
                act()
            result = real(*arguments, **named)
            if now and after:
                act()
            return result

        setattr(owner, name, patched)

    def half_a_file(tensors, path, metadata=None) -> None:
        now = due()
        real_save(tensors, path, metadata)
        if now:
            size = os.path.getsize(path)
            os.truncate(path, size // 2)
            act()  # if it comes back (SIGTERM), writing goes on
            real_save(tensors, path, metadata)

    def half_a_line(log, text, **named) -> None:
        if log.file is not None and due():
            half = len(text) // 2
            log.file.write(text[:half])
            log.file.flush()
            act()
            log.file.write(text[half:] + "\n")
            log.file.flush()
            return
        real_line(log, text, **named)

    real_save, real_line = safetensors.torch.save_file, train_gpt.RunLog.line
    ends_with = lambda suffix: lambda source, target, **_: str(target).endswith(suffix)  # noqa: E731
    if place == "before the first step":
        before(train_gpt, "train")
    elif place == "in a step, before the update":
        before(train_gpt.PlainExchange, "wait_matrices")  # one of the two is called in a step
        before(train_gpt.GradientExchange, "wait_matrices")
    elif place == "in a step, between the two optimizers":
        before(train_gpt.AdamW, "step")
    elif place == "in a validation":
        before(train_gpt, "validate")
    elif place == "in a checkpoint, half written":
        safetensors.torch.save_file = half_a_file
    elif place == "in a checkpoint, before the rename":
        before(os, "replace", ends_with(".safetensors"))
    elif place == "in a checkpoint, after the rename":
        before(os, "replace", ends_with(".safetensors"), after=True)
    elif place == "in a log line, half written":
        train_gpt.RunLog.line = half_a_line
    elif place == "in the summary, before the rename":
        before(os, "replace", ends_with(".json"))
    else:
        raise ValueError(f"no such place: {place}")


def _nan_in_a_gradient(fault: Fault) -> None:
    """One element of one gradient becomes NaN: of any parameter before ranks sum them, or of a matrix in the hands of
    the rank that updates it."""
    import train_gpt

    passes = 0

    def poison(parameters) -> None:
        nonlocal passes
        passes += 1
        if passes == fault.call:
            gradient = parameters[int(fault.amount * len(parameters))].grad
            gradient.view(-1)[int(fault.amount * 1e6) % gradient.numel()] = float("nan")

    def plain(exchange) -> None:
        poison([*exchange.my_matrices.values(), *exchange.my_others.values()])
        real_plain(exchange)

    def overlapped(exchange) -> None:
        real_overlapped(exchange)
        poison(list(exchange.my_matrices.values()))

    real_plain, real_overlapped = train_gpt.PlainExchange.wait_matrices, train_gpt.GradientExchange.wait_matrices
    train_gpt.PlainExchange.wait_matrices, train_gpt.GradientExchange.wait_matrices = plain, overlapped


def turn_the_clock_back() -> None:
    """From here on the wall clock of this process runs backwards, in leaps of an hour, from a day in 2001."""
    import trainer.log

    calls = 0

    def wrong_time() -> float:
        nonlocal calls
        calls += 1
        return 1_000_000_000.0 - 3600 * calls

    class WrongDatetime(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.fromtimestamp(wrong_time(), tz)

    class Module:
        datetime, timezone = WrongDatetime, datetime.timezone

    time.time, time.time_ns = wrong_time, lambda: int(wrong_time() * 1e9)
    trainer.log.datetime = Module


def main(arguments: list[str]) -> int:
    """FAULT_AS_JSON FOLDER TRAINER_ARGUMENTS...: the program with a fault, as a command for torchrun."""
    import argparse
    import json

    import train_gpt

    parser = argparse.ArgumentParser(prog="python -m bench.fault_injection", description=main.__doc__)
    parser.add_argument("fault", help="the fields of a Fault, as JSON")
    parser.add_argument("folder", type=Path, help="where the fault notes that it happened")
    parser.add_argument("words", nargs=argparse.REMAINDER, help="of train_gpt.py")
    told = parser.parse_args(arguments)
    arm(Fault(**json.loads(told.fault)), told.folder)
    return train_gpt.main(told.words)


if __name__ == "__main__":
    import sys

    sys.exit(main(sys.argv[1:]))
