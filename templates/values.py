"""The values that a template can hold: what they are, what it may look up in them, and what is written of them.

The list is closed: text, numbers, truth values, none, lists, tuples and dicts of these, and the few kinds below. A
value of any other kind, or an attribute that is not named here, does not exist for a template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from jinja2 import Undefined
from jinja2.runtime import LoopContext

from .budget import ITEMS, WIDTH, Budget, NotAllowed
from .tier_text import Tier, TierText, join_text

SCALARS = (str, int, float, type(None))  # what a dict may have as a key; bool is an int


@dataclass(frozen=True, eq=False)
class Function:
    """What a template can call: a macro, a method, or one of the functions that it is given."""

    call: Callable[[list[Any], dict[str, Any]], Any]


@dataclass(frozen=True, eq=False)
class Namespace:
    """Variables that outlive the loop in which they are set."""

    fields: dict[str, Any]


class View(tuple[Any, ...]):
    """The keys, values or items of a dict, or the numbers of a range."""


@dataclass(frozen=True, eq=False)
class Once:
    """Values that can be read once: what `map`, `select` and their like give."""

    values: Iterator[Any]


@dataclass(frozen=True, eq=False)
class Loop:
    """The variable `loop`."""

    context: LoopContext
    again: Callable[[Any], str]  # renders the body for other values: `loop(values)` in a recursive loop


LOOP_FIELDS = "index index0 revindex revindex0 first last length depth depth0 previtem nextitem".split()


class Values:
    """What is done with values of any kind, within a budget."""

    def __init__(self, budget: Budget) -> None:
        self.budget = budget

    def made(self, value: Any) -> Any:
        """Return what Python computed, if it is of a kind and a size that a template may hold."""
        if isinstance(value, complex):
            raise NotAllowed("it computes with complex numbers, which no chat template needs")
        self.budget.room_for_number(value)
        return value

    def key(self, value: Any) -> Any:
        """Return a value that can be the key of a dict."""
        if isinstance(value, SCALARS):
            return value
        raise NotAllowed(f"it looks a {kind(value)} up, which no chat template needs")

    def items(self, value: Any) -> Iterator[Any]:
        """Iterate over a value."""
        if isinstance(value, str):
            return self._letters(value)
        if isinstance(value, Once):
            return value.values
        if isinstance(value, Function | Namespace | Loop):
            raise TypeError(f"'{kind(value)}' object is not iterable")
        return iter(value)

    def _letters(self, text: str) -> Iterator[str]:
        for letter in text:
            self.budget.room_for(1, text)
            yield letter

    def listed(self, values: Iterable[Any]) -> list[Any]:
        """Make a list of values, which it asks room for as it grows."""
        found: list[Any] = []
        for value in values:
            self.budget.room_for_items(1)
            found.append(value)
            if len(found) > ITEMS:
                self.budget.too_large()
        return found

    def same(self, one: Any, other: Any) -> bool:
        """Tell whether two values are equal."""
        self.budget.step()
        if (isinstance(one, list) and isinstance(other, list)) or (isinstance(one, tuple) and isinstance(other, tuple)):
            return len(one) == len(other) and all(self.same(a, b) for a, b in zip(one, other, strict=True))
        if isinstance(one, dict) and isinstance(other, dict):
            return one.keys() == other.keys() and all(self.same(value, other[key]) for key, value in one.items())
        if isinstance(one, list | tuple | dict) or isinstance(other, list | tuple | dict):
            return False
        if isinstance(one, str) and isinstance(other, str):
            self.budget.work(min(len(one), len(other)))
        return bool(one == other)

    def contains(self, container: Any, value: Any) -> bool:
        """Tell whether a value is in another: a part of a text, a value of a list, a key of a dict."""
        if isinstance(container, str):
            self.budget.work(len(container))
            return value in container  # it raises where the value is no text
        if isinstance(container, dict):
            return self.key(value) in container
        if isinstance(container, list | tuple | Once):
            return any(self.same(one, value) for one in self.items(container))
        return value in container  # nothing is in what is undefined; Python says why it is in nothing else

    def owned(self, result: Any, *inputs: Any) -> Any:
        """Give a string that was computed from a tier's text to that tier, unless it knows its own owners."""
        if not isinstance(result, str) or tier_of(result):
            return result
        tier = next((tier for value in inputs if (tier := self.tier_within(value))), None)
        return TierText.of(str.__str__(result), tier) if tier else result

    def tier_within(self, value: Any) -> Tier | None:
        """Return a tier whose text is somewhere in a value; None if there is none."""
        self.budget.step()
        if isinstance(value, dict):
            return self.tier_within([*value, *value.values()])
        if isinstance(value, list | tuple):
            return next((tier for one in reversed(value) if (tier := self.tier_within(one))), None)
        return tier_of(value)


