"""The embedded corpus: exact entropy against enumeration and samples, one derivation a text, the same bytes always."""

import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import corpus, shards
from data.corpus import DOMAINS, grammar
from data.grammar import END, Choice, Grammar, GrammarError, read_grammar

START = (Choice("document", None),)


def sample(count, domain=None, seed=1, **options):
    return list(itertools.islice(corpus.iter_documents(seed, domain, **options), count))


def all_texts(known, rule):
    """Every text of a small grammar with its probability, by trying every row of draws."""
    found = defaultdict(float)
    plans = [()]  # draws so far, each as (number, probability of that option)
    while plans:
        plan = plans.pop()
        draws, asked = iter(plan), []

        def draw(draws=draws, asked=asked):
            asked.append(1)
            return next(draws)[0]

        spy = Spy(known, asked)
        try:
            text = spy.write((Choice(rule, None),), draw)
        except StopIteration:  # one more choice is needed: branch over the options of the rule that asks
            at = 0
            for option in spy.last.options:
                plans.append((*plan, (at, option.weight / spy.last.total)))
                at += option.weight
            continue
        found[text] += math.prod(p for _, p in plan)
    return found


class Spy(Grammar):
    """A grammar that remembers which rule was asked last."""

    def __init__(self, known, asked):
        super().__init__(Rules(known.rules, self))
        self.last = None


class Rules(dict):
    def __init__(self, rules, spy):
        super().__init__(rules)
        self.spy = spy

    def __getitem__(self, name):
        self.spy.last = super().__getitem__(name)
        return self.spy.last


SMALL = r"""
top
  3x <kind:k> <k!names:n>, <k.she>: <n>, <tail> $
  1x (<left:a><right:b><=a-b>)<tail>$
kind (names, she)
  2x cat | cats | she
  5x robot | robots | he
cats (name)
  1x Tom | Tom
  3x Thomasina | little Thomasina
robots (name)
  R<digit><digit> | <n>
digit
  1x 0
  2x 1
left (value)
  9- | 9
  1x 10- | 10
right (value)
  2= | 2
  3x 9= | 9
tail
  4x end
  1x <left:a>and <left:b><=a*b> <kind:k><k!names:m><m.name>
""".replace("k.she", "k.he")


def test_entropy_and_size_of_a_small_grammar_by_enumeration():
    known = Grammar(read_grammar(SMALL.replace("| <n>", "| x")))
    texts = all_texts(known, "top")
    assert len(texts) > 100 and math.isclose(sum(texts.values()), 1, rel_tol=1e-12)
    measure = known.measure("top")
    assert math.isclose(measure.nats, -sum(p * math.log(p) for p in texts.values()), rel_tol=1e-12)
    assert math.isclose(measure.size_bytes, sum(p * len(t) for t, p in texts.items()), rel_tol=1e-12)
    assert known.conflicts() == []
    for text, p in texts.items():
        ((log_p, _),) = known.derivations((Choice("top", None),), text)
        assert math.isclose(log_p, math.log(p), rel_tol=1e-12)


@pytest.mark.parametrize(
    "rules, pair",
    [
        ("top\n  a\n  ab", "top/ab / top/a"),
        ("top\n  a\n  a", "top/a / top/a"),
        ("top\n  <some>c\n  ab\nsome\n  a\n  x", None),
        ("top\n  <some>c\n  abc\nsome\n  ab\n  x", "top/abc / top/<some>c"),
        ("top\n  <some:v>-<v>\n  a-b\nsome\n  a\n  b", "top/a-b / top/<some:v>-<v>"),  # too careful, never too bold
        ("top\n  <some>-c\n  <some>-cd\nsome\n  a\n  b", "top/<some>-cd / top/<some>-c"),
    ],
)
def test_ambiguous_grammars_are_found_out(rules, pair):
    conflicts = Grammar(read_grammar(rules)).conflicts()
    assert conflicts == ([pair] if pair else [])


