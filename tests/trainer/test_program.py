"""One fingerprint of a program, worked out from its imports; versions and the assembler that a run is told by."""

import re

import pytest

from kernels.assembler import choose_assembler, doubts
from trainer.program import PROVEN, fingerprint, program_files, unproven_versions


def project(root):
    texts = {
        "main.py": "import tools.a\nfrom rooms import one\n\ndef later():\n    from tools import b\n    import json\n",
        "tools/__init__.py": "",
        "tools/a.py": "from . import c\nfrom .deep.d import thing\n",
        "tools/b.py": "import main\n",
        "tools/c.py": "",
        "tools/apart.py": "",
        "tools/deep/d.py": "from ..a import x\n",
        "rooms/one.py": "",
        "rooms/two.py": "",
    }
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root / "main.py"


def test_the_files_of_a_program_are_those_that_it_imports(tmp_path):
    entry = project(tmp_path)
    before = program_files(entry)
    tools = ["tools/__init__.py", "tools/a.py", "tools/b.py", "tools/c.py", "tools/deep/d.py"]
    assert list(before) == ["main.py", "rooms/one.py", *tools]
    for apart in ("tools/apart.py", "rooms/two.py"):
        (tmp_path / apart).write_text("changed = 1\n")
    (tmp_path / "tools" / "c.py").write_text("\n\n")  # newlines at the end do not count
    assert program_files(entry) == before
    for part in before:
        entry = project(tmp_path)
        (tmp_path / part).write_text((tmp_path / part).read_text() + "changed = 1\n")
        assert fingerprint(program_files(entry)) != fingerprint(before), part


def test_the_trainers_files_are_all_there_and_no_others(repo):
    files = program_files(repo / "train_gpt.py")
    for part in (
        "data/shards.py",
        "trainer/options.py",
        "trainer/processes.py",
        "kernels/muon.py",
        "kernels/runtime.py",
    ):
        assert part in files
    assert not [part for part in files if part.partition("/")[0] not in ("train_gpt.py", "trainer", "kernels", "data")]


def test_versions_outside_of_what_is_proven_are_told(repo):
    assert unproven_versions({"torch": "2.13.0+cpu", "triton": "3.9.0"}) == []
    assert unproven_versions({"torch": "2.11.0", "triton": "none"}) == []
    (said,) = unproven_versions({"torch": "2.14.0a0+git12", "triton": "3.6.1"})
    assert "torch 2.14.0a0+git12 is not what this program was proven with" in said
    assert len(unproven_versions({"torch": "2.9.1", "triton": "3.10"})) == 2
    text = (repo / "requirements.txt").read_text()
    least, below = re.search(r"^triton>=([\d.]+),<([\d.]+)", text, re.MULTILINE).groups()
    assert (least, below) == PROVEN["triton"]
    assert unproven_versions({"torch": re.search(r"^torch==([\d.]+)", text, re.MULTILINE)[1]}) == []
    assert f"torch from {PROVEN['torch'][0]} up to, not including, {PROVEN['torch'][1]}" in text


def test_one_assembler_is_chosen_and_stays(tmp_path, monkeypatch):
    def ptxas(name, release):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release 1, V{release}'\n")
        path.chmod(0o755)
        return path

    def both(path):
        return {"TRITON_PTXAS_PATH": str(path), "TRITON_PTXAS_BLACKWELL_PATH": str(path)}

    old, new, broken = ptxas("old", "12.8.93"), ptxas("new", "12.10.1"), tmp_path / "absent"
    next_cuda, torchs = ptxas("next", "13.4.59"), ptxas("torchs", "13.5.1")
    monkeypatch.setattr("kernels.assembler._triton", lambda: [broken, old, new])
    monkeypatch.setattr("kernels.assembler._torch", lambda: [torchs])
    environment = {}
    assert choose_assembler(environment) == f"12.10.1 {new}" and environment == both(new)
    assert choose_assembler(environment) == f"12.10.1 {new}"
    chosen = {"TRITON_PTXAS_PATH": str(old)}  # by the user, who means every GPU
    assert choose_assembler(chosen) == f"12.8.93 {old}" and chosen == both(old)
    monkeypatch.setattr("kernels.assembler._triton", lambda: [old, next_cuda])
    assert choose_assembler({}) == f"13.4.59 {next_cuda}"
    monkeypatch.setattr("kernels.assembler._cuda_of_torch", lambda: 12)  # whose driver would not load code of 13
    assert choose_assembler({}) == f"12.8.93 {old}"
    monkeypatch.setattr("kernels.assembler._cuda_of_torch", lambda: None)
    monkeypatch.setattr("kernels.assembler._triton", lambda: [broken])
    assert choose_assembler({}) == f"13.5.1 {torchs}"
    assert choose_assembler({"TRITON_PTXAS_PATH": str(broken)}) == "none"


def test_torchs_cuda_is_read_from_its_files(tmp_path, monkeypatch):
    from kernels import assembler

    monkeypatch.setattr(assembler, "_folder", lambda _package: tmp_path)
    for text, expected in (("cuda: Optional[str] = '13.0'\n", 13), ("cuda = '12.6'\n", 12), ("cuda = None\n", None)):
        (tmp_path / "version.py").write_text(f"debug = False\n{text}hip = None\n")
        assert assembler._cuda_of_torch() == expected


def test_an_assembler_that_is_not_safe_on_hopper_is_told():
    assert "12.9.86" in doubts("12.9.86 /somewhere/ptxas")[0] and "13.3" in doubts("13.1.80")[0]
    assert doubts("13.3.33") == doubts("13.10.1") == doubts("none") == []


def test_tritons_own_assembler_is_found():
    pytest.importorskip("triton")
    assert re.match(r"\d+\.\d+\.\d+ /", choose_assembler({}))
