"""A series that stops as soon as its plan allows: the statistics are `stats.sequential`'s, the bookkeeping is here.

The plan lies in the series' folder before the first run, and its hash goes into every run's log. The test sees
losses in the order of launch and waits at the first run without an end, so quick runs are never preferred.
"""

from __future__ import annotations

from pathlib import Path

from records.ledger import Ledger
from stats.planfile import read_plan, write_plan
from stats.plans import Plan, make_plan
from stats.sequential import ACCEPT, CONTINUE, Decision, decide
from stats.series import read_runs
from stats.values import final_validation

EXIT_NON_FINITE = 4  # the trainer's


def exit_code(decision: Decision) -> int:
    """0 accepted, 4 more runs are needed, 1 otherwise; as `python -m stats monitor`."""
    return {ACCEPT: 0, CONTINUE: 4}.get(decision.verdict, 1)


def plan_of(
    folder: Path, given: str | None, threshold: float | None, margin: float | None, sigma: float | None
) -> Plan:
    """The series' plan: the one in its folder, or a copy of `given`, or a new one written there.

    `threshold` is for a new plan. Raises stats' errors, or ValueError if a plan is asked for that is not the series'
    own.
    """
    path = folder / "plan.json"
    if path.exists():
        plan = read_plan(path)
        if given and read_plan(given).hash != plan.hash:
            raise ValueError(f"{path} is another plan than {given}: a series keeps the plan it began with")
        if any(
            value is not None and value != getattr(plan, key) for key, value in (("margin", margin), ("sigma", sigma))
        ):
            raise ValueError(f"{path} has margin {plan.margin} and sigma {plan.sigma}: a series keeps its plan")
        return plan
    if given:
        plan = read_plan(given)
    else:
        wanted = {"margin": margin, "sigma": sigma}
        if sigma is not None:
            wanted["sigma_source"] = "given with --sigma"
        if threshold is None:
            raise ValueError("the trainer does not tell its target_loss; give --plan FILE")
        plan = make_plan(threshold, **{key: value for key, value in wanted.items() if value is not None})
    write_plan(plan, path)
    return plan


def losses_in_order(folder: Path) -> list[float]:
    """Final losses, from the logs, of the longest stretch of launches from the first on that have all ended.

    Crashed and dropped runs are passed over, except that a run whose loss was no longer finite stays as NaN, which
    the test refuses to judge.
    """
    losses = []
    for state in Ledger(folder).runs().values():
        if not state.attempts:
            if state.submitted and not state.cancelled:
                break  # in a cluster's queue: later ones that were quicker must wait for it
            continue
        if state.status == "finished":
            (run,) = read_runs(folder / "runs" / f"{state.run}.txt")
            losses.append(final_validation(run).loss)
        elif state.status == "crashed" and state.attempts[-1].end.get("exit_code") == EXIT_NON_FINITE:
            losses.append(float("nan"))
        elif state.status not in ("crashed", "dropped"):
            break
    return losses


class Watch:
    """Asks the test again whenever the ledger has grown."""

    def __init__(self, folder: Path, plan: Plan):
        self.folder, self.plan = folder, plan
        self.seen_bytes = -1
        self.reason: str | None = None

    def __call__(self) -> str | None:
        """Why no further run is needed, or None. Raises stats' DataError for a run that diverged."""
        path = Ledger(self.folder).path
        size = path.stat().st_size if path.exists() else 0
        if size != self.seen_bytes:
            self.seen_bytes = size
            decision = decide(losses_in_order(self.folder), self.plan)
            if decision.verdict != CONTINUE:
                self.reason = f"the sequential test decided {decision.verdict} after {decision.n} runs"
        return self.reason
