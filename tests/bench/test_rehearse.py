"""The rehearsal of a GPU's step: it holds on today's program, and every fault that it is for turns it red."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from bench.rehearse import budgets
from bench.rehearse.project import CEILINGS, project

pytestmark = pytest.mark.timeout(900)  # the first test waits for a minute of compiling, or as long as others leave it


def python(*arguments, timeout, changed=None):
    """A process of its own: Triton's interpreter is off there. changed: of its environment."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | (changed or {})
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=budgets.REPO)


@pytest.fixture(scope="module")
def short_form(tmp_path_factory):
    """The counts of one block of medium, as one of eight H100 runs it, and what was printed."""
    path = tmp_path_factory.mktemp("rehearsal") / "counts.json"
    done = python("-m", "bench.rehearse", "--preset=medium", "--one-block", "--check", f"--json={path}", timeout=850)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    return json.loads(path.read_text()) if path.exists() else None, done


def test_one_block_of_medium_holds_all_rules_and_budgets(short_form):
    counted, done = short_form
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "within all rules and budgets" in done.stdout
    assert counted["tokens"] == 65536 and counted["world"] == 8 and counted["other_orders"] == []
    assert counted["windows"]["tried"] > 20, "every window of the run was tried"


@pytest.mark.slow
def test_one_block_with_attention_in_gluon(tmp_path):
    """As `--kernels=gluon` runs it: in one graph over all windows, machine code that is in the proof's table, and a
    projection that counts its own passes."""
    path = tmp_path / "counts.json"
    short = "--preset=medium", "--one-block", "--kernels=gluon"
    done = python("-m", "bench.rehearse", *short, f"--json={path}", timeout=850)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    counted = json.loads(path.read_text())
    rows = {row["kernel"]: row for row in counted["step"]["kernels"] if row["kernel"].startswith("_attention")}
    assert set(rows) == {"_attention_forward_gluon", "_attention_dq_gluon", "_attention_dkdv_gluon"}
    assert counted["unproven"] == [] and counted["windows"]["new_graphs"] == 0 == len(counted["compile"]["breaks"])
    assert not [kernel["kernel"] for kernel in counted["kernels"] if kernel["stack_bytes"]]
    assert 0.5 < counted["over_plain"] < 0.65


