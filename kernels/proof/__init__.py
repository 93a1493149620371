"""Proof of the kernels on a machine without a GPU: `python -m kernels.proof` (`--help` for its parts).

Each kernel family describes itself once, in `kernels/proof/families/<family>.py`, as a module-level
`FAMILY = Family(...)`; the harness finds every module there. From the description it does five things:

interpret  runs the numeric cases in Triton's interpreter (mended for bfloat16) in float32, float16 and bfloat16.
           Every address is checked against the tensor that its pointer came from; no two programs may write,
           nor one read what another writes; outputs are NaN beforehand. The error against float64 may be 1.3
           times that of the same-dtype reference (root mean square; the largest error twice), plus FLOOR.
           A tiny case of each family also runs with a NaN in each input and with inputs of every layout.
compile    runs the launches on meta tensors against pretend devices (sm_80, sm_90, sm_100, gfx942): the real
           launch code, so that whatever could launch compiles and fits in the device's shared memory.
code       reads the machine code of those compilations: registers, stack, shared memory, matrix and bulk-copy
           instructions, instructions in the hot loop; checks them against the family's `demands` and against
           the committed table machine_code.json, which is keyed by Triton's version.
scan       (on demand) compiles for sm_90 every launch, and every tile that tuning may choose, and looks in each for
           registers that are written while an asynchronous product reads them; kept in scanned.json.
manifest   looks up the hash of each sm_90 machine code in measured.json: which of it has run on a GPU.
faults     plants each of the family's faults in a copy of its source and runs the quick numeric cases in
           float32: one must fail.

A family module looks like this (kernels/proof/families/attention_inputs.py is a short real one):

    from kernels.proof import Demand, Family, Fault, Launch, Numeric

    def _inputs(random):                        # random: torch.Generator. CPU tensors; floats in float32
        return {"x": torch.randn(70, 48, generator=random), "index": torch.arange(70)}

    def _kernel(module, given):                 # module: kernels.<family>, or its copy with a planted fault
        y = module.launch_forward(given["x"], given["index"])
        return {"y": y}                         # named outputs, from launchers or the public function

    def _reference(module, given):              # the same names; runs in float64 and in the case's dtype
        return {"y": module.op_reference(given["x"], given["index"])}

    def _launch():                              # under a pretend device; builds meta tensors, calls launchers
        import kernels.<family> as module
        module.launch_forward(torch.empty(70, 1024, dtype=torch.bfloat16, device="meta"), ...)

    FAMILY = Family(
        name="<family>", module="kernels.<family>", kernels=("_forward", "_backward"),
        numeric=(Numeric("ragged rows", _inputs, _kernel, _reference),),
        launches=(Launch("bf16, width 1024", _launch),),
        demands={"_forward": Demand(instructions=("HGMMA",))},
        faults=(Fault("the row bound is off by one", "o_row < N", "o_row <= N"),),
    )

Floating tensors among a case's inputs are cast to the case's dtype, except those in `keep_float32`. What a kernel
changes in place is copied with `kernels.proof.operators.same_layout`, which keeps strides. Launchers
get their outputs from `torch.empty`, `empty_like` or `new_empty`, which the harness poisons. What a launcher
reads on the host (`.item()`) would break the dry run, as it would stall a GPU.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

#: Error beyond twice the same-dtype reference's, relative to the largest value of the output.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float64: 1e-14}
#: A root-mean-square error may be so many times the same-dtype reference's, and the largest error so many times ...
FACTOR = {"rms": 1.3, "largest": 2.0}
#: ... and beyond that this share of the output's size: for root mean squares what one rounding of the result makes
#: (half a unit in the last place, evenly spread, over the square root of three).
FLOOR = {
    "rms": {torch.float32: 1e-6, torch.float16: 2**-12 / 3**0.5, torch.bfloat16: 2**-9 / 3**0.5, torch.float64: 1e-14},
    "largest": TOLERANCE,
}
#: The devices that every launch is compiled for.
DEVICES = ("sm_80", "sm_90", "sm_100", "gfx942")


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor of that shape that has no storage, for a `Launch`."""
    return torch.empty(shape, dtype=dtype, device="meta")


