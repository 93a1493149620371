"""A run that diverged ends with exit code 4, whichever implementation computes it: through the command line."""

import pytest
import torch

import train_gpt
from kernels.runtime import INTERPRETED

SMALL = (
    "--preset=nano --device=cpu --num_iterations=6 --num_layers=2 --unet_skips= --long_window_layers=0 --model_dim=32 "
    "--num_heads=1 --train_seq_len=64 --tokens_per_step=64 --val_seq_len=64 --val_tokens=64 --warmup_steps=0 "
    "--value_embeddings=0 --attention_free_layers= --save_final=false"
).split()
WAYS = ["auto", "reference", pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="interpreter"))]
PLACES = ("blocks.0.mlp_in_w", "blocks.1.qkvo_w", "scalars")


@pytest.fixture
def broken(monkeypatch):
    """Plants one NaN in a weight of every model that is made, where the name says."""

    def plant(name):
        whole = train_gpt.GPT.reset_parameters

        def reset(model):
            whole(model)
            with torch.no_grad():
                weight = dict(model.named_parameters())[name]
                weight.view(-1)[weight.numel() // 2] = torch.nan

        monkeypatch.setattr(train_gpt.GPT, "reset_parameters", reset)

    return plant


@pytest.mark.parametrize("kernels", WAYS)
@pytest.mark.parametrize("seen_in", ["training", "validation"])
def test_one_nan_weight_ends_the_run(broken, tmp_path, capsys, kernels, seen_in):
    """In training with its loss in the log, in validation (step 0) without."""
    broken("head_w" if seen_in == "validation" else "blocks.0.mlp_in_w")
    first = "--val_loss_every=0" if seen_in == "training" else "--val_loss_every=1"
    words = [*SMALL, f"--kernels={kernels}", f"--output_dir={tmp_path}", first]
    if seen_in == "validation":
        words.append("--log_train_loss=false")
    assert train_gpt.main(words) == 4
    told = capsys.readouterr().err
    assert f"{seen_in} loss" in told and "nan" in told, told


@pytest.mark.parametrize("place", PLACES)
def test_wherever_the_nan_lies(broken, tmp_path, place):
    broken(place)
    assert train_gpt.main([*SMALL, f"--output_dir={tmp_path}"]) == 4
