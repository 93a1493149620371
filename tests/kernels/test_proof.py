"""The proof of the kernels in the size that fits the default tests; `python -m kernels.proof` runs all of it.

Numeric cases and planted faults run in this process, in the interpreter. Compilation needs the interpreter off,
so it runs once in a process of its own. The rest tests the harness: what it checks must be able to fail.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.proof import DEVICES, Family, Numeric, families, machine_code
from kernels.proof.__main__ import run_part, table_rows
from kernels.proof.numeric import further_checks
from kernels.runtime import HAVE_TRITON, INTERPRETED, tl, triton

needs_triton = pytest.mark.skipif(not HAVE_TRITON, reason="triton is not installed")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1 before triton is imported")
FAMILIES = families() if HAVE_TRITON else {}
# Every case of every family in every type; by default the quick ones, and of float16, which no run trains in, one a
# family.
FIRST = {name: next(case for case in family.numeric if case.quick) for name, family in FAMILIES.items()}
NUMERIC = [(name, case, dtype) for name, family in FAMILIES.items() for case in family.numeric for dtype in case.dtypes]
QUICK = [(n, case, dtype) for n, case, dtype in NUMERIC if case.quick and (dtype != torch.float16 or case is FIRST[n])]
REST = [row for row in NUMERIC if row not in QUICK]
FURTHER = [(name, check) for name, family in FAMILIES.items() for check in further_checks(family)]
FAULTS = [(name, number) for name, family in FAMILIES.items() for number in range(len(family.faults))]


def check(name, case, dtype):
    import importlib

    from kernels.proof.numeric import check_case

    return check_case(importlib.import_module(FAMILIES[name].module), case, dtype)


@interpreted
@pytest.mark.parametrize("name, case, dtype", QUICK, ids=[f"{n}-{c.name}-{d}" for n, c, d in QUICK])
def test_numeric(name, case, dtype):
    check(name, case, dtype)


@interpreted
@pytest.mark.parametrize("name, further", FURTHER, ids=[f"{n}-{c}" for n, c in FURTHER])
def test_further(name, further):
    """NaN and layouts in a tiny case of the family, and the checks that are its own."""
    import importlib

    further_checks(FAMILIES[name])[further](importlib.import_module(FAMILIES[name].module))


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("name, case, dtype", REST, ids=[f"{n}-{c.name}-{d}" for n, c, d in REST])
def test_numeric_rest(name, case, dtype):
    check(name, case, dtype)


@interpreted
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kernel_has_a_case(name):
    """Each kernel that a module launches is named by its family; what a family names besides is another family's."""
    import importlib

    from triton.experimental.gluon._runtime import GluonJITFunction
    from triton.runtime.interpreter import InterpretedFunction

    module = importlib.import_module(FAMILIES[name].module)
    launched = re.findall(
        r"launch\(\s*([^,]+),", Path(module.__file__).read_text()
    )  # one kernel, or the one or the other
    entry = {
        n
        for n, x in vars(module).items()
        if isinstance(x, (InterpretedFunction, GluonJITFunction))
        and any(p.startswith("p_") for p in x.arg_names)
        and any(n in words.split() for words in launched)
    }
    others = {kernel for other, family in FAMILIES.items() if other != name for kernel in family.kernels}
    assert entry and entry <= set(FAMILIES[name].kernels) <= entry | others


@interpreted
@pytest.mark.parametrize("name, number", FAULTS, ids=[f"{n}-{FAMILIES[n].faults[i].name}" for n, i in FAULTS])
def test_planted_fault_is_caught(name, number):
    from kernels.proof.numeric import run_faults

    (result,) = run_faults(FAMILIES[name], only=(number,))
    assert result["caught"] is not None, f"no quick case of {name} notices: {result['fault']}"


# ---- compilation -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled():
    """The quick launches, compiled for sm_90 in a process of its own."""
    if not HAVE_TRITON:
        pytest.skip("triton is not installed")
    return run_part("compile", [], ["sm_90"], quick=True)


@needs_triton
def test_every_quick_launch_compiles_and_meets_its_demands(compiled):
    assert compiled["failures"] == []
    assert {row["family"] for row in compiled["rows"]} == set(FAMILIES)


