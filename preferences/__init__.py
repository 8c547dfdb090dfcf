"""Preferences as data: kinds, families, values, wordings, and which of them training may see.

A TOML file is a kind (length, format, tone, …) and holds families. A family is one thing that can be preferred; its
values exclude each other, so each is the opposite of the others. A value is put into words by a sentence frame
(wordings.toml) around a phrase. Four splits say which wordings training may show, so that evaluation agrees:

    seen          both the frame and the phrase, and their combination, may be trained on
    combination   frame and phrase are seen, this combination of them is not
    frame         a sentence frame that is never trained on, around a seen phrase
    word          a phrase whose key words are never trained on, in a seen frame
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

from .checkers import CHECKERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "FORMS",
    "SPLITS",
    "Family",
    "Value",
    "Wording",
    "adheres",
    "draw_slot",
    "express",
    "families",
    "neutral_lines",
    "profiles",
    "read",
    "values",
]

SPLITS = ("seen", "combination", "frame", "word")
FORMS = ("do", "manner", "thing", "say", "terse")

_FOLDER = Path(__file__).parent
_SHARED = ("wordings.toml", "neutral.toml", "profiles.toml", "slots.toml")  # every other TOML file here is a kind
_RESERVED = 8  # one in eight combinations of frame and phrase is kept for evaluation

Phrases = Mapping[str, tuple[str, ...]]  # form -> phrases


@dataclass(frozen=True)
class Value:
    """One value of a family: what a preference asks for."""

    family: str
    name: str
    parameters: Mapping[str, Any] = field(hash=False)  # for the family's checker; "{name}" is filled per dialog
    seen: Phrases = field(hash=False)
    held_out: Phrases = field(hash=False)
    excludes: tuple[str, ...]  # families, and values of other families, that cannot be obeyed at the same time

    @property
    def key(self) -> str:
        """Return `family.value`."""
        return f"{self.family}.{self.name}"


@dataclass(frozen=True)
class Family:
    """One thing that can be preferred. Its values exclude each other."""

    kind: str  # the name of its file
    name: str
    asks: str  # what it is about, in one line
    checker: str  # a name in CHECKERS
    values: tuple[Value, ...]
    subjects: tuple[str, ...]  # the kinds of question whose answers it changes; empty: all
    transfer: bool  # whether some topics are kept apart from it in training, to test whether it carries over
    tiers: tuple[str, ...]  # that may ask for it: system, user
    conflicts: bool  # whether two of its values contradict each other
    weight: int  # how often training draws it, relative to the others
    rewords: bool  # whether obeying it changes the content words of an answer, so that its facts are not searched for


@dataclass(frozen=True)
class Wording:
    """A preference in words."""

    text: str
    value: Value = field(repr=False)
    form: str  # one of FORMS
    split: str  # one of SPLITS
    slots: Mapping[str, str] = field(default_factory=dict, hash=False)  # {"name": "Anna"}

    @property
    def implicit(self) -> bool:
        """Tell whether the wording describes the person and leaves the preference to be inferred."""
        return self.form == "say" and not self.slots


@cache
def families() -> dict[str, Family]:
    """Read every family, by name, in the order of the files' names."""
    paths = sorted(path for path in _FOLDER.glob("*.toml") if path.name not in _SHARED)
    found = [_family(path.stem, name, table) for path in paths for name, table in read(path.name).items()]
    return {family.name: family for family in found}


@cache
def values() -> dict[str, Value]:
    """Return every value by its key, `family.value`."""
    return {value.key: value for family in families().values() for value in family.values}


def profiles() -> dict[str, str]:
    """Return the built-in profiles, `--pref @name`: name and text."""
    return dict(read("profiles.toml"))


