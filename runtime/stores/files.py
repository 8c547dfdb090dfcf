"""Files and folders: where things lie, reading what users write, and writing whole files or none."""

from __future__ import annotations

import contextlib
import errno
import glob
import importlib.util
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..errors import CannotWrite, NotFound, UsageError

BINARY = getattr(os, "O_BINARY", 0)  # without it, Windows writes two bytes for a newline


def digest(document: Any) -> str:
    """Return 32 hexadecimal digits that stand for a JSON document."""
    import hashlib  # four milliseconds

    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]


def part_folder(name: str) -> Path:
    """Return the folder that is `name` in a checkout and the package `metaalign_edge_name` where it is installed."""
    spec = importlib.util.find_spec(f"metaalign_edge_{name}")
    assert spec and spec.origin
    return Path(spec.origin).parent


def system_folder(kind: Literal["cache", "config", "data"]) -> Path:
    """Return where this system keeps a program's files of a kind; a user without a home has none that exists."""
    from platformdirs import PlatformDirs

    folder = Path(getattr(PlatformDirs("metaalign-edge", appauthor=False), f"user_{kind}_dir"))
    return folder if folder.is_absolute() else Path(os.devnull) / "metaalign-edge"


def cache_folder() -> Path:
    """Return the folder for what can be made again: METAALIGN_EDGE_CACHE, else the system's."""
    return Path(os.environ.get("METAALIGN_EDGE_CACHE") or system_folder("cache"))


def config_folder() -> Path:
    """Return the folder for what the user decides: METAALIGN_EDGE_CONFIG, else the system's."""
    return Path(os.environ.get("METAALIGN_EDGE_CONFIG") or system_folder("config"))


def data_folder() -> Path:
    """Return the folder for what was said: METAALIGN_EDGE_DATA, else the system's."""
    return Path(os.environ.get("METAALIGN_EDGE_DATA") or system_folder("data"))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that other processes of this program wait for; it is named after a file, and lies beside it.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a+b") as file:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]  # released with the file
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def replacing(path: Path, keep: bool = True) -> Iterator[Path]:
    """Yield the path to write to; what is written gets its own name at the end, or is removed if it fails.

    A pipe, a terminal or `/dev/null` is written as it is: it must not be replaced by a file.

    Raises:
        OSError: it is a folder, or cannot be given its name.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file():
        yield path
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    sweep(path.parent, f".{glob.escape(path.name)}.*")
    try:
        yield temporary
        if keep:
            os.replace(temporary, path)
    except OSError as error:
        if error.filename == str(temporary):  # say the name that the user knows
            error.filename = str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sweep(folder: Path, pattern: str) -> None:
    """Remove what killed processes left of their writing; an hour old, it is nobody's any more."""
    for left in folder.glob(pattern):
        with contextlib.suppress(OSError):
            if left.suffix[1:].isdecimal() and left.lstat().st_mtime < time.time() - 3600:
                left.unlink()


def room_at(folder: Path) -> tuple[Path, int]:
    """Return a folder, or the nearest one above it that exists, and how many bytes are free there."""
    there = next((one for one in (folder, *folder.parents) if one.exists()), Path(os.sep))
    return there, shutil.disk_usage(there).free


def from_bytes(data: bytes) -> str:
    """Decode a text that may come from Windows: with a byte order mark, and two characters at the end of a line.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def check_utf8(text: str, what: str) -> None:
    """Refuse a text that cannot be written as UTF-8.

    Raises:
        UsageError: it holds a lone surrogate, which stands for a byte that was no UTF-8.
    """
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UsageError(f"{what} holds bytes that are not UTF-8 (a lone surrogate): re-encode the text")


def read_text(path: Path, what: str) -> str:
    """Read a user's text file.

    Raises:
        NotFound: it is not there or not readable. UsageError: it is not UTF-8.
    """
    try:
        return from_bytes(path.read_bytes())
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path} is not UTF-8 text (byte {error.start}): re-encode it") from None
    except OSError as error:
        raise NotFound(f"cannot read {what} {path}: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all, where a link at its place leads, and with the rights it had.

    Raises:
        OSError: it cannot be written.
    """
    path = path.resolve()
    with replacing(path) as part:
        part.write_bytes(text.encode())
        if path.exists():
            shutil.copymode(path, part)


def write_whole(path: Path, data: bytes | None) -> None:
    """Write a file that is there whole or not at all; None only tries.

    Raises:
        CannotWrite: it cannot be written.
    """
    try:
        with replacing(path, keep=data is not None) as part:
            if data is not None or part != path:  # a pipe would wait for its reader
                part.write_bytes(data or b"")
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}") from None


def file_name(name: str, what: str) -> str:
    """Return a name that the user gives to something which is kept in a file.

    Raises:
        UsageError: a file could not have that name on every system.
    """
    if not re.fullmatch(r"\w[\w.-]{,49}", name):
        rule = "letters, digits, _ . and -, 50 at most, neither a dot nor a dash first"
        raise UsageError(f"{name!r} cannot name a {what}: {rule}")
    if re.fullmatch(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name, re.IGNORECASE):
        raise UsageError(f"{name!r} cannot name a {what}: Windows keeps that name for a device; choose another")
    return name


def looks_like_path(name: str, suffix: str) -> bool:
    """Tell whether a name is meant as a path."""
    return "/" in name or os.sep in name or name.startswith((".", "~")) or name.endswith(suffix) or os.path.isfile(name)


@contextlib.contextmanager
def changing(path: Path) -> Iterator[None]:
    """Hold what the user decides in a file or a folder against other processes, to change it.

    Raises:
        CannotWrite: it cannot be changed.
    """
    try:
        with locked(path):
            yield
    except OSError as error:
        reason = f"{error.strerror} (METAALIGN_EDGE_CONFIG names another folder)"
        raise CannotWrite(f"cannot write {error.filename or path}: {reason}") from None
