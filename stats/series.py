"""Files and folders to series of runs.

A series is a folder of repeats of one configuration. Our own has this form; of anyone else's, only the logs
are needed:

    <series>/record.json     what the series claims: threshold, and whatever else its author wrote down
             ledger.jsonl    every launch, finished or not, in order
             plan.json       the statistical plan, if the series has one
             runs/*.txt      the logs: the evidence          runs/*.json  what the trainer noted beside them
             source/<hash>.py   the program, kept once
"""

from __future__ import annotations

import io
import json
import re
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from stats.errors import DataError, NoReader
from stats.offline import SUFFIX as OFFLINE
from stats.offline import read_offline
from stats.runs import EmptyLog, parse_log
from stats.sources import is_event_file, parse_console, read_events
from stats.tables import parse_csv, parse_json, parse_numbers
from stats.values import Problem, Run

LOG_SUFFIXES = (".txt", ".log", ".out", ".stdout")
LARGEST_TABLE_BYTES = 64 << 20
_OTHER_RANK = re.compile(r"[._-]rank[._-]?[1-9]\d*$")
ENDS = ("finished", "crashed", "interrupted")
NOT_LOGS = ("README.txt", "requirements.txt", "LICENSE.txt")
KNOWN = ("record.json", "plan.json", "ledger.jsonl", "README.md", "losses.png", "manifest.json")
NOT_SERIES = ("attempts", "source", "__pycache__")  # what a series keeps beside its runs


@dataclass(frozen=True, slots=True)
class Launch:
    """One start of a run, from the ledger, and what became of it."""

    run: str
    status: str  # queued, running, finished, crashed, interrupted, cancelled or dropped
    line: int  # of its first launch (or submission to a queue) in the ledger
    seed: int | None = None
    attempt: int | None = None
    exit_code: int | None = None
    reason: str | None = None  # of the drop or the cancellation
    launches: int = 1  # how often it was started, resumptions included
    crashes: int = 0  # how many of those crashed


@dataclass(frozen=True, slots=True)
class PassedOver:
    """A file or folder that was looked at and not read as a run, and why."""

    path: str
    reason: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What a command read, and what it passed over."""

    series: int
    runs: int
    passed_over: tuple[PassedOver, ...]


@dataclass(frozen=True, slots=True)
class Series:
    """Runs that belong together, and what is known of them beside their logs."""

    name: str
    path: str
    runs: tuple[Run, ...]
    record: dict | None = None  # record.json
    launches: tuple[Launch, ...] | None = None  # from ledger.jsonl, in the order of their first launch
    ledger_problems: tuple[Problem, ...] = ()
    plan_path: str | None = None
    rank_runs: tuple[Run, ...] = ()  # logs of a run's other processes: no runs of their own
    passed_over: tuple[PassedOver, ...] = ()

    @property
    def threshold(self) -> float | None:
        """The loss that the series says it is judged by: record.json, else what every run's JSON agrees on."""
        if self.record and isinstance(self.record.get("threshold"), (int, float)):
            return float(self.record["threshold"])
        targets = {run.target_loss for run in self.runs}
        return targets.pop() if len(targets) == 1 else None

    @property
    def stop_step(self) -> int | None:
        """The step that record.json says the series stops at, where that is not the planned one."""
        step = (self.record or {}).get("stop_step")
        return step if isinstance(step, int) else None


STUDY = "a study, whose runs are compared with one another: python -m records.study report"


def find_series(paths: Iterable[str | Path]) -> list[Series]:
    """One series for each folder that holds one, and one for all the files that are named together.

    A series is a folder with logs of its own, at any depth; folders below it are series of their own.
    Raises DataError, naming what was looked at, where there is nothing.
    """
    found: list[Series] = []
    files: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            series = _gathered(_once([load_series(folder) for folder in _series_folders(path)]))
            with_runs = [one for one in series if one.runs or one.launches is not None or one.record is not None]
            if not with_runs:
                raise DataError(_nothing_here(series), path)
            loose = tuple(entry for one in series if one not in with_runs for entry in one.passed_over)
            loose += tuple(PassedOver(str(folder), STUDY) for folder in _studies(path))
            with_runs[0] = replace(with_runs[0], passed_over=with_runs[0].passed_over + loose)
            found += with_runs
        else:
            files.append(path)
    if files:
        runs, excerpts = settled([run for path in files for run in read_runs(path)])
        name = files[0].name if len(files) == 1 else f"{len(files)} files"
        found.append(Series(name, str(files[0]), tuple(runs), passed_over=tuple(excerpts)))
    if not found:
        raise DataError("no file or folder was named")
    return named_apart(found)


