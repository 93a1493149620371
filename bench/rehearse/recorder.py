"""What a step does on the pretended device: launches with bytes and FLOPs, memory, messages, waits of the host."""

from __future__ import annotations

import functools
import linecache
import re
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.common import REPO

#: FLOPs of our own kernels that multiply matrices, from the names of their arguments and their grid.
WORK: dict[str, Callable[[dict, tuple], float]] = {
    "_product": lambda a, grid: 2.0 * a["M"] * a["N"] * a["K"],
    "_product_8": lambda a, grid: 2.0 * a["M"] * a["N"] * a["K"],
    "_symmetric": lambda a, grid: 1.0 * grid[1] * a["M"] ** 2 * a["K"],  # one triangle of each
}
#: Bytes of our own kernels that touch only parts of what they are given; of others, `_touched`.
BYTES: dict[str, Callable[[dict], int]] = {
    "_prepare": lambda a: (
        2
        * a["R"]
        * a["tokens"]
        * a["p_v"].element_size()
        * (2 * a["ROTATE"] * (a["HEADS"] + a["KV_HEADS"]) + (2 + a["HAS_VE"]) * a["KV_HEADS"])
    ),
    "_head_inputs_backward": lambda a: (  # values as they are need no more than their gradient
        sum(nbytes(t) for t in a.values() if isinstance(t, torch.Tensor))
        - (0 if a["VALUE_NORM"] or a["HAS_S"] else a["tokens"] * a["HEADS"] * 2 * a["R"] * a["p_qkv"].element_size())
    ),
    # BEFORE: it looks at rows only where those that were looked at before are all zeros
    "_measure": lambda a: (
        a["TENSORS"] * (not a["BEFORE"]) * a["lines"] * a["length"] * a["p_x"][0].element_size() + nbytes(a["p_parts"])
    ),
    "_move_rows": lambda a: 2 * nbytes(a["p_packed"]) + nbytes(a["p_rows"]),
    "_update_rows": lambda a: (
        sum(map(nbytes, (*a["p_grads"], a["p_order"], a["p_starts"], a["p_rows"], a["p_mean"])))
        + 2 * len(a["p_rows"]) * (a["D"] * a["p_weight"].element_size() + 8)
    ),
}
#: Operators that write what they are given first without reading it.
_OVERWRITES = re.compile(r"aten\.(_foreach_)?(copy|fill|zero)_")
#: Operators that launch nothing: views, allocations, questions. (Nor do those that hand back what they were given.)
_FREE = re.compile(
    r"aten\.(_?(unsafe_)?view|_reshape_alias|reshape|alias|as_strided|transpose|permute|detach|slice|select|split|t\.|"
    r"unsqueeze|squeeze|expand|empty|new_empty|unbind|chunk|narrow|lift|is_|sym_|size|stride|_local_scalar|resize|"
    r"promote_types|result_type|pin_memory|_pin_memory|set_|_has)|^(prim|profiler|inductor)"
)
#: Functions of torch.distributed that a step calls.
_COLLECTIVES = "all_reduce all_gather_into_tensor reduce_scatter_tensor reduce_scatter_single all_to_all_single".split()
_PRODUCTS = {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::matmul": (0, 1), "aten::addmm": (1, 2)}
_PRODUCTS |= {"aten::baddbmm": (1, 2), "aten::_scaled_mm": (0, 1)}


@dataclass(frozen=True)
class Launch:
    """One kernel of a step. kind: product (the library's), own, inductor, torch; bytes moved, each operand once, what
    is changed in place twice."""

    kind: str
    name: str
    part: str
    phase: str
    bytes: int
    flops: float
    bits: int  # an element of a product's operands


@dataclass
class Message:
    """One collective: its operator, data types and devices of its tensors, bytes of the largest side, the phase."""

    name: str
    dtypes: list[str]
    device: str
    bytes: int
    phase: str


def nbytes(t: torch.Tensor) -> int:
    return t.numel() * t.element_size()


def caller() -> str:
    """file:line of the innermost line of this repository, bench/rehearse left out, that is being run."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(REPO)) and "/bench/rehearse/" not in file and "/site-packages/" not in file:
            return f"{file[len(str(REPO)) + 1 :]}:{frame.f_lineno}"
        frame = frame.f_back
    return "torch"


@functools.cache
def _maker_in_wrapper(file: str, line: int) -> str:
    """What the buffer that a line of Inductor's wrapper allocates is first used for: a kernel's or operator's name."""
    made = re.match(r"\s*(\w+) = ", linecache.getline(file, line))
    if made:
        for text in linecache.getlines(file)[line : line + 40]:
            if re.search(rf"\b{made[1]}\b", text) and (used := re.search(r"(\w+(?:\.\w+)*)\.(?:run|default)\(", text)):
                return re.sub(r"_\d+$", "", used[1].removeprefix("torch.ops."))
            if re.search(rf"\b{made[1]}\b", text) and (used := re.search(r"extern_kernels\.(\w+)\(", text)):
                return used[1]
    return "compiled code"


def _maker(operator: str) -> str:
    """Who allocates: a kernel of compiled code, or a line of this repository."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(REPO)) and "/bench/rehearse/" not in file and "/site-packages/" not in file:
            return f"{file[len(str(REPO)) + 1 :]}:{frame.f_lineno}"
        if frame.f_code.co_name == "call" and "def call" in "".join(linecache.getlines(file)[:4000]):
            return _maker_in_wrapper(file, frame.f_lineno)
        frame = frame.f_back
    return operator


class Memory:
    """Bytes of the device's storages that live, as they come and go, in the allocator's units of 512."""

    def __init__(self):
        self.live = 0
        self.events: list[tuple[int, int, str, str]] = []  # (storage, +-bytes, maker, phase)
        self._seen: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
        self._count = 0

    def note(self, t: Any, phase: str) -> None:
        """Count the storage of `t`, if it is a new one of the device."""
        if not isinstance(t, torch.Tensor) or t.device.type != "cuda":
            return
        storage = t.untyped_storage()
        if storage in self._seen:
            return
        self._count += 1
        number, size = self._count, -(-storage.nbytes() // 512) * 512
        self._seen[storage] = size
        self.live += size
        self.events.append((number, size, f"{tuple(t.shape)} {str(t.dtype)[6:]} from {_maker('torch')}", phase))
        weakref.finalize(storage, self._freed, number, size)

    def _freed(self, number: int, size: int) -> None:
        self.live -= size
        self.events.append((number, -size, "", ""))

    def peak(self, since: int = 0) -> tuple[int, str, dict[str, int]]:
        """(bytes at the highest point after event `since`, its phase, bytes by what holds them there)."""
        held: dict[int, tuple[int, str]] = {}
        live, best, at = 0, -1, 0
        for i, (_, change, _, _) in enumerate(self.events):
            live += change
            if i >= since and live > best:
                best, at = live, i
        for number, change, maker, _ in self.events[: at + 1]:
            if change > 0:
                held[number] = (change, maker)
            else:
                held.pop(number, None)
        holders: dict[str, int] = {}
        for size, maker in held.values():
            holders[maker] = holders.get(maker, 0) + size
        return best, self.events[at][3] if self.events else "", dict(sorted(holders.items(), key=lambda kv: -kv[1]))


@dataclass
class Recorder(TorchDispatchMode):
    """The mode under which a step runs; `recording()` fills launches, messages and waits."""

    launches: list[Launch] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    queue: list[tuple[str, int]] = field(default_factory=list)  # "launch", "send", "arrive" and the number of which one
    waits: list[str] = field(default_factory=list)
    unaligned: dict[str, int] = field(default_factory=dict)  # kernel of Inductor's -> bytes behind such pointers
    kernels: dict[str, Any] = field(default_factory=dict)  # name -> what holds its compiled code, all that ever ran
    assembles: bool = True  # off: launches stop before Triton compiles; only shapes and memory are of interest

    def __post_init__(self):
        super().__init__()
        self.memory, self.phase, self.on = Memory(), "set-up", False
        self.inside: list[str] = []
        self.pinned: weakref.WeakSet = weakref.WeakSet()
        self.launchers = _launchers()
        # What fake tensors cannot answer: how many tokens are touched, what pinned memory is, what a number was.
        self._on_the_host = {
            "aten.nonzero.default": self._nonzero,
            "aten._local_scalar_dense.default": self._number,
            "aten._pin_memory.default": self._pinned,
            "aten.is_pinned.default": lambda t: t.untyped_storage() in self.pinned,
        }
        self.rows = 30000  # of the tables, that the tokens of a step of `medium` touch (bench/scaling.py counts them)
        _watch(self)

    __hash__ = object.__hash__
    __eq__ = object.__eq__

    @classmethod
    def is_infra_mode(cls):
        return True

    @contextmanager
    def recording(self) -> Iterator[None]:
        self.launches, self.messages, self.queue, self.waits, self.unaligned, self.on = [], [], [], [], {}, True
        try:
            with self._awaited():
                yield
        finally:
            self.on = False

    @contextmanager
    def _awaited(self) -> Iterator[None]:
        """Note when a message is awaited: at once, or where its Work is."""

        def noted(collective: Callable) -> Callable:
            def run(*args, **kwargs):
                work = collective(*args, **kwargs)
                number = len(self.messages) - 1
                if work is not None:
                    return SimpleNamespace(wait=lambda: self.queue.append(("arrive", number)))
                self.queue.append(("arrive", number))
                return None

            return run

        with ExitStack() as patched:
            for name in _COLLECTIVES:
                if hasattr(dist, name):
                    patched.enter_context(mock.patch.object(dist, name, noted(getattr(dist, name))))
            yield

    def add(self, kind: str, name: str, part: str, moved: int, flops: float = 0.0, bits: int = 16) -> None:
        self.queue.append(("launch", len(self.launches)))
        self.launches.append(Launch(kind, name, part, self.phase, moved, flops, bits))

    def part(self, own: str = "") -> str:
        """The part of a step that a launch belongs to: the outermost operator's it is launched by, else the phase's."""
        if self.inside:
            return self.inside[0]
        return own or self.phase

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        launcher = self.launchers.get(str(func))
        if self.on and launcher is not None:  # the operator's real launch code in place of its fake
            self.inside.append(launcher.__module__.rpartition(".")[2])
            try:
                with self:
                    out = launcher(*args, **kwargs)
            finally:
                self.inside.pop()
        elif str(func) in self._on_the_host:
            out = self._on_the_host[str(func)](args[0])
        elif self.on:
            out = self._operator(func, args, kwargs)
        else:
            out = func(*args, **kwargs)
        for t in tree_leaves(out):
            self.memory.note(t, self.phase)
        return out

    def _nonzero(self, t: torch.Tensor) -> torch.Tensor:
        if t.device.type == "cuda":
            self.waits.append(f"nonzero at {caller()}")
        return torch.empty(self.rows, t.dim(), dtype=torch.int64, device=t.device)

    def _number(self, t: torch.Tensor) -> Any:
        if t.device.type == "cuda":
            self.waits.append(f"item at {caller()}")
        return 0.0 if t.dtype.is_floating_point else 0

    def _pinned(self, t: torch.Tensor) -> torch.Tensor:
        copy = t.clone()
        self.pinned.add(copy.untyped_storage())
        return copy

    def _operator(self, func, args, kwargs):
        name, tensors = str(func), [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_device = any(t.device.type == "cuda" for t in tensors)
        if func.namespace in ("c10d", "_c10d_functional"):
            self._message(func, tensors)
        pin = kwargs.pop("pin_memory", False)
        # torch 2.11's fake tensors take this one's dtype for its beta; its result is what it is given.
        out = kwargs["out"] if name == "aten.addmm.dtype_out" else func(*args, **kwargs)
        outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.pinned.update(t.untyped_storage() for t in outs if pin)
        if func.namespace not in ("c10d", "_c10d_functional"):
            self._copies(name, tensors, outs, kwargs)
            same = {t.untyped_storage()._cdata for t in tensors}
            alias = not func._schema.is_mutable and all(t.untyped_storage()._cdata in same for t in outs)
            if (on_device or any(t.device.type == "cuda" for t in outs)) and not alias and not _FREE.search(name):
                moved = moved_by(func, args, kwargs, outs)
                flops = _product_flops(func, args)
                bits = 8 * tensors[0].element_size() if tensors else 0
                self.add(
                    "product" if flops else "torch", name.removesuffix(".default"), self.part(), moved, flops, bits
                )
        return out

    def _copies(self, name: str, tensors: list, outs: list, kwargs: dict) -> None:
        """Note the copies between host and device for which the host waits."""
        if name == "aten._to_copy.default":
            source, target, free = tensors[0], outs[0], kwargs.get("non_blocking", False)
        elif name == "aten.copy_.default" and len(tensors) > 1:
            target, source, free = tensors[0], tensors[1], False
        else:
            return
        here, there = source.device.type, target.device.type
        if here == there or (here == "cpu" and source.dim() == 0):
            return
        if there == "cpu" and not free:
            self.waits.append(f"copy to the host at {caller()}")
        elif there == "cuda" and source.untyped_storage() not in self.pinned:
            self.waits.append(f"copy from pageable memory at {caller()}")

    def _message(self, func, tensors: list) -> None:
        dtypes = sorted({str(t.dtype)[6:] for t in tensors})
        devices = sorted({t.device.type for t in tensors})
        size = max((nbytes(t) for t in tensors), default=0)
        if "coalesced" in func.__name__ or len(tensors) > 2:
            size = sum(map(nbytes, tensors))
        name = func._schema.name.partition("::")[2].strip("_")
        self.queue.append(("send", len(self.messages)))
        self.messages.append(Message(name, dtypes, "+".join(devices), size, self.phase))


def moved_by(func, args, kwargs, outs: list[torch.Tensor]) -> int:
    """Bytes that an operator reads and writes off the host, each operand once; what it changes in place, twice."""
    arguments = {a.name: a for a in func._schema.arguments}
    given = dict(zip(arguments, args)) | kwargs
    written = {name for name in given if (info := arguments[name].alias_info) is not None and info.is_write}
    unread = written if _OVERWRITES.search(str(func)) else {name for name in written if arguments[name].is_out}
    read = [value for name, value in given.items() if name not in unread]
    sides = read, [[given[name] for name in written], outs]
    tensors = [[t for t in tree_leaves(side) if isinstance(t, torch.Tensor)] for side in sides]
    return sum(nbytes(t) for side in tensors for t in _distinct(side) if t.device.type != "cpu")


@functools.cache
def _uses(ttir: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the pointers that a kernel reads through, and of those that it writes through."""
    from kernels.proof.machine_code import pointer_uses

    uses = [(kind, name) for kind, name, _ in pointer_uses(ttir)]
    loaded, stored = (frozenset(name for kind, name in uses if kind == wanted) for wanted in ("load", "store"))
    return loaded, stored


def _touched(name: str, arguments: dict, ttir: str) -> int:
    """Bytes that a kernel of ours reads and writes: each tensor once, twice where it does both, be it by two names."""
    if name in BYTES:
        return BYTES[name](arguments)
    tensors = dict(_tensors(arguments))
    loaded, stored = ([t for n, t in tensors.items() if n in names] for names in _uses(ttir))
    read = {_place(t) for t in loaded}
    again = [t for t in stored if _place(t) in read]
    return sum(map(nbytes, [*_distinct(list(tensors.values())), *_distinct(again)]))


def _tensors(arguments: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors among a kernel's named arguments, those under descriptors and in tuples too."""
    for name, argument in arguments.items():
        for part, a in enumerate(argument) if isinstance(argument, tuple) else [("", argument)]:
            if isinstance(t := getattr(a, "base", a), torch.Tensor):
                yield f"{name}{part}", t


def _distinct(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors that are not the same part of the same storage."""
    return list({_place(t): t for t in tensors}.values())


def _place(t: torch.Tensor) -> tuple[int, int, int]:
    """What part of which storage it is."""
    return t.untyped_storage()._cdata, t.storage_offset(), t.numel()


def _product_flops(func, args) -> float:
    places = _PRODUCTS.get(func._schema.name)
    if places is None:
        return 0.0
    a, b = (args[i] for i in places)
    batch = a.shape[0] if a.dim() == 3 else 1
    return 2.0 * batch * a.shape[-2] * a.shape[-1] * b.shape[-1]


def _launchers() -> dict[str, Callable]:
    """Name of each custom operator of kernels/ and trainer/ -> its launch code."""
    found = {}
    for module in [m for name, m in sys.modules.items() if name.startswith(("kernels.", "trainer."))]:
        for value in vars(module).values():
            if type(value).__name__ == "CustomOpDef" and value._init_fn.__module__ == module.__name__:
                found[f"{value._namespace}.{value._name}.default"] = value._init_fn
    return found


def unaligned_pointers(triton_meta: dict[str, Any]) -> frozenset[str]:
    """Pointer arguments of a kernel of Inductor's that, for all it knows, do not begin at a multiple of 16 bytes: what
    lies there is loaded and stored in smaller pieces than the device can."""
    (told,) = triton_meta["configs"]
    aligned = {place for (place,), attributes in told.items() if ["tt.divisibility", 16] in attributes}
    signature = enumerate(triton_meta["signature"].items())
    return frozenset(name for place, (name, kind) in signature if kind.startswith("*") and place not in aligned)


_watching: list[Recorder] = []


def _watch(recorder: Recorder) -> None:
    """Tell `recorder`, and no longer the one before it, of every launch of Inductor's kernels and of our own."""
    _watching.append(recorder)
    if len(_watching) > 1:
        del _watching[0]
        return
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from triton.runtime.jit import JITFunction

    run, launch = CachingAutotuner.run, JITFunction.run

    def run_noted(self, *args, stream, **kwargs):
        recorder = _watching[0]
        if recorder.on and recorder.assembles:
            name = self.inductor_meta.get("kernel_name", self.fn.__name__)
            # Every argument once, those updated in place twice: an upper bound where rows of a table are gathered.
            named = [(n, a) for n, a in zip(self.triton_meta["signature"], args) if isinstance(a, torch.Tensor)]
            sizes = [nbytes(a) * (2 if n.startswith("in_out") else 1) for n, a in named]
            recorder.add("inductor", re.sub(r"_\d+$", "", name), recorder.part(), sum(sizes))
            recorder.kernels[name] = self
            unaligned = unaligned_pointers(self.triton_meta)
            behind = sum(nbytes(a) for n, a in named if n in unaligned)
            recorder.unaligned[name] = recorder.unaligned.get(name, 0) + behind
        return run(self, *args, stream=stream, **kwargs) if recorder.assembles else None

    def launch_noted(self, *args, grid, warmup, **kwargs):
        recorder = _watching[0]
        if not recorder.assembles:
            return None
        kernel = launch(self, *args, grid=grid, warmup=warmup, **kwargs)
        if recorder.on:
            named = dict(zip(self.arg_names, args)) | kwargs
            first = next(t for _, t in _tensors(named))
            work = WORK.get(self.fn.__name__)
            flops = work(named, tuple(grid(named) if callable(grid) else grid)) if work else 0.0
            part = recorder.part(self.fn.__module__.rpartition(".")[2])
            moved = _touched(self.fn.__name__, named, kernel.asm["ttir" if "ttir" in kernel.asm else "ttgir"])  # Gluon
            recorder.add("own", self.fn.__name__, part, moved, flops, 8 * first.element_size())
            recorder.kernels[f"{self.fn.__name__} {len(kernel.asm['cubin'])} {kernel.hash[:8]}"] = kernel
        return kernel

    CachingAutotuner.run, JITFunction.run = run_noted, launch_noted
    if not recorder.assembles:
        CachingAutotuner.precompile = lambda self, *_a, **_k: None
