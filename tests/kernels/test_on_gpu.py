"""What only a GPU can tell: every family's numeric cases, and every public operator, against float64 on the device.

The cases are those that run in the interpreter without a GPU (kernels/proof/families, kernels/proof/operators.py), by
the same code: `python -m pytest -m gpu tests/kernels` on a machine with a GPU, and here a rehearsal of one of each.
"""

import importlib

import pytest
import torch

from kernels.proof import families
from kernels.proof.numeric import check_case, further_checks
from kernels.proof.operators import OPERATORS, check_layout, check_nan, check_values
from kernels.runtime import HAVE_TRITON, INTERPRETED, device_kind

FAMILIES = families() if HAVE_TRITON else {}
CASES = [(name, case, dtype) for name, f in FAMILIES.items() for case in f.numeric for dtype in case.dtypes]
FURTHER = [(name, check) for name, family in FAMILIES.items() for check in further_checks(family)]
ON_GPU = [name for name, operator in OPERATORS.items() if "triton" in operator.implementations]
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")]


def on_device(*values):
    return [pytest.param(*value, marks=gpu) for value in values]


def module_of(name):
    return importlib.import_module(FAMILIES[name].module)


def runs_here(case, dtype):
    """Skip what the kernels for Hopper are not made for: they take 16 bits."""
    if ("specialised" in case or "gluon" in case) and (device_kind() != "sm_90" or dtype.itemsize != 2):
        pytest.skip("for 16 bits on Hopper")


@pytest.mark.parametrize("name, case, dtype", on_device(*CASES))
def test_numeric_cases(name, case, dtype):
    runs_here(f"{name} {case.name}", dtype)
    check_case(module_of(name), case, dtype, device="cuda")


@pytest.mark.parametrize("name, check", on_device(*FURTHER))
def test_nan_layouts_and_a_familys_own_checks(name, check):
    runs_here(
        f"{name} {check}",
        torch.float16 if any(word in check for word in ("infinity", "logits", "events")) else torch.float32,
    )
    further_checks(FAMILIES[name], device="cuda")[check](module_of(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", on_device(*((n,) for n in ON_GPU)))
def test_operators(name, dtype):
    if dtype == torch.float32 or OPERATORS[name].half:
        check_values(OPERATORS[name], "triton", dtype, device="cuda")


@pytest.mark.parametrize("name", on_device(*((n,) for n in ON_GPU)))
def test_nan_in_operators(name):
    check_nan(OPERATORS[name], "triton", device="cuda")


@pytest.mark.parametrize("name", on_device(*((n,) for n in ON_GPU)))
def test_layouts_of_operators(name):
    for layout in ("transposed", "sliced", "offset"):
        check_layout(OPERATORS[name], "triton", layout, at_once=True, device="cuda")


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
def test_rehearsal():
    """The device code of the checks, with the CPU for a device: one family, one operator."""
    family = FAMILIES["mlp"]
    tiny = next(case for case in family.numeric if case.hostile)
    check_case(module_of("mlp"), tiny, torch.float32, device="cpu")
    further_checks(family, device="cpu")[f"{tiny.name}: sliced"](module_of("mlp"))
    check_values(OPERATORS["mlp"], "triton", torch.float32, device="cpu")
    check_nan(OPERATORS["mlp"], "triton", device="cpu")
    check_layout(OPERATORS["mlp"], "triton", "sliced", at_once=True, device="cpu")
