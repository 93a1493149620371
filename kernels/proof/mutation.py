"""A campaign of planted faults over all kernels: which kinds of fault would nobody notice?

    python -m kernels.proof --part mutate                          all mutants; goes on where the last one stopped
    python -m kernels.proof --part mutate --family mlp --minutes 5
    python -m kernels.proof --part mutate --page                   docs/mutations.md from what is kept, nothing run

A rule changes one place of a kernel module: a bound, a mask, a stride, a sign, an operand, a dtype, a cast, a barrier.
Every place that a rule finds is a mutant; of each rule and module so many are drawn, always the same. A mutant is put
to the checks of its family in the interpreter, and if it survives those, its launches are compiled for sm_90 and held
to the family's demands. Outcomes are kept in mutations.json, by the line that was changed, so that a campaign can be
stopped, and after a change of a module only what it touches runs again.

The faults that stand in the families (`Fault`) are written by hand together with the cases that catch them, and every
one of them is caught in the tests; this campaign asks what nobody thought of.
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import importlib
import json
import os
import random
import re
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from kernels.proof import Family, Fault, families

KEPT = Path(__file__).with_name("mutations.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "mutations.md"
#: Mutants drawn of each rule and module.
DRAWN = 3


class Rule(NamedTuple):
    """A kind of fault: `pattern` in a line of a module becomes `replacement`."""

    kind: str
    pattern: str
    replacement: str


RULES = (
    Rule("bounds", r"(\bo_\w+|\bo|row \+ o_row) < (T|V|N|M|K|tokens)\b", r"\1 <= \2"),
    Rule("bounds", r"range\(0, ", "range(1, "),
    Rule("masks", r"(\[:, None\]) & .*?\[None, :\](?=[,)]|$)", r"\1"),
    Rule("masks", r", other=0(\.0)?\)", ", other=1)"),
    Rule("missing store mask", r"(tl\.store\(.*), mask=[^=]*\)$", r"\1)"),
    Rule("strides", r"\* (stride_\w+|HEADS|KV_HEADS|K_APART|Q_APART|DH|V|N|M|K|T)\b", r"* (\1 + 1)"),
    Rule("scale", r"\* (scale|scale_log2|alpha|beta|keep|lr|_LOG2_E|s_0|s_1|b_slope|slope_target)\b", ""),
    Rule("sign", r"(b_\w+) - (b_\w+)", r"\1 + \2"),
    Rule("swapped operands", r"tl\.trans\((b_\w+|p_\w+\.load\([^)]*\))\)", r"\1"),
    Rule("swapped operands", r"tl\.minimum", "tl.maximum"),
    Rule("comparison", r" >= ", " > "),
    Rule("comparison", r" == ", " != "),
    Rule("accumulate type", r"tl\.zeros\((.*?), tl\.float32\)", r"tl.zeros(\1, tl.float16)"),
    Rule("half-precision sums", r"\.to\(tl\.float32\)", ".to(tl.float16)"),
    Rule("lost 64-bit cast", r"\.to\(tl\.int64\)", ""),
    Rule("removed barrier", r"tl\.debug_barrier\(\)", "pass"),
    Rule("NaN dropped", r", propagate_nan=tl\.PropagateNan\.ALL", ""),
    Rule("forced tf32", r"input_precision=PRECISION", 'input_precision="tf32"'),
    Rule("dropped dense", r"\bdense\((\w+)\)", r"\1"),
    Rule("schedule", r"descending=True", "descending=False"),
    Rule("off by one", r"\+ 1\b", "+ 2"),
    Rule("removed barrier", r"^( +)(mbarrier\.(wait|arrive)|fence_async_shared|tiles_read)\(.*\)$", r"\1pass"),
    Rule("missing store mask", r"(gl\.store\(.*), mask=.*\)$", r"\1)"),
    Rule("swapped operands", r"\.permute\(\(1, 0\)\)", ""),
    Rule("comparison", r" <= ", " < "),
)

_NOT_STORED = "what is read where the mask is off is not stored: the same program"
_TIMES_ZERO = "the other operand is 0 where this mask is off: the same program"
#: What a survivor means, by the mutant's name; one without a word here is an open question.
EXPLAINED: dict[str, str] = {
    "attention: masks: 3c670c19b0": _TIMES_ZERO,
    "attention: masks: 5391a4617e": _NOT_STORED,
    "attention: masks: 9ca3749c7e": _NOT_STORED,
    "attention: masks: affcc942cc": _NOT_STORED,
    "attention_inputs: masks: 34936f7ce5": _NOT_STORED,
    "attention_inputs: masks: 62e54388ce": _NOT_STORED,
    "attention_layer: masks: 8f484f4e0c": _NOT_STORED,
    "attention_layer: masks: f5f86ff99f": _NOT_STORED,
    "attention_layer: strides: 06168a680c": "programs behind the last token do nothing: the same result",
    "cross_entropy: comparison: 28458d38c0": "the other of two ways to the same sum: slower, not wrong",
    "cross_entropy: comparison: 2b1743fc6a": "a row of just one block is read in blocks: the same result",
    "cross_entropy: comparison: 68a38ea7ea": "of the 8-bit head, which tests/kernels/test_products8.py holds",
    "cross_entropy: masks: 3f430a28e0": _NOT_STORED,
    "cross_entropy: masks: 822c941a3a": "a target that equals a known one is known: the same program",
    "cross_entropy: masks: 9bd5f3bc54": _NOT_STORED,
    "heads: masks: 1a34e8ac0d": _TIMES_ZERO,
    "heads: masks: 835b91cac0": _NOT_STORED,
    "heads: masks: fc12a7ef2b": _NOT_STORED,
    "mlp: masks: 24a5fd88d2": _TIMES_ZERO,
    "mlp: masks: 4387fcfaf5": _NOT_STORED,
    "mlp: masks: ad25c846a1": _TIMES_ZERO,
    "attention: masks: 324297ee37": _NOT_STORED,
    "attention: comparison: 9292c294cf": "what is dense is copied: slower, not wrong",
    "attention_gluon: masks: 8464d0b78d": _NOT_STORED,
    "mlp8: comparison: 2583145ebf": "of the layer around the kernel, which tests/kernels/test_mlp8.py holds",
    "mlp8: strides: ddf328085c": "an empty factor, of which no tile is loaded: the same result here",
    "mlp8: half-precision sums: 74e77184b5": "float16 holds every e4m3 number, and what follows is float32: the same",
    "mlp8: comparison: 60550746e6": "the other of two ways to the same numbers: slower, not wrong",
    "products8: comparison: c92c72e2fd": "the other of two ways to the same numbers: slower, not wrong",
    "products8: dropped dense: 9106007734": "the launcher makes it dense once more: the same result",
    "products8: dropped dense: d712c99d49": "the launcher makes it dense once more: the same result",
    "attention: lost 64-bit cast: e4b3df6746": "what is added is 64 bits wide: the same program",
    "attention_layer: dropped dense: 5025bfb2b2": "torch's product takes any strides: the same result",
    "attention_layer: masks: aac3d5149b": _NOT_STORED,
    "cross_entropy: comparison: 22436c3324": "of the head around it, which tests/kernels/test_operators.py holds",
    "embedding: accumulate type: 3668ec1425": "zeros, to which the first sum gives its own type: the same program",
    "embedding: masks: 959ce837b1": _NOT_STORED,
    "mlp8: comparison: 47f6bbb2dc": "of the layer around the kernel, which tests/kernels/test_mlp8.py holds",
    "mlp8: comparison: 624b8081bc": "the other of two ways to the same numbers: slower, not wrong",
    "mlp: masks: abd263cb8b": _NOT_STORED,
    "attention: masks: 5374f059c6": "a key past the end is seen by no query, whatever ends there: the same program",
    "attention_gluon_backward: comparison: 293f8e5a0b": "the other group makes the last tile's dq: the same result",
    "attention_gluon_backward: comparison: 5da0fa373b": "another order of the same programs: slower, not wrong",
    "attention_gluon_backward: comparison: b5a1a624bb": "the groups take each other's turns with dq: the same result",
    "attention_gluon_backward: masks: 74a08cc0d8": _NOT_STORED,
    "attention_gluon_backward: masks: 78da4325b0": _NOT_STORED,
    "attention_gluon_backward: masks: 50c357c034": _TIMES_ZERO,
    "attention_gluon_backward: removed barrier: 8b278f2b33": "the other group waits for it, and both give it back",
    "attention_layer: dropped dense: 990658825e": "flatten copies what is not dense: the same result",
    "attention_layer: dropped dense: f87cc35823": "torch's product takes any strides: the same result",
    "cross_entropy: comparison: 1b29952c37": "of the 8-bit head, which tests/kernels/test_products8.py holds",
    "cross_entropy: masks: 05df643e15": "a target beyond the last is none, whatever its weight: the same program",
    "embedding: masks: d1893f3080": "what is read of that token is masked again: the same program",
    "mlp8: comparison: 85dc11d34a": "of the layer around the kernel, which tests/kernels/test_mlp8.py holds",
    "mlp8: half-precision sums: b6b14b8228": "float16 holds every e4m3 number, and what follows is float32: the same",
    "cross_entropy: comparison: 365d47915b": "of the 8-bit head, which tests/kernels/test_products8.py holds",
    "embedding: comparison: 2ae51b21d7": "warps of a program: slower, or a thread spills, not wrong",
    "mlp8: bounds: 9e345ef194": "of the layer around the kernel, which tests/kernels/test_mlp8.py holds",
    "mlp8: comparison: 4fb05c3e48": "the other of two ways to the same numbers: slower, not wrong",
    "mlp8: dropped dense: e83055b587": "a scale is one number, which is dense",
    "mlp8: strides: b9d22ccb5d": "an empty factor, of which no tile is loaded: the same result here",
    "muon: bounds: 8d20feae9a": "a mirrored tile's rows end before the matrix does: the same program",
    "muon: masks: 79939c3115": _NOT_STORED,
    "muon: masks: 9f50b3d7f2": _NOT_STORED,
    "muon: masks: d2bc7c0af4": _NOT_STORED,
    "muon: masks: f627658ba2": _TIMES_ZERO,
}


class Mutant(NamedTuple):
    """One changed place: of `family`'s module, in line `number` (from 0), `old` became `new`."""

    family: str
    kind: str
    number: int
    old: str
    new: str

    @property
    def name(self) -> str:
        """A key that survives the lines around it."""
        text = f"{self.family}|{self.kind}|{self.old.strip()}|{self.new.strip()}"
        return f"{self.family}: {self.kind}: {hashlib.sha256(text.encode()).hexdigest()[:10]}"


