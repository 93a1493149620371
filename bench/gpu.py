"""The hour a GPU comes: everything that only a GPU can tell, in four commands of at most ten minutes each.

    python -m bench.gpu first      # it starts, trains, resumes, samples; its kernels and steps are right
    python -m bench.gpu step       # a step of medium with its parts and a profile, ours and the plain way
    python -m bench.gpu peers      # attention, loss, MLP and Muon against other implementations
    python -m bench.gpu choices    # tiles, tuning, 8 bits
    python -m bench.gpu first --tokens 'data/fineweb10B/*train*.bin'   # real documents; else drawn ones, our corpus
    python -m bench.gpu first --cpu                                    # the small versions, where there is no GPU

All write into one JSON, bench/results/gpu-<device>.json: a command replaces what it wrote before and keeps the rest.
Each stage runs in a process of its own under a time limit, so that one failure loses nothing of the others; the JSON
is complete after every stage. What was counted without a GPU (bench.rehearse) stands beside what is measured. The
benchmarks note the hashes of the machine code that ran in kernels/proof/measured.json. No network is needed.

Exit code: 0 every stage passed, 1 one failed or ran out of time, 2 usage, or no GPU and no --cpu.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.common import REPO, RESULTS, command_line, device_name, table, write_json
from bench.rehearse.page import kept
from trainer.options import command, setting
from trainer.program import now

LOGS = REPO / "local" / "bench-gpu"  # the stages' whole output; git ignores it
TAIL_LINES = 40
WITHOUT_GPU = 4  # times a stage's limit, where a few cores do it all
GRACE_S = 10.0  # from SIGTERM to SIGKILL for a stage over its time


@dataclass(frozen=True)
class Stage:
    """A command with its time limit; `needs` is a file without which the stage is not there (yet)."""

    name: str
    command: tuple[str, ...]
    limit_s: float
    needs: str = ""
    gpu_only: bool = False


@dataclass(frozen=True)
class Options:
    """What is measured."""

    tokens: str | None = setting(None, "glob", "of token shards, for documents and for the training")
    val_tokens: str | None = setting(None, "glob", "of the training's validation shards (the same)")
    minutes: float = setting(9.5, "minutes", "for the command's stages together", above=0)
    only: tuple = setting((), "stage", "to run")
    cpu: bool = setting(False, "flag", "run the small versions if there is no GPU")
    out: Path | None = setting(None, "folder", "of all results (bench/results; small versions: local/bench-gpu)")


def stages(command: str, options: Options, on_gpu: bool) -> list[Stage]:
    """What one of the four commands runs, in the order of what must not be lost."""
    return COMMANDS[command](options, on_gpu)


def _python(*words: str) -> tuple[str, ...]:
    return (sys.executable, *words)


def _first(options: Options, on_gpu: bool) -> list[Stage]:
    """First life: it trains, stops, resumes and samples, then its numbers are right, before anything is timed."""
    nano, medium = _training("nano", options, on_gpu), _training("medium", options, on_gpu)
    sample = ("sample", str(LOGS / "nano.checkpoints"), "--prompt=The ", "--max_new_tokens=40")
    tests = (
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "-p",
        "no:cacheprovider",
        *(() if on_gpu else ("--collect-only",)),
        "tests",
    )
    proof = ("-m", "kernels.proof", "--part", "compile", "--device", "sm_90")
    proof = (
        proof if on_gpu else ("-m", "kernels.proof", "--part", "interpret", "--quick", "--family", "attention_layer")
    )
    return [
        Stage("nano", _python("train_gpt.py", *nano), 120),
        Stage("sample", _python("train_gpt.py", *sample), 60),
        Stage("medium", _python("train_gpt.py", *medium, "--stop_after=10", "--overwrite"), 240),
        Stage("resume", _python("train_gpt.py", *medium, "--resume=auto"), 150),
        Stage("agreement", _python("-m", "bench.agreement"), 120),
        Stage("hopper", _python(*tests[:-1], "tests/kernels/test_attention_gpu.py", "-k", "hopper"), 100),
        Stage("tests", _python(*tests), 240),  # without a GPU: that all of them are found
        Stage("proof", _python(*proof), 120),
    ]


def _training(preset: str, options: Options, on_gpu: bool) -> list[str]:
    """Flags of a short real training. medium: 65,536 tokens a step, on given shards or our own corpus's bytes."""
    flags = [f"--output_dir={os.path.relpath(LOGS, REPO)}", f"--run_name={preset}"]
    if preset == "nano":
        steps = (["--num_iterations=100"] if on_gpu else ["--num_iterations=10"]) + ["--val_loss_every=50"]
        return [*flags, "--preset=nano", "--dtype=bfloat16", "--overwrite", *steps]
    flags += ["--num_iterations=20", "--val_loss_every=10", "--log_train_loss"]
    if not on_gpu:
        tiny = ["--num_layers=2", "--unet_skips=0>1", "--long_window_layers=0", "--val_tokens=8192"]
        return [*flags, "--preset=nano", *tiny]
    files = [f"--train_files={options.tokens}", f"--val_files={options.val_tokens or options.tokens}"]
    if not options.tokens:
        files = ["--train_files=embedded", "--val_files=embedded", "--eos_id=0"]
    return [*flags, "--preset=medium", *files, "--tokens_per_step=65536", "--val_seq_len=65536", "--val_tokens=65536"]


