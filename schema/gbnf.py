"""A JSON Schema as GBNF, llama.cpp's grammars.

Whatever the grammar lets through fits the schema, but for what `left` names. It lets through less than the schema where
nobody misses it: properties come in the order of the schema and, unless `additionalProperties` says so, no others do;
white space is sparing, so that no model loses itself in it.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from .patterns import FORMATS, PLAIN, Unsupported, characters, literal, pattern_body, repeated, without

Schema = dict[str, Any]

COMMON = {
    "ws": '" "?',
    "char": characters(PLAIN) + r' | "\\" ( ["\\/bfnrt] | "u" escape )',
    "escape": "( [0-9a-cA-Ce-fE-F] [0-9a-fA-F] | [dD] [0-7] ) [0-9a-fA-F] [0-9a-fA-F]",  # half a pair is no character
    "string": r'"\"" char* "\""',
    "integer": '"-"? ( "0" | [1-9] [0-9]{0,14} )',
    "number": 'integer ( "." [0-9]{1,16} )? ( [eE] [+-]? [0-9]{1,2} )?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "array": '"[" ( value ( "," ws value )* )? "]"',
    "object": r'"{" ( string ":" ws value ( "," ws string ":" ws value )* )? "}"',
    "value": "object | array | string | number | boolean | null",
}
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
HINTS = {  # a schema that names no type means the one whose keywords it has
    "object": {"properties", "required", "additionalProperties", "patternProperties", "minProperties", "maxProperties"},
    "array": {"items", "prefixItems", "minItems", "maxItems", "uniqueItems", "contains"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
LEFT = (  # to the check of the answer
    "not if multipleOf uniqueItems contains minProperties maxProperties propertyNames dependentRequired "
    "dependentSchemas dependencies unevaluatedItems"
).split()
TEXT = ("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly")
SAID_ELSEWHERE = {*TEXT, "$comment", "$schema", "$id", "$anchor", "$defs", "definitions"}
COMBINED = {"$ref", "allOf", "anyOf", "oneOf"}
MERGED_BELOW = {"type", "enum", "const", "properties", "required", "items", "prefixItems"}
MAPS = {"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"}  # of names to schemas
DATA = {"const", "enum", "default", "examples"}
COMBINATIONS = 1000  # of alternatives that hold together
DEPTH = 64


class InvalidSchema(ValueError):
    """A schema is none, or no answer fits it; the text says which part and why."""


class Grammar(NamedTuple):
    """A grammar, and what it leaves to the check of the answer."""

    text: str  # its root is `root`, or `after` for what follows a text that ends in an empty line or none
    left: list[str]


def pointer(path: Iterable[Any]) -> str:
    """Write where something is, as `/tags/0`; the whole is `/`."""
    return "/" + "/".join(map(str, path))


def convert(document: Schema) -> Grammar:
    """Turn a schema into a grammar.

    Raises:
        InvalidSchema: it refers to what is not in it, or nothing fits it.
    """
    return _Converter(document).convert()


class _Converter:
    def __init__(self, document: Schema) -> None:
        self.document = document
        self.rules: dict[str, str] = {}
        self.names: dict[str, str] = {}  # of the rules, by their schemas
        self.left: list[str] = []

    def convert(self) -> Grammar:
        references: set[str] = set()
        for schema, at in parts(self.document, "/"):
            if isinstance(schema.get("$ref"), str):
                self.resolve(schema["$ref"], at)
                references.add(schema["$ref"])
            for pattern in [schema.get("pattern", ""), *schema.get("patternProperties", ())]:
                check_pattern(pattern, at)
        finite: set[str] = set()
        while more := {one for one in references - finite if self.ends(self.resolve(one, "/"), finite)}:
            finite |= more
        if not self.ends(self.document, finite):
            raise InvalidSchema("no answer to it is ever complete: something requires itself")
        root = self.value(self.document, "/")
        rules = {"root": root, "after": r'"\n"{0,2} root', **self.rules, **COMMON}
        return Grammar("".join(f"{name} ::= {body}\n" for name, body in rules.items()), self.left)

    def rule(self, body: str) -> str:
        """Give a body a name, the same for the same."""
        if re.fullmatch(r"[\w-]+|\[[^\]]*\]", body):
            return body
        found = next((name for name, known in self.rules.items() if known == body), None)
        name = found or f"part-{len(self.rules)}"
        self.rules[name] = body
        return name

    def leave(self, keyword: str, at: str) -> None:
        note = f"{keyword} at {at}"
        if note not in self.left:
            self.left.append(note)

    def resolve(self, reference: str, at: str) -> Any:
        """Return the part of the document that a `$ref` means."""
        if not reference.startswith("#"):
            raise InvalidSchema(
                f"{at} refers to {reference!r}: nothing is fetched: copy it into $defs, and refer to that"
            )
        found: Any = self.document
        for step in reference[1:].split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            elif isinstance(found, dict) and step in found:
                found = found[step]
            else:
                raise InvalidSchema(f"{at} refers to {reference!r}, which is not there")
        if (reference != "#" and not reference.startswith("#/")) or not isinstance(found, dict | bool):
            raise InvalidSchema(f"{at} refers to {reference!r}, which is no part of the form #/$defs/name")
        return found

    def ends(self, schema: Any, finite: set[str]) -> bool:
        """Tell whether some value of a schema is finite, if those of these references are."""
        if not isinstance(schema, dict):
            return True
        if isinstance(schema.get("$ref"), str) and schema["$ref"] not in finite:
            return False
        if not all(any(self.ends(one, finite) for one in schema[key]) for key in ("anyOf", "oneOf") if key in schema):
            return False
        if not all(self.ends(one, finite) for one in schema.get("allOf", ())):
            return False
        kinds = types(schema)
        if kinds == ["object"]:
            known = schema.get("properties", {})
            return all(self.ends(known.get(name), finite) for name in schema.get("required", ()))
        if kinds == ["array"] and schema.get("minItems", 0) > 0:
            prefix, items = prefix_and_items(schema)
            return all(self.ends(one, finite) for one in [*prefix, items][: schema["minItems"]])
        return True

    # -- any schema ---------------------------------------------------------------------------------------------------

    def value(self, schema: Any, at: str) -> str:
        """Return the name of the rule of a schema's values."""
        if schema is True or (isinstance(schema, dict) and not schema.keys() - SAID_ELSEWHERE):
            return "value"
        key = json.dumps(schema, sort_keys=True)
        if key not in self.names:
            if at.count("/") > DEPTH:
                raise InvalidSchema(f"it nests too deep at {at}")
            name = f"value-{len(self.names)}"
            self.names[key], self.rules[name] = name, ""  # known while its parts are written: they may refer to it
            options = list(dict.fromkeys(way for flat in self.flat(schema, at, ()) for way in self.typed(flat, at)))
            if not options:
                raise InvalidSchema(f"nothing fits {at}")
            self.rules[name] = " | ".join(options)
        return self.names[key]

    def flat(self, schema: Any, at: str, inside: tuple[str, ...]) -> list[Schema]:
        """Return the alternatives of a schema, each without references, `allOf`, `anyOf` and `oneOf`."""
        if not isinstance(schema, dict):
            return [{}] if schema else []
        found = [{key: value for key, value in schema.items() if key not in SAID_ELSEWHERE | COMBINED}]
        reference, groups = schema.get("$ref"), [[one] for one in schema.get("allOf", ())]
        for dynamic in ("$dynamicRef", "$recursiveRef"):
            if dynamic in schema:
                raise InvalidSchema(f"{at} has a {dynamic}, which a grammar cannot follow: use $ref")
        if isinstance(reference, str):
            if reference in inside:
                raise InvalidSchema(f"{at} refers to itself without end ({reference})")
            inside = (*inside, reference)
            groups.append([self.resolve(reference, at)])
        groups += [schema[key] for key in ("anyOf", "oneOf") if key in schema]
        if len(schema.get("oneOf", ())) > 1 and not self.apart(schema["oneOf"], at, inside):
            self.leave("oneOf", at)
        for group in groups:
            options = [one for part in group for one in self.flat(part, at, inside)]
            if len(found) > 1 and len(found) * len(options) > COMBINATIONS:
                raise InvalidSchema(f"{at} combines too many alternatives for a grammar")
            found = [
                both
                for one, other in itertools.product(found, options)
                if (both := self.merged(one, other, at)) is not None
            ]
        return found

    def apart(self, options: Sequence[Any], at: str, inside: tuple[str, ...]) -> bool:
        """Tell whether it is plain that no value fits two of these: by type, or by a property that tells them apart."""

        def differ(one: Schema, other: Schema) -> bool:
            if "type" in one and "type" in other and not wide_types(one) & wide_types(other):
                return True
            values = [{json.dumps(value) for value in choices(schema) or ()} for schema in (one, other)]
            if all(values):
                return not values[0] & values[1]
            shared = set(one.get("required", ())) & set(other.get("required", ()))
            known = [schema.get("properties", {}) for schema in (one, other)]
            return any(
                differ(known[0][name], known[1][name])
                for name in shared
                if all(isinstance(properties.get(name), dict) for properties in known)
            )

        flat = [self.flat(option, at, inside) for option in options]
        pairs = itertools.combinations(flat, 2)
        return all(differ(one, other) for left, right in pairs for one in left for other in right)

    def merged(self, one: Schema, other: Schema, at: str) -> Schema | None:
        """Return the schema of what fits both; None if nothing does."""
        both = {**one, **other}
        for key in sorted(one.keys() & other.keys() - MERGED_BELOW):
            if one[key] == other[key]:
                continue
            if key in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
                both[key] = max(one[key], other[key])
            elif key in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
                both[key] = min(one[key], other[key])
            elif key in ("additionalProperties", "propertyNames"):
                both[key] = conjunction(one[key], other[key])
            elif key == "patternProperties":
                both[key] = {**one[key], **other[key]}
                self.leave(key, at)
            else:
                self.leave(key, at)
        if "type" in one and "type" in other:
            both["type"] = [kind for kind in listed(one) if kind in listed(other)]
            wide = {"integer": "number"}
            both["type"] += [
                kind
                for here, there in ((one, other), (other, one))
                for kind in listed(here)
                if wide.get(kind) in listed(there) and kind not in both["type"]
            ]
            if not both["type"]:
                return None
        values = [choices(schema) for schema in (one, other)]
        if all(found is not None for found in values):
            kept = {json.dumps(value) for value in values[1] or ()}
            both.pop("const", None)
            both["enum"] = [value for value in values[0] or () if json.dumps(value) in kept]
            if not both["enum"]:
                return None
        both |= merged_members(one, other)
        return both

    def typed(self, schema: Schema, at: str) -> Iterator[str]:
        """Yield the ways to write a value of a flat schema, one for each of its types or its choices."""
        for keyword in LEFT:
            if keyword in schema:
                self.leave(keyword, at)
        kinds, values = types(schema), choices(schema)
        if values is not None:
            for value in values:
                if any(kind in kinds for kind in kinds_of(value)):
                    yield literal(as_json(value))
            for keyword in sorted(schema.keys() & set().union(*HINTS.values())):
                self.leave(keyword, at)
            return
        for kind in kinds:
            if kind in ("boolean", "null"):
                yield kind
                continue
            write = {"object": self.object, "array": self.array, "string": self.string}.get(kind, self.number)
            if (body := write(schema, kind, at)) is not None:
                yield body

    # -- strings and numbers ------------------------------------------------------------------------------------------

    def string(self, schema: Schema, kind: str, at: str) -> str | None:
        low, high = schema.get("minLength", 0), schema.get("maxLength")
        if high is not None and high < low:
            return None
        shape = schema.get("pattern") or FORMATS.get(schema.get("format", ""))
        if "format" in schema and ("pattern" in schema or schema["format"] not in FORMATS):
            self.leave(f"format {schema['format']!r}", at)
        if shape is not None:
            try:
                body = pattern_body(shape, self.rule)
            except Unsupported:
                self.leave("pattern", at)
            else:
                for keyword in ("minLength", "maxLength"):
                    if keyword in schema:
                        self.leave(keyword, at)
                return rf'"\"" {body} "\""'
        if low == 0 and high is None:
            return "string"
        try:
            return rf'"\"" {repeated("char", low, high)} "\""'
        except Unsupported:
            self.leave("maxLength" if high is not None else "minLength", at)
            return "string"

    def number(self, schema: Schema, kind: str, at: str) -> str | None:
        low, high = bound(schema, "minimum", "exclusiveMinimum", 1), bound(schema, "maximum", "exclusiveMaximum", -1)
        if low is None and high is None:
            return kind
        if low and high and low[0] > high[0]:
            return None
        if kind == "integer":
            first, last = low and whole_above(*low), high and -whole_above(-high[0], high[1])
            return None if first is not None and last is not None and first > last else either(integers(first, last))
        floor, ceiling = low and math.floor(low[0]), high and math.ceil(high[0])
        for edge, end, keyword in ((low, floor, "minimum"), (high, ceiling, "maximum")):
            if edge and edge[0] != end:
                self.leave(keyword, at)
        open_low, open_high = bool(low and low == (floor, True)), bool(high and high == (ceiling, True))
        ways = decimals(floor, ceiling, open_low, open_high)
        return either(ways) if ways else None

    # -- arrays and objects -------------------------------------------------------------------------------------------

    def array(self, schema: Schema, kind: str, at: str) -> str | None:
        prefix, items = prefix_and_items(schema)
        low, high, inside = schema.get("minItems", 0), schema.get("maxItems"), at.rstrip("/")
        if prefix and not {"items", "additionalItems"} & schema.keys():
            items = low > len(prefix)  # nobody misses more than is described
        if items is False:
            high = len(prefix) if high is None else min(len(prefix), high)
        if high is not None and high < low:
            return None
        prefix = prefix or [items]
        count = len(prefix) if high is None else min(len(prefix), high)
        body = ""
        if high is None or high > count:
            more = self.rule(f'"," ws {self.value(items, f"{inside}/items")}')
            try:
                body = repeated(more, max(low - count, 0), None if high is None else high - count)
            except Unsupported:
                self.leave("minItems and maxItems", at)
                body = f"{more}*"
        for place in reversed(range(count)):
            comma = '"," ws ' if place else ""
            body = f"{comma}{self.value(prefix[place], f'{inside}/{place}')} {body}"
            body = body if place < low else f"( {body} )?"
        return f'"[" {body} "]"'

    def object(self, schema: Schema, kind: str, at: str) -> str | None:
        inside, required = at.rstrip("/"), set(schema.get("required", ()))
        others = schema.get("additionalProperties", False if schema.get("properties") else None)
        patterns: Schema = schema.get("patternProperties", {})
        if others is None and not required and not patterns:
            return "object"
        others = False if others is None and patterns else True if others is None else others
        members: list[tuple[str, bool, str]] = []
        known: Schema = dict(schema.get("properties", {}))
        for name in schema.get("required", ()):
            known.setdefault(name, others if "additionalProperties" in schema else True)
        for name, part in known.items():
            for pattern, more in patterns.items():
                part = conjunction(part, more) if re.search(pattern, name) else part
            if part is not False:
                value = self.value(part, f"{inside}/{name}")
                members.append((name, name in required, f'{literal(as_json(name))} ":" ws {value}'))
            elif name in required:
                return None
        extra = self.extra(schema, known, others, at)
        return f'"{{" {self.members(members, extra)} "}}"'

    def extra(self, schema: Schema, known: Schema, others: Any, at: str) -> str | None:
        """Return the rule of a property that has no name in the schema; None if there is none."""
        inside, patterns = at.rstrip("/"), schema.get("patternProperties", {})
        if patterns and others is False and not known:
            if len(patterns) > 1:
                self.leave("patternProperties", at)  # a name may match two
            try:
                pairs = [
                    rf'"\"" {pattern_body(pattern, self.rule)} "\"" ":" ws {self.value(part, f"{inside}/{pattern}")}'
                    for pattern, part in patterns.items()
                ]
                return self.rule(" | ".join(pairs))
            except Unsupported:
                self.leave("patternProperties", at)
        elif patterns and others is not False:
            self.leave("patternProperties", at)
        if others is False:
            return None
        if "unevaluatedProperties" in schema:
            self.leave("unevaluatedProperties", at)
        key = rf'"\"" {self.rule(other_names(sorted(known)))} "\""' if known else "string"
        return self.rule(f'{key} ":" ws {self.value(others, f"{inside}/*")}')

    def members(self, members: list[tuple[str, bool, str]], extra: str | None) -> str:
        """Write properties in their order, those that may be missing with or without, the comma only between two."""
        more = f'( "," ws {extra} )*'
        after, first = (more, f"( {extra} {more} )?") if extra else ("", "")  # with something before, and without
        for _, required, pair in reversed(members):
            with_comma, alone = f'"," ws {pair} {after}', f"{pair} {after}"
            if required:
                after, first = with_comma, alone
            else:
                after, first = f"( {with_comma} | {after} )", f"( {alone} | {first} )"
            after, first = self.rule(after) if after else "", self.rule(first)
        return first


