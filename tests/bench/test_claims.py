"""Pages about the statistics say what the files say that they are made from; rates of false claims keep promises."""

import json

import numpy as np
import pytest

from bench import claims, false_positives
from bench.common import RESULTS


def test_the_page_of_claims_says_what_records_say(tmp_path, capsys):
    edited = tmp_path / "claims.md"
    edited.write_text(claims.PAGE.read_text("utf-8").replace("19 runs", "20 runs", 1), "utf-8")
    assert claims.main(["--check", "--page", str(edited)]) == 1
    told = capsys.readouterr().out
    assert "claims.md is out of date" in told and "claims.svg is up to date" in told
    assert claims.PAGE.read_text("utf-8") == edited.read_text("utf-8").replace("20 runs", "19 runs", 1)
    assert claims.page() == claims.PAGE.read_text("utf-8")


def test_the_table_of_false_positives_says_what_its_file_says(tmp_path, capsys):
    assert false_positives.main(["--check"]) == 0
    edited = tmp_path / "README.md"
    edited.write_text(false_positives.PAGE.read_text("utf-8").replace("| ttest, 3 runs", "| ttest, 4 runs", 1), "utf-8")
    assert false_positives.main(["--check", "--page", str(edited)]) == 1


def test_no_verdict_is_wrong_more_often_than_it_promises():
    """By the kept file: the lower end of every interval lies below what is promised, peeking shows why."""
    rows = json.loads((RESULTS / "false-positives-cpu.json").read_text())["result"]["rows"]
    assert len(rows) >= 20
    for row in rows:
        assert row["promised"] is None or row["low"] <= row["promised"], row
    naive = next(row for row in rows if row["verdict"].startswith("no verdict: p < 0.01"))
    assert naive["low"] > 0.05, "who looks after every run passes far more than one in a hundred"


@pytest.mark.parametrize("row", false_positives.rows(), ids=lambda row: row.verdict)
def test_every_row_can_be_measured(row):
    n = 200 if row.series >= 100_000 else 8
    found = row.count(np.random.default_rng(0), n)
    assert 0 <= found <= n * (0.5 if n == 200 else 1)


def test_the_interval_is_the_exact_one():
    low, high = false_positives.interval(0, 1000)
    assert low == 0 and high == pytest.approx(1 - 0.025 ** (1 / 1000))
    low, high = false_positives.interval(5, 100)
    assert (low, high) == pytest.approx((0.016432, 0.112835), abs=1e-6)
