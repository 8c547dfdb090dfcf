"""What a mask lets through, letter by letter: patterns, numbers, vocabularies; and what the final check says of the same."""

from __future__ import annotations

import json
import random
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from helpers.vocabularies import write_bpe, write_spm

from metaalign_edge import ModelFile, UsageError
from metaalign_edge_runtime.llama.token_texts import texts_of, token_texts
from metaalign_edge_runtime.llama.vocabulary import load_vocabulary
from metaalign_edge_runtime.structured import Schema, expand_schema, fault, make_schema
from metaalign_edge_runtime.structured.mask import Constraint, Vocabulary

END, MARK, LINES, HALF = 256, 257, 258, 259
TEXTS = [*(bytes([byte]) for byte in range(256)), b"", b"<mark>", b"\n\n", b"\xc3"]
TOKENS = Vocabulary(TEXTS.__getitem__, END.__eq__, MARK.__eq__, lambda: TEXTS)


def constraint(schema: Schema, **options: Any) -> Constraint:
    return Constraint(schema.mask, TOKENS, **options)


def behind_a_mark(data: bytes) -> bytes | None:
    """Take the mark as what may stand before an answer."""
    return None if data == b"<mark>" else data


def passes(schema: Schema, text: str) -> bool:
    """Tell whether a mask lets a text through, letter by letter, and lets it end there."""
    held = constraint(schema)
    for letter in text.encode():
        if not held.fits(letter):
            return False
        held.accept(letter)
    return held.fits(END)


# -- patterns and formats ---------------------------------------------------------------------------------------------

PATTERNS: list[tuple[str, list[str], list[str]]] = [  # a pattern, in what it is found, and in what not
    (r"^\p{L}+$", ["é", "漢字"], ["e1", ""]),
    (r"^(?<year>\d{4})-(?<month>\d\d)$", ["2024-02"], ["2024-2", "٢٠٢٤-٠٢"]),
    (r"^[\w-.]+$", ["a-b.c_9"], ["é", "a b"]),
    (r"^[\s\S]+$", ["é\n😀", "\u2028", "\x01"], [""]),
    (r"^\S+@\S+$", ["jo-hn.2@ex-ample9.com", "é@ü"], ["a b@c", "\ufeff@a"]),
    (r"^a.c$", ["abc", "a😀c"], ["a\nc", "a\rc", "a\u2028c"]),
    (r"^[a&&b]+$", ["a&b"], ["c"]),
    (r"^[[a]+~?$", ["[a", "[~"], ["b"]),
    (r"^[+--]$", ["+", ",", "-"], ["."]),
    (r"^\cA[\b]\0$", ["\x01\x08\x00"], ["cA"]),
    (r"^\ud83d\ude00\u{1F600}\u00e9\x41$", ["😀😀éA"], ["😀éA"]),
    (r"^a{,3}}{$", ["a{,3}}{"], ["aaa}{"]),
    (r"^[^]$|^[]$", ["a", "\n"], ["", "ab"]),
    (r"^a\/\-\_b$", ["a/-_b"], ["ab"]),
    (r"x|^y", ["ax", "yb"], ["ay"]),
    ("a$", ["ba"], ["a\n", "ab"]),
    (r"^\D\W\s$", ["aé\u3000", "-- "], ["1- ", "aa "]),
    (r"^[.-\w]$", [".", "-", "z"], ["[", "/"]),
    (r"^[--/]$", ["-", ".", "/"], ["a", ","]),
    (r"^\p{sc=Greek}$", ["α"], ["a"]),
    (r"^[^\P{L}\d]$", ["é"], ["1", "-"]),
    (r"^\a\k$", ["ak"], ["\a"]),
]
CHECKED = [  # likewise; the mask leaves them to the final check
    (r"^(?!a)(.)\1$", ["bb"], ["aa", "ab"]),
    (r"^(?=.)(?<first name>\p{L})\k<first name>[\w-.]$", ["éé-"], ["é1-"]),
    (r"^(a)?\1(?=b)b$", ["b", "aab"], ["ab"]),
    (r"^(?=a)a$", ["a"], ["a\n"]),
    (r"a\b", ["aé", "a b"], ["ab"]),
    (r"^(?<=^)[^]\u{1F600}$", ["\n😀"], ["😀"]),
]


