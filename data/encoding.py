"""Between text and tokens, both ways: bytes, or GPT-2's byte pairs. A model is known by the size of its vocabulary."""

from __future__ import annotations

import codecs
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import shards

MARKER = "<|endoftext|>"

_LONGEST_BLANK = 1 << 17  # characters of white space in a row that the GPT-2 tokenizer is given; even: 628 is two ends
_BLANKS = re.compile(rf"\s{{{_LONGEST_BLANK}}}")
# GPT-2's split into words, from the release of its vocabulary; an alternation of the contractions is equivalent.
_GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_ENCODER_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"


class Vocabulary(NamedTuple):
    """How many tokens an encoding has, and the one that opens every document."""

    size: int
    end_of_text: int


ENCODINGS = {"gpt2": Vocabulary(50257, 50256), "bytes": Vocabulary(256, 0)}


class TokenizeError(ValueError):
    """Input that cannot be tokenized, or output that cannot be written; the message names the place and the cause."""


class Encoding:
    """How one model reads and writes text.

    encode(text) -> token ids. stream_decoder() -> a function that takes one token after the other and returns the
    text that is complete so far: a character of several bytes comes with the token that ends it."""

    def __init__(self, encode: Callable[[str], Iterable[int]], piece: Callable[[int], bytes]):
        self._encode, self.piece = encode, piece

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._encode(text)]

    def raw(self, token: int) -> bytes:
        """The bytes of one token, which may be a part of a character."""
        return self.piece(token)

    def decode(self, tokens: list[int]) -> str:
        return b"".join(self.piece(token) for token in tokens).decode("utf-8", errors="replace")

    def stream_decoder(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(self.piece(token))


def encoding_for(vocab_size: int, vocab: str | None = None) -> Encoding:
    """The encoding of models with `vocab_size` tokens: 256 bytes, or GPT-2's 50257.

    vocab: folder with GPT-2's encoder.json, where there is no network. Raises TokenizeError."""
    if vocab_size == 256:
        return Encoding(bytes_encoder, lambda token: bytes([token]))
    if vocab_size == 50257:
        known = _gpt2_encoding(vocab)
        return Encoding(
            gpt2_encoder(vocab), lambda t: MARKER.encode() if t == 50256 else known.decode_single_token_bytes(t)
        )
    raise TokenizeError(f"a vocabulary of {vocab_size} tokens is neither bytes (256) nor GPT-2's (50257)")


def encoding_name(vocab_size: int) -> str:
    """The key in ENCODINGS of a vocabulary's size. Raises TokenizeError."""
    for name, vocabulary in ENCODINGS.items():
        if vocabulary.size == vocab_size:
            return name
    raise TokenizeError(f"a vocabulary of {vocab_size} tokens is neither bytes (256) nor GPT-2's (50257)")


def token_bytes(vocab_size: int, vocab: str | None = None) -> np.ndarray:
    """int64 (vocab_size,): how many bytes of text each token stands for; none for the end of text."""
    encoding, name = encoding_for(vocab_size, vocab), encoding_name(vocab_size)
    lengths = np.array([len(encoding.piece(token)) for token in range(vocab_size)])
    lengths[ENCODINGS[name].end_of_text] = 0
    return lengths


def longest_prefixes(pieces: Sequence[bytes]) -> np.ndarray:
    """int64 (tokens,): the number of the longest other token that each token's bytes begin with; -100: none."""
    numbers = {piece: number for number, piece in enumerate(pieces) if piece}
    found = np.full(len(pieces), -100, dtype=np.int64)
    for number, piece in enumerate(pieces):
        starts = (numbers[piece[:end]] for end in range(len(piece) - 1, 0, -1) if piece[:end] in numbers)
        found[number] = next(starts, -100)
    return found


def prefix_tokens(vocab_size: int, vocab: str | None = None) -> np.ndarray:
    """`longest_prefixes` of a vocabulary; the end of text has none and is none. Raises TokenizeError."""
    encoding, name = encoding_for(vocab_size, vocab), encoding_name(vocab_size)
    if name == "bytes":
        raise TokenizeError("no byte is the beginning of another one; the vocabulary must have longer tokens")
    end = ENCODINGS[name].end_of_text
    return longest_prefixes([b"" if token == end else encoding.piece(token) for token in range(vocab_size)])


def token_characters(vocab_size: int, vocab: str | None = None) -> np.ndarray:
    """int64 (vocab_size,): how many characters begin in each token; none in the end of text."""
    encoding, name = encoding_for(vocab_size, vocab), encoding_name(vocab_size)
    counts = np.array([sum(byte & 0xC0 != 0x80 for byte in encoding.piece(token)) for token in range(vocab_size)])
    counts[ENCODINGS[name].end_of_text] = 0
    return counts


def bytes_encoder(text: str) -> np.ndarray:
    """UTF-8 bytes as tokens. Byte 0 is taken: it separates documents."""
    data = text.encode("utf-8")
    if b"\0" in data:
        raise TokenizeError("byte 0 in the text, which marks the beginning of documents; remove it from the input")
    return np.frombuffer(data, dtype=np.uint8).astype(shards.TOKEN)


def gpt2_encoder(vocab: str | None = None) -> Callable[[str], np.ndarray]:
    """GPT-2's byte-pair encoder; `<|endoftext|>` in a text is ordinary text.

    vocab: folder with GPT-2's encoder.json, checked by its hash. Without it tiktoken uses its cache or downloads.
    """
    encoding = _gpt2_encoding(vocab)

    def encode(text: str) -> np.ndarray:
        text.encode("utf-8")  # lone surrogates: the same error as for bytes, where tiktoken would replace them
        parts = [encoding.encode_ordinary(part) for part in _without_long_blanks(text)]
        return np.concatenate([np.array(tokens, dtype=shards.TOKEN) for tokens in parts])

    return encode


def _without_long_blanks(text: str) -> list[str]:
    """`text` cut inside every long run of white space: tiktoken's pattern gives up on about half a million of them.

    A run of one kind of white space keeps its tokens, since GPT-2 has none for more than two such characters."""
    ends = [found.end() for found in _BLANKS.finditer(text)]
    return [text[begin:end] for begin, end in zip([0, *ends], [*ends, len(text)])] if ends else [text]


def _gpt2_encoding(vocab: str | None) -> Any:
    import tiktoken

    if vocab is None:
        try:
            return tiktoken.get_encoding("gpt2")
        except Exception as error:  # requests' many kinds, and a wrong hash
            raise TokenizeError(
                f"the GPT-2 vocabulary could not be downloaded ({type(error).__name__}); with --vocab DIR it is read "
                "from encoder.json in a folder"
            ) from error
    return _offline_gpt2(vocab)


@cache
def _offline_gpt2(vocab: str) -> Any:
    import tiktoken

    return tiktoken.Encoding(
        "gpt2",
        pat_str=_GPT2_PATTERN,
        mergeable_ranks=gpt2_ranks(vocab),
        special_tokens={MARKER: ENCODINGS["gpt2"].end_of_text},
        explicit_n_vocab=ENCODINGS["gpt2"].size,
    )


def gpt2_ranks(vocab: str) -> dict[bytes, int]:
    """GPT-2's tokens as bytes, with their numbers, from encoder.json in the folder `vocab`. Raises TokenizeError."""
    path = Path(vocab) / "encoder.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TokenizeError(f"{path}: {error.strerror}; --vocab names the folder that holds encoder.json") from error
    if (digest := hashlib.sha256(data).hexdigest()) != _ENCODER_SHA256:
        raise TokenizeError(f"{path}: not GPT-2's vocabulary: sha256 {digest}, expected {_ENCODER_SHA256}")
    byte_of = _bytes_by_character()
    # In this vocabulary a token's number is its rank among the merges, so the merges' own file is not needed.
    return {bytes(byte_of[c] for c in token): rank for token, rank in json.loads(data).items() if token != MARKER}


def _bytes_by_character() -> dict[str, int]:
    """GPT-2's file writes bytes as characters: visible Latin-1 as themselves, the other 68 from U+0100 on, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in visible}
    for byte in range(256):
        if byte not in visible:
            table[chr(0x100 + len(table) - len(visible))] = byte
    return table


def make_encoder(name: str, vocab: str | None) -> Callable[[str], np.ndarray]:
    """The function that turns a text into token ids (uint16)."""
    return bytes_encoder if name == "bytes" else gpt2_encoder(vocab)
