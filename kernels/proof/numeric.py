"""Numeric cases in the checked interpreter, and the planted faults that they must catch."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from kernels.proof import Family, Fault, Numeric, gluon_model
from kernels.proof.interpreter import KernelFault, Watch, checked, mended, poisoned
from kernels.proof.near import compare
from kernels.proof.operators import LAYOUTS, laid_out, mapped, moved, with_a_nan
from kernels.runtime import INTERPRETED


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


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    """Run a kernel as far watched as can be: in the mended interpreter with every address checked, or on the device;
    either way, what it leaves unwritten is NaN."""
    if not INTERPRETED:
        with poisoned():
            yield Watch()
        return
    with mended(), checked() as watch, poisoned():
        yield watch


def check_case(module: ModuleType, case: Numeric, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> dict:
    """Run one case in one dtype: in the interpreter, or on a GPU with device="cuda".

    Returns: for each output, what `compare` returns; and under "launched" how often each kernel ran (interpreter).
    Raises: KernelFault naming the output, for a wrong access, shape, dtype, or an error that is too large."""
    drawn = case.inputs(torch.Generator().manual_seed(seed))
    given = cast(drawn, dtype, torch.float32, case.keep_float32)
    truth = case.reference(module, cast(given, torch.float64, torch.float64, ()))
    same = case.reference(module, given)
    with watched() as watch:
        results = case.kernel(module, mapped(given, lambda _, x: x.to(device)))
    if set(results) != set(truth):
        raise KernelFault(f"outputs {sorted(results)} but the reference has {sorted(truth)}")
    report: dict[str, dict] = {"launched": dict(watch.launched)}
    for name, x in results.items():
        report[name] = compare(name, x.cpu(), truth[name], same[name], dtype, case.tolerance, case.least_scale)
    return report


def check_nan_case(module: ModuleType, case: Numeric, device: str = "cpu") -> None:
    """A NaN in each floating input in turn must reach every output that it reaches in the reference."""
    drawn = case.inputs(torch.Generator().manual_seed(0))

    def reference(given):
        return case.reference(module, cast(given, torch.float64, torch.float64, ()))

    for name, given, reached in with_a_nan(drawn, reference):
        with watched():
            results = case.kernel(module, mapped(given, lambda _, x: x.to(device)))
        for key, where in reached.items():
            if (where & ~results[key].cpu().isnan()).any():
                raise KernelFault(f"a NaN in {name} does not reach {key}")


def check_layout_case(module: ModuleType, case: Numeric, layout: str, device: str = "cpu") -> None:
    """Launchers whose arguments lie as `layout` says must give the bits that dense ones give."""
    drawn = case.inputs(torch.Generator().manual_seed(0))
    hostile, plain = laid_out(drawn, layout)
    if layout == "expanded":  # a plan that is expanded is none
        kept = {n: x for n, x in drawn.items() if n in case.changed or hasattr(x, "_fields")}
        hostile, plain = hostile | kept, plain | kept
    with watched():
        found, expected = (case.kernel(module, mapped(g, lambda _, x: moved(x, device))) for g in (hostile, plain))
    for key, x in found.items():
        if not torch.equal(x.resolve_neg().nan_to_num(1e9), expected[key].nan_to_num(1e9)):
            raise KernelFault(f"{key} differs if the arguments are {layout}")


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
            worst = max((r["share"] for r in report.values()), default=math.nan)
            results.append(_result(case.name, str(dtype).removeprefix("torch."), fault, worst, started))
    for name, check in further_checks(family).items():
        started, fault = time.perf_counter(), None
        try:
            check(module)
        except Exception as error:
            fault = f"{type(error).__name__}: {error}"
        results.append(_result(name, "float32", fault, 0.0, started))
    missing = sorted(set(family.kernels) - launched - set(gluon_model.launched))
    fault = f"never launched: {missing}" if missing else None
    results.append(_result("every kernel is launched", "any", fault, 0.0, time.perf_counter()))
    return results


def _result(case: str, dtype: str, fault: str | None, share: float, started: float) -> dict:
    return {
        "case": case,
        "dtype": dtype,
        "fault": fault,
        "worst_error_over_allowed": share,
        "seconds": time.perf_counter() - started,
    }


def further_checks(family: Family, device: str = "cpu") -> dict[str, Callable[[ModuleType], object]]:
    """A family's own checks, and what its cases with `hostile` are put to: a NaN in each input, and every layout."""
    checks = {name: functools.partial(_watched_check, check=check, device=device) for name, check in family.checks}
    for case in family.numeric:
        if case.hostile:
            checks[f"{case.name}: NaN"] = functools.partial(check_nan_case, case=case, device=device)
            for layout in LAYOUTS:
                checks[f"{case.name}: {layout}"] = functools.partial(
                    check_layout_case, case=case, layout=layout, device=device
                )
    return checks


def _watched_check(module: ModuleType, check: Callable[[ModuleType, str], None], device: str) -> None:
    with watched():
        check(module, device)


def _numbers_drawn(case: Numeric) -> int:
    drawn = case.inputs(torch.Generator().manual_seed(0))
    return sum(value.numel() for value in drawn.values() if isinstance(value, torch.Tensor))


def noticing_checks(family: Family) -> dict[str, Callable[[ModuleType], object]]:
    """The checks that planted faults are put to, those of small inputs first, as the cheapest."""
    quick = sorted((case for case in family.numeric if case.quick), key=_numbers_drawn)
    values = {case.name: functools.partial(check_case, case=case, dtype=torch.float32) for case in quick}
    return values | further_checks(family)


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
    """Plant each fault and run the quick cases in float32, then what is hostile, until one notices; `caught` is None if
    none does."""
    results, checks = [], noticing_checks(family)
    with tempfile.TemporaryDirectory(prefix="kernel-faults-") as folder:
        for number, fault in enumerate(family.faults):
            if only is not None and number not in only:
                continue
            started, caught, by = time.perf_counter(), None, None
            module = plant(family, fault, Path(folder), number)
            for name, check in sorted(checks.items(), key=lambda item: not (fault.by and fault.by in item[0])):
                try:
                    check(module)
                except Exception as error:  # whatever the fault leads to
                    caught, by = f"{type(error).__name__}: {error}", name
                    break
            results.append({"fault": fault.name, "caught": caught, "by": by, "seconds": time.perf_counter() - started})
            sys.modules.pop(module.__name__, None)
    return results
