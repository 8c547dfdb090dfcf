"""A line on a terminal's stderr that says what is being waited for. It gives way to all else that is shown there."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from metaalign_edge_runtime.errors import CONTROLS, one_line
from metaalign_edge_runtime.llama.interrupt import undone_at_once

from .screen import Screen, at_terminal

DELAY = 0.5  # seconds without a sign of life before the line is shown
PERIOD = 0.25  # seconds between its renewals
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class StatusLine:
    """The line, and the thread that shows and renews it.

    It stands at the beginning of a line only, and needs no escape sequences: blanks erase it.
    """

    def __init__(self, describe: Callable[[], str], terminal: TextIO) -> None:
        self._describe, self._terminal = describe, terminal
        self._began = self._latest = time.monotonic()  # the latest: of anything that was shown
        self._text, self._shown = "", 0  # what was shown last; the columns that are taken now
        self._within_a_line = False  # whether something else stands in the line
        self._lock, self._ended = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)

    def start(self) -> None:
        """Begin to wait."""
        self._thread.start()

    def end(self) -> None:
        """Erase the line for good."""
        self._ended.set()
        self._thread.join()
        self.erase()

    def erase(self) -> None:
        """Erase the line, if it is shown."""
        with self._lock:
            if self._shown:
                self._write(f"\r{' ' * self._shown}\r")
                self._shown = 0

    @contextlib.contextmanager
    def giving_way(self, text: str) -> Iterator[None]:
        """Erase the line while a text is written; where that does not end its line, this one stays away."""
        with self._lock:
            self.erase()
            yield
            self._latest = time.monotonic()
            if plain := ESCAPES.sub("", text):
                self._within_a_line = not plain.endswith(("\n", "\r"))

    def _renew(self) -> None:
        while not self._ended.wait(PERIOD):
            with self._lock:
                now = time.monotonic()
                if not self._within_a_line and (self._shown or now - self._latest >= DELAY):
                    text = self._describe()
                    self._show(f"{text} ({now - self._began:.0f} s)" if text else "")

    def _show(self, text: str) -> None:
        if text == self._text and bool(text) == bool(self._shown):
            return
        from rich.cells import cell_len, set_cell_size  # characters of some scripts take two columns

        self._text = text
        text = one_line(text.translate(CONTROLS)) if text else ""
        size = min(cell_len(text), columns_of(self._terminal) - 1)
        self._write(f"\r{set_cell_size(text, size)}{' ' * (self._shown - size)}\r")
        self._shown = size

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # the terminal may be gone
            self._terminal.write(text)
            self._terminal.flush()


def columns_of(terminal: TextIO) -> int:
    """Return the width of a terminal."""
    with contextlib.suppress(OSError, ValueError):
        if found := os.get_terminal_size(terminal.fileno()).columns:
            return found
    return shutil.get_terminal_size().columns


class Yielding:
    """A terminal's stream before which the status line gives way."""

    def __init__(self, stream: TextIO, line: StatusLine) -> None:
        self._stream, self._line = stream, line

    def write(self, text: str) -> int:
        """Write a text."""
        with self._line.giving_way(text):
            return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def waiting(screen: Screen, describe: Callable[[], str]) -> Iterator[None]:
    """Say on stderr what is being waited for, whenever nothing else was shown for a while within the `with`.

    Nothing is said off a terminal, on one that only prints (TERM=dumb), and with -q.

    Args:
        describe: returns what is being done now, and how far it is; an empty text shows nothing. A thread calls it.
    """
    usual = sys.stdout, sys.stderr
    if screen.quiet or not at_terminal(sys.stderr) or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        yield
        return
    line = StatusLine(describe, sys.stderr)
    with undone_at_once(line.erase):
        sys.stderr = Yielding(sys.stderr, line)
        if at_terminal(sys.stdout):
            sys.stdout = Yielding(sys.stdout, line)
        line.start()
        try:
            yield
        finally:
            sys.stdout, sys.stderr = usual
            line.end()
