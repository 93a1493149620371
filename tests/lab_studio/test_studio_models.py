"""Checkpoints in the studio: found, described, opened without running anything in them, written with."""

import html
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lab import LabError
from lab.analyses.menu import MENU
from lab.checkpoints import save_checkpoint
from lab.models import LADDER, build_model
from lab.sample import generate
from lab.studio import markup
from lab.studio.analyses import LONGEST_LOOK, MOST_CHECKPOINTS, Microscope, along
from lab.studio.catalogue import Catalogue, Models, describe, read_header, steps_of
from lab.studio.places import Places, Refused
from lab.studio.samples import Samples
from lab.studio.writing import LONGEST_PROMPT, drivers, guess, write
from lab.tokens import ByteTokenizer, CharTokenizer, UnknownTextError, WordTokenizer
from lab.words import unread_words

CHARACTERS = CharTokenizer("abcd .")


def save(folder: Path, rung: str = "mlp", tokenizer=CHARACTERS, step: int = 5, name: str | None = None) -> Path:
    """A checkpoint of an untrained rung, where a run would leave it."""
    torch.manual_seed(0)
    model = build_model(rung, tokenizer.vocab_size)
    if rung == "counts":
        model.observe(torch.tensor([[0, 1, 2, 3]]), torch.tensor([[1, 2, 3, 0]]))
    path = folder / "runs" / "seed-000.checkpoints" / (name or f"step-{step:06d}.safetensors")
    told = {"model": rung, "fields": {}, "step": step, "run_name": "seed-000", "series": folder.name}
    save_checkpoint(path, model, tokenizer, told)
    return path


@pytest.fixture
def places(tmp_path) -> Places:
    return Places(tmp_path, (tmp_path,))


def test_runs_are_found_with_size_loss_and_date(places, tmp_path):
    for step in (0, 5, 9):
        save(tmp_path / "one", step=step)
    best = save(tmp_path / "one", step=5, name="best.safetensors")
    save(tmp_path / "two", "bigram")
    save(tmp_path / "two", "bigram", name="resume.safetensors")
    log = (
        "=" * 100
        + "\n"
        + "".join(f"step:{s}/9 val_loss:{v} train_time:1ms step_avg:1ms\n" for s, v in ((0, 3.0), (5, 2.0), (9, 2.5)))
    )
    (tmp_path / "one" / "runs" / "seed-000.txt").write_text(log)
    (tmp_path / "one" / "torn.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    catalogue = Catalogue(places)
    found = {one.model: one for one in catalogue.checkpoints()}
    assert set(found) == {"mlp", "bigram"}
    mlp = found["mlp"]
    assert (mlp.path, mlp.step, mlp.loss, mlp.size_bytes) == (best, 5, 2.0, best.stat().st_size)
    assert mlp.parameters == build_model("mlp", CHARACTERS.vocab_size).num_parameters()
    assert found["bigram"].path.name == "step-000005.safetensors" and found["bigram"].loss is None
    counts = save(tmp_path / "three", "counts")
    counts.parent.with_name("seed-000.json").write_text(json.dumps({"num_parameters": 0}))
    assert describe(counts).parameters == 0, "what is counted is no parameter"
    assert [p.stem for p in steps_of(best)] == ["best", "step-000000", "step-000005", "step-000009"]
    row = catalogue.row(mlp)
    assert row[0] == "mlp" and row[3] == "2.0000 a character" and "one" in row[-1]


def test_losses_say_what_they_are_counted_in_and_untrained_models_come_last(places, tmp_path):
    """The newest was stopped before its first step; a word's loss and a character's do not compare."""
    save(tmp_path / "characters", step=5)
    save(tmp_path / "words", "bigram", WordTokenizer(["a", "b"]), step=5)
    save(tmp_path / "new", step=0)
    found = Catalogue(places).checkpoints()
    assert [one.untrained for one in found] == [False, False, True]
    assert {one.model: one.unit for one in found} == {"mlp": "character", "bigram": "word"}


def test_what_lies_in_the_trash_is_not_offered(places, tmp_path):
    save(tmp_path / "kept")
    save(places.trash / "gone")
    log = places.trash / "gone" / "runs" / "seed-000.txt"
    log.write_text("x")
    assert [one.path.parts[-4] for one in Catalogue(places).checkpoints()] == ["kept"]
    assert Catalogue(places).series() == []


def test_checkpoints_of_the_trainer_are_described_too(places, tmp_path):
    import dataclasses
    import json

    from train_gpt import CHECKPOINT_FORMAT, GPT, parse_config
    from trainer.checkpoints import save_tensors

    config = parse_config(["--preset=nano", "--model_dim=16", "--num_heads=1"])
    gpt = GPT(config)
    state = {f"model.{n}": p.detach() for n, p in gpt.named_parameters()} | {"muon.momentum.x": torch.zeros(9)}
    told = {"format": CHECKPOINT_FORMAT, "config": json.dumps(dataclasses.asdict(config)), "step": "7", "run_name": "a"}
    path = tmp_path / "s" / "runs" / "a.checkpoints" / "step-000007.safetensors"
    path.parent.mkdir(parents=True)
    save_tensors(path, state, told)
    (one,) = Catalogue(places).checkpoints()
    assert (one.model, one.step, one.parameters) == ("nano", 7, sum(p.numel() for p in gpt.parameters()))
    *_, written = write(Models(places).load(path), "ab", max_tokens=5, temperature=0)
    assert written.text.startswith("ab")


class Bomb:
    """Unpickling this creates a file."""

    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (Path(self.path),))


