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

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.echo import program, tell
from data.paths import write_text
from records.flags import StudyFlags, default_root, helped, make_launcher, read_flags
from records.folder import EXIT_CRASHED, EXIT_MORE_RUNS, EXIT_USAGE, SCHEMA, Identity, Series, SeriesError, sole_start
from records.launch import EXIT_IO, default_nproc, visible_gpus
from records.ledger import Ledger, LedgerError
from records.runner import Runner, Stopped, Task, can_resume, settle_lost
from records.study_plan import BASE, StudyError, StudyPlan, check_against, load_trainer, read_plan
from records.study_report import Pairs, read_pairs, sealed_plan, told, verdicts, write_report
from stats.errors import StatsError
from stats.paired import CONTINUE
from stats.samples import RUN_FIELDS
from trainer.program import changed_files, now, program_files, text_hash

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
        return self.command_of(one, self.runs_folder / arm, name, seed, resume=resume)


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
        write_text(folder / "source" / f"{text_hash(text)[:16]}.py", text.rstrip("\r\n") + "\n")
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
        write_text(path, json.dumps(record, indent=1) + "\n")
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
    if files := changed_files(was_code, code):
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
            tell(line)
        tasks = next_tasks(study, pairs)
        if not tasks:
            return 0
        if reason := budget():
            tell(f"{reason}: {len(tasks)} runs up to the next look were not started")
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


def run_command(argv: Sequence[str]) -> int:
    """Start or continue a study."""
    (file,), flags = read_flags(StudyFlags, argv, 1)
    plan = read_plan(Path(file))
    nproc = flags.nproc or default_nproc(visible_gpus())
    folder = Path(flags.root or default_root() / "studies") / plan.name
    with sole_start(folder):
        study = open_study(folder, plan, flags.program, nproc)
        settle_lost(study)
        return run_study(study, make_launcher(study.folder, flags, nproc, plan.preset), quiet=True)


@dataclass(frozen=True)
class ReportFlags:
    """Of `report`, which takes the folders of studies: none."""


def report_command(argv: Sequence[str]) -> int:
    """Write the tables and pictures of studies anew from their logs."""
    for folder in map(Path, read_flags(ReportFlags, argv, None)[0]):
        plan = sealed_plan(folder)
        pairs = read_pairs(folder, plan)
        write_report(folder, plan, pairs)
        print("\n".join(told(plan, verdicts(plan, pairs))))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code of the module's docstring."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if helped(argv, __doc__, StudyFlags):
        return 0
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
    sys.exit(program("records.study", main))
