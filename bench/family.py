"""What the benchmarks of one kernel family share: command line, taking turns, table, JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from bench.common import REPO, compare, peak_memory_mib, write_result


@dataclass
class Case:
    """One thing to do, in several ways. `ways`: name -> function; the first is the one that others are compared to.

    flops, bytes: of the least work that does it, for the floor. missing: way -> why it cannot be timed here."""

    name: str
    ways: dict[str, Callable[[], object]]
    flops: float
    bytes: float
    missing: dict[str, str] = field(default_factory=dict)


def run(name: str, doc: str, cases: Callable[[torch.device, bool], list[Case]], argv: list[str] | None = None) -> int:
    """Time all cases on the GPU, or small ones on the CPU; print a table, keep bench/results/<name>-<device>.json.

    Exit code 0, also without a GPU: what was not measured is told, not estimated."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=doc.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=0, help="rounds (default: 30 on a GPU, 5 on a CPU)")
    options = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    repeats = options.repeats or (30 if gpu else 5)
    rows = []
    for case in cases(torch.device("cuda" if gpu else "cpu"), gpu):
        times = compare(case.ways, repeats)
        for way, found in times.items():
            found["tflop_s"] = case.flops / found["median_ms"] / 1e9
            found["peak_mib"] = peak_memory_mib(case.ways[way])
            peak = "" if found["peak_mib"] is None else f"  {found['peak_mib']:8.0f} MiB"
            spread = f"{found['min_ms']:.3f} to {found['max_ms']:.3f}"
            speed = f"{found['median_ms']:10.3f} ms ({spread}) {found['tflop_s']:8.2f} TFLOP/s"
            print(f"{case.name:36} {way:22} {speed}{peak}")
        for way, why in case.missing.items():
            print(f"{case.name:36} {way:22} not measured: {why}")
        rows.append(dict(case=case.name, flops=case.flops, bytes=case.bytes, times=times, missing=case.missing))
    if not gpu:
        print("not measured: no GPU. The figures above are those of the CPU's path at a small size.")
    print(write_result(name, {"cases": rows, "on_gpu": gpu}).relative_to(REPO))
    return 0


def compiled(function: Callable) -> Callable:
    """torch.compile with one graph."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def gradients(function: Callable, *leaves: torch.Tensor) -> Callable[[], object]:
    """A call that runs `function(*leaves)` and all gradients of its sum."""

    def call():
        out = function(*leaves)
        return torch.autograd.grad(out.sum() if out.dim() else out, leaves)

    return call


if __name__ == "__main__":
    sys.exit("bench.family is what bench.cross_entropy, bench.mlp and bench.muon share; run one of those")
