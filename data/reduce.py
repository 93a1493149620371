"""Shards of a smaller vocabulary: the most frequent tokens of the training shards stay, all others become one.

    python -m data.reduce --train 'gpt2/*train*.bin' --val 'gpt2/*val*.bin' --vocab-size 4096 --out DIR

A proxy for real text that a laptop can train on: with GPT-2's 50,257 tokens most of a small model's time goes into
its head. Token 0 is the end of text, then come the tokens that stay, the most frequent first (the lower number where
two are equal), and the last one, V - 1, is whatever was rarer. `kept` in tokenize.json has their old numbers, in order.
Losses of different vocabularies cannot be compared, and such shards have no text any more: they are for comparing
trainings. Exit codes: 0 done, 2 wrong usage, 3 shards that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import paths, shards
from data.echo import program
from data.encoding import TokenizeError
from data.folder import facts_beside
from data.tokenize import PartWriter

_BLOCK_TOKENS = 1 << 22


def blocks(files: list[str], most: int, vocab_size: int | None = None) -> Iterator[np.ndarray]:
    """The tokens of shards, one block (uint16) after the other, `most` at most; 0: all. With `vocab_size` each block is
    checked. Raises shards.ShardError."""
    left = most or sys.maxsize
    for path in files:
        tokens = shards.open_shard(path)
        for start in range(0, len(tokens), _BLOCK_TOKENS):
            if left <= 0:
                return
            block = tokens[start : start + min(_BLOCK_TOKENS, left)]
            if vocab_size is not None:
                shards.check_vocabulary(path, block, start, vocab_size)
            left -= len(block)
            yield block


def frequent(counts: np.ndarray, vocab_size: int, end_of_text: int) -> np.ndarray:
    """int64 (at most vocab_size - 1,): the end of text, then the most frequent tokens. counts: of each token."""
    order = np.argsort(-counts, kind="stable")
    order = order[(counts[order] > 0) & (order != end_of_text)]
    return np.concatenate([[end_of_text], order[: vocab_size - 2]])


def reduce(train: list[str], val: list[str], out: Path, vocab_size: int, most: int = 0) -> dict:
    """Write the shards and tokenize.json to `out`; returns what that holds.

    most: training tokens that are taken, and counted; 0: all. Raises TokenizeError and shards.ShardError."""
    if list(out.glob("*.bin")):
        raise TokenizeError(f"{out}: holds .bin files already; give another --out")
    facts = facts_beside(train + val)
    old_size, end_of_text = facts.vocabulary if facts else (50257, 50256)
    counts = np.zeros(1 << 16, np.int64)  # of any token of 16 bits
    for block in blocks(train, most, old_size):
        counts += np.bincount(block, minlength=len(counts))
    judged = sum(len(block) for block in blocks(val, 0, old_size))  # read before anything is written
    for path, tokens in ((train[0], counts.sum()), (val[0], judged)):
        if not tokens:
            raise TokenizeError(f"{path}: holds no tokens")
    kept = frequent(counts, vocab_size, end_of_text)
    if len(kept) + 1 < vocab_size:
        raise TokenizeError(f"{train[0]}: {len(kept)} different tokens; --vocab-size can be {len(kept) + 1} at most")
    new = np.full(len(counts), vocab_size - 1, shards.TOKEN)
    new[kept] = np.arange(len(kept))
    told: dict[str, dict] = {}
    infos: list[shards.ShardInfo] = []
    for part, files, limit in (("train", train, most), ("val", val, 0)):
        writer, rare = PartWriter(out, part, shards.MAX_TOKENS), 0
        try:
            for block in blocks(files, limit):  # which were checked as they were counted
                tokens = new[block]
                writer.append(tokens)
                rare += int(np.count_nonzero(tokens == vocab_size - 1))
            writer.close()
        finally:
            writer.abandon()
        infos += writer.files
        told[part] = {"tokens": writer.counts["tokens"], "rare": rare}
    result = {
        "schema": 1,
        "inputs": [*train, *val],
        "encoding": f"the {vocab_size - 1:,} most frequent of {old_size:,} tokens",
        "vocab_size": vocab_size,
        "end_of_text": 0,
        **told,
        "shards": {Path(info.path).name: shards.data_hash([info]) for info in infos},
        "kept": kept.tolist(),
    }
    with paths.atomic_file(out / "tokenize.json", "w") as file:
        json.dump(result, file)
    return result


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.reduce", description="Make shards of a smaller vocabulary.")
    parser.add_argument("--train", required=True, metavar="GLOB", help="training shards, which are counted")
    parser.add_argument("--val", required=True, metavar="GLOB", help="validation shards")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the new ones")
    parser.add_argument("--vocab-size", type=int, default=4096, metavar="V", help="tokens; default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=0, metavar="N", help="training tokens taken; 0: all")
    options = parser.parse_args(argv)
    if not 3 <= options.vocab_size <= 1 << 16:
        parser.error(f"--vocab-size must be from 3 to {1 << 16}")
    if options.max_tokens < 0:
        parser.error("--max-tokens must be 0 (all) or more")
    try:
        train, val = paths.expand(options.train), paths.expand(options.val)
        options.out.mkdir(parents=True, exist_ok=True)
        told = reduce(train, val, options.out, options.vocab_size, options.max_tokens)
    except (TokenizeError, shards.ShardError, paths.PathError, OSError) as error:
        print(f"data.reduce: {error}", file=sys.stderr)
        return 3
    for part in ("train", "val"):
        tokens, rare = told[part]["tokens"], told[part]["rare"]
        print(f"{part}: {tokens:,} tokens, {rare / tokens:.1%} of them rarer than the vocabulary")
    print(f"train with: python train_gpt.py --preset=micro --data={options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(program("data.reduce", main))
