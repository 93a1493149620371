"""Vocabularies: characters, bytes, words and GPT-2's pieces, each rebuilt exactly from a JSON spec.

A checkpoint carries its vocabulary's spec and digest, so a model is never fed another's ids. `mark` is the id
that opens every document and, as a target, ends it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from lab import LabError
from lab.models.base import MARK
from lab.words import common_words, join_words, split_words

UNKNOWN = -1  # stands in `encode(..., unknown="keep")` for text that the vocabulary lacks


class UnknownTextError(LabError):
    """Text with characters that the vocabulary lacks; `characters` counts them."""

    def __init__(self, characters: Counter, position: int, known: str):
        self.characters = characters
        listed = ", ".join(f"{c!r} (U+{ord(c):04X})" for c in list(characters)[:8])
        more = f" and {len(characters) - 8} more" if len(characters) > 8 else ""
        super().__init__(
            f"the text has characters the model's vocabulary lacks: {listed}{more}, first at character {position}; "
            f"the vocabulary has {known}. Rewrite the text, or train a model on a corpus that holds them"
        )


class Tokenizer:
    """The interface. `encode` gives int64 ids without marks; `decode` skips marks; `piece` is one id, printable."""

    kind = ""
    vocab_size = 0
    mark = MARK
    lossless = True  # decode(encode(text)) == text for text that is known
    never_written: tuple[int, ...] = ()  # ids that a model may read but must not write

    def encode(self, text: str, unknown: str = "error") -> np.ndarray:
        """Ids of `text`. What the vocabulary lacks raises UnknownTextError, or with unknown="keep" reads UNKNOWN."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, marks left out."""
        raise NotImplementedError

    def spec(self) -> dict[str, Any]:
        """JSON from which `from_spec` rebuilds this vocabulary."""
        return {"kind": self.kind}

    def piece(self, token: int) -> str:
        """One token as it should appear in a picture: spaces and line ends as signs, the mark as '<mark>', what is
        only a part of a character as its bytes, '<CE>'. For looking, not for counting: two tokens may look alike."""
        if token == self.mark:
            return "<mark>"
        raw = self.raw(token)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            return "".join(f"<{byte:02X}>" for byte in raw)
        if text in ("\u2423", "\u21b5", "\u21e5"):  # these signs themselves, not what they stand for below
            return f"<U+{ord(text):04X}>"
        shown = text.replace(" ", "\u2423").replace("\n", "\u21b5").replace("\t", "\u21e5")
        return "".join(c if c.isprintable() else f"<{ord(c):02X}>" for c in shown)

    def raw(self, token: int) -> bytes:
        """The bytes that one token stands for."""
        return self.decode([token]).encode("utf-8", "surrogatepass")

    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of the spec."""
        canonical = json.dumps(self.spec(), sort_keys=True, ensure_ascii=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class CharTokenizer(Tokenizer):
    """One token a character: id 0 is the mark, then the corpus's characters in code point order."""

    kind = "char"

    def __init__(self, characters: Iterable[str]):
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise LabError("a character vocabulary needs at least one character; is the corpus empty?")
        self.vocab_size = len(self.characters) + 1
        points = np.frombuffer(self.characters.encode("utf-32-le"), dtype=np.uint32)
        self._table = np.full(int(points.max()) + 1, UNKNOWN, dtype=np.int64)
        self._table[points] = np.arange(1, self.vocab_size)

    def encode(self, text: str, unknown: str = "error") -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        inside = points < len(self._table)
        ids = np.where(inside, self._table[np.where(inside, points, 0)], UNKNOWN)
        missing = np.flatnonzero(ids == UNKNOWN)
        if len(missing) and unknown == "error":
            counts = Counter(text[i] for i in missing)
            raise UnknownTextError(counts, int(missing[0]), f"{len(self.characters)} characters: {self.characters!r}")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i - 1] for i in ids if i != self.mark)

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "characters": self.characters}


