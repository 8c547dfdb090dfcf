"""Ctrl-C as a flag, which is checked where it is safe to stop."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, ClassVar

from ..errors import Interrupted


class Interrupt:
    """Ctrl-C as a flag: an exception would be lost in a ctypes callback, or stop Python while llama.cpp computes.

    A second Ctrl-C before the flag is checked ends the process at once. The context manager can be nested.
    """

    undo: ClassVar[list[Callable[[], object]]] = []  # functions that restore the terminal

    def __init__(self) -> None:
        self.raised = False
        self.deadline = math.inf  # of `time.monotonic`, in seconds: then it counts as raised
        self._depth = 0
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # shells do so for background jobs
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
        """Restore the terminal and end the process at once."""
        for undo in reversed(cls.undo):
            with contextlib.suppress(Exception):  # the terminal may be gone
                undo()
        os._exit(code)

    @property
    def due(self) -> bool:
        """Whether to stop: Ctrl-C was pressed, or time is up."""
        return self.raised or time.monotonic() >= self.deadline

    def check(self) -> None:
        """Raise `Interrupted` if it is time to stop."""
        if self.due:
            raise Interrupted("interrupted")


@contextlib.contextmanager
def undone_at_once(undo: Callable[[], object]) -> Iterator[None]:
    """Have `undo` called if the process ends at once within the `with`, as by a second Ctrl-C or by SIGTERM."""
    Interrupt.undo.append(undo)
    main = threading.current_thread() is threading.main_thread()
    first = main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # not a handler of the host's
    if first:
        signal.signal(signal.SIGTERM, lambda *_: Interrupt.leave(128 + signal.SIGTERM))
    try:
        yield
    finally:
        Interrupt.undo.remove(undo)
        if first:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def stopping_at(progress: Callable[[str, int, int], None]) -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback that reports progress and raises `Interrupted` after Ctrl-C.

    KeyboardInterrupt could come at any moment, even while a lock is held that other threads wait for.
    """
    with Interrupt() as interrupt:

        def told(what: str, done: int, total: int) -> None:
            interrupt.check()
            progress(what, done, total)

        yield told
