"""Which program ran, and on what: versions, machine, hashes of the code, and how fast its matrix products are."""

from __future__ import annotations

import contextlib
import hashlib
import platform
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kernels.runtime import triton
from trainer.log import Clock

REPO = Path(__file__).resolve().parent.parent


def matmul_ceiling(device: torch.device, dtype: torch.dtype, processes: int = 1) -> float:
    """FLOP/s of large square products on this machine, measured in a moment: the ceiling that MFU refers to.

    Processes on one CPU share its cores, so only GPUs multiply it."""
    n = 8192 if device.type == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=dtype)
    clock, best = Clock(device), 0.0
    for _ in range(4):
        before = clock.seconds
        clock.start()
        for _ in range(3):
            a @ a
        clock.stop()
        best = max(best, 3 * 2 * n**3 / (clock.seconds - before))
    return best * (processes if device.type == "cuda" else 1)


def describe_environment(
    device: torch.device, *, world_size: int, source: str, implementations: Mapping[str, str], **hashes: str
) -> dict[str, Any]:
    """What log and JSON say of machine, software, code and data; the host appears as a hash only."""
    cuda = device.type == "cuda"
    code = dict(code_hash=hashlib.sha256(source.encode()).hexdigest(), kernels_hash=folder_hash(REPO / "kernels"))
    return dict(
        python=sys.version.split()[0],
        torch=torch.__version__,
        triton=triton.__version__,
        compute=f"CUDA {torch.version.cuda}" if cuda else f"CPU, {torch.get_num_threads()} threads",
        hardware=torch.cuda.get_device_name() if cuda else cpu_name(),
        device=device.type,
        world_size=world_size,
        system=f"{platform.system()} {platform.machine()}",
        host_hash=hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12],
        implementations=dict(implementations),
        hashes=code | hashes,
    )


def folder_hash(folder: Path) -> str:
    """sha256 over the Python files of a folder: what the program imports from there runs, too."""
    seen = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        seen.update(path.name.encode() + path.read_bytes())
    return seen.hexdigest()


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