@needs_triton
def test_machine_code_is_as_committed(compiled):
    rows = table_rows(compiled)
    try:
        verdicts = machine_code.compare(rows, compiled["ptxas"])
    except LookupError as missing:
        pytest.skip(str(missing))
    assert {key: verdict for key, verdict in verdicts.items() if verdict} == {}


@needs_triton
def test_manifest(compiled, capsys):
    """Prints, for the log of every run of the tests, which machine code has run on a GPU."""
    measured = machine_code.manifest()
    for key, row in table_rows(compiled).items():
        assert len(row["sha256"]) == 64
        with capsys.disabled():
            state = "as measured" if row["sha256"] in measured else "needs a GPU run"
            print(f"\n  {state}: {key}", end="")


@needs_triton
@pytest.mark.slow
def test_every_launch_compiles_for_every_device():
    everything = run_part("compile", [], list(DEVICES), quick=False)
    assert everything["failures"] == []
    assert {row["device"] for row in everything["rows"]} == set(DEVICES)


@needs_triton
@pytest.mark.slow
def test_two_compilations_give_the_same_machine_code(tmp_path, compiled, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    again = table_rows(run_part("compile", [], ["sm_90"], quick=True))
    assert {k: r["sha256"] for k, r in again.items()} == {k: r["sha256"] for k, r in table_rows(compiled).items()}


OVERSIZED = """
import torch
from kernels.proof import pretend
from kernels.runtime import tl, triton

@triton.jit
def product(p_a, p_c, N: tl.constexpr):
    o = tl.arange(0, N)
    total = tl.zeros([N, N], tl.float32)
    for i in range(0, 16):
        a = tl.load(p_a + i * N * N + o[:, None] * N + o[None, :])
        total = tl.dot(a, a, total)
    tl.store(p_c + o[:, None] * N + o[None, :], total)

for stages in (2, 8):  # a stage of the pipeline takes 32 KiB
    x = torch.empty(16, 128, 128, dtype=torch.float16, device="meta")
    with pretend.device("sm_80") as launched:
        try:
            product[(1,)](x, x.float(), N=128, num_stages=stages, num_warps=8)
            print("fits", launched[0].shared_bytes)
        except Exception as error:
            print(type(error).__name__)
"""


@needs_triton
def test_a_tile_that_does_not_fit_is_an_error(tmp_path, repo):
    script = tmp_path / "oversized.py"
    script.write_text(OVERSIZED)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(repo), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)], env=environment, capture_output=True, text=True, timeout=240
    )
    lines = done.stdout.split("\n")
    assert lines[0].startswith("fits") and lines[1] == "OutOfResources", done.stdout + done.stderr[-2000:]


# ---- the harness itself ------------------------------------------------------------------------------------


def test_bf16_rounding_is_torchs():
    from kernels.proof.interpreter import round_bf16, widen_bf16

    random = np.random.default_rng(0)
    bits = random.integers(0, 2**32, 200_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38], np.float32)])
    expected = torch.from_numpy(values).bfloat16()
    got = round_bf16(values)
    finite = ~np.isnan(values)
    assert np.array_equal(got[finite], expected.view(torch.uint16).numpy()[finite])
    assert np.isnan(widen_bf16(got[~finite])).all()
    assert np.array_equal(widen_bf16(got[finite]), expected.float().numpy()[finite])


@interpreted
def test_mended_interpreter_computes_bf16():
    from kernels.proof.interpreter import mended

    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 32, generator=random).bfloat16() for _ in range(2))
    product, mixed = torch.empty(32, 32), torch.empty(32, 32, dtype=torch.bfloat16)
    with mended():
        _bf16_kernel[(1,)](a, b, product, mixed, N=32)
    torch.testing.assert_close(product, a.float() @ b.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed, torch.where(a > b, a * b, a + b.exp2()), rtol=1e-2, atol=1e-2)


