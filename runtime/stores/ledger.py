"""The finished rows of a batch: JSON Lines, on the disk as soon as they are added."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CannotWrite, UsageError
from ..llama.library import Closing
from . import files
from .jsonl import open_named


@dataclass(frozen=True)
class FinishedRow:
    """What the file says of a row; the rest of the line is the user's."""

    index: int
    run: str
    asked: str  # a digest
    failed: bool


def finished_row(line: bytes) -> FinishedRow | None:
    """Read a line of the file; None if it is another's, or was changed."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    kinds = {"index": int, "run": str, "asked": str, "error": str | None}
    if not isinstance(row, dict) or any(not isinstance(row.get(name, ...), kind) for name, kind in kinds.items()):
        return None
    return FinishedRow(row["index"], row["run"], row["asked"], row["error"] is not None)


class Ledger(Closing):
    """The finished rows of a batch: appended to a file as they end, and put in order when all are there.

    Raises:
        UsageError: the file holds something else, or another process writes it. CannotWrite: it cannot be written.
    """

    def __init__(self, path: Path, run: str, force: bool) -> None:
        """Open the file and read the rows of earlier calls.

        Args:
            run: a digest of the model and options: rows of another run are refused.
            force: remove what the file holds.
        """
        self.path, self.run = path, run
        self._places: dict[int, tuple[int, str]] = {}  # row index: byte offset, digest of what the row asks for
        try:
            self._file = open_named(path, "-o")
        except OSError as error:
            raise CannotWrite(f"cannot write {path}: {error.strerror}") from None
        try:
            if force:
                self._file.cut(0)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self) -> None:
        for start, line in self._file.read():
            row = finished_row(line)
            if row is None:
                raise UsageError(f"{self.path} holds something else than a batch's rows: --force replaces it")
            if row.run != self.run:
                raise UsageError(
                    f"{self.path} holds the rows of another run (its model or options differ): --force replaces it"
                )
            if not row.failed:
                self._places[row.index] = (start, row.asked)

    def has(self, index: int, digest: str) -> bool:
        """Tell whether a row has been answered that asked for the same."""
        return self._places.get(index, (0, ""))[1] == digest

    def add(self, row: Mapping[str, Any], digest: str) -> None:
        """Write down a finished row; it is on the disk when this returns.

        Raises:
            CannotWrite: the disk is full.
        """
        document = {**row, "run": self.run, "asked": digest}
        try:
            start = self._file.append(json.dumps(document, ensure_ascii=False))
        except OSError as error:
            again = "the same command goes on from here"
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}; {again}") from None
        self._places[row["index"]] = (start, digest)

    def finish(self, count: int) -> None:
        """Put the first `count` rows in order, in a new file that takes the place of this one.

        Raises:
            CannotWrite: the disk is full; the rows stay as they are.
        """
        try:
            with files.replacing(self.path) as part:
                with part.open("wb") as ordered, self._file.reader() as rows:
                    for index in range(count):
                        rows.seek(self._places[index][0])
                        ordered.write(rows.readline())
                    ordered.flush()
                    os.fsync(ordered.fileno())
                shutil.copymode(self.path, part)
                if os.name == "nt":  # Windows cannot replace an open file
                    self._file.close()
        except OSError as error:
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}") from None
