"""The schema as a model is told it: the mask decides what an answer may be, but not what it is to mean."""

from __future__ import annotations

import json
from collections.abc import Iterable

from . import Schema

HINT_LIMIT = 8_000  # characters, some 2,000 tokens: a longer schema would take half of a usual context
PLAIN = [{"type": kind} for kind in ("string", "integer", "number", "boolean")]


def hint_of(schema: Schema) -> str:
    """Return a schema as one line of JSON, in the order in which the answer has its properties."""
    return json.dumps(schema.document, ensure_ascii=False)


def fields_of(schema: Schema) -> list[str]:
    """Return the names of the fields of a schema that says no more than these and their types; else none.

    The mask sees to the types. A list of names leads small models less astray than JSON Schema does.
    """
    document = dict(schema.document)
    properties, required = document.pop("properties", None), document.pop("required", None)
    plain = isinstance(properties, dict) and all(one in PLAIN for one in properties.values())
    closed = document.pop("additionalProperties", False) is False
    if not (closed and plain and document == {"type": "object"} and list(properties) == required):
        return []
    return required if all(name.isprintable() and name.strip() == name != "" for name in required) else []


def is_too_long(schema: Schema) -> bool:
    """Tell whether a schema is too long to be told to a model."""
    return len(hint_of(schema)) > HINT_LIMIT


def told_by(schema: Schema, texts: Iterable[str]) -> bool:
    """Tell whether texts already hold the schema, whatever its white space, or ask for JSON and name all its fields."""
    text, fields = "\n".join(texts), fields_of(schema)
    wanted = "".join(hint_of(schema).split())
    named = fields and "json" in text.casefold() and all(name in text for name in fields)
    return bool(named) or wanted in "".join(text.split())
