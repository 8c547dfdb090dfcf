"""JSON Lines that are only appended to: after any append, whatever happens, the file holds whole lines.

A process can be killed, or the disk fill, in the middle of a line. Such a torn last line is never read as a line, and
the next append takes its place.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ..errors import UsageError
from .files import BINARY, NONBLOCK, PRIVATE

LONGEST = 1 << 24  # bytes of a line: an end for /dev/zero


def lines_within(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the lines of a file, each with its newline.

    Raises:
        UsageError: one has no end, or a far one.
    """
    for number, line in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
        if len(line) > LONGEST:
            raise UsageError(f"line {number} of {name} has more than {LONGEST:,} bytes: write shorter ones")
        yield line


class JsonLines:
    """A file of JSON Lines, open to be read and appended to; it is made if it is not there.

    The file is locked while it is open, where the system has such locks (Windows has none).

    Raises:
        BlockingIOError: another process has it open. OSError: it cannot be opened.
    """

    def __init__(self, path: Path, mode: int = 0o666) -> None:
        self.end = 0  # bytes: the end of the whole lines that were read or appended
        self.torn = b""  # the last line, as `read` found it without its newline
        self._newline = b""  # that the next append has to write first
        flags = os.O_RDWR | os.O_CREAT | BINARY | NONBLOCK
        self._file = io.FileIO(path, "r+", opener=lambda name, _: os.open(name, flags, mode))
        try:
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no file", str(path))
            if mode == PRIVATE and os.name != "nt":
                with contextlib.suppress(OSError):  # another user's
                    os.fchmod(self._file.fileno(), mode)
            self._lock()
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # a file system without locks
                raise

    def close(self) -> None:
        """Close the file; again is harmless."""
        with contextlib.suppress(OSError):
            self._file.close()

    def reader(self) -> BinaryIO:
        """Open the file once more, to read from anywhere in it."""
        return os.fdopen(os.dup(self._file.fileno()), "rb")

    def read(self) -> Iterator[tuple[int, bytes]]:
        """Yield the byte offset of each whole line and the line with its newline. A torn one is then in `torn`."""
        with self.reader() as file:
            file.seek(0)
            self.end = 0
            for line in lines_within(file, "the file"):
                if not line.endswith(b"\n"):
                    self.torn = line
                    return
                start, self.end = self.end, self.end + len(line)
                yield start, line

    def keep_torn(self) -> None:
        """Count the torn line as a whole one: all that it lacks is the newline, which the next append writes."""
        self.end, self.torn, self._newline = self.end + len(self.torn), b"", b"\n"

    def cut(self, end: int) -> None:
        """Remove all behind a byte offset.

        Raises:
            OSError: the file cannot be written.
        """
        self._file.truncate(end)
        self.end, self.torn, self._newline = end, b"", b""

    def append(self, *texts: str) -> int:
        """Write lines after the last whole one; they are on the disk when this returns. Return where the first begins.

        Raises:
            OSError: the disk is full, or the file cannot be written: it ends where it did.
        """
        start = self.end + len(self._newline)
        data = self._newline + b"".join(text.encode("utf-8", "replace") + b"\n" for text in texts)
        try:
            self._file.truncate(self.end)  # a torn line
            self._file.seek(self.end)
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self.end)
            raise
        self.end, self.torn, self._newline = self.end + len(data), b"", b""
        return start


def open_named(path: Path, option: str, mode: int = 0o666) -> JsonLines:
    """Open a file that the user may name with an option.

    Raises:
        UsageError: it is a folder or the like, or another process has it open. OSError: it cannot be opened.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UsageError(f"{path} is no file: name another with {option}")
    try:
        return JsonLines(path, mode)
    except BlockingIOError:
        raise UsageError(f"another process is writing {path}: wait for it, or name another with {option}") from None
