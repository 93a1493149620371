"""The beginning and the end of a run's log: its header, its last lines and the JSON's last state."""

from __future__ import annotations

import dataclasses
import signal
from typing import Any

import torch

from data.shards import TokenStream
from kernels.assembler import choose_assembler, doubts
from trainer import implementations
from trainer.evidence import hash_of
from trainer.log import RunLog, unique_name
from trainer.processes import on_rank_0, rank
from trainer.program import describe_environment, program_files, unproven_versions
from trainer.streams import describe_data, loss_floor
from trainer.techniques import head_widths


def open_log(
    config: Any, trainer: Any, streams: tuple[TokenStream, TokenStream], path: str, source: str, hashed: str
) -> RunLog:
    """The run's log, opened, with all that its header says: machine, program, data, the kernels that run. Collective.

    config, trainer: of train_gpt.py. path, source: its file, and the text of it that runs. hashed: of
    the configuration."""
    c, device, dtype = config, trainer.device, getattr(torch, config.dtype)
    data, remarks = describe_data(c, *streams)
    environment = describe_environment(
        device,
        world_size=trainer.world_size,
        source=source,
        program=program_files(path),
        implementations=implementations.running(trainer.model.impls, device, dtype, c.products, head_widths(c)),
        assembler=choose_assembler() if device.type == "cuda" else "none",
        val_data_hash=hash_of(streams[1]),
        plan_hash=c.plan_hash,
    ) | {"data": data}
    told, name = dataclasses.asdict(c), on_rank_0(lambda: c.run_name or unique_name(c.preset))
    log = RunLog(c.output_dir, name, told, environment, source, hashed, writes=rank() == 0)
    on_rank_0(lambda: log.open(resuming=bool(c.resume), overwrite=c.overwrite))
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    for remark in [*unproven_versions(environment), *(doubts(environment["assembler"]) if hopper else []), *remarks]:
        log.line(remark)
    return log


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
