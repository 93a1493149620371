"""The data of a run: which shards, opened and checked, how long they last, and how good a model of them can be."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from data import paths
from data.documents import DocumentStream
from data.folder import check_encoding
from data.shards import ShardError, TokenStream, TooFewTokens, read_header
from trainer import schedule
from trainer.evidence import same_content

EMBEDDED = "embedded"


CHECKOUT = Path(__file__).resolve().parent.parent


def corpus_folder(checkout: Path = CHECKOUT) -> Path:
    """Where the embedded corpus lies or is to be made: in the checkout, or in the cache if that is read-only."""
    folder = checkout / "data" / "embedded"
    if folder.is_dir() or os.access(folder.parent, os.W_OK):
        return folder
    return paths.cache_folder() / "embedded"


def embedded_files(config: Any) -> Any:
    """`config` with 'embedded' replaced by the shards of the embedded corpus, which is generated if need be."""
    if EMBEDDED not in (config.train_files, config.val_files):
        return config
    from data.corpus import ensure_corpus

    corpus = ensure_corpus(config.data_dir or corpus_folder())  # one process writes, the others wait
    found = {"train_files": str(corpus.train_files), "val_files": str(corpus.val_files)}
    return dataclasses.replace(config, **{k: v for k, v in found.items() if getattr(config, k) == EMBEDDED})


def _named(config: Any, part: str) -> str:
    """The flag that names the data of a part, train or val."""
    return f"--data={config.data}" if config.data else f"--{part}_files={getattr(config, part + '_files')}"


def with_all_validation(config: Any) -> Any:
    """`config` with a number in place of `val_tokens` 0: the tokens of as many whole sequences as the validation shards
    hold. Raises ShardError."""
    if config.val_tokens:
        return config
    try:
        held = sum(read_header(path).num_tokens for path in paths.expand(embedded_files(config).val_files))
    except paths.PathError as error:
        raise ShardError(str(error)) from error
    whole = (held - 1) // config.val_seq_len * config.val_seq_len
    if whole < 1:
        raise ShardError(
            f"{_named(config, 'val')}: {held} tokens are too few for one sequence of "
            f"--val_seq_len={config.val_seq_len} and a target; give a shorter one"
        )
    return dataclasses.replace(config, val_tokens=whole)


def validation_stream(config: Any) -> TokenStream:
    """The validation tokens, one step. Raises ShardError."""
    try:
        return TokenStream(
            embedded_files(config).val_files,
            sequence_tokens=config.val_seq_len,
            sequences_per_step=max(config.val_tokens // config.val_seq_len, 1),
            vocab_size=config.vocab_size,
            cycle=False,
        )
    except TooFewTokens as error:
        raise ShardError(
            f"{_named(config, 'val')}: too few for --val_tokens={config.val_tokens} and a target "
            f"({error.why if config.data else error}); "
            f"--val_tokens=0 takes all there are, in whole sequences of --val_seq_len={config.val_seq_len}"
        ) from error


def training_stream(config: Any) -> TokenStream:
    """The training tokens, without an end. Raises ShardError."""
    files = embedded_files(config).train_files
    lengths, count = schedule.sequence_lengths(config), schedule.sequences(config)
    how = dict(sequence_tokens=lengths, sequences_per_step=count, vocab_size=config.vocab_size)
    try:
        if config.align_documents:
            return DocumentStream(files, **how, eos_id=config.eos_id, document_tokens=schedule.document_tokens(config))
        return TokenStream(files, **how, drop_shard_tail=config.drop_shard_tail)
    except TooFewTokens as error:
        raise ShardError(
            f"{_named(config, 'train')}: too few for one step of --tokens_per_step={config.tokens_per_step} in "
            f"sequences of --train_seq_len={config.train_seq_len} ({error.why if config.data else error}); give more, "
            "or smaller steps"
        ) from error


def open_streams(config: Any) -> tuple[TokenStream, TokenStream]:
    """Training and validation streams. Raises ShardError that names file and cause: among others if they share a
    shard, or if what lies beside the shards speaks of another vocabulary."""
    train, val = training_stream(config), validation_stream(config)
    named = {os.path.realpath(shard.path) for shard in train.shards}
    for shard in val.shards:
        if os.path.realpath(shard.path) in named:
            raise ShardError(f"{shard.path}: both --train_files and --val_files name it; validate on other data")
    if pair := same_content(train, val):
        raise ShardError(f"{pair[0]} and {pair[1]} hold the same tokens; validate on data that is not trained on")
    return train, val


def describe_data(config: Any, train: TokenStream, val: TokenStream) -> tuple[dict[str, Any], list[str]]:
    """(what the log's `data:` line and the JSON tell of the data, sentences that the user should read).

    Raises ShardError where tokens and vocabulary contradict."""
    steps, a_pass, most = config.num_iterations, train.steps_per_epoch, " at most" if config.align_documents else ""
    facts = {
        "train_shards": [[Path(s.path).name, s.num_tokens] for s in train.shards_until(steps)],
        "val_shards": [[Path(s.path).name, s.num_tokens] for s in val.shards_until(1)],
        "steps_in_one_pass": a_pass,
        "passes": round(steps / a_pass, 3),
    }
    remarks = []
    if steps > a_pass:
        remarks.append(f"the data last for{most} {a_pass} of {steps} steps: {steps / a_pass:.3g} passes over them")
    files = [shard.path for shard in (*train.shards, *val.shards)]
    if warning := check_encoding(files, val.window(0, 0), config.vocab_size, config.eos_id):
        remarks.append(f"warning: {warning}")
    return facts, remarks


def loss_floor(config: Any) -> float | None:
    """The least mean loss that anything could reach on the validation tokens, if they are of the embedded corpus,
    whose grammar tells every document's exact probability (data/corpus.py)."""
    if config.val_files != EMBEDDED:
        return None
    from data.corpus import best_loss
    from data.shards import open_shard

    return best_loss(open_shard(embedded_files(config).val_files)[: config.val_tokens + 1])


def to_device(batch: Sequence[Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch from the host, as int32 inputs and int64 targets; from page-locked memory the host does not wait."""
    inputs, targets = (torch.as_tensor(part) for part in batch)
    inputs = inputs.to(device, torch.int32, non_blocking=True)
    return inputs, targets.to(device, torch.int64, non_blocking=True)
