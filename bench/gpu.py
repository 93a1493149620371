"""The one command for whenever a GPU is at hand: everything that only a GPU can tell, in one JSON and one table.

    python -m bench.gpu                                         # about 25 minutes at most; --minutes to change that
    python -m bench.gpu --tokens 'data/fineweb10B/*train*.bin'  # real documents; else drawn ones and our corpus
    python -m bench.gpu --only tests --only step                # some of the stages
    python -m bench.gpu --cpu                                   # the small versions, where there is no GPU

Stages: the GPU tests, one benchmark a kernel family (they note the hashes of the machine code that ran in
kernels/proof/measured.json), the proof that their machine code is the one committed, a training step of
`medium` with our kernels and the plain way, and a short real training. Each runs in a process of its own
under a time limit, so that one failure loses nothing of the rest; the JSON is complete after every stage.
It needs no network.

Exit code: 0 every stage passed, 1 one failed or ran out of time, 2 usage, or no GPU and no --cpu.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from bench.common import REPO, RESULTS, command_line, device_name, table, write_json

LOGS = REPO / "local" / "bench-gpu"  # the stages' whole output; git ignores it
TAIL_LINES = 40
GRACE_S = 10.0  # from SIGTERM to SIGKILL for a stage over its time


@dataclass(frozen=True)
class Stage:
    """A command with its time limit; `needs` is a file without which the stage is not there (yet)."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: str = ""
    gpu_only: bool = False