# -- schemas ----------------------------------------------------------------------------------------------------------


def parts(schema: Any, at: str) -> Iterator[tuple[Schema, str]]:
    """Yield every schema in a document, and the document itself."""
    inside = at.rstrip("/")
    if isinstance(schema, list):
        for place, one in enumerate(schema):
            yield from parts(one, f"{inside}/{place}")
    elif isinstance(schema, dict):
        yield schema, at
        for key, value in schema.items():
            if key in MAPS and isinstance(value, dict):
                for name, one in value.items():
                    yield from parts(one, f"{inside}/{key}/{name}")
            elif key not in DATA:
                yield from parts(value, f"{inside}/{key}")


def check_pattern(pattern: str, at: str) -> None:
    """Refuse a text that is no regular expression to Python, which checks the answer."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise InvalidSchema(f"{at} has the pattern {pattern!r}, which is none here: {error}") from None


def listed(schema: Schema) -> list[str]:
    """Return the types that a schema names."""
    return schema["type"] if isinstance(schema["type"], list) else [schema["type"]]


def wide_types(schema: Schema) -> set[str]:
    """Return the types that a schema names, an integer as the number that it is."""
    return {"number" if kind == "integer" else kind for kind in listed(schema)}


def types(schema: Schema) -> list[str]:
    """Return the types of a schema: those that it names, or the one that its keywords mean, or all but integer."""
    if "type" in schema:
        return list(listed(schema))
    found = [kind for kind, hints in HINTS.items() if schema.keys() & hints and choices(schema) is None]
    return found[:1] or [kind for kind in TYPES if kind != "integer"]


def kinds_of(value: Any) -> list[str]:
    """Return the types that a value is of."""
    if isinstance(value, bool):
        return ["boolean"]
    whole = isinstance(value, int | float) and value == int(value)
    kinds = {dict: "object", list: "array", str: "string", int: "number", float: "number", type(None): "null"}
    return [kinds[type(value)], *(["integer"] if whole else [])]


def choices(schema: Schema) -> list[Any] | None:
    """Return the values of a schema that names them all."""
    if "const" in schema and "enum" in schema:
        return [value for value in schema["enum"] if value == schema["const"]]
    return [schema["const"]] if "const" in schema else schema.get("enum")


def conjunction(one: Any, other: Any) -> Any:
    """Return the schema of what fits both."""
    if one is False or other is False:
        return False
    return other if one is True else one if other is True or one == other else {"allOf": [one, other]}


def merged_members(one: Schema, other: Schema) -> Schema:
    """Return the members of objects and arrays that fit two schemas."""
    found: Schema = {}
    if "required" in one or "required" in other:
        found["required"] = list(dict.fromkeys([*one.get("required", ()), *other.get("required", ())]))
    known = [schema.get("properties", {}) for schema in (one, other)]
    if any(known):
        found["properties"] = {
            name: conjunction(
                *(
                    properties.get(name, schema.get("additionalProperties", True))
                    for properties, schema in zip(known, (one, other), strict=True)
                )
            )
            for name in dict.fromkeys([*known[0], *known[1]])
        }
    if any(key in schema for schema in (one, other) for key in ("items", "prefixItems")):
        (first, rest), (second, more) = prefix_and_items(one), prefix_and_items(other)
        pairs = itertools.zip_longest(first, second)
        prefix = [conjunction(rest if a is None else a, more if b is None else b) for a, b in pairs]
        found |= {"prefixItems": prefix} if prefix else {}
        if "items" in one or "items" in other:
            found["items"] = conjunction(rest, more)
    return found


def prefix_and_items(schema: Schema) -> tuple[list[Any], Any]:
    """Return the schemas of an array's first items and of the others, in the words of any draft."""
    items = schema.get("items", True)
    if isinstance(items, list):
        return items, schema.get("additionalItems", True)
    return schema.get("prefixItems", []), items


