"""What a run leaves in its folder, by name; without torch, so that looking costs nothing."""

from __future__ import annotations

import re
from pathlib import Path

_NAME = re.compile(r"step-(\d+)\.safetensors")


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, named step-<number>.safetensors, the highest number first."""
    found = {path: _NAME.fullmatch(path.name) for path in folder.glob("step-*.safetensors")}
    return sorted((p for p, match in found.items() if match), key=lambda p: int(found[p][1]), reverse=True)  # type: ignore[index]
