"""Stories: a raw corpus cleaned, words as tokens, and text put back together with spaces and capitals.

    python -m lab.stories clean RAW.txt --out=clean.txt                  # what was repaired and dropped, and why
    python -m lab.stories train --model=gpt --path=clean.txt             # about a million parameters; or recurrent
    python -m lab.stories judge gpt=RUN recurrent=RUN --path=clean.txt   # perplexity, novelty, a sample of each

A story ends with the end mark (the document mark of every lab vocabulary), which the models learn to write:
they end their stories by themselves. The stories of Eldan and Li (2023), "TinyStories", are the pattern.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab import LabError, cli
from lab.tokens import WordTokenizer, plain

STORY_END = "<|endoftext|>"
_ALLOWED = re.compile(r"[A-Za-z0-9\n .,!?;:'\"()\-]*\Z")
_ENDS = re.compile(r"[.!?][\"')]*\Z")
# UTF-8 that somebody once read as Windows-1252: an accented capital followed by what no text has there.
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3\u00e2][\u0080-\u00bf\u20ac\u2018-\u2122\u0152\u0153\u0160\u0161\u0178\u02c6\u02dc]+"
)
_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*|[0-9]|\n|[^\sA-Za-z0-9]")


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


def split_words(text: str) -> list[str]:
    """Words (with inner apostrophes), single digits, punctuation signs and line ends, in the text's case."""
    return _WORD.findall(text)


def word_tokenizer(documents: Sequence[str], size: int = 2000, min_count: int = 2) -> WordTokenizer:
    """A vocabulary of the `size` commonest words of at least `min_count` uses; and which of them are names,
    that is written with a capital nearly always where no sentence starts."""
    counts: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    capital: Counter[str] = Counter()
    for document in documents:
        start = True
        for word in split_words(document):
            lower = word.lower()
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
    return WordTokenizer(words, names)


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


def judge(runs: Mapping[str, Path], path: str, *, count: int = 12, temperature: float = 0.8) -> dict[str, Any]:
    """What each run's best checkpoint is worth: losses, and measures of `count` stories it writes (see
    lab/analyses/quality.py), beside the same measures of held-out stories."""
    from lab.analyses.quality import MEASURES, assess
    from lab.checkpoints import best_checkpoint, load_checkpoint
    from lab.datasets import load_documents, split_documents
    from lab.sample import generate

    split = split_documents(load_documents("stories", path))
    told: dict[str, Any] = {}
    for name, run in runs.items():
        checkpoint = load_checkpoint(best_checkpoint(run))
        log = json.loads(next((run / "runs").glob("*.json")).read_text(encoding="utf-8"))
        drawn = generate(
            checkpoint, "Once upon a time", count=count, max_tokens=400, temperature=temperature, top_p=0.95, seed=1
        )
        texts = {"written": [s.text for s in drawn], "held out": split["val"][:count]}
        rows = {kind: assess(stories, split["train"], checkpoint) for kind, stories in texts.items()}
        means = {k: {m: sum(r[m] for r in rs) / len(rs) for m in MEASURES} for k, rs in rows.items()}
        told[name] = {
            "parameters": log["num_parameters"],
            "steps": log["config"]["steps"],
            "best": log["best"],
            "perplexity": math.exp(log["best"]["loss"]),
            "test_loss": log["test_loss"],
            "train_time_s": log["train_time_s"],
            "ended": sum(s.ended for s in drawn),
            "stories": count,
            "temperature": temperature,
            "means": means,
            "sample": next((s.text for s in drawn if s.ended), drawn[0].text),
        }
    return told


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    positional, given = cli.split_arguments(words)
    if positional[:1] == ["judge"] and len(positional) > 1:
        from lab.runlog import write_json

        runs = {name: Path(run) for name, _, run in (word.partition("=") for word in positional[1:])}
        out = Path(given.get("out", Path(__file__).with_name("results") / "stories.json"))
        told = judge(runs, given.get("path", ""))
        write_json(out, told)
        for name, r in told.items():
            m = r["means"]["written"]
            print(
                f"{name}: perplexity {r['perplexity']:.1f}; {r['ended']} of {r['stories']} stories end by themselves; "
                f"nearest training story at {m['novelty_distance']:.2f}, longest shared run "
                f"{m['longest_shared_run']:.0f} characters, grammaticality {m['grammaticality']:.2f}, repetition "
                f"{m['repetition']:.2f}\n  {r['sample']}"
            )
        return 0
    if positional[:1] == ["clean"] and len(positional) == 2:
        text, lines = decode_bytes(Path(positional[1]).read_bytes())
        common = cli.typed("common_words", int, given.pop("common_words", "0"))
        out = given.pop("out", "")
        if given:
            raise LabError(f"unknown argument --{next(iter(given))}; there are --out and --common_words")
        cleaned = clean_stories(text, common_words=common)
        print(f"{cleaned.report()}; lines that were not UTF-8: {lines}")
        if out:
            Path(out).write_text(f"\n{STORY_END}\n".join([*cleaned.stories, ""]), encoding="utf-8")
        return 0
    if positional == ["train"]:
        from lab import train

        model = given.pop("model", "gpt")
        if model not in STORY_MODELS:
            raise LabError(f"--model={model}: stories are for {' and '.join(STORY_MODELS)}")
        settings = {"model": model, "data": "stories", "tokens": "word", **STORY_MODELS[model], **given}
        return train.main([f"--{name}={value}" for name, value in settings.items()])
    print(__doc__)
    return 0 if {"-h", "--help"} & set(words) else 2


# About a million parameters each at 2000 words.
STORY_MODELS = {
    "gpt": {
        "num_layers": 2,
        "model_dim": 128,
        "num_heads": 4,
        "second_input_embedding": "false",
        "steps": 1000,
        "batch_tokens": 4096,
        "row_tokens": 512,
    },
    "recurrent": {
        "cell": "gru",
        "embedding_dim": 128,
        "hidden_dim": 256,
        "steps": 1500,
        "batch_tokens": 4096,
        "row_tokens": 128,
        "dropout": 0.1,
    },
}


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
