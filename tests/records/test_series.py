"""A series is run, stopped, broken, continued and judged; the trainer is a fake with the real one's interface."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from records import launch, logs, report, series
from records.folder import EXIT_USAGE
from records.ledger import Ledger, LedgerError
from stats.series import load_series
from stats.validate import validate

FAKE = Path(__file__).with_name("fake_trainer.py")


@pytest.fixture
def run(tmp_path, capfd):
    """Call the series' command line in this process, without reports unless asked: (exit code, out, err)."""

    def call(*flags, judge=False, trainer=FAKE, repeats=3, name="s"):
        command = ["--root", str(tmp_path), "--trainer", str(trainer), "--preset=nano", "--name", name]
        command += ["--repeats", str(repeats), *([] if judge else ["--no-judge"]), *flags]
        code = series.main(command)
        out, err = capfd.readouterr()
        return code, out, err

    return call


def start(tmp_path, *flags, repeats=3, name="s", **more):
    """The same in a process of its own."""
    command = [sys.executable, "-m", "records.series", "--root", str(tmp_path), "--trainer", str(FAKE)]
    command += ["--preset=nano", "--name", name, "--repeats", str(repeats), "--no-judge", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=FAKE.parents[2], **pipes, **more)


def wait_for(condition, what, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.02)


def events(folder, kind=None, run=None):
    return [e for e in Ledger(folder).events() if kind in (None, e["event"]) and run in (None, e.get("run"))]


def statuses(folder):
    return {name: state.status for name, state in Ledger(folder).runs().items()}


def test_a_series_runs_reports_judges_and_repeats_nothing(run, tmp_path):
    folder = tmp_path / "s"
    code, out, _ = run(judge=True, repeats=4)
    assert code == 0, out
    assert "REJECT H0" in out and "seed-003 finished" in out
    assert set(statuses(folder).values()) == {"finished"}
    record = json.loads((folder / "record.json").read_text())
    losses = [json.loads(p.read_text())["final_loss"] for p in sorted((folder / "runs").glob("*.json"))]
    assert record["results"]["loss"]["mean"] == pytest.approx(sum(losses) / 4, rel=1e-12)
    assert record["results"]["ttest"]["n"] == 4 and record["threshold"] == 0.75
    text = (folder / "README.md").read_text()
    for row in record["results"]["runs"]:
        assert f"| {row['seed']} | 10 | {row['loss']:.6f} |" in text
    assert (folder / "losses.png").read_bytes().startswith(b"\x89PNG")

    before = {path: path.read_bytes() for path in (folder / "runs").glob("*.*") if path.is_file()}
    code, out, _ = run(judge=True, repeats=4)
    assert code == 0 and "0 to start" in out
    assert len(events(folder, "launch")) == 4, "a finished run must not be started again"
    assert len(events(folder, "judge")) == 1, "the same runs looked at twice are one look"
    assert {path: path.read_bytes() for path in before} == before
    assert run(judge=True, repeats=6)[0] == 0
    assert len(events(folder, "launch")) == 6 and [e["n"] for e in events(folder, "judge")] == [4, 6]
    assert "looked at 2 times" in (folder / "README.md").read_text()


def test_the_source_is_kept_once_and_the_rest_of_the_log_is_untouched(run, tmp_path):
    run(repeats=2)
    folder = tmp_path / "s"
    (kept,) = (folder / "source").iterdir()
    source = FAKE.read_text()
    assert kept.read_text() == source
    digest = logs.text_hash(source)
    for seed in (0, 1):
        text = (folder / "runs" / f"seed-00{seed}.txt").read_text()
        first, _, rest = text.partition("\n")
        assert first == f"source sha256:{digest} kept in source/{digest[:16]}.py"
        assert rest.startswith("=" * 100 + "\nRunning Python 3\n") and rest.count("step:") == 11
    from stats.series import read_runs
    from stats.values import final_validation

    (read,) = read_runs(folder / "runs" / "seed-000.txt")
    assert read.code_hash == digest and final_validation(read).step == 10


