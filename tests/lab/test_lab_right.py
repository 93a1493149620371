"""Right to the last character: each answer of the lab against a truth worked out another way, entering where a user
enters, and each refusal in words."""

import json
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lab.analyses.__main__ as look
from data.corpus import grammar, log_prob
from data.grammar import Choice
from lab import LabError, cli, sample, stories, sweep, tour, train, vary
from lab.analyses.anatomy import attention, logit_lens
from lab.analyses.attribution import (
    EmbeddedModel,
    attribute,
    attribution,
    attribution_layers,
    captum_integrated_gradients,
)
from lab.analyses.colours import as_html, read_tokens
from lab.analyses.learning import spelling
from lab.analyses.losses import fewshot, fine_tune, next_token
from lab.analyses.quality import assess
from lab.analyses.samples import cosine, positions, profile
from lab.analyses.scoring import score, token_logits
from lab.analyses.tasks import (
    hellaswag,
    lambada,
    read_cola,
    read_hellaswag,
    read_lambada,
    read_pairs,
    sentence_nats,
    wilson,
)
from lab.checkpoints import Checkpoint, best_checkpoint, find_checkpoints, load_checkpoint
from lab.cleaning import clean_stories, kept_by_share, raw_stories
from lab.datasets import load_corpus, load_documents, overlap, split_documents
from lab.embedded import floor_on
from lab.models import IGNORE, build_model
from lab.texts import starting_prompt, texts_of
from lab.tokens import ByteTokenizer, CharTokenizer, WordTokenizer, word_tokenizer
from lab.train import evaluate
from lab.words import split_words
from trainer.files import checkpoints_of


def test_a_run_is_looked_at_on_its_own_text_and_on_no_other(own, tmp_path, capsys):
    run, path = own
    assert cli.run(look.main, [str(run), f"--out={tmp_path}", "--only=frequency"]) == 0
    found = json.loads((tmp_path / "frequency.json").read_text())
    names = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    assert found["characters"]["total"] == sum(map(len, names)), "the text it was trained on, found without being told"
    other = tmp_path / "other.txt"
    other.write_text("abc\nbcd\ncde\n" * 9)
    assert cli.run(look.main, [str(run), f"--out={tmp_path}", "--only=losses", f"--path={other}"]) == 2
    assert "is not the text of" in capsys.readouterr().err
    assert cli.run(look.main, [str(run), f"--out={tmp_path}", "--only=losses", f"--other={other}"]) == 0
    assert "another text than the model's own: other.txt" in json.loads((tmp_path / "losses.json").read_text())["text"]
    moved = path.rename(tmp_path / "moved.txt")
    try:
        words = [str(run), f"--out={tmp_path}", "--only=losses"]
        assert cli.run(look.main, words) == 2 and "it was trained on" in capsys.readouterr().err
        assert cli.run(look.main, [*words, f"--path={moved}"]) == 0
        assert cli.run(look.main, ["domains", f"a={run}", f"--out={tmp_path}"]) == 2, "as in every other analysis"
        assert cli.run(look.main, ["domains", f"a={run}:{moved}", f"--out={tmp_path}"]) == 0
    finally:
        moved.rename(path)


def test_tokens_that_look_alike_are_counted_apart(own, tmp_path):
    run, path = own
    assert cli.run(look.main, [str(run), f"--out={tmp_path}", "--only=frequency"]) == 0
    found = json.loads((tmp_path / "frequency.json").read_text())["tokens"]
    by_hand = Counter(path.read_bytes())
    del by_hand[ord("\n")]  # the documents are lines
    assert found["distinct"] == len(by_hand) and {row["id"]: row["count"] for row in found["top"]} == by_hand
    assert {"<CE>", "<CF>"} <= {row["piece"] for row in found["top"]}
    assert ByteTokenizer().piece(0xCE) == "<CE>" and ByteTokenizer().piece(0x41) == "A"
    checkpoint = load_checkpoint(best_checkpoint(run))
    found = attribute(checkpoint, "μῆν")
    with torch.no_grad():
        logits = checkpoint.model.logits(torch.tensor([checkpoint.encode_prompt("μῆν")]))[0, -1]
    assert found.target_id == int(logits.argmax())
    pytest.importorskip("captum")
    opened = EmbeddedModel(checkpoint, checkpoint.encode_prompt("μῆν"))
    theirs, _ = opened.by_token(captum_integrated_gradients(opened, found.target_id))
    assert max(abs(a - b) for a, b in zip(theirs, found.integrated)) < 1e-3


