"""What a compiled kernel's machine code says: resources, instructions, loops, and a hash that names it.

The tools that read it (cuobjdump, nvdisasm) come with Triton. Code for AMD is read from its assembly text.
"""

from __future__ import annotations

import collections
import fcntl
import hashlib
import json
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from kernels.proof import Demand, Family
from kernels.proof.pretend import Compiled
from kernels.runtime import triton

TABLE = Path(__file__).with_name("machine_code.json")
SCANNED = Path(__file__).with_name("scanned.json")
MANIFEST = Path(__file__).with_name("measured.json")
#: The device whose code is listed in the table and the manifest.
TABLE_DEVICE = "sm_90"
#: Opcodes that the table counts: products (Hopper's asynchronous ones, the older ones), copies to shared memory
#: (bulk by descriptor, 16 bytes a thread), local memory (spills), exponentials and the like.
COUNTED = ("HGMMA", "QGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL", "MUFU")
_OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)([^;]*);")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_BACK = re.compile(r"\((\.L_\w+)\)")
_ASYNCHRONOUS = re.compile(r"^\.\d+x(\d+)x\d+\S*\s+R(\d+),\s*(R\d+)?")


def text_hash(cubin: bytes) -> str:
    """sha256 of the executable sections of a cubin (ELF64), so that paths and line numbers do not count."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    strings = sections[names][4]
    digest = hashlib.sha256()
    for name, _kind, _flags, _address, offset, length in sections:
        start = strings + name
        if cubin[start : cubin.index(b"\0", start)].startswith(b".text"):
            digest.update(cubin[offset : offset + length])
    return digest.hexdigest()


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the tools in Triton's package."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def read_listing(listing: str) -> tuple[list[tuple[str, str]], list[tuple[int, int]]]:
    """(opcode, rest of the line) of every instruction that nvdisasm lists, and the loops: the numbers of the first
    instruction of each and of the one behind its last."""
    code, labels, loops = [], {}, []
    for line in listing.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := _OPCODE.search(line):
            code.append((found[1], found[2]))
            target = _BACK.search(found[2]) if found[1] == "BRA" else None
            if target and target[1] in labels:  # a label seen before: a jump back
                loops.append((labels[target[1]], len(code)))
    return code, loops


def read_cubin(cubin: bytes) -> dict[str, Any]:
    """Registers and stack a thread, opcodes, the innermost loops (instructions and products of each), and, where there
    are any, `reused_registers`."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = dict(re.findall(r"(REG|STACK):(\d+)", _tool("cuobjdump", "--dump-resource-usage", file.name)))
        code, loops = read_listing(_tool("nvdisasm", "-c", file.name))
    opcodes = [opcode for opcode, _ in code]
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    counts = collections.Counter(opcodes)
    body = [
        {"instructions": end - start, "products": sum("MMA" in op for op in opcodes[start:end])}
        for start, end in inner
        if end - start > 4
    ]  # shorter ones only wait for a barrier
    reused = reused_registers(code, loops)
    from_registers = [rest for opcode, rest in code if opcode == "HGMMA" and (p := _ASYNCHRONOUS.match(rest)) and p[3]]
    return {
        "registers": int(usage["REG"]),
        "stack_bytes": int(usage["STACK"]),
        "instructions": len(opcodes),
        "opcodes": {op: counts[op] for op in COUNTED if counts[op]},
        "loops": body,
        "register_operands": len(from_registers),
    } | ({"reused_registers": reused} if reused else {})


