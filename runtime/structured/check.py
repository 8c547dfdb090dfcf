"""The final check: whether a document is a JSON Schema, and whether an answer fits it.

Functions import jsonschema when they are called, because the import is slow.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from .mask import letters, refusal
from .numbers import fraction
from .patterns import FORMATS, regex_pattern, rust_pattern

SECONDS = 5.0  # the most time of a check: a pattern or a reference can ask for years of it
FAULTS = 100  # of an answer, among which the most telling one is chosen; an answer can have 2**30
REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


class Effort:
    """The time that is left for a check, and the references that hold: so that none is followed twice for one value.

    Args:
        again: follow them again; what a dynamic reference leads to depends on the way there.
    """

    def __init__(self, again: bool = False) -> None:
        self._end, self.again = time.monotonic() + SECONDS, again
        self.held: set[tuple[int, int]] = set()  # the `id()` of the schema and of the value

    def left(self) -> float:
        """Return the seconds that are left.

        Raises:
            TimeoutError: there are none.
        """
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


_effort: ContextVar[Effort | None] = ContextVar("effort", default=None)


def pointer(path: Iterable[Any]) -> str:
    """Write the path of a value in a document as `/tags/0`; the whole document is `/`."""
    return "/" + "/".join(map(str, path))


def draft(document: Mapping[str, Any]) -> Any:
    """Return jsonschema's validator class for the draft that `$schema` names, by default 2020-12."""
    from jsonschema.validators import Draft202012Validator, validator_for

    return validator_for(document, default=Draft202012Validator)


def schema_fault(document: Any) -> str | None:
    """Return the reason why a document is not a JSON Schema; None if it is a schema. Patterns are not checked."""
    from jsonschema import FormatChecker
    from jsonschema.exceptions import SchemaError

    if not isinstance(document, dict):
        return f"it is {json.dumps(document)[:40]}, not an object"
    if not isinstance(document.get("$schema", ""), str):
        return f"/$schema: {json.dumps(document['$schema'])[:40]} is no text"
    try:
        draft(document).check_schema(document, format_checker=FormatChecker(()))
    except SchemaError as error:
        return f"{pointer(error.absolute_path)}: {error.message}"
    return None


def document_fault(text: str, document: Mapping[str, Any]) -> str | None:
    """Return the reason why an answer does not fit a schema (not JSON, or a wrong value); None if the answer fits."""
    from jsonschema.exceptions import best_match
    from referencing import Registry

    text_of_schema = json.dumps(document)
    begun = _effort.set(Effort(again=any(name in text_of_schema for name in REFERENCES[1:])))
    try:
        value = json.loads(text)
        kind = _exact(draft(document))
        plain = {key: part for key, part in document.items() if key != "$schema"}  # else jsonschema takes its own class
        validator = kind(plain, registry=Registry(), format_checker=kind.FORMAT_CHECKER)  # fetches no URLs
        found = best_match(itertools.islice(validator.iter_errors(value), FAULTS))
    except RecursionError:
        return "it nests too deep"
    except TimeoutError:
        return f"whether it fits is not known after {SECONDS:g} seconds: make the schema simpler"
    except ValueError as error:
        return f"it is no JSON: {error}"
    finally:
        _effort.reset(begun)
    return None if found is None else f"{pointer(found.absolute_path)}: {found.message}"


# -- replacements for jsonschema's keywords that use Python's floats and regular expressions ---------------------------


@functools.cache
def _exact(kind: Any) -> Any:
    """Return a validator class with exact decimals (19.99 is a multiple of 0.01) and with ECMA-262's patterns."""
    from jsonschema.validators import extend

    additional = kind.VALIDATORS["additionalProperties"]

    def additional_properties(validator: Any, value: Any, instance: Any, schema: Any) -> Iterator[Any]:
        if isinstance(instance, dict) and (patterns := schema.get("patternProperties")):
            known = {name: True for name in instance if any(found_in(pattern, name) for pattern in patterns)}
            schema = {"properties": {**known, **schema.get("properties", {})}}
        yield from additional(validator, value, instance, schema)

    own: dict[str, Any] = {"multipleOf": _multiple_of, "pattern": _pattern, "patternProperties": _pattern_properties}
    own |= {"additionalProperties": additional_properties, "format": functools.partial(_format, kind)}
    followed = {
        name: functools.partial(_follow, kind.VALIDATORS[name]) for name in REFERENCES if name in kind.VALIDATORS
    }
    return extend(kind, {**own, **followed})