def bound(schema: Schema, plain: str, exclusive: str, sign: int) -> tuple[float, bool] | None:
    """Return the tighter of two bounds and whether it is excluded; sign: 1 for a lower one, -1 for an upper one."""
    found = [(schema[plain], schema.get(exclusive) is True)] if plain in schema else []  # True: draft 4
    if exclusive in schema and not isinstance(schema[exclusive], bool):
        found.append((schema[exclusive], True))
    return max(found, key=lambda one: (sign * one[0], one[1])) if found else None


def whole_above(low: float, excluded: bool) -> int:
    """Return the first whole number from a bound on."""
    return math.floor(low) + 1 if excluded else math.ceil(low)


def as_json(value: Any) -> str:
    """Write a value as JSON, readable where that is UTF-8."""
    text = json.dumps(value, ensure_ascii=False)
    return json.dumps(value) if any("\ud800" <= one <= "\udfff" for one in text) else text


def either(ways: Sequence[str]) -> str:
    """Write alternatives as one."""
    return ways[0] if len(ways) == 1 else f"({' | '.join(ways)})"


# -- numbers in digits ------------------------------------------------------------------------------------------------


def integers(low: int | None, high: int | None) -> list[str]:
    """Return the ways to write the whole numbers from `low` to `high`."""
    ways = []
    if low is None or low < 0:
        least = 1 if high is None or high >= 0 else -high
        ways += [f'"-" ({" | ".join(naturals(least, None if low is None else -low))})']
    if high is None or high >= 0:
        ways += naturals(max(low or 0, 0), high)
    return ways


