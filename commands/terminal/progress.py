"""Progress bars on stderr, if that is a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import metaalign_edge as edge
from metaalign_edge import Scheduler
from metaalign_edge_runtime.errors import counted

from .screen import Screen, at_terminal, hidden_cursor


@contextlib.contextmanager
def progress_bar(screen: Screen) -> Iterator[Callable[[str, int, int], None]]:
    """Show a progress bar on a terminal's stderr; yield a function that takes a name, bytes done, and their total."""
    if screen.quiet or not at_terminal(sys.stderr):
        yield lambda _what, _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    name, size = TextColumn("{task.description}", markup=False), DownloadColumn()
    columns = (name, BarColumn(), size, TransferSpeedColumn(), TimeRemainingColumn())
    with hidden_cursor(sys.stderr), Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total)


@contextlib.contextmanager
def answers_bar(screen: Screen, name: str, done: int, total: int | None) -> Iterator[Callable[[int, int], None]]:
    """Show on a terminal's stderr the answers done, their speed, and the time left; yield a function that adds to them.

    That function takes the answers that were written since the last call, and those that were there already.

    Args:
        done: answers of an earlier run.
        total: None: not known.
    """
    if screen.quiet or not at_terminal(sys.stderr):
        yield lambda _written, _there: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    shown = TextColumn("{task.fields[speed]:.1f} answers/s, {task.fields[left]} left,")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(16), MofNCompleteColumn(), shown)
    started = time.monotonic()
    bar, console = (*columns, TimeElapsedColumn()), Console(stderr=True)
    with hidden_cursor(sys.stderr), Progress(*bar, console=console, transient=True, redirect_stdout=False) as bars:
        task = bars.add_task(name, total=total, completed=done, speed=0.0, left="-:--:--")
        added = 0  # in this run: the speed is its own

        def tell(written: int, there: int) -> None:
            nonlocal added, done
            added, done = added + written, done + written + there
            speed = added / max(0.001, time.monotonic() - started)
            if total is not None and speed:
                bars.update(task, left=timedelta(seconds=int(max(0, total - done) / speed)))
            bars.update(task, completed=done, speed=speed)

        yield tell


def of_answers(scheduler: Scheduler, unseen: bool) -> Callable[[], str]:
    """Return a function that says how far the answers in hand are, in tokens.

    Args:
        unseen: say how many tokens are written, too: the text is not shown as it comes.
    """

    def describe() -> str:
        found = edge.progress(scheduler)
        if not found:
            return "preparing the prompt"
        read, written = sum(one.read for one in found), sum(one.written for one in found)
        if total := sum(one.prompt for one in found if not one.written):
            read = sum(one.read for one in found if not one.written)
            what = "the prompt" if len(found) == 1 else f"{len(found)} prompts"
            return f"reading {what}: {read:,} of {counted(total, 'token')}"
        return f"writing: {counted(written, 'token')}" if unseen else ""

    return describe
