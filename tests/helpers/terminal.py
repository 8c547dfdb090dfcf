"""The command line in a real pseudo-terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import sys
import termios
import time
from typing import Any

import pyte

COMMAND = (sys.executable, "-m", "metaalign_edge")


class Terminal:
    """A command and what it has shown that was not asked for yet."""

    def __init__(
        self, *arguments: str, columns: int = 100, kind: str = "dumb", program: tuple[str, ...] = COMMAND
    ) -> None:
        self.process, self.screen = pty.fork(), ""
        if self.process[0] == 0:
            os.environ |= {"TERM": kind, "COLUMNS": str(columns), "LINES": "40"}
            os.execvp(program[0], [*program, *arguments])

    def until(self, text: str, seconds: float = 120, times: int = 1) -> str:
        """Read until a text appears, so many times; return what came with the first and forget it."""
        deadline = time.monotonic() + seconds
        while self.screen.count(text) < times:
            assert self.look(max(0.0, deadline - time.monotonic())), self.screen
        seen, _, self.screen = self.screen.partition(text)
        return seen

    def look(self, seconds: float = 120) -> bool:
        """Take what is shown next; tell whether anything was within this time."""
        ready, _, _ = select.select([self.process[1]], [], [], seconds)
        if ready:
            try:
                self.take(os.read(self.process[1], 65536))
            except OSError:
                raise AssertionError(f"it ended: {self.screen}") from None
        return bool(ready)

    def take(self, data: bytes) -> None:
        self.screen += data.decode("utf-8", "replace").replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self.process[1], text.encode())

    def rest(self, seconds: float = 120) -> str:
        """Read to the end."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(OSError):
            while True:
                ready, _, _ = select.select([self.process[1]], [], [], max(0.0, deadline - time.monotonic()))
                assert ready, f"it does not end: {self.screen}"
                if not (data := os.read(self.process[1], 65536)):
                    break
                self.take(data)
        return self.screen

    def leave(self) -> int:
        with_end = os.waitpid(self.process[0], 0)[1]
        os.close(self.process[1])
        return os.waitstatus_to_exitcode(with_end)


class Emulator(Terminal):
    """A terminal that moves its cursor, erases and answers as a real one; `screen` is what stands on it."""

    def __init__(self, *arguments: str, columns: int = 80, lines: int = 30, program: tuple[str, ...] = COMMAND) -> None:
        super().__init__(*arguments, columns=columns, kind="xterm-256color", program=program)
        fcntl.ioctl(self.process[1], termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        descriptor = self.process[1]

        class Glass(pyte.Screen):
            def write_process_input(self, data: str) -> None:
                os.write(descriptor, data.encode())

        self.glass: Any = Glass(columns, lines)
        self.stream = pyte.ByteStream(self.glass)

    def take(self, data: bytes) -> None:
        self.stream.feed(data)
        self.screen = "\n".join(line.rstrip() for line in self.glass.display).rstrip() + "\n"

    def until(self, text: str, seconds: float = 120, times: int = 1) -> str:
        """Read until a text stands on the screen, so many times; return the screen."""
        super().until(text, seconds, times)
        self.screen = "\n".join(line.rstrip() for line in self.glass.display).rstrip() + "\n"
        return self.screen
