"""Milliseconds of a step from what was counted, at ceilings and efficiencies that are stated: a projection, no result.

Each part costs its FLOPs at the rate of products, or its bytes at the rate of memory, whichever is more, divided by an
efficiency; parts follow one another. What is not known without a GPU is how near a kernel comes to its ceiling: the
efficiencies below are assumptions, each with its ground, and the first hour on a GPU replaces them (bench.gpu).

Attention is one assumed rate, that of the plain kernels, times what the chosen kernels cost of them by count
(`over_plain`). A pass over a plan keeps the tensor cores busy for so many cycles and asks a scheduler for so many
slots (docs/slots.md: tiles as they are visited, masked ones at their own price). The plain kernels' warps meet at
barriers and do both by turns: they cost the sum. Where warps have roles of their own both go on side by side: the
larger counts. No kernel costs less than memory takes for its operands and results, each moved once. What else keeps a
kernel from its ceiling (waiting, the last wave, prologues) is taken to be the same share of either. The two kernels
around the one backward pass are traffic, and cost their bytes like any other; its sums are fetched and written back
once, beside its products, as docs/slots.md argues.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kernels.proof import slots


@dataclass(frozen=True)
class Ceilings:
    """Rates that large products, copies and messages reach on a device. TFLOP/s, TB/s, GB/s a process sends."""

    tflops_16: float
    tflops_8: float
    tb_per_s: float
    link_gb_per_s: float


#: h100: large bfloat16 products and copies as measured on this chip's larger-memory sibling; 8 bit twice, less 15 %
#: (assumed); NVLink's 450 GB/s a direction at 75 % (assumed). The others in proportion of their data sheets.
CEILINGS = {
    "h100": Ceilings(798, 1350, 3.0, 340),
    "a100": Ceilings(250, 250, 1.4, 200),
    "l40s": Ceilings(290, 580, 0.75, 25),
    "rtx4090": Ceilings(150, 300, 0.9, 10),
    "rtx3090": Ceilings(65, 65, 0.85, 10),
}

#: (kind, is it a product) -> share of the ceiling. Library products of these shapes: 690 to 700 TFLOP/s of 798 in
#: public traces. Own products: one program a multiprocessor; the next tile's loads run under the epilogue, its products
#: do not, which is some 1,300 of 20,000 cycles a tile (0.76 with a program a tile, whose first loads wait as well).
#: Inductor's: one configuration for most, few warps. Muon's symmetric products: small batches. Elementwise kernels of
#: our own and torch's: streams.
EFFICIENCY = {
    ("product", True): 0.87,
    ("own", True): 0.81,
    ("inductor", False): 0.80,
    ("own", False): 0.85,
    ("torch", False): 0.85,
}
#: Plain attention: of the allowed pairs' FLOPs, forward and backward together, in TFLOP/s on an H100 (assumed:
#: documents of 690 tokens, tiles that are a third masked); scaled with the device's products.
ATTENTION_TFLOPS = 230.0
#: How a pass's busy cycles and its slots make its cost.
TOGETHER = {"triton": sum, "specialised": max, "gluon": max, "gluon_one_pass": max}
#: Kernels around attention's one backward pass.
AROUND = ("_attention_rows", "_attention_dq_rounded")
#: FlexAttention in the published reference run, derived from its step.
FLEX_TFLOPS = 250.0
LAUNCH_GAP_US = 2.0  # between kernels, where the queue is full


def milliseconds(row: dict[str, Any], device: str) -> tuple[float, float]:
    """(of a row of counts at its ceiling and efficiency, of its products at their ceiling alone)."""
    ceilings = CEILINGS[device]
    rate = ceilings.tflops_8 if row["bits"] == 8 else ceilings.tflops_16
    products, memory = row["flops"] / rate / 1e9, row["bytes"] / ceilings.tb_per_s / 1e9
    return max(products, memory) / EFFICIENCY[row["kind"], products > 0], products


def travel(
    stretches: Iterable[dict[str, Any]], cost: Callable[[dict[str, Any]], float], link: float, world: int
) -> list[dict[str, Any]]:
    """A step's messages, and how long its kernels wait for each: both queues played through as they were filled.

    stretches: of `bench.rehearse.counts`; cost: milliseconds of a row; link: GB/s a process. A message begins when what
    was launched before it has run and the message before it is through, and takes a ring's time. Returns of each its
    operator, MB, and in ms since the step began when it was sent and when it is there, and how long it was waited for.
    """
    now = free = 0.0
    found: list[dict[str, Any]] = []
    share = (world - 1) / world / link / 1e6
    for stretch in stretches:
        now += sum(cost(row) + row["launches"] * LAUNCH_GAP_US / 1e3 for row in stretch["kernels"])
        if "sends" in stretch:
            name, size = stretch["sends"]
            free = max(free, now) + share * size * (2 if "allreduce" in name else 1)
            found.append({"message": name, "MB": size / 1e6, "sent": now, "there": free, "waited for": 0.0})
        elif "awaits" in stretch:
            message = found[stretch["awaits"]]
            message["waited for"] = max(0.0, message["there"] - now)
            now += message["waited for"]
    return found


def project(counted: dict[str, Any], attention_tflop: float, over_plain: float = 1.0) -> dict[str, Any]:
    """Counts of one step (bench.rehearse), its attention's TFLOP over allowed pairs and what its kernels cost of the
    plain ones -> milliseconds by part.

    Returns {"parts": {part: ms}, "ms": sum, "floor_ms": all products and no efficiency, "messages": of `travel`}."""
    step, device = counted["step"], counted["device"]
    ceilings = CEILINGS[device]
    parts: dict[str, float] = {}
    floor = 0.0
    for row in filter(_by_itself, step["kernels"]):
        ms, products = milliseconds(row, device)
        floor += products
        parts[part_of(row)] = parts.get(part_of(row), 0.0) + ms
    scale = ceilings.tflops_16 / CEILINGS["h100"].tflops_16
    flexible = any("flex_attention" in row["kernel"] for row in step["kernels"])
    rate = FLEX_TFLOPS if flexible else ATTENTION_TFLOPS / over_plain
    of_attention = attention_tflop / (rate * scale) * 1e3
    parts["attention"] = parts.get("attention", 0.0) + of_attention
    launched = collections.Counter()  # of attention's kernels, by direction: forward has two of seven products
    for row in step["kernels"]:
        launched[row["phase"] == "forward"] += 0 if _by_itself(row) else row["launches"]

    def cost(row: dict[str, Any]) -> float:
        if _by_itself(row):
            return milliseconds(row, device)[0]
        forward = row["phase"] == "forward"
        return of_attention * (2 if forward else 5) / 7 * row["launches"] / launched[forward]

    messages = travel(step["queues"], cost, ceilings.link_gb_per_s, counted["world"])
    if messages:
        parts["messages not hidden"] = sum(message["waited for"] for message in messages)
    parts["gaps between launches"] = step["launches"] * LAUNCH_GAP_US / 1e3
    parts = dict(sorted(parts.items(), key=lambda kv: -kv[1]))
    floor += attention_tflop / ceilings.tflops_16 * 1e3
    return {"parts": parts, "ms": sum(parts.values()), "floor_ms": floor, "messages": messages}


def _by_itself(row: dict[str, Any]) -> bool:
    """Whether a row costs what it counts, and is no kernel of attention's, which cost one rate together."""
    return part_of(row) != "attention" or row["kernel"] in AROUND


