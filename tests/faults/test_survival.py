"""Pieces of the trainer that the fault campaign rests on, one by one."""

import os
import signal
import subprocess
import sys
import time

import pytest

import train_gpt
from trainer.log import RULER, RunLog
from trainer.processes import StopRequest


@pytest.fixture
def stop(monkeypatch):
    """A StopRequest; the handlers are put back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_torchrun_passes_on_a_second_time_does_not_kill(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)  # would end this very process
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGTERM


def test_asking_again_later_ends_the_process_at_once(stop, monkeypatch):
    last_words = []
    stop.at_once = lambda: last_words.append("told")
    os.kill(os.getpid(), signal.SIGTERM)
    later = time.monotonic() + 6
    monkeypatch.setattr(time, "monotonic", lambda: later)
    ended = []
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.append((pid, number, signal.getsignal(number))))
    stop._asked(signal.SIGTERM, None)
    assert ended == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)] and last_words == ["told"]


def log_in(folder, **named) -> RunLog:
    environment = dict.fromkeys(("python", "torch", "compute", "triton", "hardware", "world_size", "assembler"), "x")
    environment |= {"hashes": {}, "implementations": {}}
    return RunLog(folder, "run", {"num_iterations": 20, "seed": 0}, environment, "source", "hash", **named)


def test_a_line_that_the_disk_cut_short_is_taken_out_on_resuming(tmp_path):
    log = log_in(tmp_path)
    log.open()
    for step in range(1, 13):
        log.trained(step, 10.0 * step, 2.0)
    log.file.write("step:1")  # half of "step:13/20 ...", which reads like an early step
    log.file.flush()
    log.cut_back_to(10)
    body = log.text_path.read_text().rpartition(RULER + "\n")[2].splitlines()
    assert len(body) == 11 and body[9].startswith("step:10/20 ") and body[10].startswith("resumed from the checkpoint")


def test_a_damaged_log_is_not_continued(tmp_path):
    for number, (damaged, message) in enumerate(((b"\xff\xfe", "byte 0 is no UTF-8"), (b"step:1/20", "no end"))):
        log = log_in(tmp_path / str(number))
        log.open()
        log.text_path.write_bytes(damaged)
        with pytest.raises(train_gpt.UsageError, match=rf"run\.txt: damaged, .*{message}.*move it away"):
            log.cut_back_to(10)
        assert log.text_path.read_bytes() == damaged
        log.line("a log that is closed by then takes no line, and no harm", echo=False)


def test_a_log_that_exists_has_a_whole_header(tmp_path, monkeypatch):
    log = log_in(tmp_path)
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match=r"run\.txt"):
        log.open()
    assert not log.text_path.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".run.lock"]


def test_temporary_files_of_a_killed_process_go_and_those_of_another_run_stay(tmp_path):
    for name in (".run.json.abc.part", ".run.txt.abc.part", ".run.2.json.abc.part"):
        (tmp_path / name).touch()
    log_in(tmp_path).open()
    assert sorted(path.name for path in tmp_path.glob(".*.part")) == [".run.2.json.abc.part"]


@pytest.mark.parametrize("error", [train_gpt.UsageError("no"), OSError(28, "full", "here")], ids=["usage", "disk"])
def test_what_rank_0_raises_is_printed_once_and_has_its_exit_code(error, capsys, monkeypatch):
    def fail(config):
        train_gpt.on_rank_0(lambda: (_ for _ in ()).throw(error))

    monkeypatch.setattr(train_gpt, "run", fail)
    code = train_gpt.main(["--preset=nano"])
    assert code == (2 if isinstance(error, train_gpt.UsageError) else 5)
    assert capsys.readouterr().err.count("train_gpt.py: ") == 1
    monkeypatch.setattr("trainer.processes.rank", lambda: 1)
    monkeypatch.setattr(train_gpt, "on_rank_0", lambda work: (_ for _ in ()).throw(error))
    assert train_gpt.main(["--preset=nano"]) == code
    assert capsys.readouterr().err == "", "the other ranks leave the message to rank 0"


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nat x"),
            5,
            "out of memory",
        ),
        (MemoryError(), 5, "smaller --train_seq_len"),
        (KeyboardInterrupt(), 130, "stopped by SIGINT"),
        (BrokenPipeError(32, "Broken pipe"), 5, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_else_ends_a_program_is_one_sentence(error, code, said, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "run", lambda config: (_ for _ in ()).throw(error))
    assert train_gpt.main(["--preset=nano"]) == code
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == (1 if said else 0)


def test_a_reader_that_has_gone_is_no_error(repo):
    """As with `| head -1`: no traceback, not even at the exit of Python."""
    command = f"{sys.executable} train_gpt.py --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=repo, capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 5) and done.stderr == "" and done.stdout.count("\n") == 1
