"""The answers of one run of `eval`: JSON Lines in a file from which the same command goes on.

The first line says which run it is; every other line is the answer to one turn of one case.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from metaalign_edge_runtime.errors import CannotWrite, UsageError, one_line, shortened
from metaalign_edge_runtime.stores import files
from metaalign_edge_runtime.stores.jsonl import JsonLines, open_named

from .suite import Case

__all__ = ["Answers"]

Record = dict[str, Any]  # an answer {response, finish_reason, truncated}, or why there is none {error}


FIELDS: dict[str, tuple[type, str]] = {  # of an answer's line, those that are read, and what they are
    "case": (int, "a whole number"),
    "turn": (int, "a whole number"),
    "seconds": (float, "a number"),
    "truncated": (int, "a whole number"),
    "response": (str, "a text"),
    "error": (str, "a text"),
    "finish_reason": (str, "a text"),
}


def answer_line(line: bytes) -> Record:
    """Read a line of the file that is not its first.

    Raises:
        UsageError: it is none; says which field is wrong. ValueError, RecursionError: it is no JSON.
    """
    record = json.loads(line)
    if not isinstance(record, dict):
        raise UsageError("a JSON object belongs there")
    needed = ("case", "turn", "seconds", "error" if "error" in record else "response")
    for name, (kind, what) in FIELDS.items():
        value = record.get(name)
        if value is None and name not in needed:
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
        if not (number if kind is float else isinstance(value, kind) and (kind is str or number)):
            raise UsageError(f"field {name!r} is {shortened(json.dumps(value), 40)}, not {what}")
    return record


class Answers:
    """The answers of one run, in memory and in a file.

    Where the user did not name the file, one that cannot be written costs no more than that nothing is kept.

    Raises:
        UsageError: the file holds something else. CannotWrite: the user named it, and it cannot be written.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], named: bool) -> None:
        """Open the file and read the answers of earlier calls. run: the settings by which runs are told apart."""
        self.path, self.named = path, named
        self.records: dict[int, list[Record]] = {}  # by the number of the case, one for each turn
        self.seconds = self._before = 0.0  # of all calls; of the earlier ones
        self._started = 0.0
        self.lost: str | None = None  # why nothing is kept
        self._file: JsonLines | None = None
        try:
            if not named:
                files.make_private(path.parent)
            self._file = open_named(path, "--answers", files.PRIVATE)
            self._read(self._file, run)
        except OSError as error:
            self._lose(error)
        except UsageError:
            self.close()
            raise

    def _read(self, file: JsonLines, run: Mapping[str, Any]) -> None:
        """Read the answers of earlier calls; a last line that is not whole does not count."""
        head = json.dumps({"metaalign_edge": "eval", **run})
        lines = file.read()
        first = next((line for _, line in lines), b"") or file.torn
        if not file.end and head.encode().startswith(first):  # killed while it wrote its first line
            file.append(head)
            return
        if first != head.encode() + b"\n":
            raise UsageError(f"{self.path} holds {_other(first, run)}: name another file with --answers")
        number = 1
        for start, line in lines:
            number += 1
            try:
                record = answer_line(line)
            except (UsageError, ValueError, RecursionError) as error:
                if not isinstance(error, UsageError) and not (next(lines, None) or file.torn):
                    file.cut(start)  # the process was killed while it wrote its last line
                    return
                advice = "mend or remove that line, or name another file with --answers"
                raise UsageError(f"{self.path}, line {number}, is damaged: {one_line(error)}: {advice}") from None
            turns = self.records.setdefault(record["case"], [])
            if record["turn"] == len(turns):
                turns.append(record)
                self.seconds = self._before = record["seconds"]

    def add(self, number: int, turn: int, name: str, answer: Record) -> None:
        """Write down the answer to a turn of a case (its number and its name), or why there is none.

        Raises:
            CannotWrite: the user named the file, and the disk is full.
        """
        self.seconds = round(self._before + time.monotonic() - self._started, 3)
        record = {"case": number, "turn": turn, "id": name, **answer, "seconds": self.seconds}
        self.records.setdefault(number, []).append(record)
        try:
            if self._file:
                self._file.append(json.dumps(record))
        except OSError as error:
            self._lose(error)

    def start(self) -> None:
        """Begin to count the seconds of this call."""
        self._started = time.monotonic()

    def _lose(self, error: OSError) -> None:
        self.close()
        if self.named:
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}") from None
        self.lost = error.strerror or str(error)

    def close(self) -> None:
        """Close the file; again is harmless."""
        if self._file:
            self._file.close()
        self._file = None

    @property
    def where(self) -> str:
        """Say where the answers are kept."""
        return f"nothing is kept: {self.lost}" if self.lost else f"kept in {self.path}"

    def failed(self, number: int) -> str | None:
        """Return why a case could not be answered; None if it was, or has yet to be asked."""
        return next((record["error"] for record in self.records.get(number, []) if "error" in record), None)

    def responses(self, number: int) -> list[str]:
        """Return the responses to a case's questions so far."""
        return [record["response"] for record in self.records.get(number, []) if "response" in record]

    def unanswered(self, cases: Sequence[Case]) -> list[int]:
        """Return the numbers of the cases that have a question without an answer, and did not fail."""
        return [
            number
            for number, case in enumerate(cases)
            if self.failed(number) is None and len(self.responses(number)) < len(case.queries)
        ]

    def count(self, cases: Sequence[Case]) -> int:
        """Return how many questions are settled; a case that failed is settled as a whole."""
        return sum(
            len(case.queries) if self.failed(number) else len(self.responses(number))
            for number, case in enumerate(cases)
        )


def _other(line: bytes, run: Mapping[str, Any]) -> str:
    """Say in which way the first line of a file is not that of this run."""
    try:
        found = json.loads(line)
        if found.pop("metaalign_edge") == "eval":
            return f"the answers of another run (other {', '.join(key for key in run if found.get(key) != run[key])})"
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        pass
    return "something else than the answers of a run"
