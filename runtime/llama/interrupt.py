"""Ctrl-C as a flag, which is looked at where it is safe to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, ClassVar

from ..errors import Interrupted


class Interrupt:
    """Ctrl-C as a flag: an exception inside a ctypes callback would be lost, and llama.cpp be left in the middle.

    A second Ctrl-C while the first is still being honoured ends the process at once. One `with` may hold another.
    """

    undo: ClassVar[list[Callable[[], object]]] = []  # gives a terminal back what was taken from it

    def __init__(self) -> None:
        self.raised = False
        self._depth = 0
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # a script's background job: its Ctrl-C is not ours
        if not self._depth and threading.current_thread() is threading.main_thread() and not ignored:
            self._before = signal.signal(signal.SIGINT, self._raise)
        self._depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if not self._depth and self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            self._before = None

    def _raise(self, number: int, frame: object) -> None:
        if self.raised:
            self.leave(Interrupted.exit_code)
        self.raised = True

    @classmethod
    def leave(cls, code: int) -> None:
        """End the process at once, from wherever it is."""
        for undo in reversed(cls.undo):
            with contextlib.suppress(Exception):  # the terminal may be gone
                undo()
        os._exit(code)

    def check(self) -> None:
        """Raise `Interrupted` if Ctrl-C was pressed."""
        if self.raised:
            raise Interrupted("interrupted")


@contextlib.contextmanager
def undone_at_once(undo: Callable[[], object]) -> Iterator[None]:
    """Have what ends the process at once, as a second Ctrl-C, undo what is done to the terminal inside."""
    Interrupt.undo.append(undo)
    try:
        yield
    finally:
        Interrupt.undo.remove(undo)


@contextlib.contextmanager
def stopping_at(progress: Callable[[str, int, int], None]) -> Iterator[Callable[[str, int, int], None]]:
    """Yield what tells of progress, too, but raises `Interrupted` after Ctrl-C.

    An exception that comes at any moment may find a lock taken that other threads wait for.
    """
    with Interrupt() as interrupt:

        def told(what: str, done: int, total: int) -> None:
            interrupt.check()
            progress(what, done, total)

        yield told
