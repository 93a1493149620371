"""Where refusals are made: noted while cases run, and held against all such places in the source."""

import ast
import sys
from pathlib import Path

from stats.errors import StatsError
from stats.values import Finding, Problem

STATS = Path(__file__).resolve().parents[1] / "stats"


class Places:
    """(file, line) of every call that made an error or a problem, while it is open."""

    def __init__(self):
        self.seen = set()

    def __enter__(self):
        self.kept = {kind: kind.__init__ for kind in (StatsError, Problem, Finding)}
        for kind, real in self.kept.items():
            kind.__init__ = self.noting(real)
        return self

    def __exit__(self, *_):
        for kind, real in self.kept.items():
            kind.__init__ = real

    def noting(self, real):
        def init(this, *given, **named):
            frame = sys._getframe(1)
            while frame.f_code.co_name in ("problem", "__init__", "init"):
                frame = frame.f_back
            self.seen.add((frame.f_code.co_filename, frame.f_lineno))
            real(this, *given, **named)

        return init


def places_in_source(kinds):
    """(file, first line, last line, words) of every call in stats that makes one of `kinds`, by the name of what is
    called; findings that say that all is well (grade A) are none."""
    for path in sorted(STATS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if name in kinds and not (name == "Finding" and ast.unparse(node.args[1]) == "'A'"):
                at = {"Finding": 2, "Problem": 1, "problem": 1}.get(name, 0)
                words = ast.unparse(node.args[at]) if len(node.args) > at else name
                yield str(path), node.lineno, node.end_lineno, words


def without_a_case(reached, kinds):
    """`file.py: words` of the places that are not among those that were reached."""
    missing = []
    for file, first, last, words in places_in_source(kinds):
        if not any(path == file and first <= at <= last for path, at in reached):
            words = words.removeprefix("f").strip("'\"")
            missing.append(f"{Path(file).name}: {words}")
    return missing
