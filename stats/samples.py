"""From a series to the sample that is tested: which runs count, and whether they are one configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from stats.errors import DataError
from stats.program import differing_lines, program_key
from stats.series import Launch, Series
from stats.values import LeftOut, Run, Validation, decimals_of, final_validation, unit_of

DIVERGED = 4  # exit code of a trainer whose loss was no longer finite


@dataclass(frozen=True, slots=True)
class Sample:
    """The final results of the runs of one configuration, in the order of their launch where a ledger tells it."""

    name: str
    runs: tuple[Run, ...]
    finals: tuple[Validation, ...]
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()  # on what the sample mixes, where the caller allowed that

    @property
    def losses(self) -> tuple[float, ...]:
        """Final validation losses."""
        return tuple(point.loss for point in self.finals)

    @property
    def times_s(self) -> tuple[float, ...]:
        """Training times in seconds, of the runs whose logs tell them."""
        return tuple(point.time_s for point in self.finals if point.time_s is not None)

    @property
    def decimals(self) -> int | None:
        """Digits after the point to which the losses are rounded; None if some have full precision."""
        return decimals_of(self.finals)


def sample_of(
    series: Series, stop_step: int | None = None, drop: Mapping[str, str] | None = None, allow_mixed: bool = False
) -> Sample:
    """The sample of a series: the final validation of every run that counts.

    A run leaves the sample in three ways, each of which stands in `left_out`: the ledger says that it did not finish
    (crashed, interrupted, still running), the ledger dropped it with a reason, or `drop` does ({name: reason}). A run
    that ended because its loss was no longer finite did finish: that was its result.

    Raises DataError for an unfinished or damaged log that nothing accounts for, a loss that is not finite,
    and for mixed configurations unless `allow_mixed`.
    """
    drop = dict(drop or {})
    launches = {launch.run: launch for launch in series.launches or ()}
    stop_step = series.stop_step if stop_step is None else stop_step
    runs, finals, left_out = [], [], []
    for run in in_launch_order(series):
        launch = launches.get(run.name)
        if reason := drop.pop(run.name, None) or reason_left_out(launch) or _not_finished(run):
            left_out.append(LeftOut(run.name, reason))
            continue
        runs.append(run)
        finals.append(final_of(run, launch, stop_step))
    for launch in launches.values():
        if launch.run not in {run.name for run in series.runs}:
            reason = drop.pop(launch.run, None) or reason_left_out(launch)
            if not reason:
                raise DataError(f"run {launch.run} finished by the ledger, but its log is not there", series.path)
            left_out.append(LeftOut(launch.run, reason))
    if drop:
        unknown = ", ".join(map(repr, drop))
        raise DataError(f"no run named {unknown} to drop; there are {_names(series.runs)}", series.path)
    mixed = mixture(runs, stop_step)
    if mixed and not allow_mixed:
        raise DataError(
            f"runs of different configurations: {'; '.join(mixed)}. Name the runs that belong together, "
            "or say --allow-mixed",
            series.path,
        )
    notes = [*mixed, *_machines(runs)]
    return Sample(series.name, tuple(runs), tuple(finals), tuple(left_out), tuple(notes))


def _machines(runs: Sequence[Run]) -> list[str]:
    """A word on times of different machines; losses may be averaged, times say nothing then."""
    groups = grouped([run for run in runs if run.hardware], lambda run: run.hardware)
    if len(groups) < 2:
        return []
    parts = ", ".join(f"{name} ({len(group)} runs)" for name, group in groups.items())
    return [f"different machines: {parts}; their times cannot be compared"]


GROUPS: dict[str, Callable[[Run], object]] = {
    "code": program_key,
    "config": lambda run: run.config_hash,
    "hardware": lambda run: (run.hardware, run.world_size),
    "steps": lambda run: run.planned_steps,
}


def split(series: Series, by: str) -> list[Series]:
    """The series taken apart by `code`, `config`, `hardware` or `steps`; itself where all its runs are alike."""
    groups = grouped(series.runs, GROUPS[by])
    if len(groups) < 2:
        return [series]
    parts = []
    for number, group in enumerate(groups.values(), 1):
        names = {run.name for run in group}
        launches = None if series.launches is None else tuple(one for one in series.launches if one.run in names)
        told = _value_text(group[0].code_hash) if by == "code" else str(GROUPS[by](group[0]))[:40]
        name = f"{series.name} [{by} {number}: {told}]"
        parts.append(replace(series, name=name, runs=tuple(group), launches=launches, passed_over=()))
    return [replace(parts[0], passed_over=series.passed_over), *parts[1:]]


def names_in(series: Series) -> list[str]:
    """Names of all runs of a series, those that only its ledger knows as well."""
    return list(dict.fromkeys([*(run.name for run in series.runs), *(one.run for one in series.launches or ())]))


def drops_in(series: Series, drop: Mapping[str, str] | None) -> dict[str, str]:
    """Of {run: reason}, what is about this series."""
    names = names_in(series) if drop else []
    return {run: reason for run, reason in (drop or {}).items() if run in names}


def selected(
    series: Series,
    threshold: float | None = None,
    stop_step: int | None = None,
    drop: Mapping[str, str] | None = None,
    allow_mixed: bool = False,
) -> Sample:
    """`sample_of` with the selection that several series share: drops apply where a run of that name is."""
    return sample_of(series, stop_step, drops_in(series, drop), allow_mixed)


def _not_finished(run: Run) -> str | None:
    """Why whoever kept the run says that it is no final; None if they do not."""
    return None if run.state in (None, "finished") else f"{run.state}, says {Path(run.path).name}"


def final_of(run: Run, launch: Launch | None, stop_step: int | None) -> Validation:
    """The final validation of a run that counts. Raises DataError if the run diverged or is not finished."""
    if launch and launch.exit_code == DIVERGED:
        raise DataError("its loss was no longer finite, says the ledger: a run that diverged is a result", run.path)
    point = final_validation(run, stop_step)
    if not math.isfinite(point.loss):
        raise DataError(f"the final validation loss is {point.loss}: a run that diverged", run.path, point.line)
    return point


def in_launch_order(series: Series) -> list[Run]:
    """The runs as the ledger started them; runs that it does not know come last, by name."""
    order = {launch.run: index for index, launch in enumerate(series.launches or ())}
    return sorted(series.runs, key=lambda run: (order.get(run.name, len(order)), run.path, run.first_line or 0))


def mixture(runs: Sequence[Run], stop_step: int | None = None) -> list[str]:
    """What differs among runs that should be one configuration, in words; empty if nothing does.

    With `stop_step`, what differs only after it does not count.
    """
    found = []
    for what, key in _CONFIGURATION:
        groups = grouped(runs, partial(_asked, key, stop_step))
        if len(groups) > 1:
            parts = [f"{_value_text(value)} in {_names(group)}" for value, group in groups.items()]
            found.append(f"{len(groups)} different {what}: {', '.join(parts)}")
    if len(groups := grouped(runs, lambda run: run.code_hash)) > 1:
        found += _programs([group[0] for group in groups.values()], runs)
    for what in ("world_size", "val_files"):
        known = [run for run in runs if _told(run, what) is not None]
        groups = grouped(known, partial(_told, what=what))
        if len(groups) > 1:
            parts = [f"{value} in {_names(group)}" for value, group in groups.items()]
            found.append(f"{len(groups)} different {what}: {', '.join(parts)}")
    return found + _configs(runs)


def unlike_losses(samples: Sequence[Sequence[Run]]) -> str:
    """What makes the losses of several samples unlike, in words: their unit, the data that they were measured on. What
    a run does not tell is not held against it; empty where nothing differs."""
    runs = [run for sample in samples for run in sample]
    found = []
    for what, key in (
        ("unit", lambda run: (unit_of(run.validations[-1]) or "nats") if run.validations else None),
        ("validation data", lambda run: run.val_data_hash),
        ("val_files", lambda run: configuration_of(run).get("val_files")),
        ("val_tokens", lambda run: configuration_of(run).get("val_tokens")),
    ):
        values = sorted({str(value) for run in runs if (value := key(run)) is not None})
        if len(values) > 1:
            found.append(f"{what} ({', '.join(value[:24] for value in values[:3])})")
    return ", ".join(found)


def configuration_of(run: Run) -> dict:
    """The configuration that a run's log prints, else that of the JSON beside it; empty if neither has one."""
    beside = (run.sidecar or {}).get("config")
    return run.config or (beside if isinstance(beside, dict) else {})


