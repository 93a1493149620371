"""Two recipes against each other, and two models graded blind: the same numbers as stats gives."""

import json
import subprocess
import sys

import pytest
import torch
from lab_studio.studio_tools import series

from lab.checkpoints import Checkpoint
from lab.models import build_model
from lab.studio.blind import Session, in_words, judged, keep, session
from lab.studio.duel import mean_curves, sides, verdict
from lab.studio.places import REPO, Refused
from lab.tokens import CharTokenizer
from stats.errors import DataError

A, B = [2.9, 2.95, 2.91, 2.93], [2.5, 2.52, 2.56]


def recipe(folder, losses, model, data="d", status="finished"):
    """A series whose runs tell their configuration, as lab.train writes it."""
    made = series(folder, losses)
    for seed, loss in enumerate(losses):
        told = {
            "status": status,
            "final_loss": loss,
            "config": {"model": model, "data": "names", "steps": 4},
            "config_hash": model,
            "data_hash": data,
        }
        (made / "runs" / f"seed-{seed:03d}.json").write_text(json.dumps(told))
    return made


def test_runs_of_one_configuration_are_one_side_wherever_they_lie(tmp_path):
    folders = [recipe(tmp_path / "a1", A[:3], "mlp"), recipe(tmp_path / "a2", A[3:], "mlp"), series(tmp_path / "x", A)]
    folders += [recipe(tmp_path / "b", B, "gpt"), recipe(tmp_path / "half", B, "wavenet", status="interrupted")]
    found = sides(folders)
    assert [(side.key, len(side.runs)) for side in found] == [("mlp-d", 4), ("gpt-d", 3)]
    assert found[0].label == "mlp on names · 4 steps · 4 runs", "nothing told its parameters"


def test_recipes_that_would_read_alike_are_told_apart(tmp_path):
    made = [recipe(tmp_path / name, B, name) for name in ("x", "y")]
    for folder, rate in zip(made, (0.1, 0.3)):
        for path in folder.glob("runs/*.json"):
            told = json.loads(path.read_text())
            told["config"] |= {"model": "mlp", "learning_rate": rate, "seed": 3, "fields": {"hidden_dim": 8}}
            path.write_text(json.dumps(told))
    told = [side.label.partition("mlp on names")[0] for side in sides(made)]
    assert told == ["learning rate 0.1: ", "learning rate 0.3: "]
    same = [recipe(tmp_path / "z" / data, B, "gpt", data) for data in ("one text", "another")]
    assert len({side.label for side in sides(same)}) == 2


def test_runs_of_the_trainer_are_named_by_their_series_and_read_as_their_preset(tmp_path):
    """A variant keeps its preset's name in its configuration; its series' name is not what it was trained on."""
    made = [recipe(tmp_path / name, B, name) for name in ("nano", "nano-window", "again", "third")]
    for folder in made:
        for path in folder.glob("runs/*.json"):
            told = json.loads(path.read_text())
            told["config"] = {"preset": "nano", "train_files": "embedded", "num_iterations": 700}
            told["config_hash"] = "plain" if folder.name == "nano" else "window"
            path.write_text(json.dumps(told))
    plain, window, several = sides(made[:1])[0], sides(made[1:2])[0], sides(made[1:])[0]
    assert plain.label == "nano on embedded · 700 steps · 3 runs"
    assert window.label == "nano-window: nano on embedded · 700 steps · 3 runs"
    assert several.label.startswith("nano-window, again and 1 more: nano on embedded · ")


def test_the_verdict_is_that_of_stats_compare(tmp_path):
    folders = [recipe(tmp_path / name, losses, name) for name, losses in (("mlp", A), ("gpt", B))]
    first, second = sides(folders)
    one = verdict(first, second).comparisons[0]
    words = [sys.executable, "-m", "stats", "compare", *map(str, folders), "--json"]
    told = json.loads(subprocess.run(words, capture_output=True, text=True, cwd=REPO).stdout)
    theirs = told["comparisons"][0]["loss"]
    assert (one.loss.estimate, one.loss.low, one.loss.high) == (theirs["estimate"], theirs["low"], theirs["high"])
    assert one.loss.estimate == pytest.approx(sum(B) / 3 - sum(A) / 4)
    rows = mean_curves(first, second)
    assert [row for row in rows if row[2] == "B"][-1] == (4, pytest.approx(sum(B) / 3), "B")


