"""The processes of one run: the group that torchrun describes, what they agree on, how they are asked to stop.

Everything here works without torchrun too: one process is a group of its own, and nothing is sent.
"""

from __future__ import annotations

import contextlib
import datetime
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data.echo import flush_or_mute
from trainer.options import UsageError

T = TypeVar("T")

_patience_s = 0.0  # of the group, once it is joined

# What torch says when another process has gone, or has not answered for the time that `join_group` set.
_GONE = re.compile(r"by peer|Broken pipe|Connection refused", re.IGNORECASE)
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)
_SILENT = re.compile(r"timed? ?out", re.IGNORECASE)


def rank() -> int:
    """This process's number in its group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def asked_rank() -> int:
    """This process's number by torchrun's variables, before the group is joined, which judges them; 0 without one."""
    number = os.environ.get("RANK", "")
    return int(number) if os.environ.get("WORLD_SIZE", "1") != "1" and number.isdecimal() else 0


def _local_gpu() -> torch.device:
    """The GPU of this process's local rank. Raises UsageError."""
    told, count = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
    if not told.isdecimal() or int(told) >= count:
        raise UsageError(
            f"LOCAL_RANK={told} in the environment is no GPU's number: torch sees {count} here; start one process a "
            f"GPU (torchrun --nproc_per_node={count}), or unset it"
        )
    return torch.device("cuda", int(told))


def choose_device(name: str, deterministic: bool) -> torch.device:
    """This process's device: "cuda", "cpu", or "auto", the GPU of its local rank if there is one. Raises UsageError.

    deterministic: ask torch for bitwise repeatable algorithms; so this comes before anything touches the GPU."""
    cuda = name == "cuda" or (name == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise UsageError("--device=cuda: torch sees no GPU here")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it once, when CUDA starts
    if deterministic or torch.are_deterministic_algorithms_enabled():  # this call alone takes a second
        torch.use_deterministic_algorithms(deterministic)
    device = _local_gpu() if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    return device


def join_group(device: torch.device, patience_s: float) -> None:
    """Join the process group that torchrun's variables describe, if they do and it is not joined yet.

    patience_s: how long a process waits for another in any exchange before the run ends with an error.
    Raises UsageError for variables that describe no group."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    told = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    said = "the environment has " + " ".join(f"{name}={value}" for name, value in told.items() if value is not None)
    advice = "start several with torchrun, or unset them"
    numbers = [told[name] or "" for name in ("WORLD_SIZE", "RANK", "MASTER_PORT")]
    if not told["MASTER_ADDR"] or not all(n.isdecimal() for n in numbers) or not int(numbers[1]) < int(numbers[0]):
        raise UsageError(f"{said}, which is no group of processes: {advice}")
    global _patience_s
    _patience_s = patience_s
    cuda = device.type == "cuda"
    wait = datetime.timedelta(seconds=patience_s)
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=wait))
    except (ValueError, RuntimeError) as error:  # no such port or host, or nobody came in time
        why = str(error).strip().splitlines()[0].rstrip(".")
        raise UsageError(f"{said}, and no group came together ({why}; --patience={patience_s:g}): {advice}") from error
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # Processes that `torchrun --max-restarts` starts again share the store of the dead, whose addresses they
        # must not read (github.com/pytorch/pytorch/issues/135712). Several hosts: docs/scaling.md.
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # gloo beside NCCL carries the processes' agreement to stop, which lives in host memory
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(
        backend, store=store, rank=number, world_size=size, timeout=wait, device_id=device if cuda else None
    )


class Ended:
    """How a program ended: its exit code."""

    code = 0


@contextlib.contextmanager
def exit_code(codes: Mapping[type[Exception], int]) -> Iterator[Ended]:
    """Around a whole program: an error of `codes` is told in one line and becomes its exit code, as memory that does
    not suffice (5), Ctrl-C where nothing hears it (130) and the loss of another process (1) do; the process group is
    left in order. An error that all ranks share is told by rank 0 alone; a reader of the output that has gone, as with
    `| head`, is not told."""
    ended = Ended()
    try:
        yield ended
        sys.stdout.flush()
    except tuple(codes) as error:
        if not isinstance(error, BrokenPipeError) and (rank() == 0 or not getattr(error, "shared", False)):
            _say(str(error))
        ended.code = next(code for kind, code in codes.items() if isinstance(error, kind))
    except KeyboardInterrupt:
        _say("stopped by SIGINT")
        ended.code = 128 + signal.SIGINT
    except (RuntimeError, MemoryError) as error:
        ended.code, said = _cause_of(error)
        if not ended.code:
            raise
        _say(said)
    finally:
        flush_or_mute(sys.stdout)
        if dist.is_initialized() and sys.exc_info()[0] is None:
            with contextlib.suppress(Exception):
                dist.destroy_process_group()


def _say(text: str) -> None:
    """One line on standard error, whatever characters a user's words have."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    print(f"train_gpt.py: {shown}", file=sys.stderr, flush=True)


def _cause_of(error: Exception) -> tuple[int, str]:
    """(exit code, what to say) of an error of torch's that has a cause of its own; (0, "") of any other."""
    if isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)):
        why = (str(error).strip() or "Python's own").splitlines()[0]
        return 5, f"out of memory ({why}); smaller --train_seq_len, --val_seq_len or a smaller model take less"
    cause = _cause_elsewhere(str(error)) if dist.is_initialized() else ""
    return (1, f"rank {rank()} {cause}") if cause else (0, "")