def test_novelty_is_against_every_training_text(own):
    checkpoint = load_checkpoint(best_checkpoint(own[0]))
    rng = np.random.default_rng(0)
    known = ["".join(rng.choice(list("abcdefgh"), 12)) for _ in range(2300)]
    known[2250] = "the cat sat on the mat"  # beyond the first two thousand
    (row,) = assess(["the cat sat on a mat"], known, checkpoint)
    by_hand = [1 - cosine(profile("the cat sat on a mat"), profile(k)) for k in known]
    assert row["novelty_distance"] == pytest.approx(min(by_hand)) and row["nearest"] == known[2250]
    assert row["longest_shared_run"] == len("the cat sat on ")


def test_counts_without_smoothing_keep_the_counts_and_write_proper_json(tmp_path):
    words = "--model=counts --smoothing=0 --data=names --limit_chars=3000 --overwrite"
    assert cli.run(train.main, [*words.split(), f"--output_dir={tmp_path}"]) == 0

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    told = json.loads((tmp_path / "runs/seed-000.json").read_text(), parse_constant=refuse)
    assert told["kept_by"] == "last" and told["best"]["step"] == 1 and told["final_loss"] is None
    kept = load_checkpoint(best_checkpoint(tmp_path))
    assert kept.step == 1 and float(kept.model.counts_VV.sum()) > 1000


def test_the_share_of_a_split_that_stands_in_training_is_told(tmp_path):
    names = ["ann", "bob", "cid", "dan", "eve"] * 8 + ["zoe", "yan"]
    split = split_documents(names)
    for part in ("val", "test"):
        by_hand = sum(1 for name in split[part] if name in split["train"]) / len(split[part])
        assert overlap(split)[part] == by_hand > 0
    path = tmp_path / "names.txt"
    path.write_text("\n".join(names))
    words = f"--model=bigram --steps=2 --path={path} --output_dir={tmp_path / 'o'} --row_tokens=8"
    assert cli.run(train.main, words.split()) == 0
    told = json.loads((tmp_path / "o/runs/seed-000.json").read_text())
    assert told["overlap"] == overlap(split)
    share = f"documents that stand in train too: {overlap(split)['val']:.1%} of val"
    assert share in (tmp_path / "o/runs/seed-000.txt").read_text()
    apart = split_documents(names, kind="unique")
    assert sorted(name for part in apart.values() for name in part) == sorted(names)
    assert not set(apart["val"]) & set(apart["train"]) and overlap(apart) == {"val": 0.0, "test": 0.0}
    more = "--split=unique --split_seed=3"
    assert cli.run(train.main, [*words.split(), *more.split(), "--overwrite"]) == 0
    read = texts_of(load_checkpoint(best_checkpoint(tmp_path / "o"))).documents
    assert read == split_documents(names, 3, kind="unique") != split_documents(names, kind="unique")


@pytest.mark.parametrize("name", ["batchnorm", "wavenet"])
def test_padding_does_not_move_a_batch_norm(name):
    results = []
    for padding in (0, 7):
        torch.manual_seed(0)
        model = build_model(name, 9, {"hidden_dim": 8}).train()
        idx = torch.tensor([[0, 3, 4, 5, 0, 6, 7, 8]])
        targets = torch.tensor([[3, 4, 5, 0, 6, 7, 8, 0]])
        pad = torch.zeros(1, padding, dtype=torch.long)
        loss = model(torch.cat([idx, pad], 1), torch.cat([targets, pad + IGNORE], 1))[1]
        loss.backward()
        grads = [p.grad for p in model.parameters()]
        results.append((loss, *grads, *(b for _, b in model.named_buffers())))
    for plain, padded in zip(*results):
        torch.testing.assert_close(plain, padded)


