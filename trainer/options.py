"""A frozen dataclass as a command line: `--field=value`, typed, presets as a table, misspellings answered."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import operator
import os
import re
import sys
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Options = TypeVar("Options")
YES, NO = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


class UsageError(ValueError):
    """A command line or a configuration makes no sense; the message says which field and what to do."""


def setting(
    default: Any,
    unit: str,
    text: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    choices: Iterable[str] = (),
) -> Any:
    """A dataclass field with the unit and the sentence that `help_text` prints, and the values that `check_limits`
    lets pass. Its type: bool, int, float, str, Path, one of these or None for "not given", or tuple for texts that may
    be given again and again."""
    limits = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    told = {"limits": {words: limit for words, limit in limits.items() if limit is not None}}
    return dataclasses.field(default=default, metadata={"unit": unit, "help": text, "choices": tuple(choices), **told})


def wants_help(words: Iterable[str]) -> bool:
    """Whether a command line asks what there is, anywhere in it."""
    return not {"-h", "--help"}.isdisjoint(words)


MOST = 2**31 - 1  # of a whole number without a lower limit of its own: sizes and counts travel as int32
PLAIN = ("name", "hash")  # units of texts that stand in a log's line as they are
PLACES = ("path", "folder", "local folder", "file", "glob", "checkpoint")  # units where `~` is the user's folder
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://")
_HOLDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def _fields(kind: Any) -> tuple[dataclasses.Field, ...]:
    """The fields of a dataclass, whatever type variable it hides behind."""
    return dataclasses.fields(kind)


_TYPES = {kind.__name__: kind for kind in (bool, int, float, str, Path, tuple)}


def kind_of(field: dataclasses.Field) -> type:
    """The type of a field's values where they are given: of `int | None`, int."""
    if isinstance(field.type, str):  # its module postpones annotations
        return _TYPES[field.type.partition(" |")[0]]
    kinds = typing.get_args(field.type) or (field.type,)
    return next(kind for kind in kinds if isinstance(kind, type) and kind is not type(None))


def check_limits(options: Any) -> None:
    """Raise UsageError for the first field of a dataclass whose value its `setting` does not let pass. Whole numbers
    are at most `MOST`, others finite; None is no value."""
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        limits, choices = dict(field.metadata.get("limits", {})), field.metadata.get("choices", ())
        if value is None:
            continue
        if isinstance(value, str):
            _check_text(field, value)
        if kind_of(field) is int and "at most" not in limits:
            limits.setdefault("below", MOST + 1)
        held = all(_HOLDS[words](value, limit) for words, limit in limits.items())
        if not held or (isinstance(value, float) and not math.isfinite(value)):
            wanted = [f"{words} {limit:,}".replace(",", "") for words, limit in limits.items()]
            wanted += ["a finite number"] if isinstance(value, float) and not math.isfinite(value) else []
            raise UsageError(f"--{field.name}={value}: {' and '.join(wanted)}")
        for one in value if isinstance(value, tuple) else (value,):
            if choices and one not in choices:
                raise UsageError(f"--{field.name}={one}: one of {', '.join(choices)}")


def _check_text(field: dataclasses.Field, text: str) -> None:
    """Raise UsageError for characters that no such text can have, and for a URL where none can be."""
    unit = field.metadata.get("unit")
    if "\0" in text or (unit in PLAIN and not text.isprintable()):
        place = next(place for place, c in enumerate(text) if c == "\0" or not c.isprintable())
        raise UsageError(f"--{field.name}: character {place} ({text[place]!r}) is none that a {unit} may have")
    if unit == "local folder" and _URL.match(text):
        raise UsageError(f"--{field.name}={text}: a folder of this machine is needed; only shards may lie at URLs")


