"""Text from a trained model: the choice of a token, a text token by token, and the command that writes it.

Nothing here knows the trainer: a model is anything that maps tokens (1, T) to logits (1, T, V), and the command is
given the function that opens a checkpoint.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from trainer.options import UsageError


@torch.no_grad()
def generate(
    model: Any,
    tokens: list[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Iterator[int]:
    """Yield new token ids until the end-of-text token or `max_new_tokens`.

    model: train_gpt.GPT. `temperature` 0 takes the likeliest token; `top_k` (0: off) and `top_p` (1: off) cut the tail
    before sampling (nucleus sampling: Holtzman et al. 2020)."""
    device, limit = model.head_w.device, max(model.config.window_max_tokens, 1024)
    tokens = [model.config.eos_id, *tokens]
    for _ in range(max_new_tokens):
        logits_V = model(torch.tensor([tokens[-limit:]], device=device))[0, -1]
        token = int(pick(logits_V, temperature, top_k, top_p, generator))
        if token == model.config.eos_id:
            return
        tokens.append(token)
        yield token


def pick(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Token ids (...) from logits (V) or (B, V)."""
    if temperature <= 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        unlikely = p.cumsum(-1) - p >= top_p  # the likelier ones before it have top_p already
        logits = logits.masked_fill(unlikely.gather(-1, index.argsort(-1)), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[..., 0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="train_gpt.py sample", description="Write text from a checkpoint.")
    parser.add_argument("checkpoint", help="a .safetensors file of train_gpt.py")
    parser.add_argument("--prompt", default="", help="the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=300, help="at most this many tokens a sample")
    parser.add_argument("--num_samples", type=int, default=1)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token")
    parser.add_argument("--top_k", type=int, default=0, help="sample from this many tokens; 0: from all")
    parser.add_argument("--top_p", type=float, default=0.95, help="sample from the tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vocab", default="", help="folder with encoder.json and vocab.bpe (GPT-2 tokens offline)")
    return parser


def sample_command(arguments: list[str], load: Callable[[str, str], tuple[Any, Any]]) -> int:
    """`train_gpt.py sample CHECKPOINT`: write text, token by token.

    load: (checkpoint, device) -> (model, configuration). Raises UsageError, and what `load` raises."""
    options = _parser().parse_args(arguments)
    model, config = load(options.checkpoint, options.device)
    from data.encoding import TokenizeError, encoding_for  # late: only this needs it

    try:
        encoding = encoding_for(config.vocab_size, options.vocab or None)
        prompt = encoding.encode(options.prompt)
    except TokenizeError as error:
        raise UsageError(str(error)) from error
    generator = torch.Generator(options.device).manual_seed(options.seed)
    for number in range(options.num_samples):
        if number:
            print("\n" + "-" * 40)
        decoder = encoding.stream_decoder()
        print(options.prompt, end="", flush=True)
        new = generate(
            model,
            prompt,
            options.max_new_tokens,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            generator=generator,
        )
        for token in new:
            print(decoder(token), end="", flush=True)
        print()
    return 0
