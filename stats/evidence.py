"""What a cheater would have to change, checked against everything else that was written down.

The ledger's lines hold together (`stats.chain`), the end of a run seals its log, its JSON and its loss, the first
line seals threshold, plan and configuration. Curves of different runs must differ as much as noise makes them, times
must fit the clock, and what is said twice must be the same. `README.md` in this folder says what remains possible.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

from stats.chain import HEAD, check_links, cut_at, link
from stats.copies import within
from stats.errors import StatsError, UsageError
from stats.jsonio import json_hash
from stats.planfile import read_plan
from stats.samples import RUN_FIELDS, Sample
from stats.series import Series, read_runs
from stats.values import Finding, Run, is_finished

GRADES = "ABCDF"
FEWEST_TIMED = 4  # runs, to call one of them too quick
CLOCK_TOLERANCE_S = 300.0  # between the clocks of two hosts


def ledger_bytes(series: Series) -> bytes | None:
    """The ledger as it lies there; None if there is none."""
    path = Path(series.path) / "ledger.jsonl"
    return path.read_bytes() if series.launches is not None and path.is_file() else None


def events_of(series: Series) -> list[dict]:
    """Every event of the ledger that can be read, in order."""
    events = []
    for line in (ledger_bytes(series) or b"").splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and isinstance(event.get("event"), str):
            events.append(event)
    return events


# ----------------------------------------------------------------------------------------------------
# The ledger


def chain(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """Every line holds to the lines above it."""
    data = ledger_bytes(series)
    if data is None:
        return
    linked, problems = check_links(data)
    for problem in problems[:3]:
        yield Finding("chain", "F", f"ledger.jsonl:{problem.line}: {problem.text}")
    if not linked:
        yield Finding("chain", "C", "an older ledger, without links: lines may have been changed, moved or taken out")
    elif not problems:
        total = sum(bool(line.strip()) for line in data.splitlines())
        older = f"; the first {total - linked} lines are older than the links" if total > linked else ""
        yield Finding("chain", "C" if older else "A", f"{linked} lines hold together, head {link(data)}{older}")


def order(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """A run that has finished is not started again, cancelled or dropped, and time goes on from line to line."""
    finished: set[str] = set()
    latest: tuple[float, str] | None = None
    for event in events_of(series):
        run, kind = event.get("run"), event["event"]
        if run in finished and kind in ("launch", "submit", "cancel", "drop"):
            verb = {"launch": "started again", "submit": "queued again", "cancel": "cancelled", "drop": "dropped"}[kind]
            yield Finding("order", "F", f"{run} was {verb} after it had finished: its result was known")
        if kind == "end" and event.get("status") == "finished" and isinstance(run, str):
            finished.add(run)
        moment = _moment(event.get("time"))
        if moment is None:
            continue
        if latest and moment < latest[0] - CLOCK_TOLERANCE_S:
            text = f"the ledger's time runs backwards, from {latest[1]} to {event['time']}: lines were moved"
            yield Finding("order", "F", text)
        latest = max(latest or (moment, event["time"]), (moment, event["time"]))
    yield from _set_aside_though_finished(series)


def _set_aside_though_finished(series: Series) -> Iterator[Finding]:
    """Among the attempts that were set aside, none had finished."""
    for path in sorted((Path(series.path) / "attempts").glob("*.txt")):
        try:
            complete = any(is_finished(run) for run in read_runs(path, may_be_empty=True))
        except StatsError:
            continue
        if complete:
            yield Finding("order", "F", f"attempts/{path.name} is a complete run that was set aside")


def holes(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """Seeds of a series go up one by one: one that is not in the ledger may have been taken out with its run."""
    seeds = {e["seed"] for e in events_of(series) if isinstance(e.get("seed"), int) and e["event"] in _STARTS}
    if isinstance((series.record or {}).get("identity"), dict) and len(seeds) > 1:
        missing = sorted(set(range(max(seeds) + 1)) - seeds)
        if missing:
            told = ", ".join(map(str, missing[:5]))
            yield Finding("holes", "D", f"no launch of seed {told} in the ledger, though later ones were started")


_STARTS = ("launch", "submit", "cancel")

# ----------------------------------------------------------------------------------------------------
# Seals


def seals(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """A finished run's log, JSON and loss are those that its end noted."""
    ends = {e.get("run"): e for e in events_of(series) if e["event"] == "end" and e.get("status") == "finished"}
    finals = {run.name: point for run, point in zip(sample.runs, sample.finals)} if sample else {}
    kept = unsealed = 0
    for run in series.runs:
        end = ends.get(run.name)
        if end is None:
            continue
        loss, point = end.get("final_loss"), finals.get(run.name)
        if isinstance(loss, (int, float)) and point is not None:
            half = 0.51 * 10.0 ** -(12 if point.decimals is None else point.decimals)
            if not math.isclose(loss, point.loss, rel_tol=1e-9, abs_tol=half):
                yield Finding(
                    "seals", "F", f"{run.name}: loss {point.loss} in the log, {loss} in the ledger at its end"
                )
        sealed = end.get("sealed")
        if not isinstance(sealed, dict):
            unsealed += 1
            continue
        changed = [name for name in ("log", "json") if sealed.get(name) != _sha256(run.path, name)]
        kept += not changed
        for name in changed:
            yield Finding("seals", "F", f"{run.name}: its {name} is not the one that its end sealed")
    if kept:
        yield Finding("seals", "A", f"{kept} runs have the log and the JSON that their end sealed")
    if unsealed:
        yield Finding("seals", "C", f"{unsealed} runs ended without a seal on log and JSON (an older ledger)")


