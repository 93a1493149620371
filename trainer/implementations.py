"""Which implementation of each kernel family a run asks for, which one runs, and what a device cannot do."""

from __future__ import annotations

import torch

from kernels import attention, attention_inputs, cross_entropy, mlp, muon
from kernels.runtime import device_kind
from trainer.options import UsageError

FAMILIES = {"attention": attention, "attention_inputs": attention, "mlp": mlp, "loss": cross_entropy, "muon": muon}


def asked(kernels: str, device: str) -> dict[str, str]:
    """`--kernels` spelled out, by family; device: as `--device` has it. The plain way on a GPU is FlexAttention."""
    found = dict.fromkeys(FAMILIES, kernels)
    if kernels == "reference":
        found["attention"] = "flex" if torch.cuda.is_available() and device != "cpu" else "banded"
    return found


def running(impls: dict[str, str], device: torch.device, dtype: torch.dtype, fp8_head: bool) -> dict[str, str]:
    """The names of what runs on that device for what was `asked`. Raises ValueError for what cannot run there."""
    sample = torch.empty(0, device=device, dtype=dtype)
    found = {family: FAMILIES[family].implementation(impl, sample) for family, impl in impls.items()}
    return found | {"loss": found["loss"] + ", products in 8 bits" * fp8_head}


def check_device(kernels: str, head_width: int, device: torch.device, dtype: torch.dtype, fp8_head: bool) -> None:
    """Raise UsageError for what that device cannot do."""
    try:
        if running(asked(kernels, device.type), device, dtype, False)["attention"] in ("triton", "flex"):
            attention_inputs.check_width(torch.empty(0, head_width, dtype=dtype))
    except ValueError as error:
        raise UsageError(f"--kernels={kernels} --model_dim / --num_heads = {head_width}: {error}") from error
    if fp8_head and (device.type != "cuda" or device_kind() not in cross_entropy.FP8_DEVICES):
        raise UsageError(f"--fp8_head: products in 8 bits need one of {', '.join(cross_entropy.FP8_DEVICES)}")
