"""Validations that are gone: from a copy of another run, or at the same place of several logs."""

import re

import pytest

from stats.cli import main


def without(text, *steps):
    """The log without the validations of these steps."""
    return re.sub(rf"^step:({'|'.join(map(str, steps))})/\d+ val_loss:.*\n", "", text, flags=re.MULTILINE)


def judge(folder, capsys, logs):
    """(exit code of the t-test, all that it says) of a folder with these logs."""
    folder.mkdir()
    for name, text in logs.items():
        (folder / name).write_text(text)
    code = main(["ttest", str(folder), "--threshold", "2.92"])
    return code, "".join(capsys.readouterr())


@pytest.fixture
def honest(make_log):
    return {f"{seed}.txt": make_log(2.90 + 0.001 * seed, seed=seed, steps=60, every=10) for seed in range(4)}


@pytest.mark.parametrize("steps", [(20,), (10, 40), (0,)])
def test_a_copy_with_lines_taken_out_is_damaged_and_no_further_run(honest, tmp_path, capsys, steps):
    assert judge(tmp_path / "honest", capsys, honest)[0] == 0
    code, said = judge(tmp_path / "copied", capsys, honest | {"9.txt": without(honest["2.txt"], *steps)})
    assert code == 3 and "a copy" in said and "9.txt" in said


def test_the_first_lines_of_a_run_are_passed_over(honest, tmp_path, capsys):
    cut = honest["2.txt"].partition("step:21/60 ")[0]
    code, said = judge(tmp_path / "cut", capsys, honest | {"9.txt": cut})
    assert code == 0 and "once more, and not all of them" in said


def test_a_line_lost_at_one_place_of_two_logs_is_no_cadence(honest, tmp_path, capsys):
    """Nobody tells a recipe that leaves one validation out from a lost line, unless three runs agree."""
    holed = {name: without(text, 30) for name, text in honest.items()}
    two = {name: holed[name] for name in ("0.txt", "1.txt")}
    code, said = judge(tmp_path / "two", capsys, two)
    assert code == 3 and "missing between steps 20 and 40" in said
    assert judge(tmp_path / "all", capsys, holed)[0] == 0
    code, said = judge(tmp_path / "mixed", capsys, two | {"2.txt": honest["2.txt"], "3.txt": honest["3.txt"]})
    assert code == 3 and "missing between steps 20 and 40" in said
