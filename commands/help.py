"""Explain a topic or a command; without one, list the topics."""

from __future__ import annotations

from typing import Annotated

import typer

from metaalign_edge_runtime.errors import UsageError, did_you_mean
from metaalign_edge_runtime.stores import docs

from . import program
from .terminal import pager
from .terminal.screen import Screen


def help(
    topic: Annotated[
        list[str] | None, typer.Argument(metavar="TOPIC", help="A topic, or a command.", show_default=False)
    ] = None,
) -> None:
    """Explain a topic or a command; without one, list the topics.

    At a terminal, what is longer than the screen is shown through $PAGER, else less.

    Examples:

        metaalign-edge help exit-codes

        metaalign-edge help chat

        metaalign-edge help models show
    """
    screen, known, commands = Screen(), docs.topics(), program.commands
    first, *more = topic or [""]
    if not first:
        width = max(map(len, known))
        screen.lines(f"{name:<{width}}  {heading}" for name, (heading, _) in known.items())
    elif first in known and not more:
        heading, text = known[first]
        if screen.terminal:
            pager.show_page(f"# {heading}\n\n{text}")
        else:
            screen.write(f"{heading}\n\n{text}\n")
    elif first in commands:
        program(args=[first, *more, "--help"], prog_name=program.name, standalone_mode=False)
    else:
        alike = did_you_mean(first, [*known, *commands], "`metaalign-edge help` lists them")
        raise UsageError(f"no topic {' '.join([first, *more])!r}: {alike}")
