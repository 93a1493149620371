"""The studio's first page and its memory.

    python -m bench.studio --starts 5                # bench/results/studio-<device>.json

Figures: time from starting `python -m lab.studio` to its first page, imports included; while a tiny model trains in
the studio's own queue, the memory of studio, runner and trainer together (Linux: pages that they share are counted
once), the largest of the samples taken until the training's end.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.common import REPO, summary, write_result
from trainer.options import command, setting


@contextlib.contextmanager
def started(home: Path) -> Iterator[tuple[subprocess.Popen, str, float]]:
    """A studio in a process of its own: (process, address, milliseconds until its first page was there).

    Raises RuntimeError if it ends before."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    address = f"http://127.0.0.1:{port}/"
    begin = time.perf_counter()
    command = [sys.executable, "-m", "lab.studio", f"--port={port}", f"--folder={home}"]
    process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL)
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(address, timeout=30).read()
                break
            if process.poll() is not None:
                raise RuntimeError(f"the studio ended with exit code {process.returncode} before its first page")
            time.sleep(0.02)
        yield process, address, (time.perf_counter() - begin) * 1e3
    finally:
        process.terminate()
        process.wait(30)


def resident_mib(pids: set[int]) -> float:
    """Memory of processes; a page that n of them share counts as 1/n in each (proportional set size)."""
    total_kib = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended meanwhile
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total_kib += int(next(line.split()[1] for line in lines if line.startswith("Pss:")))
    return total_kib / 1024


def memory_while_training(home: Path, steps: int) -> dict:
    """Memory in MiB: of the idle studio, and the most of studio, runner and trainer until a tiny GPT is trained."""
    from lab.studio.jobs import Queue
    from lab.studio.places import Places
    from lab.studio.recipes import Request, training_of

    places = Places.of(home)
    queue = Queue(places.trainings)
    with started(home) as (process, _, _):
        idle = resident_mib({process.pid})
        id = queue.add(training_of(Request(steps=steps, batch_tokens=1024, width=32, layers=2), places))
        queue.work()
        most, samples = idle, 0
        until = time.monotonic() + 300
        while queue.entry(id).state not in ("finished", "failed") and time.monotonic() < until:
            attempts = run.attempts if (run := queue.entry(id).run) else ()
            events = [event for attempt in attempts for event in (attempt.launch, attempt.start) if event]
            most, samples = max(most, resident_mib({process.pid, *(event["pid"] for event in events)})), samples + 1
            time.sleep(0.2)
        state = queue.entry(id).state
    if state != "finished":
        raise RuntimeError(f"the training ended as {state}: {queue.entry(id).message}")
    return {"idle_mib": idle, "most_mib": most, "samples": samples, "steps": steps}


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    starts: int = setting(5, "starts", "of the studio", at_least=1)
    steps: int = setting(60, "steps", "of the tiny training", at_least=1)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and keep the result; exit code 0."""
    _, options = command(__doc__, arguments, Options)
    times_ms = []
    with tempfile.TemporaryDirectory(prefix="studio-") as folder:
        for number in range(options.starts):
            with started(Path(folder) / str(number)) as (_, _, ms):
                times_ms.append(ms)
        memory = memory_while_training(Path(folder) / "training", options.steps)
    result = {"first_page": summary(times_ms), "memory": memory}
    print(
        f"first page after {result['first_page']['median_ms'] / 1e3:.2f} s (median of {options.starts}, "
        f"{min(times_ms) / 1e3:.2f} to {max(times_ms) / 1e3:.2f}); {memory['most_mib']:.0f} MiB while a model trains"
    )
    print(f"kept in {write_result('studio', result).relative_to(REPO)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
