"""Compose dialogs: meta-prompts in words, questions, and the checks that a program can make of the answer.

Training adds written responses (tune/responses.py); `eval` asks a model for its own (suite.py). A dialog is a pure
function of its plan and the random numbers.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from random import Random
from typing import Any

from . import Wording, draw_slot, express, families, fill, neutral_lines, read, values
from .checkers import CHECKERS

__all__ = [
    "SUBJECTS",
    "Check",
    "MetaPrompt",
    "Plan",
    "Question",
    "Scene",
    "Subject",
    "checks",
    "compatible",
    "compose",
    "flip",
    "held_out_pair",
    "noun_of",
    "subjects",
]

SUBJECTS = ("topic", "opinion", "request", "unknown", "smalltalk")
TURNS = 6  # the most questions of a dialog

_HELD_OUT_PAIRS = 12  # one in twelve pairs of topic and value is kept from training
_HELD_OUT_UNKNOWN = 8  # so is one in eight unknown nouns and questions
_TRIES = 300  # draws of a subject that suits the plan; then any that can be obeyed is taken
# how often training draws what; the first entry is for usual dialogs, the second for hard ones (Plan.hard)
_KINDS = ((64, 13, 8, 11, 4), (56, 17, 12, 11, 4))  # weights of SUBJECTS
_COUNTS = ((11, 41, 29, 19), (7, 32, 32, 29))  # weights of no, one, two and three preferences
_CONFLICTS = (0.2, 0.5)  # the share of dialogs whose tiers contradict each other
_LENGTHS = (60, 15, 9, 7, 5, 4)  # weights of one to six turns, usual or hard


@dataclass(frozen=True)
class Subject:
    """The subject of a question, with the sentences of a right answer."""

    kind: str  # one of SUBJECTS
    name: str
    ask: tuple[str, ...]  # noun phrases of a topic, else whole questions
    facts: tuple[str, ...]  # sentences, the most important first
    by_value: Mapping[str, Any] = field(default_factory=dict, hash=False)  # "audience.child" -> its facts under it, …

    @property
    def nouns(self) -> list[str]:
        """Return the names of a topic; none for another kind."""
        return list(self.ask) if self.kind == "topic" else []

    def says(self) -> list[str]:
        """Return every sentence that a right answer may contain."""
        said = [*self.facts]
        for content in self.by_value.values():
            said += [content] if isinstance(content, str) else content["answer"]
        return said


@dataclass(frozen=True)
class Check:
    """One thing that a program can verify of a response."""

    key: str  # of the preference, family.value
    checker: str
    parameters: Mapping[str, Any] = field(hash=False)

    def holds(self, response: str) -> bool:
        """Tell whether a response satisfies the check."""
        return bool(CHECKERS[self.checker](response, **self.parameters))


@dataclass(frozen=True)
class MetaPrompt:
    """System Info and User Info in words, and the preferences that they contain."""

    system_info: str = ""
    user_info: str = ""
    system: tuple[Wording, ...] = ()
    user: tuple[Wording, ...] = ()
    losing: tuple[Wording, ...] = ()  # of User Info, overridden by System Info

    @property
    def wordings(self) -> tuple[Wording, ...]:
        """Return the wordings of both tiers."""
        return self.system + self.user

    @property
    def force(self) -> dict[str, Wording]:
        """Return the wordings in force by the key of their value, backgrounds included: all but the losing ones."""
        return {w.value.key: w for w in self.wordings if w not in self.losing}


@dataclass(frozen=True)
class Question:
    """A question, and the meta-prompt under which it was answered."""

    query: str
    subject: Subject
    prompt: MetaPrompt


@dataclass(frozen=True)
class Scene:
    """A dialog up to its last question."""

    prompt: MetaPrompt  # in force now; earlier questions may have been answered under another
    questions: tuple[Question, ...]

    @property
    def last(self) -> Question:
        """Return the question whose answer is judged."""
        return self.questions[-1]

    @property
    def checks(self) -> tuple[Check, ...]:
        """Return the checks that an obedient answer to the last question satisfies."""
        return checks(self.last, self.prompt.force)

    @property
    def losing(self) -> tuple[Check, ...]:
        """Return the checks of what User Info asks for and System Info overrides."""
        lost = {w.value.key: w for w in self.prompt.losing}
        background = {key: w for key, w in self.prompt.force.items() if key.startswith("background.")}
        return tuple(check for check in checks(self.last, background | lost) if check.key in lost)


@dataclass(frozen=True)
class Plan:
    """What is decided of a dialog in advance. Unset fields are drawn at random, as training draws them."""

    kind: str | None = None  # one of SUBJECTS
    values: tuple[str, ...] | None = None  # keys of the values in force
    tiers: tuple[str, ...] | None = None  # of those values, one for each
    losing: str | None = None  # a value in User Info that System Info overrides
    turns: int | None = None
    split: str = "seen"  # of the wordings, of names and words, and of unknown subjects
    subject: str | None = None  # its name
    changed: bool | None = None  # whether earlier turns followed another meta-prompt
    held_out_pair: bool = False  # a topic and a value that are never trained together
    held_out_query: bool = False  # a form of question that is never trained on
    background: str | None = None  # a value of the family background; "" for none
    hard: bool = False  # more contradictions, more preferences at once, and questions that look like either


# --- subjects ---------------------------------------------------------------------------------------------------------


@cache
def subjects(kind: str) -> tuple[Subject, ...]:
    """Return all subjects of a kind."""
    if kind == "topic":
        return tuple(_topic(table) for table in read("questions/topics.toml")["topics"])
    if kind == "opinion":
        return tuple(_opinion(table) for table in read("questions/opinions.toml")["opinions"])
    if kind == "request":
        return tuple(_request(table) for table in read("questions/requests.toml")["requests"])
    talk = read("questions/smalltalk.toml")
    tables = talk["smalltalk"] if kind == "smalltalk" else [talk["unknown"]]
    return tuple(Subject(kind, table["name"], tuple(table["ask"]), tuple(table["answer"])) for table in tables)


@cache
def held_out_pair(topic: str, key: str) -> bool:
    """Tell whether a topic and a value never meet in training, to test whether the value carries over to it."""
    return families()[_family_of(key)].transfer and _digest(f"{topic}/{key}") % _HELD_OUT_PAIRS == 0


def noun_of(subject: Subject) -> str:
    """Return a subject's name without its article."""
    return re.sub(r"^(?:an?|the) ", "", subject.name)