def test_losses_that_do_not_compare_are_refused(tmp_path):
    same, other, single = (
        sides([recipe(tmp_path / name, losses, name, data)])[0]
        for name, losses, data in (("mlp", A, "d"), ("gpt", B, "another text"), ("one", B[:1], "d"))
    )
    with pytest.raises(Refused, match="different texts"):
        verdict(same, other)
    with pytest.raises(Refused, match="same recipe"):
        verdict(same, same)
    with pytest.raises(DataError):
        verdict(same, single)


def graded(first: list[int], second: list[int]) -> Session:
    stories = [(0, "a")] * len(first) + [(1, "b")] * len(second)
    made = Session(("mlp", "gpt"), "", stories)
    for value in [*first, *second]:
        made.grade(value)
    return made


def test_grades_are_judged_by_stats():
    """Welch's interval, worked out by scipy here."""
    from scipy import stats as scipy_stats

    first, second = [2, 3, 2, 1, 2, 3], [4, 5, 4, 4, 3, 5]
    done = graded(first, second)
    words = in_words(done, judged(done))
    test = scipy_stats.ttest_ind(second, first, equal_var=False)
    interval = test.confidence_interval(0.95)
    assert f"{interval.low:+.2f} to {interval.high:+.2f} points, p = {test.pvalue:.3g}" in words
    assert "gpt is graded higher" in words and "mlp: 2.17 on average, gpt: 4.17" in words
    turned = graded(second, first)
    assert "mlp is graded higher" in in_words(turned, judged(turned))
    unsure = graded([3, 4, 2], [3, 2, 5])
    assert "no evidence of a difference" in in_words(unsure, judged(unsure))
    with pytest.raises(DataError):
        judged(graded([3, 3, 3], [3, 3, 3]))


def test_a_session_hides_whose_story_it_is_and_takes_grades_one_by_one(tmp_path):
    letters = CharTokenizer("ab")
    pair = []
    for letter in (1, 2):  # one model writes a, the other b
        model = build_model("bigram", letters.vocab_size)
        with torch.no_grad():
            model.table.weight.fill_(-9.0)
            model.table.weight[:, letter], model.table.weight[letter, 0] = 9.0, 8.0
        pair.append(Checkpoint(tmp_path, "bigram", 1, model.eval(), letters, {}))
    made = session(tuple(pair), ("one", "two"), "", 5, seed=3)
    whose = [which for which, _ in made.stories]
    assert sorted(whose) == [0] * 5 + [1] * 5 and whose != sorted(whose)
    assert all(("a" in text) == (which == 0) for which, text in made.stories)
    alike = session((pair[0], pair[0]), ("one", "two"), "", 3, seed=3).stories
    texts = [[text for whose, text in alike if whose == which] for which in (0, 1)]
    assert sorted(texts[0]) != sorted(texts[1]), "the same random numbers would give both the same stories"
    for number in range(10):
        with pytest.raises(Refused, match="choose a grade"):
            made.grade(None)
        assert made.current == made.stories[number][1]
        made.grade(1 + 3 * made.stories[number][0])
    assert made.current is None and made.of(1) == [4] * 5
    with pytest.raises(Refused, match="every story"):
        made.grade(3)
    kept = json.loads(keep(made, tmp_path / "grades").read_text())
    assert {(row["model"], row["grade"]) for row in kept["stories"]} == {("one", 1), ("two", 4)}
    with pytest.raises(Refused, match="at most 4,000"):
        session(tuple(pair), ("one", "two"), "a" * 4001, 3, seed=0)
    with pytest.raises(Refused, match="from 3 to 20"):
        session(tuple(pair), ("one", "two"), "", 2, seed=0)
