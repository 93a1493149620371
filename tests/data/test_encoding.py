"""Text to tokens and back, whole and as a stream."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.encoding import TokenizeError, encoding_for

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def streamed(encoding, tokens):
    decode = encoding.stream_decoder()
    return "".join(decode(token) for token in tokens)


@given(TEXT)
@settings(deadline=None)
def test_bytes_come_back(text):
    encoding = encoding_for(256)
    tokens = encoding.encode(text)
    assert bytes(tokens) == text.encode() == b"".join(map(encoding.raw, tokens))
    assert encoding.decode(tokens) == text == streamed(encoding, tokens)


def test_gpt2_comes_back(shared_data):
    encoding = encoding_for(50257, str(shared_data / "tokenizer"))
    assert encoding.encode("Hello world") == [15496, 995]
    for text in ("Hello world", "naïve 🦆 quack", "<|endoftext|>"):
        tokens = encoding.encode(text)
        assert encoding.decode(tokens) == text == streamed(encoding, tokens)
        assert b"".join(map(encoding.raw, tokens)) == text.encode()


def test_half_a_character_is_kept_back_and_nonsense_is_marked():
    decode = encoding_for(256).stream_decoder()
    assert [decode(byte) for byte in "é!".encode()] == ["", "é", "!"]
    assert encoding_for(256).decode([0xC3, 0x28]) == "\ufffd("


def test_other_vocabularies_are_refused():
    with pytest.raises(TokenizeError, match="1000 tokens is neither"):
        encoding_for(1000)
