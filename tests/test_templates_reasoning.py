"""Reasoning and response are told apart in every format that models are known to write, however their text is cut."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.vocabularies import write_bpe

from metaalign_edge import ModelFile
from metaalign_edge_runtime.llama.vocabulary import load_vocabulary
from metaalign_edge_templates.reasoning import FORMATS, Format, ReasoningSplitter, formats_of, unknown_mark


def no_token(_: str) -> bool:
    return False


def split(formats: tuple[Format, ...], output: str, ending: str, size: int) -> tuple[str, str]:
    """Split an output that comes in pieces of so many bytes."""
    splitter, data = ReasoningSplitter(formats, ending), output.encode()
    found = [splitter.feed(data[at : at + size]) for at in range(0, len(data), size)]
    found.append(splitter.rest())
    return b"".join(thought for thought, _ in found).decode(), b"".join(said for _, said in found).decode()


class Case(NamedTuple):
    """What a template says, the end of its prompt, what the model writes, and what that is."""

    template: str
    ending: str
    output: str
    reasoning: str
    response: str


THINK = "{{ '<think>' + message.reasoning_content + '</think>' + content }}"
HARMONY = "{{ '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}"
COMMAND = "<|START_THINKING|>{{ plan }}<|END_THINKING|><|START_RESPONSE|>{{ content }}<|END_RESPONSE|>"
KIMI = (
    "{%- macro open_tag(tag) -%}{{ '<|open|>' + tag + '<|sep|>' }}{%- endmacro -%}{{ '<|close|>' + tag + '<|sep|>' }}"
)
MUSE = "{{ '<|start|>assistant to=self<|message|>' + message.reasoning_content + '<|eom|>' }}"
SOLAR = (
    "{{ '<|begin|>assistant<|think|>' + thought + '<|end|>' }}{{ '<|begin|>assistant<|content|>' + said + '<|end|>' }}"
)
GEMMA = "{{ '<|channel>thought\\n' + thinking_text + '\\n<channel|>' }}"
APRIEL = "{{ 'Here are my reasoning steps:\\n' }}{{ thoughts + '\\n[BEGIN FINAL RESPONSE]\\n' }}"
HUNYUAN = "{%- set end = '</think{}>'.format(suffix) %}{{ '<think{}>'.format(suffix) }}"

CASES = {
    "think": Case(THINK, "", "<think>\nI wonder.\n</think>\n\nTea is a drink.", "I wonder.", "Tea is a drink."),
    "think, opened by the prompt": Case(THINK, "<think>\n", "I wonder.</think>Tea.", "I wonder.", "Tea."),
    "think, opened twice": Case(THINK, "<think>\n", "<think>I wonder.</think>Tea.", "I wonder.", "Tea."),
    "think, two blocks": Case(THINK, "", "<think>One.</think>\n<think>Two.</think>Tea.", "One.\n\nTwo.", "Tea."),
    "think, closed by the prompt": Case(THINK, "<think>\n\n</think>\n\n", "Tea.", "", "Tea."),
    "think, closed alone": Case("{{ '</think>' }}", "", "</think>Tea.", "", "Tea."),
    "think, not at all": Case(THINK, "", "Tea </think> and <think> x</think>.", "", "Tea </think> and <think> x</think>."),
    "think and response": Case(
        THINK + "<response>", "", "<think>I wonder.</think>\n<response>\nTea.\n</response>\n", "I wonder.", "Tea."
    ),
    "think and answer": Case(THINK + "<answer>", "", "<think>a</think><answer>Tea </b> .</answer> x", "a", "Tea </b> ."),
    "answer that nobody named": Case(
        THINK, "", "<think>a</think><answer>Tea.</answer>", "a", "<answer>Tea.</answer>"
    ),
    "upper case in brackets": Case("[THINK]{{ x }}[/THINK]", "", "[THINK]I wonder.[/THINK]Tea.", "I wonder.", "Tea."),
    "thought": Case("<thought>{{ x }}</thought>", "<thought>\n", "I wonder.\n</thought>\n\nTea.", "I wonder.", "Tea."),
    "seed": Case("'</seed:think>'", "", "<seed:think>I wonder.</seed:think>Tea.", "I wonder.", "Tea."),
    "minimax m3": Case("'</mm:think>'", "", "<mm:think>I wonder.</mm:think>Tea.", "I wonder.", "Tea."),
    "minimax m3, nothing to think": Case("'</mm:think>'", "", "</mm:think>Tea.", "", "Tea."),
    "hunyuan 3": Case(HUNYUAN, "<think:open>", "I wonder.</think:open>Tea.", "I wonder.", "Tea."),
    "hunyuan 3, opening": Case(HUNYUAN, "", "<think:open>I wonder.</think:open>Tea.", "I wonder.", "Tea."),
    "kimi vl": Case("◁/think▷", "", "◁think▷I wonder.◁/think▷Tea.", "I wonder.", "Tea."),
    "thinking": Case("</thinking>", "", "<thinking>I wonder.</thinking>Tea.", "I wonder.", "Tea."),
    "reasoning": Case("</reasoning>", "", "<reasoning>I wonder.</reasoning>\nTea.", "I wonder.", "Tea."),
    "marco": Case(
        "</Thought><Output>", "", "<Thought>\nI wonder.\n</Thought>\n\n<Output>\nTea.\n</Output>", "I wonder.", "Tea."
    ),
    "functionary": Case("'>>>all\\n'\">>>${recipient}\"", "<|end_header_id|>\n\n>>>", "all\nTea >>> x.", "", "Tea >>> x."),
    "open thinker": Case(
        "<|end_of_thought|><|begin_of_solution|>",
        "",
        "<|begin_of_thought|>\n\nI wonder.\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nTea.\n\n<|end_of_solution|>",
        "I wonder.",
        "Tea.",
    ),
    "apriel": Case(APRIEL, "Here are my reasoning steps:\n", "I wonder.\n[BEGIN FINAL RESPONSE]\nTea.", "I wonder.", "Tea."),
    "apriel, opening": Case(
        APRIEL, "", "Here are my reasoning steps:\nI wonder.\n[BEGIN FINAL RESPONSE]\nTea.\n[END FINAL RESPONSE]", "I wonder.", "Tea."
    ),
    "granite 3.2": Case(
        "'Here is my response:'", "", "Here is my thought process: I wonder.\n\nHere is my response: Tea.", "I wonder.", "Tea."
    ),
    "apertus": Case("'<|inner_suffix|>'", "", "<|inner_prefix|>I wonder.<|inner_suffix|>Tea.", "I wonder.", "Tea."),
    "command": Case(
        COMMAND, "", "<|START_THINKING|>I wonder.<|END_THINKING|><|START_RESPONSE|>Tea.<|END_RESPONSE|>", "I wonder.", "Tea."
    ),
    "command, closed by the prompt": Case(
        COMMAND, "<|START_THINKING|><|END_THINKING|>", "<|START_RESPONSE|>Tea.<|END_RESPONSE|>", "", "Tea."
    ),
    "north, never closed": Case(
        COMMAND, "<|START_THINKING|>", "I wonder.<|START_TEXT|>Tea.<|END_TEXT|>", "I wonder.", "Tea."
    ),
    "gemma 4": Case(GEMMA, "<|turn>model\n", "<|channel>thought\nI wonder.\n<channel|>Tea.", "I wonder.", "Tea."),
    "gemma 4, empty channels": Case(GEMMA, "", "<|channel><|channel>thought\na<channel|>Tea.", "a", "Tea."),
    "gemma 4, again at the end": Case(GEMMA, "", "Tea.<|channel>thought\n<channel|>", "", "Tea."),
    "gemma 4, a lone end": Case(GEMMA, "<|channel>thought\n<channel|>", "Tea.<channel|>", "", "Tea."),
    "gemma 4, in between": Case(
        GEMMA, "", "<|channel>thought\na<channel|>Tea, <|channel>thought\nb<channel|>or not.", "a\n\nb", "Tea, or not."
    ),
    "harmony": Case(
        HARMONY,
        "<|end|><|start|>assistant",
        "<|channel|>analysis<|message|>I wonder.<|end|><|start|>assistant<|channel|>final<|message|>Tea.<|end|>",
        "I wonder.",
        "Tea.",
    ),
    "harmony, final alone": Case(HARMONY, "<|start|>assistant", "<|channel|>final<|message|>Tea.", "", "Tea."),
    "harmony, no channel": Case(HARMONY, "<|start|>assistant", "Tea.", "", "Tea."),
    "harmony, two analyses": Case(
        HARMONY,
        "<|start|>assistant",
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Tea.",
        "a\n\nb",
        "Tea.",
    ),
    "harmony, a call of a tool": Case(
        HARMONY,
        "<|start|>assistant",
        "<|channel|>commentary to=functions.look <|constrain|>json<|message|>{}<|end|>"
        "<|start|>assistant to=functions.x<|channel|>commentary<|message|>{}<|end|>"
        "<|start|>assistant<|channel|>final <|constrain|>json<|message|>[1]",
        "{}\n\n{}",
        "[1]",
    ),
    "harmony, stray commentary": Case(
        HARMONY, "<|start|>assistant", "<|channel|>commentary<|channel|>final<|message|>Tea.", "", "Tea."
    ),
    "harmony, cut in a header": Case(
        HARMONY, "<|start|>assistant", "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>fin", "a", ""
    ),
    "harmony, opened by the prompt": Case(
        HARMONY,
        "<|start|>assistant<|channel|>analysis<|message|>",
        "a<|end|><|start|>assistant<|channel|>final<|message|>Tea.",
        "a",
        "Tea.",
    ),
    "muse": Case(
        MUSE,
        "<|start|>assistant",
        " to=self<|message|>I wonder.<|eom|><|start|>assistant to=user<|message|>Tea.<|eot|>",
        "I wonder.",
        "Tea.",
    ),
    "muse, no recipient": Case(MUSE, "<|start|>assistant", "<|message|>Tea.<|eom|>", "", "Tea."),
    "solar": Case(
        SOLAR,
        "<|begin|>assistant",
        "<|think|>I wonder.<|end|><|begin|>assistant<|content|>Tea.<|end|>",
        "I wonder.",
        "Tea.",
    ),
    "solar, closed by the prompt": Case(
        SOLAR, "<|begin|>assistant<|think|><|end|><|begin|>assistant", "<|content|>Tea.<|end|>", "", "Tea."
    ),
    "kimi k3": Case(
        KIMI,
        '<|open|>message role="assistant"<|sep|><|open|>think<|sep|>',
        "I wonder.<|close|>think<|sep|><|open|>response<|sep|>Tea.<|close|>response<|sep|><|close|>message<|sep|>",
        "I wonder.",
        "Tea.",
    ),
    "kimi k3, never closed": Case(KIMI, "<|open|>think<|sep|>", "a<|open|>response<|sep|>Tea.", "a", "Tea."),
    "kimi k3, response opened by the prompt": Case(
        KIMI, "<|open|>response<|sep|>", "Tea.<|close|>response<|sep|><|close|>message<|sep|>", "", "Tea."
    ),
    "a template that names none": Case("{{ content }}", "", "<think>I wonder.</think>Tea.", "I wonder.", "Tea."),
    "a template that only opens it": Case("'<think>'", "<think>\n", "I wonder.</think>Tea.", "I wonder.", "Tea."),
    "a template that names none, and words": Case("", "", "\n<b>Tea</b> <think>a</think> ", "", "\n<b>Tea</b> <think>a</think> "),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_each_format_is_found_and_split_however_the_text_is_cut(name: str) -> None:
    case = CASES[name]
    formats = formats_of(case.template, no_token)
    for size in (*range(1, 20), 1000):
        found = split(formats, case.output, case.ending, size)
        assert found == (case.reasoning, case.response), size


def test_every_format_of_the_table_is_tried() -> None:
    found = {(one.opens, one.closes) for case in CASES.values() for one in formats_of(case.template, no_token)}
    assert found == {(one.opens, one.closes) for one in FORMATS}


def test_a_vocabulary_names_a_format_where_the_template_does_not(tmp_path: Path) -> None:
    with load_vocabulary(ModelFile(write_bpe(tmp_path / "plain.gguf"))) as words:
        (found,) = formats_of("", lambda mark: len(words.encode(mark, special=True)) == 1)
    assert found.closes == ("</think>",)
    harmony, tokens = formats_of(HARMONY, no_token), ("<|channel|>", "<|message|>", "</think>")
    assert formats_of("", tokens[:2].__contains__) == harmony
    assert formats_of("", tokens.__contains__)[0] == harmony[0]
    assert formats_of(THINK, tokens.__contains__) == formats_of(THINK, no_token)


def test_what_may_precede_the_answer_to_a_schema() -> None:
    splitter = ReasoningSplitter(formats_of(HARMONY, no_token), "<|start|>assistant", to_schema=True)
    assert splitter.response_with(b"{") == b"{" and splitter.response_with(b"\n") is None
    assert splitter.response_with(b"  ") == b"  " and splitter.response_with(b"\n\n\n") == b"\n\n\n"
    for piece in (b"<|channel|>", b"final", b"<|message|>"):
        assert splitter.response_with(piece) is None
        assert splitter.feed(piece) == (b"", b"")
    assert splitter.feed(b'{"a": "<|end|><|channel|>analysis<|message|>') == (
        b"", b'{"a": "<|end|><|channel|>analysis<|message|>',
    )  # fmt: skip
    splitter = ReasoningSplitter(formats_of(THINK, no_token), to_schema=True)
    splitter.feed(b"<thi")
    assert splitter.response_with(b"") is None and splitter.response_with(b"nk>") is None
    assert splitter.response_with(b"{") == b"<thi{"


def test_only_what_closes_reasoning_does_not_end_an_answer() -> None:
    splitter = ReasoningSplitter(formats_of(HARMONY, no_token), "<|start|>assistant")
    assert not splitter.closes(b"<|end|>")
    splitter.feed(b"<|channel|>analysis<|message|>a")
    assert splitter.closes(b"<|end|>") and not splitter.closes(b"<|return|>")
    splitter.feed(b"<|end|><|start|>assistant<|channel|>final<|message|>b")
    assert not splitter.closes(b"<|end|>")


@pytest.mark.parametrize("response, mark", [
    ("<|plan|>First", "<|plan|>"), ("\n<reflect>hm</reflect>", "<reflect>"), ("<｜x▁y｜>", "<｜x▁y｜>"), ("[PLAN]a[/PLAN]b", "[PLAN]"),
    ("[DATE]\nDear", None), ("<p>Tea</p>", None), ("<a@b.c> wrote", None), ("a <reflect>", None), ("", None), ("< 3", None),
    ("<!DOCTYPE html>", None), ("</p>", None),
])  # fmt: skip
def test_a_mark_of_no_format_is_noticed_at_the_beginning(response: str, mark: str | None) -> None:
    assert unknown_mark(response) == mark
