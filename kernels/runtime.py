"""What every kernel family needs to know about the machine: is Triton there, is it its interpreter on.

`import triton` never fails where it is installed, even without a driver; every launch then does. So an
implementation is chosen from the tensor's device and the interpreter knob, never by trying.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

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


def tile_of(tiles: dict, x: torch.Tensor):
    """The tile of this device for x's bytes an element, in a table by (device, bytes); else that of "default"."""
    return tiles.get((device_kind(), x.element_size())) or tiles["default", x.element_size()]


def copies_in_bulk(x: torch.Tensor) -> bool:
    """Whether a descriptor can describe the contiguous x: the copy engine wants rows and addresses of 16 bytes."""
    return x.shape[-1] * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0


def descriptor(x: torch.Tensor, block: list[int]):
    """The tensor descriptor of x, whose last axis is dense, for tiles of the shape `block`."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
