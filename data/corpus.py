"""The embedded corpus: small stories, sums and names from a seeded grammar whose entropy is known exactly.

    python -m data.corpus --out DIR          # train and validation byte shards, plain text, corpus.json
    python -m data.corpus --show 3           # read some of it
    python -m data.corpus --entropy          # nats per byte, by domain

The grammar is data/grammar.txt, which also explains its notation. A document is a row of independent weighted
choices; only how long a text is and which choices come next depend on earlier ones. So three things need no
sampling:

- the entropy of a document, the expected sum of its choices' entropies (`Grammar.measure`), because no
document has
  two derivations;
- the expected number of bytes of a document;
- the probability of a given text, by reading it with the grammar (`log_prob`).

In a shard each document is preceded by byte 0. Reading on, the end of a document is the next byte 0, which
must be predicted like any other byte; so the best possible mean loss is

    entropy of a document / (expected bytes of a document + 1)   nats per byte

for a reader that sees every document from its beginning, knows the grammar, and has infinitely many documents
to average over. On given documents the best possible mean loss differs a little from that: `best_loss`
computes it.

Sampling uses integers only: SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as a counter-based generator, one
stream a document, and rejection instead of a biased remainder. The bytes are the same on every platform and
Python version, and document i can be made without the documents before it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import paths, shards

GRAMMAR_FILE = Path(__file__).with_name("grammar.txt")
SEPARATOR = 0  # the byte before each document
VOCAB_SIZE = 256
DOMAINS = ("story", "sums", "names")  # the options of the rule "document", in order
TRAIN_BYTES, VAL_BYTES = 16 << 20, 1 << 20

_END = "\0"  # `$` in the grammar: the separator that follows a document
_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_DRAWS = 160  # choices drawn at once per document; most take fewer, more are drawn one by one
_BATCH = 128  # documents drawn at once
_STREAMS = {"train": 0, "val": 1}
_SUMS, _NAMES = 24, 12  # lines of the longest document of sums, of names
_PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself", "He": "She", "His": "Her"},
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself", "He": "He", "His": "His"},
}


class GrammarError(ValueError):
    """The grammar file is wrong; the message names rule and option."""


# -----------------------------------------------------------------------------------------------------------
# The grammar: rules, options, and the parts of an option's text. A part is a str, to be written as it is, or
# one of these.


class Choice(NamedTuple):
    """`<rule>` or `<rule:v>`: one of the rule's options, remembered as `bind` unless that is None."""

    rule: str
    bind: str | None


class Dispatch(NamedTuple):
    """`<v!col>` or `<v!col:w>`: one of the options of the rule that column `column` of `var` names."""

    var: str
    column: str
    bind: str | None


class Recall(NamedTuple):
    """`<v.col>` or `<v>`: a column of what `var` remembers; the column "" is its text."""

    var: str
    column: str


class Arithmetic(NamedTuple):
    """`<=a+b>`: the result of an operation on the columns "value" of two variables."""

    left: str
    operator: str
    right: str

    def text(self, left: Option, right: Option) -> str:
        a, b = left.value, right.value
        return str(a + b if self.operator == "+" else a - b if self.operator == "-" else a * b)


class Option:
    """One option of a rule: its text in parts, its columns (each in parts), its column "value" as a number."""

    __slots__ = ("binds", "columns", "key", "parts", "value", "weight")

    def __init__(self, key: str, weight: int, parts: tuple, columns: dict[str, tuple]):
        self.key, self.weight, self.parts, self.columns = key, weight, parts, columns
        self.binds = any(getattr(part, "bind", None) for part in parts)
        self.value = int(columns["value"][0]) if "value" in columns else None


class Rule:
    """A weighted list of options; `table` has each option `weight` times."""

    __slots__ = ("entropy", "limit", "name", "options", "table", "total")

    def __init__(self, name: str, options: list[Option]):
        self.name, self.options = name, options
        self.table = [option for option in options for _ in range(option.weight)]
        self.total = len(self.table)
        self.limit = 2**32 - 2**32 % self.total  # draws from here on would favor the first options
        self.entropy = -math.fsum(self.probability(o) * math.log(self.probability(o)) for o in options)

    def probability(self, option: Option) -> float:
        return option.weight / self.total


