"""What a study is: a base, treatments that differ from it by flags, and when to stop; from a TOML file, sealed.

    preset = "nano"
    about = "Each technique of the medium preset, switched off"      # printed above the table
    flags = { num_iterations = 300, cooldown_frac = 0.5 }            # of every run; those of a treatment come on top

    [design]                    # all fixed before the first run
    looks = [4, 6, 8]           # pairs at which the intervals are looked at; the last one is the most
    alpha = 0.05                # probability of any wrong "helps" or "hurts" over all treatments
    margin = 0.005              # nats: a smaller effect is called none
    endpoint = 1                # a run's loss is the mean of its last so many validations
    first_seed = 0              # of the pairs; another where the treatments were chosen by the runs of earlier seeds
    minutes = 120               # training time of all runs together after which no further one starts; 0: no limit

    [treatments.no_skips]       # the name: letters, digits, '.', '_' and '-'
    flags = { unet_skips = "none" }
    parameters = 200000         # needed where the treatment's model has another size than the base's
    published = "..."           # optional: what was claimed elsewhere, printed beside the result
    published_percent = 2.3     # optional: that claim as a change of the steps needed, in percent; positive is worse
    published_mn = -4.2         # optional, in its place: as a change of the loss at equal steps, in 0.001 nats
    about = "..."               # optional

Every study also holds the treatment `base-again`: the base with other seeds, which must come out as no effect.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stats.errors import UsageError
from stats.paired import Design
from trainer.program import json_hash

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BASE, AGAIN = "base", "base-again"
OTHER_SEEDS = 1000  # base-again's are so much higher: with the base's own it would be the same runs once more
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
_TOP = {"preset", "about", "flags", "design", "treatments"}
_DESIGN = {"looks", "alpha", "margin", "endpoint", "first_seed", "minutes"}
_TREATMENT = {"flags", "parameters", "published", "published_percent", "published_mn", "about"}
# What a run computes does not depend on these; the study sets some of them itself.
_SET_BY_STUDY = {"seed", "output_dir", "run_name", "resume", "overwrite", "plan_hash", "preset", "stop_after"}


class StudyError(ValueError):
    """A study's file makes no sense, or is not the one that the study began with; the message says what to do."""


@dataclass(frozen=True)
class Treatment:
    """Flags on top of the base's. parameters: the size of its model, where it is stated."""

    name: str
    flags: dict[str, str]
    parameters: int | None = None
    published: str = ""
    about: str = ""
    published_percent: float | None = None
    published_mn: float | None = None


@dataclass(frozen=True)
class StudyPlan:
    """A study's file, checked as far as that goes without the trainer."""

    name: str
    preset: str
    flags: dict[str, str]
    treatments: tuple[Treatment, ...]
    looks: tuple[int, ...]
    alpha: float
    margin: float
    endpoint: int = 1
    minutes: float = 0.0
    about: str = field(default="", compare=False)
    first_seed: int = 0

    @property
    def design(self) -> Design:
        """The statistics' part; the family is all treatments, base-again included."""
        return Design(self.looks, self.alpha, len(self.treatments) + 1, self.margin)

    @property
    def arms(self) -> dict[str, dict[str, str]]:
        """{arm: all its flags}, the base first."""
        rest = {t.name: self.flags | t.flags for t in self.treatments}
        return {BASE: dict(self.flags), AGAIN: dict(self.flags), **rest}

    def seed(self, arm: str, pair: int) -> int:
        """The seed of an arm's run in a pair (from 0)."""
        return self.first_seed + pair + (OTHER_SEEDS if arm == AGAIN else 0)

    def run(self, arm: str, pair: int) -> str:
        """The run of an arm in a pair (from 0): ARM/seed-003."""
        return f"{arm}/seed-{self.seed(arm, pair):03d}"

    @property
    def sealed(self) -> dict:
        """Everything that must not change once the first run has started, as JSON; `minutes` may be raised."""
        told = json.loads(json.dumps(dataclasses.asdict(self)))
        for open_to_change in ("about", "minutes"):
            told.pop(open_to_change)
        if not self.first_seed:  # plans that were sealed before there was a choice keep their hash
            told.pop("first_seed")
        for treatment in told["treatments"]:
            for key in ("about", "published", "published_percent", "published_mn"):
                treatment.pop(key)
        return told

    @property
    def hash(self) -> str:
        """sha256 of `sealed`; in every run's log as its plan."""
        return json_hash(self.sealed)


def read_plan(path: Path) -> StudyPlan:
    """The study in a TOML file, named after the file. Raises StudyError."""
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path}: not TOML ({error})") from None
    try:
        return _plan(path.stem, told)
    except StudyError as error:
        raise StudyError(f"{path}: {error}") from None


