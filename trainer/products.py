"""Which products of a training step are in 8 bits: `--products`.

    bf16      none: all in `--dtype`
    fp8_head  the head's three
    fp8_mlp   the head's and the MLP's six a layer
    fp8       these and those of Q, K, V and O: every product with a weight

Training only: a validation is in `--dtype`. On a GPU without 8 bits it is all in `--dtype`, and the log says so; on a
CPU the same 8-bit numbers are multiplied in float32. What the numbers are: kernels/products8.py, kernels/mlp8.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import products8
from kernels.guards import differentiable_once
from kernels.mlp import normed_mlp
from kernels.mlp8 import added_linear_8, normed_linear_8, normed_mlp_8
from kernels.norm import rms_norm
from trainer.leaving import leaving

NAMES = ("bf16", "fp8_head", "fp8_mlp", "fp8")  # each has those of the one before it


def on_device(products: str, device: str) -> str:
    """What of that can be had on the device that `--device` names."""
    chosen = torch.device("cuda" if torch.cuda.is_available() and device != "cpu" else "cpu")
    return products if products == "bf16" or products8.available_on(chosen) else "bf16"


def in_8_bits(impls: Mapping[str, str], least: str) -> bool:
    """Whether products that are in 8 bits from `least` on are so now."""
    return NAMES.index(impls["products"]) >= NAMES.index(least) and torch.is_grad_enabled()


@torch.library.custom_op("speedrun::joined", mutates_args=())
def _joined(inwards: list[Tensor], outwards: list[Tensor]) -> list[Tensor]:
    D = outwards[0].shape[0]
    wholes = [part.new_empty(4, D, D) for part in outwards]
    parts = [(whole[:3].view(3 * D, D), whole[3]) for whole in wholes]
    torch._foreach_copy_(
        [part for pair in parts for part in pair], [g for pair in zip(inwards, outwards) for g in pair]
    )
    return wholes


@_joined.register_fake
def _(inwards, outwards):
    return [part.new_empty(4, *part.shape) for part in outwards]


class _Halves(torch.autograd.Function):
    """Of each (4, D, D) the first three as (3 D, D), then of each the last. The compiler would put the gradients of
    each pair together by a kernel of its own; here all are in one operator's few."""

    @staticmethod
    def forward(ctx, *wholes):
        return *(whole[:3].flatten(0, 1) for whole in wholes), *(whole[3] for whole in wholes)

    @staticmethod
    @differentiable_once("halves")
    def backward(ctx, *gradients):
        half = len(gradients) // 2
        return tuple(_joined(list(gradients[:half]), list(gradients[half:])))


Weights = Mapping[str, Tensor]  # of a block, by their names in it
Projections = Callable[[Weights], tuple[list[Tensor], Tensor]]


def plain_projections(weights: Weights) -> tuple[list[Tensor], Tensor]:
    """Of the plain model's block: (its weights to q, k and v, the rows (E, D) after each other; that back (D, D))."""
    return [weights["qkvo_w"][:3].flatten(0, 1)], weights["qkvo_w"][3]


