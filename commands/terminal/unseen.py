"""What is typed while an answer is written: it stays off the screen, and stands at the next prompt."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

from metaalign_edge_runtime.llama.interrupt import undone_at_once


@contextlib.contextmanager
def keys_unseen() -> Iterator[None]:
    """Have the terminal keep keys as they are, without showing them, for the editor that reads them next.

    Ctrl-C and Ctrl-Z work as ever. While the process is stopped, the terminal is as it was before. The editor sets
    modes of its own, and sets back what it found. Without a terminal that has modes, nothing is changed.
    """
    try:
        import termios

        keyboard = sys.stdin.fileno()
        usual = termios.tcgetattr(keyboard)
        stops = signal.getsignal(signal.SIGTSTP)
    except (ImportError, OSError, ValueError, AttributeError, termios.error):  # Windows; stdin is closed or no terminal
        yield
        return

    def to(modes: list[object]) -> None:
        termios.tcsetattr(keyboard, termios.TCSANOW, modes)  # type: ignore[arg-type]

    def stop(number: int, _: object) -> None:
        now = termios.tcgetattr(keyboard)
        to(usual)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # stops here, until the shell's fg or bg
        signal.signal(number, stop)
        if os.tcgetpgrp(keyboard) == os.getpgrp():  # else it goes on in the background
            to(now)

    unseen = termios.tcgetattr(keyboard)
    unseen[0] &= ~termios.ICRNL  # Enter arrives as the editor expects it
    unseen[3] &= ~(termios.ECHO | termios.ICANON | termios.IEXTEN)
    with undone_at_once(lambda: to(usual)):
        to(unseen)
        if stops is signal.SIG_DFL:  # else the shell has no jobs
            signal.signal(signal.SIGTSTP, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTSTP, stops)
            to(usual)
