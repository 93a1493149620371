"""Folders, ledgers and tables to samples; the sequential test on a running series."""

import json

import pytest

from stats.cli import main
from stats.errors import DataError, UsageError
from stats.monitor import monitor
from stats.plans import make_plan
from stats.samples import sample_of
from stats.sequential import ACCEPT, CONTINUE
from stats.series import find_series, load_series, read_ledger, read_runs

LOSSES = [2.9193, 2.9198, 2.9189, 2.9201, 2.9195, 2.9190]


def _events(folder):
    """The ledger's events of runs, unsealed: what is asked here is what they mean, not whether they hold together."""
    events = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    return [event for event in events if event["event"] != "begin"]


def _write_events(folder, events):
    (folder / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def test_series_folder(make_series):
    folder = make_series("s", LOSSES)
    (series,) = find_series([folder.parent])
    sample = sample_of(series)
    assert series.name == "s" and series.threshold == 2.92
    assert sample.losses == tuple(LOSSES)
    assert sample.decimals == 6
    assert [run.seed for run in sample.runs] == list(range(6))
    assert all(run.host == "abc" for run in sample.runs)


def test_threshold_comes_from_the_command_line_then_the_record_then_the_run(make_series, capsys):
    folder = make_series("s", LOSSES, record={"threshold": 3.1})
    for extra, threshold in ([], 3.1), (["--threshold", "2.95"], 2.95):
        main(["ttest", str(folder), "--json", "--no-sensitivity", *extra])
        assert json.loads(capsys.readouterr().out)["threshold"] == threshold
    (folder / "record.json").write_text("{}")
    main(["ttest", str(folder), "--json", "--no-sensitivity"])
    assert json.loads(capsys.readouterr().out)["threshold"] == 2.92


def test_foreign_folder_of_logs(tmp_path, make_log):
    for index, loss in enumerate(LOSSES):
        (tmp_path / f"{index:08x}-uuid.txt").write_text(make_log(loss, seed=index))
    (tmp_path / "README.txt").write_text("not a log")
    assert sample_of(load_series(tmp_path)).losses == tuple(LOSSES)


def test_mixed_configurations_are_refused_with_what_was_found(make_series, make_log, capsys):
    folder = make_series("s", LOSSES)
    (folder / "runs" / "seed-002.txt").write_text(make_log(2.9189, steps=70, seed=2))
    (folder / "runs" / "seed-003.txt").write_text(make_log(2.9189, source="another program\n", seed=3))
    assert main(["ttest", str(folder)]) == 3
    told = capsys.readouterr().err
    assert "2 different planned steps: 60 in seed-000, seed-001, seed-003, seed-004 and 1 more, 70 in seed-002" in told
    assert "2 different programs (code hash)" in told
    assert main(["ttest", str(folder), "--allow-mixed", "--no-sensitivity"]) == 0
    assert "note: 2 different planned steps" in capsys.readouterr().out


def test_truncated_log_in_a_series_is_refused_until_it_is_dropped_with_a_reason(make_series, capsys):
    folder = make_series("s", LOSSES, ledger=False)
    log = folder / "runs" / "seed-004.txt"
    log.write_text("".join(line for line in log.read_text().splitlines(True) if not line.startswith("step:60/60 val")))
    assert main(["ttest", str(folder)]) == 3
    assert f"{log}:" in (told := capsys.readouterr().err)
    assert "its last validation is at step 40 of 60 planned, though it trained to step 60" in told
    assert main(["ttest", str(folder), "--drop", "seed-004="]) == 2
    assert "not dropped without a reason" in capsys.readouterr().err
    assert main(["ttest", str(folder), "--drop", "seed-009=gone"]) == 3
    assert main(["ttest", str(folder), "--drop", "seed-004=disk full", "--no-sensitivity"]) == 0
    assert "left out: seed-004: disk full" in capsys.readouterr().out


def test_ledger_accounts_for_runs_that_do_not_count(make_series):
    folder = make_series("s", LOSSES)
    events = _events(folder)
    events[3] |= {"status": "crashed", "exit_code": 137}
    events += [{"event": "drop", "run": "seed-002", "reason": "power cut"}]
    events += [
        {"event": "launch", "run": "seed-006", "seed": 6},
        {"event": "cancel", "run": "seed-007", "reason": "decided"},
    ]
    _write_events(folder, events)
    sample = sample_of(load_series(folder))
    assert len(sample.runs) == 4
    assert {entry.run: entry.reason for entry in sample.left_out} == {
        "seed-001": "crashed (exit code 137)",
        "seed-002": "dropped: power cut",
        "seed-006": "launched, and its end is not in the ledger: running, or killed",
        "seed-007": "cancelled (decided)",
    }


def test_a_finished_run_without_its_log_and_a_diverged_one_are_results(make_series):
    folder = make_series("s", LOSSES)
    (folder / "runs" / "seed-005.txt").unlink()
    with pytest.raises(DataError, match="seed-005 finished by the ledger, but its log is not there"):
        sample_of(load_series(folder))
    assert len(sample_of(load_series(folder), drop={"seed-005": "lost disk"}).runs) == 5
    events = _events(folder)
    events[1] |= {"status": "crashed", "exit_code": 4}
    _write_events(folder, events)
    with pytest.raises(DataError, match="diverged"):
        sample_of(load_series(folder), drop={"seed-005": "lost disk"})


def test_drop_in_the_ledger_needs_a_reason(make_series):
    folder = make_series("s", LOSSES)
    _write_events(folder, [*_events(folder), {"event": "drop", "run": "seed-002"}])
    with pytest.raises(DataError, match="dropped without a reason"):
        sample_of(load_series(folder))


def test_damaged_ledger_lines_are_reported_and_a_half_written_last_one_has_not_happened(tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text(
        '{"event":"launch","run":"a"}\n{"event":"laun\n{"event":"end","run":"a","status":"odd"}\n{"event":"dr'
    )
    launches, problems = read_ledger(path)
    assert [(launch.run, launch.status) for launch in launches] == [("a", "crashed")]
    assert [problem.line for problem in problems] == [2, 3]


def test_numbers_of_launches_and_crashes(tmp_path):
    path = tmp_path / "ledger.jsonl"
    ends = ["crashed", "interrupted", "finished"]
    events = [e for end in ends for e in ({"event": "launch", "run": "a"}, {"event": "end", "run": "a", "status": end})]
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    ((launch,), _) = read_ledger(path)
    assert (launch.status, launch.launches, launch.crashes) == ("finished", 3, 1)


def test_empty_log_of_a_crashed_run_does_not_hide_the_others(make_series):
    folder = make_series("s", LOSSES)
    (folder / "runs" / "seed-006.txt").write_text("x = 1\n" + "=" * 100 + "\n")
    events = [*_events(folder), {"event": "launch", "run": "seed-006"}]
    _write_events(folder, [*events, {"event": "end", "run": "seed-006", "status": "crashed", "exit_code": 1}])
    sample = sample_of(load_series(folder))
    assert len(sample.runs) == 6 and sample.left_out[0].reason == "crashed (exit code 1)"


def test_tables(tmp_path):
    def runs(name, text):
        (tmp_path / name).write_text(text)
        return read_runs(tmp_path / name)

    assert [r.validations[-1].loss for r in runs("a.csv", "2.9\n2.91\n")] == [2.9, 2.91]
    (run,) = runs("b.csv", "seed,step,val_loss,time_ms\n0,0,9.5,0\n0,100,2.95,1500\n")
    assert (run.seed, run.planned_steps, run.validations[-1].time_s) == (0, 100, 1.5)
    assert [r.validations[-1].loss for r in runs("c.json", "[2.9, 2.95]")] == [2.9, 2.95]
    found = runs("d.json", '{"losses": [2.9, 2.95], "times_s": [10, 11]}')
    assert [r.validations[-1].time_s for r in found] == [10.0, 11.0]
    assert len(runs("e.jsonl", '{"loss": 2.9}\n{"loss": 2.95}\n2.97\n')) == 3
    assert len(runs("f.txt", "2.9 2.91, 2.92\n")) == 3
    unfinished = runs("g.csv", "run,step,planned_steps,loss\na,50,100,2.9\n")[0]
    with pytest.raises(DataError, match="step 50 of 100"):
        sample_of(find_series([tmp_path / "g.csv"])[0])
    assert unfinished.last_step == 50


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.csv", "run,time\na,3\n", "no loss"),
        ("a.csv", "loss,time\n2.9\n", "1 cells under a header of 2"),
        ("a.csv", "loss\nabc\n", "loss 'abc' is not a number"),
        ("a.csv", "run,loss\na,2\na,3\n", "a second time"),
        ("a.json", "{", "not JSON"),
        ("a.json", "[]", "no runs"),
        ("a.json", '{"losses": [1, 2], "times_s": [1]}', "as many times_s"),
        ("a.json", "[true]", "not a number"),
        ("a.jsonl", '{"loss": 1}\n{"loss": ', "not JSON"),
    ],
)
def test_broken_tables_say_why(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        read_runs(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_standard_input(monkeypatch, capsys, make_log):
    import io
    from types import SimpleNamespace

    for text in (
        "2.9 2.91 2.92\n",
        "[2.9, 2.91, 2.92]",
        "loss,time\n2.9,1\n2.91,1\n2.92,2\n",
        '{"loss": 2.9}\n{"loss": 2.91}\n',
    ):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text.encode())))
        assert main(["ttest", "-", "--threshold", "3"]) in (0, 1), text
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(make_log(2.9).encode())))
    assert main(["ttest", "-"]) == 3
    assert "at least 2 losses; found 1: [2.9]" in capsys.readouterr().err


