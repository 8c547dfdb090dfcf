"""A model that the threads of a program share: one after the other has access, and closing it stops an answer."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ..errors import Interrupted, UsageError
from . import library
from .interrupt import Interrupt

if TYPE_CHECKING:
    from typing_extensions import Self


class AnswerTimeout(TimeoutError):
    """Time was up before an answer was complete.

    Attributes:
        answers: what was written by then, `interrupted` their finish reason; none if the call still waited for another.
    """

    def __init__(self, seconds: float, answers: list[Any]) -> None:
        super().__init__(f"the answer was not complete after {seconds:g} seconds")
        self.answers = answers


class Access:
    """A call's access to a model. A `with` waits for it, and ends it.

    Raises:
        UsageError: the time limit is no number of seconds.
    """

    def __init__(self, sharing: Sharing, seconds: float | None) -> None:
        if seconds is not None and not seconds >= 0:
            raise UsageError(f"timeout takes a number of seconds from 0 on, not {seconds}")
        self._sharing, self._seconds = sharing, math.inf if seconds is None else seconds
        self.deadline = time.monotonic() + self._seconds
        self.given_up = False  # its stream was closed by another thread
        self.readers: set[int] = set()  # the threads that have read from it
        self.answers: list[Any] = []  # those that have begun

    def __enter__(self) -> Self:
        """Wait until no other call has access.

        Raises:
            RuntimeError: the model is closed, or this thread itself is in the middle of an answer. AnswerTimeout: time
                is up. Interrupted: it was given up meanwhile.
        """
        self.readers.add(threading.get_ident())
        self._sharing.begin(self)
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        """End the access. An interrupted one says why, unless it was given up.

        Raises:
            RuntimeError: the model was closed. AnswerTimeout: time was up. KeyboardInterrupt: it was Ctrl-C.
        """
        self._sharing.end(self)
        if not isinstance(error, Interrupted) or self.given_up:
            return
        if why := self._sharing.unusable():
            raise RuntimeError(why) from None
        self.check_time()
        raise KeyboardInterrupt from None

    def check_time(self) -> None:
        """Raise `AnswerTimeout` if time is up."""
        if time.monotonic() >= self.deadline:
            raise AnswerTimeout(self._seconds, self.answers) from None

    def give_up(self) -> None:
        """Stop the answer, or the wait for it, from another thread."""
        self._sharing.give_up(self)


class Sharing:
    """Gives the threads that share a model access, one at a time, and keeps it from being freed while it computes.

    Access lasts as long as an answer. Between two pieces of a stream nothing computes: `work` does. So the model can be
    closed although a stream that nobody reads any more still has access.
    """

    def __init__(self, interrupt: Interrupt) -> None:
        self.interrupt = interrupt
        self._process, self._used, self._closed = os.getpid(), False, False
        self._changed = threading.Condition()
        self._current: Access | None = None
        self._work, self._worker = threading.Lock(), 0  # the thread that computes, 0 if none does

    def unusable(self) -> str:
        """Say why the model cannot be used in this process any more; an empty text if it can be."""
        if self._in_child():
            if self._used or library.drives_gpu():  # its threads, and a GPU's driver, are the parent's
                return "the model was opened before a fork: open it in the child process"
            self._process = os.getpid()
        return "the model is closed" if self._closed else ""

    def check(self) -> None:
        """Raise RuntimeError if the model cannot be used any more."""
        if why := self.unusable():
            raise RuntimeError(why)

    def begin(self, access: Access) -> None:
        """Wait for access; see there for what is raised."""
        self.check()  # before any lock: a fork copies locks that nobody will release
        self._used = True
        with self._changed:
            while self._current:
                if self._current.readers == {threading.get_ident()}:
                    raise RuntimeError("an answer is still being written: read its stream to the end, or close it")
                self._check_wait(access)
                left = access.deadline - time.monotonic()
                self._changed.wait(None if left == math.inf else min(max(left, 0), threading.TIMEOUT_MAX))
            self._check_wait(access)
            self._current = access
            self.interrupt.raised, self.interrupt.deadline = False, access.deadline

    def _check_wait(self, access: Access) -> None:
        self.check()
        access.check_time()
        if access.given_up:
            raise Interrupted("closed")

    def end(self, access: Access) -> None:
        """Let the next call have access."""
        if self._in_child():
            return
        with self._changed:
            if self._current is access:
                self._current = None
                self._changed.notify()

    def give_up(self, access: Access) -> None:
        """Stop an answer, or the wait for access."""
        access.given_up = True
        if self._in_child():
            return
        with self._changed:
            if self._current is access:
                self.interrupt.raised = True
            self._changed.notify_all()

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Compute: meanwhile the model is not freed.

        Raises:
            RuntimeError: the model is closed.
        """
        self.check()
        with self._work:
            self.check()
            self._worker = threading.get_ident()
            try:
                yield
            finally:
                self._worker = 0

    def close(self, free: Callable[[], None]) -> None:
        """Stop the answer that is being written, and free what it used. A child of a fork frees nothing.

        Raises:
            RuntimeError: this thread itself computes, and calls this from a signal handler.
        """
        if self._in_child():
            return
        with self._changed:
            self._closed = True
            if self._current:
                self.interrupt.raised = True
            self._changed.notify_all()
        if self._worker == threading.get_ident():
            raise RuntimeError("an answer is being written in this very thread: close the model when it has stopped")
        with self._work:
            free()

    def _in_child(self) -> bool:
        return self._process != os.getpid()
