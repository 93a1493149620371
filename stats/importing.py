"""What is understood of a source before anything is judged: the reader, what it took for what, the runs that count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stats.errors import DataError
from stats.series import PassedOver, Series, reading_of
from stats.values import final_validation


@dataclass(frozen=True, slots=True)
class Understood:
    """One run of a source."""

    series: str
    run: str
    reader: str  # and what it took for what
    state: str  # finished, or why it is no final
    step: int | None
    planned_steps: int | None
    final_loss: float | None
    time_s: float | None
    seed: int | None
    validations: int


@dataclass(frozen=True, slots=True)
class Import:
    """All runs of a source, and what was passed over."""

    runs: tuple[Understood, ...]
    passed_over: tuple[PassedOver, ...]


def look(series: Sequence[Series], stop_step: int | None = None) -> Import:
    """What the readers made of `series`; nothing here is judged."""
    runs = []
    for one in series:
        for run in one.runs:
            final, state = None, "finished"
            try:
                final = final_validation(run, one.stop_step if stop_step is None else stop_step)
            except DataError as error:
                state = run.state if run.state not in (None, "finished") else error.cause
            last = final or (run.validations[-1] if run.validations else None)
            runs.append(
                Understood(
                    one.name,
                    run.name,
                    run.origin or f"log, dialect {run.dialect}",
                    state,
                    last.step if last else None,
                    run.planned_steps,
                    final.loss if final else None,
                    last.time_s if last else None,
                    run.seed,
                    len(run.validations),
                )
            )
    return Import(tuple(runs), reading_of(series).passed_over)


def render(result: Import) -> str:
    """The runs as a table, then the readers, then what was passed over."""
    from stats.text import number, table

    dash = lambda value: "-" if value is None else value  # noqa: E731
    rows = [
        [r.series, r.run, r.state[:60], dash(r.step), number(r.final_loss), number(r.time_s), dash(r.seed)]
        for r in result.runs
    ]
    lines = [table(["series", "run", "state", "step", "final loss", "time (s)", "seed"], rows), ""]
    readers = dict.fromkeys(run.reader for run in result.runs)
    lines += [f"read as {reader}" for reader in readers]
    lines += [f"passed over {entry.path}: {entry.reason}" for entry in result.passed_over]
    return "\n".join(lines).rstrip()
