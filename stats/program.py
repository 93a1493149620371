"""Are two programs the same, whatever their comments, layout, seed and the name of the run in them?

Logs embed the source of their program. Two texts that differ in a comment, a run's id or its seed are one program; what
counts is the syntax tree with those set aside.
"""

from __future__ import annotations

import ast
import difflib
import functools
import hashlib
import re
from pathlib import Path

from stats.values import Run

LARGEST_SOURCE_BYTES = 4 << 20
# Names whose value tells one run from another and changes nothing that it computes.
_OF_A_RUN = re.compile(r"(?:^|_)(?:seed|run_?id|run_?name|uuid|log_?file|log_?dir|exp_?name|experiment)(?:$|_)", re.I)
_SEEDING = re.compile(r"(?:^|\.)(?:manual_seed(?:_all)?|seed_everything|seed|set_seed|default_rng)$")
_SEPARATOR = re.compile(r"^={60,}[ \t\r]*$", re.MULTILINE)


def source_of(run: Run) -> str | None:
    """The program that a run's log embeds, or that is kept in source/ beside it; None if there is none."""
    if run.code_hash is None:
        return None
    log = Path(run.path)
    for folder in (log.parent.parent, log.parent):
        kept = folder / "source" / f"{run.code_hash[:16]}.py"
        if kept.is_file():
            return kept.read_text(encoding="utf-8", errors="replace")
    try:
        with open(log, "rb") as file:
            data = file.read(LARGEST_SOURCE_BYTES)
    except OSError:
        return None
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    text = data.decode(encoding, "replace").replace("\r\n", "\n")
    parts = [part for part in _SEPARATOR.split(text) if part.strip()]
    return None if not parts or parts[0].startswith("source sha256:") else parts[0]


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


@functools.lru_cache(maxsize=512)
def essence(text: str) -> str | None:
    """The program without what does not count, one statement a line; None where Python cannot read it."""
    try:
        tree = _SetAside().visit(ast.parse(text))
        return ast.unparse(ast.fix_missing_locations(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def program_key(run: Run) -> str | None:
    """One value for all runs of one program: of its syntax tree, or of its text where that cannot be read."""
    source = source_of(run)
    told = essence(source) if source else None
    return run.code_hash if told is None else "tree:" + hashlib.sha256(told.encode()).hexdigest()


def differing_lines(a: Run, b: Run, most: int = 2) -> str:
    """The first lines in which two programs differ, as a sentence; empty if they cannot be shown."""
    before, after = (essence(source) if (source := source_of(run)) else None for run in (a, b))
    if before is None or after is None:
        return ""
    changed = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    lines = [line for line in changed if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    shown = "; ".join(f"{line[0]} {line[1:].strip()[:90]}" for line in lines[:most])
    return f"they differ in {len(lines)} lines: {shown}" if lines else ""
