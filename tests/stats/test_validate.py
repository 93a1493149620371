"""Grades: each kind of missing or contradicting evidence, and its reason."""

import json

import pytest

from stats.cli import main
from stats.plans import make_plan
from stats.series import load_series
from stats.validate import validate

GOOD = [2.9180 + 0.0001 * ((3 * i) % 7) for i in range(12)]
PLAN = make_plan(margin=0.0006, sigma=0.00063, cap=30)


def _grade(folder):
    result = validate(load_series(folder))
    return result.grade, {(finding.check, finding.grade): finding.text for finding in result.findings}


def test_complete_planned_series_is_an_a(make_series):
    grade, found = _grade(make_series("s", GOOD, plan=PLAN))
    assert grade == "A", found
    assert "12 launches of 12 runs" in found["launches", "A"]
    assert "ACCEPT" in found["claim", "A"]


def test_without_a_plan_b_and_without_a_ledger_c(make_series):
    grade, found = _grade(make_series("unplanned", GOOD))
    assert grade == "B" and "chosen after looking" in found["plan", "B"]
    grade, found = _grade(make_series("unledgered", GOOD, ledger=False, plan=PLAN))
    assert grade == "C" and "no ledger" in found["launches", "C"]


def test_not_significant_is_an_f(make_series):
    grade, found = _grade(make_series("s", [2.9196, 2.9204, 2.9199, 2.9206, 2.9193, 2.9201]))
    assert grade == "F" and "FAIL TO REJECT" in found["claim", "F"]


def test_a_series_that_claims_nothing_need_not_be_significant(make_series):
    losses = [2.9196, 2.9204, 2.9199, 2.9206, 2.9193, 2.9201]
    grade, _ = _grade(make_series("s", losses, record={"claim": "no effect"}))
    assert grade == "B"


def test_copied_run(make_series):
    folder = make_series("s", GOOD, plan=PLAN)
    (folder / "runs" / "seed-003.txt").write_text((folder / "runs" / "seed-005.txt").read_text())
    grade, found = _grade(folder)
    what = "every loss and every time and every training loss is equal"
    assert grade == "F" and found["duplicates", "F"] == f"seed-005 and seed-003 are the same run: {what}"


def test_same_seed_twice(make_series, make_log):
    folder = make_series("s", GOOD, plan=PLAN, sealed=False)
    log = folder / "runs" / "seed-003.txt"
    log.write_text(log.read_text().replace('"seed": 3', '"seed": 5'))
    (folder / "runs" / "seed-003.json").unlink()
    grade, found = _grade(folder)
    assert grade == "D" and "same seed, 5" in found["seeds", "C"]
    assert "seed-003: seed 5 in its log, 3 in the ledger" == found["steps", "D"]


def test_a_log_that_no_launch_accounts_for(make_series, make_log):
    folder = make_series("s", GOOD, plan=PLAN, sealed=False)
    (folder / "runs" / "seed-099.txt").write_text(make_log(2.9181, seed=99, plan_hash=PLAN.hash, step_ms=51))
    grade, found = _grade(folder)
    assert grade == "D" and "seed-099" in found["launches", "D"]


