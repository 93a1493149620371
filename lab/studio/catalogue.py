"""Checkpoints and series found in the project's folders. Headers are read without torch, so a list is quick."""

from __future__ import annotations

import json
import re
import struct
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lab.studio.places import Places, Refused
from lab.studio.progress import read_progress
from records.logs import read_run_json
from trainer.files import checkpoints_of

if TYPE_CHECKING:
    from lab.checkpoints import Checkpoint

MOST_HEADER_BYTES = 100 << 20  # safetensors' own limit
MOST_NUMBERS = 50_000_000  # parameters of all opened models together, 200 MB
_UNITS = {"char": "character", "word": "word", "byte": "byte"}
_CACHED_TEXT = re.compile(r"(\.\w+)?-(bytes|gpt2)-[0-9a-f]{16}$")  # what data.folder adds to a text's name
NOT_MODELS = ("resume.safetensors",)  # a training's state, for lab.train alone


@dataclass(frozen=True)
class Found:
    """One run that left checkpoints; `path` is the one to open: the best by validation, else the newest."""

    path: Path
    model: str
    run: str
    step: int
    parameters: int | None
    size_bytes: int
    loss: float | None  # validation, nats a token, at that step
    saved: float  # seconds since 1970
    corpus: str = ""  # what it was trained on, where its header says so
    unit: str = "token"  # that the loss is counted in: character, byte, word

    @property
    def untrained(self) -> bool:
        """It was stopped before its first step was kept."""
        return self.step == 0


