"""`adam_period`: value and bigram tables that update less often than all else, against a literal Adam in float64."""

import dataclasses

import pytest
import torch
from small_runs import folder_of, in_worlds, losses, tokens

import train_gpt
from train_gpt import CHECKPOINT_FORMAT as FORMAT
from train_gpt import Trainer
from trainer import schedule
from trainer.checkpoints import load_tensors

CPU = torch.device("cpu")
SLOW = ("value_embeds.0.weight", "value_embeds.1.weight", "techniques.bigram_embed.weight")

RUN = """--preset=nano-frontier --num_iterations=16 --tokens_per_step=256 --train_seq_len=64 --val_seq_len=64
--val_tokens=128 --val_loss_every=4 --checkpoint_every=4 --keep_checkpoints=0 --warmup_steps=2 --num_layers=3
--model_dim=32 --unet_skips=0>1 --long_window_layers=0,2 --key_offset=0,2 --late_attention_source=0 --dynamic_skips=0,1
--bigram_rows=512 --paired_heads=1 --ngram_rows=0 --dynamic_gates=-1 --head_mixing=false --log_words=grad_norm
--adam_period=4 --adam_period_from=0.25 --device=cpu --run_name=run""".split()


def config_of(*more):
    return train_gpt.parse_config(list({word.partition("=")[0]: word for word in [*RUN, *more]}.values()))


def test_steps_of_the_tables():
    """Every second until a quarter of the run is done, rounded up to a period, then every fourth."""
    c = config_of()
    found = [step for step in range(16) if schedule.tables_step(step, c)]
    assert found == [1, 3, 7, 11, 15]
    later = dataclasses.replace(c, adam_period_from=0.3)  # step 4.8, hence 8: no update is on half of a sum
    assert [step for step in range(16) if schedule.tables_step(step, later)] == [1, 3, 5, 7, 11, 15]
    off = dataclasses.replace(c, adam_period=0)
    assert [step for step in range(6) if schedule.tables_step(step, off)] == [1, 3, 5]


class LiteralTable:
    """Adam on one table: pairs of steps up to step 3, then fours, betas squared and decay doubled."""

    def __init__(self, p, rate, b1, b2, decay):
        self.p, self.m, self.v = p.double().clone(), 0.0, 0.0
        self.constants, self.sum, self.left1, self.left2 = (rate, b1, b2, decay), 0.0, 1.0, 1.0

    def take(self, step, g, f):
        (rate, b1, b2, decay), self.sum = self.constants, self.sum + g.double()
        if step not in (1, 3, 7, 11, 15):
            return
        if step > 3:
            b1, b2, decay = b1 * b1, b2 * b2, 2 * decay
        self.m = b1 * self.m + (1 - b1) * self.sum
        self.v = b2 * self.v + (1 - b2) * self.sum**2
        self.left1, self.left2 = self.left1 * b1, self.left2 * b2  # what of the moments still is their zero beginning
        u = rate * f * (self.m / (1 - self.left1)) / ((self.v / (1 - self.left2)).sqrt() + 1e-8)
        self.p = self.p - u - (rate * f) ** 2 * decay * self.p * (u * self.p > 0)
        self.sum = 0.0


def tables_agree():
    trainer, generator = Trainer(config_of(), CPU), torch.Generator().manual_seed(1)
    named = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name in SLOW:
            named[name].normal_(generator=generator)
    rules = {name: (0.1, *((0.75, 0.95) if "bigram" in name else (0.8, 0.95)), 0.025) for name in SLOW}
    literal = {name: LiteralTable(named[name].detach(), *rules[name]) for name in SLOW}
    others = {n: p for n, p in named.items() if n not in SLOW}
    for step in range(16):
        before = {n: p.detach().clone() for n, p in others.items()}
        drawn = {n: torch.randn(p.shape, generator=generator) for n, p in named.items()}
        for name, p in named.items():
            p.grad = drawn[name].clone() if p.grad is None else p.grad + drawn[name]
        f = schedule.learning_rate_factor(step, trainer.config)
        trainer.update(step)
        for name in SLOW:
            literal[name].take(step, drawn[name], f)
            torch.testing.assert_close(named[name].double(), literal[name].p, rtol=1e-4, atol=1e-5)
            assert (named[name].grad is None) == (step in (1, 3, 7, 11, 15)), (step, name)
        for name in ("head_w", "scalars", "embed2.weight"):  # every second step as ever
            assert torch.equal(before[name], named[name]) == (step % 2 == 0), (step, name)


def test_tables_equal_the_literal_ones():
    tables_agree()


