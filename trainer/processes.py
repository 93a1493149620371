"""The processes of one run: the group that torchrun describes, what they agree on, how they are asked to stop.

Everything here works without torchrun too: one process is a group of its own, and nothing is sent.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def rank() -> int:
    """This process's number in its group; 0 without one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes in the group; 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_group(device: torch.device) -> None:
    """Join the process group that torchrun's variables describe, if they do and it is not joined yet."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        return
    cuda = device.type == "cuda"
    store, number, size = next(dist.rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # Processes that `torchrun --max-restarts` starts again share the store of the dead, whose addresses they
        # must not read (github.com/pytorch/pytorch/issues/135712). Several hosts: docs/scaling.md.
        store = dist.PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # gloo beside NCCL carries the processes' agreement to stop, which lives in host memory
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=size, device_id=device if cuda else None)


def on_rank_0(work: Callable[[], T]) -> T:
    """What `work()` returns on rank 0, on every rank; it is called there only, and must be picklable.

    An exception that it raises there is raised on every rank, so that all end for the same reason and none waits for
    one that has gone. It carries `shared = True`: rank 0 alone needs to print it."""
    told: list = [None, None]
    if rank() == 0:
        try:
            told[0] = work()
        except Exception as error:
            error.shared = True
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


class StopRequest:
    """SIGINT and SIGTERM ask for a checkpoint and an orderly end; asking again 5 s later ends the process at once.

    Not sooner: Ctrl-C and `scancel` reach every process, and torchrun passes them on a second time. `signal` is the
    number of the signal that asked, or 0. Only the main thread can hear signals: elsewhere nobody asks."""

    def __init__(self):
        self.signal, self.asked_at = 0, -math.inf
        hears = threading.current_thread() is threading.main_thread()
        numbers = (signal.SIGINT, signal.SIGTERM) if hears else ()
        self._before = {number: signal.signal(number, self._asked) for number in numbers}

    def _asked(self, number, frame) -> None:
        if self.signal and time.monotonic() - self.asked_at > 5:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif not self.signal:
            self.signal, self.asked_at = number, time.monotonic()

    def restore(self) -> None:
        """Back to the handlers that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
