"""The embedded corpus (data/corpus.py) as the lab reads it, and the entropy floor of each of its domains."""

import math

import numpy as np

from data.corpus import document_measure, grammar, iter_documents, log_prob
from data.grammar import Choice
from lab import LabError

DOMAINS = {"names": "names", "text": "story", "stories": "story", "sums": "sums"}
MOST_CHARS = 100_000_000  # the grammar writes for ever, and all of it is kept in memory
DEFAULT_CHARS = {"names": 120_000, "text": 600_000, "stories": 600_000, "sums": 300_000}


def embedded_documents(kind: str, chars: int = 0, seed: int = 0) -> list[str]:
    """Documents of the embedded corpus for data `kind` (names: one name each), about `chars` characters of them."""
    if kind not in DOMAINS:
        raise LabError(f"the embedded corpus has no {kind!r}; choose one of {', '.join(DOMAINS)}")
    if chars > MOST_CHARS:
        raise LabError(f"--limit_chars={chars}: the embedded corpus is written here, at most {MOST_CHARS:,} characters")
    size, wanted, documents = 0, chars or DEFAULT_CHARS[kind], []
    for document in iter_documents(seed, DOMAINS[kind]):
        found = document.split() if kind == "names" else [document]
        documents += found
        size += sum(map(len, found))
        if size >= wanted:
            return documents
    raise AssertionError("unreachable: the grammar writes for ever")


def entropy_floor(kind: str) -> float:
    """Nats a prediction (characters and end marks) below which no model of characters can go on endless text."""
    if kind == "names":
        measure = grammar().measure("name")  # its line end stands for our end mark
    else:
        measure = document_measure(DOMAINS[kind])
    return measure.nats / measure.size_bytes


def floor_on(documents: list[str], kind: str, rest: str = "") -> float:
    """The mean loss of the predictor that knows the grammar on these very documents: what a perfect model would show.
    A model may lie below `entropy_floor` on a lucky sample, below this only by luck of its own. `rest`: the beginning
    of one more document, where the text is cut.

    LabError for text that the grammar cannot write."""
    nats = [_nats(d, kind) for d in documents] + ([_nats(rest, kind, whole=False)] if rest else [])
    if not all(map(math.isfinite, nats)):
        raise LabError("the text is not of the embedded corpus: its grammar cannot write it")
    return sum(nats) / (sum(len(d) + 1 for d in documents) + len(rest))


def _nats(document: str, kind: str, whole: bool = True) -> float:
    """Of one document and its end (or of a beginning), over all ways in which the grammar can write it."""
    if kind != "names":
        return -log_prob(document, DOMAINS[kind], whole=whole)
    ways = [log_p for log_p, _ in grammar().derivations((Choice("name", None),), document + "\n" * whole)]
    return -float(np.logaddexp.reduce(ways)) if ways else math.inf