class ByteTokenizer(Tokenizer):
    """One token a byte of UTF-8: 256 ids, byte 0 is the mark. What train_gpt.py's nano preset reads."""

    kind, vocab_size = "byte", 256

    def encode(self, text: str, unknown: str = "error") -> np.ndarray:
        ids = np.frombuffer(text.encode("utf-8", "replace"), dtype=np.uint8).astype(np.int64)
        if len(zeros := np.flatnonzero(ids == self.mark)):
            if unknown == "error":
                raise UnknownTextError(Counter({"\0": len(zeros)}), text.index("\0"), "every byte but 0, the mark")
            ids[zeros] = UNKNOWN
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i != self.mark).decode("utf-8", "replace")

    def raw(self, token: int) -> bytes:
        return bytes([token])


class GPT2Tokenizer(Tokenizer):
    """GPT-2's byte pairs, by the encoding that data.tokenize uses; `folder` holds encoder.json and
    vocab.bpe where there is no network."""

    kind, vocab_size, mark = "gpt2", 50257, 50256

    def __init__(self, folder: str | None = None) -> None:
        from data.encoding import encoding_for  # only here: the character rungs do without it

        try:
            self._encoding = encoding_for(self.vocab_size, folder)
        except Exception as error:  # the network's own errors, which this file need not know
            raise LabError(
                f"GPT-2's vocabulary cannot be loaded ({error}); give a folder with encoder.json and vocab.bpe "
                "(--vocab), or connect once"
            ) from error

    def encode(self, text: str, unknown: str = "error") -> np.ndarray:
        return np.array(self._encoding.encode(text), dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self._encoding.decode([int(i) for i in ids if i != self.mark])

    def raw(self, token: int) -> bytes:
        return self._encoding.raw(token)


class WordTokenizer(Tokenizer):
    """One token a word or punctuation sign, lower case: id 0 is the mark (end of story), id 1 the unknown word.

    `decode` restores spaces and capitals: sentence starts, `i`, and the words that the corpus writes with a
    capital inside sentences (names), which the spec lists.
    """

    kind, lossless, unknown_id = "word", False, 1
    never_written = (1,)  # a story with holes is none, and once one unknown word is written more follow

    def __init__(self, words: Sequence[str], capitalized: Iterable[str] = ()):
        if not words:
            raise LabError("a word vocabulary needs at least one word; is the corpus empty?")
        self.words, self.capitalized = list(words), sorted(set(capitalized))
        self.vocab_size = len(self.words) + 2
        self._ids = {word: i + 2 for i, word in enumerate(self.words)}
        self._names = set(self.capitalized)

    def encode(self, text: str, unknown: str = "error") -> np.ndarray:
        missing = UNKNOWN if unknown == "keep" else self.unknown_id
        return np.array([self._ids.get(w.lower(), missing) for w in split_words(text)], dtype=np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        words = ["<unk>" if i == self.unknown_id else self.words[i - 2] for i in ids if i != self.mark]
        return join_words(words, self._names)

    def piece(self, token: int) -> str:
        special = {self.mark: "<mark>", self.unknown_id: "<unk>", self._ids.get("\n"): "\u21b5"}
        return special[token] if token in special else self.words[token - 2]

    def spec(self) -> dict[str, Any]:
        return {"kind": self.kind, "words": self.words, "capitalized": self.capitalized}


def word_tokenizer(documents: Sequence[str], size: int = 2000, min_count: int = 2) -> WordTokenizer:
    """A vocabulary of the `size` commonest words of `documents`, see `common_words`."""
    return WordTokenizer(*common_words(documents, size, min_count))


def from_spec(spec: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a spec; LabError for a kind this version does not know."""
    kind = spec.get("kind")
    if kind == "char":
        return CharTokenizer(spec["characters"])
    if kind == "byte":
        return ByteTokenizer()
    if kind == "gpt2":
        return GPT2Tokenizer()
    if kind == "word":
        return WordTokenizer(spec["words"], spec.get("capitalized", ()))
    raise LabError(f"the checkpoint's vocabulary is of kind {kind!r}; known are char, byte, gpt2 and word")
