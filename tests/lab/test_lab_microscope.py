"""The microscope: maps, lens, pairs and neighbours against their definitions; pages and duels as a user makes them."""

import json
import math
from collections import Counter
from dataclasses import replace
from itertools import pairwise, permutations

import pytest
import torch

import lab.analyses.__main__ as look
from lab import LabError, cli, duel, page, stories, train, vary
from lab.analyses.anatomy import attention_maps, lens
from lab.analyses.attribution import by_layer
from lab.analyses.colours import coloured
from lab.analyses.curves import curve, noise
from lab.analyses.learning import entropy, spelling
from lab.analyses.losses import forgetting
from lab.analyses.menu import MENU, look_at
from lab.analyses.pairs import count_pairs, divergence_of, in_the_plane, learned_pairs, neighbours, pairs
from lab.analyses.quality import quality
from lab.analyses.samples import positions, symbols
from lab.analyses.tasks import grammar, pair_share, ranked_share, sentence_nats
from lab.checkpoints import Checkpoint, best_checkpoint, find_checkpoints, load_checkpoint
from lab.datasets import load_documents, row_batches, tokenize_documents
from lab.models import build_model
from lab.models.initial import different_units, initialise_
from lab.sample import Sample, telling
from lab.texts import texts_of
from lab.tokens import ByteTokenizer, CharTokenizer
from lab.train import TrainConfig, complete, evaluate, rate_factor
from trainer.sample import Cache


def test_attention_maps_are_what_the_model_attends_with(own, monkeypatch):
    """The weights of the maps, applied to the values that the model itself used, are what its attention gave."""
    checkpoint = load_checkpoint(best_checkpoint(own[0]))
    used, truth = [], Cache.attend

    def recording(cache, layer, q, k, v, *how):
        out = truth(cache, layer, q, k, v, *how)
        used.append((v, out))
        return out

    monkeypatch.setattr(Cache, "attend", recording)
    ids = checkpoint.encode_documents(["ab cd", "efg"])
    maps = attention_maps(checkpoint, ids)
    assert [m.layer for m in maps] == [0, 1]
    for one, (v, out) in zip(maps, used):
        by_hand = torch.einsum("hts,shd->thd", one.weights, v[0].float())
        torch.testing.assert_close(by_hand, out[0].float(), atol=1e-5, rtol=1e-4)
        assert torch.equal(one.allowed, one.weights[0] > 0)
        assert not one.allowed[6:, :6].any(), "the second document does not see the first"


def test_the_last_layer_says_what_the_model_says(own):
    checkpoint = load_checkpoint(best_checkpoint(own[0]))
    ids = checkpoint.encode_prompt("abc de")
    said = lens(checkpoint, ids)
    assert [s.layer for s in said] == ["block 0", "block 1", "output"]
    torch.testing.assert_close(said[-2].logits, said[-1].logits)
    assert not torch.allclose(said[0].logits, said[-1].logits)
    counted = Checkpoint(own[1], "counts", 0, build_model("counts", 4), CharTokenizer("abc"), {})
    with pytest.raises(LabError, match="no layers"):
        lens(counted, [0, 1])


def test_pairs_and_neighbours_by_hand(tmp_path):
    words, tokenizer = ["abca", "bb", "cab"], CharTokenizer("abc")
    counts = count_pairs(words, tokenizer)
    by_hand = Counter(pair for w in words for pair in pairwise([0, *tokenizer.encode(w).tolist(), 0]))
    assert {(a, b): counts[a, b] for a in range(4) for b in range(4) if counts[a, b]} == dict(by_hand)
    model = build_model("counts", 4, {"smoothing": 0.0})
    model.counts_VV.copy_(torch.from_numpy(counts))
    checkpoint = Checkpoint(tmp_path, "counts", 1, model, tokenizer, {})
    learned = learned_pairs(checkpoint, [0, 1, 2, 3])
    torch.testing.assert_close(learned.double(), torch.from_numpy(counts / counts.sum(1, keepdims=True)))
    strange = count_pairs(["abxc"], tokenizer)
    assert strange.sum() == 3 and strange[0, 1] == strange[1, 2] == strange[3, 0] == 1, "neither b x nor x c"
    vectors = torch.tensor([[9.0, 9.0], [1.0, 0.0], [2.0, 0.1], [0.0, 3.0]])
    near = neighbours(vectors, [1, 2, 3], count=1)
    assert near[1][0][0] == 2 and near[1][0][1] == pytest.approx(2 / math.hypot(2, 0.1)) and near[3][0][0] == 2
    plane, kept = in_the_plane(torch.tensor([[0.0, 0, 0], [3, 4, 0], [6, 8, 0], [0, 0, 1]]))
    assert kept == pytest.approx(1.0) and torch.dist(plane[0], plane[1]) == pytest.approx(5.0)


