"""Grading blind: stories of two models in a shuffled order, each graded by a person who does not see whose it is; the
grades are then compared by stats."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data.paths import atomic_file
from lab.studio.places import Refused
from lab.studio.writing import LONGEST_PROMPT

if TYPE_CHECKING:
    from lab.checkpoints import Checkpoint
    from stats.compare import Comparison

GRADES = (1, 2, 3, 4, 5)
FEWEST, MOST = 3, 20  # stories of each model


@dataclass
class Session:
    """Stories in the order in which they are shown, whose each is (0 or 1), and the grades so far."""

    names: tuple[str, str]
    prompt: str
    stories: list[tuple[int, str]]
    grades: list[int] = field(default_factory=list)

    @property
    def current(self) -> str | None:
        """The story to be graded now; None when all are."""
        return self.stories[len(self.grades)][1] if len(self.grades) < len(self.stories) else None

    def grade(self, value: int) -> None:
        """Grade the current story. Refused for what is no grade, or when all are graded."""
        if value not in GRADES:
            raise Refused("choose a grade from 1 to 5 first")
        if self.current is None:
            raise Refused("every story is graded")
        self.grades.append(int(value))

    def of(self, which: int) -> list[int]:
        """The grades of one model's stories."""
        return [grade for grade, (whose, _) in zip(self.grades, self.stories) if whose == which]


def session(pair: tuple[Checkpoint, Checkpoint], names: tuple[str, str], prompt: str, count: int, seed: int) -> Session:
    """`count` stories of each model after the same beginning, shuffled. Refused for a count out of range and a
    beginning of more than LONGEST_PROMPT characters, LabError for one that a model cannot read."""
    from lab.sample import generate

    if not isinstance(count, (int, float)) or not FEWEST <= count <= MOST:
        raise Refused(f"stories of each model: from {FEWEST} to {MOST}")
    if len(prompt) > LONGEST_PROMPT:
        raise Refused(f"the beginning has {len(prompt):,} characters; at most {LONGEST_PROMPT:,} can be read")
    stories = []
    for which, checkpoint in enumerate(pair):
        # Each with random numbers of its own: models that are alike would write the same stories, word for word.
        own = 2 * seed + which
        drawn = generate(checkpoint, prompt, count=int(count), max_tokens=250, temperature=0.8, seed=own)
        stories += [(which, one.text + ("" if one.ended else " ...")) for one in drawn]
    random.Random(seed).shuffle(stories)
    return Session(names, prompt, stories)


def judged(done: Session, alpha: float = 0.05) -> Comparison:
    """Both models' grades compared by stats (Welch's t-test): `loss` is the points short of the best grade, so that
    less is better, as stats has it. DataError of stats where grades cannot be compared (all of them alike)."""
    from stats.compare import compare

    samples = [_sample(name, done.of(which)) for which, name in enumerate(done.names)]
    return compare(samples[0], samples[1:], alpha).comparisons[0]


def _sample(name: str, grades: list[int]):
    from stats.samples import Sample
    from stats.values import Run, Validation

    finals = tuple(Validation(0, float(max(GRADES) - grade), None, None, 0, None) for grade in grades)
    runs = tuple(Run(name, f"story {n}", "table", None, None, None, 0, (final,)) for n, final in enumerate(finals, 1))
    return Sample(name, runs, finals)


def in_words(done: Session, found: Comparison) -> str:
    """The verdict in points of the grades."""
    means = [sum(done.of(which)) / len(done.of(which)) for which in (0, 1)]
    difference = found.loss
    sure = difference.p_value < found.alpha
    better = done.names[difference.estimate < 0]
    interval = f"{1 - found.alpha:.0%} interval {-difference.high:+.2f} to {-difference.low:+.2f} points"
    told = f"{better} is graded higher" if sure else "no evidence of a difference"
    return (
        f"{done.names[0]}: {means[0]:.2f} on average, {done.names[1]}: {means[1]:.2f}; {told} "
        f"(second minus first {-difference.estimate:+.2f}, {interval}, p = {difference.p_value:.3g}, "
        f"{len(done.of(0))} stories each)"
    )


def keep(done: Session, folder: Path) -> Path:
    """Write stories, grades and names to a JSON file below `folder`."""
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}.json"
    rows = [
        {"model": done.names[whose], "text": text, "grade": grade}
        for (whose, text), grade in zip(done.stories, done.grades)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "w") as file:
        json.dump({"prompt": done.prompt, "stories": rows}, file, indent=1, ensure_ascii=False)
    return path
