"""Under load: a series of runs, a reader that judges it again and again, and reports, all at once on this machine.

    python -m bench.load --runs 19                # bench/results/load-<device>.json

The same tiny runs are trained twice: alone, and while `stats monitor`, `stats ttest`, `records.report` and the
studio's Series page (where Gradio is installed) work on the series' folder without a pause. Figures: how much slower
the runs are then, and how long a reader takes. Checks: every run finishes with the loss that it has alone; no reader
ever fails; the last verdict, the studio's too, is that of the series alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.common import REPO, summary, write_result
from bench.faults import TINY, make_shards
from bench.studio import started
from trainer.options import command, setting

THRESHOLD = 4.3
PLAN = ["--threshold", str(THRESHOLD), "--margin", "0.02", "--sigma", "0.02", "--sigma-source", "guess", "--cap", "40"]
READERS = {
    "monitor": lambda folder: ["-m", "stats", "monitor", str(folder), "--json"],
    "ttest": lambda folder: ["-m", "stats.ttest", str(folder), "--json", "--no-sensitivity"],
    "report": lambda folder: ["-m", "records.report", str(folder)],
}
# 0 to 4 are verdicts; 3 of a series that has too few runs so far, which its message says.
EARLY = ("at least 2", "at least two", "too few", "no validation", "no finished", "no run", "has no runs", "1 run")


def python(*words: str, **options) -> subprocess.CompletedProcess:
    """Our modules in a process of their own, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, *words]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, **options)


def series_command(root: Path, shards: Path, runs: int, steps: int) -> list[str]:
    """The series runner on tiny runs."""
    fields = TINY | dict(
        train_files=f"{shards}/train_*.bin",
        val_files=f"{shards}/val_*.bin",
        target_loss=THRESHOLD,
        num_iterations=steps,
        checkpoint_every=0,
    )
    own = ("preset", "run_name")
    flags = [f"--{name}={value}" for name, value in fields.items() if name not in own]
    return [
        "-m",
        "records.series",
        "--repeats",
        str(runs),
        "--preset=nano",
        "--name",
        "load",
        "--root",
        str(root),
        "--no-judge",
        "--launcher=local",
        "--parallel=2",
        *flags,
    ]


def ends_of(root: Path) -> dict[str, dict]:
    """{run: its end} by the ledger."""
    events = [json.loads(line) for line in (root / "load" / "ledger.jsonl").read_text().splitlines()]
    return {event["run"]: event for event in events if event["event"] == "end"}


@contextlib.contextmanager
def studio(home: Path) -> Iterator[Callable[[Path], str] | None]:
    """A studio that may open `home`, as a function: the t-test that its Series page shows of a folder. None where
    Gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        yield None
        return
    from gradio_client import Client

    with started(home) as (_, address, _):
        client, shown = Client(address, verbose=False), ""

        def look(folder: Path) -> str:
            nonlocal shown
            answer = client.predict(str(folder), "", 0.05, api_name="/look")[0]
            shown = answer if isinstance(answer, str) else shown  # else: no file has changed, the page stays as it is
            return shown

        yield look


def read_until(
    process: subprocess.Popen, folder: Path, look: Callable[[Path], str] | None, problems: list[str]
) -> dict[str, list[float]]:
    """Readers in turn while `process` lives; {reader: its times in ms}."""
    times: dict[str, list[float]] = {name: [] for name in (*READERS, "studio")}
    while process.poll() is None:
        if not (folder / "record.json").exists():
            time.sleep(0.05)
            continue
        for name, words in READERS.items():
            begin = time.perf_counter()
            done = python(*words(folder), timeout=300)
            times[name].append((time.perf_counter() - begin) * 1e3)
            problems += problems_of(name, done)
        if look is not None:
            begin = time.perf_counter()
            problems += shown_problems(look, folder)
            times["studio"].append((time.perf_counter() - begin) * 1e3)
    return times


def shown_problems(look: Callable[[Path], str], folder: Path) -> list[str]:
    """What is wrong with the studio's answer on a series that is still running."""
    try:
        told = look(folder)
    except Exception as error:  # whatever it is, the page failed
        return [f"studio: {type(error).__name__}: {error}"[:400]]
    early = "No verdict" in told and any(word in told for word in EARLY)
    return [] if early or "one-sided p = " in told else [f"studio: {told[:400]}"]


