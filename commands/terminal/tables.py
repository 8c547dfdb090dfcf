"""Tables: drawn on a terminal, elsewhere with aligned columns."""

from __future__ import annotations

import io
import shutil


def aligned(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table's lines with aligned columns: the first and the last to the left, those between to the right."""
    cells = [heads, *rows]
    widths = [max(len(row[place]) for row in cells if len(row) > place + 1) for place in range(len(heads) - 1)]
    lines = []
    for first, *figures in cells:
        middle = "".join(f"  {cell:>{width}}" for cell, width in zip(figures[:-1], widths[1:], strict=False))
        lines.append(f"{first:<{widths[0]}}{middle}  {figures[-1] if figures else ''}".rstrip())
    return lines


def rich_table(heads: list[str], rows: list[list[str]]) -> list[str]:
    """Return a table's lines for this terminal, without colours.

    Where the terminal is too narrow, the last column is left out; where it is narrower still, columns are aligned only.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    width = shutil.get_terminal_size().columns
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    taken = [max(len(row[place]) for row in (heads, *rows) if len(row) > place) for place in range(len(heads) - 1)]
    if width < sum(taken[1:]) + 3 * len(taken) + 16:
        return aligned(heads, rows)
    if width < sum(taken) + 3 * len(taken) + 24:
        heads, rows = [*heads[:-1], ""], [row[: len(heads) - 1] for row in rows]
    for place, head in enumerate(heads):
        figures = 0 < place < len(heads) - 1
        table.add_column(Text(head), justify="right" if figures else "left", no_wrap=figures)
    for row in rows:
        table.add_row(*map(Text, row))
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(table)
    return [line.rstrip() for line in buffer.getvalue().splitlines() if line.strip()]
