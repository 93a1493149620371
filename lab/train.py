"""Train a rung of the ladder.

    python -m lab.train --model=mlp --data=names                      # on the embedded corpus
    python -m lab.train --model=gpt --data=text --path=book.txt --steps=2000 --num_layers=4
    python -m lab.train --model=wavenet --data=names --seeds=0-4      # a series: five runs, five seeds

Fields of training and of the model are both given as --field=value; --help lists them. A run leaves
<output_dir>/runs/seed-000.{txt,json} and checkpoints beside them. The checkpoint with the least validation
loss is kept as best.safetensors (with --keep=last the last one is read instead); with --test=true it, and only it, is
scored once on the whole test split.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

import lab.models.base  # noqa: F401  (its source is part of the log)
from lab import LabError, cli
from lab.checkpoints import load_tensors, save_checkpoint, save_tensors
from lab.cli import setting
from lab.datasets import KINDS, SPLIT_KINDS, Corpus, Tokens, load_corpus, overlap, pack_rows, row_batches
from lab.diagnostics import Diagnostics
from lab.memory import refuse_batch
from lab.models import IGNORE, LADDER, LanguageModel, build_model, fields_class
from lab.models.initial import different_units, initialise_, parse_initial
from lab.runlog import RunLog, finite, sources_of
from records.runner import run_name
from trainer.processes import StopRequest

KEEP = ("best", "last")
TOKEN_KINDS = ("char", "word", "byte")
MOST_SEEDS = 10_000  # of a series
EVAL_TOKENS = 16384  # tokens a batch of evaluation; only memory depends on it


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    model: str = setting("mlp", "name", "rung of the ladder", choices=LADDER)
    data: str = setting("names", "name", "how the corpus is read: one a line, passages, cleaned stories", choices=KINDS)
    path: str = setting("", "file", "corpus, UTF-8, or CSV or JSON lines with texts under 'text'; '': the embedded one")
    tokens: str = setting("char", "name", "what a token is", choices=TOKEN_KINDS)
    split: str = setting("documents", "name", "unique: copies of a document stay together", choices=SPLIT_KINDS)
    steps: int = setting(0, "steps", "of the optimizer; 0: the model's default", at_least=0, below=1 << 31)
    batch_tokens: int = setting(0, "tokens", "a step, cut in rows; 0: the model's default", at_least=0, at_most=1 << 24)
    row_tokens: int = setting(
        0, "tokens", "a row of packed documents; 0: the model's default", at_least=0, at_most=1 << 20
    )
    repeat_batches: int = setting(
        0, "batches", "the first so many alone, over and over: can the model learn them by heart? 0: all", at_least=0
    )
    learning_rate: float = setting(0.0, "rate", "peak, of AdamW; 0: the model's default", at_least=0, at_most=1e4)
    weight_decay: float = setting(0.01, "rate", "of AdamW, matrices only", at_least=0, at_most=1e4)
    schedule: str = setting("linear", "name", "of the rate: linear ends, or one step down", choices=("linear", "step"))
    warmup_frac: float = setting(0.02, "fraction", "of the steps in which the rate rises from 0", at_least=0, below=1)
    cooldown_frac: float = setting(0.7, "fraction", "of the steps, at the end, of its fall to 0", above=0, at_most=1)
    drop_at: float = setting(0.5, "fraction", "of the steps after which schedule=step goes down", above=0, below=1)
    drop_to: float = setting(0.1, "factor", "on the rate from there on", at_least=0, at_most=1)
    initial: str = setting("", "name", "uniform:LOW:HIGH, normal:STD or constant:VALUE; '': the model's own")
    keep: str = setting(
        "best", "name", "the checkpoint that is scored and read: by validation, or the last", choices=KEEP
    )
    val_every: int = setting(0, "steps", "between validations; 0: twenty times a run", at_least=0)
    val_tokens: int = setting(
        100_000, "tokens", "of validation scored at each of them (0: all); the kept checkpoint on all", at_least=0
    )
    log_every: int = setting(0, "steps", "between lines of training loss; 0: a hundred a run", at_least=0)
    checkpoints: int = setting(
        10, "files", "along training, closer at the start; the first is at step 0", at_least=1, at_most=10_000
    )
    diagnostics: bool = setting(False, "flag", "histograms and update-to-weight ratios along training, JSON and PNG")
    test: bool = setting(False, "flag", "score the kept checkpoint once on the whole test split")
    seed: int = setting(0, "number", "of the initial weights and the order of the data", at_least=0, below=1 << 63)
    split_seed: int = setting(
        0, "number", "of the split of documents; keep it fixed to compare models", at_least=0, below=1 << 63
    )
    limit_chars: int = setting(0, "characters", "of the corpus, its first so many; 0: all", at_least=0)


@dataclass(frozen=True)
class Where:
    """Where a run goes, and how it is started."""

    output_dir: str = setting("", "folder", "'': lab/out/DATA-MODEL")
    seeds: str = setting("", "numbers", "0-4 or 0,3,7: a run each; '': --seed alone")
    resume: bool = setting(False, "flag", "go on where an interrupted run stopped")
    overwrite: bool = setting(False, "flag", "replace a run that is there")
    threads: int = setting(0, "threads", "of the CPU; 0: torch's choice", at_least=0, at_most=1024)


_MACHINE_FIELDS = ("path",)  # where the corpus lies does not change what a run computes: data_hash says what it is

# Defaults by rung: (steps, batch_tokens, row_tokens, learning_rate)
_DEFAULTS = {
    "counts": (1, 8192, 256, 1.0),
    "bigram": (400, 8192, 256, 0.1),
    "mlp": (4000, 2048, 256, 3e-3),
    "batchnorm": (4000, 2048, 256, 3e-3),
    "wavenet": (4000, 2048, 256, 3e-3),
    "recurrent": (1500, 4096, 64, 3e-3),
    "gpt": (1000, 4096, 1024, 0.0),
}


# Settings that a rung has no use for, and why. Given all the same they are refused: they would change nothing.
_ADAMW = ("learning_rate", "weight_decay", "schedule", "warmup_frac", "cooldown_frac", "drop_at", "drop_to")
_UNUSED = {
    "gpt": (_ADAMW, "the GPT has train_gpt.py's optimizers and their schedule; see --muon_lr, --head_lr, --embed_lr"),
    "counts": (
        (*_ADAMW, "steps", "batch_tokens", "val_every", "log_every", "repeat_batches", "initial"),
        "counting is one pass over the corpus",
    ),
}


def _refuse_unused(config: TrainConfig) -> None:
    """LabError for the first setting that is neither its default nor what `complete` makes of it, but unused."""
    names, why = _UNUSED.get(config.model, ((), ""))
    unused = dict.fromkeys(names, f"--model={config.model}: {why}")
    if not unused:
        linear = config.schedule == "linear"
        other = ("drop_at", "drop_to") if linear else ("warmup_frac", "cooldown_frac")
        unused = dict.fromkeys(other, f"--schedule={config.schedule}")
    steps, batch, _, rate = _DEFAULTS[config.model]
    made = {"steps": steps, "batch_tokens": max(batch, config.row_tokens), "learning_rate": rate}
    made |= {"val_every": 1, "log_every": 1}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in unused and value not in (field.default, made.get(field.name)):
            raise LabError(f"--{field.name}={value} has no part in a training with {unused[field.name]}")


def complete(config: TrainConfig) -> TrainConfig:
    """`config` with zeros replaced by the model's defaults, checked. LabError names the field at fault."""
    fields_class(config.model)  # refuses an unknown rung
    cli.checked(config)
    _refuse_unused(config)
    steps, batch, row, rate = _DEFAULTS[config.model]
    row = config.row_tokens or row
    c = dataclasses.replace(
        config,
        steps=config.steps or steps,
        row_tokens=row,
        batch_tokens=config.batch_tokens or max(batch, row),
        learning_rate=config.learning_rate or rate,
    )
    c = dataclasses.replace(
        c, val_every=c.val_every or max(1, c.steps // 20), log_every=c.log_every or max(1, c.steps // 100)
    )
    if c.model == "counts":  # one pass over the corpus is all there is to it, so there is nothing to choose from
        c = dataclasses.replace(c, steps=1, val_every=1, log_every=1, keep="last")
    if c.row_tokens < 2:
        raise LabError(f"--row_tokens={c.row_tokens}: at least 2, or a row holds no context")
    if c.batch_tokens < c.row_tokens:
        raise LabError(f"--batch_tokens={c.batch_tokens} is less than one row of --row_tokens={c.row_tokens}")
    if c.initial:
        parse_initial(c.initial)
    return c


def rate_factor(step: int, config: TrainConfig) -> float:
    """Share of the peak learning rate at `step` (from 0). schedule=linear: up linearly, constant, then linearly to 0;
    schedule=step: the whole of it, then `drop_to` of it from `drop_at` of the steps on."""
    if config.schedule == "step":
        return config.drop_to if step >= config.drop_at * config.steps else 1.0
    warmup = max(1, round(config.warmup_frac * config.steps))
    return min(1.0, (step + 1) / warmup, (1 - step / config.steps) / config.cooldown_frac)


class ScheduledAdamW:
    """AdamW with the lab's schedule; weight decay on matrices only."""

    def __init__(self, model: LanguageModel, config: TrainConfig):
        self.config = config
        self.named = dict(model.named_parameters())
        self.steps = {n: torch.zeros((), device=p.device) for n, p in self.named.items()}
        self.means, self.squares = ({n: torch.zeros_like(p) for n, p in self.named.items()} for _ in range(2))

    @torch.no_grad()
    def step(self, step: int) -> None:
        """One update from the gradients; torch's, as a function (train_gpt.AdamW says why)."""
        c, rate = self.config, self.config.learning_rate * rate_factor(step, self.config)
        how = dict(amsgrad=False, beta1=0.9, beta2=0.99, eps=1e-8, lr=rate, maximize=False, fused=True)
        for n, p in self.named.items():
            if p.grad is not None:
                given = [p], [p.grad], [self.means[n]], [self.squares[n]], [], [self.steps[n]]
                adamw(*given, **how, weight_decay=c.weight_decay if p.ndim >= 2 else 0.0)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, live."""
        kinds = {"step": self.steps, "exp_avg": self.means, "exp_avg_sq": self.squares}
        return {f"adam.{key}.{n}": kind[n] for n in self.named for key, kind in kinds.items()}


def scored_rows(tokens: Tokens, row_tokens: int, limit_tokens: int = 0) -> tuple[Tensor, Tensor]:
    """(inputs, targets) of the first packed rows that hold `limit_tokens` (one at least; 0: all rows)."""
    idx, targets = pack_rows(tokens, row_tokens)
    rows = max(1, limit_tokens // row_tokens) if limit_tokens else len(idx)
    return idx[:rows], targets[:rows]


@torch.no_grad()
def evaluate(model: LanguageModel, tokens: Tokens, row_tokens: int, limit_tokens: int = 0) -> float:
    """Mean loss in nats over every prediction of `tokens` (or of the first rows that hold `limit_tokens`)."""
    idx, targets = scored_rows(tokens, row_tokens, limit_tokens)
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(idx), max(1, EVAL_TOKENS // row_tokens)):
        batch = slice(start, start + max(1, EVAL_TOKENS // row_tokens))
        scored = int((targets[batch] != IGNORE).sum())
        if scored:
            total += float(model(idx[batch], targets[batch])[1]) * scored
            count += scored
    model.train(was_training)
    return total / count


def checkpoint_steps(steps: int, count: int) -> list[int]:
    """`count` steps from 0 to `steps`, evenly spaced in the logarithm after the first: early training is
    where most happens."""
    if count == 1:
        return [steps]
    first = max(1, steps // 200)
    spaced = [round(first * (steps / first) ** (i / max(count - 2, 1))) for i in range(count - 1)]
    return sorted({0, *spaced, steps})


class Stopped(SystemExit):
    """Training was asked to stop, and has saved its state; the exit code is 128 and the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)