PLAN = dict(margin=0.0006, sigma=0.00063, cap=30)


def test_monitor_takes_runs_in_launch_order_and_waits(make_series):
    plan = make_plan(**PLAN)
    folder = make_series("s", LOSSES, plan=plan)
    events = _events(folder)
    # seed-004 was launched third and has not ended; later ones have.
    order = [0, 1, 4, 2, 3, 5]
    shuffled = [
        event for seed in order for event in events[2 * seed : 2 * seed + 2] if (seed, event["event"]) != (4, "end")
    ]
    _write_events(folder, shuffled)
    result = monitor(load_series(folder))
    assert result.counted == ("seed-000", "seed-001")
    assert result.waiting_for == ("seed-004",)
    assert result.ended_early == ("seed-002", "seed-003", "seed-005")
    assert result.decision.verdict == CONTINUE
    _write_events(folder, [*shuffled, {"event": "end", "run": "seed-004", "status": "finished"}])
    result = monitor(load_series(folder))
    assert result.counted == tuple(f"seed-{seed:03d}" for seed in order)
    assert [look.mean for look in result.decision.path][:2] == pytest.approx(
        [(2.9193 + 2.9198) / 2, (2.9193 + 2.9198 + 2.9195) / 3]
    )


def test_monitor_counts_no_crashed_run_but_tells_of_it(make_series, capsys):
    plan = make_plan(**PLAN)
    folder = make_series("s", LOSSES, plan=plan)
    events = _events(folder)
    events[5] |= {"status": "crashed", "exit_code": -9}
    events.append({"event": "drop", "run": "seed-003", "reason": "wrong data"})
    _write_events(folder, events)
    assert main(["monitor", str(folder)]) == 4
    told = capsys.readouterr().out
    assert "left out: seed-002: crashed (exit code -9)" in told
    assert "left out: seed-003: dropped: wrong data" in told
    assert "launches that crashed: seed-002 (1)" in told
    assert main(["monitor", str(folder), "--drop", "seed-001=no reason at all", "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["counted"] == ["seed-000", "seed-004", "seed-005"]


def test_monitor_exit_codes(make_series, capsys, tmp_path):
    plan = make_plan(**PLAN)
    good = make_series("good", [2.9180 + 0.0001 * (i % 4) for i in range(12)], plan=plan)
    assert main(["monitor", str(good)]) == 0
    bad = make_series("bad", [2.9220 + 0.0001 * (i % 4) for i in range(12)], plan=plan)
    assert main(["monitor", str(bad)]) == 1
    none = make_series("none", LOSSES)
    assert main(["monitor", str(none)]) == 2
    assert "has no plan.json" in capsys.readouterr().err
    assert main(["monitor", "2.91", "2.911", "--plan", str(good / "plan.json")]) == 4
    assert main(["monitor", "2.91", "2.911"]) == 2
    assert main(["monitor", str(good), "--plan", str(tmp_path / "absent.json")]) == 3


def test_monitor_says_where_the_plan_is_not_in_the_logs(make_series):
    folder = make_series("s", LOSSES)
    result = monitor(load_series(folder), make_plan(**PLAN))
    assert any("do not carry this plan's hash" in note for note in result.notes)
    with pytest.raises(UsageError, match=r"plan\.json"):
        monitor(load_series(folder))


def test_monitor_without_a_ledger(make_series):
    folder = make_series("s", [2.9180 + 0.0001 * (i % 4) for i in range(12)], ledger=False, plan=make_plan(**PLAN))
    result = monitor(load_series(folder))
    assert result.decision.verdict == ACCEPT
    assert any("no ledger" in note for note in result.notes)
    log = folder / "runs" / "seed-001.txt"
    log.write_text("".join(log.read_text().splitlines(True)[:-10]))
    result = monitor(load_series(folder))
    assert (result.counted, result.waiting_for) == (("seed-000",), ("seed-001",))


def test_monitor_waits_for_a_run_in_a_clusters_queue(make_series):
    folder = make_series("s", LOSSES, plan=make_plan(**PLAN))
    events = _events(folder)
    queue = [{"event": "submit", "run": f"seed-{seed:03d}", "seed": seed} for seed in range(6)]
    _write_events(folder, queue + [event for event in events if event["run"] != "seed-003"])
    result = monitor(load_series(folder))
    assert (len(result.counted), result.waiting_for) == (3, ("seed-003",))
    assert result.ended_early == ("seed-004", "seed-005")
    _write_events(folder, [*queue, *reversed(events[0::2]), *events[1::2]])
    assert monitor(load_series(folder)).counted == tuple(f"seed-{seed:03d}" for seed in range(6))


def test_series_that_has_not_got_anywhere(tmp_path, capsys):
    from stats.planfile import write_plan

    folder = tmp_path / "new"
    (folder / "attempts").mkdir(parents=True)
    (folder / "attempts" / "seed-000.1.txt").write_text("an earlier attempt\n")
    write_plan(make_plan(**PLAN), folder / "plan.json")
    (folder / "ledger.jsonl").write_text('{"event":"launch","run":"seed-000"}\n')
    assert main(["monitor", str(folder)]) == 4
    assert "waiting for seed-000" in capsys.readouterr().out
    assert main(["ttest", str(folder)]) == 3
    assert "found 0: []; left out: seed-000 (launched, and its end is not in the ledger" in capsys.readouterr().err
    assert main(["validate", str(folder)]) == 1
    assert main(["ttest", str(tmp_path)]) == 3
