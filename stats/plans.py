"""How many runs, decided before the first of them: power, the design of a series, and the file that fixes it.

A plan says what the series will claim (mean loss below `threshold`), the `margin` below it that would be
worth finding, the noise that is expected and where that number comes from, the errors that are accepted
(alpha: claiming what is not so; beta: missing a true margin), and the rule by which it stops. Its hash goes
into every run's log, so that a reader can see that the design came first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import scipy

from stats.errors import DataError, UsageError
from stats.samples import Sample
from stats.ttest import POOLED_SIGMA, TRACK_THRESHOLD, check_alpha

METHODS = ("fixed", "sequential-t", "group-sequential")
MOST_RUNS = 1000
POOLED_SIGMA_SOURCE = "pooled over 13 groups of public logs of the medium track, 825 degrees of freedom"


@dataclass(frozen=True, slots=True)
class Plan:
    """The design of a series. Losses, `threshold`, `margin` and `sigma` in nats."""

    threshold: float
    margin: float  # the true distance below the threshold that the series shall find
    sigma: float  # standard deviation of the final loss between runs
    sigma_source: str
    alpha: float = 0.01
    beta: float = 0.11
    method: str = "sequential-t"  # one of METHODS
    cap: int = 40  # most runs; with method `fixed`, the runs
    first_look: int = 4  # sequential-t does not decide before this many runs
    looks: tuple[int, ...] = ()  # group-sequential: runs at which it looks, the last of them the cap
    bounds: str = "strict"  # sequential-t: `strict` (1/alpha, beta) or `wald` ((1-beta)/alpha, beta/(1-alpha))
    stop_step: int | None = None  # the validation that decides, where it is not at the planned last step
    steps_per_run: int | None = None
    seconds_per_run: float | None = None
    loss_per_step: float | None = None  # slope at the end of the run, for translating nats into steps; negative
    nodes: int = 1  # machines that one run takes
    note: str = ""
    schema: int = 1

    @property
    def effect(self) -> float:
        """The margin in standard deviations."""
        return self.margin / self.sigma

    @property
    def hash(self) -> str:
        """sha256 over every field that says something: the plan's name in the logs."""
        told = {name: value for name, value in asdict(self).items() if value is not None}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class FixedSample:
    """Runs of a fixed sample that find the margin with this power."""

    power: float
    runs: int
    node_minutes: float | None


@dataclass(frozen=True, slots=True)
class Worth:
    """A difference of the loss in what it costs to get it by training longer, at the slope of the run's end."""

    loss: float  # nats
    steps: float | None
    seconds: float | None
    node_minutes: float | None


@dataclass(frozen=True, slots=True)
class Design:
    """What a plan costs and finds, for people who choose between plans."""

    plan: Plan
    plan_hash: str
    power: float  # to find the margin, with `cap` runs in a fixed sample
    fixed_samples: tuple[FixedSample, ...]
    margin: Worth
    least_margin: Worth  # what `cap` runs find with power 1 - beta: nothing smaller is worth claiming
    seconds: float | None  # training time of `cap` runs
    node_minutes: float | None
    expected: tuple[Expectation, ...] = ()  # sequential methods: by simulation


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a sequential design does at one true mean; simulated."""

    mean: float  # true mean loss
    accepted: float  # share of series that end in ACCEPT
    runs: float  # average number of runs
    standard_error_accepted: float  # Monte-Carlo, as the next one
    standard_error_runs: float


def power(n: int, margin: float, sigma: float, alpha: float) -> float:
    """P(the one-sided t-test at `alpha` rejects | the true mean is `margin` below the threshold), for n
    runs."""
    _check_sizes(margin=margin, sigma=sigma)
    check_alpha(alpha)
    if n < 2:
        return 0.0
    from statsmodels.stats.power import TTestPower

    found = float(TTestPower().power(margin / sigma, n, alpha, alternative="larger"))
    return found if math.isfinite(found) else _power_by_integral(n, margin / sigma, alpha)


def _power_by_integral(n: int, effect: float, alpha: float) -> float:
    """The same where the library's noncentral t fails, at noncentralities above 37: the expectation of
    Phi(noncentrality - critical * s) over s, the sample's standard deviation in units of sigma."""
    df, critical, shift = n - 1, scipy.stats.t.isf(alpha, n - 1), effect * math.sqrt(n)
    scatter = scipy.stats.chi(df, scale=1 / math.sqrt(df))
    low, high = scatter.ppf(1e-12), scatter.isf(1e-12)
    value, _ = scipy.integrate.quad(
        lambda s: scatter.pdf(s) * scipy.stats.norm.cdf(shift - critical * s), low, high, limit=200
    )
    return min(max(float(value), 0.0), 1.0)


