"""Time Muon's parts: the orthogonalisation with symmetric products against plain ones, and the weight update.

    python -m bench.muon     # medium's attention and MLP matrices on a GPU, small ones on a CPU
"""

from __future__ import annotations

import sys

import torch

from bench.family import Case, compiled, run
from kernels.muon import apply_update_, orthogonalize, orthogonalize_reference


def cases(device: torch.device, gpu: bool) -> list[Case]:
    """All of a model's matrices of one shape as one batch, as the trainer does it on one GPU."""
    shapes = {"attention": (60, 1024, 1024), "MLP": (32, 1024, 4096)} if gpu else {"MLP": (8, 64, 256)}
    dtype = torch.bfloat16 if gpu else torch.float32
    found = []
    for name, (B, M, K) in shapes.items():
        g = torch.randn(B, M, K, device=device)
        ways = {
            "ours": lambda g=g: orthogonalize(g, dtype=dtype),
            "plain products": lambda g=g: orthogonalize_reference(g, dtype=dtype),
        }
        if gpu:
            fused = compiled(orthogonalize_reference)
            ways["torch.compile"] = lambda g=g, fused=fused: fused(g, dtype=dtype)
        flops = 5.0 * B * (M * M * K + M**3 + 2 * M * M * K)  # two symmetric products and a full one
        found.append(Case(f"orthogonalise {name} {B} x {M} x {K}", ways, flops, 5 * 2.0 * B * (3 * M * K + 4 * M * M)))
    B, M, K = next(iter(shapes.values()))
    weight = torch.randn(B, M, K, device=device, dtype=dtype)
    low = torch.zeros(B, M, K, device=device, dtype=torch.int16) if gpu else None
    update = torch.randn(B, M, K, device=device, dtype=dtype)
    ways = {"ours": lambda: apply_update_(weight, low, update, lr=0.0, weight_decay=0.0)}
    if gpu:
        ways["eager"] = lambda: apply_update_(weight, low, update, lr=0.0, weight_decay=0.0, impl="reference")
    found.append(Case(f"update {B} x {M} x {K}", ways, 2.0 * B * M * K, 10.0 * B * M * K))
    return found


if __name__ == "__main__":
    sys.exit(run("muon", __doc__, cases))