def test_a_log_with_another_source_than_its_json_says_is_not_rewritten(tmp_path):
    (tmp_path / "runs").mkdir()
    log = tmp_path / "runs" / "seed-000.txt"
    log.write_text("print('changed')\n" + "=" * 80 + "\nstep:1/1 val_loss:1.0\n")
    (tmp_path / "runs" / "seed-000.json").write_text(json.dumps({"code_hash": "0" * 64}))
    before = log.read_bytes()
    assert not logs.trim_log(tmp_path, "seed-000") and log.read_bytes() == before


def test_crashes_are_recorded_kept_and_only_retried_when_asked(run, tmp_path):
    folder, flags = tmp_path / "s", ("--crash_seeds=1", "--crash_once=" + str(tmp_path))
    code, out, err = run(*flags)
    assert code == series.EXIT_CRASHED
    assert "seed-001 crashed" in out and "the loss of seed 1 is not finite" in out
    assert statuses(folder) == {"seed-000": "finished", "seed-001": "crashed", "seed-002": "finished"}
    assert "last words" in (folder / "attempts" / "seed-001.1.output").read_text() and "last words" in err

    code, out, _ = run(*flags)
    assert code == series.EXIT_CRASHED and "1 stay crashed" in out
    assert len(events(folder, "launch")) == 3, "a crashed run must not be started again by itself"

    code, out, _ = run(*flags, "--retry-crashed")
    assert code == 0 and "(attempt 2)" in out
    assert [e["status"] for e in events(folder, "end", "seed-001")] == ["crashed", "finished"]
    old = json.loads((folder / "attempts" / "seed-001.1.json").read_text())
    assert old["status"] == "failed", "what the crashed attempt left is kept"


@pytest.mark.parametrize("code", [2, 3, 5])
def test_a_crash_that_every_run_would_repeat_stops_the_series(run, tmp_path, code):
    result, _, err = run("--crash_seeds=0", f"--crash_code={code}")
    assert result == series.EXIT_CRASHED and "Every run would" in err
    assert list(statuses(tmp_path / "s")) == ["seed-000"]


def test_a_run_that_dies_or_leaves_no_result_is_crashed(run, tmp_path):
    code, out, _ = run("--die_seeds=0", "--silent_exit_seeds=1")
    assert code == series.EXIT_CRASHED
    assert "killed by SIGKILL" in out and "exit code 0, but seed-001.json says running" in out
    assert statuses(tmp_path / "s")["seed-002"] == "finished"


def test_a_run_over_its_time_limit_is_stopped_and_crashed(run, tmp_path):
    code, out, _ = run("--hang_seeds=0", "--timeout-s=1", repeats=1)
    assert code == series.EXIT_CRASHED and "over the time limit of 1 s" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_trainer_is_recorded_and_the_series_goes_on(run, tmp_path, number):
    folder = tmp_path / "s"
    process = start(tmp_path, "--hang_seeds=1")
    hanging = folder / "runs" / "seed-001.txt"
    wait_for(lambda: hanging.exists() and "step:5/10" in hanging.read_text(), "seed-001 hangs")
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number, out
    assert statuses(folder) == {"seed-000": "finished", "seed-001": "interrupted"}
    code, out, _ = run("--hang_seeds=1")
    assert code == 0 and "seed-001 started (attempt 2, resumed)" in out
    assert set(statuses(folder).values()) == {"finished"} and len(statuses(folder)) == 3
    assert "resumed from the checkpoint of step 5" in hanging.read_text()


def test_kill_9_of_the_series_in_mid_run(run, tmp_path):
    """The trainer ends with its runner; what it left decides: interrupted with a checkpoint, so resumed."""
    folder = tmp_path / "s"
    process = start(tmp_path, "--hang_seeds=1")
    hanging = folder / "runs" / "seed-001.txt"
    wait_for(lambda: hanging.exists() and "step:5/10" in hanging.read_text(), "seed-001 hangs")
    process.kill()
    process.communicate()
    code, out, _ = run("--hang_seeds=1")
    assert code == 0, out
    ends = events(folder, "end", "seed-001")
    assert [e["status"] for e in ends] == ["interrupted", "finished"] and ends[0]["settled_later"]
    assert len(events(folder, "launch", "seed-000")) == 1


