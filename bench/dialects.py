"""What programs write of a training run, from a known truth: every dialect of logs and tables that is read."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

RULE = "=" * 100


@dataclass(frozen=True)
class Truth:
    """One run as it was: what a reader has to find."""

    stem: str
    seed: int
    steps: tuple[int, ...]  # of its validations
    losses: tuple[float, ...]
    planned: int
    step_ms: float
    rate: float = 0.02  # learning rate in its program
    gpus: int = 8
    crashed: bool = False


# ----------------------------------------------------------------------------------------------------
# Dialects of logs: {name of the file: text} of one run


def _program(t: Truth) -> str:
    return (
        f'import torch  # run {t.stem}\nrun_id = "{t.stem}"\ntorch.manual_seed({t.seed})\nlr = {t.rate}\n'
        'print(f"step:{step}/{total} val_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")\n'
        'example = "step:600/600 val_loss:1.0000 train_time:1ms step_avg:1.00ms"\n'
    )


def _nvidia_smi(gpus: int) -> list[str]:
    rows = [
        "Mon Nov  4 04:29:41 2024",
        "+-----------------------------------------------------------------------------------------+",
        "| NVIDIA-SMI 550.54.15              Driver Version: 550.54.15      CUDA Version: 12.4     |",
        "| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |",
    ]
    for gpu in range(gpus):
        rows.append(
            f"|   {gpu}  NVIDIA H100 80GB HBM3          On  |   00000000:{gpu:02d}:00.0 Off |                    0 |"
        )
    return [
        *rows,
        "| Processes:                                                                              |",
        "+-----+",
    ]


def _result_lines(
    t: Truth, between: str | None = None, seconds: bool = False, nan_ms: bool = False, extra: str = ""
) -> list[str]:
    """The validations, and with `between` (which stands before the time) a line for each step."""
    digits = len(repr(t.losses[-1]).partition(".")[2])
    told, lines = dict(zip(t.steps, t.losses)), []
    for step in range(t.planned + 1):
        ms = step * t.step_ms
        clock = f"train_time:{ms / 1e3:.3f}s" if seconds else f"train_time:{ms:.0f}ms"
        average = "step_avg:nanms" if nan_ms and step < 10 else f"step_avg:{ms / max(step, 1):.2f}ms"
        if step in told:
            loss = f"{told[step]:.{max(digits, 4)}f}"
            lines.append(f"step:{step}/{t.planned} val_loss:{loss} {clock} {average}{extra}")
        if between is not None and step < t.planned:
            at = step + 1
            lines.append(
                f"step:{at}/{t.planned} {between.format(loss=4 - at / 1e3)}train_time:{at * t.step_ms:.0f}ms {average}"
            )
    return lines


def autumn_2024(t: Truth) -> str:
    """A ruler line, the source, nvidia-smi, what the loaders say, a training loss each step."""
    head = [RULE, _program(t), RULE, "Running pytorch 2.5.0+cu124 compiled for CUDA 12.4", "nvidia-smi:"]
    head += [*_nvidia_smi(t.gpus), RULE, "Training DataLoader: total number of tokens: 9800000000 across 98 files"]
    head += ["Validation DataLoader: total number of tokens: 100000000 across 1 files", RULE]
    return "\n".join(head + _result_lines(t, "train_loss:{loss:.4f} ", nan_ms=True)) + "\n"


def medium_2025(t: Truth) -> str:
    """The source first, a line each step without a loss, further lines after the last validation."""
    head = [_program(t), RULE, "Running Python 3.12.7 (main)", "Running PyTorch 2.7.0+cu126 compiled for CUDA 12.6"]
    end = ["peak memory allocated: 39472 MiB reserved: 40516 MiB", "hellaswag accuracy: 0.2931", "Saved to out/"]
    end.append("final val_loss:9.9999 checked:1")
    return "\n".join([*head, *_nvidia_smi(t.gpus), RULE, *_result_lines(t, ""), *end]) + "\n"


def seconds_2026(t: Truth) -> str:
    """Seconds, further pairs, the machine on one line."""
    head = [_program(t), RULE, f"Running on device_name=NVIDIA L40S with world_size={t.gpus}", f"seed: {t.seed}", RULE]
    return "\n".join(head + _result_lines(t, seconds=True, extra=" ema_beta:0.3 ref_step:20")) + "\n"


def own(t: Truth) -> str:
    """This trainer's own."""
    config = {"seed": t.seed, "preset": "nano", "num_iterations": t.planned, "muon_lr": t.rate}
    head = [_program(replace(t, rate=0)), RULE, "Running Python 3.11.9 (main)", "config:" + json.dumps(config)]
    head += [f"Running on device_name=NVIDIA H100 with world_size={t.gpus}", RULE]
    return "\n".join(head + _result_lines(t, "train_loss:{loss:.6f} ")) + "\n"