def _sha256(log: str, name: str) -> str | None:
    path = Path(log) if name == "log" else Path(log).with_suffix(".json")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def first_line(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """Threshold, plan, stop step and configuration are those that the ledger's first line fixed."""
    events = events_of(series)
    begin = next((event for event in events if event["event"] == "begin"), None)
    if begin is None:
        if any("before" in event for event in events[:1]):
            yield Finding("begin", "F", "the ledger's first line, which fixes threshold and plan, is gone")
        yield from _threshold_of_runs(series)
        return
    if begin is not events[0]:
        yield Finding("begin", "F", "the line that fixes threshold and plan is not the ledger's first")
    moved = []
    threshold = begin.get("threshold")
    if series.record and series.threshold is not None and threshold is not None and series.threshold != threshold:
        moved.append(f"threshold {threshold:g}, now {series.threshold:g}")
    plan_hash, plan = begin.get("plan"), None
    if series.plan_path:
        try:
            plan = read_plan(series.plan_path)
        except StatsError:
            moved.append("the plan cannot be read")
    if (plan.hash if plan else None) != plan_hash:
        words = (plan_hash or "none")[:16], (plan.hash if plan else "none")[:16]
        moved.append(f"plan {words[0]}, now {words[1]}")
    stop_step = plan.stop_step if plan and plan.stop_step is not None else series.stop_step
    if begin.get("stop_step") != stop_step:
        moved.append(f"stop step {begin.get('stop_step')}, now {stop_step}")
    identity = (series.record or {}).get("identity")
    if begin.get("identity") and isinstance(identity, dict):
        digest = json_hash(identity)
        if digest != begin["identity"]:
            moved.append("flags or code in record.json are not those that it began with")
    for text in moved:
        yield Finding("begin", "F", f"fixed before the first launch and changed since: {text}")
    if not moved:
        yield Finding("begin", "A", "threshold, plan and configuration are those of the ledger's first line")
    yield from _threshold_of_runs(series)


def _threshold_of_runs(series: Series) -> Iterator[Finding]:
    """record.json names the threshold that the runs' own configuration names."""
    targets = {run.target_loss for run in series.runs if run.target_loss is not None}
    if series.record and series.threshold is not None and targets and targets != {series.threshold}:
        told = ", ".join(f"{target:g}" for target in sorted(targets))
        yield Finding("begin", "D", f"record.json is about {series.threshold:g}, the runs were configured for {told}")


def plan_is_sealed(series: Series, plan_hash: str) -> bool:
    """Whether a plan came before the runs: the ledger's first line or every log names it."""
    begin = next((event for event in events_of(series) if event["event"] == "begin"), None)
    if begin is not None:
        return begin.get("plan") == plan_hash
    return bool(series.runs) and all(run.plan_hash and plan_hash.startswith(run.plan_hash) for run in series.runs)


# ----------------------------------------------------------------------------------------------------
# Times, steps, configurations


def clocks(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """Training took no longer than its process lived, and its average is its time over its steps."""
    events = events_of(series)
    seconds = {e.get("run"): e.get("seconds") for e in events if e["event"] == "end" and e.get("status") == "finished"}
    resumed = {e.get("run") for e in events if e["event"] == "launch" and e.get("attempt", 1) != 1}
    launched = {e.get("run"): _moment(e.get("time")) for e in events if e["event"] == "launch"}
    yield from _too_quick(sample.runs if sample else ())
    for run in sample.runs if sample else ():
        for point in run.validations:
            if point.time_s is not None and point.step_avg_ms and not _average_fits(point):
                text = f"{point.time_s:g} s over {point.step} steps, but an average of {point.step_avg_ms:g} ms"
                yield Finding("clocks", "D", f"{run.name}: {text} at line {point.line}")
                break
        for step, after, took in _stretches(run):
            if took <= 0:
                yield Finding("clocks", "D", f"{run.name}: no time between steps {step} and {after}")
                break
        last, lived = run.validations[-1].time_s, seconds.get(run.name)
        if last and isinstance(lived, (int, float)) and lived and run.name not in resumed and last > lived + 1:
            yield Finding("clocks", "D", f"{run.name} trained for {last:g} s in a process that lived for {lived:g} s")
        beside = run.sidecar or {}
        start, end = _moment(beside.get("start_time")), _moment(beside.get("end_time"))
        if run.name in resumed or start is None:
            continue
        if end is not None and last is not None and last > end - start + 2:
            yield Finding("clocks", "D", f"{run.name} trained for {last:g} s between {start:g} and {end:g}")
        begun = launched.get(run.name)
        if begun is not None and start < begun - CLOCK_TOLERANCE_S:
            text = f"its JSON says that it began {begun - start:.0f} s before the ledger launched it"
            yield Finding("clocks", "D", f"{run.name}: {text}")


def _stretches(run: Run) -> Iterator[tuple[int, int, float]]:
    """(step, next step, seconds between them) of the validations, where the log tells them; without the first steps,
    after which some programs set their clock back."""
    for before, after in pairwise(run.validations):
        if before.step >= 20 and before.time_s is not None and after.time_s is not None:
            yield before.step, after.step, after.time_s - before.time_s


def _too_quick(runs: Sequence[Run]) -> Iterator[Finding]:
    """A stretch between two validations in less than half of the time that every other run took for it, on one kind of
    machine, by a run that is no quicker elsewhere: its clock was moved there."""
    stretches: dict[tuple, list[tuple[float, str]]] = {}
    for run in runs:
        for start, end, seconds in _stretches(run):
            stretches.setdefault((run.hardware, run.world_size, start, end), []).append((seconds, run.name))
    quick: dict[str, list[str]] = {}
    for (*_, start, end), told in stretches.items():
        if len(told) < FEWEST_TIMED:
            continue
        (least, name), (second, _) = sorted(told)[:2]
        if 0 < least < 0.5 * second:
            quick.setdefault(name, []).append(f"{least:g} s from step {start} to {end}, the next took {second:g} s")
    for name, where in quick.items():
        if len(where) < 3:
            yield Finding("clocks", "D", f"{name}: {where[0]}")


def _average_fits(point: Any) -> bool:
    """step_avg is the time over all steps, or over all but the first ten (some programs leave those out)."""
    steps = [point.step - skipped for skipped in (0, 10) if point.step - skipped > 0]
    wanted = [point.time_s * 1e3 / n for n in steps] or [point.step_avg_ms]
    slack = 0.006 + 1.5 / max(1, point.step)  # of its own rounding, and of a time in whole milliseconds
    return any(math.isclose(point.step_avg_ms, value, rel_tol=0.02, abs_tol=slack) for value in wanted) or (
        point.step < 20
    )


def steps(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """Planned steps and tokens are those of the configuration, and seeds those of the ledger."""
    seeds = {e.get("run"): e.get("seed") for e in events_of(series) if e["event"] == "launch"}
    tokens: dict[int, tuple[str, str]] = {}
    for run in sample.runs if sample else ():
        planned = (run.config or {}).get("num_iterations")
        if isinstance(planned, int) and run.planned_steps not in (None, planned):
            yield Finding("steps", "D", f"{run.name} has {run.planned_steps} steps, its configuration {planned}")
        if isinstance(seeds.get(run.name), int) and run.seed is not None and seeds[run.name] != run.seed:
            yield Finding("steps", "D", f"{run.name}: seed {run.seed} in its log, {seeds[run.name]} in the ledger")
        for point in run.validations:
            told = dict(point.extra).get("train_tokens")
            if told is None:
                continue
            first = tokens.setdefault(point.step, (run.name, told))
            if first[1] != told:
                text = f"{told} tokens at step {point.step}, {first[1]} in {first[0]}"
                yield Finding("steps", "D", f"{run.name}: {text}")
                break


def configurations(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """The configuration in the log is the one in the JSON, and both have the hash that they name."""
    hashed: dict[bool, list[str]] = {True: [], False: []}
    for run in sample.runs if sample else ():
        beside = (run.sidecar or {}).get("config")
        if run.config is None or not isinstance(beside, dict):
            continue
        wrong = sorted(
            k for k in run.config.keys() & beside.keys() if k not in RUN_FIELDS and run.config[k] != beside[k]
        )
        if wrong:
            told = f"{wrong[0]} {run.config[wrong[0]]!r} in the log, {beside[wrong[0]]!r} in the JSON"
            yield Finding("config", "D", f"{run.name}: {told}")
        if run.config_hash:
            hashed[_config_hash(run.config) == run.config_hash].append(run.name)
    # A trainer with another rule for its hash fails for all runs alike, and says nothing about this series.
    if hashed[True] and hashed[False]:
        text = f"{', '.join(hashed[False][:3])}: another configuration than the hash that it names"
        yield Finding("config", "F", text)


def _config_hash(config: dict) -> str:
    """sha256 over the fields that decide what a run computes, as the trainer takes it."""
    told = {key: value for key, value in config.items() if key not in RUN_FIELDS}
    return json_hash(told)


def _moment(text: object) -> float | None:
    """Seconds since 1970 of an ISO time; None if it is none."""
    if not isinstance(text, str):
        return None
    try:
        return datetime.fromisoformat(re.sub(r"Z$", "+00:00", text)).timestamp()
    except ValueError:
        return None


# ----------------------------------------------------------------------------------------------------
# Against what was published


def against(series: Series, published: str) -> Finding:
    """Whether the series is still what it was when a head of its ledger, or a commit that holds it, was published.

    Raises UsageError for a word that is neither, or a commit that does not hold this series.
    """
    data = ledger_bytes(series)
    if data is None:
        raise UsageError(f"{series.path} has no ledger, so it has no head")
    if HEAD.fullmatch(published) and (lines := cut_at(data, published)) is not None:
        later = len(data.splitlines()) - lines
        return Finding("against", "A", f"the first {lines} lines are those of head {published}; {later} came later")
    then = _at_commit(series, published, "ledger.jsonl")
    if then is None:
        if not HEAD.fullmatch(published):
            raise UsageError(f"{published!r} is neither a head nor a commit that holds {series.path}/ledger.jsonl")
        return Finding("against", "F", f"no beginning of this ledger has the head {published}: it was written anew")
    if not data.startswith(then):
        return Finding("against", "F", f"the ledger does not begin as it stood in {published}: it was written anew")
    changed = [run.name for run in series.runs if _changed_since(series, published, run)]
    if changed:
        return Finding("against", "F", f"logs that were changed since {published}: {', '.join(changed[:5])}")
    return Finding("against", "A", f"ledger and logs are those of {published}, with what came later")


def _changed_since(series: Series, commit: str, run: Run) -> bool:
    """Whether a log that the commit holds is another one now."""
    then = _at_commit(series, commit, str(Path(run.path).relative_to(series.path)))
    return then is not None and then != Path(run.path).read_bytes()


def _at_commit(series: Series, commit: str, name: str) -> bytes | None:
    """A file of the series as it stood in a commit; None if there is none, or no git."""
    command = ["git", "-C", series.path, "show", f"{commit}:./{name}"]
    if commit.startswith("-"):
        return None
    try:
        done = subprocess.run(command, capture_output=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


CHECKS = (chain, order, holes, seals, first_line, within, clocks, steps, configurations)