@pytest.mark.parametrize(
    "text, low, high", [("uniform:0:1", 0, 1), ("uniform:-4:0", -4, 0), ("uniform:0.1:0.3", 0.1, 0.3)]
)
def test_weights_are_drawn_as_asked(text, low, high):
    for name in ("bigram", "mlp", "batchnorm", "wavenet", "recurrent", "gpt"):
        model = build_model(name, 9)
        initialise_(model, text)
        values = torch.cat([p.detach().float().flatten() for p in model.parameters() if p.ndim >= 2])
        assert (
            low <= values.min() and values.max() <= high and values.mean() == pytest.approx((low + high) / 2, abs=0.3)
        )


def test_equal_weights_stay_equal_and_that_is_counted():
    torch.manual_seed(0)
    idx, targets = torch.randint(0, 9, (2, 4, 16)).unbind(0)
    found = []
    for text in ("", "constant:0.1"):
        model = build_model("mlp", 9, {"hidden_dim": 8})
        initialise_(model, text)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            model(idx, targets)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(different_units(model)["hidden"])
    assert found == [(8, 8), (1, 8)]
    with pytest.raises(LabError, match="it is counted"):
        initialise_(build_model("counts", 4), "constant:1")


def test_a_step_down_of_the_rate_and_the_noise_around_it():
    config = complete(TrainConfig(model="mlp", schedule="step", drop_at=0.5, drop_to=0.1, steps=10))
    assert [rate_factor(s, config) for s in range(10)] == [1.0] * 5 + [0.1] * 5
    losses = [1.0, 2.0] * 25 + [1.0, 1.2] * 25
    told = {"config": {"schedule": "step", "steps": 100, "drop_at": 0.5, "log_every": 1}, "train_loss": losses}
    assert noise(told) == {"before": pytest.approx(0.513, abs=1e-3), "after": pytest.approx(0.1026, abs=1e-4)}
    told["config"]["schedule"] = "linear"
    assert noise(told) is None


def test_grammar_is_judged_by_the_losses_of_whole_sentences(own, tmp_path):
    checkpoint = load_checkpoint(best_checkpoint(own[0]))
    pairs = [("αβ", "zz"), ("xx", "ἡρώων"), ("ab", "ab")]
    losses = [[sentence_nats(checkpoint, s)[0] for s in pair] for pair in pairs]
    wins = sum(1.0 if a < b else 0.5 if a == b else 0.0 for a, b in losses)
    assert pair_share(checkpoint, pairs)["share"] == wins / 3
    path = tmp_path / "blimp.jsonl"
    path.write_text("\n".join(json.dumps({"sentence_good": a, "sentence_bad": b}) for a, b in pairs))
    found = grammar([checkpoint], path, tmp_path).data["table"][0]
    assert found["share"] == wins / 3 and found["low"] < found["share"] < found["high"]
    rows = [("αβ", True), ("zz", False), ("ab", True), ("qq", False)]
    a_token = {s: nats / n for s, _ in rows for nats, n in [sentence_nats(checkpoint, s)]}
    better = sum(a_token[g] < a_token[b] for g in ("αβ", "ab") for b in ("zz", "qq"))
    assert ranked_share(checkpoint, rows, draws=50)["share"] == better / 4
    cola = tmp_path / "cola.tsv"
    cola.write_text("\n".join(f"x\t{int(fine)}\t\t{s}" for s, fine in rows))
    assert cli.run(look.main, [str(own[0]), f"--grammar={cola}", "--only=grammar", f"--out={tmp_path}"]) == 0
    assert json.loads((tmp_path / "grammar.json").read_text())["form"] == "CoLA"


