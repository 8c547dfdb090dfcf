"""The command line in a real pseudo-terminal."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import sys
import time

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

    def until(self, text: str, seconds: float = 30) -> str:
        """Read until a text appears; return what came with it and forget it."""
        deadline = time.monotonic() + seconds
        while text not in self.screen:
            ready, _, _ = select.select([self.process[1]], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, self.screen
            try:
                self.screen += os.read(self.process[1], 65536).decode("utf-8", "replace").replace("\r\n", "\n")
            except OSError:
                raise AssertionError(f"it ended: {self.screen}") from None
        seen, _, self.screen = self.screen.partition(text)
        return seen

    def type(self, text: str) -> None:
        os.write(self.process[1], text.encode())

    def rest(self) -> str:
        """Read to the end."""
        with contextlib.suppress(OSError):
            while data := os.read(self.process[1], 65536):
                self.screen += data.decode("utf-8", "replace").replace("\r\n", "\n")
        return self.screen

    def leave(self) -> int:
        with_end = os.waitpid(self.process[0], 0)[1]
        os.close(self.process[1])
        return os.waitstatus_to_exitcode(with_end)
