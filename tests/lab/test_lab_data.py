"""Documents, vocabularies, packing, cleaning."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import LabError, cli, stories
from lab.cleaning import clean_stories, repair_encoding
from lab.datasets import (
    load_corpus,
    load_documents,
    pack_rows,
    row_batches,
    split_documents,
    text_documents,
    tokenize_documents,
)
from lab.models import IGNORE
from lab.tokens import ByteTokenizer, CharTokenizer, GPT2Tokenizer, UnknownTextError, from_spec, word_tokenizer
from lab.words import join_words, split_words

WORDS = st.lists(st.text("abcde", min_size=1, max_size=9), min_size=1, max_size=30)


@settings(max_examples=60, deadline=None)
@given(WORDS, st.integers(2, 64), st.booleans())
def test_every_prediction_is_in_the_rows_exactly_once(words, row_tokens, shuffled):
    tokens = tokenize_documents(words, CharTokenizer("abcde"))
    inputs, targets = pack_rows(tokens, row_tokens, np.random.default_rng(0) if shuffled else None)
    scored = targets != IGNORE
    assert int(scored.sum()) == tokens.num_predictions == sum(len(w) + 1 for w in words)
    stream = targets[scored].tolist()
    pieces, current = [], []
    for token in stream:
        if token == 0:
            pieces.append("".join("abcde"[t - 1] for t in current))
            current = []
        else:
            current.append(token)
    assert not current and sorted(pieces) == sorted(words)
    if 4 * (max(map(len, words)) + 1) <= row_tokens:  # whole documents: each target is the next input of its row
        follows = scored[:, :-1] & scored[:, 1:]
        assert torch.equal(targets[:, :-1][follows], inputs[:, 1:][follows])
        assert bool((inputs[:, 0] == 0).all())


@settings(max_examples=40, deadline=None)
@given(WORDS, st.integers(0, 9))
def test_a_split_is_a_partition(words, seed):
    if len(words) < 3:
        with pytest.raises(LabError, match="one each"):
            split_documents(words, seed)
        return
    split = split_documents(words, seed)
    assert sorted(w for part in split.values() for w in part) == sorted(words)
    assert all(split.values()) and split == split_documents(words, seed)


def test_batches_skip_to_where_they_were():
    tokens = tokenize_documents(["abc", "de", "a", "eeee"] * 9, CharTokenizer("abcde"))
    whole = row_batches(tokens, 20, 2, seed=3)
    seen = [next(whole) for _ in range(12)]
    later = row_batches(tokens, 20, 2, seed=3, skip=7)
    for a, b in zip(seen[7:], later):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=60).filter(lambda t: "\0" not in t))
def test_characters_and_bytes_come_back(text):
    for tokenizer in (CharTokenizer(text), ByteTokenizer()):
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
        assert from_spec(tokenizer.spec()).digest() == tokenizer.digest()


def test_unknown_characters_are_named():
    with pytest.raises(UnknownTextError, match=r"'é' \(U\+00E9\).*character 3"):
        CharTokenizer("abc").encode("abcé")
    assert CharTokenizer("abc").encode("aéb", "keep").tolist() == [1, -1, 2]


def test_running_text_is_cut_at_blank_lines():
    text = "\n\n".join(f"speech {i} " + "x" * 300 for i in range(30))
    passages = text_documents(text, 1000)
    assert "".join(passages) == text and all(p.startswith("speech") for p in passages)


@pytest.mark.parametrize("content, words", [(b"", "empty"), (b"  \n\n ", "empty"), (b"ab\xff\xfe", "not UTF-8")])
def test_bad_files_are_named(tmp_path, content, words):
    path = tmp_path / "corpus.txt"
    path.write_bytes(content)
    with pytest.raises(LabError, match=words):
        load_documents("text", path)
    with pytest.raises(LabError, match="cannot read"):
        load_documents("names", tmp_path / "absent.txt")


def test_cleaning_counts_what_it_drops():
    good = "Once upon a time there was a cat. " * 4
    raw = [good, good, good.replace("cat", "ca\ufffdt"), good + "And then", good.replace("cat", "кот"), "Too short."]
    cleaned = clean_stories(raw)
    assert len(cleaned.stories) == 1
    reasons = ("copy", "broken", "incomplete", "foreign characters", "length")
    assert all(cleaned.dropped[reason] == 1 for reason in reasons)


def test_mojibake_is_repaired():
    broken = "He said, “I’m here” – café".encode().decode("cp1252", "replace")
    assert "�" in broken or repair_encoding(broken) == "He said, “I’m here” – café"
    assert repair_encoding("It’s".encode().decode("cp1252")) == "It’s"


def test_words_get_their_spaces_and_capitals_back():
    story = 'One day, Lily said, "I like my cat." She ran home.\nThe cat, named Tom, was 12. "Is it?" asked Lily.'
    tokenizer = word_tokenizer([story] * 3 + ["We saw Lily and Tom. He saw Lily and Tom."])
    assert tokenizer.decode(tokenizer.encode(story).tolist()) == story
    assert tokenizer.encode("zebra").tolist() == [1]
    assert join_words(split_words("hi there , you")) == "Hi there, you"


@pytest.mark.parametrize("kind", ["names", "text", "sums"])
def test_the_embedded_corpus_reads_as_every_kind(kind):
    corpus = load_corpus(kind, limit_chars=4000)
    assert corpus.tokens["train"].num_predictions > corpus.tokens["val"].num_predictions > 0


def test_gpt2_tokens_by_a_folder_and_a_folder_without_them(shared_data, tmp_path):
    """Found on a checkpoint over GPT-2's tokens, which the microscope could not open at all."""
    tokenizer = GPT2Tokenizer(str(shared_data / "tokenizer"))
    assert tokenizer.encode("Hello world").tolist() == [15496, 995] and tokenizer.decode([15496, 995]) == "Hello world"
    with pytest.raises(LabError, match="GPT-2's vocabulary cannot be loaded"):
        GPT2Tokenizer(str(tmp_path))


def test_a_file_of_stories_of_which_none_is_left_is_not_written(tmp_path, capsys):
    raw, out = tmp_path / "raw.txt", tmp_path / "clean.txt"
    raw.write_text("too short\n", "utf-8")
    assert cli.run(stories.main, ["clean", str(raw), f"--out={out}"]) == 2
    assert "no story is left" in capsys.readouterr().err and not out.exists()
