"""run.sh: which Python it takes, what it would run, what it says when it cannot."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="run.sh needs bash")
ROOT = Path(__file__).resolve().parent.parent


def call(*words, cwd=ROOT, path=None, **environment):
    """(exit code, stdout, stderr) of ./run.sh, by default with this Python and without running the last command."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", "DRY_RUN")}
    here = str(Path(sys.executable).parent)
    clean["PATH"] = path or f"{here}{os.pathsep}{clean['PATH']}"
    done = subprocess.run(
        [shutil.which("bash"), "./run.sh", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env=clean | {"DRY_RUN": "1"} | environment,
    )
    return done.returncode, done.stdout, done.stderr


def script(path, text):
    path.write_text(f"#!{shutil.which('bash')}\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def tools(folder):
    """A PATH with what run.sh needs of the system and no Python."""
    folder.mkdir()
    for name in ("bash", "cat", "basename", "dirname"):
        (folder / name).symlink_to(shutil.which(name))
    return folder


def test_syntax():
    subprocess.run([shutil.which("bash"), "-n", "run.sh"], cwd=ROOT, check=True)
    assert os.access(ROOT / "run.sh", os.X_OK) and os.access(ROOT / ".ci" / "run", os.X_OK)
    text = (ROOT / "run.sh").read_text()
    assert "set -euo pipefail" in text
    for word in ("mapfile", "declare -A", "${1,,}", "readarray", "|&"):
        assert word not in text, f"{word} is not in the bash of macOS"


def test_help():
    code, out, _ = call("--help", path="/nonexistent:" + os.environ["PATH"])
    assert code == 0
    for verb in ("--repeats N", "test", "lab | studio", "bench", "PYTHON", "Exit status"):
        assert verb in out


def test_an_environment_with_torch_is_used_as_it_is():
    code, out, err = call("test", "-k", "some name", "-x")
    assert code == 0, err
    assert out.strip() == "python -m pytest -n 2 -k some name -x"
    code, out, _ = call("test", PYTHON=sys.executable, path=os.environ["PATH"])
    assert code == 0 and out.strip() == f"{sys.executable} -m pytest -n 2"


def test_what_each_verb_runs():
    assert call("sample", "x.safetensors")[1].strip() == "python train_gpt.py sample x.safetensors"
    assert call("bench", "--cpu")[1].strip() == "python -m bench.gpu --cpu"
    assert call("lab")[1].strip() == "python -m lab.tour"
    assert call("studio", "--port=1")[1].strip() == "python -m lab.studio --port=1"
    series = call("--repeats", "19", "--preset=nano", "--seed_is_ours")[1]
    assert series.strip() == "python -m records.series --repeats 19 --preset=nano --seed_is_ours"
    code, _, err = call("tset")
    assert code == 2 and "unknown word 'tset'" in err


LINTERS = "ruff check .", "ruff format --check .", "mypy"


def test_lint_tells_all_that_is_wrong_and_skips_where_it_cannot(clone):
    """With ruff and mypy that only note what they are told; the first of them finds a fault."""
    code, _, err, _ = clone("lint")
    assert code == 3 and "skipped" in err and "requirements-lab.txt" in err
    note = "import os, sys\nopen(os.environ['NOTES'], 'a').write(' '.join([NAME, *sys.argv[1:]]) + '\\n')\n"
    for name in ("ruff", "mypy"):
        told = note.replace("NAME", repr(name)) + "sys.exit('check' in sys.argv and bool(os.environ.get('WRONG')))\n"
        (clone.folder.parent / "modules" / f"{name}.py").write_text(told)
    assert clone("lint")[0::3] == (0, [*LINTERS])
    assert clone("lint", WRONG="1")[0::3] == (1, [*LINTERS]), "one fault does not hide the others"
    ci = (ROOT / ".ci" / "run").read_text()
    assert "\n./run.sh lint || [ $? = 3 ]\n" in ci and "set -e" in ci


def test_style_and_form():
    """What ./run.sh lint asks first, here too: it takes no second."""
    if not shutil.which("ruff", path=str(Path(sys.executable).parent)):
        pytest.skip("no ruff here: ./run.sh setup lab installs it")
    for words in (["check", "--no-cache"], ["format", "--check", "--no-cache"]):
        done = subprocess.run([sys.executable, "-m", "ruff", *words, "."], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_fineweb_is_fetched_only_for_what_trains_on_it():
    fetch = "-m data.fineweb"
    assert fetch in call("--repeats", "2", "--preset=medium")[1]
    assert fetch in call("--repeats", "2", "--preset", "medium")[1]
    assert fetch not in call("--repeats", "2", "--preset=medium", "--train_files=x.bin")[1]
    assert fetch not in call("--repeats", "2", "--preset", "nano")[1]
    assert fetch not in call("--repeats", "2", "--preset=nano-plain")[1]


def test_without_a_gpu_the_main_job_is_nano(monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, out, err = call()
    assert code == 0 and "no GPU" in err
    assert "-m records.series --repeats 4 --preset nano" in out


def test_a_python_without_torch_or_too_old_is_refused(tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    code, _, err = call("test", PYTHON=str(bare / "bin" / "python"))
    assert code == 2 and "has no torch" in err
    code, _, err = call("test", PYTHON="/no/such/python")
    assert code == 2 and "does not run, or is older than Python 3.10" in err


def test_without_any_python_it_says_what_is_needed(tmp_path):
    shutil.copy(ROOT / "run.sh", tmp_path)
    code, _, err = call("test", cwd=tmp_path, path=str(tools(tmp_path / "bin")))
    assert code == 2 and "Python 3.10 or newer is needed" in err


@pytest.fixture
def clone(tmp_path):
    """A folder with run.sh, its requirements, a Python without torch, and a pip that only notes what it is told."""
    folder = tmp_path / "clone"
    folder.mkdir()
    shutil.copy(ROOT / "run.sh", folder)
    (folder / "requirements.txt").write_text("torch==0\n")
    path = tools(tmp_path / "bin")
    real = Path(sys.base_prefix) / "bin" / "python3"
    script(path / "python3", f'exec "{real if real.exists() else sys.executable}" -S "$@"')
    notes = tmp_path / "notes"
    module = (
        "import os, sys\n"
        "open(os.environ['NOTES'], 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "sys.exit(int(os.environ.get('PIP_EXIT', 0)))\n"
    )
    modules = tmp_path / "modules"
    (modules / "pip").mkdir(parents=True)
    (modules / "pip" / "__main__.py").write_text(module)
    (modules / "pip" / "__init__.py").write_text("")
    # The environment's own ensurepip would unpack a real pip: this one makes the environment without.
    (modules / "venv").mkdir()
    (modules / "venv" / "__init__.py").write_text("")
    (modules / "venv" / "__main__.py").write_text(
        "import os, sys\n"
        "os.makedirs('.venv/bin', exist_ok=True)\n"
        "open(os.environ['NOTES'], 'a').write('venv\\n')\n"
        "target = '.venv/bin/python'\n"
        "if os.path.lexists(target): os.remove(target)\n"
        f"os.symlink({str(path / 'python3')!r}, target)\n"
    )
    for name in (
        "pytest",
        "xdist",
        "pytest_timeout",
        "hypothesis",
        "numpy",
        "scipy",
        "matplotlib",
        "safetensors",
        "tqdm",
    ):
        (modules / f"{name}.py").write_text("")

    def run(*words, **more):
        environment = {"NOTES": str(notes), "PYTHONPATH": str(modules)} | more
        code, out, err = call(*words, cwd=folder, path=str(path), **environment)
        told = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        return code, out, err, told

    run.folder = folder
    return run


def test_it_makes_its_environment_and_installs_once(clone):
    code, out, err, told = clone("test")
    assert code == 0, err
    assert out.strip() == ".venv/bin/python -m pytest -n 2"
    assert told == ["venv", "install --disable-pip-version-check -q -r requirements.txt"]
    assert clone("test")[3] == [], "the second time nothing is made or installed"
    (clone.folder / "requirements.txt").write_text("torch==1\n")
    assert clone("test")[3] == ["install --disable-pip-version-check -q -r requirements.txt"]


def test_an_install_that_fails_is_tried_again_and_says_what_to_do(clone):
    code, _, err, told = clone("test", PIP_EXIT="1")
    assert code == 2 and "pip could not install" in err and "PYTHON" in err and len(told) == 2
    assert clone("test")[3] == ["install --disable-pip-version-check -q -r requirements.txt"]


def test_a_broken_environment_is_made_anew(clone):
    clone("test")
    python = clone.folder / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python")
    assert clone("test")[3][0] == "venv"


def test_from_another_folder_and_through_a_link(tmp_path):
    """Relative paths are the caller's; the checkout is found through a link."""
    (tmp_path / "bin").mkdir()
    link = tmp_path / "bin" / "go"
    link.symlink_to(ROOT / "run.sh")
    here = str(Path(sys.executable).parent)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")}
    clean |= {"PATH": f"{here}{os.pathsep}{clean['PATH']}"}

    def run(*words, **more):
        command = [shutil.which("bash"), str(link), *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=clean | more, timeout=120)
        return done.returncode, done.stdout.strip(), done.stderr

    code, out, err = run("sample", "own/x.safetensors", DRY_RUN="1")
    assert (code, out) == (0, f"python {ROOT}/train_gpt.py sample own/x.safetensors"), err
    (tmp_path / "losses.csv").write_text("loss\n2.91\n2.92\n")
    code, out, err = run("python", "-m", "stats.ttest", "losses.csv", "--no-sensitivity")
    assert code == 1 and out.startswith("losses.csv: 2 runs"), err