def runs_for_power(wanted: float, margin: float, sigma: float, alpha: float) -> int:
    """Least number of runs whose power is at least `wanted`. Raises UsageError beyond MOST_RUNS."""
    if not 0 < wanted < 1:
        raise UsageError(f"power must lie between 0 and 1, not {wanted}")
    if power(MOST_RUNS, margin, sigma, alpha) < wanted:
        raise UsageError(f"a margin of {margin} at sigma {sigma} takes more than {MOST_RUNS} runs")
    low, high = 1, MOST_RUNS  # power grows with n: bisect
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, margin, sigma, alpha) >= wanted else (middle, high)
    return high


def least_margin(n: int, wanted: float, sigma: float, alpha: float) -> float:
    """The margin below the threshold that n runs find with power `wanted`: nothing smaller is worth
    claiming."""
    if n < 2 or not 0 < wanted < 1:
        raise UsageError(f"at least 2 runs and a power between 0 and 1 are needed, not {n} and {wanted}")
    high = sigma
    while power(n, high, sigma, alpha) < wanted:
        high *= 2
    return float(scipy.optimize.brentq(lambda m: power(n, m, sigma, alpha) - wanted, 1e-6 * sigma, high))


def make_plan(
    threshold: float = TRACK_THRESHOLD,
    margin: float = 0.0006,
    sigma: float = POOLED_SIGMA,
    sigma_source: str = POOLED_SIGMA_SOURCE,
    *,
    cap: int | None = None,
    looks: Sequence[int] = (),
    **others,
) -> Plan:
    """A checked plan. Without `cap`: the runs of a fixed sample of power 1 - beta, twice that for
    sequential-t (which ends long before, as a rule). Raises UsageError for a design that makes no sense."""
    plan = Plan(threshold, margin, sigma, sigma_source, cap=2, looks=tuple(looks), **others)
    _check(replace(plan, cap=MOST_RUNS, looks=()))
    if cap is None and looks:
        cap = max(looks)
    if cap is None:
        cap = runs_for_power(1 - plan.beta, margin, sigma, plan.alpha)
        cap = max(cap, plan.first_look) * (2 if plan.method == "sequential-t" else 1)
    if plan.method == "group-sequential" and not looks:
        looks = sorted({max(2, math.ceil(cap * share / 4)) for share in (1, 2, 3, 4)})
    return _check(replace(plan, cap=cap, looks=tuple(looks)))


def design(plan: Plan, simulations: int = 2000, seed: int = 0) -> Design:
    """What `plan` costs and finds. A sequential plan is simulated at its margin, halfway and at the
    threshold."""
    from stats.sequential import simulate

    expected = ()
    if plan.method != "fixed" and simulations:
        means = [plan.threshold - share * plan.margin for share in (1, 0.5, 0)]
        expected = tuple(simulate(plan, mean, simulations, seed) for mean in means)
    samples = []
    for wanted in (0.8, 0.9, 0.95):
        try:
            runs = runs_for_power(wanted, plan.margin, plan.sigma, plan.alpha)
        except UsageError:  # beyond any series that somebody would run
            break
        samples.append(FixedSample(wanted, runs, _node_minutes(plan, runs)))
    return Design(
        plan=plan,
        plan_hash=plan.hash,
        power=power(plan.cap, plan.margin, plan.sigma, plan.alpha),
        fixed_samples=tuple(samples),
        margin=_worth(plan, plan.margin),
        least_margin=_worth(plan, least_margin(plan.cap, 1 - plan.beta, plan.sigma, plan.alpha)),
        seconds=None if plan.seconds_per_run is None else plan.cap * plan.seconds_per_run,
        node_minutes=_node_minutes(plan, plan.cap),
        expected=expected,
    )


