"""The plan of the house: which room may use which, held against every import in the code.

Imports inside functions count: they are arrows all the same. The order below is the one place where it stands; the
README's map is checked against it.
"""

import ast
import re
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
# Floors from the ground up. A room uses itself and the floors below; rooms of one floor do not know each other.
FLOORS = (("kernels", "data", "stats"), ("trainer",), ("train_gpt.py", "records"), ("lab",), ("bench",))
APART = {"stats": {"torch", "triton"}}  # what a room must not even import from outside
# What stands on two floors, told openly: a checkpoint's model is the trainer's, whoever opens it.
LEVEL = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def files(root: Path) -> dict[str, Path]:
    """{module: file} of every room."""
    found = {}
    for room in LEVEL:
        paths = [root / room] if room.endswith(".py") else sorted((root / room).rglob("*.py"))
        for path in paths:
            parts = path.relative_to(root).with_suffix("").parts
            if "source" in parts or not path.is_file():
                continue  # programs that committed series ran
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(module: str) -> str:
    first = module.partition(".")[0]
    return first if first in LEVEL else f"{first}.py"


def names(path: Path, module: str) -> set[str]:
    """Every dotted name that a file may import, relative ones made absolute."""
    found = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([node.module] if node.module else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def arrows(root: Path) -> dict[str, set[str]]:
    """{module: modules of the house that it imports}."""
    known = files(root)
    graph = {}
    for module, path in known.items():
        told = names(path, module)
        hit = {name for name in told if name in known}
        # `from package import module` is an arrow to the module; to the package only if a name of its own is taken
        for name in list(hit):
            taken = {t.rpartition(".")[2] for t in told if t.rpartition(".")[0] == name}
            if taken and all(f"{name}.{t}" in known for t in taken):
                hit.discard(name)
        graph[module] = hit - {module}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one file (Tarjan 1972)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph[node]:
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for node in graph:
        if node not in index:
            visit(node)
    return found


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Arrows to a higher floor, or to another room of the same one."""
    found = []
    for module, targets in graph.items():
        for target in sorted(targets):
            here, there = room_of(module), room_of(target)
            if here != there and LEVEL[there] >= LEVEL[here]:
                found.append(f"{module} -> {target}")
    return found


def test_no_circle_between_files():
    assert circles(arrows(REPO)) == []


def test_no_arrow_upwards():
    assert upward(arrows(REPO)) == []


def test_statistics_need_no_torch():
    for module, path in files(REPO).items():
        forbidden = APART.get(room_of(module), set())
        assert not forbidden & {name.partition(".")[0] for name in names(path, module)}, path


def test_tokens_are_drawn_in_one_place():
    """trainer/sample.py chooses tokens and writes with them, for the trainer, the lab and the studio."""
    for module, path in files(REPO).items():
        if module != "trainer.sample":
            called = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
            assert "multinomial" not in called and "trainer.sample.pick" not in names(path, module), path


@pytest.mark.parametrize("planted", ["circle", "upward", "sideways"])
def test_a_planted_fault_is_seen(tmp_path, planted):
    for room in LEVEL:
        if not room.endswith(".py"):
            (tmp_path / room).mkdir()
            (tmp_path / room / "__init__.py").write_text("")
    (tmp_path / "train_gpt.py").write_text("from trainer import log\n")
    (tmp_path / "trainer" / "log.py").write_text("from data import shards\n")
    (tmp_path / "data" / "shards.py").write_text("import numpy\n")
    graph = arrows(tmp_path)
    assert graph["train_gpt"] == {"trainer.log"} and not circles(graph) and not upward(graph)
    if planted == "circle":
        (tmp_path / "trainer" / "exchange.py").write_text("def late():\n    from trainer.log import x\n")
        (tmp_path / "trainer" / "log.py").write_text("from . import exchange\n")
        assert circles(arrows(tmp_path)) == [["trainer.exchange", "trainer.log"]]
    elif planted == "upward":
        (tmp_path / "trainer" / "log.py").write_text("def late():\n    import train_gpt\n")
        assert upward(arrows(tmp_path)) == ["trainer.log -> train_gpt"]
    else:
        (tmp_path / "data" / "shards.py").write_text("from kernels import x\n")
        assert upward(arrows(tmp_path)) == ["data.shards -> kernels"]


def test_the_readme_draws_the_same_house():
    text = (REPO / "README.md").read_text()
    rows = re.findall(r"^\| `([\w./]+)` \|.*\| (.*) \|$", text.partition("## The house")[2].partition("\n## ")[0], re.M)
    drawn = {room.rstrip("/"): set(re.findall(r"`([\w.]+)/?`", uses)) for room, uses in rows}
    assert drawn.keys() == LEVEL.keys()
    for room, uses in drawn.items():
        assert all(LEVEL[other] < LEVEL[room] for other in uses), room