def stages(options: argparse.Namespace, on_gpu: bool) -> list[Stage]:
    """What to run, in the order of what must not be lost: correctness, kernels, the step, a training."""
    python = sys.executable
    tokens = ("--tokens", options.tokens) if options.tokens else ()
    found = [
        Stage(
            "tests", (python, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"), 420, gpu_only=True
        )
    ]
    for family in ("attention", "cross_entropy", "mlp", "muon"):
        extra = tokens if family == "attention" and on_gpu else ()
        found.append(Stage(family, (python, "-m", f"bench.{family}", *extra), 240, f"bench/{family}.py"))
    found.append(
        Stage(
            "proof",
            (python, "-m", "kernels.proof", "--part", "compile", "--device", "sm_90"),
            240,
            "kernels/proof/__main__.py",
            gpu_only=True,
        )
    )
    step = (python, "-m", "bench.step", *(tokens if on_gpu else ("--repeats", "3")))
    found.append(Stage("step", step, 300))
    found.append(Stage("step-reference", (*step, "--kernels=reference"), 300))
    found.append(Stage("training", (python, "train_gpt.py", *training_flags(options, on_gpu)), 420))
    return found


def training_flags(options: argparse.Namespace, on_gpu: bool) -> list[str]:
    """A short real training: medium on given shards, nano's shape on our own corpus otherwise."""
    common = [f"--output_dir={os.path.relpath(LOGS, REPO)}", "--run_name=training", "--overwrite", "--save_final=false"]
    if not on_gpu:
        return [*common, "--preset=nano", "--num_iterations=20", "--val_loss_every=10", "--val_tokens=16384"]
    if options.tokens:
        return [
            *common,
            "--preset=medium",
            f"--train_files={options.tokens}",
            f"--val_files={options.val_tokens or options.tokens}",
            "--num_iterations=200",
            "--val_loss_every=50",
            "--tokens_per_step=65536",
            "--val_seq_len=65536",
            "--val_tokens=1048576",
            "--log_train_loss",
        ]
    return [*common, "--preset=nano", "--dtype=bfloat16", "--val_loss_every=100"]


def run_stage(stage: Stage, limit_s: float) -> dict:
    """Run one stage to its end or limit: status, seconds, exit code, the end of its output."""
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{stage.name}.txt"
    started = time.monotonic()
    with open(log, "wb") as sink:
        process = subprocess.Popen(
            stage.command,
            cwd=REPO,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        timed_out = False
        try:
            process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            end_group(process)
    text = log.read_text(errors="replace").replace(str(REPO), ".")
    code = process.returncode
    return {
        "status": "out of time" if timed_out else "passed" if code == 0 else "failed",
        "seconds": round(time.monotonic() - started, 1),
        "limit_s": round(limit_s, 1),
        "exit_code": code,
        "tail": text.splitlines()[-TAIL_LINES:],
    }


def end_group(process: subprocess.Popen) -> None:
    """Stop a stage and whatever it has started, gently first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_S)
            if number == signal.SIGKILL:
                return
            if process.poll() is not None:
                continue


def results_since(started: float) -> dict[str, dict]:
    """Results that stages have kept since `started` (seconds of the epoch), by file name."""
    found = {}
    for path in sorted(RESULTS.glob("*.json")):
        if path.stat().st_mtime >= started and not path.name.startswith("gpu-"):
            with contextlib.suppress(ValueError):
                found[path.name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def ask_environment() -> dict:
    """The environment, asked in a process of its own: it opens the GPU, which this process must not hold."""
    code = "import json; from bench.common import environment; print(json.dumps(environment()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"the environment could not be asked: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def headline(name: str, outcome: dict) -> str:
    """The one line of a stage that a table has room for."""
    lines = [line.strip() for line in outcome.get("tail", []) if line.strip()]
    if name.startswith("step"):
        wanted = [line for line in lines if line.startswith(("| end", "measured ceilings"))]
        lines = wanted or lines
    elif name == "training":
        wanted = [line for line in lines if "val_loss:" in line]
        lines = wanted or lines
    return (lines[-1] if lines else "")[:110]


def run_all(chosen: Sequence[Stage], seconds: float, on_gpu: bool, write: Callable[[dict], object]) -> dict:
    """Run the stages while time lasts, calling `write` with all outcomes so far after each."""
    deadline = time.monotonic() + seconds
    outcomes: dict[str, dict] = {}
    for stage in chosen:
        left_s = deadline - time.monotonic()
        if stage.gpu_only and not on_gpu:
            outcomes[stage.name] = {"status": "skipped", "why": "needs a GPU"}
        elif stage.needs and not (REPO / stage.needs).exists():
            outcomes[stage.name] = {"status": "skipped", "why": f"there is no {stage.needs}"}
        elif left_s < 15:
            outcomes[stage.name] = {"status": "out of time", "why": "the time for all stages is over"}
        else:
            print(f"{stage.name} ... (at most {min(stage.limit_s, left_s):.0f} s)", flush=True)
            outcomes[stage.name] = run_stage(stage, min(stage.limit_s, left_s))
            outcome = outcomes[stage.name]
            print(f"  {outcome['status']} after {outcome['seconds']} s: {headline(stage.name, outcome)}", flush=True)
        write(outcomes)
    return outcomes


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code of the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", metavar="GLOB", help="token shards for documents and for the training")
    parser.add_argument("--val-tokens", metavar="GLOB", help="validation shards of the training (the same)")
    parser.add_argument("--minutes", type=float, default=25, help="for all stages together (25)")
    parser.add_argument("--only", action="append", default=[], metavar="STAGE", help="this stage (repeatable)")
    parser.add_argument("--cpu", action="store_true", help="run the small versions if there is no GPU")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON (bench/results)")
    options = parser.parse_args(argv)

    env = ask_environment()
    on_gpu = bool(env["gpus"])
    if not on_gpu and not options.cpu:
        print("no GPU is visible to torch here; --cpu runs the small versions of everything", file=sys.stderr)
        return 2
    chosen = stages(options, on_gpu)
    unknown = set(options.only) - {stage.name for stage in chosen}
    if unknown or options.minutes <= 0:
        names = ", ".join(stage.name for stage in chosen)
        print(f"error: --only takes {names}; --minutes is above 0", file=sys.stderr)
        return 2
    if options.only:
        chosen = [stage for stage in chosen if stage.name in options.only]

    started = time.time()
    path = options.out / f"gpu-{device_name(env)}.json"
    record = {
        "schema": 1,
        "name": "gpu",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command_line(),
        "environment": env,
    }

    def write(outcomes: dict) -> None:
        write_json(path, record | {"stages": outcomes, "results": results_since(started)})

    outcomes = run_all(chosen, options.minutes * 60, on_gpu, write)
    rows = [
        {
            "stage": name,
            "status": outcome["status"],
            "s": outcome.get("seconds", ""),
            "result": outcome.get("why") or headline(name, outcome).replace("|", " "),
        }
        for name, outcome in outcomes.items()
    ]
    print(f"\n{table(rows)}\n\nkept in {path.relative_to(REPO) if path.is_relative_to(REPO) else path}")
    return int(any(outcome["status"] in ("failed", "out of time") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
