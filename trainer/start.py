"""Where the values of a configuration come from that its command line does not give.

    --config=run.toml         a file of fields: TOML, or the JSON that lies beside any run's log
    --resume=CHECKPOINT       the run that wrote it, which goes on
    --init_from=CHECKPOINT    the model that it holds; the schedule too, unless --preset names another
    --data=FOLDER or TEXT     files, vocabulary, end of text and validation tokens

A checkpoint is named as everywhere (checkpoints.find_checkpoint): a file, a folder of them, a run. In this order, each
over the ones before and all over the preset; what the command line gives itself stands over all.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from data.encoding import TokenizeError, encoding_name
from data.folder import open_folder, tokens_of
from data.paths import PathError, is_remote
from data.shards import ShardError
from trainer import foreign
from trainer.checkpoints import RUNS, CheckpointError, find_checkpoint, load_tensors, read_texts
from trainer.options import UsageError, check_limits, fill, modern, read_words
from trainer.processes import asked_rank, on_rank_0

#: What belongs to one run and not to the next one that a file or a checkpoint describes.
OF_ONE_RUN = "run_name resume overwrite plan_hash config data init_from init_optimizer init_hash stop_after".split()
#: Fields that bring further fields with them, on the command line and in a file alike.
DOORS = ("data", "init_from", "resume")
OF_A_MACHINE = "device compile kernels communication deterministic".split()
OF_A_MODEL = """vocab_size eos_id num_layers model_dim num_heads mlp_ratio attention_scale soft_cap
second_input_embedding second_embedding_context value_embedding_context context_rows value_embeddings unet_skips
attention_free_layers half_truncated_rotary block_tokens window_max_tokens long_window_layers dtype""".split()
#: Of a model with techniques (trainer/techniques.py), beside those.
OF_TECHNIQUES = """norm_before_attention value_norm output_scalar mix_lr smear skip_gates backout_layer value_gates
output_gates key_offset exact_windows bigram_rows ngram_rows late_attention_source dynamic_skips dynamic_hidden
dynamic_bias_dtype matrix_dtype tie_embeddings_frac window_schedule validation_window short_window_max yarn_until
gate_optimizer untied_values xsa paired_heads dynamic_gates head_mixing""".split()


def expand(
    arguments: Iterable[str], kind: type, presets: Mapping[str, Mapping[str, Any]], bare: Mapping[str, str]
) -> list[str]:
    """The words of a command line over the dataclass `kind` with the fields that the file, the checkpoint or the data
    that they name decides, each field once. Raises UsageError, CheckpointError, ShardError."""
    words, given = read_words([kind], [_modern_word(word) for word in arguments], bare, foreign.TRAIN)
    found: dict[str, Any] = {}
    if path := given.get("config"):
        found |= from_file(path, kind)
    found |= {name: _door(found[name], bare.get(name, "true")) for name in DOORS if name in found}
    for name in ("resume", "init_from"):
        home = given if name in given else found
        if home.get(name, "auto") not in ("", "auto"):
            home[name] = _checkpoint(name, home[name], [str({**found, **given}.get("output_dir", RUNS)), RUNS])
    doors = {name: text for name, text in {**found, **given}.items() if name in DOORS}
    if doors.get("resume", "auto") not in ("", "auto"):
        found |= from_run(doors["resume"], kind)
    elif doors.get("resume") == "auto" and not {**found, **given}.get("run_name"):
        raise UsageError(f"--resume=auto goes on with the run that --run_name names{_newest_run(given, kind)}")
    if path := doors.get("init_from"):
        found |= from_model(path, kind, schedule="preset" not in given and "config" not in given)
    if path := doors.get("data"):
        known = _values(kind, presets, found, given)
        told = {**found, **given} if "data" in found else given  # one file that says both contradicts itself
        found |= from_data(path, known, {name: str(value) for name, value in told.items()})
    return [*words, *(f"--{name}={value}" for name, value in {**found, **given}.items())]


def _door(value: Any, bare: str) -> str:
    """A file's value of one of `DOORS` as a command line would have it: `true` is the flag alone."""
    if value is True:
        return bare
    return "" if value is False else os.path.expanduser(str(value))


def _modern_word(word: str) -> str:
    """An argument under its present name."""
    name, equals, text = word.removeprefix("--").partition("=")
    now, value = modern(name.replace("-", "_"), text if equals else "true")
    return f"--{now}={value}" if word.startswith("--") and now != name.replace("-", "_") else word


