"""Text from a trained model: the choice of a token, tokens one after the other, and the command that writes them.

Nothing here knows the trainer: a model of train_gpt.py keeps its keys and values in a `Cache`, so that a token costs
one token's work; any other model is asked for its logits again with every token (`recomputed`). The lab draws its
tokens here, too. The command is given the function that opens a checkpoint.
"""

import math
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.checkpoints import find_checkpoint
from trainer.foreign import SAMPLE
from trainer.gating import REACH, mixed_heads_of_few
from trainer.options import UsageError, check_limits, fields_text, fill, read_words, setting, wants_help

# -------------------------------------------------------------------------------------------------------------
# Tokens


class Cache:
    """What a model has seen so far: tokens, and for every layer with attention its keys and values.

    train_gpt.GPT takes one as `cache=` and then is given the new tokens alone: `extend` adds them to those seen,
    `attend` adds a layer's new keys and values to the old ones, and attends. Keys before every later query's first one
    are dropped when their number has doubled, so memory stays within twice the window."""

    def __init__(self):
        self.tokens_BT: Tensor | None = None
        self.layers: dict[int, tuple[Tensor, Tensor, int]] = {}  # keys, values, position of the first one
        self.keys: dict[int, Tensor] = {}  # of layers with `key_offset`, the last one as it was

    @property
    def length(self) -> int:
        """Tokens seen."""
        return 0 if self.tokens_BT is None else self.tokens_BT.size(1)

    def extend(self, tokens_BT: Tensor) -> Tensor:
        """All tokens seen, the new ones last."""
        seen = tokens_BT if self.tokens_BT is None else torch.cat([self.tokens_BT, tokens_BT], 1)
        self.tokens_BT = seen
        return seen

    def last_key(self, layer: int, k_BTHDh: Tensor) -> Tensor | None:
        """The key (B, 1, H, Dh) of the token before these, None before the first; the last of these is kept."""
        before, self.keys[layer] = self.keys.get(layer), k_BTHDh[:, -1:].clone()
        return before

    def attend(
        self,
        layer: int,
        q_BTHDh: Tensor,
        k_BTHDh: Tensor,
        v_BTHDh: Tensor,
        first_key_BS: Tensor,
        scale: float,
        per_token: int = 1,
        mixing: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention of the new queries over old and new keys, (B, T, H, v's width); query i sees first_key[i] .. i.

        per_token: positions of q, k and v that a token has in that layer (2: `paired_heads`). mixing: weights of
        `head_mixing`, where the layer has it."""
        T, end = q_BTHDh.size(1), self.length * per_token
        if layer in self.layers:
            old_k, old_v, begin = self.layers[layer]
            k_BTHDh, v_BTHDh = torch.cat([old_k, k_BTHDh], 1), torch.cat([old_v, v_BTHDh], 1)
        else:
            begin = end - T
        first_BT = first_key_BS[:, end - T :]
        position = torch.arange(begin, end, device=q_BTHDh.device)
        asked = position[-T:, None]
        allowed_BTS = (position <= asked) & (position >= first_BT[:, :, None])
        q, k, v = (x.transpose(1, 2) for x in (q_BTHDh, k_BTHDh, v_BTHDh))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed_BTS[:, None], scale=scale).transpose(1, 2)
        if mixing is not None:
            near_BTS = allowed_BTS & (position > asked - REACH)
            y = y + mixed_heads_of_few(q_BTHDh, k_BTHDh, v_BTHDh, mixing, near_BTS, scale)
        needed = int(first_BT[:, -1].min()) - begin  # first keys never go back
        if needed > (end - begin) // 2:
            k_BTHDh, v_BTHDh, begin = k_BTHDh[:, needed:].clone(), v_BTHDh[:, needed:].clone(), begin + needed
        self.layers[layer] = k_BTHDh, v_BTHDh, begin
        return y


def cached(model: Any, context: int = 0) -> Callable[[Tensor], Tensor]:
    """A function from new tokens (B, T) to the logits (B, V) after the last of them; it remembers what it was given.

    model: train_gpt.GPT. context: tokens that it may have before it at most (what it was trained on), 0: any number.
    When they are full, the newest half of them is read anew."""
    cache = Cache()

    def after(tokens_BT: Tensor) -> Tensor:
        nonlocal cache
        if context and cache.length + tokens_BT.size(1) > context:
            seen = tokens_BT if cache.tokens_BT is None else torch.cat([cache.tokens_BT, tokens_BT], 1)
            cache, tokens_BT = Cache(), seen[:, -max(1, context // 2) :]
        return model(tokens_BT, cache=cache)[:, -1]

    return after


def recomputed(logits: Callable[[Tensor], Tensor], context: int) -> Callable[[Tensor], Tensor]:
    """The same for any model that maps tokens (B, T) to logits (B, T, V): the last `context` tokens are read again."""
    seen: list[Tensor] = []

    def after(tokens_BT: Tensor) -> Tensor:
        seen[:] = [torch.cat([*seen, tokens_BT], 1)[:, -context:]]
        return logits(seen[0])[:, -1]

    return after


@torch.no_grad()
def draw(
    after: Callable[[Tensor], Tensor],
    start_BT: Tensor,
    max_new_tokens: int,
    *,
    end: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    never: Collection[int] = (),
) -> Iterator[Tensor]:
    """Yield the next token of every row (B,) until all rows have had `end`, or `max_new_tokens` times.

    after: `cached(model)` or `recomputed(logits, context)`. A row goes on after its `end`: cut it there. `temperature`
    0 takes the likeliest token; `top_k` (0: off) and `top_p` (1: off) cut the tail before sampling (nucleus sampling:
    Holtzman et al. 2020); tokens in `never` are not drawn."""
    alive = torch.ones(start_BT.size(0), dtype=torch.bool, device=start_BT.device)
    new_BT = start_BT
    for _ in range(max_new_tokens):
        logits_BV = after(new_BT)
        logits_BV[:, list(never)] = -math.inf
        token_B = pick(logits_BV, temperature, top_k, top_p, generator)
        yield token_B
        alive &= token_B != end
        if not alive.any():
            return
        new_BT = token_B[:, None]


def generate(model: Any, tokens: list[int], max_new_tokens: int, **how: Any) -> Iterator[int]:
    """Yield the token ids that continue `tokens`, a document's beginning, until the end of text or `max_new_tokens`.

    model: train_gpt.GPT. how: of `draw`."""
    eos_id = model.config.eos_id
    start_BT = torch.tensor([[eos_id, *tokens]], device=model.head_w.device)
    for token_B in draw(cached(model, model.config.train_seq_len), start_BT, max_new_tokens, end=eos_id, **how):
        if int(token_B) == eos_id:
            return
        yield int(token_B)


_COLD = 1e-30  # a temperature at which only the likeliest token comes; lower ones overflow float32


def pick(
    logits: Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Token ids (...) from logits (V) or (B, V)."""
    if temperature <= _COLD:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if 0 < top_k < logits.size(-1):
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if top_p < 1:
        ordered, index = logits.sort(descending=True)
        p = ordered.softmax(-1)
        unlikely = p.cumsum(-1) - p >= top_p  # the likelier ones before it have top_p already
        unlikely[..., 0] = False  # however small top_p is
        logits = logits.masked_fill(unlikely.gather(-1, index.argsort(-1)), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[..., 0]


# -------------------------------------------------------------------------------------------------------------
# The command


@dataclass(frozen=True)
class SampleOptions:
    """What `train_gpt.py sample` is told beside the checkpoint."""

    prompt: str = setting("", "text", "to continue")
    prompts: str = setting("", "file", "with a prompt a line; '-': standard input")
    max_new_tokens: int = setting(300, "tokens", "at most, a sample", at_least=1)
    num_samples: int = setting(1, "samples", "of each prompt", at_least=1)
    temperature: float = setting(0.8, "factor", "0: always the likeliest token", at_least=0)
    top_k: int = setting(0, "tokens", "sample from so many; 0: from all", at_least=0)
    top_p: float = setting(0.95, "fraction", "sample from the tokens that hold this probability", above=0, at_most=1)
    seed: int = setting(0, "number", "of the draws", at_least=0, below=2**63)
    device: str = setting("auto", "name", "auto, cuda or cpu", choices=("auto", "cuda", "cpu"))
    vocab: str = setting("", "folder", "with encoder.json (GPT-2 tokens offline)")


USAGE = """usage: train_gpt.py sample CHECKPOINT [--prompt=TEXT] [--field=value ...]

Write text from a checkpoint: a file, a folder of them (its newest), or the name of a run in local/runs.
"""


def device_of(name: str) -> str:
    """cuda or cpu from auto, cuda or cpu. Raises UsageError."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device=cuda: torch sees no GPU here")
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _prompts(options: SampleOptions) -> list[str]:
    if not options.prompts:
        return [options.prompt]
    if options.prompt:
        raise UsageError("--prompt and --prompts: give one of them")
    try:
        data = sys.stdin.buffer.read() if options.prompts == "-" else Path(options.prompts).read_bytes()
        lines = data.decode("utf-8-sig").splitlines()
    except OSError as error:
        raise UsageError(f"--prompts={options.prompts}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompts={options.prompts}: not UTF-8 text at byte {error.start}") from error
    if not any(lines):
        raise UsageError(f"--prompts={options.prompts}: no prompt in it")
    return [line for line in lines if line]


def sample_command(arguments: list[str], load: Callable[[Path, str], tuple[Any, Any]]) -> int:
    """`train_gpt.py sample CHECKPOINT`: write text, token by token.

    load: (checkpoint, device) -> (model, configuration). Raises UsageError, and what `load` raises."""
    if wants_help(arguments):
        print(USAGE, *fields_text(SampleOptions), sep="\n")
        return 0
    words, given = read_words([SampleOptions], arguments, {}, SAMPLE)
    if len(words) != 1:
        raise UsageError(f"{USAGE.splitlines()[0]}: {len(words)} checkpoints were named")
    options = fill(SampleOptions, given)
    check_limits(options)
    prompts, device = _prompts(options), device_of(options.device)
    model, config = load(find_checkpoint(words[0]), device)
    generator = torch.Generator(device).manual_seed(options.seed)
    turns = [prompt for prompt in prompts for _ in range(options.num_samples)]
    for number, prompt in enumerate(turns):
        if number:
            print("\n" + "-" * 40)
        for text in _written(model, config, prompt, options, generator):
            print(text, end="", flush=True)
        print()
    return 0


def _written(model: Any, config: Any, prompt: str, options: SampleOptions, generator: torch.Generator) -> Iterator[str]:
    """The prompt, and then the text of every new token."""
    from data.encoding import TokenizeError, encoding_for  # late: only this needs it

    try:
        encoding = encoding_for(config.vocab_size, options.vocab or None)
        tokens = encoding.encode(prompt)
    except TokenizeError as error:
        raise UsageError(str(error)) from error
    except UnicodeEncodeError as error:
        raise UsageError(f"--prompt: not UTF-8 text at character {error.start}") from error
    most = config.train_seq_len - 1
    if len(tokens) > most:
        print(
            f"the prompt has {len(tokens)} tokens, the model was trained on sequences of {config.train_seq_len}: "
            f"it is given the last {most}",
            file=sys.stderr,
        )
    yield prompt
    decoder = encoding.stream_decoder()
    how = dict(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, generator=generator)
    for token in generate(model, tokens[-most:], options.max_new_tokens, **how):
        yield decoder(token)
