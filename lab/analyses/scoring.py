"""Scoring text under any checkpoint, in nats and in bits a byte, so that vocabularies compare."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from lab import LabError
from lab.checkpoints import Checkpoint
from lab.datasets import Tokens, pack_rows, tokenize_documents
from lab.train import evaluate


@dataclass(frozen=True)
class Score:
    """Loss of a model on a text. `bits_per_byte` charges 8 bits for every byte that the vocabulary lacks, so a model
    cannot gain by not knowing characters; a lossy vocabulary (words) understates it and says so."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int
    unknown_share: float
    unknown: dict[str, int]
    lossy: bool


def row_tokens_of(checkpoint: Checkpoint) -> int:
    """The row length that the checkpoint was trained with, or 1024 for one of train_gpt.py."""
    return int(checkpoint.told.get("row_tokens", 1024))


def limit_documents(documents: Sequence[str], chars: int) -> list[str]:
    """The first documents, `chars` characters in all; the last one is cut. 0: all."""
    if not chars:
        return list(documents)
    kept: list[str] = []
    left = chars
    for document in documents:
        kept.append(document[:left])
        left -= len(document)
        if left <= 0:
            break
    return kept


def unknown_characters(tokens: Tokens, documents: Sequence[str]) -> tuple[Counter, int]:
    """Characters that became UNKNOWN (one token a character), and their bytes."""
    text = "".join(documents)
    if len(text) != len(tokens.ids):
        return Counter(), 0
    missing = Counter(text[i] for i in np.flatnonzero(tokens.ids < 0))
    return missing, sum(len(c.encode("utf-8", "surrogatepass")) * n for c, n in missing.items())


def score(checkpoint: Checkpoint, documents: Sequence[str], strict: bool = True) -> Score:
    """Score documents. Unknown characters are no targets; as context they read as a space. If all
    are unknown that is a LabError, or without `strict` the end marks alone are scored."""
    keep = "error" if checkpoint.tokenizer.kind == "word" else "keep"
    tokens = tokenize_documents(documents, checkpoint.tokenizer, keep)
    unknown, unknown_bytes = unknown_characters(tokens, documents)
    unknown_tokens = int((tokens.ids < 0).sum())
    scored = tokens.num_predictions - unknown_tokens
    if strict and len(tokens.ids) and unknown_tokens == len(tokens.ids):
        raise LabError(f"{checkpoint.path} knows not one character of the text; score another text")
    nats = evaluate(checkpoint.model, tokens, row_tokens_of(checkpoint))
    size = tokens.text_bytes + len(documents)  # each end mark counts as one byte
    bits = nats * scored / math.log(2) + 8 * unknown_bytes
    listed = {c: n for c, n in unknown.most_common(20)}
    share = unknown_tokens / max(1, len(tokens.ids))
    return Score(nats, bits / size, scored, size, share, listed, not checkpoint.tokenizer.lossless)


@torch.no_grad()
def token_losses(checkpoint: Checkpoint, ids: Sequence[int]) -> torch.Tensor:
    """Nats of every id after the mark, (len(ids),), read in one row."""
    row = torch.tensor([[checkpoint.tokenizer.mark, *ids]])
    logits = checkpoint.model.logits(row[:, :-1])[0].float()
    return F.cross_entropy(logits, row[0, 1:], reduction="none")


__all__ = ["Score", "limit_documents", "pack_rows", "row_tokens_of", "score", "token_losses", "unknown_characters"]