def tensor_loops(cubin: bytes) -> list[tuple[int, int]]:
    """(instructions a warp, cycles of the tensor cores) of every innermost loop with asynchronous products (HGMMA).

    The cycles are those that the loop's products of one group of four warps take on sm_90, whose four tensor cores do
    4,096 floating-point operations in 16 bits a cycle together: half a column of a 64 x N x 16 product. A scheduler
    issues one instruction of one warp a cycle, and each of a group's warps has a scheduler of its own: so the first
    number over the second is what the loop asks of the schedulers in a cycle that the tensor cores are busy."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        code, loops = read_listing(_tool("nvdisasm", "-c", file.name))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    found = []
    for start, end in inner:
        products = [_ASYNCHRONOUS.match(rest) for opcode, rest in code[start:end] if opcode == "HGMMA"]
        if products:
            found.append((end - start, sum(int(product[1]) // 2 for product in products if product)))
    return found


def reused_registers(code: list[tuple[str, str]], loops: list[tuple[int, int]]) -> list[str]:
    """Instructions that write a register which an asynchronous product in flight still reads or writes, in words.

    A product (HGMMA) is in flight from its issue until a wait (WARPGROUP.DEPBAR.LE gsb0, n) leaves at most n later
    groups; one that names gsb0 closes a group. This is the fault of assemblers before CUDA 13.3 (kernels/assembler.py).
    code and loops: of `read_listing`, followed in its order, and each loop once more from its end; jumps forward are
    taken for not taken."""
    found: dict[int, str] = {}
    flying: list[set[int]] = [set()]  # registers of each group, the last one still open
    ends = {end: start for start, end in loops}

    def follow(first: int, last: int) -> None:
        for i in range(first, last):
            opcode, rest = code[i]
            if opcode == "HGMMA" and (product := _ASYNCHRONOUS.match(rest)):
                flying[-1] |= {int(product[2]) + r for r in range(int(product[1]) // 2)}
                if product[3]:
                    flying[-1] |= {int(product[3][1:]) + r for r in range(4)}
                if "gsb0" in rest:
                    flying.append(set())
            elif opcode == "WARPGROUP" and (wait := re.search(r"gsb0, 0x([0-9a-f]+)", rest)):
                left = int(wait[1], 16)
                flying[:] = [*flying[-1 - left : -1], flying[-1]] if left else [flying[-1]]
            elif clash := _written(opcode, rest) & set().union(*flying):
                found.setdefault(i, f"{opcode}{rest.rstrip()} writes R{min(clash)}, which a product in flight uses")

    for i in range(len(code)):
        follow(i, i + 1)
        if i + 1 in ends:
            before = [set(group) for group in flying]
            follow(ends[i + 1], i + 1)
            flying[:] = before
    return list(found.values())


def _written(opcode: str, rest: str) -> set[int]:
    """Numbers of the registers that an instruction other than a product writes."""
    target = re.match(r"\S*\s+(?:P\d+,\s*)?R(\d+)\b", rest)
    if not target:
        return set()
    wide = re.match(r"\S*\.(?:64|128|WIDE|4|2)\b", rest)
    size = {".128": 4, ".64": 2, ".WIDE": 2, ".4": 4, ".2": 2}
    width = max((n for name, n in size.items() if name in rest.split()[0] + "."), default=1) if wide else 1
    return {int(target[1]) + r for r in range(width)}


def read_amdgcn(assembly: str) -> dict[str, Any]:
    """Vector registers and scratch a lane, and matrix products, from AMD assembly."""

    def field(name):
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(found[1]) if found else 0

    return {
        "registers": field("vgpr_count"),
        "stack_bytes": field("private_segment_fixed_size"),
        "opcodes": {"MFMA": len(re.findall(r"\bv_mfma_", assembly))},
    }


def describe(compiled: Compiled) -> dict[str, Any]:
    """One row: the launch's options, its resources, and what its machine code shows."""
    row = {"options": dict(sorted(compiled.options.items())), "shared_bytes": compiled.shared_bytes}
    if "cubin" in compiled.asm:
        row |= read_cubin(compiled.asm["cubin"])
        del row["register_operands"]  # of the scan
        row["sha256"] = text_hash(compiled.asm["cubin"])
    else:
        row |= read_amdgcn(compiled.asm["amdgcn"])
    return row