def mutants(family: Family) -> list[Mutant]:
    """The drawn mutants of a family's module, always the same for the same source."""
    lines = Path(importlib.import_module(family.module).__file__).read_text().splitlines()
    code, blocks = _lines_of_code(lines), _blocks(lines)
    found = []
    for rule in RULES:
        places = []
        for number in code:
            line = lines[number]
            for match in re.finditer(rule.pattern, line):
                if "  # " in line[: match.start()]:
                    continue  # a remark behind the code
                new = line[: match.start()] + match.expand(rule.replacement) + line[match.end() :]
                if new != line and _parses(
                    [*lines[blocks[number].start : number], new, *lines[number + 1 : blocks[number].stop]]
                ):
                    places.append(Mutant(family.name, rule.kind, number, line, new))
        chosen = random.Random(f"{family.name} {rule.pattern}").sample(range(len(places)), min(DRAWN, len(places)))
        found += [places[i] for i in sorted(chosen)]
    return found


def _blocks(lines: list[str]) -> list[range]:
    """Of each line, the statement of the module's top level that it lies in: as much as must parse again."""
    starts = [
        n for n, line in enumerate(lines) if line[:1].strip() and line[0] not in ")]}" and lines[n - 1][:1] != "@"
    ]
    blocks = [range(begin, end) for begin, end in zip([0, *starts], [*starts, len(lines)])]
    return [block for block in blocks for _ in block]


