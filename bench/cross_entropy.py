"""How fast the head and its loss are, forward and backward: `python -m bench.cross_entropy [--tokens N]`.

On a GPU: 65,536 tokens, width 1024 and 50,304 classes in bfloat16: the fused way at several chunk sizes (and in 8 bits
where the device can), against all logits in memory, eagerly and under torch.compile, and against Liger's fused loss and
Apple's cut cross-entropy where they are installed. Those two know other soft caps (30 tanh, c tanh(z / c)), so they run
without one or with their own: the work is the same, the numbers are not compared. Time, peak memory, and the share of
the floor: 6 N D V FLOPs at the measured rate of products, and one read and one write of bfloat16 logits at that of
copies. On a CPU: the chunked reference against all logits, small, and a line that says what was not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.common import compare, copy_ceiling, matmul_ceiling, peak_memory_mib, table, write_result
from kernels.cross_entropy import implementation, linear_cross_entropy, linear_cross_entropy_reference
from trainer.options import command, setting

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def installed_rivals() -> tuple[dict[str, Loss], list[str]]:
    """Other projects' fused losses: those that can be imported, and the names of those that cannot."""
    found, missing = {}, []
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        found["Liger"] = lambda x, w, t: liger(w.to(x.dtype), x, t)
    except ImportError:
        missing.append("Liger (liger-kernel is not installed)")
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        found["cut cross-entropy"] = lambda x, w, t: cut(x, w.to(x.dtype), t, softcap=15.0)
    except ImportError:
        missing.append("Apple's cut cross-entropy (cut-cross-entropy is not installed)")
    return found, missing


def ways_to_compare(on_gpu: bool, N: int, fp8: bool) -> tuple[dict[str, Loss], list[str]]:
    """(loss functions by name, what cannot be measured here)."""
    ways: dict[str, Loss] = {"eager": linear_cross_entropy_reference}
    if not on_gpu:
        ways["reference"] = linear_cross_entropy
        return ways, ["not measured: no GPU (the Triton kernel, torch.compile, Liger, Apple's, 8 bits, peak memory)"]
    for chunk in (2048, 4096, 8192, N):
        ways[f"triton, chunks of {chunk}"] = lambda x, w, t, c=chunk: linear_cross_entropy(x, w, t, chunk_tokens=c)
    if fp8:
        ways["triton, 8 bits"] = lambda x, w, t: linear_cross_entropy(x, w, t, fp8=True)
    ways["torch.compile"] = torch.compile(linear_cross_entropy_reference)
    rivals, missing = installed_rivals()
    return ways | rivals, [f"not measured: {name}" for name in missing]


@dataclass(frozen=True)
class Options:
    """What is timed."""

    tokens: int | None = setting(None, "rows", "of x (65,536 on a GPU, 4096 on a CPU)", at_least=1)
    repeats: int = setting(10, "calls", "timed of each", at_least=1)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write bench/results/cross_entropy-<device>.json."""
    _, options = command(__doc__, arguments, Options)
    on_gpu = torch.cuda.is_available()
    N, D, V = options.tokens or (65536 if on_gpu else 4096), *((1024, 50304) if on_gpu else (128, 256))
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    x = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    w = torch.randn(V, D, device=device).mul_(D**-0.5).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    fp8 = on_gpu and torch.version.cuda is not None and torch.cuda.get_device_capability() >= (8, 9)
    ways, missing = ways_to_compare(on_gpu, N, fp8)
    passes = {name: (lambda f=f: torch.autograd.grad(f(x, w, targets), (x, w))) for name, f in ways.items()}
    for name in list(passes):  # what does not fit or does not run here is named, not hidden
        try:
            passes[name]()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            missing.append(f"not measured: {name}: {str(error).splitlines()[0][:120]}")
            del passes[name]
    times = compare(passes, options.repeats)
    flops, moved = 6 * N * D * V, 2 * N * V * x.element_size()
    floor_ms = flops / matmul_ceiling()["tflops"] / 1e9 + moved / copy_ceiling()["gb_per_s"] / 1e6
    rows = [
        {
            "implementation": name,
            **times[name],
            "over_floor": times[name]["median_ms"] / floor_ms,
            "peak_mib": peak_memory_mib(passes[name]),
        }
        for name in passes
    ]
    print(
        f"N = {N}, D = {D}, V = {V}, {str(dtype).removeprefix('torch.')}; runs: {implementation('auto', x)}; "
        f"floor {floor_ms:.3g} ms from this device's own rates"
    )
    print(table(rows, ["implementation", "median_ms", "iqr_ms", "over_floor", "peak_mib"]))
    print("\n".join(missing))
    path = write_result(
        "cross_entropy",
        {
            "N": N,
            "D": D,
            "V": V,
            "dtype": str(dtype),
            "flops": flops,
            "floor_ms": floor_ms,
            "rows": rows,
            "not_measured": missing,
        },
    )
    print(f"written: {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