def test_products_are_those_of_the_mathematics(short_form):
    """Every product of the step is counted: 6 FLOPs a weight and token, Muon's own apart."""
    import train_gpt
    from bench.rehearse.counts import one_block

    counted, _ = short_form
    model = one_block(train_gpt.parse_config([]))
    weights = 12 * model.model_dim**2 + -(-model.vocab_size // 128) * 128 * model.model_dim
    counted_flops = sum(row["flops"] for row in counted["step"]["kernels"] if row["phase"] in ("forward", "backward"))
    assert counted_flops == pytest.approx(6 * weights * counted["tokens"], rel=0.001)


def test_own_and_generated_kernels_show_their_resources(short_form):
    counted, _ = short_form
    own = {kernel["kernel"] for kernel in counted["kernels"] if kernel["own"]}
    assert {"_product", "_symmetric", "_row_loss"} <= own
    assert all(0 < kernel["registers"] <= 255 and kernel["warps"] for kernel in counted["kernels"])
    assert any(kernel["kernel"].startswith("triton_") for kernel in counted["kernels"])
    assert sum(counted["step"]["peak_holders_gib"].values()) == pytest.approx(counted["step"]["peak_gib"], rel=0.05)


def with_fault(counted, name):
    """The same counts with one fault in them."""
    faulty = copy.deepcopy(counted)
    step = faulty["step"]
    if name == "graph":
        faulty["compile"]["graphs"] = 3
    elif name == "window":
        faulty["windows"]["new_graphs"] = 1
    elif name == "int16":
        step["messages"][0]["dtypes"] = ["int16"]
    elif name == "order":
        faulty["other_orders"] = [3]
    elif name == "wait":
        step["host_waits"].append("item at train_gpt.py:1")
    elif name == "spill":
        next(kernel for kernel in faulty["kernels"] if not kernel["stack_bytes"])["stack_bytes"] = 8
    elif name == "memory":
        step["peak_gib"] += 2
    elif name == "launches":
        step["launches"] += 50
    elif name == "alignment":
        step["unaligned_bytes"]["a_kernel"] = 10**9
    elif name == "ptxas":
        next(kernel for kernel in faulty["kernels"] if kernel["own"])["sha256"] = "0" * 64
    return faulty


FAULTS = {
    "graph": "3 graphs",
    "window": "recompilations",
    "int16": "NCCL carries no such type",
    "order": "rank 3",
    "wait": "host_waits",
    "spill": "spilling_kernels",
    "memory": "peak_gib",
    "launches": "launches",
    "alignment": "unaligned_mb",
    "ptxas": "unproven_kernels",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_counts_fails_and_is_named(short_form, name):
    counted, _ = short_form
    limits = {budgets.form(counted): budgets.measures(counted)}
    proven = {kernel["sha256"] for kernel in counted["kernels"]} | budgets.proven_hashes()
    faulty = with_fault(counted, name)
    if name == "ptxas":
        faulty["unproven"] += budgets.unproven(faulty, proven)
    judge = lambda c: budgets.broken_rules(c) + budgets.exceeded(c, limits)  # noqa: E731
    assert judge(counted) == [] == budgets.unproven(counted, proven)
    (said,) = judge(faulty)
    assert FAULTS[name] in said


def test_counts_without_budgets_fail(short_form):
    counted, _ = short_form
    assert "has no budgets" in budgets.exceeded(counted, {})[0]


def test_the_projection_adds_up():
    row = dict(kind="product", phase="backward", part="mlp", kernel="aten.mm", bits=16, launches=2)
    product = row | {"flops": 0.87 * CEILINGS["h100"].tflops_16 * 1e9, "bytes": 1}
    generated = row | {"kind": "inductor", "part": "", "kernel": "x", "flops": 0.0, "bytes": 0.8 * 3e9}
    heads = row | {"kind": "own", "part": "attention", "kernel": "_attention_dq", "flops": 0.0, "bytes": 1e12}
    # Two messages of 1 ms each in 8 processes, the first behind the product, the second awaited after 0.4 ms of work.
    size = 340e6 * 8 / 7
    queues = [
        {"kernels": [heads], "sends": ["reduce_scatter_base", size]},
        {"kernels": [product], "sends": ["reduce_scatter_base", size]},
        {"kernels": [], "awaits": 0},
        {"kernels": [generated | {"bytes": 0.4 * 0.8 * 3e9 - 0.004 * 0.8 * 3e9}], "awaits": 1},
        {"kernels": []},
    ]
    counted = {
        "device": "h100",
        "world": 8,
        "step": {"launches": 1000, "queues": queues, "kernels": [product, generated, heads]},
    }
    told = project(counted, attention_tflop=2.3)
    assert told["parts"] == pytest.approx(
        {
            "attention": 10,
            "gaps between launches": 2,
            "MLP": 1,
            "norms, mixes, embeddings": 1,
            "messages not hidden": 0.6,
        }
    )
    assert told["ms"] == pytest.approx(14.6)


def test_kernels_wait_for_messages_as_two_queues_say():
    """A message runs beside what is launched after it, messages one after another; an all-reduce goes twice around."""
    from bench.rehearse.project import travel

    row = dict(launches=0, ms=1.0)
    sends = lambda size, name="reduce_scatter_base": {"kernels": [row], "sends": [name, size]}  # noqa: E731
    awaits = lambda number, rows=(): {"kernels": list(rows), "awaits": number}  # noqa: E731
    ms = 1e6 * 8 / 7  # bytes that travel for one at 1 GB/s
    play = lambda *queues: sum(m["waited for"] for m in travel(queues, lambda row: row["ms"], 1.0, 8))  # noqa: E731
    assert play(sends(ms), awaits(0)) == pytest.approx(1)
    assert play(sends(ms), awaits(0, [row])) == pytest.approx(0)
    assert play(sends(ms, "allreduce_"), awaits(0, [row])) == pytest.approx(1)
    assert play(sends(3 * ms), sends(ms), awaits(1), awaits(0)) == pytest.approx(3)
    assert play({"kernels": [row | dict(launches=500)]}) == 0


def test_gradients_leave_before_the_backward_pass_ends(short_form):
    """The head's first, with the block's whole backward pass to travel behind; then the block's, before the tables'."""
    counted, _ = short_form
    queues, launched, sent = counted["step"]["queues"], 0, []
    for stretch in queues:
        launched += sum(row["launches"] for row in stretch["kernels"])
        if "sends" in stretch:
            sent.append((*stretch["sends"], launched))
    (head, of_head, after_head), (block, of_block, after_block), (tables, _, after_tables) = sent[:3]
    assert (head, of_head) == ("reduce_scatter_base", 50304 * 1024 * 4) and "allreduce" in tables
    assert (block, of_block) == ("reduce_scatter_base", 12 * 1024 * 1024 * 2 * 8 // 3)  # one of three to a process
    assert after_tables - after_head >= 20 and after_tables - after_block >= 3


def test_what_an_operator_changes_moves_twice():
    from bench.rehearse.recorder import moved_by

    a, b, c = (torch.empty(size, device="meta") for size in ((4, 8), (8, 2), (4, 2)))  # 128, 64 and 32 bytes
    aten = torch.ops.aten
    assert moved_by(aten.mm.default, (a, b), {}, [c]) == 128 + 64 + 32
    assert moved_by(aten.mm.out, (a, b), {"out": c}, [c]) == 128 + 64 + 32
    assert moved_by(aten.addmm.out, (c, a, b), {"out": c}, [c]) == 32 + 128 + 64 + 32
    assert moved_by(aten.mul_.Tensor, (a, a.clone()), {}, [a]) == 3 * 128
    assert moved_by(aten.copy_.default, (a, a.clone()), {}, [a]) == 2 * 128
    assert moved_by(aten.zero_.default, (a,), {}, [a]) == 128
    assert moved_by(aten.mul_.Tensor, (a, torch.empty(4, 8)), {}, [a]) == 2 * 128, "the host's memory is not counted"


def test_pointers_of_which_inductor_knows_no_alignment_are_found():
    from bench.rehearse.recorder import unaligned_pointers

    signature = {"in_ptr0": "*bf16", "in_ptr1": "*fp32", "out_ptr0": "*bf16", "xnumel": "i32"}
    sixteen = [["tt.divisibility", 16]]
    meta = {"signature": signature, "configs": [{(0,): sixteen, (2,): [["tt.other", 1]], (3,): sixteen}]}
    assert unaligned_pointers(meta) == {"in_ptr1", "out_ptr0"}


def test_what_a_kernel_reads_and_writes_moves_twice_whatever_its_names():
    from bench.rehearse.recorder import _touched

    ttir = "tt.func public @k(%p_x: !tt.ptr<f32>, %p_g: !tt.ptr<f32>) {\n%0 = tt.load %p_x\ntt.store %p_g, %0\n}"
    x, g = (torch.empty(4, 8, device="meta") for _ in range(2))
    assert _touched("k", {"p_x": x, "p_g": g}, ttir) == 128 + 128
    assert _touched("k", {"p_x": x, "p_g": x}, ttir) == 128 + 128, "in place"
    assert _touched("k", {"p_x": (x, g), "p_g": None}, ttir) == 128 + 128, "each of a tuple"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_planted_faults_are_seen():
    """Eight faults planted in a run of nano on the pretended device; without any, nothing is said."""
    done = python("tests/bench/planted.py", timeout=2900)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    expected = {
        "a host synchronisation": "host_waits",
        "a tensor left on the CPU": "host_waits",
        "int16 in a collective": "int16",
        "a kernel that spills": "spilling_kernels",
        "2 GB more at the peak": "peak_gib",
        "50 more launches": "launches",
        "a graph break": "graph_break",
        "a recompilation by window": "recompil",
    }
    assert said.pop("none") == []
    assert said.keys() == expected.keys()
    for fault, word in expected.items():
        assert any(word in line.lower() for line in said[fault]), f"{fault}: {said[fault]}"


@pytest.mark.slow
def test_another_assembler_is_seen(tmp_path):
    """The command with Triton's older ptxas: the machine code of every own kernel is another than the proof's."""
    from pathlib import Path

    triton = pytest.importorskip("triton")
    older = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = ("-m", "bench.rehearse", "--preset=medium", "--one-block", "--world=1", "--check")
    changed = {"TRITON_PTXAS_PATH": str(older), "TRITON_CACHE_DIR": str(tmp_path)}
    done = python(*command, timeout=850, changed=changed)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 1
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("own kernels whose machine code is not")]
    assert told.count(",") > 3, told


FORMS = {
    "medium": ("--preset=medium",),
    "nano": ("--preset=nano", "--world=1", "--dtype=bfloat16"),
    "medium in 8 bits": ("--preset=medium", "--products=fp8"),
    **{f"all of {name}": (f"--preset={name}",) for name in ("record18", "f3", "frontier")},
    "a block in 8 bits": ("--preset=medium", "--products=fp8", "--one-block"),
    **{f"a block of {name}": (f"--preset={name}", "--one-block") for name in ("small", "record18", "f2", "f3")},
    "a block of frontier": ("--preset=frontier", "--one-block"),
    "a block of nano": ("--preset=nano", "--one-block", "--world=1", "--dtype=bfloat16"),
}


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_all_of_a_preset_holds_all_rules_and_budgets(form):
    done = python("-m", "bench.rehearse", *form, "--check", timeout=2900)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_loss_over_all_logits_at_once_passes_over_them_four_times():
    """Plain torch as the published runs have it: read for the sum, read again, and their gradient written; in chunks,
    as our own reference has it, more than twice that."""
    code = """import json; from bench.rehearse.loss import counted
print(json.dumps([counted("rsqrt", whole, tokens=16384, classes=8192) for whole in (True, False)]))"""
    done = python("-c", code, timeout=850)
    if "CannotRehearse" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    whole, chunked = json.loads(done.stdout.splitlines()[-1])
    logits = 16384 * 8192 * 2 / 1e9
    assert whole["gb"] == pytest.approx(4 * logits, rel=0.02) and chunked["gb"] > 2 * whole["gb"]
    assert whole["tflop"] == chunked["tflop"] == pytest.approx(6 * 16384 * 8192 * 1024 / 1e12)