def problems_of(name: str, done: subprocess.CompletedProcess) -> list[str]:
    """What is wrong with a reader's answer on a series that is still running."""
    if "Traceback" in done.stderr:
        return [f"{name}: {done.stderr[-400:]}"]
    if done.returncode in (0, 1, 4) or (done.returncode == 3 and any(word in done.stderr for word in EARLY)):
        return []
    return [f"{name}: exit code {done.returncode}: {done.stderr[-400:]}"]


def verdict(folder: Path) -> dict:
    """The t-test of a series that is complete."""
    told = json.loads(python("-m", "stats.ttest", str(folder), "--json", "--no-sensitivity").stdout)
    return {key: told[key] for key in ("n", "sample_mean", "p_value", "decision")}


def measure_load(runs: int, steps: int, folder: Path) -> dict:
    """Train the series alone and under load; figures and problems."""
    problems: list[str] = []
    make_shards(folder / "shards")
    alone, loaded = folder / "alone", folder / "loaded"
    begin = time.perf_counter()
    done = python(*series_command(alone, folder / "shards", runs, steps))
    alone_s = time.perf_counter() - begin
    if done.returncode:
        raise RuntimeError(f"the series alone ended with {done.returncode}:\n{done.stdout[-900:]}{done.stderr[-2000:]}")
    (loaded / "load").mkdir(parents=True)
    planned = python("-m", "stats", "plan", *PLAN, "--write", str(loaded / "load" / "plan.json"))
    if planned.returncode:
        shutil.rmtree(loaded)
        problems.append(f"no plan: {planned.stderr[-300:]}")
    with open(folder / "output", "w") as output:
        command = [sys.executable, *series_command(loaded, folder / "shards", runs, steps)]
        with studio(loaded) as look:
            begin = time.perf_counter()
            process = subprocess.Popen(command, cwd=REPO, stdout=output, stderr=subprocess.STDOUT)
            times = read_until(process, loaded / "load", look, problems)
            loaded_s = time.perf_counter() - begin
            shown = look(loaded / "load") if look is not None else None
    if process.returncode:
        told = (folder / "output").read_text()[-500:]
        problems.append(f"the series under load ended with {process.returncode}: {told}")
    before, after = ends_of(alone), ends_of(loaded)
    for run in sorted(before.keys() | after.keys()):
        losses = [ends.get(run, {}).get("final_loss") for ends in (before, after)]
        if losses[0] is None or losses[0] != losses[1]:
            problems.append(f"{run}: loss {losses[0]} alone, {losses[1]} under load")
    verdicts = verdict(alone / "load"), verdict(loaded / "load")
    if verdicts[0] != verdicts[1]:
        problems.append(f"verdict alone {verdicts[0]}, under load {verdicts[1]}")
    printed = python("-m", "stats.ttest", str(loaded / "load"), "--alpha", "0.05").stdout
    if shown is not None and shown.strip() != printed.strip():
        problems.append(f"stats.ttest prints {printed[-600:]}, the studio shows {shown[-600:]}")
    seconds = [sorted(end["seconds"] for end in ends.values()) for ends in (before, after)]
    middle = [values[len(values) // 2] for values in seconds]
    return {
        "runs": runs,
        "steps": steps,
        "series_alone_s": alone_s,
        "series_loaded_s": loaded_s,
        "run_alone_s": middle[0],
        "run_loaded_s": middle[1],
        "slow_down": middle[1] / middle[0],
        "readers": {name: summary(values) if values else None for name, values in times.items()},
        "verdict": verdicts[0],
        "problems": problems,
    }


@dataclass(frozen=True)
class Options:
    """How much is trained."""

    runs: int = setting(19, "runs", "of each series", at_least=1)
    steps: int = setting(10, "steps", "of each run", at_least=1)
    json: str | None = setting(None, "file", "for the result, in place of bench/results/")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0 if no reader and no run went wrong."""
    _, options = command(__doc__, arguments, Options)
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        found = measure_load(options.runs, options.steps, Path(folder))
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))
    else:
        write_result("load", found)
    print(json.dumps(found, indent=1))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