def _parses(lines: list[str]) -> bool:
    try:
        ast.parse("\n".join(lines))
    except SyntaxError:
        return False
    return True


def _lines_of_code(lines: list[str]) -> list[int]:
    """Numbers of the lines from the first kernel to the last launcher that are neither text nor comment."""
    text = "\n".join(lines)
    first = text[: re.search(r"^@(triton|gluon)\.jit", text, re.MULTILINE).start()].count("\n")
    last = next((n for n, line in enumerate(lines) if line.startswith("# ---- torch operators")), len(lines))
    if last == len(lines):
        last = next((n for n, line in enumerate(lines) if line.startswith("# ---- public")), len(lines))
    inside, chosen = False, []
    for number in range(first, last):
        quotes = lines[number].count('"""')
        if not inside and not quotes and lines[number].strip() and not lines[number].strip().startswith("#"):
            chosen.append(number)
        inside ^= quotes % 2 == 1
    return chosen


def planted(family: Family, mutant: Mutant) -> Fault:
    """The mutant as a fault of its module: its whole line, with the lines around it, so that it occurs once."""
    lines = Path(importlib.import_module(family.module).__file__).read_text().splitlines()
    n = mutant.number
    around = lines[max(n - 2, 0) : n], lines[n + 1 : n + 3]
    old = "\n".join([*around[0], mutant.old, *around[1]])
    return Fault(mutant.name, old, "\n".join([*around[0], mutant.new, *around[1]]))


def judged(family: Family, mutant: Mutant, number: int, folder: Path) -> dict:
    """Put one mutant to its family's checks in the interpreter; `caught` is None if none notices."""
    from kernels.proof.numeric import noticing_checks, plant

    started, caught, by = time.perf_counter(), None, None
    module = plant(family, planted(family, mutant), folder, number)
    for name, check in noticing_checks(family).items():
        try:
            check(module)
        except Exception as error:  # whatever the fault leads to
            caught, by = f"{type(error).__name__}: {error}".splitlines()[0][:200], name
            break
    return {"caught": caught, "by": by, "seconds": round(time.perf_counter() - started, 1)}


