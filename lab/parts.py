"""Work in parts, side by side: each part in one of several processes, with one thread of the CPU, and timed.

Models as small as the lab's gain little from a second thread: two trainings beside each other take half of the time of
one after the other, with the same numbers however many there are.
"""

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any

import torch

MOST = 8  # processes, if nobody says how many: each holds torch, some 300 MB


@dataclass(frozen=True)
class Spent:
    """Seconds of a part: by the clock, and of the CPU."""

    part: str
    wall_s: float
    cpu_s: float


def _timed(work: Callable[..., Any], args: tuple) -> tuple[Any, float, float]:
    """What `work` returns, and its seconds by the clock and of the CPU, on one thread."""
    torch.set_num_threads(1)
    wall, cpu = time.perf_counter(), time.process_time()
    return work(*args), time.perf_counter() - wall, time.process_time() - cpu


def _end_with_parent() -> None:
    """End this process when the one that began it is gone, even if that was killed: nobody would read the results."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Parts(AbstractContextManager):
    """A pool of `processes` (0: one a core, at most MOST; 1: this one alone). `start` begins a part, `wait` returns
    what it made, and `spent` has the seconds of all that were waited for, in that order. What a part is given and what
    it makes is pickled; what it raises is raised by `wait`."""

    def __init__(self, processes: int = 0):
        self.processes = processes or min(MOST, os.cpu_count() or 1)
        # spawn, not fork: a child forked from a process whose threads are at work may wait for them for ever
        pool = {"mp_context": get_context("spawn"), "initializer": _end_with_parent}
        self._pool = ProcessPoolExecutor(self.processes, **pool) if self.processes > 1 else None
        self._names: dict[Future, str] = {}
        self.spent: list[Spent] = []

    def start(self, part: str, work: Callable[..., Any], *args: Any) -> Future:
        """Begin `work(*args)` as soon as a process is free."""
        if self._pool:
            begun = self._pool.submit(_timed, work, args)
        else:
            begun = Future()
            try:
                begun.set_result(_timed(work, args))
            except Exception as error:  # as a pool would: whoever waits is told
                begun.set_exception(error)
        self._names[begun] = part
        return begun

    def wait(self, begun: Future) -> Any:
        """What a part made, when it is done."""
        made, wall, cpu = begun.result()
        self.spent.append(Spent(self._names[begun], wall, cpu))
        return made

    def __exit__(self, *_error: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
