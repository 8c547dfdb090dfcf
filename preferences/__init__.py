"""Preferences as data: families, paraphrases, opposites, and the checkers that decide adherence.

A family (one TOML file) is one thing that can be preferred; its values exclude each other. A value is put into words by
frames and phrases (wordings.toml); which of them training may see is fixed here, so that training and evaluation agree:

    seen          both the frame and the phrase, and their combination, may be trained on
    combination   frame and phrase are seen, this combination of them is not
    frame         a sentence frame that is never trained on, around a seen phrase
    word          a phrase whose key words are never trained on, in a seen frame
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Mapping
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
    "SPLITS",
    "Family",
    "Value",
    "Wording",
    "adheres",
    "draw_name",
    "families",
    "neutral_lines",
    "values",
    "word",
]

SPLITS = ("seen", "combination", "frame", "word")
KINDS = ("do", "manner", "thing", "say", "terse")

_FOLDER = Path(__file__).parent
_SHARED = ("wordings.toml", "neutral.toml")  # every other TOML file here is a family
_RESERVED = 8  # one combination of frame and phrase in so many is kept for evaluation

Phrases = Mapping[str, tuple[str, ...]]  # kind -> phrases


@dataclass(frozen=True)
class Value:
    """One value of a family: what a preference asks for."""

    family: str
    name: str
    parameters: Mapping[str, Any] = field(hash=False)  # for the family's checker; "{name}" is filled per dialog
    seen: Phrases = field(hash=False)
    held_out: Phrases = field(hash=False)
    excludes: tuple[str, ...]  # keys of values of other families that cannot be obeyed at the same time

    @property
    def key(self) -> str:
        """Return `family.value`."""
        return f"{self.family}.{self.name}"


@dataclass(frozen=True)
class Family:
    """One thing that can be preferred. Its values exclude each other."""

    name: str
    asks: str  # one line for people
    checker: str  # a name in CHECKERS
    values: tuple[Value, ...]
    transfer: bool  # whether it can be asked of a topic that was never trained together with it
    tiers: tuple[str, ...]  # where it may stand: system, user
    conflicts: bool  # whether two of its values contradict each other
    weight: int  # how often training draws it, next to the others


@dataclass(frozen=True)
class Wording:
    """A preference in words."""

    text: str
    value: Value = field(repr=False)
    kind: str  # do, manner, thing, say, terse
    split: str  # one of SPLITS
    slots: Mapping[str, str] = field(default_factory=dict, hash=False)  # {"name": "Anna"}

    @property
    def implicit(self) -> bool:
        """Tell whether the wording says something about the person and leaves the preference to be understood."""
        return self.kind == "say" and self.value.family != "name"


@cache
def families() -> dict[str, Family]:
    """Read every family, by name, in the order of their names."""
    paths = sorted(path for path in _FOLDER.glob("*.toml") if path.name not in _SHARED)
    return {family.name: family for family in map(_read_family, paths)}


@cache
def values() -> dict[str, Value]:
    """Return every value by its key, `family.value`."""
    return {value.key: value for family in families().values() for value in family.values}


def word(value: Value, split: str, rng: Random) -> Wording:
    """Put a value into words of one split. ValueError if the value has no wording of that kind."""
    rules = _read("wordings.toml")
    phrases = value.held_out if split == "word" else value.seen
    frame_split = "held_out" if split == "frame" else "seen"
    kinds = [kind for kind in KINDS if phrases.get(kind)]
    if not kinds or split not in SPLITS:
        raise ValueError(f"{value.key} has no wording of the split {split!r}")
    # sentences and terse phrases stand alone: they have no combinations to hold out
    if split == "combination":
        kinds = [kind for kind in kinds if kind in ("do", "manner", "thing")] or kinds
    while True:
        kind = rng.choice(kinds)
        phrase = rng.choice(phrases[kind])
        core = _core(rng, rules, kind, rng.choice(rules["frames"][kind][frame_split]), phrase)
        composed = kind in ("do", "manner", "thing") and split in ("seen", "combination")
        if not composed or _is_reserved(core) == (split == "combination"):
            break
    slots = {"name": draw_name(rng, split)} if "{name}" in core else {}
    endings = {"say": "said", "terse": "bare"}.get(kind, "full")
    text = core.format(**slots) + rng.choice(rules["endings"][endings])
    as_written = rng.random() < (0.6 if kind == "terse" else 0.2)
    return Wording(text if as_written else text[0].upper() + text[1:], value, kind, split, slots)


def draw_name(rng: Random, split: str = "seen") -> str:
    """Draw a person's name: a known or an invented one, or, outside `seen`, one that is never trained on."""
    table = _read("name.toml")["names"]
    if split == "word":
        return str(rng.choice(table["held_out"]))
    if rng.random() < 0.3:
        return str(rng.choice(table["seen"]))
    return "".join(rng.choice(table["syllables"]) for _ in range(rng.choice((2, 2, 3)))).capitalize()


def neutral_lines(tier: str) -> list[str]:
    """Return lines for the tier `system` or `user` that ask for nothing."""
    return list(_read("neutral.toml")[tier])


def adheres(value: Value, response: str, slots: Mapping[str, str] | None = None, **extra: Any) -> bool:
    """Decide whether a response obeys a value; `slots` fill the parameters, `extra` adds what the question brings."""
    filled = {k: v.format(**slots) if isinstance(v, str) and slots else v for k, v in value.parameters.items()}
    return CHECKERS[families()[value.family].checker](response, **filled, **extra)


def _core(rng: Random, rules: dict[str, Any], kind: str, frame: str, phrase: str) -> str:
    """Fill a frame; an order in the negative takes a plain opening."""
    negative = kind == "do" and phrase.startswith(tuple(rules["negations"]))
    opening = rng.choice(rules["plain_openings" if negative else "openings"])
    slots = {"opening": opening, "verb": rng.choice(rules["verbs"]), "phrase": phrase}
    for slot, text in slots.items():  # not str.format: a phrase may hold a slot of its own, {name}
        frame = frame.replace("{" + slot + "}", text)
    return frame


def _is_reserved(core: str) -> bool:
    """Tell whether a combination is kept from training, by a digest that is the same on every machine."""
    return zlib.crc32(core.casefold().encode()) % _RESERVED == 5


@cache
def _read(name: str) -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((_FOLDER / name).read_text(encoding="utf-8"))
    return table


def _read_family(path: Path) -> Family:
    table = _read(path.name)
    name = table["name"]

    def phrases(source: Mapping[str, Any]) -> Phrases:
        return {kind: tuple(source[kind]) for kind in KINDS if kind in source}

    return Family(
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
        transfer=table.get("transfer", True),
        tiers=tuple(table.get("tiers", ("system", "user"))),
        conflicts=table.get("conflicts", True),
        weight=table.get("weight", len(table["values"]) + 1),
    )
