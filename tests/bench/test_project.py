"""The projection of whole runs, and the page of schedules: what is counted, and that pages say what files say."""

import dataclasses

import pytest

import train_gpt
from bench import project, schedules
from bench.rehearse.page import kept
from trainer import schedule

MEDIUM = train_gpt.parse_config(["--preset=medium"])
RECORD18 = train_gpt.parse_config(["--preset=record18"])


def projection(config):
    rehearsed = kept("medium")
    return project.Projection(config, MEDIUM, rehearsed["projection"]["parts"], rehearsed["tokens"])


def test_weights_are_counted_from_the_model():
    D, V, padded = 1024, 50257, 50304
    assert project.weights_of(MEDIUM) == project.Weights(
        mlp=16 * 8 * D * D, projections=15 * 4 * D * D, head=padded * D, tables=7 * V * D, bigram=0
    )
    f3 = project.weights_of(train_gpt.parse_config(["--preset=f3"]))
    assert f3.bigram == 251_520 * D and f3.tables == 7 * padded * D
    assert f3.projections == 16 * 4 * D * D + 2 * 64 * D + 2 * 16 * 64


def test_the_rehearsed_run_costs_what_was_rehearsed():
    """Attention is that of a step's own windows, messages of counted bytes; all else is taken over."""
    parts, ms = kept("medium")["projection"]["parts"], projection(MEDIUM).step_ms(MEDIUM.num_iterations - 1)
    assert set(ms) == set(parts)
    for name in set(parts) - {"attention", "messages not hidden"}:
        assert ms[name] == pytest.approx(parts[name], rel=1e-9), name
    assert ms["messages not hidden"] == pytest.approx(parts["messages not hidden"], rel=0.02)


def test_attention_is_of_the_allowed_pairs():
    """One document over a whole sequence, counted in closed form: a query at p sees min(p, w) + 1 keys."""
    import torch

    from bench.step import attention_flops

    tokens = torch.ones(4096, dtype=torch.int32)
    step = 2000
    window = schedule.window_blocks_at(step, RECORD18)
    pairs = lambda blocks: sum(min(p, 128 * blocks) + 1 for p in range(4096))  # noqa: E731
    wanted = 14 * 1024 * (4 * pairs(window) + 12 * pairs(schedule.short_window(window, RECORD18)))
    assert attention_flops(RECORD18, [tokens], step) == wanted


def test_tokens_layers_and_bits_tell_on_the_parts_that_they_concern():
    small, full = (projection(RECORD18).step_ms(step) for step in (0, 4000))
    for name in ("MLP", "head and loss", "attention projections", "norms, mixes, embeddings"):
        assert small[name] == pytest.approx(full[name] / 4)
    for name in ("Muon", "AdamW", "messages not hidden"):
        assert small[name] == full[name]
    assert full["attention projections"] == pytest.approx(
        projection(MEDIUM).step_ms(0)["attention projections"] * 16 / 15
    )
    eight = dataclasses.replace(RECORD18, products="fp8_head")
    assert projection(eight).head_ms() < 0.75 * projection(RECORD18).head_ms()
    rare = dataclasses.replace(RECORD18, adam_every=1)
    assert projection(rare).sent_bytes() > projection(RECORD18).sent_bytes()


def test_rows_of_ngrams_are_bytes_and_a_preset_of_its_own_rehearsal_is_that():
    """The most that can be: two rows a token, there and their gradients back, of which an eighth stays."""
    frontier = train_gpt.parse_config(["--preset=frontier"])
    last, first = (projection(frontier).ngram_bytes(step) for step in (4000, 0))
    assert last == 2 * 2 * 65536 * 1024 * 2 * 7 / 8 == 4 * first
    without = dataclasses.replace(frontier, ngram_rows=0)
    assert projection(without).ngram_bytes(0) == 0
    assert projection(without).streams_ms() < projection(frontier).streams_ms()
    parts = dict.fromkeys(kept("medium")["projection"]["parts"], 1.0)
    own = project.Projection(frontier, frontier, parts, 65536).step_ms(4000)
    assert own["norms, mixes, embeddings"] == own["MLP"] == own["attention inputs"] == 1.0


def counted(function, *shapes):
    """(streams read, streams written, whether it is linear in them) of a function of tensors, those in a list for one
    that gets several: a stream has as many elements as the first shape."""
    import math

    import torch

    generator = torch.Generator().manual_seed(1)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    size = math.prod(shapes[0])
    first, second = function(*given), function(*(2 * x for x in given))
    first, second = (x if isinstance(x, tuple) else (x,) for x in (first, second))
    written = sum(x.numel() for x in first) / size
    linear = all(torch.allclose(2 * one, two) for one, two in zip(first, second))
    return sum(x.numel() for x in given) / size, written, linear


