"""A dialog becomes a prompt: natively, or wrapped into whatever chat template a model carries."""

from __future__ import annotations

import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import metaalign_edge as edge
from metaalign_edge import ChatTemplate, Dialog, RenderOptions, Turn, render
from metaalign_edge_runtime.errors import TemplateError, UsageError
from metaalign_edge_templates.sandbox import Refusal, Template

TEMPLATES = Path(edge.__file__).with_name("templates")
BOTH = Dialog("Be formal.", "One sentence.", (Turn("What is tea?", "A drink."), Turn("And coffee?")))
QUERY = Dialog(turns=(Turn("What is tea?"),))
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def chat_template(source: str, **more: Any) -> ChatTemplate:
    meta_prompt, reminder = (
        Template((TEMPLATES / f"{own}.jinja").read_text(), own) for own in ("meta_prompt", "reminder")
    )
    template = Template(source, "the test")
    return ChatTemplate(
        template, template.mentions("user_info"), "test", "a test", meta_prompt, reminder, "<s>", "</s>", **more
    )


def shipped(name: str) -> ChatTemplate:
    return chat_template((TEMPLATES / f"{name}.jinja").read_text())


GOLDEN = {
    "metaalign": (
        "<|system_info|>Be formal.<|end|><|user_info|>One sentence.<|end|><|user|>What is tea?<|end|>"
        "<|assistant|>A drink.<|end|><|user|>And coffee?<|end|><|assistant|>"
    ),
    "chatml": (
        "<|im_start|>system\n{meta}<|im_end|>\n<|im_start|>user\nWhat is tea?<|im_end|>\n"
        "<|im_start|>assistant\nA drink.<|im_end|>\n<|im_start|>user\n{reminded}<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\n{meta}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nWhat is tea?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA drink.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n{reminded}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "gemma": (
        "<s><start_of_turn>user\n{meta}\n\nWhat is tea?<end_of_turn>\n<start_of_turn>model\nA drink.<end_of_turn>\n"
        "<start_of_turn>user\n{reminded}<end_of_turn>\n<start_of_turn>model\n"
    ),
    "mistral": "<s>[INST] {meta}\n\nWhat is tea? [/INST] A drink.</s>[INST] {reminded} [/INST]",
    "plain": "{meta}\n\n### Query:\nWhat is tea?\n\n### Response:\nA drink.\n\n### Query:\n{reminded}\n\n### Response:\n",
}
META = (
    "# System Info\nBe formal.\n\n# User Info\nOne sentence.\n\n# Priority\nAnswer every query the way both sections ask. Where the two "
    "cannot both be met, do what System Info says and leave that one wish of User Info aside."
)
REMINDED = "(Keep to System Info, then to User Info; where they conflict, System Info wins.)\n\nAnd coffee?"


@pytest.mark.parametrize("name", GOLDEN)
def test_a_shipped_template_renders_this_exactly(name: str) -> None:
    assert render(BOTH, shipped(name)).prompt == GOLDEN[name].format(meta=META, reminded=REMINDED)


def test_every_shipped_chat_template_has_a_golden_rendering() -> None:
    assert set(edge.shipped_templates()) == set(GOLDEN)


@pytest.mark.parametrize(
    "path", sorted(set(TEMPLATES.glob("*.jinja")) - {TEMPLATES / "report.html.jinja"}), ids=lambda path: path.stem
)
def test_a_shipped_template_begins_with_a_comment_and_asks_for_nothing_it_is_not_given(path: Path) -> None:
    from jinja2 import Environment, meta

    source = path.read_text()
    given = {
        "messages",
        "turns",
        "query",
        "bos_token",
        "eos_token",
        "add_generation_prompt",
        "raise_exception",
        "fields",
        "schema",
    }
    given |= {field.name for field in fields(Dialog)}
    assert source.startswith("{#-")
    assert meta.find_undeclared_variables(Environment().parse(source)) <= given
    wanted = meta.find_undeclared_variables(Environment().parse(source)) - {"raise_exception"}
    assert all(
        name in source[: source.index("#}")] or name.endswith("_token") or name == "add_generation_prompt"
        for name in wanted
    )


