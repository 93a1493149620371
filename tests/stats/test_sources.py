"""Wherever runs are kept: each source as its own program writes it, by the real library where there is one."""

import csv
import itertools
import json

import pytest

from stats.cli import main
from stats.errors import DataError
from stats.series import find_series, read_runs, reading_of
from stats.values import final_validation


def finals(path):
    return [(run.name, final_validation(run).loss) for run in read_runs(path)]


def test_a_column_that_is_not_used_changes_nothing(tmp_path):
    """Its name may be another name of what is used: a training loss, a count of calls, a wall clock."""
    table = tmp_path / "t.csv"
    for order in itertools.permutations(["val_loss", "loss", "step", "_step", "time_s", "_runtime"]):
        value = dict(val_loss=2.9, loss=2.5, step=100, _step=7, time_s=12.5, _runtime=99)
        table.write_text("run," + ",".join(order) + "\na," + ",".join(str(value[name]) for name in order) + "\n")
        (run,) = read_runs(table)
        (point,) = run.validations
        assert (point.loss, point.step, point.time_s) == (2.9, 100, 12.5)


def test_tables_that_weights_and_biases_exports(tmp_path, capsys):
    table = tmp_path / "runs.csv"
    with open(table, "w", newline="") as file:
        rows = csv.writer(file, quoting=csv.QUOTE_ALL)
        rows.writerow(["Name", "State", "Runtime", "seed", "lr", "loss", "val_loss"])
        rows.writerow(["a", "finished", "1400", "0", "0.01", "2.5", "2.9186"])
        rows.writerow(["b", "crashed", "200", "1", "0.01", "4.5", "4.2"])
        rows.writerow(["c", "finished", "1401", "2", "0.01", "2.5", "2.9191"])
        rows.writerow(["d", "running", "900", "3", "0.01", "3.5", "3.2"])
    assert main(["ttest", str(table), "--json", "--no-sensitivity"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["n"] == 2 and told["sample_mean"] == pytest.approx(2.91885), "val_loss, not the training loss"
    assert {(one["run"], one["reason"]) for one in told["left_out"]} == {
        ("b", "crashed, says runs.csv"),
        ("d", "running, says runs.csv"),
    }
    assert main(["import", str(table)]) == 0
    assert "loss from 'val_loss'" in (out := capsys.readouterr().out) and "not used: 'lr', 'loss'" in out

    chart = tmp_path / "chart.csv"
    header = '"Step","a - val_loss","a - val_loss__MIN","b - val_loss"'
    chart.write_text(f'{header}\n"50","3.4","3.4",""\n"100","2.9","2.9","3"\n')
    assert finals(chart) == [("a", 2.9), ("b", 3.0)]
    history = tmp_path / "history.csv"
    history.write_text("_step,_runtime,loss,val_loss\n0,1,10.8,10.8\n25,2,5.0,\n50,3,4.0,3.9\n")
    assert finals(history) == [("history", 3.9)]


def test_consoles_of_nanogpt_and_nanochat(tmp_path):
    log = tmp_path / "nanogpt.log"
    log.write_text(
        "Overriding: max_iters = 500\nstep 0: train loss 10.9, val loss 10.9105\niter 0: loss 10.91, time 90.00ms\n"
        "step 250: train loss 3.2, val loss 3.3000\nstep 500: train loss 3.0, val loss 3.1234\n"
    )
    assert finals(log) == [("nanogpt", 3.1234)]
    log = tmp_path / "nanochat.log"
    log.write_text(
        "Step 00000 | Validation bpb: 3.2\nstep 00001/00200 (0.50%) | loss: 9.1 | dt: 100.00ms | tok/sec: 5\n"
        "Step 00200 | Validation bpb: 0.9812\n"
    )
    (run,) = read_runs(log)
    assert final_validation(run).loss == 0.9812 and dict(run.validations[-1].extra)["unit"] == "bits per byte"


def test_two_columns_for_the_loss_are_refused(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("run,val_loss,validation_loss\na,2.9,2.8\n")
    with pytest.raises(DataError, match="two columns for the loss, 'val_loss' and 'validation_loss'"):
        read_runs(table)


@pytest.mark.parametrize("text", ["2,9195; 2,9198\n2,9206", "2.9195, 2.9198\n2.9206", "2.9195 2.9198 2.9206"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_decimal_commas_and_exports_of_windows(text, encoding, tmp_path):
    path = tmp_path / "losses.txt"
    path.write_text(text, encoding=encoding)
    assert [loss for _, loss in finals(path)] == [2.9195, 2.9198, 2.9206]


def test_a_comma_that_could_be_both_is_refused(tmp_path):
    (tmp_path / "losses.txt").write_text("2,3\n")
    with pytest.raises(DataError, match="a decimal comma or a list"):
        read_runs(tmp_path / "losses.txt")


def test_everything_below_a_folder_is_read_or_passed_over_with_a_reason(tmp_path, make_log, capsys):
    for place, final in (("a.txt", 2.91), ("deep/b.out", 2.92), ("deep/er/c.stdout", 2.93), ("deep/er/c.txt", 2.93)):
        path = tmp_path / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make_log(final))
    (tmp_path / "notes.txt").write_text("the second run was on the old machine\n")
    (tmp_path / "weights.npy").write_bytes(b"\0")
    series = find_series([tmp_path])
    assert [[final_validation(run).loss for run in one.runs] for one in series] == [[2.91], [2.92], [2.93]]
    passed = {entry.path.rpartition("/")[2]: entry.reason for entry in reading_of(series).passed_over}
    assert passed["notes.txt"] == "no result line of any dialect in it" and "'.npy'" in passed["weights.npy"]
    assert passed["c.txt"] == "the same run as c.stdout, kept twice"
    assert main(["import", str(tmp_path), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["passed_over"]) == len(passed) == 3


def test_several_runs_in_one_file_have_their_own_seeds(tmp_path, make_log):
    path = tmp_path / "all.txt"
    first, second = make_log(2.91, seed=3), make_log(2.92, seed=4)
    path.write_text(first + second.partition("=" * 100)[2])
    assert [run.seed for run in read_runs(path)] == [3, 4]


def test_programs_are_compared_by_what_they_do(tmp_path, make_log):
    source = "seed = {seed}\nimport torch  # {note}\ntorch.manual_seed({seed})\nlr = {lr}\n"
    for seed in range(3):
        text = make_log(2.91 + seed / 1e3, source=source.format(seed=seed, note=f"run {seed}", lr=0.1), seed=seed)
        (tmp_path / f"{seed}.txt").write_text(text)
    assert main(["ttest", str(tmp_path), "--no-sensitivity"]) == 0
    other = make_log(2.914, source=source.format(seed=3, note="", lr=0.2), seed=3)
    (tmp_path / "3.txt").write_text(other)
    with pytest.raises(DataError, match=r"2 different programs .*- lr = 0\.1; \+ lr = 0\.2"):
        from stats.samples import sample_of

        sample_of(find_series([tmp_path])[0])


def test_a_step_that_was_evaluated_twice(tmp_path):
    """With one result it is one; with two, the second line is named."""
    table = tmp_path / "t.tsv"
    rows = ["run\tstep\tval_loss", "a\t10\t3.0", "a\t20\t2.9", "a\t20\t2.9"]
    table.write_text("\n".join(rows) + "\n")
    (run,) = read_runs(table)
    assert [(point.step, point.loss) for point in run.validations] == [(10, 3.0), (20, 2.9)]
    table.write_text("\n".join([*rows, "a\t10\t3.1"]) + "\n")
    with pytest.raises(DataError, match=r"t\.tsv:5: run 'a' has two rows for one step"):
        read_runs(table)
