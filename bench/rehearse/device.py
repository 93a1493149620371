"""A GPU that is not there: enough of one that torch compiles and Triton assembles for it, on a machine without any.

`install("h100")` makes torch.cuda, Dynamo, Inductor and Triton believe in one such device; tensors are fake (shapes,
dtypes and devices, no storage) inside `tensors()`. Real are tracing, graph breaks, recompilations, Inductor's fusion
and the Triton source it writes, every kernel's launch code, ptxas, limits of shared memory. Not real are numbers,
time, races, fragmentation. The first call of a torch version builds a small C++ extension (guard.cpp), so it needs g++.

It changes the process for good: use a process of its own, with TRITON_INTERPRET unset.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from kernels.proof import pretend

_GIB = 2**30
#: Name -> what torch.cuda.get_device_properties says. Memory is what the driver leaves of it.
DEVICES = {
    "h100": dict(name="NVIDIA H100 80GB HBM3", major=9, minor=0, memory=79.1, multi_processor_count=132, shared=227),
    "a100": dict(name="NVIDIA A100 40GB", major=8, minor=0, memory=39.4, multi_processor_count=108, shared=163),
    "l40s": dict(name="NVIDIA L40S", major=8, minor=9, memory=44.4, multi_processor_count=142, shared=99),
    "rtx4090": dict(name="NVIDIA RTX 4090", major=8, minor=9, memory=23.5, multi_processor_count=128, shared=99),
    "rtx3090": dict(name="NVIDIA RTX 3090", major=8, minor=6, memory=23.6, multi_processor_count=82, shared=99),
}


class CannotRehearse(RuntimeError):
    """This machine lacks what a rehearsal needs; the message says what."""


def why_not() -> str | None:
    """What a rehearsal lacks on this machine, or None if it can run here."""
    from kernels.runtime import HAVE_TRITON, INTERPRETED

    if not HAVE_TRITON:
        return "triton is not installed"
    if INTERPRETED:
        return "Triton's interpreter is on: unset TRITON_INTERPRET, in a process of its own"
    if torch.cuda.is_available():
        return "there is a GPU here: measure on it (python -m bench.gpu)"
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "g++ is missing, which builds the pretended device's guard (Debian: apt-get install g++)"
    return None


class _Event:
    """torch.cuda.Event of a queue in which nothing ever waits."""

    def __init__(self, *_arguments, **_options):
        pass

    def record(self, *_stream):
        pass

    def wait(self, *_stream):
        pass

    def query(self):
        return True

    def elapsed_time(self, _other):
        return 1.0


class _Stream(_Event):
    """torch.cuda.Stream, likewise."""

    device_index = stream_id = cuda_stream = 0
    device_type = 1
    device = torch.device("cuda", 0)

    def wait_stream(self, _other):
        pass

    def wait_event(self, _event):
        pass

    def record_event(self, event=None):
        return event or _Event()

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        return False


def _properties(told: dict) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        name=told["name"],
        major=told["major"],
        minor=told["minor"],
        total_memory=int(told["memory"] * _GIB),
        multi_processor_count=told["multi_processor_count"],
        warp_size=32,
        max_threads_per_block=1024,
        max_threads_per_multi_processor=2048 if told["minor"] == 0 else 1536,
        regs_per_multiprocessor=65536,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=told["shared"] * 1024,
        shared_memory_per_multiprocessor=(told["shared"] + 1) * 1024,
        L2_cache_size=50 * 2**20,
        gcnArchName="",
        is_integrated=0,
        is_multi_gpu_board=0,
    )


_FAKES = torch.library.Library("aten", "IMPL")  # lives as long as what is put in place with it
_installed: dict[str, list[str]] = {}  # the device that this process believes in -> the host's waits for it


def install(name: str) -> list[str]:
    """Believe in one device `name` of DEVICES from here on. Returns the list to which each wait of the host for it is
    added; the same one if it is called again.

    Raises: CannotRehearse; ValueError for an unknown name, or another one than this process believes in."""
    if name in _installed:
        return _installed[name]
    if name not in DEVICES or _installed:
        raise ValueError(f"no pretended device {name!r} here; there are {', '.join(_installed or DEVICES)}")
    if reason := why_not():
        raise CannotRehearse(reason)
    warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
    _build_guard()
    waited = _installed[name] = []
    _install_torch(_properties(DEVICES[name]), waited)
    _FAKES.impl("_scaled_mm.out", lambda *_a, out, **_k: out, "Meta")  # as compiled code calls it; torch has no fake
    _install_inductor()
    _install_driver(DEVICES[name])
    return waited


def _build_guard() -> None:
    """Compile guard.cpp once a version of torch and of the source, and put its hooks in place."""
    source = Path(__file__).with_name("guard.cpp")
    name = hashlib.sha256(torch.__version__.encode() + source.read_bytes()).hexdigest()[:12]
    library = Path(tempfile.gettempdir()) / f"rehearsal-guard-{os.getuid()}-{name}.so"
    if not library.exists():
        torch_folder = Path(torch.__file__).parent
        include, libraries = torch_folder / "include", torch_folder / "lib"
        written = library.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CXX", "g++"), "-shared", "-fPIC", "-std=c++20", f"-I{include}", str(source)]
        command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-o", str(written)]
        command += [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CannotRehearse(f"g++ could not build {source.name}: {done.stderr.strip()[-800:]}")
        written.replace(library)
    ctypes.CDLL(str(library)).pretend()


def _install_torch(properties: types.SimpleNamespace, waited: list[str]) -> None:
    from bench.rehearse.recorder import caller

    capability = (properties.major, properties.minor)

    def wait(*_device):
        waited.append(f"synchronize at {caller()}")

    _Event.synchronize = _Stream.synchronize = wait

    def always(value):
        return lambda *_a, **_k: value  # a function of its own for each name, as Dynamo wants

    silent = "set_device init _lazy_init reset_peak_memory_stats empty_cache manual_seed manual_seed_all set_rng_state"
    zeros = "current_device memory_allocated max_memory_allocated memory_reserved max_memory_reserved"
    zeros += " _exchange_device _maybe_exchange_device"
    answers = {key: always(None) for key in silent.split()} | {key: always(0) for key in zeros.split()}
    answers |= {key: always(True) for key in ("is_available", "is_initialized", "is_bf16_supported")}
    answers |= dict(
        device_count=always(1),
        get_device_properties=always(properties),
        get_device_capability=always(capability),
        get_device_name=always(properties.name),
        get_arch_list=always([f"sm_{capability[0]}{capability[1]}"]),
        mem_get_info=always((properties.total_memory, properties.total_memory)),
        get_rng_state=lambda *_a: torch.zeros(16, dtype=torch.uint8),
        is_current_stream_capturing=always(False),
        synchronize=wait,
        current_stream=lambda *_a: _Stream(),
        default_stream=lambda *_a: _Stream(),
        Event=_Event,
        Stream=_Stream,
    )
    for key, value in answers.items():
        setattr(torch.cuda, key, value)
    torch.version.cuda = torch.version.cuda or "13.0"
    for key in ("_cuda_getCurrentRawStream", "_cuda_getDevice", "_cuda_exchangeDevice", "_cuda_maybeExchangeDevice"):
        setattr(torch._C, key, always(0))
    torch._C._cuda_setDevice = always(None)
    _install_dynamo()


def _install_dynamo() -> None:
    from torch._dynamo import device_interface

    interface = device_interface.CudaInterface
    asked = "current_device set_device device_count current_stream synchronize get_device_properties memory_allocated"
    for key in f"{asked} is_bf16_supported".split():
        setattr(interface, key, staticmethod(getattr(torch.cuda, key)))
    interface.exchange_device = interface.maybe_exchange_device = staticmethod(lambda _d: 0)
    interface.get_raw_stream = staticmethod(lambda _d=0: 0)
    interface.Event, interface.Stream = _Event, _Stream
    device_interface.get_cuda_stream = lambda _d=0: 0
    for key in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(key, interface)


def _install_inductor() -> None:
    """No arithmetic on the device while compiling, and no timing there: the first configuration wins. Allocations go
    through torch.empty_strided, which fake tensors answer."""
    from torch._inductor import config
    from torch._inductor.runtime import triton_helpers
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    config.fx_graph_cache = config.autotune_local_cache = False
    config.compile_threads = 1  # compile workers are other processes, where there is no device
    config.joint_graph_constant_folding = False
    for key in ("use_static_cuda_launcher", "use_static_triton_launcher"):
        if hasattr(config, key):
            setattr(config, key, False)
    torch._functorch.config.enable_autograd_cache = False
    triton_helpers.set_driver_to_gpu = lambda: None
    CachingAutotuner.bench = lambda self, launcher, *_a, **_k: 1.0
    CachingAutotuner.coordinate_descent_tuning = lambda self, launcher, *_a, **_k: launcher
    guards = torch._C._dynamo.guards
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda:0"
    )
    guards._reinterpret_tensor = lambda t, size, stride, more=0: t.as_strided(size, stride, t.storage_offset() + more)


class _Driver(pretend._Driver):
    """The proof's driver, for the device that torch believes in."""

    def __init__(self, told: dict):
        arch = f"sm_{told['major']}{told['minor']}"
        pretend.SHARED_MEMORY_BYTES.setdefault(arch, told["shared"] * 1024)
        super().__init__(arch)
        self.number = 0
        limits = self.utils.get_device_properties(0)
        limits["multiprocessor_count"] = told["multi_processor_count"]
        self.utils.get_device_properties = lambda _device: limits

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    @staticmethod
    def is_active():
        return True


def _install_driver(told: dict) -> None:
    import triton

    driver = _Driver(told)
    triton.runtime.driver.set_active(driver)
    triton.runtime.driver._default = driver


@contextlib.contextmanager
def tensors() -> Iterator[None]:
    """Inside, tensors are fake: on "cuda" or not, they have no storage."""
    from torch._subclasses import FakeTensorMode, fake_tensor

    fake_tensor.init_gpu_context = lambda _device: None
    FakeTensorMode.avoid_device_init = property(lambda _self: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
