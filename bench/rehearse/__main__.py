"""Rehearse a run's step, as one of several GPUs would run it, on a machine without a GPU, and count it.

    python -m bench.rehearse --preset medium --device h100            # one of eight, minutes on two cores
    python -m bench.rehearse --preset medium --one-block              # the short form: one block at full width
    python -m bench.rehearse --preset nano --world 1 --dtype=bfloat16 # fields of train_gpt.py may follow

Exit code: 0 counted, 1 (with --check) a rule is broken or a budget exceeded, 2 usage, 3 this machine
cannot rehearse (the reason is printed).
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.common import table, write_json
from bench.options import helped, own_and_config
from trainer.options import UsageError, setting


def summary(counted: dict) -> str:
    """The counts as Markdown: a table of parts, then what a reader looks for first."""
    groups: dict[tuple, dict] = {}
    for row in counted["step"]["kernels"]:
        key = (row["phase"], row["part"] if row["part"] != row["phase"] else "", row["kind"])
        group = groups.setdefault(key, {"phase": key[0], "part": key[1], "by": key[2], "launches": 0, "GB": 0.0})
        group["launches"] += row["launches"]
        group["GB"] += row["bytes"] / 1e9
        group["TFLOP"] = group.get("TFLOP", 0.0) + row["flops"] / 1e12
    step, kernels, windows = counted["step"], counted["kernels"], counted["windows"]
    unaligned = step["unaligned_bytes"]
    spilling = [k["kernel"] for k in kernels if k["stack_bytes"]]
    peaks = {"a step": step["peak_holders_gib"], "the warm-up": counted["warm_up_holders_gib"]}
    peaks["a validation"] = counted["validation"]["peak_holders_gib"]
    lines = [
        table(sorted(groups.values(), key=lambda g: -g["GB"])),
        "",
        f"launches {step['launches']}; kernels compiled {len(kernels)}, spilling {len(spilling)} {spilling or ''}",
        f"peak {step['peak_gib']:.2f} GiB in {step['peak_phase']}; weights and state {counted['state_gib']:.2f}; "
        f"warm-up {counted['warm_up_peak_gib']:.2f}; validation {counted['validation']['peak_gib']:.2f}",
        f"graphs {counted['compile']['graphs']}, breaks {counted['compile']['breaks'] or 'none'}, new graphs over "
        f"{windows['tried']} of {windows['different']} windows: {windows['new_graphs']}",
        f"waits of the host in a step: {step['host_waits'] or 'none'}",
        f"behind pointers that Inductor does not know to be aligned: {sum(unaligned.values()) / 1e6:.3g} MB "
        f"{list(unaligned)[:3] or ''}",
        f"own kernels whose machine code is not the proof's: {', '.join(counted['unproven']) or 'none'}",
        "",
        *(f"held at the peak of {name} (GiB): {_held(holders)}" for name, holders in peaks.items()),
    ]
    for m in step["messages"]:
        lines.append(
            f"{m['count']} x {m['name']} {'+'.join(m['dtypes'])} on {m['device']}, {m['phase']}: "
            f"{m['bytes'] / 1e6:.1f} MB"
        )
    return "\n".join(lines)


def _held(holders: dict[str, float]) -> str:
    return ", ".join(f"{maker} {gib:.2f}" for maker, gib in list(holders.items())[:14])


def projection(counted: dict) -> str:
    """The projected milliseconds of a step, part by part."""
    told = counted["projection"]
    rows = [{"part": part, "ms (projected)": ms} for part, ms in told["parts"].items()]
    rows.append({"part": "a step", "ms (projected)": told["ms"]})
    return (
        f"{table(rows)}\n\nA projection from counts at assumed efficiencies (bench/rehearse/project.py), not a "
        f"measurement. Products and attention alone at their ceiling: {told['floor_ms']:.1f} ms."
    )


@dataclass(frozen=True)
class Options:
    """What this command takes beside fields of train_gpt.py (--preset=medium unless given)."""

    device: str = setting("h100", "name", "of the pretended GPU: h100, a100, l40s, rtx4090 or rtx3090")
    world: int = setting(8, "GPUs", "of the run, of which one is rehearsed", at_least=1)
    one_block: bool = setting(False, "flag", "a single block at full width, in place of all")
    check: bool = setting(False, "flag", "fail where a rule is broken or a budget exceeded")
    set_budgets: bool = setting(False, "flag", "make these counts the budgets of their form")
    keep: str | None = setting(None, "name", "keep the page's part in bench/results/rehearsal-NAME.json")
    json: str | None = setting(None, "file", "keep the counts there")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code of the module's docstring."""
    argv = sys.argv[1:] if argv is None else argv
    if helped(argv, __doc__, Options):
        return 0
    from bench.rehearse import budgets
    from bench.rehearse.counts import one_block, rehearse
    from bench.rehearse.device import DEVICES, CannotRehearse
    from bench.rehearse.page import keep
    from bench.rehearse.project import attention_tflop, over_plain, project

    try:
        options, config = own_and_config(Options, argv, "medium")
        if options.device not in DEVICES:
            raise UsageError(f"--device={options.device}: one of {', '.join(DEVICES)}")
        config = one_block(config) if options.one_block else config
        all_ranks = options.one_block and options.world > 1
        counted = rehearse(config, device=options.device, world=options.world, all_ranks=all_ranks)
    except UsageError as error:
        print(f"bench.rehearse: {error}", file=sys.stderr)
        return 2
    except CannotRehearse as error:
        print(f"bench.rehearse: skipped: {error}", file=sys.stderr)
        return 3
    counted["unproven"] = budgets.unproven(counted, budgets.proven_hashes())
    counted["attention_tflop"] = attention_tflop(config, counted["sequences"])
    counted["over_plain"] = over_plain(config, counted["sequences"], (r["kernel"] for r in counted["step"]["kernels"]))
    counted["projection"] = project(counted, counted["attention_tflop"], counted["over_plain"])
    print(summary(counted), projection(counted), sep="\n\n")
    if options.json:
        write_json(Path(options.json), counted)
    if options.keep:
        keep(counted, options.keep)
    if options.set_budgets:
        budgets.set_budgets(counted)
    if not options.check:
        return 0
    wrong = budgets.broken_rules(counted) + budgets.exceeded(counted, budgets.read())
    print("", *(f"FAILED {line}" for line in wrong), *([] if wrong else ["within all rules and budgets"]), sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
