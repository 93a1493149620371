"""Learning-rate sweep: the same short run at rates whose exponents are evenly spaced.

    python -m lab.sweep --model=mlp --data=names --steps=200 --low=-4 --high=0 --count=9

Every rate trains from the same initial weights on the same batches. The suggestion is the rate with the least
validation loss; runs whose loss is not finite, or above uniform guessing, count as diverged. Test data are not read.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lab import LabError, cli, plots
from lab.cli import setting
from lab.datasets import Corpus, row_batches
from lab.models import build_model
from lab.models.initial import initialise_
from lab.runlog import write_json
from lab.train import ScheduledAdamW, TrainConfig, corpus_of, evaluate, parse, read, use_threads

# Fields of lab.train that a sweep would not read.
UNREAD = {"seeds", "resume", "overwrite", "keep", "val_every", "log_every", "checkpoints", "diagnostics", "test"}
UNREAD |= {"learning_rate", "repeat_batches"}


@dataclass(frozen=True)
class Rates:
    """The rates of a sweep; fields of lab.train may stand beside them, but UNREAD."""

    low: float = setting(-4.0, "exponent", "of ten: the least rate", at_least=-12, at_most=6)
    high: float = setting(0.0, "exponent", "of ten: the greatest rate", at_least=-12, at_most=6)
    count: int = setting(9, "rates", "evenly spaced in the exponent", at_least=2, at_most=1000)


@dataclass(frozen=True)
class Sweep:
    """Rates, the validation loss of each (None: diverged) and the suggestion."""

    exponents: list[float]
    losses: list[float | None]
    suggestion: float
    uniform_loss: float


def one_run(config: TrainConfig, fields: Any, corpus: Corpus, rate: float) -> float:
    """Validation loss after `config.steps` steps at a peak learning rate of `rate`; nothing is written."""
    config = dataclasses.replace(config, learning_rate=rate)
    torch.manual_seed(config.seed)
    if hasattr(fields, "muon_lr"):  # the GPT's rates keep their proportions; `rate` is that of its matrices
        factor = rate / fields.muon_lr
        scaled = {name: getattr(fields, name) * factor for name in ("muon_lr", "head_lr", "embed_lr", "scalar_lr")}
        fields = dataclasses.replace(fields, **scaled)
    model = build_model(config.model, corpus.tokenizer.vocab_size, fields)
    initialise_(model, config.initial)
    own = hasattr(model, "make_optimizer")
    optimizer = model.make_optimizer(config.steps) if own else ScheduledAdamW(model, config)
    rows = max(1, config.batch_tokens // config.row_tokens)
    batches = row_batches(corpus.tokens["train"], config.row_tokens, rows, config.seed)
    for step in range(config.steps):
        loss = model(*next(batches))[1]
        if not torch.isfinite(loss):
            return math.inf
        loss.backward()
        optimizer.step(step)
        model.zero_grad(set_to_none=True)
    return evaluate(model, corpus.tokens["val"], config.row_tokens, config.val_tokens)


def sweep(config: TrainConfig, fields: Any, corpus: Corpus, low: float, high: float, count: int) -> Sweep:
    """Run `count` rates 10^low .. 10^high. LabError if none of them learns."""
    if config.model == "counts":
        raise LabError("counting has no learning rate; sweep another model")
    if count < 2 or low >= high:
        raise LabError(f"a sweep needs --low={low} below --high={high} and --count={count} of at least 2")
    exponents = [low + i * (high - low) / (count - 1) for i in range(count)]
    uniform = math.log(corpus.tokenizer.vocab_size)
    losses = [one_run(config, fields, corpus, 10**e) for e in exponents]
    kept = [loss if math.isfinite(loss) and loss < uniform else None for loss in losses]
    learned = [(loss, e) for loss, e in zip(kept, exponents) if loss is not None]
    if not learned:
        raise LabError(f"no rate from 1e{low:g} to 1e{high:g} learned anything; take more steps or other rates")
    return Sweep(exponents, kept, 10 ** min(learned)[1], uniform)


def draw(found: Sweep, path: Path, title: str) -> Path:
    """The curve of loss over rate, the suggestion marked, diverged rates as crosses on top."""
    fig, ax = plots.figure(size=(7, 4))
    good = [(10**e, loss) for e, loss in zip(found.exponents, found.losses) if loss is not None]
    bad = [10**e for e, loss in zip(found.exponents, found.losses) if loss is None]
    ax.plot([r for r, _ in good], [loss for _, loss in good], "o-", color=plots.color(0))
    top = max(loss for _, loss in good)
    if bad:
        ax.plot(bad, [top] * len(bad), "x", color=plots.color(1), label="diverged, or worse than guessing")
    best = min(loss for _, loss in good)
    label = f"suggestion {found.suggestion:.2g}"
    ax.plot([found.suggestion], [best], "o", markersize=12, markerfacecolor="none", color=plots.color(1), label=label)
    ax.set_xscale("log")
    ax.set_xlabel("peak learning rate")
    ax.set_ylabel("validation loss, nats a token")
    ax.set_title(title)
    ax.legend()
    return plots.save(fig, path)


def main(words: list[str]) -> int:
    """The command line; returns the exit code."""
    if cli.wants_help(words):
        print(__doc__, cli.describe(Rates))
        return 0
    if read(words, Rates)[1].get("model") == "counts":
        raise LabError("--model=counts counts and has no learning rate to sweep")
    config, fields, where, rates = parse(words, {"steps": "200"}, Rates)
    if unread := sorted(read(words, Rates)[1].keys() & UNREAD):
        raise LabError(f"--{unread[0]} has no part in a sweep, whose short runs have one seed and leave nothing behind")
    use_threads(where)
    folder = Path(where.output_dir or f"lab/out/sweep-{config.data}-{config.model}")
    found = sweep(config, fields, corpus_of(config), rates.low, rates.high, rates.count)
    for e, loss in zip(found.exponents, found.losses):
        print(f"rate {10**e:.3g}: {'diverged' if loss is None else f'{loss:.4f}'}")
    write_json(folder / "sweep.json", dataclasses.asdict(found) | {"config": dataclasses.asdict(config)})
    draw(found, folder / "sweep.png", f"{config.model} on {config.data}, {config.steps} steps a rate")
    rate = "muon_lr" if config.model == "gpt" else "learning_rate"
    print(f"suggestion: --{rate}={found.suggestion:.3g}; curve in {folder / 'sweep.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
