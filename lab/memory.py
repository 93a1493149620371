"""What would not fit into this machine is refused in words before it is tried: the system would end it without any."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lab import LabError
from trainer.checkpoints import WithoutValues

SURELY_SMALL = 10**8  # parameters that are not worth counting first
BYTES_A_PARAMETER = 16  # weight, gradient and two moments, float32 each
BYTES_AN_ACTIVATION = 8  # kept for the way back, and its gradient


def machine_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _width(fields: Any) -> int:
    """The widest of a model's layers."""
    names = ("hidden_dim", "model_dim", "embedding_dim")
    return max((int(getattr(fields, name)) for name in names if hasattr(fields, name)), default=1)


def refuse_too_large(name: str, vocab_size: int, fields: Any, build: Callable[[], nn.Module]) -> None:
    """LabError for a model that cannot be trained here. Where a rough bound does not settle it, `build` makes the model
    without memory behind it, and its parameters are counted."""
    width, context = _width(fields), getattr(fields, "context", 1)
    layers, ratio = getattr(fields, "num_layers", 1), getattr(fields, "mlp_ratio", 1)
    tables = 3 + getattr(fields, "value_embeddings", 0)
    if (8 + 2 * ratio + context) * layers * width**2 + tables * vocab_size * width < SURELY_SMALL:
        return
    with WithoutValues(), torch.device("meta"):
        count = sum(p.numel() for p in build().parameters())
    if (needed := count * BYTES_A_PARAMETER) > machine_bytes():
        raise LabError(
            f"{name} has {count:,} parameters with these settings: training takes {needed / 2**30:,.0f} GiB (weights, "
            f"gradients, two moments), and this machine has {machine_bytes() / 2**30:,.0f}. Lower its width or layers"
        )


def refuse_batch(batch_tokens: int, vocab_size: int, fields: Any) -> None:
    """LabError for a batch whose logits and hidden layers alone are more than this machine holds."""
    numbers = vocab_size + _width(fields) * getattr(fields, "num_layers", 1)
    if (needed := batch_tokens * numbers * BYTES_AN_ACTIVATION) > machine_bytes():
        raise LabError(
            f"--batch_tokens={batch_tokens}: a step takes more than {needed / 2**30:,.0f} GiB for logits and hidden "
            f"layers, and this machine has {machine_bytes() / 2**30:,.0f}. Lower it"
        )
