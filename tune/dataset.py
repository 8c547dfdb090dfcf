"""Generate the demo model's training dialogs, and its test dialogs, from data.

A program writes every response from facts (topics.toml, opinions.toml, smalltalk.toml) and the preferences in force
(preferences/), so each row is correct by construction, and the checkers that obedience is measured with later hold for
every trained response. Row `i` of a seed is a pure function of `(seed, i)`: training can stop and resume anywhere.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from metaalign_edge_preferences import Wording, families, neutral_lines, values, word
from metaalign_edge_preferences.checkers import CHECKERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Check", "Plan", "Row", "Turn", "held_out_pair", "row", "rows", "subjects", "write_row"]

_FOLDER = Path(__file__).parent
_HELD_OUT_PAIRS = 12  # one pair of topic and value in so many is kept from training
_HELD_OUT_UNKNOWN = 8  # so is one unknown noun or question in so many
# as usual, and where a row is to be hard: how often each kind of subject; none to three preferences; a contradiction
_KINDS = ((68, 16, 12, 4), (64, 14, 18, 4))
_COUNTS = ((12, 40, 29, 19), (6, 34, 30, 30))
_CONFLICTS = (0.2, 0.5)


@dataclass(frozen=True)
class Subject:
    """What a question can be about, with everything a response may say of it."""

    kind: str  # topic, opinion, smalltalk, unknown
    name: str
    ask: tuple[str, ...]  # noun phrases of a topic, else whole questions
    facts: tuple[str, ...]
    by_value: Mapping[str, Any] = field(default_factory=dict, hash=False)  # "audience.child" -> first fact, and so on


@dataclass(frozen=True)
class Check:
    """One thing that a program can verify of the last response."""

    key: str  # the preference, family.value
    checker: str
    parameters: Mapping[str, Any] = field(hash=False)

    def holds(self, response: str) -> bool:
        """Tell whether a response satisfies the check."""
        return bool(CHECKERS[self.checker](response, **self.parameters))


@dataclass(frozen=True)
class Turn:
    """A question, the response, and whether the response is trained on."""

    query: str
    response: str
    trained: bool = True  # False where the response followed a meta-prompt that has been replaced since


@dataclass(frozen=True)
class Row:
    """A dialog; the response of the last turn is the one that is evaluated."""

    system_info: str
    user_info: str
    turns: tuple[Turn, ...]
    kind: str  # of the last turn's subject
    checks: tuple[Check, ...] = ()  # what the last response satisfies
    losing: tuple[Check, ...] = ()  # in a conflict: what the User Info asked for in vain
    wordings: tuple[Wording, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Plan:
    """What a row shall be like. Unset fields are drawn at random, as training draws them."""

    kind: str | None = None  # topic, opinion, smalltalk, unknown
    values: tuple[str, ...] | None = None  # keys of the values in force
    tiers: tuple[str, ...] | None = None  # where they stand
    losing: str | None = None  # a value in User Info that System Info overrides
    turns: int | None = None
    split: str = "seen"  # of the wordings, of names, and of unknown subjects
    subject: str | None = None  # a topic's name
    changed: bool | None = None  # whether earlier turns followed another meta-prompt
    held_out_pair: bool = False  # a topic and a value that are never trained together
    held_out_query: bool = False  # a form of question that is never trained on
    background: str | None = None  # a value of the family background; "" for none
    hard: bool = False  # more contradictions, more preferences at once, and questions that look like either


# --- what there is to say ---------------------------------------------------------------------------------------------


@cache
def subjects(kind: str) -> tuple[Subject, ...]:
    """Return all topics, opinions or kinds of smalltalk."""
    if kind == "topic":
        return tuple(_topic(table) for table in _read("topics.toml")["topics"])
    if kind == "opinion":
        return tuple(_opinion(table) for table in _read("opinions.toml")["opinions"])
    talk = _read("smalltalk.toml")
    if kind == "smalltalk":
        return tuple(Subject(kind, t["name"], tuple(t["ask"]), tuple(t["answer"])) for t in talk["smalltalk"])
    unknown = talk["unknown"]
    return (Subject("unknown", unknown["name"], tuple(unknown["ask"]), tuple(unknown["answer"])),)


def held_out_pair(topic: str, key: str) -> bool:
    """Tell whether a topic and a value are kept apart in training, to see whether the value carries over."""
    family = families()[key.partition(".")[0]]
    return family.transfer and family.name != "name" and _digest(f"{topic}/{key}") % _HELD_OUT_PAIRS == 0


def _topic(table: Mapping[str, Any]) -> Subject:
    by_value = {"audience.child": table["child"], "audience.expert": table["expert"]}
    by_value |= {f"units.{system}": table[system] for system in ("metric", "imperial") if system in table}
    return Subject("topic", table["name"], tuple(table["ask"]), tuple(table["facts"]), by_value)


def _opinion(table: Mapping[str, Any]) -> Subject:
    stances = {f"background.{k}": v for k, v in table.items() if isinstance(v, dict)}
    return Subject("opinion", table["name"], tuple(table["ask"]), tuple(table["open"]), stances)


# --- rows -------------------------------------------------------------------------------------------------------------


def rows(seed: int, start: int = 0) -> Iterator[Row]:
    """Yield training rows without end, from row `start`."""
    index = start
    while True:
        yield row(seed, index)
        index += 1


def row(seed: int, index: int, hard: bool = False) -> Row:
    """Return one training row, a pure function of its arguments. hard: see ``Plan``."""
    return write_row(Random(f"{seed}/{index}"), Plan(hard=hard))


def write_row(rng: Random, plan: Plan) -> Row:
    """Write a dialog that fits the plan; what the plan leaves open is drawn."""
    kind = plan.kind or rng.choices(("topic", "opinion", "unknown", "smalltalk"), _KINDS[plan.hard])[0]
    head = _draw_head(rng, plan, kind)
    subject = _draw_subject(rng, kind, plan, head)
    count = plan.turns or rng.choices((1, 2, 3), (66, 20, 14))[0]
    changed = plan.changed if plan.changed is not None else rng.random() < 0.4
    # earlier turns: under this meta-prompt, or under one that has been replaced since
    other = _draw_head(rng, Plan(), "topic") if changed else head
    first_trained = rng.randrange(1, count) if changed and count > 1 and plan.changed is None else count - 1
    turns: list[Turn] = []
    previous: Subject | None = None
    for number in range(count):
        last = number == count - 1
        trained = last or not changed or number >= first_trained
        again = previous is not None and previous.kind == "topic" and rng.random() < 0.2
        now = subject if last else _draw_subject(rng, rng.choice(("topic", "topic", "topic", kind)), Plan(), head)
        free = not last or (plan.subject is None and kind == "topic")  # the plan may want something else here
        if again and free and previous is not None and _may_meet(previous, head):
            query, now = rng.choice(_read("voice.toml")["queries"]["again"]), previous
        else:
            query = _query(rng, now, plan, later=number > 0)
        turns.append(Turn(query, _respond(now, head if trained else other)[0], trained))
        previous = now
    return Row(
        system_info=_join(rng, head.system, "system"),
        user_info=_join(rng, head.user, "user"),
        turns=tuple(turns),
        kind=now.kind,
        checks=_respond(now, head)[1],
        losing=tuple(_check(w) for w in head.losing),
        wordings=head.system + head.user,
    )


@dataclass(frozen=True)
class _Head:
    """A meta-prompt: what each tier says, and what is in force."""

    system: tuple[Wording, ...]
    user: tuple[Wording, ...]
    losing: tuple[Wording, ...] = ()  # stand in User Info, overridden by System Info

    @property
    def force(self) -> dict[str, Wording]:
        """Return what is in force, by value key, backgrounds included."""
        return {w.value.key: w for w in self.system + self.user if w not in self.losing}


def _draw_head(rng: Random, plan: Plan, kind: str) -> _Head:
    """Draw preferences for both tiers; what is in force can be obeyed all at once."""
    while True:
        keys = plan.values if plan.values is not None else _draw_values(rng, plan.hard)
        if _compatible(keys + ((plan.losing,) if plan.losing else ())):
            break
    tiers = plan.tiers or tuple("system" if rng.random() < 0.38 else "user" for _ in keys)
    losing = plan.losing
    if losing is None and plan.values is None and keys and rng.random() < _CONFLICTS[plan.hard]:
        # a conflict: the first preference moves to System Info, an opposite value stands in User Info
        tiers = ("system", *tiers[1:])
        losing = _opposite(rng, keys[0])
    system: list[Wording] = []
    user: list[Wording] = []
    for key, tier in zip(keys, tiers, strict=True):
        (system if tier == "system" else user).append(word(values()[key], plan.split, rng))
    lost = [word(values()[losing], plan.split, rng)] if losing else []
    user += lost
    background = plan.background
    if background is None:
        background = _draw_background(rng, kind, bool(keys))
    if background:
        split = "seen" if plan.split == "combination" else plan.split
        user.append(word(values()[f"background.{background}"], split, rng))
    rng.shuffle(system)
    rng.shuffle(user)
    return _Head(tuple(system), tuple(user), tuple(lost))


def _draw_values(rng: Random, hard: bool) -> tuple[str, ...]:
    """Draw none to three values of different families."""
    names = [f.name for f in families().values() if f.name != "background" for _ in range(f.weight)]
    count = rng.choices((0, 1, 2, 3), _COUNTS[hard])[0]
    chosen: list[str] = []
    while len(chosen) < count:
        name = rng.choice(names)
        if all(key.partition(".")[0] != name for key in chosen):
            chosen.append(rng.choice(families()[name].values).key)
    return tuple(chosen)


def _draw_background(rng: Random, kind: str, others: bool) -> str:
    if rng.random() < (0.7 if kind == "opinion" else 0.04 if others else 0.08):
        return str(rng.choice(families()["background"].values).name)
    return ""


def _opposite(rng: Random, key: str) -> str | None:
    """Return another value of the same family, or None."""
    family = families()[key.partition(".")[0]]
    others = [value.key for value in family.values if value.key != key]
    return rng.choice(others) if others and family.conflicts else None


def _compatible(keys: tuple[str, ...]) -> bool:
    """Tell whether all values can be obeyed at once."""
    return not any(other in values()[key].excludes for key in keys for other in keys)


def _draw_subject(rng: Random, kind: str, plan: Plan, head: _Head) -> Subject:
    if kind != "topic":
        candidates = subjects(kind)
        if kind == "opinion" and plan.kind == "opinion" and plan.background:
            candidates = tuple(s for s in candidates if f"background.{plan.background}" in s.by_value)
        elif kind == "opinion" and rng.random() < 0.85:
            # mostly questions on which the background has a say, when there is one
            candidates = tuple(s for s in candidates if any(k in s.by_value for k in head.force)) or candidates
        return rng.choice(candidates)
    topics = subjects("topic")
    if plan.subject is not None:
        return next(s for s in topics if s.name == plan.subject)
    fitting = [s for s in topics if _may_meet(s, head) != plan.held_out_pair]
    if any(key.startswith("units.") for key in head.force) and rng.random() < 0.75:
        measured = [s for s in fitting if "units.metric" in s.by_value]
        fitting = measured or fitting
    return rng.choice(fitting or topics)


def _may_meet(subject: Subject, head: _Head) -> bool:
    """Tell whether training may show this subject under this meta-prompt."""
    return subject.kind != "topic" or not any(held_out_pair(subject.name, key) for key in head.force)


# --- words ------------------------------------------------------------------------------------------------------------


def _query(rng: Random, subject: Subject, plan: Plan, later: bool) -> str:
    """Ask about a subject."""
    forms = _read("voice.toml")["queries"]
    unknown = _read("smalltalk.toml")["unknown"]
    if subject.kind == "topic":
        text = _fill(rng, forms, rng.choice((subject.ask[0], *subject.ask)), plan, later, subject.name.startswith("a"))
    elif subject.kind == "unknown" and rng.random() < 0.7:
        held_out = plan.split == "word"
        known = {phrase for topic in subjects("topic") for phrase in topic.ask}
        nouns = [n for n in unknown["nouns"] if n not in known and _unseen(n) == held_out]
        invented = "".join(rng.choice(unknown["syllables"]) for _ in range(rng.choice((2, 3))))
        noun = rng.choice(nouns) if rng.random() < 0.75 else rng.choice(("", "a ", "the ")) + invented
        text = _fill(rng, forms, noun, plan, later, False)
    else:
        ask = list(subject.ask)
        if subject.kind == "unknown":
            ask = [q for q in ask if _unseen(q) == (plan.split == "word")]
        text = rng.choice(ask)
    if subject.kind == "unknown" and plan.hard and rng.random() < 0.6:
        text = rng.choice([q for q in unknown["decoys"] if not _unseen(q)])
    # people type as they like
    style = rng.random()
    if style < 0.12:
        text = text.lower()
    if style < 0.06 or 0.12 <= style < 0.2:
        text = text.rstrip(".?!") or text
    if rng.random() < 0.05:  # a line that was broken, a slip of the space bar
        gap = rng.choice([place for place, letter in enumerate(text) if letter == " "] or [len(text)])
        text = text[:gap] + rng.choice(("\n", "\n", "  ", "\n\n")) + text[gap + 1 :]
    return text


def _fill(rng: Random, forms: Mapping[str, Any], noun: str, plan: Plan, later: bool, countable: bool) -> str:
    if later and rng.random() < 0.4:
        form = rng.choice(forms["next"])
    else:
        form = rng.choice(forms["held_out" if plan.held_out_query else "seen"])
    if countable and not noun.startswith(("a ", "an ", "the ")):  # "bicycles", where the topic is "a bicycle"
        form = form.replace(" is {x}", " are {x}").replace("What's", "What are").replace("{x} is", "{x} are")
        form = form.replace("does {x}", "do {x}")
    text = str(form.format(x=noun))
    return text[0].upper() + text[1:]


def _respond(subject: Subject, head: _Head) -> tuple[str, tuple[Check, ...]]:
    """Write the response under a meta-prompt; return it with the checks that it satisfies."""
    voice = _read("voice.toml")
    force = head.force
    checks = [_check(w) for key, w in force.items() if not key.startswith(("background.", "audience."))]
    checks += [_check(w) for key, w in force.items() if key.startswith("audience.") and subject.kind == "topic"]
    facts = list(subject.facts)
    if subject.kind == "opinion":
        made_for = next((key for key in force if key in subject.by_value), None)
        facts = list(subject.by_value[made_for]["answer"]) if made_for else facts
        side = subject.by_value[made_for]["side"] if made_for else "open"
        checks.append(Check(made_for or "background.none", "stance", {"side": side}))
    for key in force:
        if subject.kind == "topic" and key.startswith("audience."):
            facts[0] = subject.by_value[key]
        if subject.kind == "topic" and key.startswith("units.") and key in subject.by_value:
            facts.insert(1, subject.by_value[key])
    shape = next((key for key in force if key.startswith("format.")), "format.plain")
    is_list = shape in ("format.bullets", "format.numbered")
    count = 1 if "length.one" in force else len(facts) if "length.long" in force else 3 if is_list else 2
    before = _before(voice, force)
    after = [text for key, text in voice["after"].items() if key in force]
    text = _compose(facts[:count], before, after, is_list, shape == "format.numbered")
    title = subject.name[0].upper() + subject.name[1:] if "title.yes" in force else ""
    if shape == "format.json":
        text = json.dumps(({"title": title} if title else {}) | {"answer": text}, ensure_ascii=False)
    elif title:
        text = f"# {title}\n{text}"
    if "case.upper" in force:
        text = text.upper()
    if "case.lower" in force:
        text = text.lower()
    return text, tuple(checks)


def _compose(facts: list[str], before: str, after: list[str], is_list: bool, numbered: bool) -> str:
    """Put the facts between what comes before and after them, as a list or as running text."""
    if is_list:
        marks = [f"{n}." if numbered else "-" for n in range(1, len(facts) + 1)]
        lead = [before.rstrip(",: ") + ":"] if before else []
        lines = lead + [f"{mark} {fact}" for mark, fact in zip(marks, facts, strict=True)]
        return "\n".join(lines + ([" ".join(after)] if after else []))
    first = before + _small(facts[0]) if before else facts[0]
    return " ".join([first, *facts[1:], *after])


def _before(voice: Mapping[str, Any], force: Mapping[str, Wording]) -> str:
    """Return what stands before the first fact, with the comma or colon that joins it."""
    text = ""
    for key, part in voice["before"].items():
        if key in force:
            part = part.format(**force[key].slots)
            text += (", " + (part if key == "name.name" else _small(part))) if text else part
    colon = any(key in force for key in voice["punctuation"]["colon"])
    return text + (": " if colon else ", ") if text else ""


def _small(text: str) -> str:
    """Return the text with a small first letter, but leave "I" and abbreviations alone."""
    keep = text.startswith(("I ", "I'")) or (text[:2].isalpha() and text[:2].isupper())
    return text if keep else text[0].lower() + text[1:]


def _join(rng: Random, wordings: tuple[Wording, ...], tier: str) -> str:
    """Write a tier: its wordings, sometimes a line that asks for nothing, on lines of their own or in one."""
    texts = [w.text for w in wordings]
    if rng.random() < ((0.5 if tier == "system" else 0.12) if not texts else (0.3 if tier == "system" else 0.04)):
        texts.insert(0, rng.choice(neutral_lines(tier)))
    if rng.random() < 0.6:
        return "\n".join(texts)
    if len(wordings) > 1 and rng.random() < 0.4:
        # "Be brief and answer in capitals": a line that asks for nothing stays a sentence of its own
        asked = [texts[-len(wordings)].rstrip(".!"), *map(_small, texts[1 - len(wordings) :])]
        texts[-len(wordings) :] = [" and ".join(t.rstrip(".!") for t in asked[:-1]) + " and " + asked[-1]]
    return " ".join(t if t[-1] in ".!?" or t is texts[-1] else t + "." for t in texts)


def _check(wording: Wording) -> Check:
    value = wording.value
    parameters = {k: v.format(**wording.slots) if wording.slots else v for k, v in value.parameters.items()}
    return Check(value.key, families()[value.family].checker, parameters)


def _unseen(text: str) -> bool:
    return _digest(text) % _HELD_OUT_UNKNOWN == 0


def _digest(text: str) -> int:
    """Return a digest that is the same on every machine and in every run."""
    return zlib.crc32(text.encode())


@cache
def _read(name: str) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((_FOLDER / name).read_text(encoding="utf-8"))
    return table
