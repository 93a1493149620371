"""What a model writes as it learns: one sample from each checkpoint of a training, made in the background."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from lab.studio.places import Refused
from trainer.files import checkpoints_of

if TYPE_CHECKING:
    from lab.studio.catalogue import Models

SAMPLE_TOKENS = 120
NAMES, NAME_TOKENS = 10, 30  # of a model of names, whose texts are short


class Samples:
    """Texts by checkpoint file, each made once with the same seed, so that only the learning differs."""

    def __init__(self, models: Models):
        self.models = models
        self._made: dict[Path, str | None] = {}  # None: being made
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="samples")

    def along(self, checkpoints: Path) -> list[tuple[int, str]]:
        """(step, text) for the checkpoints in a folder that have been sampled, the latest first; the others are
        put on the worker's list."""
        found = []
        for path in checkpoints_of(checkpoints):
            if path not in self._made:
                self._made[path] = None
                self._worker.submit(self._make, path)
            elif self._made[path] is not None:
                found.append((int(path.stem.partition("-")[2]), self._made[path]))
        return found

    def text(self, path: str | Path) -> str:
        """What the model of a checkpoint writes unasked; several texts of a model of names. LabError or Refused if it
        cannot be opened."""
        from lab.sample import TRIES, generate, telling

        model = self.models.load(path)
        names = model.told.get("data") == "names"
        count, length = (2 * NAMES, NAME_TOKENS) if names else (TRIES, SAMPLE_TOKENS)
        made = generate(model, count=count, max_tokens=length, temperature=0.8, seed=1)
        made = [one for one in made if one.text.strip()][:NAMES] if names else [telling(made)]
        return ", ".join(one.text.strip() + ("" if one.ended else " ...") for one in made)

    def _make(self, path: Path) -> None:
        from lab import LabError

        try:
            self._made[path] = self.text(path)
        except (LabError, Refused, OSError) as error:
            self._made[path] = f"({error})"
