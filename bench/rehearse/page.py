"""What rehearsals counted, kept small and told: bench/results/rehearsal-*.json and docs/rehearsal.md.

python -m bench.rehearse --preset medium --keep medium     # count, and keep what the page tells
python -m bench.rehearse --preset medium --products=fp8 --keep medium-fp8
python -m bench.rehearse --preset medium --kernels=reference --keep reference
python -m bench.rehearse --preset f3 --keep f3             # likewise the others of WHOLE, which bench.project takes
python -m bench.rehearse --preset f3 --kernels=reference --products=bf16 --keep reference-f3    # record18, f2
python -m bench.rehearse --preset medium --kernels=gluon --keep medium-gluon    # with --products=fp8: medium-fp8-gluon
python -m bench.rehearse --preset f3 --one-block --keep f3-one-block    # likewise the others of SHORT
python -m bench.rehearse.page                              # write docs/rehearsal.md from what is kept
python -m bench.rehearse.page --check                      # exit 1 if it does not say what the files say
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.common import REPO, RESULTS, table, up_to_date, write_json
from bench.rehearse import budgets
from bench.rehearse.project import ATTENTION_TFLOPS, CEILINGS, LAUNCH_GAP_US
from trainer.options import command, setting

PAGE = REPO / "docs" / "rehearsal.md"
#: Presets of which one block is counted, for a table of its own.
SHORT = ("small", "record18", "f2", "f3", "frontier")
#: Presets of which all is counted beside `medium`, likewise.
WHOLE = ("record18", "f2", "f3", "frontier")
ROWS = {
    "peak_gib": "peak of a step, GiB",
    "warm_up_peak_gib": "peak of the warm-up, GiB",
    "validation_peak_gib": "peak of a validation, GiB",
    "launches": "launches a step",
    "other_gb": "bytes outside of products, attention and Muon, GB a step",
    "unaligned_mb": "behind pointers not known to be aligned, MB a step",
    "message_mb": "messages on the GPU, MB a step",
    "spilling_kernels": "kernels that spill",
    "host_waits": "waits of the host in a step",
    "unproven_kernels": "own kernels whose machine code is not the proof's",
}


def condensed(counted: dict[str, Any]) -> dict[str, Any]:
    """The part of the counts that pages and other commands need."""
    kinds: dict[str, dict[str, float]] = {}
    for row in counted["step"]["kernels"]:
        kind = kinds.setdefault(row["kind"], {"launches": 0, "gb": 0.0, "tflop": 0.0})
        kind["launches"] += row["launches"]
        kind["gb"] += row["bytes"] / 1e9
        kind["tflop"] += row["flops"] / 1e12
    heads = "preset products device world tokens torch triton assembler state_gib".split()
    return {
        **{name: counted[name] for name in heads},
        "measures": budgets.measures(counted),
        "kinds": kinds,
        "most_launched": most_launched(counted["step"]["kernels"]),
        "projection": counted["projection"],
        "attention_tflop": counted["attention_tflop"],
        "messages": counted["step"]["messages"],
        "holders_gib": dict(list(counted["step"]["peak_holders_gib"].items())[:12]),
        "graphs": counted["compile"]["graphs"],
        "windows": counted["windows"],
        "kernels": len(counted["kernels"]),
        "largest_registers": max(kernel["registers"] for kernel in counted["kernels"]),
    }


def most_launched(kernels: Sequence[dict[str, Any]], shown: int = 12) -> list[dict[str, Any]]:
    """The kernels that a step launches most often, products of the library left out."""
    sums: dict[tuple[str, str, str], int] = {}
    for row in kernels:
        if row["kind"] != "product":
            key = (row["kernel"], row["kind"], row["phase"])
            sums[key] = sums.get(key, 0) + row["launches"]
    most = sorted(sums.items(), key=lambda item: -item[1])[:shown]
    return [dict(zip(("kernel", "by", "phase", "launches"), (*key, count))) for key, count in most]


def keep(counted: dict[str, Any], name: str) -> None:
    """Write bench/results/rehearsal-<name>.json. It tells no environment: nothing in it was measured."""
    asked = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True)
    told = {"schema": 1, "name": "rehearsal", "commit": asked.stdout.strip(), "result": condensed(counted)}
    write_json(RESULTS / f"rehearsal-{name}.json", told)


def kept(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"rehearsal-{name}.json"
    return json.loads(path.read_text())["result"] if path.is_file() else None


def scanned() -> str:
    """What `python -m kernels.proof --part scan` found in the machine code, as a table."""
    path = REPO / "kernels" / "proof" / "scanned.json"
    if not path.is_file():
        return "Not scanned yet."
    return table(
        [
            {
                "compiled with": versions,
                "kernels": told["kernels"],
                "products that read registers": told["register_operands"],
                "registers written too early": len(told["reused"]),
            }
            for versions, told in json.loads(path.read_text()).items()
        ]
    )


def counts_of(names: dict[str, str], first: str, more: Callable[[dict], dict] = lambda told: {}) -> str:
    """What was counted of several rehearsals, as a table. names: of a row -> of the kept file; first: their heading."""
    skipped = ("unaligned_mb", "unproven_kernels")
    found = {name: kept(file) for name, file in names.items()}
    return table(
        [
            {first: name, "graphs": told["graphs"], "windows": told["windows"]["tried"]}
            | {text.partition(",")[0]: told["measures"][key] for key, text in ROWS.items() if key not in skipped}
            | more(told)
            for name, told in found.items()
            if told is not None
        ]
    )


def blocks() -> str:
    """What one block of each of SHORT costs, as a table."""
    return counts_of({name: f"{name}-one-block" for name in SHORT}, "one block of")


def wholes() -> str:
    """What a whole step of each of WHOLE costs, as a table."""
    more = lambda told: {"projected ms": told["projection"]["ms"]}  # noqa: E731
    return counts_of({name: name for name in WHOLE}, "all of", more)


def holders_of_blocks(shown: int = 6) -> str:
    """What holds the most memory at the peak of one block of each of SHORT, as a table."""
    rows = []
    for name in SHORT:
        told = kept(f"{name}-one-block")
        largest = list(told["holders_gib"].items())[:shown] if told else []
        rows += [
            {"one block of": name, "held at the peak, by what makes it": _maker(who), "GiB": gib}
            for who, gib in largest
        ]
    return table(rows)


def _maker(held: str) -> str:
    """Shape and maker of what is held; of a generated kernel's name, which lists all that it does, the beginning."""
    shape, _, maker = held.replace(" | ", " from ").partition(" from ")
    return f"{shape} from {maker if len(maker) <= 60 else maker[:60] + '...'}"