class Numeric(NamedTuple):
    """One numeric case: `kernel` and `reference` take (module, inputs) and return outputs by the same names.

    dtypes: of the floating inputs. keep_float32: inputs that stay float32 (float64 for the truth).
    quick: also used to catch planted faults, and part of the default tests; keep it to a second or so.
    """

    name: str
    inputs: Callable[[torch.Generator], dict[str, Any]]
    kernel: Callable[[ModuleType, dict[str, Any]], dict[str, torch.Tensor]]
    reference: Callable[[ModuleType, dict[str, Any]], dict[str, torch.Tensor]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    keep_float32: tuple[str, ...] = ()
    quick: bool = True
    tolerance: float = 1.0  # factor on TOLERANCE, with a comment in the family file that says why
    least_scale: float = 0.0  # FLOOR is relative to at least this, for outputs that cancel to nearly nothing
    hostile: bool = False  # also run with a NaN in each input, and with inputs of every layout; keep it tiny
    changed: tuple[str, ...] = ()  # inputs that the kernel changes in place, which therefore cannot be expanded


class Launch(NamedTuple):
    """One dry run: `run` builds meta tensors and calls launchers.

    quick: part of the default tests, on sm_90. demanding: its sm_90 code must meet the family's demands (say
    False where it cannot, as float32 code has no HGMMA). spills: without demands it may; False forbids it all the
    same."""

    name: str
    run: Callable[[], object]
    devices: tuple[str, ...] = DEVICES
    quick: bool = False
    demanding: bool = True
    spills: bool = True


class Demand(NamedTuple):
    """What a kernel's sm_90 code must show: what the interpreter cannot tell, the compiled code is asked.

    instructions: opcodes that must occur ("HGMMA", "UTMALDG"). stack_bytes: the most stack that a thread may use, which
    is where spilled registers go. wide: pointer arguments every access of which takes a 64-bit offset. shows: (pattern
    in Triton's or NVIDIA's intermediate code, "OPTION=value" for which launches, or "" for all)."""

    instructions: tuple[str, ...] = ()
    stack_bytes: int = 0
    wide: tuple[str, ...] = ()
    shows: tuple[tuple[str, str], ...] = ()


class Fault(NamedTuple):
    """A planted fault: `old`, which must occur in the module's source, becomes `new` wherever it occurs.
    module: of the source, if not the family's. by: part of the name of the check that is put to it first."""

    name: str
    old: str
    new: str
    module: str | None = None
    by: str = ""


class Family(NamedTuple):
    """A kernel family; `kernels` names its @triton.jit kernels, each of which some case must launch."""

    name: str
    module: str
    kernels: tuple[str, ...]
    numeric: tuple[Numeric, ...]
    launches: tuple[Launch, ...]
    demands: dict[str, Demand]
    faults: tuple[Fault, ...]
    checks: tuple[tuple[str, Callable[[ModuleType, str], None]], ...] = ()  # (module, device); raise if it fails
    candidates: tuple[Launch, ...] = ()  # launches with every tile that tuning may choose, for the scan only


# Imported before the function of its name is defined: importing a package later would put it in the function's place.
importlib.import_module("kernels.proof.families")


def families(chosen: tuple[str, ...] = ()) -> dict[str, Family]:
    """The families under kernels/proof/families, by name; only the `chosen` ones if any are named.

    Raises: ValueError for a name that no family has."""
    package = importlib.import_module("kernels.proof.families")
    names = sorted(m.name for m in pkgutil.iter_modules(package.__path__))
    found = {f.name: f for f in (importlib.import_module(f"{package.__name__}.{n}").FAMILY for n in names)}
    unknown = sorted(set(chosen) - set(found))
    if unknown:
        raise ValueError(f"no kernel family named {', '.join(unknown)}; there are {', '.join(found)}")
    return {name: family for name, family in found.items() if not chosen or name in chosen}
