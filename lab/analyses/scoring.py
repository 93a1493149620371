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
from lab.datasets import Tokens, tokenize_documents
from lab.tokens import WordTokenizer
from lab.train import evaluate
from lab.words import split_words


@dataclass(frozen=True)
class Score:
    """Loss of a model on a text. `bits_per_byte` charges 8 bits for every byte that the vocabulary lacks, so a model
    cannot gain by not knowing characters or words (an unknown word costs its guess and its letters); a lossy
    vocabulary (words forget capitals and spaces) understates it and says so."""

    nats_per_token: float
    bits_per_byte: float
    tokens: int
    bytes: int
    unknown_share: float
    unknown: dict[str, int]
    lossy: bool


MOST_ROW = 4096  # longer rows would need gigabytes for their logits over GPT-2's vocabulary


def row_tokens_of(checkpoint: Checkpoint) -> int:
    """The row length that the checkpoint was trained with, at most MOST_ROW."""
    return min(checkpoint.row_tokens, MOST_ROW)


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


def told_limit(documents: Sequence[str], chars: int) -> str:
    """What `limit_documents` leaves of `documents`, in words: a limit that changes a result is told with it."""
    size = sum(map(len, documents))
    return f"its first {chars:,} characters" if chars and size > chars else f"all its {size:,} characters"


def unknown_characters(tokens: Tokens, documents: Sequence[str]) -> tuple[Counter, int]:
    """Characters that became UNKNOWN (one token a character), and their bytes."""
    text = "".join(documents)
    if len(text) != len(tokens.ids):
        return Counter(), 0  # bytes and GPT-2's pieces know every character
    missing = Counter(text[i] for i in np.flatnonzero(tokens.ids < 0))
    return missing, sum(len(c.encode("utf-8", "surrogatepass")) * n for c, n in missing.items())


def unknown_words(tokens: Tokens, documents: Sequence[str]) -> tuple[Counter, int]:
    """Words that the vocabulary lacks, which the model reads as its unknown word; and their bytes."""
    words = [w for d in documents for w in split_words(d)]
    missing = Counter(words[i] for i in np.flatnonzero(tokens.ids == WordTokenizer.unknown_id))
    return missing, sum(len(w.encode("utf-8", "surrogatepass")) * n for w, n in missing.items())


def letters_nats(checkpoint: Checkpoint, text: str) -> float:
    """Nats of the letters of the words that a vocabulary of words lacks, at 8 bits a byte; 0.0 for other vocabularies.
    Added to a loss it keeps a model from gaining by not knowing words: the unknown word itself is cheap."""
    if not isinstance(checkpoint.tokenizer, WordTokenizer):
        return 0.0
    words = split_words(text)
    missing = np.flatnonzero(checkpoint.tokenizer.encode(text) == WordTokenizer.unknown_id)
    return 8 * math.log(2) * sum(len(words[i].encode("utf-8", "surrogatepass")) for i in missing)


def score(checkpoint: Checkpoint, documents: Sequence[str], strict: bool = True) -> Score:
    """Score documents. Unknown characters are no targets; as context they read as a space. If all
    are unknown that is a LabError, or without `strict` the end marks alone are scored."""
    words = checkpoint.tokenizer.kind == "word"
    tokens = tokenize_documents(documents, checkpoint.tokenizer, "error" if words else "keep")
    unknown, unknown_bytes = (unknown_words if words else unknown_characters)(tokens, documents)
    unknown_tokens = sum(unknown.values())
    scored = tokens.num_predictions - int((tokens.ids < 0).sum())
    if strict and len(tokens.ids) and unknown_tokens == len(tokens.ids):
        what = "word" if words else "character"
        raise LabError(f"{checkpoint.path} knows not one {what} of the text; score another text")
    nats = evaluate(checkpoint.model, tokens, row_tokens_of(checkpoint))
    size = tokens.text_bytes + len(documents)  # each end mark counts as one byte
    bits = nats * scored / math.log(2) + 8 * unknown_bytes
    listed = {c: n for c, n in unknown.most_common(20)}
    share = unknown_tokens / max(1, len(tokens.ids))
    return Score(nats, bits / size, scored, size, share, listed, not checkpoint.tokenizer.lossless)


def token_logits(checkpoint: Checkpoint, ids: Sequence[int]) -> torch.Tensor:
    """Logits (len(ids), V) for every id after the mark. A text longer than the model's context is read in windows
    that overlap by half, so that all but the first tokens have at least half a context before them."""
    row = [checkpoint.tokenizer.mark, *ids][:-1]
    context = min(checkpoint.context, MOST_ROW) if checkpoint.model.context is None else len(row)
    parts, done = [], 0
    while done < len(row):
        start = max(0, done - context // 2) if done else 0
        with torch.no_grad():
            logits = checkpoint.model.logits(torch.tensor([row[start : start + context]]))[0].float()
        parts.append(logits[done - start :])
        done = start + len(logits)
    return torch.cat(parts)


def token_losses(checkpoint: Checkpoint, ids: Sequence[int]) -> torch.Tensor:
    """Nats of every id after the mark, (len(ids),), see `token_logits`."""
    return F.cross_entropy(token_logits(checkpoint, ids), torch.tensor(list(ids)), reduction="none")
