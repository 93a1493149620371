"""A frozen dataclass as a command line: `--field=value`, typed, presets as a table, misspellings answered."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

Options = TypeVar("Options")
YES, NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


class UsageError(ValueError):
    """A command line or a configuration makes no sense; the message says which field and what to do."""


def setting(default: Any, unit: str, text: str) -> Any:
    """A dataclass field with the unit and the sentence that `help_text` prints. Its type must be a real one
    (bool, int, float or str), not a string: the module must not postpone annotations."""
    return dataclasses.field(default=default, metadata={"unit": unit, "help": text})


def parse_options(
    kind: type[Options], presets: Mapping[str, Mapping[str, Any]], arguments: Iterable[str], bare: Mapping[str, str]
) -> Options:
    """An instance of the dataclass `kind` from `--field=value` or `--field value`.

    `kind` has a field `preset`, a key of `presets` whose row replaces the defaults. A bare `--field` means the text
    in `bare`, else "true". Raises UsageError."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given: dict[str, str] = {}
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            raise UsageError(f"unknown argument {word!r}; {hint}")
        if not equals:
            text = queue.pop(0) if queue and not queue[0].startswith("--") else bare.get(name, "true")
        given[name] = text
    preset = given.get("preset", fields["preset"].default)
    if preset not in presets:
        raise UsageError(f"--preset={preset}: no such preset; there are {', '.join(presets)}")
    typed = {name: _typed(fields[name], text) for name, text in given.items()}
    return kind(**{**presets[preset], **typed, "preset": preset})


def _typed(field: dataclasses.Field, text: str) -> Any:
    """`text` as the field's type; a number is switched off (0) by the words that switch off a flag."""
    word = text.lower()
    if field.type is bool:
        if word not in YES + NO:
            raise UsageError(f"--{field.name}={text}: a flag is true or false")
        return word in YES
    if field.type is int and word in ("false", "off", "no"):
        return 0
    try:
        value = field.type(text)
    except ValueError:
        unit = field.metadata["unit"]
        raise UsageError(f"--{field.name}={text}: expected {field.type.__name__} ({unit})") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"--{field.name}={text}: a finite number is needed")
    return value


def help_text(kind: type, presets: Mapping[str, Mapping[str, Any]], beside: str) -> str:
    """Every field with type, unit and default, and the value of preset `beside` where it differs."""
    lines = [f"Fields (--field=value) with their defaults; presets: {', '.join(presets)}\n"]
    for field in dataclasses.fields(kind):
        lines.append(f"  --{field.name}={field.default}")
        lines.append(f"        {field.metadata['help']} ({field.type.__name__}, {field.metadata['unit']})")
        if field.name in presets[beside]:
            lines.append(f"        {beside}: {presets[beside][field.name]}")
    return "\n".join(lines)