def unmet_demands(family: Family, kernel: str, row: dict[str, Any]) -> list[str]:
    """What the family demands of a kernel's sm_90 code and this row does not show, in words."""
    demand = family.demands.get(kernel, Demand(stack_bytes=1 << 30))
    unmet = [f"no {op} instruction" for op in demand.instructions if not row["opcodes"].get(op)]
    if row["stack_bytes"] > demand.stack_bytes:
        unmet.append(f"{row['stack_bytes']} bytes of stack, {demand.stack_bytes} allowed")
    return unmet


def pointer_uses(ttir: str) -> list[tuple[str, str, bool]]:
    """Of every load and store in Triton's intermediate code: which of the two, the kernel's pointer argument that it
    goes through, and whether a 64-bit offset was added on the way. Of several pointers in one argument, which are
    %p_x.0 and so on there, the argument's name."""
    known: dict[str, tuple[str, bool]] = {}
    signature = ttir[ttir.index("tt.func") : ttir.index("\n", ttir.index("tt.func"))]
    for name in re.findall(r"%([\w.]+): !tt\.ptr", signature):
        known[name] = (name.partition(".")[0], False)
    found = []
    for line in ttir.splitlines():
        made = re.search(r"%([\w.]+) = tt\.(addptr|splat|broadcast|expand_dims|reshape|trans) %([\w.]+)", line)
        if made and made[3] in known:
            argument, before = known[made[3]]
            by_64 = made[2] == "addptr" and re.search(r", (tensor<[\dx]*xi64|i64)", line.partition(" : ")[2])
            known[made[1]] = (argument, before or bool(by_64))
        used = re.search(r"tt\.(load|store) %([\w.]+)", line)
        if used and used[2] in known:
            found.append((used[1], *known[used[2]]))
    return found


def narrow_pointers(ttir: str) -> set[str]:
    """Names of the pointer arguments through which something is read or written without a 64-bit offset on the way.

    A row times a width fits 32 bits until the tensor has 2^31 elements, which logits and activations reach; the
    interpreter's small cases cannot show a lost cast."""
    return {argument for _, argument, wide in pointer_uses(ttir) if not wide}


def rewritten_pointers(ttir: str) -> set[str]:
    """Names of the pointer arguments through which a kernel both reads and writes."""
    loaded, stored = ({name for use, name, _ in pointer_uses(ttir) if use == kind} for kind in ("load", "store"))
    return loaded & stored


# A demand on PTX, and what stands for it in the intermediate code where there is no PTX (AMD's cards).
_WITHOUT_PTX = {r"max\.NaN": r"arith\.maximumf", r"min\.NaN": r"arith\.minimumf"}


def unmet_structure(family: Family, compiled: Compiled) -> list[str]:
    """What the family demands of a kernel's intermediate code and this compilation does not show, in words."""
    demand, options = family.demands.get(compiled.kernel, Demand()), compiled.options
    ttir, ptx = compiled.asm.get("ttir", compiled.asm.get("ttgir")), compiled.asm.get("ptx", "")  # Gluon: no ttir
    unmet = [f"{name} is reached by 32-bit offsets" for name in sorted(narrow_pointers(ttir) & set(demand.wide))]
    for pattern, where in demand.shows:
        option, _, value = where.partition("=")
        pattern = pattern if ptx else _WITHOUT_PTX.get(pattern, pattern)
        if (not where or str(options.get(option)) == value) and not re.search(pattern, ttir + ptx):
            unmet.append(f"no {pattern} in the code" + f" for {where}" * bool(where))
    if options.get("PRECISION") == "ieee" and re.search(r"inputPrecision = tf32", ttir):
        unmet.append("products of float32 numbers are rounded to tf32")
    return unmet


# ---- committed files ---------------------------------------------------------------------------------------


