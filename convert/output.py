"""The output file: all of it, or nothing under its name."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from metaalign_edge_runtime.errors import CannotWrite, UsageError

try:
    import fcntl
except ImportError:  # Windows, where an open file cannot be replaced anyway
    fcntl = None  # type: ignore[assignment]

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", None))
PART = ".metaalign-part"  # what the temporary files end in
OPEN_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)


def check_output(output: Path, force: bool) -> None:
    """Refuse an output that could not be written, before any work is done. Raises UsageError or CannotWrite."""
    if os.path.isdir(output):
        raise CannotWrite(f"{output}: a folder; name a file in it, such as {output / 'model.gguf'}")
    if not os.path.isdir(output.parent):
        raise CannotWrite(f"{output.parent}: no such folder; make it first")
    if os.path.exists(output) and not os.path.isfile(output):
        raise CannotWrite(f"{output}: not a regular file")
    if os.path.lexists(output) and not force:
        raise UsageError(f"{output}: exists already; use --force to replace it")


def check_space(output: Path, size: int) -> None:
    """Refuse to begin what cannot fit on the disk. Raises CannotWrite."""
    try:
        free = shutil.disk_usage(output.parent).free
    except OSError:  # some network file systems do not say; then the writing itself will
        return
    if free < size:
        raise CannotWrite(f"{output.parent}: {size / 1e6:,.0f} MB are needed, and {free / 1e6:,.0f} MB are free")


class Part(NamedTuple):
    """The output while it is being written."""

    file: BinaryIO
    path: Path


@contextmanager
def atomic(output: Path) -> Iterator[Part]:
    """Open a temporary file beside ``output``; when the block ends well, it takes the name, else it is removed.

    Its name is always the same and it is locked while in use: what a killed process left behind is removed by the
    next one in the folder, and two that write the same output at once do not meet.
    """
    part = output.with_name(f".{output.name}{PART}")
    try:
        file = _open_locked(part, output)
        _remove_left_behind(part)
        try:
            with file:
                yield Part(file, part)
                file.flush()
                os.fsync(file.fileno())
                if fcntl is not None:
                    os.replace(part, output)  # while the lock is held
            if fcntl is None:
                os.replace(part, output)
            _sync_folder(output.parent)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
    except OSError as error:
        reason = "the disk is full" if error.errno in FULL else error.strerror or str(error)
        raise CannotWrite(f"{output}: cannot be written ({reason})") from None


def _open_locked(part: Path, output: Path) -> BinaryIO:
    """Open the temporary file and lock it; only then is it emptied, for it may be somebody else's."""
    while True:
        handle = os.open(part, OPEN_FLAGS, 0o666)
        file = os.fdopen(handle, "r+b")
        if fcntl is None:
            break
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise CannotWrite(f"{output}: another conversion is writing it at this moment") from None
        if part.exists() and os.path.samestat(os.fstat(handle), os.stat(part)):
            break
        file.close()  # between opening and locking, its owner finished and renamed it
    file.truncate(0)
    return file


def _remove_left_behind(ours: Path) -> None:
    """Remove the temporary files of processes that were killed; who lives still has the lock."""
    if fcntl is None:
        return
    for path in ours.parent.glob(f".*{PART}"):
        if path == ours:
            continue
        with suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the new name last through a power cut, where the system can."""
    if fcntl is None:
        return
    with suppress(OSError):  # some file systems cannot, and the file itself is safe
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
