"""The referee: every cheat is planted in an honest series, and found; honest series are not accused."""

import hashlib
import json
import shutil

import pytest

from stats.chain import link
from stats.evidence import against
from stats.planfile import write_plan
from stats.plans import make_plan
from stats.series import find_series, load_series
from stats.validate import GRADES, validate, validate_each


def log_of(folder, seed):
    return folder / "runs" / f"seed-{seed:03d}.txt"


def edit(path, old, new, count=-1):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, count))


def lines(folder):
    return (folder / "ledger.jsonl").read_text().splitlines(keepends=True)


def add(folder, *events):
    """Append events as the real ledger does, linked."""
    for event in events:
        data = (folder / "ledger.jsonl").read_bytes()
        (folder / "ledger.jsonl").write_bytes(data + json.dumps(event | {"before": link(data)}).encode() + b"\n")


def cancel_after_finish(folder):
    add(folder, {"event": "cancel", "run": "seed-003", "reason": "not needed"})


def relaunch_after_finish(folder):
    add(folder, {"event": "launch", "run": "seed-003", "seed": 3, "attempt": 2})
    add(folder, {"event": "end", "run": "seed-003", "attempt": 2, "status": "finished", "exit_code": 0})


def drop_after_finish(folder):
    add(folder, {"event": "drop", "run": "seed-003", "reason": "another job on the machine"})


def set_the_finished_run_aside(folder):
    (folder / "attempts").mkdir()
    shutil.copy(log_of(folder, 3), folder / "attempts" / "seed-003.1.txt")


def edit_a_loss(folder):
    final = json.loads(log_of(folder, 3).with_suffix(".json").read_text())["validation"][-1]["loss"]
    edit(log_of(folder, 3), f"val_loss:{final:.6f}", "val_loss:2.917000")


def edit_loss_and_json(folder):
    edit_a_loss(folder)
    beside = log_of(folder, 3).with_suffix(".json")
    told = json.loads(beside.read_text())
    told["validation"][-1]["loss"] = 2.917
    beside.write_text(json.dumps(told))


def delete_a_run(folder):
    log_of(folder, 3).unlink()
    log_of(folder, 3).with_suffix(".json").unlink()
    kept = [line for line in lines(folder) if '"seed-003"' not in line]
    (folder / "ledger.jsonl").write_text("".join(kept))


def call_a_run_crashed(folder):
    kept = [
        line.replace('"finished"', '"crashed"') if '"seed-003"' in line and '"end"' in line else line
        for line in lines(folder)
    ]
    (folder / "ledger.jsonl").write_text("".join(kept))


def raise_the_threshold(folder):
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"threshold": 2.93}))


def write_the_plan_afterwards(folder):
    write_plan(make_plan(margin=0.0005, sigma=0.0006), folder / "plan.json", overwrite=True)


def move_the_stop_step(folder):
    record = json.loads((folder / "record.json").read_text())
    (folder / "record.json").write_text(json.dumps(record | {"stop_step": 40}))


def reorder_the_ledger(folder):
    told = lines(folder)
    told[1:3], told[3:5] = told[3:5], told[1:3]
    (folder / "ledger.jsonl").write_text("".join(told))


def other_validation_data(folder):
    edit(log_of(folder, 3), "config_hash:", "val_data_hash:" + "e" * 64 + "\nconfig_hash:", 1)


def copy_with_another_seed(folder):
    text = log_of(folder, 5).read_text().replace('"seed": 5', '"seed": 3')
    log_of(folder, 3).write_text(text)


def another_configuration(folder):
    edit(log_of(folder, 3), '"preset": "nano"', '"preset": "nano", "muon_lr": 0.5')


def impossible_time(folder):
    log = log_of(folder, 3)
    last = next(line for line in log.read_text().splitlines() if line.startswith("step:60/60 val_loss"))
    told = last.split("train_time:")[1].split("ms")[0]
    edit(log, f"train_time:{told}ms", f"train_time:{int(told) // 2}ms")


