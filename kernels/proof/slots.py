"""What attention's kernels ask of a Hopper multiprocessor's schedulers, counted from their machine code.

    python -m kernels.proof --part slots             print it
    python -m kernels.proof --part slots --update    and write docs/slots.md, and slots.json with the loops

An innermost loop has so many instructions a warp and keeps the tensor cores busy for so many cycles
(`machine_code.tensor_loops`); the plan of a row of documents says how often each loop runs. Nothing here is measured:
it is how a kernel is chosen to be tried on a device, not what it does there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels.attention import SCHEDULE_TOKENS, AttentionPlan, attention_plan
from kernels.attention_gluon import HALF, TILE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "slots.md"
LOOPS = Path(__file__).with_name("slots.json")
#: What is launched in each direction for each name of an implementation.
PASSES = {
    ("forward", "triton"): ("_attention_forward",),
    ("forward", "specialised"): ("_attention_forward_specialised",),
    ("forward", "gluon"): ("_attention_forward_gluon",),
    ("backward", "triton"): ("_attention_dq", "_attention_dkdv"),
    ("backward", "gluon"): ("_attention_dq_gluon", "_attention_dkdv_gluon"),
    ("backward", "gluon_one_pass"): ("_attention_backward_gluon",),
}
#: Bytes that a kernel moves for each number of a head's queries, at least: operands of 16 bits read once, results
#: written once, and in a layer's backward pass the raw values; of the one pass also its float32 sums, fetched and
#: written back once, as programs that run at once add to few of them.
MOVED = {
    "_attention_forward": 8,
    "_attention_forward_specialised": 8,
    "_attention_forward_gluon": 8,
    "_attention_dq": 12,
    "_attention_dkdv": 14,
    "_attention_dq_gluon": 12,
    "_attention_dkdv_gluon": 14,
    "_attention_backward_gluon": 14 + 8,
}
#: FLOPs a pair of tokens and a column of a head: 2 for each product of the definition.
FLOPS = {"forward": 4, "backward": 10}
FLOPS_A_CYCLE = 4096
#: Of large products and of copies on an H100, as bench/rehearse/project.py has them.
CEILING_TFLOPS, CEILING_GB_PER_S = 798.0, 3000.0
#: Of memory, in a cycle of one multiprocessor at these ceilings.
BYTES_A_CYCLE = CEILING_GB_PER_S * 1e9 / (CEILING_TFLOPS * 1e12 / FLOPS_A_CYCLE)
TOKENS = 65536
WINDOWS = (128, 1664, 3456)
WIDTHS = (128, 64)
HEADS = 8


class Walk(NamedTuple):
    """How many tiles of 64 queries times keys (forward, dq) or of 64 keys times queries (dk and dv) a kernel visits
    over a plan: fully allowed ones, and masked ones."""

    full: int
    masked: int
    full_keys: int
    masked_keys: int

    @property
    def pairs(self) -> int:
        return 64 * (self.full * self.full_keys + self.masked * self.masked_keys)


class Asked(NamedTuple):
    """Of a pass over a plan, one head: slots that its loops ask of a scheduler, cycles that their products take, and
    those that the products of the allowed pairs would take; pairs in visited tiles, and those of them that are masked,
    a kernel."""

    slots: float
    busy: float
    least: float
    pairs: float
    masked: float


def documents(length: int = TOKENS) -> torch.Tensor:
    """(length,) tokens of which 0 opens a document; lengths log-normal as FineWeb's (median 400, mean 690)."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.ones(length, dtype=torch.int32)
    lengths = torch.exp(torch.randn(length // 100, generator=random) * 1.04 + 6.0).long().clamp(min=2)
    starts = lengths.cumsum(0) - lengths[0]
    tokens[starts[starts < length]] = 0
    return tokens


def walk(kernel: str, plan: AttentionPlan) -> Walk:
    """The tiles of the kernel of that name (of PASSES) over the plan's sequences, one head."""
    if kernel in ("_attention_dkdv", "_attention_backward_gluon", "_attention_dkdv_gluon"):
        return _walk_of_keys(kernel, plan)
    if kernel == "_attention_dq_gluon":
        return _walk_of_queries(plan)
    full = masked = 0
    for first in plan.first_key_BT.tolist():
        T = len(first)
        for row in range(0, T, SCHEDULE_TOKENS):
            end = min(row + SCHEDULE_TOKENS, T)
            oldest, newest = first[row], first[end - 1]
            if kernel in ("_attention_forward", "_attention_dq"):  # 64 keys at once, both groups alike
                interior = max(row - newest, 0) // 64
                edge = -(-max(row - interior * 64 - oldest, 0) // 64)
                full, masked = full + 2 * interior, masked + 2 * (edge - (-(end - row) // 64))
            elif kernel == "_attention_forward_specialised":
                masked += 2 * (-(-(row - oldest) // TILE) + 1)
            else:
                tiles = -(-max(row - oldest, 0) // TILE)
                for begin in (row, row + HALF):
                    own = max(row - first[min(begin + HALF, T) - 1], 0) // TILE
                    oldest_own = first[min(begin, T - 1)]
                    keys = [row - (t + 1) * TILE + h * HALF for t in range(own, tiles) for h in range(2)]
                    seen = [key for key in (*keys, row, row + HALF) if key <= begin and key + HALF > oldest_own]
                    full, masked = full + own, masked + len(seen)
    if kernel == "_attention_forward_specialised":
        return Walk(full, masked, TILE, TILE)
    return Walk(full, masked, TILE if kernel == "_attention_forward_gluon" else 64, HALF)


def _walk_of_keys(kernel: str, plan: AttentionPlan) -> Walk:
    """Of the kernels that own 128 keys, 64 a group, and walk 64 queries at once, both groups alike."""
    full = masked = 0
    for ends in plan.end_query_BT.tolist():
        T = len(ends)
        for key in range(0, T, SCHEDULE_TOKENS):
            end = ends[min(key + SCHEDULE_TOKENS, T) - 1]
            if kernel == "_attention_dkdv":  # queries from the next 128 on until the first key's end: in full
                start = key + SCHEDULE_TOKENS
                interior = max(ends[key] - start, 0) // 64
                edge = -(-max(end - start - interior * 64, 0) // 64)
                full, masked = full + 2 * interior, masked + 2 * (edge - (-(min(start, end) - key) // 64))
                continue
            for own in (key, key + HALF):  # a group leaves out what sees none of its keys
                rows = range(own, ends[min(own + HALF, T) - 1] if own < T else own, HALF)
                seen_whole = sum(row >= own + HALF and row + HALF <= ends[own] for row in rows)
                full, masked = full + seen_whole, masked + len(rows) - seen_whole
    return Walk(full, masked, HALF, HALF)


def _walk_of_queries(plan: AttentionPlan) -> Walk:
    """Of `_attention_dq_gluon`, whose groups own 64 queries and walk 64 keys at once."""
    full = masked = 0
    for first in plan.first_key_BT.tolist():
        T = len(first)
        for own in range(0, -(-T // TILE) * TILE, HALF):
            oldest, newest = first[min(own, T - 1)], first[min(own + HALF, T) - 1]
            keys = range(oldest // HALF * HALF, own, HALF)
            full += (seen_whole := sum(key >= newest for key in keys))
            masked += len(keys) - seen_whole + 1  # the diagonal
    return Walk(full, masked, HALF, HALF)


def tile_loops(kernel: str, width: int, loops: list[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(instructions, cycles) of one tile of `Walk`, full and masked, from the loops of the machine code."""
    if kernel == "_attention_forward_specialised":  # its one loop masks every tile
        return max(loops), max(loops)
    if kernel == "_attention_backward_gluon":  # its one loop has the mask behind a branch; counted as always taken
        # and dq's product is in it twice, for tiles that see both groups' keys and for those that see one's; at width
        # 64 the groups make it by turns: so cycles are not the loop's, but those of five products of a group's keys
        one = loops[0][0], FLOPS["backward"] * HALF * HALF * width // FLOPS_A_CYCLE
        return one, one
    if kernel in ("_attention_dq_gluon", "_attention_dkdv_gluon"):  # likewise, one loop a group
        return max(loops), max(loops)
    if kernel in ("_attention_dq", "_attention_dkdv"):  # what is masked comes first
        return loops[1], loops[0]
    full, masked = loops[0], loops[1]
    if kernel == "_attention_forward_gluon":  # a masked step is two halves
        masked = (masked[0] // 2, masked[1] // 2)
    return full, masked


def allowed(plan: AttentionPlan) -> int:
    """Pairs of tokens that see each other."""
    first = plan.first_key_BT.to(torch.int64)
    return int((torch.arange(1, first.shape[1] + 1) - first).sum())


def asked(direction: str, name: str, plan: AttentionPlan, width: int, loops: dict[str, list] | None = None) -> Asked:
    """What that pass of the implementation `name` asks for over the plan; loops: kernel -> those of a full and of a
    masked tile, by default the committed ones.

    Raises: KeyError for a head width that was not counted."""
    loops = committed(width) if loops is None else loops
    parts = [asked_of(kernel, plan, width, loops[kernel]) for kernel in PASSES[direction, name]]
    slots, busy, pairs, masked = (sum(part) for part in zip(*parts))
    least = FLOPS[direction] * allowed(plan) * width / FLOPS_A_CYCLE
    return Asked(slots, busy, least, pairs / len(parts), masked / len(parts))


def asked_of(kernel: str, plan: AttentionPlan, width: int, loops: list) -> tuple[float, float, float, float]:
    """(slots, busy cycles, pairs, masked pairs) of one kernel, as in `Asked`; loops: of a full and of a masked tile."""
    visited, (whole, edge) = walk(kernel, plan), loops
    slots, busy = (float(visited.full * whole[i] + visited.masked * edge[i]) for i in range(2))
    return slots, busy, visited.pairs, visited.masked * visited.masked_keys * 64


def memory_cycles(kernel: str, plan: AttentionPlan, width: int) -> float:
    """Cycles of a multiprocessor, at the ceilings, in which memory moves what the kernel does at least, one head."""
    return MOVED[kernel] * plan.first_key_BT.numel() * width / BYTES_A_CYCLE


def committed(width: int) -> dict[str, list]:
    """slots.json's loops at that head width."""
    return json.loads(LOOPS.read_text())["loops"][str(width)]


def added_bytes(plan: AttentionPlan, width: int) -> int:
    """What the one pass adds to the float32 sums of dq over the plan, one head: each tile of 64 queries once for 128
    keys."""
    tiles = 0
    for ends in plan.end_query_BT.tolist():
        T = len(ends)
        tiles += sum(-(-(ends[min(key + TILE, T) - 1] - key) // HALF) for key in range(0, T, TILE))
    return tiles * HALF * width * 4


def around_bytes(plan: AttentionPlan, width: int) -> int:
    """What the two kernels around the one pass read and write, one head, 16 bits: o and its gradient, zeros for the
    sums; the sums, queries and dq."""
    return plan.first_key_BT.numel() * width * (2 + 2 + 4 + 4 + 2 + 2)


def count(launched: Callable[[str, int], Any]) -> dict[str, Any]:
    """{"rows": one a pass, implementation, head width and window, "loops": head width -> kernel -> loops of a full and
    a masked tile, "sums": the one pass's float32 sums}; `launched(kernel, width)` is its compilation for sm_90."""
    from kernels.proof.machine_code import tensor_loops

    rows, sums = [], []
    tokens = documents()
    plans = {w: attention_plan(tokens, eos_id=0, window_blocks=w // SCHEDULE_TOKENS) for w in WINDOWS}
    kernels = [kernel for group in PASSES.values() for kernel in group]
    loops = {
        width: {k: tile_loops(k, width, tensor_loops(launched(k, width).asm["cubin"])) for k in kernels}
        for width in WIDTHS
    }
    for width in WIDTHS:
        for (direction, name), group in PASSES.items():
            whole, edge = (
                [sum(loops[width][kernel][masked][i] for kernel in group) for i in range(2)] for masked in range(2)
            )
            for window, plan in plans.items():
                found, pairs = asked(direction, name, plan, width, loops[width]), allowed(plan)
                rows.append(
                    {
                        "width": width,
                        "pass": direction,
                        "kernel": name,
                        "full tile": whole[0] / whole[1],
                        "masked tile": edge[0] / edge[1],
                        "window": window,
                        "tiles' work over allowed": found.pairs / pairs,
                        "masked work": found.masked / found.pairs,
                        "busy over needed": found.busy / found.least,
                        "slots a busy cycle": found.slots / found.busy,
                        "slots a needed cycle": found.slots / found.least,
                        "memory over needed": sum(memory_cycles(k, plan, width) for k in group) / found.least,
                    }
                )
        sums += [
            {
                "width": width,
                "window": window,
                "added in bulk": added_bytes(plan, width) * HEADS / 1e9,
                "around": around_bytes(plan, width) * HEADS / 1e9,
                "bytes added a needed cycle": added_bytes(plan, width)
                / asked("backward", "gluon_one_pass", plan, width, loops[width]).least,
            }
            for window, plan in plans.items()
        ]
    return {"rows": rows, "loops": loops, "sums": sums}


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
    rows = list(rows)
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [f"{x:.2f}" if isinstance(x, float) else str(x) for x in row.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


_COUNTED = """Counted in the machine code for sm_90 ({made_with}). **Nothing here is measured**, and of these
kernels only `triton` is used unasked. A scheduler issues one instruction a cycle. Where a loop asks for more than
one in a cycle that the tensor cores are busy, these must wait; far below one, there is room for what a count does
not see: waiting for a barrier, for memory, for a result."""
_COLUMNS = """full tile, masked tile: instructions a warp over cycles of the tensor cores, in the loop of tiles
where every pair is allowed and in that where a mask is computed. Then over a row of 65,536 tokens of documents
(median 400, mean 690 tokens) under a window: what the visited tiles hold over the pairs that are allowed, the share
of it that is masked, the cycles that the products take over those that the definition's (two forward, five backward)
would take for the allowed pairs alone, the slots over the first, and the slots over the second. A kernel whose warps
have roles of their own takes the larger of slots and busy cycles, the plain ones their sum, and none less than memory
needs to move its operands and results once: the last column, in the same unit, at 3 TB/s where the tensor cores do
798 TFLOP/s."""
_SPECIALISED = """`specialised` has one loop, which masks every tile. At head width 64 it asks for more slots than
there are in all of them, and `--kernels=specialised` is refused there. It has no backward pass of its own."""
_BACKWARD = """Backward, `triton` and `gluon` take two passes of seven products, `gluon_one_pass` one of five, behind
`gluon`'s forward pass: each tile's share of dq is added to float32 sums in device memory by the copy engine. Loops of
`gluon` backward have their mask behind a branch, which is counted as taken in every tile. The sums have their price,
which two passes do not pay: they are zeroed, and read to be rounded (in the same kernel to the gradient at the
projection), together with delta = rowsum(o do) two kernels that are nothing but traffic, `around`; and what the copy
engine adds goes through the second-level cache beside the products. In GB for 65,536 tokens and 8 heads, and in bytes
of one multiprocessor a cycle that the products need:"""
_PRICE = """How much of what is added goes on to memory hangs on the order of programs. 132 run at once. In the order of
falling work they add to rows all over a layer's sums (268 MB at width 128), of which the level-2 cache (50 MB) holds a
fifth, so that most additions would fetch and write back what they add to: twice `added in bulk`. They go through one
head after another and through its keys as they lie instead: then they add to the rows that 132 x 128 keys and a window
of 3456 reach, 10 MB at most, as much again of queries and gradients, and each row is fetched and written back about
once (`memory over needed` has that).

At the ceilings the traffic around costs as long as {products:.1f} of the five products of the allowed pairs at width
128 under the longest window, while two products are saved. FlashAttention-3, which adds likewise, reports backward 316
TFLOP/s where a query sees 1,024 keys in the mean (causal, 2k tokens), 444 for 2,048 and 539 for 4,096; in documents as
short as FineWeb's a query of `medium` sees some 500 in the middle of the run. There two passes cost less by count, and
they are what `gluon` takes; their results repeat to the bit, `--deterministic` or not, and every Triton has their
words. In one pass sums differ from run to run in their last bits, and before 3.9 threads add what they hold, some 50
instructions a tile more; it is chosen by name, for `python -m bench.attention` to time."""


def page(counted: dict[str, Any], made_with: str) -> str:
    """docs/slots.md."""
    last = [row for row in counted["sums"] if row["width"] == WIDTHS[0]][-1]
    plan = attention_plan(documents(), eos_id=0, window_blocks=last["window"] // SCHEDULE_TOKENS)
    one_product = 2 * allowed(plan) * WIDTHS[0] * HEADS / CEILING_TFLOPS / 1e12
    price = _PRICE.format(products=last["around"] / CEILING_GB_PER_S / one_product)
    words = ["# Issue slots of attention's kernels on Hopper"]
    words += ["Generated by `python -m kernels.proof --part slots --update`; do not edit."]
    words += [_COUNTED.format(made_with=made_with), _COLUMNS, "\n".join(table(counted["rows"])), _SPECIALISED]
    words += [_BACKWARD, "\n".join(table(counted["sums"])), price]
    return "\n\n".join(words) + "\n"


def keep(counted: dict[str, Any], made_with: str) -> None:
    """Write docs/slots.md and slots.json."""
    PAGE.write_text(page(counted, made_with))
    LOOPS.write_text(json.dumps({"made_with": made_with, "loops": counted["loops"]}, indent=1) + "\n")
