"""What a run spends beside its steps: seconds to the first step of nano, and the shares of evaluation, log, checkpoint.

    python -m bench.startup [--rounds=5] [--steps=700]       -> bench/results/startup-<device>.json

Each round is a whole process. Processor time (user and system, all threads) says what the program does; elapsed time
says what a user waits, and means something on a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.common import REPO, table, write_result
from trainer.options import command, setting

# What a child runs: the trainer with clocks around its parts; the first line of a step ends the start.
CHILD = """
import functools, json, sys, time
begin = float(sys.argv[1])
import train_gpt
from trainer.log import RunLog
spent, first, deep = {}, {}, []
def timed(owner, name, part):
    real = getattr(owner, name)
    @functools.wraps(real)
    def clocked(*given, **named):
        if deep:  # a part within a part counts once
            return real(*given, **named)
        deep.append(part)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return real(*given, **named)
        finally:
            deep.pop()
            old = spent.get(part, (0.0, 0.0))
            spent[part] = old[0] + time.perf_counter() - wall, old[1] + time.process_time() - cpu
    setattr(owner, name, clocked)
def told(real, self, step, *given, **named):
    if not first:
        first.update(wall=time.time() - begin, cpu=time.process_time(), modules=len(sys.modules))
    return real(self, step, *given, **named)
real_trained = RunLog.trained
RunLog.trained = lambda self, *given, **named: told(real_trained, self, *given, **named)
timed(train_gpt, "validate", "evaluation")
timed(RunLog, "line", "log")
timed(RunLog, "summary", "log")
timed(train_gpt.Stretch, "save", "checkpoint")
timed(train_gpt, "warm_up", "warm-up")
code = train_gpt.main(sys.argv[2:])
whole = dict(wall=time.time() - begin, cpu=time.process_time())
parts = {name: dict(wall=wall, cpu=cpu) for name, (wall, cpu) in spent.items()}
print(json.dumps(dict(code=code, first=first, whole=whole, parts=parts)))
"""


def one_run(steps: int, folder: str) -> dict:
    """The clocks of one run, in seconds."""
    words = ["--preset=nano", "--device=cpu", f"--output_dir={folder}", "--run_name=startup", "--overwrite"]
    more = [] if steps == 0 else [f"--stop_after={steps}"]
    command = [sys.executable, "-c", CHILD, str(time.time()), *words, *more]
    done = subprocess.run(command, cwd=REPO, env=os.environ, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout.splitlines()[-1])
    if told["code"]:
        raise RuntimeError(done.stderr)
    return told


def rows_of(starts: list[dict], run: dict) -> list[dict]:
    """One row a part: seconds of both clocks, and their share of the run."""
    medians = {clock: statistics.median(s["first"][clock] for s in starts) for clock in ("wall", "cpu")}
    rows = [{"part": "to the first step", "elapsed s": medians["wall"], "processor s": medians["cpu"]}]
    rows += [{"part": n, "elapsed s": p["wall"], "processor s": p["cpu"]} for n, p in run["parts"].items()]
    rows.append({"part": "the whole run", "elapsed s": run["whole"]["wall"], "processor s": run["whole"]["cpu"]})
    for row in rows:
        row["of the run, %"] = round(100 * row["processor s"] / run["whole"]["cpu"], 1)
        row |= {key: round(row[key], 2) for key in ("elapsed s", "processor s")}
    return rows


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    rounds: int = setting(5, "starts", "of a process", at_least=1)
    steps: int = setting(700, "steps", "of the run whose shares are measured", at_least=1)
    out: Path | None = setting(None, "folder", "of the result (bench/results)")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    _, options = command(__doc__, argv, Options)
    with tempfile.TemporaryDirectory() as folder:
        starts = [one_run(1, folder) for _ in range(options.rounds)]
        run = one_run(options.steps if options.steps < 700 else 0, folder)
    rows = rows_of(starts, run)
    told = dict(steps=options.steps, modules=starts[0]["first"]["modules"], starts=starts, run=run, rows=rows)
    told["load"] = os.getloadavg()[0]
    print(table(rows), write_result("startup", told, folder=options.out), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