def express(value: Value, split: str, rng: Random, slots: Mapping[str, str] | None = None) -> Wording:
    """Put a value into words of one split; `slots` are drawn unless given.

    Raises:
        ValueError: the value has no wording of that split.
    """
    rules = read("wordings.toml")
    phrases = value.held_out if split == "word" else value.seen
    frame_split = "held_out" if split == "frame" else "seen"
    forms = [form for form in FORMS if phrases.get(form)]
    if not forms or split not in SPLITS:
        raise ValueError(f"{value.key} has no wording of the split {split!r}")
    # sentences and terse phrases have no frame, so no combinations to hold out
    if split == "combination":
        forms = [form for form in forms if form in ("do", "manner", "thing")] or forms
    while True:
        form = rng.choice(forms)
        core = _core(rng, rules, form, rules["frames"][form][frame_split], rng.choice(phrases[form]))
        composed = form in ("do", "manner", "thing") and split in ("seen", "combination")
        if not composed or _is_reserved(core) == (split == "combination"):
            break
    wanted = [slot for slot in read("slots.toml") if "{" + slot + "}" in core]
    filled = {slot: (slots or {}).get(slot) or draw_slot(slot, rng, split) for slot in wanted}
    for slot, text in filled.items():  # not str.format: a phrase may contain other braces
        core = core.replace("{" + slot + "}", text)
    text = core + rng.choice(rules["endings"][{"say": "said", "terse": "bare"}.get(form, "full")])
    as_written = rng.random() < (0.6 if form == "terse" else 0.2)
    return Wording(text if as_written else text[0].upper() + text[1:], value, form, split, filled)


def draw_slot(slot: str, rng: Random, split: str = "seen") -> str:
    """Draw the text of a slot: a listed or an invented one; for the split `word`, one that training never shows."""
    table = read("slots.toml")[slot]
    if split == "word":
        return str(rng.choice(table["held_out"]))
    if rng.random() < table["known"]:
        return str(rng.choice(table["seen"]))
    invented = "".join(rng.choice(table["syllables"]) for _ in range(rng.choice((2, 2, 3))))
    return invented.capitalize() if table["capital"] else invented


def neutral_lines(tier: str) -> list[str]:
    """Return lines for the tier `system` or `user` that express no preference."""
    return list(read("neutral.toml")[tier])


def adheres(value: Value, response: str, slots: Mapping[str, str] | None = None, **extra: Any) -> bool:
    """Decide whether a response obeys a value. `extra` are parameters that depend on the question."""
    return CHECKERS[families()[value.family].checker](response, **fill(value, slots), **extra)


def fill(value: Value, slots: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Return a value's parameters with the slots filled in."""
    filled = dict(value.parameters)
    for key, text in filled.items():
        for slot, said in (slots or {}).items():
            if isinstance(text, str):
                text = filled[key] = text.replace("{" + slot + "}", said)
    return filled


@cache
def read(name: str) -> dict[str, Any]:
    """Read a TOML file of this folder."""
    table: dict[str, Any] = tomllib.loads((_FOLDER / name).read_text(encoding="utf-8"))
    return table


def _core(rng: Random, rules: dict[str, Any], form: str, frames: Sequence[str], phrase: str) -> str:
    """Fill a frame. A negative order ("don't …") takes a plain opening, and no frame that needs an infinitive."""
    negative = form == "do" and phrase.startswith(tuple(rules["negations"]))
    frame = rng.choice([one for one in frames if not (negative and one.endswith(tuple(rules["infinitives"])))])
    opening = rng.choice(rules["plain_openings" if negative else "openings"])
    for slot, text in {"opening": opening, "verb": rng.choice(rules["verbs"]), "phrase": phrase}.items():
        frame = frame.replace("{" + slot + "}", text)
    return frame


def _is_reserved(core: str) -> bool:
    """Tell whether a combination is kept for evaluation, by a digest that is the same on every machine."""
    return zlib.crc32(core.casefold().encode()) % _RESERVED == 5


def _family(kind: str, name: str, table: Mapping[str, Any]) -> Family:
    def phrases(source: Mapping[str, Any]) -> Phrases:
        return {form: tuple(source[form]) for form in FORMS if form in source}

    return Family(
        kind=kind,
        name=name,
        asks=table["asks"],
        checker=table["checker"],
        values=tuple(
            Value(
                family=name,
                name=key,
                parameters=dict(value.get("parameters", {})),
                seen=phrases(value),
                held_out=phrases(value.get("held_out", {})),
                excludes=tuple(value.get("excludes", ())),
            )
            for key, value in table["values"].items()
        ),
        subjects=tuple(table.get("subjects", ())),
        transfer=table.get("transfer", True),
        tiers=tuple(table.get("tiers", ("system", "user"))),
        conflicts=table.get("conflicts", True),
        weight=table.get("weight", len(table["values"]) + 1),
        rewords=table.get("rewords", False),
    )
