"""Folders in every dialect and layout, made with a known truth: the right numbers, or the right reason."""

import json
from pathlib import Path

import pytest

from bench.dialects import LOGS, autumn_2024, llm_c, medium_2025, own, seconds_2026
from bench.folders import fuzz, series_of
from stats.cli import main
from stats.series import find_series, read_runs, reading_of
from stats.values import final_validation

WIDENING = (0, 5, 10, 20, 30, 40)
UNEVEN = (0, 10, 20, 25, 26, 28, 29, 30, 35, 40)  # sets of steps laid over one another


def runs_of(steps, runs=3, seed=0, **same):
    import random

    return series_of(random.Random(seed), runs, steps, **same)


def write(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_a_hundred_and_twenty_folders():
    kinds, wrong = fuzz(120)
    assert not wrong, wrong[:3]
    assert len(kinds) > 30


@pytest.mark.slow
def test_two_thousand_folders():
    assert not fuzz(2000, first=1000)[1]


@pytest.mark.parametrize("steps", [WIDENING, UNEVEN, (40,)], ids=["widening", "uneven", "one at the end"])
@pytest.mark.parametrize("dialect", [autumn_2024, medium_2025, seconds_2026, own])
def test_any_cadence_that_runs_share_is_healthy(dialect, steps, tmp_path):
    truths = runs_of(steps)
    write(tmp_path, {f"{t.stem}.txt": dialect(t) for t in truths})
    (series,) = find_series([tmp_path])
    assert sorted(final_validation(run).loss for run in series.runs) == sorted(t.losses[-1] for t in truths)


def test_one_run_of_a_series_that_lost_a_line_is_still_refused(tmp_path, capsys):
    truths = runs_of(tuple(range(0, 41, 5)))
    texts = {f"{t.stem}.txt": seconds_2026(t) for t in truths}
    name = sorted(texts)[1]
    texts[name] = "".join(line for line in texts[name].splitlines(True) if not line.startswith("step:20/"))
    write(tmp_path, texts)
    assert main(["ttest", str(tmp_path), "--no-sensitivity"]) == 3
    assert f"{name}:" in (err := capsys.readouterr().err) and "missing between steps 15 and 25" in err


def test_ruler_logs_tell_their_machine_and_their_program(tmp_path):
    (truth,) = runs_of((0, 20, 40), runs=1)
    write(tmp_path, {"a.txt": autumn_2024(truth)})
    (run,) = read_runs(tmp_path / "a.txt")
    assert (run.hardware, run.world_size) == ("NVIDIA H100 80GB HBM3", 8)
    assert run.code_hash is not None and run.torch == "2.5.0+cu124" and not run.problems


TABLE = """nvidia-smi not found. Using library functions instead.
GPU Name                      Temp  Power      Mem Used        Mem Total       Util
0   NVIDIA H100 80GB HBM3     35    117        6340            81559           0     %
1   NVIDIA H100 80GB HBM3     48    120        2029            81559           1     %
"""
LIST = "GPU 0: NVIDIA H200 (UUID: GPU-b801c947)\nGPU 1: NVIDIA H200 (UUID: GPU-b801c948)\n"


@pytest.mark.parametrize("head, card", [(TABLE, "NVIDIA H100 80GB HBM3"), (LIST, "NVIDIA H200")])
def test_cards_of_a_librarys_table_and_of_a_list(head, card, tmp_path):
    (tmp_path / "a.txt").write_text(
        "x = 1\n" + "=" * 100 + "\n" + head + "=" * 100 + "\nstep:2/2 val_loss:2.9 train_time:5ms step_avg:2.5ms\n"
    )
    (run,) = read_runs(tmp_path / "a.txt")
    assert (run.hardware, run.world_size) == (card, 2)


def test_runs_on_one_card_and_on_eight_are_not_averaged(tmp_path, capsys):
    truths = [*runs_of((0, 20, 40)), *runs_of((0, 20, 40), runs=1, seed=1, gpus=1)]
    write(tmp_path, {f"{t.stem}.txt": autumn_2024(t) for t in truths})
    assert main(["ttest", str(tmp_path)]) == 3
    assert "2 different world_size" in capsys.readouterr().err


def test_main_log_of_llm_c_validates_before_it_trains(tmp_path):
    (truth,) = runs_of((*range(0, 40, 6), 40), runs=1)
    write(tmp_path, {"main.log": llm_c(truth)})
    (run,) = read_runs(tmp_path / "main.log")
    assert not run.problems and final_validation(run).loss == truth.losses[-1]
    assert any("trl" in line for line in llm_c(truth).splitlines()) and run.step_lines == 40


def test_excerpts_of_a_run_are_passed_over_and_copies_are_not(tmp_path):
    truths = runs_of(tuple(range(0, 41, 5)), runs=2)
    texts = {f"{t.stem}.txt": seconds_2026(t) for t in truths}
    first = texts[f"{truths[0].stem}.txt"]
    last = next(line for line in first.splitlines() if line.startswith("step:40/40"))
    write(tmp_path, texts | {"summary.log": last + "\n", "zcopy.txt": first})
    (series,) = find_series([tmp_path])
    assert [run.name for run in series.runs] == [*sorted(t.stem for t in truths), "zcopy"]
    (passed,) = reading_of([series]).passed_over
    assert passed.reason == f"lines of {truths[0].stem} once more, and not all of them"


def test_a_folder_a_run_is_one_series(tmp_path, capsys):
    truths = runs_of((0, 20, 40))
    write(tmp_path, {f"seed_{t.seed}/stdout.txt": seconds_2026(t) for t in truths})
    (series,) = find_series([tmp_path])
    assert [run.name for run in series.runs] == ["seed_0", "seed_1", "seed_2"]
    write(tmp_path, {"baseline/stdout.txt": seconds_2026(truths[0])})
    assert len(find_series([tmp_path])) == 2, "a folder of another name is no run of theirs"


def test_a_second_program_in_a_file_is_refused_by_its_name(tmp_path, capsys):
    one, two = runs_of((0, 20, 40), runs=2)
    write(tmp_path, {"all.txt": seconds_2026(one) + seconds_2026(two)})
    assert main(["ttest", str(tmp_path / "all.txt")]) == 3
    assert "a second program stands above this line" in capsys.readouterr().err


def test_lines_of_another_kind_are_not_broken_results(tmp_path):
    (truth,) = runs_of((0, 20, 40), runs=1)
    text = seconds_2026(truth) + "tailavg step:40 tau:150 lambda:0.4 val_loss:3.27909\n"
    write(tmp_path, {"a.txt": text})
    assert not read_runs(tmp_path / "a.txt")[0].problems


def test_two_series_of_one_name_keep_their_own_numbers(tmp_path, capsys):
    for place, seed in (("x/record", 0), ("y/record", 5)):
        write(tmp_path / place, {f"{t.stem}.txt": own(t) for t in runs_of((0, 20, 40), runs=4, seed=seed)})
    assert main(["leaderboard", str(tmp_path), "--json", "--threshold", "3"]) == 0
    board = json.loads(capsys.readouterr().out)
    (pair,) = board["pairs"]
    assert {pair["first"], pair["second"]} == {str(tmp_path / "x/record"), str(tmp_path / "y/record")}
    means = {entry["path"]: entry["loss"]["mean"] for entry in board["entries"]}
    assert pair["loss"]["estimate"] == pytest.approx(means[pair["second"]] - means[pair["first"]])


def test_a_step_zero_in_a_table_is_step_zero(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("run,step,val_loss,planned_steps\na,0,10.9,40\na,40,2.9,40\n")
    (run,) = read_runs(table)
    assert [point.step for point in run.validations] == [0, 40]


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_marks_of_editors_change_nothing(name, encoding, tmp_path):
    truths = runs_of((*range(0, 40, 6), 40))
    for truth in truths:
        (tmp_path / f"{truth.stem}.txt").write_text(LOGS[name](truth), encoding=encoding)
    from stats.samples import sample_of

    (series,) = find_series([tmp_path])
    assert sorted(sample_of(series).losses) == sorted(t.losses[-1] for t in truths)
