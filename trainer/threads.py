"""How long OpenMP's threads spin. To be called before torch is first imported, wherever a process starts."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, MutableMapping
from pathlib import Path

# Turns of a loop that a thread spins before it sleeps, as the process finds the machine; the same numbers are computed
# either way. `python -m bench.spin` compares both with other rules.
IDLE_SPIN_COUNT = 5000  # waking a thread costs more than a small tensor: sleeping at once takes twice as long
BUSY_SPIN_COUNT = 300  # some microseconds: who spins longer keeps the core from the thread that is waited for
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_OURS = "SPEEDRUN_SPIN_COUNT"  # what this function has set: a child of this process looks anew, and does not take it
LOOKS, BETWEEN_SECONDS = 4, 0.002


def bound_spinning(environment: MutableMapping[str, str] = os.environ, busy: Callable[[], bool] | None = None) -> None:
    """Let idle threads of OpenMP sleep soon, unless the user has chosen how they wait.

    By default GNU's OpenMP, which torch's wheels bring, lets threads that wait for the others spin for milliseconds.
    Beside other work on the same cores, a training of small tensors then mostly waits for spinning threads: a step
    takes 2 to 30 times as long. On idle cores, threads that sleep at once make it take up to twice as long. So what
    counts is whether cores are free as the process starts. LLVM's OpenMP (macOS) counts the time before its threads
    sleep in milliseconds; its default is 200.

    busy: says whether other work needs the cores (`cores_are_taken`)."""
    if environment.get("GOMP_SPINCOUNT") == environment.get(_OURS, ""):
        for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
            environment.pop(name, None)
    if not any(name in environment for name in _CHOICES):
        count = str(BUSY_SPIN_COUNT if (busy or cores_are_taken)() else IDLE_SPIN_COUNT)
        environment["GOMP_SPINCOUNT"] = environment[_OURS] = count
        environment["KMP_BLOCKTIME"] = "1"


def cores_are_taken(running: Callable[[], int | None] | None = None, cores: int | None = None) -> bool:
    """Whether other work leaves fewer cores than this process has threads; True where the system does not tell.

    running: threads that run or wait for a core now, this one among them; the least of a few looks counts, so that
        what only wakes up for a moment is no work. cores: all that there are."""
    found = []
    for look in range(LOOKS):
        if look:
            time.sleep(BETWEEN_SECONDS)
        found.append((running or _running)())
    known = [number for number in found if number is not None]
    if not known:
        return True
    cores = cores or os.cpu_count() or 1
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    return cores - (min(known) - 1) < min(mine, cores)


def _running() -> int | None:
    try:
        return int(Path("/proc/loadavg").read_text().split()[3].split("/")[0])
    except (OSError, ValueError, IndexError):
        return None
