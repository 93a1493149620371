"""The Series page shows what stats says, in stats' own words."""

import subprocess
import sys

import pytest
from lab_studio.studio_tools import series

from lab.studio.places import REPO, Places
from lab.studio.verdicts import fingerprint, view, write_report


def test_the_verdict_is_the_command_lines(tmp_path):
    folder = series(tmp_path / "s", [2.9, 2.95, 2.91, 2.93, 2.92])
    command = [sys.executable, "-m", "stats.ttest", str(folder)]
    printed = subprocess.run(command, capture_output=True, text=True, cwd=REPO).stdout
    found = view(folder)
    assert found.verdict == printed.rstrip("\n") and "REJECT" in found.verdict
    assert found.curves.startswith("<svg") and found.losses.startswith("<svg") and not found.sequential
    assert found.rows[1] == ["seed-001", 1, "finished", "4/4", "2.95000", "0.04"]


def test_a_plan_adds_the_sequential_verdict(tmp_path):
    from stats.monitor import monitor, render
    from stats.planfile import write_plan
    from stats.plans import make_plan
    from stats.series import load_series

    folder = series(tmp_path / "s", [2.9, 2.95, 2.91])
    write_plan(make_plan(threshold=3.0, margin=0.05, sigma=0.02), folder / "plan.json")
    found = view(folder)
    assert found.sequential == render(monitor(load_series(folder))) and found.path.startswith("<svg")


@pytest.mark.parametrize("losses", [[], [2.9]])
def test_too_few_runs_are_said_in_words(tmp_path, losses):
    folder = series(tmp_path / "s", losses)
    assert view(folder).verdict.startswith("No verdict:") and len(view(folder).rows) == len(losses)


def test_threshold_and_alpha_are_handed_on(tmp_path):
    folder = series(tmp_path / "s", [2.9, 2.95, 2.91])
    assert "mean loss >= 2.5" in view(folder, threshold=2.5).verdict
    assert "alpha = 0.2" in view(folder, alpha=0.2).verdict


def test_new_runs_change_the_fingerprint(tmp_path):
    folder = series(tmp_path / "s", [2.9, 2.95])
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    log = folder / "runs" / "seed-002.txt"
    log.write_text("x")
    assert fingerprint(folder) != before


def test_the_report_is_one_file_below_the_studios_folder(tmp_path):
    folder = series(tmp_path / "s", [2.9, 2.95, 2.91])
    places = Places(tmp_path / "home", (tmp_path,))
    report = write_report(folder, places)
    text = report.read_text()
    assert report.parent == places.reports and "<svg" in text and "seed-001" in text and 'src="http' not in text
