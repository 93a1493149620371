"""The documents that a checkpoint was trained on, and no others: every analysis asks here.

A checkpoint of the lab knows the hash of its documents, their split and where they lay; one of train_gpt.py knows its
shards and their hash. Another text can be asked for, and then whatever is found says so.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import train_gpt
from data.shards import ShardError, TokenStream, open_shard
from lab import LabError
from lab.checkpoints import Checkpoint
from lab.datasets import documents_digest, load_documents, split_documents
from lab.tokens import Tokenizer
from lab.words import WORD
from trainer.checkpoints import CheckpointError
from trainer.evidence import TokenRecord, check_same_data, hash_of
from trainer.streams import open_streams

MOST_HASHED = 20_000_000  # training tokens that are read again to see that they are the run's
SHARD_TOKENS = 500_000  # read of each of train_gpt.py's shards: enough to score, and told in `Texts.said`


@dataclass(frozen=True)
class Texts:
    """Documents by split, and what there is to say of them: '' if they are all of the checkpoint's own."""

    documents: dict[str, list[str]]
    said: str = ""


def texts_of(checkpoint: Checkpoint, path: str = "", other: str = "", kind: str = "") -> Texts:
    """The train, val and test documents of a checkpoint.

    path: where its text lies now; '': where it lay when it was trained, or the embedded corpus.
    other: a file with another text instead, read as `kind` ('': as the checkpoint's own); `Texts.said` says so.

    LabError if what lies there is not the text that the checkpoint was trained on."""
    if other:
        documents = load_documents(kind or checkpoint.told.get("data", "text"), other)
        return Texts(split_documents(documents), f"on another text than the model's own: {Path(other).name}")
    if "config" in checkpoint.told:
        if path:
            raise LabError(
                f"{checkpoint.path} was trained on shards of tokens, which it names, not on a text such as {path}; "
                "leave --path out, or look at that text with --other=FILE"
            )
        return _of_shards(checkpoint)
    return Texts(_own(checkpoint, path))


def _own(checkpoint: Checkpoint, path: str) -> dict[str, list[str]]:
    told = checkpoint.told
    lay = told.get("path", "")
    place = path or (lay if lay and Path(lay).is_file() else "")
    documents = load_documents(told["data"], place or None, int(told.get("limit_chars", 0)))
    if documents_digest(documents) != told["data_hash"]:
        there = place or "the embedded corpus"
        was = f"; it was trained on {lay}" if lay and lay != place else ""
        raise LabError(
            f"{there} is not the text of {checkpoint.path}: its hash differs{was}. Give the text that it was trained "
            "on with --path=FILE, or look at another text on purpose with --other=FILE"
        )
    return split_documents(documents, int(told.get("split_seed", 0)), kind=told.get("split", "documents"))


def _of_shards(checkpoint: Checkpoint) -> Texts:
    """Documents of the shards that a checkpoint of train_gpt.py names: the first of each kind."""
    known = {field.name for field in dataclasses.fields(train_gpt.Config)}
    config = train_gpt.Config(**{k: v for k, v in checkpoint.told["config"].items() if k in known})
    try:
        streams = open_streams(config)
        said = _check_tokens(checkpoint, *streams)
        train, val = (_documents(stream.shards[0].path, checkpoint.tokenizer) for stream in streams)
    except (ShardError, CheckpointError, OSError) as error:
        raise LabError(
            f"the text of {checkpoint.path} is not here ({error}); look at another text with --other=FILE"
        ) from error
    half = len(val) // 2
    return Texts(
        {"train": train, "val": val[: half or 1], "test": val[half:]},
        f"train and validation documents from the first {SHARD_TOKENS:,} tokens of their shards{said}",
    )


def _check_tokens(checkpoint: Checkpoint, train: TokenStream, val: TokenStream) -> str:
    """CheckpointError unless the shards hold what the run was fed and validated on; what was not checked, if
    something was too long to be read again."""
    told = {key: checkpoint.told[key] for key in ("data_hash", "val_data_hash")} | {"path": str(checkpoint.path)}
    fed = train.tokens_until(checkpoint.step)
    here = hash_of(val)
    if fed <= MOST_HASHED:
        check_same_data(told, checkpoint.step, TokenRecord(train), val, here)
        return ""
    if ":" not in told["val_data_hash"] and here != told["val_data_hash"]:
        raise CheckpointError(f"{checkpoint.path}: made with other validation tokens than {val.shards[0].path} holds")
    return f"; its {fed:,} training tokens were not compared with them"


def _documents(path: str, tokenizer: Tokenizer) -> list[str]:
    ids = np.asarray(open_shard(path)[:SHARD_TOKENS], dtype=np.int64)
    opens = np.flatnonzero(ids == tokenizer.mark)
    pieces = np.split(ids, opens)
    whole = pieces[:-1] if len(pieces) > 2 else pieces  # the last one may be cut
    return [text for piece in whole if (text := tokenizer.decode(piece.tolist())).strip()]


def starting_prompt(checkpoint: Checkpoint, documents: dict[str, Sequence[str]]) -> str:
    """A few characters from the start of the first validation document: what an analysis begins with unasked. Of a
    model of words a few words, since half of one is none."""
    text, name = documents["val"][0], checkpoint.told.get("data") == "names"
    if checkpoint.tokenizer.kind != "word":
        return text[: 2 if name else 20]
    ends = [word.end() for word in WORD.finditer(text)]
    return text[: ends[: 1 if name else 4][-1]] if ends else text