_PART = re.compile(r"<([^<>]*)>")
_TAGS: list[tuple[re.Pattern, Callable]] = [
    (re.compile(r"=(\w)([-+*])(\w)"), lambda m: Arithmetic(*m.groups())),
    (re.compile(r"(\w)!(\w+)(?::(\w))?"), lambda m: Dispatch(*m.groups())),
    (re.compile(r"(\w)(?:\.(\w+))?"), lambda m: Recall(m[1], m[2] or "")),
    (re.compile(r"(\w\w+)(?::(\w))?"), lambda m: Choice(*m.groups())),
]


def _parts(text: str, where: str) -> tuple:
    """The parts of a text in the grammar's notation."""
    parts: list = []
    for index, piece in enumerate(_PART.split(text.replace("\\n", "\n").replace("$", _END))):
        if index % 2 == 0:
            parts.extend([piece] if piece else [])
            continue
        for pattern, make in _TAGS:
            if found := pattern.fullmatch(piece):
                parts.append(make(found))
                break
        else:
            raise GrammarError(
                f"{where}: <{piece}> is not one of the notations that the file's head explains"
            )
    return tuple(parts)


def _option(rule: str, names: list[str], line: str) -> Option:
    weight, text = re.fullmatch(r"(?:(\d+)x )?(.*)", line.strip()).groups()
    text, *cells = (cell.strip() for cell in text.split(" | "))
    where = f"rule {rule}, option {text!r}"
    if len(cells) != len(names):
        raise GrammarError(f"{where}: {len(cells)} columns, expected {len(names)}: {', '.join(names)}")
    columns = {name: _parts(cell, where) for name, cell in zip(names, cells)}
    if "she" in columns:
        columns.update({key: (value,) for key, value in _PRONOUNS[columns.pop("she")[0]].items()})
    parts = _parts(text, where)
    if not parts:
        raise GrammarError(f"{where}: an empty option cannot be read back")
    return Option(f"{rule}/{text}", int(weight or 1), parts, {"": parts, **columns})


def read_grammar(text: str) -> dict[str, Rule]:
    """Rules from the grammar's notation. Raises GrammarError."""
    rules: dict[str, Rule] = {}
    name, names, options = "", [], []
    for line in [*text.splitlines(), "end_of_file"]:
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith(" "):
            options.append(_option(name, names, line))
            continue
        if options:
            rules[name] = Rule(name, options)
        head = re.fullmatch(r"(\w\w+)(?: \(([\w, ]+)\))?", line)
        if not head or head[1] in rules:
            raise GrammarError(f"{line!r}: a rule needs a name of its own, of two letters or more")
        name, names, options = head[1], (head[2] or "").replace(" ", "").split(",") if head[2] else [], []
    return rules


def _made_rules() -> str:
    """The rules that are better counted than typed, in the grammar's notation."""

    def numbers(name: str, values: Iterable[int], after: str) -> str:
        return f"{name} (value)\n" + "".join(f"  {3 if v < 10 else 1}x {v}{after} | {v}\n" for v in values)

    def lines(name: str, item: str, last: int, more: int) -> str:
        text = f"{name}_1\n  {item}<{name}_2>\n"
        for k in range(2, last + 1):
            text += f"{name}_{k}\n  {more}x {item}<{name}_{k + 1}>\n  1x $\n"
        return text + f"{name}_{last + 1}\n  $\n"

    return "\n".join(
        [
            numbers("first", range(100), "+"),
            numbers("second", range(100), "="),
            numbers("big", range(20, 100), "-"),
            numbers("small", range(21), "="),
            numbers("factor", range(2, 10), "*"),
            numbers("times", range(2, 10), "="),
            lines("sums", "<sum>\\n", _SUMS, 15),
            lines("names", "<name>", _NAMES, 8),
        ]
    )