def test_kill_9_of_series_and_trainer_is_a_crash(run, tmp_path):
    """Nobody is left to write the end and there is no checkpoint: crashed, and not silently run again."""
    folder = tmp_path / "s"
    process = start(tmp_path, "--hang_seeds=1")
    hanging = folder / "runs" / "seed-001.txt"
    wait_for(lambda: hanging.exists() and "step:5/10" in hanging.read_text(), "seed-001 hangs")
    trainer = events(folder, "start", "seed-001")[0]["pid"]
    process.kill()
    os.kill(trainer, signal.SIGKILL)
    process.communicate()
    code, out, _ = run("--hang_seeds=1")
    assert code == series.EXIT_CRASHED and "no end was recorded" in out
    assert statuses(folder) == {"seed-000": "finished", "seed-001": "crashed", "seed-002": "finished"}


def test_two_starts_at_once(run, tmp_path):
    process = start(tmp_path, "--hang_seeds=0", repeats=1)
    wait_for(lambda: events(tmp_path / "s", "start"), "the first start runs")
    code, _, err = run("--hang_seeds=0", repeats=1)
    assert code == EXIT_USAGE and f"in use by another start (process {process.pid})" in err
    process.terminate()
    process.communicate(timeout=20)
    assert not (tmp_path / "s" / ".lock").exists()


def test_the_same_name_with_another_configuration_or_code(run, tmp_path):
    own = tmp_path / "code" / "train.py"
    (own.parent / "kernels").mkdir(parents=True)
    own.write_text(FAKE.read_text() + "\n\ndef later():\n    import kernels.a\n")
    (own.parent / "kernels" / "a.py").write_text("1\n")
    (own.parent / "kernels" / "apart.py").write_text("1\n")
    assert run("--noise=0.1", trainer=own, repeats=1)[0] == 0
    code, _, err = run("--noise=0.2", trainer=own, repeats=1)
    assert code == EXIT_USAGE and "--noise was 0.1, now 0.2" in err and "another --name" in err
    assert "--loss was not given, now 3" in run("--noise=0.1", "--loss=3", trainer=own)[2]
    (own.parent / "kernels" / "apart.py").write_text("no part of the program\n")
    (own.parent / "kernels" / "a.py").write_text("2\n")
    code, _, err = run("--noise=0.1", trainer=own, repeats=2)
    assert code == EXIT_USAGE and "changed code: kernels/a.py" in err
    assert len(events(tmp_path / "s", "launch")) == 1


def test_code_that_changes_while_the_series_runs_stops_it(run, tmp_path):
    own = tmp_path / "code" / "train.py"
    own.parent.mkdir()
    shutil.copy(FAKE, own)
    timer = threading.Timer(1.0, lambda: own.write_text(FAKE.read_text() + "# edited\n"))
    timer.start()
    code, _, err = run("--delays=3:0:0", trainer=own)
    timer.join()
    assert code == series.EXIT_CRASHED and "train.py changed while the series was running" in err
    assert statuses(tmp_path / "s") == {"seed-000": "finished"}


def test_validation_data_that_changed_between_two_runs_stop_the_series(run, tmp_path):
    code, _, err = run("--other_validation_seeds=1", repeats=4)
    assert code == series.EXIT_CRASHED
    assert f"{'0' * 32} in seed-000, {'1' * 32} in seed-001" in err and "cannot be judged together" in err
    assert set(statuses(tmp_path / "s")) == {"seed-000", "seed-001"}, "no other was started"


