"""What is settled before a GPU is touched: cuBLAS's workspace for --deterministic, and widths that no kernel has."""

import os

import pytest
import torch

import train_gpt
from trainer import implementations
from trainer.processes import choose_device


def test_deterministic_gives_cublas_its_workspace_before_torch_is_asked(monkeypatch):
    """cuBLAS reads the variable once, and torch refuses the first product without it; a user's own stays."""
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda on: asked.append((on, os.environ[name])))
    name = "CUBLAS_WORKSPACE_CONFIG"
    monkeypatch.setenv(name, "")  # so that it is restored, whatever it was
    for before, after in ((None, ":4096:8"), (":16:8", ":16:8")):
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
        choose_device("cpu", True)
        assert asked.pop() == (True, after)


@pytest.mark.parametrize("heads, width", [(2, 48), (4, 24)])
def test_a_head_width_that_no_kernel_has_is_refused_at_start(heads, width, monkeypatch, capsys, tmp_path):
    """As on a GPU, where the kernels run: the command names both fields and what to do, and leaves nothing behind."""
    monkeypatch.setattr(implementations, "running", lambda *_: {"attention": "triton"})
    words = ["--preset=nano", "--device=cpu", "--model_dim=96", f"--num_heads={heads}", f"--output_dir={tmp_path}"]
    assert train_gpt.main(words) == 2
    told = capsys.readouterr().err
    assert f"--model_dim / --num_heads = {width}" in told and "widths 16, 32, 64 and 128" in told
    assert "impl='reference'" in told and not list(tmp_path.iterdir())
    implementations.check_device("auto", 64, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("kernels, width, widths", [("specialised", 64, "128"), ("gluon", 32, "64 and 128")])
def test_a_kernel_for_hopper_is_refused_at_a_head_width_that_it_is_not_for(
    kernels, width, widths, monkeypatch, capsys, tmp_path
):
    """The command names what is asked for and what to choose; nothing is swapped in silence."""
    monkeypatch.setattr(implementations, "running", lambda *_: {"attention": kernels})
    words = ["--preset=nano", "--device=cpu", f"--model_dim={2 * width}", "--num_heads=2", f"--output_dir={tmp_path}"]
    assert train_gpt.main([*words, f"--kernels={kernels}"]) == 2
    told = capsys.readouterr().err
    assert f"--kernels={kernels} --model_dim / --num_heads = {width}" in told
    assert f"for head widths of {widths}, not {width}; choose 'triton'" in told and not list(tmp_path.iterdir())
