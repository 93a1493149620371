"""The shared table of n-grams (`ngram_rows`): its formula and its updates in float64, its ways between processes."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from small_runs import folder_of, in_worlds, losses, tokens

import train_gpt
from train_gpt import CHECKPOINT_FORMAT as FORMAT
from trainer.checkpoints import load_tensors
from trainer.ngram_table import NAME, SIGNS, NGramTable

CPU = torch.device("cpu")
MULTIPLIER, PRIME, ROWS, EOS = 1_000_003, 2**31 - 1, 64, 7

SMALL = f"""--preset=nano-plain --num_layers=3 --model_dim=16 --num_heads=1 --unet_skips=0>1 --long_window_layers=0,2
--block_tokens=16 --vocab_size=60 --eos_id={EOS} --num_iterations=8 --tokens_per_step=128 --train_seq_len=32
--val_seq_len=32 --val_tokens=96 --ngram_rows={ROWS} --device=cpu --val_loss_every=2 --warmup_steps=2
--checkpoint_every=2 --keep_checkpoints=0 --run_name=run""".split()


def trainer_config(*more):
    return train_gpt.parse_config([*SMALL, *more])


def trainer_of(*more):
    """With a head that is not zero: through that one no gradient flows."""
    trainer = train_gpt.Trainer(trainer_config(*more), CPU)
    torch.nn.init.normal_(trainer.model.head_w, std=0.1)
    return trainer


def drawn(length, seed):
    found = torch.randint(8, 60, (length,), generator=torch.Generator().manual_seed(seed))
    found[::11] = EOS
    return found


def rows_of(tokens):
    """Of each position the rows of pair and triple, one after the other; before a document there are ends of text."""
    found, x = [], [int(token) for token in tokens]
    for t in range(len(x)):
        start = max((i for i in range(t + 1) if x[i] == EOS), default=0)
        back = [x[t - k] if t - k >= start else EOS for k in range(3)]
        pair = (back[0] * MULTIPLIER + back[1]) % PRIME
        triple = (pair * MULTIPLIER + back[2]) % PRIME
        found.append((pair % (ROWS // 2), ROWS // 2 + triple % (ROWS // 2)))
    return found


def signs_of(tokens, signs):
    x = [0, *(int(token) for token in tokens)]
    return [signs[(x[t] ^ x[t + 1]) % SIGNS].double() for t in range(len(x) - 1)]


def test_a_position_gets_the_signed_sum_of_its_rows():
    table = trainer_of().model.techniques.ngrams
    torch.nn.init.normal_(table.weight)
    x, weight = drawn(40, 1), table.weight.double()
    found = table(x[None])[0].double()
    assert table.signs.shape == (SIGNS, 16) and set(table.signs.unique().tolist()) == {-1, 1}
    for t, ((pair, triple), sign) in enumerate(zip(rows_of(x), signs_of(x, table.signs))):
        torch.testing.assert_close(found[t], sign * (weight[pair] + weight[triple]), rtol=1e-6, atol=1e-6)


def test_updates_are_those_of_a_whole_gradient_row_by_row():
    """Six steps of four sequences, Adam on every second: weights and numbers of all rows against float64, whose
    gradient with respect to the whole table comes from autograd through a plain look-up."""
    trainer = trainer_of("--adam_every=2", "--lr_schedule=1,2", "--cooldown_frac=0.5", "--adam_eps=1e-8")
    table, c = trainer.model.techniques.ngrams, trainer.config
    torch.nn.init.normal_(table.weight, std=0.1)
    table(drawn(3, 0)[None])  # draws the signs
    weight, total = table.weight.detach().double(), torch.zeros(ROWS, 16, dtype=torch.float64)
    second, count = (torch.zeros(ROWS, dtype=torch.float64) for _ in range(2))
    for step in range(6):
        batch = [drawn(33, 10 * step + i) for i in range(4)]
        if step in (2, 3):  # a row that is not touched keeps its state
            batch = [torch.full((33,), 9)] * 4
        for x in batch:
            whole = table.weight.detach().clone().requires_grad_()
            rows = torch.tensor(rows_of(x[:-1]))
            sign = torch.stack(signs_of(x[:-1], table.signs))
            n = (whole[rows].sum(1) * sign.float())[None]
            loss = trainer.model(x[None, :-1], x[None, 1:], window_blocks=train_window(trainer, step), ngrams=n)
            total += torch.autograd.grad(loss / 4, whole)[0].double()
        trainer.step(step, [(x[:-1].int(), x[1:]) for x in batch])
        if step % 2 == 0:
            torch.testing.assert_close(table.weight.double(), weight, rtol=1e-6, atol=1e-6)
            continue
        lr = c.ngram_lr * train_gpt.schedule.learning_rate_factor(step, c)
        for row in range(ROWS):
            s = float(total[row].square().mean())
            if s > 0:
                count[row] += 1
                second[row] = c.adam_beta2 * second[row] + (1 - c.adam_beta2) * s
                root = math.sqrt(second[row] / (1 - c.adam_beta2 ** float(count[row])))
                weight[row] -= lr * total[row] / (root + 1e-8)
        assert (int((total.abs().sum(1) > 0).sum()) < ROWS) == (step == 3)
        total.zero_()
        torch.testing.assert_close(trainer.rows.count.double(), count)
        torch.testing.assert_close(trainer.rows.second.double(), second, rtol=1e-3, atol=1e-12)
        torch.testing.assert_close(table.weight.double(), weight, rtol=2e-3, atol=2e-4)


def train_window(trainer, step):
    return train_gpt.schedule.window_blocks_at(step, trainer.config)


def test_no_later_token_and_no_other_document_moves_a_row():
    table = trainer_of().model.techniques.ngrams
    torch.nn.init.normal_(table.weight)
    x = drawn(44, 1)
    later, earlier = x.clone(), x.clone()
    later[20:], earlier[:11] = drawn(44, 2)[20:], drawn(44, 3)[:11]
    before, after, border = table(x[None])[0], table(later[None])[0], table.picks(earlier)
    assert torch.equal(before[:20], after[:20]) and not torch.equal(before[20:], after[20:])
    assert int(x[11]) == EOS and torch.equal(table.picks(x)[11:], border[11:])
    signed = table(earlier[None])[0]
    assert torch.equal(before[12:], signed[12:])  # the sign of the opening itself is by the token before it


def test_the_model_looks_up_what_the_trainer_fetches():
    trainer, x = trainer_of(), drawn(32, 4)
    torch.nn.init.normal_(trainer.model.techniques.ngrams.weight)
    with torch.no_grad():
        fetched = trainer.rows.fetch(x.int())
        alone, given = trainer.model(x[None]), trainer.model(x[None], **fetched)
    assert torch.equal(alone, given) and trainer.rows.lent == []
    table = trainer.model.techniques.ngrams.weight
    with torch.no_grad():
        table.zero_()
        assert not torch.equal(trainer.model(x[None]), alone)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    parts = [np.where(part == 0, EOS, part % 60).astype(np.uint16) for part in (tokens(3000), tokens(300, 1))]
    return folder_of(tmp_path_factory.mktemp("ngrams") / "data", parts[0], val=parts[1])


def words(shards, out, *more):
    files = [f"--train_files={shards}/train_*.bin", f"--val_files={shards}/val_*.bin", f"--output_dir={out}"]
    return list({word.partition("=")[0]: word for word in [*SMALL, *files, *more]}.values())


def state_of(folder, name="run", step=8):
    return load_tensors(folder / f"{name}.checkpoints/step-{step:06d}.safetensors", FORMAT)[1]


def test_a_run_resumes_bit_for_bit_and_is_evaluated_alone(shards, tmp_path, capsys):
    more = ["--adam_every=2", "--log_words=grad_norm"]
    assert train_gpt.main(words(shards, tmp_path, *more)) == 0
    first, whole = losses(tmp_path / "run.txt"), state_of(tmp_path)
    assert whole[f"model.{NAME}"].any() and whole[f"rows.count.{NAME}"].any()
    for path in (tmp_path / "run.checkpoints").glob("*.safetensors"):
        if int(path.stem.removeprefix("step-")) > 4:
            path.unlink()
    assert train_gpt.main(words(shards, tmp_path, *more, "--resume=auto", "--warmup_steps=0")) == 0
    assert losses(tmp_path / "run.txt") == first
    again = state_of(tmp_path)
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())
    capsys.readouterr()
    path = str(tmp_path / "run.checkpoints/step-000008.safetensors")
    assert train_gpt.main(["evaluate", path, "--device=cpu", f"--val_files={shards}/val_*.bin"]) == 0
    assert f"loss {float(first[-1][2]):.5f}" in capsys.readouterr().out


def test_two_and_four_processes_train_as_one_does(shards, tmp_path):
    """96 validation tokens are three sequences: on two and four processes some have none while others ask for rows."""
    ways = [[1], [2, "--communication=overlap"], [4, "--communication=plain"]]
    in_worlds(words(shards, tmp_path), ways, double=True)
    one, *others = (losses(tmp_path / f"world{world}.txt") for world in (1, 2, 4))
    whole = state_of(tmp_path, "world1")
    for world, other in zip((2, 4), others):
        assert [row[:2] for row in other] == [row[:2] for row in one]
        assert max(abs(float(a[2]) - float(b[2])) for a, b in zip(one, other)) <= 1e-6
        found = state_of(tmp_path, f"world{world}")
        assert torch.equal(found[f"rows.count.{NAME}"], whole[f"rows.count.{NAME}"])
        torch.testing.assert_close(found[f"model.{NAME}"], whole[f"model.{NAME}"], rtol=1e-6, atol=1e-6)


def test_a_share_of_the_table_does_not_pass_for_all_of_it(monkeypatch):
    monkeypatch.setattr("trainer.ngram_table.world_size", lambda: 2)
    table = trainer_of().model.techniques.ngrams
    assert table.weight.shape == (ROWS // 2, 16)
    with pytest.raises(RuntimeError, match="a share of the n-gram table"):
        table(drawn(8, 1)[None])
    with pytest.raises(train_gpt.UsageError, match="ngram_rows=72: a multiple of twice the 5 processes"):
        monkeypatch.setattr("trainer.ngram_table.world_size", lambda: 5)
        NGramTable(dataclasses.replace(trainer_config(), ngram_rows=72), torch.float32)


def test_a_table_that_does_not_divide_is_refused():
    with pytest.raises(train_gpt.UsageError, match="ngram_rows=40: a multiple of 16"):
        train_gpt.parse_config(["--preset=nano", "--ngram_rows=40"])
