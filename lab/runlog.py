"""Run logs of the lab: the trainer's own (trainer/log.py), so that stats/ reads and compares them.

A run is `<folder>/runs/seed-000.txt` (source, environment, one line a step or validation) and
`seed-000.json` beside it; the runs of one configuration over several seeds are a series.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch

from data.paths import write_text
from lab import LabError
from trainer import log, program
from trainer.options import UsageError


def sources_of(*modules: str) -> str:
    """The source text of loaded modules, each under its name: what a lab log embeds, since it is what ran."""
    parts = []
    for name in modules:
        file = sys.modules[name].__file__
        parts.append(f"# {'-' * 20} {name}\n{Path(file).read_text().rstrip()}\n")
    return "\n".join(parts)


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON; a number that is not finite is an error, not a NaN in the file."""
    write_text(path, json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n")


def finite(told: Any) -> Any:
    """`told` with numbers that JSON does not have (infinite, not a number) as None."""
    if isinstance(told, dict):
        return {k: finite(v) for k, v in told.items()}
    return None if isinstance(told, float) and not math.isfinite(told) else told


class RunLog(log.RunLog):
    """Log and JSON of one run of the lab, on the CPU.

    Args:
        config: its settings with "seed" and "steps"; all but the seed make the hash of the series.
        facts: hashes of the data and the vocabulary.
        source: of `sources_of`.
        echo: print validations.
    """

    exists_advice = "choose another --output_dir, --resume=true or --overwrite=true"

    def __init__(
        self, folder: Path, name: str, config: dict[str, Any], facts: dict[str, str], source: str, echo: bool = False
    ):
        told = {k: v for k, v in config.items() if k != "seed"}
        config_hash = program.json_hash(told)
        environment = program.describe_environment(
            torch.device("cpu"),
            world_size=1,
            source=source,
            implementations={"model": config["model"]},
            plan_hash="",
            **facts,
        )
        super().__init__(folder, name, config, environment, source, config_hash, config["steps"], echo=echo)

    last_loss = math.nan  # of the newest validation

    def validated(self, step: int, clock_ms: float, loss: float) -> None:
        """The line of a validation. An infinite loss (a pair of letters never counted) stays `inf` in the log, and is
        null in the JSON, which has no infinity."""
        super().validated(step, clock_ms, loss)
        self.last_loss = loss
        self.validation[-1] = finite(self.validation[-1])

    def open(self, *, resuming: bool = False, overwrite: bool = False) -> None:
        """Begin the log, or continue it. LabError if the run exists or another process is writing it."""
        try:
            super().open(resuming=resuming, overwrite=overwrite)
        except UsageError as error:
            raise LabError(str(error)) from None
