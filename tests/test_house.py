"""The plan of the house: which room may use which, held against every import in the code; what lies at its door.

Imports inside functions count: they are arrows all the same. The order below is the one place where it stands; the
README's map is checked against it.
"""

import ast
import functools
import re
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
# Floors from the ground up. A room uses itself and the floors below; rooms of one floor do not know each other.
FLOORS = (("kernels", "data", "stats"), ("trainer",), ("train_gpt.py", "records"), ("lab",), ("bench",))
APART = {"stats": {"torch", "triton"}}  # what a room must not even import from outside
LEVEL = {room: number for number, floor in enumerate(FLOORS) for room in floor}

# The top level, whole: a file that belongs nowhere shows here.
DOOR = {".ci", ".gitignore", "CONTRIBUTING.md", "LICENSE", "README.md", "docs", "pyproject.toml", "run.sh", "tests"}
DOOR |= {"requirements.txt", "requirements-lab.txt", *LEVEL}
# Options are read by trainer/options.py; the rooms that stand alone cannot import it, and take the standard library's.
ARGPARSE = {"kernels", "data", "stats"}
ARGPARSE_FILES = {"bench.fault_injection"}  # its words are another program's, and go there as they are
# What is done in one way: the call, and the files that may make it.
ONE_WAY = {
    r"os\.replace\(|os\.rename\(": {
        "data/paths.py": "writes files in one breath, for everybody",
        "stats/planfile.py": "stands alone",
        "data/tokenize.py": "moves finished shards",
        "records/folder.py": "moves what an earlier attempt left",
    },
    r"/proc/cpuinfo|platform\.processor": {"trainer/program.py": "the CPU's name"},
    r"datetime\.now|utcnow": {"trainer/program.py": "the time of now"},
    r"gethostname\(\)\.encode": {"trainer/program.py": "the host's hash"},
    r"sha256\(json\.dumps\(": {
        "trainer/program.py": "hash of a value",
        "stats/jsonio.py": "stands alone",
        "data/folder.py": "stands alone, and of bytes: a key of its cache",
    },
}


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


@functools.cache  # five tests ask for every file's
def imports(text: str) -> list[ast.Import | ast.ImportFrom]:
    """The import statements of a program's text, at any depth."""
    return [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]


def names(path: Path, module: str) -> set[str]:
    """Every dotted name that a file may import, relative ones made absolute."""
    found = set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in imports(path.read_text(encoding="utf-8")):
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


def committed() -> list[str]:
    """Paths that git knows here; skips where this is no checkout."""
    asked = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True)
    if asked.returncode:
        pytest.skip("no git checkout")
    return asked.stdout.rstrip("\0").split("\0")


def misplaced(paths: list[str]) -> list[str]:
    """What stands at the top level and has no business there."""
    return sorted({path.partition("/")[0] for path in paths} - DOOR)


def test_the_top_level_holds_what_it_should_and_no_file_is_empty():
    paths = committed()
    assert misplaced(paths) == []
    assert misplaced([*paths, "err.txt", "notes/a.md"]) == ["err.txt", "notes"]
    empty = [path for path in paths if (REPO / path).is_file() and not (REPO / path).stat().st_size]
    assert [path for path in empty if not path.endswith("__init__.py")] == []


def other_parsers(root: Path) -> list[str]:
    """Files that read options in a way of their own, where trainer/options.py is at hand."""
    return [
        module
        for module, path in files(root).items()
        if room_of(module) not in ARGPARSE and module not in ARGPARSE_FILES
        if {"argparse", "getopt", "optparse"} & {name.partition(".")[0] for name in names(path, module)}
    ]


def test_options_are_read_by_one_parser():
    assert other_parsers(REPO) == []


def ways_of_their_own(root: Path) -> list[str]:
    """`file: call` wherever a file does by itself what one of the house does for all."""
    return [
        f"{place}: {call}"
        for path in files(root).values()
        for call, allowed in ONE_WAY.items()
        if (place := path.relative_to(root).as_posix()) not in allowed
        if re.search(call, path.read_text(encoding="utf-8"))
    ]


def test_what_is_done_in_one_way_is_done_in_one_place():
    assert ways_of_their_own(REPO) == []
    for call, allowed in ONE_WAY.items():
        for place in allowed:
            assert re.search(call, (REPO / place).read_text(encoding="utf-8")), f"{place} no longer needs {call}"


def long_functions(path: Path, most: int) -> list[str]:
    """Functions of more lines than that."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    found = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [node.name for node in found if (node.end_lineno or 0) - node.lineno >= most]


def test_the_essay_keeps_its_length():
    assert long_functions(REPO / "train_gpt.py", 50) == []
    assert len((REPO / "train_gpt.py").read_text().splitlines()) <= 1050
    assert len((REPO / "records" / "series.py").read_text().splitlines()) <= 420


@pytest.mark.parametrize("planted", ["circle", "upward", "sideways", "parser", "writer"])
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
    elif planted == "parser":
        (tmp_path / "lab" / "new.py").write_text("def main():\n    from argparse import ArgumentParser\n")
        (tmp_path / "data" / "new.py").write_text("import argparse\n")
        assert other_parsers(tmp_path) == ["lab.new"]
    elif planted == "writer":
        (tmp_path / "lab" / "new.py").write_text("os.replace(temporary, path)\n")
        assert ways_of_their_own(tmp_path) == ["lab/new.py: os\\.replace\\(|os\\.rename\\("]
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
