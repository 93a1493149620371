"""Stories made clean: encodings repaired, typography folded to ASCII, and an account of what was dropped and why.

The stories of Eldan and Li (2023), "TinyStories", are the pattern.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from lab import LabError
from lab.words import split_words

STORY_END = "<|endoftext|>"
_ALLOWED = re.compile(r"[A-Za-z0-9\n .,!?;:'\"()\-]*\Z")
_ENDS = re.compile(r"[.!?][\"')]*\Z")
# UTF-8 that somebody once read as Windows-1252: an accented capital followed by what no text has there.
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3\u00e2][\u0080-\u00bf\u20ac\u2018-\u2122\u0152\u0153\u0160\u0161\u0178\u02c6\u02dc]+"
)


def plain(text: str) -> str:
    """`text` with typographic variants folded to their plain forms (NFKC, quotes and dashes to ASCII)."""
    table = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "-", "\u2014": "-"})
    return unicodedata.normalize("NFKC", text).translate(table).replace("\u2026", "...")


def decode_bytes(raw: bytes) -> tuple[str, int]:
    """Text of bytes that should be UTF-8, line by line: a line that is not is read as Windows-1252. Returns
    the text and the number of such lines."""
    lines, repaired = [], 0
    for line in raw.split(b"\n"):
        try:
            lines.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            lines.append(line.decode("cp1252", "replace"))
            repaired += 1
    return "\n".join(lines).replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff"), repaired


def repair_encoding(text: str) -> str:
    """Undo one reading of UTF-8 as Windows-1252 (curly quotes that became three signs), where that works."""

    def undo(match: re.Match) -> str:
        raw = b""
        for c in match.group():
            try:
                raw += c.encode("cp1252")
            except UnicodeEncodeError:  # the five bytes that Windows-1252 leaves out keep their number
                if ord(c) > 255:
                    return match.group()
                raw += bytes([ord(c)])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return match.group()

    return _MOJIBAKE.sub(undo, text)


@dataclass(frozen=True)
class Cleaned:
    """Clean stories and an account of the rest. `dropped` counts stories by reason, `repaired` those
    mended."""

    stories: list[str]
    repaired: int
    dropped: dict[str, int]

    def report(self) -> str:
        """One line: kept, repaired, dropped and why."""
        why = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items() if count) or "none"
        return f"{len(self.stories)} stories kept, {self.repaired} of them repaired; dropped: {why}"


def clean_story(story: str) -> str:
    """One story with its encoding repaired, typography folded to ASCII and white space tidied."""
    story = plain(repair_encoding(story))
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in story.split("\n"))
    return "\n".join(line for line in lines if line)


def clean_stories(text: str, *, min_words: int = 20, max_words: int = 500, common_words: int = 0) -> Cleaned:
    """Clean a corpus of stories separated by `<|endoftext|>`.

    Dropped: broken characters that could not be repaired; characters beyond letters, digits and plain
    punctuation; stories that do not end as a sentence; too short or too long; copies; and, with
    `common_words`, those that use a word outside of the corpus's so many commonest.
    """
    kept: dict[str, None] = {}
    dropped = dict.fromkeys(("broken", "foreign characters", "incomplete", "length", "copy", "rare words"), 0)
    repaired = 0
    for raw in text.split(STORY_END):
        if not raw.strip():
            continue
        story = clean_story(raw)
        words = len(story.split())
        if "\ufffd" in story or _MOJIBAKE.search(story):
            dropped["broken"] += 1
        elif not _ALLOWED.match(story):
            dropped["foreign characters"] += 1
        elif not _ENDS.search(story) or story.count('"') % 2:
            dropped["incomplete"] += 1
        elif not min_words <= words <= max_words:
            dropped["length"] += 1
        elif story in kept:
            dropped["copy"] += 1
        else:
            kept[story] = None
            repaired += "\ufffd" not in raw and repair_encoding(raw) != raw
    stories = list(kept)
    if common_words:
        counts = Counter(w.lower() for s in stories for w in split_words(s))
        common = {w for w, _ in counts.most_common(common_words)}
        stories = [s for s in stories if all(w.lower() in common for w in split_words(s))]
        dropped["rare words"] = len(kept) - len(stories)
    return Cleaned(stories, repaired, dropped)


def read_stories(path: str | Path) -> Cleaned:
    """Clean the stories of a file, whatever its encoding. LabError if it cannot be read or nothing is
    left."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise LabError(f"cannot read the stories {path}: {error.strerror}") from error
    cleaned = clean_stories(decode_bytes(raw)[0])
    if not cleaned.stories:
        raise LabError(f"no story is left of {path} ({cleaned.report()}); stories are separated by lines {STORY_END}")
    return cleaned
