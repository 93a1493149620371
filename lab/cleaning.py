"""Stories made clean: encodings repaired, typography folded to ASCII, and an account of what was dropped and why.

The stories of Eldan and Li (2023), "TinyStories", are the pattern.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import LabError
from lab.tables import read_table
from lab.words import WORD, split_words

STORY_END = "<|endoftext|>"
UNKNOWN_WORD = "<unk>"
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
    """Clean stories and an account of the rest. `dropped` counts stories by reason, `repaired` those mended."""

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


def clean_stories(
    stories: Iterable[str],
    *,
    min_words: int = 20,
    max_words: int = 500,
    common_words: int = 0,
    replaced_share: float = 0.0,
) -> Cleaned:
    """Clean stories.

    Dropped: broken characters that could not be repaired; characters beyond letters, digits and plain
    punctuation; stories that do not end as a sentence; too short or too long; copies; and, with
    `common_words`, those in which more than `replaced_share` of the words are outside of the corpus's so many
    commonest. Where it is less, those words are replaced by UNKNOWN_WORD.
    """
    kept: dict[str, None] = {}
    dropped = dict.fromkeys(("broken", "foreign characters", "incomplete", "length", "copy", "rare words"), 0)
    repaired = 0
    for raw in stories:
        if not raw.strip():
            continue
        story = clean_story(raw)
        words = len(story.split())
        if "\ufffd" in story or _MOJIBAKE.search(story):
            dropped["broken"] += 1
        elif not _ALLOWED.match(story.replace(UNKNOWN_WORD, "")):
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
    clean = list(kept)
    if common_words:
        common, shares = rare_shares(clean, common_words)
        plain_enough = [replace_rare(s, common) for s, share in zip(clean, shares) if share <= replaced_share]
        clean = list(dict.fromkeys(plain_enough))
        dropped["rare words"] = len(kept) - len(plain_enough)
        dropped["copy"] += len(plain_enough) - len(clean)
    return Cleaned(clean, repaired, dropped)


def rare_shares(stories: Sequence[str], common_words: int) -> tuple[set[str], list[float]]:
    """(the `common_words` commonest words, lower case; the share of each story's words that are not among them)."""
    words = [[w.lower() for w in split_words(s)] for s in stories]
    common = {w for w, _ in Counter(w for ws in words for w in ws).most_common(common_words)}
    return common, [sum(w not in common for w in ws) / max(1, len(ws)) for ws in words]


def replace_rare(story: str, common: set[str]) -> str:
    """`story` with every word outside of `common` replaced by UNKNOWN_WORD, its spaces and line ends kept."""
    return WORD.sub(lambda m: m.group() if m.group().lower() in common else UNKNOWN_WORD, story)


def kept_by_share(stories: Sequence[str], common_words: int, shares: Sequence[float]) -> dict[float, int]:
    """{share: how many stories hold at most that share of rarer words}: what each choice of a share keeps."""
    found = rare_shares(stories, common_words)[1]
    return {share: sum(one <= share for one in found) for share in shares}


def read_stories(path: str | Path) -> Cleaned:
    """Clean the stories of a file, whatever its encoding. LabError if it cannot be read or nothing is left."""
    cleaned = clean_stories(raw_stories(path)[0])
    if not cleaned.stories:
        raise LabError(
            f"no story is left of {path} ({cleaned.report()}); stories are separated by lines {STORY_END}, or stand "
            "under 'text' in CSV or JSON lines"
        )
    return cleaned


def raw_stories(path: str | Path) -> tuple[list[str], int]:
    """(the stories of a file as they are, lines that were not UTF-8): text whose stories are separated by STORY_END,
    in whatever encoding, or CSV or JSON lines with the stories under 'text'."""
    if str(path).lower().endswith((".csv", ".jsonl")):
        return read_table(path, "text"), 0
    try:
        text, repaired = decode_bytes(Path(path).read_bytes())
    except OSError as error:
        raise LabError(f"cannot read the stories {path}: {error.strerror}") from error
    return text.split(STORY_END), repaired
