"""What a trainer says of its own command line, asked in a process of its own before anything is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_QUESTION = """
import importlib.util, json, sys
path, *words = sys.argv[1:]
sys.path.insert(0, path.rpartition("/")[0])
spec = importlib.util.spec_from_file_location("trainer_of_series", path)
module = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = module
spec.loader.exec_module(module)
if not hasattr(module, "parse_config"):
    print(json.dumps({}))
    sys.exit()
try:
    config = module.parse_config(words)
except ValueError as error:
    print(json.dumps({"error": str(error)}))
    sys.exit()
print(json.dumps({"threshold": getattr(config, "target_loss", None)}))
"""


def ask_trainer(trainer: Path, preset: str, overrides: Mapping[str, str]) -> float | None:
    """The loss that the trainer's configuration is judged against; None if it does not tell.

    A trainer tells by a function `parse_config(words)`. Raises ValueError with its own words for a flag that it does
    not know or a value that it refuses.
    """
    words = [f"--preset={preset}", *(f"--{key}={text}" for key, text in overrides.items())]
    command = [sys.executable, "-c", _QUESTION, str(trainer.resolve()), *words]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    lines = done.stdout.splitlines()
    try:
        answer = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    except ValueError:
        answer = None
    if answer is None:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise ValueError(f"{trainer.name} cannot be loaded: {last}")
    if "error" in answer:
        raise ValueError(answer["error"])
    threshold = answer.get("threshold", overrides.get("target_loss"))
    return None if threshold is None else float(threshold)
