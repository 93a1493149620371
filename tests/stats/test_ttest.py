"""The t-test: the published numbers, agreement with scipy, refusals and exit codes."""

import json
import math
import subprocess
import sys

import pytest

from stats.cli import main
from stats.errors import DataError, UsageError
from stats.ttest import ttest

# The 19 published final losses and times of the medium track's record with a second input embedding.
LOSSES = [
    2.919502, 2.91976, 2.920582, 2.919331, 2.919008, 2.919827, 2.918785, 2.918519, 2.919297, 2.920061,
    2.918938, 2.919342, 2.918186, 2.920546, 2.91954, 2.919093, 2.918951, 2.919599, 2.919956,
]  # fmt: skip
TIMES_S = [
    1414.299, 1412.033, 1411.668, 1421.735, 1411.998, 1411.094, 1412.637, 1410.047, 1410.509, 1412.048,
    1411.574, 1415.299, 1411.649, 1412.94, 1412.508, 1410.912, 1415.296, 1410.778, 1407.511,
]  # fmt: skip
PUBLISHED = {
    "n": 19,
    "sample_mean": 2.9194117368421053,
    "sample_std": 0.0006300479560324045,
    "t_stat": -4.069816643193549,
    "p_value": 0.00035946114919240566,
    "alpha": 0.05,
    "decision": "REJECT H0 (mean < threshold)",
    "upper_conf_bound_mean": 2.919662383449226,
    "threshold": 2.92,
}


def _close(found: float, published: float) -> bool:
    return math.isclose(found, published, rel_tol=1e-12, abs_tol=0)


def test_every_published_number_of_the_record_is_reproduced():
    result = ttest(LOSSES, times_s=TIMES_S)
    for key, published in PUBLISHED.items():
        found = getattr(result, key)
        same = _close(found, published) if isinstance(published, float) else found == published
        assert same, f"{key}: {found!r}, published {published!r}"
    loss, time = result.loss, result.time_s
    expected = (2.9194117368421053, 2.919342, 0.000613243648848653, 2.918186, 2.920582)
    assert all(map(_close, (loss.mean, loss.median, loss.std, loss.min, loss.max), expected))
    expected = (1412.4492105263155, 1411.998, 2.8062021268488864, 1407.511, 1421.735)
    assert all(map(_close, (time.mean, time.median, time.std, time.min, time.max), expected))


def test_published_numbers_through_the_command_line():
    command = [sys.executable, "-m", "stats.ttest", "--json", *map(str, LOSSES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert list(printed)[: len(PUBLISHED)] == list(PUBLISHED)
    for key, published in PUBLISHED.items():
        assert _close(printed[key], published) if isinstance(published, float) else printed[key] == published
    assert printed["decisions"] == {"0.05": True, "0.01": True}


@pytest.mark.parametrize(
    "losses, words",
    [
        ([2.9], "at least 2"),
        ([], "at least 2"),
        ([2.9, 2.9, 2.9], "no variance"),
        ([2.9, float("nan"), 2.8], "loss 2 of 3 is nan"),
        ([2.9, float("inf")], "inf"),
    ],
)
def test_what_cannot_be_tested_is_refused_with_its_reason(losses, words):
    with pytest.raises(DataError, match=words):
        ttest(losses)


def test_usage_errors():
    for alpha in (0.0, -0.1, 0.51, float("nan")):
        with pytest.raises(UsageError, match="alpha"):
            ttest([1.0, 2.0], alpha=alpha)
    with pytest.raises(UsageError, match="threshold"):
        ttest([1.0, 2.0], threshold=float("nan"))


def test_exit_codes(tmp_path, capsys):
    assert main(["ttest", "2.91", "2.911", "2.912"]) == 0
    assert main(["ttest", "2.93", "2.931", "2.932"]) == 1
    assert main(["ttest", "2.91", "2.911", "--alpha", "7"]) == 2
    assert main(["ttest"]) == 2
    assert main(["no-such-verb"]) == 2
    assert main(["ttest", str(tmp_path)]) == 3
    assert "no logs in this folder" in capsys.readouterr().err
    assert main(["ttest", str(tmp_path / "absent.txt")]) == 3
    assert "absent.txt: cannot be read: No such file" in capsys.readouterr().err
    assert main(["ttest", "2.91", "nan", "2.92"]) == 3
    assert main(["ttest", "2.91"]) == 3
    assert main(["ttest", "2.91", "2.91"]) == 3
