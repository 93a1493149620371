"""What may happen to a run from outside: signals, a reader of its output that goes away, a terminal that is lost.

One process imports the trainer once and is forked for each case; all cases are of one tiny model."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import folder_of, losses, small, tokens

from data.shards import write_shard

REPO = Path(__file__).resolve().parent.parent
PATIENCE_S = 120  # of these tests, where the machine has other work

# A line of JSON with arguments and file descriptors begins a run; its number and, later, its exit code are told.
SERVER = """
import json, os, sys
import torch, train_gpt
from trainer.program import program_files
torch.set_num_threads(1)
program_files(train_gpt.__file__)  # parsed once for all runs
for line in sys.stdin:
    told = json.loads(line)
    child = os.fork()
    if not child:
        os.setsid()
        if told["terminal"]:
            import fcntl, termios
            fcntl.ioctl(os.open(told["terminal"], os.O_RDWR), termios.TIOCSCTTY, 0)
        for number in (1, 2):
            os.dup2(os.open(told["out"], os.O_WRONLY | os.O_APPEND), number)
        if told["ignore"]:
            import signal
            signal.signal(told["ignore"], signal.SIG_IGN)
        sys.exit(train_gpt.main(told["words"]))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Begins runs one after the other; `ends` waits for the last one's exit code."""

    def __init__(self, folder: Path):
        self.folder, self.data = folder, folder_of(folder / "data", tokens(2000))
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SERVER]
        self.process = subprocess.Popen(command, cwd=REPO, env=env, text=True, stdin=-1, stdout=-1)

    def begin(self, out: str, *words: str, terminal: str = "", ignore: int = 0) -> int:
        """Number of a process that trains for 100,000 steps unless `words` say otherwise; its output goes to `out`."""
        files = [f"--{part}_files={self.data}/{part}_*.bin" for part in ("train", "val")]
        given = ["--num_iterations=100000", "--val_loss_every=0", *files, f"--output_dir={self.folder}", *words]
        told = dict(words=small(*given, "--overwrite"), out=out, terminal=terminal, ignore=ignore)
        if "--resume=auto" not in words:
            self.log.unlink(missing_ok=True)
        print(json.dumps(told), file=self.process.stdin, flush=True)
        self.run = int(self.process.stdout.readline())
        return self.run

    def ends(self) -> int:
        """The exit code: negative for a signal that killed."""
        return int(self.process.stdout.readline())

    @property
    def log(self) -> Path:
        return self.folder / "run.txt"

    def last_line(self) -> str:
        return self.log.read_text().splitlines()[-1]

    def told(self) -> dict:
        return json.loads((self.folder / "run.json").read_text())

    def until(self, wanted) -> None:
        """Wait until the run's log is there and `wanted(its text)` holds."""
        end = time.monotonic() + PATIENCE_S
        while not (self.log.exists() and wanted(self.log.read_text())):
            assert time.monotonic() < end, "the run does not get on"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    with contextlib.suppress(ProcessLookupError):
        os.kill(server.run, signal.SIGKILL)  # of a test that failed
    server.process.stdin.close()
    server.process.wait(PATIENCE_S)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGQUIT", "SIGUSR1", "SIGHUP"])
def test_a_signal_ends_with_a_checkpoint(server, tmp_path, name):
    number, out = getattr(signal, name), tmp_path / "out"
    out.touch()
    run = server.begin(str(out))
    server.until(lambda text: "\nstep:3/" in text)
    os.kill(run, number)
    assert server.ends() == 128 + number
    told, step = server.told(), len(losses(server.log))
    assert told["status"] == "interrupted" and told["end_time"]
    assert (server.folder / "run.checkpoints" / f"step-{step:06d}.safetensors").exists()
    said = f"stopped by {name}: the checkpoint of step {step} is there; --resume=auto continues"
    assert server.last_line() == said == out.read_text().splitlines()[-1]