def test_passes_over_the_stream_are_what_the_lines_read_and_write():
    """Each function on tensors: what goes in and comes out that is as large as the stream."""
    import torch

    from trainer import gating, techniques
    from trainer.ngram_table import NGramTable

    f3 = dataclasses.replace(train_gpt.parse_config(["--preset=f3"]), model_dim=32, num_heads=2, dtype="float32")
    x, heads, S = (1, 6, 32), (1, 6, 2, 16), project.STREAMS
    alone = lambda passed: (passed.reads, passed.writes, passed.linear)  # noqa: E731
    assert counted(techniques.norm, x) == alone(S["norm_before_attention"])
    gate = torch.full((1, 16), 0.3, dtype=torch.float64)
    assert counted(lambda e: techniques.smeared(e, None, gate, torch.ones(())), x) == alone(S["smear"])
    assert counted(techniques.offset_keys, heads) == counted(techniques.interleaved, heads) == alone(S["key_offset"])
    assert alone(S["paired_heads"]) == alone(S["key_offset"])
    gated = S["output_gates"]
    found = counted(lambda o, v: techniques.exclusive(o, v, torch.ones(2, dtype=torch.float64)), heads, heads)
    assert found[:2] == (gated.reads + S["xsa"].reads, gated.writes + S["xsa"].writes)
    skips = techniques.DynamicSkips(f3).double()
    with torch.no_grad():
        skips.reset_parameters()
        skips.out_w.normal_(generator=torch.Generator().manual_seed(2))
    before = counted(lambda *given: skips.before_last(*given)[:2], x, x, x)
    late = lambda a, b, c, d, e, table: skips.before_head(a, b, {4: c, 11: d, 14: e}, 15, table)  # noqa: E731
    after = counted(late, *[x] * 6)
    assert (before[0] + after[0] + 1, before[1] + after[1]) == (S["dynamic_skips"].reads, S["dynamic_skips"].writes)
    assert not before[2] and not after[2] and not S["dynamic_skips"].linear
    ids = torch.arange(6)[None]
    table = NGramTable(dataclasses.replace(f3, ngram_rows=64), torch.float64)
    both = counted(lambda one, two: table.joined(ids, torch.stack([one, two], -2)), x, x)
    assert (both[0] + 2 + 1, both[1] + 2, both[2]) == alone(S["ngram_rows"])  # two look-ups, and the bigram's row
    assert (gating.REACH, 2 * gating.REACH * 8 / 1024) == (112, 1.75)
    assert S["head_mixing"].reads == 1 + 2 + 2 + 1 + 1.75 and S["head_mixing"].writes == 1 + 1.75 + round(1.75 / 8, 2)
    assert {name: passed.count for name, passed in S.items() if passed.per != "step"} == {
        "norm_before_attention": 5, "output_gates": 5, "bigram_rows": 3, "xsa": 3, "key_offset": 4, "paired_heads": 4,
        "untied_values": 3,
    }  # fmt: skip


def test_narrow_heads_and_sampled_classes_cost_less():
    """At a window of one token every query has one pair, and a narrow layer 8 of 14 FLOPs at half the width."""
    import torch

    from bench.step import attention_flops

    tokens = torch.ones(512, dtype=torch.int32)
    narrow = dataclasses.replace(RECORD18, narrow_qk=64, narrow_qk_layers="0,1")
    whole, less = (attention_flops(c, [tokens], 4000) for c in (RECORD18, narrow))
    pairs = sum(range(1, 513))  # of each of the 16 layers, whose windows hold the whole sequence
    assert whole == 16 * 14 * 1024 * pairs and whole - less == 2 * 8 * 512 * pairs
    assert attention_flops(dataclasses.replace(narrow, narrow_qk=96), [tokens], 4000) == whole  # filled up to 128
    assert project.weights_of(RECORD18).projections - project.weights_of(narrow).projections == 2 * 2 * 512 * 1024
    sampled = dataclasses.replace(RECORD18, sampled_softmax="12576")  # a quarter of the classes
    early, late = (projection(sampled).step_ms(step)["head and loss"] for step in (4000, 4600))
    assert early == pytest.approx(late / 4)


def test_steps_are_argued_from_the_effects():
    told = project.argued({"steps": 1000, "calibrated_seconds": 200.0})
    least, most = (sum(effect[i] for effect in project.EFFECTS) for i in (1, 2))
    assert [row["steps"] for row in told] == [
        1000,
        round(1000 - 500 * least),
        round(1000 - 500 * most),
        round(1000 - 1000 * most),
    ]
    assert told[-1]["calibrated s"] == round(0.2 * told[-1]["steps"])
    fields = {name.strip() for effect in project.EFFECTS for name in effect[0].split(",")}
    f3, frontier = (train_gpt.parse_config([f"--preset={name}"]) for name in ("f3", "frontier"))
    assert all(getattr(f3, name) != getattr(frontier, name) for name in fields)


def test_a_run_is_the_sum_of_its_steps():
    config = dataclasses.replace(RECORD18, num_iterations=24, extension_steps=0)
    one = projection(config)
    told = one.run()
    assert told["seconds"] == pytest.approx(sum(sum(one.step_ms(step).values()) for step in range(24)) / 1e3)
    assert list(told["ms"]) == [131072, 262144, 393216, 524288]


def test_pages_say_what_files_and_presets_say(capsys, tmp_path):
    assert project.main(["--check"]) == 0 and schedules.main(["--check"]) == 0
    edited = tmp_path / "projection.md"
    edited.write_text(project.PAGE.read_text("utf-8").replace("1412", "1411", 1), "utf-8")
    assert project.main(["--check", "--page", str(edited)]) == 1
    assert "out of date" in capsys.readouterr().out
