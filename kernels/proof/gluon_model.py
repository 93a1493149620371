"""A model of the part of Gluon that the kernels use, on a CPU: so that a Gluon kernel runs where no GPU is.

Triton's interpreter does not know Gluon. Here stand the same names as in kernels/gluon.py, with their meaning in plain
torch; `modelled(module)` is the module's source with these in place of those, so that what runs is the kernel's own
text: its loops, masks, barriers and buffers. What is kept of the machine, as NVIDIA's PTX manual has it:

partitions   run one at a time, and which one goes on is drawn (by a seed) wherever one waits, signals, loads or
             multiplies. If nobody can go on, that is an error, as on a device the hang.
barriers     a phase ends when its arrivals and its bytes are there; a wait names a phase by its parity.
copies       a buffer is NaN from the moment a copy into it is asked for until it is done, at a moment that is drawn.
             One out of a buffer, which is added to what is in device memory, finds it as it was when it was asked for.
fences       what a partition stores in shared memory is read by no copy and no product before its fence.
products     that are asynchronous read their operands when they are asked for and again when they are waited for: if
             those differ, somebody has overwritten a buffer in use. Nobody has their result before the wait.
memory       a load or a store outside its tensor is an error, and so is one address written by two programs.

What it does not know: layouts in registers and in shared memory, widths of integers, and time.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from kernels.proof.interpreter import KernelFault

__all__ = [
    "add_tile",
    "descriptor",
    "fence_async_shared",
    "gl",
    "gluon",
    "load_tile",
    "mbarrier",
    "modelled",
    "seeded",
    "tiles_read",
]


# ---- who runs ---------------------------------------------------------------------------------------------


class _Ended(BaseException):
    """Another partition has failed: this one ends, too."""


class _Machine:
    """A program's partitions and its copies under way. One partition runs at a time."""

    def __init__(self, number: int, draw: random.Random, programs: int = 1):
        self.number, self.draw, self.programs = number, draw, programs
        self.copies: list[Callable[[], None]] = []
        self.haste = draw.choice((0.0, 0.3))  # of copies: they end when nobody can go on without them, or sooner
        self.partitions: dict[threading.Thread, threading.Semaphore] = {}
        self.waiting: dict[threading.Thread, Callable[[], bool]] = {}
        self.products: dict[threading.Thread, list[_Product]] = {}
        self.adding: Counter[threading.Thread] = Counter()  # tiles that the copy engine has not read yet
        self.stored: list[tuple[threading.Thread, torch.Tensor]] = []  # in shared memory, before a fence
        self.fault: BaseException | None = None
        self.done = threading.Semaphore(0)

    def step(self, until: Callable[[], bool] = lambda: True) -> None:
        """A place where another partition may go on, and where this one waits `until` something holds."""
        me = threading.current_thread()
        if me not in self.partitions:
            while not until():
                self._copy()
            return
        self.waiting[me] = until
        self._pass_on()
        self.partitions[me].acquire()
        if self.fault:
            raise _Ended

    def _copy(self) -> None:
        """Let one copy, any, come to its end."""
        if not self.copies:
            raise KernelFault("nobody can go on: everything waits for a barrier")
        self.copies.pop(self.draw.randrange(len(self.copies)))()

    def _pass_on(self) -> None:
        """Wake a partition that can go on; ends copies, some early and some late."""
        try:
            while self.copies and self.draw.random() < self.haste:
                self._copy()
            while self.waiting and not self.fault:
                ready = [thread for thread, until in self.waiting.items() if until()]
                if ready:
                    chosen = ready[self.draw.randrange(len(ready))]
                    del self.waiting[chosen]
                    self.partitions[chosen].release()
                    return
                self._copy()
        except BaseException as error:
            self.fault = error
        for semaphore in self.partitions.values():
            semaphore.release()
        self.done.release()

    def run(self, partitions: list[tuple[Callable, tuple]]) -> None:
        """Run the partitions to their ends. Raises what one of them raised."""

        def body(function, arguments):
            me = threading.current_thread()
            self.partitions[me].acquire()
            try:
                if not self.fault:
                    function(*arguments)
                    if self.products.get(me):
                        raise KernelFault("a partition ends with a product under way")
            except _Ended:
                pass
            except BaseException as error:
                self.fault = self.fault or error
            self._pass_on()

        threads = [threading.Thread(target=body, args=each, daemon=True) for each in partitions]
        for thread in threads:
            self.partitions[thread], self.waiting[thread] = threading.Semaphore(0), lambda: True
        for thread in threads:
            thread.start()
        self._pass_on()
        for thread in threads:
            thread.join()
        if self.fault:
            raise self.fault
        if self.copies:
            raise KernelFault("a program ends with a copy under way")


class _Now:
    """The program that runs, and what the draws follow from."""

    machine: _Machine
    seed = 0