@triton.jit
def _bf16_kernel(p_a, p_b, p_product, p_mixed, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    b_a = tl.load(p_a + o)
    b_b = tl.load(p_b + o)
    tl.store(p_product + o, tl.dot(b_a, b_b))
    b_e = tl.exp2(b_b.to(tl.float32)).to(tl.bfloat16)
    tl.store(p_mixed + o, tl.where(b_a > b_b, b_a * b_b, b_a + b_e))


@triton.jit
def _misbehaving(p_x, p_y, n, HOW: tl.constexpr):
    """Copies x into y, 16 elements a program, with one of the faults that the watch must notice."""
    pid = tl.program_id(0)
    o = pid * 16 + tl.arange(0, 16)
    m = o < n
    b = tl.load(p_x + o, mask=m, other=0.0)
    if HOW == "no mask":
        tl.store(p_y + o, b)
    elif HOW == "overlap":
        tl.store(p_y + o - pid, b, mask=m)
    elif HOW == "neighbour":
        tl.store(p_y + o, b + tl.load(p_y + (o + 16) % n, mask=m), mask=m)
    elif HOW == "same lane":
        tl.store(p_y + o // 2, b, mask=m)
    elif HOW == "other tensor":
        # lands inside p_y, but the pointer was made from p_x
        tl.store(p_x + 64 + o, b, mask=m)
    elif HOW == "unwritten":
        tl.store(p_y + o, b, mask=o < n - 1)
    elif HOW == "gap":
        tl.store(p_y + o, b + tl.load(p_x + o + 1, mask=o < n - 1, other=0.0), mask=m)
    else:
        tl.store(p_y + o, b, mask=m)


def _run_misbehaving(how):
    from kernels.proof.numeric import check_case

    def kernel(module, given):
        both = torch.zeros(128)
        x = both[:40].copy_(given["x"]) if how != "gap" else torch.zeros(40, 2)[:, 0].copy_(given["x"])
        y = both[64:104] if how == "other tensor" else torch.empty(40)
        if how == "gap":  # x is every second element of its storage; the kernel walks it as if it were dense
            _misbehaving[(3,)](x, y, 40, HOW=how)
        else:
            _misbehaving[(3,)](x, y, 40, HOW=how)
        return {"y": y}

    case = Numeric(
        "copy",
        lambda random: {"x": torch.randn(40, generator=random)},
        kernel,
        lambda module, given: {"y": given["x"].clone()},
    )
    return check_case(None, case, torch.float32)


@interpreted
@pytest.mark.parametrize(
    "how, message",
    [
        ("no mask", "outside p_y"),
        ("overlap", "meets what program"),
        ("neighbour", "program"),
        ("same lane", "several lanes"),
        ("other tensor", "outside p_x"),
        ("unwritten", "off by nan"),
        ("gap", "outside p_x"),
    ],
)
def test_watch_notices(how, message):
    from kernels.proof.interpreter import KernelFault

    with pytest.raises(KernelFault, match=message):
        _run_misbehaving(how)


@interpreted
def test_watch_lets_a_sound_kernel_pass():
    report = _run_misbehaving("nothing")
    assert report["y"]["error"] == 0 and report["launched"] == {"_misbehaving": 1}


@interpreted
def test_reducing_bf16_is_refused():
    from kernels.proof.interpreter import KernelFault, checked, mended

    with mended(), checked(), pytest.raises(KernelFault, match="widen them to float32"):
        _bf16_sum[(1,)](torch.ones(16, dtype=torch.bfloat16), torch.empty(1))


@triton.jit
def _bf16_sum(p_x, p_y):
    tl.store(p_y, tl.reduce(tl.load(p_x + tl.arange(0, 16)), 0, _add))


@triton.jit
def _add(a, b):
    return a + b


@interpreted
def test_patches_are_undone():
    from triton.runtime import interpreter

    from kernels.proof.interpreter import checked, mended, poisoned

    def state():
        return [
            dict(vars(x))
            for x in (
                interpreter.InterpreterBuilder,
                interpreter.GridExecutor,
                interpreter.ReduceOps,
                interpreter.TensorDescHandle,
            )
        ] + [torch.empty, interpreter._implicit_cvt]

    before = state()
    with mended(), checked(), poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.zeros(2)).isnan().all()
        assert torch.zeros(2).new_empty(2).isnan().all()
    assert state() == before


def test_a_fault_whose_text_is_gone_is_an_error(tmp_path):
    from kernels.proof import Fault
    from kernels.proof.numeric import plant

    family = Family("x", "kernels.norm", (), (), (), {}, ())
    with pytest.raises(ValueError, match="does not occur"):
        plant(family, Fault("gone", "no such text here", ""), tmp_path, 0)


def test_unknown_family_is_an_error():
    with pytest.raises(ValueError, match="no kernel family named nonsense"):
        families(("nonsense",))


def test_table_differences_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "TABLE", tmp_path / "table.json")
    with pytest.raises(LookupError, match="has no rows for triton"):
        machine_code.compare({}, "13.4.59")
    row = {"registers": 64, "sha256": "a"}
    machine_code.update_table({"f / l / k": row, "g / l / k": row}, "1.2.3")
    assert machine_code.compare({"f / l / k": row}, "1.2.3") == {"f / l / k": None}
    assert "registers 64 -> 65" in machine_code.compare({"f / l / k": {**row, "registers": 65}}, "1.2.3")["f / l / k"]
    assert "not in the committed table" in machine_code.compare({"f / new / k": row}, "1.2.3")["f / new / k"]
    with pytest.raises(LookupError, match=r"are of ptxas 1\.2\.3, not 1\.2\.4"):
        machine_code.compare({"f / l / k": row}, "1.2.4")
    machine_code.update_table({"f / other / k": row}, "1.2.3")  # a family's rows are replaced, other families' stay
    assert set(machine_code.committed_table()[triton.__version__]) == {"f / other / k", "g / l / k"}
    machine_code.update_table({"f / l / k": row}, "1.2.4")  # no rows of two assemblers beside each other
    assert set(machine_code.committed_table()[triton.__version__]) == {"f / l / k"}


