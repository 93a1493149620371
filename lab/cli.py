"""Typed `--field=value` command lines over dataclasses, as train_gpt.py has them."""

import dataclasses
import difflib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

from lab import LabError

_FLAGS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def field(default: Any, text: str) -> Any:
    """A dataclass field with the sentence that `--help` prints."""
    return dataclasses.field(default=default, metadata={"help": text})


def typed(name: str, kind: type, text: str) -> Any:
    """`text` as `kind` (bool, int, float or str); LabError names the flag."""
    if kind is bool:
        if text.lower() not in _FLAGS:
            raise LabError(f"--{name}={text}: a flag is true or false")
        return _FLAGS[text.lower()]
    try:
        value = kind(text)
    except ValueError:
        raise LabError(f"--{name}={text}: expected {kind.__name__}") from None
    if isinstance(value, float) and not math.isfinite(value):
        raise LabError(f"--{name}={text}: a finite number is needed")
    return value


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(positional words, {field: text}) of a command line; `--field value` and a bare `--flag` work too."""
    words, given = [], {}
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        if not equals:
            text = queue.pop(0) if queue and not queue[0].startswith("--") else "true"
        given[name.replace("-", "_")] = text
    return words, given


def fill(cls: type, given: dict[str, str], also: Sequence[str] = ()) -> Any:
    """An instance of dataclass `cls` from texts; an unknown field is an error that names the nearest one.
    Fields in `also` belong to somebody else and are passed over."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for name in given:
        if name not in fields and name not in also:
            near = difflib.get_close_matches(name, [*fields, *also], n=1)
            hint = f"; did you mean --{near[0]}?" if near else f"; there are {', '.join(fields)}"
            raise LabError(f"unknown argument --{name}{hint}")
    return cls(**{n: typed(n, fields[n].type, text) for n, text in given.items() if n in fields})


def describe(*classes: type) -> str:
    """The fields of dataclasses as `--help` shows them."""
    lines = []
    for cls in classes:
        lines.append(f"\n{(cls.__doc__ or cls.__name__).splitlines()[0]}")
        for f in dataclasses.fields(cls):
            lines.append(f"  --{f.name}={f.default}  ({f.type.__name__}) {f.metadata.get('help', '')}".rstrip())
    return "\n".join(lines)


def run(main: Callable[[list[str]], int | None], arguments: Sequence[str] | None = None) -> int:
    """Call a command's `main` with its words; errors become one line on stderr and an exit code: 2 for
    input that the lab cannot use, 5 for input or output that failed."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(main(words) or 0)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error.strerror or error}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 5
