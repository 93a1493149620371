"""The ladder: one file a rung, one interface, one registry.

Every rung is a `LanguageModel`: `forward(idx_BT, targets_BT=None) -> (logits_BTV, loss)`. Its settings are a
frozen dataclass with typed fields, so that a checkpoint can rebuild the model from JSON and the command line
can name them.
"""

import dataclasses
import importlib
from typing import Any

from lab import LabError
from lab.cli import checked
from lab.memory import refuse_too_large
from lab.models.base import IGNORE, MARK, LanguageModel

# rung -> (module, model class, fields class). Modules are imported when asked for: the GPT pulls in
# train_gpt.py.
_REGISTRY = {
    "counts": ("lab.models.bigram", "CountedBigram", "CountsFields"),
    "bigram": ("lab.models.bigram", "Bigram", "BigramFields"),
    "mlp": ("lab.models.mlp", "MLP", "MLPFields"),
    "batchnorm": ("lab.models.batchnorm", "BatchNormMLP", "BatchNormFields"),
    "wavenet": ("lab.models.wavenet", "WaveNet", "WaveNetFields"),
    "recurrent": ("lab.models.recurrent", "Recurrent", "RecurrentFields"),
    "gpt": ("lab.models.gpt", "GPTRung", "GPTFields"),
}
LADDER = tuple(_REGISTRY)


def _entry(name: str) -> tuple[type[LanguageModel], type]:
    if name not in _REGISTRY:
        raise LabError(f"no model named {name!r}; the ladder has {', '.join(LADDER)}")
    module_name, model, fields = _REGISTRY[name]
    module = importlib.import_module(module_name)
    return getattr(module, model), getattr(module, fields)


def fields_class(name: str) -> type:
    """The frozen dataclass of rung `name`'s settings; LabError for an unknown rung."""
    return _entry(name)[1]


def build_model(name: str, vocab_size: int, fields: Any = None) -> LanguageModel:
    """A freshly initialised rung over `vocab_size` tokens. `fields` is its fields class, a dict of them,
    or None for the defaults. Draws its weights from torch's global generator: seed that first."""
    model, cls = _entry(name)
    if isinstance(fields, dict):
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(fields) - known):
            raise LabError(f"{name} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
        fields = cls(**fields)
    if vocab_size < 2:
        raise LabError(f"a vocabulary of {vocab_size} tokens cannot be modelled; is the corpus empty?")
    fields = checked(fields if fields is not None else cls())
    refuse_too_large(name, vocab_size, fields, lambda: model(vocab_size, fields))
    return model(vocab_size, fields)


__all__ = ["IGNORE", "LADDER", "MARK", "LanguageModel", "build_model", "fields_class"]
