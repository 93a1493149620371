"""Run a series of repeats into one folder, and judge it.

    python -m records.series --repeats 19 --preset=nano --name nano      # start, or continue where it stopped
    python -m records.series --repeats 19 --name nano --retry-crashed    # give crashed runs another attempt
    python -m records.series drop nano seed-003 --reason "power cut"     # leave an unfinished run out
    python -m records.series lost nano seed-003 --reason "host is gone"  # it ended and nobody wrote it down

Every flag that is not the series' own (see --help) goes to the trainer, the same for every run; the series
sets `--seed`, `--output_dir` and `--run_name` itself. Runs are seeds 0..N-1.

    records/<name>/
      record.json    what the series is, and its results      ledger.jsonl   every launch and its end
      README.md      generated from the logs                  losses.png     the loss curves
      source/        the trainer's source, once               runs/          a log and a JSON for each run
      attempts/      what earlier attempts of a run left behind, and the output of crashed ones

Rules. A finished run is never repeated. A crashed run stays crashed until `--retry-crashed` adds an
attempt, with the old one kept and counted. A run that was stopped is resumed from its checkpoint. The
configuration and the code of a series never change: the same name with others is an error. Only one start
may work on a series at a time.

Exit codes: the t-test's (0 the mean is below the threshold, 1 not significant, 3 cannot be judged, 4 the
sequential test needs more runs), or 2 usage, 5 input or output failed, 6 a run crashed, 130 and 143 stopped
by a signal. A single run has no verdict: 0 if it finished.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from data.echo import program, tell
from records import report
from records.asking import ask_trainer
from records.flags import AmendFlags, SeriesFlags, default_root, helped, make_launcher, read_flags
from records.folder import (
    EXIT_CRASHED,
    Identity,
    Series,
    SeriesError,
    open_series,
    read_record,
    sole_start,
    write_record,
)
from records.launch import EXIT_IO, EXIT_NON_FINITE, default_nproc, visible_gpus
from records.ledger import Ledger, LedgerError
from records.runner import Runner, Stopped, choose, copy_away, settle_lost
from stats.errors import StatsError
from stats.planfile import read_plan
from stats.plans import Plan
from trainer.program import fingerprint, json_hash, program_files

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def default_name(preset: str, overrides: dict[str, str]) -> str:
    """The preset, followed by the changed fields: `nano`, `nano-num_iterations-50`. Where a name cannot hold all
    that, a hash of it tells two series apart."""
    words = [preset] + [f"{key}-{Path(text).name or text}" for key, text in sorted(overrides.items())]
    whole = "-".join([preset] + [f"{key}-{text}" for key, text in sorted(overrides.items())])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)).rstrip("-.")
    if name == whole and len(name) <= 100:
        return name
    return f"{name[:91].rstrip('-.')}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def series_from(options: SeriesFlags, overrides: dict[str, str]) -> tuple[Path, Identity]:
    """(folder, wanted identity); a name alone continues that series with the flags it was started with."""
    gpus = visible_gpus()
    preset = options.preset or ("medium" if gpus else "nano")
    nproc = options.nproc or default_nproc(gpus)
    code = program_files(options.program)
    name = options.name or default_name(preset, overrides)
    if name == "auto":  # another program is another series: changed code never meets old runs
        name = f"{default_name(preset, overrides)}-{fingerprint(code)[:8]}"
    if not NAME_PATTERN.fullmatch(name):
        raise SeriesError(f"--name {name!r}: letters, digits, '.', '_' and '-', at most 100, no leading sign")
    folder = Path(options.root or default_root()) / name
    if options.name and not overrides and options.preset is None and (record := read_record(folder)):
        was = Identity(**record["identity"])
        preset, overrides, nproc = was.preset, was.overrides, options.nproc or was.nproc
    return folder, Identity(name, preset, overrides, nproc, code)


def run_command(argv: Sequence[str]) -> int:
    """Start or continue a series, then report and judge."""
    overrides: dict[str, str] = {}
    _, options = read_flags(SeriesFlags, argv, 0, overrides)
    folder, wanted = series_from(options, overrides)
    check_room(folder)
    threshold = None if read_record(folder) else checked_words(wanted, options.program)
    check_threshold(Path(options.plan or folder / "plan.json"), threshold)
    with sole_start(folder):
        series = open_series(folder, wanted, options.program)
        settle_lost(series)
        series, plan = with_plan(series, options, threshold)
        return run_and_judge(series, options, plan, plan.threshold if plan else threshold)


def check_room(folder: Path) -> None:
    """PermissionError where the series' folder could not be made, before anything else takes time."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(place))


def check_threshold(plan: Path, target: float | None) -> None:
    """SeriesError unless a plan is about what the runs are told to reach: a series has one threshold."""
    if target is None or not plan.exists():
        return
    try:
        wanted = read_plan(plan).threshold
    except StatsError as error:
        raise SeriesError(str(error)) from None
    if wanted != target:
        raise SeriesError(
            f"{plan} is about a mean loss below {wanted:g}, the runs about {target:g}: give --target_loss={wanted:g}, "
            "or a plan for theirs"
        )


def checked_words(wanted: Identity, trainer: Path) -> float | None:
    """The trainer's threshold, once it has accepted the flags: a mistyped one must leave nothing behind."""
    try:
        return ask_trainer(trainer, wanted.preset, wanted.overrides)
    except ValueError as error:
        raise SeriesError(f"{trainer.name} does not take these flags: {error}") from None