#: How often each kernel has run here, and how many products of each size (rows, columns, depth).
launched: Counter[str] = Counter()
multiplied: Counter[tuple[int, int, int]] = Counter()
#: Bytes that have been added to each tensor in device memory, those past its end too.
added: Counter[int] = Counter()


def seeded(seed: int) -> None:
    """What is drawn from now on follows from this number."""
    _Now.seed = seed


# ---- memory -----------------------------------------------------------------------------------------------


class Scalar(int):
    """An integer of a kernel; `to` another width changes nothing here."""

    def to(self, _dtype) -> Scalar:
        return self

    def __floordiv__(self, other) -> Scalar:
        return Scalar(int(self) // other)

    def __mod__(self, other) -> Scalar:
        return Scalar(int(self) % other)


def _flat(x: torch.Tensor) -> torch.Tensor:
    """All elements from the first to the last of x in memory, those between x's own too."""
    return x.as_strided((1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride())),), (1,))


class Pointer:
    """Elements of a dense tensor, from an offset on or at many of them."""

    @property
    def dtype(self):
        return SimpleNamespace(element_ty=self.base.dtype)

    def __init__(self, base: torch.Tensor, offset: Any = 0):
        self.base, self.offset = base, offset

    def __add__(self, more) -> Pointer:
        return Pointer(self.base, self.offset + more)

    def __sub__(self, less) -> Pointer:
        return Pointer(self.base, self.offset - less)

    def at(self, mask) -> tuple[torch.Tensor, torch.Tensor]:
        """(offsets where the mask is on, the mask); raises KernelFault for one outside the tensor."""
        offset = torch.as_tensor(self.offset)
        mask = torch.as_tensor(True if mask is None else mask).expand(offset.shape)
        offset = offset[mask]
        if offset.numel() and not 0 <= int(offset.min()) <= int(offset.max()) < self.base.numel():
            raise KernelFault(
                f"elements {int(offset.min())} .. {int(offset.max())} of {self.base.numel()} are asked for"
            )
        return offset, mask


class Shared:
    """A buffer in shared memory, or a part of one."""

    def __init__(self, values: Any):
        self.values = values

    dtype = property(lambda self: self.values.dtype)

    def load(self, _layout):
        return self.values.clone()

    def store(self, values) -> None:
        self.values.copy_(values)
        _Now.machine.stored.append((threading.current_thread(), self.values))
        _Now.machine.step()

    def fenced(self) -> torch.Tensor:
        """The values, as copies and products may read them; raises KernelFault if somebody stored some without a
        fence."""
        begin, end = (_address(self.values, at) for at in (0, -1))
        for _, stored in _Now.machine.stored:
            if begin <= _address(stored, -1) and _address(stored, 0) <= end:
                raise KernelFault("a buffer is read by a copy or a product with no fence behind what was stored there")
        return self.values

    def index(self, number: int):
        return Shared(self.values[number]) if isinstance(self.values, torch.Tensor) else self.values[number]

    def reshape(self, shape):
        return Shared(self.values.view(shape))

    def permute(self, order):
        return Shared(self.values.permute(order))

    def slice(self, start: int, length: int, dim: int = 0):
        return Shared(self.values.narrow(dim, start, length))


def _address(values: torch.Tensor, which: int) -> int:
    """Of the first (0) or the last (-1) element."""
    offset = 0 if which == 0 else sum((n - 1) * step for n, step in zip(values.shape, values.stride()))
    return values.data_ptr() + offset * values.element_size()


class Barrier:
    """Counts arrivals and bytes; each time both are there, one phase ends and the next begins."""

    def __init__(self):
        self.count = self.missing = self.bytes = self.phase = 0

    def index(self, _number: int) -> Barrier:
        return self

    def change(self, arrivals: int, more: int) -> None:
        if not self.count or arrivals > self.missing:
            raise KernelFault("a barrier gets more arrivals in a phase than it was made for")
        self.missing -= arrivals
        self.bytes += more
        if self.missing == 0 and self.bytes == 0:
            self.missing, self.phase = self.count, self.phase + 1


