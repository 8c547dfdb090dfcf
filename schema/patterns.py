"""Regular expressions as GBNF, between the quotes of a JSON string. Python parses them, as it does when it checks."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

Range = tuple[int, int]
LAST = 0x10FFFF
PLAIN: list[Range] = [(0x20, 0x21), (0x23, 0x5B), (0x5D, 0x7E), (0xA0, 0xD7FF), (0xE000, LAST)]  # not escaped in JSON
ESCAPED = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
CLASSES = {
    "CATEGORY_DIGIT": [(0x30, 0x39)],
    "CATEGORY_WORD": [(0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)],
    "CATEGORY_SPACE": [(0x20, 0x20)],
}
REPETITIONS = 1000  # llama.cpp takes somewhat more

DAYS = r"(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31"  # and 29 February below
YEAR = r"([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
DATE = rf"({YEAR}-({DAYS})|[0-9]{{2}}([02468][48]|[13579][26]|[2468]0)-02-29)"
TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
BYTE = r"([0-9]|[1-9][0-9]|1[0-9]{2}|2[0-4][0-9]|25[0-5])"
FORMATS = {
    "date": f"^{DATE}$",
    "time": f"^{TIME}$",
    "date-time": f"^{DATE}T{TIME}$",
    "uuid": r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "ipv4": rf"^{BYTE}(\.{BYTE}){{3}}$",
    "email": r"^[A-Za-z0-9_+-]+(\.[A-Za-z0-9_+-]+)*@[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z]{2,12})+$",
    "uri": r"^https?://[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z]{2,12})+(/[A-Za-z0-9._~-]*)*$",
}


class Unsupported(ValueError):
    """A grammar cannot say this."""


def literal(text: str) -> str:
    """Write a text as GBNF."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def characters(ranges: Iterable[Range]) -> str:
    """Write a set of characters as GBNF, by their numbers: so none of them means anything."""
    shown = [rf"\U{low:08X}" if low == high else rf"\U{low:08X}-\U{high:08X}" for low, high in ranges]
    return f"[{''.join(shown)}]"


def without(ranges: Iterable[Range], excluded: Iterable[Range]) -> list[Range]:
    """Return some ranges less what lies in others."""
    left = list(ranges)
    for low, high in excluded:
        left = [
            piece
            for start, end in left
            for piece in ((start, min(end, low - 1)), (max(start, high + 1), end))
            if piece[0] <= piece[1]
        ]
    return left


def within(ranges: Iterable[Range], allowed: Iterable[Range]) -> list[Range]:
    """Return what lies in both."""
    ranges = list(ranges)
    shared = [(max(low, start), min(high, end)) for low, high in allowed for start, end in ranges]
    return sorted({piece for piece in shared if piece[0] <= piece[1]})


def one_of(ranges: Sequence[Range]) -> str:
    """Write one character of a set as it stands in a JSON string.

    Raises:
        Unsupported: a JSON string can hold none of them.
    """
    plain = within(ranges, PLAIN)
    ways = [characters(plain)] if plain else []
    ways += [literal(said) for one, said in ESCAPED.items() if any(low <= ord(one) <= high for low, high in ranges)]
    if not ways:
        raise Unsupported("a character that no JSON text needs")
    return ways[0] if len(ways) == 1 else f"({' | '.join(ways)})"


ANYTHING = [(0x20, LAST)]  # of what a free string holds


def pattern_body(pattern: str, rule: Callable[[str], str]) -> str:
    """Return the GBNF of the texts that a pattern is found in; `rule` gives a part a name of its own.

    Raises:
        Unsupported: it looks ahead or back, refers to a group, or is no pattern that Python knows.
    """
    try:
        parsed = parser.parse(pattern)
    except (ValueError, parser.error, OverflowError, RecursionError) as error:
        raise Unsupported(str(error)) from None
    if parsed.state.flags & ~32:  # re.UNICODE alone
        raise Unsupported("flags")
    return _Pattern(rule).whole(list(parsed))


class _Pattern:
    def __init__(self, rule: Callable[[str], str]) -> None:
        self.rule = rule

    def whole(self, items: list[Any]) -> str:
        """Write a pattern that is searched for: without an anchor, anything may stand before and behind it."""
        for place, (code, value) in enumerate(items):
            inner = [list(one) for one in value[1]] if str(code) == "BRANCH" else []
            inner = [list(value[3])] if str(code) == "SUBPATTERN" else inner
            if any(str(one) == "AT" for option in inner for one, _ in self._leaves(option)):
                options = [self.whole(items[:place] + option + items[place + 1 :]) for option in inner]
                return f"({' | '.join(options)})"
        anchors, begins, ends = [str(value) if str(code) == "AT" else "" for code, value in items], 0, 0
        while anchors[begins : begins + 1] == ["AT_BEGINNING"]:
            begins += 1
        while ends < len(items) - begins and anchors[-1 - ends] == "AT_END":
            ends += 1
        body = self.sequence(items[begins : len(items) - ends])
        free = f"{one_of(ANYTHING)}*"
        return " ".join(part for part in ("" if begins else free, body, "" if ends else free) if part)

    def _leaves(self, items: list[Any]) -> Iterable[tuple[Any, Any]]:
        for code, value in items:
            if str(code) == "SUBPATTERN":
                yield from self._leaves(list(value[3]))
            elif str(code) == "BRANCH":
                for option in value[1]:
                    yield from self._leaves(list(option))
            else:
                yield code, value

    def sequence(self, items: Iterable[Any]) -> str:
        return " ".join(filter(None, (self.item(str(code), value) for code, value in items))) or '""'

    def item(self, code: str, value: Any) -> str:
        if code in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            return one_of(self.ranges(code, value))
        if code in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inner = value
            return repeated(self.rule(self.sequence(inner)), low, None if high == parser.MAXREPEAT else high)
        if code == "SUBPATTERN":
            _, added, removed, inner = value
            if added or removed:
                raise Unsupported("flags")
            return f"({self.sequence(inner)})"
        if code == "BRANCH":
            return f"({' | '.join(map(self.sequence, value[1]))})"
        raise Unsupported(code.lower())

    def ranges(self, code: str, value: Any) -> list[Range]:
        if code == "ANY":
            return without(ANYTHING, [(10, 10)])
        if code in ("LITERAL", "NOT_LITERAL"):
            return [(value, value)] if code == "LITERAL" else without(ANYTHING, [(value, value)])
        items = [(str(kind), inner) for kind, inner in value]
        negated = items[0][0] == "NEGATE"
        found: list[Range] = []
        for kind, inner in items[negated:]:
            name = str(inner)
            if kind == "CATEGORY":
                positive = CLASSES[name.replace("_NOT", "")]
                found += without([(0x20, 0x7E)], positive) if "_NOT" in name else positive
            else:
                found += [inner if kind == "RANGE" else (inner, inner)]
        if not negated:
            return found
        # what else Python takes for a digit or a letter is left out of its complement
        return without([(0x20, 0x7E)] if any(kind == "CATEGORY" for kind, _ in items) else ANYTHING, found)


def repeated(item: str, low: int, high: int | None) -> str:
    """Write an item some times.

    Raises:
        Unsupported: more often than llama.cpp takes.
    """
    if max(low, high or 0) > REPETITIONS:
        raise Unsupported(f"more than {REPETITIONS:,} repetitions")
    marks = {(0, None): "*", (1, None): "+", (0, 1): "?", (1, 1): ""}
    return item + marks.get((low, high), f"{{{low},{'' if high is None else high}}}") if high != 0 else '""'
