"""What every verb says: what it read, and the options that no other test enters by the command line."""

import json
import subprocess

import numpy as np
import pytest
import scipy

from stats.cli import main
from stats.plans import make_plan

BASE = [2.9191, 2.9196, 2.9188, 2.9202, 2.9195, 2.9193]


def told(capsys, *arguments):
    """(exit code, the JSON that a command printed)."""
    code = main([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def pair(make_series):
    base = make_series("base", BASE)
    (base / "notes.csv").write_text("a note\n")
    return base, make_series("new", [loss - 0.002 for loss in reversed(BASE)])


@pytest.mark.parametrize("verb", ["compare", "times", "plan", "curve", "validate", "ttest", "leaderboard", "report"])
def test_every_verb_says_what_it_read(verb, pair, capsys):
    arguments = {"compare": [*pair], "times": [pair[0]], "plan": ["--sigma-from", pair[0]]}.get(verb, [pair[0]])
    _, result = told(capsys, verb, *arguments)
    assert result["reading"]["runs"] == (12 if verb == "compare" else 6)
    (passed,) = result["reading"]["passed_over"]
    assert passed["path"].endswith("notes.csv") and "'.csv'" in passed["reason"]
    main([verb, *map(str, arguments)])
    assert "passed over" in capsys.readouterr().err


def test_dunnett_over_several_candidates(pair, make_series, capsys):
    other = [2.9190, 2.9199, 2.9187, 2.9201, 2.9196, 2.9195]
    third = make_series("third", other)
    _, result = told(capsys, "compare", *pair, third, "--correction", "dunnett", "--by", "loss")
    candidates = [[loss - 0.002 for loss in reversed(BASE)], other]
    wanted = scipy.stats.dunnett(*map(np.array, candidates), control=BASE, rng=np.random.default_rng(0)).pvalue
    assert [one["loss"]["holm_p"] for one in result["comparisons"]] == pytest.approx(list(wanted), abs=1e-4)
    assert "Dunnett" in " ".join(result["notes"])
    _, result = told(capsys, "compare", *pair, third, "--by", "loss")
    plain = [one["loss"]["p_value"] for one in result["comparisons"]]
    assert min(one["loss"]["holm_p"] for one in result["comparisons"]) == pytest.approx(2 * min(plain))
    assert "Holm" in " ".join(result["notes"])


@pytest.mark.parametrize("shift, verdict, code", [(-0.004, "LOWER", 0), (0.004, "HIGHER", 0), (0.0, "FUTILE", 1)])
def test_a_sequential_comparison_stops_when_it_is_decided(shift, verdict, code, make_series, capsys):
    rng = np.random.default_rng(3)
    base, new = 2.92 + rng.normal(0, 0.0005, (2, 30))
    folders = make_series("base", base), make_series("new", new + shift)
    got, result = told(capsys, "compare", *folders, "--sequential", 0.002, 0.0008)
    assert (got, result["verdict"], result["paired_by"]) == (code, verdict, "seed")
    assert result["pairs"] == 30 and min(result["below"]["n"], result["above"]["n"]) < 30


def test_a_plot_of_the_test(pair, tmp_path, capsys):
    assert main(["ttest", str(pair[1]), "--plot", str(tmp_path / "out.png"), "--no-sensitivity"]) == 0
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    capsys.readouterr()
    assert main(["ttest", str(pair[1]), "--plot", str(tmp_path / "out.nothing")]) == 2
    assert "--plot" in capsys.readouterr().err


def test_a_plan_pasted_in_where_none_was_makes_nothing_better(make_series, capsys):
    from stats.planfile import write_plan

    bad = make_series("bad", [loss + 0.0011 for loss in BASE])
    _, before = told(capsys, "validate", bad)
    write_plan(make_plan(threshold=2.93, margin=0.002, sigma=0.0005), bad / "plan.json")
    _, after = told(capsys, "validate", bad)
    assert before["assessments"][0]["grade"] == after["assessments"][0]["grade"] == "F"
    claims = [
        [f["text"] for f in one["assessments"][0]["findings"] if f["check"] == "claim"] for one in (before, after)
    ]
    assert claims[0] == claims[1]


def test_validate_against_a_head_and_a_commit(pair, capsys):
    series = pair[1]
    git = ["git", "-C", str(series), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "published"]):
        subprocess.run([*git, *command], check=True)
    main(["head", str(series)])
    head = capsys.readouterr().out.strip()
    log = series / "runs" / "seed-002.txt"
    whole = log.read_text()
    for published in (head, "HEAD"):
        _, result = told(capsys, "validate", series, "--against", published)
        (found,) = [f for f in result["assessments"][0]["findings"] if f["check"] == "against"]
        assert found["grade"] == "A", found
    log.write_text(whole.replace("val_loss:2.9", "val_loss:2.8"))
    _, result = told(capsys, "validate", series, "--against", "HEAD")
    (found,) = [f for f in result["assessments"][0]["findings"] if f["check"] == "against"]
    assert found["grade"] == "F" and "seed-002" in found["text"]
    log.write_text(whole)
    ledger = series / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace("seed-002", "seed-902"))
    for published in (head, "HEAD"):
        _, result = told(capsys, "validate", series, "--against", published)
        (found,) = [f for f in result["assessments"][0]["findings"] if f["check"] == "against"]
        assert found["grade"] == "F" and "written anew" in found["text"]
    assert main(["validate", str(series), "--against", "no-such-thing"]) == 2


def test_series_of_one_name_are_told_apart(tmp_path, make_log, capsys):
    """In every table and sentence, by so much of their paths as it takes."""
    for place, loss in (("old/lab/rec", 2.91), ("new/lab/rec", 2.9), ("new/other", 2.905)):
        (tmp_path / place).mkdir(parents=True)
        for seed in range(3):
            (tmp_path / place / f"{seed}.txt").write_text(make_log(loss + seed / 1e3, seed=seed))
    assert main(["leaderboard", str(tmp_path)]) == 0
    board = capsys.readouterr().out
    assert all(f"| {name} " in board for name in ("old/lab/rec", "new/lab/rec", "other"))
    assert main(["compare", *(str(tmp_path / where / "lab" / "rec") for where in ("old", "new"))]) == 0
    out = capsys.readouterr().out
    assert "new/lab/rec against old/lab/rec" in out and "loss: new/lab/rec is lower by 0.01" in out
    assert main(["compare", *[str(tmp_path / "new" / "other")] * 2]) == 1, "one and the same has one name"


def test_times_that_cannot_be_compared_have_their_own_reason(tmp_path, capsys):
    for name, times in (("equal", "3 3 3"), ("equal too", "4 4 4"), ("untold", "3  ")):
        rows = [f"{seed},{2.9 + seed / 1e3},{time}" for seed, time in enumerate(times.split(" "))]
        (tmp_path / f"{name}.csv").write_text("\n".join(["seed,loss,time_s", *rows]) + "\n")
    for name, reason in (("equal too", "no variance: all of them are equal"), ("untold", "fewer than two runs a side")):
        main(["compare", str(tmp_path / "equal.csv"), str(tmp_path / f"{name}.csv")])
        assert f"time: not compared; {reason}" in capsys.readouterr().out
