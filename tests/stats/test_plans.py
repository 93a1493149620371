"""Power, run numbers and the plan file."""

import json
import math

import pytest
import scipy
from hypothesis import given, settings
from hypothesis import strategies as st

from stats.design import design
from stats.errors import DataError, UsageError
from stats.planfile import read_plan, write_plan
from stats.plans import Plan, make_plan
from stats.power import _power_by_integral, least_margin, power, runs_for_power


def test_runs_for_the_track():
    """sigma .0008, offset .0006, alpha .01: exact for 90 and 95 %; 80 % takes 21 runs (20 have 78.4 %)."""
    assert [runs_for_power(wanted, 0.0006, 0.0008, 0.01) for wanted in (0.8, 0.9, 0.95)] == [21, 26, 31]
    assert power(20, 0.0006, 0.0008, 0.01) == pytest.approx(0.784, abs=5e-4)
    assert power(19, 0.0006, 0.0008, 0.01) == pytest.approx(0.756, abs=5e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.floats(0.05, 2), st.floats(0.001, 0.2))
def test_power_is_the_tail_of_the_noncentral_t(n, effect, alpha):
    critical = scipy.stats.t.isf(alpha, n - 1)
    exact = scipy.stats.nct.sf(critical, n - 1, effect * math.sqrt(n))
    assert power(n, effect, 1.0, alpha) == pytest.approx(exact, abs=1e-8)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.floats(0.05, 4), st.floats(0.001, 0.2))
def test_power_by_integral_agrees_with_the_library(n, effect, alpha):
    assert _power_by_integral(n, effect, alpha) == pytest.approx(power(n, effect, 1.0, alpha), abs=1e-6)


def test_power_of_effects_beyond_the_library():
    assert power(562, 1.625, 1.0, 0.005) == pytest.approx(1.0, abs=1e-9)
    assert 0 < power(2, 60.0, 1.0, 0.001) < power(2, 90.0, 1.0, 0.001) < 1


@settings(max_examples=15, deadline=None)
@given(st.floats(0.3, 0.99), st.floats(0.2, 2), st.floats(0.005, 0.1))
def test_run_number_is_the_least_that_has_the_power(wanted, effect, alpha):
    n = runs_for_power(wanted, effect, 1.0, alpha)
    assert power(n, effect, 1.0, alpha) >= wanted > power(n - 1, effect, 1.0, alpha)
    if n >= 2:
        assert power(n, least_margin(n, wanted, 1.0, alpha), 1.0, alpha) == pytest.approx(wanted, abs=1e-6)


def test_plan_survives_its_file(tmp_path):
    plan = make_plan(margin=0.0005, sigma=0.0007, sigma_source="pilot of 12 runs", stop_step=5690, note="é")
    write_plan(plan, tmp_path / "deep" / "plan.json")
    assert read_plan(tmp_path / "deep" / "plan.json") == plan
    assert len(plan.hash) == 64
    assert read_plan(tmp_path / "deep" / "plan.json").hash == plan.hash


def test_a_plan_is_not_replaced_by_accident(tmp_path):
    write_plan(make_plan(), tmp_path / "plan.json")
    with pytest.raises(UsageError, match="exists"):
        write_plan(make_plan(margin=0.001), tmp_path / "plan.json")
    write_plan(make_plan(margin=0.001), tmp_path / "plan.json", overwrite=True)
    assert read_plan(tmp_path / "plan.json").margin == 0.001


def test_a_changed_plan_is_noticed(tmp_path):
    path = tmp_path / "plan.json"
    write_plan(make_plan(), path)
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"margin": 0.0003}))
    with pytest.raises(DataError, match="changed after it was written"):
        read_plan(path)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"margin": -1}, "margin must be positive"),
        ({"margin": float("nan")}, "margin"),
        ({"sigma": 0}, "sigma must be positive"),
        ({"alpha": 0.9}, "alpha"),
        ({"beta": 0}, "beta"),
        ({"cap": 1}, "cap"),
        ({"cap": "many"}, "cap is 'many'"),
        ({"cap": True}, "cap is True"),
        ({"method": "peek"}, "method 'peek'"),
        ({"bounds": "loose"}, "bounds"),
        ({"looks": [9, 3]}, "looks"),
        ({"colour": "red"}, "no field 'colour'"),
        ({"schema": 2}, "schema"),
        ({"threshold": None}, "threshold is None"),
    ],
)
def test_plan_files_that_make_no_sense(tmp_path, change, words):
    path = tmp_path / "plan.json"
    write_plan(make_plan(), path)
    values = json.loads(path.read_text())
    values.pop("hash")
    path.write_text(json.dumps(values | change))
    with pytest.raises(DataError, match=words) as caught:
        read_plan(path)
    assert str(path) in str(caught.value)


def test_design_translates_margins_into_steps_seconds_and_node_minutes():
    plan = make_plan(method="fixed", steps_per_run=5690, seconds_per_run=1410.0, loss_per_step=-1.5e-5, nodes=2)
    found = design(plan)
    assert found.plan.cap == runs_for_power(0.89, 0.0006, 0.0008, 0.01)
    assert found.margin.steps == pytest.approx(40)
    assert found.margin.seconds == pytest.approx(40 / 5690 * 1410)
    assert found.margin.node_minutes == pytest.approx(40 / 5690 * 1410 / 60 * 2)
    assert found.node_minutes == pytest.approx(plan.cap * 1410 / 60 * 2)
    assert [(sample.power, sample.runs) for sample in found.fixed_samples] == [(0.8, 21), (0.9, 26), (0.95, 31)]
    assert found.fixed_samples[0].node_minutes == pytest.approx(21 * 1410 / 60 * 2)
    assert found.power >= 0.89
    assert found.least_margin.loss <= plan.margin
    assert found.least_margin.steps == pytest.approx(found.least_margin.loss / 1.5e-5)
    assert found.expected == ()
    assert design(make_plan(), simulations=0).margin.steps is None
    assert len(design(make_plan(), simulations=200).expected) == 3


def test_hash_depends_on_every_field():
    base = make_plan()
    changed = [make_plan(margin=0.0007), make_plan(note="x"), make_plan(stop_step=5), make_plan(first_look=5)]
    assert len({plan.hash for plan in [base, *changed]}) == 5
    assert isinstance(base, Plan)
