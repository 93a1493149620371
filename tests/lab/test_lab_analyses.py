"""The microscope on small models: numbers by hand where there are some, files where there are none."""

import json
import math

import pytest
import torch

from lab import LabError, analyses
from lab.analyses.attribution import EmbeddedModel, attribute, captum_integrated_gradients, integrated_gradients
from lab.analyses.losses import diagonal_is_least, fine_tune
from lab.analyses.quality import GrammarProxy, Nearest, longest_shared_run, repetition
from lab.analyses.samples import cosine, distinct, profile
from lab.analyses.scoring import score
from lab.analyses.tasks import hellaswag, lambada
from lab.checkpoints import find_checkpoints, load_checkpoint
from lab.datasets import load_corpus, stand_in_of
from lab.models import fields_class
from lab.train import TrainConfig, complete, train_model

GPT = {"model_dim": 16, "num_heads": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Checkpoints of a small GPT and a small wavenet, and their corpora."""
    made = {}
    for model, kind, fields in (("gpt", "sums", GPT), ("wavenet", "names", {"hidden_dim": 16})):
        corpus = load_corpus(kind, limit_chars=6000)
        c = complete(TrainConfig(model=model, data=kind, steps=12, batch_tokens=512, row_tokens=128, checkpoints=3))
        folder = tmp_path_factory.mktemp(model)
        train_model(c, fields_class(model)(**fields), folder=folder, corpus=corpus)
        made[kind] = ([load_checkpoint(p) for p in find_checkpoints(folder)], corpus)
    return made


@pytest.mark.parametrize("kind, prompt", [("sums", "12+3"), ("names", "Ma")])
def test_integrated_gradients_are_complete_and_captum_agrees(runs, kind, prompt):
    checkpoint = runs[kind][0][-1]
    found = attribute(checkpoint, prompt, points=256)
    change = found.logit - found.baseline_logit
    assert sum(found.integrated) + found.padding == pytest.approx(change, abs=1e-3 + 0.01 * abs(change))
    assert found.completeness_error == pytest.approx(0, abs=1e-3 + 0.01 * abs(change))
    pytest.importorskip("captum")
    opened = EmbeddedModel(checkpoint, checkpoint.encode_prompt(prompt))
    opened.values()
    ours, theirs = (f(opened, 2, 64) for f in (integrated_gradients, captum_integrated_gradients))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.float(), b.float(), atol=1e-4, rtol=1e-3)


def test_every_analysis_leaves_json_and_picture(runs, tmp_path):
    along, corpus = runs["sums"]
    split = corpus.documents
    names, names_corpus = runs["names"]
    models = {"sums": along[-1], "names": names[-1]}
    held_out = {"sums": split["val"], "names": names_corpus.documents["val"]}
    findings = [
        analyses.frequency(split["val"], corpus.tokenizer, tmp_path),
        analyses.architecture(names[-1], tmp_path),
        analyses.samples_along(along, "1+", tmp_path, max_tokens=8),
        analyses.variability(along[-1], "1+", tmp_path, count=2, max_tokens=8),
        analyses.losses(along, split, tmp_path, chars=500),
        analyses.domains(models, held_out, tmp_path, chars=500),
        analyses.fewshot(along[-1:], split["train"], split["val"], tmp_path, steps=2, every=1, chars=300),
        analyses.next_token(along, "1+", tmp_path),
        analyses.attribution(along[-1], "1+", tmp_path, target="7"),
        analyses.quality(along[-1], split["train"][:9], split["val"], tmp_path, count=2, max_tokens=20, prompt="1"),
    ]
    for finding in findings:
        assert json.loads(finding.json_path.read_text())["summary"] == finding.summary
        assert finding.png_path.read_bytes().startswith(b"\x89PNG")
    page = analyses.write_summary(tmp_path, findings).read_text()
    assert all(f.png_path.name in page for f in findings)


def test_architecture_counts_every_parameter_once(runs):
    for kind in runs:
        checkpoint = runs[kind][0][-1]
        from lab.analyses.architecture import describe

        assert sum(p["parameters"] for p in describe(checkpoint)) == checkpoint.model.num_parameters()


def test_unknown_characters_are_charged_eight_bits(runs):
    checkpoint, corpus = runs["sums"][0][-1], runs["sums"][1]
    document = corpus.documents["val"][0]
    plain, spoiled = score(checkpoint, [document]), score(checkpoint, [document + "é" * 10])
    assert plain.unknown_share == 0 and plain.bytes == len(document) + 1
    assert spoiled.unknown == {"é": 10} and spoiled.bytes == plain.bytes + 20
    tokenizer = checkpoint.tokenizer
    ids = tokenizer.encode(document + "é" * 10, "keep").tolist()
    read = [tokenizer.mark, *(i if i >= 0 else stand_in_of(tokenizer) for i in ids)]
    with torch.no_grad():
        logp = checkpoint.model.logits(torch.tensor([read]))[0].log_softmax(-1)
    known = [(place, i) for place, i in enumerate([*ids, tokenizer.mark]) if i >= 0]
    by_hand = -sum(float(logp[place, i]) for place, i in known) / len(known)
    assert spoiled.nats_per_token == pytest.approx(by_hand, abs=1e-5) and spoiled.tokens == len(known)
    bits = spoiled.nats_per_token * spoiled.tokens / math.log(2) + 160
    assert spoiled.bits_per_byte == pytest.approx(bits / spoiled.bytes)
    with pytest.raises(LabError, match="not one character"):
        score(checkpoint, ["éé"])


def test_fine_tuning_leaves_the_model_alone_and_learns(runs):
    checkpoint, corpus = runs["sums"][0][-1], runs["sums"][1]
    before = [p.clone() for p in checkpoint.model.parameters()]
    split = corpus.documents
    table = fine_tune(checkpoint, split["train"], split["val"], steps=10, every=5, rate=3e-3, batch_tokens=512)
    assert [r["step"] for r in table] == [0, 5, 10] and table[-1]["loss"] < table[0]["loss"]
    assert all(torch.equal(a, b) for a, b in zip(before, checkpoint.model.parameters()))


def test_measures_by_hand():
    assert distinct(["aab", "ab"], 2) == pytest.approx(2 / 3)
    assert longest_shared_run("xxhello wyy", "say hello world") == len("hello w")
    assert repetition("a b c a b c".split(), 3) == pytest.approx(0.25)
    assert Nearest(["goodbye", "hello"])("hello") == (pytest.approx(0.0), 1)
    documents = ["the cat sat on the mat", "a dog", "the cat ate the mouse", ""]
    distance, index = Nearest(documents)("the cat sat with the mouse")
    likeness = [cosine(profile("the cat sat with the mouse"), profile(d)) for d in documents]
    assert (distance, index) == (pytest.approx(1 - max(likeness)), likeness.index(max(likeness)))
    assert Nearest(documents)("zzz")[0] == pytest.approx(1.0), "nothing in common"
    proxy = GrammarProxy(["The cat sat."])
    assert proxy.score("The cat sat.") == 1.0 > proxy.score("sat cat the")
    cell = lambda x, unknown=0.0: {"x": x, "unknown_share": unknown}  # noqa: E731
    cells = {"a": {"a": cell(1), "b": cell(3)}, "b": {"a": cell(2), "b": cell(2)}}
    assert diagonal_is_least(cells, "x")
    cells["a"]["b"] = cell(1.5)
    assert not diagonal_is_least(cells, "x")
    cells["a"]["b"] = cell(0.1, unknown=1.0)
    assert diagonal_is_least(cells, "x"), "end marks alone are no text"


class _Oracle(torch.nn.Module):
    """Knows byte texts by heart: the next byte of a known text gets a logit of 20."""

    context, vocab_size = None, 256

    def __init__(self, texts):
        super().__init__()
        self.texts = [[0, *t.encode()] for t in texts]

    def logits(self, idx):
        out = torch.zeros(*idx.shape, 256)
        for b, row in enumerate(idx.tolist()):
            for t in range(len(row)):
                for text in self.texts:
                    if text[: t + 1] == row[: t + 1] and t + 1 < len(text):
                        out[b, t, text[t + 1]] = 20.0
        return out


def test_task_scores_of_a_model_that_knows_the_answers(tmp_path):
    from lab.checkpoints import Checkpoint
    from lab.tokens import ByteTokenizer

    tasks = [{"ctx": "A cat", "endings": ["flies", "sits", "x", "y"], "label": 1}]
    (tmp_path / "h.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    (tmp_path / "l.jsonl").write_text(json.dumps({"text": "the end is here"}) + "\n" + json.dumps({"text": "no idea"}))
    oracle = Checkpoint(tmp_path, "gpt", 0, _Oracle(["A cat sits", "the end is here"]), ByteTokenizer(), {})
    assert hellaswag(oracle, tmp_path / "h.jsonl")["accuracy"] == 1.0
    assert lambada(oracle, tmp_path / "l.jsonl")["accuracy"] == 0.5
    with pytest.raises(LabError, match="cannot read"):
        lambada(oracle, tmp_path / "absent.jsonl")


def test_attribution_refuses_what_it_cannot_do(runs):
    with pytest.raises(LabError, match="exactly one"):
        attribute(runs["sums"][0][-1], "1+", target="12")
    with pytest.raises(LabError, match="vocabulary lacks"):
        attribute(runs["sums"][0][-1], "one")
