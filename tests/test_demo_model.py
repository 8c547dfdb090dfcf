"""The embedded model does what the README says of it, through the toolkit and through llama-cpp-python's own chat."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from metaalign_edge_tune.dataset import Row
from metaalign_edge_tune.evaluate import Result, edge_generator, suite

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def generate(demo: Path) -> Callable[[Row], str]:
    return edge_generator(demo)


def test_the_model_is_small_enough_to_be_carried(demo: Path) -> None:
    assert demo.stat().st_size < 20_000_000


@pytest.mark.parametrize("pref, holds", [
    ("Answer in capital letters.", str.isupper),
    ("in capital letters please", str.isupper),
    ("answer in lower case", str.islower),
    ("one sentence", lambda text: text.count(".") == 1),
    ("Answer as a numbered list.", lambda text: text.startswith("1.") and "\n2." in text),
    ("Reply as JSON.", lambda text: isinstance(json.loads(text), dict)),
])  # fmt: skip
def test_it_follows_a_preference(pref: str, holds: Callable[[str], bool], run: Run) -> None:
    assert holds(run("chat", "--pref", pref, "What is the moon?").stdout.strip())


def test_system_info_wins_a_conflict(run: Run) -> None:
    for system, pref in (
        ("Answer in capital letters.", "Answer in lower case."),
        ("Answer in lower case.", "Answer in capital letters."),
    ):
        text = run("chat", "--system", system, "--pref", pref, "What is tea?").stdout
        assert text == (text.upper() if "capital" in system else text.lower())


def test_it_says_so_when_it_does_not_know(run: Run) -> None:
    assert "I only know" in run("chat", "Who won the chess match in Oslo yesterday?").stdout


FLOORS = {
    "no preference": 0.9,
    "wording: seen": 0.9,
    "wording: combination": 0.9,
    "topic new to the value": 0.9,
    "conflict": 0.9,
    "two preferences": 0.8,
    "preference changed midway": 0.75,
    "opinion, background: seen": 0.85,
    "unknown question": 0.85,
}  # far below what the card reports on more rows, far above what a broken path would give


@pytest.mark.parametrize("section", FLOORS)
def test_it_obeys_wordings_it_was_not_trained_on(section: str, generate: Callable[[Row], str]) -> None:
    results = [Result(row, generate(row)) for row in suite(seed=1, size=24)[section]]
    held = [result.obeyed if result.row.checks else result.exact for result in results]
    assert sum(held) >= FLOORS[section] * len(held)


DIALOGS = [
    [("system", "Answer in capital letters."), ("user_info", "one sentence"), ("user", "What is the moon?")],
    [("user_info", "Answer as bullet points."), ("user", "What is tea?")],
    [("user", "Tell me about bread.")],
    [
        ("system", "Be formal."),
        ("user", "What is a volcano?"),
        ("assistant", "A volcano is a mountain."),
        ("user", "And the sun?"),
    ],
]


@pytest.mark.parametrize("messages", DIALOGS)
def test_llama_cpp_pythons_own_chat_gives_the_same_tokens(messages: list[tuple[str, str]], demo: Path) -> None:
    from llama_cpp import Llama

    import metaalign_edge as edge

    said = dict(messages)
    queries, answers = ([text for role, text in messages if role == wanted] for wanted in ("user", "assistant"))
    turns = tuple(
        edge.Turn(query, answers[index] if index < len(answers) else None) for index, query in enumerate(queries)
    )
    dialog = edge.Dialog(said.get("system", ""), said.get("user_info", ""), turns)
    settings, interrupt = edge.Settings(temperature=0.0), edge.Interrupt()
    file = edge.ModelFile(demo)
    with (
        edge.Model(file, settings) as model,
        edge.Chat(model, edge.choose_template("auto", file), settings, edge.AS_USUAL, interrupt) as chat,
    ):
        ours = chat.answer(dialog, 0, lambda _: None, lambda _: None)
    llama = Llama(str(demo), n_ctx=1024, verbose=False)
    theirs = llama.create_chat_completion([{"role": role, "content": text} for role, text in messages], temperature=0.0)  # type: ignore[arg-type,misc]
    llama.close()
    assert theirs["choices"][0]["message"]["content"] == ours.response  # type: ignore[index]
    assert theirs["usage"] == {  # type: ignore[index]
        "prompt_tokens": ours.input_tokens, "completion_tokens": ours.output_tokens, "total_tokens": ours.input_tokens + ours.output_tokens,
    }  # fmt: skip
