"""The projection of whole runs, and the page of schedules: what is counted, and that pages say what files say."""

import dataclasses

import pytest

import train_gpt
from bench import effects, project, schedules
from bench.rehearse.page import kept
from trainer import schedule

MEDIUM = train_gpt.parse_config(["--preset=medium"])
RECORD18 = train_gpt.parse_config(["--preset=record18"])


def step_of(config, parts=None):
    """A rehearsed step of `config` with medium's parts, or these."""
    rehearsed = kept("medium")
    return project.Step(config, parts or rehearsed["projection"]["parts"], rehearsed["tokens"])


def projection(config, rehearsed=MEDIUM, parts=None):
    return project.Projection(config, step_of(rehearsed, parts))


def test_weights_are_counted_from_the_model():
    D, V, padded = 1024, 50257, 50304
    assert project.weights_of(MEDIUM) == project.Weights(
        mlp=16 * 8 * D * D, projections=15 * 4 * D * D, head=padded * D, tables=7 * V * D, values=5 * V * D, bigram=0
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
    rare = dataclasses.replace(RECORD18, adam_every=1)
    assert projection(rare).sent_bytes(0) > projection(RECORD18).sent_bytes(0)


def test_rows_of_ngrams_are_bytes_and_a_preset_of_its_own_rehearsal_is_that():
    """The most that can be: two rows a token, there and their gradients back, of which an eighth stays."""
    frontier = train_gpt.parse_config(["--preset=frontier"])
    last, first = (projection(frontier).ngram_bytes(step) for step in (4000, 0))
    assert last == 2 * 2 * 65536 * 1024 * 2 * 7 / 8 == 4 * first
    without = dataclasses.replace(frontier, ngram_rows=0)
    assert projection(without).ngram_bytes(0) == 0
    assert projection(without).streams_ms() < projection(frontier).streams_ms()
    parts = dict.fromkeys(kept("medium")["projection"]["parts"], 1.0)
    own = projection(frontier, frontier, parts).step_ms(4000)
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

    from kernels import heads as of_heads
    from trainer import gating, techniques
    from trainer.ngram_table import NGramTable

    f3 = dataclasses.replace(train_gpt.parse_config(["--preset=f3"]), model_dim=32, num_heads=2, dtype="float32")
    x, heads, S = (1, 6, 32), (1, 6, 2, 16), project.STREAMS
    alone = lambda passed: (passed.reads, passed.writes, passed.linear)  # noqa: E731
    assert counted(techniques.norm, x) == alone(S["norm_before_attention"])
    gate = torch.full((1, 16), 0.3, dtype=torch.float64)
    assert counted(lambda e: techniques.smeared(e, None, gate, torch.ones(())), x) == alone(S["smear"])
    assert counted(of_heads.offset_keys, heads) == counted(of_heads.interleaved, heads) == alone(S["key_offset"])
    assert alone(S["paired_heads"]) == alone(S["key_offset"])
    gated = S["output_gates"]
    found = counted(lambda o, v: of_heads.exclusive(o, v, torch.ones(2, dtype=torch.float64)), heads, heads)
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


def test_narrow_heads_cost_less():
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


def test_tables_that_update_less_often_cost_less():
    """From 28 % of the run on value embeddings and bigram table update every 8th step in place of every second."""
    f2 = train_gpt.parse_config(["--preset=f2"])
    rare = dataclasses.replace(f2, adam_period=8, num_iterations=4624)
    one, other = projection(f2), projection(rare)
    early, late = 1000, 2000
    assert one.step_ms(early)["AdamW"] == other.step_ms(early)["AdamW"] == one.step_ms(late)["AdamW"]
    w, V, D = one.own, 50304, 1024
    slow, fast = 5 * V * D + 251_520 * D, V * D + 2 * V * D
    assert (slow, fast) == (w.values + w.bigram, w.head + w.tables - w.values)
    wanted = (slow / 8 + fast / 2) / ((slow + fast) / 2)
    assert other.step_ms(late)["AdamW"] == pytest.approx(wanted * one.step_ms(late)["AdamW"])
    saved = 2 * (0.611 * 5 * V * D + 0.2 * 251_520 * D) * (1 / 2 - 1 / 8)
    assert one.sent_bytes(late) - other.sent_bytes(late) == pytest.approx(saved)
    assert one.sent_bytes(early) == other.sent_bytes(early)


def test_narrow_inputs_are_narrow():
    """Of q, k and v in 15 layers two have q and k of half the width: 2 of their 3 streams."""
    narrow = dataclasses.replace(MEDIUM, narrow_qk=64, narrow_qk_layers="0,1")
    whole, less = (projection(c).step_ms(0)["attention inputs"] for c in (MEDIUM, narrow))
    assert less == pytest.approx(whole * (13 * 3 + 2 * 2) / (15 * 3))


def test_rows_of_sampled_classes_are_taken_and_put_back():
    sampled = dataclasses.replace(RECORD18, sampled_softmax="12576")
    whole, some = (projection(c).head_ms(1000) for c in (RECORD18, sampled))
    moved = (4 * 12576 + 2 * 50304) * 1024 * 2
    assert some == pytest.approx(whole / 4 + moved / 3.0e12 / 0.85 * 1e3)
    assert projection(sampled).head_ms(4600) == whole  # the run's end is over all classes


def test_what_comes_after_the_step_is_told_apart():
    from bench.rehearse.project import AVERAGE, ROWS, part_of

    def part(phase, kernel, kind="torch"):
        return part_of(dict(phase=phase, part=phase, kind=kind, kernel=kernel, bits=16))

    assert part("end", "aten.index_put_") == part("start", "aten.index.Tensor") == ROWS
    assert part("end", "aten.lerp_.Scalar") == AVERAGE
    assert part("backward", "aten.index.Tensor") == part("end", "aten.copy_") == "norms, mixes, embeddings"


def test_the_average_takes_the_end_of_a_run_and_rows_what_is_read_of_them():
    from bench.rehearse.project import AVERAGE, ROWS

    frontier = train_gpt.parse_config(["--preset=frontier"])
    parts = dict.fromkeys((*kept("medium")["projection"]["parts"], AVERAGE, ROWS), 7.0)
    own = projection(frontier, frontier, parts)
    assert [own.step_ms(step)[AVERAGE] for step in (0, 3849, 3850, 4149)] == [0.0, 0.0, 7.0, 7.0]
    rows = 2 * 65536 * 1024 * 2  # bytes of two rows a token, read and written by three operators
    assert own.step_ms(4000)[ROWS] == pytest.approx(6 * rows / 3.0e12 / 0.85 * 1e3) == 4 * own.step_ms(0)[ROWS]
    total = own.run()["parts_of_mean_step"][AVERAGE] * 4150
    assert total == pytest.approx(300 * 7.0)


def test_levers_are_no_larger_than_the_parts_that_they_pull():
    frontier, mean = project.config_of("frontier"), {"attention": 30.0, "norms, mixes, embeddings": 80.0}
    attention, norms = project.levers(frontier, {"steps": 1000, "parts_of_mean_step": mean}, 0.5).values()
    assert 0 < attention < 0.5 * 30 and 0 < norms < 0.5 * 80
    ms, tflops = project.gluon_ms(frontier, 30.0)
    assert attention == pytest.approx(0.5 * (30 - ms)) and 30 * 230 / tflops == pytest.approx(ms) and ms < 30


# ---- whose step it is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["medium", "record18", "f2", "f3"])
def test_products_of_the_published_runs_are_those_of_the_mathematics(preset):
    """What is shared out by weights is all that was counted: 6 FLOPs a weight and token, but for networks' and gates'.
    Of the loss, four passes over all logits are for ours in chunks."""
    step, name = project.published_step(preset)
    told = kept("reference" if name == "medium" else f"reference-{name}")
    w, parts = project.weights_of(project.config_of(name)), told["projection"]["parts"]
    weights, products = w.mlp + w.projections + w.head, parts["attention projections"]
    assert products == pytest.approx(6 * weights * told["tokens"] / (0.87 * 798e9), rel=0.02)
    passes = 65536 * 50304 * 2 / (0.8 * 3.0e9)  # ms of reading all logits once, in 16 bits
    less = parts["norms, mixes, embeddings"] - step.parts["norms, mixes, embeddings"]
    assert 8 * passes < less < 12 * passes
    messages = "messages not hidden"
    assert step.parts[messages] == project.our_step(name)[0].parts[messages]
    if preset in ("medium", "record18"):
        head = products * w.head / weights + 4 * passes
        assert step.parts["head and loss"] == pytest.approx(head, rel=0.01)
        both = [sum(ms for part, ms in told.items() if part != messages) for told in (parts, step.parts)]
        assert both[0] - both[1] == pytest.approx(less - 4 * passes, rel=0.01)
    else:
        assert step.parts["head and loss"] == project.our_step(preset)[0].parts["head and loss"]


def test_the_reference_run_alone_calibrates():
    told = project.json.loads(project.FILE.read_text())
    runs = told["published"]
    assert runs["medium"]["calibrated_seconds"] == pytest.approx(1412.4) and abs(runs["medium"]["error"]) < 1e-9
    assert told["calibration"] == pytest.approx(1412.4 / runs["medium"]["seconds"])
    for name in ("record18", "f2", "f3"):
        assert runs[name]["error"] == pytest.approx(
            runs[name]["seconds"] * told["calibration"] / project.PUBLISHED[name]["seconds"] - 1
        )
    for run in told["ours"].values():
        assert run["calibrated_seconds"] == pytest.approx(run["seconds"] * told["calibration"])


def test_eight_bits_cost_what_was_counted_of_them():
    plain, whole = (kept(name)["projection"]["parts"] for name in ("medium", "medium-fp8"))
    for part, ms in project.in_8_bits(plain, MEDIUM, "fp8").items():
        assert ms == pytest.approx(whole.get(part, 0.0), abs=1e-9), part
    assert project.in_8_bits(plain, MEDIUM, "bf16") == pytest.approx(
        plain | dict.fromkeys(whole.keys() - plain.keys(), 0.0)
    )
    head = project.in_8_bits(plain, MEDIUM, "fp8_head")
    assert head["head and loss"] == whole["head and loss"] and head["MLP"] == plain["MLP"]
    whose_head_was = project.in_8_bits(plain, project.config_of("f3"), "fp8")
    assert whose_head_was["head and loss"] == plain["head and loss"] and whose_head_was["MLP"] == pytest.approx(
        whole["MLP"]
    )
    mlp, share = project.in_8_bits(plain, MEDIUM, "fp8_mlp"), 16 * 8 / (16 * 8 + 15 * 4)
    assert mlp["MLP"] == pytest.approx(plain["MLP"] + share * (whole["MLP"] - plain["MLP"]))


def test_a_preset_without_a_rehearsal_has_that_of_the_one_it_comes_from(monkeypatch):
    have = {name: kept(name) for name in ("medium", "medium-fp8", "f3", "reference")}
    monkeypatch.setattr(project, "kept", have.get)
    step, name = project.our_step("frontier")
    assert name == "f3" and step.config == project.config_of("f3")
    assert step.parts["MLP"] < have["f3"]["projection"]["parts"]["MLP"] / 2  # the products are in 8 bits
    assert project.our_step("micro")[1] == "medium"
    have["f3"] = have["f3"] | {"products": "bf16"}
    with pytest.raises(ValueError, match="rehearse it again"):
        project.our_step("f3")
    have["reference-record18"] = kept("reference-record18")
    assert project.published_step("f2")[1] == "record18"
    del have["medium"], have["f3"]
    with pytest.raises(FileNotFoundError, match=r"rehearsal-medium\.json is missing"):
        project.our_step("f3")


# ---- how many steps -------------------------------------------------------------------------------------------------


def test_effects_are_of_what_frontier_has_and_f3_has_not():
    """Each field in which they differ has its line, in docs/frontier.md and with its source in `explain` too."""
    from trainer.explain import SOURCES

    f3, frontier = (train_gpt.parse_config([f"--preset={name}"]) for name in ("f3", "frontier"))
    differ = {f.name for f in dataclasses.fields(f3) if getattr(f3, f.name) != getattr(frontier, f.name)} - {"preset"}
    named = {name.strip() for effect in effects.EFFECTS for name in effect.fields.split(",")}
    assert named == differ
    assert named <= SOURCES.keys()
    told = (project.REPO / "docs" / "frontier.md").read_text("utf-8")
    assert all(f"`{name}" in told for name in named)


def test_a_loss_becomes_steps_at_both_ends_of_the_exchange_rate():
    assert (effects.steps_of(2.3, "least"), effects.steps_of(1.5, "most")) == pytest.approx((0.01, 0.01))
    assert (effects.steps_of(-1.5, "least"), effects.steps_of(-2.3, "most")) == pytest.approx((-0.01, -0.01))
    for effect in effects.EFFECTS:
        assert effect.least <= effect.most
        assert (effect.least < 0 and effect.most <= 0) or effect.least > 0


def test_steps_are_argued_from_the_effects():
    """Gains multiply, as often as they count; costs always count whole."""
    some = (
        effects.Effect("a", 0.1, 0.2, ""),
        effects.Effect("b", 0.05, 0.05, ""),
        effects.Effect("c", -0.03, -0.01, ""),
    )
    rows = [(row["steps"], row["s"]) for row in effects.argued(1000, 500.0, some)]
    wanted = [1.03, 0.95 * 0.975 * 1.03, 0.9 * 0.975 * 1.03, 0.9 * 0.95 * 1.03, 0.8 * 0.95 * 1.01]
    assert rows == [(round(1000 * share), round(500 * round(1000 * share) / 1000)) for share in wanted]
    half = effects.scale_needed(0.95 * 0.975 * 1.03, "least", some)
    assert half == pytest.approx(0.5, abs=1e-6)
    assert effects.scale_needed(0.1, "most", some) is None


def test_what_proxies_saw_is_read_from_their_studies(tmp_path):
    found = effects.proxies()
    (xsa, *_) = [row for row in found["xsa"] if row["study"] == "frontier-parts"]
    assert xsa["preset"] == "nano" and xsa["pairs"] == 8 and xsa["family_low"] < xsa["estimate"] < xsa["family_high"]
    assert "xsa on nano +0.0023 (-0.0091 to +0.0136), n 8" == effects.nats(xsa)
    row = dict(treatment="xsa", pairs=4, estimate=-0.5, family_low=-0.6, family_high=-0.4, verdict="helps")
    (tmp_path / "micro-frontier").mkdir()
    study = {
        "plan": {"preset": "micro", "flags": {"num_iterations": "100"}},
        "results": {"treatments": [row | {"steps_saved": 5.0}]},
    }
    (tmp_path / "micro-frontier" / "study.json").write_text(project.json.dumps(study))
    (only,) = effects.proxies(tmp_path)["xsa"]
    assert (only["study"], only["preset"], only["share"]) == ("micro-frontier", "micro", 0.05)
    (tmp_path / "micro-frontier" / "study.json").write_text(project.json.dumps(study | {"results": None}))
    assert effects.proxies(tmp_path) == {}


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
