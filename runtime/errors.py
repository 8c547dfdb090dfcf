"""Errors with their exit codes, and how things are put into words."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence

MESSAGE_LIMIT = 600  # characters of an error's text: names in it come from files and may be of any length


class EdgeError(Exception):
    """Root of every error a user can cause; its text is one line: what, where, what to do next.

    The text is safe to print whatever names it holds: no control characters, and cut in its middle beyond 600.
    """

    __module__ = "metaalign_edge"  # where users import it from
    exit_code = 1

    def __init__(self, message: object = "") -> None:
        text = " ".join(str(message).splitlines())
        if len(text) > MESSAGE_LIMIT:
            text = f"{text[: MESSAGE_LIMIT // 2]} … {text[-MESSAGE_LIMIT // 2 :]}"
        super().__init__("".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text))


class UsageError(EdgeError):
    """The arguments or the input make no sense together."""

    __module__ = "metaalign_edge"
    exit_code = 2


class NotFound(EdgeError):
    """A model or file is not there."""

    __module__ = "metaalign_edge"
    exit_code = 3


class NetworkError(EdgeError):
    """The hub is unreachable, or refuses."""

    __module__ = "metaalign_edge"
    exit_code = 4


class LoadError(EdgeError):
    """A model file is bad, or does not fit the memory."""

    __module__ = "metaalign_edge"
    exit_code = 5


class ContextOverflow(EdgeError):
    """The pinned part of the dialog does not fit the context."""

    __module__ = "metaalign_edge"
    exit_code = 6


class TemplateError(EdgeError):
    """A template is missing, does not render, or breaks its budget."""

    __module__ = "metaalign_edge"
    exit_code = 7


class TierViolation(EdgeError):
    """Text in a tier would become more than text."""

    __module__ = "metaalign_edge"
    exit_code = 7


class SchemaViolation(EdgeError):
    """An answer does not fit the schema that was asked for."""

    exit_code = 7


class CannotWrite(EdgeError):
    """An output cannot be written."""

    exit_code = 8


class Interrupted(EdgeError):
    """The user pressed Ctrl-C."""

    exit_code = 130


class OutputClosed(Exception):
    """Whoever read stdout has gone; that is no error."""


CONTROLS = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), *range(127, 160)]
)  # control characters that could steer a terminal, for str.translate
ESCAPED = {code: f"\\x{code:02x}" for code in [*CONTROLS, 13]}  # such characters as text: ESC becomes \x1b


def say(text: str) -> None:
    """Write a line to stderr, control characters as text; a closed stderr loses words, not the answer."""
    write_log(text + "\n")


def write_log(text: str) -> None:
    """Write text that may come from a file to stderr; control characters become text, but for tabs and line breaks."""
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.write(text.translate(ESCAPED))
        sys.stderr.flush()


def one_line(error: object) -> str:
    """Squeeze the text of an exception into one line."""
    return " ".join(str(error).split()) or type(error).__name__


def shortened(text: object, most: int) -> str:
    """Return a text in one line, cut where it has more than so many characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def counted(number: int, what: str) -> str:
    """Return how many there are of something: `1 state`, `2 states`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def some(names: Sequence[str], limit: int = 4) -> str:
    """Join the first names of a list for a message, and count the others: `a, b and 7 more`."""
    shown = ", ".join(names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def did_you_mean(word: str, words: Iterable[str], otherwise: str) -> str:
    """Ask whether one of the words was meant that are most like one that does not exist; else say something else."""
    import difflib

    word, spelled = word.casefold(), {one.casefold(): one for one in words}
    found = [one for one in spelled if one.startswith(word[:3]) and (one.startswith(word) or word.startswith(one))]
    found = found or difflib.get_close_matches(word, spelled, cutoff=0.65)
    return f"do you mean {' or '.join(spelled[one] for one in found[:2])}?" if found else otherwise


def in_bytes(count: float) -> str:
    """Return a number of bytes as a reader takes it in."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
