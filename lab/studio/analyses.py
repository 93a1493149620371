"""The microscope on the Models page: which analyses of lab.analyses are offered, and what they are given.

Each leaves a picture and its numbers below `Places.pictures`, and one line for the page.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from lab.studio.catalogue import Models, steps_of
from lab.studio.places import Places, Refused
from lab.studio.writing import LONGEST_PROMPT
from records.launch import read_run_json

if TYPE_CHECKING:
    from lab.analyses import Finding
    from lab.checkpoints import Checkpoint

MOST_CHECKPOINTS = 12  # along a training; more would only take longer
SCORED_CHARS = 20_000  # of each split, for losses recomputed from checkpoints
_drawing = threading.Lock()  # lab.plots draws with pyplot, which is for one thread at a time


class Microscope:
    """Runs analyses on the checkpoints of a run."""

    def __init__(self, places: Places, models: Models):
        self.places, self.models = places, models

    def look(self, name: str, path: str | Path, prompt: str, text: str = "") -> Finding:
        """The finding of analysis `name` of ANALYSES on the checkpoint at `path`; `text`: a kept text that is its own.
        Refused, or LabError, with the reason where it makes no sense."""
        if name not in ANALYSES:
            raise Refused(f"there is no analysis {name!r}")
        if len(prompt) > LONGEST_PROMPT:
            raise Refused(f"the prompt has {len(prompt):,} characters; at most {LONGEST_PROMPT:,} can be read")
        checkpoint = self.models.load(path)
        out = self.places.pictures / checkpoint.label / checkpoint.path.stem
        with _drawing:
            return ANALYSES[name](self, checkpoint, prompt, text, out)

    def along(self, checkpoint: Checkpoint) -> list[Checkpoint]:
        """The run's checkpoints, earliest first."""
        return [self.models.load(path) for path in along(checkpoint.path)]

    def split(self, checkpoint: Checkpoint, text: str = "") -> dict[str, list[str]]:
        """Train, validation and test documents that the checkpoint was made with. Refused if they are not here."""
        from lab.datasets import documents_digest, load_documents, split_documents

        data, wanted = checkpoint.told.get("data"), checkpoint.told.get("data_hash")
        if not data:
            raise Refused("this analysis needs the corpus, which a checkpoint of train_gpt.py does not name")
        text = text or self._text_of(checkpoint)
        limit = int(checkpoint.told.get("limit_chars", 0))
        documents = load_documents(data, str(self.places.inside(text)) if text else None, limit)
        if documents_digest(documents) != wanted:
            raise Refused("that is not the text that this model was trained on; hand its own text in, below the prompt")
        return split_documents(documents, int(checkpoint.told.get("split_seed", 0)))

    def _text_of(self, checkpoint: Checkpoint) -> str:
        """The uploaded text of a training of the studio, '' if it had none or it is gone."""
        folder = checkpoint.path.parents[2] if len(checkpoint.path.parents) > 2 else Path()
        text = str(read_run_json(folder / "training.json").get("settings", {}).get("text") or "")
        return text if text and Path(text).is_file() else ""


def along(path: Path) -> list[Path]:
    """The checkpoints of a run by step, at most MOST_CHECKPOINTS of them, first and last included."""
    found = [step for step in steps_of(path) if step.stem != "best"] or [path]
    if len(found) <= MOST_CHECKPOINTS:
        return found
    return [found[round(i * (len(found) - 1) / (MOST_CHECKPOINTS - 1))] for i in range(MOST_CHECKPOINTS)]


def step_label(path: Path) -> str:
    """'best by validation', or the step in a checkpoint's name."""
    step = path.stem.rpartition("-")[2]
    return f"step {int(step):,}" if step.isdigit() else "best by validation" if path.stem == "best" else path.stem


def _architecture(scope: Microscope, checkpoint: Checkpoint, prompt: str, text: str, out: Path) -> Finding:
    from lab.analyses import architecture

    return architecture(checkpoint, out)


def _samples(scope: Microscope, checkpoint: Checkpoint, prompt: str, text: str, out: Path) -> Finding:
    from lab.analyses import samples_along

    return samples_along(scope.along(checkpoint), prompt, out)


def _variability(scope: Microscope, checkpoint: Checkpoint, prompt: str, text: str, out: Path) -> Finding:
    from lab.analyses import variability

    return variability(checkpoint, prompt, out)


def _losses(scope: Microscope, checkpoint: Checkpoint, prompt: str, text: str, out: Path) -> Finding:
    from lab.analyses import losses

    return losses(scope.along(checkpoint), scope.split(checkpoint, text), out, chars=SCORED_CHARS)


def _next_token(scope: Microscope, checkpoint: Checkpoint, prompt: str, text: str, out: Path) -> Finding:
    from lab.analyses import next_token

    return next_token(scope.along(checkpoint), prompt, out)


def _attribution(scope: Microscope, checkpoint: Checkpoint, prompt: str, text: str, out: Path) -> Finding:
    from lab.analyses import attribution

    if not prompt:
        raise Refused("attribution needs a prompt to attribute to")
    return attribution(checkpoint, prompt, out)


def _quality(scope: Microscope, checkpoint: Checkpoint, prompt: str, text: str, out: Path) -> Finding:
    from lab.analyses import quality

    split = scope.split(checkpoint, text)
    return quality(checkpoint, split["train"], split["val"], out, prompt=prompt)


def _frequency(scope: Microscope, checkpoint: Checkpoint, prompt: str, text: str, out: Path) -> Finding:
    from lab.analyses import frequency

    return frequency([d for part in scope.split(checkpoint, text).values() for d in part], checkpoint.tokenizer, out)


Analysis = Callable[[Microscope, "Checkpoint", str, str, Path], "Finding"]
ANALYSES: dict[str, Analysis] = {
    "Architecture": _architecture,
    "Samples along training": _samples,
    "Variability": _variability,
    "Loss along training": _losses,
    "Next token along training": _next_token,
    "Attribution": _attribution,
    "Quality": _quality,
    "Corpus": _frequency,
}