def grouped(runs: Sequence[Run], key: Callable[[Run], object]) -> dict[object, list[Run]]:
    """Runs by what `key` says of them, in the order of their first."""
    groups: dict[object, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def _asked(key: Callable[[Run, int | None], object], stop_step: int | None, run: Run) -> object:
    return key(run, stop_step)


def _told(run: Run, what: str) -> object:
    return run.world_size if what == "world_size" else (run.config or {}).get(what)


def _programs(firsts: Sequence[Run], runs: Sequence[Run]) -> list[str]:
    """Programs that differ by more than comments, a seed or a run's name."""
    keys = {run.code_hash: program_key(run) for run in firsts}
    if len(set(keys.values())) == 1:
        return []
    groups = grouped(runs, lambda run: keys[run.code_hash])
    parts = [f"{_value_text(group[0].code_hash)} in {_names(group)}" for group in groups.values()]
    one, other, *_ = (group[0] for group in groups.values())
    lines = differing_lines(one, other)
    more = f" ({lines}; take them apart with --group-by code)" if lines else ""
    return [f"{len(groups)} different programs (code hash): {', '.join(parts)}{more}"]


# Fields of a configuration that belong to one run, and change nothing of what it computes.
RUN_FIELDS = frozenset(
    "seed output_dir run_name resume overwrite plan_hash data_dir checkpoint_every keep_checkpoints save_final".split()
)


def _configs(runs: Sequence[Run]) -> list[str]:
    """Fields of the configurations, as the logs print them, that differ; those that belong to a run set aside."""
    told = [run.config for run in runs if run.config is not None]
    fields = sorted({name for config in told for name in config} - RUN_FIELDS)
    found = []
    for name in fields:
        values = list(dict.fromkeys(repr(config.get(name)) for config in told))
        if len(values) > 1:
            found.append(f"configurations differ in {name}: {', '.join(values[:3])}")
    return found


def _data_hash(run: Run, stop_step: int | None) -> str | None:
    """The hash of the tokens until the step that is judged, where the log has it for that step."""
    if stop_step is not None:
        at = next((dict(point.extra).get("data_hash") for point in run.validations if point.step == stop_step), None)
        return at or (run.data_hash if len(run.validations) == 0 else None)
    return run.data_hash


def _steps(run: Run, stop_step: int | None) -> tuple[int, ...]:
    return tuple(point.step for point in run.validations if stop_step is None or point.step <= stop_step)


_CONFIGURATION: tuple[tuple[str, Callable[[Run, int | None], object]], ...] = (
    ("planned steps", lambda run, stop: run.planned_steps),
    ("kernels (kernels hash)", lambda run, stop: run.kernels_hash),
    ("program files (program hash)", lambda run, stop: run.program_hash),
    ("configurations (config hash)", lambda run, stop: run.config_hash),
    ("data (data hash)", _data_hash),
    ("validation data (val data hash)", lambda run, stop: run.val_data_hash),
    ("presets", lambda run, stop: run.preset),
    ("units of the loss", lambda run, stop: unit_of(run.validations[-1]) or "nats" if run.validations else None),
    ("sets of validation steps", _steps),
)


def _value_text(value: object) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} validations up to step {value[-1]}" if value else "no validation"
    return "unknown" if value is None else str(value)[:12]


def reason_left_out(launch: Launch | None) -> str | None:
    """Why the ledger keeps a run out of the sample; None if it does not."""
    if launch is None or launch.status == "finished" or launch.exit_code == DIVERGED:
        return None
    if launch.status == "dropped":
        if not (launch.reason or "").strip():
            raise DataError(f"ledger.jsonl:{launch.line}: run {launch.run} was dropped without a reason")
        return f"dropped: {launch.reason}"
    if launch.status == "queued":
        return "in a queue, not started yet"
    if launch.status == "running":
        return "launched, and its end is not in the ledger: running, or killed"
    details = [] if launch.exit_code is None else [f"exit code {launch.exit_code}"]
    details += [launch.reason] if launch.reason else []
    return launch.status + (f" ({', '.join(details)})" if details else "")


def _names(runs: Sequence[Run], most: int = 4) -> str:
    names = [run.name for run in runs]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
