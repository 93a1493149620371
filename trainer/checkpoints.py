"""Tensors and texts in one safetensors file that appears whole or not at all, and whose damage is noticed.

safetensors cannot run code, unlike a pickle. It does not notice a flipped bit, so the header carries a
digest of everything else. The trainer and the lab keep their checkpoints this way.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from data.paths import atomic_file
from trainer.files import checkpoints_of
from trainer.log import say


class NonFinite(ArithmeticError):
    """A loss or a weight is NaN or infinite; training stops and the last good checkpoint stays."""


def finite(value: float, what: str) -> float:
    """`value` itself. Raises NonFinite."""
    if not math.isfinite(value):
        raise NonFinite(f"{what} is {value}")
    return value


class WithoutValues(TorchFunctionMode):
    """In this block embeddings are made without the drawing of their first values: on the meta device it would have no
    effect but to import torch's compiler, which takes a second."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is torch.nn.init.normal_:
            return named["tensor"] if named else arguments[0]
        return function(*arguments, **(named or {}))


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


def check_tensors(path: str | Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError unless `found` has all tensors of `wanted` in their shapes and types."""
    for name, tensor in wanted.items():
        if name not in found or (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(f"{path}: its tensors do not fit its configuration ({name})")


def check_same_run(path: str | Path, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise CheckpointError unless the fields that decide what is computed are the same, here and in a checkpoint."""
    if differing := [name for name in here if here[name] != there[name]]:
        names = ", ".join(differing)
        raise CheckpointError(
            f"{path}: made with another configuration; these fields differ: {names}. --resume goes on with a run as it "
            f"was begun; a run of its own that begins with these weights: --init_from={path}"
        )


class Done(NamedTuple):
    """How far a run had come: steps, seconds of training, validations as in the run's JSON, losses of its steps."""

    step: int = 0
    seconds: float = 0.0
    validation: list[dict[str, Any]] = []  # noqa: RUF012  (nobody writes to it)
    losses: list[float] = []  # noqa: RUF012

    def texts(self) -> dict[str, str]:
        """For a checkpoint's header."""
        return dict(
            step=str(self.step),
            train_time_s=repr(self.seconds),
            validation=json.dumps(self.validation),
            train_loss=json.dumps(self.losses),
        )

    @classmethod
    def read(cls, path: str | Path, texts: Mapping[str, str], last_step: int) -> Done:
        """Of the header of a run's checkpoint, which has `last_step` steps. Raises CheckpointError."""
        try:
            step, seconds = int(texts["step"]), float(texts["train_time_s"])
            validation, losses = json.loads(texts["validation"]), json.loads(texts["train_loss"])
            sane = 0 <= step <= last_step and 0 <= seconds < math.inf
            if not sane or any(not 0 <= p["step"] <= step or not math.isfinite(p["loss"]) for p in validation):
                raise ValueError(f"step {step}, {seconds} s")
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: what it says of its run makes no sense ({error})") from error
        return cls(step, seconds, validation, losses)


def step_of(path: str | Path, texts: Mapping[str, str], last_step: int) -> int:
    """The step that a checkpoint was written after, by its header; `last_step` where it says none. CheckpointError."""
    try:
        step = int(texts.get("step", last_step))
        if not 0 <= step <= last_step:
            raise ValueError(f"step {step} of {last_step}")
    except ValueError as error:
        raise CheckpointError(f"{path}: what it says of its step makes no sense ({error})") from error
    return step


def newest_whole(folder: Path, format: str) -> tuple[Path, dict[str, str], dict[str, Tensor]] | None:
    """The newest checkpoint in `folder` that is whole, as (path, texts, tensors); None if there is none at all.

    Each damaged one that is passed over is told. Raises CheckpointError if all are damaged."""
    found = checkpoints_of(folder)
    for path in found:
        try:
            return path, *load_tensors(path, format)
        except CheckpointError as error:
            say(f"warning: {error}; trying the checkpoint before it")
    if found:
        raise CheckpointError(f"{folder}: none of its {len(found)} checkpoints is whole; move them away to start over")
    return None


RUNS = "local/runs"  # where runs lie whose folder is not told


def find_checkpoint(name: str, *runs: str) -> Path:
    """The file `name`; the newest checkpoint in the folder `name`, or of the run whose log or JSON is `name`, or of the
    run `name` in the folders `runs` (by default `RUNS`). Newest: of the highest step. Raises CheckpointError."""
    path = Path(name)
    if path.suffix in (".txt", ".json") and path.with_suffix(".checkpoints").is_dir():
        path = path.with_suffix(".checkpoints")
    if path.is_file():
        return path
    homes = list(dict.fromkeys(runs)) or [RUNS]
    for folder in (path, Path(f"{name}.checkpoints"), *(Path(home) / f"{name}.checkpoints" for home in homes)):
        if folder.is_dir():
            found = checkpoints_of(folder) or [p for f in folder.glob("*.checkpoints") for p in checkpoints_of(f)]
            if len({p.parent for p in found}) > 1:
                names = ", ".join(sorted({p.parent.name.removesuffix(".checkpoints") for p in found}))
                raise CheckpointError(f"{folder}: holds several runs ({names}); name one")
            if found:
                return found[0]
    where = " or ".join(homes)
    raise CheckpointError(f"{name}: no checkpoint, no folder of checkpoints, and no run of that name in {where}")


def find_run(resume: str, folder: Path, format: str) -> tuple[Path, dict[str, str], dict[str, Tensor]] | None:
    """(path, texts, tensors) of the checkpoint at the path `resume`, or, if that is "auto", of the newest whole one in
    `folder`, None if there is none yet. Raises CheckpointError."""
    return newest_whole(folder, format) if resume == "auto" else (Path(resume), *load_tensors(resume, format))


def read_run(
    found: tuple[Path, dict[str, str], dict[str, Tensor]] | None,
    here: Mapping[str, Any],
    config_of: Callable[[Path, Mapping[str, str]], Mapping[str, Any]],
    layout: Mapping[str, Tensor],
    tensors: dict[str, Tensor],
) -> tuple[Done, dict[str, str]]:
    """How far the run of a checkpoint had come, and its path and hashes ({}: none was found); its state goes into
    `tensors`. Raises CheckpointError unless it is of this run.

    found: of `find_run`. here: the fields that decide what is computed; config_of: (path, texts) -> the same fields of
    the checkpoint. layout: of train_gpt.Trainer."""
    if found is None:
        return Done(), {}
    path, texts, there = found
    check_same_run(path, here, config_of(path, texts))
    check_tensors(path, there, layout)
    tensors.update(there)
    hashes = {key: texts.get(key, "") for key in ("data_hash", "val_data_hash")}
    return Done.read(path, texts, int(here["num_iterations"])), {"path": str(path), **hashes}


def save_run(folder: Path, step: int, state: Mapping[str, Tensor], texts: Mapping[str, str], keep: int) -> Path:
    """Write the checkpoint after `step` steps and return its path; once it is safely there, all but the `keep` newest
    go (0: none goes), and with them those of later steps: a run of this name that was replaced, or gone on with from an
    earlier step, left them, and they would be taken for newer. Raises NonFinite, OSError."""
    if any(not torch.isfinite(t).all() for t in state.values() if t.is_floating_point()):
        raise NonFinite(f"a weight is not finite after step {step}: no checkpoint written")
    for left in folder.glob(".*.part"):  # by a process that was killed while it wrote
        left.unlink(missing_ok=True)
    path = folder / f"step-{step:06d}.safetensors"
    save_tensors(path, state, texts)
    if keep:
        newest = checkpoints_of(folder)
        begin = newest.index(path)
        for old in (*newest[:begin], *newest[begin + keep :]):
            old.unlink(missing_ok=True)
    return path
