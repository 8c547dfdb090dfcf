"""Answers that are written together, side by side where there is room."""

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

COLUMN = 24  # characters; with less room than that for each, answers are shown one after the other


class Columns:
    """Answers that are written together: side by side where a terminal is wide enough, else one after the other."""

    def __init__(self, heads: Sequence[str], screen: Screen) -> None:
        self._heads, self._screen = [one_line(head).translate(CONTROLS) for head in heads], screen
        self._texts = [""] * len(heads)
        self._at, self._done = -1, set[int]()  # of those one after the other
        self._live: Any = None
        self._begun = False
        self._shown = hidden_cursor(sys.stdout)
        if screen.terminal and shutil.get_terminal_size().columns >= COLUMN * len(heads):
            from rich.live import Live

            self._live = Live(get_renderable=self._table, transient=True, refresh_per_second=12)

    def __enter__(self) -> Columns:
        return self

    def _begin(self) -> None:
        """Draw the columns at the first piece of an answer: what cannot be answered is refused before that."""
        if self._begun:
            return
        self._begun = True
        if self._live:
            self._shown.__enter__()
            self._live.start()
        else:
            self._head(0)

    def __exit__(self, *_: object) -> None:
        """Leave what was said so far on the screen."""
        if not self._begun:
            return
        if self._live:
            self._live.stop()
            self._shown.__exit__(None, None, None)
            self._live.console.print(self._table())
            return
        for place in range(len(self._heads)):
            self.end(place)

    def _table(self) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        for head in self._heads:
            table.add_column(Text(head), ratio=1, overflow="fold")
        waiting = ["" if place in self._done else "…" for place in range(len(self._texts))]
        table.add_row(
            *(Text(text.translate(CONTROLS) or mark) for text, mark in zip(self._texts, waiting, strict=True))
        )
        return table

    def _head(self, place: int) -> None:
        self._at = place
        self._screen.write(("\n" if place else "") + f"[{self._heads[place]}]\n" + self._texts[place])

    def show(self, place: int, piece: str) -> None:
        """Add to an answer."""
        self._begin()
        self._texts[place] += piece
        if not self._live and place == self._at:
            self._screen.write(piece)

    def end(self, place: int) -> None:
        """Note that an answer is complete."""
        self._begin()
        self._done.add(place)
        while not self._live and self._at in self._done:
            if not self._texts[self._at].endswith("\n"):
                self._screen.write("\n")
            self._at += 1
            if self._at < len(self._heads):
                self._head(self._at)


def answer_together(
    scheduler: Scheduler, dialogs: Sequence[Dialog], columns: Columns | None, screen: Screen, strict: bool
) -> list[Answer]:
    """Answer dialogs in one batch, in columns if there are any; Ctrl-C leaves what has been written.

    Raises:
        EdgeError: one cannot be answered.
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
