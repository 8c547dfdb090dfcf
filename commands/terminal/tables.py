"""Tables: drawn on a terminal, elsewhere with aligned columns."""

from __future__ import annotations

import io
import shutil
import textwrap
from typing import Any

UNBROKEN, SHORT = "\xa0", 20  # a blank at which no line is broken; the characters of a cell that has only such ones
INDENTED: Any = {
    "initial_indent": "    ",
    "subsequent_indent": "    ",
    "break_long_words": False,
    "break_on_hyphens": False,
}  # for textwrap


def aligned(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table's lines with aligned columns: the first and the last to the left, those between to the right."""
    cells = [heads, *rows]
    widths = [max(len(row[place]) for row in cells if len(row) > place + 1) for place in range(len(heads) - 1)]
    lines = []
    for first, *figures in cells:
        middle = "".join(f"  {cell:>{width}}" for cell, width in zip(figures[:-1], widths[1:], strict=False))
        lines.append(f"{first:<{widths[0]}}{middle}  {figures[-1] if figures else ''}".rstrip())
    return lines


def paragraphs(heads: list[str], rows: list[list[str]], width: int) -> list[str]:
    """Return a table's lines as a paragraph for each row: its first cell, and below it the others with their heads."""
    lines = []
    for first, *cells in rows:
        whole = [cell.replace(" ", UNBROKEN) if len(cell) <= SHORT else cell for cell in cells]
        pairs = zip(heads[1:], whole, strict=False)
        named = ", ".join(UNBROKEN.join(filter(None, pair)) for pair in pairs if pair[1])
        lines += [first.rstrip(), *textwrap.wrap(named, width, **INDENTED)]
    return [line.replace(UNBROKEN, " ") for line in lines]


def rich_table(heads: list[str], rows: list[list[str]], spare: bool = False) -> list[str]:
    """Return a table's lines for this terminal, without colours. No word is broken.

    Where the terminal is too narrow, each row is a paragraph; with `spare`, the last column is left out before that.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = shutil.get_terminal_size().columns
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [[row[place] for row in (heads, *rows) if len(row) > place] for place in range(len(heads))]
    *taken, last = [max(map(len, column)) for column in columns]
    words = [max(map(len, " ".join(column).split()), default=0) for column in columns]
    middle = sum(taken[1:]) + 3 * len(taken)
    fits = width >= middle + taken[0] + max(words[-1], min(last, 24))
    if not fits and not (spare and width >= middle + max(words[0], 16)):
        return paragraphs(heads, rows, width)
    if not fits:
        heads, rows = [*heads[:-1], ""], [row[: len(heads) - 1] for row in rows]
    for place, head in enumerate(heads):
        figures = 0 < place < len(heads) - 1
        table.add_column(Text(head), justify="right" if figures else "left", no_wrap=figures)
    for row in rows:
        table.add_row(*map(Text, row))
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(table)
    return [line.rstrip() for line in buffer.getvalue().splitlines() if line.strip()]