def _follow(keyword: Callable[..., Any], validator: Any, reference: Any, instance: Any, schema: Any) -> Iterator[Any]:
    """Follow a reference, unless it is known to hold for this value: two in each schema of a row double the work."""
    effort, case, fits = _effort.get() or Effort(again=True), (id(schema), id(instance)), True
    effort.left()
    if case in effort.held:
        return
    for found in keyword(validator, reference, instance, schema) or ():
        fits = False
        yield found
    if fits and not effort.again:
        effort.held.add(case)


def _multiple_of(validator: Any, factor: float, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if not validator.is_type(instance, "number"):
        return
    if not math.isfinite(instance) or (fraction(instance) / fraction(factor)).denominator != 1:
        yield ValidationError(f"{instance!r} is not a multiple of {factor!r}")


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    if isinstance(instance, str) and not found_in(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _format(kind: Any, validator: Any, name: str, instance: Any, schema: Any) -> Iterator[Any]:
    from jsonschema import ValidationError

    fits = _fits(instance, **format_keywords(name)) if isinstance(instance, str) else True
    if fits is None:
        yield from kind.VALIDATORS["format"](validator, name, instance, schema)
    elif not fits:
        yield ValidationError(f"{instance!r} is not a {name!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[Any]:
    for pattern, part in patterns.items() if isinstance(instance, dict) else ():
        for name, value in instance.items():
            if found_in(pattern, name):
                yield from validator.descend(value, part, path=name, schema_path=pattern)


# -- patterns and formats ---------------------------------------------------------------------------------------------


def found_in(pattern: str, text: str) -> bool:
    """Tell whether a pattern matches somewhere in a text. `regex` handles the patterns that llguidance cannot.

    Raises:
        re.error: it is no pattern. TimeoutError: it takes longer than the check may.
    """
    fits = _fits(text, pattern=rust_pattern(pattern))
    if fits is not None:
        return fits
    return _compiled(pattern).search(text, timeout=(_effort.get() or Effort()).left()) is not None


@functools.lru_cache(256)
def _compiled(pattern: str) -> Any:
    """Return a pattern of ECMA-262 for the final check. `re` would lack Unicode's properties, and a limit of time.

    Raises:
        re.error: it is no pattern.
    """
    import regex

    try:
        return regex.compile(regex_pattern(pattern), regex.VERSION1)
    except (regex.error, OverflowError, RecursionError, ValueError) as error:
        raise re.error(str(error)) from None


def pattern_fault(pattern: str) -> str | None:
    """Return the reason why a text is no regular expression that llguidance or the final check understands."""
    try:
        if not is_known(pattern=rust_pattern(pattern)):
            _compiled(pattern)
    except re.error as error:
        return str(error)
    return None


def format_keywords(name: str) -> dict[str, Any]:
    """Return the keywords that express a format for llguidance: our own patterns, or the format's name."""
    patterns = [{"pattern": f"^({pattern})$"} for pattern in FORMATS.get(name, ())]
    return {"allOf": patterns} if patterns else {"format": name}


def is_known(**keywords: Any) -> bool:
    """Tell whether llguidance can follow these keywords of a string schema."""
    return _grammar(json.dumps({"type": "string", **keywords})) is not None


def _fits(text: str, **keywords: Any) -> bool | None:
    """Tell whether a text fits these keywords of a string schema; None if llguidance cannot follow them."""
    from llguidance import LLMatcher

    if not (grammar := _grammar(json.dumps({"type": "string", **keywords}))):
        return None if grammar is None else False
    matcher = LLMatcher(letters(), grammar, log_level=0)
    data = json.dumps(text, ensure_ascii=False).replace("\x7f", r"\u007f").encode("utf-8", "replace")
    return matcher.try_consume_tokens(list(data)) == len(data) and matcher.is_accepting()


@functools.lru_cache(256)
def _grammar(document: str) -> str | None:
    """Return llguidance's grammar of a schema: "" if no value fits the schema, None if llguidance cannot follow it."""
    from llguidance import LLMatcher

    if reason := refusal(json.loads(document)):
        return "" if "Unsatisfiable" in reason else None
    return LLMatcher.grammar_from_json_schema(document)