def why_not(told: dict[str, Any]) -> str:
    """What keeps a step from its goals, in numbers of the count itself."""
    goals, kinds, parts = budgets.GOALS, told["kinds"], told["projection"]["parts"]
    said = []
    if told["measures"]["launches"] > goals["launches"]:
        taken = kinds["product"]["launches"] + kinds["own"]["launches"]
        said.append(
            f"The goal of {goals['launches']} launches is out of reach of this design: {kinds['product']['launches']} "
            f"are products of the library and {kinds['own']['launches']} kernels of our own, each once a layer and "
            f"direction, or chunk: {taken} before anything is normed, mixed, embedded or updated. At "
            f"{LAUNCH_GAP_US:.0f} us between launches all of them are {parts['gaps between launches']:.1f} ms."
        )
    over = told["projection"]["ms"] - goals["projected_ms"]
    if over > 0:
        floor = told["attention_tflop"] / CEILINGS[told["device"]].tflops_16 * 1e3
        said.append(
            f"The goal of {goals['projected_ms']} ms is missed by {over:.1f}. The largest part above its floor is "
            f"attention: {parts['attention']:.1f} ms at the assumed {ATTENTION_TFLOPS:.0f} TFLOP/s, {floor:.1f} at the "
            f"ceiling of products, {told['attention_tflop'] / 450 * 1e3:.1f} at 450."
        )
    return "\n\n".join(textwrap.fill(one, 120) for one in said)


