"""What counts as near to float64: the one rule by which every result is held to the truth."""

from __future__ import annotations

import torch

from kernels.proof import FACTOR, FLOOR
from kernels.proof.interpreter import KernelFault


def compare(name, result, truth, same, dtype, tolerance: float = 1.0, least_scale: float = 0.0) -> dict[str, float]:
    """Hold one result to float64: its error may be little more than that of the reference in the same dtype.

    Root mean squares first, which a fault in a few places of many moves and which one unlucky rounding does not; the
    largest error second, with more room, for a fault in one place.

    Returns: error and allowed of the largest error, scale, and the share of what is allowed that was needed.
    Raises: KernelFault naming the output."""
    if result.shape != truth.shape or result.dtype != same.dtype:
        raise KernelFault(
            f"{name} is {result.dtype} {tuple(result.shape)}, but the reference {same.dtype} {tuple(truth.shape)}"
        )
    true = truth.detach().double()
    if true.numel() == 0:
        return {"error": 0.0, "allowed": 0.0, "scale": 0.0, "share": 0.0}
    errors, usual = ((x.detach().double() - true) for x in (result, same))
    scales = {"rms": _rms(true), "largest": true.abs().max().item()}
    sizes = {"rms": (_rms(errors), _rms(usual)), "largest": (errors.abs().max().item(), usual.abs().max().item())}
    share, report = 0.0, {}
    for kind, (error, common) in sizes.items():
        scale = max(scales[kind], least_scale)
        allowed = FACTOR[kind] * common + FLOOR[kind][dtype] * tolerance * scale
        if not error <= allowed:  # written so that NaN fails
            raise KernelFault(
                f"{name} is off by {error:.3g} ({kind}); allowed are {allowed:.3g}: {FACTOR[kind]} times the "
                f"same-dtype reference's {common:.3g}, and the tolerance at a {kind} value of {scale:.3g}"
            )
        share = max(share, error / allowed if allowed else 0.0)
        report = {"error": error, "allowed": allowed, "scale": scale}
    return {**report, "share": share}


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()