def _cause_elsewhere(error: str) -> str:
    """What to say of an error that another process caused by its end or its silence; "": it did not."""
    if _SILENT.search(error):
        return f"heard nothing from another process for {_patience_s:g} s (--patience): it hangs, and the run ends"
    return "lost another process of the run, which says why" if _GONE.search(error) else ""


def on_rank_0(work: Callable[[], T]) -> T:
    """What `work()` returns on rank 0, on every rank; it is called there only, and must be picklable.

    An exception that it raises there is raised on every rank, so that all end for the same reason and none waits for
    one that has gone. It carries `shared = True`: rank 0 alone needs to print it."""
    told: list = [None, None]
    if rank() == 0:
        try:
            told[0] = work()
        except Exception as error:
            error.shared = True  # type: ignore[attr-defined]
            told[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(told, 0)
    if told[1] is not None:
        raise told[1]
    return told[0]


def gathered(part: T) -> list[T]:
    """Every rank's `part`, in the order of ranks, on every rank; it must be picklable."""
    if not dist.is_initialized():
        return [part]
    parts: list = [None] * dist.get_world_size()
    dist.all_gather_object(parts, part)
    return parts


def agree(flags: Sequence[float]) -> list[float]:
    """The largest value of each flag over all processes (on the host; a GPU does not wait for it)."""
    if not dist.is_initialized():
        return list(flags)
    tensor = torch.tensor(flags)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a number over all processes, as each has it."""
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / world_size()
    return value.item()


def sequence_length_for(processes: int, tokens_per_step: int, length: int) -> int:
    """`length`, or less where that many processes would not each have a sequence of a step. Raises UsageError where
    the sequences do not divide over them."""
    sequences = tokens_per_step // length
    if sequences < processes and tokens_per_step % processes == 0:
        return tokens_per_step // processes
    if sequences % processes:
        raise UsageError(
            f"{sequences} sequences a step do not divide over {processes} processes; use 1, 2, 4 or 8, or a larger "
            f"number that divides --tokens_per_step={tokens_per_step}"
        )
    return length


def cut_sequences_note(processes: int, asked: int, length: int) -> str:
    """What the log says where `sequence_length_for` returned less than was asked for."""
    return (
        f"{processes} processes: training sequences cut from {asked} to {length} tokens. Documents and windows end at "
        "their borders, so this is another run than with 8 processes: its loss may be slightly higher, and its "
        "checkpoints need as many processes"
    )


class StopRequest:
    """Signals ask for a checkpoint and an orderly end; asking again 5 s later ends the process at once.

    Not sooner: Ctrl-C and `scancel` reach every process, and torchrun passes them on a second time. They are SIGINT,
    SIGTERM, SIGQUIT, SIGUSR1 (SLURM's warning before the time is up) and SIGHUP (the terminal is gone; under nohup it
    stays ignored). `signal` is the number of the signal that asked, or 0; `at_once` is called before the process ends
    without having come to its checkpoint. Only the main thread can hear signals: elsewhere nobody asks."""

    NAMES = ("SIGINT", "SIGTERM", "SIGQUIT", "SIGUSR1", "SIGHUP")

    def __init__(self) -> None:
        self.signal, self.asked_at = 0, -math.inf
        self.at_once: Callable[[], object] = lambda: None
        hears = threading.current_thread() is threading.main_thread()
        numbers = [getattr(signal, name) for name in self.NAMES if hears and hasattr(signal, name)]
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._asked) for number in heard}

    def _asked(self, number: int, frame: object) -> None:
        if self.signal and time.monotonic() - self.asked_at > 5:
            with contextlib.suppress(Exception):
                self.at_once()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.signal:
            self.signal, self.asked_at = number, time.monotonic()

    def heard(self) -> int:
        """The signal that asked any of the processes, or 0. Collective."""
        return int(agree([self.signal])[0])

    def restore(self) -> None:
        """Back to the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
