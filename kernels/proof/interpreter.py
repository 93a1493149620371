"""Triton's interpreter, mended for bfloat16 and made to check every address of a launch.

The interpreter keeps bfloat16 as raw 16-bit integers, and most of its operations forget to widen them:
products come out silently wrong. `mended()` widens and rounds at every operation. `checked()` watches
loads and stores:

- a pointer remembers the tensor argument that it was made from, through all pointer arithmetic; an address
  that is no element of that tensor is an error, even where it falls into another one or into a view's gaps;
- two programs of a launch may not write one address, nor may one read what another writes (atomics may meet);
- two lanes of one store may not write one address.

Both work on Triton 3.6 to 3.9 and need TRITON_INTERPRET=1 before Triton is first imported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kernels.runtime import INTERPRETED, tl


class KernelFault(AssertionError):
    """A kernel did what no kernel may do; the message names the kernel, the tensor and the program."""


@contextlib.contextmanager
def _patched() -> Iterator[Any]:
    """Yield patch(owner, name, value); undo every patch at the end."""
    if not INTERPRETED:
        raise RuntimeError("the interpreter is off: set TRITON_INTERPRET=1 before triton is first imported")
    undo = []

    def patch(owner, name, value):
        undo.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, value)

    try:
        yield patch
    finally:
        for owner, name, value in reversed(undo):
            delattr(owner, name) if value is None else setattr(owner, name, value)


# ---- bfloat16 ----------------------------------------------------------------------------------------------


def widen_bf16(raw: np.ndarray) -> np.ndarray:
    """Raw bfloat16 (uint16) as float32."""
    return (np.asarray(raw).astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_bf16(values: np.ndarray) -> np.ndarray:
    """float32 as raw bfloat16, to nearest, ties to even; NaN stays NaN."""
    values = np.array(values, dtype=np.float32, order="C")
    bits = values.view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(operand) -> bool:
    return getattr(getattr(operand, "dtype", None), "scalar", None) == tl.bfloat16


@contextlib.contextmanager
def mended() -> Iterator[None]:
    """Inside, the interpreter computes bfloat16 as a GPU does: in float32, rounded after every operation."""
    with _patched() as patch:
        from triton.runtime import interpreter

        builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle

        def widened(operand):
            return handle(widen_bf16(operand.data), tl.float32) if _is_bf16(operand) else operand

        def in_float32(original):
            def operation(self, *operands):
                if not any(map(_is_bf16, operands)):
                    return original(self, *operands)
                result = original(self, *map(widened, operands))
                if result.data.dtype == np.bool_:  # a comparison
                    return result
                return handle(round_bf16(result.data), tl.bfloat16)

            return operation

        def cast(self, source, wanted, *rounding, original=builder.cast_impl):
            if wanted.scalar == tl.bfloat16:
                return (
                    source
                    if _is_bf16(source)
                    else handle(round_bf16(original(self, source, tl.float32).data), tl.bfloat16)
                )
            return original(self, widened(source), wanted)

        def to_float(self, source, wanted, rounding, original=builder.create_fp_to_fp):
            if _is_bf16(source) or wanted.scalar == tl.bfloat16:
                return cast(self, source, wanted)
            return original(self, source, wanted, rounding)

        def dot(self, a, b, *rest, original=builder.create_dot):
            return original(self, widened(a), widened(b), *rest)

        def without_bf16(original):
            def apply(self, source):
                parts = source if isinstance(source, tuple) else (source,)
                if any(_is_bf16(x.handle) for x in parts):
                    raise KernelFault("a reduction or scan of bfloat16 values: widen them to float32 first")
                return original(self, source)

            return apply

        for name in ("binary_op", "unary_op", "create_fma", "create_rsqrt", "create_erf", "create_clampf"):
            if name in builder.__dict__:
                patch(builder, name, in_float32(builder.__dict__[name]))
        patch(builder, "cast_impl", cast)
        patch(builder, "create_fp_to_fp", to_float)
        patch(builder, "create_dot", dot)
        patch(builder, "get_bf16", lambda self, value: handle(round_bf16(np.array([value])), tl.bfloat16))
        for kind in (interpreter.ReduceOps, interpreter.ScanOps):
            patch(kind, "apply", without_bf16(kind.apply))
        yield


# ---- addresses ---------------------------------------------------------------------------------------------


_GRID = 65536  # programs along the second and third axis, at most: one number names a program


def _program(number: int) -> str:
    """A program's place in its grid; the usual, one-dimensional one as a single number."""
    x, y, z = int(number) // _GRID**2, int(number) // _GRID % _GRID, int(number) % _GRID
    return f"({x}, {y}, {z})" if y or z else str(x)