def test_drop_needs_a_reason_and_never_takes_a_finished_run(run, tmp_path, capfd):
    run("--crash_seeds=1", "--crash_code=1")

    def amend(verb, name, reason):
        code = series.main([verb, "s", name, "--reason", reason, "--root", str(tmp_path)])
        return code, capfd.readouterr().err

    assert amend("drop", "seed-001", "  ") == (
        2,
        "error: --reason is empty: say why, it is published with the series\n",
    )
    assert "no run seed-009" in amend("drop", "seed-009", "x")[1]
    assert "stays in the verdict" in amend("drop", "seed-000", "too high")[1]
    assert "is crashed" in amend("lost", "seed-001", "x")[1]
    Ledger(tmp_path / "s").append("launch", run="seed-002", seed=2, attempt=2)
    Ledger(tmp_path / "s").append("end", run="seed-002", attempt=2, status="crashed", exit_code=4)
    assert "its loss was not finite" in amend("drop", "seed-002", "x")[1]
    Ledger(tmp_path / "s").append("launch", run="seed-002", seed=2, attempt=3)
    Ledger(tmp_path / "s").append("end", run="seed-002", attempt=3, status="finished", exit_code=0)
    assert amend("drop", "seed-001", "power cut")[0] == 0
    assert statuses(tmp_path / "s")["seed-001"] == "dropped"
    code, out, _ = run("--crash_seeds=1", "--crash_code=1", "--retry-crashed", judge=True, repeats=5)
    assert code == 0 and "2 to start" in out
    assert "left out: power cut" in (tmp_path / "s" / "README.md").read_text()


def test_bad_command_lines(run, tmp_path):
    for flags, words in (
        (["--seed=3"], "--seed is set by the series itself"),
        (["--retry-crash"], "did you mean --retry_crashed"),
        (["--repeats=5"], "--repeats is given twice, as '3' and as '5'"),
        (["stray"], "unexpected word 'stray'"),
        (["--launcher=local", "--parallel=4096"], "this machine has"),
    ):
        code, _, err = run(*flags)
        assert code == EXIT_USAGE and words in err, (flags, err)
    for odd, words in (
        (dict(repeats=0), "--repeats=0: at least 1"),
        (dict(name="../x"), "--name '../x'"),
        (dict(trainer=tmp_path / "none.py"), "no trainer at"),
    ):
        code, _, err = run(**odd)
        assert code == EXIT_USAGE and words in err, (odd, err)
    assert not [e for p in tmp_path.glob("*/ledger.jsonl") for e in events(p.parent)]


def test_a_folder_without_rights_and_a_full_disk_are_named(tmp_path, run, monkeypatch):
    pid = os.fork()
    if pid == 0:  # as another user, since rights do not bind root
        try:
            tmp_path.chmod(0o555)
            if os.geteuid() == 0:
                os.setuid(65534)
            os._exit(series.main(["--root", str(tmp_path), "--trainer", str(FAKE), "--preset=nano", "--no-judge"]))
        finally:
            os._exit(99)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == launch.EXIT_IO
    tmp_path.chmod(0o755)

    def full(self, record):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "_append", full)
        code, _, err = run()
    assert code == 5 and "No space left on device" in err and "ledger.jsonl" in err
    assert run()[0] == 0, "with room again the same command goes on"


def test_side_by_side_runs_share_the_cores(run, tmp_path, monkeypatch):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    code, _out, _ = run("--launcher=local", "--parallel=2", "--delays=0.5:0.5:0:0", repeats=4)
    assert code == 0 and set(statuses(tmp_path / "s").values()) == {"finished"}
    kinds = [(e["event"], e["run"]) for e in events(tmp_path / "s") if "run" in e]
    assert kinds.index(("launch", "seed-001")) < kinds.index(("end", "seed-000")), "two at once"
    shares = launch.slots(2, 1)
    assert not set(shares[0].cores) & set(shares[1].cores)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,5")
    assert [s.gpus for s in launch.slots(0, 2)] == [("0", "1"), ("2", "5")]
    assert launch.default_nproc(launch.visible_gpus()) == 4 and launch.default_nproc([]) == 1
    with pytest.raises(ValueError, match="need 6 GPUs; this machine has 4"):
        launch.slots(3, 2)


