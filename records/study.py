"""What is each technique worth? A base and treatments of it, run in turn, compared in pairs, stopped when decided.

    python -m records.study STUDY.toml                  # start, or continue where it stopped; ./run.sh study STUDY.toml
    python -m records.study STUDY.toml --parallel 2     # two runs side by side; --launcher=slurm: on a cluster
    python -m records.study report records/studies/NAME # table and picture anew from the logs

The file is described in records/study_plan.py, the statistics in stats/paired.py. Runs of one seed are pairs; the arms
take turns, so that a slow hour hits all of them, and an arm that is decided runs no further. What the study will do is
fixed before its first run: the same name with another plan is an error.

    records/studies/NAME/
      study.json      the plan, the model sizes, the results       ledger.jsonl   every launch and its end
      README.md       table and verdicts, from the logs            effects.png    the effects and their intervals
      source/         the trainer's source, once                   runs/ARM/      log and JSON of each run, trimmed

A run of a treatment that crashes or whose loss is no number is a result ("diverged"); of the base, it ends the study.

Exit codes: 0 every treatment has its verdict (undecided at the last look is one), 4 the budget of minutes is spent
first, 2 usage, 5 input or output failed, 6 a run of the base failed, 130 and 143 stopped; the same command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from records.folder import (
    EXIT_CRASHED,
    EXIT_MORE_RUNS,
    EXIT_USAGE,
    REPO,
    SCHEMA,
    Identity,
    Series,
    SeriesError,
    sole_start,
)
from records.launch import EXIT_IO, Local, default_nproc, slots, visible_gpus
from records.ledger import Ledger, LedgerError, now
from records.logs import write_whole
from records.runner import Runner, Stopped, Task, can_resume, settle_lost
from records.study_plan import BASE, StudyError, StudyPlan, check_against, load_trainer, read_plan
from records.study_report import Pairs, read_pairs, sealed_plan, told, verdicts, write_report
from stats.errors import StatsError
from stats.paired import CONTINUE
from stats.samples import RUN_FIELDS
from trainer.program import program_files, text_hash

# Fields that change neither what a run computes nor with which kernels; the series' own, and the machine's.
IGNORED = RUN_FIELDS | {"preset"}


@dataclass(frozen=True)
class Study(Series):
    """A folder of runs of many configurations: run `ARM/seed-003` has the flags of its arm."""

    plan: StudyPlan | None = field(default=None)

    def command(self, run: str, seed: int, *, resume: bool) -> list[str]:
        """The trainer's command line for a run."""
        arm, _, name = run.partition("/")
        flags = {"save_final": "false", "log_train_loss": "false"} | self.plan.arms[arm]
        one = dataclasses.replace(self.identity, overrides=flags)
        series = Series(self.folder, one, self.trainer, self.plan_hash)
        command = series.command(name, seed, resume=resume)
        at = next(i for i, word in enumerate(command) if word.startswith("--output_dir="))
        command[at] += f"/{arm}"
        return command


def open_study(folder: Path, plan: StudyPlan, trainer: Path, nproc: int) -> Study:
    """Create the folder and seal the plan in it, or check that it is this study's. Raises StudyError."""
    path = folder / "study.json"
    code = program_files(trainer)
    identity = Identity(plan.name, plan.preset, dict(plan.flags), nproc, code)
    sizes = check_against(plan, load_trainer(trainer), IGNORED)
    if not path.exists():
        if Ledger(folder).events():
            raise StudyError(f"{folder} has a ledger but no study.json; restore it or use another name")
        text = trainer.read_text(encoding="utf-8")
        (folder / "source").mkdir(parents=True, exist_ok=True)
        write_whole(folder / "source" / f"{text_hash(text)[:16]}.py", text.rstrip("\r\n") + "\n")
        record = dict(
            schema=SCHEMA,
            created=now(),
            plan=plan.sealed,
            plan_hash=plan.hash,
            about=plan.about,
            parameters=sizes,
            published={t.name: t.published for t in plan.treatments if t.published},
            descriptions={t.name: t.about for t in plan.treatments if t.about},
            nproc=nproc,
            code=code,
        )
        write_whole(path, json.dumps(record, indent=1) + "\n")
    else:
        _check_same(path, plan, code)
    for arm in plan.arms:
        for part in ("runs", "attempts"):
            (folder / part / arm).mkdir(parents=True, exist_ok=True)
    return Study(folder, identity, trainer, plan.hash, plan)


