"""Options become what a command takes: groups of them, and what files say."""

from __future__ import annotations

from collections.abc import Callable

from . import in_files
from .signature import spread


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Let a command take groups of options, and from files what is not given."""
    return spread(function, in_files.obey_settings)
