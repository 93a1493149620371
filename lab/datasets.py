"""Corpora for the lab: documents, their split, and packed rows for any rung.

A corpus is a list of documents: a name, a story, an article, a passage of running text. Documents are split
into train, validation and test first, and contexts are cut afterwards, so no context straddles two splits. A
document that occurs twice may still lie in two splits: `overlap` tells how many do, `unique` splits keep copies
together. A document of L tokens gives L + 1 predictions: inputs mark, t1 .. tL; targets t1 .. tL, mark.
"""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lab import LabError
from lab.cleaning import STORY_END, read_stories
from lab.embedded import embedded_documents, floor_on
from lab.models.base import IGNORE, MARK
from lab.tables import read_table, read_utf8
from lab.tokens import ByteTokenizer, CharTokenizer, Tokenizer, word_tokenizer

KINDS = ("names", "text", "stories", "sums")
SPLITS = ("train", "val", "test")
SPLIT_KINDS = ("documents", "unique")
PASSAGE_CHARS = 2000  # running text is split in passages of at least this length, ended at a blank line


def read_text(path: str | Path) -> str:
    """A UTF-8 text file with newlines as \\n; LabError if it is missing, empty or not UTF-8."""
    return read_utf8(path).replace("\r\n", "\n").replace("\r", "\n")


def names_documents(text: str) -> list[str]:
    """One document a line, blank lines dropped."""
    return [line.strip() for line in text.split("\n") if line.strip()]


def text_documents(text: str, passage_chars: int = PASSAGE_CHARS) -> list[str]:
    """Running text in passages of at least `passage_chars` characters, cut at blank lines (or, where a
    text has none for twice that long, at a line end). If the text marks its ends of document, those are
    the documents."""
    if STORY_END in text:
        return [d.strip("\n") for d in text.split(STORY_END) if d.strip()]
    passages: list[str] = []
    start, size = 0, 0
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        size += len(line)
        blank = not line.strip()
        if (size >= passage_chars and blank) or size >= 2 * passage_chars:
            passages.append("".join(lines[start : i + 1]))
            start, size = i + 1, 0
    if tail := "".join(lines[start:]):
        passages.append(tail)
    return [p for p in passages if p.strip()]


def load_documents(kind: str, path: str | Path | None = None, limit_chars: int = 0) -> list[str]:
    """Documents of a corpus: the file at `path`, or without one the embedded corpus. `limit_chars` keeps only
    the first so many characters (0: all)."""
    if kind not in KINDS:
        raise LabError(f"no data named {kind!r}; choose one of {', '.join(KINDS)}")
    if not path:
        return embedded_documents(kind, limit_chars)
    if kind == "stories":
        documents = read_stories(path).stories
    elif str(path).lower().endswith((".csv", ".jsonl")):
        documents = [d for d in read_table(path, "text") if d.strip()]
    else:
        text = read_text(path)
        documents = names_documents(text) if kind == "names" else text_documents(text)
    if limit_chars:
        sizes = np.cumsum([len(d) for d in documents])
        documents = documents[: int(np.searchsorted(sizes, limit_chars)) + 1]
    return documents


def documents_digest(documents: Sequence[str]) -> str:
    """SHA-256 of the documents in order, their borders included."""
    h = hashlib.sha256()
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()


def split_documents(
    documents: Sequence[str], seed: int = 0, val: float = 0.1, test: float = 0.1, *, kind: str = "documents"
) -> dict[str, list[str]]:
    """Documents shuffled by `seed` and cut into train, val and test; at least one document in each. With `kind`
    "unique" the different documents are cut, and every copy follows its first."""
    if kind == "unique":
        copies = Counter(documents)
        split = split_documents(list(copies), seed, val, test)
        return {name: [d for document in part for d in [document] * copies[document]] for name, part in split.items()}
    if len(documents) < 3:
        raise LabError(
            f"the corpus has {len(documents)} document(s); train, validation and test need one each. Give more text "
            f"(running text is cut into passages of {PASSAGE_CHARS} characters at blank lines)"
        )
    order = np.random.default_rng(seed).permutation(len(documents))
    n_val, n_test = (max(1, round(share * len(documents))) for share in (val, test))
    n_train = max(1, len(documents) - n_val - n_test)
    bounds = {"train": (0, n_train), "val": (n_train, n_train + n_val), "test": (n_train + n_val, len(documents))}
    return {name: [documents[i] for i in order[a:b]] for name, (a, b) in bounds.items()}


