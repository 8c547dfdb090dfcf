"""Several answers that are written at the same time, side by side where the terminal is wide enough."""

from __future__ import annotations

import contextlib
import functools
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import metaalign_edge as edge
from metaalign_edge import Answer, Dialog, Prompt, Request, Scheduler
from metaalign_edge_runtime.errors import CONTROLS, Interrupted, one_line

from . import report
from .screen import Screen, hidden_cursor
from .wrapping import Wrapping

HEAD_LINES = 4  # of a drawn table: a blank one, the heads, a rule, and a blank one at the end
COLUMN = 24  # the least width of a column in characters; a narrower terminal shows one answer after the other


class Columns:
    """Prints several answers that are written at the same time: side by side, or one after the other.

    One after the other, the text of an answer that is not yet at its turn is held back.
    """

    def __init__(self, heads: Sequence[str], screen: Screen, wrap: bool = False) -> None:
        """Begin. With `wrap`, answers that stand one after the other are wrapped between words (`Wrapping`)."""
        self._wrap = wrap and screen.terminal
        self._words = Wrapping(self._wrap)  # of the answer now printed
        self._heads, self._screen = [one_line(head).translate(CONTROLS) for head in heads], screen
        self._texts = [""] * len(heads)
        self._at, self._done = -1, set[int]()  # one after the other: the answer now printed; those that are complete
        self._live: Any = None
        self._begun = False
        self._shown = hidden_cursor(sys.stdout)
        if screen.terminal and shutil.get_terminal_size().columns >= COLUMN * len(heads):
            from rich.live import Live

            self._live = Live(get_renderable=self._tails, transient=True, refresh_per_second=12)

    def __enter__(self) -> Columns:
        return self

    def _begin(self) -> None:
        """Draw the columns, at the first piece of an answer: an error before it stands on a clean screen."""
        if self._begun:
            return
        self._begun = True
        if self._live:
            self._shown.__enter__()
            self._live.start()
        else:
            self._head(0)

    def __exit__(self, *_: object) -> None:
        """Leave the answers on the screen as they are by now."""
        if not self._begun:
            return
        if self._live:
            self._live.stop()
            self._shown.__exit__(None, None, None)
            self._live.console.print(self._table())
            return
        for place in range(len(self._heads)):
            self.end(place)

    def _tails(self) -> Any:
        """Return the table as far as it fits the screen: of each answer what was written last."""
        return self._table(max(1, shutil.get_terminal_size().lines - HEAD_LINES))

    def _table(self, most: int | None = None) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        class Tail(Text):
            """A text of which the last lines are shown."""

            def __rich_console__(self, console: Any, options: Any) -> Any:
                yield from self.wrap(console, options.max_width)[-(most or 0) :]

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        for head in self._heads:
            table.add_column(Text(head), ratio=1, overflow="fold")
        waiting = ["" if place in self._done else "…" for place in range(len(self._texts))]
        table.add_row(
            *(Tail(text.translate(CONTROLS) or mark) for text, mark in zip(self._texts, waiting, strict=True))
        )
        return table

    def _head(self, place: int) -> None:
        self._at, self._words = place, Wrapping(self._wrap)
        head = ("\n" if place else "") + f"[{self._heads[place]}]\n"
        self._screen.write(head + self._words.feed(self._texts[place]))

    def show(self, place: int, piece: str) -> None:
        """Add a piece of text to the answer at a place."""
        self._begin()
        self._texts[place] += piece
        if not self._live and place == self._at:
            self._screen.write(self._words.feed(piece))

    def end(self, place: int) -> None:
        """Take the answer at a place as complete."""
        self._begin()
        self._done.add(place)
        while not self._live and self._at in self._done:
            self._screen.write(self._words.rest() + ("" if self._texts[self._at].endswith("\n") else "\n"))
            self._at += 1
            if self._at < len(self._heads):
                self._head(self._at)


def answer_together(
    scheduler: Scheduler, dialogs: Sequence[Dialog], columns: Columns | None, screen: Screen, strict: bool
) -> list[Answer]:
    """Answer several dialogs at the same time, shown in `columns` if given. Ctrl-C ends them and keeps what they said.

    Raises:
        EdgeError: a dialog cannot be answered.
    """
    answers: list[Answer] = []

    def before(prompt: Prompt) -> None:
        answers.append(prompt.answer)
        report.warn(prompt, screen, strict)

    show, seed = columns.show if columns else lambda _place, _piece: None, scheduler.settings.seed
    requests = [Request(one, seed, at, show=functools.partial(show, at)) for at, one in enumerate(dialogs)]
    with contextlib.suppress(Interrupted):
        for request, answer in scheduler.run(requests, before):
            edge.answered(answer)
            if columns:
                columns.end(request.tag)
    return answers
