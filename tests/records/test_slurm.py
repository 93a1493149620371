"""A series on a real SLURM, started here from the system's packages in a temporary folder (skipped where it cannot
be), and through submitit's local executor."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from records import series
from records.folder import EXIT_USAGE
from records.ledger import Ledger

pytest.importorskip("submitit", reason="submitit is not installed")
FAKE = Path(__file__).with_name("fake_trainer.py")

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPort={port}
SlurmdPort={port_d}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=10
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """munged, slurmctld and slurmd of our own; SLURM_CONF names them."""
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing:
        pytest.skip(f"no SLURM here: {', '.join(missing)} not installed (Debian: slurmctld slurmd slurm-client munge)")
    if os.geteuid() != 0:
        pytest.skip("slurmd of this test's configuration needs root")
    folder = Path(tmp_path_factory.mktemp("slurm"))
    for part in (folder, *folder.parents):  # munge insists on a path that others can enter
        if part != Path("/tmp") and part.is_relative_to("/tmp"):
            part.chmod(0o755)
    for part in ("state", "spool", "munge"):
        (folder / part).mkdir()
        (folder / part).chmod(0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    port, port_d = free_ports(2)
    host = socket.gethostname().partition(".")[0]
    cores = os.cpu_count()
    (folder / "slurm.conf").write_text(CONF.format(host=host, folder=folder, port=port, port_d=port_d, cores=cores))
    munge = ["munged", "-F", f"--key-file={key}", f"--socket={folder}/munge/socket", "--num-threads=1"]
    munge += [f"--pid-file={folder}/munge/pid", f"--seed-file={folder}/munge/seed"]
    environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    daemons = [subprocess.Popen(munge, **quiet)]
    try:
        wait_for(lambda: (folder / "munge" / "socket").exists(), "munged opens its socket")
        daemons.append(subprocess.Popen(["slurmctld", "-D", "-c"], **quiet))
        daemons.append(subprocess.Popen(["slurmd", "-D"], **quiet))
        ask = ["sinfo", "-h", "-o", "%T"]
        answer = lambda: subprocess.run(ask, capture_output=True, text=True, env=environment).stdout  # noqa: E731
        try:
            wait_for(lambda: "idle" in answer(), "a node is idle")
        except AssertionError:
            pytest.skip("SLURM's daemons do not come up here: " + (folder / "slurmd.log").read_text()[-300:])
        yield environment["SLURM_CONF"]
        subprocess.run(["scancel", "-u", "root"], env=environment, capture_output=True)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with_patience(daemon)


def with_patience(process):
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def wait_for(condition, what, seconds=30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.05)


def command(tmp_path, *flags, repeats=3):
    words = [sys.executable, "-m", "records.series", "--root", str(tmp_path), "--trainer", str(FAKE), "--no-judge"]
    return [*words, "--preset=nano", "--name=s", "--repeats", str(repeats), "--launcher=slurm", *flags]


def run(tmp_path, *flags, repeats=3, conf=None):
    environment = os.environ | ({"SLURM_CONF": conf} if conf else {})
    done = subprocess.run(
        command(tmp_path, *flags, repeats=repeats),
        cwd=FAKE.parents[2],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.returncode, done.stdout + done.stderr


def statuses(tmp_path):
    return {name: state.status for name, state in Ledger(tmp_path / "s").runs().items()}


def events(tmp_path, kind):
    return [e for e in Ledger(tmp_path / "s").events() if e["event"] == kind]


def test_a_series_through_submitits_local_executor(tmp_path):
    code, out = run(tmp_path, "--cluster=local", "--crash_seeds=1")
    assert code == series.EXIT_CRASHED, out
    assert statuses(tmp_path) == {"seed-000": "finished", "seed-001": "crashed", "seed-002": "finished"}
    assert len(events(tmp_path, "launch")) == len(events(tmp_path, "submit")) == 3
    logs = sorted((tmp_path / "s" / "runs").glob("*.txt"))
    assert len(logs) == 3 and logs[0].read_text().startswith("source sha256:"), "logs are trimmed as elsewhere"
    assert "1 stay crashed" in run(tmp_path, "--cluster=local", "--crash_seeds=1")[1]
    assert len(events(tmp_path, "launch")) == 3


def test_without_sbatch_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    code = series.main(command(tmp_path)[3:])
    assert code == EXIT_USAGE and "there is no sbatch" in capsys.readouterr().err


@pytest.mark.slow
def test_many_runs_write_into_one_series_at_once(tmp_path, cluster):
    code, out = run(tmp_path, "--step_s=0.02", "--crash_seeds=2", repeats=6, conf=cluster)
    assert code == series.EXIT_CRASHED, out
    assert sorted(statuses(tmp_path).values()) == ["crashed"] + ["finished"] * 5
    launches = events(tmp_path, "launch")
    assert {e["job"].partition("_")[2] for e in launches} == set("012345"), "one array"
    assert len(list((tmp_path / "s" / "runs").glob("*.json"))) == 6


@pytest.mark.slow
def test_stopping_withdraws_what_is_queued_and_resumes_what_ran(tmp_path, cluster):
    words = command(tmp_path, "--hang_seeds=0:1", "--parallel=2", repeats=4)
    process = subprocess.Popen(
        words,
        cwd=FAKE.parents[2],
        env=os.environ | {"SLURM_CONF": cluster},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: (tmp_path / "s").exists() and len(events(tmp_path, "start")) == 2, "two runs run", 60)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, out
    assert statuses(tmp_path) == {
        "seed-000": "interrupted",
        "seed-001": "interrupted",
        "seed-002": "cancelled",
        "seed-003": "cancelled",
    }, out
    code, out = run(tmp_path, "--hang_seeds=0:1", "--parallel=2", repeats=4, conf=cluster)
    assert code == 0 and set(statuses(tmp_path).values()) == {"finished"}, out
    assert [e["resume"] for e in events(tmp_path, "launch") if e["attempt"] == 2] == [True, True]


@pytest.mark.slow
def test_a_start_that_was_killed_adopts_its_jobs(tmp_path, cluster):
    words = command(tmp_path, "--step_s=0.5", "--parallel=1", repeats=2)
    process = subprocess.Popen(
        words,
        cwd=FAKE.parents[2],
        env=os.environ | {"SLURM_CONF": cluster},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: (tmp_path / "s").exists() and len(events(tmp_path, "start")) == 1, "one run runs", 60)
    process.kill()
    process.wait()
    code, out = run(tmp_path, "--step_s=0.5", "--parallel=1", repeats=2, conf=cluster)
    assert code == 0 and "0 to start" in out, out
    assert statuses(tmp_path) == {"seed-000": "finished", "seed-001": "finished"}
    assert len(events(tmp_path, "launch")) == 2, "nothing was started twice"


@pytest.mark.slow
def test_a_worker_that_is_killed_is_a_crash(tmp_path, cluster):
    words = command(tmp_path, "--hang_seeds=0", repeats=1)
    process = subprocess.Popen(
        words,
        cwd=FAKE.parents[2],
        env=os.environ | {"SLURM_CONF": cluster},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: (tmp_path / "s").exists() and len(events(tmp_path, "start")) == 1, "the run runs", 60)
    os.kill(events(tmp_path, "start")[0]["pid"], signal.SIGSTOP)  # so that it cannot say goodbye
    os.kill(events(tmp_path, "launch")[0]["pid"], signal.SIGKILL)
    time.sleep(0.5)
    os.kill(events(tmp_path, "start")[0]["pid"], signal.SIGKILL)
    out, _ = process.communicate(timeout=90)
    assert process.returncode == series.EXIT_CRASHED, out
    (end,) = events(tmp_path, "end")
    assert end["status"] == "crashed" and end["lost"] and "is gone and left no end" in end["error"]


@pytest.mark.slow
def test_the_sequential_test_cancels_what_is_queued(tmp_path, cluster):
    from stats.planfile import write_plan
    from stats.plans import make_plan

    plan = make_plan(0.75, 0.05, 0.01, "made for the test")
    write_plan(plan, tmp_path / "plan.json")
    flags = ("--sequential", "--plan", str(tmp_path / "plan.json"), "--parallel=2", "--step_s=0.1")
    code, out = run(tmp_path, *flags, repeats=plan.cap, conf=cluster)
    assert code == 0, out
    found = list(statuses(tmp_path).values())
    assert found[:4] == ["finished"] * 4 and found.count("cancelled") >= plan.cap - 8
    assert set(found) == {"finished", "cancelled"}
    assert {e["reason"] for e in events(tmp_path, "cancel")} == {"the sequential test decided ACCEPT after 4 runs"}
    hashes = [json.loads(path.read_text())["plan_hash"] for path in (tmp_path / "s" / "runs").glob("*.json")]
    assert set(hashes) == {plan.hash}
