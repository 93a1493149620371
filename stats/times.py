"""Training times: spread, hosts, outliers and drift. Outliers get a label; nothing is ever dropped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy

from stats.correct import welch_anova_p
from stats.errors import DataError
from stats.samples import Sample
from stats.ttest import Summary, summarize

OUTLIER_MADS = 3.5  # robust standard deviations from the host's median (Iglewicz and Hoaglin 1993)
FEWEST_FOR_OUTLIERS = 5


@dataclass(frozen=True, slots=True)
class TimedRun:
    """One run's training time."""

    run: str
    host: str
    time_s: float
    step_ms: float | None
    deviation: float | None  # from its host's median, in robust standard deviations; None: too few runs, no spread
    outlier: bool


@dataclass(frozen=True, slots=True)
class Host:
    """The runs of one host, or of hosts that the logs do not name."""

    host: str
    hardware: str | None
    time_s: Summary
    outliers: int


@dataclass(frozen=True, slots=True)
class Drift:
    """Trend of the time along the order of launch."""

    seconds_per_run: float
    low: float  # 95 % confidence interval
    high: float
    p_value: float


@dataclass(frozen=True, slots=True)
class Times:
    """All about the times of a series."""

    series: str
    all: Summary
    hosts: tuple[Host, ...]
    runs: tuple[TimedRun, ...]
    hosts_p: float | None  # one-way analysis of variance between hosts (Welch's); None for one host
    drift: Drift | None
    notes: tuple[str, ...]


def times(sample: Sample) -> Times:
    """Times of the runs of a sample, in its order. Raises DataError if none of them tells its time."""
    timed = [
        (run, point.time_s, point.step) for run, point in zip(sample.runs, sample.finals) if point.time_s is not None
    ]
    if not timed:
        raise DataError("none of the logs tells a training time", sample.name)
    by_host: dict[str, list[float]] = {}
    for run, time_s, _ in timed:
        by_host.setdefault(run.host or "unknown", []).append(time_s)
    runs = []
    for run, time_s, step in timed:
        host = run.host or "unknown"
        deviation = _deviation(time_s, by_host[host])
        step_ms = time_s * 1e3 / step if step else None
        outlier = deviation is not None and abs(deviation) > OUTLIER_MADS
        runs.append(TimedRun(run.name, host, time_s, step_ms, deviation, outlier))
    hardware = {run.host or "unknown": run.hardware for run, *_ in timed}
    hosts = tuple(
        Host(host, hardware[host], summarize(values), sum(r.outlier for r in runs if r.host == host))
        for host, values in by_host.items()
    )
    all_times = [time_s for _, time_s, _ in timed]
    notes = []
    if len(timed) < len(sample.runs):
        notes.append(f"{len(sample.runs) - len(timed)} of {len(sample.runs)} runs do not tell their time")
    if outliers := [run.run for run in runs if run.outlier]:
        notes.append(f"outliers, kept in every number: {', '.join(outliers)}")
    if "unknown" in by_host and len(by_host) == 1:
        notes.append("the logs do not name their hosts: all runs are taken together")
    return Times(
        sample.name,
        summarize(all_times),
        hosts,
        tuple(runs),
        _between_hosts(list(by_host.values())),
        _drift(all_times),
        tuple(notes),
    )


def _deviation(value: float, values: Sequence[float]) -> float | None:
    if len(values) < FEWEST_FOR_OUTLIERS:
        return None
    median = float(np.median(values))
    spread = float(scipy.stats.median_abs_deviation(values, scale="normal"))
    return (value - median) / spread if spread > 0 else None


def _between_hosts(groups: list[list[float]]) -> float | None:
    """p of Welch's one-way analysis of variance; None unless two hosts have at least two runs that differ."""
    groups = [group for group in groups if len(group) > 1 and np.ptp(group) > 0]
    if len(groups) < 2:
        return None
    return welch_anova_p(groups)


def _drift(values: Sequence[float]) -> Drift | None:
    """Least-squares slope over the order of launch; None for fewer than four runs or equal times."""
    n = len(values)
    if n < 4 or np.ptp(values) == 0:
        return None
    line = scipy.stats.linregress(range(n), values)
    half = float(scipy.stats.t.ppf(0.975, n - 2) * line.stderr)
    slope = float(line.slope)
    return Drift(slope, slope - half, slope + half, float(line.pvalue) if math.isfinite(line.pvalue) else 0.0)


def render(result: Times) -> str:
    """Hosts, runs and drift in plain text."""
    from stats.text import number, p_text, table

    rows = [
        [
            h.host,
            h.hardware or "-",
            h.time_s.n,
            *map(number, (h.time_s.mean, h.time_s.median, h.time_s.sample_std, h.time_s.min, h.time_s.max)),
            h.outliers,
        ]
        for h in result.hosts
    ]
    header = ["host", "hardware", "runs", "mean (s)", "median", "std", "min", "max", "outliers"]
    lines = [f"{result.series}: {result.all.n} times, mean {number(result.all.mean)} s", "", table(header, rows), ""]
    rows = [
        [
            r.run,
            r.host,
            f"{r.time_s:.3f}",
            "-" if r.step_ms is None else f"{r.step_ms:.3f}",
            "-" if r.deviation is None else f"{r.deviation:+.2f}",
            "outlier" if r.outlier else "",
        ]
        for r in result.runs
    ]
    lines += [table(["run", "host", "time (s)", "ms a step", "robust deviations", ""], rows), ""]
    if result.hosts_p is not None:
        lines.append(f"between hosts: p = {p_text(result.hosts_p)} (Welch's analysis of variance)")
    if d := result.drift:
        lines.append(
            f"drift along the launches: {d.seconds_per_run:+.3g} s a run ({d.low:+.3g} to {d.high:+.3g}), "
            f"p = {p_text(d.p_value)}"
        )
    return "\n".join(lines + [f"note: {note}" for note in result.notes])
