"""The filters and the tests that chat templates use, each as Jinja has it.

Jinja's other filters (`center`, `sum`, `batch`, ...) are left out: no chat template needs them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import jinja2.filters
import markupsafe
from jinja2 import Undefined

from .budget import NotAllowed
from .texts import Texts
from .tier_text import TierText
from .values import SCALARS, Function, Once, View, kind, known

FILTERS = (
    "abs capitalize count d default dictsort e escape first float format indent int items join last length list lower "
    "map max min reject rejectattr replace reverse round safe select selectattr sort string title tojson trim unique "
    "upper"
).split()
ALIASES = {"d": "default", "e": "escape", "count": "length"}
NUMBER = 64  # letters of a text that may be a number


class Tests(Texts):
    """What a template may ask of a value."""

    def passes(self, value: Any, args: tuple[Any, ...]) -> bool:
        """Tell whether a value passes a test, given by name with its arguments, or is true where none is given."""
        self.budget.step()
        return self.test(args[0], value, list(args[1:])) if args else bool(value)

    def test(self, name: str, value: Any, args: list[Any]) -> bool:
        """Tell whether a value passes a test: `value is name(args)`."""
        self.budget.step()
        if isinstance(name, str) and name in COMPARISONS:
            return self.compare(COMPARISONS[name], value, *args)
        if not isinstance(name, str) or name not in TESTS:
            raise NotAllowed(f"it uses the test {known(name)}, which no chat template needs")
        return bool(TESTS[name](value, *args))

    def compare(self, how: str, left: Any, right: Any) -> bool:
        """Compare two values: eq, ne, lt, le, gt, ge, in or notin."""
        if how in ("eq", "ne"):
            return self.same(left, right) == (how == "eq")
        if how in ("in", "notin"):
            return self.contains(right, left) == (how == "in")
        if isinstance(left, list | tuple) and isinstance(right, list | tuple):
            raise NotAllowed("it asks which of two lists comes first, which no chat template needs")
        if isinstance(left, str) and isinstance(right, str):
            self.budget.work(min(len(left), len(right)))
        return bool(getattr(operator, how)(left, right))


class TextFilters(Tests):
    """Filters of text and of numbers, by their names in Jinja: `filter_trim` is `trim`."""

    def _method(self, name: str, value: Any, *args: Any) -> Any:
        return self.of_text(self.written(value), name, list(args), {})

    def filter_capitalize(self, value: Any) -> Any:
        """Capitalise the first letter."""
        return self._method("capitalize", value)

    def filter_lower(self, value: Any) -> Any:
        """Write in lower case."""
        return self._method("lower", value)

    def filter_upper(self, value: Any) -> Any:
        """Write in capitals."""
        return self._method("upper", value)

    def filter_title(self, value: Any) -> Any:
        """Capitalise each word."""
        text = self.written(value)
        self.budget.work(64 * len(text))
        self.budget.room_for(64 * len(text), text)
        title = jinja2.filters.do_title(str.__str__(text))
        return text.changed(title) if isinstance(text, TierText) else title

    def filter_trim(self, value: Any, chars: Any = None) -> Any:
        """Strip both ends."""
        return self._method("strip", value, chars)

    def filter_replace(self, value: Any, old: Any, new: Any, count: int | None = None) -> Any:
        """Replace a part."""
        return self._method("replace", value, self.written(old), self.written(new), -1 if count is None else count)

    def filter_escape(self, value: Any) -> Any:
        """Write for HTML."""
        text = self.written(value)
        self.budget.room_for(6 * len(text), text)
        escaped = markupsafe.escape(str.__str__(text))
        return self.owned(str.__str__(escaped), text)

    def filter_safe(self, value: Any) -> Any:
        """Keep a text from being escaped, which nothing is here."""
        return self.written(value)

    def filter_string(self, value: Any) -> Any:
        """Make a text."""
        return self.written(value)

    def filter_format(self, value: Any, *args: Any, **named: Any) -> Any:
        """Fill a format with places as `%s`."""
        return self.percent(self.written(value), named or args)

    def filter_indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> Any:
        """Indent the lines but the first."""
        pad = width if isinstance(width, str) else self.repeated(" ", width)
        lines = self._method("splitlines", self.concat([self.written(value), "\n"]))
        self.budget.room_for_items(4 * len(lines))
        parts = [part for line in lines[1:] for part in ("\n", pad if line or blank else "", line)]
        return self.concat([pad if first else "", *lines[:1], *parts])

    def filter_tojson(self, value: Any, *args: Any, **named: Any) -> Any:
        """Write as JSON."""
        return self.to_json(value, *args, **named)

    def filter_abs(self, value: Any) -> Any:
        """Take a number without its sign."""
        return abs(value)

    def filter_round(self, value: Any, precision: int = 0, method: str = "common") -> Any:
        """Round a number."""
        if not isinstance(value, int | float):
            raise TypeError(f"a {kind(value)} cannot be rounded")
        if not isinstance(precision, int) or abs(precision) > NUMBER:
            self.budget.too_large()
        if method == "common":
            return self.made(round(value, precision))
        function = {"ceil": math.ceil, "floor": math.floor}[method]
        return self.made(function(value * 10**precision) / 10**precision)

    def filter_int(self, value: Any, default: Any = 0, base: int = 10) -> Any:
        """Read a whole number."""
        if isinstance(value, str) and len(value) > NUMBER:
            return default
        return self.made(jinja2.filters.do_int(value, default, base))

    def filter_float(self, value: Any, default: Any = 0.0) -> Any:
        """Read a number."""
        return default if isinstance(value, str) and len(value) > NUMBER else jinja2.filters.do_float(value, default)


class Filters(TextFilters):
    """Filters of lists, and the way from a filter's name to what it does."""

    def filter(self, name: str, value: Any, args: list[Any], named: dict[str, Any]) -> Any:
        """Apply a filter."""
        self.budget.check()
        if not isinstance(name, str) or name not in FILTERS:
            raise NotAllowed(f"it uses the filter {known(name)}, which no chat template needs")
        return getattr(self, f"filter_{ALIASES.get(name, name)}")(value, *args, **named)

    def filter_default(self, value: Any, default_value: Any = "", boolean: bool = False) -> Any:
        """Put another value where there is none."""
        return default_value if isinstance(value, Undefined) or (boolean and not value) else value

    def filter_length(self, value: Any) -> Any:
        """Count."""
        return len(value)

    def filter_list(self, value: Any) -> Any:
        """Make a list."""
        return self.listed(self.items(value))

    def filter_items(self, value: Any) -> Any:
        """List the keys and values of a dict."""
        return Once(iter(() if isinstance(value, Undefined) else self.of_dict(value, "items")))

    def filter_first(self, value: Any) -> Any:
        """Take the first."""
        return next(self.items(value), Undefined("No first item, sequence was empty."))

    def filter_last(self, value: Any) -> Any:
        """Take the last."""
        return next(self.items(self.filter_reverse(value)), Undefined("No last item, sequence was empty."))

    def filter_reverse(self, value: Any) -> Any:
        """Turn round."""
        if isinstance(value, str):
            return self.sliced(value, slice(None, None, -1))
        if isinstance(value, Once | Function):
            raise TypeError("argument to reversed() must be a sequence")
        return Once(reversed(value if isinstance(value, list | tuple) else self.listed(self.items(value))))

    def filter_join(self, value: Any, d: Any = "", attribute: Any = None) -> Any:
        """Join what is written of each."""
        return self.joined(value, d, attribute)

    def filter_unique(self, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
        """Leave out what came before."""
        found = self.listed(self.items(value))
        keys = self._keys(found, case_sensitive, attribute)
        first = dict(zip(reversed(keys), reversed(found), strict=True))
        return Once(iter([first[key] for key in dict.fromkeys(keys)]))

    def filter_sort(
        self, value: Any, reverse: bool = False, case_sensitive: bool = False, attribute: Any = None
    ) -> Any:
        """Sort."""
        found = self.listed(self.items(value))
        keys = self._keys(found, case_sensitive, attribute)
        return [found[place] for place in sorted(range(len(found)), key=keys.__getitem__, reverse=bool(reverse))]

    def filter_min(self, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
        """Take the smallest."""
        found = self.filter_sort(value, False, case_sensitive, attribute)
        return found[0] if found else Undefined("No aggregated item, sequence was empty.")

    def filter_max(self, value: Any, case_sensitive: bool = False, attribute: Any = None) -> Any:
        """Take the largest."""
        found = self.filter_sort(value, True, case_sensitive, attribute)
        return found[0] if found else Undefined("No aggregated item, sequence was empty.")

    def filter_dictsort(self, value: Any, case_sensitive: bool = False, by: str = "key", reverse: bool = False) -> Any:
        """List the keys and values of a dict in order."""
        return self.filter_sort(self.of_dict(value, "items"), reverse, case_sensitive, ("key", "value").index(by))

    def _keys(self, values: list[Any], case_sensitive: bool, attribute: Any) -> list[Any]:
        """Return what values are compared by."""
        if isinstance(attribute, str) and "," in attribute:
            raise NotAllowed("it compares by several fields, which no chat template needs")
        keys = [value if attribute is None else self.path(value, attribute) for value in values]
        for key in keys:
            if not isinstance(key, SCALARS) and not isinstance(key, Undefined):
                raise TypeError(f"'<' not supported between instances of '{type(key).__name__}'")
        letters = sum(len(key) for key in keys if isinstance(key, str))
        self.budget.work(letters * (len(keys).bit_length() + 1))
        self.budget.room_for_items(2 * len(keys))
        if case_sensitive:
            return keys
        for key in keys:
            if isinstance(key, str):
                self.budget.room_for(3 * len(key), key)
        return [str.lower(str.__str__(key)) if isinstance(key, str) else key for key in keys]

    def filter_map(self, value: Any, *args: Any, **named: Any) -> Any:
        """Apply a filter to each, or take a field of each."""
        if args:
            name, *others = args
            return self._once(self.filter(name, one, others, named) for one in self.items(value or ()))
        attribute, default = named.get("attribute"), named.get("default")
        if named.keys() - {"attribute", "default"} or not isinstance(attribute, str | int):
            raise TypeError("map requires a filter argument")
        found = (self.path(one, attribute) for one in self.items(value or ()))
        return self._once(default if isinstance(one, Undefined) and default is not None else one for one in found)

    def filter_select(self, value: Any, *args: Any) -> Any:
        """Keep those that pass a test."""
        return self._once(one for one in self.items(value or ()) if self.passes(one, args))

    def filter_reject(self, value: Any, *args: Any) -> Any:
        """Leave out those that pass a test."""
        return self._once(one for one in self.items(value or ()) if not self.passes(one, args))

    def filter_selectattr(self, value: Any, attribute: Any, *args: Any) -> Any:
        """Keep those of which a field passes a test."""
        return self._once(one for one in self.items(value or ()) if self.passes(self.path(one, attribute), args))

    def filter_rejectattr(self, value: Any, attribute: Any, *args: Any) -> Any:
        """Leave out those of which a field passes a test."""
        return self._once(one for one in self.items(value or ()) if not self.passes(self.path(one, attribute), args))

    def _once(self, values: Iterator[Any]) -> Once:
        """Compute all now: a chain of unread iterators could be of any length."""
        return Once(iter(self.listed(values)))


def rest(value: Any, number: Any) -> Any:
    """Return what is left when a number is divided by another."""
    if not isinstance(value, int | float) or not isinstance(number, int | float):
        raise TypeError("only a number can be divided")
    return value % number


COMPARISONS = {
    "==": "eq", "eq": "eq", "equalto": "eq", "!=": "ne", "ne": "ne", ">": "gt", "gt": "gt", "greaterthan": "gt",
    "ge": "ge", ">=": "ge", "<": "lt", "lt": "lt", "lessthan": "lt", "<=": "le", "le": "le", "in": "in",
}  # fmt: skip
TESTS: dict[str, Callable[..., Any]] = {
    "odd": lambda value: rest(value, 2) == 1,
    "even": lambda value: rest(value, 2) == 0,
    "divisibleby": lambda value, number: rest(value, number) == 0,
    "defined": lambda value: not isinstance(value, Undefined),
    "undefined": lambda value: isinstance(value, Undefined),
    "none": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "false": lambda value: value is False,
    "true": lambda value: value is True,
    "integer": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "float": lambda value: isinstance(value, float),
    "lower": lambda value: isinstance(value, str) and value.islower(),
    "upper": lambda value: isinstance(value, str) and value.isupper(),
    "string": lambda value: isinstance(value, str),
    "mapping": lambda value: isinstance(value, dict),
    "number": lambda value: isinstance(value, int | float),
    "sequence": lambda value: isinstance(value, str | dict | list | tuple | Undefined) and not isinstance(value, View),
    "iterable": lambda value: isinstance(value, str | dict | list | tuple | Undefined | Once),
    "callable": lambda value: isinstance(value, Function),
    "sameas": lambda value, other: value is other,
    "filter": lambda value: value in FILTERS,
    "test": lambda value: value in TESTS or value in COMPARISONS,
}
