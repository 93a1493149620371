"""The step benchmark: counted FLOPs and bytes against literal counts, and one small run of everything."""

import dataclasses
import json

import pytest
import torch

import train_gpt
from bench import step
from trainer import schedule

TINY = (
    "--preset=nano --num_layers=2 --model_dim=32 --num_heads=2 --unet_skips= --long_window_layers=0 "
    "--attention_free_layers= --train_seq_len=256 --tokens_per_step=512 --vocab_size=256 --device=cpu"
).split()


@pytest.fixture
def config():
    return train_gpt.parse_config(TINY)


def test_products_are_counted_as_torch_counts_them(config):
    """FLOPs of projections, MLP and head together, against torch's own counter over the parts as they run."""
    from torch.utils.flop_counter import FlopCounterMode

    trainer = train_gpt.Trainer(config, torch.device("cpu"))
    tokens = step.draw_documents(256, 256, 0)
    parts = {p.name: p for p in step.parts_of(trainer, tokens, config.num_iterations - 1)}
    for name in ("attention projections", "MLP"):
        part = parts[name]
        # The backward of the benchmark's own slice is no product, so torch counts QKV and O alone.
        with FlopCounterMode(display=False) as counter:
            part.run()
        assert counter.get_total_flops() * part.count == part.flops, name
    # The CPU's head works in chunks and may recompute logits: never less than the mathematics.
    with FlopCounterMode(display=False) as counter:
        parts["head and loss"].run()
    assert counter.get_total_flops() >= parts["head and loss"].flops
    weights = sum(p.flops for n, p in parts.items() if n in ("attention projections", "MLP", "head and loss"))
    assert weights == train_gpt.flops_per_token(trainer.model) * 256


def test_attention_is_counted_by_allowed_pairs(config):
    tokens = step.draw_documents(256, 256, 0, seed=3)
    document = (tokens == 0).cumsum(0)
    last = config.num_iterations - 1
    long = schedule.window_blocks_at(last, config)
    total = 0
    for blocks in (long, long // 2):
        for i in range(256):
            for j in range(i + 1):
                near = i // config.block_tokens - j // config.block_tokens < max(blocks, 1)
                total += bool(document[i] == document[j]) and near
    assert step.attention_flops(config, [tokens], last) == 14 * config.model_dim * total


def test_floors_follow_the_rates():
    part = step.Part("MLP", flops=2e12, bytes=1e9)
    assert part.floor_ms(1e12, 1e12) == pytest.approx(2000)
    assert part.floor_ms(1e15, 1e9) == pytest.approx(1000)
    head = dataclasses.replace(part, name="head and loss")
    assert head.floor_ms(1e12, 1e9) == pytest.approx(3000), "products, then logits written and read"


def test_drawn_documents_look_like_documents():
    tokens = step.draw_documents(200_000, 50257, 50256)
    assert tokens.dtype == torch.int32 and int(tokens[0]) == 50256 and int(tokens.max()) <= 50256
    mean = 200_000 / int((tokens == 50256).sum())
    assert 500 < mean < 900
    assert torch.equal(tokens, step.draw_documents(200_000, 50257, 50256)), "the same every time"


def test_the_breakdown_adds_up_and_changes_nothing(config):
    def trained(measured):
        trainer = train_gpt.Trainer(config, torch.device("cpu"))
        batches = step.make_batches(config, 2, trainer.device, None)
        if measured:
            pieces = step.breakdown(trainer, 3, batches, repeats=1)
            assert set(pieces) == {"forward", "backward", "AdamW", "Muon", "rest"}
            assert all(p["median_ms"] > 0 for p in pieces.values())
        else:
            trainer.step(3, batches)
        assert "step" not in vars(trainer.muon), "the trainer is as it was"
        return trainer.state()

    plain, measured = trained(False), trained(True)
    assert all(torch.equal(plain[name], measured[name]) for name in plain)


def test_the_command_measures_everything_once(tmp_path, capsys):
    assert step.main([*TINY, "--repeats=1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    record = json.loads((tmp_path / "step-nano-cpu.json").read_text())
    result = record["result"]
    assert [row["at"] for row in result["whole_step"]] == ["start", "middle", "end"]
    for row in result["whole_step"]:
        assert row["tokens_per_s"] == pytest.approx(512 / row["median_ms"] * 1e3)
        assert 0 < row["mfu_of_measured_ceiling"]
    rows = result["parts_at_end_one_sequence"]
    assert all(row["floor_ms"] > 0 and row["measured_ms"] > 0 for row in rows) and len(rows) == 10
    assert result["peak_memory_mib"] > 10 and "over_floor" in out
    assert step.main(["--num_iteration=3"]) == 2
    assert "did you mean --num_iterations" in capsys.readouterr().err
