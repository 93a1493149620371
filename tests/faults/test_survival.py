"""Pieces of the trainer that the fault campaign rests on, one by one."""

import os
import signal
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
    os.kill(os.getpid(), signal.SIGTERM)
    later = time.monotonic() + 6
    monkeypatch.setattr(time, "monotonic", lambda: later)
    ended = []
    monkeypatch.setattr(os, "kill", lambda pid, number: ended.append((pid, number, signal.getsignal(number))))
    stop._asked(signal.SIGTERM, None)
    assert ended == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)]


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
