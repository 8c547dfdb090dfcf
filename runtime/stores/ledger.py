"""What a batch has finished: rows of JSON Lines on the disk, whatever happens next."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CannotWrite, UsageError
from ..llama.library import Closing
from . import files
from .jsonl import open_named


class Ledger(Closing):
    """What a batch has finished: rows appended to a file as they end, and put in order when all are there.

    Raises:
        UsageError: the file holds something else, or another process writes it. CannotWrite: it cannot be written.
    """

    def __init__(self, path: Path, run: str, force: bool) -> None:
        """Open the file, and read what an earlier call of the same run left. run: what that is told from others by."""
        self.path, self.run = path, run
        self._places: dict[int, tuple[int, str]] = {}  # row index: its byte offset, the digest of its question
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
            try:
                row = json.loads(line)
                index, run, asked = row["index"], row["run"], row["asked"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UsageError(f"{self.path} holds something else than a batch's rows: --force replaces it") from None
            if run != self.run:
                raise UsageError(
                    f"{self.path} holds the rows of another run (its model or options differ): --force replaces it"
                )
            if row["error"] is None:
                self._places[index] = (start, asked)

    def has(self, index: int, asked: str) -> bool:
        """Tell whether a row has been answered, and what was asked is the same."""
        return self._places.get(index, (0, ""))[1] == asked

    def add(self, row: Mapping[str, Any], asked: str) -> None:
        """Write down a finished row; it is on the disk when this returns.

        Raises:
            CannotWrite: the disk is full.
        """
        document = {**row, "run": self.run, "asked": asked}
        try:
            start = self._file.append(json.dumps(document, ensure_ascii=False))
        except OSError as error:
            again = "the same command goes on from here"
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}; {again}") from None
        self._places[row["index"]] = (start, asked)

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
                if os.name == "nt":  # where what is open cannot be replaced
                    self._file.close()
        except OSError as error:
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}") from None
