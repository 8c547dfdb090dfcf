"""The query: an argument, a pipe, or both."""

from __future__ import annotations

import sys

from metaalign_edge_runtime.errors import ContextOverflow, UsageError
from metaalign_edge_runtime.stores import files

from ..terminal.screen import at_terminal

STDIN_LIMIT = 1 << 23  # bytes; more than any context holds, and an end for /dev/zero


def read_stdin() -> str:
    """Read stdin, without its final newline; return an empty text if it is a terminal or closed.

    Raises:
        UsageError: stdin is not UTF-8, or cannot be read. ContextOverflow: it has more than `STDIN_LIMIT` bytes.
    """
    if sys.stdin is None or sys.stdin.isatty():
        return ""
    try:
        data = sys.stdin.buffer.read(STDIN_LIMIT + 1)
        text = files.from_bytes(data)
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin is not UTF-8 text (byte {error.start}): pipe text, or use --no-stdin") from None
    except OSError as error:
        raise UsageError(f"cannot read stdin ({error.strerror}): pipe text, or use --no-stdin") from None
    if len(data) > STDIN_LIMIT:
        raise ContextOverflow(f"stdin has more than {STDIN_LIMIT:,} bytes: no context holds that")
    return text.removesuffix("\n")


def read_query(argument: str | None, no_stdin: bool, repl: bool) -> str | None:
    """Return the query, from stdin and the argument; None if there is none, at a terminal, and `repl` allows that.

    Raises:
        UsageError: there is no query, or stdin is not text. ContextOverflow: stdin is too long.
    """
    piped = "" if no_stdin else read_stdin()
    query = "\n\n".join(text for text in (piped, argument or "") if text.strip())
    if query:
        return query
    if repl and argument is None and not no_stdin and at_terminal(sys.stdin) and at_terminal(sys.stdout):
        return None
    raise UsageError("no query: give it as an argument or pipe it in")