def _topic(table: Mapping[str, Any]) -> Subject:
    by_value = {"audience.child": table["child"], "audience.expert": table["expert"]}
    by_value |= {f"units.{system}": table[system] for system in ("metric", "imperial") if system in table}
    return Subject("topic", table["name"], tuple(table["ask"]), tuple(table["facts"]), by_value)


def _opinion(table: Mapping[str, Any]) -> Subject:
    sides = {f"background.{key}": side for key, side in table.items() if isinstance(side, dict)}
    return Subject("opinion", table["name"], tuple(table["ask"]), tuple(table["open"]), sides)


def _request(table: Mapping[str, Any]) -> Subject:
    by_value = {value.key: {"answer": table[value.name]} for value in families()["priority"].values}
    return Subject("request", table["name"], tuple(table["ask"]), tuple(table["plain"]), by_value)


@cache
def _can_go_unnamed(subject: Subject) -> bool:
    """Tell whether a topic's sentences name it only as their first words, which can be left out."""
    begin = subject.name[0].upper() + subject.name[1:] + " "
    rest = " ".join(said.removeprefix(begin) for said in subject.says())
    return CHECKERS["names"](rest, topic=subject.nouns, present=False)


# --- checks -----------------------------------------------------------------------------------------------------------


def checks(question: Question, force: Mapping[str, Wording]) -> tuple[Check, ...]:
    """Return the checks of an answer that obeys all of `force`."""
    subject, found = question.subject, []
    for key, wording in force.items():
        family = families()[wording.value.family]
        if family.subjects and subject.kind not in family.subjects:
            continue  # it does not change this answer
        parameters = fill(wording.value, wording.slots)
        if family.checker == "stance":
            parameters = {"side": _side(subject, force)}
        elif family.checker == "names":
            parameters["topic"] = subject.nouns
        elif family.checker == "echoes":
            parameters["query"] = question.query
        found.append(Check(key, family.checker, parameters))
    return tuple(found)


def _side(subject: Subject, force: Mapping[str, Wording]) -> str:
    """Return the side of an opinion that suits the user: `yes`, `no`, or `open` where none is known or wanted."""
    mine = [subject.by_value[key]["side"] for key in force if key in subject.by_value]
    return mine[0] if mine and "stance.open" not in force else "open"


