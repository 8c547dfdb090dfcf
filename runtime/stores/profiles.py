"""Preference profiles: built-in ones, and the user's own, a text file each."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import NotFound, UsageError, did_you_mean
from . import config, files


def profiles_folder() -> Path:
    """Return the folder of the user's own profiles: a text file each."""
    return files.config_folder() / "preferences"


def profile_name(name: str) -> str:
    """Return the name of a profile that is given as `name` or `@name`.

    Raises:
        UsageError: it is none.
    """
    return files.file_name(name.removeprefix("@"), "profile")


@functools.cache
def built_in_profiles() -> dict[str, str]:
    """Return the built-in profiles: name and text."""
    return config.read_toml(files.package_folder("preferences") / "profiles.toml")


def own_profiles() -> list[str]:
    """List the names of the user's own profiles."""
    with contextlib.suppress(OSError):
        names = (path.stem for path in profiles_folder().glob("*.txt"))
        return sorted(name for name in names if re.fullmatch(r"\w[\w.-]*", name))
    return []


def known_profiles() -> list[str]:
    """List the names of all profiles, the user's own and the built-in ones."""
    return sorted({*own_profiles(), *built_in_profiles()})


def own_profile(name: str) -> str | None:
    """Return the text of a profile of the user's own; None if there is none.

    Raises:
        UsageError: it is not UTF-8. NotFound: it cannot be read.
    """
    path = profiles_folder() / f"{name}.txt"
    return files.read_text(path, "the profile", own=True).strip() if os.path.lexists(path) else None


def profile_text(name: str) -> str:
    """Return the text of a profile: the user's own, else the built-in one.

    Raises:
        NotFound: there is none. UsageError: it is empty, or not UTF-8.
    """
    text = own_profile(name)
    if text is None:
        built_in = built_in_profiles()
        if name not in built_in:
            alike = did_you_mean(
                f"@{name}", [f"@{one}" for one in known_profiles()], "`metaalign-edge pref list` shows all"
            )
            raise NotFound(f"no preference profile @{name}: {alike}")
        text = built_in[name]
    if not text:
        raise UsageError(
            f"the profile {profiles_folder() / name}.txt is empty: fill it with `metaalign-edge pref edit {name}`"
        )
    return text


def expand_profile(preference: str) -> str:
    """Return the text of a profile, `@name`, or of several, `@one+@two`; any other preference as it is.

    Raises:
        NotFound: there is no such profile. UsageError: it is empty, or not UTF-8.
    """
    names = profile_names(preference)
    return "\n".join(map(profile_text, names)) if names else preference


def profile_names(preference: str) -> list[str]:
    """List the profiles that a preference names, `@one+@two`; none if it is a text."""
    return preference[1:].split("+@") if re.fullmatch(r"@[\w.-]+(\+@[\w.-]+)*", preference) else []


def store_profile(name: str, text: str, before: str | None = None, force: bool = False) -> None:
    """Write a profile of the user's own. It must have the text `before` (None: not exist), unless `force` is set.

    Raises:
        UsageError: the text is empty or not UTF-8, or another one stands there. CannotWrite: it cannot be written.
    """
    files.check_utf8(text, f"the text of @{name}")
    text = text.replace("\r\n", "\n").strip()
    if not text:
        raise UsageError(f"the text of @{name} is empty: say what you prefer")
    with files.changing(profiles_folder()):
        files.make_private(profiles_folder())
        for other in known_profiles():
            if other != name and other.casefold() == name.casefold():
                raise UsageError(f"there is @{other}, which is the same file on some systems: choose another name")
        if not force and own_profile(name) != before:
            raise UsageError(
                f"there is a profile @{name} already: --force replaces it"
                if before is None
                else f"another process changed @{name} meanwhile, so it stays as that left it"
            )
        files.write_text(profiles_folder() / f"{name}.txt", text + "\n")


def remove_profiles(names: Sequence[str]) -> None:
    """Remove profiles of the user's own: all of them, or none if one is not there.

    Raises:
        UsageError: one is built in. NotFound: there is none. CannotWrite: one cannot be removed.
    """
    with files.changing(profiles_folder()):
        for name in names:
            if name in own_profiles():
                continue
            if name in built_in_profiles():
                raise UsageError(f"@{name} is built in and stays; an own profile of that name would win over it")
            alike = did_you_mean(
                f"@{name}", [f"@{one}" for one in own_profiles()], "`metaalign-edge pref list` shows all"
            )
            raise NotFound(f"no preference profile @{name} of your own: {alike}")
        for name in names:
            (profiles_folder() / f"{name}.txt").unlink(missing_ok=True)


def preference_text(preference: str) -> str:
    """Return the text of a preference or of a profile; a lone dash is none."""
    return "" if preference == "-" else expand_profile(preference)


def profile_words() -> list[str]:
    """List the names of all profiles as the command line takes them: `@name`."""
    return [f"@{name}" for name in known_profiles()]
