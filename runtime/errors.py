"""Errors with their exit codes, and how things are put into words."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterable, Sequence

MESSAGE_LIMIT = 600  # characters of an error's text: names in it come from files and may be of any length


class EdgeError(Exception):
    """Root of every error a user can cause; its text is one line: what, where, what to do next.

    The text is safe to print whatever names it holds: no control characters, no password of a URL, and cut in its
    middle beyond 600.
    """

    __module__ = "metaalign_edge"  # where users import it from
    exit_code = 1

    def __init__(self, message: object = "") -> None:
        text = without_passwords(" ".join(str(message).splitlines()))
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


class NoAnswer(EdgeError):
    """The model ended, or was cut, before it said anything."""

    exit_code = 7


class CannotWrite(EdgeError):
    """An output cannot be written."""

    exit_code = 8


class Interrupted(EdgeError):
    """The user pressed Ctrl-C."""

    exit_code = 130


class OutputClosed(Exception):
    """Whoever read stdout has gone; that is no error."""


def system_error(error: OSError | MemoryError) -> EdgeError:
    """Return the error of ours for one of the system's that was nobody's: no memory, no file handles, no such file."""
    number = error.errno if isinstance(error, OSError) else errno.ENOMEM
    name = error.filename if isinstance(error, OSError) else None
    why = getattr(error, "strerror", None) or one_line(error)
    reason = f"{os.fsdecode(name)}: {why}" if isinstance(name, str | bytes) else f"a file or stream: {why}"
    if number == errno.ENOMEM:
        return LoadError("the memory is not enough: end other programs, or take a smaller model, context (-c) or input")
    if number in (errno.EMFILE, errno.ENFILE):
        return LoadError(f"{reason}: allow this program more of them (ulimit -n)")
    if number in (errno.ENOSPC, errno.EROFS, errno.EFBIG, errno.EIO, errno.ENXIO):
        return CannotWrite(f"cannot write {reason}: make room, or name another place")
    return NotFound(f"cannot open {reason}: look at its name and at who may read it")


def unreadable(what: str, path: object, error: OSError | ValueError) -> EdgeError:
    """Return the error of a file that cannot be read; what the system lacks is not the file's fault."""
    if isinstance(error, OSError) and error.errno in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
        return system_error(error)
    return NotFound(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or one_line(error)}")


def without_passwords(text: str) -> str:
    """Return a text in which no URL has a user's name and password."""
    return re.sub(r"(?<=://)[^\s/?#'\"]*@", "", text) if "://" in text else text


CONTROLS = dict.fromkeys(
    [*range(9), 11, 12, *range(14, 32), *range(127, 160)]
)  # control characters that could steer a terminal, for str.translate


def say(text: str) -> None:
    """Write a line to stderr; a closed stderr loses words, not the answer."""
    with contextlib.suppress(OSError, AttributeError):
        sys.stderr.write(without_passwords(text).translate(CONTROLS) + "\n")
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