def judged(key: str, text: str, sides: dict[str, float | None]) -> dict[str, Any]:
    """A row of the page: what was counted, its budget, its goal and whether that is reached."""
    limit = budgets.read().get("medium-h100-of-8", {}).get(key, "")
    goal, now = budgets.GOALS.get(key), sides.get("now")
    reached = "" if goal is None else "not counted" if now is None else "yes" if now <= goal else "**no**"
    told = {name: "not counted" if value is None else value for name, value in sides.items()}
    return {"counted": text, **told, "budget": limit, "goal": "" if goal is None else goal, "reached": reached}


def page() -> str:
    """docs/rehearsal.md, from the kept counts."""
    before, now, eight, gluon = kept("before"), kept("medium"), kept("medium-fp8"), kept("medium-gluon")
    reference = kept("reference")
    shown = now or before
    if shown is None:
        raise FileNotFoundError("nothing is kept: python -m bench.rehearse --preset medium --keep medium")
    every = (("before", before), ("reference", reference), ("now", now))
    sides = {name: told for name, told in every if told is not None}
    rows = [
        judged(key, text, {name: told["measures"].get(key) for name, told in sides.items()})
        for key, text in ROWS.items()
    ]
    rows.append(judged("projected_ms", "projected ms a step", {n: t["projection"]["ms"] for n, t in sides.items()}))
    for key, text, told in (
        ("projected_ms", "projected ms a step, --kernels=gluon", gluon),
        ("projected_ms_8bit", "projected ms a step with 8-bit products", eight),
        ("projected_ms_8bit", "projected ms a step with 8-bit products, --kernels=gluon", kept("medium-fp8-gluon")),
    ):
        rows.append(judged(key, text, {n: told["projection"]["ms"] if told and n == "now" else None for n in sides}))
    told_apart = sides | ({"now, 8-bit products": eight} if eight else {})
    told_apart |= {"now, --kernels=gluon": gluon} if gluon else {}
    parts = sorted({part for told in told_apart.values() for part in told["projection"]["parts"]})
    projected = [
        {"part": p, **{n: t["projection"]["parts"].get(p, 0.0) for n, t in told_apart.items()}}
        for p in [*parts, "a step"]
    ]
    projected[-1] |= {name: told["projection"]["ms"] for name, told in told_apart.items()}
    kinds = [{"launched by": kind, **numbers} for kind, numbers in shown["kinds"].items()]
    holders = [
        {"held at the peak, by what makes it": _maker(who), "GiB": gib} for who, gib in shown["holders_gib"].items()
    ]
    messages = [{k: "+".join(m[k]) if k == "dtypes" else m[k] for k in m} for m in shown["messages"]]
    return TEXT.format(
        what="`{preset}`, one of {world} {device}, {tokens:,} tokens a step".format(**shown),
        versions=f"torch {shown['torch']}, triton {shown['triton']}, ptxas {shown['assembler']}",
        graphs=shown["graphs"],
        windows=shown["windows"]["different"],
        kernels=shown["kernels"],
        registers=shown["largest_registers"],
        counts=table(rows),
        kinds=table(kinds),
        most=table(shown.get("most_launched", [])),
        projected=table(projected),
        floor=shown["projection"]["floor_ms"],
        holders=table(holders),
        link=CEILINGS[shown["device"]].link_gb_per_s,
        messages=table(messages) if messages else "none",
        travel=table(shown["projection"].get("messages", [])),
        scanned=scanned(),
        blocks=blocks(),
        wholes=wholes(),
        holders_of_blocks=holders_of_blocks(),
        why_not=why_not(shown),
    )


