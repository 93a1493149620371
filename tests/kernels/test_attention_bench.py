"""bench.attention counts what it says it counts, and runs from the command line."""

import json

import pytest
import torch

from bench import attention as bench
from kernels.attention import allowed_pairs, attention_plan
from kernels.runtime import INTERPRETED


def test_pairs_are_those_of_the_mask():
    tokens = torch.randint(0, 30, (2, 300), generator=torch.Generator().manual_seed(0))
    for window in ({}, {"window_blocks": 1}, {"window_tokens": 9}):
        plan = attention_plan(tokens, eos_id=0, **window)
        assert bench.allowed_pair_count(plan) == int(allowed_pairs(plan).sum())
    assert bench.pass_flops(10, heads=2, width=8) == {"forward": 4 * 160, "backward": 10 * 160}


def test_random_documents_have_the_stated_lengths():
    tokens = bench.read_tokens(None, 1 << 23)
    lengths = (tokens == bench.EOS).nonzero().flatten().diff().float()
    assert 360 < lengths.median() < 440 and 620 < lengths.mean() < 760


def test_real_documents(shared_data):
    tokens = bench.read_tokens(str(shared_data / "tokens" / "val_000000.bin"), 65536)
    assert tokens.shape == (65536,) and 20 < int((tokens == bench.EOS).sum()) < 400
    plan = attention_plan(tokens, eos_id=bench.EOS, window_blocks=27)
    pairs = bench.allowed_pair_count(plan) / 65536  # keys a token; all of T would be 32,768
    assert 300 < pairs < 27 * 128


def test_too_short_a_shard_is_said(shared_data):
    with pytest.raises(SystemExit, match="are needed"):
        bench.read_tokens(str(shared_data / "tokens" / "val_000000.bin"), 10**9)


def test_fit_finds_a_line():
    rows = [{"impl": "banded", "T_x_window": x * 1e6, "median_ms": 2 + 3 * x} for x in (1, 2, 4, 8)]
    line = bench.fit([*rows, {"impl": "reference", "T_x_window": 1e6, "median_ms": 1e9}])
    assert line["fixed_ms"] == pytest.approx(2) and line["ms_per_million_T_x_window"] == pytest.approx(3)
    assert line["median_relative_error"] == pytest.approx(0, abs=1e-9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is not measured only where there is no GPU")
def test_command_on_a_cpu(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        assert (
            bench.main(
                [
                    "--cpu-lengths",
                    "128,256",
                    "--cpu-windows",
                    "1,2",
                    "--repeats",
                    "1",
                    "--heads",
                    "1",
                    "--width",
                    "16",
                    "--out",
                    str(tmp_path),
                ]
            )
            == 0
        )
    finally:
        torch.set_num_threads(threads)
    assert "not measured: no GPU" in capsys.readouterr().out
    rows = json.loads((tmp_path / "attention-cpu.json").read_text())["result"]["rows"]
    assert {(r["impl"], r["T"], r["window_blocks"]) for r in rows} >= {("banded", 256, 2), ("reference", 128, 1)}
    assert (tmp_path / "attention-cpu.png").stat().st_size > 10_000
    assert bench.main(["--tune"]) == 0
    assert "not measured: no GPU (candidate tiles)" in capsys.readouterr().out


@pytest.mark.skipif(not INTERPRETED, reason="a rehearsal in the interpreter")
def test_rehearsal_of_the_gpu_parts(monkeypatch, tmp_path):
    """The GPU's own code path on tiny CPU tensors: every row is there, and FLOPs are those of the exact pairs."""
    from kernels.proof import machine_code

    monkeypatch.setattr(machine_code, "MANIFEST", tmp_path / "measured.json")
    monkeypatch.setattr(bench, "WINDOWS_TOKENS", (128,))
    monkeypatch.setattr(bench, "TUNE_WINDOWS_TOKENS", (256,))
    plain = {
        impl: (lambda plan, impl=impl: lambda *x: bench.attention(*x, plan, scale=0.1, impl=impl))
        for impl in ("triton", "banded")
    }
    monkeypatch.setattr(bench, "contestants", lambda plan: {impl: make(plan) for impl, make in plain.items()})
    tokens = torch.zeros(150, dtype=torch.int32)
    rows = bench.on_gpu(tokens, heads=1, width=16, repeats=1, sdpa_length=60)
    kinds = {(r["T"], r["window"], r["impl"], r["pass"]) for r in rows}
    assert len(kinds) == len(rows) == 2 * 2 + 2 * 2
    (row,) = [r for r in rows if (r["T"], r["window"], r["impl"], r["pass"]) == (60, 128, "triton", "forward")]
    assert row["tflops"] == pytest.approx(4 * (60 * 61 // 2) * 16 / row["median_ms"] / 1e9)
    monkeypatch.setattr(bench.module, "CANDIDATES", {k: ((64, 64, 4, 1),) for k in ("forward", "dq", "dkdv")})
    tiles = bench.tune(tokens, heads=1, width=16, repeats=1)
    assert len(tiles) == 3 * 2 and all(r["median_ms"] > 0 for r in tiles)