def test_diagnostics_end_where_the_units_and_the_run_do(tmp_path):
    words = "--model=batchnorm --data=names --limit_chars=3000 --steps=8 --hidden_dim=16 --diagnostics --init=normal"
    assert cli.run(train.main, [*words.split(), "--row_tokens=64", f"--output_dir={tmp_path}"]) == 0
    told = json.loads((tmp_path / "diagnostics/seed-000.json").read_text())
    assert told["moments"][-1]["step"] == 8 and [r["step"] for r in told["ratios"]] == list(range(8))
    for moment in told["moments"]:
        layer = moment["layers"]["tanh 1"]["activation"]
        assert -1 <= layer["low"] < layer["high"] <= 1
        width = (layer["high"] - layer["low"]) / len(layer["density"])
        assert 0.9 < width * sum(layer["density"]) < 1.01
    assert set(told["moments"][0]["norms"]["layers.1"]) == {"gain_mean", "gain_std", "bias_mean", "bias_std"}


@pytest.mark.parametrize(
    "words, told",
    [
        ("--context=-1", "--context=-1: at least 1"),
        ("--hidden_dim=0", "--hidden_dim=0: at least 1"),
        ("--model=batchnorm --num_layers=0", "at least 1"),
        ("--model=recurrent --dropout=1.5", "at least 0 and below 1"),
        ("--model=wavenet --embedding_dim=-2", "at least 1"),
        ("--model=counts --smoothing=-1", "at least 0"),
        ("--model=gpt --head_lr=-1", "at least 0"),
        ("--model=gpt --model_dim=0", "at least 4"),
        ("--checkpoints=10001", "--checkpoints=10001: at least 1 and at most 10000\n"),
        ("--seed=-1", "--seed=-1: at least 0"),
        ("--learning_rate=-0.1", "at least 0"),
        ("--weight_decay=-1", "at least 0"),
        ("--val_tokens=-5", "at least 0"),
        ("--limit_chars=-5", "at least 0"),
        ("--limit_chars=999999999", "at most 100,000,000 characters"),
        ("--checkpoints=0", "at least 1"),
        ("--row_tokens=1", "at least 2"),
        ("--warmup_frac=1", "below 1"),
        ("--threads=-1", "at least 0"),
        ("--initial=uniform:1:0", "LOW below HIGH"),
        ("--initial=constant", "uniform:LOW:HIGH"),
        ("--initial=normal:1e38 --output_dir=OUT", "the initial weights are too large"),
        ("--model=gpt --learning_rate=0.1", "--learning_rate=0.1 has no part in a training with --model=gpt"),
        ("--model=gpt --cooldown_frac=0.5", "--muon_lr"),
        ("--model=counts --steps=5", "one pass over the corpus"),
        ("--drop_to=0.5", "--schedule=linear"),
        ("--schedule=step --warmup_frac=0.1", "--schedule=step"),
        ("--muon_lr=1", "--muon_lr belongs to gpt, not to mlp, which has --context, --embedding_dim"),
        ("--model=recurrent --sell=lstm", "did you mean --cell?; recurrent has --cell, --embedding_dim"),
        ("--model=bigram --context=3", "not to bigram, which has no settings of its own"),
        ("--seeds=5-2", "goes down"),
        ("--seeds=0,0", "named twice"),
        ("--seeds=0-99999999999", "at most 10,000 seeds"),
        ("--seeds=0-", "write 0-4 or 0,3,7"),
        ("--seeds=a", "write 0-4 or 0,3,7"),
        ("--seeds=0-1 --seed=3", "give one of them"),
        ("stray", "'stray' is not a --field=value"),
        ("--steps=nan", "expected int"),
        ("--learning_rate=inf", "a finite number"),
    ],
)
def test_settings_that_make_no_sense_are_refused_in_words(words, told, capsys, tmp_path):
    words = words.replace("OUT", str(tmp_path))
    assert cli.run(train.main, [*words.split(), "--limit_chars=3000"] if "limit" not in words else words.split()) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, told",
    [
        ("--model=gpt --model_dim=2048 --num_layers=4", "parameters with these settings: training takes 3 GiB"),
        ("--model=mlp --hidden_dim=65536 --context=1024", "and this machine has 2. Lower its width or layers"),
        ("--model=mlp --batch_tokens=16777216", "--batch_tokens=16777216: a step takes more than 37 GiB"),
    ],
)
def test_what_this_machine_cannot_hold_is_refused_before_it_is_tried(words, told, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("lab.memory.machine_bytes", lambda: 2 << 30)
    assert cli.run(train.main, [*words.split(), "--limit_chars=3000", f"--output_dir={tmp_path}"]) == 2
    assert told in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "main, words, told",
    [
        (look.main, "nowhere --promt=a", "did you mean --prompt"),
        (look.main, "a b c", "not 3"),
        (look.main, "domains justarun", "write name=RUN"),
        (look.main, "domains a=nowhere", "no checkpoint at nowhere"),
        (look.main, "domain a=nowhere", "did you mean the command domains?"),
        (look.main, "lst", "did you mean the command list?"),
        (tour.main, "--processes=-1", "--processes=-1: at least 0"),
        (stories.main, "judge gpt=x --pth=a", "did you mean --path"),
        (stories.main, "judge run", "write name=RUN"),
        (stories.main, "clean a b", "1 words are needed"),
        (stories.main, "polish", "there are clean, train, sweep, judge"),
        (stories.main, "train --model=mlp", "one of gpt, recurrent"),
        (sample.main, "x --cuont=2", "did you mean --count"),
        (sample.main, "x --top_p=0", "above 0"),
        (tour.main, "--scale=0", "--scale=0.0: above 0"),
        (sweep.main, "--model=mlp --seeds=0-2", "--seeds has no part in a sweep"),
        (sweep.main, "--model=mlp --learning_rate=1", "--learning_rate has no part in a sweep"),
        (sweep.main, "--model=counts", "--model=counts counts and has no learning rate to sweep"),
        (vary.main, "--field=output_dir --values=a,b", "--field=output_dir: says where and how runs go"),
    ],
)
def test_unknown_words_are_refused_by_every_command(main, words, told, capsys):
    code = cli.run(main, words.split())
    assert code == 2 and told in capsys.readouterr().err


