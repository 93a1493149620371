"""Studies: refused before the first run or carried to their end, killed or not; a crash is a result."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from records import evidence, study
from records.agreement import pairing
from records.study_plan import AGAIN, BASE, StudyError, check_against, load_trainer, read_plan

REPO = Path(__file__).resolve().parents[2]
TRAINER = Path(__file__).with_name("fake_study_trainer.py")
TEXT = """
preset = "nano"
flags = { num_iterations = 4, noise = 0.01, jitter = 0.001 }
[design]
looks = [4, 6]
margin = 0.01
[treatments.better]
flags = { loss = 0.6 }
published = "-100 steps"
[treatments.worse]
flags = { loss = 0.8 }
"""


def write(folder, text=TEXT, name="small"):
    path = folder / f"{name}.toml"
    path.write_text(text)
    return path


def run(folder, path, *more):
    return study.main([str(path), "--root", str(folder / "out"), "--trainer", str(TRAINER), *more])


def results(folder, name="small"):
    record = json.loads((folder / "out" / name / "study.json").read_text())
    return {row["treatment"]: row for row in record["results"]["treatments"]}


def told(folder):
    """What does not depend on the clock: the verdicts, and the columns of the table that hold losses."""
    keys = ("estimate", "family_low", "family_high", "verdict", "launched", "correlation")
    lines = (folder / "out" / "small" / "README.md").read_text().splitlines()
    table = [line.split("|")[1:5] for line in lines if line.startswith("|")]
    return {arm: {key: row[key] for key in keys} for arm, row in results(folder).items()}, table


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that nobody interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, write(folder), "--parallel", "2") == 0
    return folder


def test_logs_leave_their_source_in_one_place(whole):
    folder = whole / "out" / "small"
    logs = sorted((folder / "runs").glob("*/*.txt"))
    heads = {log.read_text().partition("\n")[0] for log in logs}
    assert len(logs) >= 12 and len(heads) == 1
    (head,) = heads
    assert head.startswith("source sha256:") and (folder / head.rpartition(" ")[2]).is_file()
    ends = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines() if '"end"' in line]
    assert all(end["sealed"].keys() == {"log", "json"} for end in ends)


def test_verdicts_table_and_picture(whole):
    found = results(whole)
    assert {arm: row["verdict"] for arm, row in found.items()} == {
        "better": "helps",
        "worse": "hurts",
        AGAIN: found[AGAIN]["verdict"],
    }
    assert found[AGAIN]["verdict"] in ("no effect", "undecided")
    assert found["better"]["estimate"] == pytest.approx(-0.1, abs=0.004)
    assert found["better"]["launched"] == 4  # decided at the first look: no further pairs
    assert found["better"]["variance_ratio"] < 0.5 < found[AGAIN]["variance_ratio"]
    page = (whole / "out" / "small" / "README.md").read_text()
    assert f"| better | 4 | {found['better']['estimate']:+.4f} |" in page and "-100 steps" in page
    assert (whole / "out" / "small" / "effects.png").read_bytes()[:4] == b"\x89PNG"
    logs = sorted(p.name for p in (whole / "out" / "small" / "runs" / BASE).glob("*.txt"))
    assert logs[0] == "seed-000.txt" and len(logs) in (4, 6)


def test_the_same_command_again_runs_nothing(whole):
    before = (whole / "out" / "small" / "ledger.jsonl").read_text()
    assert run(whole, whole / "small.toml") == 0
    assert (whole / "out" / "small" / "ledger.jsonl").read_text() == before


def test_killed_twice_it_ends_as_if_it_had_not_been(whole, tmp_path):
    text = TEXT.replace("jitter = 0.001", "jitter = 0.001, step_s = 0.03, checkpoint_every = 1")
    path = write(tmp_path, text)
    command = [sys.executable, "-m", "records.study", str(path), "--root", str(tmp_path / "out")]
    command += ["--trainer", str(TRAINER)]
    for number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command, cwd=REPO, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ledger = tmp_path / "out" / "small" / "ledger.jsonl"
        ended = ledger.read_text().count('"event": "end"') if ledger.exists() else 0
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if ledger.exists() and ledger.read_text().count('"event": "end"') >= ended + 3:
                break
            time.sleep(0.02)
        os.kill(process.pid, number)
        process.wait(timeout=30)
    assert run(tmp_path, path) == 0
    assert told(tmp_path) == told(whole)


def test_a_crash_is_a_result(tmp_path):
    text = TEXT + '[treatments.fragile]\nflags = { crash_seeds = "0:2:3" }\n'
    assert run(tmp_path, write(tmp_path, text), "--parallel", "2") == 0
    assert results(tmp_path)["fragile"]["verdict"] == "diverged"
    assert "diverged 3 of 4" in (tmp_path / "out" / "small" / "README.md").read_text()


def test_a_base_that_fails_ends_the_study(tmp_path, capsys):
    text = TEXT.replace("noise = 0.01", 'noise = 0.01, crash_seeds = "1"')
    assert run(tmp_path, write(tmp_path, text)) == 6
    assert "base/seed-001 failed" in capsys.readouterr().err


def test_the_budget_ends_it_and_more_of_it_goes_on(tmp_path):
    text = TEXT.replace("margin = 0.01", "margin = 0.01\nminutes = 0.0001")
    path = write(tmp_path, text)
    assert run(tmp_path, path) == 4
    assert len(list((tmp_path / "out/small/runs").glob("*/*.txt"))) < 6
    write(tmp_path)
    assert run(tmp_path, path) == 0
    assert results(tmp_path)["better"]["verdict"] == "helps"


@pytest.mark.parametrize(
    "old, new, said",
    [
        ("loss = 0.6", "los = 0.6", "better: unknown argument --los; did you mean"),
        ("loss = 0.6", "loss = 0.7", "better is the same configuration as base"),
        ("loss = 0.6", "loss = 0.8", "worse is the same configuration as better"),
        ("loss = 0.6", "seed = 3", "seed is set by the study"),
        ("loss = 0.6", "loss = [1]", "no text, number or flag"),
        ("looks = [4, 6]", "looks = [6, 4]", "growing numbers"),
        ("looks = [4, 6]", "look = [4, 6]", "unknown look"),
        ("margin = 0.01", "margin = -1", "margin -1"),
        ("margin = 0.01", "margin = 0.01\nendpoint = 0", "endpoint 0"),
        ("margin = 0.01", "margin = 0.01\nfirst_seed = 1000", "first_seed 1000 is from 0 to 999"),
        ('preset = "nano"', "", "missing: preset"),
        ("[treatments.better]", "[treatments.base]", "neither base nor base-again"),
        ("[design]", "[design", "not TOML"),
    ],
)
def test_refused_before_the_first_run(tmp_path, capsys, old, new, said):
    assert run(tmp_path, write(tmp_path, TEXT.replace(old, new, 1))) == 2
    assert said in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*/runs/*/*"))


def test_a_study_keeps_its_plan(whole, capsys):
    path = write(whole, TEXT.replace("looks = [4, 6]", "looks = [4, 8]"))
    assert run(whole, path) == 2
    assert "began with another looks" in capsys.readouterr().err
    write(whole)


def test_fresh_seeds_where_the_treatments_were_chosen_by_earlier_ones(tmp_path):
    path = write(tmp_path, TEXT.replace("margin = 0.01", "margin = 0.01\nfirst_seed = 40"))
    assert run(tmp_path, path, "--parallel", "2") == 0
    logs = {f"{log.parent.name}/{log.stem}" for log in (tmp_path / "out/small/runs").glob("*/*.txt")}
    assert {f"{arm}/seed-{seed:03d}" for arm in (BASE, "better") for seed in range(40, 44)} <= logs
    assert f"{AGAIN}/seed-1040" in logs and f"{BASE}/seed-000" not in logs
    assert results(tmp_path)["better"]["verdict"] == "helps"


def test_a_plan_without_fresh_seeds_is_sealed_as_before_there_were_any(tmp_path):
    assert "first_seed" not in read_plan(write(tmp_path)).sealed
    same = read_plan(write(tmp_path, TEXT.replace("margin = 0.01", "margin = 0.01\nfirst_seed = 0")))
    other = read_plan(write(tmp_path, TEXT.replace("margin = 0.01", "margin = 0.01\nfirst_seed = 1")))
    assert same.hash == read_plan(write(tmp_path)).hash != other.hash


def test_model_sizes_are_stated(tmp_path):
    """Held against the real trainer: what makes the model smaller says so, or is refused."""
    text = (
        'preset = "nano-plain"\nflags = { num_iterations = 5 }\n[design]\nlooks = [2]\nmargin = 0.1\n'
        "[treatments.one]\nflags = { second_input_embedding = false }\n"
    )
    trainer = load_trainer(REPO / "train_gpt.py")
    with pytest.raises(StudyError, match="one has 245,784 parameters, which it does not state"):
        check_against(read_plan(write(tmp_path, text)), trainer, study.IGNORED)
    sizes = check_against(read_plan(write(tmp_path, text + "parameters = 245784\n")), trainer, study.IGNORED)
    assert sizes == {BASE: 262168, AGAIN: 262168, "one": 245784}
    with pytest.raises(StudyError, match="states 7"):
        check_against(read_plan(write(tmp_path, text + "parameters = 7\n")), trainer, study.IGNORED)


def test_a_study_below_a_folder_of_series_is_passed_over_with_the_reason(whole):
    from stats.series import find_series, reading_of

    below = whole / "mixed"
    shutil.copytree(whole / "out" / "small", below / "studies" / "small")
    shutil.copytree(whole / "out" / "small" / "runs" / "better", below / "series")
    found = find_series([below])
    assert [one.name for one in found] == ["series"]
    assert any(entry.reason.startswith("a study") for entry in reading_of(found).passed_over)
    assert {one.name for one in find_series([below / "studies" / "small"])} >= {"base", "better"}  # named, it is read


def test_evidence_sets_effects_beside_claims(whole, tmp_path):
    shutil.copytree(whole / "out" / "small", tmp_path / "small")
    write(tmp_path, TEXT.replace('published = "-100 steps"', 'published = "-100 steps"\npublished_percent = -2'))
    write(tmp_path, TEXT, name="never-run")
    assert evidence.main(["--studies", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "## small" in text and "never-run" not in text
    assert "| helps | -100 steps |" in text and "| hurts |  |" in text
    assert "1 treatments were measured here" in text and "1 of those agree" in text and "a rank correlation" in text
    write(tmp_path, TEXT.replace('published = "-100 steps"', "published_percent = 2"))
    evidence.main(["--studies", str(tmp_path), "--out", str(tmp_path / "page.md")])
    assert "0 of those agree" in (tmp_path / "page.md").read_text()
    measured = tmp_path / "variance.json"
    rows = [{"treatment": "one", "sd within pairs": 0.001}]
    measured.write_text(json.dumps({"result": {"seeds": 8, "steps": 100, "rows": rows}}))
    words = ["--studies", str(tmp_path), "--out", str(tmp_path / "page.md"), "--variance", str(measured)]
    assert evidence.main(words) == 0
    assert "| one | 0.001 |" in (tmp_path / "page.md").read_text()
    measured.write_text("{}")
    assert evidence.main(words) == 2


def test_pairing_is_told_with_an_interval():
    """Equal seeds that make no difference, and some that do, of a known correlation."""
    import numpy as np

    from stats.paired import Design, judge

    drawn = np.random.default_rng(0)
    design = Design(looks=(40,), alpha=0.05, margin=0.01)

    def said(pairs, shared):
        base, other = drawn.normal(size=(2, pairs))
        return pairing([judge(base, shared * base + (1 - shared**2) ** 0.5 * other, design, final=True)])

    assert "it saves runs here" in said(40, 0.9)
    assert "it costs runs here" in said(40, -0.9)
    assert "do not tell" in said(6, 0.3)
    assert pairing([]) == ""
