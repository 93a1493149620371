"""What every kernel family needs to know about the machine: is Triton there, is it its interpreter on.

`import triton` never fails where it is installed, even without a driver; every launch then does. So an
implementation is chosen from the tensor's device and the interpreter knob, never by trying.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import NamedTuple

import torch

try:
    import triton
    import triton.language as tl

    HAVE_TRITON = True
except ImportError:  # macOS and Windows: only the references run

    def _undecorated(function=None, **_options):
        return function if function is not None else _undecorated

    triton = SimpleNamespace(jit=_undecorated, cdiv=lambda a, b: -(-a // b), __version__="none")
    tl = SimpleNamespace(constexpr=lambda value: value)
    HAVE_TRITON = False

#: exp(x) is exp2(x * LOG2_E), and exp2 is what the devices have.
LOG2_E = 1.4426950408889634
#: True when Triton runs kernels in its interpreter. Read once: Triton decides when a kernel is decorated.
INTERPRETED = HAVE_TRITON and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _read_numbers_of_one_element() -> None:
    """Triton 3.6's interpreter reads the bound of a loop by int() of an array of one element, which numpy refuses from
    2.4 on."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched


def _convert_float8_as_torch_does() -> None:
    """Triton's interpreter rounds to float8 without carrying into the exponent, and its e4m3 knows no NaN."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    kinds = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
    convert, dot = InterpreterBuilder.create_fp_to_fp, InterpreterBuilder.create_dot

    def widened(x):
        kind = kinds.get(x.dtype.scalar)
        if kind is None:
            return x
        return TensorHandle(torch.from_numpy(x.data.copy()).view(kind).float().numpy(), tl.float32)

    def create_fp_to_fp(self, source, wanted, rounding):
        source, kind = widened(source), kinds.get(wanted.scalar)
        if kind is None or source.dtype.scalar != tl.float32:
            return source if source.dtype.scalar == wanted.scalar else convert(self, source, wanted, rounding)
        return TensorHandle(torch.from_numpy(source.data.copy()).to(kind).view(torch.uint8).numpy(), wanted.scalar)

    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)


if INTERPRETED:
    _convert_float8_as_torch_does()
if INTERPRETED and triton.__version__.startswith("3.6."):
    _read_numbers_of_one_element()


def implementation_of(impl: str, tensor: torch.Tensor, *, cpu: str, choices: tuple[str, ...]) -> str:
    """Name of the implementation that runs for `tensor` when the caller asks for `impl`.

    Args:
        impl: "auto" or one of `choices`. "auto" is "triton" on a GPU and `cpu` elsewhere.
        tensor: any tensor of the call; only its device counts.
        cpu: the family's plain-torch path for CPUs.
        choices: every name that the family accepts besides "auto".

    Raises:
        ValueError: `impl` is unknown, or "triton" cannot run on the tensor's device.
    """
    if impl not in ("auto", *choices):
        raise ValueError(f"impl={impl!r} is unknown; choose one of auto, {', '.join(choices)}")
    device = tensor.device.type
    if impl == "auto":
        impl = "triton" if device == "cuda" else cpu
    if impl == "triton" and not HAVE_TRITON:
        raise ValueError(f"impl='triton' for a tensor on {device}, but triton is missing: pip install triton")
    if impl == "triton" and device == "cpu" and not INTERPRETED:
        raise ValueError(
            "impl='triton' on a CPU tensor needs Triton's interpreter: set TRITON_INTERPRET=1 "
            f"before the first import of triton, or choose impl={cpu!r}"
        )
    return impl


def device_kind() -> str:
    """The name in tile tables of the device that Triton compiles for: "sm_90", "gfx942", ..., or "default"."""
    if INTERPRETED:
        return "default"
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch).split(":")[0]


@functools.cache
def _multiprocessors(device: int) -> int:
    return triton.runtime.driver.active.utils.get_device_properties(device)["multiprocessor_count"]


def persistent(tiles: int) -> int:
    """Programs of a kernel that walks over so many tiles with as many programs as the device runs at once, one a
    multiprocessor; few in the interpreter, so that each has several tiles."""
    at_once = 3 if INTERPRETED else _multiprocessors(triton.runtime.driver.active.get_current_device())
    return min(tiles, at_once)


class Tile(NamedTuple):
    """Launch configuration of one kernel.

    rows, columns: of the tile that a program works on. For products, those of the result; for attention, queries and
        keys (whichever the program owns, it walks the other).
    warps, stages: warps a program, and stages of the pipeline of its loop.
    depth: of a product's step along the summed axis; 0 where a tile spans it.
    descriptors: what is walked comes through tensor descriptors (the bulk copies of Hopper and Blackwell), where 16
        bytes divide its rows; else through pointers.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    depth: int = 0
    descriptors: bool = False


#: A family's tiles: (device kind, kernel, bytes an element) -> tile. Kinds: `device_kind`; "default" fits any device.
Tiles = dict[tuple[str, str, int], Tile]


def tile_of(
    tiles: Tiles, kernel: str, dtype: torch.dtype, kind: str | None = None, special: Sequence[str] = ()
) -> Tile:
    """The tile of `kernel` for elements of `dtype`, on this device or on `kind`; that of "default" if it has none.

    special: names of tiles that are taken before, the first that the device has one of."""
    kind = device_kind() if kind is None else kind
    found = (tiles.get((kind, name, dtype.itemsize)) for name in (*special, kernel))
    return next((tile for tile in found if tile), None) or tiles["default", kernel, dtype.itemsize]


def copies_in_bulk(x: torch.Tensor) -> bool:
    """Whether a descriptor can describe the contiguous x: the copy engine wants rows and addresses of 16 bytes."""
    return x.shape[-1] * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def descriptor(x: torch.Tensor, block: list[int]):
    """The tensor descriptor of x, whose last axis is dense, for tiles of the shape `block`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