def _step(options: Options, on_gpu: bool) -> list[Stage]:
    """A step: whole, in parts, profiled; ours and the reference's."""
    tokens = ("--tokens", options.tokens) if options.tokens and on_gpu else ()
    step = _python("-m", "bench.step", "--profile", *(tokens if on_gpu else ("--repeats", "1")))
    return [Stage("step", step, 280), Stage("step-reference", (*step, "--kernels=reference"), 300)]


def _peers(options: Options, on_gpu: bool) -> list[Stage]:
    """Each kernel family against others' implementations."""
    tokens = ("--tokens", options.tokens) if options.tokens and on_gpu else ()
    small = {"attention": ("--cpu-lengths=1024", "--cpu-windows=1", "--repeats=1"), "mlp": ("--tokens=512",)}
    small |= {"cross_entropy": ("--tokens=512", "--repeats=1"), "muon": ("--repeats=1",)}
    found = []
    for family in small:
        extra = (tokens if family == "attention" else ()) if on_gpu else small[family]
        found.append(Stage(family, _python("-m", f"bench.{family}", *extra), 145))
    return found


def _choices(options: Options, on_gpu: bool) -> list[Stage]:
    """What could be chosen otherwise: tiles, Inductor's tuning, the head in 8 bits."""
    step = _python("-m", "bench.step", "--no-parts", *(() if on_gpu else ("--repeats", "1")))
    tiles = _python("-m", "bench.attention", "--tune")
    return [
        Stage("tiles", tiles, 200, gpu_only=True),
        Stage("step-untuned", (*step, "--label=untuned", "--tune=false"), 180),
        Stage("step-fp8", (*step, "--label=fp8", "--products=fp8_head"), 200, gpu_only=True),
    ]


COMMANDS: dict[str, Callable[[Options, bool], list[Stage]]] = {
    "first": _first,
    "step": _step,
    "peers": _peers,
    "choices": _choices,
}


def run_stage(stage: Stage, limit_s: float, folder: Path) -> dict:
    """Run one stage, with results in `folder`, to its end or limit: status, seconds, exit code, end of output."""
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
            env=os.environ | {"PYTHONUNBUFFERED": "1", "BENCH_RESULTS": str(folder.resolve())},
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


def results_since(folder: Path, started: float) -> dict[str, dict]:
    """Results that stages have kept there since `started` (seconds of the epoch), by file name."""
    found = {}
    for path in sorted(folder.glob("*.json")):
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
    elif name in ("nano", "medium", "resume"):
        wanted = [line for line in lines if "val_loss:" in line]
        lines = wanted or lines
    return (lines[-1] if lines else "")[:110]