@pytest.mark.parametrize(
    "rules, message",
    [
        ("top\n  <a", None),
        ("top\n  <!!>", "not one of the notations"),
        ("top (x)\n  a", "0 columns, expected 1: x"),
        ("top\n  a | b", "1 columns, expected 0"),
        ("top\n  3x ", "empty option"),
        ("top\n  a\ntop\n  b", "a name of its own"),
        ("t\n  a", "a name of its own"),
    ],
)
def test_grammar_errors(rules, message):
    if message is None:
        assert read_grammar(rules)["top"].options[0].text == "<a"
        return
    with pytest.raises(GrammarError, match=message):
        read_grammar(rules)


def test_a_column_may_not_choose():
    known = Grammar(read_grammar("top\n  <some:v><v.c>\nsome (c)\n  a | <some>\n  b | x"))
    with pytest.raises((GrammarError, RecursionError)):
        known.measure("top")


# The real grammar


def test_no_text_has_two_derivations():
    assert grammar().conflicts() == []


def test_every_rule_is_used():
    parts = [p for r in grammar().rules.values() for o in r.options for p in o.parts if isinstance(p, Choice)]
    cells = {cell for r in grammar().rules.values() for o in r.options for (cell, *_) in o.columns.values()}
    unused = set(grammar().rules) - {p.rule for p in parts} - {c for c in cells if isinstance(c, str)} - {"document"}
    assert unused == set()


@pytest.mark.parametrize("domain", [None, *DOMAINS])
def test_samples_agree_with_the_exact_entropy(domain):
    """Mean nats and mean size of a sample, and nats minus rate x size, lie within 4 standard errors."""
    documents = sample(600, domain, seed=11)
    nats = np.array([-corpus.log_prob(d, domain) for d in documents])
    sizes = np.array([len(d) + 1 for d in documents])
    exact = corpus.document_measure(domain)
    rate = corpus.entropy_nats_per_byte(domain)
    for values, expected in ((nats, exact.nats), (sizes, exact.size_bytes), (nats - rate * sizes, 0.0)):
        error = values.std() / math.sqrt(len(values))
        assert abs(values.mean() - expected) < 4 * error


def test_reading_recovers_what_was_chosen():
    known, start = grammar(), START
    for draw in itertools.islice(corpus._draws(3, 0, 0), 150):
        chosen = []
        spy = Spy(known, None)
        numbers = []

        def note(draw=draw, spy=spy, chosen=chosen, numbers=numbers):
            number = draw()
            rule = spy.last
            numbers.append(number)
            chosen.append((rule.name, rule.options.index(rule.table[number % rule.total])))
            return number

        text = spy.write(start, note)
        ((log_p, choices),) = known.derivations(start, text)  # exactly one
        assert list(choices) == chosen
        exact = math.fsum(math.log(known.rules[r].probability(known.rules[r].options[i])) for r, i in chosen)
        assert math.isclose(log_p, exact, rel_tol=1e-12)


@settings(max_examples=25, deadline=None)
@given(index=st.integers(0, 5000), data=st.data())
def test_probabilities_of_beginnings_add_up(index, data):
    (document,) = sample(1, first=index)
    text = document + END
    cut = data.draw(st.integers(0, len(text) - 1))
    total = math.exp(corpus.log_prob(text[:cut], whole=False))
    after = [corpus.log_prob(text[:cut] + chr(c), whole=False) for c in (0, 10, *range(32, 127))]
    assert math.isclose(total, math.fsum(map(math.exp, after)), rel_tol=1e-9)


def test_foreign_text_has_no_probability():
    for text in ("", "Hello", "1+1=3\n", "Once upon a time", "Belur", b"\xff\n", sample(1, "story")[0] + "x"):
        assert corpus.log_prob(text) == -math.inf
    assert math.isfinite(corpus.log_prob("1+1=2\n7*8=56\n"))
    with pytest.raises(ValueError, match="unknown domain 'poems'"):
        sample(1, "poems")


# Documents


def test_sums_are_right():
    lines = "".join(sample(100, "sums")).splitlines()
    assert {re.sub(r"\d", "", line)[0] for line in lines} == set("+-*")
    for line in lines:
        a, operator, b, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line).groups()
        assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[operator] == int(result)


def test_names_are_names():
    lines = "".join(sample(100, "names")).splitlines()
    assert len(set(lines)) > 0.7 * len(lines)
    assert all(re.fullmatch(r"[A-Z][a-z]{1,12}", line) for line in lines)


