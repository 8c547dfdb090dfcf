"""The folder of a checkpoint. Its files are not trusted: they may have been made to do harm."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from metaalign_edge_runtime.errors import LoadError, NotFound

MB = 1_000_000
TEXT_LIMIT = 4 * MB  # bytes; configurations and chat templates have a few thousand


class Folder:
    """The files of one checkpoint.

    A file is opened only if it is a regular file inside the folder. The one exception is the hub's cache, whose
    snapshots are links into the `blobs` folder beside them.
    """

    def __init__(self, path: Path) -> None:
        """Take the folder at `path`. Raises NotFound if it is no folder."""
        if not os.path.exists(path):
            raise NotFound(f"{path}: no such folder; give the folder that holds config.json")
        if not os.path.isdir(path):
            raise NotFound(f"{path}: not a folder; give the folder that holds config.json and the weights")
        self.root = path.resolve()
        self.name = os.path.basename(os.path.abspath(path))
        self.hub_id: str | None = None
        self._blobs: Path | None = None
        snapshots = next((parent for parent in self.root.parents if parent.name == "snapshots"), None)
        if snapshots is not None:
            self._blobs = snapshots.parent / "blobs"
            if snapshots.parent.name.startswith("models--"):
                self.hub_id = snapshots.parent.name.removeprefix("models--").replace("--", "/")

    def names(self) -> list[str]:
        """List the names of the files in the folder, sorted."""
        try:
            return sorted(os.listdir(self.root))
        except OSError as error:
            raise LoadError(f"{self.root}: cannot list the folder ({error.strerror})") from None

    def has(self, name: str) -> bool:
        """Say whether there is a file `name`."""
        return os.path.exists(self.root / name)  # Path.exists may raise

    def open(self, name: str) -> BinaryIO:
        """Open the file `name`. Raises LoadError for a link out of the folder, and for anything but a regular file."""
        path = self.root / name
        try:
            target = path.resolve(strict=True)
            inside = target.is_relative_to(self.root) or (self._blobs is not None and target.parent == self._blobs)
            if not inside:
                raise LoadError(f"{name}: a link out of the checkpoint's folder; copy the file itself there")
            if not stat.S_ISREG(target.stat().st_mode):  # a pipe would be waited for
                raise LoadError(f"{name}: not a regular file")
            return target.open("rb")
        except (OSError, RuntimeError) as error:  # before Python 3.13, circular links raise RuntimeError
            raise LoadError(f"{name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None

    def bytes(self, name: str, limit: int) -> bytes:
        """Read the whole file `name`. Raises LoadError if it has more than `limit` bytes."""
        with self.open(name) as file:
            try:
                data = file.read(limit + 1)
            except OSError as error:
                raise LoadError(f"{name}: cannot be read ({error.strerror})") from None
        if len(data) > limit:
            raise LoadError(f"{name}: larger than {limit // MB} MB, which no such file is; the folder looks damaged")
        return data

    def text(self, name: str, limit: int = TEXT_LIMIT) -> str | None:
        """Read `name` as UTF-8, None if there is no such file."""
        if not self.has(name):
            return None
        try:
            return self.bytes(name, limit).decode("utf-8")
        except UnicodeDecodeError as error:
            raise LoadError(f"{name}: not UTF-8 (byte {error.start}); download the file again") from None

    def json(self, name: str, limit: int = TEXT_LIMIT) -> dict[str, Any]:
        """Read `name` as a JSON object, empty if there is no such file."""
        text = self.text(name, limit)
        return {} if text is None else parse_json(text, name)


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Parse the JSON object in the file `name`. Raises LoadError, also for repeated keys, NaN and deep nesting."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):  # Python would silently keep the last one
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice!r} stands twice")
        return found

    def no_constant(word: str) -> None:
        raise ValueError(f"{word} is not a JSON number")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except ValueError as error:
        raise LoadError(f"{name}: not valid JSON ({error}); download the file again") from None
    except RecursionError:
        raise LoadError(f"{name}: nested too deeply to be genuine") from None
    if not isinstance(value, dict):
        raise LoadError(f"{name}: holds a {type(value).__name__} where a JSON object belongs")
    return value
