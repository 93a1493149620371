"""Hostile inputs: a few cases of each kind here, ten thousand in the slow suite."""

import json

import pytest

from bench import fuzz_program
from bench.fuzz import KINDS, damage, fuzz

CASES = {"series folders": 40, "plan files, hostile values": 60, "command lines of statistics and series": 30}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_gives_an_answer_or_an_error_of_ours(kind):
    counts = fuzz(kind, CASES.get(kind, 100), seed=0)
    assert counts["answer"] and counts["error"], f"one-sided cases test little: {counts}"


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_input_at_length(kind):
    assert sum(fuzz(kind, 10000, seed=1).values()) >= 5000  # some kinds have fewer distinct cases


@pytest.mark.parametrize("kind", fuzz_program.KINDS)
def test_hostile_input_through_the_whole_program(kind):
    counts = fuzz(kind, 12, 0, fuzz_program.KINDS)
    assert sum(counts.values()) >= 10, counts  # longer, by hand: bench/results/fuzz-program-cpu.json


def test_damage_does_what_its_operations_say():
    data = b"step:1/20\nstep:2/20\n"
    assert damage(data, []) == data
    assert damage(data, [("flip", 0.0, 1)]) == b"q" + data[1:]
    assert damage(data, [("cut", 0.5)]) == data[:10]
    assert damage(data, [("number", 0.0, b"nan")]) == b"step:nan/20\nstep:2/20\n"
    assert damage(data, [("line", 0.0, 0.99)]) == b"step:2/20\nstep:1/20\n"
    assert damage(data, [("remove", 0.0, 5), ("insert", 0.0, b"x")]) == b"x" + data[5:]
    assert damage(data, [("repeat", 0.0, 4, 0.0)]) == b"step" + data


def test_a_kind_that_is_tried_again_replaces_its_row_alone(tmp_path, monkeypatch):
    from bench import common, fuzz

    monkeypatch.setattr(common, "RESULTS", tmp_path)
    row = {"cases": 3, "answers": 1, "errors of ours": 2, "failures": 0, "seconds": 1.0, "seed": 1}
    fuzz.keep([{"input": "logs", **row}, {"input": "shards", **row}])
    path = fuzz.keep([{"input": "logs", **row, "cases": 9}])
    kept = json.loads(path.read_text())["result"]["kinds"]
    assert [(r["input"], r["cases"]) for r in kept] == [("shards", 3), ("logs", 9)], "in the order of the kinds"
