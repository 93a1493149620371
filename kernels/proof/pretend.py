"""Pretend devices: Triton's real launch path, up to the launch itself, on a machine without a GPU.

`device("sm_90")` makes Triton believe in a driver for that device. A launch on meta tensors then runs the
real host code, specialises and compiles the kernel, and checks its shared memory against the device's limit;
only the launch itself does nothing. TRITON_INTERPRET must be off, so this runs in a process of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from kernels.runtime import HAVE_TRITON, INTERPRETED, triton

#: Bytes of shared memory (local data share on AMD) that one program may use. NVIDIA: CUDA C++ programming
#: guide, technical specifications per compute capability (163, 227 and 227 KiB). AMD CDNA3: 64 KiB.
SHARED_MEMORY_BYTES = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}


class Compiled(NamedTuple):
    """One kernel as it would have been launched; `options` are its warps, stages and constants."""

    kernel: str
    device: str
    options: dict[str, Any]
    grid: tuple[int, ...]
    shared_bytes: int
    asm: dict[str, Any]


class _Utils:
    """What Triton asks of a loaded driver."""

    def __init__(self, name: str):
        self.name = name

    def get_device_properties(self, _device):
        return {
            "max_shared_mem": SHARED_MEMORY_BYTES[self.name],
            "multiprocessor_count": 132,
            "warpSize": 32,
            "max_num_regs": 65536,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def load_binary(self, *_arguments):
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads that a program may have

    def unload_module(self, _module):
        return None


class _Driver:
    """A driver for one device name."""

    def __init__(self, name: str):
        from triton.backends.compiler import GPUTarget

        amd = name.startswith("gfx")
        self.target = GPUTarget("hip", name, 64) if amd else GPUTarget("cuda", int(name[3:]), 32)
        self.utils = _Utils(name)
        # Triton keeps compiled kernels and device limits by device number: each pretend device has its own.
        self.number = 1000 + list(SHARED_MEMORY_BYTES).index(name)

    def launcher_cls(self, _source, _metadata):
        return lambda *arguments, **named: None

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.number

    def set_current_device(self, _device):
        return None

    def get_current_stream(self, _device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_device_interface(self):
        return torch.cuda

    def get_empty_cache_for_benchmark(self):
        return torch.empty(1, device="meta")

    def clear_cache(self, _cache):
        return None

    def get_benchmarker(self):
        def time_one(function, quantiles=None, **_options):
            function()
            return [1.0] * len(quantiles or (0,))

        return time_one


@contextlib.contextmanager
def recorded(name: str) -> Iterator[list[Compiled]]:
    """Inside, every launch is added to the list that this yields, under the device name `name`."""
    from triton.runtime.jit import JITFunction

    launched: list[Compiled] = []
    original = JITFunction.run

    def run(self, *arguments, grid, warmup, **named):
        kernel = original(self, *arguments, grid=grid, warmup=warmup, **named)
        constants = {key: value for key, value in named.items() if isinstance(value, (int, str, bool))}
        where = tuple(grid) if isinstance(grid, (tuple, list)) else ()
        launched.append(Compiled(self.fn.__name__, name, constants, where, kernel.metadata.shared, kernel.asm))
        return kernel

    JITFunction.run = run
    try:
        yield launched
    finally:
        JITFunction.run = original


@contextlib.contextmanager
def device(name: str) -> Iterator[list[Compiled]]:
    """Inside, Triton launches into nothing on device `name`; yields the list that each launch is added to.

    Raises: RuntimeError if the interpreter is on or Triton is missing; ValueError for an unknown device. A
    launch raises what it would raise on that device: a compilation error, or OutOfResources."""
    if not HAVE_TRITON or INTERPRETED:
        raise RuntimeError("a dry run needs Triton with its interpreter off: unset TRITON_INTERPRET")
    if name not in SHARED_MEMORY_BYTES:
        raise ValueError(f"no pretend device {name!r}; there are {', '.join(SHARED_MEMORY_BYTES)}")
    drivers = triton.runtime.driver
    before = drivers._active  # not `active`, which looks for a real driver and raises where there is none
    drivers.set_active(_Driver(name))
    try:
        with recorded(name) as launched:
            yield launched
    finally:
        drivers._active = before