def test_the_report_refuses_a_log_that_was_changed(run, tmp_path):
    run(judge=True)
    folder = tmp_path / "s"
    log = folder / "runs" / "seed-001.txt"
    text = log.read_text()
    log.write_text(re.sub(r"val_loss:0\.\d", "val_loss:0.1", text))
    with pytest.raises(series.SeriesError, match=r"seed-001\.json: loss .*seed-001\.txt says 0\.1"):
        report.report(folder)
    log.write_text(text.rpartition("step:")[0])
    with pytest.raises(series.SeriesError, match="its log does not show it"):
        report.report(folder)
    log.write_text(text)
    assert report.main([str(tmp_path)]) == 0
    assert report.main([str(tmp_path / "nothing")]) == 3


def test_the_report_is_a_function_of_the_logs(run, tmp_path):
    run(judge=True)
    made = ("record.json", "README.md", "losses.png")
    before = [(tmp_path / "s" / name).read_bytes() for name in made]
    report.report(tmp_path / "s")
    assert [(tmp_path / "s" / name).read_bytes() for name in made] == before


def test_a_broken_record_is_named(run, tmp_path):
    run(repeats=1)
    (tmp_path / "s" / "record.json").write_text("{")
    code, _, err = run(repeats=1)
    assert code == EXIT_USAGE and "record.json: not a series' record" in err


def test_ledger_errors_carry_the_folder(tmp_path):
    with pytest.raises(LedgerError, match="no-such-folder"):
        Ledger(tmp_path / "no-such-folder").append("launch", run="a")


def write_plan_for(tmp_path, **more):
    from stats.planfile import write_plan
    from stats.plans import make_plan

    plan = make_plan(0.75, 0.05, 0.01, "made for the test", **more)
    write_plan(plan, tmp_path / "a-plan.json")
    return plan


def test_a_sequential_series_stops_when_its_plan_decides(run, tmp_path):
    plan = write_plan_for(tmp_path)
    flags = ("--sequential", "--plan", str(tmp_path / "a-plan.json"))
    code, out, _ = run(*flags, judge=True, repeats=plan.cap)
    folder = tmp_path / "s"
    assert code == 0 and "ACCEPT after 4 runs" in out
    states = statuses(folder)
    assert [s for s in states.values()] == ["finished"] * 4 + ["cancelled"] * (plan.cap - 4)
    assert "decided ACCEPT after 4 runs" in events(folder, "cancel")[0]["reason"]
    logs = [json.loads(path.read_text()) for path in (folder / "runs").glob("*.json")]
    assert {told["plan_hash"] for told in logs} == {plan.hash} and len(logs) == 4
    assert "ACCEPT after 4 runs" in (folder / "README.md").read_text()
    code, out, _ = run(*flags, judge=True, repeats=plan.cap)
    assert code == 0 and len(events(folder, "launch")) == 4
    assert "continue it with --sequential" in run()[2]
    (folder / "plan.json").unlink()
    write_plan_for(folder, beta=0.2)
    (folder / "a-plan.json").rename(folder / "plan.json")
    assert "is not the plan that this series began with" in run("--sequential")[2]


def test_a_plan_about_another_threshold_is_refused_before_the_first_run(run, tmp_path):
    """Runs that are told another target than the plan's would be graded as if the threshold had been moved."""
    write_plan_for(tmp_path)
    plan = ("--sequential", "--plan", str(tmp_path / "a-plan.json"))
    code, _, err = run(*plan, "--target_loss=0.9", judge=True)
    assert code == EXIT_USAGE and "about a mean loss below 0.75, the runs about 0.9: give --target_loss=0.75" in err
    assert not (tmp_path / "s").exists()
    code, _, _ = run(*plan, "--target_loss=0.75", judge=True, repeats=4)
    findings = [one for one in validate(load_series(tmp_path / "s")).findings if one.check in ("begin", "plan")]
    assert code == 0 and len(findings) == 2 and {one.grade for one in findings} == {"A"}