#: Operators of torch's outside of the compiled step, by what they are for: rows of `ngram_rows`, whose table is counted
#: whole each time; the average of the weights, which takes only the end of a run.
ROWS, AVERAGE = "rows of n-grams, their table counted whole", "the weights' average"
_AT_THE_END = dict.fromkeys(("aten.index.Tensor", "aten.index_put_"), ROWS) | dict.fromkeys(
    ("aten.lerp.Scalar", "aten.lerp_.Scalar", "aten.linalg_vector_norm", "aten.bitwise_or.Tensor"), AVERAGE
)


def part_of(row: dict[str, Any]) -> str:
    """The part of a step that a row of counts belongs to, in the words of the projection's table."""
    phase, part, kind = row["phase"], row["part"], row["kind"]
    if kind == "torch" and phase in ("start", "end") and row["kernel"] in _AT_THE_END:
        return _AT_THE_END[row["kernel"]]
    if phase in ("muon", "adam"):
        return {"muon": "Muon", "adam": "AdamW"}[phase]
    if row["kernel"].startswith("_attention") or "flex_attention" in row["kernel"]:
        return "attention"
    if part in ("attention_layer", "attention_inputs", "attention", "heads"):
        return "attention projections" if kind == "product" else "attention inputs"
    if part in ("mlp", "mlp8"):
        return "MLP"
    if part == "cross_entropy":
        return "head and loss"
    if part == "products8":
        return "conversions to 8 bits"
    if kind == "product" and row["bits"] == 8:  # beside the head's: compiled code does not tell whose they are
        return "MLP and attention projections, 8-bit products"
    return "attention projections" if kind == "product" else "norms, mixes, embeddings"


def passes(kernels: Iterable[str]) -> dict[str, str]:
    """{"forward": name, "backward": name} of the implementations that such a list of launched kernels shows."""
    launched = set(kernels)
    return {
        direction: next(
            (n for (d, n), group in slots.PASSES.items() if d == direction and launched & {*group}), "triton"
        )
        for direction in slots.FLOPS
    }


def cost(direction: str, name: str, plan: Any, width: int) -> float:
    """Cycles of a multiprocessor that a pass over the plan costs one head, before what is the same share of either."""
    cycles, loops = 0.0, slots.committed(width)
    for kernel in slots.PASSES[direction, name]:
        asked, busy, *_ = slots.asked_of(kernel, plan, width, loops[kernel])
        cycles += max(TOGETHER[name]((busy, asked)), slots.memory_cycles(kernel, plan, width))
    return cycles


def over_plain(config: Any, sequences: int, kernels: Iterable[str]) -> float:
    """What the attention of a step in the middle of the run costs by count over what the plain kernels would; drawn
    documents as in `attention_tflop`. 1 for the plain kernels, whatever the head width."""
    from bench.step import attention_plans, draw_documents

    chosen = passes(kernels)
    if set(chosen.values()) == {"triton"}:
        return 1.0
    drawn = [draw_documents(config.train_seq_len, config.vocab_size, config.eos_id, s) for s in range(sequences)]
    ours = plain = 0.0
    for layers, plan in attention_plans(config, drawn, config.num_iterations // 2):
        for direction, name in chosen.items():
            ours += len(layers) * cost(direction, name, plan, config.model_dim // config.num_heads)
            plain += len(layers) * cost(direction, "triton", plan, config.model_dim // config.num_heads)
    return ours / plain


def attention_tflop(config, sequences: int = 1) -> float:
    """Forward and backward TFLOP of a step's attention in the middle of the run, allowed pairs of drawn documents."""
    from bench.step import attention_flops, draw_documents

    drawn = [draw_documents(config.train_seq_len, config.vocab_size, config.eos_id, s) for s in range(sequences)]
    return attention_flops(config, drawn, config.num_iterations // 2) / 1e12
