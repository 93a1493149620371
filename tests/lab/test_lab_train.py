"""Training, logs, checkpoints, resuming, sampling; small enough for seconds."""

import dataclasses
import json
import math

import pytest
import torch

from lab import LabError, cli, sample, sweep, train
from lab.checkpoints import Checkpoint, best_checkpoint, find_checkpoints, load_checkpoint, same_vocabulary
from lab.datasets import load_corpus
from lab.embedded import entropy_floor, floor_on
from lab.models import build_model, fields_class
from lab.train import Run, TrainConfig, complete, evaluate, train_model


@pytest.fixture(scope="module")
def names():
    return load_corpus("names", limit_chars=12_000)


def config(model="mlp", steps=30, **more):
    length = {} if model == "counts" else {"steps": steps, "batch_tokens": 512}
    return complete(TrainConfig(model=model, **length, row_tokens=128, checkpoints=3, **more))


def test_counting_and_training_a_bigram_agree(names, tmp_path):
    light = fields_class("counts")(smoothing=1e-3)
    counted = train_model(config("counts"), light, folder=tmp_path / "c", corpus=names)
    c = config("bigram", 300, learning_rate=0.3, val_every=300)
    trained = train_model(c, folder=tmp_path / "b", corpus=names)
    losses = [evaluate(r.model, names.tokens["train"], 128) for r in (counted, trained)]
    assert abs(losses[0] - losses[1]) < 1e-2
    assert losses[1] > losses[0] - 1e-4  # the counts are the best table there is for their own text


@pytest.mark.parametrize("model", ["mlp", "gpt"])
def test_a_run_learns_and_leaves_log_json_and_checkpoints(names, tmp_path, model):
    fields = fields_class("gpt")(model_dim=16) if model == "gpt" else None
    result = train_model(config(model, test=True), fields, folder=tmp_path / "s", corpus=names)
    told = json.loads((tmp_path / "s/runs/seed-000.json").read_text())
    assert told["status"] == "finished" and told["schema"] == 1 and told["final_loss"] == result.final_loss
    assert result.final_loss < math.log(names.tokenizer.vocab_size) - 0.3
    assert result.test_loss == pytest.approx(evaluate(result.model, names.tokens["test"], 128))
    log = (tmp_path / "s/runs/seed-000.txt").read_text()
    assert log.splitlines()[-1].startswith(f"step:30/30 val_loss:{result.final_loss:.6f} train_time:")
    loaded = load_checkpoint(best_checkpoint(tmp_path / "s"))
    assert evaluate(loaded.model, names.tokens["val"], 128) == pytest.approx(result.best_loss, abs=1e-5)
    assert load_checkpoint(find_checkpoints(tmp_path / "s")[0]).step == 0
    with pytest.raises(LabError, match="exists"):
        train_model(config(model), fields, folder=tmp_path / "s", corpus=names)


def test_the_statistics_read_a_series(names, tmp_path):
    from stats.runs import parse_log
    from stats.values import final_validation

    for seed in (0, 1):
        train_model(config(steps=6, seed=seed), folder=tmp_path / "s", corpus=names)
    with open(tmp_path / "s/runs/seed-001.txt", "rb") as file:
        (run,) = parse_log(file)
    told = json.loads((tmp_path / "s/runs/seed-001.json").read_text())
    assert final_validation(run).loss == pytest.approx(told["final_loss"], abs=1e-6)


@pytest.mark.parametrize("model, fields", [("mlp", {}), ("wavenet", {"dropout": 0.3, "hidden_dim": 8})])
def test_a_resumed_run_equals_an_uninterrupted_one(names, tmp_path, model, fields):
    """With dropout the draws of training must go on where they stopped, too."""
    c, fields = config(model, steps=20), fields_class(model)(**fields)
    whole = Run(c, fields, names, tmp_path / "a", echo=False).train()
    first = Run(c, fields, names, tmp_path / "b", echo=False)
    stop = sorted(train.checkpoint_steps(20, 3))[1]
    first.train(stop_after=stop)
    second = Run(c, fields, names, tmp_path / "b", echo=False).train(resume=True)
    assert second.final_loss == whole.final_loss
    for a, b in zip(whole.model.parameters(), second.model.parameters()):
        assert torch.equal(a, b)
    other = Run(dataclasses.replace(c, learning_rate=1e-4), fields, names, tmp_path / "b", echo=False)
    with pytest.raises(LabError, match="other settings"):
        other.train(resume=True)