def test_the_sequential_test_takes_runs_in_launch_order(tmp_path):
    from stats.errors import DataError
    from stats.monitor import monitor

    def counted():
        return monitor(load_series(tmp_path), plan).counted

    plan = write_plan_for(tmp_path)
    ledger = Ledger(tmp_path)
    (tmp_path / "runs").mkdir()
    for seed, status in enumerate(["finished", None, "finished", "crashed"]):
        ledger.append("launch", run=f"seed-{seed}", seed=seed, attempt=1, host="ffffffffffff", pid=1)
        if status:
            ledger.append("end", run=f"seed-{seed}", attempt=1, status=status, exit_code=1)
        text = f"step:1/1 val_loss:0.{seed}1 train_time:1ms step_avg:1.00ms\n"
        (tmp_path / "runs" / f"seed-{seed}.txt").write_text("=" * 100 + "\n" + text)
    assert counted() == ("seed-0",), "seed-2 was quicker than seed-1, which it must wait for"
    ledger.append("end", run="seed-1", attempt=1, status="finished", exit_code=0)
    assert counted() == ("seed-0", "seed-1", "seed-2"), "the crashed one is passed over"
    ledger.append("launch", run="seed-3", seed=3, attempt=2, host="ffffffffffff", pid=1)
    ledger.append("end", run="seed-3", attempt=2, status="crashed", exit_code=4)
    with pytest.raises(DataError, match="a run that diverged is a result"):
        counted()


def test_a_series_is_sequential_from_the_start_or_never(run, tmp_path):
    assert run(repeats=1)[0] == 0
    assert "began without a plan" in run("--sequential", "--sigma=0.01", "--margin=0.05")[2]
    assert "belong to --sequential" in run("--margin=0.05")[2]
    code, _, err = run("--sequential", name="other")
    assert code == EXIT_USAGE and "does not tell its target_loss; give --plan FILE" in err
    code, out, _ = run("--sequential", "--target_loss=0.75", "--sigma=0.01", "--margin=0.05", name="third", judge=True)
    assert code == 4 and "CONTINUE: 3 runs are too few" in out


def test_a_damaged_result_is_named_by_its_field(tmp_path):
    """Found by the fuzzer: one flipped bit in a key of a run's JSON."""
    from records.account import check_result

    point = {"step": 4, "loss": 2.5, "step_avg_ms": 1.0}
    whole = {
        "seed": 0,
        "final_loss": 2.5,
        "train_time_s": 1,
        "config": {},
        "environment": {},
        "start_time": "now",
        "end_time": "then",
        "validation": [point],
    }
    path = tmp_path / "seed-000.json"
    check_result(path, whole)
    for field in whole:
        with pytest.raises(series.SeriesError, match=rf"seed-000\.json: '{field}' is absent or damaged"):
            check_result(path, {name: value for name, value in whole.items() if name != field})
    for bad in ({"final_loss": float("nan")}, {"validation": []}, {"validation": [{**point, "loss": "2"}]}):
        with pytest.raises(series.SeriesError, match="absent or damaged"):
            check_result(path, whole | bad)


def test_a_mistyped_flag_of_the_trainer_leaves_nothing_behind(run, tmp_path):
    own = tmp_path / "code" / "train.py"
    own.parent.mkdir()
    own.write_text("def parse_config(words):\n    raise ValueError(f'unknown argument {words[-1]}')\n")
    code, _, err = run("--num_iteration=5", trainer=own)
    assert code == EXIT_USAGE and "unknown argument --num_iteration=5" in err
    assert not (tmp_path / "s").exists()


def test_long_names_of_ablations_do_not_collide():
    long = {f"field_number_{i}": str(i) for i in range(12)}
    names = {series.default_name("nano", long | {"zeta": text}) for text in ("1", "2")}
    assert len(names) == 2 and all(len(name) <= 100 for name in names)
    assert series.default_name("nano", {"train_files": "a/x.bin"}) != series.default_name(
        "nano", {"train_files": "b/x.bin"}
    )
    assert series.default_name("nano", {"num_iterations": "50"}) == "nano-num_iterations-50"
