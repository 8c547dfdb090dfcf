"""Progress bars on stderr, if that is a terminal."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

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
def answers_bar(screen: Screen, name: str, done: int, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show on a terminal's stderr the answers done, their speed, and the time left; yield a function that adds to them.

    Args:
        done: answers of an earlier run.
        total: None: not known.
    """
    if screen.quiet or not at_terminal(sys.stderr):
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    speed = TextColumn("{task.fields[speed]:.1f} answers/s")
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), speed)
    started = time.monotonic()
    bar, console = (*columns, TimeRemainingColumn()), Console(stderr=True)
    with hidden_cursor(sys.stderr), Progress(*bar, console=console, transient=True, redirect_stdout=False) as bars:
        task = bars.add_task(name, total=total, completed=done, speed=0.0)
        added = 0  # in this run: the speed is its own

        def tell(more: int) -> None:
            nonlocal added
            added += more
            bars.update(task, advance=more, speed=added / max(0.001, time.monotonic() - started))

        yield tell
