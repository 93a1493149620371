"""Logs that others' programs keep: consoles of nanoGPT and nanochat, event files of TensorBoard.

Tables (Weights & Biases, Hugging Face, CSV, JSON lines) are read by `stats.tables`, logs of the track by `stats.runs`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from stats.errors import DataError, NoReader
from stats.runs import EmptyLog, Trace
from stats.values import Problem, Run, Validation

_NANOGPT = re.compile(r"step (\d{1,9}): train loss (\S+), val loss (\S+)\s*$")
_NANOGPT_STEP = re.compile(r"iter (\d{1,9}): loss (\S+), time ([\d.]+)ms")
_NANOGPT_END = re.compile(r"^(?:Overriding: )?max_iters = (\d{1,9})\b")
_NANOCHAT = re.compile(r"Step (\d{1,9}) \| Validation (bpb|loss): (\S+)")
_NANOCHAT_STEP = re.compile(r"step (\d{1,9})/(\d{1,9}) .*?\| dt: ([\d.]+)ms")
_SEED = re.compile(r"^(?:Overriding: )?seed\s*[=:]\s*(\d{1,18})\b")
_NUMBER = re.compile(r"-?\d+\.(\d+)|nan|inf")
_VALIDATION_TAGS = re.compile(r"(?:^|[/_ .-])(?:val|valid|validation|eval)(?:$|[/_ .-])", re.I)


def parse_console(stream: BinaryIO, path: str) -> list[Run]:
    """The run of a console log of nanoGPT or nanochat. Raises EmptyLog if it is neither, DataError if it is broken."""
    points: list[Validation] = []
    problems: list[Problem] = []
    planned = seed = last_step = None
    dialect, steps, time_s, trace = "", 0, 0.0, Trace()
    for number, raw in enumerate(stream, 1):
        line = raw[:2000].decode("utf-8-sig" if number == 1 else "utf-8", "replace").rstrip()
        if match := _NANOGPT_END.match(line):
            planned = int(match[1])
        elif match := _SEED.match(line):
            seed = int(match[1])
        elif match := _NANOGPT_STEP.match(line):
            time_s += float(match[3]) / 1e3
            steps, last_step = steps + 1, int(match[1])
            trace.number(Trace.TIMES, round(time_s * 1e6))
            if (told := _NUMBER.fullmatch(match[2])) and told[1]:
                trace.loss(last_step, match[2])
        elif match := _NANOCHAT_STEP.match(line):
            planned = int(match[2])
            time_s += float(match[3]) / 1e3
            steps, last_step = steps + 1, int(match[1])
            trace.number(Trace.TIMES, round(time_s * 1e6))
        elif match := _NANOGPT.match(line) or _NANOCHAT.match(line):
            is_chat = match.re is _NANOCHAT
            dialect = "nanochat" if is_chat else "nanogpt"
            loss = _NUMBER.fullmatch(match[3])
            if loss is None:
                problems.append(Problem(number, f"not a loss: {match[3][:40]!a}"))
                continue
            extra = (("unit", "bits per byte"),) if is_chat and match[2] == "bpb" else ()
            told_time = time_s if is_chat and steps else None
            decimals = len(loss[1]) if loss[1] else None
            point = Validation(int(match[1]), float(match[3]), told_time, None, decimals, number, extra)
            if points and point.step <= points[-1].step:
                problems.append(Problem(number, f"step {point.step} after step {points[-1].step}"))
            points.append(point)
    if not points:
        raise EmptyLog("no training run in it: none of its lines is a step or a validation of a known dialect", path)
    origin = {"nanogpt": "console of nanoGPT: loss from 'val loss'", "nanochat": "console of nanochat: Validation"}
    run = Run(
        path=path,
        name=Path(path).stem,
        dialect=dialect,
        first_line=points[0].line,
        planned_steps=planned,
        last_step=max(points[-1].step, last_step or 0),
        step_lines=steps,
        validations=tuple(points),
        problems=tuple(problems),
        traces=trace.hashes(),
        training=tuple(trace.points),
        seed=seed,
        origin=origin[dialect] + ("" if dialect == "nanogpt" else f" {'bpb' if points[-1].extra else 'loss'}"),
    )
    return [run]


def is_event_file(path: Path) -> bool:
    """Whether a file is one of TensorBoard's, by its name."""
    return ".tfevents." in path.name


def read_events(path: str | Path, with_neighbours: bool = False) -> list[Run]:
    """The run of a TensorBoard event file, through TensorBoard's own reader; `with_neighbours`, that of all event files
    in its folder, which to TensorBoard are one run (one that was resumed writes a second file).

    Raises NoReader without that reader, EmptyLog without a loss, DataError with several that could be the validation's.
    """
    path = Path(path)
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError:
        raise NoReader("a TensorBoard file; reading it needs `pip install tensorboard`", path) from None
    events = EventAccumulator(str(path.parent if with_neighbours else path), size_guidance={"scalars": 0})
    try:
        events.Reload()
        tags = list(events.Tags()["scalars"])
        tag = _validation_tag(tags, path)
        scalars = events.Scalars(tag)
    except DataError:
        raise
    except Exception as error:  # the library's errors have no common class
        raise DataError(f"TensorBoard cannot read it: {type(error).__name__}: {error}", path) from None
    start = min(scalar.wall_time for scalar in scalars)
    by_step = {scalar.step: scalar for scalar in reversed(scalars)}  # evaluated twice at one step, the first one counts
    if any(scalar.value != by_step[scalar.step].value for scalar in scalars):
        raise DataError(f"{tag!r} has two values for one step: two runs in one file?", path)
    points = tuple(
        Validation(step, float(by_step[step].value), by_step[step].wall_time - start, None, None, None)
        for step in sorted(by_step)
    )
    unused = [other for other in tags if other != tag]
    origin = f"TensorBoard: loss from {tag!r} (32 bits), time since its first value"
    origin += f"; not used: {', '.join(map(repr, unused[:8]))}" if unused else ""
    last = points[-1].step
    name = path.parent.name or path.stem
    return [Run(str(path), name, "tensorboard", None, last, last, 0, points, origin=origin)]


def _validation_tag(tags: Iterable[str], path: Path) -> str:
    """The one tag that is a validation loss."""
    tags = list(tags)
    losses = [tag for tag in tags if "loss" in tag.lower()]
    found = [tag for tag in losses if _VALIDATION_TAGS.search(tag)] or (losses if len(losses) == 1 else [])
    told = f"of its scalars ({', '.join(map(repr, tags[:8]))})"
    if not found:
        raise EmptyLog(f"{told} none is a validation loss", path)
    if len(found) > 1:
        raise DataError(f"{told} several could be the validation loss: {', '.join(found)}", path)
    return found[0]
