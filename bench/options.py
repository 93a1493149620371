"""Command lines of measurements that take fields of train_gpt.py beside options of their own."""

from collections.abc import Sequence
from typing import Any

from trainer.options import check_limits, fields_text, fill, read_words, wants_help


def helped(argv: Sequence[str], doc: str | None, kind: type | None = None) -> bool:
    """Whether the user asked what there is; if so, `doc` and the fields of the dataclass `kind` are printed."""
    asked = wants_help(argv)
    if asked:
        print(doc, *(fields_text(kind) if kind else ()), sep="\n")
    return asked


def own_and_config(kind: type, argv: Sequence[str], preset: str) -> tuple[Any, Any]:
    """(options of the dataclass `kind`, train_gpt.Config of all other fields). `preset`: unless one is given.

    Raises UsageError."""
    import train_gpt

    others: dict[str, str] = {}
    words, given = read_words([kind], argv, {}, others=others)
    options = fill(kind, given)
    check_limits(options)
    fields = {"preset": preset} | others
    return options, train_gpt.parse_config([*words, *(f"--{name}={text}" for name, text in fields.items())])
