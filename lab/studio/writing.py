"""Text from a checkpoint, token by token, with what the model thought at each place."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lab.studio.places import Refused

if TYPE_CHECKING:
    from lab.checkpoints import Checkpoint

LONGEST_PROMPT = 4000  # characters


@dataclass(frozen=True)
class Written:
    """A text so far: ids without the opening mark, of which the first `prompt_tokens` were given."""

    ids: tuple[int, ...]
    prompt_tokens: int
    ended: bool  # the model itself wrote its end mark
    text: str


@dataclass(frozen=True)
class Guess:
    """The model's distribution at one place: the likeliest pieces with their probabilities, and entropy."""

    top: tuple[tuple[str, float], ...]
    entropy_nats: float
    chosen: str
    chosen_probability: float


def write(
    checkpoint: Checkpoint,
    prompt: str,
    *,
    max_tokens: int = 300,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Written]:
    """Yield the text after every token (first the prompt alone), until the end mark or `max_tokens`.

    UnknownTextError for a prompt with characters that the vocabulary lacks; Refused for one of more than
    LONGEST_PROMPT characters."""
    from lab.sample import continued

    if len(prompt) > LONGEST_PROMPT:
        raise Refused(f"the beginning has {len(prompt):,} characters; at most {LONGEST_PROMPT:,} can be read")
    mark = checkpoint.tokenizer.mark
    ids = checkpoint.encode_prompt(prompt)
    given = len(ids) - 1
    yield Written(tuple(ids[1:]), given, False, prompt)
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    for token_B in continued(checkpoint, [ids], max_tokens, **how):
        if (token := int(token_B)) == mark:
            yield Written(tuple(ids[1:]), given, True, text_of(checkpoint, prompt, ids[1:], given))
            return
        ids.append(token)
        yield Written(tuple(ids[1:]), given, False, text_of(checkpoint, prompt, ids[1:], given))


def text_of(checkpoint: Checkpoint, prompt: str, ids: list[int], given: int) -> str:
    """The text of `ids`, the first `given` of which stand for `prompt`. Where the vocabulary spells words its own
    way the whole is spelled by it; a character whose last bytes are still to come is left out."""
    tokenizer = checkpoint.tokenizer
    text = prompt + tokenizer.decode(ids[given:]) if tokenizer.lossless else tokenizer.decode(ids)
    return text.rstrip("\ufffd")


def next_logits(checkpoint: Checkpoint, ids: list[int]):
    """Logits (V,) for the token after `ids`."""
    import torch

    seen = ids[-checkpoint.context :]
    with torch.no_grad():
        return checkpoint.model(torch.tensor([seen]))[0][0, -1].float()


def guess(checkpoint: Checkpoint, ids: tuple[int, ...], place: int, count: int = 10) -> Guess:
    """What the model expected at `place` (0 is the first token), having read the tokens before it.

    `place` may be one past the last token: then the chosen token is the end mark."""
    tokenizer = checkpoint.tokenizer
    before = [tokenizer.mark, *ids[:place]]
    chosen = ids[place] if place < len(ids) else tokenizer.mark
    p = next_logits(checkpoint, before).softmax(0)
    top = p.topk(min(count, p.numel()))
    entropy = -sum(q * math.log(q) for q in p.tolist() if q > 0)
    pieces = tuple((tokenizer.piece(i), q) for i, q in zip(top.indices.tolist(), top.values.tolist()))
    return Guess(pieces, entropy, tokenizer.piece(chosen), float(p[chosen]))


def drivers(checkpoint: Checkpoint, ids: tuple[int, ...], place: int) -> list[tuple[str, float]]:
    """How much each token before `place` drove the logit of the token there, from -1 (against it) to 1: gradient
    times activation, as lab.analyses.attribution has it. Empty for a table of counts, which has no gradient."""
    import torch

    from lab.analyses.attribution import EmbeddedModel

    if not checkpoint.model.token_embeddings():
        return []
    tokenizer = checkpoint.tokenizer
    before = [tokenizer.mark, *ids[:place]][-checkpoint.row_tokens :]
    chosen = ids[place] if place < len(ids) else tokenizer.mark
    opened = EmbeddedModel(checkpoint, before)
    values = [value.requires_grad_() for value in opened.values()[0]]
    gradients = torch.autograd.grad(opened.logit(values, chosen).sum(), values, allow_unused=True)
    products = [value.detach() * slope for value, slope in zip(values, gradients) if slope is not None]
    scores, _ = opened.by_token(products)
    greatest = max(map(abs, scores)) or 1.0
    return [(tokenizer.piece(token), round(score / greatest, 4)) for token, score in zip(before, scores)]
