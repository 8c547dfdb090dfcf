"""The output file: checked beforehand, and written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metaalign_edge_runtime.errors import CannotWrite, UsageError
from metaalign_edge_runtime.stores import files

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", None))  # errors of a full disk and of a full quota


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
    """Refuse a file of `size` bytes that the disk has no room for. Raises CannotWrite."""
    try:
        free = shutil.disk_usage(output.parent).free
    except OSError:  # some network file systems do not tell; the writing will fail then
        return
    if free < size:
        raise CannotWrite(f"{output.parent}: {size / 1e6:,.0f} MB are needed, and {free / 1e6:,.0f} MB are free")


@contextmanager
def whole_file(output: Path) -> Iterator[Path]:
    """Yield the temporary file in which `output` is written; it takes the name when the block ends well.

    Raises CannotWrite, also while another conversion writes the same output.
    """
    try:
        with files.replacing(output, alone=True, durable=True) as part:
            yield part
    except BlockingIOError:
        raise CannotWrite(f"{output}: another conversion is writing it at this moment") from None
    except OSError as error:
        reason = "the disk is full" if error.errno in FULL else error.strerror or str(error)
        raise CannotWrite(f"{output}: cannot be written ({reason})") from None
