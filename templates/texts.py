"""What a template does with text: the methods of strings and the two ways to fill a format."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Iterable, Iterator
from typing import Any

from jinja2 import Undefined

from .budget import ITEMS, NotAllowed
from .tier_text import TierText, join_text
from .values import Function, Writing, tier_of

METHODS = (
    "capitalize count endswith find format index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle "
    "isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split "
    "splitlines startswith strip title upper zfill"
).split()
PRODUCT = {"strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition", "rsplit"}  # each letter with each other
NAMED = {"split": ("sep", "maxsplit"), "rsplit": ("sep", "maxsplit"), "splitlines": ("keepends",)}
LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
PLACE = re.compile(
    r"%(?:\((?P<key>[^()]*)\))?(?P<way>[-#0 +]*(?P<width>\*|[1-9]\d*|)(?:\.(?P<places>\*|\d*))?[hlL]?[a-zA-Z%])"
)


class Formats(Writing):
    """The two ways to fill a format; each value keeps its owner, and so does the pattern between."""

    def formatted(self, pattern: str, args: list[Any], named: dict[str, Any]) -> str:
        """Do what `str.format` does."""
        parts: list[str] = []
        unnamed = itertools.count()
        for literal, name, spec, conversion in string.Formatter().parse(pattern):
            self.budget.step()
            parts.append(literal)
            if name is None:
                continue
            value = self._field(name, unnamed, args, named)
            if "{" in (spec or "") or conversion not in (None, "s"):
                raise NotAllowed("it formats a value in a way that no chat template needs")
            parts.append(self.formatted_value(value, spec or ""))
        tier = tier_of(pattern)
        return self.concat([TierText.of(part, tier) for part in parts] if tier else parts)

    def _field(self, name: str, unnamed: Iterator[int], args: list[Any], named: dict[str, Any]) -> Any:
        first, *others = re.split(r"\.|(?=\[)", name)
        if not first or first.isdecimal():
            place = int(first[:6]) if first else next(unnamed)
            if place >= len(args):
                raise TypeError("its format has more places than values")
            value = args[place]
        elif first in named:
            value = named[first]
        else:
            raise TypeError("its format names a value that it is not given")
        for part in others:
            inside = part[1:-1] if part.startswith("[") else None
            value = self.getattr(value, part) if inside is None else self.getitem(
                value, int(inside[:9]) if inside.isdecimal() else inside
            )  # fmt: skip
        return value

    def formatted_value(self, value: Any, spec: str) -> str:
        """Do what Python's `format` does with one value."""
        if not spec:
            return self.written(value)
        if not isinstance(value, str | int | float):
            raise TypeError(f"unsupported format string passed to {type(value).__name__}.__format__")
        if re.search(r"\d{4}", spec):
            self.budget.too_large()
        self.budget.room_for(1000 + (len(value) if isinstance(value, str) else 0))
        return str(self.owned(format(str.__str__(value) if isinstance(value, str) else value, spec), value))

    def percent(self, pattern: str, values: Any) -> str:
        """Do what `%` does with a text on its left."""
        waiting = list(values) if type(values) is tuple else [values]
        parts: list[str] = []
        at = 0
        for place in PLACE.finditer(pattern):
            self.budget.step()
            parts += self._whole(pattern[at : place.start()])
            at = place.end()
            if place["way"].endswith("%"):
                parts.append("%")
                continue
            if place["key"] is not None:
                value = self.getitem(values, place["key"])
            elif not waiting:
                raise TypeError("not enough arguments for format string")
            else:
                value = waiting.pop(0)
            parts.append(self.percent_value(value, place["way"], [place["width"], place["places"] or ""]))
        parts += self._whole(pattern[at:])
        if waiting and not isinstance(values, dict | list):
            raise TypeError("not all arguments converted during string formatting")
        tier = tier_of(pattern)
        return self.concat([TierText.of(part, tier) for part in parts] if tier else parts)

    @staticmethod
    def _whole(literal: str) -> list[str]:
        if "%" in literal:
            raise TypeError("its format is not complete")
        return [literal]

    def percent_value(self, value: Any, way: str, widths: Iterable[str]) -> str:
        """Fill one place of a format, say `%-5s`."""
        if "*" in widths or any(len(width) > 3 for width in widths):
            self.budget.too_large()
        if way == "s":
            return self.written(value)
        if way[-1] in "sra":
            value, way = self.written(value) if way[-1] == "s" else self.shown(value), f"{way[:-1]}s"
        elif not isinstance(value, int | float | str):
            raise TypeError(f"%{way[-1]} format: a number is required, not {type(value).__name__}")
        self.budget.room_for(1000 + 10 * (len(value) if isinstance(value, str) else 0))
        return str(self.owned(f"%{way}" % (str.__str__(value) if isinstance(value, str) else value), value))


