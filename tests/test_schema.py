"""Answers that fit a schema: whatever the grammar lets through, and what is said of schemas and answers that do not."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema.validators import Draft202012Validator, validator_for
from metaalign_edge_schema import check_schema, convert, expand

import metaalign_edge as edge
from metaalign_edge import (
    NO_TOKEN,
    Engine,
    Feed,
    Interrupt,
    Markers,
    Model,
    ModelFile,
    SchemaSampler,
    Settings,
    Thinking,
)

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Fails = Callable[..., str]
RANDOM = Settings(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, threads=1)


def obj(**properties: Any) -> dict[str, Any]:
    """An object all of whose properties are required."""
    return {"type": "object", "properties": properties, "required": list(properties)}


INT, STR, NUM = {"type": "integer"}, {"type": "string"}, {"type": "number"}
NODE = {"type": "object", "properties": {"value": INT, "next": {"$ref": "#/$defs/node"}}, "required": ["value"]}
TREE = obj(name=STR, children={"type": "array", "items": {"$ref": "#"}, "maxItems": 2})
CAT, DOG = (
    obj(kind={"const": kind}, **more)
    for kind, more in (("cat", {"lives": INT}), ("dog", {"good": {"type": "boolean"}}))
)
PYDANTIC = {  # as pydantic writes it
    "$defs": {
        "Mood": {"enum": ["good", "bad"], "title": "Mood", "type": "string"},
        "Pet": {"properties": {"name": {"title": "Name", "type": "string"}}, "required": ["name"], "type": "object"},
    },
    "properties": {
        "mood": {"$ref": "#/$defs/Mood", "description": "how it is"},
        "pet": {"anyOf": [{"$ref": "#/$defs/Pet"}, {"type": "null"}], "default": None},
        "pair": {"maxItems": 2, "minItems": 2, "prefixItems": [INT, STR], "type": "array"},
        "price": {"exclusiveMinimum": 0, "type": "number"},
        "by": {"additionalProperties": INT, "type": "object"},
    },
    "required": ["mood", "pair", "price"],
    "title": "Thing",
    "type": "object",
}

FITTING: dict[str, dict[str, Any]] = {
    "anything": {},
    "a string": STR,
    "an integer": INT,
    "a number": NUM,
    "a boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "any object": {"type": "object"},
    "any array": {"type": "array"},
    "several types": {"type": ["integer", "null", "string"]},
    "an enumeration": {"enum": ["red", 'a "quoted"\nline', 3, 2.5, None, True, ["a", 1], {"b": "é"}]},
    "a constant": {"const": {"a": [1, {"b": "\\"}]}},
    "an enumeration of one type": {"type": "string", "enum": ["a", "b", 3]},
    "an object": obj(name=STR, age=INT),
    "names that need quotes": obj(**{'a "b"': INT, "tab\t": INT, "é😀": INT, "": INT}),
    "optional properties": {"type": "object", "properties": {"a": INT, "b": INT, "c": INT}, "required": ["b"]},
    "nothing required": {"type": "object", "properties": {"a": INT, "b": INT, "c": INT}},
    "no properties": {"type": "object", "additionalProperties": False},
    "a map": {"type": "object", "additionalProperties": INT},
    "others beside": {
        "type": "object",
        "properties": {"a": INT, "ab": {"type": "boolean"}, "": {"type": "null"}, "é": INT, 'q"': INT},
        "additionalProperties": STR,
        "required": ["a"],
    },
    "a required property of which nothing is said": {"type": "object", "required": ["a"], "properties": {"b": INT}},
    "names by a pattern": {"type": "object", "patternProperties": {"^x-[a-c]+$": INT}, "additionalProperties": False},
    "a pattern that holds for a property": {
        "type": "object", "properties": {"xa": INT}, "required": ["xa"],
        "patternProperties": {"^x": {"minimum": 3, "maximum": 5}}, "additionalProperties": False,
    },
    "a forbidden property": {"type": "object", "properties": {"a": INT, "b": False}},
    "an array": {"type": "array", "items": INT},
    "a short array": {"type": "array", "items": INT, "minItems": 2, "maxItems": 4},
    "at least one": {"type": "array", "items": INT, "minItems": 1},
    "an empty array": {"type": "array", "maxItems": 0},
    "a tuple": {"type": "array", "prefixItems": [INT, STR], "items": False, "minItems": 2},
    "the beginning of a tuple": {"type": "array", "prefixItems": [INT, {"type": "boolean"}, INT], "minItems": 1, "items": False},
    "a tuple and more": {"type": "array", "prefixItems": [INT], "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "more than a tuple says": {"type": "array", "prefixItems": [INT], "minItems": 2, "maxItems": 2},
    "a tuple cut by maxItems": {"type": "array", "prefixItems": [INT, INT, INT], "maxItems": 2},
    "a tuple of an old draft": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array", "items": [INT, STR], "additionalItems": False,
    },
    "nested": obj(a={"type": "array", "items": obj(b={"type": "array", "items": obj(c=INT), "maxItems": 2}), "maxItems": 2}),
    "a length": {"type": "string", "minLength": 2, "maxLength": 5},
    "a least length": {"type": "string", "minLength": 3},
    "from to": {"type": "integer", "minimum": 7, "maximum": 213},
    "from below to above": {"type": "integer", "minimum": -12, "maximum": 5},
    "below": {"type": "integer", "maximum": -17},
    "above": {"type": "integer", "minimum": 98},
    "between": {"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 4},
    "between fractions": {"type": "integer", "minimum": 0.5, "maximum": 10.5},
    "one number": {"type": "integer", "minimum": 100, "maximum": 100},
    "large": {"type": "integer", "minimum": 10**18, "maximum": 10**18 + 77},
    "a share": {"type": "number", "minimum": 0, "maximum": 1},
    "a positive number": {"type": "number", "exclusiveMinimum": 0},
    "a negative number": {"type": "number", "exclusiveMaximum": 0},
    "a number from to": {"type": "number", "minimum": -3, "maximum": 12},
    "a number between": {"type": "number", "exclusiveMinimum": -3, "exclusiveMaximum": 12},
    "a number up to": {"type": "number", "maximum": -2},
    "an old exclusive bound": {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "integer", "minimum": 3, "exclusiveMinimum": True, "maximum": 5,
    },
    **{f"the pattern {pattern}": {"type": "string", "pattern": pattern} for pattern in (
        r"^[A-Z]{2}-\d{3,5}$", r"^(foo|bar)?baz+$", "[a-c]", "^a", "[x-z]$", r"^\w+\s?\W\D$", r"^[^a-z\d]$", r"^a.c$", r'^"\\"$',
        r"^(\(\d{3}\))?x{0,2}$", "^(ab|cd){2}$", "^a$|^b+$", "x|^y", "", r"^[é😀\n]$", r"^(?:a|b)*?c$", r"^[^\"]{3}$", r"^(^a|b$)", r"[\s\S]",
    )},
    **{f"the format {name}": {"type": "string", "format": name} for name in (
        "date", "time", "date-time", "uuid", "ipv4", "email", "uri",
    )},
    "any of": {"anyOf": [STR, INT, obj(a=INT)]},
    "any of, and more": {"type": "object", "properties": {"a": INT}, "required": ["a"], "anyOf": [obj(b=INT), obj(c=STR)]},
    "one of, told apart": {"oneOf": [CAT, DOG]},
    "one of, by type": {"oneOf": [STR, NUM, {"type": "array", "items": INT}]},
    "all of": {"allOf": [obj(a=INT), obj(b=STR), {"properties": {"a": {"maximum": 3}}}]},
    "all of numbers": {"allOf": [NUM, INT, {"minimum": 3}, {"maximum": 9, "minimum": 1}]},
    "all of arrays": {"allOf": [{"type": "array", "items": INT, "maxItems": 3}, {"items": {"minimum": 5}, "minItems": 1}]},
    "all of enumerations": {"allOf": [{"enum": [1, 2, 3, "a"]}, {"enum": [3, "a", 4]}, {"type": "integer"}]},
    "all of, closed": {"allOf": [{**obj(a=INT), "additionalProperties": STR}, {"properties": {"b": {"maxLength": 3}}}]},
    "an alternative that cannot be": {"anyOf": [{"allOf": [STR, INT]}, {"const": 1}]},
    "references": {"$defs": {"n/a": INT, "b~": {"$ref": "#/$defs/n~1a"}}, **obj(x={"$ref": "#/$defs/b~0"}, y={"$ref": "#/properties/x"})},
    "a list of itself": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    "a tree": TREE,
    "itself by an alternative": {"$defs": {"e": {"anyOf": [INT, {"type": "array", "items": {"$ref": "#/$defs/e"}, "maxItems": 2}]}}, "$ref": "#/$defs/e"},
    "pydantic's": PYDANTIC,
    "annotations": {"title": "t", "description": "d", "$comment": "c", "examples": [{"$ref": "http://x"}], "default": 1, "type": "integer"},
    "no type, but its keywords": {"properties": {"a": {"minLength": 2, "maxLength": 3}, "b": {"items": INT}}, "required": ["a", "b"]},
    "the short form": expand("name, age int, tags [str], mood good|bad, note? str: if any, where {x float, y float}"),
}  # fmt: skip


class Randomly:
    """Texts of a grammar, drawn with logits that chance gives; what ends a text is likelier, so that texts end."""

    def __init__(self, tiny: Path) -> None:
        self.model = Model(ModelFile(tiny), RANDOM)
        self.engine = Engine(self.model, RANDOM, Interrupt(), 64)
        self.engine.step([Feed(self.engine.sequences[0], [5])])
        vocabulary = self.model.vocabulary
        self.bias = np.array([
            4.0 if vocabulary.piece(token) in (b'"', b"}", b"]", b'"}', b'"]', b"a", b"b", b"c", b"z", b"@", b".") or vocabulary.is_end(token) else 0.0
            for token in range(vocabulary.size)
        ])  # fmt: skip

    def write(self, grammar: str, seed: int, most: int = 400) -> str | None:
        """Write a text to its end; None if that takes too long."""
        vocabulary, random = self.model.vocabulary, np.random.default_rng(seed)
        markers, data = Markers("", vocabulary), b""
        settings = edge.replace(RANDOM, seed=seed)
        with SchemaSampler(self.model, settings, grammar, markers, Thinking(None), None) as sampler:
            for _ in range(most):
                self.engine.logits(-1)[:] = random.normal(0, 2, vocabulary.size) + self.bias
                token = sampler.draw(self.engine, -1)
                assert token != NO_TOKEN and (vocabulary.is_end(token) or token not in markers)
                if vocabulary.is_end(token):
                    return data.decode()
                data += vocabulary.piece(token)
        return None


@pytest.fixture(scope="module")
def randomly(tiny: Path) -> Iterator[Randomly]:
    texts = Randomly(tiny)
    yield texts
    texts.engine.close()
    texts.model.close()


@pytest.mark.parametrize("name", FITTING)
def test_whatever_the_grammar_lets_through_fits_the_schema(name: str, randomly: Randomly) -> None:
    schema = FITTING[name]
    check_schema(schema)
    grammar = convert(schema)
    kind = validator_for(schema, default=Draft202012Validator)
    validator = kind(schema, format_checker=kind.FORMAT_CHECKER)
    texts = [text for seed in range(8) if (text := randomly.write(grammar.text, seed)) is not None]
    assert len(texts) >= 4
    for text in texts:
        assert not list(validator.iter_errors(json.loads(text))), text
    assert grammar.left == []
