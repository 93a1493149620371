"""AdamW for the blocks' matrices, in Muon's place: torch's own in float64 is the truth; then as users enter."""

import pytest
import torch
from small_runs import folder_of, in_worlds, losses, tokens
from torch import nn

import train_gpt
from trainer.adam import MatrixAdamW
from trainer.options import UsageError
from trainer.schedule import learning_rate_factor

STEPS = 6


def trained(dtype, truth=False):
    """Weights after six steps on drawn gradients, float64: ours of `dtype` (with its mantissa), or torch's."""
    config = train_gpt.Config(
        matrix_optimizer="adamw", muon_lr=0.02, muon_weight_decay=0.3, adam_beta1=0.7, adam_beta2=0.9,
        num_iterations=STEPS, dtype=dtype, adam_eps=1e-6,
    )  # fmt: skip
    random = torch.Generator().manual_seed(0)
    drawn = [torch.randn(n, 8, generator=random).to(getattr(torch, dtype)) for n in (8, 16)]
    weights = {f"blocks.{i}": nn.Parameter(w.double() if truth else w.clone()) for i, w in enumerate(drawn)}
    how = dict(betas=(0.7, 0.9), eps=1e-6, weight_decay=0.3)
    ours = torch.optim.AdamW(weights.values(), **how) if truth else MatrixAdamW(weights, config, "auto")
    for step in range(STEPS):
        for w in weights.values():
            w.grad = torch.randn(w.shape, generator=random).to(w.dtype) * (1 + step)
        if truth:
            for group in ours.param_groups:
                group["lr"] = 0.02 * learning_rate_factor(step, config)
            ours.step()
        else:
            ours.step(step)
    if truth or dtype == "float32":
        return [w.detach().double() for w in weights.values()]
    whole = lambda n, w: (w.view(torch.int16).int() << 16) | (ours.mantissa[n].int() & 0xFFFF)  # noqa: E731
    return [whole(n, w.detach()).view(torch.float32).double() for n, w in weights.items()]


def test_against_torch_in_float64():
    for ours, truth in zip(trained("float32"), trained("float32", truth=True), strict=True):
        assert (ours - truth).abs().max() < 2e-6


def test_bfloat16_weights_are_float32_masters():
    """The gradients are rounded to bfloat16, so the truth gets the same ones; the weights are float32 throughout."""
    for ours, truth in zip(trained("bfloat16"), trained("bfloat16", truth=True), strict=True):
        assert (ours - truth).abs().max() > 1e-5  # the truth's gradients were not rounded
        assert (ours - truth).abs().max() < 2e-3


def test_two_processes_save_and_resume(tmp_path):
    """Each process updates its share of the matrices; a run that goes on has the losses of one that was whole."""
    few = [part % 200 for part in (tokens(4000), tokens(1500, 1))]
    data = folder_of(tmp_path / "data", few[0], val=few[1])
    words = dict(
        vocab_size=256, eos_id=0, num_layers=2, model_dim=32, num_heads=2, value_embeddings=0, unet_skips="",
        attention_free_layers="", long_window_layers="0", tokens_per_step=256, train_seq_len=128, val_seq_len=256,
        val_tokens=512, val_loss_every=2, num_iterations=4, checkpoint_every=2, keep_checkpoints=0, warmup_steps=1,
        log_train_loss=True, device="cpu", train_files=f"{data}/train_*.bin", val_files=f"{data}/val_*.bin",
        output_dir=tmp_path, matrix_optimizer="adamw", muon_lr=0.01, embed_lr=0.05,
    )  # fmt: skip
    again = [
        [0, f"{tmp_path}/two.txt", f"{tmp_path}/two.first.txt"],
        [0, f"{tmp_path}/two.checkpoints/step-000004.safetensors"],
        [2, "--run_name=two", "--resume=auto"],
    ]
    in_worlds([f"--{name}={value}" for name, value in words.items()], [[2, "--run_name=two"], *again])
    first, second = losses(tmp_path / "two.first.txt"), losses(tmp_path / "two.txt")
    assert [row[2] for row in first] == [row[2] for row in second] and len(first) > 4
    assert float(first[-1][2]) < float(first[0][2]) - 0.02


def test_muons_own_fields_are_refused():
    with pytest.raises(UsageError, match="is Muon's: not with --matrix_optimizer=adamw"):
        train_gpt.parse_config(["--preset=nano", "--matrix_optimizer=adamw", "--normuon_beta2=0.9"])