def test_stories_are_well_formed():
    stories = sample(800, "story", seed=5)
    assert len(set(stories)) == len(stories)
    for story in stories:
        assert story.isascii() and re.fullmatch(r"[\n -~]+", story)
        assert re.search(r"[.!?]\n$", story), story
        assert story.count('"') % 2 == 0, story
        assert not re.search(r"\ba (?!one-)[aeiou]|\ban [^aeiouh]|  | \n|\n\n| [.,!?]|<|\||[.,!?][.,]", story)
        for line in story.splitlines():
            assert re.match(r'["A-Z]', line), line
            assert re.search(r'[.!?]"?$', line), line
            # After a sentence comes a capital, unless a quotation is followed by who said it.
            assert not re.search(r"(?<!Mr|rs)[.!?] [a-z]", line), line
            spoken = "said|asked|cried|called|laughed|he|she|it|and"
            assert not re.search(rf'[.!?]" (?!({spoken})\b)[a-z]', line), line


def test_heroes_keep_their_names():
    for story in sample(200, "story", seed=6):
        named = re.search(r"(?:named|called|name was|story of|know) ([A-Z][\w-]+)", story)
        name = named[1] if named else story.split()[0]
        assert story.count(name) >= 2 or " he " in story.lower() or " she " in story.lower()


# The same bytes


def stream_bytes(count, seed=0):
    out = bytearray()
    for document in corpus.iter_documents(seed):
        out += b"\0" + document.encode()
        if len(out) >= count:
            return bytes(out[:count])


GOLDEN = "d6a8086b12012d04baf71b7b9f2dad5368aa45391b0691809f6de38866fcab8b"


def test_first_megabyte_is_as_ever():
    assert hashlib.sha256(stream_bytes(1 << 20)).hexdigest() == GOLDEN


def test_splitmix64_is_the_published_one():
    # Its first outputs for seed 1234567, as in the reference implementation's documentation.
    state, out = 1234567, []
    for _ in range(5):
        state = (state + corpus._GAMMA) & corpus._MASK
        out.append(corpus._mix(state))
    assert out == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    numbers = np.array([0, 1, 2**63, 2**64 - 1, 1234567], dtype=np.uint64)
    assert corpus._mix_array(numbers).tolist() == [corpus._mix(int(n)) for n in numbers]


def test_draws_beyond_the_first_ones_continue_the_stream(monkeypatch):
    expected = sample(40)
    monkeypatch.setattr(corpus, "_DRAWS", 7)
    monkeypatch.setattr(corpus, "_BATCH", 3)
    assert sample(40) == expected


def test_documents_do_not_depend_on_those_before():
    assert sample(5, first=300) == sample(305)[300:]
    assert sample(20) != sample(20, stream="val") != sample(20, stream=2)
    assert not set(sample(200, "story")) & set(sample(200, "story", stream="val"))
    assert sample(3, seed=-1) == sample(3, seed=2**64 - 1)


def test_hash_seed_and_locale_do_not_matter():
    program = """
import hashlib, itertools
from data.corpus import *
text = "".join(itertools.islice(iter_documents(0), 60))
print(hashlib.sha256(text.encode()).hexdigest(), repr(entropy_nats_per_byte()))"""
    runs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "LC_ALL": "C"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


# Files


def test_files_and_their_description(tmp_path):
    found = corpus.ensure_corpus(tmp_path, train_bytes=20_000, val_bytes=5_000)
    for path, part, size in ((found.train_files, "train", 20_000), (found.val_files, "val", 5_000)):
        tokens = np.array(shards.open_shard(path, corpus.VOCAB_SIZE))
        assert tokens[0] == corpus.SEPARATOR and len(tokens) == found.info[part]["bytes"] >= size
        assert (tokens == 0).sum() == found.info[part]["documents"]
        documents = tokens.astype(np.uint8).tobytes().decode().split("\0")[1:]
        assert documents == sample(len(documents), seed=0, stream=part)
        assert (tmp_path / f"{part}.txt").read_text() == "\n".join(documents)
    info = json.loads((tmp_path / "corpus.json").read_text())
    assert info == found.info and info["entropy_nats_per_byte"] == corpus.entropy_nats_per_byte()
    assert math.isclose(sum(d["share_of_bytes"] for d in info["domains"].values()), 1, rel_tol=1e-9)


