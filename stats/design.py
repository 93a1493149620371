"""What a plan costs and finds, for people who choose between plans; and the facts that a pilot series gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import scipy

from stats.curve import curve
from stats.errors import UsageError
from stats.plans import Expectation, Plan
from stats.power import least_margin, power, runs_for_power
from stats.samples import Sample
from stats.sequential import simulate
from stats.ttest import checked_losses


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
    power: float  # to find the margin, by the plan's own method (of a sequential one by simulation)
    power_fixed: float  # the same of a fixed sample of `cap` runs
    fixed_samples: tuple[FixedSample, ...]
    margin: Worth
    least_margin: Worth  # what `cap` runs find with power 1 - beta: nothing smaller is worth claiming
    seconds: float | None  # training time of `cap` runs
    node_minutes: float | None
    expected: tuple[Expectation, ...] = ()  # sequential methods: by simulation


def design(plan: Plan, simulations: int = 2000, seed: int = 0) -> Design:
    """What `plan` costs and finds. A sequential plan is simulated at its margin, halfway and at the threshold."""
    expected: tuple[Expectation, ...] = ()
    if plan.method != "fixed" and simulations:
        means = [plan.threshold - share * plan.margin for share in (1, 0.5, 0)]
        expected = tuple(simulate(plan, mean, simulations, seed) for mean in means)
    fixed = power(plan.cap, plan.margin, plan.sigma, plan.alpha)
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
        power=expected[0].accepted if expected else fixed,
        power_fixed=fixed,
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


def pilot_facts(sample: Sample) -> dict:
    """sigma with its source, seconds a run and slope at the end (nats a step), from the runs of a pilot series.

    The scatter of few runs is itself uncertain; the source says how many there were, and the upper end of the 80 %
    interval of sigma.
    """
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
        f"the plan finds the margin with power {result.power:.3f}" + (" (simulated)" if result.expected else ""),
        f"a fixed sample of {plan.cap} runs finds it with power {result.power_fixed:.3f}",
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
