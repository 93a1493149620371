"""Does the evidence in a record's folder support its claim? Graded A to F, every deduction with its reason.

The logs are the evidence; everything else (record.json, README.md, the JSON beside a log) only repeats it
and has to agree. The grade is the worst that any finding allows:

    A  every launch accounted for, one program, data and configuration, planned before the runs, and
    significant B  something small is missing, most often a plan that was made before the runs C  what the
    reader has to take on trust: no ledger, unknown program, fewer than five runs, seeds used twice D
    something that was written about the series disagrees with its logs F  the logs do not support the
    claim: damaged or missing, mixed, copied, or not significant
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stats import evidence
from stats.copies import across
from stats.errors import StatsError
from stats.evidence import GRADES
from stats.jsonio import json_hash
from stats.judge import judge
from stats.monitor import monitor
from stats.planfile import read_plan
from stats.plans import Plan
from stats.runs import hash_of_source
from stats.samples import Sample, drops_in, sample_of
from stats.sequential import ACCEPT
from stats.series import Series
from stats.ttest import FEWEST_RUNS, STRICT_ALPHA, TRACK_THRESHOLD, TTest, ttest
from stats.values import Finding, LeftOut, Run

NO_CLAIM = ("none", "no effect")  # record.json's "claim" of a series that is published for what it did not find


@dataclass(frozen=True, slots=True)
class Assessment:
    """The verdict on a record's evidence."""

    series: str
    grade: str
    claim: str
    findings: tuple[Finding, ...]
    test: TTest | None
    left_out: tuple[LeftOut, ...]

    @property
    def passes(self) -> bool:
        """True if the claim holds; of a series that claims nothing, if it would have been significant."""
        if self.test is None:
            return False
        if self.claim == "none":
            return self.test.significant
        return not any(finding.check == "claim" and finding.grade == "F" for finding in self.findings)


@dataclass(frozen=True, slots=True)
class Assessments:
    """All series that were graded."""

    assessments: tuple[Assessment, ...]


def validate(
    series: Series,
    alpha: float = STRICT_ALPHA,
    drop: Mapping[str, str] | None = None,
    *,
    threshold: float | None = None,
    stop_step: int | None = None,
    allow_mixed: bool = False,
    against: str | None = None,
    others: Sequence[Finding] = (),
) -> Assessment:
    """Grade a series by its folder. Never raises for what it finds there: that is what the grades are for.

    `against`: a head of its ledger, or a commit, that was published earlier. `others`: what comparing it with other
    series found (`stats.copies.across`). Raises UsageError for an `against` that is neither head nor commit.
    """
    findings: list[Finding] = list(others)
    sample = test = plan = None
    try:
        plan = read_plan(series.plan_path) if series.plan_path else None
    except StatsError as error:
        findings.append(Finding("plan", "D", str(error)))
    try:
        sample = sample_of(series, stop_step, drop, allow_mixed)
        findings.append(Finding("logs", "A", f"{len(sample.runs)} complete logs of one configuration"))
        test = judge(series, threshold, stop_step, drop, allow_mixed, alpha=alpha, sensitivity=False)
    except StatsError as error:
        findings.append(Finding("logs", "F", str(error)))
    findings += (
        [Finding("mixed", "D", f"allowed to be mixed: {note}") for note in sample.notes]
        if allow_mixed and sample
        else []
    )
    for check in (*_CHECKS, *evidence.CHECKS):
        findings += check(series, sample)
    findings += _plan_findings(series, sample, plan)
    if against is not None:
        findings.append(evidence.against(series, against))
    if plan is not None and not evidence.plan_is_sealed(series, plan.hash):
        plan = None  # made after the runs: the claim is judged as if there were none
    claim, verdict = _claim(series, test, plan, alpha, threshold)
    findings += verdict
    worst = max((finding.grade for finding in findings), key=GRADES.index)
    left_out = sample.left_out if sample else ()
    return Assessment(series.name, worst, claim, tuple(findings), test, left_out)


def validate_each(series: Sequence[Series], alpha: float = STRICT_ALPHA, **settings: Any) -> Assessments:
    """`validate` for every series, with a look for runs that stand in more than one of them."""
    copied = across(series)
    drop = settings.pop("drop", None) or {}
    found = []
    for one in series:
        found.append(validate(one, alpha, drops_in(one, drop), others=copied.get(one.path, ()), **settings))
    return Assessments(tuple(found))


