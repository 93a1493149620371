"""Run logs of the lab, in the dialect and schema of train_gpt.py, so that stats/ reads and compares them.

A run is `<folder>/runs/seed-000.txt` (source, environment, one line a step or validation) and
`seed-000.json` beside it; the runs of one configuration over several seeds are a series.
"""

import contextlib
import datetime
import hashlib
import json
import os
import platform
import socket
import sys
from pathlib import Path
from typing import Any

import torch

from lab import LabError

RULER = "=" * 100


def sources_of(*modules: str) -> str:
    """The source text of loaded modules, each under its name: what a lab log embeds, since it is what ran."""
    parts = []
    for name in modules:
        file = sys.modules[name].__file__
        parts.append(f"# {'-' * 20} {name}\n{Path(file).read_text().rstrip()}\n")
    return "\n".join(parts)


def environment() -> dict[str, Any]:
    """Machine and software; the host appears as a hash only."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "hardware": cpu,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "world_size": 1,
        "system": f"{platform.system()} {platform.machine()}",
        "host_hash": hashlib.sha256(socket.gethostname().encode()).hexdigest()[:12],
    }


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, all or nothing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON; a number that is not finite is an error, not a NaN in the file."""
    write_text(
        path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    )


def now() -> str:
    """The time, UTC, ISO 8601."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


class RunLog:
    """Log and JSON of one run. Refuses to write over an existing run unless told to."""

    def __init__(self, folder: Path, name: str, config: dict[str, Any], facts: dict[str, str], source: str):
        self.folder, self.name, self.config, self.facts, self.source = folder, name, config, facts, source
        self.text_path, self.json_path = folder / f"{name}.txt", folder / f"{name}.json"
        self.total = int(config["steps"])
        self.validation: list[dict[str, float]] = []
        self.started, self.environment = now(), environment()
        told = {k: v for k, v in config.items() if k != "seed"}
        self.config_hash = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
        self.code_hash = hashlib.sha256(source.encode()).hexdigest()

    def begin(self, overwrite: bool) -> None:
        """Start the log file: source, ruler, environment, ruler."""
        if self.text_path.exists() and not overwrite:
            raise LabError(
                f"{self.text_path} exists; choose another --output_dir, --resume=true or --overwrite=true"
            )
        e = self.environment
        header = [
            self.source.rstrip("\n"),
            RULER,
            f"Running Python {e['python']}",
            f"Running PyTorch {e['torch']} compiled for CPU, {e['threads']} threads",
            f"Running on device_name={e['hardware']} with world_size=1",
            f"code_hash:{self.code_hash}",
            *(f"{key}:{value}" for key, value in self.facts.items()),
            "config:" + json.dumps(self.config, sort_keys=True),
            RULER,
        ]
        write_text(self.text_path, "\n".join(header) + "\n")

    def resume(self, step: int, validation: list[dict[str, float]]) -> None:
        """Continue an interrupted log after `step`: lines of later steps, about to be done again, are
        taken out."""
        self.validation = [v for v in validation if v["step"] <= step]
        if not self.text_path.exists():
            self.begin(overwrite=True)
            return
        header, _, body = self.text_path.read_text(encoding="utf-8").rpartition(RULER + "\n")
        kept = []
        for line in body.splitlines():
            number = line.removeprefix("step:").partition("/")[0] if line.startswith("step:") else ""
            if not (number.isdigit() and int(number) > step):
                kept.append(line)
        kept.append(f"resumed from the checkpoint of step {step}")
        write_text(self.text_path, header + RULER + "\n" + "\n".join(kept) + "\n")

    def line(self, text: str, echo: bool = False) -> None:
        """Append a line to the log."""
        with open(self.text_path, "a", encoding="utf-8") as file:
            file.write(text + "\n")
        if echo:
            print(text, flush=True)

    def trained(self, step: int, seconds: float, loss: float) -> None:
        """The line of training step `step`, counted from 1."""
        ms = seconds * 1000
        self.line(
            f"step:{step}/{self.total} train_loss:{loss:.6f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms"
        )

    def validated(self, step: int, seconds: float, loss: float, echo: bool) -> None:
        """The line of a validation after `step` training steps."""
        ms, avg = seconds * 1000, seconds * 1000 / max(step, 1)
        self.validation.append({"step": step, "loss": loss, "train_time_s": seconds, "step_avg_ms": avg})
        text = f"step:{step}/{self.total} val_loss:{loss:.6f} train_time:{ms:.0f}ms step_avg:{avg:.2f}ms"
        self.line(text, echo)

    def summary(self, status: str, error: str = "", **more: Any) -> dict[str, Any]:
        """Write the run's JSON and return it. `status`: finished, interrupted or failed."""
        last = self.validation[-1] if self.validation else None
        told = {
            "schema": 1,
            "status": status,
            "run_name": self.name,
            "seed": self.config["seed"],
            "config": self.config,
            "config_hash": self.config_hash,
            "code_hash": self.code_hash,
            **self.facts,
            "environment": self.environment | {"hashes": {"code_hash": self.code_hash, **self.facts}},
            "plan_hash": "",
            "validation": self.validation,
            "final_loss": last["loss"] if last and status == "finished" else None,
            "train_time_s": last["train_time_s"] if last else None,
            "start_time": self.started,
            "end_time": now(),
            "error": error,
            **more,
        }
        write_json(self.json_path, told)
        return told
