"""Exported models, loaded by the real transformers library where it is installed."""

import contextlib
import dataclasses
import json

import pytest
import torch
from small_runs import folder_of, run, small, tokens

import train_gpt
from trainer.checkpoints import save_tensors
from trainer.export import _tokenizer, export_folder
from trainer.sample import generate


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("done")
    more = ["--num_layers=4", "--attention_free_layers=2", "--value_embeddings=1", "--muon_lr=0.05", "--embed_lr=1"]
    assert run(folder_of(folder / "data", tokens(2000)), folder, *more) == 0
    return folder


def export(done, target, *words):
    assert train_gpt.main(["export", str(done / "run"), str(target), *words]) == 0
    return target


def loaded(folder):
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    return transformers, model.eval()


@pytest.fixture(autouse=True)
def its_cache(tmp_path, monkeypatch):
    """transformers copies a folder's code to a cache: not to the user's."""
    with contextlib.suppress(ImportError):
        from transformers import dynamic_module_utils

        monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
        monkeypatch.syspath_prepend(tmp_path)


@torch.no_grad()
def test_transformers_gives_the_same_logits(done, tmp_path):
    folder = export(done, tmp_path / "model")
    transformers, theirs = loaded(folder)
    ours, _ = train_gpt.load_model(done / "run.checkpoints" / "step-000004.safetensors")
    text = torch.tensor(tokens(700, 3)[None].astype("int64"))  # longer than the window, with ends of documents
    torch.testing.assert_close(theirs(text).logits, ours(text), rtol=0, atol=1e-5)
    assert float(theirs(text, labels=text).loss) == pytest.approx(float(ours(text[:, :-1], text[:, 1:])), abs=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    ids = tokenizer("Zwö <b>", return_tensors="pt").input_ids
    assert ids[0].tolist() == [0, *"Zwö <b>".encode()] and tokenizer.decode(ids[0][1:]) == "Zwö <b>"
    written = theirs.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.size(1) :].tolist()
    greedy = list(generate(ours, ids[0, 1:].tolist(), 8, temperature=0))
    assert written[: len(greedy)] == greedy


@pytest.mark.parametrize(
    "words",
    [
        ["--second_input_embedding=false", "--soft_cap=sigmoid", "--half_truncated_rotary=false"],
        ["--soft_cap=none", "--dtype=bfloat16", "--unet_skips=none"],
        ["--second_embedding_context=3", "--value_embedding_context=2", "--context_rows=500"],
    ],
)
@torch.no_grad()
def test_other_models_too(words, tmp_path):

    config = train_gpt.parse_config(small(*words))
    torch.manual_seed(0)
    ours = train_gpt.GPT(config).eval()
    for p in ours.parameters():
        p.copy_(torch.randn_like(p) * 0.3)
    save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"format": "x"})
    export_folder(tmp_path / "x.safetensors", ours, config, tmp_path / "model", "")
    _, theirs = loaded(tmp_path / "model")
    text = torch.tensor(tokens(300, 3)[None].astype("int64"))
    rtol, atol = 2e-6, 1e-5
    if config.dtype == "bfloat16":  # both round, to nearly the same: they differ by far less than rounding costs
        exact = train_gpt.GPT(dataclasses.replace(config, dtype="float32")).eval()
        exact.load_state_dict({name: p.float() for name, p in ours.state_dict().items()})
        rounding = (ours(text).float() - exact(text)).abs().max().item()
        assert rounding < 0.2  # of logits up to 5
        rtol, atol = 0, 0.25 * rounding
    assert theirs.scalars.dtype == theirs.head_w.dtype == torch.float32
    assert theirs.blocks[0].mlp_in_w.dtype == getattr(torch, config.dtype)
    torch.testing.assert_close(theirs(text).logits.float(), ours(text).float(), rtol=rtol, atol=atol)


def test_the_card_tells_the_evidence(done, tmp_path):
    card = (export(done, tmp_path / "model") / "README.md").read_text()
    summary = json.loads((done / "run.json").read_text())
    for value in (summary["data_hash"], summary["val_data_hash"], summary["code_hash"], f"{summary['final_loss']:.6f}"):
        assert value in card


def test_weights_alone(done, tmp_path, capsys):
    whole = done / "run.checkpoints" / "step-000004.safetensors"
    alone = export(done, tmp_path / "weights.safetensors")
    assert alone.stat().st_size < 0.5 * whole.stat().st_size
    texts = []
    for path in (whole, alone):
        assert train_gpt.main(["sample", str(path), "--prompt=ab", "--max_new_tokens=5", "--temperature=0"]) == 0
        texts.append(capsys.readouterr().out.splitlines()[-1])
    assert texts[0].startswith("ab") and texts[0] == texts[1]
    assert train_gpt.main(["export", str(done / "run"), str(alone)]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert train_gpt.main(["export", str(done / "run")]) == 2


def test_a_tokenizer_of_gpt2(tmp_path, shared_data):
    config = train_gpt.parse_config([])
    files, remark = _tokenizer(config, "")
    assert not files and "--vocab=FOLDER" in remark
    files, _ = _tokenizer(config, str(shared_data / "tokenizer"))
    transformers = pytest.importorskip("transformers", reason="the transformers library is not installed")
    for name, content in files.items():
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("Hello world").input_ids[-2:] == [15496, 995] and tokenizer.eos_token_id == 50256