@pytest.mark.parametrize("maker", ["pickle", "torch"])
def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(places, tmp_path, maker):
    ran, path = tmp_path / "ran", tmp_path / "bomb.safetensors"
    if maker == "pickle":
        path.write_bytes(pickle.dumps(Bomb(str(ran))))
    else:
        torch.save({"model": Bomb(str(ran))}, path)
    with pytest.raises((Refused, LabError)):
        Models(places).load(path)
    with pytest.raises(Refused):
        Models(places).load(path.rename(tmp_path / "bomb.pt"))
    assert not ran.exists()
    pickle.loads(pickle.dumps(Bomb(str(ran))))
    assert ran.exists()  # the bomb is live


def test_a_foreign_checkpoint_is_refused(places, tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "foreign.safetensors"
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(LabError, match="not a checkpoint of format"):
        Models(places).load(path)
    assert Catalogue(places).checkpoints() == []


def test_headers_that_lie_are_refused(tmp_path):
    for content in (b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b"\x10\0\0\0\0\0\0\0{}", b'\x07\0\0\0\0\0\0\0{"a":1}'):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(Refused, match="not a safetensors file"):
            read_header(path)


def test_a_damaged_checkpoint_is_refused(places, tmp_path):
    path = save(tmp_path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(LabError, match="damaged"):
        Models(places).load(path)


def test_models_stay_open_until_their_file_changes(places, tmp_path):
    models, path = Models(places, keep=1), save(tmp_path / "a")
    first = models.load(path)
    assert models.load(path) is first
    models.load(save(tmp_path / "b"))
    assert models.load(path) is not first


@pytest.mark.parametrize("rung", LADDER)
def test_every_rung_writes_the_same_for_the_same_seed(places, tmp_path, rung):
    checkpoint = Models(places).load(save(tmp_path, rung))
    runs = [list(write(checkpoint, "ab", max_tokens=12, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    (one,) = generate(checkpoint, "ab", max_tokens=12, seed=1)  # as lab.sample writes it
    assert list(runs[0][-1].ids[2:]) == one.ids and runs[0][-1].ended == one.ended
    first = runs[0][0]
    assert first.text == "ab" and first.prompt_tokens == 2 and not first.ended
    for before, after in zip(runs[0], runs[0][1:]):
        assert after.ended or len(after.ids) == len(before.ids) + 1
        assert after.text.startswith("ab") and len(after.ids) <= 14


def test_a_model_ends_its_text_by_itself(places, tmp_path):
    checkpoint = Models(places).load(save(tmp_path, "counts"))  # it has seen one text, of its first three characters
    *_, last = write(checkpoint, "", max_tokens=50, temperature=0)
    assert last.ended and last.text == CHARACTERS.decode([1, 2, 3])


def test_what_the_model_expected(places, tmp_path):
    checkpoint = Models(places).load(save(tmp_path, "gpt"))
    found = guess(checkpoint, (1, 2, 3), 2, count=4)
    assert len(found.top) == 4 and [p for _, p in found.top] == sorted((p for _, p in found.top), reverse=True)
    assert 0 < found.entropy_nats <= torch.tensor(float(CHARACTERS.vocab_size)).log() + 1e-6
    assert found.chosen == CHARACTERS.piece(3)
    assert guess(checkpoint, (1, 2, 3), 3).chosen == "<mark>"


def test_an_embedded_direction_drives_what_it_should(places, tmp_path):
    """In a bigram only the token just before can matter, and its share is its whole logit."""
    checkpoint = Models(places).load(save(tmp_path, "bigram"))
    with torch.no_grad():
        checkpoint.model.table.weight.normal_(generator=torch.Generator().manual_seed(1))
    assert [score for _, score in drivers(checkpoint, (1, 2, 3), 3)[:-1]] == [0.0, 0.0, 0.0]
    assert [abs(score) for _, score in drivers(checkpoint, (1, 2, 3), 3)[-1:]] == [1.0]
    scores = drivers(Models(places).load(save(tmp_path / "r", "recurrent")), (1, 2, 3, 4), 3)
    assert [piece for piece, _ in scores] == ["<mark>", *map(CHARACTERS.piece, (1, 2, 3))]
    assert max(abs(score) for _, score in scores) == 1.0
    assert drivers(Models(places).load(save(tmp_path / "c", "counts")), (1, 2), 1) == []


def test_a_prompt_with_unknown_characters_is_refused(places, tmp_path):
    checkpoint = Models(places).load(save(tmp_path))
    with pytest.raises(UnknownTextError, match="'z'"):
        next(write(checkpoint, "abz"))


def test_words_that_a_model_does_not_know_are_told(places, tmp_path):
    words = WordTokenizer(["the", "cat", "."])
    assert unread_words(words, "The cat.") == ""
    assert unread_words(words, "The dog and the dog.").endswith("reads these as <unk>: dog, and.")
    assert unread_words(CHARACTERS, "dog") == ""  # characters are refused instead
    scope = Microscope(places, Models(places))
    path = save(tmp_path, "bigram", words)
    assert "reads these as <unk>: dog" in scope.look("next_token", path, "the dog").summary
    assert "<unk>" not in scope.look("next_token", path, "the cat").summary


def test_a_prompt_without_end_is_refused_by_the_server_too(places, tmp_path):
    checkpoint = Models(places).load(save(tmp_path))
    next(write(checkpoint, "a" * LONGEST_PROMPT))
    with pytest.raises(Refused, match="at most"):
        next(write(checkpoint, "a" * (LONGEST_PROMPT + 1)))
    with pytest.raises(Refused, match="at most"):
        Microscope(places, Models(places)).look("variability", checkpoint.path, "a" * (LONGEST_LOOK + 1))


def test_nothing_chosen_is_said_and_never_becomes_a_word(places):
    for nothing in (None, ""):
        with pytest.raises(Refused, match="choose a model first"):
            Models(places).load(nothing)
        with pytest.raises(Refused, match="nothing is chosen"):
            places.inside(nothing)


def test_names_are_sampled_ten_at_a_time(places, tmp_path):
    path = save(tmp_path, "bigram")
    samples = Samples(Models(places))
    samples.models.load(path).told["data"] = "names"
    assert samples.text(path).count(",") == 9


def test_bytes_that_are_half_a_character_are_not_shown(places, tmp_path):
    checkpoint = Models(places).load(save(tmp_path, "bigram", ByteTokenizer()))
    with torch.no_grad():
        checkpoint.model.table.weight.zero_()
        for before, after in ((ord("a"), 0xC3), (0xC3, 0xA9), (0xA9, 0)):
            checkpoint.model.table.weight[before, after] = 50.0
    texts = [now.text for now in write(checkpoint, "a", temperature=0)]
    assert texts == ["a", "a", "aé", "aé"]


def test_words_are_written_with_spaces_and_capitals(places, tmp_path):
    words = WordTokenizer(["the", "cat", "sat", "."])
    checkpoint = Models(places).load(save(tmp_path, "bigram", words))
    with torch.no_grad():
        checkpoint.model.table.weight.zero_()
        for before, after in ((2, 3), (3, 4), (4, 5), (5, 0)):
            checkpoint.model.table.weight[before, after] = 50.0
    *_, last = write(checkpoint, "the", temperature=0)
    assert last.text == "The cat sat." and last.ended


def test_samples_are_made_once_for_each_checkpoint(places, tmp_path):
    import time

    folder = save(tmp_path, "counts", step=1).parent
    save(tmp_path, "counts", step=2)
    samples = Samples(Models(places))
    end = time.monotonic() + 30
    while len(found := samples.along(folder)) < 2:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert [step for step, _ in found] == [2, 1] and found[0][1] == found[1][1]
    assert samples.along(folder) == found


def test_a_sample_that_ends_at_once_is_followed_by_another(places, tmp_path, monkeypatch):
    """The same random numbers end every untrained model at once, and the page showed empty lines."""
    from lab.sample import Sample

    texts = [Sample("", "", [], True), Sample("", "a dog", [1], True)]
    monkeypatch.setattr("lab.sample.generate", lambda *given, **how: texts[: how["count"]])
    assert Samples(Models(places)).text(save(tmp_path, "bigram", step=1)) == "a dog"
    monkeypatch.setattr(Models, "load", lambda self, path: SimpleNamespace(told={"data": "names"}))
    assert Samples(Models(places)).text("a model of names") == "a dog", "and no comma before it"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The folder of a short real training of the lab, where the queue would have put it."""
    from lab.models import fields_class
    from lab.train import TrainConfig, train_model

    folder = tmp_path_factory.mktemp("home") / "trainings" / "one"
    config = TrainConfig("mlp", "names", steps=6, batch_tokens=256, limit_chars=3000, checkpoints=3, val_tokens=500)
    train_model(config, fields_class("mlp")(hidden_dim=16), folder=folder)
    return folder


OF_AN_MLP = [name for name in MENU if name not in ("attention", "scalars")]


def test_the_analyses_that_fit_are_offered_in_words(trained):
    places = Places(trained.parents[1], (trained.parents[1],))
    path = trained / "runs" / "seed-000.checkpoints" / "best.safetensors"
    offered = Microscope(places, Models(places)).kinds(path)
    assert [name for _, name in offered] == OF_AN_MLP
    assert dict(map(reversed, offered))["coloured"] == "Coloured: text coloured by loss"


@pytest.mark.parametrize("name", OF_AN_MLP)
def test_every_analysis_leaves_a_picture_and_a_line(trained, name):
    from lab.studio import analyses

    places = Places(trained.parents[1], (trained.parents[1],))
    scope = Microscope(places, Models(places))
    path = trained / "runs" / "seed-000.checkpoints" / "best.safetensors"
    monkey = pytest.MonkeyPatch()
    monkey.setattr(analyses, "SCORED_CHARS", 500)
    try:
        found = scope.look(name, path, "an")
    finally:
        monkey.undo()
    assert found.summary and found.png_path.read_bytes().startswith(b"\x89PNG")
    assert html.escape(found.summary) in markup.finding(found), "as the page shows it"
    assert found.png_path.is_relative_to(places.pictures)


def test_a_run_can_be_kept_as_one_page(trained, monkeypatch):
    monkeypatch.setattr("lab.page.SHOWN", ("curve", "samples"))  # all of them take a minute
    places = Places(trained.parents[1], (trained.parents[1],))
    path = trained / "runs" / "seed-000.checkpoints" / "best.safetensors"
    page = Microscope(places, Models(places)).page(path)
    assert page.is_relative_to(places.pictures) and page.suffix == ".html"
    text = page.read_text()
    assert all(f'<h2 id="{name}">' in text for name in ("curve", "samples")) and "mlp" in text
    steps = [int(one.stem[5:]) for one in steps_of(path)[1:]]
    assert len(steps) > 2 and all(f"<td>{step}<td>" in text for step in steps), "along the whole training"
    with pytest.raises(Refused, match="outside"):
        Microscope(places, Models(places)).page(path, "/etc/passwd")


def test_analyses_that_make_no_sense_are_refused(trained):
    places = Places(trained.parents[1], (trained.parents[1],))
    scope = Microscope(places, Models(places))
    path = trained / "runs" / "seed-000.checkpoints" / "best.safetensors"
    with pytest.raises(Refused, match="no analysis"):
        scope.look("__class__", path, "")
    with pytest.raises(Refused, match="attention does not fit a mlp"):
        scope.look("attention", path, "an")
    other = places.texts / "other.txt"
    other.parent.mkdir(exist_ok=True)
    other.write_text("ann\nbob\ncid\n")
    with pytest.raises(LabError, match="is not the text of"):
        scope.look("quality", path, "an", str(other))
    with pytest.raises(UnknownTextError):
        scope.look("variability", path, "1234")
    with pytest.raises(Refused, match="outside"):
        scope.look("variability", "/etc/passwd", "")


def test_a_model_can_be_handed_its_own_text(tmp_path):
    """Trained elsewhere, on a file that is now among the texts of the studio."""
    from lab.models import fields_class
    from lab.train import TrainConfig, train_model

    places = Places(tmp_path, (tmp_path,))
    text = places.texts / "mine.txt"
    text.parent.mkdir()
    text.write_text("\n".join(["anna", "bob", "cid", "dora", "emil", "fred", "gus", "hal", "ida", "jo"]))
    config = TrainConfig("bigram", "names", path=str(text), checkpoints=1, steps=2)
    trained = train_model(config, fields_class("bigram")(), folder=tmp_path / "elsewhere")
    path = trained.checkpoints / "best.safetensors"
    moved = text.rename(text.with_name("moved.txt"))
    scope = Microscope(places, Models(places))
    with pytest.raises((Refused, LabError)):
        scope.look("frequency", path, "")
    found = scope.look("frequency", path, "", str(moved))
    assert found.data["characters"]["total"] == sum(map(len, moved.read_text().split()))


def test_what_a_model_writes_is_escaped():
    """A model may have learned to write markup; the page must not run it."""
    story_html = pytest.importorskip("lab.studio.pages.write").story_html
    samples_html = pytest.importorskip("lab.studio.pages.train").samples_html
    pieces = [markup.token_buttons(["<b>"], 0), markup.driven(["<b>"], [1.0], "<b>"), markup.bars([("<b>", 1.0)], "")]
    for shown in (story_html("<b>hello", "<b>", True), samples_html([(1, "<b>hello")]), *pieces):
        assert "<b>" not in shown and "&lt;b&gt;" in shown


def test_colours_mean_the_same_as_in_the_pictures():
    """lab.analyses.attribution draws RdBu: blue pushed towards the target, red away from it."""
    shown = markup.driven(["a", "b"], [2.0, -1.0], "c")
    towards, away = shown.index(f"rgb({markup.TOWARDS} / 0.55)"), shown.index(f"rgb({markup.AWAY} / 0.28)")
    assert towards < shown.index(">a<") < away < shown.index(">b<")
    red, _, blue = map(int, markup.TOWARDS.split())
    assert blue > red and "Blue pushed towards" in shown


def test_texts_of_any_alphabet_are_shown_as_text(trained):
    """Pictures have no letters for many alphabets and grow with the prompt; text wraps."""
    from dataclasses import replace

    places = Places(trained.parents[1], (trained.parents[1],))
    path = trained / "runs" / "seed-000.checkpoints" / "best.safetensors"
    found = Microscope(places, Models(places)).look("samples", path, "an")
    row = {"step": 3, "text": "你好, नमस्ते", "ended": True}
    shown = markup.finding(replace(found, data={"prompt": "", "samples": [row]}))
    assert "你好, नमस्ते" in shown and "<img" not in shown
    top = {"prompt": "", "table": [{"drawn": "你", "entropy_nats": 0.5, "top": [["好", 0.75, 9]]}]}
    shown = markup.finding(replace(found, name="positions", data=top))
    assert "<th scope='row'>你</th><td>0.50</td><td>好 75%</td>" in shown and "<img" not in shown
    said = {"tokens": ["न"], "table": [{"layer": "block 0", "likeliest": [["म", 0.5]]}]}
    shown = markup.finding(replace(found, name="logit_lens", data=said))
    assert "<th scope='col'>न</th>" in shown and "<th scope='row'>block 0</th><td>म 50%</td>" in shown


def test_a_long_prompt_makes_no_endless_picture(trained):
    """It was drawn 0.32 inches a token: 70,655 pixels for a long one."""
    import struct

    places = Places(trained.parents[1], (trained.parents[1],))
    path = trained / "runs" / "seed-000.checkpoints" / "best.safetensors"
    found = Microscope(places, Models(places)).look("attribution", path, "an" * 200)
    width, height = struct.unpack(">II", found.png_path.read_bytes()[16:24])
    assert max(width, height) < 3000 and len(found.data["tokens"]) == 401
    assert markup.finding(found).count("<span style") == 2 * 401


def test_the_ways_through_a_gpt_are_drawn():
    """Each value embedding and skip where the model's own forward pass has it."""
    from lab.models.gpt import GPTFields, gpt_config
    from lab.studio.diagram import gpt_paths, value_layers
    from train_gpt import GPT

    fields = GPTFields(num_layers=4, model_dim=16, num_heads=1, value_embeddings=1, unet_skips="1>3")
    shown = gpt_paths(GPT(gpt_config(9, fields)))
    words = "4 layers; both input embeddings mixed in at each; value embeddings at 0, 3; skips 1 to 3."
    assert f"<figcaption>{words}</figcaption>" in shown and f"aria-label='{words}'" in shown
    assert shown.count(">layer ") == 4 and shown.count(">values 0<") == 2
    plain = GPTFields(num_layers=2, model_dim=16, num_heads=1, value_embeddings=0, second_input_embedding=False)
    assert "2 layers; the input embedding mixed in at each." in gpt_paths(GPT(gpt_config(9, plain)))
    assert value_layers(2, 6) == {0: 0, 1: 1, 4: 0, 5: 1}
    assert value_layers(2, 6, untied=True) == {0: 0, 1: 1, 4: 2, 5: 3}


def test_long_trainings_are_looked_at_from_first_to_last(tmp_path):
    for step in range(40):
        (tmp_path / f"step-{step:06d}.safetensors").touch()
    found = [int(p.stem[5:]) for p in along(tmp_path / "step-000003.safetensors")]
    assert found[0] == 0 and found[-1] == 39 and len(found) == MOST_CHECKPOINTS
