"""Looking at a run beside its log: TensorBoard, Weights & Biases, more words in the log's lines, a trace of some steps.

    --watch=tensorboard,wandb           through their own writers, beside the log; W&B offline unless WANDB_MODE is set
    --log_words=lr,window,grad_norm     in every step's line; the gradient's norm makes the program wait for the GPU
    --profile=3                         so many steps, once warm, as <run>.trace.json: https://ui.perfetto.dev opens it

Everything is written by rank 0.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.log import Clock, RunLog
from trainer.options import UsageError
from trainer.processes import on_rank_0, rank, world_size
from trainer.schedule import last_step

WORDS, WRITERS = ("lr", "window", "grad_norm"), ("tensorboard", "wandb")
_UNWATCHED = 2  # steps before the trace: the first ones still allocate


def listed(name: str, text: str, known: tuple[str, ...]) -> list[str]:
    """The words of a comma-separated field. Raises UsageError for one that is not in `known`."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    for word in words:
        if word not in known:
            raise UsageError(f"--{name}={text}: of {', '.join(known)}, divided by commas; not {word!r}")
    return words


class GradientNorm:
    """The norm of all of a step's gradients, each parameter counted once however many processes hold it.

    exchange: of trainer.exchange. `add` is called when gradients of some parameters are sums; `take` is collective."""

    def __init__(self, exchange: Any):
        self.exchange = exchange
        self.shared: list[Tensor] = []
        self.own: list[Tensor] = []

    def add(self, parameters: Mapping[str, Tensor]) -> None:
        """Parameters by name whose `.grad` is complete, before they are updated."""
        for name, p in parameters.items():
            sharded = self.exchange.owner_of(name) is not None or self.exchange.rows_of(name) is not None
            (self.own if sharded else self.shared).append(torch.linalg.vector_norm(p.grad.float()).square())

    def take(self) -> float:
        """The norm of what was added since the last time."""
        zero = torch.zeros((), device=(self.own or self.shared)[0].device)
        own, shared = sum(self.own, zero), sum(self.shared, zero)
        if world_size() > 1:
            dist.all_reduce(own)
        self.own, self.shared = [], []
        return (own + shared).sqrt().item()


class Watch:
    """All of the above for one run, whose steps begin after `start`.

    before(step) and words(step) stand around every step; `close` at the end of the run, however it ends. The clock
    stands still while a trace is begun or written, which takes seconds."""

    def __init__(self, config: Any, log: RunLog, trainer: Any, start: int, clock: Clock):
        self.config, self.log, self.device, self.start, self.clock = config, log, trainer.device, start, clock
        self.asked = listed("log_words", config.log_words, WORDS)
        self.norm = trainer.norm = GradientNorm(trainer.exchange) if "grad_norm" in self.asked else None
        self.closing: list[Callable[[], None]] = []
        self.profiler: Any = None
        on_rank_0(self._open)

    def _open(self) -> None:
        for name in listed("watch", self.config.watch, WRITERS):
            try:
                (self._tensorboard if name == "tensorboard" else self._wandb)()
            except ImportError as error:
                raise UsageError(f"--watch={name}: {error}; pip install {name}") from error

    def _tensorboard(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.log.folder / f"{self.log.name}.tensorboard"), purge_step=self.start + 1)

        def hear(step: int, values: Mapping[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)

        self.log.listeners.append(hear)
        self.closing.append(writer.close)

    def _wandb(self) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE", "offline")
        run = wandb.init(
            project="train_gpt",
            name=self.log.name,
            dir=str(self.log.folder),
            config=dict(self.log.config),
            mode=mode,
            settings=wandb.Settings(console="off", silent=True),
        )
        last, end = self.start, last_step(self.config)

        def hear(step: int, values: Mapping[str, float]) -> None:
            nonlocal last
            last = step
            run.log(dict(values), step=step)

        def finish() -> None:
            whole = last >= end and sys.exc_info()[0] is None
            run.finish(exit_code=0 if whole else 1)  # stopped or failed: Weights & Biases must not call it finished

        self.log.listeners.append(hear)
        self.closing.append(finish)

    def before(self, step: int) -> None:
        """Before step number `step` + 1: the trace begins or ends."""
        if not self.config.profile or rank() != 0:
            return
        first = self.start + _UNWATCHED
        if step == first:
            activity = torch.profiler.ProfilerActivity
            both = [activity.CPU, *([activity.CUDA] if self.device.type == "cuda" else [])]
            self.clock.stop()
            self.profiler = torch.profiler.profile(activities=both)
            self.profiler.start()
            self.clock.start()
        elif step == first + self.config.profile:
            self._write_trace()

    def _write_trace(self) -> None:
        profiler, self.profiler = self.profiler, None
        if profiler is not None:
            self.clock.stop()
            profiler.stop()
            path = self.log.folder / f"{self.log.name}.trace.json"
            profiler.export_chrome_trace(str(path))
            self.log.line(f"trace from step {self.start + _UNWATCHED + 1} on: {path}; https://ui.perfetto.dev opens it")
            self.clock.start()

    def words(self, lr: float, window_tokens: int) -> dict[str, str]:
        """What `--log_words` asks for of the step just done, as the log prints it. Collective."""
        told = {"lr": f"{lr:.6g}", "window": str(window_tokens)}
        if self.norm is not None:
            told["grad_norm"] = f"{self.norm.take():.6g}"
        return {name: told[name] for name in self.asked}

    def close(self) -> None:
        """Write the trace if it has not come to its end, and close the writers."""
        self._write_trace()
        for close in self.closing:
            close()
        self.closing, self.log.listeners = [], []
