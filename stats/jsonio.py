"""Results as JSON, and the JSON Schema of a result, both from its dataclass."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import types
import typing
from typing import Any


def to_jsonable(value: Any) -> Any:
    """`value` as JSON can hold it: dataclasses as objects, tuples as arrays, numbers that are not finite as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f for f in dataclasses.fields(value) if f.repr)
        return {f.name: to_jsonable(getattr(value, f.name)) for f in fields}
    if isinstance(value, dict):
        return {str(key): to_jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_jsonable(item) for item in value]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()  # numpy scalar
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def json_hash(value: Any) -> str:
    """sha256 of a value's JSON with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def dumps(value: Any) -> str:
    """`to_jsonable`, indented, valid by the letter of the standard."""
    return json.dumps(to_jsonable(value), indent=2, allow_nan=False, ensure_ascii=False)


def schema(kind: type) -> dict:
    """JSON Schema (2020-12) of a result's dataclass, with every class it mentions under `$defs`."""
    definitions: dict[str, dict] = {}
    root = _schema_of(kind, definitions)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **root, "$defs": definitions}


def _schema_of(kind: Any, definitions: dict[str, dict]) -> dict:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # before its fields, which may mention it
            hints = typing.get_type_hints(kind)
            fields = [f for f in dataclasses.fields(kind) if f.repr]
            definitions[kind.__name__] = {
                "type": "object",
                "description": " ".join((kind.__doc__ or "").split()),
                "properties": {f.name: _schema_of(hints[f.name], definitions) for f in fields},
                "required": [f.name for f in fields],
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_schema_of(argument, definitions) for argument in arguments]}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return {"type": "array", "items": _schema_of(arguments[0], definitions)}
        items = [_schema_of(argument, definitions) for argument in arguments]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(arguments[1], definitions)}
    if kind is float:
        return {"type": ["number", "null"]}  # null: not finite
    plain = {bool: "boolean", int: "integer", str: "string", type(None): "null", dict: "object"}
    return {"type": plain[kind]} if kind in plain else {}