def _claim(
    series: Series, test: TTest | None, plan: Plan | None, alpha: float, threshold: float | None
) -> tuple[str, list[Finding]]:
    """What the series claims, and whether its numbers carry that."""
    claimed = str((series.record or {}).get("claim", "")).lower()
    if claimed in NO_CLAIM:
        return "none", [Finding("claim", "A", "the record claims nothing but its numbers")]
    if test is None:
        return "unknown", [Finding("claim", "F", "no verdict can be computed from these logs")]
    claim = f"mean loss below {test.threshold:g} at alpha {alpha:g}"
    if plan is not None and plan.method != "fixed":
        try:
            decision = monitor(series, plan).decision
        except StatsError as error:
            return claim, [Finding("claim", "F", str(error))]
        same_question = threshold is None or threshold == plan.threshold
        grade = "A" if decision.verdict == ACCEPT and plan.alpha <= alpha and same_question else "F"
        return claim, [Finding("claim", grade, decision.words)]
    grade = "A" if test.significant else "F"
    found = [Finding("claim", grade, f"{test.decision}: p = {test.p_value:.3g} with n = {test.n}")]
    if test.n < FEWEST_RUNS:
        found.append(Finding("runs", "C", f"{test.n} runs: normality has to be taken on trust"))
    if test.rounding and not test.rounding.decisive:
        low, high = test.rounding.p_low, test.rounding.p_high
        found.append(Finding("rounding", "C", f"rounding leaves p in [{low:.3g}, {high:.3g}], on both sides of alpha"))
    return claim, found


# ----------------------------------------------------------------------------------------------------
# Checks. Each looks at a series (and at its sample, if there is one) and yields findings.


