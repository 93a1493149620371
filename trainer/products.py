"""Which products of a training step are in 8 bits: `--products`.

    bf16      none: all in `--dtype`
    fp8_head  the head's three
    fp8_mlp   the head's and the MLP's six a layer
    fp8       these and those of Q, K, V and O: every product with a weight

Training only: a validation is in `--dtype`. On a GPU without 8 bits it is all in `--dtype`, and the log says so; on a
CPU the same 8-bit numbers are multiplied in float32. What the numbers are: kernels/products8.py, kernels/mlp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import products8
from kernels.mlp import normed_mlp, relu_squared_mlp
from kernels.mlp8 import relu_squared_mlp_8
from kernels.norm import rms_norm

NAMES = ("bf16", "fp8_head", "fp8_mlp", "fp8")  # each has those of the one before it


def on_device(products: str, device: str) -> str:
    """What of that can be had on the device that `--device` names."""
    chosen = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    return products if products == "bf16" or products8.available_on(chosen) else "bf16"


def in_8_bits(impls: Mapping[str, str], least: str) -> bool:
    """Whether products that are in 8 bits from `least` on are so now."""
    return NAMES.index(impls["products"]) >= NAMES.index(least) and torch.is_grad_enabled()


def mlp(x_BTD: Tensor, w_in_FD: Tensor, w_out_DF: Tensor, impls: Mapping[str, str]) -> Tensor:
    """relu(norm(x) w_in^T)^2 w_out^T."""
    if in_8_bits(impls, "fp8_mlp"):
        return relu_squared_mlp_8(rms_norm(x_BTD), w_in_FD, w_out_DF)
    return relu_squared_mlp(rms_norm(x_BTD), w_in_FD, w_out_DF, impl=impls["mlp"])


def mlp_added(x_BTD: Tensor, w_in_FD: Tensor, w_out_DF: Tensor, impls: Mapping[str, str]) -> Tensor:
    """x + `mlp`, in fewer passes over memory."""
    if in_8_bits(impls, "fp8_mlp"):
        return x_BTD + mlp(x_BTD, w_in_FD, w_out_DF, impls)
    return normed_mlp(x_BTD, w_in_FD, w_out_DF, impl=impls["mlp"])


def linear(x: Tensor, w_FD: Tensor, impls: Mapping[str, str]) -> Tensor:
    """x w^T, of the attention's four."""
    return products8.linear(x, w_FD) if in_8_bits(impls, "fp8") else F.linear(x, w_FD)


def added(residual_BTD: Tensor, x_BTE: Tensor, w_DE: Tensor, impls: Mapping[str, str]) -> Tensor:
    """residual + x w^T, in one pass over memory where the device's product can begin with the residual."""
    if in_8_bits(impls, "fp8") or not residual_BTD.is_cuda:
        return residual_BTD + linear(x_BTE, w_DE, impls)
    return added_in_the_product(residual_BTD, x_BTE, w_DE)


def added_in_the_product(residual_BTD: Tensor, x_BTE: Tensor, w_DE: Tensor) -> Tensor:
    """`added` as one call of the library: the same sums, of which the residual is the first summand."""
    return torch.addmm(residual_BTD.flatten(0, 1), x_BTE.flatten(0, 1), w_DE.t()).view_as(residual_BTD)


def of_head(impls: Mapping[str, str], scales: str) -> bool | tuple[float, ...]:
    """`fp8` of `linear_cross_entropy`: no, with measured scales, or with those of `--fp8_scales`."""
    if not in_8_bits(impls, "fp8_head"):
        return False
    return tuple(float(size) for size in scales.split(",") if size) or True


def told(asked: str, impls: Mapping[str, str]) -> dict[str, str]:
    """By family, what the log says beside its implementation."""
    has = impls["products"]
    if has != asked:
        return {"loss": f" (asked for products in 8 bits, {asked}: this device has none)"}
    loss, layers = (", products in 8 bits" * (NAMES.index(has) >= least) for least in (1, 2))
    return {"loss": loss, "mlp": layers, "attention": ", projections in 8 bits" * (has == "fp8")}
