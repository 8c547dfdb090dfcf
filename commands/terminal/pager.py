"""Show a page of Markdown at a terminal: rendered, and through a pager if it is longer than the screen."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import shutil
import subprocess
import sys

WIDEST = 100  # columns; the eye loses its way in longer lines
NOT_STARTED = (126, 127)  # exit codes of a shell whose command is no program, or not there


def show_page(markdown: str) -> None:
    """Render a page, and show it through a pager unless it fits the screen or there is no pager."""
    size, command = shutil.get_terminal_size(), pager_command()
    width = min(size.columns, WIDEST)
    page = rendered(markdown, width, styled=True)
    if command and page.count("\n") >= size.lines:
        less = os.path.basename(shlex.split(command)[0]) == "less"
        if run_pager(command, page if less else rendered(markdown, width, styled=False)):
            return
    sys.stdout.write(page)
    sys.stdout.flush()


def rendered(markdown: str, width: int, styled: bool) -> str:
    """Return Markdown laid out for some columns; with the styles that this terminal knows, if `styled`."""
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.markdown import Markdown, TableElement

    class WholeTable(TableElement):
        """A table that breaks what is wider than its column, where Rich would cut it off."""

        def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
            for table in super().__rich_console__(console, options):
                for column in getattr(table, "columns", ()):
                    column.overflow = "fold"
                yield table

    class Page(Markdown):
        elements = {**Markdown.elements, "table_open": WholeTable}  # noqa: RUF012  as Rich declares it

    console = Console(width=width) if styled else Console(width=width, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(Page(markdown, hyperlinks=False))  # a link shows where it leads
    return captured.get()


def pager_command() -> str | None:
    """Return the command line of the user's pager ($PAGER, else less or more); None if there is none to be used."""
    if not sys.stdin.isatty() or os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return None
    for command in [os.environ["PAGER"]] if "PAGER" in os.environ else ["less", "more"]:
        with contextlib.suppress(ValueError):  # a quote is left open
            words = shlex.split(command)
            if words and words[0] != "cat" and shutil.which(words[0]):
                return command
    return None


def run_pager(command: str, page: str) -> bool:
    """Let a pager show a page, and wait until the user leaves it; tell whether it could be started.

    Ctrl-C is the pager's while it runs: in `less` it stops a search.
    """
    # -R shows styles, -F and -X leave what was read on the screen; LESS may end with an option that takes a text
    environment = {**os.environ, "LESS": f"-R {os.environ['LESS']}" if "LESS" in os.environ else "-FRX"}
    try:
        pager = subprocess.Popen(command, shell=True, stdin=subprocess.PIPE, env=environment)
    except OSError:
        return False
    assert pager.stdin
    with contextlib.suppress(OSError, KeyboardInterrupt), pager.stdin as file:  # the user may have left it already
        file.write(page.encode(sys.stdout.encoding or "utf-8", "replace"))
    while True:
        try:
            return pager.wait() not in NOT_STARTED
        except KeyboardInterrupt:
            continue
