"""Words that a terminal does not break at its edge, in text that is shown as it is written.

Before a word that would cross the edge, blanks fill the line, and the terminal itself goes on in the next one. It takes
the two for one line, so that a copied paragraph stays a paragraph, with more blanks between some words.
"""

from __future__ import annotations

import os
import shutil

LONGEST = 24  # columns; a longer word may be broken by the terminal
NARROWEST = 40  # columns of a terminal; on a narrower one, half of the text would be blanks
FENCES = ("```", "~~~")
VERBATIM = ("    ", "\t", "|", *FENCES)  # beginnings of lines of code and of tables, whose blanks mean something


class Wrapping:
    """Takes a text in pieces, and returns what is to be shown of it by now: a word near the edge waits for its end."""

    def __init__(self, wanted: bool) -> None:
        """Begin a text; unless `wanted`, its pieces are returned as they are."""
        self._wanted = wanted and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
        self._columns = 0  # of the terminal
        self._line, self._column = "", 0  # what is shown of the line so far, and the columns that its last row takes
        self._word = ""  # held back
        self._in_code = False  # between two fences

    def feed(self, piece: str) -> str:
        """Take the next piece of the text."""
        self._columns = shutil.get_terminal_size().columns
        if not self._wanted or self._columns < NARROWEST:
            return self.rest() + piece
        return "".join(map(self._take, piece))

    def rest(self) -> str:
        """Return the word that is held back."""
        word, self._word = self._word, ""
        return self._place(word)

    def _take(self, letter: str) -> str:
        from rich.cells import cell_len

        if letter == "\n":
            shown = self.rest() + letter
            self._in_code ^= self._line.lstrip().startswith(FENCES)
            self._line, self._column = "", 0
            return shown
        if letter.isspace() or cell_len(letter) == 2:  # the scripts of wide letters break anywhere
            return self.rest() + self._place(letter)
        begins = not self._line or self._line[-1].isspace()
        if not (self._word or (begins and self._is_near_the_edge())):
            return self._place(letter)
        self._word += letter
        if self._column + cell_len(self._word) < self._columns:  # the last column is for the blank behind it
            return ""
        blanks = " " * (self._columns - self._column)
        return self._place(blanks) + self.rest()

    def _is_near_the_edge(self) -> bool:
        verbatim = self._in_code or self._line.startswith(VERBATIM)
        return not verbatim and self._columns - LONGEST < self._column < self._columns

    def _place(self, text: str) -> str:
        """Follow with the cursor a text that is shown; return it."""
        from rich.cells import cell_len

        for letter in text:
            width = 8 - self._column % 8 if letter == "\t" else cell_len(letter)
            self._column = width if self._column + width > self._columns else self._column + width
        self._line += text
        return text