def _node_minutes(plan: Plan, runs: float) -> float | None:
    return None if plan.seconds_per_run is None else runs * plan.seconds_per_run * plan.nodes / 60


def _worth(plan: Plan, loss: float) -> Worth:
    steps = loss / abs(plan.loss_per_step) if plan.loss_per_step else None
    if steps is None or plan.steps_per_run is None or plan.seconds_per_run is None:
        return Worth(loss, steps, None, None)
    share = steps / plan.steps_per_run
    return Worth(loss, steps, share * plan.seconds_per_run, _node_minutes(plan, share))


def write_plan(plan: Plan, path: str | Path, overwrite: bool = False) -> None:
    """Write the plan with its hash. A plan that exists is not replaced unless asked: that would be another
    design."""
    path = Path(path)
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; a plan is made once, before the runs (--overwrite replaces it)")
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(asdict(plan) | {"hash": plan.hash}, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"cannot be written: {error.strerror or error}", path) from None
    finally:
        temporary.unlink(missing_ok=True)


def read_plan(path: str | Path) -> Plan:
    """The plan in a file. Raises DataError if it is broken, makes no sense or was changed after it was
    written."""
    from stats.series import read_object

    values = read_object(Path(path))
    written_hash = values.pop("hash", None)
    known = {field.name: field for field in fields(Plan)}
    if unknown := sorted(values.keys() - known.keys()):
        raise DataError(f"a plan has no field {', '.join(map(repr, unknown))}", path)
    try:
        plan = Plan(**{name: _typed(name, value) for name, value in values.items()})
        _check(plan)
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"not a plan: {error}", path) from None
    except UsageError as error:
        raise DataError(f"a plan that makes no sense: {error}", path) from None
    if written_hash is not None and written_hash != plan.hash:
        raise DataError("changed after it was written: its hash does not fit its fields", path)
    return plan


_FLOATS = ("threshold", "margin", "sigma", "alpha", "beta")
_FLOATS_OR_NONE = ("seconds_per_run", "loss_per_step")
_INTEGERS = ("cap", "first_look", "nodes", "schema")
_TEXTS = ("sigma_source", "method", "bounds", "note")


