"""The embedded corpus: small stories, sums and names from a seeded grammar whose entropy is known exactly.

    python -m data.corpus --out DIR          # train and validation byte shards, plain text, corpus.json
    python -m data.corpus --show 3           # read some of it
    python -m data.corpus --entropy          # nats per byte, by domain

The grammar is data/grammar.txt, which also explains its notation. A document is a row of independent weighted
choices; only how long a text is and which choices come next depend on earlier ones. So three things need no
sampling:

- the entropy of a document, the expected sum of its choices' entropies (`Grammar.measure`), because no
  document has two derivations (`Grammar.conflicts`);
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
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data import paths, shards
from data.echo import program
from data.grammar import END, Choice, Grammar, Measure, Option, Rule, read_grammar

GRAMMAR_FILE = Path(__file__).with_name("grammar.txt")
SEPARATOR = 0  # the byte before each document
VOCAB_SIZE = 256
DOMAINS = ("story", "sums", "names")  # the options of the rule "document", in order
TRAIN_BYTES, VAL_BYTES = 16 << 20, 1 << 20

_MASK = 2**64 - 1
_GAMMA = 0x9E3779B97F4A7C15
_DRAWS = 160  # choices drawn at once per document; most take fewer, more are drawn one by one
_BATCH = 128  # documents drawn at once
_STREAMS = {"train": 0, "val": 1}
_SUMS, _NAMES = 24, 12  # lines of the longest document of sums, of names


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
            numbers("count_one", range(10, 60), ""),
            numbers("count_two", range(10, 40), ""),
            lines("sums", "<sum>\\n", _SUMS, 15),
            lines("names", "<name>", _NAMES, 8),
        ]
    )


def _hero_rule(rules: dict[str, Rule]) -> Rule:
    """All known names of heroes in one rule, each as likely as when its kind is chosen first."""
    kinds = [k for k in rules["kind"].options if all(o.text for o in rules[k.columns["names"][0]].options)]
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


def _syllable_rule(name: str, onsets: Rule, vowels: Rule) -> Rule:
    """Each onset with each vowel, as likely as when they are chosen one after the other."""
    return Rule(
        name,
        [
            Option(f"{name}/{onset}{vowel}", o.weight * v.weight, (onset + vowel,), {})
            for o in onsets.options
            for v in vowels.options
            if (onset := o.text) is not None and (vowel := v.text) is not None
        ],
    )


@cache
def grammar() -> Grammar:
    """The grammar of the embedded corpus."""
    rules = read_grammar(GRAMMAR_FILE.read_text(encoding="utf-8") + "\n" + _made_rules())
    rules["hero"] = _hero_rule(rules)
    rules["friends_any"] = Rule("friends_any", [*rules["friends_she"].options, *rules["friends_he"].options])
    for syllable, onset in (("Syllable", "Onset"), ("syllable", "onset")):
        rules[syllable] = _syllable_rule(syllable, rules[onset], rules["vowel"])
    for name in ("Onset", "onset", "vowel"):  # alone they are no prefix code: S, St
        del rules[name]
    return Grammar(rules)


def grammar_hash() -> str:
    """Hash of all that decides which documents a seed gives."""
    made = f"{GRAMMAR_FILE.read_text(encoding='utf-8')}\n{_made_rules()}\nnotation 1, splitmix64"
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

    domain: "story", "sums" or "names", or None for the corpus's mixture of them. stream: "train", "val", or a number of
    your own from 2 on, for documents that are independent of both. first: the number of the first document.
    """
    known = grammar()
    start: tuple = (Choice("document", None),)
    if domain is not None:
        start = _domain_option(domain).parts
    for draw in _draws(seed, _STREAMS[stream] if isinstance(stream, str) else stream, first):
        yield known.write(start, draw)[: -len(END)]


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

    The separator that ends it counts, as in the entropy. whole=False: the probability that a document begins so.
    """
    start = (Choice("document", None),) if domain is None else _domain_option(domain).parts
    text = document if isinstance(document, str) else document.decode("latin-1")
    logs = [log_p for log_p, _ in grammar().derivations(start, text + END * whole)]
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
    wanted = {"schema": 1, "grammar": grammar_hash(), "seed": seed, "train_bytes": train_bytes, "val_bytes": val_bytes}
    info = _intact(folder, wanted)  # before anything is written: the folder may be read-only
    if info is not None:
        return _corpus_paths(folder, info)
    with paths.locked(folder / ".lock"):
        info = _intact(folder, wanted)  # another process may have been quicker
        if info is None:
            info = dict(wanted)
            (folder / "corpus.json").unlink(missing_ok=True)
            for part, size in (("train", train_bytes), ("val", val_bytes)):
                info[part] = _write_part(folder, part, size, seed)
            info["entropy_nats_per_byte"] = entropy_nats_per_byte()
            info["domains"] = {name: _domain_facts(name) for name in DOMAINS}
            with paths.atomic_file(folder / "corpus.json", "w") as file:
                json.dump(info, file, indent=1)
    return _corpus_paths(folder, info)


def _corpus_paths(folder: Path, info: dict) -> CorpusPaths:
    return CorpusPaths(str(folder / "train_000000.bin"), str(folder / "val_000000.bin"), info)


def _write_part(folder: Path, part: str, size: int, seed: int) -> dict:
    """Write one part as a shard of bytes and as text; returns its entry in corpus.json."""
    pieces, count, total = [], 0, 0
    for document in iter_documents(seed, stream=part):
        pieces.append(f"{END}{document}")
        count, total = count + 1, total + len(pieces[-1])
        if total >= size:
            break
    data = "".join(pieces).encode("ascii")
    shards.write_shard(folder / f"{part}_000000.bin", np.frombuffer(data, dtype=np.uint8))
    with paths.atomic_file(folder / f"{part}.txt") as file:  # an empty line between documents
        file.write(data[1:].replace(b"\0", b"\n"))
    names = (f"{part}_000000.bin", f"{part}.txt")
    return {"documents": count, "bytes": total, "sha256": {name: paths.file_sha256(folder / name) for name in names}}


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
        if same and all(paths.file_sha256(folder / name) == digest for name, digest in files.items()):
            return info
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass  # absent or damaged: it is made again
    return None


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
    parser.add_argument("--train-bytes", type=int, default=TRAIN_BYTES, metavar="N", help="default: %(default)s")
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
            print(f"{file}: {found.info[part]['bytes']:,} bytes in {found.info[part]['documents']:,} documents")
        print(f"entropy {found.info['entropy_nats_per_byte']:.6f} nats per byte ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(program("data.corpus", main))