def _plan(name: str, told: Mapping[str, Any]) -> StudyPlan:
    _known(told, _TOP, "the file")
    design = _table(told, "design")
    _known(design, _DESIGN, "[design]")
    missing = [key for key in ("looks", "margin") if key not in design]
    if "preset" not in told or missing:
        raise StudyError(f"missing: {', '.join(['preset'] * ('preset' not in told) + missing)}")
    if not _NAME.fullmatch(name):
        raise StudyError("the file's name is the study's: letters, digits, '.', '_' and '-', no leading sign")
    treatments = tuple(_treatment(key, value) for key, value in _table(told, "treatments").items())
    if not treatments:
        raise StudyError("no [treatments.NAME]: nothing to compare with the base")
    try:
        plan = StudyPlan(
            name=name,
            preset=str(told["preset"]),
            flags=_flags(told.get("flags", {}), "flags"),
            treatments=treatments,
            looks=tuple(int(n) for n in design["looks"]),
            alpha=float(design.get("alpha", 0.05)),
            margin=float(design["margin"]),
            endpoint=int(design.get("endpoint", 1)),
            minutes=float(design.get("minutes", 0)),
            about=str(told.get("about", "")),
            first_seed=int(design.get("first_seed", 0)),
        )
        plan.design  # noqa: B018  (checks looks, alpha and margin)
    except (TypeError, ValueError, UsageError) as error:
        raise StudyError(f"[design]: {error}") from None
    if plan.endpoint < 1 or not plan.minutes >= 0:
        raise StudyError(f"[design]: endpoint {plan.endpoint} is at least 1, minutes {plan.minutes:g} at least 0")
    if not 0 <= plan.first_seed < OTHER_SEEDS:
        raise StudyError(f"[design]: first_seed {plan.first_seed} is from 0 to {OTHER_SEEDS - 1}")
    return plan


def _table(told: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = told.get(key, {})
    if not isinstance(value, Mapping):
        raise StudyError(f"{key} is a table, not {value!r}")
    return value


def _known(told: Mapping[str, Any], allowed: set[str], where: str) -> None:
    unknown = sorted(set(told) - allowed)
    if unknown:
        raise StudyError(f"{where}: unknown {', '.join(unknown)}; known: {', '.join(sorted(allowed))}")


def _treatment(name: str, told: Any) -> Treatment:
    where = f"[treatments.{name}]"
    if not _NAME.fullmatch(name) or name in (BASE, AGAIN):
        raise StudyError(f"{where}: a name of letters, digits, '.', '_', '-', and neither {BASE} nor {AGAIN}")
    if not isinstance(told, Mapping):
        raise StudyError(f"{where} is a table, not {told!r}")
    _known(told, _TREATMENT, where)
    parameters = told.get("parameters")
    if parameters is not None and (not isinstance(parameters, int) or parameters < 1):
        raise StudyError(f"{where}: parameters = {parameters!r} is no number of parameters")
    claims = {key: told.get(key) for key in ("published_percent", "published_mn")}
    for key, value in claims.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise StudyError(f"{where}: {key} = {value!r} is no number")
    if None not in claims.values():
        raise StudyError(f"{where}: the claim in percent or in 0.001 nats, not both")
    flags = _flags(told.get("flags", {}), where)
    return Treatment(name, flags, parameters, str(told.get("published", "")), str(told.get("about", "")), **claims)


def _flags(told: Any, where: str) -> dict[str, str]:
    """{field: text}, as the trainer's command line takes them."""
    if not isinstance(told, Mapping):
        raise StudyError(f"{where}: flags = {{ field = value, ... }}, not {told!r}")
    found = {}
    for key, value in told.items():
        name = key.replace("-", "_")
        if name in _SET_BY_STUDY:
            raise StudyError(f"{where}: {name} is set by the study itself")
        if not isinstance(value, (bool, int, float, str)):
            raise StudyError(f"{where}: {key} = {value!r} is no text, number or flag")
        found[name] = ("true" if value else "false") if isinstance(value, bool) else str(value)
    return found


# -----------------------------------------------------------------------------------------------------------
# Held against the trainer


def load_trainer(path: Path):
    """The trainer as a module, under a name of its own (importing it starts nothing)."""
    spec = importlib.util.spec_from_file_location("trainer_of_study", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
    return module


def check_against(plan: StudyPlan, trainer: Any, ignored: frozenset[str]) -> dict[str, int | None]:
    """{arm: parameters of its model}. `trainer`: module with parse_config and, for the sizes, GPT; `ignored`: fields
    that do not decide what a run computes.

    Raises StudyError for a flag that the trainer does not know or refuses, a treatment equal to the base or to another
    one, and a model of another size than the base's that is not the one stated."""
    seen: dict[str, str] = {}
    sizes: dict[str, int | None] = {}
    for arm, flags in plan.arms.items():
        try:
            config = trainer.parse_config([f"--preset={plan.preset}", *(f"--{k}={v}" for k, v in flags.items())])
        except ValueError as error:
            raise StudyError(f"{arm}: {error}") from None
        told = {k: v for k, v in dataclasses.asdict(config).items() if k not in ignored}
        text = json.dumps(told, sort_keys=True)
        if text in seen and arm != AGAIN:
            raise StudyError(f"{arm} is the same configuration as {seen[text]}: its flags change nothing")
        seen.setdefault(text, arm)
        sizes[arm] = _parameters(trainer, config)
    _check_sizes(plan, sizes)
    return sizes


def _check_sizes(plan: StudyPlan, sizes: Mapping[str, int | None]) -> None:
    for treatment in plan.treatments:
        size, base = sizes[treatment.name], sizes[BASE]
        stated = base if treatment.parameters is None else treatment.parameters
        if size is not None and size != stated:
            how = "which it does not state" if treatment.parameters is None else f"and states {treatment.parameters:,}"
            raise StudyError(
                f"{treatment.name} has {size:,} parameters, {how} (the base has {base:,}): write parameters = {size} "
                "if that is meant"
            )


def _parameters(trainer: Any, config: Any) -> int | None:
    if not hasattr(trainer, "GPT"):
        return None
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in trainer.GPT(config).parameters())
