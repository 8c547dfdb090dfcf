"""KV states of prompt prefixes on disk: seconds to compute, milliseconds to load."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

from ..errors import CannotWrite
from . import files

STATE_MAGIC = b"MAEKV\x00\x00\x01"  # the first bytes of a file; the last one is the version of its layout
STATE_HEAD = struct.Struct("<8sQ32s")  # magic, hits, SHA-256 of key and state
MOST_HITS = 2**64 - 1  # the largest count that the head of a file holds
STATES_BYTES = 1 << 30  # the default limit of all files together


class CachedPrompt(NamedTuple):
    """A state on the disk."""

    path: Path
    bytes: int
    used: float  # the time of the last use, in seconds since 1970
    hits: int


class PromptCache:
    """KV states of prompt prefixes in a folder, a file each: `<key>.kv`.

    A file is a header (magic, hits, SHA-256 of key and state) and the state. The key is a digest of all that decides
    the state. A damaged or foreign file is removed and never trusted; where nothing can be written, nothing is stored.
    A state contains the prompt in a form: files have the mode 0600, their folder 0700.

    Args:
        most: bytes of all files together; the least recently used are removed beyond it.
        read_only: states are loaded, and no new ones stored.
    """

    def __init__(self, folder: Path | None = None, most: int = STATES_BYTES, read_only: bool = False) -> None:
        self.folder, self.most, self.read_only = folder or files.cache_folder() / "states", most, read_only

    def load(self, key: str) -> bytearray | None:
        """Return a state, and count the hit; None if there is none."""
        path = self.folder / f"{key}.kv"
        try:
            with os.fdopen(os.open(path, os.O_RDWR | files.BINARY | files.NONBLOCK), "r+b", buffering=0) as file:
                there = os.fstat(file.fileno())
                size = there.st_size if S_ISREG(there.st_mode) and there.st_size <= self.most else 0
                head = file.read(STATE_HEAD.size) if size else b""
                data = bytearray(max(0, size - STATE_HEAD.size))
                file.readinto(data)
                magic, hits, checksum = STATE_HEAD.unpack(head) if len(head) == STATE_HEAD.size else (b"", 0, b"")
                if magic == STATE_MAGIC and checksum == state_checksum(key, data):
                    file.seek(0)
                    # this also renews the modification time, by which files are evicted
                    file.write(STATE_HEAD.pack(magic, min(hits + 1, MOST_HITS), checksum))
                    return data
            path.unlink()
        except OSError:
            pass
        return None

    def has(self, key: str) -> bool:
        """Tell whether there is a file of that name."""
        return (self.folder / f"{key}.kv").exists()

    def save(self, key: str, data: bytes | bytearray) -> None:
        """Write a state, whole or not at all, and make room for it; a disk that is full loses nothing but time."""
        if STATE_HEAD.size + len(data) > self.most:
            return
        with contextlib.suppress(OSError):
            files.make_private(self.folder)
            with files.replacing(self.folder / f"{key}.kv", mode=files.PRIVATE) as part, part.open("wb") as file:
                file.write(STATE_HEAD.pack(STATE_MAGIC, 0, state_checksum(key, data)))
                file.write(data)
            self._evict()

    def files(self) -> list[CachedPrompt]:
        """List the states, the most recently used first."""
        found = []
        with contextlib.suppress(OSError):
            for path in self.folder.glob("*.kv"):
                with contextlib.suppress(OSError, struct.error), path.open("rb") as file:
                    stat = os.fstat(file.fileno())
                    hits = STATE_HEAD.unpack(file.read(STATE_HEAD.size))[1]
                    found.append(CachedPrompt(path, stat.st_size, stat.st_mtime, hits))
        return sorted(found, key=lambda file: -file.used)

    def _evict(self) -> None:
        """Remove the least recently used beyond the limit."""
        total = 0
        for file in self.files():
            total += file.bytes
            if total > self.most:
                file.path.unlink(missing_ok=True)

    def clear(self) -> int:
        """Remove all states; return how many there were.

        Raises:
            CannotWrite: one cannot be removed.
        """
        states = self.files()
        try:
            for path in [*(state.path for state in states), *self.folder.glob(".*"), *self.folder.glob("*.kv")]:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise CannotWrite(f"cannot remove {error.filename}: {error.strerror}") from None
        return len(states)


def state_checksum(key: str, data: bytes | bytearray) -> bytes:
    """Return 32 bytes that stand for a state and the name it is filed under."""
    import hashlib

    checksum = hashlib.sha256(key.encode())  # twice as fast as blake2b on processors with SHA instructions
    checksum.update(data)
    return checksum.digest()