def _values(kind: type, presets: Mapping, found: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """All fields as they are so far. Raises UsageError."""
    told = {**{name: str(value) for name, value in found.items()}, **given}
    options: Any = fill(kind, told, presets.get(told.get("preset", "medium"), {}))
    check_limits(options)
    return dataclasses.asdict(options)


def _told(kind: type, values: Mapping[str, Any], without: Iterable[str]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)} - set(without)
    return {name: value for name, value in values.items() if name in names}


# -------------------------------------------------------------------------------------------------------------
# A file


def from_file(path: str, kind: type) -> dict[str, Any]:
    """Fields from TOML (tables only group them) or JSON (a run's, with its fields under "config"). UsageError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors begin a file with a mark of its encoding
        told = json.loads(text) if path.endswith(".json") else _toml(text)
        if not isinstance(told, dict):
            raise ValueError("no fields in it")
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--config={path}: {getattr(error, 'strerror', None) or error}") from error
    if isinstance(told.get("config"), dict):
        return _told(kind, dict(modern(*pair) for pair in told["config"].items()), OF_ONE_RUN)
    flat: dict[str, Any] = {}
    for name, value in told.items():
        flat |= value if isinstance(value, dict) else {name: value}
    flat = dict(modern(*pair) for pair in flat.items())
    names = [field.name for field in dataclasses.fields(kind)]
    for name, value in flat.items():
        if name == "config":
            raise UsageError(f"--config={path}: names a further file of fields; only the command line does")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = foreign.TRAIN.get(name.lower()) or (f"did you mean {near[0]}?" if near else "")
            raise UsageError(f"--config={path}: unknown field {name!r}" + (f"; {hint}" if hint else ""))
        if not isinstance(value, (str, int, float)):
            raise UsageError(f"--config={path}: {name} is {type(value).__name__}, a text or a number is needed")
    return flat


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)


# -------------------------------------------------------------------------------------------------------------
# A checkpoint


def _config_of(path: str) -> tuple[dict[str, str], dict[str, Any]]:
    """(texts, configuration) in the header of a checkpoint of train_gpt.py. Raises CheckpointError."""
    texts = read_texts(path)
    try:
        config = json.loads(texts["config"])
        if not texts["format"].startswith("train_gpt") or not isinstance(config, dict):
            raise ValueError(f"format {texts['format']}")
        return texts, config
    except (KeyError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a checkpoint of train_gpt.py ({error})") from error


def _checkpoint(field: str, name: str, runs: list[str]) -> str:
    """The checkpoint that a field names. On another host than the first one's, where it may be absent, the name."""
    try:
        return str(find_checkpoint(name, *runs))
    except CheckpointError as error:
        if asked_rank():
            return name
        raise CheckpointError(f"--{field}={error}") from error


def from_run(path: str, kind: type) -> dict[str, Any]:
    """The fields of the run that wrote a checkpoint, its log's place among them: it goes on where it is.

    On another host than the first one's, where the file may be absent, nothing: rank 0's configuration counts."""
    if asked_rank() and not Path(path).exists():
        return {}
    _, config = _config_of(path)
    found = _told(kind, config, {*OF_ONE_RUN, *OF_A_MACHINE} - {"init_hash", "plan_hash"})
    folder = Path(path).resolve().parent
    if folder.name.endswith(".checkpoints"):
        found |= {"output_dir": str(folder.parent), "run_name": folder.name.removesuffix(".checkpoints")}
    return found


def from_model(path: str, kind: type, schedule: bool) -> dict[str, Any]:
    """The fields of the model in a checkpoint, and with `schedule` all others of its run too; `init_hash` says which
    weights they are."""
    texts, config = _config_of(path)
    if "digest" not in texts:
        raise CheckpointError(f"{path}: without a digest; it was not written by train_gpt.py")
    found = _told(kind, config, {*OF_ONE_RUN, *OF_A_MACHINE, "output_dir"})
    if not schedule:
        found = {name: value for name, value in found.items() if name in {*OF_A_MODEL, *OF_TECHNIQUES}}
    return found | {"init_hash": texts["digest"]}