def test_what_is_forgotten_is_watched_for_every_pair(tmp_path):
    checkpoint = Checkpoint(tmp_path, "bigram", 0, build_model("bigram", 256), ByteTokenizer(), {})
    corpora = {n: {"train": [t * 3] * 4, "val": [t * 3]} for n, t in (("a", "abc "), ("b", "xyz "), ("c", "123 "))}
    found = forgetting(dict.fromkeys(corpora, checkpoint), corpora, tmp_path, steps=1, every=1).data["pairs"]
    assert [(p["first"], p["second"]) for p in found] == [(x, y) for x in "abc" for y in "abc" if x != y]
    first = found[0]["points"][0]
    assert first["first"] == pytest.approx(found[1]["points"][0]["first"]), "before training both watch the same"


def test_forgetting_is_told_for_all_six_pairs_of_the_three_corpora(tmp_path):
    """By hand: what the first model loses in the one step of AdamW that is taken on the second corpus."""
    words = f"--model=bigram --limit_chars=3000 --steps=3 --row_tokens=64 --checkpoints=1 --output_dir={tmp_path}/"
    named = {}
    for kind in ("names", "sums", "text"):
        assert cli.run(train.main, f"{words}{kind} --data={kind}".split()) == 0
        named[kind] = load_checkpoint(best_checkpoint(tmp_path / kind))
    flags = [f"{kind}={tmp_path / kind}" for kind in named]
    assert cli.run(look.main, ["forgetting", *flags, "--steps=1", f"--out={tmp_path}"]) == 0
    found = json.loads((tmp_path / "forgetting.json").read_text())["pairs"]
    assert [(p["first"], p["second"]) for p in found] == list(permutations(named, 2))
    first, second = named["names"], texts_of(named["text"]).documents
    tokens = tokenize_documents(second["train"], first.tokenizer, "keep")
    own = tokenize_documents(texts_of(first).documents["val"], first.tokenizer)
    before = evaluate(first.model, own, 64)
    first.model(*next(row_batches(tokens, 64, 2048 // 64, 0)))[1].backward()
    with torch.no_grad():
        for p in first.model.parameters():
            p -= 1e-3 * p.grad / (p.grad.abs() + 1e-8)  # AdamW's first step: both moments are the gradient's own
    points = next(p["points"] for p in found if (p["first"], p["second"]) == ("names", "text"))
    assert [p["first"] for p in points] == pytest.approx([before, evaluate(first.model, own, 64)], abs=1e-5)
    assert points[0]["first"] != pytest.approx(points[1]["first"], abs=1e-5)


def test_what_is_all_unknown_is_not_drawn_as_learned(tmp_path, monkeypatch):
    """Only its ends were scored, which are soon known: a curve down to 0, as of a corpus learned to perfection."""
    drawn = []
    monkeypatch.setitem(forgetting.__globals__, "write_finding", lambda *found: drawn.append(found[-1]))
    letters = {"a": "ab", "z": "yz", "mixed": "byz"}
    models = {
        n: Checkpoint(tmp_path, n, 0, build_model("bigram", 3), CharTokenizer(t[:2]), {}) for n, t in letters.items()
    }
    forgetting(models, {n: {"train": [t] * 9, "val": [t] * 3} for n, t in letters.items()}, tmp_path, steps=1, every=1)
    panels = {ax.get_title(loc="left"): len(ax.lines) for ax in drawn[0].axes}
    assert panels["a, then z, all unknown"] == 1 and panels["a, then mixed"] == panels["z, then mixed"] == 2


def test_a_checkpoint_that_ends_at_once_is_shown_by_its_next_text(own, tmp_path):
    empty, full = Sample("", "", [], True), Sample("", "ab", [1, 2], False)
    assert telling([empty, full, empty]) is full and telling([empty, empty]) is empty


def test_a_curve_says_whose_the_line_below_is(tmp_path):
    """A model may have less loss than the grammar, by luck or on text that it learns by heart."""
    words = f"--model=bigram --data=names --limit_chars=3000 --steps=2 --output_dir={tmp_path / 'b'}"
    assert cli.run(train.main, words.split()) == 0
    assert "; the grammar itself has " in curve(tmp_path / "b", tmp_path).summary


def test_story_models_are_swept_over_layers_and_width(tmp_path):
    path = tmp_path / "stories.txt"
    story = "Once upon a time a {} cat sat on the {} mat. " + "It was happy, and it sang and slept. " * 3 + "The end."
    told = (story.format(a, b) for a in ("red", "big", "old", "sad") for b in ("red", "big", "old", "sad"))
    path.write_text("\n<|endoftext|>\n".join(told))
    words = f"sweep --path={path} --layers=1,2 --widths=16,32 --steps=2 --row_tokens=64 --batch_tokens=64"
    assert cli.run(stories.main, [*words.split(), f"--output_dir={tmp_path / 'o'}", "--checkpoints=1"]) == 0
    found = json.loads((tmp_path / "o/vary.json").read_text())["table"]
    assert [(row["num_layers"], row["model_dim"]) for row in found] == [(a, b) for a in "12" for b in ("16", "32")]
    config = json.loads(next((tmp_path / "o").glob("*/runs/*.json")).read_text())["config"]
    assert (config["data"], config["tokens"]) == ("stories", "word"), "a story model's own"
    vocabulary = load_checkpoint(next((tmp_path / "o").glob("*/runs/*/best.safetensors"))).tokenizer.vocab_size
    for row in found:
        fields = {"num_layers": int(row["num_layers"]), "model_dim": int(row["model_dim"]), "num_heads": 4}
        same = build_model("gpt", vocabulary, fields | {"second_input_embedding": False, "value_embeddings": 0})
        assert row["parameters"] == same.num_parameters()


def test_one_page_holds_everything(own, tmp_path, capsys):
    path = tmp_path / "page.html"
    words = [str(own[0]), f"--out={path}", "--limit=200", "--only=samples,coloured,attention,logit_lens,scalars"]
    assert cli.run(page.main, words) == 0
    text = path.read_text(encoding="utf-8")
    for name in ("curve", "samples", "coloured", "attention", "logit_lens", "scalars"):
        assert f'<h2 id="{name}">' in text
    assert text.count("data:image/png;base64,") == 4 and "What could not be shown" not in text
    assert "<span tabindex=0" in text and "http" not in text.replace("http-equiv", ""), "nothing is fetched"
    assert "reading" not in text and "step 6" in text
    assert cli.run(page.main, [str(own[0]), f"--out={path}", "--only=atention"]) == 2
    assert "there are curve, frequency" in capsys.readouterr().err


def test_what_is_text_stands_on_the_page_as_text(own, tmp_path):
    """In any alphabet, with what else was expected on hover: a picture has neither."""
    words = [str(own[0]), f"--out={tmp_path}", "--only=coloured,samples,inside", "--prompt=μῆ"]
    assert cli.run(look.main, words) == 0
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert text.count("<span tabindex=0") == len("μῆ".encode()) and "&lt;CE&gt;" in text
    assert "<td>0<td>μῆ" in text and text.count("<img") == 1
    data = json.loads((tmp_path / "inside.json").read_text(encoding="utf-8"))
    along = find_checkpoints(own[0])
    assert [row["step"] for row in data["samples"]] == [load_checkpoint(path).step for path in along]


def test_every_analysis_of_the_menu_says_whether_it_fits(own, tmp_path, capsys):
    words = f"--model=counts --data=names --limit_chars=3000 --output_dir={tmp_path / 'c'}"
    assert cli.run(train.main, words.split()) == 0
    assert cli.run(look.main, [str(tmp_path / "c"), f"--out={tmp_path}", "--only=attention"]) == 2
    assert "--only=attention: does not fit this model" in capsys.readouterr().err
    assert cli.run(look.main, ["list"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in MENU)


def test_a_duel_has_curves_samples_and_the_verdict_of_stats(tmp_path, capsys):
    for name, more in (("a", ""), ("b", "--learning_rate=0.05")):
        words = f"--model=mlp --hidden_dim=8 --data=names --limit_chars=4000 --steps=6 --output_dir={tmp_path / name}"
        assert cli.run(train.main, [*words.split(), "--seeds=0-2", *more.split()]) == 0
    sides = [str(tmp_path / name) for name in "ab"]
    assert cli.run(duel.main, [*sides, f"--out={tmp_path / 'duel'}"]) == 0
    told = json.loads((tmp_path / "duel/duel.json").read_text())
    a, b = (side["losses"] for side in told["sides"])
    assert len(a) == len(b) == 3
    assert told["verdict"]["estimate"] == pytest.approx(sum(b) / 3 - sum(a) / 3, abs=1e-5)
    assert told["verdict"]["high"] < 0 and "b is better" in told["summary"]


def test_one_field_varies_over_seeds_and_two_make_a_map(tmp_path, capsys):
    words = "--model=mlp --hidden_dim=8 --data=names --limit_chars=3000 --steps=4 --row_tokens=64 --batch_tokens=64"
    more = f"--field=initial --values=uniform:-2:2,constant:0.1 --seeds=0-1 --output_dir={tmp_path / 'v'}"
    assert cli.run(vary.main, f"{words} {more}".split()) == 0
    found = json.loads((tmp_path / "v/vary.json").read_text())["table"]
    assert [row["initial"] for row in found] == ["uniform:-2:2", "constant:0.1"]
    assert [row["different_units"] for row in found] == [{"hidden": "8 of 8"}, {"hidden": "1 of 8"}]
    for row in found:
        assert len(row["losses"]) == 2 and row["mean"] == pytest.approx(sum(row["losses"]) / 2)
    more = f"--field=hidden_dim,context --values=2,4/1,2 --output_dir={tmp_path / 'w'}"
    assert cli.run(vary.main, f"{words} {more}".split()) == 0
    assert len(json.loads((tmp_path / "w/vary.json").read_text())["table"]) == 4
    capsys.readouterr()
    for bad in ("--field=hidden_dim --values=4,zero", "--field=a,b --values=1", "--field=hidden_dims --values=4"):
        assert cli.run(vary.main, [*words.split(), *bad.split(), f"--output_dir={tmp_path / 'x'}"]) == 2
    assert not (tmp_path / "x").exists(), "all values are read before the first training"


# ---- along training, each against a truth of its own -------------------------------------------------------


def _writers(tmp_path, *favourites):
    """Checkpoints of step 0, 1, ... over a, b and space that write these texts again and again, for certain."""
    tokenizer, made = CharTokenizer("ab "), []
    for step, text in enumerate(favourites):
        model = build_model("bigram", tokenizer.vocab_size)
        with torch.no_grad():
            model.table.weight.zero_()
            ring = [0, *tokenizer.encode(text).tolist(), 0]
            for a, b in pairwise(ring):
                model.table.weight[a, b] = 60.0
        made.append(Checkpoint(tmp_path, "bigram", step, model.eval(), tokenizer, {"row_tokens": 64}))
    return made


def test_spelling_is_the_share_of_known_words(tmp_path):
    """One checkpoint writes a word of the training text, one writes none, one half and half."""
    along = _writers(tmp_path, "b", "ab", "ab ")
    found = spelling(along, ["ab", "ab ab"], tmp_path, count=3).data["table"]
    assert [row["known_share"] for row in found] == [0.0, 1.0, 1.0]
    assert [set(row["examples"]) for row in found] == [{"b"}, {"ab"}, {"ab"}]
    copies = spelling(along, ["ab", "a"], tmp_path, count=3, names=True).data["table"]
    assert [row["known_share"] for row in copies] == [0.0, 1.0, 0.0], "'ab ' is no name of the text"


def test_symbols_are_counted_in_what_was_written_and_read(tmp_path):
    (writer,) = _writers(tmp_path, "ab")
    found = symbols(writer, ["aab", "b a"], tmp_path, count=5).data
    assert {row["symbol"]: (row["corpus"], row["written"]) for row in found["table"]} == {
        "a": (3, 5),
        "b": (2, 5),
        " ": (1, 0),
    }
    by_hand = 0.5 * (abs(3 / 6 - 1 / 2) + abs(2 / 6 - 1 / 2) + 1 / 6)
    assert found["total_variation"] == pytest.approx(by_hand)
    long = symbols(writer, ["a" * 200 + "b" * 50], tmp_path, count=1).data["table"]
    assert {row["symbol"]: row["corpus"] for row in long} == {"a": 200, "b": 0}, "as far as samples are written"


def test_entropy_along_training_is_the_mean_over_every_place(own, tmp_path):
    """Each place from the model given nothing but the tokens before it, in plain Python."""
    along = [load_checkpoint(path) for path in find_checkpoints(own[0])]
    texts = ["ab c", "αβ"]
    found = entropy(along, texts, tmp_path).data["table"]
    for checkpoint, row in zip(along, found):
        entropies, losses = [], []
        for text in texts:
            read = [0]
            for target in [*text.encode(), 0]:
                with torch.no_grad():
                    logits = checkpoint.model.logits(torch.tensor([read]))[0, -1].tolist()
                total = sum(map(math.exp, logits))
                p = [math.exp(x) / total for x in logits]
                entropies.append(-sum(x * math.log(x) for x in p))
                losses.append(-math.log(p[target]))
                read.append(target)
        assert row["step"] == checkpoint.step
        assert row["entropy_nats"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
        assert row["loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_attribution_by_layer_is_the_slope_along_what_a_layer_adds(own):
    """By differences: the logit where what a layer adds to the stream at one place is scaled a little."""
    checkpoint = load_checkpoint(best_checkpoint(own[0]))
    gpt, ids, target, h = checkpoint.model.gpt, checkpoint.encode_prompt("abc"), ord("d"), 0.02
    with torch.no_grad():
        gpt.head_w.normal_(generator=torch.Generator().manual_seed(1))  # six steps have hardly moved it from zero
    found = by_layer(checkpoint, ids, target)
    assert list(found) == ["block 0", "block 1"]

    @torch.no_grad()
    def logit(layer, place, factor):
        def scale(module, inputs, output):
            factors = torch.ones(output.shape[1], 1)
            factors[place] = factor
            return inputs[0] + (output - inputs[0]) * factors

        hook = gpt.blocks[layer].register_forward_hook(scale)
        try:
            return float(gpt(torch.tensor([ids]))[0, -1, target])
        finally:
            hook.remove()

    for layer, row in enumerate(found.values()):
        slopes = [(logit(layer, t, 1 + h) - logit(layer, t, 1 - h)) / (2 * h) for t in range(len(ids))]
        assert row == pytest.approx(slopes, abs=2e-3, rel=0.02)
    assert abs(found["block 1"][-1]) > 0.02 and found["block 1"][:-1] == [0.0] * 3, "nobody reads its other places"


def test_positions_tell_what_was_expected_and_what_was_drawn(tmp_path):
    (writer,) = _writers(tmp_path, "ab")
    found = positions(writer, "a", tmp_path, count=4).data["table"]
    assert [row["drawn"] for row in found] == ["b", "<mark>"]
    assert all(row["p"] == pytest.approx(1.0) and row["entropy_nats"] == pytest.approx(0, abs=1e-6) for row in found)
    assert [row["top"][0][0] for row in found] == ["b", "<mark>"]


def test_two_tokens_that_look_alike_are_told_apart_place_by_place(tmp_path):
    """By id: a picture and a page that compare what is printed would take one byte for another."""
    tokenizer = ByteTokenizer()
    model = build_model("bigram", 256)
    with torch.no_grad():
        model.table.weight.zero_()
        model.table.weight[ord("a"), 0xCE] = model.table.weight[0xCE, 0xB1] = 40.0
    writer = Checkpoint(tmp_path, "bigram", 0, model.eval(), tokenizer, {})
    found = positions(writer, "a", tmp_path, count=2).data["table"]
    assert [row["drawn_id"] for row in found] == [0xCE, 0xB1]
    assert [row["top"][0] for row in found] == [["<CE>", pytest.approx(1.0), 0xCE], ["<B1>", pytest.approx(1.0), 0xB1]]


def test_a_model_that_looks_back_one_letter_writes_whole_names_for_its_symbols(tmp_path):
    """It was cut after four times its context, so that the ends of names were never counted."""
    (writer,) = _writers(tmp_path, "aab")  # after an a another one or the b, as a coin falls
    found = symbols(writer, ["ab"], tmp_path, count=30).data["table"]
    assert {row["symbol"]: row["written"] for row in found}["b"] == 30, "every text ends with its only b"


def test_pairs_are_held_against_the_counts_of_every_token(tmp_path, monkeypatch):
    """Not of the commonest alone, whose cells are drawn; by hand, token by token."""
    monkeypatch.setitem(count_pairs.__globals__, "ROWS_AT_ONCE", 2)
    documents, tokenizer = ["abca", "bb", "cabd"], CharTokenizer("abcd")
    torch.manual_seed(0)
    model = build_model("bigram", 5)
    with torch.no_grad():
        model.table.weight.normal_()
    checkpoint = Checkpoint(tmp_path, "bigram", 1, model.eval(), tokenizer, {})
    followed = [pair for d in documents for pair in pairwise([0, *tokenizer.encode(d).tolist(), 0])]
    logp = model.table.weight.detach().log_softmax(1)
    counts, firsts = Counter(followed), Counter(a for a, _ in followed)
    by_hand = sum(n * (math.log(n / firsts[a]) - float(logp[a, b])) for (a, b), n in counts.items()) / len(followed)
    assert divergence_of(checkpoint, count_pairs(documents, tokenizer)) == pytest.approx(by_hand, abs=1e-5)


def test_names_are_not_judged_by_neighbouring_words(tmp_path):
    """They have none, and all of them, real ones too, were said to have a grammaticality of 0."""
    (writer,) = _writers(tmp_path, "ab")
    name = quality(writer, ["ab", "aab"], ["ab"], tmp_path, count=2)
    assert "grammaticality" not in name.data["means"]["held out"] and "grammaticality" not in name.summary
    two = quality(writer, ["ab", "ab b"], ["ab b"], tmp_path, count=2)
    assert two.data["means"]["held out"]["grammaticality"] > 0 and "grammaticality 0.00, repetition" in two.summary


def test_counts_are_no_less_than_nothing_away_from_themselves(tmp_path):
    """The model rounds to 32 bits, so that the mean over all pairs came out as -0.0000."""
    documents, tokenizer = load_documents("names", limit_chars=2000), CharTokenizer(map(chr, range(32, 127)))
    model, counts = build_model("counts", tokenizer.vocab_size, {"smoothing": 0.0}), count_pairs(documents, tokenizer)
    model.counts_VV.copy_(torch.from_numpy(counts))
    checkpoint = Checkpoint(tmp_path, "counts", 1, model, tokenizer, {})
    assert 0.0 <= divergence_of(checkpoint, counts) < 1e-6
    assert "lies 0.0000 nats" in pairs(checkpoint, documents, tmp_path).summary


def test_a_page_draws_no_picture_of_what_it_shows_as_text(own, tmp_path):
    look = page.look_of([str(own[0])], page.Keeping(), tmp_path)
    for name in ("coloured", "samples"):
        assert look_at(look, name).png_path is None and not (tmp_path / f"{name}.png").exists()
        assert look_at(replace(look, pictures=True), name).png_path == tmp_path / f"{name}.png"


def test_limits_that_change_a_result_are_told_with_it(own, tmp_path):
    words = [str(own[0]), f"--out={tmp_path}", "--only=losses"]
    sizes = {k: sum(map(len, d)) for k, d in texts_of(load_checkpoint(best_checkpoint(own[0]))).documents.items()}
    for limit, told in ((7, "its first 7 characters"), (0, f"all its {sizes['val']} characters")):
        assert cli.run(look.main, [*words, f"--limit={limit}"]) == 0
        assert told in json.loads((tmp_path / "losses.json").read_text())["summary"]
    checkpoint = load_checkpoint(best_checkpoint(own[0]))
    monkey = pytest.MonkeyPatch()
    monkey.setattr("lab.analyses.colours.MOST_TOKENS", 5)
    try:
        found = coloured([checkpoint], "abcdefgh", tmp_path)
    finally:
        monkey.undo()
    assert len(found.data["tokens"]) == 5 and "the 3 tokens after them are left out" in found.summary


@pytest.mark.parametrize(
    "words, told",
    [
        ("domains a=RUN --path=x", "--path has no part in domains, which reads --out, --limit, --vocab"),
        ("forgetting a=RUN b=RUN --only=losses", "--only has no part in forgetting"),
        ("RUN --path=x --other=y", "give one of them"),
        ("RUN --data=names", "--data says how --other or --fewshot_path is read"),
        ("RUN --only=losses --target=a", "--target is read by attribution, which --only=losses leaves out"),
        ("RUN --only=losses --grammar=x", "--grammar is read by grammar"),
        ("RUN RUN --only=losses", "a second run is read by coloured alone"),
    ],
)
def test_options_that_nothing_would_read_are_refused(own, words, told, tmp_path, capsys):
    assert cli.run(look.main, [*words.replace("RUN", str(own[0])).split(), f"--out={tmp_path}"]) == 2
    assert told in capsys.readouterr().err


def test_a_duel_over_two_alphabets_has_samples_of_each_and_no_verdict(tmp_path, capsys):
    words = "--model=bigram --data=names --steps=2 --row_tokens=16 --batch_tokens=16 --checkpoints=1"
    for name, letters in (("greek", "αβγ"), ("latin", "abc")):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n".join(a + b for a in letters for b in letters), encoding="utf-8")
        assert cli.run(train.main, f"{words} --path={path} --output_dir={tmp_path / name}".split()) == 0
    sides = [str(tmp_path / name) for name in ("greek", "latin")]
    assert cli.run(duel.main, [*sides, f"--out={tmp_path / 'd'}"]) == 0
    assert "No verdict" in capsys.readouterr().out
    assert cli.run(duel.main, [*sides, "--prompt=α", f"--out={tmp_path / 'd'}"]) == 2, "asked for, and not to be read"
    assert "vocabulary lacks" in capsys.readouterr().err


def test_losses_of_other_texts_are_not_compared(tmp_path, capsys):
    words = "--model=bigram --data=names --steps=2 --row_tokens=64 --batch_tokens=64 --checkpoints=1 --limit_chars="
    for name, size in (("a", 3000), ("b", 4000)):
        for seed in (0, 1):
            assert cli.run(train.main, [*f"{words}{size} --seed={seed} --output_dir={tmp_path / name}".split()]) == 0
    assert cli.run(duel.main, [str(tmp_path / "a"), str(tmp_path / "b"), f"--out={tmp_path / 'd'}"]) == 0
    told = json.loads((tmp_path / "d/duel.json").read_text())
    assert told["verdict"]["estimate"] is None and "validated on different texts" in told["summary"]
    vary_words = f"{words}3000 --field=tokens --values=char,byte --output_dir={tmp_path / 'v'}"
    assert cli.run(vary.main, vary_words.split()) == 0
    assert "of which none is the best" in json.loads((tmp_path / "v/vary.json").read_text())["summary"]
    capsys.readouterr()