def test_a_signal_in_the_warm_up_is_heard_at_once(server, tmp_path):
    out = tmp_path / "out"
    out.touch()
    for path in (server.folder / "run.checkpoints").glob("*"):
        path.unlink()
    run = server.begin(str(out), "--warmup_steps=1000000")
    server.until(lambda text: True)
    time.sleep(0.5)  # the log is there before the warm-up is
    begin = time.monotonic()
    os.kill(run, signal.SIGUSR1)
    assert server.ends() == 128 + signal.SIGUSR1
    assert time.monotonic() - begin < 30 and "\nstep:1/" not in server.log.read_text()
    assert server.told()["status"] == "interrupted"
    assert not list((server.folder / "run.checkpoints").glob("*"))
    assert server.last_line() == "stopped by SIGUSR1: no checkpoint yet" == out.read_text().splitlines()[-1]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_in_a_validation_is_heard_there(server, tmp_path, name):
    """The validation is given up, and the run that goes on makes it: its loss is that of a run without a signal."""
    number, out, many = getattr(signal, name), tmp_path / "out", tmp_path / "val_0.bin"
    out.touch()
    write_shard(many, tokens(150_000, 2))
    words = ("--num_iterations=3", f"--val_files={many}", "--val_tokens=0")
    run = server.begin(str(out), *words)
    server.until(lambda text: "\nstep:3/3 train_loss" in text)
    os.kill(run, number)
    assert server.ends() == 128 + number
    assert "\nstep:3/3 val_loss" not in server.log.read_text()
    told = server.told()
    assert (told["status"], told["validation"]) == ("interrupted", []) and told["end_time"]
    said = f"stopped by {name}: the checkpoint of step 3 is there; --resume=auto continues"
    assert server.last_line() == said == out.read_text().splitlines()[-1]
    if name == "SIGTERM":
        server.begin(str(out), *words, "--resume=auto", "--overwrite=false")
        assert server.ends() == 0
        (point,) = server.told()["validation"]
        server.begin(str(out), *words)
        assert server.ends() == 0
        (straight,) = server.told()["validation"]
        assert (point["step"], point["loss"]) == (3, straight["loss"]) and server.told()["status"] == "finished"


FINITE = ("--num_iterations=40", "--val_loss_every=10", "--save_final=false")


def finished(server) -> bool:
    """Whether a run of FINITE went on to its end and its log has all of it."""
    told = server.told()
    steps = [point["step"] for point in told["validation"]]
    return (
        told["status"] == "finished"
        and steps == [0, 10, 20, 30, 40]
        and "step:40/40 val_loss" in server.log.read_text()
    )


def test_a_reader_that_goes_away_does_not_stop_the_run(server, tmp_path):
    """As with `| head -1`."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    server.begin(str(tmp_path / "pipe"), *FINITE)
    server.until(lambda text: "\nstep:1/" in text)
    os.close(reader)
    assert server.ends() == 0 and finished(server)


def test_a_full_disk_behind_standard_output_does_not_stop_the_run(server):
    server.begin("/dev/full", *FINITE)
    assert server.ends() == 0 and finished(server)


def test_a_terminal_that_is_lost(server):
    """It sends SIGHUP, which ends the run with a checkpoint; where that is ignored (nohup), the run goes on."""
    for ignore, more in ((0, ()), (signal.SIGHUP, FINITE)):
        keyboard, screen = pty.openpty()
        server.begin(os.ttyname(screen), *more, terminal=os.ttyname(screen), ignore=ignore)
        server.until(lambda text: "\nstep:3/" in text)
        os.close(screen)
        os.close(keyboard)
        code = server.ends()
        if ignore:
            assert code == 0 and finished(server)
        else:
            assert code == 128 + signal.SIGHUP and server.told()["status"] == "interrupted"
            assert "stopped by SIGHUP: the checkpoint of step" in server.last_line()
