"""Numeric cases in the checked interpreter, and the planted faults that they must catch."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kernels.proof import TOLERANCE, Family, Fault, Numeric
from kernels.proof.interpreter import KernelFault, checked, mended, poisoned


def cast(value: Any, dtype: torch.dtype, kept: torch.dtype, keep: tuple[str, ...], name: str = "") -> Any:
    """The inputs with every floating tensor in `dtype`, or in `kept` if its name is in `keep`."""
    if isinstance(value, torch.Tensor):
        return value.to(kept if name in keep else dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {n: cast(x, dtype, kept, keep, n) for n, x in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [cast(x, dtype, kept, keep, name) for x in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def check_case(module: ModuleType, case: Numeric, dtype: torch.dtype, seed: int = 0) -> dict[str, dict]:
    """Run one case in one dtype.

    Returns: for each output, its error, what was allowed, and the largest true value; and under "launched"
        how often each kernel ran.
    Raises: KernelFault naming the output, for a wrong access, shape, dtype, or an error that is too large."""
    drawn = case.inputs(torch.Generator().manual_seed(seed))
    given = cast(drawn, dtype, torch.float32, case.keep_float32)
    truth = case.reference(module, cast(given, torch.float64, torch.float64, ()))
    same = case.reference(module, given)
    with mended(), checked() as watch, poisoned():
        results = case.kernel(module, given)
    if set(results) != set(truth):
        raise KernelFault(f"outputs {sorted(results)} but the reference has {sorted(truth)}")
    report: dict[str, dict] = {"launched": dict(watch.launched)}
    for name, result in results.items():
        if result.shape != truth[name].shape or result.dtype != same[name].dtype:
            raise KernelFault(
                f"{name} is {result.dtype} {tuple(result.shape)}, but the reference "
                f"{same[name].dtype} {tuple(truth[name].shape)}"
            )
        true = truth[name].detach()
        scale = max(true.abs().max().item(), case.least_scale)
        error = (result.detach().double() - true).abs().max().item()
        usual = (same[name].detach().double() - true).abs().max().item()
        allowed = 2 * usual + TOLERANCE[dtype] * case.tolerance * scale
        report[name] = {"error": error, "allowed": allowed, "scale": scale}
        if not error <= allowed:  # written so that NaN fails
            raise KernelFault(
                f"{name} is off by {error:.3g}; allowed are {allowed:.3g}: twice the same-dtype "
                f"reference's {usual:.3g} and the tolerance at a largest value of {scale:.3g}"
            )
    return report


def run_numeric(family: Family, quick: bool = False, dtypes: tuple[torch.dtype, ...] | None = None) -> list[dict]:
    """Every numeric case of a family in every dtype; one result a case and dtype, with `fault` None if it holds.

    A last entry says which of the family's kernels no case launched; that is a failure too."""
    module = importlib.import_module(family.module)
    results, launched = [], set()
    for case in family.numeric:
        if quick and not case.quick:
            continue
        for dtype in case.dtypes:
            if dtypes and dtype not in dtypes:
                continue
            started, fault, report = time.perf_counter(), None, {}
            try:
                report = check_case(module, case, dtype)
                launched |= set(report.pop("launched"))
            except Exception as error:  # a broken case must not hide the others
                fault = f"{type(error).__name__}: {error}"
            worst = max((r["error"] / (r["allowed"] or math.inf) for r in report.values()), default=math.nan)
            results.append(
                {
                    "case": case.name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "fault": fault,
                    "worst_error_over_allowed": worst,
                    "seconds": time.perf_counter() - started,
                }
            )
    missing = sorted(set(family.kernels) - launched)
    results.append(
        {
            "case": "every kernel is launched",
            "dtype": "any",
            "seconds": 0.0,
            "worst_error_over_allowed": 0.0,
            "fault": f"never launched: {missing}" if missing else None,
        }
    )
    return results


# ---- planted faults ----------------------------------------------------------------------------------------


def plant(family: Family, fault: Fault, folder: Path, number: int) -> ModuleType:
    """Import a copy of the family's module in which the fault is planted.

    Raises: ValueError if the text to change no longer occurs."""
    name = fault.module or family.module
    source = Path(importlib.import_module(name).__file__).read_text()
    if fault.old not in source:
        raise ValueError(f"fault {fault.name!r}: {fault.old!r} does not occur in {name}")
    # torch knows an operator by its name, so the copy's operators need names of their own
    source = source.replace(fault.old, fault.new).replace('"speedrun::', f'"speedrun_fault{number}::')
    copy = f"{name.rpartition('.')[2]}_fault_{number}"
    path = folder / f"{copy}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(copy, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[copy] = module
    spec.loader.exec_module(module)
    return module


def run_faults(family: Family, only: tuple[int, ...] | None = None) -> list[dict]:
    """Plant each fault and run the quick cases in float32 until one notices; `caught` is None if none does."""
    results = []
    with tempfile.TemporaryDirectory(prefix="kernel-faults-") as folder:
        for number, fault in enumerate(family.faults):
            if only is not None and number not in only:
                continue
            started, caught, by = time.perf_counter(), None, None
            module = plant(family, fault, Path(folder), number)
            for case in family.numeric:
                if not case.quick:
                    continue
                try:
                    check_case(module, case, torch.float32)
                except Exception as error:  # whatever the fault leads to
                    caught, by = f"{type(error).__name__}: {error}", case.name
                    break
            results.append({"fault": fault.name, "caught": caught, "by": by, "seconds": time.perf_counter() - started})
            sys.modules.pop(module.__name__, None)
    return results
