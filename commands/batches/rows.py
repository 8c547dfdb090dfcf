"""The rows of a batch: lines of JSON, each of which asks for an answer."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metaalign_edge import Dialog, Request, Turn
from metaalign_edge_runtime import structured
from metaalign_edge_runtime.errors import EdgeError, NotFound, UsageError, one_line
from metaalign_edge_runtime.stores import files, profiles
from metaalign_edge_runtime.structured import Schema

ROW = {"id", "query", "pref", "user_info", "system_info", "turns", "max_tokens", "seed", "json_schema"}


class BadRow(ValueError):
    """A line is no row; the text says why."""


@dataclass(frozen=True)
class Row:
    """A line of the input."""

    index: int  # from 0, without blank lines
    line: int  # from 1
    id: Any
    job: Request | None  # its tag is the row's index
    asked: str  # a digest of what it asks for
    error: str | None


def read_rows(lines: Iterable[bytes], standing: Dialog, seed: int, unknown: set[str]) -> Iterator[Row]:
    """Yield the rows of a JSONL file, the bad ones with what is wrong.

    Args:
        standing: its tiers are those of rows that have none of their own.
        unknown: is filled with the names of fields that mean nothing.
    """
    index = 0
    for line, data in enumerate(lines, 1):
        if not data.strip():
            continue
        found: Any = None
        try:
            found = json.loads(data)
            job, error = read_row(found, standing, seed, index), None
            unknown |= found.keys() - ROW
        except UnicodeDecodeError as wrong:
            job, error = None, f"it is not UTF-8 (byte {wrong.start})"
        except json.JSONDecodeError as wrong:
            job, error = None, f"it is no JSON ({wrong.msg}, column {wrong.colno})"
        except (ValueError, EdgeError, RecursionError) as wrong:  # a BadRow, or a number of thousands of digits
            job, error = None, one_line(wrong)
        known = found if isinstance(found, dict) else {}
        own = [known.get(key) for key in ("seed", "json_schema") if key == "seed" or key in known]
        asked = files.digest([asdict(job.dialog), job.max_tokens, *own]) if job else ""
        yield Row(index, line, known.get("id"), job, asked, error)
        index += 1


def read_row(found: Any, standing: Dialog, seed: int, index: int) -> Request:
    """Make a job of a row.

    Raises:
        BadRow: a field is missing or of another type. EdgeError: there is no such profile, or no such text.
    """
    if not isinstance(found, dict):
        raise BadRow(f"it is a {type(found).__name__}, not an object with a `query`")

    def text(holder: Any, key: str) -> str | None:
        value = holder.get(key) if isinstance(holder, dict) else holder
        if value is not None and not isinstance(value, str):
            raise BadRow(f"`{key}` is a {type(value).__name__}, not a text")
        return value

    def number(key: str, least: int, most: int) -> int | None:
        value = found.get(key)
        if value is not None and not (type(value) is int and least <= value <= most):
            raise BadRow(f"`{key}` is not a number from {least} to {most}")
        return value

    query, turns = text(found, "query"), found.get("turns") or []
    if not query or not query.strip():
        raise BadRow("`query` is missing or empty")
    if found.get("pref") is not None and found.get("user_info") is not None:
        raise BadRow("`pref` and `user_info` are the same tier: give one")
    wishes = found["pref"] if isinstance(found.get("pref"), list) else [found.get("pref")]
    user_info = text(found, "user_info")
    if any(wish is not None for wish in wishes):
        user_info = "\n".join(profiles.expand_profile(text(wish, "pref") or "") for wish in wishes)
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("`turns` is not a list of {query, response}")
    past = [(text(turn, "query"), text(turn, "response")) for turn in turns]
    if not all(query is not None and response is not None for query, response in past):
        raise BadRow("a turn lacks its `query` or its `response`")
    system_info = text(found, "system_info")
    dialog = Dialog(
        standing.system_info if system_info is None else system_info,
        standing.user_info if user_info is None else user_info,
        (*(Turn(query or "", response) for query, response in past), Turn(query)),
    )
    row_seed, shape = number("seed", 0, 2**32 - 1), found.get("json_schema")
    if not isinstance(shape, dict | str | None):
        raise BadRow(f"`json_schema` is a {type(shape).__name__}, not a schema or its short form")
    return Request(
        dialog,
        seed if row_seed is None else row_seed,
        index,
        number("max_tokens", 1, 2**31 - 1),
        schema=None if shape is None else row_schema(json.dumps(shape) if isinstance(shape, dict) else shape),
    )


@functools.lru_cache(64)  # rows are often alike
def row_schema(text: str) -> Schema:
    """Read a row's schema. A row is data: it names no file.

    Raises:
        UsageError: it is none.
    """
    return structured.parse_schema(text) if text.lstrip().startswith("{") else structured.expand_schema(text)


@contextlib.contextmanager
def open_rows(source: str) -> Iterator[tuple[Iterable[bytes], str]]:
    """Open a JSONL file, or stdin; yield its lines and what to call it.

    Raises:
        NotFound: it is not there or not readable. UsageError: stdin is a terminal.
    """
    if source == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("stdin is a terminal: pipe rows in, or name a file")
        yield sys.stdin.buffer, "stdin"
        return
    try:
        with Path(source).expanduser().open("rb") as file:
            yield file, source
    except OSError as error:
        raise NotFound(f"cannot read {source}: {error.strerror}") from None