@dataclass
class Result:
    """What a run left behind. Losses in nats a token: `final_loss` that of the last validation, `best_loss` that of
    the kept checkpoint (after `best_step` steps) on the whole split; `test_loss` only if it was asked for."""

    folder: Path
    run_name: str
    final_loss: float
    best_loss: float
    best_step: int
    test_loss: float | None
    model: LanguageModel
    summary: dict[str, Any]

    @property
    def checkpoints(self) -> Path:
        """Folder of the run's checkpoints."""
        return self.folder / "runs" / f"{self.run_name}.checkpoints"


class Run:
    """One training run, step by step."""

    def __init__(self, config: TrainConfig, fields: Any, corpus: Corpus, folder: Path, echo: bool):
        self.config, self.fields, self.corpus, self.folder, self.echo = config, fields, corpus, folder, echo
        self.name = run_name(config.seed)
        torch.manual_seed(config.seed)
        self.model = build_model(config.model, corpus.tokenizer.vocab_size, fields)
        initialise_(self.model, config.initial)
        self._check_context()
        self.optimizer = self._make_optimizer()
        described = {k: v for k, v in dataclasses.asdict(config).items() if k not in _MACHINE_FIELDS}
        described |= {"fields": dataclasses.asdict(fields), "num_parameters": self.model.num_parameters()}
        facts = {"data_hash": corpus.digest, "vocabulary_digest": corpus.tokenizer.digest()}
        modules = [__name__, type(self.model).__module__, "lab.models.base"]
        self.log = RunLog(folder / "runs", self.name, described, facts, sources_of(*modules), echo)
        self.checkpoints = folder / "runs" / f"{self.name}.checkpoints"
        self.seconds = 0.0
        self.best: dict[str, Any] = {"step": -1, "loss": math.inf}
        self.floor, self.overlap = self._floor(), overlap(corpus.documents)
        looks = config.diagnostics and config.model != "counts"  # counting has no gradients to look at
        self.diagnostics = (
            Diagnostics(self.model, corpus.tokenizer.vocab_size, max(1, config.steps // 100)) if looks else None
        )

    def _floor(self) -> float | None:
        """The grammar's own loss on the very text that validations read, which may be a part of the split."""
        val, c = self.corpus.tokens["val"], self.config
        if not c.val_tokens or c.val_tokens >= val.num_predictions + c.row_tokens:
            return self.corpus.floor
        return self.corpus.floor_of(scored_rows(val, c.row_tokens, c.val_tokens)[1])

    def _check_context(self) -> None:
        refuse_batch(self.config.batch_tokens, self.corpus.tokenizer.vocab_size, self.fields)
        smallest = min(t.num_predictions for t in self.corpus.tokens.values())
        needed = self.model.context or 1
        if needed > smallest:
            raise LabError(
                f"a context of {needed} tokens is longer than the text: the smallest split has {smallest} "
                "predictions. Lower --context or give more text"
            )
        if self.config.model == "gpt" and self.config.row_tokens > self.corpus.tokens["train"].num_predictions:
            raise LabError(
                f"--row_tokens={self.config.row_tokens} is longer than the training text of "
                f"{self.corpus.tokens['train'].num_predictions} tokens; lower it or give more text"
            )

    def _make_optimizer(self) -> Any:
        if self.config.model == "counts":
            return None
        if hasattr(self.model, "make_optimizer"):
            return self.model.make_optimizer(self.config.steps)
        return ScheduledAdamW(self.model, self.config)

    def header(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself."""
        return {
            "model": self.config.model,
            "fields": dataclasses.asdict(self.fields),
            "step": step,
            "series": self.folder.name,
            "run_name": self.name,
            "seed": self.config.seed,
            "row_tokens": self.config.row_tokens,
            "data": self.config.data,
            "tokens": self.config.tokens,
            "split": self.config.split,
            "split_seed": self.config.split_seed,
            "kept_by": self.config.keep,
            "path": str(Path(self.config.path).resolve()) if self.config.path else "",
            "limit_chars": self.config.limit_chars,
            "data_hash": self.corpus.digest,
            "config_hash": self.log.config_hash,
        }

    def save(self, step: int, name: str | None = None) -> None:
        """A checkpoint of the model after `step` steps."""
        path = self.checkpoints / (name or f"step-{step:06d}.safetensors")
        save_checkpoint(path, self.model, self.corpus.tokenizer, self.header(step))

    def save_state(self, step: int) -> None:
        """Everything needed to go on: weights, optimizer, validations, generator."""
        state = {"rng": torch.get_rng_state(), **{f"model.{n}": t for n, t in self.model.state_dict().items()}}
        state |= self.optimizer.state() if self.optimizer else {}
        told = {"step": step, "seconds": self.seconds, "validation": self.log.validation, "best": self.best}
        save_tensors(self.checkpoints / "resume.safetensors", state, told | {"config_hash": self.log.config_hash})

    def load_state(self) -> int:
        """Go back to where an interrupted run stopped; returns the steps done."""
        tensors, told = load_tensors(self.checkpoints / "resume.safetensors")
        if told["config_hash"] != self.log.config_hash:
            raise LabError(f"{self.checkpoints}: the run to resume had other settings; repeat its command line")
        torch.set_rng_state(tensors.pop("rng"))
        weights = {n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")}
        self.model.load_state_dict(weights)
        for name, live in (self.optimizer.state() if self.optimizer else {}).items():
            live.copy_(tensors[name])
        self.seconds, self.best = told["seconds"], told["best"]
        self.log.validation[:] = told["validation"]
        self.log.cut_back_to(told["step"])
        return int(told["step"])

    def validate(self, step: int) -> None:
        """Score the validation split, every time the same part of it, or losses would not compare; keep the model if
        it is the best so far."""
        loss = evaluate(self.model, self.corpus.tokens["val"], self.config.row_tokens, self.config.val_tokens)
        if not math.isfinite(loss) and self.config.model != "counts":
            advice = "lower the learning rate" if step else "the initial weights are too large, see --initial"
            raise LabError(f"validation loss is {loss} after step {step}; {advice}")
        self.log.validated(step, 1000 * self.seconds, loss)
        if self.config.keep == "last":
            self.best = {"step": step, "loss": loss}
        elif loss < self.best["loss"]:
            self.best = {"step": step, "loss": loss}
            self.save(step, "best.safetensors")
        self.log.summary("running", best=finite(self.best), floor=self.floor, overlap=self.overlap)

    def train_step(self, step: int, idx: Tensor, targets: Tensor) -> Tensor:
        """One update; returns the loss before it, detached."""
        if self.config.model == "counts":
            whole = pack_rows(self.corpus.tokens["train"], self.config.row_tokens)
            self.model.observe(*whole)
            return self.model(*whole)[1]
        _, loss = self.model(idx, targets)
        loss.backward()
        self.optimizer.step(step)
        self.model.zero_grad(set_to_none=True)
        return loss.detach()

    def train(self, resume: bool = False, overwrite: bool = False, stop_after: int | None = None) -> Result:
        """Train to the end (or, for tests of resuming, to `stop_after`), then choose, and score the test split."""
        c = self.config
        resuming = resume and (self.checkpoints / "resume.safetensors").exists()
        self.log.open(resuming=resuming, overwrite=overwrite)
        start = self.load_state() if resuming else 0
        if not resuming:
            for old in self.checkpoints.glob("*.safetensors"):  # of a run that is overwritten: none may be read as ours
                old.unlink()
            self.tell_split()
        marks = set(checkpoint_steps(c.steps, c.checkpoints))
        batches = self.batches(start)
        self.model.train()
        stop = StopRequest()
        try:
            for step in range(start, c.steps + 1):
                if stop.signal and step < c.steps:
                    self.save_state(step)
                    self.log.summary("interrupted", best=self.best)
                    raise Stopped(stop.signal)
                if step % c.val_every == 0 or step == c.steps:
                    if not self.log.validation or self.log.validation[-1]["step"] < step:
                        self.validate(step)
                if step in marks:
                    self.save(step)
                    if step > start or step == c.steps:
                        self.save_state(step)
                if step == c.steps or step == stop_after:
                    if self.diagnostics:
                        self.diagnostics.before(step, *next(batches), whole=True)
                    break
                idx, targets = next(batches)
                if self.diagnostics:
                    self.diagnostics.before(step, idx, targets, whole=step in marks)
                began = time.perf_counter()
                loss = self.train_step(step, idx, targets)
                self.seconds += time.perf_counter() - began
                if self.diagnostics:
                    self.diagnostics.updated(step)
                if (step + 1) % c.log_every == 0:
                    value = float(loss)
                    if not math.isfinite(value):
                        raise LabError(f"training loss is {value} at step {step + 1}; lower the learning rate")
                    self.log.trained(step + 1, 1000 * self.seconds, value)
            return self.finish(step)
        except LabError as error:
            self.log.summary("failed", str(error))
            raise
        finally:
            stop.restore()
            self.log.close()

    def batches(self, skip: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches from number `skip` on: of the whole corpus, or the first few again and again."""
        c = self.config
        tokens, rows = self.corpus.tokens["train"], max(1, c.batch_tokens // c.row_tokens)
        if not c.repeat_batches:
            return row_batches(tokens, c.row_tokens, rows, c.seed, skip=skip)
        few = list(itertools.islice(row_batches(tokens, c.row_tokens, rows, c.seed), c.repeat_batches))
        return itertools.islice(itertools.cycle(few), skip % c.repeat_batches, None)

    def tell_split(self) -> None:
        """One line in the log: the sizes of the split, and what of it stands in training too."""
        sizes = ", ".join(f"{name} {t.num_predictions:,}" for name, t in self.corpus.tokens.items())
        shares = ", ".join(f"{share:.1%} of {name}" for name, share in self.overlap.items())
        self.log.line(f"predictions: {sizes}; documents that stand in train too: {shares}")

    def finish(self, step: int) -> Result:
        """Load the checkpoint that is kept, score what is asked, write the summary."""
        c = self.config
        complete_run = step == c.steps
        final = self.log.last_loss
        test_loss = None
        if complete_run:
            if c.keep == "best":
                weights, _ = load_tensors(self.checkpoints / "best.safetensors")
                self.model.load_state_dict(weights)
            whole = evaluate(self.model, self.corpus.tokens["val"], c.row_tokens)
            self.best = {"step": self.best["step"], "loss": whole}
            if c.test:
                test_loss = evaluate(self.model, self.corpus.tokens["test"], c.row_tokens)
        self.model.eval()
        if self.diagnostics:
            self.diagnostics.write(self.folder / "diagnostics", self.name)
        tokens_per_s = c.batch_tokens * step / self.seconds if self.seconds else None
        told = self.log.summary(
            "finished" if complete_run else "interrupted",
            best=finite(self.best),
            kept_by=c.keep,
            test_loss=test_loss if test_loss is None or math.isfinite(test_loss) else None,
            floor=self.floor,
            floor_whole=self.corpus.floor,
            overlap=self.overlap,
            num_parameters=self.model.num_parameters(),
            tokens_per_s=tokens_per_s,
            split={name: t.num_predictions for name, t in self.corpus.tokens.items()},
        )
        best = self.best
        return Result(self.folder, self.name, final, best["loss"], best["step"], test_loss, self.model, told)


def train_model(
    config: TrainConfig,
    fields: Any = None,
    *,
    folder: str | Path,
    corpus: Corpus | None = None,
    resume: bool = False,
    overwrite: bool = False,
    echo: bool = False,
) -> Result:
    """Train one run into `folder` (a series folder). `fields` are the model's (default: its defaults);
    `corpus` saves reading it again. Raises LabError for settings or data that make no sense."""
    config = complete(config)
    fields = fields if fields is not None else fields_class(config.model)()
    corpus = corpus or corpus_of(config)
    return Run(config, fields, corpus, Path(folder), echo).train(resume, overwrite)


def corpus_of(config: TrainConfig) -> Corpus:
    """The corpus that a configuration names."""
    return load_corpus(
        config.data,
        config.path or None,
        tokens=config.tokens,
        split_seed=config.split_seed,
        split_kind=config.split,
        limit_chars=config.limit_chars,
    )


def parse_seeds(text: str) -> list[int]:
    """'0-4' or '0,3,7' as numbers; LabError otherwise, and for a range that goes down or a seed named twice."""
    seeds: list[int] = []
    for part in text.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and not high.isdecimal()):
            raise LabError(f"--seeds={text}: write 0-4 or 0,3,7")
        if not (found := range(int(low), int(high or low) + 1)):
            raise LabError(f"--seeds={text}: {part} goes down; write the smaller number first")
        if int(high or low) - int(low) >= MOST_SEEDS:
            raise LabError(f"--seeds={text}: at most {MOST_SEEDS:,} seeds, each is a run")
        seeds += found
    if len(set(seeds)) < len(seeds):
        raise LabError(f"--seeds={text}: a seed is named twice, and would train the same run again")
    return seeds


def _names(kind: type) -> str:
    """The settings of a model, in words."""
    return ", ".join(f"--{field.name}" for field in dataclasses.fields(kind)) or "no settings of its own"


def read(words: Sequence[str], *more: type) -> tuple[list[str], dict[str, str]]:
    """(words, {field: text}) of a command line over the fields of a training, of every model and of `more`."""
    return cli.read(words, TrainConfig, Where, *more, *(fields_class(rung) for rung in LADDER))


def parse(words: Sequence[str], start: dict[str, str] | None = None, *more: type) -> tuple[Any, ...]:
    """(TrainConfig, the model's settings, Where, an instance of each of `more`) from a command line; `start`: texts
    that it may replace. LabError for an unknown field, told with the chosen model's own."""
    rungs = {rung: fields_class(rung) for rung in LADDER}
    try:
        positional, given = read(words, *more)
    except LabError as error:
        asked = next((w.partition("=")[2] for w in words if w.startswith("--model=")), (start or {}).get("model", ""))
        rung = asked if asked in rungs else TrainConfig.model
        raise LabError(f"{error}; {rung} has {_names(rungs[rung])}") from None
    if positional:
        raise LabError(f"{positional[0]!r} is not a --field=value; see --help")
    given = (start or {}) | given
    rung = given.get("model", TrainConfig.model)
    own = {field.name for kind in (TrainConfig, Where, *more, fields_class(rung)) for field in dataclasses.fields(kind)}
    for name in given:
        if name not in own:
            theirs = ", ".join(r for r, kind in rungs.items() if name in {f.name for f in dataclasses.fields(kind)})
            raise LabError(f"--{name} belongs to {theirs}, not to {rung}, which has {_names(fields_class(rung))}")
    if given.get("seeds") and "seed" in given:
        raise LabError(f"--seed={given['seed']} and --seeds={given['seeds']}: give one of them")
    others = [cli.filled(kind, given) for kind in (fields_class(rung), Where, *more)]
    return complete(cli.filled(TrainConfig, given)), *others


def use_threads(where: Where) -> None:
    """Torch's threads as they were asked for."""
    if where.threads:
        torch.set_num_threads(where.threads)


def main(words: list[str], start: dict[str, str] | None = None, progress: Callable[[str], None] = print) -> int:
    """The command line; returns the exit code."""
    if cli.wants_help(words):
        print(__doc__, cli.describe(TrainConfig, Where, *(fields_class(name) for name in LADDER)))
        return 0
    config, fields, where = parse(words, start)
    use_threads(where)
    corpus = corpus_of(config)
    folder = Path(where.output_dir or Path("lab/out") / f"{config.data}-{config.model}")
    for seed in parse_seeds(where.seeds) if where.seeds else [config.seed]:
        run = Run(dataclasses.replace(config, seed=seed), fields, corpus, folder, echo=True)
        progress(f"{config.model}: {run.model.num_parameters():,} parameters, seed {seed}, into {folder}")
        if config.initial:
            units = [f"{a} of {b} units of {name} differ" for name, (a, b) in different_units(run.model).items()]
            progress(f"initial weights {config.initial}: {'; '.join(units) or 'no hidden units to count'}")
        result = run.train(where.resume, where.overwrite)
        test = "" if result.test_loss is None else f", test {result.test_loss:.4f}"
        kept = "of the least validation loss" if config.keep == "best" else "the last one"
        progress(
            f"validation {result.final_loss:.4f} at the end; kept: step {result.best_step}, {kept}, "
            f"{result.best_loss:.4f} on the whole split{test}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run(main))