def llm_c(t: Truth) -> str:
    """main.log of llm.c: it validates before it trains the step of that number."""
    told, lines = dict(zip(t.steps, t.losses)), []
    for step in range(t.planned + 1):
        if step in told:
            lines.append(f"s:{step} tel:{told[step]:.4f}")
        if step < t.planned:
            lines.append(f"s:{step} trl:{4 - step / 1e3:.4f} lr:0.000600 norm:0.90")
    return "\n".join(lines) + "\n"


def nanogpt(t: Truth) -> str:
    """Console of nanoGPT."""
    lines = [f"Overriding: max_iters = {t.planned}", f"Overriding: seed = {t.seed}", "number of parameters: 123.59M"]
    for step, loss in zip(t.steps, t.losses):
        lines += [f"step {step}: train loss {loss - 0.01:.4f}, val loss {loss:.4f}", "saving checkpoint to out"]
        lines.append(f"iter {step}: loss {loss:.4f}, time {t.step_ms:.2f}ms, mfu 30.00%")
    return "\n".join(lines) + "\n"


def nanochat(t: Truth) -> str:
    """Console of nanochat, in bits a byte; each step's own line tells how many are planned."""
    lines = []
    for step, loss in zip(t.steps, t.losses):
        at = max(step - 1, 0)
        if step:
            told = f"step {at:05d}/{t.planned:05d} ({at / t.planned:.2%}) | loss: 3.1 | dt: {t.step_ms:.2f}ms"
            lines.append(told + " | tok/sec: 5,000")
        lines.append(f"Step {step:05d} | Validation bpb: {loss:.4f}")
    return "\n".join(lines) + "\n"


LOGS: dict[str, Callable[[Truth], str]] = {
    one.__name__: one for one in (autumn_2024, medium_2025, seconds_2026, own, llm_c, nanogpt, nanochat)
}

# ----------------------------------------------------------------------------------------------------
# Tables: (ending, text) of a whole series


def wandb_runs(runs: Sequence[Truth]) -> tuple[str, str]:
    """The table of runs that Weights & Biases exports, its columns in an order that somebody dragged them into."""
    rows = [["Name", "State", "Runtime", "seed", "lr", "loss", "val_loss"]]
    for t in runs:
        state = "crashed" if t.crashed else "finished"
        rows.append([t.stem, state, f"{t.planned * t.step_ms / 1e3:.1f}", t.seed, "0.01", "2.5", t.losses[-1]])
    order = random.Random(runs[0].stem).sample(range(7), 7)
    return ".csv", "".join(",".join(f'"{row[column]}"' for column in order) + "\n" for row in rows)


def wandb_chart(runs: Sequence[Truth]) -> tuple[str, str]:
    """A chart of one metric, with the columns for least and greatest."""
    told = ",".join(f'"{t.stem} - val_loss","{t.stem} - val_loss__MIN","{t.stem} - val_loss__MAX"' for t in runs)
    rows = ['"Step",' + told]
    for at, step in enumerate(runs[0].steps):
        rows.append(f'"{step}",' + ",".join(",".join([f'"{t.losses[at]}"'] * 3) for t in runs))
    return ".csv", "\n".join(rows) + "\n"


def history_csv(runs: Sequence[Truth]) -> tuple[str, str]:
    """A row a validation, named columns."""
    rows = ["run,seed,step,val_loss,time_s,planned_steps"]
    for t in runs:
        for step, loss in zip(t.steps, t.losses):
            rows.append(f"{t.stem},{t.seed},{step},{loss},{step * t.step_ms / 1e3:.3f},{t.planned}")
    return ".csv", "\n".join(rows) + "\n"


def decimal_commas(runs: Sequence[Truth]) -> tuple[str, str]:
    """What a spreadsheet with another locale writes."""
    rows = [f"{t.stem};{t.losses[-1]};{t.planned * t.step_ms / 1e3:.1f}".replace(".", ",") for t in runs]
    return ".csv", "\r\n".join(["run;loss;time_s", *rows]) + "\r\n"


def json_rows(runs: Sequence[Truth]) -> tuple[str, str]:
    """Objects with named values."""
    return ".json", json.dumps([{"run": t.stem, "seed": t.seed, "loss": t.losses[-1]} for t in runs])


def json_lines(runs: Sequence[Truth]) -> tuple[str, str]:
    """One object a line."""
    return ".jsonl", "".join(json.dumps({"name": t.stem, "final_loss": t.losses[-1]}) + "\n" for t in runs)


def numbers(runs: Sequence[Truth]) -> tuple[str, str]:
    """Nothing but losses."""
    return ".txt", "; ".join(str(t.losses[-1]).replace(".", ",") for t in runs) + "\n"


TABLES = {
    one.__name__: one for one in (wandb_runs, wandb_chart, history_csv, decimal_commas, json_rows, json_lines, numbers)
}