def test_a_larger_corpus_begins_with_the_smaller(tmp_path):
    small = corpus.ensure_corpus(tmp_path / "a", train_bytes=3000, val_bytes=100)
    large = corpus.ensure_corpus(tmp_path / "b", train_bytes=9000, val_bytes=100)
    one, two = shards.open_shard(small.train_files), shards.open_shard(large.train_files)
    assert np.array_equal(one, two[: len(one)])


def test_a_good_corpus_is_kept_a_damaged_one_made_again(tmp_path):
    sizes = {"train_bytes": 3000, "val_bytes": 1000}
    first = corpus.ensure_corpus(tmp_path, **sizes)
    shard = tmp_path / "train_000000.bin"
    written = shard.stat().st_mtime_ns
    assert corpus.ensure_corpus(tmp_path, **sizes) == first and shard.stat().st_mtime_ns == written
    whole = shard.read_bytes()
    for damage in (b"", whole[:-1], whole[:-1] + b"\1"):
        shard.write_bytes(damage)
        assert corpus.ensure_corpus(tmp_path, **sizes) == first
        assert shard.read_bytes() == whole
    (tmp_path / "corpus.json").write_text('{"schema": 1, "train": []}')
    assert corpus.ensure_corpus(tmp_path, **sizes) == first
    other = corpus.ensure_corpus(tmp_path, seed=7, **sizes)
    assert other.info["train"]["sha256"] != first.info["train"]["sha256"]


def _ensure(folder):
    return corpus.ensure_corpus(folder, train_bytes=30_000, val_bytes=1000).info


def test_processes_that_start_together_agree(tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        infos = pool.map(_ensure, [str(tmp_path)] * 3, chunksize=1)
    assert infos[0] == infos[1] == infos[2]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".lock",
        "corpus.json",
        "train.txt",
        "train_000000.bin",
        "val.txt",
        "val_000000.bin",
    ]


def test_best_loss_is_that_of_the_documents(tmp_path):
    found = corpus.ensure_corpus(tmp_path, train_bytes=1000, val_bytes=60_000)
    tokens = np.array(shards.open_shard(found.val_files))
    best = corpus.best_loss(tokens)
    assert abs(best - corpus.entropy_nats_per_byte()) < 0.06
    documents = tokens.astype(np.uint8).tobytes().decode().split("\0")[1:]
    logs = [corpus.log_prob(d) for d in documents[:-1]] + [corpus.log_prob(documents[-1], whole=False)]
    assert math.isclose(best, -sum(logs) / (len(tokens) - 1), rel_tol=1e-12)
    # Cut anywhere, the nats of the beginning only grow.
    totals = [corpus.best_loss(tokens[:n]) * (n - 1) for n in (2, 50, 51, 52, 400, 1000)]
    assert totals == sorted(totals)
    for bad in (tokens[1:], np.array([0, 1, 2]), np.array([0])):
        with pytest.raises(ValueError, match=r"separator|not of the embedded corpus"):
            corpus.best_loss(bad)


def test_command_line(tmp_path, capsys):
    assert corpus.main(["--out", str(tmp_path / "c"), "--train-bytes", "2000", "--val-bytes", "500"]) == 0
    assert f"entropy {corpus.entropy_nats_per_byte():.6f} nats per byte" in capsys.readouterr().out
    assert corpus.main(["--entropy", "--show", "2", "--domain", "sums"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("\n".join(sample(2, "sums", seed=0))) and "nats/byte" in out
    for wrong in ([], ["--out", "x", "--train-bytes", "0"], ["--show", "x"]):
        with pytest.raises(SystemExit) as exit:
            corpus.main(wrong)
        assert exit.value.code == 2
    (tmp_path / "file").touch()
    assert corpus.main(["--out", str(tmp_path / "file")]) == 3
    assert "file" in capsys.readouterr().err


def test_the_readme_states_the_entropy(repo):
    assert corpus._table() in (repo / "data" / "README.md").read_text(encoding="utf-8")
