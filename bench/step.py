"""What a training step costs, and where the time goes, on whatever is there.

    python -m bench.step                                      # medium on a GPU, nano on a CPU
    python -m bench.step --preset=medium --kernels=reference  # the same math the plain way
    python -m bench.step --tokens 'shards/*.bin'              # real documents in place of drawn ones
    python -m bench.step --repeats 30 --no-parts --train_seq_len=32768

Flags that are not its own are fields of train_gpt.py. On a GPU a step is one GPU's share of an eight-GPU step: one
packed sequence (`--sequences` for more). Three measurements:

whole step   `Trainer.step`, at the start, the middle and the end of the run, since the window grows
breakdown    the same step cut where the trainer goes from forward to backward to the optimizers
parts        each kernel family alone, forward and backward, times the number of layers, beside its floor

A floor is a part's FLOPs over the measured rate of large matrix products plus, for memory-bound parts, its bytes
over the measured rate of copies. FLOPs are those of the mathematics (attention: the allowed pairs only; symmetric
products of Muon: one triangle); bytes count every operand read once and every result written once.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.common import REPO, copy_ceiling, matmul_ceiling, measure, summary, table, write_result
from bench.options import helped, own_and_config
from trainer import schedule
from trainer.options import UsageError, setting
from trainer.techniques import narrow_rows, numbers

MEAN_DOCUMENT_TOKENS = 690  # of FineWeb under the GPT-2 BPE; drawn documents are exponential about it


@dataclass
class Part:
    """One part of a step: what it computes and moves in all layers together, and how to run it once.

    `count` times what `run` does is the step's share. flops are those of matrix products; bytes of memory traffic.
    """

    name: str
    flops: float
    bytes: float
    run: Callable[[], object] | None = None
    count: int = 1

    def floor_ms(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Least time: products at their measured rate; where a part is not all products, memory at its own."""
        product_ms = self.flops / flops_per_s * 1e3
        memory_ms = self.bytes / bytes_per_s * 1e3
        return product_ms + memory_ms if self.name == "head and loss" else max(product_ms, memory_ms)


