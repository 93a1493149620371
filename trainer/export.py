"""A checkpoint for others: a folder that the transformers library loads, or the weights alone.

    python train_gpt.py export CHECKPOINT DIR                 # config, weights, tokenizer, code, a card
    python train_gpt.py export CHECKPOINT FILE.safetensors    # without the optimizers' state: a third of the file

The folder holds what `AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)` needs; its code is that of
trainer/exported. The file is a checkpoint as before, for sample, evaluate and --init_from; no run can go on from it.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.encoding import ENCODINGS, MARKER, TokenizeError, encoding_name, gpt2_ranks
from data.paths import atomic_file
from trainer.checkpoints import CheckpointError, find_checkpoint, read_tensors, read_texts, save_tensors
from trainer.options import UsageError, fields_text, fill, read_words, setting, wants_help
from trainer.start import OF_A_MODEL, starting_layout
from trainer.techniques import techniques_of

CODE = Path(__file__).with_name("exported")


@dataclass(frozen=True)
class ExportOptions:
    """What `train_gpt.py export` is told beside the checkpoint and the place."""

    vocab: str = setting("", "folder", "with GPT-2's encoder.json and vocab.bpe, which become the tokenizer")
    overwrite: bool = setting(False, "flag", "replace what is there")


USAGE = """usage: train_gpt.py export CHECKPOINT DIR|FILE.safetensors [--field=value ...]

A folder for the transformers library, or a checkpoint of the weights alone. CHECKPOINT: a file, a folder of them (its
newest), or the name of a run in local/runs.
"""


def export_weights(path: Path, target: Path) -> None:
    """A checkpoint without the optimizers' state."""
    texts, tensors = read_tensors(path)
    texts.pop("digest", None)
    save_tensors(target, starting_layout(tensors, with_optimizer=False), texts)


def export_folder(path: Path, model: Any, config: Any, folder: Path, vocab: str) -> list[str]:
    """Write a model and its configuration to `folder`. Returns what the user should know. UsageError, OSError."""
    from safetensors.torch import save_file

    if unknown := techniques_of(config):
        raise UsageError(
            f"{path}: the exported code has only the plain model, and this one has {', '.join(unknown)}; its weights "
            "alone can be exported, as FILE.safetensors"
        )
    tokenizer, remark = _tokenizer(config, vocab)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    with atomic_file(folder / "model.safetensors") as file:
        save_file(weights, file.name, metadata={"format": "pt"})
    classes = {"AutoConfig": "SpeedrunConfig", "AutoModelForCausalLM": "SpeedrunForCausalLM"}
    told = {name: getattr(config, name) for name in OF_A_MODEL if name != "dtype"}
    told |= dict(
        model_type="speedrun-gpt",
        architectures=["SpeedrunForCausalLM"],
        auto_map={auto: f"modeling_speedrun.{name}" for auto, name in classes.items()},
        dtype=config.dtype,
        max_position_embeddings=config.train_seq_len,
    )
    ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), config.eos_id)
    files = {"config.json": told, "generation_config.json": {**ends, "use_cache": False}} | tokenizer
    for name, content in files.items():
        with atomic_file(folder / name, "w") as file:
            file.write(content if isinstance(content, str) else json.dumps(content, indent=1) + "\n")
    shutil.copyfile(CODE / "modeling_speedrun.py", folder / "modeling_speedrun.py")
    with atomic_file(folder / "README.md", "w") as file:
        file.write(card(read_texts(path), config, sum(tensor.numel() for tensor in weights.values())))
    return [remark] if remark else []


