"""Time the MLP (linear, relu squared, linear), forward with all gradients: fused, plain, compiled.

    python -m bench.mlp      # medium's at 65,536 tokens on a GPU, a small one on a CPU
"""

from __future__ import annotations

import sys

import torch

from bench.family import Case, compiled, gradients, run
from kernels.mlp import relu_squared_mlp, relu_squared_mlp_reference


def cases(device: torch.device, gpu: bool) -> list[Case]:
    """The MLP of the medium preset, or of nano."""
    N, D, F, dtype = (65536, 1024, 4096, torch.bfloat16) if gpu else (1024, 64, 256, torch.float32)
    x = torch.randn(N, D, device=device, dtype=dtype, requires_grad=True)
    w_in = torch.randn(F, D, device=device, dtype=dtype).mul_(D**-0.5).requires_grad_()
    w_out = torch.randn(D, F, device=device, dtype=dtype).mul_(F**-0.5).requires_grad_()
    leaves = (x, w_in, w_out)
    ways = {"ours": gradients(relu_squared_mlp, *leaves), "eager": gradients(relu_squared_mlp_reference, *leaves)}
    if gpu:
        ways["torch.compile"] = gradients(compiled(relu_squared_mlp_reference), *leaves)
    size = torch.finfo(dtype).bits // 8
    least = size * (4 * N * D + 4 * D * F + 3 * N * F)
    return [Case(f"{N} tokens, {D} to {F}", ways, 12.0 * N * D * F, least)]


if __name__ == "__main__":
    sys.exit(run("mlp", __doc__, cases))
