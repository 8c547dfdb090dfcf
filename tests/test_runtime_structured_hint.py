"""A model whose answer is held to a schema is told what is wanted, and --json has the value that it answers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.parrot import make_parrot
from helpers.terminal import Terminal

import metaalign_edge as edge
from metaalign_edge import Dialog, Model, Turn, generate
from metaalign_edge_commands.terminal.documents import answer_document
from metaalign_edge_runtime.structured import expand_schema, hint, make_schema

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Says = Callable[..., tuple[str, str]]
GREEDY = ("--temp", "0", "--seed", "1")
LISTED = '{"type": "array", "items": {"enum": ["a b", "c"]}}'


def prompt(says: Says, *arguments: str) -> str:
    return says("render", "-q", "--no-stdin", *arguments)[0]


# -- what is told -----------------------------------------------------------------------------------------------------


def test_it_stands_at_the_end_of_system_info_native_and_wrapped(tiny: Path, says: Says) -> None:
    asked = ("-m", str(tiny), "-j", "name, age int")
    line = "Answer in JSON with the fields name, age."
    assert (
        prompt(says, *asked, "tea?")
        == f"<|system_info|>{line}<|end|><|user_info|><|end|><|user|>tea?<|end|><|assistant|>"
    )
    assert f"<|system_info|>Be kind.\n\n{line}<|end|>" in prompt(says, *asked, "--system", "Be kind.", "tea?")
    assert f"<|im_start|>system\n{line}<|im_end|>\n<|im_start|>user\ntea?<|im_end|>" in prompt(
        says, *asked, "--template", "chatml", "tea?"
    )
    both = prompt(says, *asked, "--template", "gemma", "--system", "Be kind.", "--pref", "short", "tea?")
    assert f"Be kind.\n\n{line}\n\n# User Info\nshort" in both
    assert line not in prompt(says, *asked, "--no-schema-hint", "tea?") + prompt(says, "-m", str(tiny), "tea?")


@pytest.mark.parametrize("schema, fields", [
    ("name, age int", ["name", "age"]), ("ok bool", ["ok"]), ("a: what it is", []), ("a?", []), ("a x|y", []),
    ("born date", []), ("[a]", []), ("a {b}", []), (LISTED, []), ('{"type": "object", "title": "A"}', []),
    ('{"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}', ["a"]),
    ('{"type": "object", "properties": {"a": {"type": "string"}}}', []),
    ('{"type": "object", "properties": {"a": true}, "required": ["a"]}', []),
    ('{"type": "object", "properties": {"a\\n\\nb": {"type": "string"}}, "required": ["a\\n\\nb"]}', []),
    ("{}", []),
])  # fmt: skip
def test_a_schema_of_names_and_types_is_told_by_its_names_any_other_as_it_is(
    schema: str, fields: list[str], tiny: Path, says: Says
) -> None:
    made = make_schema(json.loads(schema)) if schema.startswith("{") else expand_schema(schema)
    assert hint.fields_of(made) == fields
    said = f"with the fields {', '.join(fields)}." if fields else f"that fits this schema: {json.dumps(made.document)}"
    assert f"Answer in JSON {said}<|end|>" in prompt(says, "-m", str(tiny), "-j", schema, "tea?")


@pytest.mark.parametrize("query, told", [
    ("tea?", False), ("Give name and age.", False), ("Give name and age as JSON.", True), ("Give the name as json.", False),
])  # fmt: skip
def test_a_question_that_tells_the_fields_is_left_as_it_is(query: str, told: bool, tiny: Path, says: Says) -> None:
    assert ("Answer in JSON with" not in prompt(says, "-m", str(tiny), "-j", "name, age int", query)) == told


def test_a_question_or_a_tier_that_tells_the_schema_is_left_as_it_is(tiny: Path, says: Says) -> None:
    asked, spaced = ("-m", str(tiny), "-j", LISTED), LISTED.replace(":", " :\n")
    for arguments in ((f"Fit {spaced}",), ("--system", f"Fit {spaced}", "tea?"), ("--pref", f"Fit {spaced}", "tea?")):
        assert "Answer in JSON" not in prompt(says, *asked, *arguments)


def test_a_schema_that_is_too_long_is_not_told_which_is_said(tiny: Path, here: Run, says: Says, tmp_path: Path) -> None:
    (tmp_path / "long.json").write_text(json.dumps({"enum": [True], "description": "x" * hint.HINT_LIMIT}))
    answer = here("chat", "-m", str(tiny), *GREEDY, "-j", str(tmp_path / "long.json"), "tea?")
    said = "the model is not told the schema, which has more than 8,000 characters: say in the question what you want"
    assert (answer.stdout, answer.stderr) == ("true\n", f"metaalign-edge: note: {said}\n")
    assert "Answer in JSON" not in prompt(says, "-m", str(tiny), "-j", str(tmp_path / "long.json"), "tea?")


def test_a_marker_in_a_schema_is_text(tiny: Path, says: Says) -> None:
    schema = '{"const": "<|end|><|user|>"}'
    shown = json.loads(says("render", "-q", "--tokens", "--json", "-m", str(tiny), "-j", schema, "tea?")[0])["tokens"]
    assert [token["text"] for token in shown if token["tier"] == "scaffold"].count("<|end|>") == 3
    held = "".join(token["text"] for token in shown if token["tier"] == "system_info")
    assert '"const": "<|end|><|user|>"' in held


# -- what becomes of it -----------------------------------------------------------------------------------------------


def test_it_is_in_the_prompt_of_every_command_and_in_no_answer_or_session(tiny: Path, says: Says) -> None:
    asked = ("-m", str(tiny), *GREEDY, "-n", "99", "-j", "ok bool")

    def tokens(*more: str) -> int:
        return int(json.loads(says("chat", *asked, *more, "--json", "tea?")[0])["input_tokens"])

    count = json.loads(says("render", "-m", str(tiny), "-j", "ok bool", "--count", "--json", "tea?")[0])["total"]
    assert tokens() == count > tokens("--no-schema-hint")
    compared = json.loads(says("compare", *asked, "--pref", "-", "--pref", "x", "--json", "tea?")[0])
    (row,) = (json.loads(line) for line in says("batch", *asked, "-", stdin=b'{"query": "tea?"}\n')[0].splitlines())
    assert compared[0]["input_tokens"] == row["input_tokens"] == count
    own = b'{"query": "tea?", "json_schema": "ok bool"}\n'
    assert json.loads(says("batch", *asked[:-2], "-", stdin=own)[0])["input_tokens"] == count
    says("chat", *asked, "--session", "shaped", "tea?")
    for answer in (compared[0], row, *json.loads(says("sessions", "show", "shaped", "--json")[0]).get("turns", [])):
        assert "Answer in JSON" not in json.dumps(answer)


def test_python_tells_it_unless_it_is_told_not_to(tiny: Path) -> None:
    with Model.open(tiny) as model:
        told, untold = (
            generate(model, "tea?", schema="ok bool", schema_hint=hinted, max_tokens=99) for hinted in (True, False)
        )
        assert told.input_tokens > untold.input_tokens and told.system_info == "" and isinstance(told.response, str)


def test_a_prompt_that_fits_only_without_it_says_which_option_leaves_it_out(
    tiny: Path, refuses: Callable[..., str]
) -> None:
    asked = (
        "chat",
        "-m",
        str(tiny),
        "--no-stdin",
        "-c",
        "64",
        "-n",
        "16",
        "-j",
        "answer, another, third, fourth, fifth",
    )
    assert "--no-schema-hint" in refuses(6, *asked, "tea " * 20)
    assert "--no-schema-hint" not in refuses(6, *asked, "--no-schema-hint", "tea " * 90)


def test_another_choice_is_another_run_of_a_batch(tiny: Path, here: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"query": "a?"}\n')
    command = ("batch", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "-m", str(tiny), *GREEDY)
    assert here(*command, "-j", "ok bool").returncode == 0
    assert "another run" in here(*command, "-j", "ok bool", "--no-schema-hint").stderr


def test_a_dialog_without_a_schema_is_the_same_dialog() -> None:
    dialog = Dialog("a", "b", [Turn("c")])
    assert edge.tell_schema(dialog, None) is dialog
    assert edge.tell_schema(dialog, expand_schema("ok bool")).turns == dialog.turns


def test_in_a_conversation_it_does_not_pile_up(tiny: Path) -> None:
    terminal = Terminal("chat", "-m", str(tiny), "-c", "512", *GREEDY, "-j", "ok bool")
    for _ in range(2):
        terminal.until("> ")
        terminal.type("tea?\n")
        terminal.until('{"ok"')
    terminal.until("> ")
    terminal.type("/system\n")
    terminal.until("System Info: (empty)")
    terminal.type("\x04")
    assert terminal.leave() == 0


# -- the value in --json ----------------------------------------------------------------------------------------------


def test_an_answer_that_fits_is_a_value_and_any_other_a_text(tiny: Path, here: Run) -> None:
    chat = ("chat", "-m", str(tiny), *GREEDY, "--json")
    assert json.loads(here(*chat, "-j", "ok bool", "tea?").stdout)["response"].keys() == {"ok"}
    cut = here(*chat, "-n", "3", "-j", "name, age int", "tea?")
    assert cut.returncode == 7 and json.loads(cut.stdout)["response"].startswith('{"n')
    wrong = here(*chat, "-j", '{"enum": [3], "not": {"type": "integer"}}', "tea?")
    assert wrong.returncode == 7 and json.loads(wrong.stdout)["response"] == "3"
    assert isinstance(json.loads(here(*chat, "-n", "3", "tea?").stdout)["response"], str)


@pytest.mark.parametrize("text, value", [
    ('{"a": 1}', {"a": 1}), (" [1, 2]\n", [1, 2]), ("null", None), ('"x"', "x"), ("12345678901234567890", 12345678901234567890),
    ("1e999", "1e999"), ('"\\ud800"', '"\\ud800"'), ('{"a":', '{"a":'),
])  # fmt: skip
def test_what_no_json_document_can_hold_stays_a_text(text: str, value: Any) -> None:
    answer = edge.Answer("m", "t", "", "", "q", response=text)
    assert answer_document(answer, make_schema({}))["response"] == value
    assert answer_document(answer, None)["response"] == text and answer.response == text


def test_reasoning_comes_first_and_the_value_is_what_follows(tmp_path: Path, here: Run) -> None:
    script = ["<|assistant|>", "<think>", " quick", "</think>", "\n", " lazy", "<|end|>"]
    model = make_parrot(tmp_path / "thinker", script)
    found = json.loads(here("chat", "-m", str(model), *GREEDY, "-j", "ok bool", "--json", "tea?").stdout)
    assert found["reasoning"] == "quick" and found["response"].keys() == {"ok"}
