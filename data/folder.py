"""What lies beside shards says how to read them: the vocabulary, the end of text, which part is which.

tokenize.json (data.tokenize, data.convert), corpus.json (the embedded corpus) and fineweb.json (data.fineweb) are
such notes. `facts_beside(files)` finds and checks them; `open_folder(folder)` names the parts of a folder of shards;
`tokens_of(text)` makes such a folder of a text, once, in the cache.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data import paths, shards
from data.encoding import ENCODINGS, MARKER, Vocabulary

NOTES = ("tokenize.json", "corpus.json", "fineweb.json")
VAL_FRACTION = 0.1  # of a text that is tokenised on the way


class Facts(NamedTuple):
    """What the note `source` says of the shards beside it."""

    source: Path
    vocabulary: Vocabulary


def facts_beside(files: Sequence[str]) -> Facts | None:
    """What the notes beside these shards say; None where there are none. Remote shards are not asked.

    Raises ShardError for a note that makes no sense, and for shards whose notes contradict each other."""
    found: dict[Path, Facts] = {}
    for folder in dict.fromkeys(Path(paths.local_path(file)).parent for file in files if not paths.is_remote(file)):
        for name in NOTES:
            if (folder / name).is_file():
                found[folder] = Facts(folder / name, _vocabulary(folder / name))
                break
    if len({facts.vocabulary for facts in found.values()}) > 1:
        told = "; ".join(f"{facts.source} says {facts.vocabulary.size}" for facts in found.values())
        raise shards.ShardError(f"the shards are of different vocabularies: {told}")
    return next(iter(found.values()), None)


def _vocabulary(path: Path) -> Vocabulary:
    if path.name != "tokenize.json":
        return ENCODINGS["bytes" if path.name == "corpus.json" else "gpt2"]
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        vocabulary = Vocabulary(int(told["vocab_size"]), int(told["end_of_text"]))
        if not 0 <= vocabulary.end_of_text < vocabulary.size:
            raise ValueError(f"end of text {vocabulary.end_of_text} of {vocabulary.size} tokens")
        return vocabulary
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise shards.ShardError(f"{path}: makes no sense ({type(error).__name__}: {error}); tokenise again") from error


class Parts(NamedTuple):
    """The two parts of a folder of shards, as globs."""

    train_files: str
    val_files: str
    facts: Facts | None
    val_tokens: int  # that the validation shards hold


def open_folder(folder: str | Path) -> Parts:
    """The parts of a folder: shards with "train" in their names and shards with "val". Raises ShardError."""
    folder = Path(folder)
    globs = {part: f"{paths.escaped(folder)}/*{part}*.bin" for part in ("train", "val")}
    for part, pattern in globs.items():
        if not any(folder.glob(f"*{part}*.bin")):
            raise shards.ShardError(
                f"{pattern}: no such shards; a folder of data holds *train*.bin and *val*.bin"
                + (" (tokenise with --val-fraction)" if part == "val" else "")
            )
    files = {part: paths.expand(pattern) for part, pattern in globs.items()}
    held = sum(shards.read_header(path).num_tokens for path in files["val"])
    return Parts(globs["train"], globs["val"], facts_beside(files["train"] + files["val"]), held)


def tokens_of(
    path: str, encoding: str, say: Callable[[str], None] = print, vocab: str | None = None, documents: str | None = None
) -> Path:
    """A folder with the shards of one text (or JSONL, parquet ...), made now unless the cache has them already.

    documents: what a document of a text is, as of data.tokenize; None: what lines equal to `<|endoftext|>` divide,
    where there are any, else all of it. One text is cut at 90 % of its characters; of several documents a tenth goes
    into validation, unless they are so few that none would: then they are cut as one text is. The cache is keyed by
    content: a changed text is tokenised anew. Raises TokenizeError."""
    from data.reading import file_kind
    from data.tokenize import EmptyPart, Settings, tokenize

    local = paths.fetch(path)
    digest, marked = _digest(local)
    if file_kind(path) != "text":
        documents = None
    else:
        documents = documents or ("marker" if marked else "file")
    settings: dict[str, Any] = dict(
        encoding=encoding,
        documents=documents or "file",
        split="characters" if documents == "file" else "documents",
        val_fraction=VAL_FRACTION,
    )
    key = hashlib.sha256(json.dumps([digest, file_kind(path), settings]).encode()).hexdigest()[:16]
    folder = paths.cache_folder() / "tokens" / f"{Path(path).name}-{encoding}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with paths.locked(folder.parent / f".{folder.name}.lock"):
        if not (folder / "tokenize.json").is_file():
            for left in folder.glob(".tokenize-*"):  # by a process that was killed: the lock is ours
                shutil.rmtree(left, ignore_errors=True)
            say(f"tokenising {path} to {folder}")
            how = Settings(out=str(folder), vocab=vocab, overwrite=True, **settings)
            try:
                facts = tokenize([path], how)
            except EmptyPart:
                facts = tokenize([path], how._replace(split="characters"))
            say(f"{path}: {facts['train']['tokens']:,} tokens for training, {facts['val']['tokens']:,} for validation")
    return folder


def _digest(path: Path) -> tuple[str, bool]:
    """(sha256 of a file, whether a line of it is the marker between documents)."""
    seen, marker, before, marked = hashlib.sha256(), b"\n" + MARKER.encode(), b"\n", False
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            seen.update(block)
            marked = marked or marker + b"\n" in before + block or marker + b"\r\n" in before + block
            before = (before + block)[-len(marker) - 2 :]
    return seen.hexdigest(), marked


def check_encoding(files: Sequence[str], tokens: np.ndarray, vocab_size: int, eos_id: int) -> str:
    """Compare the vocabulary that a run is told with what lies beside its shards and with some of its tokens.

    Returns "" or a sentence of warning. Raises ShardError where they contradict."""
    facts = facts_beside(files)
    if facts is not None and facts.vocabulary != (vocab_size, eos_id):
        told = facts.vocabulary
        raise shards.ShardError(
            f"{facts.source}: its shards have {told.size} tokens and end of text {told.end_of_text}, the run was told "
            f"--vocab_size={vocab_size} --eos_id={eos_id}; --data={facts.source.parent} takes them from there"
        )
    if len(tokens) and not np.any(tokens == eos_id):
        highest = int(tokens.max())
        if facts is None and vocab_size > ENCODINGS["bytes"].size > highest:
            raise shards.ShardError(
                f"{files[0]}: its tokens go up to {highest}, and --eos_id={eos_id} is not among them: bytes, rather "
                f"than tokens of a vocabulary of {vocab_size}; for bytes: --vocab_size=256 --eos_id=0"
            )
        return f"the end of text, token {eos_id}, is not among the {len(tokens):,} validation tokens: one document"
    return ""
