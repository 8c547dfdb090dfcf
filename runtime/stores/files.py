"""Files and folders: where things lie, reading what users write, and writing whole files or none."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from ..errors import CannotWrite, UsageError, unreadable

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PART = ".metaalign-part"  # the suffix of temporary files
PRIVATE = 0o600  # the mode of files of this program's own; what the user names as an output has the usual one, by umask
LIMIT = 1 << 23  # bytes of a text that is read: more than any context holds, and an end for /dev/zero
NONBLOCK = getattr(os, "O_NONBLOCK", 0)
NOFOLLOW = getattr(os, "O_NOFOLLOW", 0)
BINARY = getattr(os, "O_BINARY", 0)  # without it, Windows writes two bytes for a line break


def digest(document: Any) -> str:
    """Return a digest of a JSON document: 32 hexadecimal digits of its SHA-256."""
    import hashlib  # not at the top: it takes 4 ms

    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:32]


def package_folder(name: str) -> Path:
    """Return the folder `name` of a checkout, or of the installed package `metaalign_edge_<name>`."""
    spec = importlib.util.find_spec(f"metaalign_edge_{name}")
    assert spec and spec.origin
    return Path(spec.origin).parent


def system_folder(kind: Literal["cache", "config", "data"]) -> Path:
    """Return this system's folder for a program's files of a kind; for a user without a home, one that cannot exist."""
    from platformdirs import PlatformDirs

    try:
        folder = Path(getattr(PlatformDirs("metaalign-edge", appauthor=False), f"user_{kind}_dir"))
    except RuntimeError:  # no HOME, and a user that the system does not know
        folder = Path()
    return folder if folder.is_absolute() else Path(os.devnull) / "metaalign-edge"


def cache_folder() -> Path:
    """Return the folder for files that can be made again: METAALIGN_EDGE_CACHE, else the system's."""
    return Path(os.environ.get("METAALIGN_EDGE_CACHE") or system_folder("cache"))


def config_folder() -> Path:
    """Return the folder for settings and profiles: METAALIGN_EDGE_CONFIG, else the system's."""
    return Path(os.environ.get("METAALIGN_EDGE_CONFIG") or system_folder("config"))


def data_folder() -> Path:
    """Return the folder for sessions and history: METAALIGN_EDGE_DATA, else the system's."""
    return Path(os.environ.get("METAALIGN_EDGE_DATA") or system_folder("data"))


def make_private(folder: Path) -> None:
    """Make a folder, and its parents, that nobody else can look into; one that is there stays as it is.

    Raises:
        OSError: it cannot be made.
    """
    missing = [one for one in (folder, *folder.parents) if not os.path.lexists(one)]
    for one in reversed(missing):
        one.mkdir(mode=0o700, exist_ok=True)
        one.chmod(0o700)  # the umask may take the user's own rights
    if not missing:
        folder.mkdir(exist_ok=True)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock for which other processes of this program wait: a hidden file beside `path`, named after it.

    Raises:
        OSError: the folder cannot be written.
    """
    make_private(path.parent)
    lock = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | NOFOLLOW, 0o600)
    with os.fdopen(lock, "r+b") as file:
        if hasattr(os, "fchmod"):
            with contextlib.suppress(OSError):  # another user's
                os.fchmod(lock, PRIVATE)
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]  # released with the file
        else:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def replacing(
    path: Path, keep: bool = True, *, mode: int = 0o666, alone: bool = False, durable: bool = False
) -> Iterator[Path]:
    """Yield an empty temporary file beside `path`; at the end it takes that name, or is removed if anything fails.

    A pipe, a terminal or `/dev/null` is yielded as it is: it must not be replaced by a file.

    keep: False removes the file in any case; it only tries whether one can be written. mode: its permissions, less the
    umask; PRIVATE is the same under any umask. alone: refuse if another writer of the same file is at work. durable:
    end only when the disk has it all, so that a power cut leaves no half of it.

    Raises:
        OSError: `path` is a folder, or cannot be written. BlockingIOError: another writer is at work.
    """
    with contextlib.suppress(FileNotFoundError):
        os.lstat(path)  # says at once if no file can have that name
    if os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if os.path.exists(path) and not os.path.isfile(path):
        yield path
        return
    part, replaced = path, False
    remove_left_behind(path.parent)
    try:
        part, lock = _create_part(path, mode, alone)
        try:
            yield part
            if keep:
                if durable:
                    _sync(part, os.O_RDWR | BINARY)
                os.replace(part, path)
                replaced = True
        finally:
            if not replaced:  # else the name may be another writer's by now
                with contextlib.suppress(OSError):
                    part.unlink()
            if lock is not None:
                os.close(lock)
        if durable and replaced:
            with contextlib.suppress(OSError):  # not every system can, and the file itself is safe
                _sync(path.parent, os.O_RDONLY)
    except OSError as error:
        if error.filename == str(part):  # say the name that the user knows
            error.filename = str(path)
        raise


def _create_part(path: Path, mode: int, alone: bool) -> tuple[Path, int | None]:
    """Create a temporary file for `path`; return it, and a handle that locks it as long as it is open.

    The lock tells other processes that the file has a living writer. On Windows, where an open file cannot be renamed,
    there is none.

    Raises:
        OSError: it cannot be created. BlockingIOError: `alone`, and another writer of `path` is at work.
    """
    whose = f".{digest(os.fsencode(path.name).hex())[:16]}."  # not the name itself: it may be as long as a name can be
    while True:
        part = path.with_name(f"{whose}{secrets.token_hex(8)}{PART}")  # a name that nobody can guess, and put a link at
        try:
            handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | NOFOLLOW | BINARY, mode)
        except OSError as error:
            error.filename = str(path)
            raise
        if fcntl is None:
            os.close(handle)
            return part, None
        if mode == PRIVATE:
            os.fchmod(handle, mode)
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if not _is_at(handle, part):  # another process took it for left behind, before it was locked
            os.close(handle)
            continue
        if alone and len(list(path.parent.glob(f"{whose}*{PART}"))) > 1:  # those of dead writers have been removed
            part.unlink()
            os.close(handle)
            raise BlockingIOError(errno.EAGAIN, "another process is writing it", str(path))
        return part, handle


@contextlib.contextmanager
def remembered(output: Path) -> Iterator[None]:
    """Note where a large output is being written, so that the next one, in whatever folder, removes what a kill leaves.

    First it removes what earlier ones left. Where no note can be kept, only the output's own folder is swept.
    """
    notes, note = cache_folder() / "writing", None
    with contextlib.suppress(OSError):
        make_private(notes)
        for earlier in notes.iterdir():
            folder = Path(os.fsdecode(read_bytes(earlier, "", own=True)))
            remove_left_behind(folder)
            if not any(folder.glob(f".*{PART}")):  # else one is still at work
                earlier.unlink(missing_ok=True)
        note = notes / secrets.token_hex(8)
        with os.fdopen(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_EXCL | NOFOLLOW, PRIVATE), "wb") as file:
            file.write(os.fsencode(os.path.abspath(output.parent)))
    try:
        yield
    finally:
        if note:
            with contextlib.suppress(OSError):
                note.unlink()


def remove_left_behind(folder: Path) -> None:
    """Remove the temporary files of killed writers: those that nobody locks; without locks, those an hour old."""
    for part in folder.glob(f".*{PART}"):
        with contextlib.suppress(OSError):
            old = part.lstat().st_mtime < time.time() - 3600
            if fcntl is not None:
                _remove_unlocked(part, old)
            elif old:
                part.unlink()


def _remove_unlocked(part: Path, old: bool) -> None:
    """Remove a temporary file unless its writer locks it; where files cannot be locked, if it is `old`.

    Raises:
        OSError: it is locked, or cannot be opened or removed.
    """
    handle = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError) or not old:
                raise
        if _is_at(handle, part):  # else its writer has just finished, and the name may be another's
            part.unlink()
    finally:
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Tell whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _sync(path: Path, flags: int) -> None:
    """Wait until the disk has a file, or a folder's names."""
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def room_at(folder: Path) -> tuple[Path, int]:
    """Return a folder, or its nearest parent that exists, and the bytes that are free on its disk."""
    there = next((one for one in (folder, *folder.parents) if os.path.exists(one)), Path(os.sep))
    return there, shutil.disk_usage(there).free


