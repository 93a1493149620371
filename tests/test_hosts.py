"""More than one host, and more processes than sequences. The hosts are network namespaces joined by veth."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    """(folder, {start: [[exit code, output] of each host]}) of tests/two_hosts.py; skips where it cannot be done."""
    folder = tmp_path_factory.mktemp("hosts")
    done = subprocess.run(
        [sys.executable, str(REPO / "tests" / "two_hosts.py"), str(folder)],
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder, json.loads(done.stdout.splitlines()[-1])


def losses(folder: Path) -> list[tuple[str, str, float]]:
    """(step, kind, value) of every loss in a run's log."""
    body = (folder / "out" / "run.txt").read_text().rpartition("=" * 100)[2]
    found = re.findall(r"^step:(\d+)/\d+ (val_loss|train_loss):(\S+)", body, re.MULTILINE)
    return [(step, kind, float(value)) for step, kind, value in found]


def test_two_hosts_train_as_one_does(trained):
    folder, starts = trained
    assert [code for code, _ in starts["one host"] + starts["two hosts"]] == [0, 0, 0], starts
    one, two = losses(folder / "one"), losses(folder / "whole-0")
    assert len(one) == 15 and [row[:2] for row in two] == [row[:2] for row in one]
    assert max(abs(a[2] - b[2]) for a, b in zip(one, two)) <= 2e-5
    assert not (folder / "whole-1" / "out").exists(), "only the first process writes"


def test_a_signal_on_one_host_stops_both_and_they_resume_without_a_shared_disk(trained):
    folder, starts = trained
    assert [code for code, _ in starts["stopped"]] == [143, 143], starts["stopped"]
    assert [code for code, _ in starts["resumed"]] == [0, 0], starts["resumed"]
    assert "resumed from the checkpoint of step 5" in starts["resumed"][0][1]
    assert losses(folder / "stopped-0") == losses(folder / "whole-0")


def test_more_processes_than_sequences_cut_them_and_say_so(trained):
    folder, starts = trained
    assert starts["more processes than sequences"][0][0] == 0
    told = "2 processes: training sequences cut from 256 to 128 tokens"
    assert told in (folder / "cut" / "out" / "run.txt").read_text()
    assert json.loads((folder / "cut" / "out" / "run.json").read_text())["config"]["train_seq_len"] == 128
