"""Checkpoints of the lab: safetensors (which cannot run code) with the model's name, fields and vocabulary as
JSON in the header, and one way to open these and those of train_gpt.py alike.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lab import LabError
from lab.models import LanguageModel, build_model
from lab.tokens import ByteTokenizer, GPT2Tokenizer, Tokenizer, from_spec
from trainer import checkpoints

FORMAT = "lab-2"  # 1: with another digest
DEFAULT_ROW = 256  # of checkpoints that do not say, which the first ones of the lab did not


@dataclass
class Checkpoint:
    """A model as it was after `step` steps, with its vocabulary. `told` is the rest of the header."""

    path: Path
    name: str
    step: int
    model: LanguageModel
    tokenizer: Tokenizer
    told: dict[str, Any]

    @property
    def label(self) -> str:
        """A short name for pictures: series (or run) and model."""
        return str(self.told.get("series") or self.told.get("run_name") or self.name)

    @property
    def context(self) -> int:
        """Tokens that the model may be given at once: what it looks at, or the row that it was trained on. What
        lies beyond was never seen in training, so nothing reads or writes with more."""
        return self.model.context or self.row_tokens

    @property
    def row_tokens(self) -> int:
        """Tokens of a packed row in training."""
        return int(self.told.get("row_tokens") or DEFAULT_ROW)

    def within(self, ids: Sequence[int]) -> list[int]:
        """The last of `ids` that the model may be given at once, see `context`; all of them where it looks at a fixed
        number of tokens, and so cannot look at more."""
        return list(ids) if self.model.context else list(ids)[-self.row_tokens :]

    def told_within(self, prompt: str) -> str:
        """A sentence on a prompt that is longer than what `within` leaves of it; '' for a shorter one."""
        ids = self.encode_prompt(prompt)
        rest = len(ids) - len(self.within(ids))
        return f" Its first {rest:,} tokens are not read: a row in training had {self.row_tokens:,}." if rest else ""

    def reading(self) -> str:
        """Which weights these are, in words."""
        why = " (of the least validation loss)" if self.path.stem == "best" else ""
        return f"{self.label}, {self.name}, step {self.step:,}{why}"

    def several_tokens(self, therefore: str) -> str:
        """A sentence on tables whose rows belong to no single token, and what follows from it; '' if there are none."""
        told = self.model.rows_of_several_tokens()
        listed = ", ".join(f"the {table} by {count}" for table, count in told.items())
        return f" A row is picked by several tokens ({listed}): {therefore}." if told else ""

    def encode_prompt(self, prompt: str) -> list[int]:
        """The mark and the prompt's ids: what the model reads before it writes. UnknownTextError for
        characters that the vocabulary lacks."""
        return [self.tokenizer.mark, *(int(i) for i in self.tokenizer.encode(prompt))]

    def encode_documents(self, text: str | Sequence[str]) -> list[int]:
        """Ids of one text or of several documents, the mark before each, as the model reads them in training."""
        return [i for document in ([text] if isinstance(text, str) else text) for i in self.encode_prompt(document)]


def save_tensors(path: Path, tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write tensors and a JSON header to `path`, all or nothing. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    checkpoints.save_tensors(path, tensors, {"format": FORMAT, "lab": json.dumps(header, sort_keys=True)})


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a lab checkpoint whose digest holds; LabError otherwise."""
    with _told():
        texts, tensors = checkpoints.load_tensors(path, FORMAT)
    return tensors, json.loads(texts["lab"])


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A CheckpointError as the lab's own error, with advice."""
    try:
        yield
    except checkpoints.CheckpointError as error:
        raise LabError(f"{error}; take another checkpoint, or train one with python -m lab.train") from error


def save_checkpoint(path: Path, model: LanguageModel, tokenizer: Tokenizer, header: dict[str, Any]) -> None:
    """Write a model's checkpoint. `header` names at least model, fields and step; the vocabulary is added."""
    vocabulary = {"tokenizer": tokenizer.spec(), "vocabulary_digest": tokenizer.digest()}
    save_tensors(path, dict(model.state_dict()), header | vocabulary)


