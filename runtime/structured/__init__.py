"""Structured answers: a JSON schema, or the short form of one, as a mask of tokens; and the final check.

llguidance makes the mask, jsonschema judges the answer; both are imported only where a schema is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from ..errors import UsageError, one_line


@dataclass(frozen=True)
class Schema:
    """What an answer has to fit."""

    document: dict[str, Any]  # JSON Schema
    relaxed: tuple[str, ...]  # keywords that the mask leaves to the final check, as `not at /tags`
    mask: str  # the schema without them, as llguidance takes it: JSON


def parse_schema(text: str, where: str = "the schema") -> Schema:
    """Read a schema that is JSON.

    Raises:
        UsageError: it is none, or no schema that an answer can fit.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is no JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise UsageError(f"{where} nests too deep") from None
    except ValueError as error:  # a number of thousands of digits
        raise UsageError(f"{where} cannot be used: {one_line(error)}") from None
    return make_schema(document, where)


def expand_schema(text: str) -> Schema:
    """Read the short form of a schema. Its mask writes integers of 15 digits at most.

    Raises:
        UsageError: it is none.
    """
    from .short import MASKED, expand

    return replace(make_schema(expand(text, MASKED)), document=expand(text))


def make_schema(document: Any, where: str = "the schema") -> Schema:
    """Turn a JSON Schema into what llguidance can follow.

    Raises:
        UsageError: it is none, or no answer can fit it.
    """
    from .check import schema_fault
    from .mask import LAYOUT
    from .relax import relax

    try:
        if reason := schema_fault(document):
            raise UsageError(f"{where} cannot be used: {one_line(reason)}")
        mask, relaxed = relax(json.loads(json.dumps(document, allow_nan=False)), where)
    except (ValueError, OverflowError) as error:  # NaN for a number
        raise UsageError(f"{where} cannot be used: {one_line(error)}") from None
    except RecursionError:
        raise UsageError(f"{where} nests too deep") from None
    return Schema(document, relaxed, json.dumps({**mask, "x-guidance": LAYOUT}))


def fault(text: str, schema: Schema) -> str | None:
    """Say why a text is no answer to a schema: it is no JSON, or a value that does not fit; None if it fits."""
    from .check import document_fault

    return document_fault(text, schema.document)
