"""Text from a checkpoint of the lab or of train_gpt.py.

python -m lab.sample CHECKPOINT --prompt="Once upon a time" --count=5 --temperature=0.8 --top_p=0.95 --seed=0
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lab import cli
from lab.checkpoints import Checkpoint, best_checkpoint, load_checkpoint
from lab.cli import setting
from lab.models.gpt import GPTRung
from lab.words import unread_words
from trainer.sample import cached, draw, recomputed


@dataclass(frozen=True)
class Writing:
    """How text is written."""

    prompt: str = setting("", "text", "that the model continues")
    count: int = setting(1, "texts", "written side by side", at_least=1, at_most=10_000)
    max_tokens: int = setting(200, "tokens", "a text at most", at_least=1, at_most=1 << 20)
    temperature: float = setting(1.0, "factor", "0: always the likeliest token", at_least=0, at_most=100)
    top_k: int = setting(0, "tokens", "draw from the likeliest so many; 0: from all", at_least=0)
    top_p: float = setting(1.0, "fraction", "draw from the tokens that hold this probability", above=0, at_most=1)
    seed: int = setting(0, "number", "of the draws", at_least=0, below=1 << 63)
    vocab: str = setting("", "folder", "GPT-2's encoder.json and vocab.bpe, where there is no network")


@dataclass(frozen=True)
class Sample:
    """One text: `prompt` and what the model wrote after it; `ended` if it wrote the end mark itself."""

    prompt: str
    written: str
    ids: list[int]
    ended: bool

    @property
    def text(self) -> str:
        """Prompt and continuation."""
        return self.prompt + self.written


TRIES = 4  # texts, of which the first that says anything is shown


def telling(samples: Sequence[Sample]) -> Sample:
    """The first of several texts that is not empty; an untrained model may end at once, and with the same random
    numbers does so again and again as it learns."""
    return next((s for s in samples if s.written.strip()), samples[0])


def generate(
    checkpoint: Checkpoint,
    prompt: str = "",
    *,
    count: int = 1,
    max_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[Sample]:
    """`count` continuations of `prompt`, written side by side; each stops at its end mark or after `max_tokens`.

    Raises UnknownTextError (a LabError) for a prompt with characters the vocabulary lacks.
    """
    cli.checked(Writing(prompt, count, max_tokens, temperature, top_k, top_p, seed))
    tokenizer, start = checkpoint.tokenizer, checkpoint.encode_prompt(prompt)
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    drawn = list(continued(checkpoint, [start] * count, max_tokens, **how))
    samples = []
    for row in torch.stack(drawn, 1).tolist():
        ended = tokenizer.mark in row
        ids = row[: row.index(tokenizer.mark)] if ended else row
        samples.append(Sample(prompt, _written(checkpoint, start[1:], ids), ids, ended))
    return samples


def continued(
    checkpoint: Checkpoint, rows: list[list[int]], max_tokens: int, *, seed: int = 0, **how: Any
) -> Iterator[torch.Tensor]:
    """Yield the next token of every row (B,), until all rows have had the end mark or `max_tokens` times.

    rows: ids that begin with the mark, all of one length. how: temperature, top_k, top_p as of trainer.sample.draw."""
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    if isinstance(model, GPTRung):
        after = cached(model.gpt, checkpoint.context)
    else:
        after = recomputed(model.logits, checkpoint.context)
    how |= dict(end=tokenizer.mark, never=tokenizer.never_written, generator=torch.Generator().manual_seed(seed))
    return draw(after, torch.tensor(rows), max_tokens, **how)


def _written(checkpoint: Checkpoint, prompt_ids: list[int], ids: list[int]) -> str:
    """The new part of the text. Words are joined together with the prompt's, so that spaces and capitals fit."""
    tokenizer = checkpoint.tokenizer
    if tokenizer.kind == "word":
        return tokenizer.decode([*prompt_ids, *ids])[len(tokenizer.decode(prompt_ids)) :]
    return tokenizer.decode(ids)


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    (place,), asked = cli.command(__doc__, words, Writing, (1, 1))
    checkpoint = load_checkpoint(best_checkpoint(Path(place)), asked.vocab or None)
    print(f"reading {checkpoint.reading()}", file=sys.stderr)
    if told := unread_words(checkpoint.tokenizer, asked.prompt):
        print(told, file=sys.stderr)
    if told := checkpoint.told_within(asked.prompt):
        print(f"The prompt is long.{told}", file=sys.stderr)
    how = {name: value for name, value in vars(asked).items() if name != "vocab"}
    for sample in generate(checkpoint, **how):
        print(sample.text + ("" if sample.ended else " ..."))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
