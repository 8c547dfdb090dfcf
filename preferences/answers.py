"""The answers of one run of `eval`, a line each in a file that the same command goes on from."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from io import BufferedRandom
from pathlib import Path
from typing import Any

from .suite import Case

__all__ = ["ForeignFile", "Transcript"]

Record = dict[str, Any]  # an answer, {response, finish_reason, truncated}, or why there is none, {error}


class ForeignFile(ValueError):
    """The file holds something else than the answers of this run; the text says what, and what to do."""


class Transcript:
    """The answers of one run, in memory and in its file. Without the file, if nobody asked for it, it still counts.

    Raises:
        ForeignFile: the file holds something else. OSError: the user named it, and it cannot be written.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], named: bool) -> None:
        """Open the file, and read what an earlier session left. run: what this run is told from others by."""
        self.path, self.named = path, named
        self.answers: dict[int, list[Record]] = {}  # by the number of the case, a turn after the other
        self.seconds = self._before = 0.0  # of all sessions
        self._started = 0.0
        self.lost: str | None = None  # why nothing is kept
        self._file: BufferedRandom | None = None
        try:
            if not named:
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.exists() and not path.is_file():
                raise ForeignFile(f"{path} is no file: name another with --answers")
            opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            self._file = os.fdopen(opened, "r+b")
            self._read(self._file, run)
        except OSError as error:
            self._lose(error)

    def _read(self, file: BufferedRandom, run: Mapping[str, Any]) -> None:
        """Read what an earlier session left, less a last line that it did not finish."""
        head = json.dumps({"metaalign_edge": "eval", **run}).encode() + b"\n"
        first = file.readline()
        if first != head and not (head.startswith(first) and not first.endswith(b"\n")):
            raise ForeignFile(f"{self.path} holds {_other(first, run)}: name another file with --answers")
        whole = len(first) if first == head else 0
        for line in file:
            try:
                record = json.loads(line)
                turns = self.answers.setdefault(record["case"], [])
                if line.endswith(b"\n") and record["turn"] == len(turns):
                    turns.append(record)
                    self.seconds = self._before = record["seconds"]
            except (ValueError, KeyError, TypeError):
                break
            whole += len(line) if line.endswith(b"\n") else 0
        if file.read(1):
            raise ForeignFile(f"{self.path} is damaged after byte {whole:,}: remove it, or name another with --answers")
        file.truncate(whole)
        if not whole:
            file.write(head)
            file.flush()

    def add(self, number: int, turn: int, name: str, answer: Record) -> None:
        """Write down the answer to a turn of a case, its number and its name, or why there is none.

        Raises:
            OSError: the file was named by the user, and is full.
        """
        self.seconds = round(self._before + time.monotonic() - self._started, 3)
        record = {"case": number, "turn": turn, "id": name, **answer, "seconds": self.seconds}
        self.answers.setdefault(number, []).append(record)
        try:
            if self._file:
                self._file.write(json.dumps(record).encode() + b"\n")
                self._file.flush()
        except OSError as error:
            self._lose(error)

    def start(self) -> None:
        """Begin to count the seconds of this session."""
        self._started = time.monotonic()

    def _lose(self, error: OSError) -> None:
        if self.named:
            raise error
        self.close()
        self.lost = error.strerror or str(error)

    def close(self) -> None:
        """Close the file; again is harmless."""
        file, self._file = self._file, None
        if file:
            with contextlib.suppress(OSError):
                file.close()

    @property
    def where(self) -> str:
        """Say where the answers are kept."""
        return f"nothing is kept: {self.lost}" if self.lost else f"kept in {self.path}"

    def failed(self, number: int) -> str | None:
        """Return why a case has no answer, once that is known."""
        return next((answer["error"] for answer in self.answers.get(number, []) if "error" in answer), None)

    def said(self, number: int) -> list[str]:
        """Return the responses to a case's questions so far."""
        return [answer["response"] for answer in self.answers.get(number, []) if "response" in answer]

    def left(self, asked: Sequence[Case]) -> list[int]:
        """Return the numbers of the cases that have a question without an answer, and no failure."""
        return [
            number
            for number, case in enumerate(asked)
            if self.failed(number) is None and len(self.said(number)) < len(case.queries)
        ]

    def count(self, asked: Sequence[Case]) -> int:
        """Return how many questions are settled; a case that failed is settled as a whole."""
        return sum(
            len(case.queries) if self.failed(number) else len(self.said(number)) for number, case in enumerate(asked)
        )


def _other(line: bytes, run: Mapping[str, Any]) -> str:
    """Say in which way the first line of a file is not that of this run."""
    try:
        found = json.loads(line)
        if found.pop("metaalign_edge") == "eval":
            return f"the answers of another run (other {', '.join(key for key in run if found.get(key) != run[key])})"
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    return "something else than the answers of a run"
