"""Between text and tokens, both ways, for a model that is known by its vocabulary size: bytes or GPT-2's BPE."""

from __future__ import annotations

import codecs
from collections.abc import Callable

from data.tokenize import TokenizeError, _gpt2_encoding, bytes_encoder, gpt2_encoder


class Encoding:
    """How one model reads and writes text.

    encode(text) -> token ids. stream_decoder() -> a function that takes one token after the other and returns the
    text that is complete so far: a character of several bytes comes with the token that ends it."""

    def __init__(self, encode: Callable[[str], object], piece: Callable[[int], bytes]):
        self._encode, self._piece = encode, piece

    def encode(self, text: str) -> list[int]:
        return [int(token) for token in self._encode(text)]

    def decode(self, tokens: list[int]) -> str:
        return b"".join(self._piece(token) for token in tokens).decode("utf-8", errors="replace")

    def stream_decoder(self) -> Callable[[int], str]:
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        return lambda token: decoder.decode(self._piece(token))


def encoding_for(vocab_size: int, vocab: str | None = None) -> Encoding:
    """The encoding of models with `vocab_size` tokens: 256 bytes, or GPT-2's 50257.

    vocab: folder with GPT-2's encoder.json, where there is no network. Raises TokenizeError."""
    if vocab_size == 256:
        return Encoding(bytes_encoder, lambda token: bytes([token]))
    if vocab_size == 50257:
        return Encoding(gpt2_encoder(vocab), _gpt2_encoding(vocab).decode_single_token_bytes)
    raise TokenizeError(f"a vocabulary of {vocab_size} tokens is neither bytes (256) nor GPT-2's (50257)")
