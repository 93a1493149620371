"""The measuring harness: honest clocks, interleaved comparison, results that name no machine."""

import json
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import common
from bench.common import compare, environment, measure, peak_memory_mib, summary, table, write_json, write_result


@given(st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50))
def test_summary_is_ordered(times):
    s = summary(times)
    assert s["min_ms"] <= s["median_ms"] <= s["max_ms"] and s["n"] == len(times)
    assert 0 <= s["iqr_ms"] <= s["max_ms"] - s["min_ms"] + 1e-9


def test_measure_measures_the_time_of_a_call():
    calls = []
    stats = measure(lambda: (calls.append(1), time.sleep(0.01)), repeats=4, warmup=2, sync=False, keep_raw=True)
    assert len(calls) == 6 and stats["n"] == len(stats["raw_ms"]) == 4
    assert stats["min_ms"] >= 10


def test_sync_is_called_around_the_call():
    order = []
    measure(lambda: order.append("call"), repeats=1, warmup=0, sync=lambda: order.append("sync"))
    assert order == ["sync", "call", "sync"]


def test_compare_takes_turns_and_gives_ratios():
    order = []

    def sleeper(name, seconds):
        return lambda: (order.append(name), time.sleep(seconds))

    fns = {"base": sleeper("base", 0.004), "twice": sleeper("twice", 0.012)}
    both = compare(fns, 4, warmup=1, sync=False)
    assert order[2:] == ["base", "twice", "twice", "base", "base", "twice", "twice", "base"]
    assert both["base"]["ratio"] == 1.0 and both["twice"]["ratio"] > 1.2
    low, high = both["twice"]["ratio_quartiles"]
    assert low <= both["twice"]["ratio"] <= high


@pytest.mark.parametrize(
    "arguments, words", [(({}, 3), "at least one function"), (({"a": print}, 0), "repeats must be >= 1")]
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        compare(*arguments, sync=False)
    with pytest.raises(ValueError, match="sync"):
        measure(print, sync=True)
    with pytest.raises(ValueError, match="no times"):
        summary([])


def test_environment_names_neither_host_nor_paths():
    env = environment()
    assert env["cores"] >= 1 and env["python"] and env["torch"] and env["memory_gib"] > 0
    text = json.dumps(env)
    assert socket.gethostname() not in text and str(common.REPO) not in text
    assert common.device_name({"gpus": []}) == "cpu"
    eight = {"gpus": [{"name": "NVIDIA H100 80GB HBM3"}] * 8}
    assert common.device_name(eight) == "8x-nvidia-h100-80gb-hbm3"


def test_results_are_whole_json_with_environment_and_command(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", [str(common.REPO / "bench" / "step.py"), "--tokens=/data/private/x.bin", "--n", "3"]
    )
    path = write_result("step-nano", {"ms": 1.5}, folder=tmp_path)
    record = json.loads(path.read_text())
    assert record["command"] == "python -m bench.step --tokens=x.bin --n 3"
    assert record["result"] == {"ms": 1.5} and record["environment"]["cores"] >= 1
    device = path.stem.removeprefix("step-nano-")
    assert common.read_result("step-nano", device, folder=tmp_path) == record
    assert common.read_result("other", device, folder=tmp_path) is None
    with pytest.raises(ValueError, match="result name"):
        write_result("../up", {}, folder=tmp_path)
    with pytest.raises(TypeError):
        write_json(path, {"x": object()})
    assert json.loads(path.read_text()) == record, "a failed write leaves the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_ceilings_are_rates_of_the_work_that_was_timed():
    product = common.matmul_ceiling(size=128, repeats=3)
    assert product["tflops"] == pytest.approx(2 * 128**3 / product["time"]["median_ms"] / 1e9)
    copy = common.copy_ceiling(size_bytes=2**20, repeats=3)
    assert copy["gb_per_s"] == pytest.approx(2 * 2**20 / copy["time"]["median_ms"] / 1e6)


def test_tables_say_what_was_not_measured():
    text = table([{"a": 1.23456, "b": None}, {"a": 2, "b": "x"}])
    assert text.splitlines()[2:] == ["| 1.235 | not measured |", "| 2     | x            |"]
    import torch

    if not torch.cuda.is_available():
        assert peak_memory_mib(lambda: None) is None
