"""Print the paths of settings, profiles, sessions and caches, and the sizes of the caches."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import cast

from metaalign_edge_runtime.stores import config, files, models, profiles

from .options.groups import JsonOption
from .terminal.screen import Screen


def paths(as_json: JsonOption = False) -> None:
    """Print the paths of settings, profiles, sessions and caches, and the sizes of the caches.

    Examples:

        metaalign-edge paths

        metaalign-edge paths --json
    """
    screen, project = Screen(), config.find_project()
    places = {
        "settings": config.config_file(),
        "profiles": profiles.profiles_folder(),
        "project": project and project.path,
        "states": files.cache_folder() / "states",
        "answers": files.cache_folder() / "answers",
        "data": files.data_folder(),
        "hub": models.hub_folder(),
        "models": models.own_folder(),
    }
    sizes = {name: folder_bytes(cast(Path, places[name])) for name in ("states", "answers")}
    if as_json:
        screen.json({name: {"path": path and str(path), "bytes": sizes.get(name)} for name, path in places.items()})
        return
    for name, path in places.items():
        size = f"  ({sizes[name] / 1e6:,.1f} MB)" if name in sizes else ""
        screen.write(f"{name:<10}{path or '-'}{size}\n")


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder; 0 if it does not exist."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
