"""stdout is the answer, or one JSON document; everything else is on stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from metaalign_edge_runtime.errors import CONTROLS, CannotWrite, OutputClosed, say
from metaalign_edge_runtime.llama.interrupt import undone_at_once

from . import tables


def hidden_cursor(stream: TextIO) -> contextlib.AbstractContextManager[None]:
    """Show a terminal's cursor again, which Rich hides, also when a second Ctrl-C ends the process at once."""
    return undone_at_once(lambda: os.write(stream.fileno(), b"\x1b[?25h"))


@contextlib.contextmanager
def terminal_given_back() -> Iterator[None]:
    """Give the terminal back as it was, with echo and cursor, also when SIGTERM or a second Ctrl-C ends the process."""
    if os.name == "nt" or not at_terminal(sys.stdin):
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin.fileno())
    plain = os.environ.get("TERM") in (None, "dumb", "unknown")

    def give_back() -> None:
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, before)
        if not plain:  # the cursor, no bracketed paste, no style, and a line of its own for the shell's prompt
            os.write(sys.stdout.fileno(), b"\x1b[?25h\x1b[?2004l\x1b[0m\r\n")

    with undone_at_once(give_back):
        yield


def at_terminal(stream: TextIO | None) -> bool:
    """Tell whether a stream, which may be closed, is a terminal."""
    return stream is not None and stream.isatty()


class Screen:
    """stdout and stderr, and how much to print on the second."""

    def __init__(self, quiet: bool = False, verbose: bool = False) -> None:
        self.quiet, self.verbose = quiet, verbose
        self.terminal = at_terminal(sys.stdout)
        self._noted: set[str] = set()

    def write(self, text: str, escapes: bool = False) -> None:
        """Write to stdout at once. `escapes`: the text has escape sequences for a terminal, made by this program.

        Raises:
            OutputClosed: the pipe's reader has ended. CannotWrite: the disk is full, or stdout is closed.
        """
        if sys.stdout is None:
            raise CannotWrite("stdout is closed: redirect it to a file or to /dev/null")
        try:
            sys.stdout.write(text.translate(CONTROLS) if self.terminal and not escapes else text)
            sys.stdout.flush()
        except BrokenPipeError:
            raise OutputClosed from None
        except OSError as error:
            raise CannotWrite(f"cannot write to stdout: {error.strerror}") from None

    def json(self, document: Any) -> None:
        """Write one JSON document to stdout."""
        self.write(json.dumps(document, ensure_ascii=False, indent=2 if self.terminal else None) + "\n")

    def lay_out(self, heads: list[str], rows: list[list[str]], spare: bool = False) -> list[str]:
        """Return the lines of a table: drawn on a terminal, elsewhere with aligned columns.

        `spare`: a narrow terminal need not show the last column.
        """
        return tables.rich_table(heads, rows, spare) if self.terminal else tables.aligned(heads, rows)

    def lines(self, lines: Iterable[str]) -> None:
        """Write lines to stdout. They may hold names from files of others: even a pipe gets no control characters."""
        self.write("".join(f"{line.translate(CONTROLS)}\n" for line in lines))

    def note(self, text: str) -> None:
        """Print a line on stderr, unless -q."""
        if not self.quiet:
            say(text)

    def note_once(self, kind: str, text: str) -> None:
        """Print a line on stderr, unless -q, or a line of that kind was printed before."""
        if kind not in self._noted:
            self._noted.add(kind)
            self.note(text)

    def detail(self, text: str) -> None:
        """Print a line on stderr with -v only."""
        if self.verbose:
            say(text)


class ReasoningPrinter:
    """A model's reasoning on stderr: dim on a terminal, plain elsewhere and with -v only, never with -q."""

    def __init__(self, screen: Screen) -> None:
        terminal = at_terminal(sys.stderr)
        plain = not terminal or bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        self._dim, self._usual = ("", "") if plain else ("\x1b[2m", "\x1b[22m")
        self._shown = (terminal or screen.verbose) and not screen.quiet

    def write(self, text: str) -> None:
        """Print a piece of reasoning."""
        if self._shown:
            with contextlib.suppress(OSError):
                sys.stderr.write(f"{self._dim}{text.translate(CONTROLS)}{self._usual}")
                sys.stderr.flush()
