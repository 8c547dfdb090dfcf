"""Answers that fit a schema: whatever the mask lets through, and what is said of schemas and answers that do not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.terminal import Terminal

import metaalign_edge as edge
from metaalign_edge import NO_TOKEN, BatchEntry, Engine, Markers, Model, SchemaSampler, Settings
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.llama.token_texts import token_texts
from metaalign_edge_runtime.structured import expand_schema, fault, make_schema
from metaalign_edge_runtime.structured.mask import Constraint, Vocabulary
from metaalign_edge_runtime.structured.short import expand

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
    "large": {"type": "integer", "minimum": 10**18, "maximum": 10**18 + 128},
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
        "date", "time", "date-time", "uuid", "ipv4", "ipv6", "email", "uri", "hostname", "duration",
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
    "a multiple": {"type": "integer", "multipleOf": 5},
    "cents": {"type": "number", "multipleOf": 0.01},
    "quarters": {"type": "number", "multipleOf": 0.25, "minimum": -3, "maximum": 12.75},
    "a pattern with a length": {"type": "string", "pattern": "^a+$", "maxLength": 3},
    "two patterns": {"allOf": [{"type": "string", "pattern": "a"}, {"pattern": "b"}]},
    "a very long text": {"type": "string", "maxLength": 50_000},
    "very many": {"type": "array", "items": INT, "maxItems": 50_000},
    "a bound with a fraction": {"type": "number", "minimum": 0.25, "maximum": 3.125},
    "how many names, all of them known": {**obj(a=INT), "additionalProperties": False, "minProperties": 1, "maxProperties": 1},
    "an anchor": {"$defs": {"a": {"$anchor": "here", "type": "integer"}}, "$ref": "#here"},
    "one of, told apart behind references": {"$defs": {"cat": CAT, "dog": DOG}, "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}]},
    "nothing unevaluated": {**obj(a=INT), "unevaluatedProperties": False},
    "an old reference, which stands alone": {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": INT}, "$ref": "#/definitions/a", "type": "string"},
    "annotations": {"title": "t", "description": "d", "$comment": "c", "examples": [{"$ref": "http://x"}], "default": 1, "type": "integer"},
    "no type, but its keywords": {"properties": {"a": {"minLength": 2, "maxLength": 3}, "b": {"items": INT}}, "required": ["a", "b"]},
    "the short form": expand("name, age int, tags [str], mood good|bad, note? str: if any, where {x float, y float}"),
}  # fmt: skip


class Randomly:
    """Texts of a mask, drawn with logits that chance gives; what ends a text is likelier, so that texts end."""

    def __init__(self, tiny: Path) -> None:
        self.model = Model(ModelFile(tiny), RANDOM).wait()
        self.engine = Engine(self.model, RANDOM, Interrupt(), 64)
        self.engine.decode([BatchEntry(self.engine.sequences[0], [5])])
        vocabulary = self.model.vocabulary
        self.markers, self.texts = Markers("", vocabulary), token_texts(self.model.file)
        self.bias = np.array([
            4.0 if vocabulary.piece(token) in (b'"', b"}", b"]", b'"}', b'"]', b"a", b"b", b"c", b"z", b"@", b".") or vocabulary.is_end(token) else 0.0
            for token in range(vocabulary.size)
        ])  # fmt: skip

    def vocabulary(self, texts: list[bytes]) -> Vocabulary:
        """The tokens as a constraint sees them, with these texts."""
        return Vocabulary(texts.__getitem__, self.model.vocabulary.is_end, self.markers.__contains__, lambda: texts)

    def write(self, mask: str, seed: int, most: int = 400) -> str | None:
        """Write a text to its end; None if that takes too long."""
        vocabulary, random = self.model.vocabulary, np.random.default_rng(seed)
        data, constraint = b"", Constraint(mask, self.vocabulary(self.texts))
        with SchemaSampler(self.model.file, edge.replace(RANDOM, seed=seed)) as sampler:
            for _ in range(most):
                self.engine.logits(-1)[:] = random.normal(0, 2, vocabulary.size) + self.bias
                token = sampler.draw_fitting(self.engine, -1, constraint)
                assert token != NO_TOKEN and (vocabulary.is_end(token) or token not in self.markers)
                if vocabulary.is_end(token):
                    return data.decode()
                constraint.accept(token)
                data += vocabulary.piece(token)
        return None


@pytest.fixture(scope="module")
def randomly(tiny: Path) -> Iterator[Randomly]:
    texts = Randomly(tiny)
    yield texts
    texts.engine.close()
    texts.model.close()


@pytest.mark.parametrize("name", FITTING)
def test_whatever_the_mask_lets_through_fits_the_schema(name: str, randomly: Randomly) -> None:
    document = FITTING[name]
    schema = make_schema(document)
    texts = [text for seed in range(8) if (text := randomly.write(schema.mask, seed)) is not None]
    assert len(texts) >= 4
    for text in texts:
        assert fault(text, schema) is None, text
    assert schema.relaxed == ()


RELAXED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "no two alike": (obj(a={"type": "array", "items": INT, "uniqueItems": True}), ["uniqueItems at /a"]),
    "not": ({"type": "string", "not": {"const": "a"}}, ["not at /"]),
    "if": ({**obj(a=INT), "if": {"required": ["a"]}, "then": {"required": ["b"]}}, ["if at /"]),
    "one of two that overlap": ({"oneOf": [INT, {"type": "number", "minimum": 3}]}, ["oneOf at /"]),
    "a pattern that looks ahead": ({"type": "string", "pattern": "^(?!a)b"}, ["pattern at /"]),
    "a format of which nothing is known": ({"type": "string", "format": "iri"}, ["format 'iri' at /"]),
    "a bound of 19 digits": ({"type": "integer", "minimum": 10**18, "maximum": 10**18 + 77}, ["maximum at /"]),
    "a value of 19 digits": ({"enum": [10**18 + 77, 3]}, ["enum at /"]),
    "names": ({"additionalProperties": INT, "propertyNames": {"maxLength": 3}}, ["propertyNames at /"]),
    "how many names": ({"additionalProperties": INT, "minProperties": 3}, ["minProperties at /"]),
    "names by two patterns": (
        {"patternProperties": {"^a": INT, "b$": STR}, "additionalProperties": False},
        ["patternProperties at /", "additionalProperties at /"],
    ),
    "at least one of a kind": ({"type": "array", "contains": {"const": 3}}, ["contains at /"]),
    "a length beyond all bounds": ({"type": "string", "maxLength": 10**12}, ["maxLength at /"]),
    "a pattern of too many letters": ({"type": "string", "pattern": "(" * 300 + "a" + ")" * 300}, ["pattern at /"]),
    "where it is used": ({"$defs": {"a": {"not": STR}, "b": {"not": INT}}, **obj(x={"type": "array", "items": {"$ref": "#/$defs/a"}})}, ["not at /x/items"]),
    "two at once": ({"allOf": [obj(a={"not": STR}), {"uniqueItems": True, "if": True}]}, ["if at /", "uniqueItems at /", "not at /a"]),
    "a dialect of its own": ({"$schema": "https://example.org/mine", "type": "integer"}, ["$schema at /"]),
}  # fmt: skip


@pytest.mark.parametrize("name", RELAXED)
def test_what_a_mask_cannot_say_is_named(name: str, randomly: Randomly) -> None:
    document, relaxed = RELAXED[name]
    schema = make_schema(document)
    assert list(schema.relaxed) == relaxed
    for text in filter(None, (randomly.write(schema.mask, seed, 100) for seed in range(3))):
        json.loads(text)


SHORT: dict[str, dict[str, Any]] = {
    "name, age int, ok bool, x float": obj(name=STR, age=INT, ok={"type": "boolean"}, x=NUM),
    "name: the full name, age int: in years": obj(name={**STR, "description": "the full name"}, age={**INT, "description": "in years"}),
    "name\nage int: in years, about\n": obj(name=STR, age={**INT, "description": "in years, about"}),
    "tags [str]": obj(tags={"type": "array", "items": STR}),
    "grid [[int]], at {x float, y float}": obj(grid={"type": "array", "items": {"type": "array", "items": INT}}, at={**obj(x=NUM, y=NUM), "additionalProperties": False}),
    "mood good|so so|bad": obj(mood={"enum": ["good", "so so", "bad"]}),
    "a, b? int": {**obj(a=STR), "properties": {"a": STR, "b": INT}},
    "when date, rest any": obj(when={**STR, "format": "date"}, rest={}),
    "[name, age int]": {"type": "array", "items": {**obj(name=STR, age=INT), "additionalProperties": False}},
    "[int]": {"type": "array", "items": INT},
    "name string, n integer, x number, b boolean": obj(name=STR, n=INT, x=NUM, b={"type": "boolean"}),
}  # fmt: skip


@pytest.mark.parametrize("text", SHORT)
def test_the_short_form_is_a_schema(text: str) -> None:
    expected = SHORT[text]
    assert expand(text) == ({**expected, "additionalProperties": False} if expected["type"] == "object" else expected)


def test_the_short_forms_that_are_shown_are_schemas() -> None:
    page = (Path(__file__).parent.parent / "docs" / "structured.md").read_text()
    rows = re.findall(
        r"^\| (?:fields|lists, choices, groups|what may be missing.*|a list of all.*) \| `(.*?)`", page, re.MULTILINE
    )
    assert len(rows) == 4
    for row in rows:
        assert expand_schema(row.replace("\\|", "|")).relaxed == ()


# -- as a user meets it -----------------------------------------------------------------------------------------------

GREEDY = ("--temp", "0", "--seed", "1", "-n", "120")
BAD: list[tuple[int, str, list[str]]] = [
    (3, "./none.json", ["none.json"]),
    (3, "my schemas/none.json", ["my schemas/none.json"]),
    (2, '{"type": "object",}', ["no JSON", "line 1, column 19"]),
    (2, '{"type": "strin"}', ["/type", "'strin'"]),
    (2, '{"properties": {"a": {"minimum": "3"}}}', ["/properties/a/minimum", "'3'"]),
    (2, '{"$ref": "https://example.org/schema.json"}', ["https://example.org/schema.json", "nothing is fetched"]),
    (2, '{"not": {"$ref": "other.json#/a"}}', ["/not", "other.json"]),
    (2, '{"$ref": "#/$defs/none"}', ["#/$defs/none", "not there"]),
    (2, '{"$ref": "#name"}', ["#name"]),
    (2, '{"$ref": "#"}', ["ever complete"]),
    (2, '{"anyOf": [{"$ref": "#"}, {"type": "null"}]}', ["refers to itself without end"]),
    (2, '{"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}', ["complete"]),
    (2, '{"allOf": [{"type": "string"}, {"type": "integer"}]}', ["nothing fits /"]),
    (2, '{"type": "integer", "minimum": 3, "maximum": 2}', ["nothing fits /"]),
    (2, '{"type": "object", "properties": {"a": {"type": "array", "minItems": 2, "maxItems": 1}}, "required": ["a"]}', ["nothing fits /a"]),
    (2, '{"type": "string", "pattern": "("}', ["/pattern", "'('"]),
    (2, '{"$dynamicRef": "#a"}', ["$dynamicRef"]),
    (2, "name, age inte", ["no type 'inte'", "int, "]),
    (2, "a, a int", ["'a'", "twice"]),
    (2, "tags [str", ["bracket"]),
    (2, "", ["no field", "name, age int"]),
    (2, "a b c, d", ["no type 'b c'"]),
    (2, "{" * 3 + "}" * 3, ["no JSON"]),
    (2, '{"a":' * 50_000 + "1" + "}" * 50_000, ["too deep"]),
]  # fmt: skip


@pytest.mark.parametrize("code, schema, said", BAD, ids=[text[:40] or "nothing" for _, text, _ in BAD])
def test_a_bad_schema_is_one_line_before_any_model_is_loaded(
    code: int, schema: str, said: list[str], refuses: Fails
) -> None:
    line = refuses(code, "chat", "-m", "never-loaded.gguf", "--no-stdin", "-j", schema, "tea?")
    assert all(word in line for word in said), line


def test_a_file_is_read_and_its_name_said(tmp_path: Path, refuses: Fails, here: Run, tiny: Path) -> None:
    (tmp_path / "ok.json").write_text('{"type": "boolean"}')
    answer = here("chat", "-m", str(tiny), *GREEDY, "-j", str(tmp_path / "ok.json"), "tea?")
    assert (answer.returncode, answer.stderr) == (0, "") and answer.stdout in ("true\n", "false\n")
    (tmp_path / "bad.json").write_text('{\n  "type": "boolean"\n  "title": "x"\n}')
    line = refuses(2, "chat", "--no-stdin", "-j", str(tmp_path / "bad.json"), "tea?")
    assert "bad.json" in line and "line 3, column 3" in line
    (tmp_path / "list.json").write_text("[1]")
    assert "not an object" in refuses(2, "chat", "--no-stdin", "-j", str(tmp_path / "list.json"), "tea?")


def test_greedy_warm_and_guided_answers_all_fit(tiny: Path, here: Run) -> None:
    shape = ("-m", str(tiny), "-n", "300", "--no-schema-hint", "-j", "a int, b [bool], c red|green, d {e bool}")
    for options in (
        ("--temp", "0"),
        ("--temp", "1.8", "--repeat-penalty", "1.3"),
        ("--temp", "0", "--pref-strength", "2"),
        ("--top-k", "1"),
    ):
        document = json.loads(
            here("chat", *shape, *options, "--seed", "3", "--pref", "be brief", "--json", "tea?").stdout
        )
        assert document["finish_reason"] == "stop" and list(document["response"]) == ["a", "b", "c", "d"]


def test_an_answer_that_is_cut_is_printed_and_exit_7(tiny: Path, here: Run) -> None:
    cut = here("chat", "-m", str(tiny), "--temp", "0", "-n", "6", "-j", "name, age int", "tea?")
    assert cut.returncode == 7 and cut.stdout.startswith('{"n')
    assert cut.stderr == "metaalign-edge: the answer was cut at 6 tokens before the JSON was complete: raise -n or -c\n"
    document = here("chat", "-m", str(tiny), "--temp", "0", "-n", "6", "-j", "name, age int", "--json", "tea?")
    assert (document.returncode, json.loads(document.stdout)["finish_reason"]) == (7, "length")


def test_what_only_the_check_sees_is_said_before_and_after(tiny: Path, here: Run) -> None:
    schema = '{"type": "object", "properties": {"a": {"enum": [3, 4], "not": {"type": "integer"}}}, "required": ["a"]}'
    answer = here("chat", "-m", str(tiny), *GREEDY, "-j", schema, "tea?")
    assert answer.returncode == 7 and json.loads(answer.stdout)["a"] in (3, 4)
    note, said = answer.stderr.splitlines()
    assert "not at /a" in note and "/a: " in said and "should not be valid" in said


@pytest.mark.slow
def test_compare_names_the_column_that_failed(tiny: Path, here: Run) -> None:
    shape = ("compare", "-m", str(tiny), "--temp", "0", "--pref", "be brief", "--pref", "-")
    fitting = here(*shape, "-n", "200", "-j", "ok bool, n int", "--json", "tea?")
    assert fitting.returncode == 0
    assert all(one["response"].keys() == {"ok", "n"} for one in json.loads(fitting.stdout))
    cut = here(*shape, "-n", "3", "-j", "ok bool, n int", "tea?")
    assert cut.returncode == 7 and "the answer under be brief was cut at 3 tokens" in cut.stderr
    assert cut.stdout.count('{"o') == 2


def test_a_row_has_a_schema_of_its_own(tiny: Path, here: Run, tmp_path: Path) -> None:
    rows = [
        {"query": "a?"},
        {"query": "b?", "json_schema": {"enum": ["x", "y"]}},
        {"query": "c?", "json_schema": "n int"},
        {"query": "d?", "json_schema": "n intt"},
        {"query": "e?", "json_schema": 3},
        {"query": "f?", "json_schema": "name, age int", "max_tokens": 4},
        {"query": "g?", "json_schema": "/etc/hostname.json"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("batch", str(tmp_path / "in.jsonl"), "-m", str(tiny), *GREEDY, "--parallel", "4", "-j", "ok bool")
    done = here(*command, "-o", str(tmp_path / "out.jsonl"))
    assert done.returncode == 1
    answers = [json.loads(line) for line in here(*command).stdout.splitlines()]
    assert answers[0]["response"].keys() == {"ok"}
    assert answers[1]["response"] in ("x", "y") and answers[2]["response"].keys() == {"n"}
    assert (
        "line 4" in answers[3]["error"] and "no type 'intt'" in answers[3]["error"] and "schema" in answers[4]["error"]
    )
    assert "cut at 4 tokens" in answers[5]["error"] and answers[5]["response"].startswith('{"n')
    assert "line 7" in answers[6]["error"]
    (tmp_path / "in.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [rows[0], {**rows[1], "json_schema": "n int"}])
    )
    again = here(*command, "-o", str(tmp_path / "out.jsonl"))
    assert "2 rows: 1 answered, 1 before, 0 failed" in again.stderr


@pytest.mark.slow
def test_another_schema_is_another_run(tiny: Path, here: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"query": "a?"}\n')
    command = ("batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "-m", str(tiny), *GREEDY, "-j")
    assert here(*command, "ok bool").returncode == 0
    assert "another run" in here(*command, "n int").stderr


def test_a_vocabulary_without_the_letters_ends_in_exit_7_and_not_in_a_crash(randomly: Randomly) -> None:
    schema = make_schema({"const": "\ufffe"})  # its bytes are there, one by one; a token of none of them is
    assert randomly.write(schema.mask, 0, 20) == '"\ufffe"'
    texts = [b"" if b'"' in text else text for text in randomly.texts]
    constraint = Constraint(schema.mask, randomly.vocabulary(texts))
    with SchemaSampler(randomly.model.file, RANDOM) as sampler:
        assert sampler.draw_fitting(randomly.engine, -1, constraint) == NO_TOKEN


def test_the_libraries_are_imported_only_where_a_schema_is(tiny: Path) -> None:
    code = f"import sys, metaalign_edge as e; e.run(['chat', '-m', {str(tiny)!r}, '-n', '1', '--no-stdin', 'tea?']); sys.exit('jsonschema' in sys.modules or 'llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60).returncode == 0


def test_an_answer_that_does_not_fit_is_part_of_the_conversation(tiny: Path) -> None:
    terminal = Terminal("chat", "-m", str(tiny), "--temp", "0", "-n", "4", "-j", "name, age int")
    terminal.until("> ")
    terminal.type("tea?\n")
    assert "cut at 4 tokens before the JSON was complete" in terminal.until("\n> ")
    terminal.type("/regen\n")
    assert "cut at 4 tokens" in terminal.until("\n> ")
    terminal.type("\x04")
    assert terminal.leave() == 0
