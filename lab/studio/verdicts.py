"""A series as the page shows it: table, curves, verdicts and report, all of them from stats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lab.studio.places import Places


@dataclass(frozen=True)
class View:
    """What the Series page shows of a folder. Texts are those that `python -m stats` prints."""

    rows: list[list]
    curves: str  # SVG
    losses: str  # SVG of the final losses, '' without a verdict
    verdict: str
    sequential: str  # '' without a plan
    path: str  # SVG of the sequential test, '' without a plan


HEADERS = ["run", "seed", "state", "step", "validation loss", "training time (s)"]


def fingerprint(folder: Path) -> tuple:
    """Changes whenever a log, JSON, plan or ledger of the series does."""
    files = [*folder.glob("*.json*"), *folder.glob("runs/*.txt"), *folder.glob("runs/*.json")]
    return tuple(sorted((str(f), s.st_mtime_ns, s.st_size) for f in files if (s := f.stat())))


def view(folder: Path, threshold: float | None = None, alpha: float = 0.05) -> View:
    """Everything about the series in `folder`; what cannot be said stands as a sentence in its place."""
    from stats import figures
    from stats.errors import StatsError
    from stats.judge import judge
    from stats.monitor import monitor
    from stats.monitor import render as render_monitoring
    from stats.planfile import read_plan
    from stats.samples import sample_of
    from stats.series import load_series
    from stats.ttest import TRACK_THRESHOLD
    from stats.ttest import render as render_test

    series = load_series(folder)
    limit = threshold if threshold is not None else series.threshold
    curves = figures.loss_curves(series.runs, TRACK_THRESHOLD if limit is None else limit, series.name)
    losses = sequential = path = ""
    try:
        test = judge(series, threshold, alpha=alpha)
        verdict = render_test(test)
        losses = figures.distribution(test, sample_of(series).losses, series.name)
    except StatsError as error:
        verdict = f"No verdict: {error}"
    if series.plan_path:
        try:
            plan = read_plan(series.plan_path)
            state = monitor(series, plan)
            sequential = render_monitoring(state)
            path = figures.sequential_path(state.decision, plan, series.name)
        except StatsError as error:
            sequential = f"No sequential verdict: {error}"
    return View(rows(series), curves, losses, verdict, sequential, path)


def rows(series) -> list[list]:
    """A line a launched run (or, without a ledger, a line a log): see HEADERS."""
    from stats.values import is_finished

    runs = {run.name: run for run in series.runs}
    launches = {launch.run: launch for launch in series.launches or ()}
    found = []
    for name in dict.fromkeys([*launches, *runs]):
        run, launch = runs.get(name), launches.get(name)
        finished = run is not None and is_finished(run, series.stop_step)
        state = launch.status if launch else "finished" if finished else "not finished"
        if launch and launch.reason:
            state += f": {launch.reason}"
        last = run.validations[-1] if run and run.validations else None
        seed = run.seed if run and run.seed is not None else launch.seed if launch else None
        step = f"{last.step}/{run.planned_steps}" if last else ""
        loss = f"{last.loss:.5f}" if last else ""
        time_s = f"{last.time_s:.2f}" if last and last.time_s is not None else ""
        found.append([name, "" if seed is None else seed, state, step, loss, time_s])
    return found


def write_report(folder: Path, places: Places, threshold: float | None = None, alpha: float = 0.05) -> Path:
    """The report of `python -m stats report` on a series, as one HTML file that needs nothing else."""
    from data.paths import atomic_file
    from stats.report import make_report, to_html
    from stats.series import find_series

    path = places.reports / f"{folder.name}.html"
    with atomic_file(path, "w") as file:
        file.write(to_html(make_report(find_series([folder]), alpha, threshold)))
    return path
