"""Initial values by name: what two models of one seed have in common is equal, whatever else they have."""

import pytest
import torch

import train_gpt

SMALL = ["--preset=nano", "--num_iterations=4", "--value_embedding_context=1", "--second_embedding_context=1"]


def initial(*flags, seed=0):
    torch.manual_seed(seed)
    return dict(train_gpt.GPT(train_gpt.parse_config([*SMALL, *flags])).named_parameters())


def common(a, b):
    return [name for name in a if name in b and a[name].shape == b[name].shape]


@pytest.mark.parametrize(
    "flag, fewer_or_other",
    [
        ("--second_input_embedding=false", {"embed2.weight"}),
        ("--value_embeddings=0", {"value_embeds.0.weight"}),
        ("--value_embeddings=2", set()),
        ("--attention_free_layers=", set()),
        ("--attention_free_layers=0,2", {"blocks.0.qkvo_w", "blocks.2.qkvo_w"}),
        ("--mlp_ratio=2", {f"blocks.{i}.{w}" for i in range(4) for w in ("mlp_in_w", "mlp_out_w")}),
        ("--context_rows=4096", set()),
        ("--bigram_rows=512", set()),
        ("--dynamic_skips=0,1", set()),
    ],
)
def test_parameters_of_one_name_and_shape_begin_equal(flag, fewer_or_other):
    base, other = initial(), initial(flag)
    shared = common(base, other)
    assert fewer_or_other | {"scalars"} >= set(base) - set(shared)
    assert all(torch.equal(base[name], other[name]) for name in shared if name != "scalars")
    assert sum(base[name].count_nonzero() > 0 for name in shared) >= 4  # not only what starts at zero


def test_values_do_not_depend_on_narrow_queries():
    wide, narrow = initial(), initial("--narrow_qk=16")
    assert torch.equal(wide["blocks.0.qkvo_w"][2], narrow["blocks.0.vo_w"][0])
    assert narrow["blocks.0.qk_w"].unique().numel() > 0.9 * narrow["blocks.0.qk_w"].numel()


def test_every_draw_is_its_own_and_the_seed_s():
    first, second = initial(), initial(seed=1)
    drawn = [name for name in first if first[name].count_nonzero()]
    assert not any(torch.equal(first[name], second[name]) for name in drawn if name != "scalars")
    rows = torch.cat([first[f"blocks.{i}.mlp_in_w"] for i in range(4)] + [first["blocks.0.qkvo_w"][:3].flatten(0, 1)])
    alike = torch.corrcoef(rows.double()).fill_diagonal_(0).abs().max()
    assert alike < 0.75  # 64 numbers a row, some 1,200 rows: of a repeated draw it would be 1


def test_a_second_model_has_other_values():
    torch.manual_seed(0)
    config = train_gpt.parse_config(SMALL)
    one, two = (dict(train_gpt.GPT(config).named_parameters()) for _ in range(2))
    assert not torch.equal(one["blocks.0.mlp_in_w"], two["blocks.0.mlp_in_w"])


def test_as_wide_as_stated():
    drawn = initial("--value_init_std=0.5")
    width = drawn["blocks.0.mlp_in_w"].size(1)
    assert drawn["blocks.0.mlp_in_w"].std().item() * width**0.5 == pytest.approx(0.5, rel=0.05)
    assert drawn["blocks.0.qkvo_w"][:3].std().item() * width**0.5 == pytest.approx(0.5, rel=0.05)
    assert drawn["embed1.weight"].std().item() == pytest.approx(1, rel=0.05)
    assert drawn["value_embeds.0.weight"].std().item() == pytest.approx(0.5, rel=0.05)
