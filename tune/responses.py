"""Write the response that obeys every preference in force: facts, put into shape."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from metaalign_edge_preferences import Wording
from metaalign_edge_preferences.dialogs import Question, Subject, noun_of, small

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["respond"]

Force = Mapping[str, Wording]  # what is in force, by value key

_LISTS = ("format.bullets", "format.numbered", "format.table")


def respond(question: Question, force: Force) -> str:
    """Return the response to a question that obeys everything in force."""
    shape = next((key for key in force if key.startswith("format.")), "format.plain")
    facts = _sentences(question.subject, force)
    count = 1 if "length.one" in force else len(facts) if "length.long" in force else 3 if shape in _LISTS else 2
    facts = _reworded(facts[:count], question.subject, force)
    before = _before(question, force)
    after = _after(question.subject, force)
    text = _list(facts, before, after, shape) if shape in _LISTS else _prose(facts, before, after, force)
    return _cased(_framed(text, question, force, shape), force)


# --- what is said -----------------------------------------------------------------------------------------------------


def _sentences(subject: Subject, force: Force) -> list[str]:
    """Choose the sentences, the most important first."""
    facts = list(subject.facts)
    mine = [key for key in force if key in subject.by_value]
    if subject.kind in ("opinion", "request"):
        chosen = mine[0] if mine and "stance.open" not in force else None
        return list(subject.by_value[chosen]["answer"]) if chosen else facts
    for key in mine:
        if key.startswith("audience."):
            facts[0] = subject.by_value[key]
        else:  # a measure
            facts.insert(1, subject.by_value[key])
    return facts


def _reworded(facts: list[str], subject: Subject, force: Force) -> list[str]:
    """Change words and signs inside the sentences."""
    if "taboo.unnamed" in force and subject.kind == "topic":
        name = subject.name[0].upper() + subject.name[1:] + " "
        facts = ["It " + fact.removeprefix(name) if fact.startswith(name) else fact for fact in facts]
    if "contractions.yes" in force:
        facts = [_replaced(fact, _words()["short"]) for fact in facts]
    for key, lead in _words()["measure"].items():
        if key in force and key in subject.by_value:
            facts[1:2] = [f"{lead}, {small(fact)}" for fact in facts[1:2]]
    if "exclamation.yes" in force:
        facts = [re.sub(r"\.$", "!", fact) for fact in facts]
    return facts


def _before(question: Question, force: Force) -> str:
    """Return what stands before the first fact, with the comma or colon that joins it."""
    words, text = _words(), ""
    for key, part in words["before"].items():
        if key in force:
            part = _replaced(part, {"{" + slot + "}": said for slot, said in force[key].slots.items()})
            text += (", " + (part if key == "name.name" else small(part))) if text else part
    colon = any(key in force for key in words["punctuation"]["colon"])
    return text + (": " if colon else ", ") if text else ""


def _after(subject: Subject, force: Force) -> list[str]:
    """Return the sentences that follow the facts."""
    slots = {"{tag}": "".join(word[0].upper() + word[1:] for word in noun_of(subject).split())}
    slots |= {"{" + slot + "}": said for w in force.values() for slot, said in w.slots.items()}
    found = [_replaced(text, slots) for key, text in _words()["after"].items() if key in force]
    return [text.replace("!", ".") for text in found] if "exclamation.no" in force else found


def _replaced(text: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        text = text.replace(old, new)
    return text


# --- how it is shaped -------------------------------------------------------------------------------------------------


def _prose(facts: list[str], before: str, after: list[str], force: Force) -> str:
    first = small(facts[0]) if before else facts[0]
    if "bold.yes" in force:
        first = f"**{first}**"
    return ("\n" if "lines.separate" in force else " ").join([before + first, *facts[1:], *after])


def _list(facts: list[str], before: str, after: list[str], shape: str) -> str:
    lines = [before.rstrip(",: ") + ":"] if before else []
    if shape == "format.table":
        lines += [f"| {cell} |" for cell in (_words()["layout"]["table"], "---", *facts)]
    else:
        marks = [f"{n}." if shape == "format.numbered" else "-" for n in range(1, len(facts) + 1)]
        lines += [f"{mark} {fact}" for mark, fact in zip(marks, facts, strict=True)]
    return "\n".join(lines + ([" ".join(after)] if after else []))


def _framed(text: str, question: Question, force: Force, shape: str) -> str:
    """Put what encloses the answer around it: the question, a label, quotation marks, JSON, a title, a fence."""
    layout, between = _words()["layout"], "\n" if shape in _LISTS or "lines.separate" in force else " "
    if "echo.yes" in force:
        asked = " ".join(question.query.split())
        asked = asked if asked[-1] in ".?!" else asked + "."
        text = layout["echo"].replace("{query}", asked) + between + text
    if "label.yes" in force:
        text = layout["label"] + between + text
    if "quotes.yes" in force:
        text = f'"{text}"'
    name = question.subject.name
    title = name[0].upper() + name[1:] if "title.yes" in force else ""
    if shape == "format.json":
        text = json.dumps(({"title": title} if title else {}) | {"answer": text}, ensure_ascii=False)
    elif title:
        text = f"# {title}\n{text}"
    return f"```\n{text}\n```" if "code.yes" in force else text


def _cased(text: str, force: Force) -> str:
    return text.upper() if "case.upper" in force else text.lower() if "case.lower" in force else text


@cache
def _words() -> dict[str, Any]:
    path = Path(__file__).with_name("responses.toml")
    table: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return table