def fewer_steps(folder):
    log = log_of(folder, 3)
    log.write_text(log.read_text().replace("/60 ", "/40 "))


def repeated_seed(folder):
    edit(log_of(folder, 3), '"seed": 3', '"seed": 5')


CHEATS = {
    cancel_after_finish: "order",
    relaunch_after_finish: "order",
    drop_after_finish: "order",
    set_the_finished_run_aside: "order",
    edit_a_loss: "seals",
    edit_loss_and_json: "seals",
    delete_a_run: "chain",
    call_a_run_crashed: "chain",
    raise_the_threshold: "begin",
    write_the_plan_afterwards: "begin",
    move_the_stop_step: "begin",
    reorder_the_ledger: "chain",
    other_validation_data: "logs",
    copy_with_another_seed: "duplicates",
    another_configuration: "logs",
    impossible_time: "logs",  # a clock that runs backwards makes the log a damaged one
    fewer_steps: "logs",
    repeated_seed: "seeds",
}


@pytest.fixture
def series(honest, tmp_path):
    return shutil.copytree(honest, tmp_path / "s")


def test_the_honest_series_is_an_a(honest):
    result = validate(load_series(honest))
    assert result.grade == "A", [finding for finding in result.findings if finding.grade != "A"]


@pytest.mark.parametrize("cheat", CHEATS, ids=lambda cheat: cheat.__name__)
def test_a_planted_cheat_is_found(cheat, series):
    cheat(series)
    result = validate(load_series(series))
    found = {finding.check for finding in result.findings if GRADES.index(finding.grade) >= GRADES.index("C")}
    assert CHEATS[cheat] in found, result.findings
    assert GRADES.index(result.grade) >= GRADES.index("C")


def test_a_series_under_a_new_name(honest, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(honest, tmp_path / name)
    grades = {one.series: one for one in validate_each(find_series([tmp_path])).assessments}
    assert grades["a"].grade == "A" and grades["b"].grade == "F"
    assert any(f.check == "copied" and "8 runs" in f.text for f in grades["b"].findings)


def test_a_ledger_written_anew_is_seen_only_against_a_published_head(honest, series):
    head = link((honest / "ledger.jsonl").read_bytes())
    events = [json.loads(line) for line in lines(series) if '"seed-007"' not in line]
    log_of(series, 7).unlink()
    log_of(series, 7).with_suffix(".json").unlink()
    (series / "ledger.jsonl").write_text("")
    add(series, *({key: value for key, value in event.items() if key != "before"} for event in events))
    alone = validate(load_series(series))
    assert not [f for f in alone.findings if f.check == "chain" and f.grade != "A"], "a chain written anew holds"
    seen = against(load_series(series), head)
    assert seen.grade == "F" and "written anew" in seen.text
    assert against(load_series(honest), head).grade == "A"
    early = hashlib.sha256("".join(lines(honest)[:1]).encode()).hexdigest()
    assert against(load_series(honest), early[:16]).grade == "A", "a head of the first line still holds"


@pytest.mark.parametrize("kind", ["no time", "too quick"])
def test_a_clock_that_was_moved_between_two_validations(kind, tmp_path, make_log):
    for seed in range(5):
        text = make_log(2.9180 + seed * 1e-4, seed=seed, steps=100, step_ms=50 + seed / 10)
        if seed == 3:  # from step 60 on everything came sooner
            cut = 1015 if kind == "no time" else 700
            for step in (60, 80, 100):
                old = f"{step * 50.3:.0f}ms step_avg:{50.3:.2f}"
                new = step * 50.3 - cut
                text = text.replace(f"train_time:{old}", f"train_time:{new:.0f}ms step_avg:{new / step:.2f}")
        (tmp_path / f"{seed}.txt").write_text(text)
    series = load_series(tmp_path)
    found = [f.text for f in validate(series, allow_mixed=True).findings if f.check in ("clocks", "logs")]
    wanted = {"no time": "runs backwards", "too quick": "from step 40 to 60, the next took"}[kind]
    assert any(wanted in text for text in found), found