class Fields(Values):
    """What a template may look up in a value."""

    def undefined(self, owner: Any, name: Any) -> Undefined:
        """Return what stands for a field that is not there; a tier's text is not named in an error."""
        return Undefined(obj="" if isinstance(owner, str) else owner, name="…" if tier_of(name) else name)

    def getattr(self, owner: Any, name: str) -> Any:
        """Do what `owner.name` does."""
        if isinstance(owner, Undefined):
            return owner[name]  # it raises
        if isinstance(owner, Namespace) and name in owner.fields:
            return owner.fields[name]
        method = self.method(owner, name)
        if method is not None:
            return method
        if isinstance(owner, dict) and name in owner:
            return self.owned(owner[name], name)
        return self.undefined(owner, name)

    def getitem(self, owner: Any, name: Any) -> Any:
        """Do what `owner[name]` does."""
        if isinstance(owner, Undefined):
            return owner[name]  # it raises
        if isinstance(owner, dict) and self.key(name) in owner:
            return self.owned(owner[name], name)
        if isinstance(owner, str | list | tuple) and isinstance(name, int):
            if not -len(owner) <= name < len(owner):
                return self.undefined(owner, name)
            if isinstance(owner, str):
                self.budget.room_for(1, owner)
            return owner[name]
        return self.getattr(owner, name) if isinstance(name, str) else self.undefined(owner, name)

    def sliced(self, owner: Any, part: slice) -> Any:
        """Do what `owner[a:b:c]` does."""
        if not isinstance(owner, str | list | tuple):
            return self.undefined(owner, "slice")
        count = len(range(*part.indices(len(owner))))
        if isinstance(owner, str):
            self.budget.room_for(count, owner)
        else:
            self.budget.room_for_items(count)
        return owner[part]

    def method(self, owner: Any, name: str) -> Any:
        """Return a method of a value; None if it has none of that name."""
        if isinstance(owner, dict) and name in ("items", "keys", "values", "get"):
            return Function(lambda args, named: self.of_dict(owner, name, *args, **named))
        if isinstance(owner, list | tuple) and name in ("index", "count"):
            return Function(lambda args, named: self.of_list(owner, name, *args, **named))
        if isinstance(owner, Loop):
            if name in LOOP_FIELDS:
                return getattr(owner.context, name)
            if name == "cycle":
                return Function(lambda args, named: owner.context.cycle(*args, **named))
        if hasattr(owner, name) or name.startswith("__"):
            raise NotAllowed(f"it reaches for {known(name)} of a {kind(owner)}, which no chat template needs")
        return None

    def of_dict(self, owner: dict[Any, Any], method: str, *args: Any) -> Any:
        """Call a method of a dict."""
        if not isinstance(owner, dict):
            raise TypeError("only a dict has items")
        if method == "get":
            self.key(args[0] if args else None)
            return self.owned(owner.get(*args), args[0])
        self.budget.room_for_items(2 * len(owner))
        return View(getattr(owner, method)(*args))

    def of_list(self, owner: list[Any] | tuple[Any, ...], method: str, value: Any) -> int:
        """Call a method of a list."""
        places = [place for place, one in enumerate(owner) if self.same(one, value)]
        if method == "count":
            return len(places)
        if not places:
            raise TypeError("what it looks for is not in the list")
        return places[0]