def overlap(split: dict[str, list[str]]) -> dict[str, float]:
    """Share of the documents of val and of test that stand, whole and letter by letter, in train too."""
    train = set(split["train"])
    return {name: sum(d in train for d in split[name]) / len(split[name]) for name in ("val", "test")}


@dataclass(frozen=True)
class Tokens:
    """Documents as ids, concatenated. Document d is `ids[offsets[d]:offsets[d + 1]]`; `text_bytes` their
    UTF-8 size."""

    ids: np.ndarray
    offsets: np.ndarray
    mark: int
    text_bytes: int
    stand_in: int = 0  # what an unknown id (below 0) reads as where it is context; as a target it is not scored

    @property
    def num_predictions(self) -> int:
        """Scored targets: every token, and the mark that ends each document."""
        return len(self.ids) + len(self.offsets) - 1

    def streams(self, order: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(inputs, targets, lengths): the documents one after another in `order`, and L + 1 of each. An id
        below 0 (unknown) is never a target and reads as the mark's neighbour, see `lab.analyses.domains`."""
        order = np.arange(len(self.offsets) - 1) if order is None else order
        starts, lengths = self.offsets[order], np.diff(self.offsets)[order]
        out_starts = np.cumsum(lengths + 1) - (lengths + 1)
        total = int((lengths + 1).sum())
        inputs = np.empty(total, dtype=np.int64)
        source = np.arange(total) + np.repeat(starts - out_starts, lengths + 1)  # place of a target in ids
        ends = out_starts + lengths
        is_end = np.zeros(total, dtype=bool)
        is_end[ends] = True
        targets = np.where(is_end, self.mark, self.ids[np.minimum(source, len(self.ids) - 1)])
        inputs[1:] = targets[:-1]
        inputs[0] = self.mark
        return inputs, targets, lengths + 1


def stand_in_of(tokenizer: Tokenizer) -> int:
    """The id that stands for unknown text in contexts: a space where there is one, else the mark."""
    space = tokenizer.encode(" ", "keep") if tokenizer.kind in ("char", "byte") else []
    return int(space[0]) if len(space) and space[0] >= 0 else tokenizer.mark


def tokenize_documents(documents: Sequence[str], tokenizer: Tokenizer, unknown: str = "error") -> Tokens:
    """Encode documents one by one. LabError (UnknownTextError) for text that the vocabulary lacks."""
    if not documents:
        raise LabError("there is no document to encode")
    encoded = [tokenizer.encode(d, unknown) for d in documents]
    offsets = np.cumsum([0] + [len(e) for e in encoded])
    size = sum(len(d.encode("utf-8", "surrogatepass")) for d in documents)
    return Tokens(np.concatenate(encoded), offsets, tokenizer.mark, size, stand_in_of(tokenizer))


def pack_rows(tokens: Tokens, row_tokens: int, rng: np.random.Generator | None = None) -> tuple[Tensor, Tensor]:
    """(inputs_RT, targets_RT), int64, every prediction exactly once; padding reads mark and is IGNORE.

    Short documents (the longest at most a quarter of a row) are never cut: each row takes whole documents
    until the next would not fit. Otherwise the documents are one stream, cut every `row_tokens`. With `rng`
    the documents are shuffled, and the cuts of a stream shifted, so that epochs differ.
    """
    if row_tokens < 2:
        raise LabError(f"a row of {row_tokens} tokens holds no context; take at least 2")
    count = len(tokens.offsets) - 1
    inputs, targets, lengths = tokens.streams(rng.permutation(count) if rng is not None else None)
    if 4 * int(lengths.max()) <= row_tokens:
        place = _whole_document_places(lengths, row_tokens)
    else:
        shift = int(rng.integers(row_tokens)) if rng is not None else 0
        place = np.arange(len(inputs)) + shift
    rows = int(place[-1]) // row_tokens + 1
    out_inputs = np.full(rows * row_tokens, tokens.mark, dtype=np.int64)
    out_targets = np.full(rows * row_tokens, IGNORE, dtype=np.int64)
    out_inputs[place], out_targets[place] = inputs, targets
    out_targets[out_targets < 0] = IGNORE
    out_inputs[out_inputs < 0] = tokens.stand_in
    as_rows = (torch.from_numpy(a).view(rows, row_tokens) for a in (out_inputs, out_targets))
    return tuple(as_rows)


def _whole_document_places(lengths: np.ndarray, row_tokens: int) -> np.ndarray:
    """Where each prediction goes when documents fill rows in order and none is cut."""
    starts = np.empty(len(lengths), dtype=np.int64)
    at = 0
    for d, length in enumerate(lengths.tolist()):
        left = row_tokens - at % row_tokens
        if length > left:
            at += left
        starts[d] = at
        at += length
    first = np.cumsum(lengths) - lengths
    return np.arange(int(lengths.sum())) + np.repeat(starts - first, lengths)


def row_batches(
    tokens: Tokens, row_tokens: int, rows: int, seed: int, skip: int = 0
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless training batches (rows, T), shuffled anew every epoch, a function of (seed, batch number)
    only: `skip` passes over batches already used, so that a resumed run sees what the uninterrupted one
    would have seen."""
    held: list[tuple[Tensor, Tensor]] = []
    epoch, available = 0, 0
    while True:
        while available < rows:
            rng = np.random.default_rng([seed, epoch])
            inputs, targets = pack_rows(tokens, row_tokens, rng)
            order = torch.from_numpy(rng.permutation(len(inputs)))
            held.append((inputs[order], targets[order]))
            available += len(inputs)
            epoch += 1
        inputs, targets = (torch.cat(parts) for parts in zip(*held))
        full = available // rows
        for b in range(full):
            if skip > 0:
                skip -= 1
                continue
            yield inputs[b * rows : (b + 1) * rows], targets[b * rows : (b + 1) * rows]
        held = [(inputs[full * rows :], targets[full * rows :])]
        available -= full * rows


@dataclass(frozen=True)
class Corpus:
    """A split corpus, encoded: what training and the analyses read."""

    kind: str
    documents: dict[str, list[str]]
    tokens: dict[str, Tokens]
    tokenizer: Tokenizer
    digest: str
    embedded: bool = False  # the project's own corpus, whose grammar is known

    @functools.cached_property
    def floor(self) -> float | None:
        """Mean loss, in nats a prediction, of the grammar itself on the validation documents: no model goes below
        it but by luck. None where it is not known: text of one's own, and words or GPT-2's pieces as tokens."""
        if not self.embedded or self.tokenizer.kind not in ("char", "byte"):
            return None
        return floor_on(self.documents["val"], self.kind)

    def floor_of(self, targets_RT: Tensor) -> float | None:
        """The same for a part of the validation text: the targets of its first packed rows, the last document
        maybe cut."""
        if self.floor is None:
            return None
        ids = targets_RT[targets_RT != IGNORE].numpy()
        *whole, rest = (self.tokenizer.decode(d.tolist()) for d in np.split(ids, np.flatnonzero(ids == MARK) + 1))
        return floor_on(whole, self.kind, rest)


def make_tokenizer(kind: str, documents: Sequence[str]) -> Tokenizer:
    """A vocabulary over `documents` (all splits: a character seen only in validation is still a character)."""
    if kind == "char":
        return CharTokenizer(set().union(*map(set, documents)))
    if kind == "byte":
        return ByteTokenizer()
    if kind == "word":
        return word_tokenizer(documents)
    raise LabError(f"no tokens named {kind!r}; choose char, word or byte")


def load_corpus(
    kind: str,
    path: str | Path | None = None,
    *,
    tokens: str = "char",
    split_seed: int = 0,
    split_kind: str = "documents",
    limit_chars: int = 0,
    tokenizer: Tokenizer | None = None,
) -> Corpus:
    """Read, split and encode a corpus. With `tokenizer` (a checkpoint's) its vocabulary is used as it is. A word
    vocabulary is made from the training documents alone, so that validation meets unknown words honestly."""
    documents = load_documents(kind, path, limit_chars)
    split = split_documents(documents, split_seed, kind=split_kind)
    if tokenizer is None:
        tokenizer = make_tokenizer(tokens, split["train"] if tokens == "word" else documents)
    encoded = {name: tokenize_documents(docs, tokenizer) for name, docs in split.items()}
    return Corpus(kind, split, encoded, tokenizer, documents_digest(documents), embedded=not path)
