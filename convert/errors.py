"""What can go wrong, by kind. Every message is one line: what, where, and what to do next."""

from __future__ import annotations

from metaalign_edge_runtime import errors
from metaalign_edge_runtime.errors import LoadError

MESSAGE_LIMIT = 600  # characters; names and tokens come from files and may be of any length


class ConvertError(LoadError):
    """The checkpoint cannot be converted as it is."""

    def __init__(self, message: str) -> None:
        """Take a message, and make it safe to print: one line, no control characters, of bounded length."""
        if len(message) > MESSAGE_LIMIT:
            half = MESSAGE_LIMIT // 2
            message = f"{message[:half]} … {message[-half:]}"
        shown = (letter if letter.isprintable() else ascii(letter)[1:-1] for letter in message)
        super().__init__("".join(shown))


class SourceNotFound(ConvertError):
    """There is no checkpoint where one was looked for."""

    exit_code = errors.NotFound.exit_code


class OutputExists(ConvertError):
    """The output is there already, and nobody said that it may be replaced."""

    exit_code = errors.UsageError.exit_code


class CannotWrite(ConvertError):
    """The output cannot be written: no folder, no permission, no space."""

    exit_code = errors.CannotWrite.exit_code


def some(names: list[str], limit: int = 4) -> str:
    """Join the first few ``names`` for a message, and count the others: ``a, b and 7 more``."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
