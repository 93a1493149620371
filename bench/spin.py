"""What waiting threads cost: ms a step of nano under several rules of waiting, on idle cores and beside other work.

    python -m bench.spin [--rounds=3] [--steps=150]        -> bench/results/spin-cpu.json

The other work is one process that computes without a pause. Runs of all rules take turns, idle and busy, so that what
disturbs the machine disturbs all of them; run it on a machine that does nothing else. Each run is a whole process.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench.common import REPO, environment, summary, table, write_result
from trainer.options import command, setting
from trainer.threads import BUSY_SPIN_COUNT, IDLE_SPIN_COUNT

RULES: dict[str, dict[str, str]] = {
    "ours": {},
    "OpenMP's own": {"KMP_BLOCKTIME": "200"},  # a choice, LLVM's default: the trainer sets nothing for GNU's either
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "300 turns": {"GOMP_SPINCOUNT": "300"},
    "1000 turns": {"GOMP_SPINCOUNT": "1000"},
    "10000 turns": {"GOMP_SPINCOUNT": "10000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def ms_a_step(rule: dict[str, str], steps: int, folder: str) -> float:
    """Milliseconds a step of one run of the nano preset, start-up and validations apart."""
    command = [sys.executable, str(REPO / "train_gpt.py"), "--preset=nano", "--device=cpu", "--save_final=false"]
    command += [f"--num_iterations={steps}", "--val_loss_every=0", f"--output_dir={folder}", "--run_name=spin"]
    clean = {name: value for name, value in os.environ.items() if name not in CHOICES}
    subprocess.run([*command, "--overwrite"], env=clean | rule, check=True, stdout=subprocess.DEVNULL)
    return json.loads((Path(folder) / "spin.json").read_text())["validation"][-1]["step_avg_ms"]


def measure_rules(rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """{"idle" or "busy": {rule: ms a step of each round}}."""
    found: dict[str, dict[str, list[float]]] = {when: {name: [] for name in RULES} for when in ("idle", "busy")}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for when, times in found.items():
                for name, rule in RULES.items():
                    beside = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if when == "busy" else None
                    try:
                        times[name].append(ms_a_step(rule, steps, folder))
                    finally:
                        if beside is not None:
                            beside.kill()
                            beside.wait()
    return found


def rows_of(found: dict[str, dict[str, list[float]]]) -> list[dict[str, object]]:
    """One row a rule: medians, and each over the best of all rules in the same column."""
    medians = {when: {name: statistics.median(times) for name, times in one.items()} for when, one in found.items()}
    best = {when: min(one.values()) for when, one in medians.items()}
    return [
        {"rule": name}
        | {f"{when}, ms": round(medians[when][name], 1) for when in found}
        | {f"{when}, over the best": round(medians[when][name] / best[when], 2) for when in found}
        for name in RULES
    ]


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    rounds: int = setting(3, "runs", "of each rule, idle and busy", at_least=1)
    steps: int = setting(150, "steps", "of each run", at_least=1)
    out: Path | None = setting(None, "folder", "of the result (bench/results)")


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    _, options = command(__doc__, argv, Options)
    found = measure_rules(options.rounds, options.steps)
    rows = rows_of(found)
    times = {when: {name: summary(values) for name, values in one.items()} for when, one in found.items()}
    told = dict(
        steps=options.steps, spin_counts=[IDLE_SPIN_COUNT, BUSY_SPIN_COUNT], rules=RULES, ms_a_step=times, rows=rows
    )
    path = write_result("spin", told, folder=options.out)
    print(table(rows), f"{environment()['cpu']}; {path}", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
