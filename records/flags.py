"""The command lines of `records.series` and `records.study`: what they take for themselves, and what a trainer gets.

    flags, overrides = read_flags(SeriesFlags, ["--repeats=19", "--matrix_lr=0.02"])

Both `--field=value` and `--field value`, with `_` or `-`, as everywhere (trainer/options.py).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.paths import cache_folder
from records.folder import REPO, SeriesError
from records.launch import Local, slots, visible_gpus
from trainer.options import UsageError, check_limits, fields_text, fill, read_words, setting, wants_help

SET_BY_SERIES = ("seed", "output_dir", "run_name", "resume", "overwrite", "plan_hash")


@dataclass(frozen=True)
class Machines:
    """Where runs go."""

    nproc: int | None = setting(None, "processes", "that is GPUs, a run (8, 4, 2 or 1, as the machine has)", at_least=1)
    launcher: str | None = setting(
        None, "name", "local: side by side on this machine; slurm: a job array", choices=("local", "slurm")
    )
    parallel: int | None = setting(None, "runs", "side by side; 0: as many as the machine holds", at_least=0)
    partition: str | None = setting(None, "name", "for slurm: where to queue")
    minutes: int = setting(60, "minutes", "for slurm: time limit of a run", at_least=1)
    gpus: int | None = setting(
        None,
        "GPUs",
        "for slurm: of a run (--nproc with GPUs on this machine or with another preset than the nano ones, else 0)",
        at_least=0,
    )
    slurm: tuple = setting((), "KEY=VALUE", "for slurm: any other sbatch option")
    cluster: str | None = setting(
        None, "name", "for slurm: submitit's executor; local tries it without SLURM", choices=("slurm", "local")
    )
    trainer: str | None = setting(None, "file", "the program that is run (train_gpt.py)")

    @property
    def program(self) -> Path:
        """The trainer's file. Raises SeriesError where there is none."""
        path = Path(self.trainer or REPO / "train_gpt.py")
        if not path.is_file():
            raise SeriesError(f"no trainer at {path}")
        return path


@dataclass(frozen=True)
class SeriesFlags(Machines):
    """The series' own flags; all others go to the trainer."""

    repeats: int | None = setting(None, "runs", "in all, seeds 0..N-1 (1; with --sequential the plan's)", at_least=1)
    preset: str | None = setting(None, "name", "the trainer's preset (medium with GPUs, nano without)")
    name: str | None = setting(
        None, "folder", "of the series (the preset, with the changed fields); auto: with a hash of the code"
    )
    root: str | None = setting(None, "folder", "where series' folders lie (records/)")
    retry_crashed: bool = setting(False, "flag", "give every crashed run another attempt")
    sequential: bool = setting(False, "flag", "stop as soon as the sequential test has decided")
    plan: str | None = setting(None, "file", "for --sequential: a plan made by `python -m stats plan`")
    margin: float | None = setting(None, "nats", "for --sequential: true distance below the threshold")
    sigma: float | None = setting(None, "nats", "for --sequential: noise of the loss between runs")
    timeout_s: float | None = setting(None, "seconds", "a run that takes longer is stopped and counts as crashed")
    alpha: float = setting(0.01, "probability", "significance level of the verdict; the track's", above=0, below=1)
    copy_to: str | None = setting(
        None, "URL", "copy the series there after every run (s3://..., any fsspec URL, a folder)"
    )
    no_judge: bool = setting(False, "flag", "run only; no report and no verdict")


@dataclass(frozen=True)
class StudyFlags(Machines):
    """The study's flags."""

    root: str | None = setting(None, "folder", "where studies' folders lie (records/studies)")


@dataclass(frozen=True)
class AmendFlags:
    """What goes into the ledger beside the series and the run."""

    reason: str | None = setting(None, "text", "why; published with the series")
    root: str | None = setting(None, "folder", "where series' folders lie (records/)")


def read_flags(
    kind: type, argv: Sequence[str], words: int | None, others: dict[str, str] | None = None
) -> tuple[list[str], Any]:
    """(words, flags) of a command line with that many words (None: one or more); `others`: see `read_words`.

    Raises SeriesError."""
    try:
        found, given = read_words([kind], argv, {}, others=others)
        flags = fill(kind, given)
        check_limits(flags)
    except UsageError as error:
        raise SeriesError(str(error)) from None
    for name in SET_BY_SERIES:
        if name in (others or {}):
            raise SeriesError(f"--{name} is set by the series itself: leave it out")
    if words is not None and len(found) > words:
        raise SeriesError(f"unexpected word {found[words]!r}: flags are written --field=value")
    if len(found) < (least := 1 if words is None else words):
        raise SeriesError(f"{least} words are needed beside the flags, not {len(found)}; see --help")
    return found, flags


def helped(argv: Sequence[str], doc: str | None, *kinds: type) -> bool:
    """Whether the user asked what there is; if so, that is printed."""
    if not wants_help(argv):
        return False
    print(doc)
    for kind in kinds:
        print(kind.__doc__, *fields_text(kind), sep="\n")
    return True


def default_root() -> Path:
    """records/ of the checkout, or the cache folder where the checkout may not be written to."""
    own = REPO / "records"
    return own if os.access(own, os.W_OK) else cache_folder() / "records"


def make_launcher(folder: Path, flags: Machines, nproc: int, preset: str) -> Any:
    """Where the runs go: one after the other, side by side, or to a cluster. Raises SeriesError, SlurmError."""
    try:
        if flags.launcher != "slurm":
            return Local(slots(flags.parallel if flags.parallel is not None or not flags.launcher else 0, nproc))
        from records.slurm import Request, Slurm

        gpus = flags.gpus
        if gpus is None:
            gpus = nproc if visible_gpus() or not preset.startswith("nano") else 0
        request = Request(
            minutes=flags.minutes,
            partition=flags.partition,
            gpus=gpus,
            cores=max(1, nproc if not gpus else 4 * nproc),
            at_once=flags.parallel or 256,
            cluster=flags.cluster,
            more=dict(word.partition("=")[::2] for word in flags.slurm),
        )
        return Slurm(folder, request)
    except ValueError as error:
        raise SeriesError(str(error)) from None