def named_apart(series: Sequence[Series]) -> list[Series]:
    """`series`, those of one name called by so much of their paths as tells them apart (`old/record`, `new/record`)."""
    found, depth = list(series), 1
    while (alike := [name for name, count in Counter(one.name for one in found).items() if count > 1]) and depth < 9:
        depth += 1
        for index, one in enumerate(found):
            if one.name in alike:
                found[index] = replace(one, name="/".join(Path(one.path).resolve().parts[-depth:]))
    return found


_WATCHERS = {"wandb": 1, "tensorboard": 2}  # who keep a run's losses beside its log: the higher number gives way


def _once(series: list[Series]) -> list[Series]:
    """`series` without what a library kept of runs that are there by a log (or by a library of a lower number) too."""
    if not any(run.dialect in _WATCHERS for one in series for run in one.runs):
        return series
    known: dict[tuple[int, float], list[Run]] = {}  # by (step, loss to three digits) of each validation
    for run in (run for one in series for run in one.runs):
        for point in run.validations:
            known.setdefault((point.step, round(point.loss, 3)), []).append(run)
    found = []
    for one in series:
        kept, passed_over = [], list(one.passed_over)
        for run in one.runs:
            near: list[Run] = []
            if run.validations and run.dialect in _WATCHERS:
                last = run.validations[-1]
                rounded = {round(last.loss + way, 3) for way in (-5e-4, 0, 5e-4)}
                near = [other for loss in rounded for other in known.get((last.step, loss), ())]
            twin = next((other for other in near if _watched(run, other)), None)
            if twin is None:
                kept.append(run)
            else:
                passed_over.append(PassedOver(run.path, f"the run of {twin.path}, kept twice"))
        found.append(replace(one, runs=tuple(kept), passed_over=tuple(passed_over)))
    return found


def _watched(run: Run, other: Run) -> bool:
    """Whether `run` is what a library kept of `other`: it has the other's losses, to the digits of both, at all of its
    steps, or at some if its folder lies within that of the log (a run that was resumed, or evaluated once more)."""
    if _WATCHERS.get(run.dialect, 0) <= _WATCHERS.get(other.dialect, 0):
        return False
    within = Path(other.path).parent in Path(run.path).parents
    if not within and (len(run.validations) == 1 or _steps(run) != _steps(other)):
        return False  # one loss alone may be an accident
    points = {point.step: point for point in other.validations}
    pairs = [(a, points.get(a.step)) for a in run.validations]
    return all(
        b is not None
        and abs(a.loss - b.loss) <= 2**-23 * abs(b.loss) + 0.5 * sum(0.1**p.decimals for p in (a, b) if p.decimals)
        for a, b in pairs
    )


def _gathered(series: list[Series]) -> list[Series]:
    """Series of one run each whose folders lie side by side, differ in a number or a last letter, and hold logs of one
    name (`seed_0/stdout.txt`, `seed_1/stdout.txt`; event files) are the runs of one series: the folder above."""
    beside: dict[tuple, list[Series]] = {}
    keys: dict[int, tuple] = {}
    for one in series:
        if len(one.runs) == 1 and one.record is None and one.launches is None:
            log, folder = Path(one.runs[0].path), Path(one.path).resolve()
            name = "events" if is_event_file(log) else "offline" if log.suffix == OFFLINE else log.name
            number = r"\d{8}_\d{6}-\w+$" if log.suffix == OFFLINE else r"\d+|(?<=[._-])[a-z]$"
            alike = (folder.parent, name, re.sub(number, "#", folder.name))
            beside.setdefault(alike, []).append(one)
            keys[id(one)] = alike
    above = {Path(one.path).resolve() for one in series if one.runs}
    found, taken = [], set()
    for one in series:
        key = keys.get(id(one))
        if key is None or len(beside[key]) < 2 or key[0] in above:
            found.append(one)
        elif key not in taken:
            taken.add(key)
            parts = beside[key]
            names = [part.runs[0].name if key[1] == "offline" else Path(part.path).name for part in parts]
            if len(set(names)) < len(names):
                names = [Path(part.path).name for part in parts]
            runs = [replace(part.runs[0], name=name) for part, name in zip(parts, names)]
            others = tuple(entry for part in parts for entry in part.passed_over)
            folder = Path(parts[0].path).parent
            found.append(Series(folder.resolve().name, str(folder), tuple(settled(runs)[0]), passed_over=others))
    return found