class _Memory:
    """One storage of a launch: which program wrote and which read each byte (an element counts by its first).

    -1 means nobody; in `reader`, -2 means several programs."""

    def __init__(self, storage: torch.UntypedStorage):
        self.start = storage.data_ptr()
        size = max(storage.nbytes(), 1)
        self.writer = np.full(size, -1, np.int64)
        self.reader = np.full(size, -1, np.int64)
        self.by_atomics = np.zeros(size, bool)


class _Origin:
    """The tensor argument that a pointer was made from."""

    def __init__(self, name: str, tensor: torch.Tensor, memory: _Memory):
        self.name, self.memory = name, memory
        storage = tensor.untyped_storage()
        size = tensor.element_size()
        every = torch.arange(storage.nbytes() // size)
        mine = every.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).reshape(-1)
        self.allowed = np.zeros(max(storage.nbytes(), 1), bool)
        self.allowed[mine.numpy() * size] = True
        self.size = size
        self.first = tensor.data_ptr() - memory.start

    def offsets(self, addresses: np.ndarray, what: str) -> np.ndarray:
        """Byte offsets into the storage; KernelFault if an address is no element of this tensor."""
        offsets = addresses.astype(np.int64) - self.memory.start
        inside = (offsets >= 0) & (offsets < self.allowed.size)
        good = inside & self.allowed[np.where(inside, offsets, 0)]
        if not good.all():
            bad = offsets[~good]
            raise KernelFault(
                f"{what} reaches {bad.size} addresses outside {self.name}, the first at byte "
                f"{bad[0] - self.first} from its start"
            )
        return offsets


class Watch:
    """What `checked()` has seen: `launched` counts the launches of each kernel by name."""

    def __init__(self) -> None:
        self.launched: dict[str, int] = {}
        self.kernel = ""
        self.program = 0
        self.memories: dict[int, _Memory] = {}
        self.origins: dict[tuple, _Origin] = {}

    def begin(self, kernel: str, arguments: dict[str, Any]) -> None:
        """Start a launch of `kernel` with these named arguments."""
        self.kernel, self.memories, self.origins = kernel, {}, {}
        self.launched[kernel] = self.launched.get(kernel, 0) + 1
        for name, value in arguments.items():
            tensor = getattr(value, "base", value)
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                self._origin(tensor, name)

    def _origin(self, tensor: torch.Tensor, name: str = "an unnamed tensor") -> _Origin:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
        if key not in self.origins:
            storage = tensor.untyped_storage()
            memory = self.memories.setdefault(storage.data_ptr(), _Memory(storage))
            self.origins[key] = _Origin(name, tensor, memory)
        return self.origins[key]

    def mark(self, handle, tensor) -> None:
        """Remember that `handle` points into `tensor`."""
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            handle.origin = self._origin(tensor)

    def access(self, kind: str, pointer, mask) -> None:
        """Check one load, store or atomic of the running program."""
        addresses = np.asarray(pointer.data)
        chosen = np.broadcast_to(np.asarray(True if mask is None else mask.data, bool), addresses.shape)
        addresses = addresses[chosen].ravel()
        if addresses.size == 0:
            return
        what = f"{self.kernel}, program {_program(self.program)}: a {kind}"
        origin = getattr(pointer, "origin", None)
        if origin is None:
            raise KernelFault(f"{what} through a pointer that comes from no argument")
        offsets = origin.offsets(addresses, what)
        if kind == "store" and np.unique(offsets).size != offsets.size:
            raise KernelFault(f"{what} writes one address of {origin.name} from several lanes")
        self._meet(kind, what, origin, offsets)

    def _meet(self, kind: str, what: str, origin: _Origin, offsets: np.ndarray) -> None:
        """Compare with what other programs did at these offsets, and note this access."""
        memory, atomic = origin.memory, kind == "atomic"
        writer, reader = memory.writer[offsets], memory.reader[offsets]
        others = (writer != -1) & (writer != self.program)
        if atomic:
            others &= ~memory.by_atomics[offsets]
        if others.any():
            raise KernelFault(
                f"{what} meets what program {_program(writer[others][0])} wrote "
                f"in {origin.name}, {int(others.sum())} addresses"
            )
        if kind == "load":
            memory.reader[offsets] = np.where((reader == -1) | (reader == self.program), self.program, -2)
            return
        others = (reader != -1) & (reader != self.program)
        if others.any():
            raise KernelFault(
                f"{what} changes what another program reads in {origin.name}, {int(others.sum())} addresses"
            )
        memory.by_atomics[offsets] = atomic
        memory.writer[offsets] = self.program


