"""What one rendering may spend: steps, processor time, and memory, which is asked for before it is taken."""

from __future__ import annotations

import time
from typing import NoReturn

STEPS = 1_000_000  # parts of a template that are evaluated; real templates need some thousands
SECONDS = 5.0  # of this thread's processor time: a process that was stopped for a while has not spent them
TEXT = 1 << 24  # characters of one string, and as many operations of one call on strings times eight
ITEMS = 1 << 17  # values in one list or dict, and pieces of one string
BYTES = 1 << 28  # of memory that everything made in one rendering would take if nothing were freed
STEPS_PER_LETTER, BYTES_PER_LETTER = 4, 2048  # more of them for each character that the dialog has
WIDTH = 16  # columns of an indent; a format may pad to three digits
BITS = 60  # of a number: Python's hash of a larger one is not the number, and many can be chosen to have the same


class OverBudget(Exception):
    """A template spends more than a chat template ever needs."""


class NotAllowed(Exception):
    """A template does what no chat template needs and the tiers' text could not be followed through."""


class Budget:
    """The rest of what a rendering may spend.

    Args:
        letters: characters that the rendering is given: a long dialog may need more.
    """

    def __init__(self, letters: int) -> None:
        self.steps = STEPS + STEPS_PER_LETTER * letters
        self.bytes = BYTES + BYTES_PER_LETTER * letters
        self.text = TEXT + 4 * letters
        self._end = time.thread_time() + SECONDS

    def step(self) -> None:
        """Take one step."""
        self.steps -= 1
        if not self.steps & 63:
            self.check()

    def check(self) -> None:
        """Look at the clock of this thread."""
        if self.steps <= 0:
            raise OverBudget("it takes more steps than any chat template needs")
        if time.thread_time() > self._end:
            raise OverBudget(f"it takes more than {SECONDS:g} seconds of processor time")

    def room_for(self, letters: int, like: str = "") -> None:
        """Ask for room for a string of so many characters that is made of `like`."""
        self.step()
        if letters > self.text:
            self.too_large()
        overhead = 64 if type(like) is str else 512  # a string with owners is some objects more
        self._take(overhead + letters * (1 if like.isascii() else 4))

    def room_for_items(self, count: int) -> None:
        """Ask for room for a list or a dict of so many values."""
        self.step()
        if count > ITEMS:
            self.too_large()
        self._take(64 + 100 * count)

    def room_for_number(self, number: object) -> None:
        """Refuse a number that is too large."""
        if isinstance(number, int) and number.bit_length() > BITS:
            self.too_large()

    def work(self, operations: int) -> None:
        """Refuse a call of Python's own that would take so many operations: nothing can stop it once it runs."""
        self.check()
        if operations > 8 * self.text:
            raise OverBudget("it compares more text than any chat template needs")

    def _take(self, size: int) -> None:
        self.bytes -= size
        if self.bytes < 0:
            raise OverBudget("it takes more memory than any chat template needs")

    @staticmethod
    def too_large() -> NoReturn:
        """Refuse a value."""
        raise OverBudget("it makes a value larger than any chat template needs")