def load_checkpoint(path: str | Path, vocab_folder: str | None = None) -> Checkpoint:
    """Open a checkpoint of the lab or of train_gpt.py (any preset), in evaluation mode, on the CPU. `vocab_folder`
    holds GPT-2's encoder.json and vocab.bpe for models over its tokens, where there is no network."""
    path = Path(path)
    with _told():
        texts, _ = checkpoints.read_tensors(path)
    if texts.get("format", "").startswith("train_gpt"):
        return _load_train_gpt(path, texts, vocab_folder)
    tensors, header = load_tensors(path)
    tokenizer = from_spec(header["tokenizer"])
    if tokenizer.digest() != header["vocabulary_digest"]:
        raise LabError(f"{path}: its vocabulary does not match the digest in its header; take another checkpoint")
    model = build_model(header["model"], tokenizer.vocab_size, header["fields"])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise LabError(f"{path}: its tensors do not fit a {header['model']} of its fields ({error})") from error
    return Checkpoint(path, header["model"], int(header["step"]), model.eval(), tokenizer, header)


def _load_train_gpt(path: Path, texts: dict[str, str], vocab_folder: str | None) -> Checkpoint:
    import train_gpt
    from lab.models.gpt import GPTRung

    with _told():
        gpt, config = train_gpt.load_model(path)
        step = checkpoints.step_of(path, texts, config.num_iterations)
    if config.vocab_size == 256:
        tokenizer: Tokenizer = ByteTokenizer()
    elif config.vocab_size == GPT2Tokenizer.vocab_size:
        tokenizer = GPT2Tokenizer(vocab_folder)
    else:
        raise LabError(f"{path}: a vocabulary of {config.vocab_size} tokens is neither bytes nor GPT-2's")
    if tokenizer.mark != config.eos_id:
        raise LabError(f"{path}: documents open with token {config.eos_id}, expected {tokenizer.mark}")
    told = {"run_name": texts.get("run_name", ""), "preset": config.preset, "row_tokens": config.train_seq_len}
    told |= {"config": dataclasses.asdict(config)} | {k: texts.get(k, "") for k in ("data_hash", "val_data_hash")}
    return Checkpoint(path, "gpt", step, GPTRung.of(gpt).eval(), tokenizer, told)


def find_checkpoints(place: str | Path) -> list[Path]:
    """Checkpoints along training, earliest first: a file, a folder of step-*.safetensors, or a run's or
    series' folder (then those of its first run). LabError if there is none."""
    place = Path(place)
    if place.is_file():
        return [place]
    for pattern in ("step-*.safetensors", "*.checkpoints/step-*.safetensors", "runs/*.checkpoints/step-*.safetensors"):
        # by number: step-1000000 is later than step-999999
        if found := sorted(place.glob(pattern), key=lambda path: (str(path.parent), len(path.name), path.name)):
            return [p for p in found if p.parent == found[0].parent]
    raise LabError(f"no checkpoint at {place}; give a .safetensors file, or a folder that a run wrote")


def best_checkpoint(place: str | Path) -> Path:
    """The checkpoint that a run kept in a run's or series' folder: the best by validation, or with --keep=last (and
    of train_gpt.py's runs) the last one; or the file itself."""
    place = Path(place)
    if place.is_file():
        return place
    folder = find_checkpoints(place)[0].parent
    best = folder / "best.safetensors"
    return best if best.exists() else find_checkpoints(folder)[-1]


def same_vocabulary(checkpoints: Sequence[Checkpoint]) -> Tokenizer:
    """The vocabulary that all checkpoints share; LabError names two that differ."""
    first = checkpoints[0]
    for other in checkpoints[1:]:
        if other.tokenizer.digest() != first.tokenizer.digest():
            raise LabError(
                f"{other.path} has another vocabulary ({other.tokenizer.kind}, {other.tokenizer.vocab_size} tokens) "
                f"than {first.path} ({first.tokenizer.kind}, {first.tokenizer.vocab_size}); compare models of one "
                "vocabulary here, or use the cross-domain analysis, which works in bits per byte"
            )
    return first.tokenizer
