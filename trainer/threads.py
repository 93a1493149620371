"""How long OpenMP's threads spin. To be called before torch is first imported, wherever a process starts."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

SPIN_COUNT = 300  # turns of a loop: some microseconds; `python -m bench.spin` compares it with other rules
_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def bound_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let idle threads of OpenMP sleep soon, unless the user has chosen how they wait.

    By default GNU's OpenMP, which torch's wheels bring, lets threads that wait for the others spin for milliseconds.
    Beside other work on the same cores, a training of small tensors then mostly waits for spinning threads: a step
    takes 2 to 30 times as long. LLVM's OpenMP (macOS) counts the time before its threads sleep in milliseconds;
    its default is 200.
    """
    if not any(name in environment for name in _CHOICES):
        environment["GOMP_SPINCOUNT"] = str(SPIN_COUNT)
        environment["KMP_BLOCKTIME"] = "1"
