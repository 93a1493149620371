"""Parts side by side: the same numbers however many processes, seconds of each, errors told, and nobody left behind."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import tour
from lab.parts import Parts, Spent

REPO = Path(__file__).resolve().parents[2]


def test_parts_in_two_processes_give_what_one_gives_and_their_errors_are_told():
    for processes in (1, 2):
        with Parts(processes) as parts:
            begun = [parts.start(f"root of {n}", math.sqrt, n) for n in (4, 9, -1)]
            assert [parts.wait(part) for part in begun[:2]] == [2.0, 3.0]
            with pytest.raises(ValueError, match=r"domain|nonnegative"):
                parts.wait(begun[2])
            assert [one.part for one in parts.spent] == ["root of 4", "root of 9"]
            asleep = parts.start("sleep", time.sleep, 0.3)
            parts.wait(asleep)
            assert parts.spent[-1].wall_s > 0.29 > 0.25 > parts.spent[-1].cpu_s
            assert (parts.wait(parts.start("where", os.getpid)) == os.getpid()) == (processes == 1)
            assert parts.wait(parts.start("threads", _threads)) == 1


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def test_seconds_of_the_tour_are_summed_by_part_the_longest_first():
    spent = [Spent("mlp", 1.0, 0.5), Spent("gpt", 5.0, 4.0), Spent("mlp", 2.5, 1.5)]
    assert tour.by_name(spent) == [("gpt", 1, 5.0, 4.0), ("mlp", 2, 3.5, 2.0)]
    shown = tour.spent_html(spent, 2)
    assert re.findall(r"row>(\w+)<td>(\d)<td>([\d.]+)<td>([\d.]+)", shown) == [
        ("gpt", "1", "5.0", "4.0"),
        ("mlp", "2", "3.5", "2.0"),
    ]


@pytest.mark.slow
def test_a_killed_tour_leaves_no_process_behind(tmp_path):
    program = (
        "import os, time\n"
        "from lab.parts import Parts\n"
        "if __name__ == '__main__':\n"
        "    with Parts(2) as parts:\n"
        "        print(parts.wait(parts.start('id', os.getpid)), flush=True)\n"
        "        parts.wait(parts.start('sleep', time.sleep, 60))\n"
    )
    script = tmp_path / "asleep.py"
    script.write_text(program)
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 20
    while Path(f"/proc/{child}").exists() and "State:\tZ" not in Path(f"/proc/{child}/status").read_text():
        assert time.monotonic() < end, "a child outlives its parent"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_tour_whole(tmp_path):
    page = tour.tour(tmp_path, [0], 0.01, 2)
    told = json.loads((tmp_path / "tour.json").read_text())
    parts = {one["part"] for one in told["spent"]}
    assert {f"train {rung}" for rung in tour.LADDER} | {f"look: {name}" for name in tour.LOOKS} < parts
    assert [row["rung"] for row in told["table"]] == list(tour.LADDER)
    text = page.read_text()
    links = [link for link in re.findall('(?:href|src)="([^"#]+)"', text) if not link.startswith("data:")]
    assert links and all((page.parent / link).exists() for link in links)
    assert all(f"{row['mean']:.4f}" in text for row in told["table"]) and "id=seconds" in text
