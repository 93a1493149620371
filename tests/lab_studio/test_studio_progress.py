"""What the page reads from a log that is being written."""

import pytest

from lab.studio.progress import MOST_POINTS, Progress, clock_text, curve_rows, loss_span, read_progress

RULER = "=" * 100
SOURCE = (
    "print('step:9/9 train_loss:1.0 train_time:1ms step_avg:1ms')\nstep:1/1 val_loss:0.5 train_time:1ms step_avg:1ms\n"
)
HEAD = f"{SOURCE}{RULER}\nRunning Python 3\n{RULER}\n"


def log(tmp_path, body: str):
    path = tmp_path / "seed-000.txt"
    path.write_text(HEAD + body)
    return path


def test_losses_time_and_what_is_left(tmp_path):
    lines = ["step:0/100 val_loss:4.0 train_time:0ms step_avg:nanms"]
    lines += [f"step:{s}/100 train_loss:{4 - s / 50} train_time:{s * 200}ms step_avg:200.00ms" for s in range(1, 41)]
    lines += ["step:40/100 val_loss:3.3 train_time:8000ms step_avg:200.00ms"]
    found = read_progress(log(tmp_path, "\n".join(lines) + "\nstep:41/100 train_lo"))
    assert (found.step, found.steps, found.seconds) == (40, 100, 8.0)
    assert found.val == ((0, 4.0), (40, 3.3)) and found.train[-1] == (40, pytest.approx(3.2))
    assert found.seconds_left == pytest.approx(12.0)


def test_the_source_in_a_log_is_not_read_as_results(tmp_path):
    assert read_progress(log(tmp_path, "")) == Progress()
    assert read_progress(tmp_path / "none.txt") == Progress()
    (tmp_path / "half.txt").write_text(SOURCE)
    assert read_progress(tmp_path / "half.txt") == Progress()


def test_lines_without_a_loss_count_steps_and_losses_that_are_not_finite_are_left_out(tmp_path):
    body = "step:1/3 train_time:5ms step_avg:5ms\nstep:2/3 train_loss:nan train_time:9ms step_avg:4ms\n"
    found = read_progress(log(tmp_path, body))
    assert found.step == 2 and found.train == () and found.seconds_left == pytest.approx(0.004)


def test_long_curves_are_thinned_to_means(tmp_path):
    count = 3 * MOST_POINTS
    lines = [f"step:{s}/{count} train_loss:{s}.0 train_time:{s}ms step_avg:1ms" for s in range(1, count + 1)]
    found = read_progress(log(tmp_path, "\n".join(lines) + "\n"))
    assert len(found.train) == MOST_POINTS and found.train[0] == (3, 2.0) and found.step == count


def test_clock_texts():
    assert [clock_text(s) for s in (None, 4.2, 187, 3720)] == ["unknown", "4 s", "3:07 min", "1:02:00 h"]


def test_the_chart_shows_curves_and_the_floor_over_its_width():
    rows = curve_rows(Progress(5, 10, ((1, 3.0), (5, 2.0)), ((0, 4.0), (5, 2.5)), 1.0, 1.0), 0.5)
    assert [row for row in rows if row[2] == "floor"] == [(0, 0.5, "floor"), (10, 0.5, "floor")]
    assert [loss for _, loss, line in rows if line == "validation"] == [4.0, 2.5] and len(rows) == 6
    assert curve_rows(Progress(), 0.5) == []


def test_the_chart_is_zoomed_to_the_data():
    """The fall at the start (here from 9) is left out once enough comes after it; a floor stays in sight."""
    rows = [(0, 9.0, "validation"), (50, 2.2, "validation"), (70, 2.1, "training"), (100, 2.0, "validation")]
    assert loss_span(rows, 100) == (pytest.approx(1.99), pytest.approx(2.21))
    assert loss_span([*rows, (0, 1.2, "floor")], 100) == (pytest.approx(1.15), pytest.approx(2.25))
    low, high = loss_span(rows[:1], 100)
    assert low < 9.0 < high
    begun = [(0, 9.0, "training"), (10, 4.0, "training"), (11, 3.9, "validation"), (12, 3.8, "training")]
    low, high = loss_span(begun, 100)
    assert low < 3.8 and high > 9.0, "the chart was empty where hardly more than the fall was there"
