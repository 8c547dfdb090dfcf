"""Structured answers: a JSON schema or its short form, and the final check of an answer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from .errors import UsageError, one_line


@dataclass(frozen=True)
class Schema:
    """What an answer has to fit."""

    document: dict[str, Any]  # JSON Schema
    grammar: str  # the same for llama.cpp
    left: tuple[str, ...]  # what the grammar cannot say, and only the check of the answer sees


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
    """Read the short form of a schema.

    Raises:
        UsageError: it is none.
    """
    import metaalign_edge_schema as schemas

    try:
        document = schemas.expand(text)
    except schemas.InvalidSchema as error:
        raise UsageError(f"the schema's short form: {one_line(error)}") from None
    return make_schema(document)


def fault(text: str, schema: Schema) -> str | None:
    """Say why a text is no answer to a schema; None if it fits."""
    import metaalign_edge_schema as schemas

    return schemas.fault(text, schema.document)


def make_schema(document: Any, where: str = "the schema") -> Schema:
    """Turn a JSON Schema into a grammar.

    Raises:
        UsageError: it is none, or no answer can fit it.
    """
    import metaalign_edge_schema as schemas

    try:
        schemas.check_schema(document)
        grammar = schemas.convert(document)
    except (ValueError, OverflowError, RecursionError) as error:  # an InvalidSchema, or NaN for a number
        raise UsageError(f"{where} cannot be used: {one_line(error)}") from None
    return Schema(document, grammar.text, tuple(grammar.left))
