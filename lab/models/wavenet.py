"""Rung 4: the hierarchical network. Instead of squashing the whole context at once, neighbours are fused two
by two (van den Oord et al. 2016, WaveNet, without the gates): n = 2^k tokens take k layers, each halving the
time axis.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lab import LabError
from lab.models.base import LanguageModel, windows
from lab.models.batchnorm import BatchNorm1d, init_linear_, through
from trainer.options import setting


@dataclass(frozen=True)
class WaveNetFields:
    """Settings of the hierarchical network."""

    context: int = setting(8, "tokens", "read at every place, a power of two", at_least=2, at_most=1024)
    embedding_dim: int = setting(24, "width", "of a token's vector", at_least=1, at_most=8192)
    hidden_dim: int = setting(128, "units", "a layer", at_least=1, at_most=65536)
    dropout: float = setting(0.0, "fraction", "of units silenced in training", at_least=0, below=1)


class FuseNeighbours(nn.Module):
    """(B, T, n, C) -> (B, T, n/2, 2C): two neighbours become one place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-2, (x.shape[-2] // 2, 2)).flatten(-2)


class WaveNet(LanguageModel):
    """Embeddings, then log2(context) layers of fuse, linear, batch norm, tanh; then logits."""

    def __init__(self, vocab_size: int, fields: WaveNetFields):
        super().__init__()
        depth = fields.context.bit_length() - 1
        if 2**depth != fields.context:
            raise LabError(f"context is {fields.context}; the hierarchical network needs a power of two from 2 on")
        self.vocab_size, self.context = vocab_size, fields.context
        self.embedding = nn.Embedding(vocab_size, fields.embedding_dim)
        layers: list[nn.Module] = []
        width = fields.embedding_dim
        for _ in range(depth):
            linear = nn.Linear(2 * width, fields.hidden_dim, bias=False)
            init_linear_(linear.weight, "kaiming")
            layers += [FuseNeighbours(), linear, BatchNorm1d(fields.hidden_dim), nn.Tanh()]
            layers += [nn.Dropout(fields.dropout)] if fields.dropout else []
            width = fields.hidden_dim
        self.layers = nn.Sequential(*layers)
        self.output = nn.Linear(width, vocab_size)
        with torch.no_grad():
            self.output.weight *= 0.1
            self.output.bias.zero_()

    def logits(self, idx_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        e_BTNE = self.embedding(windows(idx_BT, self.context))
        return self.output(through(self.layers, e_BTNE, counted_BT).squeeze(-2))

    def token_embeddings(self) -> list[nn.Module]:
        return [self.embedding]

    def activations(self) -> list[tuple[str, nn.Module]]:
        tanhs = [m for m in self.layers if isinstance(m, nn.Tanh)]
        return [(f"tanh {i + 1}", m) for i, m in enumerate(tanhs)]
