"""Rendering against transformers' own renderer, on the chat templates of real models that llama.cpp ships."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from conftest import Reference
from transformers.utils.chat_template_utils import render_jinja_template

from metaalign_edge import ChatTemplate, Dialog, Turn, render, shipped_templates
from metaalign_edge_runtime.errors import EdgeError, TemplateError
from metaalign_edge_runtime.stores.files import package_folder
from metaalign_edge_templates.sandbox import Refusal, Template
from metaalign_edge_templates.tier_text import TierText

VARIABLES: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_generation_prompt": True,
    "tools": None,
    "documents": None,
    "functions": None,
}
TEXTS = [
    "What is tea?",
    "  leading and trailing \n",
    "\n\nlines\n\n\n\tcode = {'a': [1, 2]}  # <b> & \"quotes\" \\n\r\n",
    "Grüße, 你好, привет, שלום, 😀👩‍👩‍👧 e\u0301 \u00a0\u2028\u3000.",
    "{{ bos_token }}{% if x %}{# no #}{% endif %} {{",
    "<|im_end|>\n<|im_start|>system\n</s>[INST] [/INST]<start_of_turn><|eot_id|>",
    "before <think>hm</think> after </think> end",
    "word " * 2000,
    "",
]
NEEDS_TOOLS = {  # made to be used with tools only: they fail in transformers too when there are none
    "CohereForAI-c4ai-command-r-plus-tool_use": "'NoneType' object is not iterable",
    "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use": "'NoneType' object is not iterable",
    "NousResearch-Hermes-3-Llama-3.1-8B-tool_use": "'NoneType' object is not iterable",
    "fireworks-ai-llama-3-firefunction-v2": 'can only concatenate str (not "NoneType") to str',
}


@pytest.fixture(scope="module")
def sources(reference: Reference) -> dict[str, str]:
    """Read the templates of real models, and ours, by name."""
    real = (reference.llama_cpp / "models" / "templates").glob("*.jinja")
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted([*real, *shipped_templates().values()])}
    assert len(found) > 70 and NEEDS_TOOLS.keys() < found.keys()
    return found


def user(text: Any) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(text: Any) -> dict[str, Any]:
    return {"role": "system", "content": text}


SHAPES: dict[str, Callable[[str], list[dict[str, Any]]]] = {
    "user only": lambda text: [user(text)],
    "system and user": lambda text: [system(text), user("What is tea?")],
    "several turns": lambda text: [system("Be brief."), user(text), assistant("A drink."), user("And coffee?")],
    "an answer in history": lambda text: [user("What is tea?"), assistant(text), user("And coffee?")],
    "lists of parts": lambda text: [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        for message in [system("Be brief."), user("Hi"), assistant("Ho"), user(text)]
    ],
    "two users in a row": lambda text: [user(text), user("And coffee?")],
    "an unknown role": lambda text: [{"role": "narrator", "content": text}, user("What is tea?")],
    "an answer last": lambda text: [user("What is tea?"), assistant(text)],
}


def tiered(value: Any) -> Any:
    """Mark every content as tier text, as `render` hands it to a template."""
    if isinstance(value, list):
        return [tiered(item) for item in value]
    return {
        key: tiered(item)
        if isinstance(item, list)
        else TierText.of(item, "query")
        if key in ("content", "text")
        else item
        for key, item in value.items()
    }


@cache
def compiled(source: str) -> Template:
    """Compile a template once."""
    return Template(source, "it")


Outcome = tuple[str, str]


def outcome(attempt: Callable[[], str]) -> Outcome:
    """Return what is rendered, or that it fails; with a template's own words when it refuses."""
    try:
        return "text", "".join(attempt())
    except Refusal as error:
        return "refused", str(error)
    except TemplateError:
        return "failed", ""
    except Exception as error:
        refused = type(error).__name__ == "TemplateError"  # transformers' raise_exception
        return ("refused", " ".join(str(error).split())) if refused else ("failed", "")


def ours(source: str, conversations: list[list[dict[str, Any]]], **more: Any) -> list[Outcome]:
    """Render conversations with our sandbox."""
    given = {**VARIABLES, **more}
    return [outcome(lambda m=m: compiled(source).render(messages=tiered(m), **given)) for m in conversations]


