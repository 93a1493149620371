"""Which program ran, and on what: its files and their one fingerprint, versions, machine, assembler.

The files of a program are worked out from its imports, so that none is forgotten and none is counted that has no part
in it. Log, checkpoint and series name a program by the same hash. This file imports torch only where it needs it: a
series asks for a fingerprint and never for a GPU.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Versions that the tests and the table of machine code (kernels/proof) have seen: from, below. requirements.txt has
#: the same numbers.
PROVEN = {"torch": ("2.11", "2.14"), "triton": ("3.6", "3.10")}


# -------------------------------------------------------------------------------------------------------------
# The program's files


def program_files(entry: str | Path) -> dict[str, str]:
    """{path relative to the entry's folder: hash of its text} of a program and of all project files that it imports,
    inside functions too. Only what lies in the entry's folder is of the project. Raises OSError, SyntaxError."""
    entry = Path(entry).resolve()
    root, found, queue, asked = entry.parent, {}, [entry], set[tuple[str, ...]]()
    while queue:
        path = queue.pop()
        name = path.relative_to(root).as_posix()
        if name not in found:
            text = path.read_text(encoding="utf-8")
            found[name] = text_hash(text)
            for module in _imported(text, path.parent.relative_to(root).parts) - asked:
                asked.add(module)
                place = root.joinpath(*module)
                queue += [p for p in (place / "__init__.py", place.with_suffix(".py")) if p.is_file()]
    return dict(sorted(found.items()))


def _imported(text: str, package: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Names, as their parts, of what may be a module in the import statements of a file of that package, with the
    packages that they lie in."""
    modules: set[tuple[str, ...]] = set()
    for level, module, names in _import_statements(text):
        base = (*package[: len(package) - level + 1], *module) if level else module
        for parts in (base, *((*base, name) for name in names)):
            modules.update(parts[:depth] for depth in range(1, len(parts) + 1))
    return modules


@functools.lru_cache(maxsize=256)  # parsing takes a quarter of a second, and a process may make many runs
def _import_statements(text: str) -> tuple[tuple[int, tuple[str, ...], tuple[str, ...]], ...]:
    """(level, parts of the module's name, names taken from it) of every import statement of a program's text."""
    found: list[tuple[int, tuple[str, ...], tuple[str, ...]]] = []
    for node in _statements(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [(0, tuple(alias.name.split(".")), ()) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = tuple(node.module.split(".")) if node.module else ()
            found.append((node.level, module, tuple(alias.name for alias in node.names)))
    return tuple(found)


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All statements, at any depth. No expression holds one, and they are nine tenths of a tree."""
    queue = [tree]
    while queue:
        node = queue.pop()
        yield node
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            queue += getattr(node, block, ())


def text_hash(text: str) -> str:
    """sha256 of a program's text, newlines at its end counted as one (as `stats.runs` counts them)."""
    return hashlib.sha256((text.rstrip("\r\n") + "\n").encode()).hexdigest()


def changed_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Names of the files that differ between two answers of `program_files`, or are in one of them only."""
    return sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))


def fingerprint(files: Mapping[str, str]) -> str:
    """One hash of `program_files`."""
    return json_hash(dict(files))


def json_hash(value: Any) -> str:
    """sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------
# Versions


def unproven_versions(found: Mapping[str, str]) -> list[str]:
    """What to say of packages whose version is outside of `PROVEN`; `found`: {package: version}."""
    said = []
    for package, (least, below) in PROVEN.items():
        version = found.get(package, "none")
        if version != "none" and not _number(least) <= _number(version) < _number(below):
            proven = f"{least} up to, not including, {below} (requirements.txt)"
            said.append(f"warning: {package} {version} is not what this program was proven with: {proven}")
    return said


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])


# -------------------------------------------------------------------------------------------------------------
# The machine


def describe_environment(
    device: torch.device,
    *,
    world_size: int,
    source: str,
    implementations: Mapping[str, str],
    program: Mapping[str, str] | None = None,
    assembler: str = "none",
    **hashes: str,
) -> dict[str, Any]:
    """What log and JSON say of machine, software, code and data; the host appears as a hash only.

    source: the text that the log embeds. program: of `program_files`."""
    import torch

    from kernels.runtime import triton

    cuda = device.type == "cuda"
    code = dict(code_hash=hashlib.sha256(source.encode()).hexdigest())
    if program:
        code["program_hash"] = fingerprint(program)
    return dict(
        python=sys.version.split()[0],
        torch=torch.__version__,
        triton=triton.__version__,
        compute=f"CUDA {torch.version.cuda}" if cuda else f"CPU, {torch.get_num_threads()} threads",
        assembler=assembler.partition(" ")[0],
        hardware=torch.cuda.get_device_name() if cuda else cpu_name(),
        device=device.type,
        world_size=world_size,
        system=f"{platform.system()} {platform.machine()}",
        host_hash=host_hash(),
        implementations=dict(implementations),
        program=dict(program or {}),
        hashes=code | hashes,
    )


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # macOS
        told = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(told, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    return platform.processor() or platform.machine()


def host_hash() -> str:
    """Twelve hex digits that tell hosts apart without naming them: logs and ledgers are published."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12]


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