def test_an_empty_tier_is_still_written_natively_and_left_out_of_the_wrap() -> None:
    assert (
        render(QUERY, shipped("metaalign")).prompt
        == "<|system_info|><|end|><|user_info|><|end|><|user|>What is tea?<|end|><|assistant|>"
    )
    assert (
        render(QUERY, shipped("chatml")).prompt == "<|im_start|>user\nWhat is tea?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_system_info_alone_is_the_system_message_as_it_is() -> None:
    rendering = render(Dialog("Be formal.", "", QUERY.turns), shipped("chatml"))
    assert rendering.messages[0] == {"role": "system", "content": "Be formal."}
    assert rendering.messages[-1]["content"] == "What is tea?"


def test_the_reminder_stands_by_the_newest_query_when_both_tiers_speak_and_can_be_left_out() -> None:
    assert "Keep to System Info" not in render(Dialog("", "Short.", QUERY.turns), shipped("chatml")).prompt
    assert render(BOTH, shipped("chatml")).prompt.count("Keep to System Info") == 1
    assert "Keep to System Info" not in render(BOTH, shipped("chatml"), RenderOptions(remind=False)).prompt


def test_the_native_template_takes_the_tiers_as_variables_too_for_programs_that_know_three_roles() -> None:
    template = shipped("metaalign").template
    text = template.render(
        messages=[{"role": "user", "content": "q"}], system_info="s", user_info="u", add_generation_prompt=True
    )
    assert text == "<|system_info|>s<|end|><|user_info|>u<|end|><|user|>q<|end|><|assistant|>"


def test_the_native_template_refuses_a_role_it_does_not_know() -> None:
    with pytest.raises(Refusal, match="tool"):
        shipped("metaalign").template.render(messages=[{"role": "tool", "content": "x"}])


STRANGE = {
    "refuses a system role": "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    + CHATML,
    "drops a system message": "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}",
    "insists on alternation": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('must alternate') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}"
    ),
    "adds a date": "Today is {{ strftime_now('%d %B %Y') }}.\n" + CHATML,
    "adds a default system prompt": "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Qwen.<|im_end|>\n{% endif %}"
    + CHATML,
    "thinks": CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
    "drops old thoughts": CHATML.replace("m.content", "(m.content.split('</think>')|last).lstrip('\\n')"),
    "wants a list of parts": "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}{{ p['text'] }}{% endfor %}{% endfor %}",
    "puts the system prompt into the last turn": (
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{% for m in messages %}"
        "{% if m.role == 'user' %}[INST]{% if loop.last and system %}{{ system }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% elif m.role == 'assistant' %}{{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "uses tools if there are any": "{% if tools %}TOOLS{{ tools|tojson }}{% endif %}{% if documents %}x{% endif %}"
    + CHATML,
    "marks what is trained": CHATML.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"),
    "trims": CHATML.replace("m.content", "m.content|trim"),
}


@pytest.mark.parametrize("source", STRANGE.values(), ids=STRANGE)
def test_every_tier_reaches_a_model_whose_template(source: str) -> None:
    rendering = render(BOTH, chat_template(source))
    assert not rendering.native
    for text in ("Be formal.", "One sentence.", "What is tea?", "A drink.", "And coffee?"):
        assert text in rendering.prompt
    assert rendering.missing(BOTH) is None


def test_think_is_passed_only_when_it_was_said() -> None:
    source = "{{ enable_thinking if enable_thinking is defined else 'unset' }}{{ messages[0].content }}"
    assert [render(QUERY, chat_template(source), RenderOptions(think=think)).prompt[:5] for think in (None, True, False)] == [
        "unset", "TrueW", "False",
    ]  # fmt: skip


def test_a_date_is_today() -> None:
    assert time.strftime("%B %Y") in render(QUERY, chat_template(STRANGE["adds a date"])).prompt


def test_a_template_that_leaves_a_tier_out_whatever_is_done_is_an_error_that_names_it() -> None:
    with pytest.raises(TemplateError, match="leaves out system_info"):
        render(BOTH, chat_template("{{ messages[-1].content }}"))
    with pytest.raises(TemplateError, match="leaves out user_info"):
        render(
            BOTH, chat_template("{{ system_info }}{{ messages[-1].content }}{% if false %}{{ user_info }}{% endif %}")
        )


def test_a_template_that_uses_user_info_is_native_by_variable_or_by_role() -> None:
    by_variable = chat_template(
        "S:{{ system_info }} U:{{ user_info }} {% for t in turns %}Q:{{ t.query }} A:{{ t.response }}{% endfor %}"
    )
    assert by_variable.native
    assert render(BOTH, by_variable).prompt == "S:Be formal. U:One sentence. Q:What is tea? A:A drink.Q:And coffee? A:"
    assert chat_template("{% for m in messages %}{{ 'U' if m.role == 'user_info' }}{% endfor %}").native
    assert not chat_template(CHATML).native


def test_the_prompt_is_a_pure_function_of_the_dialog_so_a_changed_preference_rewrites_the_head_only() -> None:
    before, after = (render(Dialog("s", pref, BOTH.turns), shipped("metaalign")).prompt for pref in ("one", "two"))
    assert before.replace("one", "two") == after


def test_a_lone_surrogate_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="User Info"):
        Dialog("", "\udcff")