class Writing(Fields):
    """What is written of a value, with the owner of each letter."""

    def concat(self, parts: list[str]) -> str:
        """Join texts, each with its owners."""
        with_owners = [part for part in parts if isinstance(part, TierText)]
        like = next((part for part in parts if not part.isascii()), "")
        if sum(len(part.spans) for part in with_owners) > ITEMS:
            self.budget.too_large()
        self.budget.room_for(sum(map(len, parts)), TierText.of(like, "query") if with_owners else like)
        return join_text(parts) if with_owners else "".join(parts)

    def written(self, value: Any) -> str:
        """Return the text that is written of a value."""
        if isinstance(value, str):
            return value
        return "" if isinstance(value, Undefined) else self.shown(value)

    def shown(self, value: Any) -> str:
        """Return a value as Python writes it within a list."""
        self.budget.step()
        if isinstance(value, str):
            self.budget.room_for(10 * len(value), value)
            return str(self.owned(str.__repr__(value), value))
        if value is None or isinstance(value, int | float):
            return repr(value)
        if type(value) is list:
            return self._enclosed("[", [self.shown(one) for one in value], "]")
        if type(value) is tuple:
            return self._enclosed("(", [self.shown(one) for one in value], ",)" if len(value) == 1 else ")")
        if isinstance(value, dict):
            pairs = [self.concat([self.shown(key), ": ", self.shown(one)]) for key, one in value.items()]
            return self._enclosed("{", pairs, "}")
        if isinstance(value, Undefined):
            return "Undefined"
        raise NotAllowed(f"it writes a {kind(value)}, which no chat template needs")

    def _enclosed(self, before: str, parts: list[str], after: str) -> str:
        return self.concat([before, *[part for piece in parts for part in (piece, ", ")][:-1], after])

    def to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        """Do what transformers' `tojson` does: JSON without HTML escapes."""
        if isinstance(indent, str | int) and (len(indent) if isinstance(indent, str) else indent) > WIDTH:
            self.budget.too_large()
        pair = separators if isinstance(separators, list | tuple) else []
        if separators is not None and [isinstance(one, str) and len(one) < WIDTH for one in pair] != [True, True]:
            raise NotAllowed("its `tojson` has separators that no chat template needs")
        self.budget.room_for(self._json_size(value, 1 + WIDTH))
        apart = (pair[0], pair[1]) if pair else None
        result = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=apart, sort_keys=sort_keys)
        return str(self.owned(result, value, indent, separators))

    def _json_size(self, value: Any, indent: int) -> int:
        """Bound the letters of a value's JSON, of which each line may begin with so many."""
        self.budget.step()
        if isinstance(value, str):
            return 12 * len(value) + indent + WIDTH
        if isinstance(value, dict):
            return sum((self._json_size(one, indent + WIDTH) for one in [*value, *value.values()]), 2 * indent)
        if isinstance(value, list | tuple):
            return sum((self._json_size(one, indent + WIDTH) for one in value), 2 * indent)
        return 40 + indent


def tier_of(value: Any) -> Tier | None:
    """Return the tier that a text, or its end, came from; None for scaffold and for what is no text."""
    return value.spans[-1].tier if isinstance(value, TierText) and value.spans else None


def known(name: Any) -> str:
    """Quote a name for a message; one that is not the template's own is not shown."""
    return repr(name[:40]) if type(name) is str else "…"


def kind(value: Any) -> str:
    """Name the kind of a value for a message."""
    name = "str" if isinstance(value, str) else type(value).__name__.lower()
    return {"once": "generator", "view": "view of a dict", "nonetype": "none"}.get(name, name)