def betas_as_ever(monkeypatch):
    monkeypatch.setattr("trainer.adam.stretched", lambda step, config: 1)


def gradients_are_forgotten(monkeypatch):
    update = Trainer.update

    def forgetful(self, step):
        update(self, step)
        if schedule.adam_steps(step, self.config):
            self.model.zero_grad(set_to_none=True)

    monkeypatch.setattr(Trainer, "update", forgetful)


def updates_come_early(monkeypatch):
    monkeypatch.setattr(schedule, "tables_step", schedule.adam_steps)


@pytest.mark.parametrize("plant", [betas_as_ever, gradients_are_forgotten, updates_come_early])
def test_a_fault_in_it_is_seen(plant, monkeypatch):
    plant(monkeypatch)
    with pytest.raises((AssertionError, AttributeError)):
        tables_agree()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return folder_of(tmp_path_factory.mktemp("period") / "data", tokens(9000), val=tokens(600, 1))


def words(shards, out, *more):
    files = [f"--train_files={shards}/train_*.bin", f"--val_files={shards}/val_*.bin", f"--output_dir={out}"]
    return list({word.partition("=")[0]: word for word in [*RUN, *files, *more]}.values())


def test_a_run_resumes_bit_for_bit(shards, tmp_path):
    """Warm-up leaves no waiting gradient behind, either."""
    assert train_gpt.main(words(shards, tmp_path, "--ema_nesterov=0.6")) == 0
    first, folder = losses(tmp_path / "run.txt"), tmp_path / "run.checkpoints"
    last = load_tensors(folder / "step-000016.safetensors", FORMAT)[1]
    for path in folder.glob("*.safetensors"):
        if int(path.stem.removeprefix("step-")) > 8:
            path.unlink()
    again = words(shards, tmp_path, "--ema_nesterov=0.6", "--resume=auto", "--warmup_steps=0")
    assert train_gpt.main(again) == 0
    assert losses(tmp_path / "run.txt") == first
    again = load_tensors(folder / "step-000016.safetensors", FORMAT)[1]
    assert all(torch.equal(again[name], tensor) for name, tensor in last.items())


def test_processes_train_as_one_does(shards, tmp_path):
    """Tables that wait are not sent, by neither way; gradients' norms, which count what is updated, agree, too."""
    ways = [[1], [2, "--communication=overlap"], [4, "--communication=plain"]]
    in_worlds(words(shards, tmp_path, "--ema_nesterov=0.6"), ways, double=True)
    one, *others = (losses(tmp_path / f"world{world}.txt") for world in (1, 2, 4))
    norms = [
        [word for line in (tmp_path / f"world{world}.txt").read_text().splitlines() for word in line.split()
         if word.startswith("grad_norm:")] for world in (1, 2, 4)
    ]  # fmt: skip
    for other, norm in zip(others, norms[1:]):
        assert [row[:2] for row in other] == [row[:2] for row in one]
        assert max(abs(float(a[2]) - float(b[2])) for a, b in zip(one, other)) <= 1e-6
        assert len(norm) == 16 and norm == norms[0]


def test_waiting_tables_are_not_sent(monkeypatch):
    """Counted in two processes' own exchange: a table's group goes only where it updates, with the rows of all its
    batches since."""
    import torch.distributed as dist

    from trainer.exchange import GradientExchange

    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    table, slow = (torch.nn.Parameter(torch.zeros(4096, 2)) for _ in range(2))
    made = GradientExchange({}, {"a": table, "b": slow}, {}, {}, slow={"b"})
    ids = [torch.arange(n, n + 4) for n in (0, 1000, 2000)]
    monkeypatch.setattr("trainer.exchange.ROWS_MULTIPLE", 1)
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    made.begin([ids[0]], slow=False)
    assert [tables for tables, _ in made.going] == [[table]]
    made.begin([ids[1]], slow=False)
    made.begin([ids[2]])
    assert [tables for tables, _ in made.going] == [[table], [slow]]
    of_a, of_b = (set(rows.tolist()) for _, rows in made.going)
    assert of_b == {int(token) for part in ids for token in part} and of_a == set(ids[2].tolist())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--adam_period=3"], "adam_period=3: a multiple of --adam_every=2"),
        (["--num_iterations=18"], "num_iterations=18: a multiple of --adam_period=4"),
        (["--checkpoint_every=2"], "checkpoint_every=2: a multiple of --adam_period=4"),
        (["--value_embeddings=0", "--bigram_rows=0", "--value_gates=false"], "no value or bigram tables"),
        (["--adam_period_from=1.5"], "adam_period_from"),
    ],
)
def test_periods_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(train_gpt.UsageError, match=message):
        config_of(*arguments)
