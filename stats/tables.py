"""Results that are not logs: CSV, JSON, JSON lines, and bare numbers.

    CSV     (or TSV) a header, then one row a run, or one row a validation where there is a column `step` and a run has
            many rows; without a header, one loss a row
    JSON    [2.919, 2.920] | [{"loss": 2.919, "time_s": 1412.0}, ...] | {"losses": [...], "times_s": [...]}
            | {"columns": [...], "data": [[...], ...]} | a run's own JSON as the trainer writes it (with "validation")
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
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from stats.errors import DataError
from stats.values import Run, Validation

#: A longer cell is no cell of a table of runs.
MOST_CELL_CHARS = 1 << 17

# What a column may be called: {meaning: groups of names}. Of several groups the first that a table has is taken:
# `loss` beside `val_loss` is the training loss, and `_step` counts the calls of Weights & Biases' `log`, which are the
# program's steps only where it has no column for them. Names are compared in lower case, `/`, ` `, `-`, `.` as `_`.
_COLUMNS: dict[str, tuple[tuple[str, ...], ...]] = {
    "loss": (
        ("final_val_loss", "final_loss"),
        ("val_loss", "validation_loss", "valid_loss", "loss_val", "loss_validation"),
        ("eval_loss", "loss_eval"),
        ("loss",),
    ),
    "run": (("run", "name", "run_name", "id", "run_id"),),
    "seed": (("seed", "config_seed"),),
    "step": (
        ("step", "final_step", "global_step", "train_global_step", "trainer_global_step", "iter", "iteration"),
        ("_step",),
    ),
    "planned_steps": (("planned_steps", "num_iterations", "steps", "max_steps", "max_iters"),),
    "time_s": (("time_s", "train_time_s", "time", "seconds"),),
    "time_ms": (("time_ms", "train_time_ms"),),
    "runtime": (("_runtime", "runtime"),),  # in seconds, of everything: only where no other time is told
    "state": (("state", "status"),),
    "host": (("host", "hostname", "hostname_hash"),),
    "hardware": (("hardware", "gpu"),),
    "torch": (("torch",),),
    "code_hash": (("code_hash",),),
}
_MEANING = {name: meaning for meaning, groups in _COLUMNS.items() for group in groups for name in group}
_OURS = ("line", "semicolons")  # which line of its file a row is, and whether a comma there is a decimal sign
_FIRST_COUNTS = ("run", "time_s", "time_ms", "runtime")  # a name beside an id: no contradiction


def meaning_of(key: object) -> str | None:
    """What a column or a field of this name is taken for, if for anything."""
    return _MEANING.get(_plain(key))


def _plain(key: object) -> str:
    return re.sub(r"[/ .-]+", "_", str(key).strip().lower())


def understood(keys: Iterable[str], path: str) -> tuple[dict[str, str], list[str]]:
    """({column: what it is taken for}, columns that mean nothing here). Raises DataError where two claim one thing."""
    plain = {key: _plain(key) for key in keys}
    taken: dict[str, str] = {}
    for meaning, groups in _COLUMNS.items():
        if meaning == "runtime" and {"time_s", "time_ms"} & set(taken.values()):
            continue
        found = next((hit for group in groups if (hit := [key for key, name in plain.items() if name in group])), [])
        if len(found) > 1 and meaning not in _FIRST_COUNTS:
            what = "the loss" if meaning == "loss" else meaning
            raise DataError(f"two columns for {what}, {' and '.join(map(repr, found[:2]))}: take one out", path)
        if found:
            taken[found[0]] = meaning
    taken = {key: taken[key] for key in plain if key in taken}
    return taken, [str(key) for key in plain if key not in taken and key not in (*_OURS, "")]


def parse_csv(text: str, path: str) -> list[Run]:
    """Runs of a CSV text. Raises DataError with the line at fault."""
    first = text.lstrip().split("\n")[0]
    delimiter = next((sign for sign in (";", "\t") if sign in first and "," not in first), ",")
    rows = csv.reader(io.StringIO(text.replace("\0", "?"), newline=""), delimiter=delimiter)
    others = csv.field_size_limit(MOST_CELL_CHARS)  # the process has one, and others may have set it
    try:
        lines = [line for line in rows if any(cell.strip() for cell in line)]
    except csv.Error as error:
        raise DataError(f"not a table: {error}", path, rows.line_num) from None
    finally:
        csv.field_size_limit(others)
    if not lines:
        raise DataError("an empty table", path)
    if _is_number(lines[0][0]) and len(lines[0]) == 1:
        return runs_of_rows([{"loss": line[0], "line": number} for number, line in enumerate(lines, 1)], path)
    header = [cell.strip().lower() for cell in lines[0]]
    for name, count in Counter(header).items():
        if count > 1 and (meaning_of(name) is not None or " - " in name):
            raise DataError(f"{count} columns named {name!r}: which one? Give them names of their own", path, 1)
    table: list[dict] = []
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(header):
            raise DataError(f"{len(line)} cells under a header of {len(header)}", path, number)
        table.append({**dict(zip(header, line)), "line": number, "semicolons": delimiter != ","})
    return runs_of_rows(table, path)


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
    if isinstance(value, dict) and isinstance(value.get("columns"), list) and isinstance(value.get("data"), list):
        value = _split_table(value, path)
    if isinstance(value, dict) and isinstance(value.get("log_history"), list):
        return [_trainer_state(value, path)]
    rows = value if isinstance(value, list) else [value]
    if rows and all(isinstance(row, dict) and isinstance(row.get("validation"), list) for row in rows):
        return [_own_run(row, path) for row in rows]
    return runs_of_rows([row if isinstance(row, dict) else {"loss": row} for row in rows], path)


def _split_table(value: dict, path: str) -> list[dict]:
    """Rows of a table whose header stands apart: `wandb.Table`'s file, pandas' `to_json(orient="split")`."""
    header, rows = value["columns"], value["data"]
    for number, row in enumerate(rows, 1):
        if not isinstance(row, list) or len(row) != len(header):
            raise DataError(f"row {number} of `data` has not the {len(header)} cells of `columns`", path)
    return [dict(zip(map(str, header), row)) for row in rows]


def parse_numbers(text: str, path: str) -> list[Run]:
    """One finished run for each number of a text like `2.9195 2.9198, 2.9206`."""
    words = [word for word in re.split(_between_numbers(text, path), text) if word]
    words = [word.replace(",", ".") for word in words]
    return runs_of_rows([{"loss": word} for word in words], path)


def _between_numbers(text: str, path: str) -> str:
    """The pattern that divides numbers. A comma does, unless it is the decimal sign (`2,9195; 2,9198`)."""
    if "." in text or not re.search(r"\d,\d", text):
        return r"[\s,;]+"
    words = [word for word in re.split(r"[\s;]+", text) if word]
    if all(re.fullmatch(r"[+-]?\d{1,3},\d{2,}", word) for word in words):
        return r"[\s;]+"
    raise DataError("commas between digits, and no point: a decimal comma or a list? Write 2.9195", path)


def runs_of_rows(rows: list[dict], path: str) -> list[Run]:
    """Rows with any of the known columns, gathered into runs. Raises DataError for what makes no sense."""
    if not rows:
        raise DataError("no runs in it", path)
    if wide := _wide_table(rows, path):
        return wide
    taken, unknown = understood(dict.fromkeys(key for row in rows for key in row), path)
    told = ", ".join(f"{meaning} from {key!r}" for key, meaning in taken.items())
    origin = f"table: {told}" + (f"; not used: {', '.join(map(repr, unknown[:12]))}" if unknown else "")
    grouped: dict[str, list[dict]] = {}
    history = "step" in taken.values() and not {"run", "seed"} & set(taken.values())
    for index, row in enumerate(rows, 1):
        # what means nothing here goes: a training loss beside the validation loss is called `loss` as well
        row = {taken.get(key, key): value for key, value in row.items() if key in taken or key in _OURS}
        empty = (
            row.get("loss") in (None, "", "NaN", "nan") if "step" in taken.values() else row.get("loss") in (None, "")
        )
        if empty and "step" in taken.values() and "loss" in taken.values() and not _is_final(row):
            continue  # a row of a history that logs something else
        if empty:
            known = ", ".join(name for group in _COLUMNS["loss"] for name in group)
            raise DataError(f"row {index} has no loss (a column named {known})", path, row.get("line"))
        name = row.get("run", row.get("seed"))
        if history and name in (None, ""):
            name = Path(path).stem
        several = name not in (None, "") and row.get("step") not in (None, "")
        key = str(name) if name not in (None, "") else f"row {index}"
        if key in grouped and not several:
            raise DataError(
                f"run {key!r} a second time, and no column `step` to tell them apart", path, row.get("line")
            )
        grouped.setdefault(key, []).append(row)
    if not grouped:
        raise DataError("no row of it has a loss", path)
    return [_table_run(name, rows, path, origin) for name, rows in grouped.items()]


def _is_final(row: dict) -> bool:
    """Whether a row is a run's only one, which must have its loss: it names a state."""
    return row.get("state") not in (None, "") and str(row["state"]).lower() in ("finished", "completed")