@pytest.mark.parametrize("pattern, found, missing", PATTERNS, ids=[pattern for pattern, _, _ in PATTERNS])
def test_a_pattern_means_what_ecma_262_says(pattern: str, found: list[str], missing: list[str]) -> None:
    schema = make_schema({"type": "string", "pattern": pattern})
    assert schema.relaxed == ()
    for text in (*found, *missing):
        quoted = json.dumps(text, ensure_ascii=False)
        assert passes(schema, quoted) == (text in found), text
        assert (fault(quoted, schema) is None) == (text in found), text


@pytest.mark.parametrize("pattern, found, missing", CHECKED, ids=[pattern for pattern, _, _ in CHECKED])
def test_a_pattern_that_the_mask_cannot_hold_means_the_same_to_the_final_check(
    pattern: str, found: list[str], missing: list[str]
) -> None:
    schema = make_schema({"type": "string", "pattern": pattern})
    assert schema.relaxed == ("pattern at /",)
    for text in (*found, *missing):
        quoted = json.dumps(text, ensure_ascii=False)
        assert passes(schema, quoted)
        assert (fault(quoted, schema) is None) == (text in found), text


@pytest.mark.parametrize(
    "pattern", ["(", "[", "a++", "(?x)a", r"\u{110000}", r"(?=a)\k<b>", "(?=a)[b-a]", r"[\1]", "\\"]
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(UsageError, match="is no regular expression: "):
        make_schema({"type": "string", "pattern": pattern})


@pytest.mark.parametrize("text", ["[" * 5000 + "int" + "]" * 5000, "a {" * 3000 + "b" + "}" * 3000, "a, " * 100_000])
def test_a_short_form_without_measure_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="short form"):
        expand_schema(text)


# -- checks that could take years ---------------------------------------------------------------------------------------


def test_a_pattern_that_never_ends_is_given_up() -> None:
    schema = make_schema(
        {"type": "string", "pattern": r"^(?=(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4x\5\6\7\8\9y$)"}
    )
    assert "is not known after 5 seconds" in str(fault(json.dumps("ab" * 60 + "xy"), schema))


def test_references_that_double_in_each_row_are_followed_once() -> None:
    rows = {f"a{row}": {"allOf": [{"$ref": f"#/$defs/a{row + 1}"}] * 2} for row in range(40)}
    schema = make_schema({"$defs": {**rows, "a40": {"type": "string"}}, "$ref": "#/$defs/a0"})
    assert fault('"tea"', schema) is None
    assert fault("1", schema) == "/: 1 is not of type 'string'"


def test_names_by_patterns_over_all_of_unicode() -> None:
    schema = make_schema(
        {"patternProperties": {r"^x\p{L}$": {"type": "integer"}}, "additionalProperties": False, "type": "object"}
    )
    assert schema.relaxed == ()
    assert passes(schema, '{"xé":1, "xa":2}') and fault('{"xé": 1}', schema) is None
    assert not passes(schema, '{"x1":1}') and "unexpected" in str(fault('{"x1": 1}', schema))
    assert not passes(schema, '{"xé":"a"}') and "/xé: " in str(fault('{"xé": "a"}', schema))


