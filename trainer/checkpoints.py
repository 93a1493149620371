"""Tensors and texts in one safetensors file that appears whole or not at all, and whose damage is noticed.

safetensors cannot run code, unlike a pickle. It does not notice a flipped bit, so the header carries a
digest of everything else. The trainer and the lab keep their checkpoints this way.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from data.paths import atomic_file


class CheckpointError(ValueError):
    """A checkpoint is absent, damaged or of another kind; the message names the file and the cause."""


def digest(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """blake2b over the texts and over every tensor's name, dtype, shape and bytes."""
    seen = hashlib.blake2b(json.dumps(dict(texts), sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        seen.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        seen.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return seen.hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> None:
    """Write `tensors` (of any device) and `texts` to `path`, synced; what was there stays if anything fails.

    texts: must not have the key "digest". Raises OSError (disk full, read-only folder).
    """
    from safetensors.torch import save_file

    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        # safetensors refuses two names for one memory
        shared = any(tensor.numel() and tensor.data_ptr() == other.data_ptr() for other in plain.values())
        plain[name] = tensor.clone() if shared else tensor
    try:
        with atomic_file(path) as file:
            save_file(plain, file.name, metadata={**texts, "digest": digest(plain, texts)})
            with open(file.name, "rb") as written:  # save_file may have put another file in this one's place
                os.fsync(written.fileno())
    except OSError:
        raise
    except Exception as error:  # safetensors reports a full disk as an error of its own
        raise OSError(f"cannot write {path}: {error}") from error


def load_tensors(path: str | Path, format: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(texts, tensors on the CPU) of a file that `save_tensors` wrote with texts["format"] == `format`.

    Raises CheckpointError: no such file, not whole, of another format, or damaged."""
    texts, tensors = read_tensors(path)
    if texts.get("format") != format:
        raise CheckpointError(f"{path}: a safetensors file, but not a checkpoint of format {format!r}")
    stored = texts.pop("digest", "")
    if stored != digest(tensors, texts):
        raise CheckpointError(f"{path}: damaged, its content does not match its digest")
    return texts, tensors


def read_tensors(path: str | Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(texts, tensors) of any safetensors file; the digest, if there is one, is not checked."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:  # safetensors has an error type for each kind of damage
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def read_texts(path: str | Path) -> dict[str, str]:
    """The texts of any safetensors file, without reading its tensors. Raises CheckpointError."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint") from None
    except Exception as error:  # safetensors has an error type for each kind of damage
        raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, named step-<number>.safetensors, the newest step first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def newest_whole(
    folder: Path, format: str, say: Callable[[str], None]
) -> tuple[Path, dict[str, str], dict[str, Tensor]] | None:
    """The newest checkpoint in `folder` that is whole, as (path, texts, tensors); None if there is none at
    all.

    `say` is told of each damaged one that is passed over. Raises CheckpointError if all are damaged."""
    found = checkpoints_of(folder)
    for path in found:
        try:
            return path, *load_tensors(path, format)
        except CheckpointError as error:
            say(f"warning: {error}; trying the checkpoint before it")
    if found:
        raise CheckpointError(f"{folder}: none of its {len(found)} checkpoints is whole; move them away to start over")
    return None
