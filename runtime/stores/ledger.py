"""What a batch has finished: rows of JSON Lines on the disk, whatever happens next."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CannotWrite, UsageError
from ..llama.library import Closing
from . import files
from .files import BINARY


class Ledger(Closing):
    """What a batch has finished: rows appended to a file as they end, and put in order when all are there.

    Raises:
        UsageError: the file holds something else, or another process writes it. CannotWrite: it cannot be written.
    """

    def __init__(self, path: Path, run: str, force: bool) -> None:
        """Open the file, and read what an earlier call of the same run left. run: what that is told from others by."""
        self.path, self.run = path, run
        self._places: dict[int, tuple[int, str]] = {}  # of a row, where it begins, and the digest of what was asked
        try:
            if path.exists() and not path.is_file():
                raise UsageError(f"{path} is no file: name another with -o")
            self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 0o666), "r+b")
        except OSError as error:
            raise CannotWrite(f"cannot write {path}: {error.strerror}") from None
        try:
            self._lock()
            if force:
                self._file.truncate(0)
            self._read()
        except BaseException:
            self._file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):
            self._file.close()

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"another process is writing {self.path}: wait for it, or name another with -o") from None

    def _read(self) -> None:
        at = 0
        for line in self._file:
            if not line.endswith(b"\n"):  # killed in the middle of it
                break
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
                self._places[index] = (at, asked)
            at += len(line)
        self._file.seek(at)
        self._file.truncate()

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
            at = self._file.tell()
            self._file.write(json.dumps(document, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            again = "the same command goes on from here"
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}; {again}") from None
        self._places[row["index"]] = (at, asked)

    def finish(self, count: int) -> None:
        """Put the first `count` rows in order, in a new file that takes the place of this one.

        Raises:
            CannotWrite: the disk is full; the rows stay as they are.
        """
        try:
            with files.replacing(self.path) as part:
                with part.open("wb") as ordered:
                    for index in range(count):
                        self._file.seek(self._places[index][0])
                        ordered.write(self._file.readline())
                    ordered.flush()
                    os.fsync(ordered.fileno())
                shutil.copymode(self.path, part)
                if os.name == "nt":  # where what is open cannot be replaced
                    self._file.close()
        except OSError as error:
            raise CannotWrite(f"cannot write {self.path}: {error.strerror}") from None