def test_dropped_and_crashed_runs_cost_a_grade_and_are_told(make_series):
    folder = make_series("s", GOOD, sealed=False)
    events = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    events[1] |= {"status": "crashed", "exit_code": 1}
    events[9] |= {"status": "crashed", "exit_code": 137}
    events.append({"event": "drop", "run": "seed-004", "reason": "another job on the machine"})
    (folder / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    result = validate(load_series(folder))
    texts = [finding.text for finding in result.findings if finding.check == "launches" and finding.grade == "B"]
    assert texts == ["seed-000 crashed and is not in the sample", "seed-004 was dropped: another job on the machine"]
    assert result.grade == "D"  # and the README still quotes the mean of all twelve
    events.append({"event": "drop", "run": "seed-005"})
    (folder / "ledger.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    assert validate(load_series(folder)).grade == "F"


def test_numbers_that_disagree_with_the_logs(make_series):
    folder = make_series("s", GOOD, plan=PLAN, sealed=False)
    readme = folder / "README.md"
    readme.write_text("mean 2.9100\n")
    grade, found = _grade(folder)
    assert grade == "D" and "does not say the mean loss of the logs" in found["README", "D"]
    truth = {"n": 12, "sample_mean": sum(GOOD) / 12, "p_value": 1e-9}
    readme.write_text(f"mean {sum(GOOD) / 12:.4f}\n\n```\n{truth}\n```\n")
    grade, found = _grade(folder)
    assert grade == "D" and "README.md disagrees with the logs: p_value 1e-09" in found["README", "D"]
    readme.unlink()
    grade, found = _grade(folder)
    assert grade == "C" and "no README" in found["README", "B"]
    (folder / "record.json").write_text(json.dumps({"threshold": 2.92, "results": {"ttest": truth | {"n": 19}}}))
    grade, found = _grade(folder)
    assert grade == "D" and "n 19, 12 from the logs" in found["record", "D"]


def test_readme_that_leaves_runs_out(make_series):
    folder = make_series("s", [2.9180 + 0.0002 * i for i in range(8)], plan=PLAN)
    lines = (folder / "README.md").read_text().splitlines(True)
    (folder / "README.md").write_text("".join(line for line in lines if not line.startswith("| 3 ")))
    values = [finding for finding in validate(load_series(folder)).findings if finding.check == "README"]
    assert any(f.grade == "C" and "leaves out 1 of 8 losses: [2.9186]" in f.text for f in values), values


def test_json_beside_a_log_that_disagrees(make_series):
    folder = make_series("s", GOOD, plan=PLAN, sealed=False)
    path = folder / "runs" / "seed-002.json"
    beside = json.loads(path.read_text())
    beside["validation"][-1]["loss"] -= 0.001
    path.write_text(json.dumps(beside))
    grade, found = _grade(folder)
    assert grade == "D" and "seed-002.json disagrees with the log: loss 2.917" in found["json", "D"]
    path.write_text(json.dumps(beside | {"seed": 77, "validation": []}))
    assert "seed 77, 2 in the log" in " ".join(f.text for f in validate(load_series(folder)).findings)


def test_plan_of_another_series(make_series):
    folder = make_series("s", GOOD, plan=PLAN, sealed=False)
    from stats.planfile import write_plan

    write_plan(make_plan(margin=0.0005, sigma=0.0006, cap=30), folder / "plan.json", overwrite=True)
    grade, found = _grade(folder)
    assert grade == "D" and "12 logs carry the hash of another plan" in found["plan", "D"]
    (folder / "plan.json").write_text("{}")
    assert _grade(folder)[0] == "D"


def test_kept_source_that_was_changed(make_series):
    from pathlib import Path

    folder = make_series("s", GOOD, plan=PLAN)
    digest = load_series(folder).runs[0].code_hash
    source = (folder / "runs" / "seed-000.txt").read_text().split("=" * 100)[0].rstrip("\n") + "\n"
    (folder / "source").mkdir()
    kept = Path(folder / "source" / f"{digest[:16]}.py")
    kept.write_text(source)
    grade, found = _grade(folder)
    assert grade == "A" and "is the program in the logs" in found["program", "A"]
    kept.write_text(source + "# changed\n")
    grade, found = _grade(folder)
    assert grade == "D" and "is not what its name and the logs say" in found["program", "D"]


def test_logs_of_another_program_than_the_series_records(make_series):
    from trainer.program import fingerprint

    folder = make_series("s", GOOD, plan=PLAN, sealed=False)
    files = {"train.py": "0" * 64, "kernels/a.py": "1" * 64}
    record = json.loads((folder / "record.json").read_text()) if (folder / "record.json").exists() else {}
    (folder / "record.json").write_text(json.dumps(record | {"identity": {"code": files}}))
    for log in (folder / "runs").glob("*.txt"):
        text = log.read_text()
        log.write_text(text.replace("config_hash:", f"program_hash:{fingerprint(files)}\nconfig_hash:", 1))
    assert "are those that the series was started with" in _grade(folder)[1]["program", "A"]
    (folder / "record.json").write_text(json.dumps(record | {"identity": {"code": files | {"b.py": "2" * 64}}}))
    grade, found = _grade(folder)
    assert grade == "D" and "in some logs are not those" in found["program", "D"]


def test_logs_of_other_ranks_have_to_agree(make_series):
    folder = make_series("s", GOOD, plan=PLAN)
    log = folder / "runs" / "seed-000.txt"
    other = folder / "runs" / "seed-000.rank1.txt"
    other.write_text(log.read_text())
    assert _grade(folder)[0] == "A"
    assert len(load_series(folder).runs) == 12
    other.write_text(log.read_text().replace("step:40/60 val_loss:4", "step:40/60 val_loss:5"))
    grade, found = _grade(folder)
    assert grade == "F" and "seed-000.rank1 tells other losses than seed-000" in found["ranks", "F"]


def test_different_hardware(make_series):
    folder = make_series("s", GOOD, plan=PLAN, sealed=False)
    log = folder / "runs" / "seed-001.txt"
    log.write_text(log.read_text().replace("Example CPU", "Another CPU"))
    grade, found = _grade(folder)
    assert grade == "C" and "different hardware: Another CPU, Example CPU" in found["machines", "C"]


def test_looks_without_a_plan(make_series):
    _, found = _grade(make_series("s", GOOD, record={"ledger": {"looks": 4}}))
    assert "looked at 4 times" in found["looks", "B"]


def test_damaged_log_is_an_f_not_an_exception(make_series):
    folder = make_series("s", GOOD)
    (folder / "runs" / "seed-001.txt").write_text("nothing\n")
    grade, found = _grade(folder)
    assert grade == "F" and "no validation in this run" in found["logs", "F"]


def test_public_shape_one_log_of_many(tmp_path, make_log):
    (tmp_path / "a.txt").write_text(make_log(2.9190))
    (tmp_path / "README.md").write_text("19 runs, mean 2.9190, p = 0.0004\n")
    grade, found = _grade(tmp_path)
    assert grade == "F" and "at least 2 losses; found 1" in found["logs", "F"]


@pytest.mark.parametrize("least, code", [("A", 1), ("B", 0), ("C", 0)])
def test_exit_code_follows_the_grade(make_series, capsys, least, code):
    folder = make_series("s", GOOD)
    assert main(["validate", str(folder), "--at-least", least]) == code
    assert "s: grade B (mean loss below 2.92 at alpha 0.01)" in capsys.readouterr().out
