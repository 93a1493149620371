"""What everything here talks about: runs, their validations, what does not fit in them. No file is read here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stats.errors import DataError


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A run that was launched and is not in the sample, and why."""

    run: str
    reason: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One check. `grade` is the best that it allows: A if it is met."""

    check: str
    grade: str
    text: str


@dataclass(frozen=True, slots=True)
class Validation:
    """One validation of a run."""

    step: int
    loss: float  # nats a token (or a byte); NaN where the log says so
    time_s: float | None  # training time so far, the validations' own left out
    step_avg_ms: float | None
    decimals: int | None  # digits after the point that the log prints of the loss; None: full precision
    line: int | None  # in its file, from 1
    extra: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in a log that does not fit, and where."""

    line: int | None
    text: str
    doubt: bool = False  # of the cadence alone: a second run with the very same validations settles it


@dataclass(frozen=True, slots=True)
class Run:
    """One training run as its log tells it. What the log does not say is None."""

    path: str
    name: str
    dialect: str  # steps, llmc or table
    first_line: int | None
    planned_steps: int | None
    last_step: int | None  # the highest step that any line of the run speaks of
    step_lines: int  # lines between validations, one a step in most dialects
    validations: tuple[Validation, ...]
    problems: tuple[Problem, ...] = ()
    code_hash: str | None = None  # sha256 of the embedded source, newlines at its end counted as one
    seed: int | None = None
    python: str | None = None
    torch: str | None = None
    triton: str | None = None
    hardware: str | None = None
    host: str | None = None
    world_size: int | None = None
    peak_memory_mib: int | None = None
    training: tuple[tuple[int, float], ...] = ()  # (step, training loss) of some lines between validations
    traces: tuple[tuple[str, str], ...] = ()  # (`step time` or `training loss`, hash of all of them)
    config_hash: str | None = None
    kernels_hash: str | None = None  # of the folder kernels/, in older logs
    program_hash: str | None = None  # of all files of the program
    data_hash: str | None = None  # of the training tokens until the last validation, or of the files in older logs
    val_data_hash: str | None = None
    plan_hash: str | None = None
    preset: str | None = None
    target_loss: float | None = None  # the threshold that the run's own configuration names
    config: dict | None = field(default=None, repr=False, compare=False)  # every field that the log prints of it
    state: str | None = None  # finished, crashed, running, ..., where whoever kept the run says so
    origin: str | None = field(default=None, compare=False)  # which reader, and what it took for what
    sidecar: dict | None = field(default=None, repr=False, compare=False)  # the JSON beside an own log, unchecked

    @property
    def label(self) -> str:
        """Path and, where a file holds several runs, the line at which this one starts."""
        return self.path if self.name == Path(self.path).stem else f"{self.path} ({self.name})"

    @property
    def losses_by_step(self) -> dict[int, float]:
        """{step: validation loss}."""
        return {point.step: point.loss for point in self.validations}


def unit_of(point: Validation) -> str | None:
    """The unit of a loss that is not in nats a token; None for those that are, or do not say."""
    return dict(point.extra).get("unit")


def decimals_of(points: Sequence[Validation]) -> int | None:
    """Digits after the point to which these losses are rounded: the most that any of them shows (a table may drop zeros
    at the end); None if some have full precision."""
    digits = [point.decimals for point in points if point.decimals is not None]
    return max(digits) if digits and len(digits) == len(points) else None


def final_validation(run: Run, stop_step: int | None = None) -> Validation:
    """The validation that the run is judged by: at `stop_step` if given, else at the planned last step.

    Raises DataError if the log is damaged, or if there is no validation at that step: the last line of a
    truncated run is not its result.
    """
    stopped = next((point for point in run.validations if point.step == stop_step), None)
    after = stopped.line if stopped and stopped.line is not None else None
    problems = [one for one in run.problems if after is None or one.line is None or one.line <= after]
    if problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DataError(f"damaged log: {first.text}{more}", run.path, first.line)
    if run.state not in (None, "finished"):
        raise DataError(f"its state is {run.state!r}: the last value of such a run is no result", run.path)
    if not run.validations:
        raise DataError(f"no validation in this run ({run.step_lines} step lines)", run.path, run.first_line)
    last = run.validations[-1]
    wanted = run.planned_steps if stop_step is None else stop_step
    if wanted is None:
        raise DataError(
            f"its last validation is at step {last.step}, but this dialect does not say how many steps were "
            "planned; name the step with --stop-step",
            run.path,
            last.line,
        )
    for point in reversed(run.validations):
        if point.step == wanted:
            return point
    planned = f"of {run.planned_steps} planned" if stop_step is None else f"and none at --stop-step {stop_step}"
    raise DataError(
        f"truncated or unfinished run: its last validation is at step {last.step} {planned}"
        + (f", though it trained to step {run.last_step}" if (run.last_step or 0) > last.step else ""),
        run.path,
        last.line,
    )


def is_finished(run: Run, stop_step: int | None = None) -> bool:
    """True if `final_validation` has an answer."""
    try:
        final_validation(run, stop_step)
    except DataError:
        return False
    return True