TEXT = """# The GPU path, rehearsed without a GPU

Generated by `python -m bench.rehearse.page` from counts that `python -m bench.rehearse --preset medium` made without a
GPU. **Nothing here is measured.** Counted is {what},
with {versions}.

The trainer's own warm-up, its last step and a validation run on tensors without storage, for a device that is
pretended; tracing, fusion, Triton's compilation for the chip, launch code and messages are real.

{graphs} graphs (one to train, one to validate), the same over the first, a middle and the last of the run's
{windows} windows (for one block, in the tests: over all); {kernels} kernels, at most {registers} registers a thread.

The rule: a graph for each pair of a sequence's length and a token's number of targets that occurs in the run
(`trainer.schedule.shapes`; `medium` has one, f3 four; with sampled classes their number counts too, and `frontier` has
five), one to validate, and none compiled once the clock runs: the warm-up meets them all. What else changes over a run
(windows, YaRN's tables and factor, weights of targets, rates) are tensors that change in place. `--one-block` holds a
run to that over all its windows and shapes.

{counts}

Before: the program of the commit in `bench/results/rehearsal-before.json`, mended only so far that it starts.
Reference: `--kernels=reference`, plain torch and FlexAttention, compiled and counted by the same code. CI fails
when a count goes over its budget in `bench/budgets.json`; budgets are what the program reached when they were last set.

{why_not}

All of the other presets, the last step of the run:

{wholes}

One block of each other preset, at full width, over all windows and lengths of its run:

{blocks}

## A step by who launches

Bytes count every operand once and what changes in place twice; a table that rows are gathered from counts whole.

{kinds}

The most often launched, products of the library left out:

{most}

## Projected milliseconds

At the ceilings and efficiencies in `bench/rehearse/project.py`, which are assumptions until a GPU has measured them.
Attention of other kernels than the plain ones costs what these do times the ratio of counts (docs/slots.md).
All products and attention at their ceiling, and nothing else: {floor:.1f} ms.

{projected}

`--products` chooses what is multiplied in 8 bits while training; a validation is in `--dtype` throughout. `fp8_head`:
the head's three products; `fp8_mlp`: these and the six of each layer's MLP; `fp8`: these and the projections of
attention, which is the column above. Scales are powers of two and safe for what they scale (kernels/products8.py):
nothing finite is lost to them, but in the gradient of q, k and v of sequences from 8,192 tokens on: its scale follows
from at least 4,096 of its rows, or all if those are zeros, with 12 binades of room, so rows 4,096 times as large as all
of those saturate. Rounding to 3 bits costs each product some 4 % of its result's spread. What that does to a
loss curve is known of small models only (tests/trainer/test_products.py). GPUs without 8 bits run all in `--dtype`, and
the log says so.

## Memory at the peak

{holders}

Of one block of the other presets, where tables and what their optimizers keep weigh more than activations:

{holders_of_blocks}

## Messages a step and process

{messages}

Projected: when each leaves, in ms since the step began, when it is there at {link} GB/s a process, and how long kernels
wait for it. The head's gradient and each third of the matrices' leave while the backward pass still runs
(trainer/leaving.py); gradients of tables are made at its end.

{travel}

## Registers under products in flight

Assemblers before CUDA 13.3 may reuse a register that an asynchronous product on Hopper has yet to read
(github.com/triton-lang/triton/pull/11781). The one that runs is chosen (kernels/assembler.py), and the machine code of
every launch and every tile that tuning may choose is searched for such places: `python -m kernels.proof --part scan`.

{scanned}

## What a GPU must still confirm

- Time: every millisecond above, the efficiencies behind it, and what of the messages is hidden.
- Numbers on the device: the proof's cases, and a compiled step against the eager one (`python -m bench.gpu first`).
- Memory: fragmentation and the library's workspaces are not in the peak (`python -m bench.gpu step` measures it).
- Races, clocks, NCCL itself. `_fused_adamw_` counts as one launch a call; the device may need several.
"""


@dataclass(frozen=True)
class Options:
    """What is done with the page."""

    check: bool = setting(False, "flag", "write nothing; exit 1 if the page is out of date")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line."""
    _, options = command(__doc__, argv, Options)
    text = page()
    if options.check:
        return up_to_date(PAGE, text, "bench.rehearse.page")
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