def _studies(folder: Path) -> list[Path]:
    """Folders of studies below `folder`, which the walk for series leaves alone."""
    return sorted(path.parent for path in folder.rglob("study.json") if path.parent != folder)


def reading_of(series: Iterable[Series]) -> Reading:
    """What was read to get these series, and what was not."""
    series = list(series)
    passed_over = tuple(entry for one in series for entry in one.passed_over)
    return Reading(len(series), sum(len(one.runs) + len(one.rank_runs) for one in series), passed_over)


def _nothing_here(series: list[Series]) -> str:
    looked = f"no logs in this folder: looked for {', '.join('*' + suffix for suffix in LOG_SUFFIXES)} at any depth"
    passed = [entry for one in series for entry in one.passed_over]
    told = "".join(f"; {Path(entry.path).name}: {entry.reason}" for entry in passed[:3])
    return looked + told + (f" (and {len(passed) - 3} more)" if len(passed) > 3 else "")


def load_series(folder: str | Path) -> Series:
    """The series in one folder. Raises DataError for a log, record or ledger that cannot be read."""
    folder = Path(folder)
    record_path, ledger_path, plan_path = (folder / name for name in ("record.json", "ledger.jsonl", "plan.json"))
    record = read_object(record_path) if record_path.exists() else None
    launches, problems = read_ledger(ledger_path) if ledger_path.exists() else (None, ())
    known = {launch.run for launch in launches or ()}
    home = folder / "runs" if _logs(folder / "runs") else folder
    found, passed_over = _read_folder(home, known)
    if home != folder:
        passed_over += _others(folder)
    others = tuple(run for run in found if _OTHER_RANK.search(Path(run.path).stem))
    runs = tuple(run for run in found if run not in others)
    plan = str(plan_path) if plan_path.exists() else None
    name = folder.resolve().name
    return Series(name, str(folder), runs, record, launches, problems, plan, others, tuple(passed_over))


def _read_folder(folder: Path, known: set[str]) -> tuple[list[Run], list[PassedOver]]:
    """(runs of the logs in one folder, what was passed over). A text without one result line is no run, unless the
    ledger knows one of its name. A run's output that was kept twice (a.txt, a.out) is one run."""
    runs: list[Run] = []
    passed_over = _others(folder)
    logs = _logs(folder)
    events = [path for path in logs if is_event_file(path)]
    for path in (path for path in logs if path not in events[1:]):
        try:
            if path in events:
                found = read_events(path, with_neighbours=len(events) > 1)
            else:
                found = read_runs(path, may_be_empty=path.suffix.lower() in LOG_SUFFIXES)
        except (EmptyLog, NoReader) as error:  # of a library's file: no run that a ledger could know
            passed_over.append(PassedOver(str(path), error.cause))
            continue
        if not any(run.validations or run.step_lines for run in found) and path.stem not in known:
            passed_over.append(PassedOver(str(path), "no result line of any dialect in it"))
            continue
        twin = next((run for run in runs if _same_output(run, found)), None)
        if twin is not None:
            passed_over.append(PassedOver(str(path), f"the same run as {Path(twin.path).name}, kept twice"))
            continue
        runs += found
    runs, excerpts = settled(runs, known)
    return runs, passed_over + excerpts


