"""The ledger: nothing that was reported as written is lost, whatever happens to its writers."""

import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from records import ledger as ledger_module
from records.folder import SeriesError, read_record
from records.ledger import Ledger, LedgerError, ledger_summary, process_lives, process_start, run_states
from records.logs import read_run_json
from trainer.program import host_hash


def write_many(folder, writer, count):
    for i in range(count):
        Ledger(folder).append("launch", run=f"w{writer}-{i}", seed=i, attempt=1, pad="x" * (i * 37 % 900))


def test_concurrent_writers_lose_and_mix_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path, w, 25)) for w in range(6)]
    for process in writers:
        process.start()
    for process in writers:
        process.join()
        assert process.exitcode == 0
    lines = (tmp_path / "ledger.jsonl").read_text().splitlines()
    runs = [json.loads(line)["run"] for line in lines]
    assert sorted(runs) == sorted(f"w{w}-{i}" for w in range(6) for i in range(25))
    for w in range(6):  # each writer's own order is kept
        assert [r for r in runs if r.startswith(f"w{w}-")] == [f"w{w}-{i}" for i in range(25)]


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(1, 60))
def test_a_line_cut_off_is_skipped_and_then_kept_as_torn(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("series")
    ledger = Ledger(folder)
    ledger.append("launch", run="seed-000", seed=0, attempt=1)
    whole = ledger.path.read_bytes()
    fragment = b'{"event": "end", "run": "seed-000", "status": "finished", "exit_code": 0}'[:cut]
    ledger.path.write_bytes(whole + fragment)
    with pytest.warns(UserWarning, match="line 2: not an event, skipped"):
        assert len(ledger.events()) == 1
    ledger.append("end", run="seed-000", attempt=1, status="crashed")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        events = ledger.events()
    assert [e["event"] for e in events] == ["launch", "torn", "end"]
    assert events[1]["text"] == fragment.decode()
    assert ledger.runs()["seed-000"].status == "crashed"


def test_disk_full_leaves_no_half_line(tmp_path):
    """The kernel itself refuses: a file-size limit cuts the write within the line."""
    ledger = Ledger(tmp_path)
    ledger.append("launch", run="seed-000", seed=0, attempt=1)
    before = ledger.path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, old[1]))
    try:
        with pytest.raises(LedgerError, match=r"cannot add end of seed-000.*Make room") as caught:
            ledger.append("end", run="seed-000", attempt=1, status="finished", note="x" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(ledger.path) in str(caught.value)
    assert ledger.path.read_bytes() == before
    ledger.append("end", run="seed-000", attempt=1, status="finished")
    assert ledger.runs()["seed-000"].status == "finished"


@pytest.mark.skipif(os.geteuid() == 0, reason="rights do not bind root; test_series has the same as another user")
def test_read_only_folder_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(LedgerError, match=r"Permission denied.*writable"):
        Ledger(tmp_path).append("launch", run="seed-000")


def test_status_of_a_launch_without_end(tmp_path):
    ledger = Ledger(tmp_path)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    token = process_start(child.pid)
    ledger.append("launch", run="a", seed=0, attempt=1, host=host_hash(), pid=child.pid, pid_start=token)
    assert ledger.runs()["a"].status == "running"
    assert not process_lives(child.pid, "another boot-1"), "a reused process id must not count as alive"
    child.kill()
    child.wait()
    assert ledger.runs()["a"].status == "lost"
    ledger.append("launch", run="b", seed=1, attempt=1, host="ffffffffffff", pid=1)
    assert ledger.runs()["b"].status == "elsewhere"
    ledger.append("end", run="b", attempt=1, status="finished")
    assert ledger.runs()["b"].status == "finished"
    ledger.append("drop", run="a", reason="power")
    assert ledger.runs()["a"].status == "dropped"


def test_unknown_events_and_values_that_json_lacks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="event 'lunch'"):
        Ledger(tmp_path).append("lunch", run="a")
    with pytest.raises(ValueError, match="not JSON compliant"):
        Ledger(tmp_path).append("end", run="a", final_loss=float("nan"))
    assert not Ledger(tmp_path).path.exists()


EVENT = st.fixed_dictionaries(
    {"event": st.sampled_from(ledger_module.EVENTS)},
    optional={
        "run": st.sampled_from(["a", "b"]),
        "attempt": st.integers(1, 3),
        "seed": st.integers(0, 5),
        "status": st.sampled_from(["finished", "crashed", "interrupted", "nonsense"]),
        "host": st.just("elsewhere"),
        "reason": st.text(max_size=5),
    },
)


@settings(max_examples=200, deadline=None)
@given(st.lists(EVENT, max_size=12))
def test_any_order_of_events_gives_states_and_counts_that_agree(events):
    states = run_states(events)
    summary = ledger_summary(events)
    assert set(states) == {e["run"] for e in events if "run" in e}
    assert sum(summary["runs_by_status"].values()) == summary["runs"] == sum(bool(s.attempts) for s in states.values())
    launches = sum(e["event"] == "launch" and "run" in e for e in events)
    assert summary["launches"] >= launches, "an end without a launch line still counts as a launch"
    for run, state in states.items():
        ends = [e for e in events if e.get("run") == run and e["event"] == "end"]
        if state.attempts and state.attempts[-1].end:
            assert state.attempts[-1].end in ends


def test_json_nested_beyond_all_bounds_is_damage_like_any_other(tmp_path):
    deep = "[" * 100_000
    ledger = Ledger(tmp_path)
    ledger.append("launch", run="seed-000", seed=0, attempt=1)
    with open(ledger.path, "a") as file:
        file.write(deep + "\n")
    with pytest.warns(UserWarning, match="line 2: not an event, skipped"):
        assert [event["run"] for event in ledger.events()] == ["seed-000"]
    (tmp_path / "run.json").write_text(deep)
    assert read_run_json(tmp_path / "run.json") == {}
    (tmp_path / "record.json").write_text(deep)
    with pytest.raises(SeriesError, match=r"record\.json: not a series' record"):
        read_record(tmp_path)
