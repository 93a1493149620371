"""Every `python -m` command of the house: it answers --help, and refuses a flag or a word that it does not have in
one line."""

import ast
import contextlib
import io
import os
import runpy
import sys
import warnings
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
WAITS_FOR_WORDS = {"lab.studio.jobs"}  # its word is a folder, which is made where there is none
ROOMS = ("kernels", "data", "stats", "trainer", "records", "lab", "bench")


def runs_by_name(path: Path) -> bool:
    """Whether a file is a package's __main__, or has an `if __name__ == "__main__":`."""
    if path.name == "__main__.py":
        return True
    tests = [node.test for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.If)]
    return any(ast.unparse(test) == "__name__ == '__main__'" for test in tests)


def commands() -> list[str]:
    paths = [path for room in ROOMS for path in sorted((REPO / room).rglob("*.py")) if "source" not in path.parts]
    found = [path.relative_to(REPO).with_suffix("") for path in [REPO / "train_gpt.py", *paths] if runs_by_name(path)]
    return [".".join(path.parts).removesuffix(".__main__") for path in found]


def call(module: str, *words: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of `python -m module words...`, in this process."""
    out, err, argv, environment = io.StringIO(), io.StringIO(), sys.argv, dict(os.environ)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that another test has imported the module already
        sys.argv = [module, *words]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=False)
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        finally:
            sys.argv = argv
            os.environ.clear()
            os.environ.update(environment)
    return code, out.getvalue(), err.getvalue()


def test_they_are_found():
    found = commands()
    assert {"train_gpt", "stats", "stats.ttest", "records.series", "bench.rehearse", "lab.tour"} <= set(found)


@pytest.mark.parametrize("module", commands())
def test_help_and_an_unknown_flag(module):
    code, out, err = call(module, "--help")
    assert code == 0 and not err, (code, err)
    assert len(out) > 60, out
    code, out, err = call(module, "--no_such_flag=1")
    last = (err.strip().splitlines() or [""])[-1]
    assert code == 2 and ("no_such_flag" in last or "are required" in last), (code, out, err)
    assert "Traceback" not in err and err.count("error") <= 1, "one line, after the usage that argparse shows"


@pytest.mark.parametrize("module", sorted(set(commands()) - WAITS_FOR_WORDS))
def test_a_word_that_means_nothing(module, tmp_path, monkeypatch):
    """Where words are files or runs, that there is none; elsewhere, that no word is wanted. Nothing is done first."""
    monkeypatch.chdir(tmp_path)
    code, out, err = call(module, "no_such_word")
    last = (err.strip().splitlines() or [""])[-1]
    assert code in (2, 3, 5) and ("no_such_word" in last or "needed" in last or "required" in last), (code, out, err)
    assert "Traceback" not in err and not out, (out, err)
    assert list(tmp_path.iterdir()) == []