def settled(runs: list[Run], known: Collection[str] = ()) -> tuple[list[Run], list[PassedOver]]:
    """(runs in the light of one another, excerpts among them). `known`: runs that the ledger accounts for.

    A cadence that looks as if a validation were gone is the recipe's own where a second run has the same
    validations; one that is regular but for a hole, where three have: a line can be lost at the same place in two
    logs. It is not where another run has these validations and those between them. A few lines of another run, with
    its losses and times (a summary, a log that was cut), are no run; most of its lines, up to its end, are a copy
    that was tampered with.
    """
    cadences = Counter(_steps(run) for run in runs)
    agreed = [
        replace(run, problems=tuple(one for one in run.problems if not one.doubt))
        if any(one.doubt for one in run.problems) and _is_a_recipes(_steps(run), cadences)
        else run
        for run in runs
    ]
    places: dict[tuple, list[int]] = {}
    points = [{(p.step, p.loss, p.time_s) for p in run.validations} for run in agreed]
    for index, told in enumerate(points):
        for point in told:
            places.setdefault(point, []).append(index)
    kept, passed_over = [], []
    for run, told in zip(agreed, points):
        last = run.validations[-1] if run.validations and run.dialect in ("steps", "llmc") else None
        around: Sequence[int] = ()
        if last is not None and last.step > 0 and (last.time_s is not None or len(told) > 2):
            around = places[last.step, last.loss, last.time_s]
        whole = next((agreed[other] for other in around if told < points[other]), None)
        if whole is None or last is None:
            kept.append(run)
        elif run.name in known or (2 * len(told) > len(whole.validations) and last.step == whole.validations[-1].step):
            text = f"{len(told)} of the {len(whole.validations)} validations of {whole.name}, once more: a copy"
            kept.append(replace(run, problems=(Problem(run.first_line, text), *run.problems)))
        else:
            passed_over.append(PassedOver(run.label, f"lines of {whole.name} once more, and not all of them"))
    return kept, passed_over


def _is_a_recipes(steps: tuple[int, ...], cadences: Counter[tuple[int, ...]]) -> bool:
    """Whether enough runs have these validation steps to believe that the recipe made them so."""
    if cadences[steps] < (3 if _regular_but_for_a_hole(steps) else 2):
        return False
    return not any(set(steps) < set(other) for other in cadences if other[-1:] == steps[-1:])


def _regular_but_for_a_hole(steps: tuple[int, ...]) -> bool:
    """Whether one distance holds throughout, but for a place or two where it is a multiple, and goes on after it; the
    last distance may be a shorter one."""
    gaps = [after - before for before, after in pairwise(steps)]
    gaps = [steps[0], *gaps] if steps[0] > 1 else gaps
    if len(gaps) < 4:
        return False
    usual, count = Counter(gaps).most_common(1)[0]
    holes = [index for index, gap in enumerate(gaps[:-1]) if gap != usual]
    after = (gaps[index + 1] for index in holes)
    return 0 < len(holes) <= min(2, count - 1) and all(
        gaps[index] % usual == 0 and (later == usual or (index + 2 == len(gaps) and later < usual))
        for index, later in zip(holes, after)
    )


def _steps(run: Run) -> tuple[int, ...]:
    return tuple(point.step for point in run.validations)


def _same_output(run: Run, found: list[Run]) -> bool:
    """Whether a file holds just the run that another file of the same stem holds."""
    if len(found) != 1 or Path(found[0].path).stem != Path(run.path).stem or not run.validations:
        return False
    told = [[(point.step, point.loss) for point in one.validations] for one in (run, found[0])]
    return told[0] == told[1]


def _others(folder: Path) -> list[PassedOver]:
    """Files of a folder that are no logs by their name; a series' own and a log's JSON are not worth a word."""
    logs = _logs(folder)
    expected = {*KNOWN, *(f"{path.stem}.json" for path in logs)}
    found = []
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".") or path.name in expected
        if path in logs or hidden or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() and path.is_dir():
            found.append(PassedOver(str(path), "a link to a folder: name the folder itself"))
        elif path.name in NOT_LOGS:
            found.append(PassedOver(str(path), "no log, by its name"))
        else:
            found.append(PassedOver(str(path), f"no log, by its ending {path.suffix!r}; name it to read it"))
    return found


def read_runs(path: str | Path, may_be_empty: bool = False) -> list[Run]:
    """All runs in one log or table; `-` is standard input. Raises DataError.

    A log without one result line is an error, or, with `may_be_empty`, a run that has not got anywhere.
    """
    path = Path(path)
    try:
        if str(path) == "-":
            return _parse(io.BytesIO(sys.stdin.buffer.read()), "<stdin>", "")
        if path.suffix == OFFLINE:
            return read_offline(path)
        if is_event_file(path):
            return read_events(path)
        with open(path, "rb") as stream:
            runs = _parse(stream, str(path), path.suffix.lower())
    except EmptyLog:
        if not may_be_empty:
            raise
        runs = [Run(str(path), path.stem, "steps", None, None, None, 0, ())]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", path) from None
    except UnicodeEncodeError:
        raise DataError("no name that a file can have", ascii(str(path))) from None
    except MemoryError:
        raise DataError("too large to be read as a table", path) from None
    beside = path.with_suffix(".json")
    if len(runs) == 1 and path.suffix.lower() in LOG_SUFFIXES and beside.is_file():
        runs = [_with_sidecar(runs[0], read_object(beside))]
    return runs