def from_bytes(data: bytes) -> str:
    """Decode a text that may come from Windows: a byte order mark is dropped, CR LF becomes LF.

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


def read_bytes(path: Path, what: str, most: int = LIMIT, own: bool = False) -> bytes:
    """Read a file to its end.

    own: it is one of this program's own, and so no pipe, for whose writer one would wait. most: bytes.

    Raises:
        NotFound: it is not there or not readable. UsageError: it has no end, or a far one.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | BINARY | NONBLOCK), "rb") if own else path.open("rb") as file:
            if own and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no file")
            data = file.read(most + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in its name
        raise unreadable(what, path, error) from None
    if len(data) > most:
        raise UsageError(f"{what} {path} has more than {most:,} bytes: name a smaller file")
    return data


def read_text(path: Path, what: str, most: int = LIMIT, own: bool = False) -> str:
    """Read a text file, as `read_bytes`.

    Raises:
        NotFound: it is not there or not readable. UsageError: it is not UTF-8, or too large.
    """
    try:
        return from_bytes(read_bytes(path, what, most, own))
    except UnicodeDecodeError as error:
        raise UsageError(f"{what} {path} is not UTF-8 text (byte {error.start}): re-encode it") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file of this program's own, whole or not at all. A link is followed.

    Raises:
        OSError: it cannot be written.
    """
    path = Path(os.path.realpath(path))
    kind = os.lstat(path).st_mode if os.path.lexists(path) else 0
    if stat.S_ISFIFO(kind) or stat.S_ISLNK(kind):  # one would wait for the pipe's reader; the link leads to itself
        raise OSError(errno.EINVAL, "it is no file", str(path))
    with replacing(path, mode=PRIVATE) as part:
        part.write_bytes(text.encode())


def write_whole(path: Path, data: bytes | None) -> None:
    """Write a file, whole or not at all. With None for `data`, only try whether it can be written.

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
    """Return the name of a profile or a session, after checking that a file can have it.

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
    """Tell whether a name is a path: it has a separator, begins with . or ~, ends in `suffix`, or is a file."""
    return "/" in name or os.sep in name or name.startswith((".", "~")) or name.endswith(suffix) or os.path.isfile(name)


@contextlib.contextmanager
def changing(path: Path) -> Iterator[None]:
    """Lock the settings file or the folder of profiles against other processes, to change it.

    Raises:
        CannotWrite: it cannot be changed.
    """
    try:
        with locked(path):
            yield
    except OSError as error:
        reason = f"{error.strerror} (METAALIGN_EDGE_CONFIG names another folder)"
        raise CannotWrite(f"cannot write {error.filename or path}: {reason}") from None