# --- dialogs ----------------------------------------------------------------------------------------------------------


def compose(rng: Random, plan: Plan) -> Scene:
    """Compose a dialog that fits the plan; fields that the plan leaves open are drawn."""
    kind = plan.kind or rng.choices(SUBJECTS, _KINDS[plan.hard])[0]
    prompt = _draw_prompt(rng, plan, kind)
    subject = _draw_subject(rng, kind, plan, prompt)
    count = plan.turns or rng.choices(range(1, TURNS + 1), _LENGTHS)[0]
    changed = plan.changed if plan.changed is not None else rng.random() < 0.4
    # earlier questions: under this meta-prompt, or under one that has been replaced since
    other = _draw_prompt(rng, Plan(), "topic") if changed else prompt
    since = rng.randrange(1, count) if changed and count > 1 and plan.changed is None else count - 1 if changed else 0
    questions: list[Question] = []
    for number in range(count):
        last = number == count - 1
        mine = prompt if number >= since else other
        now = subject if last else _draw_subject(rng, rng.choice(("topic", "topic", "topic", kind)), Plan(), mine)
        previous = questions[-1].subject if questions else None
        free = not last or (plan.subject is None and kind == "topic")  # to stay with the previous subject
        if previous and previous.kind == "topic" and free and rng.random() < 0.2 and _suits(previous, mine.force):
            query, now = rng.choice(read("questions/forms.toml")["again"]), previous
        else:
            query = _query(rng, now, plan, later=number > 0)
        questions.append(Question(query, now, mine))
    return Scene(prompt, tuple(questions))


def flip(rng: Random, scene: Scene) -> Scene | None:
    """Ask the same questions under a meta-prompt that wants another answer; None where no such meta-prompt was found.

    In a conflict the tiers swap their preferences. Otherwise one preference that changes the answer becomes its
    opposite or is dropped; where none changes it, the preferences are drawn anew.
    """
    subject, prompt = scene.last.subject, scene.prompt
    lost = prompt.losing[0].value.key if prompt.losing else None
    background = next((k for k in prompt.force if k.startswith("background.")), "").partition(".")[2]
    placed = [(w.value.key, "system") for w in prompt.system]
    placed += [(w.value.key, "user") for w in prompt.user if w not in prompt.losing]
    placed = [(key, tier) for key, tier in placed if not key.startswith("background.")]
    for _ in range(20):
        mine, now, losing = list(placed), background, lost
        matter = [place for place, (key, _) in enumerate(mine) if _matters(key, subject)]
        if lost:
            place = next(place for place, (key, _) in enumerate(mine) if _family_of(key) == _family_of(lost))
            mine[place], losing = (lost, "system"), mine[place][0]
        elif subject.kind == "opinion" and (not matter or rng.random() < 0.7):
            sides = [key.partition(".")[2] for key in subject.by_value]
            now = rng.choice([side for side in (*sides, "", "") if side != background])
        elif matter:
            place = rng.choice(matter)
            other = _opposite(rng, mine[place][0])
            mine[place : place + 1] = [(other, mine[place][1])] if other else []
        else:
            mine = [(key, rng.choice(("system", "user", "user"))) for key in _draw_values(rng, False, subject.kind)[:1]]
        keys = [key for key, _ in mine]
        alone = "stance.personal" in (*keys, losing) and not now  # the user's side, of nobody known
        if alone or not compatible([*keys, losing] if losing else keys):
            continue
        found = _write_prompt(rng, mine, losing, now, "seen")
        questions = tuple(replace(q, prompt=found) if q.prompt is prompt else q for q in scene.questions)
        if all(q.subject.kind != "topic" or _suits(q.subject, found.force) for q in questions if q.prompt is found):
            return Scene(found, questions)
    return None


def _matters(key: str, subject: Subject) -> bool:
    """Tell whether a value changes the right answer about a subject."""
    family = families()[_family_of(key)]
    if family.name == "units" and "units.metric" not in subject.by_value:
        return False
    return not family.subjects or subject.kind in family.subjects


def _family_of(key: str) -> str:
    return key.partition(".")[0]


