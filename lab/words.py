"""Words of a text and back: splitting, joining with spaces and capitals restored, and the commonest words.

In any alphabet: a word is a run of letters with the signs that belong to them (accents, the vowel signs of Hindi). Of
scripts that put no spaces between words (Chinese, Japanese, Thai, Khmer, Burmese) a word is one character.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_FIRST_SIGN, _LAST_SIGN = 0x300, 0x12000  # where Unicode has nearly all of its combining characters


def _signs() -> str:
    """The inside of a class of a regular expression: what belongs to the letter before it and is none, as Python's
    `\\w` has it: combining characters, and the joiners of Persian and Hindi."""
    points = (chr(p) for p in range(_FIRST_SIGN, _LAST_SIGN))
    return "\u200c\u200d" + "".join(c for c in points if unicodedata.category(c).startswith("M"))


_LETTER = rf"(?:[A-Za-z]+|(?![{_UNSPACED}])[^\W\d_])"
_SIGN = rf"(?=[^\x00-\u02ff])[{_signs()}]"  # the first look is quick, and enough for most texts
_RUN = rf"{_LETTER}(?:{_LETTER}|{_SIGN})*"
WORD = re.compile(rf"<unk>|{_RUN}(?:['\u2019]{_RUN})*|[{_UNSPACED}](?:{_SIGN})*|\S|\n")
_TIGHT = re.compile(f"[{_UNSPACED}\u3000-\u303f\uff00-\uff65]")  # with the punctuation of such scripts


def split_words(text: str) -> list[str]:
    """Words (with inner apostrophes), single digits, punctuation signs and line ends, in the text's case; `<unk>`, the
    word that stands for a rarer one, is a word."""
    return WORD.findall(text)


def unread_words(tokenizer: Any, text: str) -> str:
    """A sentence that names the words which a vocabulary of words lacks and so reads as its unknown word; '' if there
    are none, or the vocabulary is of another kind (it refuses what it does not know)."""
    if tokenizer.kind != "word":
        return ""
    missing = [w for w in dict.fromkeys(split_words(text)) if tokenizer.encode(w, "keep").min() < 0]
    if not missing:
        return ""
    listed = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
    return f"The model knows {tokenizer.vocab_size - 2:,} words and reads these as <unk>: {listed}."


def common_words(documents: Sequence[str], size: int = 2000, min_count: int = 2) -> tuple[list[str], list[str]]:
    """(the `size` commonest words of at least `min_count` uses, lower case; those of them that are names, that is
    written with a capital nearly always where no sentence starts)."""
    counts: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    capital: Counter[str] = Counter()
    for document in documents:
        start = True
        for word in split_words(document):
            lower = word.lower()
            if word == "<unk>":
                start = False
                continue
            counts[lower] += 1
            if word[0].isalpha():
                if not start:
                    inside[lower] += 1
                    capital[lower] += word[0].isupper()
                start = False
            elif word in '.!?"\n':
                start = True
    words = [w for w, n in counts.most_common(size) if n >= min_count] or [w for w, _ in counts.most_common(size)]
    names = [w for w in words if inside[w] >= 2 and capital[w] > 0.8 * inside[w]]
    return words, names


_SPEECH = {"said", "asked", "replied", "shouted", "cried", "whispered", "answered", "called", "exclaimed", "he", "she"}
_SPEECH |= {"they", "it", "the", "his", "her"}


def join_words(words: Iterable[str], names: set[str] | frozenset[str] = frozenset()) -> str:
    """Lower-case words as text: spaces around words but not before punctuation or inside quotes; capitals at sentence
    starts, in `names` and in I. After a quote that ends in ! or ?, 'said' and its like stay small."""
    out: list[str] = []
    quoted, start, last, glue = False, True, "", True
    for word in words:
        if word == "\n":
            out.append("\n")
            quoted, start, last, glue = False, True, word, True
            continue
        if word == '"':
            if quoted:
                out.append('"')
                quoted, glue = False, False
            else:
                out.append('"' if glue else ' "')
                quoted, start, glue = True, True, True
                last = word
            continue
        if not word[0].isalnum() and word != "<unk>" and word != "(":
            out.append(word)
            start = (start and word not in ",;:") or word in ".!?"
            last, glue = word, word == "-"
            continue
        if last in "!?" and out and out[-1] == '"' and word in _SPEECH:
            start = False
        shown = word
        if start or word in names or word == "i" or word.startswith("i'"):
            shown = word[0].upper() + word[1:]
        together = (word.isdigit() and last.isdigit()) or (_TIGHT.match(word) and _TIGHT.match(last))
        out.append(shown if glue or together else f" {shown}")
        start, last, glue = False, word, word == "("
    return "".join(out)
