"""The end of a run: the log's last lines and the JSON's last state."""

from __future__ import annotations

import signal
from typing import Any

import torch

from trainer.log import RunLog
from trainer.processes import on_rank_0
from trainer.streams import loss_floor


def report(log: RunLog, config: Any, device: torch.device, signal_number: int, saved: int) -> None:
    """Tell memory, the floor of the loss, or what stopped the run. Collective.

    config: train_gpt.Config. saved: the last step that a checkpoint has; 0: none."""
    peak = log.peak_memory(device)
    floor = None if signal_number else on_rank_0(lambda: loss_floor(config))
    if floor is not None and log.validation:
        above = log.validation[-1]["loss"] - floor
        log.line(f"best possible on these tokens: {floor:.6f} nats; the final loss is {above:.6f} above it")
    early = 0 < config.stop_after < config.num_iterations
    status = "interrupted" if signal_number else "stopped" if early else "finished"
    log.summary(status, loss_floor=floor, peak_memory_mib=peak)
    if status == "stopped":
        log.line(f"stopped after {config.stop_after} of {config.num_iterations} steps; --resume goes on")
    if signal_number:
        kept = f"the checkpoint of step {saved} is there; --resume=auto continues" if saved else "no checkpoint yet"
        log.line(f"stopped by {signal.Signals(signal_number).name}: {kept}")
