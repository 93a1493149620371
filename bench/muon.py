"""How fast Muon's arithmetic is: `python -m bench.muon`.

On a GPU: orthogonalisation in bfloat16 of the medium model's matrices (60 of 1024 x 1024 for attention, 32 of
4096 x 1024 for the MLP), kernels against plain torch, eagerly and under torch.compile; momentum and the update of split
weights, in GB/s. On a CPU: the references in float32 at a small size, and a line that says what was not measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

from bench.common import compare, measure, peak_memory_mib, table, write_result
from kernels.muon import apply_update_, implementation, momentum_, orthogonalize, orthogonalize_reference, split_master
from trainer.options import command, setting


def product_flops(batch: int, rows: int, columns: int) -> int:
    """FLOPs of five steps of `batch` matrices: symmetric products count one triangle."""
    m, n = sorted((rows, columns))
    return batch * 5 * (m * m * n + m**3 + 2 * m * m * n)


def orthogonalisation_rows(shapes: dict, device: str, dtype: torch.dtype, repeats: int) -> list[dict]:
    """A row for each family of matrices and implementation."""
    rows = []
    for name, shape in shapes.items():
        g = torch.randn(*shape, device=device)
        ways = {"eager": lambda g=g: orthogonalize_reference(g, dtype=dtype)}
        if device == "cuda":
            ways["triton"] = lambda g=g: orthogonalize(g, dtype=dtype)
            compiled = torch.compile(orthogonalize_reference)
            ways["torch.compile"] = lambda g=g, f=compiled: f(g, dtype=dtype)
        for way, times in compare(ways, repeats).items():
            tflops = product_flops(*shape) / times["median_ms"] / 1e9
            rows.append(
                {"what": name, "implementation": way, **times, "tflops": tflops, "peak_mib": peak_memory_mib(ways[way])}
            )
    return rows


def elementwise_rows(size: int, device: str, repeats: int) -> list[dict]:
    """Momentum and the update of split weights: time, and GB/s of the bytes that have to move."""
    weight, mantissa = split_master(torch.randn(size, device=device))
    buffer, grad = torch.zeros(size, device=device), torch.randn(size, device=device).bfloat16()
    update = torch.randn(size, device=device).bfloat16()
    both = {
        "momentum": (lambda: momentum_(buffer, grad, 0.95), 14),  # buffer twice, gradient in bfloat16, update
        "update": (lambda: apply_update_(weight, mantissa, update, lr=1e-6, weight_decay=0.0), 10),
    }
    rows = []
    for name, (run, bytes_each) in both.items():
        times = measure(run, repeats=repeats)
        rows.append(
            {
                "what": name,
                "implementation": implementation("auto", buffer),
                **times,
                "gb_per_s": bytes_each * size / times["median_ms"] / 1e6,
                "peak_mib": peak_memory_mib(run),
            }
        )
    return rows


@dataclass(frozen=True)
class Options:
    """What is timed."""

    repeats: int = setting(20, "calls", "timed of each", at_least=1)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write bench/results/muon-<device>.json."""
    _, options = command(__doc__, arguments, Options)
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    width, attention, mlp = (1024, 60, 32) if on_gpu else (64, 16, 8)
    shapes = {"attention": (attention, width, width), "MLP": (mlp, 4 * width, width)}
    rows = orthogonalisation_rows(shapes, device, dtype, options.repeats)
    rows += elementwise_rows(64 * 2**20 if on_gpu else 2**18, device, options.repeats)
    print(f"{shapes}, {str(dtype).removeprefix('torch.')}")
    print(table(rows, ["what", "implementation", "median_ms", "iqr_ms", "tflops", "gb_per_s", "peak_mib"]))
    missing = [] if on_gpu else ["not measured: no GPU (the Triton kernels, torch.compile, peak memory)"]
    print("\n".join(missing))
    path = write_result("muon", {"shapes": shapes, "dtype": str(dtype), "rows": rows, "not_measured": missing})
    print(f"written: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
