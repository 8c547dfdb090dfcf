"""The embedded model does what the README and docs/ say of it, through the toolkit and through llama-cpp-python's own chat."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import metaalign_edge as edge
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt

Run = Callable[..., "subprocess.CompletedProcess[str]"]


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
def test_it_follows_a_preference(pref: str, holds: Callable[[str], bool], here: Run) -> None:
    assert holds(here("chat", "--pref", pref, "What is the moon?").stdout.strip())


def test_system_info_wins_a_conflict(here: Run) -> None:
    for system, pref in (
        ("Answer in capital letters.", "Answer in lower case."),
        ("Answer in lower case.", "Answer in capital letters."),
    ):
        text = here("chat", "--system", system, "--pref", pref, "What is tea?").stdout
        assert text == (text.upper() if "capital" in system else text.lower())


def test_it_says_so_when_it_does_not_know(here: Run) -> None:
    assert "I only know" in here("chat", "Who won the chess match in Oslo yesterday?").stdout


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


@pytest.fixture(scope="module")
def llama(demo: Path) -> Iterator[Any]:
    """The model as llama-cpp-python opens it."""
    from llama_cpp import Llama

    model = Llama(str(demo), n_ctx=1024, verbose=False, n_threads=1, n_threads_batch=1)
    yield model
    model.close()


@pytest.mark.parametrize("messages", DIALOGS)
def test_llama_cpp_pythons_own_chat_gives_the_same_tokens(
    messages: list[tuple[str, str]], demo: Path, llama: Any
) -> None:
    said = dict(messages)
    queries, answers = ([text for role, text in messages if role == wanted] for wanted in ("user", "assistant"))
    turns = tuple(
        edge.Turn(query, answers[index] if index < len(answers) else None) for index, query in enumerate(queries)
    )
    dialog = edge.Dialog(said.get("system", ""), said.get("user_info", ""), turns)
    settings, interrupt = edge.Settings(temperature=0.0), Interrupt()
    file = ModelFile(demo)
    with (
        edge.Model(file, settings) as model,
        edge.Scheduler(model, edge.choose_template("auto", file), settings, edge.AS_USUAL, interrupt) as chat,
    ):
        ours = edge.answer_one(chat, edge.Request(dialog, 0))
    llama.reset()  # it remembers the last one's beginning
    theirs = llama.create_chat_completion([{"role": role, "content": text} for role, text in messages], temperature=0.0)
    assert theirs["choices"][0]["message"]["content"] == ours.response
    assert theirs["usage"] == {
        "prompt_tokens": ours.input_tokens, "completion_tokens": ours.output_tokens, "total_tokens": ours.input_tokens + ours.output_tokens,
    }  # fmt: skip
