"""Structured answers: a JSON Schema or its short form, the mask of the next tokens, and the final check of an answer.

llguidance computes the mask and jsonschema checks the answer; both are imported only when a schema is used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from ..errors import UsageError, one_line

MOST = 1 << 18  # characters of a schema: half a second to check and to compile 64 thousand


@dataclass(frozen=True)
class Schema:
    """A schema that an answer has to fit."""

    document: dict[str, Any]  # JSON Schema
    relaxed: tuple[str, ...]  # keywords that the mask leaves to the final check, e.g. `not at /tags`
    mask: str  # the schema without those keywords, as JSON for llguidance


def parse_schema(text: str, where: str = "the schema") -> Schema:
    """Read a JSON Schema from JSON text.

    Raises:
        UsageError: the text is not JSON, the JSON is not a schema, or no answer can fit the schema.
    """
    if len(text) > MOST:
        raise UsageError(f"{where} has more than {MOST:,} characters: make it simpler")
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is no JSON: {error.msg} (line {error.lineno}, column {error.colno})") from None
    except RecursionError:
        raise UsageError(f"{where} nests too deep") from None
    except ValueError as error:  # a number with thousands of digits
        raise UsageError(f"{where} cannot be used: {one_line(error)}") from None
    return make_schema(document, where)


def expand_schema(text: str) -> Schema:
    """Read the short form of a schema.

    Raises:
        UsageError: the text is not in the short form.
    """
    from .short import expand

    if len(text) > MOST:
        raise UsageError(f"the schema's short form has more than {MOST:,} characters: make it simpler")
    try:
        return make_schema(expand(text))
    except RecursionError:
        raise UsageError("the schema's short form nests too deep") from None


def make_schema(document: Any, where: str = "the schema") -> Schema:
    """Make a `Schema` of a JSON Schema: its mask holds the keywords that llguidance can follow.

    Raises:
        UsageError: the document is not a JSON Schema, or no answer can fit it.
    """
    from .check import schema_fault
    from .mask import LAYOUT
    from .relax import relax

    try:
        if reason := schema_fault(document):
            raise UsageError(f"{where} cannot be used: {one_line(reason)}")
        mask, relaxed = relax(json.loads(json.dumps(document, allow_nan=False)), where)
    except (ValueError, OverflowError) as error:  # NaN or infinity as a number
        raise UsageError(f"{where} cannot be used: {one_line(error)}") from None
    except RecursionError:
        raise UsageError(f"{where} nests too deep") from None
    return Schema(document, relaxed, json.dumps({**mask, "x-guidance": LAYOUT}))


def fault(text: str, schema: Schema) -> str | None:
    """Return the reason why an answer does not fit a schema (not JSON, or a wrong value); None if the answer fits."""
    from .check import document_fault

    return document_fault(text, schema.document)
