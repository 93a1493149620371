"""Results that are not logs: CSV, JSON, JSON lines, and bare numbers.

    CSV     a header, then one row a run, or one row a validation where there is a column `step` and a run
    has many rows;
            without a header, one loss a row
    JSON    [2.919, 2.920] | [{"loss": 2.919, "time_s": 1412.0}, ...] | {"losses": [...], "times_s": [...]}
    | a run's
            own JSON as the trainer writes it (with "validation")
    JSONL   one number or one object a line

The columns have the names of `_COLUMNS`. A table's word is taken for it that a row is a finished run's
result, unless it says `planned_steps`.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re

from stats.errors import DataError
from stats.values import Run, Validation

_COLUMNS = {
    "run": ("run", "name", "run_name", "id"),
    "seed": ("seed",),
    "step": ("step", "final_step"),
    "planned_steps": ("planned_steps", "num_iterations", "steps"),
    "loss": ("loss", "val_loss", "final_loss", "final_val_loss"),
    "time_s": ("time_s", "train_time_s", "time", "seconds"),
    "time_ms": ("time_ms", "train_time_ms"),
    "host": ("host", "hostname", "hostname_hash"),
    "hardware": ("hardware", "gpu"),
    "torch": ("torch",),
    "code_hash": ("code_hash",),
}
_NAME_OF = {alias: name for name, aliases in _COLUMNS.items() for alias in aliases}


def parse_csv(text: str, path: str) -> list[Run]:
    """Runs of a CSV text. Raises DataError with the line at fault."""
    first = text.lstrip().split("\n")[0]
    delimiter = next((sign for sign in (";", "\t") if sign in first and "," not in first), ",")
    rows = csv.reader(io.StringIO(text.replace("\0", "?"), newline=""), delimiter=delimiter)
    try:
        lines = [line for line in rows if any(cell.strip() for cell in line)]
    except csv.Error as error:
        raise DataError(f"not a table: {error}", path, rows.line_num) from None
    if not lines:
        raise DataError("an empty table", path)
    if _is_number(lines[0][0]) and len(lines[0]) == 1:
        return _runs([{"loss": line[0], "line": number} for number, line in enumerate(lines, 1)], path)
    header = [cell.strip().lower() for cell in lines[0]]
    rows = []
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            raise DataError(f"{len(line)} cells under a header of {len(header)}", path, number)
        rows.append(dict(zip(header, line)) | {"line": number})
    return _runs(rows, path)


def parse_json(text: str, path: str) -> list[Run]:
    """Runs of a JSON text, or of JSON lines. Raises DataError."""
    try:
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            if "Extra data" not in error.msg:
                raise
            value = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", path, getattr(error, "lineno", None)) from None
    if isinstance(value, dict) and isinstance(value.get("losses"), list):
        times = value.get("times_s") or [None] * len(value["losses"])
        if not isinstance(times, list) or len(times) != len(value["losses"]):
            raise DataError(f"{len(value['losses'])} losses, but not as many times_s", path)
        value = [{"loss": loss, "time_s": time} for loss, time in zip(value["losses"], times)]
    rows = value if isinstance(value, list) else [value]
    if rows and all(isinstance(row, dict) and isinstance(row.get("validation"), list) for row in rows):
        return [_own_run(row, path) for row in rows]
    return _runs([row if isinstance(row, dict) else {"loss": row} for row in rows], path)


def parse_numbers(text: str, path: str) -> list[Run]:
    """One finished run for each number of a text like `2.9195 2.9198, 2.9206`."""
    words = [word for word in re.split(_between_numbers(text, path), text) if word]
    words = [word.replace(",", ".") for word in words]
    return _runs([{"loss": word} for word in words], path)


def _between_numbers(text: str, path: str) -> str:
    """The pattern that divides numbers. A comma does, unless it is the decimal sign (`2,9195; 2,9198`)."""
    if "." in text or not re.search(r"\d,\d", text):
        return r"[\s,;]+"
    words = [word for word in re.split(r"[\s;]+", text) if word]
    if all(re.fullmatch(r"[+-]?\d{1,3},\d{2,}", word) for word in words):
        return r"[\s;]+"
    raise DataError("commas between digits, and no point: a decimal comma or a list? Write 2.9195", path)


def _runs(rows: list[dict], path: str) -> list[Run]:
    """Rows with any of the known columns, gathered into runs."""
    if not rows:
        raise DataError("no runs in it", path)
    grouped: dict[str, list[dict]] = {}
    for index, row in enumerate(rows, 1):
        row = {_NAME_OF.get(str(key).strip().lower(), key): value for key, value in row.items()}
        if row.get("loss") in (None, ""):
            known = ", ".join(_COLUMNS["loss"])
            raise DataError(f"row {index} has no loss (a column named {known})", path, row.get("line"))
        name = row.get("run", row.get("seed"))
        several = name not in (None, "") and row.get("step") not in (None, "")
        key = str(name) if name not in (None, "") else f"row {index}"
        if key in grouped and not several:
            raise DataError(
                f"run {key!r} a second time, and no column `step` to tell them apart", path, row.get("line")
            )
        grouped.setdefault(key, []).append(row)
    return [_table_run(name, rows, path) for name, rows in grouped.items()]


def _table_run(name: str, rows: list[dict], path: str) -> Run:
    points = []
    for row in rows:
        loss, decimals = _value(row, "loss", path)
        time_s, _ = _value(row, "time_s", path)
        if time_s is None and (milliseconds := _value(row, "time_ms", path)[0]) is not None:
            time_s = milliseconds / 1e3
        step = int(_value(row, "step", path)[0] or _value(row, "planned_steps", path)[0] or 0)
        points.append(Validation(step, loss, time_s, None, decimals, row.get("line")))
    points.sort(key=lambda point: point.step)
    steps = [point.step for point in points]
    if len(set(steps)) < len(steps):
        raise DataError(f"run {name!r} has two rows for one step", path, points[-1].line)
    planned = _value(rows[-1], "planned_steps", path)[0]
    seed = _value(rows[0], "seed", path)[0]
    facts = {key: str(rows[0][key]) for key in ("host", "hardware", "torch", "code_hash") if rows[0].get(key)}
    return Run(
        path=path,
        name=name,
        dialect="table",
        first_line=rows[0].get("line"),
        last_step=steps[-1],
        step_lines=0,
        planned_steps=steps[-1] if planned is None else int(planned),
        validations=tuple(points),
        seed=None if seed is None else int(seed),
        **facts,
    )


def _own_run(record: dict, path: str) -> Run:
    """A run from the JSON that the trainer writes beside its log."""
    points = record["validation"]
    if not all(isinstance(point, dict) for point in points):
        raise DataError("`validation` is not a list of objects", path)
    name = str(record.get("run_name") or "run")
    rows = [
        {"run": name, "step": p.get("step"), "loss": p.get("loss"), "time_s": p.get("train_time_s")} for p in points
    ]
    config = record.get("config") if isinstance(record.get("config"), dict) else {}
    if rows and record.get("status") in ("finished", None) and "num_iterations" not in config:
        raise DataError("`config` does not say num_iterations, so nothing tells whether the run is finished", path)
    if not rows:
        raise DataError("no validation in this run", path)
    rows[-1]["planned_steps"] = config.get("num_iterations")
    for row in rows:
        row.update({"seed": record.get("seed"), "code_hash": record.get("code_hash")})
    return _runs(rows, path)[0]


def _value(row: dict, key: str, path: str) -> tuple[float | None, int | None]:
    """(number, digits after the point as written) of a cell; (None, None) if it is empty."""
    cell = row.get(key)
    if cell is None or cell == "":
        return None, None
    if isinstance(cell, str):
        text = cell.strip()
        if re.fullmatch(r"[+-]?\d+,\d+", text):  # in a table whose cells are not divided by commas
            text = text.replace(",", ".")
    elif isinstance(cell, (int, float)) and not isinstance(cell, bool):
        text = repr(cell)
    else:
        text = ""
    if not _is_number(text):
        raise DataError(f"{key} {ascii(cell)[:80]} is not a number", path, row.get("line"))
    number = float(text)
    if key != "loss" and not (math.isfinite(number) and abs(number) < 1e15):
        raise DataError(f"{key} {text[:80]} is out of range", path, row.get("line"))
    mantissa = re.fullmatch(r"[+-]?\d*\.(\d+)", text)
    return number, len(mantissa[1]) if mantissa else None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