def test_rows_of_other_devices_stand_beside_and_are_renewed_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(machine_code, "TABLE", tmp_path / "table.json")

    def rows(device, registers, launch="heads of 8 on 2"):
        row = dict(family="f", launch=launch, device=device, kernel="k", seconds=0.1, registers=registers, options={})
        return table_rows({"rows": [row]})

    first, other = rows("sm_90", 64), rows("gfx942", 32)
    assert [*first, *other] == ["f / heads of 8 on 2 / k", "f / heads of 8 on 2 / k on gfx942"]
    machine_code.update_table(first, "1.2.3")
    assert machine_code.compare(other, "1.2.3") == {}, "no row of that device is there to compare with"
    machine_code.update_table(other, "1.2.3")
    assert set(machine_code.committed_table()[triton.__version__]) == {*first, *other}
    assert "registers 32 -> 40" in machine_code.compare(rows("gfx942", 40), "1.2.3")[next(iter(other))]
    machine_code.update_table(rows("gfx942", 40, "new"), "1.2.3")
    assert set(machine_code.committed_table()[triton.__version__]) == {*first, "f / new / k on gfx942"}
    assert "not in the committed table" in str(machine_code.compare(rows("sm_90", 64, "new"), "1.2.3"))


LISTING = """
.L_x_1:
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR28], RZ, !UPT, gsb0 ;
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0020*/                   F2FP.BF16.F32.PACK_AB R184, R153, R152 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, R184, gdesc[UR24].tnspB, R24, gsb0 ;
        /*0040*/                   HGMMA.64x64x16.F32.BF16 R152, gdesc[UR28], RZ, !UPT, gsb0 ;
        /*0050*/                   IADD3 R5, P0, R5, 0x1, RZ ;
        /*0060*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0070*/                   MOV R185, R5 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/               @P3 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
"""


def reused(listing):
    return machine_code.reused_registers(*machine_code.read_listing(listing))


def test_a_register_that_a_product_in_flight_reads_is_not_written():
    """The fault of assemblers before 13.3, in the machine code itself; each change makes one such place."""
    assert reused(LISTING) == []
    assert reused(LISTING.replace("IADD3 R5, P0, R5, 0x1, RZ ;", "LDS.128 R184, [R3] ;"))
    assert reused(LISTING.replace("IADD3 R5, P0", "IADD3 R187, P0"))
    assert reused(LISTING.replace("IADD3 R5, P0, R5, 0x1, RZ ;", "LDS.128 R182, [R3] ;"))
    assert reused(LISTING.replace("IADD3 R5, P0, R5, 0x1, RZ ;", "FADD R87, R1, R2 ;"))
    assert reused(LISTING.replace("MOV R185, R5", "MOV R152, R5"))
    assert not reused(LISTING.replace("IADD3 R5, P0, R5, 0x1, RZ ;", "STS.128 [R3], R184 ;"))
    # over the end of a loop: what its last product reads is written by its first instruction
    body = LISTING.replace("MOV R185, R5", "HGMMA.64x64x16.F32.BF16 R88, R196, gdesc[UR2], R88, gsb0")
    body = body.replace("/*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0", "/*0080*/                   NOP")
    assert reused(body) == []
    assert reused(body.replace(".L_x_1:", ".L_x_1:\n        /*0008*/                   MOV R197, R5 ;"))


