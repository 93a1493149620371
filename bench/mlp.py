"""How fast the MLP is, forward and backward: `python -m bench.mlp [--tokens N]`.

On a GPU: 65,536 tokens, width 1024 and hidden width 4096 in bfloat16: the fused products against the plain expression,
eagerly and under torch.compile, with peak memory and TFLOP/s (12 N D F FLOPs in all). On a CPU: the reference with its
own gradient against autograd, at a small size, and a line that says what was not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.common import compare, peak_memory_mib, table, write_result
from kernels.mlp import implementation, relu_squared_mlp, relu_squared_mlp_reference
from trainer.options import command, setting


def training_pass(run: Callable, leaves: list[torch.Tensor], dy: torch.Tensor) -> Callable[[], object]:
    """A function that runs forward and backward once."""
    return lambda: torch.autograd.grad(run(*leaves), leaves, dy)


@dataclass(frozen=True)
class Options:
    """What is timed."""

    tokens: int | None = setting(None, "rows", "of x (65,536 on a GPU, 4096 on a CPU)", at_least=1)
    repeats: int = setting(20, "calls", "timed of each", at_least=1)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write bench/results/mlp-<device>.json."""
    _, options = command(__doc__, arguments, Options)
    on_gpu = torch.cuda.is_available()
    N, D = options.tokens or (65536 if on_gpu else 4096), 1024 if on_gpu else 128
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    shapes = ((N, D), (4 * D, D), (D, 4 * D), (N, D))
    *leaves, dy = (torch.randn(*shape, device=device).mul_(shape[-1] ** -0.5).to(dtype) for shape in shapes)
    leaves = [t.requires_grad_() for t in leaves]
    ways = {"eager": relu_squared_mlp_reference, implementation("auto", dy): relu_squared_mlp}
    if on_gpu:
        ways["torch.compile"] = torch.compile(relu_squared_mlp_reference)
    passes = {name: training_pass(run, leaves, dy) for name, run in ways.items()}
    times = compare(passes, options.repeats)
    flops = 12 * N * D * 4 * D
    rows = [
        {
            "implementation": name,
            **times[name],
            "tflops": flops / times[name]["median_ms"] / 1e9,
            "peak_mib": peak_memory_mib(passes[name]),
        }
        for name in passes
    ]
    print(f"N = {N}, D = {D}, F = {4 * D}, {str(dtype).removeprefix('torch.')}, {flops / 1e12:.3f} TFLOP a pass")
    print(table(rows, ["implementation", "median_ms", "iqr_ms", "tflops", "peak_mib"]))
    missing = [] if on_gpu else ["not measured: no GPU (the Triton kernels, torch.compile, peak memory)"]
    print("\n".join(missing))
    path = write_result(
        "mlp", {"N": N, "D": D, "dtype": str(dtype), "flops": flops, "rows": rows, "not_measured": missing}
    )
    print(f"written: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
