"""The floors inside stats/ and records/: values and maths, then files, then verdicts, then the command line."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# stats/, from the ground up; a module imports from its own floor or from below.
FLOORS = (
    ("errors", "text", "jsonio", "values"),
    ("correct", "chance", "power", "ttest", "plans", "sequential", "curve", "svg", "figures", "paired"),
    ("chain", "program", "runs", "tables", "offline", "sources", "series", "planfile"),
    ("samples", "compare", "times", "judge", "monitor", "design", "copies", "evidence"),
    ("validate", "leaderboard", "report", "importing"),
    ("verbs", *(f"verbs.{name}" for name in ("options", "judging", "planning", "showing", "sources"))),
    ("cli", "__main__", "ttest.__main__"),
)
FLOOR_OF = {f"stats.{name}": floor for floor, names in enumerate(FLOORS) for name in names}


def modules(root: Path, *packages: str) -> dict[str, Path]:
    """{dotted name: file} of every module of the packages."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            name = ".".join(path.relative_to(root).with_suffix("").parts)
            if "source" not in path.parts:
                found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules among `known` that a file imports, inside functions as well."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known.keys()) or {node.module}
    return found & known.keys()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, or nothing."""
    done: set[str] = set()

    def walk(name: str, trail: list[str]) -> list[str]:
        if name in trail:
            return [*trail[trail.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := walk(other, [*trail, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := walk(name, []))), [])


def graph_of(root: Path) -> dict[str, set[str]]:
    known = modules(root, "stats", "records")
    return {name: imports(path, known) - {name, "stats", "records"} for name, path in known.items()}


def test_no_circle():
    assert circle(graph_of(ROOT)) == []


def test_a_planted_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def test_no_arrow_upwards():
    wrong = [
        f"{name} -> {other}"
        for name, others in graph_of(ROOT).items()
        for other in others
        if name in FLOOR_OF and FLOOR_OF.get(other, 0) > FLOOR_OF[name]
    ]
    assert wrong == []
    loose = sorted(n for n in graph_of(ROOT) if n.startswith("stats.") and n not in FLOOR_OF)
    assert loose == [], "a module without a floor: add it to FLOORS"


@pytest.mark.parametrize("name", ["stats.ttest", "stats.sequential", "stats.plans", "stats.power"])
def test_maths_opens_no_file(name):
    text = modules(ROOT, "stats")[name].read_text()
    for word in ("open(", "read_text", "read_bytes", "write_text"):
        assert word not in text


def test_stats_knows_nothing_of_the_other_rooms():
    known = modules(ROOT, "stats", "records", "trainer", "kernels", "data", "lab", "bench")
    wrong = [f"{n} -> {o}" for n, p in known.items() if n.startswith("stats") for o in imports(p, known)]
    assert [arrow for arrow in wrong if not arrow.partition(" -> ")[2].startswith("stats")] == []
    assert all("import torch" not in path.read_text() for name, path in known.items() if name.startswith("stats"))