def _hero_rule(rules: dict[str, Rule]) -> Rule:
    """All heroes' names in one rule, each as likely as when its kind is chosen first."""
    kinds = rules["kind"].options
    scale = math.lcm(*(rules[kind.columns["names"][0]].total for kind in kinds))
    heroes = []
    for kind in kinds:
        names = rules[kind.columns["names"][0]]
        for option in names.options:
            weight = kind.weight * option.weight * (scale // names.total)
            heroes.append(Option(f"hero/{option.parts[0]}", weight, option.parts, option.columns))
    divisor = math.gcd(*(hero.weight for hero in heroes))
    for hero in heroes:
        hero.weight //= divisor
    return Rule("hero", heroes)


# -----------------------------------------------------------------------------------------------------------
# What is done with a grammar: write, measure, read


class Measure(NamedTuple):
    """Exact expectations of a text: its entropy in nats, and its bytes."""

    nats: float
    size_bytes: float


class Grammar:
    """Rules that can write documents, measure them without sampling, and read them back."""

    def __init__(self, rules: dict[str, Rule]):
        self.rules = rules
        self._measured: dict = {}

    # Writing ---------------------------------------------------------------------------------------------

    def write(self, parts: tuple, draw: Callable[[], int]) -> str:
        """One text, choosing with `draw`, which returns independent uniform integers below 2^32."""
        out: list[str] = []
        self._write(parts, {}, draw, out)
        return "".join(out)

    def _write(self, parts: tuple, memory: dict[str, Option], draw: Callable, out: list[str]) -> None:
        for part in parts:
            kind = part.__class__
            if kind is str:
                out.append(part)
            elif kind is Recall:
                self._write(memory[part.var].columns[part.column], memory, draw, out)
            elif kind is Arithmetic:
                out.append(part.text(memory[part.left], memory[part.right]))
            else:
                rule = self.rules[part.rule if kind is Choice else memory[part.var].columns[part.column][0]]
                number = draw()
                while number >= rule.limit:
                    number = draw()
                option = rule.table[number % rule.total]
                if part.bind:
                    memory[part.bind] = option
                # What an option's text binds is forgotten after it.
                self._write(option.parts, dict(memory) if option.binds else memory, draw, out)

    # Measuring -------------------------------------------------------------------------------------------

    def measure(self, rule: str) -> Measure:
        """Exact expected entropy and size of a text of `rule`, which uses no variables bound outside."""
        return self._measure_rule(self.rules[rule], {})

    def _measure_rule(self, rule: Rule, memory: dict[str, tuple]) -> Measure:
        """`memory`: variable -> the options it may remember with their probabilities; all independent."""
        key = (rule.name, *sorted((var, id(beliefs)) for var, beliefs in memory.items()))
        if key not in self._measured:
            inner = [(rule.probability(o), self._measure(o.parts, 0, memory)) for o in rule.options]
            self._measured[key] = (
                _mean(inner, rule.entropy),
                memory,
            )  # memory is kept, so that ids stay taken
        return self._measured[key][0]

    def _measure(self, parts: tuple, start: int, memory: dict[str, tuple]) -> Measure:
        nats, size = 0.0, 0.0
        for index in range(start, len(parts)):
            part = parts[index]
            if isinstance(part, str):
                size += len(part.encode())
                continue
            if isinstance(part, Arithmetic):
                pairs = [
                    (p * q, part.text(a, b)) for p, a in memory[part.left] for q, b in memory[part.right]
                ]
                size += math.fsum(p * len(text) for p, text in pairs)
                continue
            if isinstance(part, Choice):
                rule = self.rules[part.rule]
                found = self._measure_rule(rule, memory)
                if part.bind:
                    memory = {**memory, part.bind: self._beliefs(rule)}
            elif isinstance(part, Recall):
                found = _mean(
                    [(p, self._measure(o.columns[part.column], 0, memory)) for p, o in memory[part.var]]
                )
                if found.nats:
                    raise GrammarError(f"column {part.column} of {part.var} makes a choice; only texts may")
            else:  # given what var is, the rule is known, and so is what the bound variable may be
                cases = []
                for p, option in memory[part.var]:
                    rule = self.rules[option.columns[part.column][0]]
                    given = {**memory, part.var: self._certain(option)}
                    case = self._measure_rule(rule, given)
                    if part.bind:
                        rest = self._measure(parts, index + 1, {**given, part.bind: self._beliefs(rule)})
                        case = Measure(case.nats + rest.nats, case.size_bytes + rest.size_bytes)
                    cases.append((p, case))
                found = _mean(cases)
                if part.bind:
                    return Measure(nats + found.nats, size + found.size_bytes)
            nats, size = nats + found.nats, size + found.size_bytes
        return Measure(nats, size)

    @cache  # noqa: B019 - the object lives as long as the program
    def _beliefs(self, rule: Rule) -> tuple:
        return tuple((rule.probability(option), option) for option in rule.options)

    @cache  # noqa: B019
    def _certain(self, option: Option) -> tuple:
        return ((1.0, option),)

    # Reading ---------------------------------------------------------------------------------------------

    def derivations(self, parts: tuple, text: str) -> Iterator[tuple[float, tuple]]:
        """All ways in which `parts` can write `text`, or a longer text that begins with `text`.

        Yields the log-probability of each and its choices as (rule, option number) pairs. The probabilities
        add up to that of a text with this beginning, whatever follows.
        """
        # A state: place in the text; what is still to be read, as a linked list of (parts, index, memory, rest);
        # log-probability; choices so far, as a linked list.
        agenda: list = [(0, (parts, 0, {}, None), 0.0, None)]
        while agenda:
            place, todo, log_p, choices = agenda.pop()
            while todo is not None and todo[1] == len(todo[0]):
                todo = todo[3]
            if place == len(text):
                yield log_p, _unlink(choices)
                continue
            if todo is None:
                continue
            parts, index, memory, rest = todo
            part = parts[index]
            if isinstance(part, (str, Recall, Arithmetic)):
                wanted = self._fixed(part, memory)
                if text.startswith(wanted[: len(text) - place], place):
                    after = (parts, index + 1, memory, rest)
                    agenda.append((min(place + len(wanted), len(text)), after, log_p, choices))
                continue
            rule = self.rules[
                part.rule if isinstance(part, Choice) else memory[part.var].columns[part.column][0]
            ]
            for number, option in enumerate(rule.options):
                first = option.parts[0]
                if isinstance(first, str) and not text.startswith(first[: len(text) - place], place):
                    continue
                kept = {**memory, part.bind: option} if part.bind else memory
                after = (option.parts, 0, kept, (parts, index + 1, kept, rest))
                p = math.log(rule.probability(option))
                agenda.append((place, after, log_p + p, (choices, (rule.name, number))))

    def _fixed(self, part, memory: dict[str, Option]) -> str:
        """The text of a part that makes no choice."""
        if isinstance(part, str):
            return part
        if isinstance(part, Arithmetic):
            return part.text(memory[part.left], memory[part.right])
        return "".join(self._fixed(inner, memory) for inner in memory[part.var].columns[part.column])


def _mean(cases: list[tuple[float, Measure]], nats: float = 0.0) -> Measure:
    return Measure(
        nats + math.fsum(p * m.nats for p, m in cases), math.fsum(p * m.size_bytes for p, m in cases)
    )


def _unlink(choices) -> tuple:
    flat = []
    while choices is not None:
        choices, choice = choices
        flat.append(choice)
    return tuple(reversed(flat))


@lru_cache(maxsize=1)
def grammar() -> Grammar:
    """The grammar of the embedded corpus."""
    rules = read_grammar(GRAMMAR_FILE.read_text(encoding="utf-8") + "\n" + _made_rules())
    rules["hero"] = _hero_rule(rules)
    return Grammar(rules)


def grammar_hash() -> str:
    """Hash of all that decides which documents a seed gives."""
    made = f"{GRAMMAR_FILE.read_text(encoding='utf-8')}\n{_made_rules()}\n{_PRONOUNS}\nsplitmix64 1"
    return hashlib.sha256(made.encode()).hexdigest()


# -----------------------------------------------------------------------------------------------------------
# Documents


def _mix(x: int) -> int:
    """SplitMix64's finalizer: a permutation of the 64-bit integers that scatters neighbors."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _mix_array(x: np.ndarray) -> np.ndarray:
    """`_mix` of an array of uint64, whose products wrap."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _draws(seed: int, stream: int, first: int) -> Iterator[Callable[[], int]]:
    """For each document from number `first` on, a function that returns its next 32-bit draw.

    Draw j of document i of a stream is the upper half of mix(key_i + (j + 1) gamma), with
    key_i = mix(mix(mix(seed) + stream) + i).
    """
    base = _mix((_mix(seed & _MASK) + stream) & _MASK)
    counters = (np.arange(1, _DRAWS + 1, dtype=np.uint64) * np.uint64(_GAMMA))[None, :]

    def more(key: int) -> Iterator[int]:
        j = _DRAWS
        while True:
            j += 1
            yield _mix((key + j * _GAMMA) & _MASK) >> 32

    while True:
        keys = _mix_array(np.uint64(base) + np.arange(first, first + _BATCH, dtype=np.uint64))
        rows = (_mix_array(keys[:, None] + counters) >> np.uint64(32)).tolist()
        for key, row in zip(keys.tolist(), rows):
            yield chain(row, more(key)).__next__
        first += _BATCH


def iter_documents(
    seed: int, domain: str | None = None, *, stream: str | int = "train", first: int = 0
) -> Iterator[str]:
    """Endless documents, each ending in a line end; the same arguments give the same ones everywhere.

    domain: "story", "sums" or "names", or None for the corpus's mixture of them. stream: "train", "val", or a
    number of your own from 2 on, for documents that are independent of both. first: the number of the first
    document.
    """
    known = grammar()
    start: tuple = (Choice("document", None),)
    if domain is not None:
        start = _domain_option(domain).parts
    for draw in _draws(seed, _STREAMS.get(stream, stream), first):
        yield known.write(start, draw)[: -len(_END)]


def _domain_option(domain: str) -> Option:
    if domain not in DOMAINS:
        raise ValueError(f"unknown domain {domain!r}; the corpus has {', '.join(DOMAINS)}")
    return grammar().rules["document"].options[DOMAINS.index(domain)]


# -----------------------------------------------------------------------------------------------------------
# How good a model can be


def document_measure(domain: str | None = None) -> Measure:
    """Exact expected entropy (nats) and size (bytes, its separator included) of a document."""
    known = grammar()
    if domain is None:
        return known.measure("document")
    return known._measure(_domain_option(domain).parts, 0, {})


def entropy_nats_per_byte(domain: str | None = None) -> float:
    """The best possible mean loss on endless documents, from the grammar; separators count as bytes."""
    nats, size_bytes = document_measure(domain)
    return nats / size_bytes


def log_prob(document: str | bytes, domain: str | None = None, *, whole: bool = True) -> float:
    """ln of the exact probability of a document (without separators), -inf if the grammar cannot write it.

    The separator that ends it counts, as in the entropy. whole=False: the probability that a document begins
    so.
    """
    start = (Choice("document", None),) if domain is None else _domain_option(domain).parts
    text = document if isinstance(document, str) else document.decode("latin-1")
    logs = [log_p for log_p, _ in grammar().derivations(start, text + _END * whole)]
    if not logs:
        return -math.inf
    top = max(logs)
    return top + math.log(math.fsum(math.exp(log_p - top) for log_p in logs))


def best_loss(tokens: np.ndarray) -> float:
    """Mean loss (nats per byte) on these very bytes of the predictor that knows the grammar: the best possible.

    tokens: a separator and then documents, the last one possibly cut, as in the embedded shards. The
    predictor reads from the left and predicts all bytes but the first. Raises ValueError if the first byte is
    not the separator or the grammar cannot write the bytes. Takes about 2 s per MB.
    """
    data = np.asarray(tokens).astype(np.uint8).tobytes()
    if len(data) < 2 or data[0] != SEPARATOR:
        raise ValueError("two bytes or more are needed, of which the first is the separator (byte 0)")
    *complete, rest = data[1:].split(bytes([SEPARATOR]))
    logs = [log_prob(document) for document in complete] + ([log_prob(rest, whole=False)] if rest else [])
    if math.inf in map(abs, logs):
        raise ValueError(f"document {list(map(abs, logs)).index(math.inf)} is not of the embedded corpus")
    return -math.fsum(logs) / (len(data) - 1)


# -----------------------------------------------------------------------------------------------------------
# Files


class CorpusPaths(NamedTuple):
    """Where the embedded corpus lies. `info` is what corpus.json says (entropy, hashes, sizes)."""

    train_files: str
    val_files: str
    info: dict


def ensure_corpus(
    folder: str | Path, *, train_bytes: int = TRAIN_BYTES, val_bytes: int = VAL_BYTES, seed: int = 0
) -> CorpusPaths:
    """Write the embedded corpus to `folder` unless it is there and undamaged.

    Documents are whole; a part ends with the first document that fills its size, so a larger corpus of the
    same seed begins with the smaller one. Any number of processes may call this at once: one writes, the
    others wait. Files appear whole or not at all, corpus.json last. Takes about 0.3 s per MB.
    """
    folder = Path(folder)
    wanted = {
        "schema": 1,
        "grammar": grammar_hash(),
        "seed": seed,
        "train_bytes": train_bytes,
        "val_bytes": val_bytes,
    }
    with paths.locked(folder / ".lock"):
        info = _intact(folder, wanted)
        if info is None:
            info = dict(wanted)
            (folder / "corpus.json").unlink(missing_ok=True)
            for part, size in (("train", train_bytes), ("val", val_bytes)):
                info[part] = _write_part(folder, part, size, seed)
            info["entropy_nats_per_byte"] = entropy_nats_per_byte()
            info["domains"] = {name: _domain_facts(name) for name in DOMAINS}
            with paths.atomic_file(folder / "corpus.json", "w") as file:
                json.dump(info, file, indent=1)
    return CorpusPaths(str(folder / "train_000000.bin"), str(folder / "val_000000.bin"), info)


def _write_part(folder: Path, part: str, size: int, seed: int) -> dict:
    """Write one part as a shard of bytes and as text; returns its entry in corpus.json."""
    pieces, count, total = [], 0, 0
    for document in iter_documents(seed, stream=part):
        pieces.append(f"{_END}{document}")
        count, total = count + 1, total + len(pieces[-1])
        if total >= size:
            break
    data = "".join(pieces).encode("ascii")
    shards.write_shard(folder / f"{part}_000000.bin", np.frombuffer(data, dtype=np.uint8))
    with paths.atomic_file(folder / f"{part}.txt") as file:  # an empty line between documents
        file.write(data[1:].replace(b"\0", b"\n"))
    names = (f"{part}_000000.bin", f"{part}.txt")
    return {"documents": count, "bytes": total, "sha256": {name: _sha256(folder / name) for name in names}}


def _domain_facts(domain: str) -> dict:
    nats, size_bytes = document_measure(domain)
    option = _domain_option(domain)
    share = grammar().rules["document"].probability(option)
    return {
        "share_of_documents": share,
        "share_of_bytes": share * size_bytes / document_measure().size_bytes,
        "bytes_per_document": size_bytes,
        "nats_per_document": nats,
        "entropy_nats_per_byte": nats / size_bytes,
    }


def _intact(folder: Path, wanted: dict) -> dict | None:
    """corpus.json, if it describes the wanted corpus and the files have the hashes in it."""
    try:
        info = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        same = all(info.get(key) == value for key, value in wanted.items())
        files = {**info["train"]["sha256"], **info["val"]["sha256"]}
        if same and all(_sha256(folder / name) == digest for name, digest in files.items()):
            return info
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # absent or damaged: it is made again
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# -----------------------------------------------------------------------------------------------------------
# Command line


def _table() -> str:
    """The exact figures of the grammar, by domain."""
    lines = ["domain   documents  bytes  bytes/doc  nats/doc  nats/byte  bits/byte"]
    for name in DOMAINS:
        f = _domain_facts(name)
        lines.append(
            f"{name:8} {f['share_of_documents']:9.0%} {f['share_of_bytes']:6.1%} "
            f"{f['bytes_per_document']:10.2f} {f['nats_per_document']:9.3f} "
            f"{f['entropy_nats_per_byte']:10.6f} {f['entropy_nats_per_byte'] / math.log(2):10.6f}"
        )
    nats, size_bytes = document_measure()
    lines.append(
        f"{'all':8} {1:9.0%} {1:6.1%} {size_bytes:10.2f} {nats:9.3f} {nats / size_bytes:10.6f} "
        f"{nats / size_bytes / math.log(2):10.6f}"
    )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code (0 done, 2 wrong usage, 3 cannot write)."""
    parser = argparse.ArgumentParser(
        prog="python -m data.corpus",
        description="Make the embedded corpus: stories, sums and names from a grammar whose entropy is known.",
    )
    parser.add_argument("--out", metavar="DIR", help="write shards, text and corpus.json there")
    parser.add_argument(
        "--train-bytes", type=int, default=TRAIN_BYTES, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--val-bytes", type=int, default=VAL_BYTES, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--entropy", action="store_true", help="print the exact entropy, by domain")
    parser.add_argument("--show", type=int, metavar="N", help="print N documents")
    parser.add_argument("--domain", choices=DOMAINS, help="show only documents of this domain")
    options = parser.parse_args(argv)
    if options.train_bytes < 1 or options.val_bytes < 1:
        parser.error("--train-bytes and --val-bytes must be at least 1")
    if not (options.out or options.entropy or options.show):
        parser.error("nothing to do: give --out DIR, --entropy or --show N")
    if options.show:
        documents = iter_documents(options.seed, options.domain)
        print("\n".join(next(documents) for _ in range(options.show)))
    if options.entropy:
        print(_table())
    if options.out:
        start = time.perf_counter()
        try:
            found = ensure_corpus(
                options.out, train_bytes=options.train_bytes, val_bytes=options.val_bytes, seed=options.seed
            )
        except OSError as error:
            print(f"data.corpus: {error.filename or options.out}: {error.strerror}", file=sys.stderr)
            return 3
        for part, file in (("train", found.train_files), ("val", found.val_files)):
            print(
                f"{file}: {found.info[part]['bytes']:,} bytes in {found.info[part]['documents']:,} documents"
            )
        print(
            f"entropy {found.info['entropy_nats_per_byte']:.6f} nats per byte ({time.perf_counter() - start:.1f} s)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