def _check_same(path: Path, plan: StudyPlan, code: dict[str, str]) -> None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        was, was_code = record["plan"], record["code"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise StudyError(f"{path}: not a study's record ({error}); restore it or use another name") from None
    changed = [key for key, value in plan.sealed.items() if was.get(key) != value]
    if changed:
        raise StudyError(
            f"{path}: this study began with another {', '.join(changed)}. A study keeps the plan it began with: "
            "put the file back, or give it another name"
        )
    files = sorted(k for k in code.keys() | was_code.keys() if code.get(k) != was_code.get(k))
    if files:
        raise StudyError(f"{path}: the code has changed since ({', '.join(files)}): put it back, or use another name")


# -----------------------------------------------------------------------------------------------------------
# What to run next


def next_tasks(study: Study, pairs: Pairs) -> list[Task]:
    """The runs up to the next look of every arm that is not decided, pair by pair, the arms in a turning order."""
    plan, states = study.plan, study.ledger.runs()
    decided = {arm for arm, effect in verdicts(plan, pairs).items() if effect.verdict != CONTINUE}
    arms = [arm for arm in plan.arms if arm == BASE or arm not in decided]
    if len(arms) == 1:
        return []
    done = min(_pairs_done(plan, pairs, arm) for arm in arms)
    until = next((n for n in plan.looks if n > done), plan.looks[-1])
    tasks = []
    for pair in range(until):
        turned = arms[pair % len(arms) :] + arms[: pair % len(arms)]
        for arm in turned:
            run = plan.run(arm, pair)
            state = states.get(run)
            if state is None or not state.attempts:
                tasks.append(Task(run, plan.seed(arm, pair), 1, False))
            elif state.status == "interrupted" or (state.attempts[-1].end or {}).get("lost"):
                resume = can_resume(study, state)
                tasks.append(Task(run, plan.seed(arm, pair), state.attempts[-1].number + 1, resume))
    return tasks


def _pairs_done(plan: StudyPlan, pairs: Pairs, arm: str) -> int:
    """Pairs of an arm, from the first on, whose run has ended."""
    losses = pairs.losses.get(arm, {})
    return next((pair for pair in range(plan.looks[-1]) if pair not in losses), plan.looks[-1])


def minutes_spent(ledger: Ledger) -> float:
    """Time of all attempts that have an end, in minutes."""
    ends = [event for event in ledger.events() if event["event"] == "end"]
    return sum(event.get("seconds") or 0.0 for event in ends) / 60


class Budget:
    """No further run once the minutes are spent."""

    def __init__(self, study: Study):
        self.study = study

    def __call__(self) -> str | None:
        limit = self.study.plan.minutes
        if limit and minutes_spent(self.study.ledger) >= limit:
            return f"the budget of {limit:g} minutes is spent"
        return None


def run_study(study: Study, launcher, *, quiet: bool) -> int:
    """Run until every treatment has its verdict or the budget is spent; returns the exit code."""
    budget = Budget(study)
    while True:
        pairs = read_pairs(study.folder, study.plan)
        if pairs.base_failed:
            failed = ", ".join(study.plan.run(BASE, pair) for pair in pairs.base_failed)
            raise SeriesError(f"{failed} failed: without the base nothing can be compared", EXIT_CRASHED)
        write_report(study.folder, study.plan, pairs)
        for line in told(study.plan, verdicts(study.plan, pairs)):
            print(line, flush=True)
        tasks = next_tasks(study, pairs)
        if not tasks:
            return 0
        if reason := budget():
            print(f"{reason}: {len(tasks)} runs up to the next look were not started", flush=True)
            write_report(study.folder, study.plan, pairs, final=True)
            return EXIT_MORE_RUNS
        # In one series-like loop with the ledger: starting, stopping, recording is the runner's.
        Runner(study, launcher, quiet=quiet, timeout_s=None, decide=None).run(_within(tasks, budget))


def _within(tasks: Sequence[Task], budget: Budget) -> list[Task]:
    """So many of the tasks as fit into the rest of the budget, judged by the mean time of the runs so far."""
    study = budget.study
    ends = [e for e in study.ledger.events() if e["event"] == "end" and e.get("status") == "finished"]
    if not study.plan.minutes or not ends:
        return list(tasks) if not study.plan.minutes else list(tasks)[:2]
    mean = sum(e.get("seconds") or 0.0 for e in ends) / 60 / len(ends)
    room = (study.plan.minutes - minutes_spent(study.ledger)) / max(mean, 1e-3)
    return list(tasks)[: max(1, int(room))]


# -----------------------------------------------------------------------------------------------------------
# Command line


def build_parser() -> argparse.ArgumentParser:
    """The study's flags."""
    parser = argparse.ArgumentParser(
        prog="python -m records.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the study's TOML file; or the word report, then a folder")
    parser.add_argument("--root", type=Path, default=REPO / "records" / "studies", help="where studies' folders lie")
    parser.add_argument("--nproc", type=int, help="processes, that is GPUs, a run (as the machine has)")
    parser.add_argument("--launcher", choices=("local", "slurm"), default="local")
    parser.add_argument("--parallel", type=int, default=1, help="runs side by side; 0: as many as the machine holds")
    parser.add_argument("--partition", help="for slurm: where to queue")
    parser.add_argument("--minutes", type=int, default=60, help="for slurm: time limit of a run (60)")
    parser.add_argument("--gpus", type=int, default=0, help="for slurm: GPUs a run")
    parser.add_argument("--cluster", choices=("slurm", "local"), help="for slurm: local tries it without SLURM")
    parser.add_argument("--trainer", type=Path, default=REPO / "train_gpt.py", help=argparse.SUPPRESS)
    return parser


def run_command(argv: Sequence[str]) -> int:
    """Start or continue a study."""
    options = build_parser().parse_args(argv)
    plan = read_plan(options.file)
    nproc = options.nproc or default_nproc(visible_gpus())
    folder = options.root / plan.name
    with sole_start(folder):
        study = open_study(folder, plan, options.trainer, nproc)
        settle_lost(study)
        return run_study(study, _launcher(study, options, nproc), quiet=True)


def _launcher(study: Study, options: argparse.Namespace, nproc: int):
    if options.launcher == "slurm":
        from records.slurm import Request, Slurm

        cores = max(1, nproc if not options.gpus else 4 * nproc)
        request = Request(
            minutes=options.minutes,
            partition=options.partition,
            gpus=options.gpus,
            cores=cores,
            at_once=options.parallel or 256,
            cluster=options.cluster,
        )
        return Slurm(study.folder, request)
    return Local(slots(None if options.parallel == 1 else options.parallel, nproc))


def report_command(argv: Sequence[str]) -> int:
    """Write a study's table and picture anew from its logs."""
    parser = argparse.ArgumentParser(prog="python -m records.study report")
    parser.add_argument("folder", type=Path, nargs="+", help="a study's folder")
    for folder in parser.parse_args(argv).folder:
        plan = sealed_plan(folder)
        pairs = read_pairs(folder, plan)
        write_report(folder, plan, pairs)
        print("\n".join(told(plan, verdicts(plan, pairs))))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code of the module's docstring."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return report_command(argv[1:]) if argv[:1] == ["report"] else run_command(argv)
    except (StudyError, StatsError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except SeriesError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except Stopped as stopped:
        print(f"stopped by {stopped}; the same command continues", file=sys.stderr)
        return 128 + stopped.number
    except (LedgerError, OSError) as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return EXIT_IO


if __name__ == "__main__":
    sys.exit(main())
