"""OpenMP's threads: every command that trains bounds their spinning before torch is loaded, unless the user chose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.threads import BUSY_SPIN_COUNT, IDLE_SPIN_COUNT, bound_spinning, cores_are_taken

REPO = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("busy", "count"), [(False, IDLE_SPIN_COUNT), (True, BUSY_SPIN_COUNT)])
def test_bounded_unless_the_user_has_chosen(busy, count):
    environment = {}
    bound_spinning(environment, lambda: busy)
    assert environment["GOMP_SPINCOUNT"] == str(count)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        chosen = {name: "ACTIVE"}
        bound_spinning(chosen, lambda: busy)
        assert chosen == {name: "ACTIVE"}


def test_a_child_looks_anew_and_keeps_what_the_user_chose():
    environment = {}
    bound_spinning(environment, lambda: False)
    bound_spinning(environment, lambda: True)  # as in a child of a process that found the machine idle
    assert environment["GOMP_SPINCOUNT"] == str(BUSY_SPIN_COUNT)
    environment["GOMP_SPINCOUNT"] = "7"  # the user's, for the child
    bound_spinning(environment, lambda: True)
    assert environment["GOMP_SPINCOUNT"] == "7"


def test_work_beside_is_what_runs_at_every_look(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2)), raising=False)
    looks = lambda *numbers: iter(numbers).__next__  # noqa: E731
    assert not cores_are_taken(looks(1, 1, 1, 1), cores=2)
    assert not cores_are_taken(looks(3, 2, 1, 4), cores=2)  # something woke up for a moment
    assert cores_are_taken(looks(2, 2, 3, 2), cores=2)
    assert not cores_are_taken(looks(7, 7, 7, 7), cores=8) and cores_are_taken(looks(8, 8, 8, 8), cores=8)
    assert cores_are_taken(lambda: None, cores=2)


@pytest.mark.skipif(not Path("/proc/loadavg").exists(), reason="only Linux tells how many threads run")
def test_a_busy_process_is_seen():
    beside = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        assert any(cores_are_taken() for _ in range(50))
    finally:
        for process in beside:
            process.kill()
            process.wait()


@pytest.mark.parametrize("module", ["train_gpt", "lab.train", "lab.tour", "bench.step"])
def test_set_before_torch_is_loaded(module):
    """A finder that looks at the environment in the moment in which torch is asked for."""
    program = (
        "import sys, os\n"
        "class Look:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch': print(os.environ.get('GOMP_SPINCOUNT', 'unset')); os._exit(0)\n"
        "sys.meta_path.insert(0, Look())\n"
        f"import runpy; sys.argv = ['x', '--help']; runpy.run_module('{module}', run_name='__main__')\n"
        "print('torch was never asked for')\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=REPO)
    told = done.stdout.strip()
    assert told in (str(IDLE_SPIN_COUNT), str(BUSY_SPIN_COUNT)), told + done.stderr