def of_layers(
    impls: Mapping[str, Any],
    blocks: Iterable[torch.nn.Module],
    projections: Projections = plain_projections,
    factors_L2: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Callable[[int], dict[str, Any]]:
    """By layer `impls` with its weights: "w_in", "w_out" of the MLP, and of attention "w_qkv" (E, D), E = 3 D where q
    and k are as wide as v, and "w_o" (D, D). Where products are in 8 bits, also these so ("mlp_in", "mlp_out", "qkv",
    "o"): the weights of all blocks are converted together, once a step, in a few launches.

    To be asked once a layer, from the first to the last: weights whose gradients leave together (trainer/leaving.py)
    go in with the first layer of them, so that in the backward pass they are done when it is.

    projections: as `plain_projections`. factors: of each block the numbers that w_qkv and w_o are multiplied with.
    dtype: of both; theirs if it is None."""
    own = [dict(block.named_parameters()) for block in blocks]
    place = {f"blocks.{n}.{kind}": (n, kind) for n, weights in enumerate(own) for kind in weights}
    groups = [[name for name in group if name in place] for group in impls["early"].names] if "early" in impls else []
    groups.append([name for name in place if not any(name in group for group in groups)])
    eight = _in_8_bits(impls, own, projections, factors_L2)
    halves: dict[int, tuple[Tensor, Tensor]] = {}

    def begin(group: list[str]) -> None:
        given = {name: own[n][kind] for name in group for n, kind in [place[name]]}
        for name, w in leaving(given, impls.get("early")).items():
            n, kind = place[name]
            own[n][kind] = w
        wholes = {n: own[n][kind] for n, kind in map(place.__getitem__, group) if kind == "qkvo_w"}
        if projections is plain_projections and torch.compiler.is_compiling() and torch.is_grad_enabled() and wholes:
            found = _Halves.apply(*wholes.values())
            halves.update(zip(wholes, zip(found, found[len(wholes) :])))

    def at(layer: int) -> dict[str, Any]:
        for group in groups:
            if group and min(place[name][0] for name in group) == layer:
                begin(group)
        weights = own[layer]
        found = {**impls, **eight[layer], "w_in": weights["mlp_in_w"], "w_out": weights["mlp_out_w"]}
        if _attends(weights):
            used = list(halves[layer] if layer in halves else _joined_rows(projections(weights)))
            used = used if dtype is None else [w.to(dtype) for w in used]
            used = used if factors_L2 is None else [factor * w for factor, w in zip(factors_L2[layer], used)]
            found |= dict(w_qkv=used[0], w_o=used[1])
        return found

    return at


def _attends(weights: Weights) -> bool:
    return len(weights) > 2  # more than the MLP's


def _joined_rows(parts: tuple[list[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    inwards, w_o_DD = parts
    return torch.cat(inwards) if len(inwards) > 1 else inwards[0], w_o_DD


def _in_8_bits(
    impls: Mapping[str, Any], blocks: list[dict[str, Tensor]], projections: Projections, factors_L2: Tensor | None
) -> list[dict[str, Any]]:
    """Of each block the weights that are in 8 bits, by kind; all of one kind and shape are converted together."""
    found: list[dict[str, Any]] = [{} for _ in blocks]
    kinds: list[tuple[str, int, dict[int, Tensor], int]] = []  # name, axis of norms, by block, place of factors or -1
    if in_8_bits(impls, "fp8_mlp"):
        kinds += [("mlp_in", 1, {n: weights["mlp_in_w"] for n, weights in enumerate(blocks)}, -1)]
        kinds += [("mlp_out", 0, {n: weights["mlp_out_w"] for n, weights in enumerate(blocks)}, -1)]
    if in_8_bits(impls, "fp8"):
        pairs = {n: _joined_rows(projections(weights)) for n, weights in enumerate(blocks) if _attends(weights)}
        for place, kind in enumerate(("qkv", "o")):
            for shape in dict.fromkeys(pair[place].shape for pair in pairs.values()):
                alike = {n: pair[place] for n, pair in pairs.items() if pair[place].shape == shape}
                kinds.append((kind, 1, alike, place))
    for kind, axis, ws, place in kinds:
        factors = None if place < 0 or factors_L2 is None else torch.stack([factors_L2[n, place] for n in ws])
        for n, weight in zip(ws, products8.weights_in_8_bits(list(ws.values()), axis, factors=factors)):
            found[n][kind] = weight
    return found


def mlp_added(x_BTD: Tensor, w_in_FD: Tensor, w_out_DF: Tensor, impls: Mapping[str, Any]) -> Tensor:
    """x + relu(norm(x) w_in^T)^2 w_out^T."""
    if in_8_bits(impls, "fp8_mlp"):
        weights = (impls["mlp_in"], impls["mlp_out"]) if "mlp_in" in impls else None
        return normed_mlp_8(x_BTD, w_in_FD, w_out_DF, weights=weights)
    return normed_mlp(x_BTD, w_in_FD, w_out_DF, impl=impls["mlp"])


def linear(x: Tensor, w_FD: Tensor, impls: Mapping[str, Any]) -> Tensor:
    """x w^T, of attention's first three."""
    return products8.linear(x, w_FD, weight=impls.get("qkv")) if in_8_bits(impls, "fp8") else F.linear(x, w_FD)


def normed_linear(x: Tensor, w_FD: Tensor, impls: Mapping[str, Any], columns: int) -> tuple[Tensor, Tensor]:
    """(norm(x) w^T, the first so many columns of norm(x)), of attention's first three."""
    if in_8_bits(impls, "fp8"):
        return normed_linear_8(x, w_FD, columns, weight=impls.get("qkv"))
    y = rms_norm(x)
    return F.linear(y, w_FD), y[..., :columns]


def largest_value(factors_2: Tensor, ve_BTD: Tensor | None, config: Any, impls: Mapping[str, Any]) -> float | Tensor:
    """A bound on what attention finds, for the scale of its 8 bits: a mean of values s[0] norm(v) + s[1] ve is no
    larger than the largest of these, whose first part is no longer than the root of a head's width. 0: not needed."""
    if not in_8_bits(impls, "fp8"):
        return 0.0
    s_0, s_1 = factors_2.detach().abs().unbind()
    width = config.model_dim // config.num_heads
    if ve_BTD is None:
        return s_0 * width**0.5
    return s_0 * width**0.5 + s_1 * torch.nan_to_num(ve_BTD.detach(), nan=0.0, posinf=0.0, neginf=0.0).abs().amax()


def added(
    residual_BTD: Tensor, x_BTE: Tensor, w_DE: Tensor, impls: Mapping[str, Any], of_x: float | Tensor = 0.0
) -> Tensor:
    """residual + x w^T, in one pass over memory where the device's product can begin with the residual. of_x: a bound
    on x, if there is one."""
    if in_8_bits(impls, "fp8"):
        return added_linear_8(residual_BTD, x_BTE, w_DE, of_x=of_x, weight=impls.get("o"))
    if not residual_BTD.is_cuda:
        return residual_BTD + F.linear(x_BTE, w_DE)
    return added_in_the_product(residual_BTD, x_BTE, w_DE)


def added_in_the_product(residual_BTD: Tensor, x_BTE: Tensor, w_DE: Tensor) -> Tensor:
    """`added` as one call of the library: the same sums, of which the residual is the first summand."""
    return torch.addmm(residual_BTD.flatten(0, 1), x_BTE.flatten(0, 1), w_DE.t()).view_as(residual_BTD)


def head(head_VD: Tensor, impls: Mapping[str, Any], classes_P: Tensor | None) -> Tensor:
    """The head's weight, (V, D), or (P, D) of the classes that the softmax is over."""
    head_VD = leaving(dict(head_w=head_VD), impls.get("early"))["head_w"]
    return head_VD if classes_P is None else head_VD.index_select(0, classes_P)


def of_head(impls: Mapping[str, Any], config: Any) -> bool | tuple[float, ...]:
    """`fp8` of `linear_cross_entropy`: no, with measured scales, or with those of `--fp8_scales`. The rows of its
    input come from a norm, so that they are known to be no longer than the root of their width."""
    if not in_8_bits(impls, "fp8_head"):
        return False
    return tuple(float(n) for n in config.fp8_scales.split(",") if n) or (config.model_dim**0.5, 0.0, 0.0)


def told(asked: str, impls: Mapping[str, str]) -> dict[str, str]:
    """By family, what the log says beside its implementation."""
    has = impls["products"]
    if has != asked:
        return {"loss": f" (asked for products in 8 bits, {asked}: this device has none)"}
    loss, layers = (", products in 8 bits" * (NAMES.index(has) >= least) for least in (1, 2))
    return {"loss": loss, "mlp": layers, "attention": ", projections in 8 bits" * (has == "fp8")}
