"""Text from a checkpoint of the lab or of train_gpt.py.

python -m lab.sample CHECKPOINT --prompt="Once upon a time" --count=5 --temperature=0.8 --top_p=0.95 --seed=0
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from lab import LabError, cli
from lab.checkpoints import Checkpoint, best_checkpoint, load_checkpoint
from lab.models.gpt import GPTRung
from trainer.sample import cached, draw, recomputed

LONGEST_CONTEXT = 1024  # tokens that a model without a fixed context is given


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
    if count < 1 or max_tokens < 1 or temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise LabError("count, max_tokens: at least 1; temperature, top_k: at least 0; top_p: above 0, at most 1")
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    start = checkpoint.encode_prompt(prompt)
    if isinstance(model, GPTRung):
        after = cached(model.gpt)
    else:
        after = recomputed(model.logits, model.context or LONGEST_CONTEXT)
    how = dict(temperature=temperature, top_k=top_k, top_p=top_p, generator=torch.Generator().manual_seed(seed))
    mark, never = tokenizer.mark, tokenizer.never_written
    drawn = list(draw(after, torch.tensor([start] * count), max_tokens, end=mark, never=never, **how))
    samples = []
    for row in torch.stack(drawn, 1).tolist():
        ended = tokenizer.mark in row
        ids = row[: row.index(tokenizer.mark)] if ended else row
        samples.append(Sample(prompt, _written(checkpoint, start[1:], ids), ids, ended))
    return samples


def _written(checkpoint: Checkpoint, prompt_ids: list[int], ids: list[int]) -> str:
    """The new part of the text. Words are joined together with the prompt's, so that spaces and capitals fit."""
    tokenizer = checkpoint.tokenizer
    if tokenizer.kind == "word":
        return tokenizer.decode([*prompt_ids, *ids])[len(tokenizer.decode(prompt_ids)) :]
    return tokenizer.decode(ids)


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    positional, given = cli.split_arguments(words)
    if len(positional) != 1 or "help" in given:
        print(__doc__)
        return 0 if "help" in given else 2
    kinds = {"prompt": str, "count": int, "max_tokens": int, "temperature": float, "top_k": int}
    kinds |= {"top_p": float, "seed": int}
    vocab = given.pop("vocab", None)
    if unknown := sorted(set(given) - set(kinds)):
        raise LabError(f"unknown argument --{unknown[0]}; there are {', '.join(kinds)}, vocab")
    checkpoint = load_checkpoint(best_checkpoint(Path(positional[0])), vocab)
    for sample in generate(checkpoint, **{n: cli.typed(n, kinds[n], text) for n, text in given.items()}):
        print(sample.text + ("" if sample.ended else " ..."))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
