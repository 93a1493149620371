"""Are two programs the same, whatever their comments, layout, seed and the name of the run in them?

Logs embed the source of their program. Two texts that differ in a comment, a run's id or its seed are one program; what
counts is the syntax tree with those set aside. Programs of one recipe share most of their text, so that a tree is made
of one top-level statement at a time and remembered: of a thousand logs only what differs is parsed.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import re
from pathlib import Path

from stats.errors import StatsError
from stats.runs import hash_of_source, source_in
from stats.series import as_utf8
from stats.values import Run

LARGEST_SOURCE_BYTES = 4 << 20
# Names whose value tells one run from another and changes nothing that it computes.
_OF_A_RUN = re.compile(r"(?:^|_)(?:seed|run_?id|run_?name|uuid|log_?file|log_?dir|exp_?name|experiment)(?:$|_)", re.I)
_SEEDING = re.compile(r"(?:^|\.)(?:manual_seed(?:_all)?|seed_everything|seed|set_seed|default_rng)$")
# Where a statement may begin that is not a part of the one above.
_BEGINS = re.compile(r"^(?=[A-Za-z_@])(?!(?:else|elif|except|finally)\b)", re.MULTILINE)
MOST_PARTS = 200  # lines at the left edge inside one statement (a long string), until the text is parsed as a whole


def source_of(run: Run) -> str | None:
    """The program that a run's log embeds, or that is kept in source/ beside it; None if there is none, or none with
    the hash that the run names."""
    if run.code_hash is None:
        return None
    log = Path(run.path)
    for folder in (log.parent.parent, log.parent):
        kept = folder / "source" / f"{run.code_hash[:16]}.py"
        if kept.is_file() and hash_of_source(data := kept.read_bytes()) == run.code_hash:
            return _text(data)
    try:
        with open(log, "rb") as stream:
            data = source_in(as_utf8(stream, run.path), LARGEST_SOURCE_BYTES)
    except (OSError, StatsError):
        return None
    return _text(data) if hash_of_source(data) == run.code_hash else None


def _text(source: bytes) -> str:
    return source.decode("utf-8", "replace").replace("\r\n", "\n")


class _SetAside(ast.NodeTransformer):
    """Replaces what names one run by nothing: values of such names, arguments of seeding calls, docstrings."""

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        self.generic_visit(node)
        if any(isinstance(target, (ast.Name, ast.Attribute)) and _named(target) for target in node.targets):
            node.value = ast.Constant(None)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        if _named(node.target) and node.value is not None:
            node.value = ast.Constant(None)
        return node

    def visit_keyword(self, node: ast.keyword) -> ast.AST:
        self.generic_visit(node)
        if node.arg and _OF_A_RUN.search(node.arg):
            node.value = ast.Constant(None)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if _SEEDING.search(ast.unparse(node.func)):
            node.args = []
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        self.generic_visit(node)
        return None if isinstance(node.value, ast.Constant) else node


def _named(target: ast.expr) -> bool:
    name = target.id if isinstance(target, ast.Name) else target.attr if isinstance(target, ast.Attribute) else ""
    return bool(_OF_A_RUN.search(name))


@functools.lru_cache(maxsize=1 << 13)
def _statements(text: str) -> str | None:
    """`essence` of some whole statements."""
    try:
        tree = _SetAside().visit(ast.parse(text))
        return ast.unparse(ast.fix_missing_locations(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def essence(text: str) -> str | None:
    """The program without what does not count, one statement a line; None where Python cannot read it."""
    found, open_text, parts = [], "", 0
    for part in _BEGINS.split(text):
        open_text, parts = open_text + part, parts + 1
        if parts > MOST_PARTS:
            return _statements(text)
        if (told := _statements(open_text)) is not None:  # else it goes on: a bracket, a string, a decorator
            found += [told] if told else []
            open_text, parts = "", 0
    return None if open_text.strip() else "\n".join(found)


_KEYS: dict[str, str] = {}  # {code hash: key} of programs that were read


def program_key(run: Run) -> str | None:
    """One value for all runs of one program: of its syntax tree, or of its text where that cannot be read."""
    if run.code_hash is None or run.code_hash in _KEYS:
        return _KEYS.get(run.code_hash or "")
    source = source_of(run)
    told = essence(source) if source else None
    if told is None:
        return run.code_hash
    key = _KEYS[run.code_hash] = "tree:" + hashlib.sha256(told.encode()).hexdigest()
    return key


def differing_lines(a: Run, b: Run, most: int = 2) -> str:
    """The first lines in which two programs differ, as a sentence; empty if they cannot be shown."""
    before, after = (essence(source) if (source := source_of(run)) else None for run in (a, b))
    if before is None or after is None:
        return ""
    changed = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    lines = [line for line in changed if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    shown = "; ".join(f"{line[0]} {line[1:].strip()[:90]}" for line in lines[:most])
    return f"they differ in {len(lines)} lines: {shown}" if lines else ""
