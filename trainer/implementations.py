"""Which implementation of each kernel family a run asks for, which one runs, and what a device cannot do."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from kernels import attention, attention_inputs, cross_entropy, heads, mlp, muon
from trainer import products
from trainer.options import UsageError

FAMILIES = {"attention": attention, "attention_inputs": attention, "mlp": mlp, "loss": cross_entropy, "muon": muon}


def asked(kernels: str, device: str, in_8_bits: str = "bf16") -> dict[str, str]:
    """`--kernels` spelled out, by family; device: as `--device` has it. The plain way on a GPU is FlexAttention;
    "specialised" and "gluon" are attention's, and "auto" everything else.
    "products": those of `--products` that the device has."""
    other = "auto" if kernels in ("specialised", "gluon") else kernels
    found = {**dict.fromkeys(FAMILIES, other), "attention": kernels, "products": products.on_device(in_8_bits, device)}
    found["mix"] = found["tables"] = other
    if kernels == "reference":
        found["attention"] = "flex" if torch.cuda.is_available() and device != "cpu" else "banded"
    return found


def running(
    impls: dict[str, str],
    device: torch.device,
    dtype: torch.dtype,
    in_8_bits: str,
    widths: Iterable[tuple[int, int]] = (),
) -> dict[str, str]:
    """The names of what runs on that device for what was `asked`. widths: of a model with techniques, those of a head's
    values and queries in each layer. Raises ValueError for what cannot run there."""
    sample = torch.empty(0, device=device, dtype=dtype)
    found = {family: FAMILIES[family].implementation(impls[family], sample) for family in FAMILIES}
    if with_techniques := {heads.implementation(impls["attention_inputs"], sample, *pair) for pair in widths}:
        found["attention_inputs"] = " and ".join(sorted(with_techniques)) + ", with techniques"
    return found | {family: found[family] + words for family, words in products.told(in_8_bits, impls).items()}


def check_device(kernels: str, head_width: int, device: torch.device, dtype: torch.dtype) -> None:
    """Raise UsageError for what that device cannot do."""
    try:
        runs = running(asked(kernels, device.type), device, dtype, "bf16")["attention"]
        attention.check_forward(runs, head_width)
        if runs in ("triton", "specialised", "gluon", "flex"):
            attention_inputs.check_width(torch.empty(0, head_width, dtype=dtype))
    except ValueError as error:
        raise UsageError(f"--kernels={kernels} --model_dim / --num_heads = {head_width}: {error}") from error
