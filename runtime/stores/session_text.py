"""A conversation as text, as Markdown and as JSON."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import counted, shortened
from .sessions import STAMP, Conversation

LABEL = 24  # the most characters of a preference's short form
AROUND = 30  # characters on each side of a text that is found


def label_of(preferences: Sequence[str]) -> str:
    """Return a short form of preferences: the names of profiles, or the beginning of a text."""
    return shortened("+".join(preferences), LABEL)


def tiers_and_texts(conversation: Conversation) -> Iterator[tuple[str, str]]:
    """Yield the tier and text of every query and response in order, and of the meta-prompt wherever it changes."""
    shown = {"system_info": "", "user_info": ""}
    turns = conversation.turns()
    for place, turn in enumerate(turns):
        if place and turns[place - 1]["forgotten"] and not turn["forgotten"]:
            yield "forgotten", "What was said up to here was forgotten."
        for tier, name in (("system_info", "System Info"), ("user_info", "User Info")):
            if turn[tier] != shown[tier]:
                shown[tier] = turn[tier]
                yield name, turn[tier] or "(none)"
        yield "User Query", turn["query"]
        cut = " (interrupted)" if turn.get("finish_reason") == "interrupted" else ""
        yield "Response", (turn["response"].strip("\n") + cut).strip()


def as_markdown(conversation: Conversation) -> str:
    """Return a conversation as Markdown: what the model was told as a quotation, its responses as they are."""
    parts = [f"# {conversation.name or 'Conversation'}"]
    for tier, text in tiers_and_texts(conversation):
        quoted = f"**{tier}:** {text}".replace("\n", "\n> ")
        parts.append({"Response": text, "forgotten": f"---\n\n*{text}*"}.get(tier, f"> {quoted}"))
    return "\n\n".join(parts) + "\n"


def as_text(conversation: Conversation) -> str:
    """Return a conversation as it looks at a terminal."""
    parts = []
    for tier, text in tiers_and_texts(conversation):
        head = {"Response": "", "User Query": "\n> ", "forgotten": "\n"}.get(tier, f"\n{tier}: ")
        parts.append(head + text + "\n")
    return "".join(parts).removeprefix("\n")


def as_document(conversation: Conversation) -> dict[str, Any]:
    """Return a conversation as `--json` prints it: each turn with its meta-prompt."""
    own = ("kind", "model_path")  # of this machine
    turns = [{name: value for name, value in turn.items() if name not in own} for turn in conversation.turns()]
    return {"session": conversation.name, "created": conversation.lines[0].get("at"), "turns": turns}


def exported(conversation: Conversation, form: str) -> str:
    """Return a conversation as `md` or `json`."""
    if form == "md":
        return as_markdown(conversation)
    return json.dumps(as_document(conversation), ensure_ascii=False, indent=2) + "\n"


def search(conversation: Conversation, text: str) -> Iterator[dict[str, Any]]:
    """Yield the turns whose query or response contains a text, upper or lower case, however its lines are broken.

    Yields:
        `sessions search --json`: the number of the turn, its time, `query` or `response`, and the text around it.
    """
    import re

    wanted = re.compile(re.escape(" ".join(text.split())), re.IGNORECASE)
    for number, turn in enumerate(conversation.turns(), 1):
        for tier in ("query", "response"):
            said = " ".join(turn[tier].split())
            if at := wanted.search(said):
                begin, end = max(0, at.start() - AROUND), at.end() + AROUND
                excerpt = f"{'…' if begin else ''}{said[begin:end]}{'…' if end < len(said) else ''}"
                yield {"turn": number, "at": turn.get("at"), "tier": tier, "excerpt": excerpt}
                break


def on_clock(when: float) -> str:
    """Return a time (seconds since 1970) in local time."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


def local_time(stamp: str) -> str:
    """Return a time of a session's file in local time; a text that is no time, as it is."""
    import calendar

    try:
        return on_clock(calendar.timegm(time.strptime(stamp, STAMP)))
    except ValueError:
        return stamp


def describe_session(conversation: Conversation) -> str:
    """Sum up a session in one line."""
    turns = conversation.pairs()
    return (
        f"session {conversation.name}: {counted(len(turns), 'turn')} so far"
        if turns
        else f"session {conversation.name} begins"
    )