def _read_table() -> dict[str, dict]:
    """machine_code.json: Triton's version -> "family / launch / kernel" -> row; "ptxas": that version -> release."""
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def committed_table() -> dict[str, dict[str, dict]]:
    """Triton's version -> "family / launch / kernel" -> row."""
    return {version: rows for version, rows in _read_table().items() if version != "ptxas"}


def kind_of(key: str) -> tuple[str, str]:
    """(family, device) of a row by its key in the table."""
    named = re.search(r" on (sm_\d+|gfx\w+)(?= |$)", key.rpartition(" / ")[2])
    return key.partition(" / ")[0], named[1] if named else TABLE_DEVICE


def compare(rows: dict[str, dict], ptxas: str) -> dict[str, str | None]:
    """For each row, assembled by that release of ptxas, how it differs from the committed table of this Triton; None
    where it does not. Left out are families' rows of devices beside TABLE_DEVICE for which the table has none at all.

    Raises: LookupError, with the reason, if the table has no rows for this version."""
    table = committed_table()
    known = table.get(triton.__version__)
    by = _read_table().get("ptxas", {}).get(triton.__version__)
    if known is not None and by != ptxas:
        raise LookupError(f"machine_code.json's rows for triton {triton.__version__} are of ptxas {by}, not {ptxas}")
    if known is None:
        raise LookupError(
            f"machine_code.json has no rows for triton {triton.__version__}, only for "
            f"{', '.join(table) or 'none'}: `python -m kernels.proof --update` adds them"
        )
    verdicts: dict[str, str | None] = {}
    kinds = {kind_of(key) for key in known}
    for key, row in rows.items():
        if kind_of(key) not in kinds and kind_of(key)[1] != TABLE_DEVICE:
            continue
        if key not in known:
            verdicts[key] = "not in the committed table; run `python -m kernels.proof --update`"
            continue
        different = [
            f"{name} {known[key].get(name)} -> {row.get(name)}" for name in row if row[name] != known[key].get(name)
        ]
        verdicts[key] = "; ".join(different) or None
    return verdicts


def update_table(rows: dict[str, dict], ptxas: str) -> None:
    """Replace this Triton's rows of the families and devices in `rows` in machine_code.json, one writer at a time; all
    of this Triton's rows if those there are of another ptxas."""
    folder = os.open(TABLE.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        _rewrite_table(rows, ptxas)
    finally:
        os.close(folder)


def _rewrite_table(rows: dict[str, dict], ptxas: str) -> None:
    table = _read_table()
    releases = table.pop("ptxas", {})
    if releases.get(triton.__version__) != ptxas:
        table[triton.__version__] = {}
    releases[triton.__version__] = ptxas
    renewed = {kind_of(key) for key in rows}
    kept = {k: r for k, r in table.get(triton.__version__, {}).items() if kind_of(k) not in renewed}
    table[triton.__version__] = dict(sorted({**kept, **rows}.items()))
    lines = [f' "ptxas": {json.dumps(dict(sorted(releases.items())))}']
    for version, known in sorted(table.items()):
        body = ",\n".join(f"  {json.dumps(key)}: {json.dumps(row)}" for key, row in known.items())
        lines.append(f" {json.dumps(version)}: {{\n{body}\n }}")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def keep_scan(told: dict[str, Any]) -> None:
    """Put a scan beside those of other versions of Triton and other assemblers in scanned.json."""
    known = json.loads(SCANNED.read_text()) if SCANNED.exists() else {}
    known[f"triton {told['triton']}, ptxas {told['ptxas']}"] = {
        name: told[name] for name in ("kernels", "register_operands", "reused", "not_compiled")
    }
    SCANNED.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")


def manifest() -> dict[str, dict]:
    """measured.json: sha256 of machine code that has run on a GPU -> device and measured figures."""
    return json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}


def record_measured(entries: dict[str, dict]) -> None:
    """Add machine code that has just run on a GPU to measured.json; called by the benchmarks there."""
    known = manifest() | entries
    MANIFEST.write_text(json.dumps(dict(sorted(known.items())), indent=1) + "\n")
