"""`python -m kernels.proof`: everything that can be proven about the kernels without a GPU, in one command.

    python -m kernels.proof                      all families, all cases, all devices (minutes)
    python -m kernels.proof --quick              the part that the default tests run
    python -m kernels.proof --family attention --part compile --device sm_90
    python -m kernels.proof --part compile --update    rewrite machine_code.json's rows for this Triton
    python -m kernels.proof --part scan                every candidate tile: no product's registers written too early
    python -m kernels.proof --part slots               issue slots of attention's kernels (docs/slots.md)
    python -m kernels.proof --part mutate --minutes 20 go on with the campaign of planted faults (docs/mutations.md)

Exit code 0: all holds. 1: something does not, and the output says what. 2: usage.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from kernels.proof import DEVICES, families, machine_code, mutation, slots

PARTS = ("interpret", "faults", "compile")


def run_part(part: str, names: list[str], devices: list[str], quick: bool, minutes: float | None = None) -> dict:
    """Run one part in its own process and return its results.

    Raises: RuntimeError with the end of its error output if it dies."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(Path(__file__).resolve().parents[2] / ".triton-cache"))
    environment["OMP_NUM_THREADS"] = "1"
    if part not in ("compile", "scan", "slots", "mutate-compiled"):
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-W", "ignore", "-m", "kernels.proof.worker", part, *(["--quick"] * quick)]
    command += [f"--family={n}" for n in names] + [f"--device={d}" for d in devices]
    command += [] if minutes is None else [f"--minutes={minutes}"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).resolve().parents[2]
    )
    if done.returncode:
        raise RuntimeError(f"the {part} part ended with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def table_rows(result: dict) -> dict[str, dict]:
    """The rows of a compile part that belong in machine_code.json, by key: "family / launch / kernel", and, where a
    launch compiles one kernel in several ways (forward and backward, say), the options that differ. Devices but
    TABLE_DEVICE are named behind the kernel."""
    described = ("family", "launch", "device", "kernel", "seconds")
    variants: dict[str, list[dict]] = {}
    for r in result["rows"]:
        row = {name: value for name, value in r.items() if name not in described}
        where = "" if r["device"] == machine_code.TABLE_DEVICE else f" on {r['device']}"
        known = variants.setdefault(f"{r['family']} / {r['launch']} / {r['kernel']}{where}", [])
        if row not in known:
            known.append(row)
    rows = {}
    for key, known in variants.items():
        differ = [name for name in known[0]["options"] if len({row["options"].get(name) for row in known}) > 1]
        for row in known:
            variant = " ".join([key, *(f"{name}={row['options'].get(name)}" for name in differ)])
            if variant in rows:
                raise ValueError(f"{variant}: two machine codes of the same options; launch them under different names")
            rows[variant] = row
    return rows


def report_interpret(result: dict) -> list[str]:
    """Print the numeric cases; return what does not hold."""
    wrong = []
    for name, cases in result.items():
        print(f"\n{name}: numeric cases in the interpreter (error as a share of what is allowed)")
        for case in cases:
            state = "ok" if case["fault"] is None else "FAIL"
            share = case["worst_error_over_allowed"]
            print(f"  {state:4}  {case['dtype']:9} {share or 0:6.2f}  {case['seconds']:5.1f} s  {case['case']}")
            if case["fault"] is not None:
                wrong.append(f"{name}, {case['case']} ({case['dtype']}): {case['fault']}")
    return wrong


def report_faults(result: dict) -> list[str]:
    """Print the planted faults; return those that nothing noticed."""
    wrong = []
    for name, planted in result.items():
        caught = sum(f["caught"] is not None for f in planted)
        print(f"\n{name}: {caught} of {len(planted)} planted faults caught")
        for fault in planted:
            how = (fault["caught"] or "NOT CAUGHT").splitlines()[0]
            print(f"  {fault['fault']}\n        {how[:150]}")
            if fault["caught"] is None:
                wrong.append(f"{name}: planted fault not caught: {fault['fault']}")
    return wrong


def mutate(names: list[str], minutes: float | None, page_only: bool) -> list[str]:
    """Go on with the campaign of mutation.py, write its page, and return the survivors."""
    result: dict = {}
    if not page_only:
        for part in ("mutate", "mutate-compiled"):
            result = run_part(part, names, [], False, minutes)
    mutation.PAGE.write_text(mutation.page())
    judged = result or mutation.standing(tuple(names))
    survivors = {name: f"{name}: {o['old']} -> {o['new']}" for name, o in judged.items() if not o["caught"]}
    print(f"\n{len(judged) - len(survivors)} of {len(judged)} judged mutants caught; see docs/mutations.md")
    return [told for name, told in survivors.items() if name not in mutation.EXPLAINED]


def report_scan(result: dict) -> list[str]:
    """Print and keep what a scan of the machine code found; return the places that are wrong."""
    machine_code.keep_scan(result)
    print(
        f"\ntriton {result['triton']}, ptxas {result['ptxas']}: {result['kernels']} kernels, "
        f"{result['register_operands']} asynchronous products that read registers, {len(result['reused'])} places that "
        f"write one too early"
    )
    for line in result["not_compiled"]:
        print(f"  not compiled: {line}")
    return result["reused"]


def report_slots(result: dict, update: bool) -> None:
    """Print the counted issue slots; write docs/slots.md and slots.json if `update`."""
    made_with = f"triton {result['triton']}, ptxas {result['ptxas']}"
    print(f"\n{made_with}: issue slots of attention's kernels on sm_90, counted")
    print("\n".join([*slots.table(result["rows"]), "", *slots.table(result["sums"])]))
    if update:
        slots.keep(result, made_with)


def report_compile(result: dict, update: bool) -> list[str]:
    """Print the machine code table and what the committed files say; return what does not hold."""
    print(f"\ncompiled with triton {result['triton']}, assembled by ptxas {result['ptxas']}")
    print("  device  registers stack shared  HGMMA UTMALDG  loops (instructions, products)   launch, kernel")
    for r in result["rows"]:
        loops = " ".join(f"{x['instructions']},{x['products']}" for x in r.get("loops", []))
        ops = r["opcodes"]
        print(
            f"  {r['device']:8} {r['registers']:8} {r['stack_bytes']:5} {r['shared_bytes']:6} "
            f"{ops.get('HGMMA', 0):6} {ops.get('UTMALDG', 0):7}  {loops[:36]:36}  "
            f"{r['family']} / {r['launch']}: {r['kernel']}"
        )
    wrong, rows = list(result["failures"]), table_rows(result)
    if update:
        machine_code.update_table(rows, result["ptxas"])
        print(f"\nmachine_code.json: {len(rows)} rows written for triton {result['triton']}")
    else:
        try:
            verdicts = machine_code.compare(rows, result["ptxas"])
            differences = {key: verdict for key, verdict in verdicts.items() if verdict}
            wrong += [f"machine code differs from the committed table: {k}: {v}" for k, v in differences.items()]
            print(f"\nmachine_code.json: {len(verdicts) - len(differences)} of {len(verdicts)} rows as committed")
        except LookupError as missing:
            print(f"\nnot compared: {missing}")
    measured = machine_code.manifest()
    rows = {key: row for key, row in rows.items() if machine_code.kind_of(key)[1] == machine_code.TABLE_DEVICE}
    ran = {key: measured[r["sha256"]] for key, r in rows.items() if r["sha256"] in measured}
    for key, figures in ran.items():
        print(f"as measured: {key}: {json.dumps(figures)}")
    if len(ran) < len(rows):
        print(f"needs a GPU run: {len(rows) - len(ran)} of {len(rows)} sm_90 machine codes have never run on a GPU")
    return wrong


def main() -> int:
    """Parse the command line, run the parts, print, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m kernels.proof", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", action="append", default=[], help="only this kernel family (repeatable)")
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        choices=(*PARTS, "scan", "slots", "mutate"),
        help="only this part (repeatable)",
    )
    parser.add_argument("--minutes", type=float, help="of the mutate part, for each of its two halves")
    parser.add_argument("--page", action="store_true", help="of the mutate part: only write docs/mutations.md")
    parser.add_argument("--device", action="append", default=[], choices=DEVICES, help="compile for this only")
    parser.add_argument("--quick", action="store_true", help="only what the default tests run")
    parser.add_argument(
        "--update",
        action="store_true",
        help="rewrite this Triton's rows of machine_code.json; of slots: docs/slots.md and slots.json",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything found to FILE")
    options = parser.parse_args()
    try:
        families(tuple(options.family))
    except ValueError as error:
        parser.error(str(error))
    devices = options.device or (["sm_90"] if options.quick else list(DEVICES))
    wrong, found = [], {}
    for part in options.part or PARTS:
        if part == "mutate":
            wrong += mutate(options.family, options.minutes, options.page)
            continue
        if part == "slots":
            report_slots(run_part(part, [], [], False), options.update)
            continue
        if part == "scan":
            wrong += report_scan(run_part(part, options.family, [], False))
            continue
        found[part] = run_part(part, options.family, devices, options.quick)
        if part == "compile":
            wrong += report_compile(found[part], options.update)
        else:
            wrong += (report_interpret if part == "interpret" else report_faults)(found[part])
    if options.json:
        Path(options.json).write_text(json.dumps({"holds": not wrong, "wrong": wrong, **found}, indent=1) + "\n")
    print(f"\n{'all holds' if not wrong else f'{len(wrong)} things do not hold:'}")
    for one in wrong:
        print(f"- {one}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