def _parse(stream: BinaryIO, path: str, suffix: str) -> list[Run]:
    """Log or table, by the file's suffix or, without one that tells, by what it starts with."""
    stream = as_utf8(stream, path)
    start = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    stream.seek(0)
    if not start:
        raise EmptyLog("an empty file", path)
    table = {".csv": parse_csv, ".tsv": parse_csv, ".json": parse_json, ".jsonl": parse_json}.get(suffix)
    if table is None and not suffix:
        if start[:1] in b"[{":
            table = parse_json
        elif b"," in start.split(b"\n")[0] and b":" not in start.split(b"\n")[0]:
            table = parse_csv
    if table is None and not start.strip(b"0123456789.,;+-eE \t\r\n"):
        table = parse_numbers
    if table is None:
        try:
            return parse_log(stream, path)
        except EmptyLog:
            stream.seek(0)
            return parse_console(stream, path)
    text = stream.read(LARGEST_TABLE_BYTES + 1)
    if len(text) > LARGEST_TABLE_BYTES:
        raise DataError(f"a table of more than {LARGEST_TABLE_BYTES >> 20} MiB", path)
    try:
        return table(text.decode("utf-8-sig"), path)
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise DataError(f"not UTF-8 text: {error.reason}", path, line) from None


def as_utf8(stream: BinaryIO, path: str) -> BinaryIO:
    """The stream itself, or its text from UTF-16 (exports of Windows tools), which begins with a mark."""
    mark = stream.read(512)
    stream.seek(0)
    if mark[:2] in (b"\xff\xfe", b"\xfe\xff"):
        data = stream.read(LARGEST_TABLE_BYTES + 1)
        if len(data) > LARGEST_TABLE_BYTES:
            raise DataError(f"UTF-16 text of more than {LARGEST_TABLE_BYTES >> 20} MiB; convert it to UTF-8", path)
        try:
            return io.BytesIO(data.decode("utf-16").replace("\r\n", "\n").encode())
        except UnicodeDecodeError as error:
            raise DataError(f"begins as UTF-16 text and goes on as something else: {error.reason}", path) from None
    if mark.count(0) * 3 > len(mark) > 3:
        raise DataError("zero bytes between its letters: UTF-16 without a mark? Convert it to UTF-8", path)
    return stream


def read_ledger(path: str | Path) -> tuple[tuple[Launch, ...], tuple[Problem, ...]]:
    """(runs in the order of their first launch or submission, with what became of them; lines that make no sense).

    A launch without an end counts as `running`: only its own host can tell whether its process still lives. A last line
    without its newline is being written at this moment, or was cut off: it has not happened yet.
    """
    launches: dict[str, Launch] = {}
    problems: list[Problem] = []
    for number, line in enumerate(_lines(path), 1):
        if not line.strip() or not line.endswith("\n"):
            continue
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if not isinstance(event, dict) or not isinstance(event.get("event"), str):
            problems.append(Problem(number, f"not an event of a ledger: {line.strip()[:80]!a}"))
        elif event["event"] in ("submit", "launch", "end", "drop", "cancel"):
            _add_event(event, number, launches, problems)
    return tuple(launches.values()), tuple(problems)