def run_all(
    chosen: Sequence[Stage], seconds: float, on_gpu: bool, folder: Path, write: Callable[[dict], object]
) -> dict:
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
            limit_s = min(stage.limit_s * (1 if on_gpu else WITHOUT_GPU), left_s)
            print(f"{stage.name} ... (at most {limit_s:.0f} s)", flush=True)
            outcomes[stage.name] = run_stage(stage, limit_s, folder)
            outcome = outcomes[stage.name]
            print(f"  {outcome['status']} after {outcome['seconds']} s: {headline(stage.name, outcome)}", flush=True)
        write(outcomes)
    return outcomes


def merged(path: Path, command: str, record: dict, outcomes: dict, results: dict) -> dict:
    """The JSON at `path` with this command's stages and results in place of what it wrote before."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if before.get("schema") != record["schema"]:
        before = {}
    commands = before.get("commands", {}) | {command: {"date": record["date"], "stages": outcomes}}
    return record | {"commands": commands, "results": before.get("results", {}) | results}


def beside_projection(results: dict) -> list[dict]:
    """Rows of projected and measured figures of a step; a side that is not there yet is None."""
    found = kept("medium") or {"projection": {}, "measures": {}}
    steps = [r["result"] for name, r in results.items() if name.startswith("step-medium-") and "reference" not in name]
    measured = steps[0] if steps else {}
    end = next((row["median_ms"] for row in measured.get("whole_step", []) if row["at"] == "end"), None)
    peak = measured.get("peak_memory_mib")
    return [
        {"of a step of medium": "ms", "projected, counted": found["projection"].get("ms"), "measured": end},
        {
            "of a step of medium": "peak GiB",
            "projected, counted": found["measures"].get("peak_gib"),
            "measured": peak / 1024 if peak else None,
        },
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code of the module's docstring."""
    words, options = command(__doc__, argv, Options, (0, 1))
    asked = words[0] if words else "first"
    if asked not in COMMANDS:
        print(f"error: there is no {asked!r}; there are {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    env = ask_environment()
    on_gpu = bool(env["gpus"])
    if not on_gpu and not options.cpu:
        print("no GPU is visible to torch here; --cpu runs the small versions of everything", file=sys.stderr)
        return 2
    chosen = stages(asked, options, on_gpu)
    unknown = set(options.only) - {stage.name for stage in chosen}
    if unknown:
        names = ", ".join(stage.name for stage in chosen)
        print(f"error: --only={min(unknown)}: one of {names}", file=sys.stderr)
        return 2
    if options.only:
        chosen = [stage for stage in chosen if stage.name in options.only]

    started = time.time()
    # the small versions are a rehearsal: they must not take the place of what was measured on this machine
    folder = options.out or (RESULTS if on_gpu else LOGS)
    path = folder / f"gpu-{device_name(env)}.json"
    record = {"schema": 2, "name": "gpu", "date": now(), "command": command_line(), "environment": env}
    before = json.loads(path.read_text(encoding="utf-8")) if options.only and path.is_file() else {}
    kept = before.get("commands", {}).get(asked, {}).get("stages", {})  # the stages that are not run again

    def write(outcomes: dict) -> None:
        write_json(path, merged(path, asked, record, kept | outcomes, results_since(folder, started)))

    outcomes = run_all(chosen, options.minutes * 60, on_gpu, folder, write)
    rows = [
        {
            "stage": name,
            "status": outcome["status"],
            "s": outcome.get("seconds", ""),
            "result": outcome.get("why") or headline(name, outcome).replace("|", " "),
        }
        for name, outcome in outcomes.items()
    ]
    print(f"\n{table(rows)}\n\n{table(beside_projection(json.loads(path.read_text())['results']))}")
    print(f"\nkept in {path.relative_to(REPO) if path.is_relative_to(REPO) else path}")
    return int(any(outcome["status"] in ("failed", "out of time") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