def _draw_prompt(rng: Random, plan: Plan, kind: str) -> MetaPrompt:
    """Draw preferences for both tiers; all that are in force can be obeyed at once."""
    while True:
        keys = plan.values if plan.values is not None else _draw_values(rng, plan.hard, kind)
        if compatible(keys + ((plan.losing,) if plan.losing else ())):
            break
    tiers = plan.tiers or tuple("system" if rng.random() < 0.38 else "user" for _ in keys)
    losing = plan.losing
    if losing is None and plan.values is None and keys and rng.random() < _CONFLICTS[plan.hard]:
        # a conflict: the first preference moves to System Info, an opposite value stands in User Info
        tiers = ("system", *tiers[1:])
        losing = _opposite(rng, keys[0])
    background = plan.background
    if background is None:
        background = _draw_background(rng, kind, (*keys, losing))
    return _write_prompt(rng, tuple(zip(keys, tiers, strict=True)), losing, background, plan.split)


def _write_prompt(
    rng: Random, placed: Sequence[tuple[str, str]], losing: str | None, background: str, split: str
) -> MetaPrompt:
    """Put values, each with its tier, a losing value and a background into words."""
    slots = {slot: draw_slot(slot, rng, split) for slot in read("slots.toml")}  # both tiers get the same
    system: list[Wording] = []
    user: list[Wording] = []
    for key, tier in placed:
        allowed = families()[_family_of(key)].tiers
        where = tier if tier in allowed else allowed[0]
        (system if where == "system" else user).append(express(values()[key], split, rng, slots))
    lost = [express(values()[losing], split, rng, slots)] if losing else []
    user += lost
    if background:
        split = "seen" if split == "combination" else split  # a background has no frames to combine
        user.append(express(values()[f"background.{background}"], split, rng))
    rng.shuffle(system)
    rng.shuffle(user)
    texts = _join(rng, system, "system"), _join(rng, user, "user")
    return MetaPrompt(*texts, tuple(system), tuple(user), tuple(lost))


def _draw_values(rng: Random, hard: bool, kind: str) -> tuple[str, ...]:
    """Draw none to three values of different families; those that change answers of this kind, more often."""
    drawn = [family for family in families().values() if family.name != "background"]
    shares = dict(zip(SUBJECTS, _KINDS[hard], strict=True))
    weights = [
        f.weight * (1.0 if not f.subjects else 100 / sum(shares[s] for s in f.subjects) if kind in f.subjects else 0.2)
        for f in drawn
    ]
    count = rng.choices((0, 1, 2, 3), _COUNTS[hard])[0]
    chosen: dict[str, str] = {}
    while len(chosen) < count:
        family = rng.choices(drawn, weights)[0]
        chosen.setdefault(family.name, rng.choice(family.values).key)
    return tuple(chosen.values())


def _draw_background(rng: Random, kind: str, keys: Sequence[str | None]) -> str:
    """Draw who the user is, or "" for nothing; always somebody where the user's own side is to be taken."""
    often = 1.0 if "stance.personal" in keys else 0.7 if kind == "opinion" else 0.04 if keys else 0.08
    return str(rng.choice(families()["background"].values).name) if rng.random() < often else ""


def _opposite(rng: Random, key: str) -> str | None:
    """Return another value of the same family, or None."""
    family = families()[_family_of(key)]
    others = [value.key for value in family.values if value.key != key]
    return rng.choice(others) if others and family.conflicts else None


def compatible(keys: Sequence[str]) -> bool:
    """Tell whether values can all be obeyed at once."""
    return not any(
        other != key and (other in values()[key].excludes or _family_of(other) in values()[key].excludes)
        for key in keys
        for other in keys
    )


def _draw_subject(rng: Random, kind: str, plan: Plan, prompt: MetaPrompt) -> Subject:
    found = subjects(kind)
    if plan.subject is not None:
        return next(subject for subject in found if subject.name == plan.subject)
    force = prompt.force
    if kind == "opinion" and (plan.background or rng.random() < 0.85):
        # mostly questions on which the background decides, if there is one
        found = tuple(s for s in found if any(key in s.by_value for key in force)) or found
    measured = any(key.startswith("units.") for key in force) and (plan.values or rng.random() < 0.75)
    if kind == "topic" and measured:
        found = tuple(s for s in found if "units.metric" in s.by_value)
    for _ in range(_TRIES):
        subject = rng.choice(found)
        if _may_meet(subject, force) and (kind != "topic" or _apart(subject, force) == plan.held_out_pair):
            return subject
    return rng.choice([s for s in found if _may_meet(s, force)] or found)


