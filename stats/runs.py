"""Logs of training runs, in every public dialect, to typed runs.

Dialects (`Run.dialect`):

    steps   step:125/5690 val_loss:4.290908 train_time:28446ms step_avg:227.57ms [key:value ...]
            also `train_time:96.315s`, `step_avg:nanms`, `train_loss:` or no loss at all in the lines between
    llmc    s:250 tel:6.3097                  (llm.c; says nowhere how many steps were planned)
    table   CSV, JSON, JSONL: one row a run, or one row a validation

A log of the first kind opens with its program's own source, which contains look-alikes; the source ends at
the first line of 60 or more `=`. A log whose source was moved elsewhere says `source sha256:<hash> kept in
<path>` instead.

Two rules keep a damaged log from passing as a whole one. A run is finished only if its last validation is at
the planned step, or at the stopping step that the caller names. And whatever in a log does not fit (a broken
line, a step that is missing, repeated or out of order) is kept as a `Problem` of the run with its line, never
skipped: `final_validation` refuses such a run. What cannot be noticed is whole lines that are gone such that the
others still keep one cadence: the runs of a series have to agree in their validation steps, too.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, ClassVar

from stats.errors import DataError
from stats.values import Problem, Run, Validation

BLOCK_BYTES = 1 << 18
LONGEST_LINE_BYTES = 1 << 20

_SEPARATOR = re.compile(rb"^={60,}[ \t\r]*$", re.MULTILINE)
_RULER = re.compile(rb"^={60,}[ \t\r]*(?:\n|\Z)", re.MULTILINE)  # the same, with the end of its line
_STEP = re.compile(rb"step:(\d{1,9})/(\d{1,9}) (.+)")
_LLMC = re.compile(rb"s:(\d{1,9}) (tel|trl|eval):(\S+)(.*)")
_PAIR = re.compile(r"([A-Za-z_][\w.]*):(\S+)")
_NUMBER = re.compile(r"[+-]?(?:\d{1,12}(?:\.(\d{1,17}))?(?:[eE][+-]?\d{1,2})?|nan|inf)")
# A line that is none of the above but smells of one: a flipped bit or a cut leaves some of these words
# standing.
_BROKEN = re.compile(
    rb"(?:train_time|val_loss|train_loss|step_avg):\S|\dms step_avg|tel:[\d.-]|^.?.?.?tep.?\d|^step:|^s:"
)
_RESUMED = re.compile(rb"^\W*resum\w*\b.*\bstep[ :=]*(\d{1,9})", re.IGNORECASE)
_KEPT_SOURCE = re.compile(rb"^source sha256:([0-9a-f]{64})\b", re.MULTILINE)

_FACTS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("python", re.compile(r"^Running Python (\S+)", re.MULTILINE | re.IGNORECASE)),
    ("torch", re.compile(r"(?:Running PyTorch |\btorch[ :=]+)v?(\d+\.\d+\S*?)[,;)]?(?=\s|$)", re.IGNORECASE)),
    ("triton", re.compile(r"\btriton(?: version)?[ :=]+v?(\d+\.\d+\S*?)[,;)]?(?=\s|$)", re.IGNORECASE)),
    ("hardware", re.compile(r"\bdevice_name=(.+?)(?= with | world_size|$)", re.MULTILINE)),
    ("hardware", re.compile(r"\bcompiled for CUDA \S+ on (.+?)(?= with world_size| world_size|$)", re.MULTILINE)),
    ("hardware", re.compile(r"^(?:hardware|device|gpu)[ :=]+(?!\d+:|name\b)(.+?)\s*$", re.MULTILINE | re.IGNORECASE)),
    ("world_size", re.compile(r"\bworld_size[ :=]+(\d{1,6})\b")),
    ("seed", re.compile(r"\bseed[ :=]+(\d{1,18})\b")),
    ("host", re.compile(r"\bhost(?:name)?(?:_hash)?[ :=]+(\S+)")),
    ("config_hash", re.compile(r"\bconfig[ _]hash[ :=]+(?:sha256:)?([0-9a-f]{8,64})\b")),
    ("kernels_hash", re.compile(r"\bkernels[ _]hash[ :=]+(?:sha256:)?([0-9a-f]{8,64})\b")),
    ("program_hash", re.compile(r"\bprogram_hash[ :=]+(?:sha256:)?([0-9a-f]{8,64})\b")),
    ("data_hash", re.compile(r"\bdata[ _]hash[ :=]+(?:sha256:)?([0-9a-f]{8,64})\b")),
    ("val_data_hash", re.compile(r"\bval_data_hash[ :=]+(?:sha256:)?([0-9a-f]{8,64})\b")),
    ("plan_hash", re.compile(r"\bplan[ _]hash[ :=]+(?:sha256:)?([0-9a-f]{8,64})\b")),
)
# A row of nvidia-smi's table: |   0  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |
_GPU_ROW = re.compile(
    r"^\|\s+\d+\s+((?:NVIDIA|Tesla|Quadro|GeForce|AMD)\b.*?|[A-Z]\w+.*?)\s+(?:On|Off)\s*\|", re.MULTILINE
)
_PROGRAM_LINE = re.compile(rb"^(?:import|from) \w+|^def \w+\(|^class \w+", re.MULTILINE)
# The same, where a program asks the library (`0   NVIDIA H100 80GB HBM3     35 ...`) or prints `nvidia-smi -L`.
_GPU_LINE = re.compile(
    r"^(?:GPU )?\d+(?::\s+|\s{2,})((?:NVIDIA|Tesla|Quadro|GeForce|AMD)\b.*?)(?:\s{2,}| \(UUID|$)", re.MULTILINE
)
# A line of its own kind (`tailavg step:2720 tau:25 val_loss:3.28`): a word, then whole pairs and no planned steps.
_OTHER_KIND = re.compile(rb"^(?!\w*tep\b)[A-Za-z]{3,}(?:\s+[A-Za-z_][\w.]*[:=][^\s/]+)+\s*$")
_CONFIG = re.compile(r"^config:(\{.*\})\s*$", re.MULTILINE)
_PEAK_MEMORY = re.compile(r"peak memory (?:allocated|resident):\s*(\d{1,12}) MiB")


_OF_ONE_RUN = ("seed", "config", "config_hash")


class EmptyLog(DataError):
    """A log without a single result line."""


# ----------------------------------------------------------------------------------------------------
# Logs


def parse_log(stream: BinaryIO, path: str = "<stdin>") -> list[Run]:
    """All runs in one seekable binary stream. Memory: one block and the validations, whatever the log's size.

    Raises EmptyLog where the stream holds no run at all.
    """
    first_byte = 3 if stream.read(3) == b"\xef\xbb\xbf" else 0  # the mark that some editors put before UTF-8
    code_hash, offset, number = _skip_source(stream, first_byte)
    stream.seek(offset)
    reader = _LogReader(path, code_hash)
    for number, line, ended in _numbered_lines(stream, number + 1):  # noqa: B020  (the source's go on)
        if ended:
            reader.read(number, line)
        else:
            reader.read_unended(number, line)
    runs = reader.finish()
    if not runs:
        raise EmptyLog(f"no training run in it: {number} lines, none of them a step or a validation", path)
    return runs


def _skip_source(stream: BinaryIO, start: int = 0) -> tuple[str | None, int, int]:
    """(sha256 of the source, offset just after the separator line that ends it, that line's number).

    Without a separator line there is nothing to skip: (None, start, 0). A log may open with a separator; what stands
    between that one and the next is the source only if it reads like a program."""
    stream.seek(start)
    code_hash, offset, number = _until_separator(stream, start, 0)
    if code_hash is not None or not number:
        return code_hash, offset, number
    stream.seek(offset)
    inner = _until_separator(stream, offset, number)
    if inner[0] is None:
        return None, offset, number
    stream.seek(offset)
    if not _PROGRAM_LINE.search(stream.read(min(inner[1] - offset, LONGEST_LINE_BYTES))):
        return None, offset, number
    return inner


def source_in(stream: BinaryIO, most: int) -> bytes:
    """The source that a log embeds, its ruler lines left out; empty where there is none, or one of more than
    `most` bytes."""
    start = 3 if stream.read(3) == b"\xef\xbb\xbf" else 0
    code_hash, end, _ = _skip_source(stream, start)
    if code_hash is None or end - start > most:
        return b""
    stream.seek(start)
    return [part for part in _RULER.split(stream.read(end - start)) if part.strip()][-1]


def hash_of_source(source: bytes) -> str:
    """sha256 of a program's text as the logs that embed it are hashed: lines of blanks count as empty ones, newlines at
    the end as one."""
    lines = [line if line.strip() else b"" for line in source.split(b"\n")]
    return hashlib.sha256(b"\n".join(lines).rstrip(b"\n") + b"\n").hexdigest()


def _until_separator(stream: BinaryIO, offset: int, lines_before: int) -> tuple[str | None, int, int]:
    """(sha256 of what stands before the next separator line, or None if that is blank; offset after the separator;
    its number). (None, where it began, 0) if there is none."""
    digest, blank_lines, start = hashlib.sha256(), 0, offset
    kept, has_source = None, False
    for number, line, _ in _numbered_lines(stream, lines_before + 1):
        offset += len(line) + 1
        if line[:1] == b"=" and _SEPARATOR.fullmatch(line):
            digest.update(b"\n")
            return kept or (digest.hexdigest() if has_source else None), offset, number
        if not line.strip():
            blank_lines += 1  # held back: newlines at the very end of the source do not count
            continue
        digest.update(b"\n" * (blank_lines + has_source) + line)
        blank_lines, has_source = 0, True
        if number < 10 and (match := _KEPT_SOURCE.match(line)):
            kept = match.group(1).decode()
    return None, start, 0


def _numbered_lines(stream: BinaryIO, first: int) -> Iterator[tuple[int, bytes, bool]]:
    """(line number, line without its end, whether it has one). DataError for a line that is too long for a text."""
    carry, number = b"", first
    while block := stream.read(BLOCK_BYTES):
        lines = (carry + block).split(b"\n")
        carry = lines.pop()
        for line in lines:
            yield number, line, True
            number += 1
        if len(carry) > LONGEST_LINE_BYTES:
            name = getattr(stream, "name", None)
            raise DataError("a line of more than a megabyte: not a log", name, number)
    if carry:
        yield number, carry, False


class _LogReader:
    """Takes a log's lines in order and sorts them into runs. One instance a file."""

    def __init__(self, path: str, code_hash: str | None):
        self.path, self.code_hash = path, code_hash
        self.runs: list[_RunBuilder] = []
        self.run: _RunBuilder | None = None
        self.broken: Problem | None = None  # the last line before this one, if it should have been a result
        self.head: list[str] = []  # what stands before the first result line: the environment
        self.between: list[str] = []  # since the last result line: of the next run, if one begins

    def read(self, number: int, line: bytes) -> None:
        """One line, its number for messages."""
        match = _STEP.match(line)
        if match:
            self._step_line(number, int(match[1]), int(match[2]), match[3])
            self.broken = None
        elif line[:2] == b"s:" and (match := _LLMC.match(line)):
            self._llmc_line(number, int(match[1]), match[2], match[3])
            self.broken = None
        elif line and not line.isspace():
            if self.run is not None and line[:1] == b"=" and _SEPARATOR.fullmatch(line):
                self._no_second_program(number)
            self._other_line(number, line)

    def _no_second_program(self, number: int) -> None:
        """Logs that were written one after the other into one file, each with its source, are not taken apart."""
        if any(_PROGRAM_LINE.match(line.encode()) for line in self.between):
            text = "a second program stands above this line, after a run: keep the logs of different programs apart"
            raise DataError(text, self.path, number)

    def read_unended(self, number: int, line: bytes) -> None:
        """A last line without its end: it is being written, or was cut off. It counts only if it is whole."""
        runs, run, broken = [copy.deepcopy(run) for run in self.runs], self.run, self.broken
        before = sum(len(one.problems) for one in self.runs)
        self.read(number, line)
        if sum(len(one.problems) for one in self.runs) > before or self.broken is not broken:
            index = self.runs.index(run) if run is not None else None
            self.runs, self.run = runs, None if index is None else runs[index]

    def _run_for(self, number: int, step: int, planned: int | None, dialect: str) -> _RunBuilder:
        """The run that a result line belongs to: the open one, or a new one where the steps start again."""
        run = self.run
        if run is not None and run.dialect == dialect and step >= run.last_step:
            if planned != run.planned_steps:
                run.problem(number, f"{planned} planned steps, but {run.planned_steps} in the lines before")
            return run
        self.run = run = _RunBuilder(dialect, number, planned)
        run.head, self.between = self.between, []
        self.runs.append(run)
        if self.broken is not None:  # it may have been the first line of this run
            run.problems.append(self.broken)
        return run

    def _step_line(self, number: int, step: int, planned: int, rest: bytes) -> None:
        run = self.run
        if run is None or step < run.last_step or planned != run.planned_steps:
            run = self._run_for(number, step, planned, "steps")
        if self.between:
            self.between = []
        if b"val_loss" not in rest:
            if not rest.startswith(b"train_"):
                run.problem(number, f"not a step line: {_shown(rest)}")
            run.step_line(number, step)
            run.trace.line(step, rest)
            return
        text = rest.decode("utf-8", "replace").strip()
        pairs = _PAIR.findall(text)
        if " ".join(f"{key}:{value}" for key, value in pairs) != text or len({key for key, _ in pairs}) < len(pairs):
            run.problem(number, f"not a validation line: {_shown(rest)}")
            return
        values = dict(pairs)
        loss, time_s = _number(values.pop("val_loss", "")), _seconds(values.pop("train_time", None))
        average = _seconds(values.pop("step_avg", None))
        if loss is None or isinstance(time_s, str) or isinstance(average, str):
            run.problem(number, f"a number in this validation line cannot be read: {_shown(rest)}")
            return
        average_ms = None if average is None else average * 1e3
        value, decimals = loss
        run.validation(Validation(step, value, time_s, average_ms, decimals, number, tuple(values.items())))

    def _llmc_line(self, number: int, step: int, kind: bytes, value: bytes) -> None:
        run = self._run_for(number, step, None, "llmc")
        self.between = []
        loss = _number(value.decode("utf-8", "replace"))
        if loss is None:
            run.problem(number, f"not a number: {_shown(value)}")
        elif kind == b"tel":
            run.validation(Validation(step, loss[0], None, None, loss[1], number))
        elif kind == b"trl":
            run.step_line(number, step)
            if loss[1] is not None:
                run.trace.loss(step, value.decode())

    def _other_line(self, number: int, line: bytes) -> None:
        if self.run is None:
            if len(self.head) < 500:
                self.head.append(line[:20_000].decode("utf-8", "replace"))
        elif match := _RESUMED.match(line):
            self.run.resume(int(match[1]))
            return
        elif memory := _PEAK_MEMORY.match(line[:200].decode("utf-8", "replace")):
            self.run.peak_memory_mib = int(memory[1])
            return
        elif len(self.between) < 500:
            self.between.append(line[:20_000].decode("utf-8", "replace"))
        if _BROKEN.search(line) and not _OTHER_KIND.match(line):
            self.broken = Problem(number, f"a broken result line: {_shown(line)}")
            if self.run is not None:
                self.run.problem(self.broken.line, self.broken.text)

    def finish(self) -> list[Run]:
        """All runs of the file, as frozen values."""
        facts = _facts("\n".join(self.head))
        stem = Path(self.path).stem
        names = [stem] if len(self.runs) == 1 else [f"{stem}#{i + 1}" for i in range(len(self.runs))]
        built = [self.runs[0].build(self.path, names[0], self.code_hash, facts)] if self.runs else []
        # The head of the file names the seed of its first run: a later run has the one that is told before it, or none.
        shared = {key: value for key, value in facts.items() if key not in _OF_ONE_RUN}
        for run, name in zip(self.runs[1:], names[1:]):
            built.append(run.build(self.path, name, self.code_hash, shared | _facts("\n".join(run.head))))
        return built


class Trace:
    """What the lines between validations tell, as hashes: of their times, and of their training losses.

    Two runs never tell the same unless one is a copy of the other. A hash is made only of enough numbers that no rule
    foretells: one is foretold that lies as far from the number before as that one did from its own."""

    TIMES, LOSSES = "step time", "training loss"
    FEWEST: ClassVar = {
        TIMES: 60,
        LOSSES: 20,
    }  # so that there are 60 bits: a time tells one or more, a loss three or more
    MOST_POINTS = 128  # of the training losses that are kept as a curve
    _TIME = re.compile(rb"train_time:(\d+)(?:\.(\d+))?(?:ms|s)")
    _LOSS = re.compile(rb"train_loss:(\d+\.\d{3,})")

    def __init__(self) -> None:
        self.digests = {what: hashlib.blake2b(digest_size=16) for what in self.FEWEST}
        self.told = dict.fromkeys(self.FEWEST, 0)
        self.last = dict.fromkeys(self.FEWEST, (0, 0))  # number in units of its last digit, distance to that before
        self.points: list[tuple[int, float]] = []
        self.stride = 1

    def __deepcopy__(self, memo: dict) -> Trace:
        twin = Trace()
        twin.digests = {what: digest.copy() for what, digest in self.digests.items()}
        twin.told, twin.last = dict(self.told), dict(self.last)
        twin.points, twin.stride = list(self.points), self.stride
        return twin

    def line(self, step: int, rest: bytes) -> None:
        """A line as logs of the track have it: `train_loss:4.1 train_time:28446ms step_avg:227.57ms`."""
        if match := self._TIME.search(rest):
            self.number(self.TIMES, int(match[1] + (match[2] or b"")))
        if match := self._LOSS.search(rest):
            self.loss(step, match[1].decode())

    def loss(self, step: int, text: str) -> None:
        """A training loss with three digits or more after its point; others are too coarse to tell anything."""
        if len(text.partition(".")[2]) < 3:
            return
        self.number(self.LOSSES, int(text.replace(".", "")))
        if step % self.stride == 0:
            self.points.append((step, float(text)))
        if len(self.points) > self.MOST_POINTS:
            self.stride *= 2
            self.points = [point for point in self.points if point[0] % self.stride == 0]

    def number(self, what: str, units: int) -> None:
        """One number, in units of its last digit."""
        before, usual = self.last[what]
        self.digests[what].update(b"%d " % units)
        self.told[what] += abs(units - before - usual) > 1  # one more or less is rounding
        self.last[what] = units, units - before

    def hashes(self) -> tuple[tuple[str, str], ...]:
        """(what, hash) where enough was told."""
        return tuple((what, self.digests[what].hexdigest()) for what, n in self.FEWEST.items() if self.told[what] >= n)


class _RunBuilder:
    """One run while its lines come in; notices what is missing, repeated or out of order."""

    MOST_PROBLEMS = 100

    def __init__(self, dialect: str, first_line: int, planned_steps: int | None):
        self.dialect, self.first_line, self.planned_steps = dialect, first_line, planned_steps
        self.last_step = -1
        self.head: list[str] = []  # what the file says between the run before and this one
        self.validations: list[Validation] = []
        self.problems: list[Problem] = []
        self.peak_memory_mib: int | None = None
        self.step_lines = 0
        self.first_step_line: int | None = None
        self.last_step_line: int | None = None
        self.step_gap: int | None = None  # between the last two step lines
        self.trace = Trace()

    def problem(self, line: int | None, text: str, doubt: bool = False) -> None:
        if len(self.problems) < self.MOST_PROBLEMS:
            self.problems.append(Problem(line, text, doubt))

    def step_line(self, number: int, step: int) -> None:
        """One line between validations. They come at one cadence, of which only the first (`1, 10, 20`) and the
        last may stand off."""
        last = self.last_step_line
        if last is None:
            self.first_step_line = step
        elif step - last != self.step_gap:
            gap, self.step_gap = self.step_gap, step - last
            ends = gap is not None and step == self.planned_steps and step - last < gap
            starts = gap is not None and last - gap == 1 and step - last == gap + 1 == last
            if step == last:
                self.problem(number, f"a second step line for step {step}")
            elif gap is not None and not ends and not starts:
                self.problem(number, f"the step lines jump from {last} to {step}, after a distance of {gap}")
        self.last_step = self.last_step_line = step
        self.step_lines += 1
        self._check_end(number, step)

    def validation(self, point: Validation) -> None:
        """One validation. Their distances are looked at when all are known; all print alike."""
        number, step = point.line, point.step
        if self.validations:
            before = self.validations[-1]
            if step == before.step:
                self.problem(number, f"a second validation for step {step}")
            if None not in (point.decimals, before.decimals) and point.decimals != before.decimals:
                self.problem(number, f"a loss with {point.decimals} decimals, {before.decimals} in the lines before")
            if before.time_s is None:
                pass
            elif point.time_s is None:
                self.problem(number, "no train_time, unlike the validations before")
            elif point.time_s < before.time_s:
                self.problem(number, f"train_time runs backwards, from {before.time_s:g} s to {point.time_s:g} s")
        # llm.c validates before it trains the step of that number, everyone else after it
        ahead = step - (self.dialect == "llmc")
        if self.last_step_line is not None and ahead - self.last_step_line >= (self.step_gap or step + 1):
            self.problem(number, f"step lines between {self.last_step_line} and {step} are missing")
        self._check_end(number, step)
        self.last_step = step
        self.validations.append(point)

    def _check_cadence(self) -> None:
        """The distance of validations may become smaller (`125, 250, ..., 5625, 5690`). It may also widen, once and
        for good (`50, 100, 200, 300, ...`); a single wider distance is a line that is gone, and `0, 11, 20, 30, ...`
        a step that was changed."""
        points = self.validations
        gaps = [after.step - before.step for before, after in pairwise(points)]
        for index in range(1, len(gaps)):
            if gaps[index] <= gaps[index - 1]:
                continue
            later = gaps[index:-1] or gaps[index:]  # the last may be what is left until the end
            # As many before as the wider distance would have made: they had it, and some of their numbers are wrong.
            moved = points[index].step - points[0].step == index * gaps[index]
            if len(gaps) - index >= 3 and min(later) >= gaps[index] and not moved:
                continue
            before, after = points[index].step, points[index + 1].step
            text = f"a validation is missing between steps {before} and {after}, unless enough runs share that cadence"
            self.problem(points[index + 1].line, text, doubt=True)

    def _check_end(self, number: int | None, step: int) -> None:
        if self.planned_steps is not None and step > self.planned_steps:
            self.problem(number, f"step {step} of {self.planned_steps} planned")

    def resume(self, step: int) -> None:
        """The run went on from a checkpoint at `step`: what came later in the log is told again."""
        self.validations = [point for point in self.validations if point.step <= step]
        self.last_step, self.last_step_line = step, None if self.last_step_line is None else step

    def _check_start(self) -> None:
        """A run begins at step 0 or 1, or at the first step of its cadence."""
        first = self.first_step_line
        if first is not None and first > 1 and first != self.step_gap:
            self.problem(self.first_line, f"the step lines begin at {first}: what came before is missing")
        steps = [point.step for point in self.validations]
        gaps = [after - before for before, after in pairwise(steps)]
        least = 0 if self.dialect == "llmc" else 1  # llm.c validates before its first step, which is number 0
        at_cadence = steps[0] <= least or steps[:1] == gaps[:1] or steps == [self.planned_steps] if steps else True
        if not at_cadence and (self.first_step_line is None or len(steps) > 2):
            self.problem(self.first_line, f"a validation is missing before step {steps[0]}", doubt=True)
        if len(gaps) > 2 and gaps[0] == 2 * gaps[1] and gaps[1] == gaps[2]:
            text = f"a validation is missing between steps {steps[0]} and {steps[1]}"
            self.problem(self.first_line, text, doubt=True)

    def _told_by_its_end(self) -> int | None:
        """llm.c does not say how many steps were planned. It trains on until the last validation, which comes after the
        last step and, as a rule, off the cadence: then that one is the end. Otherwise nothing tells (None)."""
        steps = [point.step for point in self.validations]
        if len(steps) < 3 or self.last_step_line is None or self.last_step_line >= steps[-1]:
            return None
        return steps[-1] if steps[-1] - steps[-2] < steps[-2] - steps[-3] else None

    def build(self, path: str, name: str, code_hash: str | None, facts: dict) -> Run:
        self._check_start()
        self._check_cadence()
        if self.validations:  # the running hash of the tokens comes with every validation; the last one counts
            told = dict(self.validations[-1].extra)
            facts = facts | ({"data_hash": told["data_hash"]} if "data_hash" in told else {})
        return Run(
            path=path,
            name=name,
            dialect=self.dialect,
            first_line=self.first_line,
            planned_steps=self.planned_steps if self.dialect == "steps" else self._told_by_its_end(),
            last_step=None if self.last_step < 0 else self.last_step,
            step_lines=self.step_lines,
            validations=tuple(self.validations),
            problems=tuple(self.problems),
            code_hash=code_hash,
            peak_memory_mib=self.peak_memory_mib,
            traces=self.trace.hashes(),
            training=tuple(self.trace.points),
            **facts,
        )


def _facts(head: str) -> dict:
    """What the environment section says of versions, hardware and hashes."""
    found: dict = {}
    for name, pattern in _FACTS:
        if name not in found and (match := pattern.search(head)):
            found[name] = int(match[1]) if name in ("world_size", "seed") else match[1].strip()
    if rows := _GPU_ROW.findall(head) or _GPU_LINE.findall(head):
        found = {"hardware": rows[0].strip(), "world_size": len(rows)} | found
    if match := _CONFIG.search(head):
        try:
            config = json.loads(match[1])
        except (ValueError, RecursionError):
            config = {}
        for name, kind in (("seed", int), ("preset", str), ("target_loss", float)):
            if isinstance(config.get(name), kind):
                found[name] = config[name]
        if config:
            found["config"] = config
    return found


def _number(text: str) -> tuple[float, int | None] | None:
    """(value, digits after the point), or None if `text` is not one plain number."""
    match = _NUMBER.fullmatch(text)
    if not match:
        return None
    plain = "e" not in text.lower()
    return float(text), len(match[1] or "") if plain and "n" not in text else None


def _seconds(text: str | None) -> float | str | None:
    """Seconds from `28446ms` or `96.315s`; None from nothing or `nanms`; the text itself if it is neither."""
    if text is None:
        return None
    unit = "ms" if text.endswith("ms") else "s"
    value = _number(text.removesuffix(unit)) if text.endswith(unit) else None
    if value is None:
        return text
    seconds = value[0] / 1e3 if unit == "ms" else value[0]
    return seconds if math.isfinite(seconds) else None


def _shown(line: bytes) -> str:
    """A line as it may stand in a message: short, and without control characters."""
    text = ascii(line[:80].decode("utf-8", "replace").strip())
    return text + ("..." if len(line) > 80 else "")
