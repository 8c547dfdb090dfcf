"""An answer on its way to stdout."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator

from metaalign_edge_runtime.errors import CONTROLS
from metaalign_edge_runtime.llama.interrupt import undone_at_once

from .screen import Screen

NARROW = 40  # columns; below, nothing is rendered


class Reply:
    """An answer on its way to stdout. With `markdown`, its text gives way to the rendered one when it is complete.

    That is done only where the text can be taken back for certain: on a terminal that obeys, while the text is still on
    the screen, and terminals agree on its width. Otherwise it stays as it is; nothing is ever shown twice.
    """

    def __init__(self, screen: Screen, markdown: bool = False, stream: bool = True) -> None:
        self._screen, self._stream = screen, stream
        self._size = self._terminal() if markdown and not screen.verbose else None  # a log may come in between

    def _terminal(self) -> os.terminal_size | None:
        """Return the size of a terminal that can be written on anew; not what COLUMNS says of it."""
        if not self._screen.terminal or os.environ.get("TERM") in ("dumb", "unknown"):
            return None
        try:
            size = os.get_terminal_size(sys.stdout.fileno())
        except (OSError, ValueError):
            return None
        return size if size.columns >= NARROW else None

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep what is typed meanwhile off the screen, if the text is to be taken back; the next prompt shows it."""
        if self._size is None or os.name == "nt":  # Windows shows only what is being read
            yield
            return
        import termios

        before = termios.tcgetattr(sys.stdout)
        silent = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
        restore = functools.partial(termios.tcsetattr, sys.stdout, termios.TCSANOW, before)
        with undone_at_once(restore):
            termios.tcsetattr(sys.stdout, termios.TCSANOW, silent)
            try:
                yield
            finally:
                restore()

    def show(self, piece: str) -> None:
        """Take a piece."""
        if self._stream:
            self._screen.write(piece)

    def end(self, text: str) -> None:
        """Complete an answer, whose text this is."""
        rendered = self._rendering(text)
        if rendered is None or self._stream:
            self._screen.write(("" if self._stream else text) + ("" if text.endswith("\n") else "\n"))
        if rendered is not None:
            sys.stdout.write(rendered)
            sys.stdout.flush()

    def _rendering(self, text: str) -> str | None:
        """Return what makes the rendered text of what stands on the screen; None if that has to stay."""
        if self._size is None or not text.strip():
            return None
        back = ""
        if self._stream:
            rows = rows_of(text, self._size.columns)
            if rows is None or rows >= self._size.lines or self._terminal() != self._size:
                return None
            back = f"\x1b[{rows}A\x1b[J"
        rendered = rendered_markdown(text.translate(CONTROLS), self._size.columns)
        return None if rendered is None else back + rendered


def rows_of(text: str, columns: int) -> int | None:
    """Count the rows of a terminal that a text takes; None where terminals differ."""
    import unicodedata

    rows = 0
    for line in text.removesuffix("\n").split("\n"):
        rows, at = rows + 1, 0
        for character in line:
            if unicodedata.category(character)[0] in "CM":  # tabs, joiners, accents of their own
                return None
            width = 2 if unicodedata.east_asian_width(character) in "WF" else 1
            if at + width > columns:
                rows, at = rows + 1, 0
            at += width
    return rows


def rendered_markdown(text: str, columns: int) -> str | None:
    """Return Markdown as a terminal shows it; None on a console that knows no such colours."""
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console(width=columns, force_terminal=True)
    if console.legacy_windows:
        return None
    with console.capture() as captured:
        console.print(Markdown(text, code_theme="ansi_dark", hyperlinks=False))  # a link shows where it leads
    return captured.get()
