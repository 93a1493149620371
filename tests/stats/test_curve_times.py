"""Curves, times and the leaderboard."""

import json

import numpy as np
import pytest
import scipy
from statsmodels.stats.multitest import multipletests

from stats.cli import main
from stats.curve import curve
from stats.errors import DataError, UsageError
from stats.leaderboard import leaderboard
from stats.samples import Sample
from stats.series import find_series, read_runs
from stats.times import times
from stats.values import Run, Validation


def _run(name, points, planned=None, host=None):
    validations = tuple(Validation(step, loss, time, None, 6, None) for step, loss, time in points)
    last = validations[-1].step
    return Run(name, name, "steps", 1, planned or last, last, 0, validations, host=host)


def test_crossing_is_interpolated_linearly():
    a = _run("a", [(0, 10.0, 0.0), (100, 4.0, 10.0), (200, 3.0, 22.0), (300, 2.8, 34.0)])
    b = _run("b", [(0, 10.0, 0.0), (100, 4.2, 11.0), (200, 3.2, 21.0), (300, 3.0, 31.0)])
    found = curve([a, b], 3.0)
    assert [(c.run, c.steps, c.time_s) for c in found.runs] == [("a", 200.0, 22.0), ("b", 300.0, 31.0)]
    assert found.mean_crossing.steps == pytest.approx(250.0)
    assert found.mean_crossing.time_s == pytest.approx((21.5 + 32.5) / 2)
    assert found.first_below == 300
    assert found.steps_to_spare == pytest.approx(50.0)
    assert found.slope_per_step == pytest.approx(-0.002)
    assert found.slope_per_s == pytest.approx(-0.2 / 11)
    assert curve([a, b], 2.0).mean_crossing.steps is None


def test_target_that_is_met_from_the_start():
    found = curve([_run("a", [(0, 2.0, 0.0), (10, 1.5, 1.0)])], 3.0)
    assert (found.runs[0].steps, found.runs[0].time_s) == (0.0, 0.0)


def test_common_steps_are_those_of_every_run_and_tested_there():
    rng = np.random.default_rng(0)
    runs = [
        _run(str(i), [(s, 3.5 - s / 1000 + rng.normal(0, 0.001), s / 10) for s in (100, 200, 300)]) for i in range(8)
    ]
    runs.append(_run("short", [(s, 3.5 - s / 1000, s / 10) for s in (100, 200)], planned=300))
    found = curve(runs, 3.3005, alpha=0.05)
    assert [step.step for step in found.common] == [100, 200]
    at = [run.losses_by_step[200] for run in runs]
    assert found.common[1].p_value == pytest.approx(scipy.stats.ttest_1samp(at, 3.3005, alternative="less").pvalue)
    assert any("1 of 9 runs end before step 300: short" in note for note in found.notes)


def test_first_significant_holds_from_there_on():
    def level(values):
        return [_run(str(i), [(s, v + d, None) for s, v in values]) for i, d in enumerate((-0.001, 0.0, 0.001))]

    found = curve(level([(100, 2.9), (200, 3.1), (300, 2.9), (400, 2.8)]), 3.0, alpha=0.05)
    assert (found.first_below, found.first_significant) == (100, 300)


def test_curve_refusals():
    with pytest.raises(UsageError, match="target"):
        curve([_run("a", [(0, 1.0, None)])], float("nan"))
    with pytest.raises(DataError, match="no curve"):
        curve([], 3.0)