def test_what_is_kept_is_chosen_and_told(tmp_path, capsys):
    """Learning one batch by heart: validation only gets worse, and the last checkpoint is what one wants to see."""
    words = (
        "--model=mlp --data=names --limit_chars=3000 --steps=60 --repeat_batches=1 --batch_tokens=64 --row_tokens=64"
    )
    more = f"--learning_rate=0.05 --keep=last --checkpoints=2 --output_dir={tmp_path}"
    assert cli.run(train.main, f"{words} {more}".split()) == 0
    assert "kept: step 60, the last one" in capsys.readouterr().out
    told = json.loads((tmp_path / "runs/seed-000.json").read_text())
    assert told["kept_by"] == "last" and told["best"]["step"] == 60
    assert told["best"]["loss"] > min(v["loss"] for v in told["validation"])
    assert told["train_loss"][-1] < 0.6 < told["train_loss"][0]
    assert told["floor"] == pytest.approx(load_corpus("names", limit_chars=3000).floor), "one floor for all who draw it"
    assert cli.run(sample.main, [str(tmp_path), "--max_tokens=3"]) == 0
    assert "step 60" in capsys.readouterr().err


def test_every_validation_of_a_run_reads_the_same_text(tmp_path):
    words = "--model=bigram --data=names --limit_chars=20000 --steps=4 --val_tokens=256 --row_tokens=64 --keep=last"
    assert cli.run(train.main, [*words.split(), f"--output_dir={tmp_path}"]) == 0
    told = json.loads((tmp_path / "runs/seed-000.json").read_text())
    corpus, kept = load_corpus("names", limit_chars=20_000), load_checkpoint(best_checkpoint(tmp_path))
    part, whole = (evaluate(kept.model, corpus.tokens["val"], 64, limit) for limit in (256, 0))
    assert told["final_loss"] == pytest.approx(part, abs=1e-6) != pytest.approx(whole, abs=1e-4)
    assert told["best"]["loss"] == pytest.approx(whole, abs=1e-6), "the kept one is scored on all of it"


def test_no_text_is_written_or_read_from_more_than_the_model_was_trained_on(own, tmp_path):
    checkpoint = load_checkpoint(best_checkpoint(own[0]))
    assert checkpoint.context == 32
    seen = []

    def look_at(module, inputs, more, output):
        cache = more.get("cache")
        seen.append(inputs[0].shape[1] if cache is None else cache.length)

    checkpoint.model.gpt.register_forward_hook(look_at, with_kwargs=True)
    sample.generate(checkpoint, "a" * 20, max_tokens=40, seed=1)
    sample.generate(checkpoint, "a" * 40, max_tokens=5, seed=1)
    assert max(seen) == 32 and len(seen) > 30
    seen.clear()
    read_tokens(checkpoint, "a" * 100)
    assert max(seen) == 32
    seen.clear()
    found = [one(checkpoint, "a" * 100, tmp_path) for one in (attribution, attribution_layers, positions)]
    found.append(next_token([checkpoint], "a" * 100, tmp_path))
    for one in (attention, logit_lens):
        one(checkpoint, "a" * 100, tmp_path)
    assert max(seen) == 32
    assert sum("Its first 69 tokens are not read" in one.summary for one in found) == 3, "the mark and 100 letters"


