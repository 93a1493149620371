"""The one command for a GPU: a stage that fails, hangs or is missing loses nothing of the others."""

import importlib
import json
import os
import sys
import time

import pytest

from bench import gpu
from bench.gpu import Stage
from trainer.options import read_command


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "GRACE_S", 1.0)
    monkeypatch.setattr(gpu, "WITHOUT_GPU", 1)


def python(code):
    return (sys.executable, "-c", code)


def test_every_stage_is_on_disk_before_the_next_starts(tmp_path):
    seen = []
    chosen = [
        Stage("good", python("print('fine')"), 20),
        Stage("bad", python("import sys; print('why it failed'); sys.exit(3)"), 20),
        Stage("hangs", python("import time; print('stuck', flush=True); time.sleep(60)"), 0.7),
        Stage("absent", python("0"), 20, needs="bench/no_such_file.py"),
        Stage("gpu", python("0"), 20, gpu_only=True),
        Stage("last", python("print('still here')"), 20),
    ]
    started = time.monotonic()
    outcomes = gpu.run_all(chosen, 60, False, tmp_path, lambda o: seen.append({k: v["status"] for k, v in o.items()}))
    assert time.monotonic() - started < 20
    assert [o["status"] for o in outcomes.values()] == [
        "passed",
        "failed",
        "out of time",
        "skipped",
        "skipped",
        "passed",
    ]
    assert [len(o) for o in seen] == [1, 2, 3, 4, 5, 6]
    assert outcomes["bad"]["exit_code"] == 3 and outcomes["bad"]["tail"] == ["why it failed"]
    assert outcomes["hangs"]["tail"] == ["stuck"]
    assert "no_such_file" in outcomes["absent"]["why"]
    assert gpu.headline("last", outcomes["last"]) == "still here"


def test_what_a_stage_started_ends_with_it(tmp_path):
    """A child that ignores SIGTERM, in a stage that runs out of time."""
    mark = tmp_path / "child"
    child = (
        f"import signal, time, os; signal.signal(15, signal.SIG_IGN); "
        f"open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    )
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    outcome = gpu.run_stage(Stage("family", python(code), 2.0), 2.0, tmp_path)
    assert outcome["status"] == "out of time"
    pid = int(mark.read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.05)
    raise AssertionError(f"process {pid} outlived its stage")


def test_time_for_all_stages_is_kept(tmp_path):
    both = [Stage("a", python("0"), 60), Stage("b", python("0"), 60)]
    outcomes = gpu.run_all(both, 10, False, tmp_path, lambda o: None)
    assert [o["status"] for o in outcomes.values()] == ["out of time"] * 2


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(gpu, "ask_environment", lambda: {"gpus": []})
    assert gpu.main([]) == 2
    assert "no GPU" in capsys.readouterr().err
    assert gpu.main(["--cpu", "--only", "nothing"]) == 2
    assert "one of nano, sample" in capsys.readouterr().err


def test_the_json_holds_stages_and_their_results(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    results.mkdir()
    (results / "old-cpu.json").write_text("{}")
    os.utime(results / "old-cpu.json", (1, 1))
    make = f"open({str(results / 'new-cpu.json')!r}, 'w').write('{{\"n\": 1}}'); print('made it')"
    monkeypatch.setattr(gpu, "ask_environment", lambda: {"gpus": []})
    monkeypatch.setattr(gpu, "stages", lambda command, options, on_gpu: [Stage(f"of {command}", python(make), 20)])
    assert gpu.main(["--cpu", "--out", str(results)]) == 0
    record = json.loads((results / "gpu-cpu.json").read_text())
    (stages,) = [told["stages"] for told in record["commands"].values()]
    assert stages["of first"]["status"] == "passed" and record["results"] == {"new-cpu.json": {"n": 1}}
    assert "made it" in capsys.readouterr().out
    monkeypatch.setattr(gpu, "stages", lambda command, options, on_gpu: [Stage("one", python("1/0"), 20)])
    assert gpu.main(["step", "--cpu", "--out", str(results)]) == 1
    record = json.loads((results / "gpu-cpu.json").read_text())
    assert set(record["commands"]) == {"first", "step"}, "another command's stages stay"
    assert record["commands"]["first"]["stages"] == stages and record["results"] == {"new-cpu.json": {"n": 1}}


def test_a_stage_run_alone_leaves_the_others_of_its_command(tmp_path, monkeypatch):
    both = [Stage(name, python(f"print('{name}')"), 20) for name in ("a", "b")]
    monkeypatch.setattr(gpu, "ask_environment", lambda: {"gpus": []})
    monkeypatch.setattr(gpu, "stages", lambda command, options, on_gpu: both)
    assert gpu.main(["--cpu", "--out", str(tmp_path)]) == 0
    assert gpu.main(["--cpu", "--only", "b", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert set(record["commands"]["first"]["stages"]) == {"a", "b"}


def test_stages_keep_their_results_beside_the_json_and_small_versions_replace_none(tmp_path, monkeypatch):
    """A rehearsal on a CPU must not overwrite what was measured there."""
    code = "from bench.common import write_result; write_result('tiny', {'n': 2})"
    monkeypatch.setattr(gpu, "ask_environment", lambda: {"gpus": []})
    monkeypatch.setattr(gpu, "stages", lambda command, options, on_gpu: [Stage("one", python(code), 60)])
    monkeypatch.chdir(gpu.REPO)
    assert gpu.main(["--cpu"]) == 0
    assert not (tmp_path / "results").exists()
    record = json.loads((gpu.LOGS / "gpu-cpu.json").read_text())
    assert record["results"]["tiny-cpu.json"]["result"] == {"n": 2} and (gpu.LOGS / "tiny-cpu.json").exists()


def test_projection_and_measurement_stand_side_by_side(monkeypatch):
    counted = {"projection": {"ms": 230.0}, "measures": {"peak_gib": 30.0}}
    monkeypatch.setattr(gpu, "kept", lambda name: counted)
    measured = {"whole_step": [{"at": "end", "median_ms": 240.0}], "peak_memory_mib": 31 * 1024}
    rows = gpu.beside_projection({"step-medium-h100.json": {"result": measured}})
    assert [(row["projected, counted"], row["measured"]) for row in rows] == [(230.0, 240.0), (30.0, 31.0)]
    assert gpu.beside_projection({})[0]["measured"] is None


def test_the_real_stages_exist_and_parse():
    """Every module that a stage names is there (or the stage knows that it may not be), and its flags are known."""
    import train_gpt

    assert gpu.Options().minutes < 10, "all stages of a command share this"
    for tokens in (None, "x*.bin"):
        options = gpu.Options(tokens=tokens)
        for on_gpu in (True, False):
            for stage in [stage for command in gpu.COMMANDS for stage in gpu.stages(command, options, on_gpu)]:
                words = list(stage.command[1:])
                if words[0] == "-m" and words[1].startswith("bench.") and not stage.needs:
                    module = importlib.import_module(words[1])
                    if words[1] != "bench.step" and words[1] != "bench.agreement":  # these take the trainer's fields
                        read_command(None, words[2:], module.Options)
                if words[0] == "train_gpt.py" and words[1] != "sample":
                    train_gpt.parse_config(words[1:])
