"""Two recipes side by side: their curves, what their best models write, and what stats says of their losses.

A side is every finished run of one configuration, whatever folder it lies in: runs of the queue are series of one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from lab.comparable import NOT_COMPARABLE, validated_on
from lab.studio.catalogue import corpus_of_shards
from lab.studio.places import Refused
from lab.studio.progress import read_progress
from records.logs import read_run_json
from trainer.files import checkpoints_of

if TYPE_CHECKING:
    from stats.compare import Comparisons
    from stats.samples import Sample


MOST_SETTINGS = 3  # of those in which recipes differ, named in a label
MOST_SERIES = 2  # whose names stand in a label


@dataclass(frozen=True)
class Side:
    """The runs of one configuration: their JSON files, and what must be equal for losses to compare."""

    key: str
    label: str
    runs: tuple[Path, ...]
    read: tuple  # see `validated_on`

    @property
    def best(self) -> Path | None:
        """The checkpoint of the run with the least loss."""
        found = [(read_run_json(run).get("final_loss") or 0.0, run) for run in self.runs]
        for _, run in sorted(found):
            folder = run.with_suffix(".checkpoints")
            for path in (folder / "best.safetensors", *checkpoints_of(folder)):
                if path.is_file():
                    return path
        return None


def sides(folders: list[Path]) -> list[Side]:
    """The configurations of which series in `folders` have finished runs; those with most runs first."""
    found: dict[str, list[tuple[Path, dict]]] = {}
    for folder in folders:
        for path in sorted(folder.glob("runs/*.json")):
            told = read_run_json(path)
            if told.get("status") == "finished" and told.get("config_hash"):
                found.setdefault(f"{told['config_hash']}-{told.get('data_hash')}", []).append((path, told))
    made = []
    for key, runs in found.items():
        told = runs[0][1]
        config = told.get("config") or {}
        steps = config.get("steps") or config.get("num_iterations") or 0
        parameters = config.get("num_parameters", told.get("num_parameters"))  # the trainer's runs do not tell
        size = "" if parameters is None else f" · {parameters:,} parameters"
        count = f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
        label = f"{_recipe(config, [path for path, _ in runs])}{size} · {steps:,} steps · {count}"
        made.append(Side(key[:80], label, tuple(path for path, _ in runs), validated_on(told)))
    return sorted(told_apart(made), key=lambda side: (-len(side.runs), side.label))


def _recipe(config: dict, runs: list[Path]) -> str:
    """What was trained on what. Runs of the trainer carry their series' name too: a variant of a preset (nano-window)
    has the preset's name in its configuration, and differs in a few of many settings."""
    series = list(dict.fromkeys(run.parent.parent.name for run in runs))
    named = ", ".join(series[:MOST_SERIES]) + (f" and {more} more" if (more := len(series) - MOST_SERIES) > 0 else "")
    if preset := config.get("preset"):
        recipe = f"{preset} on {corpus_of_shards(str(config.get('train_files', ''))) or 'an unknown text'}"
        return recipe if series == [preset] else f"{named}: {recipe}"
    return f"{config.get('model') or named} on {config.get('data') or named}"


def told_apart(made: list[Side]) -> list[Side]:
    """Sides of which no two have the same label: where they have, the settings in which they differ are added."""
    alike: dict[str, list[Side]] = {}
    for side in made:
        alike.setdefault(side.label, []).append(side)
    found = []
    for group in alike.values():
        settings = [_settings(side) for side in group]
        names = sorted({name for one in settings for name in one})
        differ = [name for name in names if len({str(one.get(name)) for one in settings}) > 1][:MOST_SETTINGS]
        for side, one in zip(group, settings):
            more = [f"{name.replace('_', ' ')} {one.get(name, 'not told')}" for name in differ]
            more += [side.key[:6]] if len(group) > 1 and not differ else []
            label = f"{', '.join(more)}: {side.label}" if more else side.label  # lists cut what is long at its end
            found.append(replace(side, label=label))
    return found


def _settings(side: Side) -> dict:
    """The configuration of a side's runs, with the model's own fields beside the trainer's."""
    config = dict(read_run_json(side.runs[0]).get("config") or {})
    return {name: value for name, value in (config | (config.pop("fields", None) or {})).items() if name != "seed"}


def verdict(first: Side, second: Side, alpha: float = 0.05) -> Comparisons:
    """The second side against the first, by `stats compare`. Refused where losses do not compare; DataError of stats
    for too few runs."""
    from stats.compare import compare

    if first.key == second.key:
        raise Refused("both sides are the same recipe; choose two")
    if first.read != second.read:
        raise Refused(NOT_COMPARABLE)
    return compare(_sample(first, "A"), [_sample(second, "B")], alpha)


def _sample(side: Side, name: str) -> Sample:
    """The final losses of a side's runs, through stats' own reader."""
    from stats.samples import sample_of
    from stats.series import load_series

    wanted = {(run.parent.parent, run.stem) for run in side.runs}
    samples = [sample_of(load_series(folder)) for folder in dict.fromkeys(folder for folder, _ in sorted(wanted))]
    pairs = [
        (run, final)
        for sample in samples
        for run, final in zip(sample.runs, sample.finals)
        if (Path(run.path).parent.parent, run.name) in wanted
    ]
    runs, finals = zip(*pairs)
    label = f"{name} ({side.label.partition(' · ')[0]})"
    return replace(samples[0], name=label, runs=runs, finals=finals, left_out=(), notes=())


def mean_curves(first: Side, second: Side) -> list[tuple[int, float, str]]:
    """(step, validation loss, 'A' or 'B'): the mean over a side's runs at every step that all of them validated."""
    rows = []
    for name, side in (("A", first), ("B", second)):
        curves = [dict(read_progress(run.with_suffix(".txt")).val) for run in side.runs]
        shared = set.intersection(*map(set, curves)) if curves else set()
        rows += [(step, sum(curve[step] for curve in curves) / len(curves), name) for step in sorted(shared)]
    return rows