def test_a_long_text_is_scored_with_half_a_context_before_every_token(own):
    """By hand: rows of 32 that begin every 16 tokens; of all but the first only the second half counts."""
    checkpoint = load_checkpoint(best_checkpoint(own[0]))
    ids = list(("αβγ ab" * 9).encode())
    row = torch.tensor([[0, *ids[:-1]]])
    with torch.no_grad():
        checkpoint.model.gpt.head_w.normal_(generator=torch.Generator().manual_seed(1))
        parts = [checkpoint.model.logits(row[:, s : s + 32])[0] for s in range(0, len(ids) - 16, 16)]
    by_hand = torch.cat([parts[0], *(part[16:] for part in parts[1:])])
    torch.testing.assert_close(token_logits(checkpoint, ids), by_hand, atol=1e-5, rtol=1e-4)


def test_an_overwritten_run_leaves_nothing_that_could_be_read_as_the_new_one(tmp_path, capsys):
    """The last of the old run's checkpoints was kept, and read, where the new one took fewer steps."""
    words = f"--model=bigram --data=names --limit_chars=3000 --row_tokens=64 --batch_tokens=64 --output_dir={tmp_path}"
    for steps in (9, 4):
        assert cli.run(train.main, [*words.split(), f"--steps={steps}", "--keep=last", "--overwrite"]) == 0
    assert load_checkpoint(best_checkpoint(tmp_path)).step == 4
    assert max(load_checkpoint(path).step for path in find_checkpoints(tmp_path)) == 4
    capsys.readouterr()


@pytest.mark.parametrize("kind, rows, row", [("sums", 3, 64), ("names", 2, 64)])
def test_the_floor_is_of_the_very_text_that_is_validated(kind, rows, row, tmp_path):
    """Rows by hand: whole names to a row as far as they fit; sums one after the other, cut where the rows end."""
    words = f"--model=bigram --data={kind} --steps=1 --limit_chars=20000 --row_tokens={row} --batch_tokens={row}"
    flags = f"{words} --val_tokens={rows * row} --checkpoints=1 --output_dir={tmp_path}"
    assert cli.run(train.main, flags.split()) == 0
    told = json.loads((tmp_path / "runs/seed-000.json").read_text())
    documents = load_corpus(kind, limit_chars=20_000).documents["val"]
    if kind == "names":
        fits, at = [], 0
        for name in documents:
            left = row - at % row
            at += (left if len(name) + 1 > left else 0) + len(name) + 1
            if at > rows * row:
                break
            fits.append(name)
        ways = [grammar().derivations((Choice("name", None),), name + "\n") for name in fits]
        nats = -sum(math.log(sum(math.exp(log_p) for log_p, _ in found)) for found in ways)
        by_hand = nats / sum(len(name) + 1 for name in fits)
    else:
        stream = "\0".join(documents)[: rows * row]
        *whole, rest = stream.split("\0")
        by_hand = -(sum(log_prob(d, "sums") for d in whole) + log_prob(rest, "sums", whole=False)) / (rows * row)
    assert told["floor"] == pytest.approx(by_hand)
    assert told["floor_whole"] == pytest.approx(floor_on(documents, kind)) != pytest.approx(by_hand, abs=1e-4)


# ---- other alphabets ---------------------------------------------------------------------------------------


@given(st.text(st.characters(max_codepoint=126), max_size=60))
def test_words_of_plain_english_are_what_they_were(text):
    assert split_words(text) == re.findall(r"<unk>|[A-Za-z]+(?:'[A-Za-z]+)*|[0-9]|\n|[^\sA-Za-z0-9]", text)