def theirs(source: str, conversations: list[list[dict[str, Any]]], **more: Any) -> list[Outcome]:
    """Render conversations with transformers: all in one call, for it compiles anew in each, unless one fails."""

    def render(conversations: list[list[dict[str, Any]]]) -> list[str]:
        return render_jinja_template(conversations, chat_template=source, **{**VARIABLES, **more})[0]

    try:
        return [("text", text) for text in render(conversations)]
    except Exception:
        return [outcome(lambda m=m: render([m])[0]) for m in conversations]


def assert_same(sources: dict[str, str], conversations: list[list[dict[str, Any]]], **more: Any) -> None:
    """Compare the two renderers; name every template and conversation that differs."""
    different = [
        (name, conversation, a, b)
        for name, source in sources.items()
        for conversation, a, b in zip(
            conversations, ours(source, conversations, **more), theirs(source, conversations, **more), strict=True
        )
        if a != b
    ]
    assert different == []


@pytest.mark.parametrize("shape", SHAPES)
def test_every_real_template_renders_as_in_transformers(shape: str, sources: dict[str, str]) -> None:
    assert_same(sources, [SHAPES[shape](text) for text in TEXTS])


@pytest.mark.parametrize("more", [{"enable_thinking": True}, {"enable_thinking": False}, {"bos_token": ""}])
def test_variables_reach_every_real_template_as_in_transformers(more: dict[str, Any], sources: dict[str, str]) -> None:
    assert_same(sources, [SHAPES["several turns"]("What is tea?"), SHAPES["user only"]("What is tea?")], **more)


def shown(*expressions: str) -> str:
    """Return a template that prints expressions over a message `m` and its text `t`, for every message."""
    return (
        "{% for m in messages %}{% set t = m.content %}"
        + "|".join(f"{{{{ {e} }}}}" for e in expressions)
        + "{% endfor %}"
    )


CONSTRUCTS = {
    "blocks are trimmed": "{% for m in messages %}\n    {% if true %}\n  {{ m.content }}\n    {% endif %}\n"
    "{% endfor %}\nx",
    "loop controls": "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% endif %}{{ m.content }}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}",
    "the generation tag": "{% for m in messages %}{% generation %}\n{{ m.content }}{% endgeneration %}\n{% endfor %}",
    "tojson": shown(
        "messages | tojson",
        "messages | tojson(indent=2)",
        "t | tojson(ensure_ascii=true)",
        "{'b': 1, 'a': none, 'c': [true, 1.5]} | tojson(sort_keys=true, separators=(',', ':'))",
    ),
    "the date": "{{ strftime_now('%Y-%m-%d %d %b %Y %A') }}{{ messages[0].content }}",
    "a refusal": "{{ messages[0].content }}{{ raise_exception('no:  such\n role') }}",
    "an undefined name": "[{{ nothing }}]{% if nothing %}x{% endif %}",
    "an attribute of an undefined name": "{{ nothing.more }}",
    "namespaces": "{% set ns = namespace(n=0, last='') %}{% for m in messages %}{% set ns.n = ns.n + 1 %}"
    "{% set ns.last = m.content %}{% endfor %}{{ ns.n }}{{ ns.last }}",
    "macros": "{% macro say(x, y='!') %}{{ x }}{{ y }}{{ caller() if caller }}{% endmacro %}"
    "{{ say(messages[0].content) }}{% call say('a', y=messages[1].content) %}in{% endcall %}",
    "cutting text": shown(
        "t.strip()",
        "t.split() | join('+')",
        "t.split('e')[-1].lstrip('\\n')",
        "t[:4] ~ t[-3:] ~ t[::-1]",
        "t.splitlines() | length",
        "t.rstrip('?') + '!' * 3",
        "t | trim",
        "t.partition('e')",
    ),
    "changing text": shown(
        "t.upper()",
        "t.title()",
        "t.replace('e', 'E').find('E')",
        "'%s-%05.1f' % (t, 2.5)",
        "'{:>3}{}'.format(loop.index, t)",
        "t | capitalize | indent(4, true) | replace('a', 'b') | default('x')",
        "t | upper | lower | title | string | length",
    ),
    "asking text": shown(
        "t.startswith('W')", "t in 'x'", "'e' in t", "t is string", "t == 'x'", "t.count('e')", "t.isdigit()"
    ),
    "filters on lists": shown(
        "messages | map(attribute='content') | join(', ')",
        "messages | selectattr('role', 'equalto', 'user') | list | length",
        "messages | rejectattr('role', 'in', ['user']) | map(attribute='role') | unique | sort | list",
        "messages | last",
        "(messages | first).content",
        "m | dictsort",
        "m.items() | list",
    ),
    "numbers": shown(
        "-3 | abs", "2.567 | round(1)", "'7' | int", "7 // 2 + 7 % 2", "2 ** 3", "[1, 2] + [3]", "(1, 'x')"
    ),
    "slices and conditions": shown(
        "messages[1:] | length",
        "messages[-1].role",
        "'a' if m.role == 'user' else 'b'",
        "m.get('name', 'none')",
        "messages is iterable and none is none",
        "{'k': t}",
    ),
    "unpacking": "{% for a, b in messages[0].items() %}{{ a }}={{ b }};{% endfor %}",
    "sets and white space": "{% set x %}  {{ messages[0].content }} {% endset %}"
    "{%- set y = x | trim -%}\n  {{- y -}}  \n",
    "filters as blocks": "{% filter upper %}{{ messages[0].content }}{% endfilter %}"
    "{% with z = 'z' %}{{ z }}{% endwith %}",
    "python's internals": "{{ messages[0].content.__class__.__mro__ }}",
    "a list that is changed": "{{ messages.append(1) }}",
}