def draw_documents(length: int, vocab_size: int, eos_id: int, seed: int = 0) -> Tensor:
    """Random tokens cut into documents with exponential lengths about FineWeb's mean; int32 (length,)."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (length,), generator=random)
    tokens[tokens == eos_id] = (eos_id + 1) % vocab_size
    position = 0
    while position < length:
        tokens[position] = eos_id
        gap = torch.empty(()).exponential_(1 / MEAN_DOCUMENT_TOKENS, generator=random).item()
        position += 1 + int(gap)
    return tokens.to(torch.int32)


def make_batches(config, sequences: int, device: torch.device, shards: str | None) -> list[tuple[Tensor, Tensor]]:
    """`sequences` packed (inputs, targets) on the device, from shards or drawn."""
    length = config.train_seq_len
    if shards:
        from data.shards import TokenStream

        stream = TokenStream(shards, sequence_tokens=length, sequences_per_step=sequences, vocab_size=config.vocab_size)
        pairs = [stream.batch(0, s) for s in range(sequences)]
        pairs = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in pairs]
    else:
        drawn = [draw_documents(length + 1, config.vocab_size, config.eos_id, s) for s in range(sequences)]
        pairs = [(tokens[:-1], tokens[1:]) for tokens in drawn]
    return [(x.to(device, torch.int32), y.to(device, torch.int64)) for x, y in pairs]


# -------------------------------------------------------------------------------------------------------------
# Whole step and breakdown


class Marks:
    """Points in time, of the device's queue on a GPU, of the wall clock elsewhere."""

    def __init__(self, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.points: list[tuple[str, object]] = []

    def mark(self, name: str) -> None:
        """From here on, time belongs to `name`."""
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.points.append((name, event))
        else:
            self.points.append((name, time.perf_counter()))

    def totals_ms(self) -> dict[str, float]:
        """Milliseconds by name; the last mark ends the measurement."""
        if self.on_gpu:
            torch.cuda.synchronize()
        totals: dict[str, float] = {}
        for (name, begin), (_, end) in zip(self.points, self.points[1:]):
            ms = begin.elapsed_time(end) if self.on_gpu else (end - begin) * 1e3
            totals[name] = totals.get(name, 0.0) + ms
        return totals


def marked(marks: Marks, fn: Callable, name: str, after: str) -> Callable:
    """`fn`, with its time counted as `name` and what follows it as `after`."""

    def run(*arguments, **named):
        marks.mark(name)
        result = fn(*arguments, **named)
        marks.mark(after)
        return result

    return run


def breakdown(trainer, step: int, batches, repeats: int) -> dict[str, dict]:
    """Summary of the ms that forward, backward (with the exchange of gradients) and the optimizers take."""
    samples: dict[str, list[float]] = {}
    forward, adam, muon = trainer.forward, trainer.adam.step, trainer.muon.step
    try:
        for _ in range(repeats):
            marks = Marks(trainer.device)
            trainer.forward = marked(marks, forward, "forward", "backward")
            trainer.adam.step = marked(marks, adam, "AdamW", "rest")
            trainer.muon.step = marked(marks, muon, "Muon", "rest")
            marks.mark("rest")
            trainer.step(step, batches)
            marks.mark("end")
            for name, ms in marks.totals_ms().items():
                samples.setdefault(name, []).append(ms)
    finally:
        trainer.forward = forward
        del trainer.adam.step, trainer.muon.step  # the methods of the classes show again
    return {name: summary(times) for name, times in samples.items()}


def peak_memory_mib(device: torch.device, fn: Callable[[], object]) -> float:
    """Peak of allocated device memory while `fn` runs; of this process's resident memory so far on a CPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        fn()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    fn()
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage / (2**20 if sys.platform == "darwin" else 2**10)


# -------------------------------------------------------------------------------------------------------------
# Parts


def gradients(fn: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """A function that runs `fn` forward and backward once for all of `inputs` that are floating point."""
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    wanted = [x for x in leaves if x.is_floating_point()]
    seed: list[Tensor] = []

    def run() -> object:
        y = fn(*leaves)
        if not seed:
            seed.append(torch.ones_like(y))
        return torch.autograd.grad(y, wanted, seed[0], allow_unused=True)

    return run


def product_bytes(m: int, k: int, n: int, size: int) -> int:
    """Traffic of (m,k) @ (k,n) and of its two gradients: each operand read once, each result written once."""
    return 3 * size * (m * k + k * n + m * n)


def muon_counts(model, size: int) -> tuple[float, float]:
    """(FLOPs of the orthogonalisation with symmetric products counted once, bytes of momentum and update)."""
    flops = elements = 0.0
    for name, p in model.named_parameters():
        if not name.startswith("blocks."):
            continue
        rows, columns = sorted(p.shape[-2:])
        batch = p.numel() // (rows * columns)
        # Five steps of XX^T (one triangle), AA (one triangle), BX.
        flops += 5 * batch * (rows * rows * columns + rows**3 + 2 * rows * rows * columns)
        elements += p.numel()
    mantissa = 4 if size == 2 else 0  # 16 more bits read and written beside a bfloat16 weight
    # Momentum float32 in and out, gradient in, update out and in, weight in and out.
    return flops, elements * (8 + 3 * size + 2 * size + mantissa)


def parts_of(trainer, tokens_T: Tensor, step: int) -> Iterator[Part]:
    """The parts of a step on one packed sequence, as `trainer`'s model would run them."""
    from kernels.attention import attention, attention_inputs, attention_plan
    from kernels.cross_entropy import linear_cross_entropy
    from kernels.mlp import relu_squared_mlp
    from kernels.residual import residual_mix
    from train_gpt import norm

    c, model, device = trainer.config, trainer.model, trainer.device
    dtype = getattr(torch, c.dtype)
    size = torch.empty((), dtype=dtype).element_size()
    T, D, L = tokens_T.numel(), c.model_dim, c.num_layers
    H, hidden, V = c.num_heads, c.mlp_ratio * c.model_dim, model.head_w.size(0)
    attending = [block for block in model.blocks if block.has_attention]
    draw = lambda *shape: torch.randn(*shape, device=device).to(dtype)  # noqa: E731
    impls = model.impls

    tables = 1 + c.second_input_embedding + c.value_embeddings
    weight = draw(c.vocab_size, D)
    yield Part(
        "embeddings",
        0,
        tables * size * (5 * T * D + c.vocab_size * D),
        gradients(lambda w: F.embedding(tokens_T, w), weight),
        tables,
    )
    del weight

    x, x00, x01 = draw(1, T, D), draw(1, T, D), draw(1, T, D)
    lambdas = torch.tensor([1.0, 0.1, 0.1], device=device)
    mixed = gradients(lambda *a: norm(residual_mix(*a)), x, x00, x01, lambdas)
    yield Part("residual mix and norms", 0, L * size * T * D * (4 + 8 + 2 + 3), mixed, L)

    w_qkv, w_o = draw(3 * D, D), draw(D, D)
    project = gradients(lambda x, a, b: F.linear(F.linear(x, a)[..., :D], b), x, w_qkv, w_o)
    n = len(attending)
    traffic = product_bytes(T, D, 3 * D, size) + product_bytes(T, D, D, size)
    yield Part("attention projections", n * 6.0 * T * 4 * D * D, n * traffic, project, n)

    rotary = [table[:T] for table in model.rotary(T)]
    q, k, v, ve = (draw(1, T, H, D // H) for _ in range(4))
    scales = torch.tensor([0.5, 0.5], device=device)
    prologue = lambda q, k, v, ve, s: torch.cat(  # noqa: E731
        attention_inputs(q, k, v, ve, s, *rotary, impl=impls["attention_inputs"]), dim=2
    )
    yield Part("attention inputs", 0, n * size * T * D * (7 + 11), gradients(prologue, q, k, v, ve, scales), n)

    window = schedule.window_blocks_at(step, c)
    for kind, blocks in (("long", window), ("short", schedule.short_window(window, c))):
        layers = sum(block.long_window == (kind == "long") for block in attending)
        plan = attention_plan(tokens_T[None], eos_id=c.eos_id, window_blocks=blocks, block_tokens=c.block_tokens)
        first = plan.first_key_BT.to(torch.int64)
        pairs = int((torch.arange(1, T + 1, device=device) - first).sum())
        run = gradients(
            lambda q, k, v, plan=plan: attention(q, k, v, plan, scale=c.attention_scale, impl=impls["attention"]),
            q,
            k,
            v,
        )
        yield Part(f"attention, {kind} window", layers * 14.0 * pairs * D, layers * 12 * size * T * D, run, layers)

    x_ND = x[0]
    w_in, w_out = draw(hidden, D), draw(D, hidden)
    mlp = gradients(lambda x, a, b: relu_squared_mlp(x, a, b, impl=impls["mlp"]), x_ND, w_in, w_out)
    yield Part("MLP", L * 12.0 * T * D * hidden, L * 2 * product_bytes(T, D, hidden, size), mlp, L)
    del w_in, w_out

    targets = tokens_T.long()
    cap = None if c.soft_cap == "none" else c.soft_cap
    head = gradients(
        lambda x, w: linear_cross_entropy(x, w, targets, softcap=cap, impl=impls["loss"]), x_ND, model.head_w
    )
    yield Part("head and loss", 6.0 * T * D * V, 2 * size * T * V, head)

    rest = [p for name, p in model.named_parameters() if not name.startswith("blocks.")]
    zeros = [torch.zeros_like(p) for p in rest]

    def adam() -> None:
        for p, zero in zip(rest, zeros):
            p.grad = zero  # an update takes the gradients away
        trainer.adam.step(step)

    moved = sum(7 * p.numel() * p.element_size() for p in rest)
    yield Part("AdamW", 0, moved, adam)
    flops, moved = muon_counts(model, size)
    yield Part("Muon", flops, moved, lambda: trainer.muon.step(step))


def measure_parts(trainer, tokens_T: Tensor, step: int, repeats: int, ceilings: dict) -> list[dict]:
    """One row a part: FLOPs, bytes, floor and measured ms in a step, and the ratio of the two."""
    for p in trainer.model.parameters():
        p.grad = torch.zeros_like(p)
    rows = []
    for part in parts_of(trainer, tokens_T, step):
        floor_ms = part.floor_ms(ceilings["flops_per_s"], ceilings["bytes_per_s"])
        row = {"part": part.name, "times": part.count, "tflop": part.flops / 1e12, "gb": part.bytes / 1e9}
        row["floor_ms"] = floor_ms
        try:
            one = measure(part.run, repeats=repeats, warmup=2)
            row["measured_ms"] = one["median_ms"] * part.count
            row["over_floor"] = row["measured_ms"] / floor_ms if floor_ms else None
            row["one_call"] = one
        except RuntimeError as error:  # out of memory, say: the other parts still count
            row |= {"measured_ms": None, "over_floor": None, "error": str(error).splitlines()[0][:200]}
        rows.append(row)
    trainer.model.zero_grad(set_to_none=True)
    return rows


def profile(fn: Callable[[], object], device: torch.device, rows: int = 60) -> list[dict]:
    """The device's kernels (a CPU's operators) that took most of one call: name, calls, ms."""
    from torch.profiler import ProfilerActivity

    on_gpu = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as seen:
        fn()
        if on_gpu:
            torch.cuda.synchronize()
    took = lambda event: event.self_device_time_total if on_gpu else event.self_cpu_time_total  # noqa: E731
    events = sorted(seen.key_averages(), key=took, reverse=True)[:rows]
    return [{"kernel": event.key, "calls": event.count, "ms": took(event) / 1e3} for event in events]


# -------------------------------------------------------------------------------------------------------------
# Command line


def run(config, *, sequences: int, repeats: int, shards: str | None, parts: bool, profiled: bool = False) -> dict:
    """All measurements of one configuration; the result's dictionary."""
    import train_gpt

    device = train_gpt.set_up(config)
    ceiling = matmul_ceiling(getattr(torch, config.dtype))
    copy = copy_ceiling()
    ceilings = {"flops_per_s": ceiling["tflops"] * 1e12, "bytes_per_s": copy["gb_per_s"] * 1e9}
    config = dataclasses.replace(config, tokens_per_step=sequences * config.train_seq_len)
    trainer = train_gpt.Trainer(config, device)
    batches = make_batches(config, sequences, device, shards)
    last = config.num_iterations - 1
    for step in (0, last):  # compile, allocate
        trainer.step(step, batches)
    peak = peak_memory_mib(device, lambda: trainer.step(last, batches))

    part_rows = measure_parts(trainer, batches[0][0], last, max(3, repeats // 2), ceilings) if parts else []
    product_flops = train_gpt.flops_per_token(trainer.model) * config.tokens_per_step
    whole = []
    for name, step in (("start", 0), ("middle", last // 2), ("end", last)):
        stats = measure(lambda step=step: trainer.step(step, batches), repeats=repeats, warmup=1, flush=False)
        flops = product_flops + attention_flops(config, [x for x, _ in batches], step)
        seconds = stats["median_ms"] / 1e3
        whole.append(
            {
                "at": name,
                "window_blocks": schedule.window_blocks_at(step, config),
                **stats,
                "tokens_per_s": config.tokens_per_step / seconds,
                "tflop": flops / 1e12,
                "tflops": flops / seconds / 1e12,
                "mfu_of_measured_ceiling": flops / seconds / ceilings["flops_per_s"],
            }
        )
    pieces = breakdown(trainer, last, batches, repeats)
    kernels = profile(lambda: trainer.step(last, batches), device) if profiled else []
    return {
        "config": dataclasses.asdict(config) | {"output_dir": "", "train_files": "", "val_files": ""},
        "implementations": trainer.model.impls,
        "tokens": "shards" if shards else "drawn documents",
        "sequences": sequences,
        "ceiling": ceiling,
        "copy": copy,
        "peak_memory_mib": peak,
        "whole_step": whole,
        "breakdown_at_end": pieces,
        "parts_at_end_one_sequence": part_rows,
        "profile_at_end": kernels,
    }


def attention_flops(config, inputs: Sequence[Tensor], step: int) -> float:
    """FLOPs of attention, forward (4 a pair and width) and backward (10), over the allowed pairs of these inputs. Of
    the 14 eight are products with queries or keys, whose heads, where they are narrow, count as wide as the kernels
    take them."""
    from kernels.attention import width_taken

    def width(layer: int) -> float:
        narrow = config.narrow_qk if narrow_rows(config, layer) else 0
        rows = config.num_heads * width_taken(narrow) if narrow else config.model_dim
        return 8.0 * rows + 6.0 * config.model_dim

    total = 0.0
    for layers, plan in attention_plans(config, inputs, step):
        query = torch.arange(1, plan.first_key_BT.shape[1] + 1, device=plan.first_key_BT.device)
        pairs = int((query - plan.first_key_BT.to(torch.int64)).sum())
        total += sum(width(layer) for layer in layers) * pairs
    return total


def attention_plans(config, inputs: Sequence[Tensor], step: int) -> Iterator[tuple[list[int], Any]]:
    """The plan of each of these inputs, and the layers that have it, for long and for short windows."""
    from kernels.attention import attention_plan

    window = schedule.window_blocks_at(step, config)
    long, free = numbers(config.long_window_layers), numbers(config.attention_free_layers)
    short = [layer for layer in range(config.num_layers) if layer not in {*long, *free}]
    for layers, blocks in ((long, window), (short, schedule.short_window(window, config))):
        reach = dict(window_blocks=blocks, block_tokens=config.block_tokens)
        if config.exact_windows:
            reach = dict(window_tokens=blocks * config.block_tokens + 1)
        for tokens_T in inputs:
            yield layers, attention_plan(tokens_T[None], eos_id=config.eos_id, **reach)


def report(result: dict) -> str:
    """The result as tables."""
    pieces = [{"breakdown": k, "ms": v["median_ms"], "iqr": v["iqr_ms"]} for k, v in result["breakdown_at_end"].items()]
    ceiling, copy = result["ceiling"], result["copy"]
    lines = [
        f"measured ceilings: {ceiling['tflops']:.4g} TFLOP/s ({ceiling['dtype']} products of {ceiling['size']}), "
        f"{copy['gb_per_s']:.4g} GB/s (copies); peak memory {result['peak_memory_mib']:.0f} MiB",
        "",
        table(
            [
                {
                    "whole step": row["at"],
                    "window": row["window_blocks"],
                    "ms": row["median_ms"],
                    "iqr": row["iqr_ms"],
                    "tokens/s": f"{row['tokens_per_s']:,.0f}",
                    "TFLOP": row["tflop"],
                    "MFU": f"{row['mfu_of_measured_ceiling']:.1%}",
                }
                for row in result["whole_step"]
            ]
        ),
        "",
        table(pieces),
    ]
    if result["parts_at_end_one_sequence"]:
        keys = ("part", "times", "tflop", "gb", "floor_ms", "measured_ms", "over_floor")
        rows = [{key: row[key] for key in keys} for row in result["parts_at_end_one_sequence"]]
        measured = [row["measured_ms"] for row in rows]
        total = {"part": "sum", "times": "", "tflop": sum(r["tflop"] for r in rows), "gb": sum(r["gb"] for r in rows)}
        total["floor_ms"] = sum(r["floor_ms"] for r in rows)
        total["measured_ms"] = None if None in measured else sum(measured)
        total["over_floor"] = None if None in measured else sum(measured) / total["floor_ms"]
        lines += ["", table([*rows, total])]
    return "\n".join(lines)


@dataclass(frozen=True)
class Options:
    """What this command takes beside fields of train_gpt.py."""

    repeats: int | None = setting(None, "steps", "timed (20 on a GPU, 7 on a CPU)", at_least=1)
    sequences: int | None = setting(None, "packed sequences", "a step (1 on a GPU, the preset's on a CPU)", at_least=1)
    tokens: str | None = setting(None, "glob", "token shards to take the documents from")
    no_parts: bool = setting(False, "flag", "whole step and breakdown only")
    profile: bool = setting(False, "flag", "time by kernel, too, of one step")
    label: str = setting("", "word", "ends the result's name")
    out: str | None = setting(None, "folder", "of the result (bench/results)")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if helped(argv, __doc__, Options):
        return 0
    on_gpu = torch.cuda.is_available()
    try:
        options, config = own_and_config(Options, argv, "medium" if on_gpu else "nano")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    sequences = options.sequences or (1 if on_gpu else config.tokens_per_step // config.train_seq_len)
    repeats = options.repeats or (20 if on_gpu else 7)
    how = dict(shards=options.tokens, parts=not options.no_parts, profiled=options.profile)
    result = run(config, sequences=sequences, repeats=repeats, **how)
    print(report(result))
    name = f"step-{config.preset}" + ("" if config.kernels == "auto" else f"-{config.kernels}")
    name += f"-{options.label}" if options.label else ""
    path = write_result(name, result, folder=Path(options.out) if options.out else None)
    print(f"\nkept in {path.relative_to(REPO) if path.is_relative_to(REPO) else path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