def naturals(low: int, high: int | None) -> list[str]:
    """Return the ways to write the whole numbers from `low`, at least 0, to `high`."""
    longest = len(str(low)) + 1
    ways = [f"[1-9] [0-9]{{{longest - 1},{max(longest, 15) - 1}}}"] if high is None else []
    high = 10 ** (longest - 1) - 1 if high is None else high
    for size in range(len(str(low)), len(str(high)) + 1):
        start, end = max(low, 10 ** (size - 1) if size > 1 else 0), min(high, 10**size - 1)
        ways.append(digits(str(start), str(end)))
    return ways


def digits(low: str, high: str) -> str:
    """Write the numbers between two of the same length."""
    if low == high:
        return literal(low)
    size = len(low) - 1
    if low[0] == high[0]:
        return f'"{low[0]}" {digits(low[1:], high[1:])}'
    first, last, ways = int(low[0]), int(high[0]), []
    if low[1:].strip("0"):
        ways.append(f'"{first}" {digits(low[1:], "9" * size)}')
        first += 1
    tail = []
    if high[1:].strip("9"):
        tail.append(f'"{last}" {digits("0" * size, high[1:])}')
        last -= 1
    if first <= last:
        ways.append(f"[{first}-{last}]" + (f" [0-9]{{{size}}}" if size else ""))
    return either(ways + tail)