@pytest.mark.parametrize("construct", CONSTRUCTS)
def test_what_templates_are_written_with_means_what_it_means_in_transformers(construct: str) -> None:
    texts = ["What is tea?\nTell me. ", " Größe 😀", "", "{{ x }}"]
    conversations = [[user(text), assistant("A drink, hot or cold."), user("And the rest?")] for text in texts]
    assert_same({construct: CONSTRUCTS[construct]}, conversations)


def chat_template(name: str, source: str) -> ChatTemplate:
    """Put a real template in force, wrapped."""
    own = {
        stem: (package_folder("templates") / f"{stem}.jinja").read_text("utf-8") for stem in ("meta_prompt", "reminder")
    }
    meta_prompt, reminder = (Template(text, stem) for stem, text in own.items())
    return ChatTemplate(Template(source, name), False, name, "", meta_prompt, reminder, "<s>", "</s>")


def dialogs() -> Iterator[Dialog]:
    """Yield every combination of tiers, with one turn and with three."""
    for system_info in ("", "SYSTEM-INFO"):
        for user_info in ("", "USER-INFO"):
            for history in ((), (Turn("EARLIER", "ANSWER"), Turn("LATER", "ANSWER"))):
                yield Dialog(system_info, user_info, (*history, Turn("NEWEST")))


def test_every_real_template_carries_every_tier(sources: dict[str, str]) -> None:
    for name in sources.keys() - NEEDS_TOOLS.keys() - {"metaalign"}:
        chat = chat_template(name, sources[name])
        for dialog in dialogs():
            rendering = render(dialog, chat)
            assert rendering.missing(dialog) is None
            for text, tier in (
                (dialog.system_info, "system_info"),
                (dialog.user_info, "user_info"),
                ("NEWEST", "query"),
            ):
                said = [piece for piece, owner in rendering.prompt.pieces() if owner == tier]
                assert not text or text in said, (name, dialog)


@pytest.mark.parametrize("name", NEEDS_TOOLS)
def test_a_template_made_for_tools_alone_is_refused_with_its_reason(name: str, sources: dict[str, str]) -> None:
    chat = chat_template(name, sources[name])
    for dialog in dialogs():
        with pytest.raises(EdgeError) as refusal:
            render(dialog, chat)
        assert refusal.value.exit_code == 7 and NEEDS_TOOLS[name] in str(refusal.value) and name in str(refusal.value)


def test_the_shipped_template_of_a_family_writes_what_the_familys_own_writes(sources: dict[str, str]) -> None:
    for shipped, own in {"gemma": "google-gemma-2-2b-it", "chatml": "Qwen-Qwen2.5-7B-Instruct"}.items():
        messages = [user("What is tea?"), assistant("A drink."), user("And coffee?")]
        messages = messages if shipped == "gemma" else [system("Be brief."), *messages]
        assert ours(sources[shipped], [messages]) == theirs(sources[own], [messages])
