"""Budgets: what a step may cost. They stand in bench/budgets.json, beside the goals; a change that exceeds one fails.

A budget is what the program reached when it was last set, rounded up a little: `python -m bench.rehearse --set-budgets`
sets those of the form it counted. Lower is better everywhere.
"""

from __future__ import annotations

import json
import math
from typing import Any

from bench.common import REPO, write_json

#: What NCCL can carry (torch's ncclDataType table); others fail at the first message.
NCCL_DTYPES = frozenset(
    "int8 uint8 bool int32 int64 float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2".split()
)
FILE = REPO / "bench" / "budgets.json"
#: Goals for one of eight H100 at `medium`: memory of a 40 GB card with room, launches that a host can feed, the bytes
#: that the mathematics needs outside of products and attention, and the milliseconds that follow, in bfloat16 and with
#: 8-bit products.
GOALS = {"peak_gib": 28, "launches": 250, "other_gb": 95, "projected_ms": 200, "projected_ms_8bit": 160}
_SLACK = dict.fromkeys(
    ("peak_gib", "warm_up_peak_gib", "validation_peak_gib", "other_gb", "unaligned_mb", "message_mb"), 0.02
)


def form(counted: dict[str, Any]) -> str:
    """The name that budgets of such a rehearsal have."""
    eight = "" if counted["products"] == "bf16" else f"-{counted['products']}"
    short = "-one-block" if counted["one_block"] else ""
    return f"{counted['preset']}{eight}{short}-{counted['device']}-of-{counted['world']}"


def other_bytes(counted: dict[str, Any]) -> int:
    """Bytes of a step outside of products, attention and Muon."""
    return sum(
        row["bytes"]
        for row in counted["step"]["kernels"]
        if not row["flops"] and row["phase"] != "muon" and not row["kernel"].startswith("_attention")
    )


def measures(counted: dict[str, Any]) -> dict[str, float]:
    """What budgets limit. GiB, GB, MB; numbers of launches, kernels that spill, waits of the host. unaligned_mb: behind
    pointers that Inductor's kernels do not know to be aligned (recorder.py)."""
    step = counted["step"]
    return {
        "peak_gib": step["peak_gib"],
        "warm_up_peak_gib": counted["warm_up_peak_gib"],
        "validation_peak_gib": counted["validation"]["peak_gib"],
        "launches": step["launches"],
        "other_gb": other_bytes(counted) / 1e9,
        "unaligned_mb": sum(step["unaligned_bytes"].values()) / 1e6,
        "message_mb": sum(m["bytes"] for m in step["messages"] if m["device"] == "cuda") / 1e6,
        "spilling_kernels": sum(k["stack_bytes"] > 0 for k in counted["kernels"]),
        "host_waits": len(step["host_waits"]),
        "unproven_kernels": len(counted["unproven"]),
    }


def broken_rules(counted: dict[str, Any]) -> list[str]:
    """What no budget allows, in words."""
    said = []
    compiled, windows = counted["compile"], counted["windows"]
    shapes = counted.get("shapes", 1)  # of sequences and targets in training, each a graph
    if compiled["graphs"] != shapes + 1 or compiled["breaks"]:
        wanted = f"{shapes} to train and one to validate"
        said.append(f"{compiled['graphs']} graphs in place of {wanted}; {compiled['breaks']}")
    if windows["new_graphs"]:
        said.append(f"{windows['new_graphs']} recompilations over {windows['tried']} windows of the run")
    for when in ("set_up", "step", "checkpoint"):
        for m in counted[when]["messages"]:
            if strange := set(m["dtypes"]) - NCCL_DTYPES:
                said.append(f"{m['name']} of {', '.join(sorted(strange))} in {when}: NCCL carries no such type")
    for rank in counted.get("other_orders", []):
        said.append(f"rank {rank} sends its messages in another order than rank 0")
    return said


def unproven(counted: dict[str, Any], proven: set[str] | None) -> list[str]:
    """Our own kernels whose machine code (sha256) is not among `proven`, with its beginning: another ptxas, tile or
    type than the proof's. None: the proof lists none for this Triton, so nothing is said."""
    own = [kernel for kernel in counted["kernels"] if kernel["own"]] if proven is not None else []
    return [f"{kernel['kernel']} {kernel['sha256'][:12]}" for kernel in own if kernel["sha256"] not in proven]


def exceeded(counted: dict[str, Any], budgets: dict[str, Any]) -> list[str]:
    """Every budget of this form that the counts exceed, in words."""
    known = budgets.get(form(counted))
    if known is None:
        return [f"bench/budgets.json has no budgets for {form(counted)}: --set-budgets adds them"]
    found = measures(counted)
    named = {"host_waits": counted["step"]["host_waits"], "unproven_kernels": counted["unproven"]}
    named["unaligned_mb"] = list(counted["step"]["unaligned_bytes"])[:3]
    named["spilling_kernels"] = [kernel["kernel"] for kernel in counted["kernels"] if kernel["stack_bytes"]]
    return [
        f"{name}: {found[name]:.6g} is over the budget of {limit:.6g} {named.get(name, '')}".rstrip()
        for name, limit in known.items()
        if found[name] > limit
    ]


def proven_hashes() -> set[str] | None:
    """Hashes of the machine code in the proof's table for this Triton, or None if it lists none."""
    from kernels.proof.machine_code import committed_table
    from kernels.runtime import triton

    rows = committed_table().get(triton.__version__)
    return {row["sha256"] for row in rows.values() if "sha256" in row} if rows else None


def read() -> dict[str, Any]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def set_budgets(counted: dict[str, Any]) -> None:
    """Make today's counts, rounded up a little, the budgets of their form."""
    limits = {}
    for name, value in measures(counted).items():
        limits[name] = math.ceil(value * (1 + _SLACK[name]) * 100) / 100 if name in _SLACK else value
    write_json(FILE, dict(sorted((read() | {form(counted): limits}).items())))
