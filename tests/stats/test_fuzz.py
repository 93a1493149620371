"""Mutated logs, tables, ledgers and plans: an answer or this package's own error, never a silently shorter run."""

import io
import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stats.cli import main
from stats.errors import DataError, StatsError
from stats.planfile import read_plan, write_plan
from stats.plans import make_plan
from stats.runs import parse_log
from stats.series import find_series, read_ledger, read_runs
from stats.values import final_validation, is_finished

EXAMPLES = 250
RULE = "=" * 100


def _dense(every=10) -> bytes:
    """A log with a line for each step, as the reference program writes it."""
    lines = [
        "import torch",
        'print(f"step:{step}/{n} val_loss:{loss}")',
        RULE,
        "Running PyTorch 2.13.0 compiled for cpu",
        RULE,
    ]
    for step in range(41):
        if step:
            lines.append(f"step:{step}/40 train_time:{step * 20}ms step_avg:20.00ms")
        if step % every == 0:
            lines.append(f"step:{step}/40 val_loss:{4 - step / 40:.6f} train_time:{step * 20}ms step_avg:20.00ms")
    return ("\n".join([*lines, "peak memory allocated: 5 MiB reserved: 6 MiB"]) + "\n").encode()


def _sparse() -> bytes:
    """Three runs of validations only in one file, in seconds."""
    lines = [RULE, "Running PyTorch 2.11.0 compiled for CUDA 12.8 on NVIDIA H100 with world_size 8", RULE]
    for run in range(3):
        for step in (0, 10, 20, 30, 40, 45, 48):
            lines.append(
                f"step:{step}/48 val_loss:{4 - step / 48 + run / 1e3:.5f} train_time:{step / 8:.3f}s step_avg:nanms"
            )
    return ("\n".join(lines) + "\n").encode()


def _llmc() -> bytes:
    return "".join(f"s:{step} tel:{4 - step / 100:.4f}\n" for step in range(0, 120, 10)).encode()


LOGS = {"dense": (_dense(), None), "sparse": (_sparse(), None), "llmc": (_llmc(), 110)}


BYTE_KINDS = ("flip", "truncate", "huge", "nan", "binary")
LINE_KINDS = ("cut", "cut lines", "duplicate", "shuffle", "swap")


def _mutate(data: bytes, rng: random.Random, kinds=BYTE_KINDS + LINE_KINDS) -> bytes:
    """One mutation of a random kind."""
    kind = rng.choice(kinds)
    at = rng.randrange(len(data)) if data else 0
    if kind == "flip" and data:
        return data[:at] + bytes([data[at] ^ (1 << rng.randrange(8))]) + data[at + 1 :]
    if kind == "cut":
        return data[:at] + data[at + rng.randrange(1, 200) :]
    if kind == "truncate":
        return data[:at]
    if kind == "binary":
        return data[:at] + rng.randbytes(rng.randrange(1, 300)) + data[at:]
    if kind in ("huge", "nan"):
        word = (
            rng.choice([b"9" * 400, b"1e999", b"-1e-999"]) if kind == "huge" else rng.choice([b"nan", b"inf", b"NaN"])
        )
        numbers = list(re.finditer(rb"\d+(\.\d+)?", data))
        if not numbers:
            return data
        hit = rng.choice(numbers)
        return data[: hit.start()] + word + data[hit.end() :]
    lines = data.split(b"\n")
    i, j = sorted(rng.choices(range(len(lines)), k=2))
    if kind == "cut lines":
        lines = lines[:i] + lines[j:]
    elif kind == "duplicate":
        lines[i:i] = lines[i : j + 1]
    elif kind == "swap":
        lines[i], lines[j] = lines[j], lines[i]
    elif kind == "shuffle":
        part = lines[i:j]
        rng.shuffle(part)
        lines[i:j] = part
    return b"\n".join(lines)


def _check(name: str, mutations: int, seed: int) -> None:
    """A mutated log is refused with its name and a line, or its runs are whole.

    Whole lines that are gone cannot always be noticed: what is left may be the log of a run with a coarser cadence.
    Where only bytes were changed, every line has to be there; else, everything that is left must keep one cadence.
    """
    original, stop_step = LOGS[name]
    rng = random.Random(seed)
    kinds = BYTE_KINDS if seed % 2 else BYTE_KINDS + LINE_KINDS
    data = original
    for _ in range(mutations):
        data = _mutate(data, rng, kinds)
    whole = parse_log(io.BytesIO(original), "whole.txt")[0]
    steps = [point.step for point in whole.validations]
    try:
        runs = parse_log(io.BytesIO(data), "mutated.txt")
    except DataError as error:
        assert str(error).startswith("mutated.txt")
        return
    refused = [run for run in runs if not is_finished(run, stop_step)]
    for run in refused:
        with pytest.raises(DataError, match=r"^mutated\.txt:"):
            final_validation(run, stop_step)
    for run in runs if not refused else ():  # one run that is refused is a file that is refused
        found = [point.step for point in run.validations]
        assert found[-1] == steps[-1] and set(found) <= set(steps), found
        if kinds == BYTE_KINDS:
            assert found == steps, found
            assert run.step_lines == whole.step_lines
        else:
            gaps = [after - before for before, after in pairwise(found)]
            assert gaps == sorted(gaps, reverse=True), found
            regular = {0} | {-(-40 // cadence) + extra for cadence in range(1, 41) for extra in (0, 1)}
            assert run.step_lines == whole.step_lines or (whole.step_lines and run.step_lines in regular)


@pytest.mark.parametrize("name", LOGS)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutations=st.integers(1, 4), seed=st.integers(0, 2**32))
def test_mutated_logs(name, mutations, seed):
    _check(name, mutations, seed)


@pytest.mark.parametrize("at, step", [(0, 1), (1, 11), (1, 9), (2, 21), (10, 101)])
def test_one_changed_step_is_noticed(at, step):
    steps = list(range(0, 120, 10))
    steps[at] = step
    text = "".join(f"s:{step} tel:{4 - step / 100:.4f}\n" for step in steps)
    (run,) = parse_log(io.BytesIO(text.encode()), "changed.txt")
    with pytest.raises(DataError, match=r"^changed\.txt:"):
        final_validation(run, 110)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOGS)
