"""What is in a shard: counts, lengths of its documents, and the first of them as text.

    python -m data.look data/embedded/val_000000.bin
    python -m data.look 'data/fineweb10B/fineweb_val_*.bin' --documents 5 --vocab DIR
    python -m data.look data/embedded                                   # all shards of a folder

The encoding is what tokenize.json, corpus.json or fineweb.json beside the shard says, else it is guessed: bytes if no
token is 256 or above. Exit codes: 0 done, 2 wrong usage, 3 a file that cannot be read as a shard.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data import paths, shards
from data.echo import program
from data.encoding import ENCODINGS, TokenizeError, encoding_for
from data.folder import facts_beside


def describe(path: str, documents: int, characters: int, encoding: str | None, vocab: str | None) -> Iterator[str]:
    """Lines about one shard. Raises ShardError, TokenizeError."""
    tokens = shards.open_shard(path)
    yield f"{path}: {len(tokens):,} tokens"
    if not len(tokens):
        return
    facts, highest = facts_beside([path]), int(tokens.max())
    if encoding is not None:
        vocabulary, said = ENCODINGS[encoding], "as you say"
    elif facts is not None:
        vocabulary, said = facts.vocabulary, f"as {facts.source} says"
    else:
        vocabulary, said = ENCODINGS["bytes" if highest < ENCODINGS["bytes"].size else "gpt2"], "a guess"
    told = f"vocabulary {vocabulary.size}, end of text {vocabulary.end_of_text}"
    yield f"ids {int(tokens.min())} to {highest}; {told} ({said})"
    starts = np.flatnonzero(tokens == vocabulary.end_of_text)
    if not len(starts):
        yield "no end-of-text token in it: one document without a border, or another encoding"
        starts = np.array([-1])
    lengths = np.diff([*starts.tolist(), len(tokens)]) - 1
    begins = "" if starts[0] <= 0 else f", after {starts[0]:,} tokens of one that began before"
    low, quarter, median, high, top = (f"{q:,.0f}" for q in np.percentile(lengths, (0, 25, 50, 75, 100)))
    spread = f"mean {lengths.mean():,.0f}, least {low}, quartiles {quarter} {median} {high}, most {top}"
    yield f"{len(lengths):,} documents{begins}; tokens each: {spread}"
    if not documents:
        return
    text = encoding_for(vocabulary.size, vocab)
    for number, (start, length) in enumerate(zip(starts[:documents].tolist(), lengths.tolist()), 1):
        shown = text.decode(tokens[start + 1 : start + 1 + min(length, 4 * characters)].tolist())[:characters]
        yield f"--- document {number}, {length:,} tokens\n{shown}{' ...' if len(shown) == characters else ''}"


def shards_of(names: list[str]) -> list[str]:
    """The files that files, globs and URLs name, and for a folder the shards in it. PathError, ShardError."""
    files: list[str] = []
    for name in paths.expand(names):
        folder = Path(paths.local_path(name))
        if paths.is_remote(name) or not folder.is_dir():
            files.append(name)
        elif found := [str(path) for path in folder.glob("*.bin")]:
            files += sorted(found, key=paths.natural)
        else:
            raise shards.ShardError(f"{name}: a folder without shards (*.bin)")
    return files


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.look", description="Say what is in token shards.")
    parser.add_argument("shards", nargs="+", metavar="SHARD", help="files, globs, folders or URLs")
    parser.add_argument("--documents", type=int, default=2, metavar="N", help="of each shard, as text (%(default)s)")
    parser.add_argument("--characters", type=int, default=400, metavar="N", help="of each document (%(default)s)")
    parser.add_argument("--encoding", choices=ENCODINGS, help="default: what lies beside the shard says, else a guess")
    parser.add_argument("--vocab", metavar="DIR", help="folder with GPT-2's encoder.json, for machines without network")
    options = parser.parse_args(argv)
    if options.documents < 0 or options.characters < 1:
        parser.error("--documents must be at least 0, --characters at least 1")
    try:
        for path in shards_of(options.shards):
            for line in describe(path, options.documents, options.characters, options.encoding, options.vocab):
                print(line)
    except (paths.PathError, shards.ShardError, TokenizeError) as error:
        print(f"data.look: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(program("data.look", main))
