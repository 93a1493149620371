"""Checkpoints whose tables have no row of a token, and those with techniques: what can be said of them is, no more."""

import dataclasses
import json

import pytest
import torch

import lab.analyses.__main__ as look
import train_gpt
from lab import cli
from lab.analyses.attribution import EmbeddedModel, attribute
from lab.checkpoints import Checkpoint, load_checkpoint
from lab.models.gpt import GPTRung
from lab.studio.diagram import gpt_paths
from lab.tokens import ByteTokenizer
from trainer.checkpoints import save_tensors

HASHED = "--preset=nano --second_embedding_context=3 --value_embedding_context=2 --context_rows=100"
FRONTIER = "--preset=nano-frontier --bigram_rows=300 --paired_heads=1 --untied_values"
SMALL = "--model_dim=32 --num_heads=2"


def gpt_of(words):
    torch.manual_seed(0)
    gpt = train_gpt.GPT(train_gpt.parse_config(f"{words} {SMALL}".split())).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(0.1 * torch.randn_like(p))  # zeros would say nothing
    return gpt


def saved(gpt, folder, step=7):
    state = {f"model.{n}": p.detach() for n, p in gpt.named_parameters()}
    told = {"format": train_gpt.CHECKPOINT_FORMAT, "config": json.dumps(dataclasses.asdict(gpt.config))}
    path = folder / "a.checkpoints" / f"step-{step:06d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_tensors(path, state, told | {"step": str(step), "run_name": "a"})
    return path


def test_the_baseline_of_an_attribution_is_a_prompt_of_marks_alone(tmp_path):
    """A table of 100 rows has none of the mark's number, 250: its rows are those that marks pick together."""
    gpt, tokenizer = gpt_of(f"{HASHED} --eos_id=250"), ByteTokenizer()
    tokenizer.mark = 250
    checkpoint = Checkpoint(tmp_path, "gpt", 0, GPTRung.of(gpt), tokenizer, {})
    found = attribute(checkpoint, "abcab", "c")
    with torch.no_grad():
        marks, prompt = (gpt(torch.tensor([ids]))[0, -1] for ids in ([250] * 6, [250, *b"abcab"]))
    assert found.baseline_logit == pytest.approx(float(marks[ord("c")]), abs=1e-5)
    assert found.logit == pytest.approx(float(prompt[ord("c")]), abs=1e-5)
    total = float(prompt[ord("c")] - marks[ord("c")])
    assert sum(found.integrated) == pytest.approx(total, abs=1e-3 + 0.02 * abs(total))
    opened = EmbeddedModel(checkpoint, checkpoint.encode_prompt("abcab"))
    (_, second, *_), _ = opened.values()
    assert not torch.equal(second[0, 1], second[0, 4]), "the same letter after others has another row"


@pytest.mark.parametrize("words", [HASHED, FRONTIER])
def test_what_has_no_row_of_a_token_is_said(words, tmp_path, capsys):
    gpt = gpt_of(words)
    for step in (0, 7):
        path = saved(gpt, tmp_path, step)
    text = tmp_path / "other.txt"
    text.write_text("the cat sat\non the mat\nand sat\n" * 4)
    names = "embeddings,attribution,architecture" + (",scalars,attention" if words is FRONTIER else "")
    flags = [f"--other={text}", "--data=names", f"--out={tmp_path / 'look'}", "--prompt=the c"]
    assert cli.run(look.main, [str(path.parent), f"--only={names}", *flags]) == 0
    several = "the bigram table by 2, the n-gram table by 3"
    several = "the second embedding by 3, the value embeddings by 2" if words is HASHED else several
    for name in ("embeddings", "attribution", "architecture"):
        told = json.loads((tmp_path / "look" / f"{name}.json").read_text())["summary"]
        assert f"A row is picked by several tokens ({several})" in told
    logits = load_checkpoint(path).model.logits(torch.tensor([[0, *b"the c"]]))
    gpt.at_step(7)
    assert torch.allclose(logits, gpt(torch.tensor([[0, *b"the c"]])), atol=1e-5)
    if words is FRONTIER:
        told = json.loads((tmp_path / "look" / "attention.json").read_text())
        assert [one["layer"] for one in told["layers"]] == [0, 2, 3] and "Layers 1, of paired heads" in told["summary"]
        assert cli.run(look.main, [str(path), "--only=logit_lens", *flags]) == 2
        assert "--only=logit_lens: does not fit this model" in capsys.readouterr().err
        assert cli.run(look.main, [str(path), "--only=benchmarks", *flags]) == 2
        assert "--only=benchmarks: needs --hellaswag or --lambada" in capsys.readouterr().err


@torch.no_grad()
def test_scalars_are_those_that_a_layer_uses():
    gpt = gpt_of(FRONTIER)
    found = GPTRung.of(gpt).scalars()
    own, L = gpt.scalars_by_kind(), gpt.config.num_layers
    assert found["stream"] == {i: float(own["mixes"][i, 0]) for i in range(L)}
    assert found["second embedding"] == {i: float(gpt.techniques.mixes[i, 1]) for i in range(L)}
    assert found["bigram table"] == {i: float(gpt.techniques.bigram_mixes[i]) for i in range(L)}
    assert found["skip, before its gate"] == {3: pytest.approx(2 / (1 + float(torch.exp(-own["skips"][0]))))}
    plain = GPTRung.of(gpt_of("--preset=nano")).scalars()
    assert set(plain) == {"stream", "first embedding", "second embedding", "value", "value embedding", "skip"}
    assert list(plain["skip"]) == [3] and list(plain["value embedding"]) == [0, 3]


def test_the_drawing_names_rows_of_several_tokens_and_what_it_leaves_out():
    assert "a row of the second embedding is picked by 3 tokens" in gpt_paths(gpt_of(HASHED))
    shown = gpt_paths(gpt_of(FRONTIER))
    assert "both input embeddings and a bigram table mixed in" in shown and ">bigram table<" in shown
    assert "not drawn: " in shown and "dynamic_skips" in shown and "bigram_rows" not in shown
    assert "not drawn" not in gpt_paths(gpt_of("--preset=nano"))
