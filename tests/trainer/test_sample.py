"""Text from checkpoints: the cache gives the logits of the whole model, and the command finds what it is told."""

import dataclasses
import io
import sys
import time

import pytest
import torch

import train_gpt
from trainer import sample
from trainer.checkpoints import CheckpointError, find_checkpoint, save_tensors
from trainer.options import UsageError

SMALL = """--preset=nano --num_layers=4 --model_dim=32 --num_heads=2 --block_tokens=8 --window_max_tokens=40
--device=cpu --train_seq_len=64 --tokens_per_step=64""".split()


def model_of(*words, seed=0):
    config = train_gpt.parse_config([*SMALL, *words])
    torch.manual_seed(seed)
    model = train_gpt.GPT(config).eval()
    with torch.no_grad():  # what is zero at the start would hide mistakes
        for p in model.parameters():
            p.copy_(
                torch.randn_like(p) * (1 if p.dim() == 1 or (p.size(-1) == config.model_dim and p.dim() == 2) else 0.2)
            )
    return model


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--attention_free_layers=2", "--value_embeddings=2"],
        ["--second_input_embedding=false", "--soft_cap=sigmoid"],
        ["--second_embedding_context=3", "--value_embedding_context=2", "--context_rows=500"],
    ],
)
@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_whole_forward_pass(words):
    model = model_of(*words)
    tokens = torch.randint(1, 256, (2, 150), generator=torch.Generator().manual_seed(1))
    tokens[:, 0], tokens[1, 60] = 0, 0  # a document ends inside one of the rows
    whole = model(tokens)
    after = sample.cached(model)
    begin = 0
    for end in (23, 24, 25, 40, *range(41, 151)):
        torch.testing.assert_close(after(tokens[:, begin:end]), whole[:, end - 1], rtol=1e-4, atol=1e-4)
        begin = end


@torch.no_grad()
def test_the_cache_keeps_no_more_than_twice_the_window():
    model, cache = model_of(), sample.Cache()
    for _ in range(150):
        model(torch.tensor([[5]]), cache=cache)
    assert cache.length == 150 and max(k.size(1) for k, _, _ in cache.layers.values()) <= 2 * (40 + 8)


def test_drawing_is_the_same_with_and_without_a_cache():
    model = model_of()
    start = torch.tensor([[0, 7, 8]])

    def drawn(after):
        generator = torch.Generator().manual_seed(3)
        return [int(t) for t in sample.draw(after, start, 30, end=0, top_p=0.9, generator=generator, never=[0])]

    one = drawn(sample.cached(model))
    assert one == drawn(sample.recomputed(model, 1000)) and len(one) == 30 and 0 not in one


def test_rows_end_together():
    logits = iter([[[0.0, 9.0], [9.0, 0.0]], [[9.0, 0.0], [0.0, 9.0]], [[0.0, 9.0], [0.0, 9.0]]])
    rows = sample.draw(lambda new: torch.tensor(next(logits)), torch.zeros(2, 1, dtype=int), 9, end=0, temperature=0)
    assert [row.tolist() for row in rows] == [[1, 0], [0, 1]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = train_gpt.parse_config(SMALL)
    trainer = train_gpt.Trainer(config, torch.device("cpu"))
    texts = dict(format=train_gpt.CHECKPOINT_FORMAT, config=train_gpt.json.dumps(dataclasses.asdict(config)))
    for step in (5, 10):
        save_tensors(folder / "one.checkpoints" / f"step-{step:06d}.safetensors", trainer.state(), texts)
    return folder


def written(capsys, *arguments):
    assert train_gpt.main(["sample", *map(str, arguments), "--max_new_tokens=3", "--device=cpu"]) == 0
    return capsys.readouterr()


def test_a_checkpoint_is_a_file_a_folder_or_a_name(runs, monkeypatch, capsys):
    newest = runs / "one.checkpoints" / "step-000010.safetensors"
    monkeypatch.chdir(runs.parent)
    for name in (newest, newest.parent, runs, runs / "one", runs / "one.json", runs / "one.txt"):
        assert find_checkpoint(str(name)) == newest
    assert find_checkpoint("one", "none", str(runs)) == newest
    with pytest.raises(CheckpointError, match="none: no checkpoint, no folder of checkpoints, and no run"):
        find_checkpoint("none")
    (runs / "two.checkpoints").mkdir()
    (runs / "two.checkpoints" / newest.name).touch()
    with pytest.raises(CheckpointError, match=r"holds several runs \(one, two\); name one"):
        find_checkpoint(str(runs))
    (runs / "two.checkpoints" / newest.name).unlink()
    assert written(capsys, runs / "one", "--prompt=abc").out.startswith("abc")


def test_prompts_from_a_file_and_from_standard_input(runs, tmp_path, capsys, monkeypatch):
    (tmp_path / "prompts.txt").write_text("first\n\nzwö\n", encoding="utf-8-sig")
    text = written(capsys, runs / "one", f"--prompts={tmp_path / 'prompts.txt'}", "--num_samples=2").out
    assert [part.strip()[:3] for part in text.split("-" * 40)] == ["fir", "fir", "zwö", "zwö"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped\n")))
    assert written(capsys, runs / "one", "--prompts=-").out.startswith("piped")


def test_a_prompt_that_is_cut_is_said(runs, capsys):
    told = written(capsys, runs / "one", "--prompt=" + "x" * 100)
    assert "the prompt has 100 tokens, the model was trained on sequences of 64: it is given the last 63" in told.err
    assert written(capsys, runs / "one", "--prompt=" + "x" * 63).err == ""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top_p=0"], "--top_p=0.0: above 0 and at most 1"),
        (["--temperature=-1"], "--temperature=-1.0: at least 0"),
        (["--temperature=nan"], "a finite number"),
        (["--num_samples=0"], "at least 1"),
        (["--prompt=\udcff"], "--prompt: not UTF-8 text at character 0"),
        (["--prompts=none.txt"], "No such file"),
        (["--prompts=none.txt", "--prompt=x"], "give one of them"),
        (["--tempurature=1"], "did you mean --temperature"),
        (["another"], "2 checkpoints were named"),
    ],
)
def test_what_makes_no_sense_is_refused(runs, words, message, capsys):
    assert train_gpt.main(["sample", str(runs / "one"), *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("how", [(1e-320, 0, 1.0), (1e-38, 0, 1.0), (1e-29, 0, 1.0), (1.0, 0, 1e-300)])
def test_least_temperature_and_least_top_p_take_the_likeliest(how):
    logits_BV = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)) * 30
    assert torch.equal(sample.pick(logits_BV, *how), logits_BV.argmax(-1))


def test_help(capsys):
    assert train_gpt.main(["sample", "--help"]) == 0
    assert "--top_p=0.95" in capsys.readouterr().out


@pytest.mark.slow
def test_800_tokens_take_about_four_times_as_long_as_200():
    model = train_gpt.GPT(train_gpt.parse_config(["--preset=nano", "--device=cpu"])).eval()

    def seconds(count):
        before = time.perf_counter()
        assert len(list(sample.generate(model, [5], count, never=[0]))) == count
        return time.perf_counter() - before

    seconds(50)
    assert min(seconds(800) for _ in range(3)) < 6 * min(seconds(200) for _ in range(3))


def test_usage_is_an_error_of_ours():
    with pytest.raises(UsageError, match="0 checkpoints"):
        sample.sample_command([], None)
