"""Shards from token files of other projects: nanoGPT's (16-bit tokens without a header) and NumPy's .npy.

    python -m data.convert train.bin val.bin --out DIR                 # nanoGPT's, GPT-2 tokens
    python -m data.convert train.npy --out DIR --encoding bytes

A file whose name holds "val" or "test" becomes validation, the others training, in the order given. nanoGPT puts the
end of text after each document, not before it: an end-of-text token is added at the beginning of a part that has none
there, so that documents have the same borders; the last one is then left as it is. Exit codes: 0 done, 2 wrong usage,
3 a file that cannot be converted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from data import paths, shards
from data.echo import program
from data.encoding import ENCODINGS, TokenizeError
from data.tokenize import PartWriter

_BLOCK_TOKENS = 1 << 22


def read_tokens(path: str) -> np.ndarray:
    """The tokens of a nanoGPT or .npy file as a memory map of integers. Raises TokenizeError."""
    try:
        if path.endswith(".npy"):
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        else:
            size = Path(path).stat().st_size
            if size % 2:
                raise TokenizeError(f"{path}: {size} bytes, an odd number: not 16-bit tokens")
            tokens = np.memmap(path, dtype=shards.TOKEN, mode="r") if size else np.empty(0, shards.TOKEN)
    except (OSError, ValueError, EOFError) as error:
        if isinstance(error, TokenizeError):
            raise
        raise TokenizeError(f"{path}: cannot be read: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise TokenizeError(
            f"{path}: an array of {tokens.dtype} in {tokens.ndim} dimensions; one row of integers is needed"
        )
    if not path.endswith(".npy") and tokens[:2].tobytes() == shards.MAGIC.to_bytes(4, "little"):
        raise TokenizeError(f"{path}: a token shard already")
    return tokens


def convert(files: list[str], out: Path, encoding: str, shard_tokens: int) -> dict:
    """Write shards of `files` and tokenize.json to `out`; returns what that holds. Raises TokenizeError."""
    vocabulary = ENCODINGS[encoding]
    if twice := [path for path in files if files.count(path) > 1]:
        raise TokenizeError(f"{twice[0]}: named {files.count(twice[0])} times; name each file once")
    if list(out.glob("*.bin")):
        raise TokenizeError(f"{out}: holds .bin files already; give another --out")
    opened = {path: read_tokens(path) for path in files}
    if empty := [path for path, tokens in opened.items() if not len(tokens)]:
        raise TokenizeError(f"{empty[0]}: holds no tokens")
    writers = {part: PartWriter(out, part, shard_tokens) for part in ("train", "val")}
    try:
        for path, tokens in opened.items():
            writer = writers["val" if any(word in Path(path).name for word in ("val", "test")) else "train"]
            for start in range(0, len(tokens), _BLOCK_TOKENS):
                block = np.asarray(tokens[start : start + _BLOCK_TOKENS])
                shards.check_vocabulary(path, block, start, vocabulary.size)
                if not writer.counts and block[0] != vocabulary.end_of_text:
                    writer.append(np.array([vocabulary.end_of_text]))
                writer.append(block)
        for writer in writers.values():
            writer.close()
    except (shards.ShardError, OSError) as error:
        raise TokenizeError(str(error)) from error
    finally:
        for writer in writers.values():
            writer.abandon()
    infos = [info for writer in writers.values() for info in writer.files]
    facts = {
        "schema": 1,
        "inputs": files,
        "encoding": encoding,
        "vocab_size": vocabulary.size,
        "end_of_text": vocabulary.end_of_text,
        **{part: {"tokens": writer.counts["tokens"]} for part, writer in writers.items() if writer.files},
        "shards": {Path(info.path).name: shards.data_hash([info]) for info in infos},
    }
    with paths.atomic_file(out / "tokenize.json", "w") as file:
        json.dump(facts, file, indent=1)
    return facts


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m data.convert", description="Make shards of others' token files.")
    parser.add_argument("files", nargs="+", metavar="FILE", help="nanoGPT's .bin, or .npy")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder for the shards")
    parser.add_argument("--encoding", choices=ENCODINGS, default="gpt2", help="of the tokens; default: %(default)s")
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, metavar="N", help="default: %(default)s")
    options = parser.parse_args(argv)
    if not 0 < options.shard_tokens <= shards.MAX_TOKENS:
        parser.error(f"--shard-tokens must be from 1 to {shards.MAX_TOKENS}")
    try:
        facts = convert(options.files, options.out, options.encoding, options.shard_tokens)
    except TokenizeError as error:
        print(f"data.convert: {error}", file=sys.stderr)
        return 3
    told = ", ".join(f"{part} {facts[part]['tokens']:,} tokens" for part in ("train", "val") if part in facts)
    missing = [part for part in ("train", "val") if part not in facts]
    for part in missing:
        print(f"data.convert: none of them is for {part} (a name with val or test is for val)", file=sys.stderr)
    print(told if missing else f"{told}; train with: python train_gpt.py --data={options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(program("data.convert", main))