def _add_event(event: dict, number: int, launches: dict[str, Launch], problems: list[Problem]) -> None:
    """What one event changes. A launch revives a run that was dropped or cancelled."""
    kind, run = event["event"], event.get("run")
    if not isinstance(run, str):
        problems.append(Problem(number, f'event "{kind}" does not name its "run"'))
        return
    before = launches.get(run)
    reason = event.get("reason") if isinstance(event.get("reason"), str) else None
    if kind in ("launch", "submit"):
        seed, attempt = (value if isinstance(value := event.get(key), int) else None for key in ("seed", "attempt"))
        status, count = ("running", 1) if kind == "launch" else ("queued", 0)
        first, crashes = number, 0
        if before:
            first, count, crashes = before.line, before.launches + count, before.crashes
        launches[run] = Launch(run, status, first, seed, attempt, launches=count, crashes=crashes)
        return
    if before is None:
        if kind != "cancel":
            problems.append(Problem(number, f'event "{kind}" of run {run!r}, which was never launched'))
        before = Launch(run, "running", number, launches=0)
    if kind == "end":
        status, code = str(event.get("status")), event.get("exit_code")
        if status not in ENDS:
            problems.append(Problem(number, f"run {run!r} ended as {ascii(status)[:80]}: one of {', '.join(ENDS)}"))
            status = "crashed"
        crashes = before.crashes + (status == "crashed")
        code = code if isinstance(code, int) else None
        launches[run] = replace(before, status=status, exit_code=code, crashes=crashes)
    else:
        launches[run] = replace(before, status={"drop": "dropped", "cancel": "cancelled"}[kind], reason=reason)


def _series_folders(folder: Path) -> Iterator[Path]:
    """Folders at or below `folder` that hold files, the logs' own `runs` folder counted to its parent."""
    if folder.name == "runs" and _logs(folder) and (folder.parent / "record.json").exists():
        yield folder.parent
        return
    if (folder / "study.json").is_file():  # named itself: each of its configurations is a series
        yield from (arm for arm in sorted((folder / "runs").iterdir()) if arm.is_dir())
        return
    own = any((folder / name).is_file() for name in ("record.json", "ledger.jsonl")) or _logs(folder / "runs")
    if own or any(child.is_file() for child in folder.iterdir()):
        yield folder
    for child in sorted(folder.iterdir()):
        skipped = child.name.startswith(".") or child.name in NOT_SERIES or child.name.endswith(".checkpoints")
        skipped = skipped or (child / "study.json").is_file()  # many configurations, compared with one another
        if child.is_dir() and not child.is_symlink() and not skipped and not (own and child.name == "runs"):
            yield from _series_folders(child)


def _is_log(path: Path) -> bool:
    """By its name: a text, the state that Hugging Face's trainer leaves in the folder of a run, what a library kept."""
    if path.name == "trainer_state.json":
        return not path.parent.name.startswith("checkpoint-")
    return path.suffix.lower() in LOG_SUFFIXES or path.suffix == OFFLINE or is_event_file(path)


def _logs(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name not in NOT_LOGS and _is_log(path))


def _with_sidecar(run: Run, beside: dict) -> Run:
    """`run` with the facts that its log leaves out filled in from the JSON beside it."""
    environment, config = (
        told if isinstance(told := beside.get(key), dict) else {} for key in ("environment", "config")
    )
    known = {
        "seed": beside.get("seed"),
        "config_hash": beside.get("config_hash"),
        "kernels_hash": beside.get("kernels_hash"),
        "program_hash": beside.get("program_hash"),
        "data_hash": beside.get("data_hash"),
        "val_data_hash": beside.get("val_data_hash"),
        "plan_hash": beside.get("plan_hash") or None,
        "code_hash": beside.get("code_hash"),
        "host": environment.get("host_hash") or environment.get("hostname_hash"),
        "torch": environment.get("torch"),
        "triton": environment.get("triton"),
        "python": environment.get("python"),
        "hardware": environment.get("hardware"),
        "world_size": environment.get("world_size"),
        "preset": config.get("preset"),
        "target_loss": config.get("target_loss"),
    }
    for key, value in known.items():
        if key.endswith("_hash") and isinstance(value, str):
            known[key] = value.removeprefix("sha256:")
    missing = {key: value for key, value in known.items() if value is not None and getattr(run, key) is None}
    return replace(run, sidecar=beside, **missing)


def read_object(path: Path) -> dict:
    """A JSON object from a file. Raises DataError."""
    try:
        value = json.loads("".join(_lines(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"not JSON: {error}", path, getattr(error, "lineno", None)) from None
    if not isinstance(value, dict):
        raise DataError("a JSON object is needed", path)
    return value


def _lines(path: str | Path) -> list[str]:
    try:
        if Path(path).stat().st_size > LARGEST_TABLE_BYTES:
            raise DataError(f"more than {LARGEST_TABLE_BYTES >> 20} MiB", path)
        return Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", path) from None
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text: {error.reason}", path) from None