TTIR = """
  tt.func public @k(%p_x: !tt.ptr<bf16> {tt.divisibility = 16 : i32}, %p_y: !tt.ptr<bf16>, %n: i32) {
    %0 = tt.addptr %p_x, %row : !tt.ptr<bf16>, i64
    %1 = tt.splat %0 : !tt.ptr<bf16> -> tensor<64x!tt.ptr<bf16>>
    %2 = tt.addptr %1, %o : tensor<64x!tt.ptr<bf16>>, tensor<64xi32>
    %3 = tt.load %2, %m, %other : tensor<64x!tt.ptr<bf16>>
    %4 = tt.splat %p_y : !tt.ptr<bf16> -> tensor<64x!tt.ptr<bf16>>
    %5 = tt.addptr %4, %o : tensor<64x!tt.ptr<bf16>>, tensor<64xOFFSET>
    tt.store %5, %3, %m : tensor<64x!tt.ptr<bf16>>
"""


def test_a_lost_64_bit_cast_is_seen_in_the_intermediate_code():
    assert machine_code.narrow_pointers(TTIR.replace("OFFSET", "i32")) == {"p_y"}
    assert machine_code.narrow_pointers(TTIR.replace("OFFSET", "i64")) == set()
    assert machine_code.narrow_pointers(TTIR.replace("%row : !tt.ptr<bf16>, i64", "%row : !tt.ptr<bf16>, i32")) == {
        "p_x",
        "p_y",
    }
    several = TTIR.replace("OFFSET", "i32").replace("%p_y", "%p_y.0")  # of a tuple of pointers
    assert machine_code.narrow_pointers(several) == {"p_y"}


def test_what_a_kernel_changes_in_place_is_seen_in_the_intermediate_code():
    assert machine_code.rewritten_pointers(TTIR) == set()
    back = "    tt.store %2, %3, %m : tensor<64x!tt.ptr<bf16>>\n"
    assert machine_code.rewritten_pointers(TTIR + back) == {"p_x"}


def test_demands_on_the_intermediate_code_are_told():
    from kernels.proof import Demand
    from kernels.proof.pretend import Compiled

    demand = Demand(wide=("p_y",), shows=((r"max\.NaN", "CAP=1"),))
    family = Family("x", "kernels.norm", (), (), (), {"k": demand}, ())

    def unmet(cap, ptx, ttir):
        asm = {"ttir": ttir, "ptx": ptx}
        options = {"CAP": cap, "PRECISION": "ieee"}
        return machine_code.unmet_structure(family, Compiled("k", "sm_90", options, (1,), 0, asm))

    wide = TTIR.replace("OFFSET", "i64")
    assert unmet(1, "max.NaN.f32", wide) == [] and unmet(0, "", wide) == []
    assert "max" in unmet(1, "max.f32", wide)[0]
    assert "p_y" in unmet(0, "", TTIR.replace("OFFSET", "i32"))[0]
    assert "tf32" in unmet(0, "", wide + "inputPrecision = tf32")[0]


@interpreted
@pytest.mark.parametrize("kind", ["half-precision sums", "bounds"])
def test_a_mutant_of_the_campaign_is_caught(kind, tmp_path):
    """One mutant of two kinds, of the cheapest family; `python -m kernels.proof --part mutate` runs all."""
    from kernels.proof.mutation import judged, mutants

    found = [m for m in mutants(FAMILIES["mlp"]) if m.kind == kind]
    assert judged(FAMILIES["mlp"], found[0], 900, tmp_path)["caught"] is not None


def test_mutants_are_many_and_always_the_same():
    from kernels.proof.mutation import mutants

    drawn = {m.name: m for f in FAMILIES.values() for m in mutants(f)}
    assert len(drawn) >= 60 and len({m.kind for m in drawn.values()}) >= 12
    assert [m for m in drawn.values() if m.family == "mlp"] == mutants(FAMILIES["mlp"])
