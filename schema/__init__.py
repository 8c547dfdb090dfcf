"""JSON Schema for llama.cpp: a schema, or a short form of one, becomes a grammar, and an answer is checked against it.

`left` of a grammar names what a grammar cannot say; an answer's check knows all of it. jsonschema is imported by what
checks only.
"""

from __future__ import annotations

import json
from typing import Any

from .gbnf import Grammar, InvalidSchema, convert, pointer
from .short import expand

__all__ = ["Grammar", "InvalidSchema", "check_schema", "convert", "expand", "fault"]


def check_schema(document: Any) -> None:
    """Refuse what is no JSON Schema, of the draft that `$schema` names or else of 2020-12.

    Raises:
        InvalidSchema: which part is wrong, and why.
    """
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import Draft202012Validator, validator_for

    if not isinstance(document, dict):
        raise InvalidSchema(f"it is {json.dumps(document)[:40]}, not an object")
    kind = validator_for(document, default=Draft202012Validator)
    try:
        kind.check_schema(document)
    except SchemaError as error:
        raise InvalidSchema(f"{pointer(error.absolute_path)}: {error.message}") from None


def fault(text: str, document: Any) -> str | None:
    """Say why a text is no answer to a schema: it is no JSON, or a value that does not fit; None if it fits."""
    from jsonschema.exceptions import best_match
    from jsonschema.validators import Draft202012Validator, validator_for
    from referencing import Registry

    try:
        value = json.loads(text)
    except ValueError as error:
        return f"it is no JSON: {error}"
    except RecursionError:
        return "it nests too deep"
    kind = validator_for(document, default=Draft202012Validator)
    validator = kind(document, registry=Registry(), format_checker=kind.FORMAT_CHECKER)  # which fetches nothing
    found = best_match(validator.iter_errors(value))
    return None if found is None else f"{pointer(found.absolute_path)}: {found.message}"
