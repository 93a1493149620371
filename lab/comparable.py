"""Which losses may stand side by side: those that were taken on the same tokens of the same text."""

from typing import Any

NOT_COMPARABLE = "they were validated on different texts, splits or tokens, so their losses do not compare"


def validated_on(told: dict[str, Any]) -> tuple[Any, ...]:
    """What the validation losses of a run are taken on, from its JSON (of the lab or of train_gpt.py): the text, its
    split, the tokens, and how much of it. Losses of runs that differ here do not compare."""
    config = told.get("config") or {}
    hashes = (told.get("environment") or {}).get("hashes") or {}
    text = told.get("val_data_hash") or hashes.get("val_data_hash") or told.get("data_hash") or hashes.get("data_hash")
    limit, size = config.get("val_tokens") or 0, (told.get("split") or {}).get("val") or 0
    part = (limit, config.get("row_tokens")) if limit and not 0 < size <= limit else ()
    return text, hashes.get("vocabulary_digest"), config.get("split"), config.get("split_seed"), part
