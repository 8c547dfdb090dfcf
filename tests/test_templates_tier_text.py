"""A tier's text keeps its owner through whatever a template does to it."""

from __future__ import annotations

import itertools

import pytest

from metaalign_edge_templates.tier_text import TierText, join_text

MARKED = join_text(["<a> ", TierText.of(" One\n two ", "query"), "</a>", TierText.of("ß", "user_info")])
OPERATIONS = {
    "strip": lambda text: text.strip(),
    "strip of characters": lambda text: text.strip("<ß"),
    "slice": lambda text: text[2:9],
    "negative slice": lambda text: text[-9:-2],
    "index": lambda text: text[5],
    "reversal": lambda text: text[::-1],
    "step": lambda text: text[::3],
    "split": lambda text: text.split(" "),
    "split at white space": lambda text: text.split(),
    "split once": lambda text: text.split(None, 1),
    "rsplit": lambda text: text.rsplit(" ", 1),
    "rsplit at white space": lambda text: text.rsplit(None, 1),
    "splitlines": lambda text: text.splitlines(),
    "splitlines with ends": lambda text: text.splitlines(True),
    "partition": lambda text: text.partition("\n"),
    "rpartition": lambda text: text.rpartition("no"),
    "removeprefix": lambda text: text.removeprefix("<a>"),
    "removesuffix": lambda text: text.removesuffix("ß"),
    "replace": lambda text: text.replace(" ", "--"),
    "replace once": lambda text: text.replace(" ", "--", 1),
    "replace nothing": lambda text: text.replace("", "."),
    "replace by nothing": lambda text: text.replace("two", ""),
    "upper, which lengthens": lambda text: text.upper(),
    "lower": lambda text: text.lower(),
    "title": lambda text: text.title(),
    "capitalize": lambda text: text.capitalize(),
    "zfill": lambda text: text.zfill(40),
    "add": lambda text: text + "x",
    "add on the left": lambda text: "x" + text,
    "times": lambda text: 3 * text * 2,
    "join": lambda text: text.join(["x", "y", "z"]),
    "iteration": lambda text: list(text),
}


def flat(value: object) -> list[str]:
    return [value] if isinstance(value, str) else list(value)  # type: ignore[call-overload]


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_an_operation_gives_what_it_gives_on_a_plain_string(operation) -> None:  # type: ignore[no-untyped-def]
    assert flat(operation(MARKED)) == flat(operation(str.__str__(MARKED)))


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_no_character_of_a_tier_becomes_scaffold(operation) -> None:  # type: ignore[no-untyped-def]
    letters = set("Ontwß")  # in the tiers only, in any case
    for result in flat(operation(MARKED)):
        assert isinstance(result, TierText)
        scaffold = "".join(text for text, tier in result.pieces() if tier is None)
        assert not letters & (set(scaffold) | set(scaffold.swapcase()))


def test_pieces_put_together_are_the_text() -> None:
    assert "".join(text for text, _ in MARKED.pieces()) == MARKED
    assert [tier for _, tier in MARKED.pieces()] == [None, "query", None, "user_info"]


def test_neighbours_of_one_tier_merge_and_empty_spans_vanish() -> None:
    parts = [TierText.of(text, "query") for text in ("a", "", "b")]
    assert all(join_text(order).spans == ((0, 2, "query"),) for order in itertools.permutations(parts))