def test_ten_thousand_mutated_logs(name):
    for seed in range(10_000):
        _check(name, 1 + seed // 2 % 5, seed)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=600), suffix=st.sampled_from([".txt", ".csv", ".json", ".jsonl", ""]))
def test_arbitrary_bytes_are_runs_or_an_error(tmp_path_factory, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"bytes{suffix}"
    path.write_bytes(data)
    try:
        assert read_runs(path)
    except StatsError as error:
        assert str(path) in str(error)


TABLES = {
    ".csv": b"run,seed,loss,time_s\na,0,2.9195,12.5\nb,1,2.9201,12.75\nc,2,2.9188,12.25\n",
    ".json": json.dumps([{"seed": seed, "loss": 2.9 + seed / 1e4, "time_s": 10.5} for seed in range(4)]).encode(),
    ".jsonl": b"".join(json.dumps({"run": f"r{i}", "loss": 2.9 + i / 1e4}).encode() + b"\n" for i in range(4)),
}


def _check_table(folder: Path, suffix: str, seed: int) -> None:
    rng = random.Random(seed)
    data = TABLES[suffix]
    for _ in range(1 + seed % 3):
        data = _mutate(data, rng)
    path = folder / f"table{suffix}"
    path.write_bytes(data)
    try:
        runs = read_runs(path)
    except StatsError as error:
        assert str(path) in str(error)
        return
    assert runs and all(len(run.validations) >= 1 for run in runs)


@pytest.mark.parametrize("suffix", TABLES)
def test_mutated_tables(tmp_path, suffix):
    for seed in range(EXAMPLES):
        _check_table(tmp_path, suffix, seed)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", TABLES)
def test_ten_thousand_mutated_tables(tmp_path, suffix):
    for seed in range(10_000):
        _check_table(tmp_path, suffix, seed)


def _check_plan(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = folder / "plan.json"
    write_plan(make_plan(margin=0.0006, sigma=0.00063, cap=20, note="why"), path, overwrite=True)
    data = path.read_bytes()
    mutated = _mutate(data, rng)
    path.write_bytes(mutated)
    try:
        plan = read_plan(path)
    except StatsError as error:
        assert str(path) in str(error)
        return
    # Without its hash a changed plan is a plan of its own; with it, only the same one is accepted.
    assert plan == make_plan(margin=0.0006, sigma=0.00063, cap=20, note="why") or b'"hash"' not in mutated


def test_mutated_plans(tmp_path):
    for seed in range(EXAMPLES):
        _check_plan(tmp_path, seed)


@pytest.mark.slow
def test_ten_thousand_mutated_plans(tmp_path):
    for seed in range(10_000):
        _check_plan(tmp_path, seed)


def _check_series(folder: Path, original: dict[str, bytes], seed: int, capsys) -> None:
    """A mutated file in a series' folder: every verb ends with one of its exit codes."""
    rng = random.Random(seed)
    name = rng.choice(sorted(original))
    (folder / name).write_bytes(_mutate(original[name], rng))
    try:
        for verb in ("ttest", "validate", "monitor", "curve", "times"):
            arguments = [verb, str(folder)] + (["--no-sensitivity"] if verb == "ttest" else [])
            assert main(arguments) in (0, 1, 3, 4), verb
            told = capsys.readouterr()
            assert told.out or told.err.startswith("error: ")
        if (folder / "ledger.jsonl").exists():
            try:
                read_ledger(folder / "ledger.jsonl")
            except StatsError as error:
                assert "ledger.jsonl" in str(error)
    finally:
        (folder / name).write_bytes(original[name])


@pytest.mark.parametrize("count", [40, pytest.param(10_000, marks=pytest.mark.slow)])
def test_mutated_series_folders(make_series, capsys, count):
    plan = make_plan(margin=0.0006, sigma=0.00063, cap=20)
    folder = make_series("s", [2.9193, 2.9198, 2.9189, 2.9201, 2.9195], plan=plan)
    files = [path for path in folder.rglob("*") if path.is_file()]
    original = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    assert main(["ttest", str(folder)]) == 0
    for seed in range(count):
        _check_series(folder, original, seed, capsys)
    assert len(find_series([folder])[0].runs) == 5
