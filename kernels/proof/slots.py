"""What attention's forward kernels ask of a Hopper multiprocessor's schedulers, counted from their machine code.

    python -m kernels.proof --part slots             print it
    python -m kernels.proof --part slots --update    and write docs/slots.md

An innermost loop has so many instructions a warp and keeps the tensor cores busy for so many cycles
(`machine_code.tensor_loops`); the plan of a row of documents says how often each loop runs. Nothing here is measured:
it is how a kernel is chosen to be tried on a device, not what it does there.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels.attention import FORWARDS, SCHEDULE_TOKENS, AttentionPlan, attention_plan
from kernels.attention_gluon import HALF, TILE

PAGE = Path(__file__).resolve().parents[2] / "docs" / "slots.md"
TOKENS = 65536
WINDOWS = (128, 1664, 3456)
WIDTHS = (128, 64)


class Walk(NamedTuple):
    """How many tiles of 64 queries times keys a kernel visits over a plan: fully allowed ones, and masked ones."""

    full: int
    masked: int
    full_keys: int
    masked_keys: int

    @property
    def pairs(self) -> int:
        return 64 * (self.full * self.full_keys + self.masked * self.masked_keys)


def documents(length: int = TOKENS) -> torch.Tensor:
    """(length,) tokens of which 0 opens a document; lengths log-normal as FineWeb's (median 400, mean 690)."""
    random = torch.Generator().manual_seed(0)
    tokens = torch.ones(length, dtype=torch.int32)
    lengths = torch.exp(torch.randn(length // 100, generator=random) * 1.04 + 6.0).long().clamp(min=2)
    starts = lengths.cumsum(0) - lengths[0]
    tokens[starts[starts < length]] = 0
    return tokens


def walk(kernel: str, plan: AttentionPlan) -> Walk:
    """The tiles of `kernel` (of FORWARDS) over the plan's sequences, one head."""
    full = masked = 0
    for first in plan.first_key_BT.tolist():
        T = len(first)
        for row in range(0, T, SCHEDULE_TOKENS):
            end = min(row + SCHEDULE_TOKENS, T)
            oldest, newest = first[row], first[end - 1]
            if kernel == "triton":  # 64 keys at once, both groups alike
                interior = max(row - newest, 0) // 64
                edge = -(-max(row - interior * 64 - oldest, 0) // 64)
                full, masked = full + 2 * interior, masked + 2 * (edge - (-(end - row) // 64))
            elif kernel == "specialised":
                masked += 2 * (-(-(row - oldest) // TILE) + 1)
            else:
                tiles = -(-max(row - oldest, 0) // TILE)
                for begin in (row, row + HALF):
                    own = max(row - first[min(begin + HALF, T) - 1], 0) // TILE
                    oldest_own = first[min(begin, T - 1)]
                    keys = [row - (t + 1) * TILE + h * HALF for t in range(own, tiles) for h in range(2)]
                    seen = [key for key in (*keys, row, row + HALF) if key <= begin and key + HALF > oldest_own]
                    full, masked = full + own, masked + len(seen)
    return Walk(full, masked, 64 if kernel == "triton" else TILE, TILE if kernel == "specialised" else HALF)


def loops_of(kernel: str, loops: list[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(instructions, cycles) of one tile of `Walk`, full and masked, from the loops of the machine code."""
    if kernel == "specialised":  # its one loop masks every tile
        return max(loops), max(loops)
    full, masked = loops[0], loops[1]
    if kernel == "gluon":  # a masked step is two halves
        masked = (masked[0] // 2, masked[1] // 2)
    return full, masked


def count(launched: Callable[[str, int], Any]) -> list[dict[str, Any]]:
    """One row a kernel, head width and window; `launched(kernel, width)` is its compilation for sm_90."""
    from kernels.proof.machine_code import tensor_loops

    rows = []
    tokens = documents()
    plans = {w: attention_plan(tokens, eos_id=0, window_blocks=w // SCHEDULE_TOKENS) for w in WINDOWS}
    allowed = {}
    for window, plan in plans.items():
        position = torch.arange(TOKENS)
        allowed[window] = int((position - plan.first_key_BT[0] + 1).sum())
    walks = {(kernel, window): walk(kernel, plan) for kernel in FORWARDS for window, plan in plans.items()}
    for width in WIDTHS:
        for kernel in FORWARDS:
            full, masked = loops_of(kernel, tensor_loops(launched(kernel, width).asm["cubin"]))
            for window in WINDOWS:
                visited = walks[kernel, window]
                slots = visited.full * full[0] + visited.masked * masked[0]
                busy = visited.full * full[1] + visited.masked * masked[1]
                least = allowed[window] * width / 1024  # cycles: 4 FLOPs a pair and column, 4,096 a cycle
                rows.append(
                    {
                        "width": width,
                        "kernel": kernel,
                        "full tile": full[0] / full[1],
                        "masked tile": masked[0] / masked[1],
                        "window": window,
                        "tiles' work over allowed": visited.pairs / allowed[window],
                        "masked work": visited.masked * visited.masked_keys * 64 / visited.pairs,
                        "slots a busy cycle": slots / busy,
                        "slots a needed cycle": slots / least,
                    }
                )
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The rows as Markdown."""
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
of it that is masked, the slots over the cycles that the products take, and over those that the allowed pairs would
take: the last number is what counts."""
_SPECIALISED = """`specialised` has one loop, which masks every tile. At head width 64 it asks for more slots than
there are in all of them, and `--kernels=specialised` is refused there."""


def page(rows: list[dict[str, Any]], made_with: str) -> str:
    """docs/slots.md."""
    title = "# Issue slots of attention's forward kernels on Hopper"
    made = "Generated by `python -m kernels.proof --part slots --update`; do not edit."
    words = [title, made, _COUNTED.format(made_with=made_with), _COLUMNS, "\n".join(table(rows)), _SPECIALISED]
    return "\n\n".join(words) + "\n"