FORMATS: dict[str, tuple[list[str], list[str]]] = {
    "date": (["2024-02-29", "1999-12-31"], ["2023-02-29", "1900-02-29", "2024-04-31", "24-1-1"]),
    "time": (["23:59:60Z", "01:29:60+01:30", "12:00:00.123456789z"], ["22:59:60Z", "24:00:00Z", "12:00:00"]),
    "date-time": (
        ["2024-02-29t23:59:60Z", "2024-01-01T00:00:00-23:59"],
        ["2023-02-29T00:00:00Z", "2024-01-01 00:00:00Z"],
    ),
    "email": (["jo-hn.2@ex-ample9.com", '"a b"@c.d', "a@[127.0.0.1]", "a@[IPv6:::1]"], ["a@", "a..b@c.d", "a@-b"]),
    "ipv6": (["::", "::ffff:192.168.0.1", "1:2:3:4:5:6:7:8", "1::8"], ["1::2::3", "12345::", "1:2:3:4:5:6:7"]),
    "uuid": (["2eb8aa08-AA98-11ea-b4aa-73b441d16380"], ["2eb8aa08"]),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_exact_to_the_mask_and_to_the_check(name: str) -> None:
    schema = make_schema({"type": "string", "format": name})
    good, bad = FORMATS[name]
    assert schema.relaxed == ()
    for text in (*good, *bad):
        assert passes(schema, json.dumps(text)) == (fault(json.dumps(text), schema) is None) == (text in good), text


# -- numbers ----------------------------------------------------------------------------------------------------------


def spelled(number: float) -> str:
    return str(int(number)) if number == int(number) else format(Decimal(repr(number)), "f")


NUMBERS: list[tuple[dict[str, Any], list[float], list[float]]] = [  # a schema, what fits it and what does not
    ({"type": "integer"}, [1234567890123456789, -(10**30), 0], [0.5]),
    ({"type": "number", "multipleOf": 0.01}, [19.99, 0.07, 100, -3.5], [19.995]),
    ({"type": "number", "multipleOf": 0.25}, [0.5, 14.5, 3, -0.75], [0.3, 0.6]),
    ({"type": "integer", "multipleOf": 0.5}, [1, 2], [0.5]),
    ({"type": "number", "minimum": -0.25, "maximum": 3.125}, [0.2, 3, 3.1, 3.12, -0.2, -0.25], [3.13, -0.3]),
    ({"type": "number", "exclusiveMaximum": 9.999}, [9.9, 9.99, 9.9989], [9.999, 10]),
    ({"allOf": [{"type": "number", "multipleOf": 0.1}, {"multipleOf": 0.25}]}, [0.5, 1], [0.1, 0.25]),
    ({"type": "integer", "minimum": 10**18, "maximum": 10**18 + 128}, [10**18, 10**18 + 128], [10**18 + 129]),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "type": "number", "minimum": 3, "exclusiveMinimum": True}, [3.1], [3]),
]  # fmt: skip


@pytest.mark.parametrize("document, good, bad", NUMBERS, ids=[str(document) for document, _, _ in NUMBERS])
def test_a_number_is_held_to_all_its_digits(document: dict[str, Any], good: list[float], bad: list[float]) -> None:
    schema = make_schema(document)
    assert schema.relaxed == ()
    for number in (*good, *bad):
        text = spelled(number)
        assert passes(schema, text) == (fault(text, schema) is None) == (number in good), text


@pytest.mark.parametrize("document, named", [
    ({"maximum": 10**18 + 77}, "maximum at /"),
    ({"exclusiveMinimum": 10**18}, "exclusiveMinimum at /"),
    ({"minimum": 1e300}, "minimum at /"),
    ({"exclusiveMinimum": 4, "maximum": 4.3}, "exclusiveMinimum at /"),
    ({"multipleOf": 0.07}, "multipleOf at /"),
    ({"multipleOf": 123456789}, ""),
    ({"allOf": [{"multipleOf": 123457}, {"multipleOf": 98765}]}, "multipleOf at /"),
    ({"const": 12345678901234567890}, "const at /"),
    ({"enum": [3, 2**53 + 1]}, "enum at /"),
    ({"minimum": 10**18}, "minimum at /"),
])  # fmt: skip
def test_what_llguidance_would_see_otherwise_is_named(document: dict[str, Any], named: str) -> None:
    relaxed = make_schema({"type": "number", **document}).relaxed
    assert relaxed[:1] == ((named,) if named else ())