def test_curve_of_the_reference_run(shared_data, capsys):
    path = shared_data / "logs" / "medium_second_input_embedding.txt"
    assert main(["curve", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (before, last) = [(5625, 2.920859), (5690, 2.919956)]
    step = before[0] + 65 * (before[1] - 2.92) / (before[1] - last[1])
    assert found["mean_crossing"]["steps"] == pytest.approx(step)
    assert main(["curve", str(path), "--target", "2.9"]) == 1
    assert "does not reach 2.9" in capsys.readouterr().out
    assert len(curve(read_runs(path), 2.92).common) == 47


def _timed(values, hosts=None):
    runs, finals = [], []
    for index, value in enumerate(values):
        run = _run(f"r{index}", [(100, 2.9, value)], host=hosts[index] if hosts else None)
        runs.append(run)
        finals.append(run.validations[-1])
    return Sample("s", tuple(runs), tuple(finals))


def test_outliers_are_labelled_and_kept():
    values = [100.0, 101.0, 99.5, 100.5, 100.2, 140.0]
    found = times(_timed(values))
    assert [run.run for run in found.runs if run.outlier] == ["r5"]
    assert found.all.n == 6 and found.all.max == 140.0
    assert found.all.mean == pytest.approx(np.mean(values))
    assert any("kept in every number: r5" in note for note in found.notes)
    assert not any(run.outlier for run in times(_timed(values[2:])).runs)  # four runs are too few to say


def test_an_outlier_is_one_on_its_own_host():
    fast, slow = [100.0, 101.0, 99.0, 100.5, 100.4], [200.0, 201.0, 199.0, 200.5, 100.2]
    found = times(_timed(fast + slow, ["f"] * 5 + ["s"] * 5))
    assert [run.run for run in found.runs if run.outlier] == ["r9"]
    assert [(host.host, host.time_s.n, host.outliers) for host in found.hosts] == [("f", 5, 0), ("s", 5, 1)]
    groups = [fast, slow]
    assert found.hosts_p == pytest.approx(scipy.stats.ttest_ind(*groups, equal_var=False).pvalue)


def test_drift():
    values = [100 + 0.5 * i + (0.1 if i % 2 else -0.1) for i in range(12)]
    found = times(_timed(values)).drift
    reference = scipy.stats.linregress(range(12), values)
    assert found.seconds_per_run == pytest.approx(reference.slope)
    assert found.p_value == pytest.approx(reference.pvalue)
    assert found.low < 0.5 < found.high
    assert times(_timed([1.0, 2.0, 3.0])).drift is None


def test_times_need_times():
    with pytest.raises(DataError, match="none of the logs"):
        times(_timed([None, None]))


def test_times_command(make_series, capsys):
    folder = make_series("s", [2.91, 2.92, 2.93, 2.94, 2.95, 2.96], hosts=["h1", "h2"])
    assert main(["times", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "| h1 " in told and "between hosts: p =" in told and "drift along the launches" in told


def test_leaderboard(make_series, capsys):
    slow = make_series("slow", [2.91802, 2.91822, 2.91842, 2.91812, 2.91832], step_ms=60.0)
    make_series("fast", [2.9185, 2.9182, 2.9184, 2.9181, 2.9183], step_ms=50.0)
    make_series("above", [2.9285, 2.9282, 2.9284, 2.9281, 2.9283], step_ms=40.0)
    broken = make_series("broken", [2.9295, 2.9292], step_ms=45.0)
    (broken / "runs" / "seed-000.txt").write_text("nothing")
    board = leaderboard(find_series([slow.parent]))
    assert [entry.series for entry in board.entries] == ["fast", "slow", "above", "broken"]
    assert [entry.passes for entry in board.entries] == [True, True, False, False]
    assert [entry.grade for entry in board.entries] == ["B", "B", "F", "F"], board.entries
    names = [(pair.first, pair.second) for pair in board.pairs]
    assert [tuple(path.rpartition("/")[2] for path in pair) for pair in names] == [
        ("fast", "slow"),
        ("fast", "above"),
        ("slow", "above"),
    ]
    raw = [pair.loss.p_value for pair in board.pairs]
    assert [pair.loss.holm_p for pair in board.pairs] == pytest.approx(multipletests(raw, method="holm")[1])
    first = board.pairs[0]
    assert first.time_s.estimate == pytest.approx(0.6, rel=0.02) and first.time_s.holm_p < 1e-6
    assert first.loss.holm_p > 0.05
    assert "no validation in this run" in board.entries[-1].error
    assert main(["leaderboard", str(slow.parent)]) == 0
    rows = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert rows[2:] == ["fast", "slow", "above", "broken"]
