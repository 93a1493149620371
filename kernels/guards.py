"""What every operator does at its border, so that no kernel has to trust its caller.

launch                  a kernel over its programs, on the device of its tensors, and not at all for no programs
dense, in_place         what kernels walk: elements one after another; and the way back for what they change
expect, expect_floats   an argument that does not fit is refused by its name; expect_operands: all of an operator
in_rows                 (..., D) as (N, D)
refuse_tangents         forward-mode derivatives, which torch would forget, are refused
differentiable_once     a derivative written by hand has none of its own: asking for one is an error
without_autocast        dtypes are the caller's: autocast does not reach inside an operator
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator

import torch

#: What the Triton kernels compute with; the plain-torch paths take float64 too.
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def launch(kernel, programs: tuple[int, ...], *arguments, **options) -> None:
    """kernel[programs](*arguments, **options), on the device of its tensors, which need not be the current one.

    Raises: ValueError if the tensors lie on several devices."""
    parts = [part for a in arguments for part in (a if isinstance(a, tuple) else (a,))]
    tensors = [t for t in (getattr(part, "base", part) for part in parts) if isinstance(t, torch.Tensor)]
    devices = {t.device for t in tensors}
    if len(devices) != 1:
        raise ValueError(f"{kernel.__name__} got tensors on {sorted(map(str, devices))}: all must be on one device")
    if 0 in programs:
        return
    (device,) = devices
    several = device.type == "cuda" and torch.cuda.device_count() > 1
    with torch.cuda.device(device) if several else contextlib.nullcontext():
        kernel[programs](*arguments, **options)


def dense(x: torch.Tensor) -> torch.Tensor:
    """x if its elements lie in memory one after another, in order and as they are, else a copy of which that holds."""
    return x.resolve_neg().contiguous()


@contextlib.contextmanager
def in_place(name: str, x: torch.Tensor) -> Iterator[torch.Tensor]:
    """What a kernel may change in place of x, whatever x's strides; x has the change afterwards.

    Raises: ValueError if elements of x may share memory; RuntimeError, as torch does, for a leaf of a graph."""
    reach = 0  # elements that the axes so far, of the smallest steps, lie within
    for step, size in sorted((step, size) for step, size in zip(x.stride(), x.shape) if size > 1):
        if step <= reach:
            raise ValueError(
                f"{name} {tuple(x.shape)} with strides {x.stride()} is expanded or overlaps: its elements share "
                "memory, so it cannot be updated"
            )
        reach += step * (size - 1)
    if x.requires_grad and x.is_leaf and torch.is_grad_enabled():
        raise RuntimeError(f"{name} is a leaf that requires grad: update it under torch.no_grad()")
    walked = dense(x)
    yield walked
    if walked is not x:
        x.copy_(walked)


def expect(name: str, x: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> None:
    """Raise ValueError, naming the argument, unless x has this shape and is on the device of `like`."""
    if tuple(x.shape) != tuple(shape) or x.device != like.device:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} and be on {like.device}, got {tuple(x.shape)} on {x.device}"
        )


def expect_floats(name: str, x: torch.Tensor, dtypes: tuple[torch.dtype, ...] = ()) -> None:
    """Raise TypeError, naming the argument, unless x holds floating numbers, of one of `dtypes` if any are given."""
    wide = (*KERNEL_DTYPES, torch.float64)
    if x.dtype not in (dtypes or wide):
        names = ", ".join(str(d).removeprefix("torch.") for d in dtypes or wide)
        raise TypeError(f"{name} has dtype {x.dtype}; {names} are supported")


class _Refusal(torch.autograd.Function):
    """The identity on gradients; differentiating it is an error that names the operator."""

    @staticmethod
    def forward(ctx, name, gradients, *_causes):
        ctx.name = name
        return tuple(g.view_as(g) for g in gradients)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"{ctx.name} can be differentiated once only: its gradient is written by hand and has no derivative of "
            "its own. The reference in plain torch beside it has all of them"
        )


def differentiable_once(name: str) -> Callable:
    """Decorator for the backward pass of the operator `name`, a function (ctx, *upstream) -> gradients or None.

    Under create_graph=True torch takes for a constant whatever the backward pass does not show it, and second
    derivatives come out silently wrong. torch's own `once_differentiable` lets that pass where the upstream gradient
    is a constant, as it is for a loss. Autocast is off inside, as in the forward pass."""

    def decorate(backward):
        backward = without_autocast(backward)

        @functools.wraps(backward)
        def run(ctx, *upstream):
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *upstream)
            with torch.no_grad():
                gradients = backward(ctx, *upstream)
            given = [g for g in gradients if g is not None]
            upstream = [g for u in upstream for g in (u if isinstance(u, (list, tuple)) else [u])]
            anchor = torch.empty(0, requires_grad=True)  # so that what comes out asks for a derivative in any case
            refusing = iter(_Refusal.apply(name, given, anchor, *upstream))
            return tuple(None if g is None else next(refusing) for g in gradients)

        return run

    return decorate


def expect_operands(operator: str, **tensors: torch.Tensor) -> None:
    """Raise an error that names the argument unless all are floats of a kernel's dtypes on one device, and none asks
    for forward-mode derivatives, which the operator has not."""
    first = next(iter(tensors.values()))
    for name, x in tensors.items():
        expect(name, x, x.shape, first)
        expect_floats(name, x, KERNEL_DTYPES)
    refuse_tangents(operator, *tensors.values())


def in_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., D) as (N, D), for no rows, too."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def refuse_tangents(name: str, *tensors: torch.Tensor | None) -> None:
    """Raise NotImplementedError if forward-mode derivatives are asked of the operator `name`, where torch would drop
    them in silence: it does for operators made by torch.library."""
    if torch.compiler.is_compiling():
        return
    if any(t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError(f"{name} has no forward-mode derivative here; its reference in plain torch has")


def without_autocast(function: Callable) -> Callable:
    """Decorator: inside, autocast is off. An operator's dtypes are those of its arguments."""

    @functools.wraps(function)
    def run(*arguments, **options):
        if not (torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")):
            return function(*arguments, **options)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*arguments, **options)

    return run
