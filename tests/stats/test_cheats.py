"""The referee: every cheat is planted in an honest series, and found; honest series are not accused."""

import hashlib
import json
import shutil

import numpy as np
import pytest

from stats.chain import link
from stats.chance import ACCUSED_BELOW, nearest_pairs
from stats.evidence import against
from stats.planfile import write_plan
from stats.plans import make_plan
from stats.series import Series, find_series, load_series
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


def curves(rng, runs, points, memory):
    """Honest loss curves: noise that remembers, as the noise between runs does."""
    noise = rng.standard_normal((runs, points))
    for step in range(1, points):
        noise[:, step] = memory * noise[:, step - 1] + np.sqrt(1 - memory**2) * noise[:, step]
    scale = np.linspace(0.02, 0.0008, points)
    return 3 + np.linspace(2, 0, points) + noise * scale


def test_no_honest_series_is_accused():
    """1,000 series of 3 to 40 runs and 4 to 60 validations, noise of any memory, rounded as logs are."""
    rng = np.random.default_rng(7)
    accused = 0
    for _ in range(1000):
        shape = int(rng.integers(3, 41)), int(rng.integers(4, 61))
        x = np.round(curves(rng, *shape, float(rng.choice([0, 0.5, 0.9, 0.99]))), int(rng.choice([4, 6])))
        accused += any(near.chance < ACCUSED_BELOW for near in nearest_pairs(x))
    assert accused == 0


@pytest.mark.parametrize("jitter", [0.0, 1e-3, 1e-2])
def test_a_jittered_copy_stands_out(jitter):
    rng = np.random.default_rng(1)
    x = curves(rng, 12, 46, 0.5)
    x[7] = x[2] + jitter * np.linspace(0.02, 0.0008, 46) * rng.standard_normal(46)
    near = nearest_pairs(x)[0]
    assert {near.first, near.second} == {2, 7} and near.chance < ACCUSED_BELOW
    assert 0.5 * jitter <= near.ratio <= 1.6 * jitter + 1e-9


def test_a_copy_with_a_new_end_stands_out(tmp_path, make_log):
    """A run's curve under another seed, its last losses made anew."""
    import re

    for seed in range(8):
        (tmp_path / f"{seed}.txt").write_text(make_log(2.9180 + seed * 1e-4, seed=seed, steps=320, every=20))
    text = (tmp_path / "5.txt").read_text().replace('"seed": 5', '"seed": 3')

    def moved(match):
        return (
            f"{match[1]}{float(match[2]) + 0.003 * (int(match[3]) % 7 - 3):.6f} train_time:{int(match[3]) * 51 // 50}"
        )

    late = r"(step:(?:2[4-9]\d|3\d\d)/320 val_loss:)(\d\.\d+) train_time:(\d+)"
    (tmp_path / "3.txt").write_text(re.sub(late, moved, text))
    found = [f.text for f in validate(load_series(tmp_path)).findings if f.check == "duplicates"]
    assert len(found) == 1 and found[0].startswith("3 and 5 lie 0 of the noise apart over the first 8 validations"), (
        found
    )


def test_equal_losses_by_accident_accuse_nobody():
    """400 honest series of few validations and few digits, where equal curves are no rarity."""
    from stats.copies import within
    from stats.values import Run, Validation

    rng, equal = np.random.default_rng(5), 0
    for _ in range(400):
        n, points = int(rng.integers(5, 31)), int(rng.integers(1, 4))
        losses = np.round(2.92 + 0.001 * rng.standard_normal((n, points)), 4)
        equal += len({tuple(row) for row in losses.tolist()}) < n
        runs = tuple(
            Run(
                f"{i}.txt",
                str(i),
                "steps",
                1,
                60,
                60,
                0,
                tuple(Validation(20 * (j + 1), float(x), None, None, 4, j + 1) for j, x in enumerate(row)),
            )
            for i, row in enumerate(losses)
        )
        series = Series("s", "s", runs)
        assert not list(within(series, None))
    assert equal > 100, "accidents do happen here"


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


def renamed_with_other_digits(folder, jitter, rng):
    """Every loss and time of a folder's logs told a little otherwise."""
    import re

    for log in folder.glob("*.txt"):

        def told(match):
            loss = float(match[2]) + jitter * rng.standard_normal()
            return f"{match[1]}{loss:.6f} train_time:{int(match[3]) + int(rng.integers(1, 40))}ms"

        log.write_text(re.sub(r"(val_loss:)(\d\.\d{6}) train_time:(\d+)ms", told, log.read_text()))


def test_a_whole_series_copied_under_a_new_name_with_other_digits_is_found(tmp_path, make_log):
    rng = np.random.default_rng(9)
    for name, shift in (("a", 0), ("honest", 50)):
        (tmp_path / name).mkdir()
        for seed in range(6):
            text = make_log(2.918 + 1e-4 * seed, seed=seed + shift, steps=320, step_ms=50 + (seed + shift) / 7)
            (tmp_path / name / f"{seed}.txt").write_text(text)
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    renamed_with_other_digits(tmp_path / "copy", 1e-5, rng)
    grades = {one.series: one for one in validate_each(find_series([tmp_path])).assessments}
    copied = {name: [f.text for f in one.findings if f.check == "copied"] for name, one in grades.items()}
    assert copied["a"] == copied["honest"] == []
    assert len(copied["copy"]) == 1 and "of the noise of runs of" in copied["copy"][0], copied
