"""Words of a text and back: splitting, joining with spaces and capitals restored, and the commonest words."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

WORD = re.compile(r"<unk>|[A-Za-z]+(?:'[A-Za-z]+)*|[0-9]|\n|[^\sA-Za-z0-9]")


def split_words(text: str) -> list[str]:
    """Words (with inner apostrophes), single digits, punctuation signs and line ends, in the text's case; `<unk>`, the
    word that stands for a rarer one, is a word."""
    return WORD.findall(text)


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
    """Lower-case words as text: spaces around words but not before punctuation or inside quotes; capitals at
    sentence starts, in `names` and in I. After a quote that ends in ! or ?, 'said' and its like stay
    small."""
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
        both_digits = word.isdigit() and last.isdigit()
        out.append(shown if glue or both_digits else f" {shown}")
        start, last, glue = False, word, word == "("
    return "".join(out)