def parse_options(
    kind: type[Options],
    presets: Mapping[str, Mapping[str, Any]],
    arguments: Iterable[str],
    bare: Mapping[str, str],
    foreign: Mapping[str, str] | None = None,
) -> Options:
    """An instance of the dataclass `kind` from `--field=value` or `--field value`.

    `kind` has a field `preset`, a key of `presets` whose row replaces the defaults. A bare `--field` means the text
    in `bare`, else "true". `foreign`: as in `read_words`. Raises UsageError."""
    words, given = read_words([kind], arguments, bare, foreign)
    if words:
        raise UsageError(f"unknown argument {words[0]!r}; {_hint(words[0], [kind])}")
    preset = given.get("preset") or str({field.name: field.default for field in _fields(kind)}["preset"])
    if preset not in presets:
        raise UsageError(f"--preset={preset}: no such preset; there are {', '.join(presets)}")
    return fill(kind, {"preset": preset, **given}, presets[preset])


def read_words(
    kinds: Sequence[type],
    arguments: Iterable[str],
    bare: Mapping[str, str],
    foreign: Mapping[str, str] | None = None,
    others: dict[str, str] | None = None,
) -> tuple[list[str], dict[str, str]]:
    """(words that belong to no field, {field: its text}) of a command line over the fields of several dataclasses.

    A bare `--field` means the text in `bare`, else "true"; a flag takes the next word for its own only if that
    is a yes or a no. `foreign`: what to say of names that other programs have for things. `others`: where the flags of
    another program that is started or asked go, {name: text}; a name nearly one of ours is a misspelling all the same.
    The texts of a field of tuples stand in lines; of a place `~` is the user's folder. Raises UsageError for a field
    that none of `kinds` has, or that is given twice."""
    types = {field.name: kind_of(field) for kind in kinds for field in dataclasses.fields(kind)}
    words: list[str] = []
    given: dict[str, str] = {}
    queue = list(arguments)
    while queue:
        word = queue.pop(0)
        if not word.startswith("--"):
            words.append(word)
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if name not in types and (others is None or not name or _near(name, kinds, 0.85)):
            raise UsageError(f"unknown argument {word!r}; {(foreign or {}).get(name.lower()) or _hint(name, kinds)}")
        if not equals:
            next_word = queue[0] if queue else "--"
            takes = not next_word.startswith("--") and (types.get(name) is not bool or next_word.lower() in YES + NO)
            if not takes and name not in bare and types.get(name, bool) is not bool:
                raise UsageError(f"--{name} needs a value: --{name}=...{_hinted_unit(name, kinds)}")
            text = queue.pop(0) if takes else bare.get(name, "true")
        home = given if name in types or others is None else others
        if name in home and types.get(name) is not tuple:
            raise UsageError(f"--{name} is given twice, as {home[name]!r} and as {text!r}: leave one out")
        home[name] = f"{home[name]}\n{text}" if name in home else text
    units = {field.name: field.metadata.get("unit") for kind in kinds for field in dataclasses.fields(kind)}
    return words, {name: os.path.expanduser(t) if units[name] in PLACES else t for name, t in given.items()}


def _near(name: str, kinds: Sequence[type], cutoff: float = 0.6) -> str | None:
    """The field whose name is most like `name`, if any is like it."""
    known = [field.name for kind in kinds for field in dataclasses.fields(kind)]
    return next(iter(difflib.get_close_matches(name, known, n=1, cutoff=cutoff)), None)


def _hinted_unit(name: str, kinds: Sequence[type]) -> str:
    units = [f.metadata.get("unit") for kind in kinds for f in dataclasses.fields(kind) if f.name == name]
    return f" ({units[0]})" if units and units[0] else ""


def _hint(name: str, kinds: Sequence[type]) -> str:
    near = _near(name.removeprefix("--").partition("=")[0], kinds)
    return f"did you mean --{near}?" if near else "see --help"


def fill(kind: type[Options], given: Mapping[str, str], start: Mapping[str, Any] | None = None) -> Options:
    """An instance of the dataclass `kind`: its defaults, over them `start`, over them the texts in `given` that
    name its fields, typed. Raises UsageError."""
    fields = {field.name: field for field in _fields(kind)}
    typed = {name: _typed(fields[name], text) for name, text in given.items() if name in fields}
    return kind(**{**(start or {}), **typed})


