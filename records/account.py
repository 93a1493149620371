"""A series' folder read once, and the verdict on it decided once; `records.report` writes both.

account = read_account(folder)       record, plan, ledger, logs and their JSON as one value
verdict = decide(account, alpha)     by stats: its t-test, or the sequential test of its plan
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from records.folder import SeriesError
from records.ledger import Ledger, RunState, run_states
from stats.errors import StatsError
from stats.judge import judge
from stats.monitor import monitor
from stats.planfile import read_plan
from stats.plans import Plan
from stats.sequential import ACCEPT, CONTINUE, Decision
from stats.series import Series, load_series
from stats.ttest import TTest, render
from stats.values import Run, final_validation

EXIT_NO_VERDICT = 3  # as of `python -m stats`
EXIT_OF = {ACCEPT: 0, CONTINUE: 4}  # of a sequential test's verdicts; any other is 1


@dataclass(frozen=True)
class Account:
    """All that a series' folder says.

    results: the JSON of every finished run in the order of the seeds, with `run` and `attempts`, checked against its
    log. plan: None without one, or, with `plan_error`, one that cannot be read."""

    folder: Path
    record: dict
    events: tuple[dict, ...]
    states: dict[str, RunState]
    series: Series
    results: tuple[dict, ...]
    plan: Plan | None
    plan_error: str


@dataclass(frozen=True)
class Verdict:
    """What the runs prove: `test` or why there is none; `decision` where the series follows a plan, or `undecided`,
    why there is none."""

    test: TTest | None
    why_none: str
    decision: Decision | None = None
    undecided: str = ""

    @property
    def look(self) -> dict | None:
        """What the ledger keeps of this look at the runs; None where there was nothing to see."""
        if self.decision is not None:
            return {"n": self.decision.n, "decision": self.decision.verdict, "p_value": None}
        if self.test is None or self.undecided:
            return None
        return {"n": self.test.n, "decision": self.test.decision, "p_value": self.test.p_value}

    @property
    def words(self) -> str:
        """For the terminal."""
        if self.decision is not None:
            return self.decision.words
        if self.test is None or self.undecided:
            return f"no verdict: {self.undecided or self.why_none}"
        return render(self.test)

    @property
    def exit_code(self) -> int:
        """0 below the threshold, 1 not shown to be, 3 cannot be judged, 4 the plan wants more runs."""
        if self.decision is not None:
            return EXIT_OF.get(self.decision.verdict, 1)
        if self.test is None or self.undecided:
            return EXIT_NO_VERDICT
        return 0 if self.test.significant else 1


def read_account(folder: str | Path) -> Account:
    """Read a series' folder. Raises SeriesError, with file and cause, where it cannot be read or where a log and its
    JSON disagree."""
    folder = Path(folder)
    try:
        series = load_series(folder)
    except StatsError as error:
        raise SeriesError(str(error), EXIT_NO_VERDICT) from None
    except OSError as error:
        raise SeriesError(f"{folder}: {error.strerror}", EXIT_NO_VERDICT) from None
    if series.record is None or not isinstance(series.record.get("identity"), dict):
        raise SeriesError(f"{folder} is no series: it has no record.json with its identity")
    plan, plan_error = None, ""
    if series.plan_path is not None:
        try:
            plan = read_plan(series.plan_path)
        except StatsError as error:
            plan_error = _within(folder, error)
    events = tuple(Ledger(folder).events())
    states = run_states(events)
    results = tuple(_results(folder, series, states))
    return Account(folder, series.record, events, states, series, results, plan, plan_error)


def _results(folder: Path, series: Series, states: dict[str, RunState]) -> list[dict]:
    found = []
    for name in sorted(name for name, state in states.items() if state.status == "finished"):
        logs = [run for run in series.runs if Path(run.path).stem == name]
        result = logs[0].sidecar if len(logs) == 1 else None
        if result is None:
            what = f"{len(logs)} logs" if len(logs) != 1 else "no JSON"
            raise SeriesError(f"{name} of {folder} finished, but has {what} in runs/; restore what was there")
        _check_against_log(folder / "runs" / f"{name}.json", result, logs[0])
        found.append(result | {"run": name, "attempts": len(states[name].attempts)})
    return found


def _check_against_log(path: Path, result: dict, run: Run) -> None:
    """SeriesError unless a finished run's JSON is whole, and says what its log says."""
    check_result(path, result)
    try:
        point = final_validation(run)
    except (StatsError, ValueError) as error:
        raise SeriesError(f"{path.stem} finished, but its log does not show it: {error}") from None
    if not math.isclose(point.loss, result["final_loss"], abs_tol=10.0 ** -(point.decimals or 12)):
        raise SeriesError(f"{path}: loss {result['final_loss']}, but {run.path} says {point.loss}")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _curve(value: object) -> bool:
    keys = ("step", "loss", "step_avg_ms")
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(point, dict) and all(_number(point.get(key)) for key in keys) for point in value)
    )


_FIELDS: dict[str, Callable[[object], bool]] = {
    "seed": lambda value: isinstance(value, int),
    "final_loss": _number,
    "train_time_s": _number,
    "config": lambda value: isinstance(value, dict),
    "environment": lambda value: isinstance(value, dict),
    "start_time": lambda value: isinstance(value, str),
    "end_time": lambda value: isinstance(value, str),
    "validation": _curve,
}


def check_result(path: Path, result: dict) -> None:
    """Raise SeriesError, naming file and field, unless a finished run's JSON has what a report tells."""
    for field, holds in _FIELDS.items():
        if not holds(result.get(field)):
            raise SeriesError(f"{path}: {field!r} is absent or damaged; restore the file, or run the seed again")


def decide(account: Account, alpha: float) -> Verdict:
    """The verdict on what has been read."""
    test, why_none = None, ""
    try:
        test = judge(account.series, alpha=alpha)
    except StatsError as error:
        why_none = _within(account.folder, error)
    if account.series.plan_path is None or account.plan is None:
        return Verdict(test, why_none, undecided=account.plan_error)
    try:
        return Verdict(test, why_none, monitor(account.series, account.plan).decision)
    except StatsError as error:
        return Verdict(test, why_none, undecided=_within(account.folder, error))


def _within(folder: Path, error: StatsError) -> str:
    """An error's words without the folder's own path: reports are published."""
    return str(error).removeprefix(f"{folder}: ").replace(f"{folder}/", "")