def _suits(subject: Subject, force: Mapping[str, Wording]) -> bool:
    """Tell whether training may show a topic under these preferences."""
    return _may_meet(subject, force) and not _apart(subject, force)


def _apart(subject: Subject, force: Mapping[str, Wording]) -> bool:
    return any(held_out_pair(subject.name, key) for key in force)


def _may_meet(subject: Subject, force: Mapping[str, Wording]) -> bool:
    """Tell whether a right answer about this subject can obey all of `force`."""
    if subject.kind == "topic" and "taboo.unnamed" in force and not _can_go_unnamed(subject):
        return False
    avoided = force.get("word.avoid")
    return not avoided or not any(avoided.slots["word"] in said.casefold() for said in subject.says())


# --- words ------------------------------------------------------------------------------------------------------------


def _query(rng: Random, subject: Subject, plan: Plan, later: bool) -> str:
    """Ask about a subject."""
    forms = read("questions/forms.toml")
    unknown = read("questions/smalltalk.toml")["unknown"]
    if subject.kind == "topic":
        countable = subject.name.startswith(("a ", "an "))
        text = _fill(rng, forms, rng.choice((subject.ask[0], *subject.ask)), plan, later, countable)
    elif subject.kind == "unknown" and rng.random() < 0.7:
        text = _fill(rng, forms, _unknown_noun(rng, unknown, plan), plan, later, False)
    else:
        held_out = plan.split == "word"
        ask = [q for q in subject.ask if subject.kind != "unknown" or _unseen(q) == held_out]
        text = rng.choice(ask)
    if subject.kind == "unknown" and plan.hard and rng.random() < 0.3:
        text = rng.choice([q for q in unknown["decoys"] if not _unseen(q)])
    # imitate careless typing
    style = rng.random()
    if style < 0.12:
        text = text.lower()
    if style < 0.06 or 0.12 <= style < 0.2:
        text = text.rstrip(".?!") or text
    if rng.random() < 0.05:  # a line that was broken, a slip of the space bar
        gap = rng.choice([place for place, letter in enumerate(text) if letter == " "] or [len(text)])
        text = text[:gap] + rng.choice(("\n", "\n", "  ", "\n\n")) + text[gap + 1 :]
    return text


def _unknown_noun(rng: Random, unknown: Mapping[str, Any], plan: Plan) -> str:
    known = {phrase for topic in subjects("topic") for phrase in topic.ask}
    nouns = [n for n in unknown["nouns"] if n not in known and _unseen(n) == (plan.split == "word")]
    invented = "".join(rng.choice(unknown["syllables"]) for _ in range(rng.choice((2, 3))))
    return str(rng.choice(nouns) if rng.random() < 0.75 else rng.choice(("", "a ", "the ")) + invented)


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


def _join(rng: Random, wordings: Sequence[Wording], tier: str) -> str:
    """Write a tier: its wordings, and sometimes a line without a preference, on a line each or all on one."""
    texts = [w.text for w in wordings]
    if rng.random() < ((0.5 if tier == "system" else 0.12) if not texts else (0.3 if tier == "system" else 0.04)):
        texts.insert(0, rng.choice(neutral_lines(tier)))
    if rng.random() < 0.6:
        return "\n".join(texts)
    if len(wordings) > 1 and rng.random() < 0.4:
        # "Be brief and answer in capitals": a line without a preference stays a sentence of its own
        clauses = [texts[-len(wordings)].rstrip(".!"), *map(small, texts[1 - len(wordings) :])]
        texts[-len(wordings) :] = [" and ".join(t.rstrip(".!") for t in clauses[:-1]) + " and " + clauses[-1]]
    return " ".join(t if t[-1] in ".!?" or t is texts[-1] else t + "." for t in texts)


def small(text: str) -> str:
    """Return the text with a small first letter, unless it begins with "I" or an abbreviation."""
    keep = text.startswith(("I ", "I'")) or (text[:2].isalpha() and text[:2].isupper())
    return text if keep else text[0].lower() + text[1:]


def _unseen(text: str) -> bool:
    return _digest(text) % _HELD_OUT_UNKNOWN == 0


def _digest(text: str) -> int:
    """Return a digest that is the same on every machine and in every run."""
    return zlib.crc32(text.encode())