def _newest_run(given: Mapping[str, str], kind: type) -> str:
    default = {field.name: field.default for field in dataclasses.fields(kind)}["output_dir"]
    folder = Path(given.get("output_dir") or str(default))
    runs = sorted(folder.glob("*.checkpoints"), key=lambda path: path.stat().st_mtime)
    return f"; the newest in {folder} is --run_name={runs[-1].name.removesuffix('.checkpoints')}" if runs else ""


# -------------------------------------------------------------------------------------------------------------
# Data


def from_data(path: str, known: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, Any]:
    """What a folder of shards decides, or a text, which is tokenised to a folder in the cache first.

    known: all fields so far. Raises UsageError where the command line contradicts, ShardError."""
    if clash := [name for name in ("train_files", "val_files") if name in given]:
        raise UsageError(f"--data={path} names the files itself; leave --{clash[0]} out")
    folder = Path(path)
    if not folder.exists() and not is_remote(path):
        raise ShardError(f"--data={path}: no such folder or file")
    if not folder.is_dir():
        say = print if not asked_rank() else lambda text: None
        try:
            folder = tokens_of(path, encoding_name(known["vocab_size"]), say, known["vocab"] or None)
        except (TokenizeError, PathError, OSError) as error:
            raise ShardError(f"--data={path}: {error}") from error
    parts = open_folder(folder)
    found: dict[str, Any] = {"train_files": parts.train_files, "val_files": parts.val_files}
    if parts.facts is not None:
        found |= dict(vocab_size=parts.facts.vocabulary.size, eos_id=parts.facts.vocabulary.end_of_text)
        for name in ("vocab_size", "eos_id"):
            if name in given and given[name] != str(found[name]):
                raise ShardError(f"{parts.facts.source}: says {name} {found[name]}, not --{name}={given[name]}")
    return found | _validation(path, parts.val_tokens, known, given)


def _validation(path: str, held: int, known: Mapping[str, Any], given: Mapping[str, str]) -> dict[str, int]:
    """As many whole validation sequences as there are tokens for, at most what the preset asks for; where there is not
    even one, a shorter one. All of them where it asks for 0."""
    length, block = known["val_seq_len"], known["block_tokens"]
    if "val_seq_len" not in given and held - 1 < length:
        length = (held - 1) // block * block or held - 1
    whole = (held - 1) // max(length, 1) * length
    if whole < 1:
        raise ShardError(
            f"--data={path}: {held} tokens for validation are too few for one sequence of --val_seq_len={length} and a "
            "target; give more, or a shorter sequence"
        )
    asked = known["val_tokens"] or whole
    return {"val_seq_len": length, "val_tokens": min(whole, asked // length * length or length)}


# -------------------------------------------------------------------------------------------------------------
# Weights


def starting_layout(layout: Mapping[str, Any], with_optimizer: bool) -> dict[str, Any]:
    """The part of `Trainer.layout()` that a run starts with: weights, and the optimizers' state if asked."""
    weights = ("model.", "muon.mantissa.")  # a bfloat16 weight and the bits below it
    return {name: t for name, t in layout.items() if with_optimizer or name.startswith(weights)}


def initial_state(path: str, layout: Mapping[str, Any], load: Any, tensors: dict[str, Any]) -> str:
    """Read what a checkpoint has of `starting_layout` into `tensors`; returns what the log says of it.

    load: path -> (texts, tensors). Raises CheckpointError."""
    texts, found = load(path)
    for name, tensor in layout.items():
        if name not in found or (found[name].shape, found[name].dtype) != (tensor.shape, tensor.dtype):
            raise CheckpointError(f"{path}: its tensors do not fit the model of this run ({name})")
        tensors[name] = found[name]
    with_optimizer = any(name.startswith("adam.") for name in layout)
    what = "weights and optimizer state" if with_optimizer else "weights"
    return f"{what} from step {texts.get('step')} of run {texts.get('run_name')} ({path})"


def start_from(trainer: Any, log: Any, format: str) -> None:
    """Begin with what `--init_from` holds, if it is given. Collective. Raises CheckpointError.

    trainer: train_gpt.Trainer. format: of its checkpoints."""
    config = trainer.config
    tensors: dict[str, Any] = {}
    if config.init_from:
        layout = starting_layout(trainer.layout(), config.init_optimizer)
        read = partial(load_tensors, format=format)
        log.line(on_rank_0(lambda: initial_state(config.init_from, layout, read, tensors)))
        trainer.load(tensors, layout)
