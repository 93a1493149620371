"""Requests become command lines that the trainers accept; what is out of bounds is refused."""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.studio.catalogue import corpus_of_shards
from lab.studio.places import Places, Refused
from lab.studio.recipes import (
    BOUNDS,
    CORPORA,
    MODELS,
    READINGS,
    VAL_TOKENS,
    Request,
    checked,
    corpora_for,
    training_of,
    unit_of,
)


@pytest.fixture
def places(tmp_path: Path, monkeypatch) -> Places:
    monkeypatch.setenv("SPEEDRUN_CACHE", str(tmp_path / "cache"))
    found = Places.of(tmp_path)
    found.texts.mkdir(parents=True)
    return found


def test_every_rung_of_the_ladder_is_there():
    from lab.models import LADDER
    from lab.stories import STORY_MODELS

    assert {m.rung for m in MODELS.values() if m.rung and not m.stories} == set(LADDER)
    assert {m.rung for m in MODELS.values() if m.stories} == set(STORY_MODELS)


@pytest.mark.parametrize("model", MODELS)
def test_the_trainers_accept_every_model(places, model):
    from lab import stories, train
    from train_gpt import parse_config

    for _, corpus in corpora_for(model):
        if corpus == "upload":
            continue
        size = {} if model == "nano" else {"width": 32, "layers": 2}
        request = Request(model, corpus, steps=7, seed=3, batch_tokens=2048, learning_rate=0.01, **size)
        command = training_of(request, places).command
        if model == "nano":
            config = parse_config(list(command[1:]))
            assert (config.num_iterations, config.seed, config.tokens_per_step) == (7, 3, 2048)
            continue
        start = stories.STORY_MODELS[MODELS[model].rung] if MODELS[model].stories else {}
        words = [word for word in command if word.startswith("--")]
        config, fields, _ = train.parse(words, {k: str(v) for k, v in start.items()})
        assert (config.model, config.seed) == (MODELS[model].rung, 3)
        if model != "counts":  # which has no steps, and no batches
            assert (config.steps, config.batch_tokens) == (7, 2048)
        for name, value in ((MODELS[model].width, 32), (MODELS[model].layers, 2)):
            assert not name or getattr(fields, name) == value


def test_an_uploaded_text_is_handed_on(places):
    text = places.texts / "mine.txt"
    text.write_text("Some words. " * 2000)
    for reading in READINGS:
        request = Request("mlp", "upload", reading, str(text))
        assert f"--path={text}" in training_of(request, places).command
        assert f"--data={reading}" in training_of(request, places).command
        assert training_of(request, places).floor is None


def test_nano_reads_an_uploaded_text_as_the_trainer_does(places, tmp_path):
    """Through its `--data`: one cache, one tokenizer, one split."""
    from train_gpt import parse_config

    text = places.texts / "mine-0a1b.txt"
    made = {}
    for reading, content in (
        ("text", "Some words. " * 2000),
        ("stories", "".join(f"Story {number}, told.\n<|endoftext|>\n" for number in range(900))),
        ("names", "".join(f"name{number}\n" for number in range(3000))),
    ):
        text.write_text(content)
        words = training_of(Request("nano", "upload", reading, str(text)), places).command
        config = parse_config(list(words[1:]))
        folder = Path(config.train_files).parent
        assert folder.parent == tmp_path / "cache" / "tokens"
        assert corpus_of_shards(config.train_files) == "mine-0a1b"
        told = json.loads((folder / "tokenize.json").read_text())
        made[reading] = told["documents"], told["split"], told["train"]["documents"]
        if reading != "names":  # whose lines the trainer takes for one text
            assert config == parse_config([*words[1:-1], f"--data={text}"])
    assert made["text"] == ("file", "characters", 1) and made["stories"][:2] == ("marker", "documents")
    assert made["names"][:2] == ("line", "documents") and 2600 < made["names"][2] < 2800


def test_nanos_floor_is_that_of_the_very_text_it_is_validated_on(places):
    """Not the grammar's average, below which a model on easier text would fall."""
    from data.corpus import best_loss, ensure_corpus, entropy_nats_per_byte
    from data.shards import TokenStream

    floor = training_of(Request("nano", "all"), places).floor
    made = ensure_corpus(places.home / "corpus", train_bytes=1 << 12, val_bytes=1 << 17)
    stream = TokenStream(made.val_files, sequence_tokens=VAL_TOKENS, vocab_size=256, cycle=False, sequences_per_step=1)
    inputs, targets = stream.batch(0, 0)
    read = np.append(np.asarray(inputs).reshape(-1), np.asarray(targets).reshape(-1)[-1])
    assert floor == best_loss(read) and floor != entropy_nats_per_byte()
    assert training_of(Request("mlp", "names"), places).floor is None  # lab.train tells it in its JSON


def test_what_losses_are_counted_in():
    asked = {"nano": "byte", "stories-gpt": "word", "mlp": "character"}
    assert {name: unit_of(asdict(Request(name))) for name in asked} == asked
    assert unit_of(asdict(Request("mlp", tokens="word"))) == "word" and unit_of({}) == "token"


def test_texts_that_were_not_uploaded_are_refused(places, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text("text")
    for path in ("", str(other), "/etc/passwd", str(places.texts / "gone.txt"), str(places.texts)):
        with pytest.raises(Refused):
            training_of(Request("mlp", "upload", text=path), places)


def test_a_text_too_short_for_nano_is_refused(places):
    text = places.texts / "short.txt"
    text.write_text("too short")
    with pytest.raises(Refused, match="short"):
        training_of(Request("nano", "upload", text=str(text)), places)


@pytest.mark.parametrize("field", ["model", "corpus", "reading", "tokens"])
def test_what_is_not_a_choice_is_refused(places, field):
    with pytest.raises(Refused, match=field):
        training_of(dataclasses.replace(Request(), **{field: "--output_dir=/"}), places)


ANYTHING = st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=3), st.booleans())


@given(st.sampled_from(sorted(BOUNDS)), ANYTHING)
def test_numbers_are_within_their_bounds_or_refused(name, value):
    try:
        found = getattr(checked(dataclasses.replace(Request(), **{name: value})), name)
    except Refused:
        return
    least, most = BOUNDS[name]
    assert found == value and (least <= found <= most or found == 0)
    assert isinstance(found, float if name == "learning_rate" else int)


@pytest.mark.parametrize(
    ("model", "corpus"), [("nano", "names"), ("mlp", "all"), ("stories-gpt", "names"), ("stories-recurrent", "sums")]
)
def test_a_corpus_that_does_not_suit_the_model_is_refused(places, model, corpus):
    assert corpus in CORPORA and corpus not in dict(corpora_for(model)).values()
    with pytest.raises(Refused):
        training_of(Request(model, corpus), places)


def test_a_transformer_of_one_layer_is_refused(places):
    with pytest.raises(Refused, match="at least 2 layers"):
        training_of(Request("gpt", layers=1), places)
    assert training_of(Request("recurrent", layers=1), places)
