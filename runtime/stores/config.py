"""What files say for options that are not given: the user's config.toml and a project's .metaalign.toml."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import EdgeError, UsageError, did_you_mean, one_line
from . import files

Value = str | int | float | bool | list[str]  # the value of a setting in a file
MOST = 1 << 20  # bytes of a file of settings
PROJECT_KEYS = ("system", "pref", "model")  # settings that run no code and read no other file


def config_file() -> Path:
    """Return the file of the user's settings."""
    return files.config_folder() / "config.toml"


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; nothing if it does not exist, or lies in a folder that cannot be read.

    Raises:
        UsageError: it is no TOML, or not UTF-8. NotFound: it cannot be read.
    """
    if not os.path.isfile(path):  # Path.is_file raises in a closed folder
        return {}
    text = files.read_text(path, "the settings", MOST, own=True)
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        found: dict[str, Any] = tomllib.loads(text)
        return found
    except (ValueError, RecursionError) as error:
        advice = "mend it (a text stands in quotes), or remove the file"
        raise UsageError(f"{path} is no TOML: {one_line(error)}: {advice}") from None


def read_settings(path: Path, known: Iterable[str]) -> dict[str, Any]:
    """Read the settings in a file, by key; a model's path is relative to the folder of the file.

    Raises:
        UsageError: it has a key that is not known, or is no TOML. NotFound: it cannot be read.
    """
    found, known = read_toml(path), list(known)
    for key in found:
        if key not in known:
            alike = did_you_mean(key, known, f"it takes {', '.join(known)}")
            raise UsageError(f"{path}: no setting {key!r}: {alike}")
    model = found.get("model")
    if isinstance(model, str):
        place = path.parent / os.path.expanduser(model)
        if model.startswith((".", "~")) or model.endswith(".gguf") or os.path.isfile(place):
            found["model"] = os.path.normpath(place)
    return found


def setting(key: str) -> Any:
    """Return a setting of the user's file; None if it is not set.

    Raises:
        UsageError: it is no TOML. NotFound: it cannot be read.
    """
    return read_toml(config_file()).get(key)


def store_setting(key: str, value: Value | None) -> None:
    """Write a setting to the user's file, or remove it for None; comments and all other lines stay.

    Raises:
        UsageError: the file is no TOML. NotFound: it cannot be read. CannotWrite: it cannot be written.
    """
    import tomlkit  # not at the top: it takes 50 ms
    from tomlkit.exceptions import TOMLKitError

    path = config_file()
    with files.changing(path):
        document = tomlkit.document()
        read_toml(path)  # says what is wrong with it, and where
        if os.path.isfile(path):
            try:
                document = tomlkit.parse(files.read_text(path, "the settings", MOST, own=True))
            except (TOMLKitError, RecursionError) as error:  # it knows bounds that the reader above does not
                raise UsageError(f"{path} cannot be changed: {one_line(error)}: mend it with an editor") from None
        if value is not None:
            document[key] = value
        elif key in document:
            del document[key]
        else:
            return
        files.write_text(path, tomlkit.dumps(document))


class Project(NamedTuple):
    """The settings of the nearest `.metaalign.toml`, from the working folder upwards."""

    path: Path
    settings: dict[str, Any]
    owner: int | None  # the id of another user, whose file it is; None: the user's own

    def is_known(self) -> bool:
        """Tell whether the user was told these very settings before."""
        with contextlib.suppress(EdgeError):
            return self.owner is None and files.read_bytes(self._memory(), "", own=True) == self._digest().encode()
        return False

    def remember(self) -> None:
        """Remember that the user was told; where nothing can be written, the user is told again."""
        with contextlib.suppress(OSError):
            files.make_private(self._memory().parent)
            files.write_text(self._memory(), self._digest())

    def _memory(self) -> Path:
        return files.data_folder() / "projects" / files.digest(os.fsencode(self.path).hex())

    def _digest(self) -> str:
        return files.digest(repr(self.settings))


def find_project() -> Project | None:
    """Find the project that the working folder lies in; METAALIGN_EDGE_PROJECT=0 finds none.

    Raises:
        UsageError: its file has a key that means nothing, or is no TOML. NotFound: it cannot be read.
    """
    if os.environ.get("METAALIGN_EDGE_PROJECT") == "0":
        return None
    try:
        here = Path.cwd()
    except OSError:  # the working folder has been removed
        return None
    for folder in (here, *here.parents):
        path = folder / ".metaalign.toml"
        if os.path.isfile(path):
            owner = path.stat().st_uid
            mine = not hasattr(os, "geteuid") or owner == os.geteuid()  # Windows has no such ids
            return Project(path, read_settings(path, PROJECT_KEYS), None if mine else owner)
    return None
