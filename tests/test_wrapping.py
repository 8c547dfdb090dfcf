"""A terminal's edge breaks no word of an answer, and what is copied from it stays the text that it was."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Callable

import pyte
import pytest
from helpers.terminal import Emulator

from metaalign_edge_commands.terminal.wrapping import LONGEST, Wrapping

Run = Callable[..., "subprocess.CompletedProcess[str]"]
WIDTH = 60
PROSE = (
    "Tea is a beverage, made of dried leaves: **Camellia sinensis**, an evergreen shrub. It's drunk everywhere "
    "(internationally), hot or cold, and contains caffeine; too much of it keeps you from sleeping.\n\n"
    "- Green tea is not oxidised, oolong is half, and black tea is oxidised entirely, by standing in the air.\n"
    "1. See https://example.org/a/very/long/address/that/no/terminal/of/sixty/columns/holds/in/one/line about it.\n"
    "Voilà: déjà-vu in a naïve façade, Привет, друзья, and that's all there is to be said about such things, now.\n"
)
CODE = "```python\nvalue = function_with_a_long_name(first_argument, second_argument, third_argument)\n```\n"
TABLE = "| a long heading of a column | another long heading of a column | and a third one |\n"


@pytest.fixture(autouse=True)
def a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    monkeypatch.setenv("TERM", "xterm")


def streamed(text: str, seed: int = 0, wanted: bool = True) -> str:
    """Return what is shown of a text that comes in random pieces."""
    wrapping, chance, shown = Wrapping(wanted), random.Random(seed), ""
    while text:
        size = chance.randint(1, 9)
        shown, text = shown + wrapping.feed(text[:size]), text[size:]
    return shown + wrapping.rest()


def on_screen(shown: str) -> list[str]:
    """Return the lines that a terminal makes of it."""
    glass = pyte.Screen(WIDTH, 60)
    pyte.Stream(glass).feed(shown.replace("\n", "\r\n"))
    return [line.rstrip() for line in glass.display]


@pytest.mark.parametrize("seed", range(20))
def test_no_word_that_fits_is_broken_however_the_text_comes(seed: int) -> None:
    words = PROSE.split() + random.Random(seed).sample(PROSE.split(), 40)
    text = PROSE + " ".join(words[-40:])
    found = [word for line in on_screen(streamed(text, seed)) for word in line.split()]
    address = next(word for word in words if word.startswith("https"))
    assert [word for word in found if word not in address] == [word for word in text.split() if word not in address]
    assert address in "".join(found)


def test_a_paragraph_stays_one_line_and_its_words_as_they_are() -> None:
    shown = streamed(PROSE)
    assert shown.count("\n") == PROSE.count("\n") and shown != PROSE
    assert [line.split() for line in shown.splitlines()] == [line.split() for line in PROSE.splitlines()]


@pytest.mark.parametrize(
    "text",
    [CODE, TABLE, "    indented = code * that_has + more_than_sixty_columns + in_it_all\n", "没有空格的文字" * 20],
)
def test_code_tables_and_wide_letters_are_shown_as_they_are(text: str) -> None:
    assert streamed(text) == text
    assert streamed(PROSE + text).endswith(text)


def test_behind_code_words_are_wrapped_again() -> None:
    assert streamed(CODE + PROSE).removeprefix(CODE) == streamed(PROSE)


def test_a_word_far_from_the_edge_does_not_wait() -> None:
    wrapping = Wrapping(True)
    assert [wrapping.feed(piece) for piece in ("Te", "a is", " gr")] == ["Te", "a is", " gr"]
    assert wrapping.feed("een " + "a " * 20 + "drin") == "een " + "a " * 20  # within the last columns, it may not fit
    assert len("Tea is green " + "a " * 20) > WIDTH - LONGEST
    assert wrapping.feed("k") == "" and wrapping.feed(" ") == "drink "


@pytest.mark.parametrize("columns, kind", [("39", "xterm"), ("60", "dumb"), ("60", "unknown")])
def test_a_narrow_or_a_dumb_terminal_gets_the_text_as_it_is(
    columns: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setenv("TERM", kind)
    assert streamed(PROSE) == PROSE and streamed(PROSE, wanted=False) == PROSE


ASKED = ("--temp", "0", "What is tea?")


@pytest.mark.parametrize("arguments", [
    ("chat",), ("chat", "--no-stream"), ("compare", "--pref", "a", "--pref", "b", "--pref", "c"),
])  # fmt: skip
def test_answers_at_a_terminal_are_wrapped_and_in_a_pipe_they_are_not(arguments: tuple[str, ...], run: Run) -> None:
    piped = run(*arguments, *ASKED).stdout
    screen = Emulator(*arguments, *ASKED, columns=50)
    shown = screen.rest()
    assert screen.leave() == 0
    assert any(len(line) > 50 for line in piped.splitlines())
    assert shown.split() == piped.split()


def test_json_is_not_wrapped() -> None:
    schema = json.dumps({"const": "a " + "long " * 12 + "text"})
    screen = Emulator("chat", "-j", schema, "tea?", columns=50)
    assert "".join(line.ljust(50) for line in screen.rest().splitlines()).rstrip() == f'"{json.loads(schema)["const"]}"'
    assert screen.leave() == 0
