"""Rung 1: the bigram, twice. Counting pairs and training one layer reach the same distribution.

Counting: P(b | a) = (n_ab + s) / (sum_b n_ab + s V) with smoothing s. As a network: logits are row a of a V x
V table; its loss is minimised exactly by the (unsmoothed) counts, so the two must meet.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lab.models.base import IGNORE, LanguageModel
from trainer.options import setting


@dataclass(frozen=True)
class CountsFields:
    """Settings of the counted bigram."""

    smoothing: float = setting(
        1.0, "count", "added to every pair; 0 gives infinite loss on a pair never seen", at_least=0
    )


@dataclass(frozen=True)
class BigramFields:
    """Settings of the bigram network: none. Its table starts at zero, the uniform distribution."""


class CountedBigram(LanguageModel):
    """Counts of pairs, smoothed. `observe` is its training; it has no parameters, and its table is a buffer."""

    def __init__(self, vocab_size: int, fields: CountsFields):
        super().__init__()
        self.vocab_size, self.context, self.smoothing = vocab_size, 1, fields.smoothing
        self.register_buffer("counts_VV", torch.zeros(vocab_size, vocab_size))

    def observe(self, idx: Tensor, targets: Tensor) -> None:
        """Add the pairs (idx, target) to the counts; targets that are IGNORE are skipped."""
        keep = targets != IGNORE
        pairs = idx[keep] * self.vocab_size + targets[keep]
        self.counts_VV += torch.bincount(pairs, minlength=self.vocab_size**2).view_as(self.counts_VV)

    def probabilities(self) -> Tensor:
        """P(next | token), (V, V), rows sum to 1. A row never seen is uniform."""
        smoothed = self.counts_VV.double() + self.smoothing
        total = smoothed.sum(1, keepdim=True)
        uniform = torch.full_like(smoothed, 1.0 / self.vocab_size)
        return torch.where(total > 0, smoothed / total.clamp_min(1e-300), uniform)

    def logits(self, idx_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        return self.probabilities().log().float()[idx_BT]


class Bigram(LanguageModel):
    """The same table learned by gradient descent: one-hot times a weight matrix, which is a row lookup."""

    def __init__(self, vocab_size: int, fields: BigramFields):
        super().__init__()
        self.vocab_size, self.context = vocab_size, 1
        self.table = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.table.weight)

    def logits(self, idx_BT: Tensor, counted_BT: Tensor | None = None) -> Tensor:
        return self.table(idx_BT)

    def token_embeddings(self) -> list[nn.Module]:
        return [self.table]
