"""The design of a series, decided before the first of its runs. Data only: `stats.planfile` keeps it in a file.

A plan says what the series will claim (mean loss below `threshold`), the `margin` below it that would be
worth finding, the noise that is expected and where that number comes from, the errors that are accepted
(alpha: claiming what is not so; beta: missing a true margin), and the rule by which it stops. Its hash goes
into every run's log, so that a reader can see that the design came first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from stats.errors import UsageError
from stats.jsonio import json_hash
from stats.power import MOST_RUNS, check_sizes, runs_for_power
from stats.ttest import POOLED_SIGMA, TRACK_THRESHOLD, check_alpha

METHODS = ("fixed", "sequential-t", "group-sequential")
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
        return json_hash(told)


@dataclass(frozen=True, slots=True)
class Expectation:
    """What a sequential design does at one true mean; simulated."""

    mean: float  # true mean loss
    accepted: float  # share of series that end in ACCEPT
    runs: float  # average number of runs
    standard_error_accepted: float  # Monte-Carlo, as the next one
    standard_error_runs: float


def make_plan(
    threshold: float = TRACK_THRESHOLD,
    margin: float = 0.0006,
    sigma: float = POOLED_SIGMA,
    sigma_source: str = POOLED_SIGMA_SOURCE,
    *,
    cap: int | None = None,
    looks: Sequence[int] = (),
    **others: Any,
) -> Plan:
    """A checked plan. Without `cap`: the runs of a fixed sample of power 1 - beta, twice that for
    sequential-t (which ends long before, as a rule). Raises UsageError for a design that makes no sense."""
    plan = Plan(threshold, margin, sigma, sigma_source, cap=2, looks=tuple(looks), **others)
    check(replace(plan, cap=MOST_RUNS, looks=()))
    if cap is None and looks:
        cap = max(looks)
    if cap is None:
        cap = runs_for_power(1 - plan.beta, margin, sigma, plan.alpha)
        cap = max(cap, plan.first_look) * (2 if plan.method == "sequential-t" else 1)
    if plan.method == "group-sequential" and not looks:
        looks = sorted({max(2, math.ceil(cap * share / 4)) for share in (1, 2, 3, 4)})
    return check(replace(plan, cap=cap, looks=tuple(looks)))


def check(plan: Plan) -> Plan:
    """`plan` itself, or UsageError that names the field and what it must be."""
    check_sizes(margin=plan.margin, sigma=plan.sigma, seconds_per_run=plan.seconds_per_run)
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
