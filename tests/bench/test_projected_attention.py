"""The projection's model of attention (bench/rehearse/project.py): counted cost over that of the plain kernels."""

import dataclasses

import pytest

from bench.options import own_and_config
from bench.rehearse import project as module
from bench.rehearse.__main__ import Options
from bench.step import attention_plans, draw_documents
from kernels.attention import attention_plan
from kernels.proof import slots

GLUON = ("_attention_forward_gluon", "_attention_dq_gluon", "_attention_dkdv_gluon")
ONE_PASS = ("_attention_forward_gluon", "_attention_rows", "_attention_backward_gluon", "_attention_dq_rounded")


@pytest.fixture(scope="module")
def medium():
    return own_and_config(Options, [], "medium")[1]


def test_what_was_launched_says_which_passes_ran():
    assert module.passes(["_prepare", "_attention_forward", "_attention_dq", "_attention_dkdv"]) == {
        "forward": "triton",
        "backward": "triton",
    }
    assert module.passes(GLUON) == {"forward": "gluon", "backward": "gluon"}
    assert module.passes(ONE_PASS) == {"forward": "gluon", "backward": "gluon_one_pass"}
    mixed = module.passes(["_attention_forward_specialised", "_attention_dq", "_attention_dkdv"])
    assert mixed == {"forward": "specialised", "backward": "triton"}
    assert module.passes([]) == {"forward": "triton", "backward": "triton"}


def test_a_pass_costs_both_by_turns_or_the_larger_side_by_side(monkeypatch):
    plan = attention_plan(length=128)
    moved = 8 * 128 * 128 * (798e12 / 4096) / 3e12  # q, k, v and o, in cycles of a multiprocessor
    monkeypatch.setattr(slots, "asked_of", lambda *_: (1.0, 1.0, 1.0, 0.0))
    assert module.cost("forward", "gluon", plan, 128) == pytest.approx(moved)
    monkeypatch.setattr(slots, "MOVED", dict.fromkeys(slots.MOVED, 0))
    for busy, asked, plain, side_by_side in ((100.0, 60.0, 160.0, 100.0), (50.0, 60.0, 110.0, 60.0)):
        monkeypatch.setattr(slots, "asked_of", lambda *_, b=busy, s=asked: (s, b, 1.0, 0.0))
        assert module.cost("forward", "triton", plan, 128) == plain
        assert module.cost("backward", "triton", plan, 128) == 2 * plain  # of its two kernels
        assert (
            module.cost("forward", "gluon", plan, 128)
            == module.cost("forward", "specialised", plan, 128)
            == side_by_side
        )


def test_plain_attention_stays_where_it_was(medium):
    """At any head width, those without counts too; and for the others the sum over layers and passes, written out."""
    narrow = dataclasses.replace(medium, num_heads=16, model_dim=16 * 48)
    assert module.over_plain(narrow, 1, ["_attention_forward", "_attention_dq", "_attention_dkdv"]) == 1
    with pytest.raises(KeyError, match="48"):
        module.over_plain(narrow, 1, GLUON)
    drawn = [draw_documents(medium.train_seq_len, medium.vocab_size, medium.eos_id, 0)]
    sums = dict.fromkeys(("gluon", "triton"), 0.0)
    for layers, plan in attention_plans(medium, drawn, medium.num_iterations // 2):
        for name in sums:
            for direction in ("forward", "backward"):
                for kernel in slots.PASSES[direction, name]:
                    found = slots.asked_of(kernel, plan, 128, slots.committed(128)[kernel])
                    how = max(found[:2]) if name == "gluon" else sum(found[:2])
                    sums[name] += max(how, slots.memory_cycles(kernel, plan, 128)) * len(layers)
    assert module.over_plain(medium, 1, GLUON) == pytest.approx(sums["gluon"] / sums["triton"])
    assert sum(len(layers) for layers, _ in attention_plans(medium, drawn, 0)) == medium.num_layers - 1


def test_the_share_of_the_ceiling_that_the_plain_rate_means(medium):
    """The assumed rate leaves the plain kernels' count a share of the ceiling that a kernel can have: near what public
    figures of FlashAttention-3 come to (it reaches some 600 of these 798 TFLOP/s in long documents)."""
    drawn = [draw_documents(medium.train_seq_len, medium.vocab_size, medium.eos_id, 0)]
    needed = cost = 0.0
    for layers, plan in attention_plans(medium, drawn, medium.num_iterations // 2):
        for direction in ("forward", "backward"):
            needed += len(layers) * slots.asked(direction, "triton", plan, 128).least
            cost += len(layers) * module.cost(direction, "triton", plan, 128)
    share = module.ATTENTION_TFLOPS / (module.CEILINGS["h100"].tflops_16 * needed / cost)
    assert 0.65 < share < 0.8


def test_the_kernels_around_one_pass_cost_their_bytes():
    row = dict(kind="own", phase="backward", part="attention_layer", bits=16, launches=1, flops=0.0)
    kernels = [row | {"kernel": name, "bytes": 3e9 * 0.85 if name in module.AROUND else 1e15} for name in ONE_PASS]
    counted = {"device": "h100", "world": 8, "step": {"launches": 0, "queues": [], "kernels": kernels}}
    told = module.project(counted, attention_tflop=2.3, over_plain=0.5)
    assert told["parts"]["attention"] == pytest.approx(2.3 / 230 * 1e3 * 0.5 + 2 * 1.0)
