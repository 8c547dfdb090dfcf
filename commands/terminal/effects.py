"""Notes on stderr about options that change nothing with the template that was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import metaalign_edge as edge
from metaalign_edge import ChatTemplate, RenderOptions

from .screen import Screen

OTHER_WAYS = ("reasoning_effort", "thinking_budget")  # by which a template without on and off lets itself be told


def without_effect(chat: ChatTemplate, options: RenderOptions) -> Iterator[tuple[str, str]]:
    """Yield the options of the command line that change nothing: the name of each, and what is to be said."""
    if options.think is not None and not edge.obeys_think(chat, options):
        yield "think", f"--{'think' if options.think else 'no-think'} changes nothing: {same_either_way(chat)}"
    for name in options.template_args:
        if not chat.template.mentions(name):
            yield "template_arg", f"--template-arg {name} changes nothing: the template {chat.name} does not mention it"


def same_either_way(chat: ChatTemplate) -> str:
    """Say that a template has no switch for thinking, and what it has instead."""
    others = [f"--template-arg {name}=…" for name in OTHER_WAYS if chat.template.mentions(name)]
    said = f"the template {chat.name} makes the same prompt either way"
    return f"{said} (it takes {' and '.join(others)})" if others else said


def note_without_effect(chat: ChatTemplate, options: RenderOptions, sources: Mapping[str, str], screen: Screen) -> None:
    """Say which options change nothing. What a file sets for all models is said with -v only.

    Args:
        sources: what gave each option its value.
    """
    for name, text in without_effect(chat, options):
        tell = screen.note if sources.get(name, "flag") == "flag" else screen.detail
        tell(f"metaalign-edge: note: {text}")