def _wide_table(rows: list[dict], path: str) -> list[Run]:
    """Runs of a chart that Weights & Biases exports: `Step`, then `NAME - KEY` (with __MIN and __MAX) a run."""
    keys = list(dict.fromkeys(key for row in rows for key in row if key not in _OURS))
    columns = [key for key in keys if " - " in str(key) and not str(key).lower().endswith(("__min", "__max"))]
    step = next((key for key in keys if meaning_of(key) == "step"), None)
    if not columns or step is None:
        return []
    metrics = {key.rpartition(" - ")[2] for key in columns} - {"_step"}
    if len(metrics) != 1:
        raise DataError(f"several metrics, {', '.join(sorted(metrics))}: export a chart of one", path)
    metric = metrics.pop()
    runs = []
    for column in columns:
        if column.endswith(" - _step"):
            continue
        name = column.rpartition(" - ")[0]
        points = [
            {"step": row[step], "loss": row[column], "line": row.get("line"), "semicolons": row.get("semicolons")}
            for row in rows
            if row.get(column) not in (None, "")
        ]
        if points:
            runs.append(_table_run(name, points, path, f"chart of Weights & Biases: loss from {metric!r}"))
    return runs


def _table_run(name: str, rows: list[dict], path: str, origin: str | None = None) -> Run:
    points = []
    for row in rows:
        loss, decimals = _value(row, "loss", path)
        if loss is None:
            raise DataError(f"run {name!r} has a row without a loss", path, row.get("line"))
        times = ((_value(row, key, path)[0], unit) for key, unit in (("time_s", 1), ("time_ms", 1e3), ("runtime", 1)))
        time_s = next((time / unit for time, unit in times if time is not None), None)
        told = [_value(row, key, path)[0] for key in ("step", "planned_steps")]
        step = int(next((number for number in told if number is not None), 0))  # step 0 is one
        points.append(Validation(step, loss, time_s, None, decimals, row.get("line")))
    # a step that was evaluated twice, with one result, counts once
    points = sorted({(p.step, p.loss): p for p in reversed(points)}.values(), key=lambda p: (p.step, p.line or 0))
    for before, point in pairwise(points):
        if point.step == before.step:
            raise DataError(f"run {name!r} has two rows for one step", path, point.line)
    steps = [point.step for point in points]
    planned = _value(rows[-1], "planned_steps", path)[0]
    seed = _value(rows[0], "seed", path)[0]
    facts: dict[str, Any] = {
        key: str(rows[0][key]) for key in ("host", "hardware", "torch", "code_hash") if rows[0].get(key)
    }
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
        state=_state(rows[-1].get("state")),
        origin=origin,
        **facts,
    )


