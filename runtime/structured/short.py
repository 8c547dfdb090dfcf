"""The short form of a schema: `name, age int, tags [str], mood good|bad: how it went`."""

from __future__ import annotations

import re
from typing import Any

from ..errors import UsageError

TYPES: dict[str, dict[str, Any]] = {
    "str": {"type": "string"},
    "string": {"type": "string"},
    "int": {"type": "integer"},
    "integer": {"type": "integer"},
    "float": {"type": "number"},
    "number": {"type": "number"},
    "bool": {"type": "boolean"},
    "boolean": {"type": "boolean"},
    "date": {"type": "string", "format": "date"},
    "any": {},
}
FORM = "name, age int, tags [str], mood good|bad, note? str: what it is"
FIELD = re.compile(
    r"""(?P<name>[^\s:?,{}[\]|"']+)(?P<optional>\?)?(?:\s+(?P<kind>[^:]+?))?\s*(?::\s*(?P<about>.*))?""", re.S
)


def expand(text: str) -> dict[str, Any]:
    """Return the JSON Schema that a short form stands for.

    Fields are separated by commas or, in a text of several lines, by line breaks. A field is a name, `?` if it is
    optional, a type (by default str), and after a colon a description. A type is a key of TYPES, choices separated by
    `|`, a list `[type]`, or fields in braces. `[name, age int]` as the whole text is a list of such objects.

    Raises:
        UsageError: a field is malformed or given twice, a type is unknown, or brackets do not match.
    """
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        inner = text[1:-1].strip()
        return {"type": "array", "items": _type(inner) if _is_type(inner) else _fields(inner)}
    return _fields(text)


def _refusal(reason: str) -> UsageError:
    return UsageError(f"the schema's short form: {' '.join(reason.split())}")


def _fields(text: str) -> dict[str, Any]:
    properties, required = {}, []
    for field in _split(text, "\n" if "\n" in text.strip() else ","):
        found = FIELD.fullmatch(field)
        if not found:
            raise _refusal(f"{field!r} is no field: write {FORM}")
        if found["name"] in properties:
            raise _refusal(f"the field {found['name']!r} stands there twice")
        about = {"description": found["about"]} if found["about"] else {}
        properties[found["name"]] = {**_type(found["kind"] or "str"), **about}
        required += [] if found["optional"] else [found["name"]]
    if not properties:
        raise _refusal(f"it has no field: write {FORM}")
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _is_type(text: str) -> bool:
    return text in TYPES or "|" in text or text[:1] in "[{"


def _type(text: str) -> dict[str, Any]:
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return {"type": "array", "items": _type(text[1:-1])}
    if text.startswith("{") and text.endswith("}"):
        return _fields(text[1:-1])
    if "|" in text:
        return {"enum": [choice.strip() for choice in text.split("|")]}
    if text not in TYPES:
        raise _refusal(f"no type {text!r}: there are {', '.join(TYPES)}, [a list], one|of|some, {{fields}}")
    return dict(TYPES[text])


def _split(text: str, separator: str) -> list[str]:
    """Split a text at the separators outside of brackets, and drop empty parts."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if depth < 0:
            break
        if character == separator and not depth:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise _refusal(f"a bracket of {text!r} has no partner")
    return [part.strip().rstrip(",").strip() for part in parts if part.strip()]