def _seeds(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """The same seed twice is no independent repeat."""
    seeds: dict[int, str] = {}
    for run in sample.runs if sample else ():
        if run.seed is not None and run.seed in seeds:
            yield Finding("seeds", "C", f"{run.name} and {seeds[run.seed]} have the same seed, {run.seed}")
        if run.seed is not None:
            seeds.setdefault(run.seed, run.name)


def _launches(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """Every launch is in the ledger, and every log belongs to one."""
    if series.launches is None:
        yield Finding("launches", "C", "no ledger: nobody can tell how many runs were started and left out")
        return
    for problem in series.ledger_problems:
        yield Finding("launches", "C", f"ledger.jsonl:{problem.line}: {problem.text}")
    logged = {run.name for run in series.runs}
    unknown = sorted(logged - {launch.run for launch in series.launches})
    if unknown:
        yield Finding("launches", "D", f"logs that no launch accounts for: {', '.join(unknown)}")
    by_status: dict[str, list[str]] = {}
    for launch in series.launches:
        by_status.setdefault(launch.status, []).append(launch.run)
    told = ", ".join(f"{len(runs)} {status}" for status, runs in by_status.items())
    total = sum(launch.launches for launch in series.launches)
    yield Finding("launches", "A", f"{total} launches of {len(series.launches)} runs in the ledger: {told}")
    for launch in series.launches:
        if launch.status == "dropped":
            reason = (launch.reason or "").strip()
            text = f"{launch.run} was dropped: {reason}" if reason else f"{launch.run} was dropped without a reason"
            yield Finding("launches", "B" if reason else "F", text)
        elif launch.status == "crashed":
            yield Finding("launches", "B", f"{launch.run} crashed and is not in the sample")
        elif launch.status in ("queued", "running", "interrupted"):
            yield Finding("launches", "B", f"{launch.run} is {launch.status}: the series is not complete")
        elif launch.crashes:
            yield Finding("launches", "A", f"{launch.run} crashed {launch.crashes} times before it finished")


def _looks(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """Looks at the test while a series without a sequential plan was growing make its p-value too small."""
    looks = (series.record or {}).get("ledger")
    looks = looks.get("looks") if isinstance(looks, dict) else None
    if isinstance(looks, int) and looks > 1 and series.plan_path is None:
        yield Finding("looks", "B", f"the test was looked at {looks} times and no plan allowed for that")


def _program(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """One known program, kept where the logs say."""
    hashes = {run.code_hash for run in sample.runs} if sample else set()
    if None in hashes:
        yield Finding("program", "C", "logs without their source: nobody can tell which program ran")
    for digest in sorted(one for one in hashes if one is not None):
        kept = Path(series.path) / "source" / f"{digest[:16]}.py"
        if not kept.is_file():
            continue
        same = hash_of_source(kept.read_bytes()) == digest
        where = f"source/{kept.name}"
        text = f"{where} is the program in the logs" if same else f"{where} is not what its name and the logs say"
        yield Finding("program", "A" if same else "D", text)
    identity = (series.record or {}).get("identity")
    files = identity.get("code") if isinstance(identity, dict) else None
    told = {run.program_hash for run in sample.runs if run.program_hash} if sample else set()
    if files and told:  # trainer/program.py makes one hash of them
        same = told == {json_hash(files)}
        text = "the files of the program are" if same else "the files of the program in some logs are not"
        yield Finding("program", "A" if same else "D", f"{text} those that the series was started with")


def _machines(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """One kind of machine, or the times mean little."""
    runs = sample.runs if sample else ()
    for what, grade in (("hardware", "C"), ("world_size", "C"), ("torch", "B"), ("triton", "B")):
        values = {getattr(run, what) for run in runs}
        if len(values) > 1:
            named = ", ".join(sorted(str(value) for value in values))
            yield Finding("machines", grade, f"different {what}: {named}")


def _ranks(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """Where several processes of a run left logs, they tell the same losses."""
    main = {_without_rank(run.name): run for run in series.runs}
    for other in series.rank_runs:
        run = main.get(_without_rank(other.name))
        if run is not None and run.losses_by_step != other.losses_by_step:
            yield Finding("ranks", "F", f"{other.name} tells other losses than {run.name}")


def _without_rank(name: str) -> str:
    return re.sub(r"[._-]rank[._-]?\d+$", "", name)


def _sidecars(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """The JSON beside a log repeats it."""
    wrong = 0
    for run in sample.runs if sample else ():
        for text in _sidecar_disagreements(run):
            wrong += 1
            if wrong <= 5:
                yield Finding("json", "D", f"{run.name}.json disagrees with the log: {text}")


def _sidecar_disagreements(run: Run) -> Iterator[str]:
    beside = run.sidecar
    if beside is None:
        return
    told = {p.get("step"): p.get("loss") for p in beside.get("validation") or () if isinstance(p, dict)}
    for point in run.validations:
        loss = told.get(point.step)
        half = 0.51 * 10.0 ** -(17 if point.decimals is None else point.decimals)
        if not isinstance(loss, (int, float)) or not abs(loss - point.loss) <= half:
            yield f"loss {loss} at step {point.step}, {point.loss} in the log"
    for step in sorted(step for step in told.keys() - run.losses_by_step.keys() if isinstance(step, int)):
        yield f"a validation at step {step} that the log does not have"
    if beside.get("status") != "finished":
        yield f"status {beside.get('status')!r}, but the log is complete"
    for key in ("seed", "code_hash", "program_hash", "config_hash", "data_hash", "val_data_hash", "plan_hash"):
        here, there = getattr(run, key), beside.get(key)
        there = str(there).removeprefix("sha256:") if there not in (None, "") else ""
        if here is not None and there and not there.startswith(str(here)):
            yield f"{key} {there[:16]}, {str(here)[:16]} in the log"


def _numbers(series: Series, sample: Sample | None) -> Iterator[Finding]:
    """record.json and README.md say the numbers that the logs give."""
    if sample is None or len(set(sample.losses)) < 2:
        return
    threshold = TRACK_THRESHOLD if series.threshold is None else series.threshold
    if series.record is not None:
        yield from _claimed_numbers("record.json", list(_objects(series.record)), sample, threshold)
    readme = next((p for p in (Path(series.path) / name for name in ("README.md", "readme.md")) if p.is_file()), None)
    if readme is None:
        yield Finding("README", "B", "no README.md")
        return
    text = readme.read_text(encoding="utf-8", errors="replace")
    quoted = [_dictionary(match) for match in re.findall(r"\{[^{}]{10,4000}\}", text)]
    yield from _claimed_numbers("README.md", [one for one in quoted if one], sample, threshold)
    numbers = {match for match in re.findall(r"(?<![\w.])\d+\.\d{3,}", text)}
    mean = statistics.fmean(sample.losses)
    if not any(math.isclose(float(n), mean, abs_tol=1.01 * 10.0 ** -len(n.partition(".")[2])) for n in numbers):
        yield Finding("README", "D", f"README.md does not say the mean loss of the logs, {mean:.6f}")
    else:
        yield Finding("README", "A", f"README.md says the mean loss of the logs, {mean:.6f}")
    missing = [p.loss for p in sample.finals if not any(math.isclose(float(n), p.loss, abs_tol=5e-5) for n in numbers)]
    if missing and len(missing) < len(sample.finals):
        yield Finding(
            "README", "C", f"README.md leaves out {len(missing)} of {len(sample.finals)} losses: {missing[:3]}"
        )


def _claimed_numbers(where: str, objects: list[dict], sample: Sample, threshold: float) -> Iterator[Finding]:
    """Compare what an object calls by a name of the t-test's dictionary with what the logs give."""
    wrong, checked = [], 0
    for one in objects:
        if "sample_mean" not in one and "p_value" not in one:
            continue
        alpha = one.get("alpha")
        alpha = alpha if isinstance(alpha, float) and 0 < alpha <= 0.5 else STRICT_ALPHA
        truth = ttest(sample.losses, threshold, alpha, sensitivity=False)
        for key in _QUOTED if "alpha" in one else _QUOTED[:-1]:
            if isinstance(one.get(key), (int, float)):
                checked += 1
                if not math.isclose(one[key], getattr(truth, key), rel_tol=1e-6):
                    wrong.append(f"{key} {one[key]}, {getattr(truth, key)} from the logs")
    name = where.partition(".")[0]
    if wrong:
        yield Finding(name, "D", f"{where} disagrees with the logs: {'; '.join(wrong[:3])}")
    elif checked:
        yield Finding(name, "A", f"{checked} numbers in {where} equal those of the logs")


_QUOTED = ("n", "sample_mean", "sample_std", "t_stat", "p_value", "threshold", "upper_conf_bound_mean")


def _objects(value: object) -> Iterator[dict]:
    """Every object inside a JSON value."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _objects(item)


def _dictionary(text: str) -> dict | None:
    """The numbers of a JSON object or of a Python dictionary as people paste it."""
    try:
        value = json.loads(text)
        return value if isinstance(value, dict) else None
    except (ValueError, RecursionError):
        pairs = re.findall(r"['\"](\w+)['\"]\s*:\s*(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)", text)
        return {key: float(number) for key, number in pairs} or None


def _plan_findings(series: Series, sample: Sample | None, plan: Plan | None) -> Iterator[Finding]:
    if plan is None:
        if series.plan_path is None:
            yield Finding("plan", "B", "no plan.json: the number of runs may have been chosen after looking")
        return
    carried = [run.plan_hash for run in sample.runs] if sample else []
    other = sum(1 for digest in carried if digest and not plan.hash.startswith(digest))
    without = sum(1 for digest in carried if not digest)
    if other:
        yield Finding("plan", "D", f"{other} logs carry the hash of another plan than plan.json ({plan.hash[:16]})")
    if without:
        yield Finding("plan", "C", f"{without} logs do not carry the plan's hash: it may have been made afterwards")
    if not other and not without and carried:
        yield Finding("plan", "A", f"every log carries the hash of plan.json, {plan.hash[:16]}")
    n = len(carried)
    if plan.method == "fixed" and n != plan.cap:
        yield Finding("plan", "C", f"{n} runs count, {plan.cap} were planned")
    if series.threshold is not None and series.threshold != plan.threshold:
        yield Finding("plan", "D", f"the plan is about {plan.threshold:g}, record.json about {series.threshold:g}")


_CHECKS: tuple[Callable[[Series, Sample | None], Iterator[Finding]], ...] = (
    _seeds,
    _launches,
    _looks,
    _program,
    _machines,
    _ranks,
    _sidecars,
    _numbers,
)


def render(result: Assessment) -> str:
    """Grade and reasons, the worst first."""
    lines = [f"{result.series}: grade {result.grade} ({result.claim})", ""]
    order = sorted(result.findings, key=lambda finding: -GRADES.index(finding.grade))
    lines += [f"  {finding.grade}  {finding.check}: {finding.text}" for finding in order]
    lines += [f"  left out: {entry.run}: {entry.reason}" for entry in result.left_out]
    return "\n".join(lines)
