"""The embedded model does what the README says of it, through the toolkit and through llama-cpp-python's own chat."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from metaalign_edge_preferences import families, values
from metaalign_edge_preferences.dialogs import Plan, compatible, compose, subjects
from metaalign_edge_preferences.suite import survives

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


CARD = (Path(__file__).parent.parent / "models" / "README.md").read_text(encoding="utf-8")
# the card's table: | family | value · value |
TRAINED = {
    f"{family}.{value.split('(')[0].strip().replace(' ', '_')}"
    for family, named in re.findall(r"^\| (\w+) \| ([^|]*[^|\s]) \|$", CARD, re.MULTILINE)
    if family in families()
    for value in named.split(" · ")
}
TOPICS = int(re.findall(r"about (\d+) everyday\s+things", CARD)[0])


def test_the_card_names_values_that_exist() -> None:
    assert len(TRAINED) > 20 and set(values()) >= TRAINED, TRAINED - set(values())


OTHERS = sorted(key for key in TRAINED if key.split(".")[0] not in ("name", "background", "units"))


def plans(section: str, rng: Random) -> Plan:
    """Return a plan of a dialog about what the model knows, under preferences that it was trained on."""
    topic = rng.choice(subjects("topic")[:TOPICS]).name
    one = Plan(kind="topic", subject=topic, turns=1, background="")
    while True:
        first, second = rng.sample(OTHERS, 2)
        rival = first.split(".")[0] == second.split(".")[0]
        if section == "conflict" and rival:
            return replace(one, values=(first,), tiers=("system",), losing=second, split="combination")
        if section == "two preferences" and not rival and compatible((first, second)):
            return replace(one, values=(first, second), split="combination")
        if section in ("seen", "combination", "frame"):
            return replace(one, values=(first,), split=section)
        if section == "no preference":
            return replace(one, values=())
        if section == "unknown question":
            return replace(one, kind="unknown", subject=None, values=(), split="word")


FLOORS = {
    "no preference": 0.9,
    "seen": 0.9,
    "combination": 0.9,
    "frame": 0.8,
    "conflict": 0.9,
    "two preferences": 0.8,
    "unknown question": 0.85,
}  # far below what the card reports on more rows, far above what a broken path would give


@pytest.mark.parametrize("section", FLOORS)
def test_it_obeys_wordings_it_was_not_trained_on(section: str, demo: Path) -> None:
    import metaalign_edge as edge

    settings, interrupt, file = edge.Settings(temperature=0.0, max_tokens=200), edge.Interrupt(), edge.ModelFile(demo)
    template, rng = edge.choose_template("auto", file), Random(f"demo/{section}")
    asked = [compose(rng, plans(section, rng)) for _ in range(60)]
    jobs = [
        edge.Job(edge.Dialog(one.prompt.system_info, one.prompt.user_info, (edge.Turn(one.last.query),)), tag=one)
        for one in asked
    ]
    with (
        edge.Model(file, settings) as model,
        edge.Parallel(model, template, settings, edge.AS_USUAL, interrupt, 8, context=512) as engine,
    ):
        answers = [(job.tag, answer) for job, answer in engine.run(jobs) if isinstance(answer, edge.Answer)]
    held = [
        all(check.holds(answer.response) for check in one.checks)
        and (bool(one.checks) or any(survives(said, answer.response) for said in one.last.subject.says()))
        for one, answer in answers
    ]
    assert len(held) == len(asked) and sum(held) >= FLOORS[section] * len(held)


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
