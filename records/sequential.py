"""A series that stops as soon as its plan allows: the decision is `stats.monitor`'s, the bookkeeping is here.

The plan lies in the series' folder before the first run, and its hash goes into every run's log. The test sees
losses in the order of launch and waits at the first run without an end, so quick runs are never preferred.
"""

from __future__ import annotations

from pathlib import Path

from records.ledger import Ledger
from stats.monitor import monitor
from stats.planfile import read_plan, write_plan
from stats.plans import Plan, make_plan
from stats.sequential import CONTINUE
from stats.series import load_series


def plan_of(
    folder: Path, given: str | None, threshold: float | None, margin: float | None, sigma: float | None
) -> Plan:
    """The series' plan: the one in its folder, or a copy of `given`, or a new one written there.

    `threshold` is for a new plan. Raises stats' errors, or ValueError if a plan is asked for that is not the
    series' own.
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
            decision = monitor(load_series(self.folder), self.plan).decision
            if decision.verdict != CONTINUE:
                self.reason = f"the sequential test decided {decision.verdict} after {decision.n} runs"
        return self.reason
