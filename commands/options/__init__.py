"""`@command`: a function that takes groups of options, and settings from files, becomes a command."""

from __future__ import annotations

from collections.abc import Callable

from . import in_files
from .signature import spread


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options, and settings from files for options that are not given."""
    return spread(function, in_files.obey_settings)