def _typed(name: str, value: object) -> object:
    """A JSON value as the field's type, or TypeError."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    if name in _FLOATS and is_number:
        return float(value)
    if name in _FLOATS_OR_NONE and (value is None or is_number):
        return None if value is None else float(value)
    if (name in _INTEGERS and is_integer) or (name in _TEXTS and isinstance(value, str)):
        return value
    if name in ("stop_step", "steps_per_run") and (value is None or is_integer):
        return value
    if name == "looks" and isinstance(value, list) and all(type(item) is int for item in value):
        return tuple(value)
    raise TypeError(f"{name} is {ascii(value)[:80]}")


def _check(plan: Plan) -> Plan:
    """`plan` itself, or UsageError that names the field and what it must be."""
    _check_sizes(margin=plan.margin, sigma=plan.sigma, seconds_per_run=plan.seconds_per_run)
    check_alpha(plan.alpha)
    if not math.isfinite(plan.threshold):
        raise UsageError(f"the threshold must be finite, not {plan.threshold}")
    if not 0 < plan.beta < 1 - plan.alpha:
        raise UsageError(f"beta must lie between 0 and 1 - alpha, not {plan.beta}")
    if plan.method not in METHODS:
        raise UsageError(f"method {plan.method!r}: one of {', '.join(METHODS)}")
    if plan.bounds not in ("strict", "wald"):
        raise UsageError(f"bounds {plan.bounds!r}: strict or wald")
    if not 0.01 <= plan.effect <= 20:
        raise UsageError(f"margin / sigma is {plan.effect:.3g}: beyond what runs can tell (0.01 to 20)")
    if not 2 <= plan.cap <= MOST_RUNS:
        raise UsageError(f"the cap must lie between 2 and {MOST_RUNS} runs, not {plan.cap}")
    if not 2 <= plan.first_look:
        raise UsageError(f"the first look needs at least 2 runs, not {plan.first_look}")
    if plan.method == "sequential-t" and plan.first_look > plan.cap:
        raise UsageError(f"the first look, at {plan.first_look} runs, is beyond the cap of {plan.cap}")
    for name in ("nodes", "steps_per_run", "stop_step"):
        value = getattr(plan, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}: at least 1, not {value}")
    if plan.schema != 1:
        raise UsageError(f"schema {plan.schema}: this program knows 1")
    looks = plan.looks
    if looks and (list(looks) != sorted(set(looks)) or looks[0] < 2 or looks[-1] != plan.cap or len(looks) > 50):
        raise UsageError(f"looks must grow, from 2 at least to the cap of {plan.cap}: {looks}")
    return plan


def _check_sizes(**sizes: float | None) -> None:
    for name, value in sizes.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{name} must be positive, not {value}")


def pilot_facts(sample: Sample) -> dict:
    """sigma with its source, seconds a run and slope at the end (nats a step), from the runs of a pilot series.

    The scatter of few runs is itself uncertain; the source says how many there were, and the upper end of the 80 %
    interval of sigma.
    """
    from stats.curve import curve
    from stats.ttest import checked_losses

    x = checked_losses(sample.losses)
    n, sigma = len(x), float(x.std(ddof=1))
    high = sigma * math.sqrt((n - 1) / float(scipy.stats.chi2.ppf(0.1, n - 1)))
    facts = {"sigma": sigma, "sigma_source": f"{n} runs of {sample.name}; below {high:.3g} with 90 % confidence"}
    if sample.times_s:
        facts["seconds_per_run"] = sum(sample.times_s) / len(sample.times_s)
    if len(steps := {point.step for point in sample.finals}) == 1 and (step := steps.pop()) > 0:
        facts["steps_per_run"] = step
    slope = curve(sample.runs, float(x.mean())).slope_per_step
    return facts | ({"loss_per_step": slope} if slope else {})


def render(result: Design) -> str:
    """The design in plain text."""
    from stats.text import number, table

    plan = result.plan
    lines = [
        f"claim: mean loss below {plan.threshold:g}; margin {plan.margin:g} nats = {plan.effect:.3g} sigma",
        f"sigma: {plan.sigma:.3g} ({plan.sigma_source})",
        f"alpha {plan.alpha:g}, beta {plan.beta:g}; {plan.method}, at most {plan.cap} runs",
        "",
        f"a fixed sample of {plan.cap} runs finds the margin with power {result.power:.3f}",
        f"the least margin it finds with power {1 - plan.beta:.2f}: {_worth_text(result.least_margin)}",
        f"the margin: {_worth_text(result.margin)}",
    ]
    for sample in result.fixed_samples:
        cost = "" if sample.node_minutes is None else f", {sample.node_minutes:,.1f} node-minutes"
        lines.append(f"a fixed sample for power {sample.power:.0%}: {sample.runs} runs{cost}")
    if result.seconds is not None:
        lines.append(f"{plan.cap} runs take {result.seconds:,.0f} s: {result.node_minutes:,.1f} node-minutes")
    if result.expected:
        rows = [
            [
                number(e.mean),
                f"{e.accepted:.3f}",
                f"{e.standard_error_accepted:.3f}",
                f"{e.runs:.1f}",
                f"{e.standard_error_runs:.1f}",
            ]
            for e in result.expected
        ]
        lines += ["", table(["true mean", "accepted", "+-", "average runs", "+-"], rows)]
    return "\n".join([*lines, "", f"plan {result.plan_hash}"])


def _worth_text(worth: Worth) -> str:
    parts = [f"{worth.loss:.3g} nats"]
    for value, unit in ((worth.steps, "steps"), (worth.seconds, "s"), (worth.node_minutes, "node-minutes")):
        if value is not None:
            parts.append(f"{value:.3g} {unit}")
    return " = ".join(parts)