def read_command(
    doc: str | None, arguments: Iterable[str], kind: type[Options], words: tuple[int, int | None] = (0, 0)
) -> tuple[list[str], Options]:
    """(words, options) of a whole command line over one dataclass, its limits held. With --help, or without any
    argument where words are needed, `doc` and the fields are printed and SystemExit raised.

    words: how few and how many may stand beside the flags (None: any number). Raises UsageError."""
    arguments, (least, most) = list(arguments), words
    if wants_help(arguments) or (least and not arguments):
        print((doc or "").rstrip(), "", (kind.__doc__ or "").partition("\n")[0], *fields_text(kind), sep="\n")
        raise SystemExit(0 if arguments else 2)
    found, given = read_words([kind], arguments, {})
    if not least <= len(found) <= (len(found) if most is None else most):
        if most == 0:
            raise UsageError(f"unexpected word {found[0]!r}: flags are written --field=value; see --help")
        wanted = f"{least}" if most == least else f"{least} or more" if most is None else f"{least} to {most}"
        told = f"not {len(found)}: {' '.join(found)}" if found else "but none was given"
        raise UsageError(f"{wanted} words are needed beside --field=value, {told}; see --help")
    options = fill(kind, given)
    check_limits(options)
    return found, options


def command(
    doc: str | None, arguments: Iterable[str] | None, kind: type[Options], words: tuple[int, int | None] = (0, 0)
) -> tuple[list[str], Options]:
    """`read_command` of what the process was started with, unless `arguments` are given; what is wrong with them is one
    line on standard error and SystemExit(2)."""
    try:
        return read_command(doc, sys.argv[1:] if arguments is None else arguments, kind, words)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def from_json(kind: type[Options], text: str) -> Options:
    """An instance of the dataclass `kind` from JSON of its fields; fields that it has no longer are left out.

    Raises ValueError, TypeError, AttributeError, OverflowError or RecursionError for what is no such JSON."""
    types = {field.name: kind_of(field) for field in _fields(kind)}
    given = dict(modern(name, value) for name, value in json.loads(text).items())
    return kind(**{name: types[name](value) for name, value in given.items() if name in types})


def modern(name: str, value: Any) -> tuple[str, Any]:
    """A field and its value as they are called now: `fp8_head` has become one of `products`."""
    if name != "fp8_head":
        return name, value
    return "products", "fp8_head" if str(value).lower() in YES else "bf16"


def _typed(field: dataclasses.Field, text: str) -> Any:
    """`text` as the field's type; a number is 0 by the words that switch off a flag, and by "all"."""
    word, kind = text.lower(), kind_of(field)
    if kind is bool:
        if word not in YES + NO:
            raise UsageError(f"--{field.name}={text}: a flag is true or false")
        return word in YES
    if kind is tuple:
        return tuple(text.split("\n"))
    if kind is int and word in ("false", "off", "no", "all"):  # what 0 means where it is allowed
        return 0
    try:
        return kind(text)
    except ValueError:
        unit = field.metadata["unit"]
        raise UsageError(f"--{field.name}={text}: expected {kind.__name__} ({unit})") from None


def help_text(kind: type, presets: Mapping[str, Mapping[str, Any]], beside: str) -> str:
    """Every field with type, unit and default, and the value of preset `beside` where it differs."""
    head = f"Fields (--field=value) with their defaults; presets: {', '.join(presets)}\n"
    return "\n".join([head, *fields_text(kind, {beside: presets[beside]})])


def fields_text(kind: type, beside: Mapping[str, Mapping[str, Any]] | None = None) -> list[str]:
    """Lines for every field of a dataclass: default, sentence, type, unit, choices; and its value in each of
    `beside`, where it has one."""
    lines = []
    for field in dataclasses.fields(kind):
        choices = f": {', '.join(field.metadata['choices'])}" if field.metadata.get("choices") else ""
        kind = kind_of(field)
        told = "text, may be given again" if kind is tuple else kind.__name__
        lines.append(f"  --{field.name}" + ("" if field.default in (None, ()) else f"={field.default}"))
        lines.append(f"        {field.metadata['help']} ({told}, {field.metadata['unit']}{choices})")
        for name, values in (beside or {}).items():
            if field.name in values:
                lines.append(f"        {name}: {values[field.name]}")
    return lines