def begin(series: Series, threshold: float | None, plan: Plan | None) -> None:
    """The ledger's first line: what is fixed before the first launch. Its hash, published now, proves that later."""
    if series.ledger.events():
        return
    identity = json_hash(asdict(series.identity))
    stop_step = plan.stop_step if plan else None
    plan_hash = plan.hash if plan else None
    series.ledger.append("begin", threshold=threshold, plan=plan_hash, stop_step=stop_step, identity=identity)
    tell(f"{series.folder.name}: head {series.ledger.head()} (publish it before the first run: stats/README.md)")


def with_plan(series: Series, options: SeriesFlags, threshold: float | None):
    """(series, its plan or None). A series is sequential from its first run on or never. Raises SeriesError."""
    if not options.sequential:
        if any(value is not None for value in (options.plan, options.margin, options.sigma)):
            raise SeriesError("--plan, --margin and --sigma belong to --sequential")
        if series.plan_hash:
            raise SeriesError(f"{series.folder} has a plan: continue it with --sequential")
        return series, None
    if not series.plan_hash and series.ledger.events():
        raise SeriesError(f"{series.folder} began without a plan: a sequential series needs another --name")
    from records.sequential import plan_of

    try:
        plan = plan_of(series.folder, options.plan, threshold, options.margin, options.sigma)
    except (StatsError, ValueError) as error:
        raise SeriesError(str(error)) from None
    if series.plan_hash not in ("", plan.hash):
        raise SeriesError(f"{series.folder / 'plan.json'} is not the plan that this series began with")
    record = read_record(series.folder)
    write_record(series.folder, record | {"plan_hash": plan.hash})
    return replace(series, plan_hash=plan.hash), plan


def run_and_judge(series: Series, options: SeriesFlags, plan: Plan | None, threshold: float | None) -> int:
    """The series' work, with the folder held."""
    repeats = options.repeats or (plan.cap if plan else 1)
    if plan and repeats > plan.cap:
        raise SeriesError(f"--repeats {repeats}: the plan allows {plan.cap} runs at most")
    launcher = make_launcher(series.folder, options, series.identity.nproc, series.identity.preset)
    begin(series, threshold, plan)
    adopted = launcher.adopt() if options.launcher == "slurm" else set()
    tasks, crashed = choose(series, repeats, options.retry_crashed, adopted)
    tell(f"{series.folder}: {repeats} runs wanted, {len(tasks)} to start, {len(crashed)} stay crashed")
    for state in crashed:
        end = state.attempts[-1].end or {}
        tell(f"  {state.run} crashed: {end.get('error')} (again with --retry-crashed)")
    decided = None
    if plan:
        from records.sequential import Watch

        decided = Watch(series.folder, plan)
    runner = Runner(
        series,
        launcher,
        quiet=options.launcher is not None,
        timeout_s=options.timeout_s,
        decide=decided,
        copy_to=options.copy_to,
    )
    try:
        runner.run(tasks)
    except (Stopped, SeriesError) as stop:
        if not options.no_judge:
            report.report(series.folder, options.alpha)
        copy_away(series.folder, options.copy_to)
        if isinstance(stop, Stopped):
            print(f"stopped by {stop}; the same command continues where it stopped", file=sys.stderr)
            return 128 + stop.number
        raise
    verdict = 0
    if not options.no_judge:
        verdict = report.judge(series.folder, alpha=options.alpha)
    if not copy_away(series.folder, options.copy_to):
        return EXIT_IO
    return verdict if not (runner.crashes or crashed) else EXIT_CRASHED


def amend_command(verb: str, argv: Sequence[str]) -> int:
    """`drop`: leave an unfinished run out of the verdict. `lost`: note that a run ended unrecorded. With
    a reason."""
    (name, run), options = read_flags(AmendFlags, argv, 2)
    folder, reason = Path(options.root or default_root()) / name, (options.reason or "").strip()
    if read_record(folder) is None:
        raise SeriesError(f"no series at {folder}")
    state = Ledger(folder).runs().get(run)
    if state is None:
        raise SeriesError(f"{folder} has no run {run}")
    if not reason:
        raise SeriesError("--reason is empty: say why, it is published with the series")
    if verb == "drop":
        if state.status == "finished":
            raise SeriesError(
                f"{run} finished, and stays in the verdict: dropping a run after seeing its loss "
                "makes every p-value wrong"
            )
        if state.status == "crashed" and state.attempts[-1].end.get("exit_code") == EXIT_NON_FINITE:
            raise SeriesError(
                f"{run} ended because its loss was not finite: that is a result, and stays in the verdict"
            )
        Ledger(folder).append("drop", run=run, reason=reason)
        print(f"{run} is left out of {folder.name}: {reason}")
        return 0
    if state.status not in ("elsewhere", "lost"):
        raise SeriesError(f"{run} is {state.status}: only a run without an end can be lost")
    fields = {"run": run, "attempt": state.attempts[-1].number, "exit_code": None, "settled_later": True}
    Ledger(folder).append("end", **fields, status="crashed", error=f"lost: {reason}", lost=True)
    print(f"{run} of {folder.name} is recorded as lost: {reason}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if helped(argv, __doc__, SeriesFlags, AmendFlags):
        return 0
    try:
        if argv[:1] in (["drop"], ["lost"]):
            return amend_command(argv[0], argv[1:])
        return run_command(argv)
    except SeriesError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except StatsError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except LedgerError as error:
        print(f"error: {error.strerror}", file=sys.stderr)
        return EXIT_IO
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; check the folder's rights and free space", file=sys.stderr)
        return EXIT_IO


if __name__ == "__main__":
    sys.exit(program("records.series", main))
