"""The rows of a batch: lines of JSON, each of which asks for an answer."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metaalign_edge import Dialog, Request, Turn
from metaalign_edge_runtime import structured
from metaalign_edge_runtime.errors import EdgeError, UsageError, one_line, unreadable
from metaalign_edge_runtime.stores import files, profiles
from metaalign_edge_runtime.stores.jsonl import lines_within
from metaalign_edge_runtime.structured import Schema

from ..terminal.screen import at_terminal

FIELDS = {"id", "query", "pref", "user_info", "system", "system_info", "turns", "max_tokens", "seed", "json_schema"}


@dataclass(frozen=True)
class Row:
    """A line of the input: the request that it makes, or what is wrong with it."""

    index: int  # from 0, blank lines not counted
    line: int  # from 1
    id: Any  # the user's own
    request: Request | None  # its tag is the row's index
    digest: str  # of the fields that decide the answer
    error: str | None


@contextlib.contextmanager
def open_rows(source: str) -> Iterator[tuple[Iterable[bytes], str]]:
    """Open a JSONL file, or stdin for `-`; yield its lines and its name in messages.

    Raises:
        NotFound: the file does not exist or cannot be read. UsageError: stdin is a terminal.
    """
    if source == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("stdin is a terminal: pipe rows in, or name a file")
        yield lines_within(sys.stdin.buffer, "stdin"), "stdin"
        return
    try:
        with Path(os.path.expanduser(source)).open("rb") as file:
            yield lines_within(file, source), source
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise unreadable("the rows", source, error) from None


def count_rows(source: str) -> int | None:
    """Count the rows of a JSONL file for a terminal that shows progress; None if they can be read once only."""
    path = Path(source).expanduser()
    if source == "-" or not path.is_file() or not at_terminal(sys.stderr):
        return None
    with path.open("rb") as file:
        return sum(not line.isspace() for line in file)


def read_rows(lines: Iterable[bytes], defaults: Dialog, seed: int, unknown: set[str]) -> Iterator[Row]:
    """Yield the rows of a JSONL file; a row that is not valid has its `error` set.

    Args:
        defaults: System Info and User Info of the rows that have none of their own.
        seed: the seed of rows that give none.
        unknown: receives the names of unknown fields.
    """
    index = 0
    for line, data in enumerate(lines, 1):
        if not data.strip():
            continue
        found: Any = None
        request, error = None, None
        try:
            found = json.loads(data)
            request = read_row(found, defaults, seed, index)
            unknown |= found.keys() - FIELDS
        except UnicodeDecodeError as wrong:
            error = f"it is not UTF-8 (byte {wrong.start})"
        except json.JSONDecodeError as wrong:
            error = f"it is no JSON ({wrong.msg}, column {wrong.colno})"
        except (EdgeError, ValueError, RecursionError) as wrong:  # ValueError: a number of thousands of digits
            error = one_line(wrong)
        known = found if isinstance(found, dict) else {}
        own = [known.get(key) for key in ("seed", "json_schema") if key == "seed" or key in known]
        digest = files.digest([asdict(request.dialog), request.max_tokens, *own]) if request else ""
        yield Row(index, line, known.get("id"), request, digest, error)
        index += 1


def read_row(found: Any, defaults: Dialog, seed: int, index: int) -> Request:
    """Make a request of a row.

    Raises:
        UsageError: a field is missing or of another type. NotFound: there is no such profile.
    """
    if not isinstance(found, dict):
        raise UsageError(f"it is a {type(found).__name__}, not an object with a `query`")
    query = text_field(found, "query")
    if not query or not query.strip():
        raise UsageError("`query` is missing or empty")
    if found.get("system") is not None and found.get("system_info") is not None:
        raise UsageError("`system` and `system_info` are the same tier: give one")
    system_info = text_field(found, "system_info" if found.get("system") is None else "system")
    user_info = user_info_field(found)
    dialog = Dialog(
        defaults.system_info if system_info is None else system_info,
        defaults.user_info if user_info is None else user_info,
        (*turns_field(found), Turn(query)),
    )
    own_seed = number_field(found, "seed", 0, 2**32 - 1)
    return Request(
        dialog,
        seed if own_seed is None else own_seed,
        index,
        number_field(found, "max_tokens", 1, 2**31 - 1),
        schema=schema_field(found),
    )


def text_field(row: Mapping[str, Any], key: str) -> str | None:
    """Return a text; None if the field is missing.

    Raises:
        UsageError: it is of another type.
    """
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise UsageError(f"`{key}` is a {type(value).__name__}, not a text")
    return value


def number_field(row: Mapping[str, Any], key: str, least: int, most: int) -> int | None:
    """Return a whole number; None if the field is missing.

    Raises:
        UsageError: it is of another type, or out of range.
    """
    value = row.get(key)
    if value is not None and not (type(value) is int and least <= value <= most):
        raise UsageError(f"`{key}` is not a number from {least} to {most}")
    return value


def user_info_field(row: Mapping[str, Any]) -> str | None:
    """Return User Info as `user_info` has it, or as the profiles and texts of `pref` say; None if both are missing.

    Raises:
        UsageError: both are there, or one is of another type. NotFound: there is no such profile.
    """
    given = row.get("pref")
    if given is not None and row.get("user_info") is not None:
        raise UsageError("`pref` and `user_info` are the same tier: give one")
    preferences = given if isinstance(given, list) else [given]
    if all(preference is None for preference in preferences):
        return text_field(row, "user_info")
    texts = [text_field({"pref": preference}, "pref") or "" for preference in preferences]
    return "\n".join(map(profiles.expand_profile, texts))


def turns_field(row: Mapping[str, Any]) -> list[Turn]:
    """Return the turns before the query.

    Raises:
        UsageError: `turns` is not a list of objects, or a turn lacks its query or response.
    """
    turns = row.get("turns") or []
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UsageError("`turns` is not a list of {query, response}")
    past = []
    for turn in turns:
        query, response = text_field(turn, "query"), text_field(turn, "response")
        if query is None or response is None:
            raise UsageError("a turn lacks its `query` or its `response`")
        past.append(Turn(query, response))
    return past


def schema_field(row: Mapping[str, Any]) -> Schema | None:
    """Return the schema that the answer has to fit; None if the field is missing.

    Raises:
        UsageError: it is none.
    """
    found = row.get("json_schema")
    if not isinstance(found, dict | str | None):
        raise UsageError(f"`json_schema` is a {type(found).__name__}, not a schema or its short form")
    return None if found is None else parse_schema(json.dumps(found) if isinstance(found, dict) else found)


@functools.lru_cache(64)  # many rows of a batch share one schema
def parse_schema(text: str) -> Schema:
    """Read a schema that is JSON or in short form. It names no file: a row is data.

    Raises:
        UsageError: it is none.
    """
    return structured.parse_schema(text) if text.lstrip().startswith("{") else structured.expand_schema(text)