def _state(told: object) -> str | None:
    """A run's state in one word; None where nothing tells."""
    if told in (None, ""):
        return None
    word = str(told).strip().lower()
    return "finished" if word in ("finished", "completed", "succeeded", "success", "done") else word


def _own_run(record: dict, path: str) -> Run:
    """A run from the JSON that the trainer writes beside its log."""
    points = record["validation"]
    if not all(isinstance(point, dict) for point in points):
        raise DataError("`validation` is not a list of objects", path)
    name = str(record.get("run_name") or "run")
    rows = [
        {"run": name, "step": p.get("step"), "loss": p.get("loss"), "time_s": p.get("train_time_s")} for p in points
    ]
    config = config if isinstance(config := record.get("config"), dict) else {}
    if rows and record.get("status") in ("finished", None) and "num_iterations" not in config:
        raise DataError("`config` does not say num_iterations, so nothing tells whether the run is finished", path)
    if not rows:
        raise DataError("no validation in this run", path)
    rows[-1]["planned_steps"] = config.get("num_iterations")
    for row in rows:
        row.update({"seed": record.get("seed"), "code_hash": record.get("code_hash")})
    return runs_of_rows(rows, path)[0]


def _trainer_state(state: dict, path: str) -> Run:
    """The run of a Hugging Face trainer_state.json: evaluations in log_history, planned steps in max_steps."""
    history = [row for row in state["log_history"] if isinstance(row, dict)]
    losses = sorted({key for row in history for key in row if re.fullmatch(r"eval_(?:\w+_)?loss", key)})
    if not losses:
        keys = sorted({key for row in history for key in row})
        raise DataError(f"no eval_loss in its log_history: {', '.join(keys[:8])}", path)
    if len(losses) > 1:
        raise DataError(f"several evaluation losses, {', '.join(losses)}: keep one", path)
    rows = [
        {"step": row.get("step"), "loss": row[losses[0]], "planned_steps": state.get("max_steps")}
        for row in history
        if losses[0] in row
    ]
    folder = Path(path).resolve().parent
    name = folder.parent.name if folder.name.startswith("checkpoint-") else folder.name
    origin = f"trainer_state.json: loss from {losses[0]!r}, planned steps from 'max_steps'; no times in it"
    return _table_run(name or "run", rows, path, origin)


def _value(row: dict, key: str, path: str) -> tuple[float | None, int | None]:
    """(number, digits after the point as written) of a cell; (None, None) if it is empty."""
    cell = row.get(key)
    if cell is None or cell == "":
        return None, None
    if isinstance(cell, str):
        text = cell.strip()
        if re.fullmatch(r"[+-]?\d+,\d+", text):
            thousands = re.search(r",\d{3}$", text) and not row.get("semicolons")
            if thousands or key not in ("loss", "time_s", "time_ms", "runtime"):
                told = f"{key} {text[:80]}: does the comma divide thousands? Write it without"
                raise DataError(told, path, row.get("line"))
            text = text.replace(",", ".")  # a decimal comma
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
