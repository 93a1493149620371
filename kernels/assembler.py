"""Which ptxas makes the machine code: one, chosen on purpose, for Triton's kernels and Inductor's.

Triton brings two assemblers and takes one by the GPU's generation (3.9 takes the newer one from Hopper on, 3.6 and 3.7
from Blackwell on); torch may bring a third, to which Inductor points the whole process as soon as it compiles in the
process itself. So what a kernel is assembled with depends on versions, and on who was first. This file needs neither.

Why it matters: assemblers before CUDA 13.3 may reuse a register that an asynchronous product on Hopper has yet to read
(NVIDIA's release notes of 13.3; github.com/triton-lang/triton/pull/11781 shows 61 in place of 64 with 12.9), and 12.8
has public reports of wrong numbers (github.com/fla-org/flash-linear-attention/pull/1262). `reused_registers` in
kernels/proof/machine_code.py looks for just that in what was assembled.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import MutableMapping
from importlib.util import find_spec
from pathlib import Path

#: The release from which on registers of Hopper's asynchronous products are safe.
SAFE_ON_HOPPER = "13.3"
#: Where Triton looks for an assembler: for older GPUs, and for those since Hopper or Blackwell.
_VARIABLES = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH")


def choose_assembler(environment: MutableMapping[str, str] = os.environ) -> str:
    """Make Triton and Inductor use one ptxas for every GPU: the user's (TRITON_PTXAS_PATH), else the newest that Triton
    brings, or torch if Triton brings none. Returns "<release> <path>"; "none" where there is none. To be
    called before anything is compiled.

    None of a later CUDA than torch's own is chosen: such code does not load under the driver that torch asks for."""
    given = next((environment[name] for name in _VARIABLES if environment.get(name)), None)
    known = [(release, path) for path in ([Path(given)] if given else _triton()) if (release := release_of(path))]
    if not known and not given:
        known = [(release, path) for path in _torch() if (release := release_of(path))]
    limit = None if given else _cuda_of_torch()
    fitting = [pair for pair in known if limit is None or _number(pair[0])[0] <= limit]
    if not fitting:
        return "none"
    release, path = max(fitting, key=lambda pair: _number(pair[0]))
    environment.update(dict.fromkeys(_VARIABLES, str(path)))
    return f"{release} {path}"


def doubts(assembler: str) -> list[str]:
    """What to say at a start of `assembler`, whose text begins with its release, on a Hopper GPU."""
    release = assembler.partition(" ")[0]
    if release in ("", "none") or _number(release) >= _number(SAFE_ON_HOPPER):
        return []
    return [
        f"warning: ptxas {release} may reuse registers of asynchronous products on Hopper before they are read "
        f"(mended in {SAFE_ON_HOPPER}); name a newer one in TRITON_PTXAS_PATH"
    ]


def _triton() -> list[Path]:
    """The assemblers in Triton's package, found without importing it."""
    folder = _folder("triton")
    return [] if folder is None else [folder / "backends/nvidia/bin" / name for name in ("ptxas", "ptxas-blackwell")]


def _torch() -> list[Path]:
    folder = _folder("torch")
    return [] if folder is None else [folder / "bin/ptxas"]


def _folder(package: str) -> Path | None:
    spec = find_spec(package)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _cuda_of_torch() -> int | None:
    """The major version of the CUDA that torch was built for, read without importing torch; None for none."""
    folder = _folder("torch")
    if folder is None or not (folder / "version.py").is_file():
        return None
    said = re.search(r"^cuda\b.*= '(\d+)\.", (folder / "version.py").read_text(), re.MULTILINE)
    return int(said[1]) if said else None


def release_of(ptxas: Path) -> str | None:
    """The release of an assembler, as 12.9.86; None if it does not run."""
    try:
        said = subprocess.run([str(ptxas), "--version"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\bV(\d+\.\d+\.\d+)", said)
    return match[1] if match else None


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:3])