def test_chance_finds_no_number_that_mask_and_check_judge_differently() -> None:
    chance = random.Random(7)
    ends = [0, 0.3, 0.25, 1, 4, 4.3, 9, 9.99, 100, -1, -4, -4.05, -0.125]
    for _ in range(120):
        bounds = chance.sample(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"], 2)
        document: dict[str, Any] = {"type": chance.choice(["number", "integer"])}
        document |= {key: chance.choice([0.25, 0.1, 2, 1.5] if key == "multipleOf" else ends) for key in bounds}
        try:
            schema = make_schema(document)
        except UsageError as error:
            assert "nothing fits /" in str(error)
            continue
        for end in (document[key] for key in bounds):
            for number in (end, end + 0.5, end - 0.001, round(end * 0.3, 3), end + 10, 2 * end):
                fits = fault(spelled(number), schema) is None
                passed = passes(schema, spelled(number))
                assert passed == fits or (passed and schema.relaxed), (document, number)


def test_integers_are_never_shortened() -> None:
    for schema in (expand_schema("[int]"), make_schema({"type": "array", "items": {"type": "integer"}})):
        assert passes(schema, f"[{10**40}, -{10**40}]") and fault(f"[{10**40}]", schema) is None


# -- one token after the other ----------------------------------------------------------------------------------------


def test_the_mask_of_all_tokens_is_what_fits_one_by_one() -> None:
    held = constraint(make_schema({"type": "array", "items": {"enum": ["é", 12, 1]}}))
    for letter in '["é", 12]'.encode():
        alone = [token for token in range(len(TEXTS)) if held.fits(token)]
        assert sorted(held.fitting()) == alone == sorted(held.fitting(range(len(TEXTS))))
        assert letter in alone and not held.may_end
        held.accept(letter)
    assert held.fitting() == [END] and held.may_end and held.fits(END)


def test_half_a_character_is_finished_before_anything_else() -> None:
    held = constraint(make_schema({"type": "string"}))
    for token in (ord('"'), HALF):
        held.accept(token)
    assert held.fitting() == [*range(0x80, 0xC0)]


def test_a_marker_is_no_text_even_where_its_letters_are() -> None:
    schema = make_schema({"const": "<mark>"})
    held = constraint(schema)
    held.accept(ord('"'))
    assert held.fitting() == [ord("<")] and not held.fits(MARK)
    assert passes(schema, '"<mark>"')


def test_white_space_comes_behind_commas_and_colons_only_and_once() -> None:
    schema = make_schema({})
    for text in ('{"a": [1, 2], "b": {}}', '{"a":[1,2],"b":{}}'):
        assert passes(schema, text)
    for text in (" 1", "[ 1]", "[1 ]", "[1,  2]", '{"a" :1}', "[1,\n2]", "1 "):
        assert not passes(schema, text)


def test_what_may_stand_before_an_answer_fits_and_half_of_it_goes_on() -> None:
    held = constraint(make_schema({"type": "boolean"}), answer_with=behind_a_mark)
    assert held.fits(MARK) and not held.fits(LINES) and held.fits(ord("t")) and MARK not in held.fitting()
    written = b"<ma"
    held = constraint(
        make_schema({"type": "boolean"}),
        answer_with=lambda data: None if b"<mark>".startswith(written + data) else written + data,
    )
    assert held.fitting() == held.fitting(range(len(TEXTS))) == [ord("r")] and not held.fits(END)


def test_what_is_written_already_counts_whether_it_fits_or_not() -> None:
    held = constraint(make_schema({"type": "array", "items": {"type": "string"}}))
    held.accept_text('["é'.encode() + b"\xc3")
    assert held.fitting() == [*range(0x80, 0xC0)]
    held = constraint(make_schema({"type": "array"}))
    held.accept_text(b"{")
    assert held.fitting() == [] and not held.fits(END) and not held.may_end


def test_what_becomes_too_much_for_llguidance_ends_the_answer_and_nothing_else() -> None:
    schema = make_schema({"type": "string", "pattern": r"^(\p{L}{1,500}){1,500}$"})
    held = constraint(schema)
    held.accept_text(b'"' + 100 * b"a")
    assert held.fitting() == [] and not held.fits(ord('"')) and not held.fits(END)
    with pytest.raises(UsageError, match="make it simpler"):
        Constraint(json.dumps({"enum": ["a"], "minLength": "long"}), TOKENS)


# -- vocabularies -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_spm, write_bpe])
def test_tokens_stand_for_what_llama_cpp_writes(write: Any, tmp_path: Path) -> None:
    file = ModelFile(write(tmp_path / "vocabulary.gguf"))
    with load_vocabulary(file) as vocabulary:
        for token, (kind, text) in enumerate(
            zip(file.items("tokenizer.ggml.token_type"), token_texts(file), strict=True)
        ):
            is_text = kind in (1, 4, 6)  # a normal one, the user's, or a byte
            assert text == (vocabulary.piece(token) if is_text else b"")


def test_a_token_of_letters_that_stand_for_no_byte_is_no_text() -> None:
    words = ["Ġa", "‼", "Ċ?", "<|end|>", "é ü"]
    assert texts_of(words, [1, 1, 1, 3, 4], byte_level=True) == [b" a", b"", b"\n?", b"", "é ü".encode()]