def compiled(family: Family, mutant: Mutant, number: int, folder: Path) -> dict | None:
    """Compile the mutant's quick launches for sm_90 and hold them to the family's demands; None if all are met."""
    import sys

    import kernels
    from kernels.proof import machine_code, pretend
    from kernels.proof.numeric import plant

    plain, short = importlib.import_module(family.module), family.module.rpartition(".")[2]
    module = plant(family, planted(family, mutant), folder, number)
    sys.modules[family.module] = module
    setattr(kernels, short, module)
    try:
        for launch in family.launches:
            if not launch.quick and launch.demanding:
                continue
            with pretend.device(machine_code.TABLE_DEVICE) as launched:
                launch.run()
            unmet = [u for one in launched for u in machine_code.unmet_structure(family, one)]
            if launch.demanding:
                for one in launched:
                    unmet += machine_code.unmet_demands(family, one.kernel, machine_code.describe(one))
            if unmet:
                return {"caught": f"demand: {unmet[0]}", "by": "compile"}
    except Exception as error:
        return {"caught": f"{type(error).__name__}: {error}".splitlines()[0][:200], "by": "compile"}
    finally:
        sys.modules[family.module] = plain
        setattr(kernels, short, plain)
    return None


def kept() -> dict[str, dict]:
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def keep(name: str, outcome: dict) -> None:
    """Add one outcome; several campaigns may write at once."""
    folder = os.open(KEPT.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        KEPT.write_text(json.dumps(dict(sorted({**kept(), name: outcome}.items())), indent=1) + "\n")
    finally:
        os.close(folder)


def campaign(names: tuple[str, ...], minutes: float, in_interpreter: bool) -> None:
    """Judge what is not judged yet, while time lasts: in the interpreter, or, those that survived it, compiled."""
    deadline = time.monotonic() + 60 * minutes
    waiting = [(f, m) for f in families(names).values() for m in mutants(f)]
    random.Random(0).shuffle(waiting)
    with tempfile.TemporaryDirectory(prefix="kernel-mutants-") as folder:
        for number, (family, mutant) in enumerate(waiting):
            if time.monotonic() > deadline:
                break
            known = kept().get(mutant.name)
            if in_interpreter and known is None:
                outcome = judged(family, mutant, number, Path(folder))
            elif not in_interpreter and known and known["caught"] is None and "compiled" not in known:
                outcome = {**known, **(compiled(family, mutant, number, Path(folder)) or {}), "compiled": True}
            else:
                continue
            told = {"family": family.name, "kind": mutant.kind, "old": mutant.old.strip(), "new": mutant.new.strip()}
            keep(mutant.name, {**told, **outcome})


def standing(names: tuple[str, ...] = ()) -> dict[str, dict]:
    """The kept outcomes of mutants that today's source still has."""
    alive = {m.name for f in families(names).values() for m in mutants(f)}
    return {name: outcome for name, outcome in kept().items() if name in alive}


def page() -> str:
    """docs/mutations.md."""
    outcomes, drawn = standing(), sum(len(mutants(f)) for f in families().values())
    caught = [o for o in outcomes.values() if o["caught"]]
    lines = [
        "# Mutants: faults that nobody thought of",
        "",
        "Generated by `python -m kernels.proof --part mutate --page`; do not edit.",
        "",
        f"{drawn} mutants are drawn from the kernels' sources (kernels/proof/mutation.py), {len(outcomes)} of them "
        f"have been judged, **{len(caught)} are caught** "
        f"({100 * len(caught) / max(len(outcomes), 1):.0f} %): by a check in the interpreter "
        f"({sum(o['by'] != 'compile' for o in caught)}) or by what is demanded of the compiled code "
        f"({sum(o['by'] == 'compile' for o in caught)}).",
        "",
        "| kind | judged | caught |",
        "|---|---|---|",
    ]
    for kind in sorted({o["kind"] for o in outcomes.values()}):
        mine = [o for o in outcomes.values() if o["kind"] == kind]
        lines.append(f"| {kind} | {len(mine)} | {sum(bool(o['caught']) for o in mine)} |")
    lines += ["", "| family | judged | caught |", "|---|---|---|"]
    for family in families():
        mine = [o for o in outcomes.values() if o["family"] == family]
        lines.append(f"| {family} | {len(mine)} | {sum(bool(o['caught']) for o in mine)} |")
    lines += ["", "## Survivors", "", "| family | kind | line | became | why |", "|---|---|---|---|---|"]
    for name, o in outcomes.items():
        if not o["caught"]:
            cells = (o["old"].replace("|", "\\|"), o["new"].replace("|", "\\|"))
            why = EXPLAINED.get(name, "" if "compiled" in o else "not yet compiled")
            lines.append(f"| {o['family']} | {o['kind']} | `{cells[0]}` | `{cells[1]}` | {why} |")
    return "\n".join(lines) + "\n"
