"""OpenMP's threads: every command that trains bounds their spinning before torch is loaded, unless the user chose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.threads import SPIN_COUNT, bound_spinning

REPO = Path(__file__).resolve().parents[2]


def test_bounded_unless_the_user_has_chosen():
    environment = {}
    bound_spinning(environment)
    assert environment["GOMP_SPINCOUNT"] == str(SPIN_COUNT)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        chosen = {name: "ACTIVE"}
        bound_spinning(chosen)
        assert chosen == {name: "ACTIVE"}


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
    assert done.stdout.strip() == str(SPIN_COUNT), done.stdout + done.stderr