class Texts(Formats):
    """Strings; every result is bounded before it is made, and each of its letters has an owner."""

    def method(self, owner: Any, name: str) -> Any:
        """Return a method of a value; None if it has none of that name."""
        if isinstance(owner, str) and name in METHODS:
            return Function(lambda args, named: self.of_text(owner, name, args, named))
        return super().method(owner, name)

    def of_text(self, text: str, name: str, args: list[Any], named: dict[str, Any]) -> Any:
        """Call a method of a string, on one with owners if any operand has them."""
        if name == "format":
            return self.formatted(text, args, named)
        if name == "join":
            if len(args) != 1 or named:
                raise TypeError("join() takes one list")
            return self.joined(args[0], text)
        if any(not isinstance(one, str | int | tuple | None) or isinstance(one, Undefined) for one in args):
            raise TypeError(f"{name}() takes text and numbers")
        if named.keys() - set(NAMED.get(name, ())):
            raise TypeError(f"{name}() takes no such argument")
        self._bound(text, name, [*args, *named.values()])
        if any(map(tier_of, args)) and name != "count":
            text = join_text([text])
        if name in ("split", "rsplit"):
            return self._split(text, name, *args, **named)
        result = getattr(text, name)(*args, **named)
        return [*result] if isinstance(result, list) else result

    def _bound(self, text: str, name: str, args: list[Any]) -> None:
        """Ask for the room that a method's result takes, and refuse what would take too long."""
        others = [one for one in args if isinstance(one, str)]
        self.budget.work(
            sum(len(part) for one in args if isinstance(one, tuple) for part in one if isinstance(part, str))
        )
        size = len(text)
        if name == "replace" and len(others) > 1:
            count = text.count(others[0]) if others[0] else len(text) + 1
            if count > ITEMS and (isinstance(text, TierText) or tier_of(others[1])):
                self.budget.too_large()
            size += count * len(others[1])
        elif name == "zfill" and args:
            size = max(size, args[0] if isinstance(args[0], int) else 0)
        elif name == "splitlines" and sum(map(text.count, LINE_ENDS)) > ITEMS:
            self.budget.too_large()
        elif name in PRODUCT and others:
            self.budget.work(len(text) * len(others[0]))
        self.budget.work(len(text))
        self.budget.room_for(3 * size, "".join(others[1:2]) + text[:1] if text.isascii() else text)

    def _split(self, text: str, name: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        most = maxsplit if 0 <= maxsplit <= ITEMS else ITEMS + 1
        pieces: list[str] = getattr(str, name)(text, sep, most)
        self.budget.room_for_items(len(pieces))
        self.budget.room_for(len(text) + 512 * len(pieces))
        return list(getattr(text, name)(sep, most)) if isinstance(text, TierText) else pieces

    def added(self, left: str, right: str) -> str:
        """Do what `+` does with two texts."""
        return self.concat([left, right])

    def repeated(self, text: str, times: int) -> str:
        """Do what `*` does with a text."""
        times = max(0, times)
        if isinstance(text, TierText) and max(1, len(text.spans)) * times > ITEMS:
            self.budget.too_large()
        self.budget.room_for(len(text) * times, text)
        return text * times

    def joined(self, values: Any, d: str = "", attribute: Any = None) -> str:
        """Do what the filter `join` does."""
        between = self.written(d)
        parts: list[str] = []
        for value in self.items(values):
            self.budget.room_for_items(2)
            parts += [self.written(value if attribute is None else self.path(value, attribute)), between]
        return self.concat(parts[:-1])

    def path(self, value: Any, attribute: str | int) -> Any:
        """Follow a path of keys with dots between: `attribute` of many filters."""
        for part in str(attribute).split(".") if isinstance(attribute, str) else [attribute]:
            value = self.getitem(value, int(part) if isinstance(part, str) and part.isdecimal() else part)
        return value
