"""What is said beside a verdict: digits that could turn it, losses of unlike data; and pictures of a folder's parts."""

import json

import pytest

from stats.cli import main
from stats.planfile import write_plan
from stats.plans import make_plan

FEW = ["2.91", "2.92", "2.91", "2.91", "2.91", "2.92"]  # p = 0.0083 as printed, 0.0001 to 0.5 by what was not
MANY = ["2.910000", "2.920000", "2.910000", "2.910000", "2.910000", "2.920000"]


def logs(folder, losses, head="", name="r"):
    folder.mkdir(parents=True, exist_ok=True)
    for index, loss in enumerate(losses):
        line = f"step:9/9 val_loss:{loss} train_time:{900 + index}ms step_avg:{100 + index / 9:.2f}ms\n"
        (folder / f"{name}{index}.txt").write_text(head + line)
    return folder


@pytest.mark.parametrize("losses, hangs", [(FEW, True), (MANY, False)])
def test_digits_that_turn_the_verdict_are_told_by_every_judge(losses, hangs, tmp_path, capsys):
    folder = logs(tmp_path / "s", losses)
    main(["ttest", str(folder)])
    assert ("the decision hangs on digits not printed" in capsys.readouterr().out) == hangs
    main(["validate", str(folder), "--json"])
    found = [
        f["text"] for f in json.loads(capsys.readouterr().out)["assessments"][0]["findings"] if f["check"] == "rounding"
    ]
    assert [text.endswith("on both sides of alpha") for text in found] == [True] * hangs
    write_plan(make_plan(threshold=2.92, margin=0.006, sigma=0.005, cap=6), folder / "plan.json")
    main(["monitor", str(folder), "--json"])
    notes = " ".join(json.loads(capsys.readouterr().out)["notes"])
    assert ("the verdict hangs on digits not printed" in notes) == hangs, notes


def test_losses_of_unlike_validation_data_are_not_compared_in_silence(tmp_path, capsys):
    def head(letter):
        return f"lr = 1\n{'=' * 100}\nval_data_hash:{letter * 64}\n{'=' * 100}\n"

    a, b = tmp_path / "a", tmp_path / "b"
    logs(a, FEW, head("a"))
    logs(b, [f"{float(loss) - 0.03:.2f}" for loss in FEW], head("b"))
    assert main(["compare", str(a), str(b)]) == 0
    assert f"note: different validation data ({'a' * 24}, {'b' * 24})" in capsys.readouterr().out
    main(["leaderboard", str(tmp_path)])
    assert "Losses of different validation data" in capsys.readouterr().out
    together = logs(tmp_path / "c", FEW[:3], head("a"))
    logs(together, FEW[3:], head("b"), "q")
    assert main(["ttest", str(together)]) == 3
    assert (
        "2 different validation data (val data hash): bbbbbbbbbbbb in q0, q1, q2, aaaaaaaaaaaa in r0"
        in capsys.readouterr().err
    )


def test_a_picture_of_the_first_part_of_a_folder(tmp_path, capsys):
    """--plot with --group-by: the part that is judged first, and its losses."""
    rule = "\n" + "=" * 100 + "\n"
    logs(tmp_path / "s", ["2.911", "2.912", "2.913"], f"lr = 1{rule}", "a")
    logs(tmp_path / "s", ["2.931", "2.932", "2.933", "2.934"], f"lr = 2{rule}", "b")
    picture = tmp_path / "out.svg"
    main(["ttest", str(tmp_path / "s"), "--group-by", "code", "--plot", str(picture), "--no-sensitivity"])
    assert "s [code 1: " in capsys.readouterr().out
    told = picture.read_text()
    assert told.count("<circle") == 3 and "s [code 1: " in told


def test_a_picture_where_a_series_of_the_same_name_cannot_be_judged(tmp_path, capsys):
    logs(tmp_path / "one" / "s", ["2.911", "nan"])
    logs(tmp_path / "two" / "s", ["2.911", "2.912", "2.913"])
    picture = tmp_path / "out.svg"
    assert main(["ttest", str(tmp_path), "--plot", str(picture), "--no-sensitivity"]) == 3
    assert "a run that diverged" in capsys.readouterr().err
    assert picture.read_text().count("<circle") == 3
