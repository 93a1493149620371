"""Faults planted in a run and rehearsed, for test_rehearse.py: prints {fault: what the rehearsal says of it} as JSON.

    python tests/bench/planted.py            # all, in one process with Triton's interpreter off; some minutes

Each fault is one that a GPU would have been the first to show. "none" is the run as it is.
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()  # what was compiled before must not answer for another assembler

import torch
import torch.distributed as dist

import train_gpt
from bench.rehearse import budgets, counts
from kernels import muon
from trainer import schedule

CONFIG = train_gpt.parse_config(["--preset=nano", "--dtype=bfloat16", "--num_iterations=3", "--tokens_per_step=2048"])
CONFIG = counts.one_block(CONFIG)
STEP = train_gpt.Muon.step  # the eager part of a step, where most faults are planted


def beside_muon(fault):
    """Muon's step with `fault(optimizer)` run before it."""

    def step(self, number):
        fault(self)
        return STEP(self, number)

    return mock.patch.object(train_gpt.Muon, "step", step)


def first(optimizer) -> torch.Tensor:
    return next(iter(optimizer.named.values()))


def two_gigabytes(optimizer) -> None:
    optimizer.kept = torch.empty(2**31, dtype=torch.uint8, device="cuda")


def fifty_launches(optimizer) -> None:
    for _ in range(50):
        first(optimizer).grad.mul_(1.0)


def spilling():
    """The momentum kernel held to so few registers that it spills."""
    kernel = muon._momentum
    launch = lambda grid: lambda *a, **k: kernel.run(*a, grid=grid, warmup=False, **k, maxnreg=16)  # noqa: E731
    starved = type("Starved", (), {"__getitem__": lambda self, grid: launch(grid)})()
    return mock.patch.object(muon, "_momentum", starved)


def window_as_a_number():
    def set_window(self, step):
        self.window = schedule.window_blocks_at(step, self.config)

    return mock.patch.object(train_gpt.Trainer, "set_window", set_window)


def broken_graph():
    def hidden(self, *args, **kwargs):
        torch._dynamo.graph_break()
        return hidden_before(self, *args, **kwargs)

    hidden_before = train_gpt.GPT.hidden
    return mock.patch.object(train_gpt.GPT, "hidden", hidden)


def host_waits():
    return beside_muon(lambda optimizer: first(optimizer).grad.sum().item())


def left_on_the_host():
    return beside_muon(lambda optimizer: first(optimizer).grad.add_(torch.ones(first(optimizer).shape).to("cuda")))


def sixteen_bits():
    return beside_muon(lambda optimizer: dist.all_reduce(first(optimizer).grad.view(torch.int16)))


EAGER = {
    "a host synchronisation": host_waits,
    "a tensor left on the CPU": left_on_the_host,
    "int16 in a collective": sixteen_bits,
    "a kernel that spills": spilling,
    "2 GB more at the peak": lambda: beside_muon(two_gigabytes),
    "50 more launches": lambda: beside_muon(fifty_launches),
}
COMPILED = {"a graph break": broken_graph, "a recompilation by window": window_as_a_number}


def rehearsed() -> dict:
    return counts.rehearse(CONFIG, world=2, say=lambda text: None)


def judged(counted: dict, limits: dict, proven: set) -> list[str]:
    counted["unproven"] = budgets.unproven(counted, proven)
    return budgets.broken_rules(counted) + budgets.exceeded(counted, limits)


def main() -> None:
    said = {}
    good = rehearsed() | {"unproven": []}
    proven = {kernel["sha256"] for kernel in good["kernels"]}
    limits = {budgets.form(good): budgets.measures(good)}
    said["none"] = judged(good, limits, proven)
    for name, plant in (EAGER | COMPILED).items():
        try:
            with plant():
                said[name] = judged(rehearsed(), limits, proven)
        except Exception as error:
            said[name] = [f"{type(error).__name__}: {str(error).splitlines()[0]}"]
    print(json.dumps(said))


if __name__ == "__main__":
    main()