def test_damage_and_strangers_are_noticed(names, tmp_path):
    train_model(config(steps=3), folder=tmp_path / "s", corpus=names)
    path = best_checkpoint(tmp_path / "s")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(data)
    with pytest.raises(LabError, match="does not match its digest"):
        load_checkpoint(tmp_path / "flipped.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(data[:50])
    with pytest.raises(LabError, match="not a whole safetensors"):
        load_checkpoint(tmp_path / "cut.safetensors")
    with pytest.raises(LabError, match="no checkpoint"):
        find_checkpoints(tmp_path / "nowhere")
    sums = load_corpus("sums", limit_chars=3000)
    train_model(config(steps=3), folder=tmp_path / "t", corpus=sums)
    with pytest.raises(LabError, match="another vocabulary"):
        same_vocabulary([load_checkpoint(path), load_checkpoint(best_checkpoint(tmp_path / "t"))])


def test_a_context_longer_than_the_text_is_refused(tmp_path):
    path = tmp_path / "few.txt"
    path.write_text("abc\nde\nfg\nhi\n")
    for flags in (["--model=mlp", "--context=50"], ["--model=gpt", "--row_tokens=512"]):
        code = cli.run(train.main, [*flags, f"--path={path}", f"--output_dir={tmp_path}/o", "--steps=2"])
        assert code == 2


@pytest.mark.parametrize(
    "flag, words",
    [
        ("--hiden_dim=3", "did you mean --hidden_dim"),
        ("--steps=many", "expected int"),
        ("--model=lstm", "the ladder has"),
        ("--data=poems", "one of names, text"),
        ("--row_tokens=9999 --batch_tokens=1", "less than one row"),
        ("--tokens=syllable", "one of char, word, byte"),
    ],
)
def test_wrong_flags_are_named(flag, words, capsys):
    assert cli.run(train.main, flag.split()) == 2
    assert words in capsys.readouterr().err


def test_samples_are_repeatable_and_unknown_prompts_refused(names, tmp_path):
    result = train_model(config(steps=10), folder=tmp_path / "s", corpus=names)
    checkpoint = load_checkpoint(best_checkpoint(result.folder))
    a, b = (sample.generate(checkpoint, "ma", count=3, max_tokens=8, seed=5) for _ in range(2))
    assert a == b and all(s.text.startswith("ma") for s in a)
    with pytest.raises(LabError, match="vocabulary lacks"):
        sample.generate(checkpoint, "m4")


def test_the_sweep_marks_the_best_rate(names):
    found = sweep.sweep(config(steps=8), fields_class("mlp")(), names, -5, 1, 4)
    losses = [loss for loss in found.losses if loss is not None]
    assert found.exponents == [-5, -3, -1, 1]
    assert found.losses[found.exponents.index(math.log10(found.suggestion))] == min(losses)


def test_no_model_beats_the_entropy_floor():
    corpus = load_corpus("sums", limit_chars=30_000)
    exact = floor_on(corpus.documents["val"], "sums")
    assert exact == pytest.approx(entropy_floor("sums"), rel=0.05)
    with pytest.raises(LabError, match="cannot write"):
        floor_on(["no such sum"], "sums")
    names = load_corpus("names").documents
    found = [floor_on(names[split], "names") for split in ("train", "val")]
    assert found[0] == pytest.approx(entropy_floor("names"), rel=0.004), "twenty thousand names are near their entropy"
    assert found[1] == pytest.approx(found[0], rel=0.01)
    with pytest.raises(LabError, match="cannot write"):
        floor_on(["Xqz"], "names")


def test_diagnostics_do_not_disturb_training(names, tmp_path):
    plain = train_model(config(steps=6), folder=tmp_path / "a", corpus=names)
    watched = train_model(config(steps=6, diagnostics=True), folder=tmp_path / "b", corpus=names)
    assert plain.final_loss == watched.final_loss
    drops = fields_class("wavenet")(dropout=0.3, hidden_dim=8)  # it draws, and its norms count, in every pass
    both = [config("wavenet", steps=6, diagnostics=looks) for looks in (False, True)]
    losses = [train_model(c, drops, folder=tmp_path / str(c.diagnostics), corpus=names).final_loss for c in both]
    assert losses[0] == losses[1]
    moments = json.loads((tmp_path / "b/diagnostics/seed-000.json").read_text())["moments"]
    assert moments[0]["loss"] == pytest.approx(moments[0]["expected_initial_loss"], abs=0.1)
    assert 0 <= moments[0]["layers"]["tanh"]["saturated"] <= 1
    assert (tmp_path / "b/diagnostics/seed-000.png").stat().st_size > 1000


def test_unknown_words_are_read_but_never_written(tmp_path):
    tokenizer = load_corpus("text", tokens="word", limit_chars=2000).tokenizer
    model = build_model("bigram", tokenizer.vocab_size)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
            p[..., tokenizer.unknown_id] = 20.0  # a model that would write nothing else
    checkpoint = Checkpoint(tmp_path, "bigram", 0, model.eval(), tokenizer, {})
    for drawn in sample.generate(checkpoint, "xyzzy the", count=3, max_tokens=30, seed=1):
        assert tokenizer.unknown_id not in drawn.ids and "<unk>" not in drawn.written
    writing = pytest.importorskip("lab.studio.writing")
    *_, last = writing.write(checkpoint, "xyzzy the", max_tokens=30, seed=1)
    assert tokenizer.unknown_id not in last.ids[last.prompt_tokens :]


def test_results_are_gathered_beside_their_aims_and_shown_on_the_page(tmp_path, capsys):
    from lab import record

    train.train_model(TrainConfig(model="bigram", steps=4, test=True, limit_chars=3000), folder=tmp_path / "series")
    out = tmp_path / "ladder.json"
    assert record.main([f"pairs={tmp_path / 'series'}:9", f"--out={out}"]) == 0
    assert record.main([f"again={tmp_path / 'series'}:0.5", f"--out={out}"]) == 0, "what is not named stays"
    assert "reached" in capsys.readouterr().out
    results = json.loads(out.read_text())
    assert results["pairs"]["reached"] and not results["again"]["reached"]
    page = record.page("before\n<!-- generated: ladder -->\nold\n<!-- end -->\nafter\n", results)
    assert page.startswith("before\n") and page.endswith("<!-- end -->\nafter\n") and "old" not in page
    run = results["pairs"]["runs"][0]
    told = f"| pairs | bigram | {run['num_parameters']:,} | 4 | {run['best']['loss']:.4f} |"
    assert told in page and "| 9.0 | yes |" in page and "**no**" in page
    with pytest.raises(LabError, match="has no part"):
        record.page("nothing", results)


def test_the_page_shows_what_was_gathered():
    from lab import record

    text = record.PAGE.read_text(encoding="utf-8")
    assert record.page(text, json.loads(record.LADDER.read_text())) == text, "run python -m lab.record --page"
