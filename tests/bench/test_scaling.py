"""Counted bytes and FLOPs against sums that are done by hand here."""

import json

import pytest

from bench import scaling


@pytest.fixture(scope="module")
def parts():
    return scaling.model_parts()


def test_products_are_those_of_the_reference(parts):
    """97.8 TFLOP on 65,536 tokens: MLP 52.8, projections 24.7, head 20.3."""
    flops = {name: value * 65536 / 1e12 for name, value in scaling.product_flops_per_token(parts[1]).items()}
    assert flops == pytest.approx({"MLP": 52.8, "attention projections": 24.7, "head": 20.3}, abs=0.06)


def test_state_adds_up(parts):
    matrices = 15 * 4 * 1024**2 + 16 * 8 * 1024**2
    tables, head = 7 * 50257 * 1024, 50304 * 1024
    wanted = matrices * (2 + 2 + 4 + 2) + tables * (2 + 2 * 2 + 2) + head * (4 + 2 * 4 + 4)
    assert sum(scaling.memory_bytes(parts[1]).values()) == wanted


@pytest.mark.parametrize("gpus", scaling.GPUS)
def test_bytes_grow_with_the_ring_and_work_falls_with_the_tokens(parts, gpus):
    config, parameters = parts
    one = scaling.count(gpus, parameters, config, rows=50257)
    assert one["tokens_per_gpu"] * gpus == config.tokens_per_step
    whole = 2 * (gpus - 1) / gpus * 7 * 50257 * 1024 * 2
    assert one["bytes_plain"]["tables"] == pytest.approx(whole) == pytest.approx(one["bytes_overlap"]["tables"])
    half = scaling.count(gpus, parameters, config, rows=50257 // 2)
    assert half["bytes_overlap"]["tables"] == pytest.approx(whole / 2, rel=1e-4)
    assert one["tflop_orthogonalisation_busiest_owner"] >= one["tflop_orthogonalisation_all"] / gpus
    predicted = scaling.predicted(one)
    for link in predicted["links"].values():
        assert link["hidden_ms"] == max(predicted["compute_ms"], link["send_ms"]) <= link["exposed_ms"]


def test_the_page_is_the_one_that_the_numbers_give(repo):
    kept = json.loads(scaling.RESULT.read_text())
    assert scaling.page(kept) == (repo / "docs" / "scaling.md").read_text()
    again = json.loads(json.dumps(scaling.result(kept["rows"])))
    assert again == kept, "the model or its communication changed: python -m bench.scaling"
