"""Time the head and its loss, forward with both gradients: ours, eager torch, compiled torch, others' if installed.

    python -m bench.cross_entropy      # medium's head at 65,536 tokens on a GPU, a small one on a CPU

Floor (bytes): logits in bfloat16 read once and written once. Products: 6 N D V FLOPs.
"""

from __future__ import annotations

import importlib.util
import sys

import torch

from bench.family import Case, compiled, gradients, run
from kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference


def cases(device: torch.device, gpu: bool) -> list[Case]:
    """The head of the medium preset, or of nano."""
    N, D, V, dtype = (65536, 1024, 50304, torch.bfloat16) if gpu else (1024, 64, 256, torch.float32)
    x = torch.randn(N, D, device=device, dtype=dtype, requires_grad=True)
    w = torch.randn(V, D, device=device).mul_(0.02).requires_grad_()
    targets = torch.randint(V, (N,), device=device)

    def way(**options):
        return gradients(lambda x, w: linear_cross_entropy(x, w, targets, **options), x, w)

    ways = {"ours": way()}
    for chunk in (1024, 8192, 65536) if gpu else (256,):
        ways[f"ours, chunks of {chunk}"] = way(chunk_tokens=chunk)
    ways["eager"] = way(impl="eager")
    missing = {}
    if gpu:
        ways["torch.compile"] = gradients(
            compiled(lambda x, w: linear_cross_entropy_reference(x, w, targets)), x, w
        )
        if torch.cuda.get_device_capability() >= (8, 9):
            ways["ours, 8 bits"] = way(fp8=True)
    for package, name in (("liger_kernel", "Liger-Kernel"), ("cut_cross_entropy", "cut-cross-entropy")):
        if importlib.util.find_spec(package) is None:
            missing[name] = f"{package} is not installed"
        elif not gpu:
            missing[name] = "it needs a GPU"
        else:
            ways[name] = gradients(_other(package, targets), x, w)
    return [Case(f"{N} tokens, {V} classes", ways, 6.0 * N * D * V, 2.0 * 2 * N * V, missing)]


def _other(package: str, targets: torch.Tensor):
    """A peer's fused linear cross-entropy, on bfloat16 weights and without our soft cap, which they do not have."""
    if package == "liger_kernel":
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as peer

        return lambda x, w: peer.apply(x, w.to(x.dtype), targets)[0]
    from cut_cross_entropy import linear_cross_entropy as peer

    return lambda x, w: peer(x, w.to(x.dtype), targets)


if __name__ == "__main__":
    sys.exit(run("cross_entropy", __doc__, cases))
