"""The microscope on the Models page: the analyses of lab.analyses.menu, and what they are given.

Each leaves a picture and its numbers below `Places.pictures`, and one line for the page.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

from lab.studio.catalogue import Models, steps_of
from lab.studio.places import Places, Refused
from trainer.files import checkpoints_of

if TYPE_CHECKING:
    from lab.analyses import Finding
    from lab.analyses.menu import Look
    from lab.checkpoints import Checkpoint

MOST_CHECKPOINTS = 12  # along a training; more would only take longer
LONGEST_LOOK = 1000  # characters of a prompt; gradients through a longer one take minutes
SCORED_CHARS = 20_000  # of each split, for losses recomputed from checkpoints
_drawing = threading.Lock()  # lab.plots draws with pyplot, which is for one thread at a time


class Microscope:
    """Runs analyses on the checkpoints of a run."""

    def __init__(self, places: Places, models: Models):
        self.places, self.models = places, models

    def kinds(self, path: str | Path) -> list[tuple[str, str]]:
        """(what it shows, name) of the analyses that fit the checkpoint at `path`."""
        from lab.analyses.menu import MENU, fitting

        names = fitting(self._look(self.models.load(path)))
        return [(f"{name.replace('_', ' ').capitalize()}: {MENU[name].shows}", name) for name in names]

    def look(self, name: str, path: str | Path, prompt: str, text: str = "", second: str | Path = "") -> Finding:
        """The finding of analysis `name` on the checkpoint at `path`; `text`: a kept text that is its own; `second`:
        another checkpoint to compare with, where the analysis compares. Refused, or LabError, with the reason where it
        makes no sense."""
        from lab.analyses.menu import MENU, look_at

        if name not in MENU:
            raise Refused(f"there is no analysis {name!r}")
        if len(prompt) > LONGEST_LOOK:
            raise Refused(f"the prompt has {len(prompt):,} characters; at most {LONGEST_LOOK:,} can be looked at")
        look = self._look(self.models.load(path), prompt, text)
        if not MENU[name].fits(look):
            raise Refused(f"{name.replace('_', ' ')} does not fit a {look.final.name}")
        if second:
            look.second = self.models.load(second)
        with _drawing:
            return look_at(look, name)

    def page(self, path: str | Path, text: str = "") -> Path:
        """The page of `lab.page` of the run whose checkpoint lies at `path`: one HTML file with everything. `text` as
        for `look`."""
        from lab.page import Keeping, write_page

        checkpoint = self.models.load(path)
        run = checkpoint.path.parent if checkpoints_of(checkpoint.path.parent) else checkpoint.path
        out = self.places.pictures / checkpoint.label / f"{checkpoint.label}.html"
        own = str(self.places.inside(text)) if text else ""
        with _drawing:
            return write_page([str(run)], Keeping(str(out), path=own, limit=SCORED_CHARS))

    def _look(self, checkpoint: Checkpoint, prompt: str = "", text: str = "") -> Look:
        """The run of a checkpoint under the microscope."""
        from lab.analyses.menu import Look

        return Look(
            along=[self.models.load(path) for path in along(checkpoint.path)],
            final=checkpoint,
            out=self.places.pictures / checkpoint.label / checkpoint.path.stem,
            path=str(self.places.inside(text)) if text else "",
            asked_prompt=prompt,
            chars=SCORED_CHARS,
        )


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
