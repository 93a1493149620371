"""A small fault campaign: one run of each quick kind. The large one is `python -m bench.faults --seed 1 --runs 100`."""

import json
import os
import subprocess
import sys

import pytest

from bench.common import REPO, read_result
from bench.faults import KINDS, broken_promises, page

# One run each keeps the default suite quick; the rest are variations, which the large campaign covers.
SMALL = [
    "kill -9 at a place in the program",
    "kill -9 at a random moment",
    "SIGTERM at a place in the program",
    "kill -9 of one rank of two, restarted",
    "Ctrl-C: SIGINT of the ranks and their agent",
    "disk full",
    "read-only folder",
    "newest checkpoint cut short",
    "newest checkpoint with a flipped bit",
    "shard that shrinks while it is read",
    "shard rewritten while it is read",
    "NaN in a gradient",
    "two starts with one name",
    "wrong clock",
]


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> dict:
    """{kind: outcome} of a campaign with one run a kind, in one process tree of its own."""
    result = tmp_path_factory.mktemp("faults") / "result.json"
    kinds = [word for kind in SMALL for word in ("--kind", kind)]
    command = [sys.executable, "-m", "bench.faults", "--seed", "7", "--runs", str(len(SMALL)), "--json", str(result)]
    done = subprocess.run(
        command + kinds,
        cwd=REPO,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=290,
    )
    assert result.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return {outcome["kind"]: outcome for outcome in json.loads(result.read_text())["outcomes"]}


@pytest.mark.parametrize("kind", SMALL)
def test_a_hurt_run_resumes_bit_for_bit_or_stops_with_its_cause(kind, campaign):
    outcome = campaign[kind]
    assert not outcome["problems"], "\n".join(outcome["problems"])
    assert outcome["ending"] in ("resumed", "stopped")
    assert outcome["message"] or outcome["ending"] == "resumed"
    assert outcome["codes"], "nothing was started"


def test_the_small_campaign_names_kinds_of_the_large_one():
    assert set(SMALL) <= KINDS.keys()


def test_a_checkpoint_that_was_reported_and_is_gone_is_noticed(tmp_path):
    (tmp_path / "run.txt").write_text("=" * 100 + "\ncheckpoint:4 run.checkpoints/step-000004.safetensors\n")
    (problem,) = broken_promises(tmp_path)
    assert problem.startswith("reported as saved, but ") and "step-000004" in problem


def test_the_page_counts_what_went_wrong():
    outcome = dict(kind="disk full", ending="stopped", message="No space | left", problems=[])
    result = {
        "command": "c",
        "date": "d",
        "environment": {"cpu": "x", "torch": "2"},
        "result": {"outcomes": [outcome, outcome | {"problems": ["lost a checkpoint"]}]},
    }
    text = page(result, None, None)
    assert "**1 of 2 runs" in text
    (row,) = [line for line in text.splitlines() if line.startswith("| disk full")]
    assert [cell.strip() for cell in row.split("|")[2:6]] == ["2", "0", "2", "1"]


def test_the_committed_page_is_that_of_the_committed_results():
    found = [read_result(name) for name in ("faults", "fuzz", "load")]
    assert (REPO / "docs" / "faults.md").read_text(encoding="utf-8") == page(*found), "python -m bench.faults --page"
