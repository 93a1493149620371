"""One part of the proof in a process of its own; `python -m kernels.proof` starts these and reads their JSON.

The interpreter and the compiler exclude each other in one process, because Triton decides when a kernel is
decorated. The last line of output is a JSON object; warnings and progress before it are ignored.
"""

from __future__ import annotations

import argparse
import functools
import json
import time

from kernels.proof import DEVICES, families

PARTS = ("interpret", "faults", "compile", "scan", "slots", "mutate", "mutate-compiled")


def interpret(names: tuple[str, ...], quick: bool) -> dict:
    """Numeric cases: family -> results."""
    from kernels.proof.numeric import run_numeric

    return {name: run_numeric(family, quick) for name, family in families(names).items()}


def faults(names: tuple[str, ...]) -> dict:
    """Planted faults: family -> results."""
    from kernels.proof.numeric import run_faults

    return {name: run_faults(family) for name, family in families(names).items()}


def compile_all(names: tuple[str, ...], quick: bool, devices: tuple[str, ...]) -> dict:
    """Dry runs: one entry a launch, device and kernel, under "rows"; what failed, under "failures"."""
    from kernels.assembler import choose_assembler
    from kernels.proof import machine_code, pretend
    from kernels.runtime import triton

    ptxas = choose_assembler().partition(" ")[0]

    rows, failures = [], []
    for name, family in families(names).items():
        for launch in family.launches:
            if quick and not launch.quick:
                continue
            for device in devices:
                if device not in launch.devices:
                    continue
                started, where = time.perf_counter(), f"{name} / {launch.name} on {device}"
                try:
                    with pretend.device(device) as compiled:
                        launch.run()
                except Exception as error:  # one that does not compile must not hide the others
                    failures.append(f"{where}: {type(error).__name__}: {error}")
                    continue
                for one in compiled:
                    row = machine_code.describe(one)
                    failures += [f"{where}: {one.kernel}: {r}" for r in row.pop("reused_registers", [])]
                    failures += [f"{where}: {one.kernel}: {u}" for u in machine_code.unmet_structure(family, one)]
                    if device == machine_code.TABLE_DEVICE and launch.demanding:
                        failures += [
                            f"{where}: {one.kernel}: {unmet}"
                            for unmet in machine_code.unmet_demands(family, one.kernel, row)
                        ]
                    elif device == machine_code.TABLE_DEVICE and row["stack_bytes"] and not launch.spills:
                        failures.append(f"{where}: {one.kernel}: {row['stack_bytes']} bytes of stack, 0 allowed")
                    rows.append(
                        {
                            "family": name,
                            "launch": launch.name,
                            "device": device,
                            "kernel": one.kernel,
                            "seconds": time.perf_counter() - started,
                            **row,
                        }
                    )
    return {"triton": triton.__version__, "ptxas": ptxas, "rows": rows, "failures": failures}


def scan(names: tuple[str, ...]) -> dict:
    """Every launch and candidate tile compiled for sm_90: how many kernels, how many of their asynchronous products
    read an operand from registers, and where such a register, or a sum, is written too early."""
    from kernels.assembler import choose_assembler
    from kernels.proof import machine_code, pretend
    from kernels.runtime import triton

    ptxas = choose_assembler().partition(" ")[0]
    seen, operands, reused, failures = set(), 0, [], []
    for name, family in families(names).items():
        for launch in (*family.launches, *family.candidates):
            where = f"{name} / {launch.name}"
            try:
                with pretend.device(machine_code.TABLE_DEVICE) as compiled:
                    launch.run()
            except Exception as error:  # a candidate may ask for more shared memory than there is
                failures.append(f"{where}: {type(error).__name__}: {str(error).splitlines()[0]}")
            for one in compiled:
                digest = machine_code.text_hash(one.asm["cubin"])
                if digest not in seen:
                    seen.add(digest)
                    row = machine_code.read_cubin(one.asm["cubin"])
                    operands += row["register_operands"]
                    reused += [f"{where}: {one.kernel}: {r}" for r in row.get("reused_registers", [])]
    told = {"ptxas": ptxas, "kernels": len(seen), "register_operands": operands, "reused": reused}
    return {"triton": triton.__version__, **told, "not_compiled": failures}


def slots() -> dict:
    """Attention's kernels compiled for sm_90, and what they ask of the schedulers: what `slots.count` returns."""
    import torch

    import kernels.attention as module
    from kernels.assembler import choose_assembler
    from kernels.proof import machine_code, pretend
    from kernels.proof import slots as counted
    from kernels.runtime import triton

    ptxas = choose_assembler().partition(" ")[0]

    @functools.cache
    def compiled(width: int) -> dict[str, pretend.Compiled]:
        q, k, v, do = (
            torch.empty(1, counted.TOKENS, counted.HEADS, width, dtype=torch.bfloat16, device="meta") for _ in range(4)
        )
        sizes = ((1, counted.TOKENS), (counted.TOKENS // module.SCHEDULE_TOKENS,))
        row, order = (torch.empty(*size, dtype=torch.int32, device="meta") for size in sizes)
        plan = module.AttentionPlan(row, row, order, order)
        with pretend.device(machine_code.TABLE_DEVICE) as found:
            for forward in ("triton", "specialised", "gluon"):
                o, lse = module.launch_forward(q, k, v, plan, 0.1, forward=forward)
            for backward in ("triton", "gluon", "gluon_one_pass"):
                module.launch_backward(do, q, k, v, o, lse, plan, 0.1, backward=backward)
        return {one.kernel: one for one in found}

    told = counted.count(lambda kernel, width: compiled(width)[kernel])
    return {"triton": triton.__version__, "ptxas": ptxas, **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("--family", action="append", default=[])
    parser.add_argument("--device", action="append", default=[], choices=DEVICES)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    names = tuple(options.family)
    if options.part.startswith("mutate"):
        from kernels.proof.mutation import campaign, standing

        campaign(names, options.minutes, in_interpreter=options.part == "mutate")
        result = standing(names)
    elif options.part == "interpret":
        result = interpret(names, options.quick)
    elif options.part == "faults":
        result = faults(names)
    elif options.part == "slots":
        result = slots()
    elif options.part == "scan":
        result = scan(names)
    else:
        result = compile_all(names, options.quick, tuple(options.device) or DEVICES)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
