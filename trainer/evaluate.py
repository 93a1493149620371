"""How good a checkpoint is on given data: nats a token, bits a byte, each document if asked.

The model sees the tokens as validation shows them to it: packed sequences of `--val_seq_len` tokens, documents apart,
the window of the end of training. So on the data of its run the loss is that of the run's last validation.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.encoding import TokenizeError, token_bytes
from data.folder import check_encoding
from data.shards import TokenStream
from trainer.checkpoints import find_checkpoint
from trainer.evidence import hash_of
from trainer.options import UsageError, check_limits, fields_text, fill, read_words, setting, wants_help
from trainer.sample import device_of
from trainer.start import from_data
from trainer.streams import validation_stream, with_all_validation


@dataclass(frozen=True)
class EvaluateOptions:
    """What `train_gpt.py evaluate` is told beside the checkpoint."""

    data: str = setting("", "path", "folder of shards, or a text: its validation part")
    val_files: str = setting("", "glob", "shards, or 'embedded'; '': those of the run")
    val_tokens: int = setting(
        -1, "tokens", "from the start of the shards; 0: all; -1: as many as the run validated on", at_least=-1
    )
    val_seq_len: int = setting(0, "tokens", "packed sequence; 0: that of the run", at_least=0)
    by_document: bool = setting(False, "flag", "a line for each document")
    json: str = setting("", "file", "for all of it; '-': standard output, and nothing else there")
    device: str = setting("auto", "name", "auto, cuda or cpu", choices=("auto", "cuda", "cpu"))
    vocab: str = setting("", "folder", "with encoder.json (to count bytes of GPT-2 tokens offline)")


USAGE = """usage: train_gpt.py evaluate CHECKPOINT [--val_files=GLOB | --data=FOLDER] [--field=value ...]

The loss of a checkpoint: a file, a folder of them (its newest), or the name of a run in local/runs.
"""


def _stream(config: Any, options: EvaluateOptions) -> TokenStream:
    """The tokens to be judged by. Raises ShardError, UsageError."""
    if options.data and options.val_files:
        raise UsageError("--data and --val_files: give one of them")
    if options.data:
        known = dataclasses.asdict(config) | ({"vocab": options.vocab} if options.vocab else {})
        found = from_data(options.data, known, {})
        names = ("val_files", "val_seq_len", "val_tokens")
        config = dataclasses.replace(config, data=options.data, **{name: found[name] for name in names})
    else:
        config = dataclasses.replace(config, data="", val_files=options.val_files or config.val_files)
    length = options.val_seq_len or config.val_seq_len
    tokens = config.val_tokens if options.val_tokens < 0 else options.val_tokens
    if 0 < tokens < length:
        raise UsageError(f"--val_tokens={tokens} is not one sequence of --val_seq_len={length}")
    if options.val_tokens > 0 and tokens % length:
        raise UsageError(f"--val_tokens={tokens} is not a multiple of --val_seq_len={length}")
    config = with_all_validation(dataclasses.replace(config, val_seq_len=length, val_tokens=tokens))
    stream = validation_stream(config)
    check_encoding([s.path for s in stream.shards], stream.window(0, 0)[:0], config.vocab_size, config.eos_id)
    return stream


@torch.no_grad()
def token_losses(model: Any, stream: TokenStream) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(inputs, targets, loss in nats of each target) of all sequences of a stream's first step, each (N,)."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    device = model.head_w.device
    for sequence in range(stream.sequences_per_step):
        inputs_T, targets_T = stream.batch(0, sequence)
        given = (torch.as_tensor(part, device=device)[None] for part in (inputs_T, targets_T))
        losses_T = model(*given, reduction="none")[0]
        parts.append((inputs_T, targets_T, losses_T.double().cpu().numpy()))
    inputs, targets, losses = (np.concatenate(part) for part in zip(*parts))
    return inputs, targets, losses


def by_document(inputs: np.ndarray, losses: np.ndarray, sizes: np.ndarray | None, eos_id: int) -> list[dict[str, Any]]:
    """The loss of each document, in order: of its tokens and of the end of text after it.

    inputs, losses: (N,). sizes: (N,) bytes of each target, or None. A first part without an opening is a document."""
    number = np.cumsum(inputs == eos_id)
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    counts = np.diff([*starts, len(inputs)])
    nats = np.add.reduceat(losses, starts)
    size = None if sizes is None else np.add.reduceat(sizes, starts)
    return [
        dict(
            start=int(start), tokens=int(count), loss=float(total / count), bytes=None if size is None else int(size[i])
        )
        for i, (start, count, total) in enumerate(zip(starts, counts, nats))
    ]


def evaluate(model: Any, config: Any, options: EvaluateOptions) -> dict[str, Any]:
    """Everything that the command tells, as JSON. Raises ShardError, UsageError."""
    stream = _stream(config, options)
    inputs, targets, losses = token_losses(model, stream)
    try:
        sizes = token_bytes(config.vocab_size, options.vocab or None)[targets]
        bytes_unknown = ""
    except TokenizeError as error:
        sizes, bytes_unknown = None, str(error)
    count = None if sizes is None else int(sizes.sum())
    told: dict[str, Any] = dict(
        loss=float(losses.mean()),
        tokens=len(losses),
        bytes=count,
        nats_per_byte=float(losses.sum() / count) if count else None,
        bits_per_byte=float(losses.sum() / count / math.log(2)) if count else None,
        perplexity=float(np.exp(min(losses.mean(), 700))),
        val_data_hash=hash_of(stream),
        shards=[Path(shard.path).name for shard in stream.shards_until(1)],
        val_seq_len=stream.sequence_tokens,
    )
    if bytes_unknown:
        told["bytes_unknown"] = bytes_unknown
    if options.by_document:
        told["documents"] = by_document(inputs, losses, sizes, config.eos_id)
    return told


def evaluate_command(arguments: list[str], load: Callable[[Path, str], tuple[Any, Any]]) -> int:
    """`train_gpt.py evaluate CHECKPOINT`. load: (checkpoint, device) -> (model, configuration)."""
    if wants_help(arguments):
        print(USAGE, *fields_text(EvaluateOptions), sep="\n")
        return 0
    words, given = read_words([EvaluateOptions], arguments, {"json": "-"})
    if len(words) != 1:
        raise UsageError(f"{USAGE.splitlines()[0]}: {len(words)} checkpoints were named")
    options = fill(EvaluateOptions, given)
    check_limits(options)
    if options.json not in ("", "-") and (Path(options.json).is_dir() or not Path(options.json).parent.is_dir()):
        raise UsageError(f"--json={options.json}: a file in a folder that is there")  # now, not after all the work
    path = find_checkpoint(words[0])
    told = {"checkpoint": str(path), **evaluate(*load(path, device_of(options.device)), options)}
    if options.json:
        text = json.dumps(told, indent=1)
        if options.json == "-":
            print(text)
            return 0
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    for document in told.get("documents", ()):
        print(f"document at {document['start']}: loss {document['loss']:.6f} on {document['tokens']} tokens")
    size = f", {told['bits_per_byte']:.6f} bits a byte" if told["bytes"] else ""
    print(f"loss {told['loss']:.6f} nats a token{size} ({told['tokens']:,} tokens, {path})")
    if "bytes_unknown" in told:
        print(f"bits a byte are not known: {told['bytes_unknown']}")
    return 0