def _tokenizer(config: Any, vocab: str) -> tuple[dict[str, Any], str]:
    """({file: content} of the tokenizer, a remark)."""
    try:
        name = encoding_name(config.vocab_size)
    except TokenizeError as error:
        return {}, f"no tokenizer was written: {error}"
    ends = dict.fromkeys(("bos_token", "eos_token", "pad_token"), MARKER)
    common = {**ends, "model_max_length": config.train_seq_len}
    if name == "bytes":
        auto = {"AutoTokenizer": ["tokenization_speedrun.ByteTokenizer", None]}
        told = {"tokenizer_class": "ByteTokenizer", "auto_map": auto, **common}
        code = (CODE / "tokenization_speedrun.py").read_text(encoding="utf-8")
        return {"tokenizer_config.json": told, "tokenization_speedrun.py": code}, ""
    if not vocab:
        return {}, "no tokenizer was written: --vocab=FOLDER, with encoder.json and vocab.bpe, makes one; it is GPT-2's"
    try:
        gpt2_ranks(vocab)  # checked by its hash
        merges = (Path(vocab) / "vocab.bpe").read_text(encoding="utf-8")
    except (TokenizeError, OSError) as error:
        raise UsageError(f"--vocab={vocab}: {error}") from error
    words = (Path(vocab) / "encoder.json").read_text(encoding="utf-8")
    told = {"tokenizer_class": "GPT2Tokenizer", "unk_token": MARKER, **common}
    return {"tokenizer_config.json": told, "vocab.json": words, "merges.txt": merges}, ""


def card(texts: dict[str, str], config: Any, parameters: int) -> str:
    """README.md of an exported model: what it is, how to load it, and the evidence of its run. CheckpointError."""
    try:
        validation = json.loads(texts.get("validation", "[]"))
        last = {"loss": float(validation[-1]["loss"]), "step": int(validation[-1]["step"])} if validation else {}
        seconds = float(texts.get("train_time_s", "nan"))
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"what the checkpoint says of its run makes no sense ({error})") from error
    rows = {
        "run": texts.get("run_name"),
        "steps": f"{texts.get('step')} of {config.num_iterations}",
        "validation loss": last and f"{last['loss']:.6f} nats a token after step {last['step']}",
        "training tokens": texts.get("train_tokens"),
        "training time": "" if math.isnan(seconds) else f"{seconds:.1f} s",
        "hash of the training tokens": texts.get("data_hash"),
        "hash of the validation tokens": texts.get("val_data_hash"),
        "hash of the program": texts.get("code_hash"),
        "weights from": config.init_hash,
        "seed": str(config.seed),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    kind = {size.size: name for name, size in ENCODINGS.items()}.get(config.vocab_size, f"{config.vocab_size} tokens")
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---
# {texts.get("run_name") or "A GPT of train_gpt.py"}

A GPT of {parameters:,} parameters ({config.num_layers} layers of width {config.model_dim}; {kind}), trained by
train_gpt.py and exported from its checkpoint.

```python
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("this/folder", trust_remote_code=True)
```

The code that this runs is modeling_speedrun.py, beside this page. A document begins with token {config.eos_id}, the end
of text: put it before a prompt. There is no cache of keys and values.

| | |
|-|-|
{table}
"""


def export_command(arguments: list[str], load: Callable[[Path, str], tuple[Any, Any]]) -> int:
    """`train_gpt.py export CHECKPOINT DIR`. load: (checkpoint, device) -> (model, configuration)."""
    if wants_help(arguments):
        print(USAGE, *fields_text(ExportOptions), sep="\n")
        return 0
    words, given = read_words([ExportOptions], arguments, {})
    if len(words) != 2:
        raise UsageError(USAGE.splitlines()[0])
    options = fill(ExportOptions, given)
    path, target = find_checkpoint(words[0]), Path(words[1])
    if target.exists() and target.samefile(path):
        raise UsageError(f"{target}: the checkpoint itself; export it to another place")
    there = target.exists() and (target.is_file() or any(target.iterdir()))
    if there and not options.overwrite:
        raise UsageError(f"{target}: there is something already; --overwrite replaces it")
    model, config = load(path, "cpu")
    if target.suffix == ".safetensors":
        export_weights(path, target)
        print(f"{target}: the weights of {path}, {target.stat().st_size:,} of {path.stat().st_size:,} bytes")
        return 0
    if target.is_file():
        raise CheckpointError(f"{target}: a file; an export is a folder, or a file that ends in .safetensors")
    for remark in export_folder(path, model, config, target, options.vocab):
        print(remark)
    print(f"{target}: AutoModelForCausalLM.from_pretrained({str(target)!r}, trust_remote_code=True) loads it")
    return 0