class Descriptor:
    """Tiles of a tensor; zeros where a tile hangs over."""

    def __init__(self, base: torch.Tensor, block: list[int]):
        self.base, self.block, self.dtype, self.layout = base.detach(), block, base.dtype, None

    def _inside(self, where: list[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """Where a tile lies inside the tensor: parts of the tile, and of the tensor."""
        inside = [(max(at, 0), min(at + n, size)) for at, n, size in zip(where, self.block, self.base.shape)]
        inside = [(begin, max(begin, end)) for begin, end in inside]
        here = tuple(slice(begin - at, end - at) for at, (begin, end) in zip(where, inside))
        return here, tuple(slice(*part) for part in inside)

    def load(self, where: list[int]) -> torch.Tensor:
        tile, (here, there) = self.base.new_zeros(self.block), self._inside(where)
        if tile[here].numel():
            tile[here] = self.base[there]
        return tile

    def add(self, where: list[int], tile: torch.Tensor) -> None:
        here, there = self._inside(where)
        if tile[here].numel():
            self.base[there] += tile[here]


def descriptor(x: torch.Tensor, block: list[int]) -> Descriptor:
    """Raises: KernelFault for what the copy engine does not take: rows are dense, all else is multiples of 16 bytes."""
    steps = [x.data_ptr(), *(step * x.element_size() for step in x.stride()[:-1])]
    if x.stride(-1) != 1 or any(step % 16 for step in steps) or x.is_neg():
        raise KernelFault(f"no descriptor for strides {x.stride()} of {x.dtype} at {x.data_ptr() % 16} bytes past 16")
    return Descriptor(x, block)


def load_tile(source: Descriptor, where: list[int], barrier: Barrier, buffer: Shared) -> None:
    """Begin a copy; its bytes are taken off the barrier when it ends."""
    values, size = buffer.values, buffer.values.numel() * buffer.values.element_size()
    values.fill_(torch.nan)

    def end():
        values.copy_(source.load(where).view(values.shape))
        barrier.change(0, -size)

    _Now.machine.copies.append(end)
    _Now.machine.step()


def add_tile(target: Descriptor, where: list[int], buffer: Shared) -> None:
    """Begin to add a buffer to what is in device memory."""
    me, machine, values = threading.current_thread(), _Now.machine, buffer.fenced()
    given = values.clone()
    machine.adding[me] += 1

    def end():
        if not torch.equal(given.nan_to_num(1e30), values.nan_to_num(1e30)):
            raise KernelFault("a buffer was overwritten while it was added to device memory")
        target.add(where, given.view(target.block))
        added[target.base.data_ptr()] += given.numel() * given.element_size()
        machine.adding[me] -= 1

    machine.copies.append(end)
    machine.step()


def tiles_read(pending: int) -> None:
    """Wait until all but so many of this partition's added tiles are read."""
    me, machine = threading.current_thread(), _Now.machine
    machine.step(lambda: machine.adding[me] <= pending)


def _wait(barrier: Barrier, parity: int, pred: bool = True) -> None:
    if pred:
        _Now.machine.step(lambda: barrier.phase & 1 != parity)


def _arrive(barrier: Barrier, count: int = 1, pred: bool = True) -> None:
    if pred:
        barrier.change(count, 0)
    _Now.machine.step()


def _initial(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


mbarrier = SimpleNamespace(
    init=_initial,
    wait=_wait,
    arrive=_arrive,
    expect=lambda barrier, size: barrier.change(1, size),
    MBarrierLayout=lambda: Barrier,
)


def fence_async_shared() -> None:
    """What this partition has stored in shared memory may be read by copies and products."""
    me, machine = threading.current_thread(), _Now.machine
    machine.stored = [(who, values) for who, values in machine.stored if who is not me]


# ---- products ---------------------------------------------------------------------------------------------


class _Product:
    """A product under way: what it will give, and how to find out whether its operands are still what they were."""

    def __init__(self, compute: Callable[[], torch.Tensor]):
        self.compute, self.first, self.done = compute, compute(), False

    def end(self) -> None:
        if not torch.equal(self.first.nan_to_num(1e30), self.compute().nan_to_num(1e30)):
            raise KernelFault("a buffer was overwritten while a product read it")
        self.done = True


def warpgroup_mma(a, b: Shared, acc, use_acc: bool = True, is_async: bool = False):
    wide = torch.promote_types(b.dtype, torch.float32)
    held = a if isinstance(a, torch.Tensor) else None
    acc = acc.first if isinstance(acc, _Product) else acc  # one product behind another on the same sum

    def compute():
        left = a.fenced() if held is None else held
        return left.to(wide) @ b.fenced().to(wide) + (acc if use_acc else 0)

    product = _Product(compute)
    multiplied[(*product.first.shape, b.values.shape[0])] += 1
    under_way = _Now.machine.products.setdefault(threading.current_thread(), [])
    under_way.append(product)
    _Now.machine.step()
    return product if is_async else warpgroup_mma_wait(0, [product])


def warpgroup_mma_wait(num_outstanding: int, deps: list):
    _Now.machine.step()
    under_way = _Now.machine.products[threading.current_thread()]
    while len(under_way) > num_outstanding:
        under_way.pop(0).end()
    if not all(product.done for product in deps):
        raise KernelFault("a product is used that may still be under way")
    found = tuple(product.first for product in deps)
    return found[0] if len(found) == 1 else found


# ---- the language -----------------------------------------------------------------------------------------


def _load(pointer: Pointer, mask=None, other=0):
    offset, mask = pointer.at(mask)
    flat = pointer.base.view(-1)
    if mask.ndim == 0 and flat.is_floating_point():
        return flat[offset].reshape(()) if bool(mask) else flat.new_tensor(other)
    if mask.ndim == 0:
        return Scalar(flat[offset]) if bool(mask) else Scalar(other)
    found = torch.full(mask.shape, other, dtype=flat.dtype)
    found[mask] = flat[offset]
    return found


def _store(pointer: Pointer, values: torch.Tensor, mask=None) -> None:
    offset, mask = pointer.at(mask)
    pointer.base.view(-1)[offset] = torch.as_tensor(values).to(pointer.base.dtype)[mask]
    known = _written.setdefault(pointer.base.data_ptr(), torch.full((pointer.base.numel(),), -1))
    if (known[offset] >= 0).any() or offset.unique().numel() != offset.numel():
        raise KernelFault("an element is written twice")
    known[offset] = _Now.machine.number


def _atomic_add(pointer: Pointer, values: torch.Tensor, mask=None, sem: str = "acq_rel") -> None:
    offset, mask = pointer.at(mask)
    if offset.unique().numel() != offset.numel():
        raise KernelFault("one addition meets an element twice")
    pointer.base.view(-1)[offset] += values[mask]
    _Now.machine.step()


def _where(condition, yes, no):
    if not isinstance(condition, torch.Tensor):
        return yes if condition else no
    return torch.where(condition, yes, no)


def _allocate(dtype, shape, layout):
    if layout is Barrier:
        return Barrier() if len(shape) == 1 else Shared([Barrier() for _ in range(shape[0])])
    return Shared(torch.full(shape, torch.nan if dtype.is_floating_point else -1, dtype=dtype))


_written: dict[int, torch.Tensor] = {}


def _nothing(*_arguments, **_options) -> None:
    """A layout, which the model does not know."""


gl = SimpleNamespace(
    constexpr=Any,
    float32=torch.float32,
    int32=torch.int32,
    int64=torch.int64,
    BlockedLayout=_nothing,
    SwizzledSharedLayout=_nothing,
    NVMMASharedLayout=SimpleNamespace(get_default_for=_nothing),
    NVMMADistributedLayout=_nothing,
    DotOperandLayout=_nothing,
    SliceLayout=_nothing,
    allocate_shared_memory=_allocate,
    warp_specialize=lambda partitions, _warps, _registers: _Now.machine.run(partitions),
    program_id=lambda _axis: Scalar(_Now.machine.number),
    num_programs=lambda _axis: Scalar(_Now.machine.programs),
    static_range=range,
    arange=lambda begin, end, _layout: torch.arange(begin, end),
    zeros=lambda shape, dtype, _layout: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, _layout: torch.full(shape, value, dtype=dtype),
    convert_layout=lambda x, _layout: x,
    expand_dims=lambda x, axis: x.unsqueeze(axis),
    reshape=lambda x, shape: x.reshape(shape),
    permute=lambda x, order: x.permute(order),
    split=lambda x: x.unbind(-1),
    rsqrt=torch.rsqrt,
    maximum=lambda x, y: torch.fmax(x, torch.as_tensor(y, dtype=x.dtype)),  # as the device does, which drops NaN
    max=lambda x, axis: x.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).amax(axis),
    sum=lambda x, axis: x.sum(axis),
    exp2=torch.exp2,
    log2=torch.log2,
    where=_where,
    load=_load,
    store=_store,
    atomic_add=_atomic_add,
)


class _Kernel:
    """kernel[programs](*arguments, **constants), all programs one after another."""

    def __init__(self, function: Callable):
        self.function, self.__name__ = function, function.__name__

    def __call__(self, *arguments, **named):
        return self.function(*arguments, **named)

    def __getitem__(self, programs: tuple[int, ...]):
        def run(*arguments, num_warps, enable_fp_fusion, **constants):
            given = [Pointer(_flat(x.detach())) if isinstance(x, torch.Tensor) else x for x in arguments]
            _written.clear()
            launched[self.__name__] += 1
            for number in range(programs[0]):
                _Now.machine = _Machine(number, random.Random(f"{_Now.seed} {number}"), programs[0])
                self.function(*given, **constants)

        return run


gluon = SimpleNamespace(jit=_Kernel)


def modelled(module: ModuleType) -> ModuleType:
    """A copy of the module whose kernels run in this model."""
    path = Path(module.__file__)
    source = path.read_text().replace("from kernels.gluon import", "from kernels.proof.gluon_model import")
    copy = ModuleType(f"{module.__name__}_modelled")
    copy.__file__ = str(path)
    exec(compile(source, str(path), "exec"), copy.__dict__)
    return copy