@pytest.mark.parametrize(
    "text, words",
    [
        ("Μῆνιν ἄειδε, θεά", ["Μῆνιν", "ἄειδε", ",", "θεά"]),
        ("cafe\u0301 naïve d’été", ["cafe\u0301", "naïve", "d’été"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("می\u200cروم", ["می\u200cروم"]),
        ("中文。日本", ["中", "文", "。", "日", "本"]),
        ("привет, мир 2x", ["привет", ",", "мир", "2", "x"]),
        ("", []),
        ("\u0301a", ["\u0301", "a"]),
    ],
)
def test_words_of_any_alphabet(text, words):
    assert split_words(text) == words


@pytest.mark.parametrize("text", ["Μῆνιν ἄειδε, θεά.", "हिन्दी में लिखो", "中文文中。国中", "Привет, мир."])
def test_a_vocabulary_of_words_writes_any_alphabet_as_it_was(text):
    tokenizer = word_tokenizer([text] * 3)
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


def test_spelling_knows_greek_words_not_letters(tmp_path):
    """A letter was a word of its own, and every model that knows the letters spelled all words rightly."""
    tokenizer = CharTokenizer("αβγ")
    model = build_model("bigram", 4)
    with torch.no_grad():
        model.table.weight.zero_()
        for a, b in ((0, 2), (2, 1), (1, 0)):
            model.table.weight[a, b] = 60.0  # it writes βα, and nothing else
    writer = Checkpoint(tmp_path, "bigram", 0, model.eval(), tokenizer, {"row_tokens": 16})
    shares = [spelling([writer], [text], tmp_path, count=2).data["table"][0]["known_share"] for text in ("αβ γ", "βα")]
    assert shares == [0.0, 1.0]


def test_words_that_a_model_does_not_know_are_told_by_the_command_line_too(tmp_path, capsys):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat .\n" * 12)
    words = f"--model=bigram --data=names --tokens=word --path={path} --steps=1 --row_tokens=16 --batch_tokens=16"
    assert cli.run(train.main, [*words.split(), "--checkpoints=1", f"--output_dir={tmp_path / 'o'}"]) == 0
    capsys.readouterr()
    assert cli.run(sample.main, [str(tmp_path / "o"), "--prompt=the zebra", "--max_tokens=2"]) == 0
    assert "reads these as <unk>: zebra" in capsys.readouterr().err
    kept = load_checkpoint(best_checkpoint(tmp_path / "o"))
    for first, prompt in (("the cat sat", "the"), ("cat's own", "cat's"), ("", "")):
        assert starting_prompt(kept, {"val": [first]}) == prompt, "whole words, that the model knows"
    kept.told["data"] = "text"
    assert starting_prompt(kept, {"val": ["The cat, sat on the mat"]}) == "The cat, sat"
    flags = [str(tmp_path / "o"), "--prompt=the gnu", f"--out={tmp_path}"]
    assert cli.run(look.main, [*flags, "--only=next_token"]) == 0
    assert "reads these as <unk>: gnu" in json.loads((tmp_path / "next_token.json").read_text())["summary"]
    assert cli.run(look.main, [*flags, "--only=attribution", "--target=zebra"]) == 2
    assert "not among the words" in capsys.readouterr().err


# ---- outside files -----------------------------------------------------------------------------------------

GOOD_TASK = {"ctx": "a", "endings": ["b", "c"], "label": 0}


@pytest.mark.parametrize(
    "reader, lines, told",
    [
        (read_hellaswag, [GOOD_TASK, {"ctx": "a", "endings": ["b", "c"]}], "line 2: no whole number under 'label'"),
        (read_hellaswag, [{"ctx": "a", "label": 0}], "line 1: 'endings' must be a list"),
        (read_hellaswag, [{**GOOD_TASK, "label": 2}], "line 1: label 2 of 2 endings; labels count from 0"),
        (read_hellaswag, [{**GOOD_TASK, "label": 1}] * 25, "seem to count from 1"),
        (read_hellaswag, [{"endings": ["b", "c"], "label": 0}], "no text under 'ctx'; there is endings, label"),
        (read_hellaswag, ["{"], "line 1: not JSON"),
        (read_hellaswag, ["7"], "an object"),
        (read_lambada, [{"text": "one"}], "line 1: at least two words"),
        (read_lambada, [{"txt": "one two"}], "no text under 'text'"),
        (read_pairs, [{"sentence_good": "a"}], "no text under 'sentence_bad'"),
        (read_cola, ["x\t2\t\tHe go."], "line 1: source, 0 or 1"),
    ],
)
def test_outside_files_are_refused_with_their_line(reader, lines, told, tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    with pytest.raises(LabError, match=told):
        reader(path)


def test_the_last_word_may_follow_a_line_end(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_text(json.dumps({"text": "she said\nyes "}) + "\n" + json.dumps({"text": "a\u2028b c"}))
    assert read_lambada(path) == [("she said", "\nyes"), ("a\u2028b", " c")]


def test_stories_are_read_from_csv(tmp_path):
    told = "Once upon a time, there was a cat.\nIt was " + "very " * 20 + 'happy, and said "yes, yes".'
    path = tmp_path / "tiny.csv"
    path.write_text('text\n"' + told.replace('"', '""') + '"\n"short."\n')
    assert raw_stories(path)[0] == [told, "short."]
    assert load_documents("stories", path) == [told.replace("\n", "\n")]
    path.write_text("story\nabc\n")
    with pytest.raises(LabError, match="line 2: no text under 'text'; there is story"):
        raw_stories(path)


def _words(tmp_path, favourite):
    """A model over five words that always expects `favourite`."""
    tokenizer = WordTokenizer(["the", "cat", "sat", "mat", "."])
    model = build_model("bigram", tokenizer.vocab_size)
    with torch.no_grad():
        model.table.weight.zero_()
        model.table.weight[:, favourite] = 3.0
    return Checkpoint(tmp_path, "bigram", 0, model.eval(), tokenizer, {})


def test_an_unknown_word_is_never_the_right_answer(tmp_path):
    path = tmp_path / "l.jsonl"
    rows = ["the cat sat zebra", "the cat sat gnu", "the cat sat mat"]
    path.write_text("\n".join(json.dumps({"text": t}) for t in rows))
    found = lambada(_words(tmp_path, favourite=WordTokenizer.unknown_id), path)
    assert found["accuracy"] == 0.0 and found["unknown_share"] == pytest.approx(2 / 3)
    assert lambada(_words(tmp_path, favourite=5), path)["accuracy"] == pytest.approx(1 / 3)


def test_a_task_is_not_won_by_its_place_or_by_unknown_words(tmp_path):
    """A model that finds all endings alike is right by chance, wherever the right one stands; an ending of words that
    it does not know is not the likeliest for that."""
    path = tmp_path / "h.jsonl"
    rows = [{"ctx": "the cat", "endings": ["sat", "sat", "sat", "sat"], "label": n} for n in (0, 0, 0, 3)]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = hellaswag(_words(tmp_path, favourite=5), path)
    assert found["accuracy"] == found["accuracy_norm"] == found["chance"] == 0.25
    path.write_text(json.dumps({"ctx": "the cat", "endings": ["zebra", "sat"], "label": 1}))
    unknown = _words(tmp_path, favourite=WordTokenizer.unknown_id)
    assert hellaswag(unknown, path)["accuracy"] == 1.0
    p = math.exp(3) / (math.exp(3) + 6)
    letters = 8 * math.log(2) * len("zebra")
    assert sentence_nats(unknown, "zebra")[0] == pytest.approx(-math.log(p) - math.log((1 - p) / 6) + letters)


def test_unknown_words_are_charged_with_their_letters(tmp_path):
    found = score(_words(tmp_path, favourite=1), ["the zebra sat", "the cat"])
    p = math.exp(3) / (math.exp(3) + 6)
    q = (1 - p) / 6
    nats = [q, p, q, q, q, q, q]  # the, unknown, sat, end; the, cat, end
    bits = -sum(map(math.log2, nats)) + 8 * len("zebra")
    assert found.bits_per_byte == pytest.approx(bits / (len("the zebra sat") + len("the cat") + 2))
    assert found.unknown_share == pytest.approx(1 / 5) and found.unknown == {"zebra": 1}


def test_rarer_words_are_replaced_up_to_a_share():
    story = "The cat sat on the mat and the cat sat on the mat and was happy with the mat it had {}."
    told = [story.format(word) for word in ("seen", "found", "made", "got")]
    assert len(clean_stories(told, common_words=12).stories) == 0
    kept = clean_stories(told, common_words=12, replaced_share=0.3)
    assert kept.stories == [story.format("<unk>")] and kept.dropped["copy"] == 3, "they had differed in that word alone"
    counts = kept_by_share(told, 12, (0.0, 0.05, 0.3))
    common = {w for w, _ in Counter(w.lower() for t in told for w in split_words(t)).most_common(12)}
    for share, count in counts.items():
        rare = [sum(w.lower() not in common for w in split_words(t)) / len(split_words(t)) for t in told]
        assert count == sum(r <= share for r in rare)
    tokenizer = WordTokenizer(["the", "cat"])
    assert tokenizer.encode("The <unk> cat").tolist() == [2, 1, 3]
    assert clean_stories([kept.stories[0]]).stories == [kept.stories[0]], "a cleaned story is clean"


def test_long_work_tells_how_far_it_is(own, tmp_path, monkeypatch):
    checkpoint, lines = load_checkpoint(best_checkpoint(own[0])), []
    texts = ["abc", "abd", "abe"] * 4
    how = {"steps": 4, "every": 2, "batch_tokens": 64, "watched": {"first": texts}}
    table = fine_tune(checkpoint, texts, texts, progress=lines.append, **how)
    assert len(lines) == len(table) == 3 and "step 4 of 4" in lines[-1]
    assert table[-1]["first"] < table[0]["first"], "here what is watched is what is learned"
    monkeypatch.setitem(fine_tune.__globals__, "TELL_S", 0.0)  # as if every step took longer than one waits
    fine_tune(checkpoint, texts, texts, progress=lines.append, **how)
    assert [line.split(",")[0][-11:] for line in lines[3:]] == [f"step {n} of 4" for n in range(5)]
    lines.clear()
    along = [load_checkpoint(path) for path in find_checkpoints(own[0])[:2]]
    fewshot(along, texts, texts, tmp_path, steps=1, every=1, progress=lines.append)
    assert [line.split(":")[0] for line in lines] == [f"from step {c.step}" for c in along for _ in range(2)]


def test_a_text_for_fewshot_is_scored_as_far_as_was_asked(own, tmp_path):
    words = f"{own[0]} --only=fewshot --fewshot_path={own[1]} --data=names --steps=1 --limit=7 --out={tmp_path}"
    assert cli.run(look.main, words.split()) == 0
    found = json.loads((tmp_path / "fewshot.json").read_text(encoding="utf-8"))
    assert found["limit_chars"] == 7 and "its first 7 characters" in found["summary"]


def test_wilsons_interval_is_that_of_the_textbook():
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 5)[0] == pytest.approx(0, abs=1e-12) and wilson(5, 5)[1] == pytest.approx(1)


# ---- the microscope ----------------------------------------------------------------------------------------


def test_coloured_text_by_hand(own):
    """Every token's loss, entropy and alternatives from the model given nothing but the tokens before it."""
    checkpoint = load_checkpoint(best_checkpoint(own[0]))
    text = "αβ ab"
    ids = list(text.encode())
    got = read_tokens(checkpoint, text, top=3)
    assert [t.id for t in got] == ids
    for place, token in enumerate(got):
        with torch.no_grad():
            logits = checkpoint.model.logits(torch.tensor([[0, *ids[:place]]]))[0, -1].tolist()
        total = sum(math.exp(x) for x in logits)
        p = [math.exp(x) / total for x in logits]
        assert token.nats == pytest.approx(-math.log(p[ids[place]]), abs=1e-4)
        assert token.entropy_nats == pytest.approx(-sum(x * math.log(x) for x in p), abs=1e-4)
        best = sorted(p, reverse=True)[:3]
        assert [x for _, x in token.top] == pytest.approx(best, abs=1e-5)
    page = as_html(got, spaced=False, before=got)
    assert page.count("<span") == len(ids) and "&lt;CE&gt;" in page and "before" in page


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    """From step 1,000,000 on, names sorted as text are in another order."""
    for step in (999_999, 1_000_000, 20, 2_000_000):
        (tmp_path / f"step-{step:06d}.safetensors").touch()
    found = [int(path.stem.removeprefix("step-")) for path in find_checkpoints(tmp_path)]
    assert found == [20, 999_999, 1_000_000, 2_000_000]
    assert [path.name for path in checkpoints_of(tmp_path)] == [f"step-{n:06d}.safetensors" for n in reversed(found)]
