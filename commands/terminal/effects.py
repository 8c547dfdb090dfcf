"""Notes on stderr about options that change nothing with the template that was chosen."""

from __future__ import annotations

from collections.abc import Iterator

import metaalign_edge as edge
from metaalign_edge import ChatTemplate, RenderOptions, Settings
from metaalign_edge_runtime.structured import hint

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


def note_without_effect(chat: ChatTemplate, options: RenderOptions, settings: Settings, screen: Screen) -> None:
    """Say which options change nothing, and of a schema that it is not told. Of files' options -v alone says it."""
    for name, text in without_effect(chat, options):
        tell = screen.note if settings.sources.get(name, "flag") == "flag" else screen.detail
        tell(f"metaalign-edge: note: {text}")
    if settings.schema and options.schema_hint and hint.is_too_long(settings.schema):
        said = f"the model is not told the schema, which has more than {hint.HINT_LIMIT:,} characters"
        screen.note(f"metaalign-edge: note: {said}: say in the question what you want")
