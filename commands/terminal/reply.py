"""An answer on its way to stdout: as it is written, or rendered as Markdown when it is complete."""

from __future__ import annotations

import os
import sys

from metaalign_edge_runtime.errors import CONTROLS

from .screen import Screen
from .wrapping import Wrapping

NARROW = 40  # columns of a terminal; with fewer, Markdown stays text
WORKING = "…\r"  # shown while an answer is awaited; whatever is written next overwrites it
ERASE_LINE = "\x1b[K"


class AnswerPrinter:
    """Prints one answer to stdout. `stream`: as it is written, otherwise all at once.

    With `wrap`, a terminal's edge breaks no word (`Wrapping`).

    With `markdown`, on a terminal that is wide enough and knows escape sequences, the answer is rendered when it is
    complete, and only a … stands there meanwhile: nothing that was shown is ever taken back.
    """

    def __init__(self, screen: Screen, markdown: bool = False, stream: bool = True, wrap: bool = False) -> None:
        self._screen, self._stream = screen, stream
        self._words = Wrapping(wrap and screen.terminal)
        self._columns = self._rendering_width() if markdown else None  # None: the text is printed as it is
        self._working = False

    def _rendering_width(self) -> int | None:
        """Return the terminal's width in columns; None if Markdown cannot be rendered there."""
        if not self._screen.terminal or os.environ.get("TERM") in ("dumb", "unknown"):
            return None
        try:
            columns = os.get_terminal_size(sys.stdout.fileno()).columns
        except (OSError, ValueError):
            return None
        return columns if columns >= NARROW else None

    @property
    def shown_as_it_comes(self) -> bool:
        """Whether a reader at this terminal sees the answer grow."""
        return self._screen.terminal and self._stream and self._columns is None

    def show(self, piece: str) -> None:
        """Take the next piece of the answer."""
        if self._columns is not None:
            if not self._working:
                self._screen.write(WORKING)
            self._working = True
        elif self._stream:
            self._screen.write(self._words.feed(piece))

    def end(self, text: str, interrupted: bool = False) -> None:
        """Complete the answer, whose text is `text`; without any, only the line of a terminal's ^C is ended."""
        if not text and not (interrupted and self._screen.terminal):
            return
        if self._columns is None:
            shown = self._words.feed("" if self._stream else text) + self._words.rest()
            self._screen.write(shown + ("" if text.endswith("\n") else "\n"))
            return
        if self._working:
            self._screen.write(ERASE_LINE, escapes=True)
        rendered = rendered_markdown(text.translate(CONTROLS), self._columns) if text.strip() else None
        if rendered is None:
            self._screen.write(text if text.endswith("\n") else f"{text}\n")
        else:
            self._screen.write(rendered, escapes=True)


def rendered_markdown(text: str, columns: int) -> str | None:
    """Return Markdown as a terminal shows it; None on an old Windows console, which knows no escape sequences."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=columns, force_terminal=True)
    if console.legacy_windows:
        return None
    with console.capture() as captured:
        console.print(Markdown(text, code_theme="ansi_dark", hyperlinks=False))  # a link shows where it leads
    return captured.get()
