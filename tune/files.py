"""Write files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path to write to; what is written gets its own name at the end, or is removed if it fails.

    A pipe, a terminal or `/dev/null` is written as it is: it must not be replaced by a file.
    """
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(path.name + ".part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