def decimals(low: int | None, high: int | None, open_low: bool, open_high: bool) -> list[str]:
    """Return the ways to write the numbers between two whole ones, which belong to them unless they are `open`."""
    some, positive = '( "." [0-9]{1,16} )?', '"." [0-9]{0,15} [1-9]'
    ways = []
    if high is None or high > 0:  # from 0 or more: a whole number, and anything up to the next one
        start = max(low or 0, 0) if low is not None else 0
        at_start = low is not None and low >= 0 and open_low
        if at_start:
            ways.append(f"{literal(str(start))} {positive}")
        if high is None or start + at_start <= high - 1:
            ways.append(f"({' | '.join(naturals(start + at_start, None if high is None else high - 1))}) {some}")
    if low is None or low < 0:  # the same below 0
        least = 0 if high is None or high >= 0 else -high
        at_start = high is not None and high <= 0 and open_high
        if at_start:
            ways.append(f'"-" {literal(str(least))} {positive}')
        if low is None or least + at_start <= -low - 1:
            ways.append(f'"-" ({" | ".join(naturals(least + at_start, None if low is None else -low - 1))}) {some}')
    ends = [end for end, is_open in ((low, open_low), (high, open_high)) if end is not None and not is_open]
    return ways + [
        literal(str(end)) for end in dict.fromkeys(ends) if not (end == low == high and (open_low or open_high))
    ]


def other_names(names: Sequence[str]) -> str:
    """Write every name but these, without escapes."""
    branches: dict[str, list[str]] = {}
    for name in names:
        if name and all(character not in '"\\' and character >= " " for character in name):
            branches.setdefault(name[0], []).append(name[1:])
    free = characters(without(PLAIN, [(ord(letter), ord(letter)) for letter in branches]))
    ways = [f"{free} char*", *(f"{literal(letter)} ({other_names(rest)})" for letter, rest in branches.items())]
    return " | ".join([*ways, *([] if "" in names else ['""'])])
