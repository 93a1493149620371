"""The statistics alone: what they import, and a fresh installation that works from any folder."""

import ast
import shutil
import subprocess
import sys
import venv

import pytest

ALWAYS = {"numpy", "scipy", "stats"}  # what an installation without extras brings
ON_REQUEST = {"jinja2", "matplotlib", "tensorboard", "wandb"}  # inside functions, each with a refusal that names it


def imported(tree, top_only):
    """First words of what a file imports, outside of functions or anywhere."""
    found = set()
    inside = {id(node) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    for node in ast.walk(tree):
        if top_only and id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found - set(sys.stdlib_module_names)


def test_statistics_import_numpy_and_scipy_alone(repo):
    for path in sorted((repo / "stats").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert imported(tree, top_only=True) <= ALWAYS, path
        assert imported(tree, top_only=False) <= ALWAYS | ON_REQUEST, path


@pytest.mark.slow
def test_a_fresh_installation_works_from_any_folder(repo, tmp_path):
    """`pip install .` into an empty environment; then a verdict, a grade and a report's Markdown from elsewhere."""
    source = tmp_path / "source"
    shutil.copytree(repo / "stats", source / "stats", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(repo / name, source)
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    done = subprocess.run([python, "-m", "pip", "install", "-q", str(source)], capture_output=True, text=True)
    if done.returncode and any(
        word in done.stderr for word in ("No matching distribution", "ConnectionError", "timed out")
    ):
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for index, loss in enumerate(("2.9101", "2.9112", "2.9123")):
        (elsewhere / f"{index}.txt").write_text(f"step:9/9 val_loss:{loss} train_time:90{index}ms step_avg:100.00ms\n")
    for words, code, says in (
        (["-m", "stats", "ttest", "."], 0, "REJECT H0"),
        (["-m", "stats.ttest", "2.91", "2.912"], 0, "2 runs"),
        (["-m", "stats", "validate", "."], 0, "grade C"),
        (["-m", "stats", "report", "."], 0, "Mean final loss"),
        (["-m", "stats", "report", ".", "--html", "r.html"], 2, "--html needs jinja2: pip install jinja2"),
    ):
        done = subprocess.run([python, *words], cwd=elsewhere, capture_output=True, text=True)
        assert (done.returncode, says in done.stdout + done.stderr) == (code, True), (words, done)
    script = tmp_path / "env" / "bin" / "speedrun-stats"
    assert subprocess.run([script, "ttest", "."], cwd=elsewhere, capture_output=True).returncode == 0