@contextlib.contextmanager
def checked() -> Iterator[Watch]:
    """Inside, every launch in the interpreter is watched; KernelFault at the first wrong access."""
    with _patched() as patch:
        from triton.runtime import interpreter

        builder, watch = interpreter.InterpreterBuilder, Watch()

        def keep_origin(original):
            def operation(self, *operands):
                result = original(self, *operands)
                origins = [x.origin for x in operands if hasattr(x, "origin")]
                if origins and hasattr(result, "data"):
                    result.origin = origins[0]
                return result

            return operation

        def convert(argument, original=interpreter._implicit_cvt):
            result = original(argument)
            if hasattr(argument, "data_ptr"):
                watch.mark(result.handle, argument)
            return result

        def pointers(self, *offsets, original=interpreter.TensorDescHandle.materialize_pointers):
            handles, masks = original(self, *offsets)
            handles.origin = self.base.origin
            return handles, masks

        loads, stores = builder.create_masked_load, builder.create_masked_store
        modifies, swaps = builder.create_atomic_rmw, builder.create_atomic_cas

        def load(self, ptrs, mask, *rest, **named):
            watch.access("load", ptrs, mask)
            return loads(self, ptrs, mask, *rest, **named)

        def store(self, ptrs, value, mask, *rest, **named):
            watch.access("store", ptrs, mask)
            return stores(self, ptrs, value, mask, *rest, **named)

        def read_modify_write(self, op, ptr, value, mask, *rest, **named):
            watch.access("atomic", ptr, mask)
            return modifies(self, op, ptr, value, mask, *rest, **named)

        def compare_and_swap(self, ptr, *rest, **named):
            watch.access("atomic", ptr, None)
            return swaps(self, ptr, *rest, **named)

        def set_program(self, x, y, z, original=builder.set_grid_idx):
            watch.program = (x * _GRID + y) * _GRID + z
            return original(self, x, y, z)

        def call(self, *arguments, original=interpreter.GridExecutor.__call__, **named):
            watch.begin(self.fn.__name__, {**dict(zip(self.arg_names, arguments)), **named})
            try:
                return original(self, *arguments, **named)
            except Exception as error:  # the interpreter wraps what a kernel raises, once a call
                inner = error
                while inner.__cause__ is not None:
                    inner = inner.__cause__
                if isinstance(inner, KernelFault):
                    raise inner from None
                raise

        for name in (
            "create_addptr",
            "create_splat",
            "create_broadcast",
            "create_expand_dims",
            "create_trans",
            "create_reshape",
            "create_unsplat",
            "create_select",
            "create_bitcast",
        ):
            if name in builder.__dict__:
                patch(builder, name, keep_origin(builder.__dict__[name]))
        patch(builder, "create_masked_load", load)
        patch(builder, "create_masked_store", store)
        patch(builder, "create_atomic_rmw", read_modify_write)
        patch(builder, "create_atomic_cas", compare_and_swap)
        patch(builder, "set_grid_idx", set_program)
        patch(interpreter, "_implicit_cvt", convert)
        patch(interpreter.TensorDescHandle, "materialize_pointers", pointers)
        patch(interpreter.GridExecutor, "__call__", call)
        yield watch


# ---- poison ------------------------------------------------------------------------------------------------


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with what no kernel computes: NaN, or the least integer."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).min)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty, empty_like and new_empty return poison: what a kernel leaves unwritten shows."""
    with _patched() as patch:
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            original = getattr(owner, name)
            patch(owner, name, lambda *a, original=original, **k: poison(original(*a, **k)))
        yield
