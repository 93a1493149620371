"""A run's steps rehearsed on the pretended device, and counted: one dictionary for JSON, budgets and projection."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from bench.rehearse import device as pretended
from bench.rehearse.recorder import Launch, Recorder
from trainer import schedule

GIB = 2**30


def one_block(config):
    """`config` with a single block of attention and MLP at full width: the short form of a rehearsal.

    What joins layers is off; the layers that are treated otherwise become the one, if there are any."""
    off = dict(value_embeddings=0, untied_values=False, unet_skips="", attention_free_layers="", dynamic_skips="")
    off |= dict(backout_layer=-1, late_attention_source=-1, long_window_layers="0", dynamic_gates=-1, head_mixing=False)
    off |= dict(narrow_qk_layers="")  # '': all, so that the one is narrow if any is
    off |= dict(skip_gates=False, value_gates=False, xsa=False)  # their weights would have no gradient
    one = dict(key_offset="0" if config.key_offset else "")
    one |= dict(paired_heads="0" if config.paired_heads and not config.key_offset else "")  # no layer has both
    return dataclasses.replace(config, num_layers=1, **off, **one)


def join(rank: int, world: int) -> None:
    """Be one of `world` processes whose messages nobody carries (torch's fake process group)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        dist.destroy_process_group()
    if world > 1:
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


def rehearse(
    config, *, device: str = "h100", world: int = 1, all_ranks: bool = False, say: Callable[[str], object] = print
) -> dict[str, Any]:
    """Everything countable of a step of `config` on one of `world` GPUs of the kind `device`, and of a validation.

    all_ranks: the other ranks' messages too, for their order.

    Raises: device.CannotRehearse; whatever a real device would raise on compiling or launching."""
    from torch._dynamo import utils as dynamo

    from kernels.assembler import choose_assembler
    from trainer.processes import sequence_length_for

    waits = pretended.install(device)
    assembler = choose_assembler().partition(" ")[0]
    torch._dynamo.reset()
    dynamo.counters.clear()
    join(0, world)
    length = sequence_length_for(world, config.tokens_per_step, config.train_seq_len)
    config = dataclasses.replace(config, device="cuda", warmup_steps=2, train_seq_len=length)
    recorder = Recorder()
    with pretended.tensors(), recorder:
        rehearsal = Rehearsal(config, recorder, waits, say)
        counted = rehearsal.set_up() | rehearsal.warm_up() | {"step": rehearsal.step()}
        counted |= {"validation": rehearsal.validation(), "windows": rehearsal.windows()}
        counted["checkpoint"] = rehearsal.checkpoint()
        if all_ranks:
            counted["other_orders"] = rehearsal.other_orders(counted["step"]["message_order"])
    counted["kernels"] = resources(recorder.kernels)
    head = dict(preset=config.preset, products=config.products, device=device, world=world)
    head |= dict(
        one_block=config.num_layers == 1,
        shapes=len(schedule.shapes(config)),
        sequences=rehearsal.sequences,
        tokens=config.train_seq_len * rehearsal.sequences,
    )
    head |= dict(torch=torch.__version__, triton=_triton_version(), assembler=assembler)
    join(0, 1)
    return {"schema": 1, **head, **counted}


def memory_alone(config, device: str) -> float:
    """Peak GiB of warm-up, step and validation of one process. No kernel is assembled, so it is soon there."""
    waits = pretended.install(device)
    torch._dynamo.reset()
    recorder = Recorder(assembles=False)
    with pretended.tensors(), recorder:
        rehearsal = Rehearsal(
            dataclasses.replace(config, device="cuda", warmup_steps=1), recorder, waits, lambda _: None
        )
        rehearsal.set_up()
        peaks = [rehearsal.warm_up()["warm_up_peak_gib"], rehearsal.step()["peak_gib"]]
        return max(*peaks, rehearsal.validation()["peak_gib"])


def _triton_version() -> str:
    import triton

    return triton.__version__


def _stand_in_for_tokens() -> None:
    """What tokens that are not there cannot tell of `ngram_rows`: here no two n-grams of a sequence share a row, which
    is the most that can be sent, and rows lie evenly on the processes. Of `sampled_softmax`: the targets always fit."""
    from trainer import ngram_table, sampled_softmax

    def ask(_exchange: Any, asked_U: torch.Tensor) -> tuple:
        world = ngram_table.world_size()
        even = [len(asked_U) // world] * world
        return asked_U, even, even

    ngram_table.different = lambda rows: (rows.flatten(), torch.zeros_like(rows))
    sampled_softmax.chosen = lambda targets, _, count: (torch.zeros_like(targets), targets.new_zeros(count))
    ngram_table.RowExchange.ask = ask  # type: ignore[method-assign]


class Rehearsal:
    """One process of a run on the pretended device; the methods in the order in which they are called."""

    def __init__(self, config, recorder: Recorder, waits: list[str], say: Callable[[str], object]):
        self.config, self.recorder, self.device_waits, self.say = config, recorder, waits, say
        self.trainer: Any = None
        self.sequences = 0
        _stand_in_for_tokens()

    def set_up(self) -> dict:
        import train_gpt

        with self.recorder.recording():
            self.trainer = train_gpt.Trainer(self.config, train_gpt.set_up(self.config))
        self.sequences = len(schedule.my_sequences(self.config, 0, self.trainer.world_size))
        messages = [vars(m) for m in _grouped(self.recorder.messages)]
        return {"state_gib": self.recorder.memory.live / GIB, "set_up": {"messages": messages}}

    def checkpoint(self) -> dict:
        """Everyone's state brought together, before rank 0 writes it."""
        self.recorder.phase = "checkpoint"
        with self.recorder.recording():
            self.trainer.whole_state()
        return {"messages": [vars(m) for m in _grouped(self.recorder.messages)]}

    def other_orders(self, first: list) -> list[int]:
        """The ranks whose messages of a step come in another order, or are others, than rank 0's `first`."""
        import train_gpt
        from trainer import leaving

        model, forward, different = self.trainer.model, self.trainer.forward, []
        compiled = torch.compile
        early = self.trainer.exchange.early
        numbers = itertools.repeat(early["early"].listener) if early else leaving._numbers

        def compile_(what, **options):
            return forward if what is model else compiled(what, **options)

        for rank in range(1, self.trainer.world_size):
            join(rank, self.trainer.world_size)
            for p in model.parameters():
                p._post_accumulate_grad_hooks = None
                p.grad = None  # as rank 0 began: what waits there leaves with its kind, not early
            as_before = mock.patch.object(train_gpt, "GPT", lambda _c: model)
            same_number = mock.patch.object(leaving, "_numbers", numbers)  # the compiled step's, who else listens
            with as_before, same_number, mock.patch.object(torch, "compile", compile_):
                other = train_gpt.Trainer(self.config, self.trainer.device)
            with self.recorder.recording():
                last = self.config.num_iterations - 1
                other.step(last, self._batches(last))
                other.exchange.wait_weights()
            if [[m.name, *m.dtypes, m.bytes] for m in self.recorder.messages] != first:
                different.append(rank)
        return different

    def warm_up(self) -> dict:
        """As the run does it: compiles training and validation."""
        import train_gpt

        started, before = time.monotonic(), len(self.recorder.memory.events)
        self.recorder.phase = "warm-up"
        kept, of_adam = self.trainer.adam.step, []

        def adam_step(*arguments):
            known = _graphs()
            kept(*arguments)
            of_adam.append(_graphs() - known)

        with mock.patch.object(self.trainer.adam, "step", adam_step):
            train_gpt.warm_up(self.trainer, SimpleNamespace(heard=lambda: False))  # nobody asks it to stop
        self.say(f"compiled and warmed up in {time.monotonic() - started:.0f} s")
        peak, _, holders = self.recorder.memory.peak(before)
        graphs = {"graphs": _graphs() - sum(of_adam), "graphs_of_adam": sum(of_adam)}
        told = {"compile": {**_compiler_says(), **graphs}, "warm_up_peak_gib": peak / GIB}
        return told | {"warm_up_holders_gib": _in_gib(holders)}

    def _batches(self, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A step's sequences, as `TokenStream.prefetch` hands them to a GPU's process: in pinned memory."""
        length = schedule.sequence_tokens_at(step, self.config)
        kinds = (torch.int32, torch.int64)
        pairs = [tuple(torch.zeros(length, dtype=kind) for kind in kinds) for _ in range(self.sequences)]
        self.recorder.pinned.update(t.untyped_storage() for pair in pairs for t in pair)
        return pairs

    def step(self) -> dict:
        """The last step of the run, every phase of it recorded."""
        trainer, recorder = self.trainer, self.recorder
        last, before = self.config.num_iterations - 1, len(recorder.memory.events)
        batches = self._batches(last)
        del self.device_waits[:]
        phases = dict(forward=(trainer, "forward", "backward"), muon=(trainer.muon, "step", "between"))
        phases["adam"] = (trainer.adam, "step", "end")
        kept = {name: getattr(owner, method) for name, (owner, method, _) in phases.items()}
        for name, (owner, method, after) in phases.items():
            setattr(owner, method, self._in_phase(name, kept[name], after))
        recorder.phase = "start"
        with recorder.recording():
            trainer.step(last, batches)
            trainer.exchange.wait_weights()
        for name, (owner, method, _) in phases.items():
            setattr(owner, method, kept[name])
        peak, phase, holders = recorder.memory.peak(before)
        return {
            "peak_gib": peak / GIB,
            "peak_phase": phase,
            "peak_holders_gib": _in_gib(holders),
            **_launch_counts(recorder),
            "host_waits": [*recorder.waits, *self.device_waits],
            "messages": [vars(m) for m in _grouped(recorder.messages)],
            "queues": stretches(recorder),
            "message_order": [[m.name, *m.dtypes, m.bytes] for m in recorder.messages],
        }

    def _in_phase(self, name: str, method: Callable, after: str) -> Callable:
        def run(*args, **kwargs):
            self.recorder.phase = name
            out = method(*args, **kwargs)
            self.recorder.phase = after
            return out

        return run

    def _forward(self, step: int | None = None) -> None:
        """Forward as that step of training does it; None: as a validation."""
        device, c, grad = self.trainer.device, self.config, step is not None
        length = c.val_seq_len if step is None else schedule.sequence_tokens_at(step, c)
        on_host = torch.zeros(length, dtype=torch.int32)
        tokens = torch.zeros(1, length, dtype=torch.int32, device=device)
        targets = torch.zeros(1, length, dtype=torch.int64, device=device)
        with torch.set_grad_enabled(grad):
            how = {}
            if step is not None:
                _, sampled = self.trainer.targets.sampled(step, 0, (on_host, on_host.long()))
                how = self.trainer.targets.at(step) | sampled
            how |= self.trainer.rows.fetch(on_host)
            self.trainer.forward(tokens, targets, window_blocks=self.trainer.window, **how)
        self.trainer.rows.forget()  # no backward pass follows, after which the gradients of fetched rows were collected

    def validation(self) -> dict:
        """One sequence of a validation."""
        recorder, before = self.recorder, len(self.recorder.memory.events)
        recorder.phase = "validation"
        with recorder.recording():
            self._forward()
        peak, _, holders = recorder.memory.peak(before)
        return {"peak_gib": peak / GIB, "peak_holders_gib": _in_gib(holders), **_launch_counts(recorder)}

    def windows(self) -> dict:
        """Windows of the run in turn, all of them for one block, else the first, a middle and the last, each with its
        step's length and targets; and for one block whole steps of each shape. None may compile anew."""
        c, before = self.config, _graphs()
        steps = list({schedule.window_blocks_at(step, c): step for step in range(c.num_iterations)}.values())
        tried = steps if c.num_layers == 1 else [steps[0], steps[len(steps) // 2], steps[-1]]
        for step in tried:
            self.trainer.set_window(step)
            self._forward(step)
        if c.num_layers == 1 and len(schedule.shapes(c)) > 1:
            for first in schedule.shapes(c).values():
                for step in range(first, first + c.adam_every):
                    self.trainer.step(step, self._batches(step))
            self.trainer.exchange.wait_weights()
        return {"different": len(steps), "tried": len(tried), "new_graphs": _graphs() - before}


def _in_gib(holders: dict[str, int]) -> dict[str, float]:
    """The largest of what is held at a peak, by what makes it."""
    return {maker: round(size / GIB, 3) for maker, size in list(holders.items())[:40]}


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return counters["stats"]["unique_graphs"]


def _compiler_says() -> dict:
    from torch._dynamo.utils import counters

    return {"breaks": dict(counters["graph_break"])}


def _rows(launches: Iterable[Launch]) -> list[dict]:
    """Launches summed by kind, phase and part, and by kernel."""
    groups: dict[tuple, list] = collections.defaultdict(lambda: [0, 0, 0.0])
    for launch in launches:
        key = (launch.kind, launch.phase, launch.part, launch.name, launch.bits)
        for i, amount in enumerate((1, launch.bytes, launch.flops)):
            groups[key][i] += amount
    fields = ("kind", "phase", "part", "kernel", "bits", "launches", "bytes", "flops")
    return [dict(zip(fields, (*key, *sums))) for key, sums in groups.items()]


def _launch_counts(recorder: Recorder) -> dict:
    """How many launches, and what they were."""
    unaligned = {name: size for name, size in sorted(recorder.unaligned.items(), key=lambda kv: -kv[1]) if size}
    rows = sorted(_rows(recorder.launches), key=lambda row: -row["bytes"])
    return {"launches": len(recorder.launches), "kernels": rows, "unaligned_bytes": unaligned}


def stretches(recorder: Recorder) -> list[dict]:
    """A step in its order, cut where a message of the GPU's is sent or awaited: {"kernels": rows of what was launched
    before that, "sends": [operator, bytes] or "awaits": the number of a message so sent}."""
    sent = [number for number, m in enumerate(recorder.messages) if m.device == "cuda"]
    found, launched = [], []
    for what, number in recorder.queue:
        if what == "launch":
            launched.append(recorder.launches[number])
        elif number in sent:
            message = recorder.messages[number]
            event = dict(sends=[message.name, message.bytes]) if what == "send" else dict(awaits=sent.index(number))
            found.append({"kernels": _rows(launched)} | event)
            launched = []
    return [*found, {"kernels": _rows(launched)}]


def _grouped(messages: list) -> list:
    """Messages of one kind, phase and type as one, with the sum of their bytes."""
    found: dict[tuple, Any] = {}
    for m in messages:
        key = (m.name, tuple(m.dtypes), m.device, m.phase)
        if key in found:
            found[key].bytes += m.bytes
            found[key].count += 1
        else:
            found[key] = dataclasses.replace(m)
            found[key].count = 1
    return list(found.values())


def resources(kernels: dict[str, Any]) -> list[dict]:
    """Registers, stack (where spills go), shared memory, warps and the hash of every kernel that ran."""
    from kernels.proof.machine_code import text_hash

    rows = []
    for name, holder in sorted(kernels.items()):
        own = not hasattr(holder, "compile_results")
        kernel = holder if own else holder.launchers[0].__dict__.get("kernel", holder.compile_results[0].kernel)
        cubin, told = kernel.asm["cubin"], kernel.metadata
        row = {"kernel": name.partition(" ")[0], "own": own, **_usage(cubin), "shared": told.shared}
        row |= {"warps": told.num_warps, "sha256": text_hash(cubin)}
        if not own:
            row |= {"heuristic": str(holder.heuristic_type).rpartition(".")[2].lower(), "bytes": 0}
        rows.append(row)
    return rows


def _usage(cubin: bytes) -> dict[str, int]:
    from kernels.proof.machine_code import _tool

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        try:
            said = _tool("cuobjdump", "--dump-resource-usage", file.name)
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"cuobjdump cannot read a kernel: {error.stderr}") from error
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", said))
    return {"registers": int(usage["REG"]), "stack_bytes": int(usage["STACK"]) + int(usage.get("LOCAL", 0))}
