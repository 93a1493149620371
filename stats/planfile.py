"""The file that fixes a plan: written once, before the runs, with its hash; read back and checked."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from stats.errors import DataError, UsageError
from stats.plans import Plan, check
from stats.series import read_object


def write_plan(plan: Plan, path: str | Path, overwrite: bool = False) -> None:
    """Write the plan with its hash. A plan that exists is not replaced unless asked: that would be another design."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; a plan is made once, before the runs (--overwrite replaces it)")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(plan) | {"hash": plan.hash}, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", path) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def read_plan(path: str | Path) -> Plan:
    """The plan in a file. Raises DataError if it is broken, makes no sense or was changed after it was written."""
    values = read_object(Path(path))
    written_hash = values.pop("hash", None)
    known = {field.name: field for field in fields(Plan)}
    if unknown := sorted(values.keys() - known.keys()):
        raise DataError(f"a plan has no field {', '.join(map(repr, unknown))}", path)
    try:
        plan = Plan(**{name: _typed(name, value) for name, value in values.items()})
        check(plan)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"not a plan: {error}", path) from None
    except UsageError as error:
        raise DataError(f"a plan that makes no sense: {error}", path) from None
    if written_hash is not None and written_hash != plan.hash:
        raise DataError("changed after it was written: its hash does not fit its fields", path)
    return plan


_FLOATS = ("threshold", "margin", "sigma", "alpha", "beta")
_FLOATS_OR_NONE = ("seconds_per_run", "loss_per_step")
_INTEGERS = ("cap", "first_look", "nodes", "schema")
_TEXTS = ("sigma_source", "method", "bounds", "note")


def _typed(name: str, value: Any) -> Any:
    """A JSON value as the field's type, or TypeError."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if name in _FLOATS and is_number:
        return float(value)
    if name in _FLOATS_OR_NONE and (value is None or is_number):
        return None if value is None else float(value)
    if (name in _INTEGERS and is_integer) or (name in _TEXTS and isinstance(value, str)):
        return value
    if name in ("stop_step", "steps_per_run") and (value is None or is_integer):
        return value
    if name == "looks" and isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    raise TypeError(f"{name} is {ascii(value)[:80]}")