def read_header(path: Path) -> tuple[dict[str, str], dict[str, list[int]]]:
    """(texts, {tensor: shape}) in the header of a safetensors file. Refused if it is not one."""
    try:
        with open(path, "rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            if size > MOST_HEADER_BYTES:
                raise ValueError("its header is too long")
            raw = file.read(size)
            if len(raw) < size:
                raise ValueError("it ends within its header")
            header = json.loads(raw)
            texts = header.pop("__metadata__", {})
            return texts, {name: entry["shape"] for name, entry in header.items()}
    except OSError as error:
        raise Refused(f"{path.name} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise Refused(f"{path.name} is not a safetensors file ({error})") from None


def describe(path: Path) -> Found:
    """One checkpoint, as its header and the log beside it tell. Refused if it is not one of the project's."""
    texts, shapes = read_header(path)
    kind = str(texts.get("format", ""))
    run = path.parent.name.removesuffix(".checkpoints")
    try:
        if kind.startswith("train_gpt"):
            config = json.loads(texts["config"])
            model, corpus = config["preset"], corpus_of_shards(str(config.get("train_files", "")))
            unit = "byte" if config.get("vocab_size") == 256 else "token"
            step, tensors = int(texts["step"]), {n: s for n, s in shapes.items() if n.startswith("model.")}
        else:
            told = json.loads(texts["lab"])
            model, step, tensors = told["model"], int(told["step"]), shapes
            corpus = Path(told["path"]).stem if told.get("path") else f"{told.get('data', '')}"
            unit = _UNITS.get(told.get("tokenizer", {}).get("kind"), "token")
    except (KeyError, ValueError, TypeError):
        raise Refused(f"{path.name} is not a checkpoint of this project") from None
    beside = path.parent.with_name(f"{run}.json")
    summary = read_run_json(beside)
    counted = summary.get("num_parameters")  # 0 of a table of counts, whose tensors are no parameters
    parameters = sum(map(_product, tensors.values())) if counted is None else counted
    losses = [loss for at, loss in read_progress(beside.with_suffix(".txt")).val if at <= step]
    stat = path.stat()
    loss = losses[-1] if losses else None
    return Found(path, str(model), run, step, parameters, stat.st_size, loss, stat.st_mtime, corpus, unit)


def corpus_of_shards(pattern: str) -> str:
    """A short name for train_gpt.py's training data: the folder's, or of a text that `--data` named the text's."""
    return "embedded" if pattern == "embedded" else _CACHED_TEXT.sub("", Path(pattern).parent.name)


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def steps_of(path: Path) -> list[Path]:
    """Every checkpoint of the run that `path` belongs to, the best first, then by step."""
    best = path.parent / "best.safetensors"
    steps = checkpoints_of(path.parent)[::-1]
    return ([best] if best.exists() else []) + steps or [path]


class Catalogue:
    """What can be opened. Headers are kept by file time, so that a second look is quicker still."""

    def __init__(self, places: Places):
        self.places = places
        self._seen: dict[tuple[Path, int], Found] = {}

    def checkpoints(self) -> list[Found]:
        """One entry a run, the newest first and untrained ones last. Files that are no checkpoints of the project are
        passed over."""
        folders: dict[Path, list[Path]] = {}
        for root in self.places.roots:
            for path in root.rglob("*.safetensors") if root.is_dir() else ():
                if path.name not in NOT_MODELS and self._listed(path, root):
                    folders.setdefault(path.parent.resolve(), []).append(path.resolve())
        found = []
        for paths in folders.values():
            best = [p for p in paths if p.name == "best.safetensors"]
            path = best[0] if best else max(paths)
            try:
                key = (path, path.stat().st_mtime_ns)
                if key not in self._seen:
                    self._seen[key] = describe(path)
                found.append(self._seen[key])
            except (Refused, OSError):  # not ours, or gone since
                continue
        return sorted(found, key=lambda one: (one.untrained, -one.saved))

    def _listed(self, path: Path, root: Path) -> bool:
        """Not hidden, not just uploaded, not thrown away."""
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        return not hidden and not any(path.is_relative_to(p) for p in (self.places.uploads, self.places.trash))

    def series(self) -> list[Path]:
        """Folders with logs of runs: the records first, then trainings, each by name."""
        found: dict[Path, None] = {}
        for root in self.places.roots:
            for log in sorted(root.rglob("runs/*.txt")) if root.is_dir() else ():
                if self._listed(log, root):
                    found[log.parent.parent.resolve()] = None
        return list(found)

    def folder(self, one: Found) -> Path:
        """The series that a checkpoint belongs to, or the folder that it lies in."""
        folder = one.path.parent.parent
        return folder.parent if folder.name == "runs" else one.path.parent

    def label(self, one: Found) -> str:
        """A short name for lists: model, series and the run within it."""
        return f"{one.model} · {self.folder(one).name} · {one.run}"

    def label_of(self, path: str | Path) -> str:
        """The same for a checkpoint's path."""
        return self.label(describe(self.places.checkpoint(path)))

    def row(self, one: Found) -> list:
        """A line of the table on the Models page."""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.saved))
        loss = "" if one.loss is None else f"{one.loss:.4f} a {one.unit}"  # units do not compare, so each says its own
        where = f"{self.places.shown(self.folder(one))} · {one.run}"
        size = f"{one.size_bytes / 1e6:.1f} MB"
        return [one.model, one.corpus, one.step, loss, f"{one.parameters:,}", size, when, where]


class Models:
    """Opened checkpoints; the last few stay in memory, as long as they are small together."""

    def __init__(self, places: Places, keep: int = 16):
        self.places, self.keep = places, keep
        self._open: OrderedDict[tuple[Path, int], Checkpoint] = OrderedDict()

    def load(self, path: str | Path) -> Checkpoint:
        """The model of a checkpoint. Refused for paths and files that the studio does not open; LabError for
        damaged or foreign ones. Nothing in a checkpoint is run: safetensors holds numbers and text only."""
        path = self.places.checkpoint(path)
        from lab.checkpoints import load_checkpoint  # takes torch along, so only for what may be opened

        key = (path, path.stat().st_mtime_ns)
        if key not in self._open:
            self._open[key] = load_checkpoint(path)
            while len(self._open) > 1 and (len(self._open) > self.keep or self._numbers() > MOST_NUMBERS):
                self._open.popitem(last=False)
        self._open.move_to_end(key)
        return self._open[key]

    def _numbers(self) -> int:
        return sum(checkpoint.model.num_parameters() for checkpoint in self._open.values())
