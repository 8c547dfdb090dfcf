"""A GGUF's template is somebody else's program: what it may not do, and what every template in the wild may."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from metaalign_edge_runtime.errors import TemplateError
from metaalign_edge_templates.budget import SECONDS
from metaalign_edge_templates.filters import FILTERS
from metaalign_edge_templates.sandbox import Refusal, Template
from metaalign_edge_templates.tier_text import TierText

MESSAGES = [
    {"role": "system", "content": TierText.of(" S ", "system_info")},
    {"role": "user", "content": TierText.of(" one\ntwo ", "query")},
]


def rendered(source: str, **variables: Any) -> TierText:
    return Template(source, "the test").render(messages=MESSAGES, **variables)


HOSTILE = {
    "an endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "nested ranges": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "a long range": "{% for a in range(10**9) %}x{% endfor %}",
    "a loop that prints": "{% for a in range(90000) %}{% for b in range(90000) %}xxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "a multiplied string": "{{ 'x' * 1000000000 }}",
    "a number times a string": "{{ 1000000000 * 'x' }}",
    "a multiplied list": "{{ [0] * 1000000000 }}",
    "a doubled string": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a string doubled by a tilde": "{% set ns = namespace(x='x') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "a list in itself": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "two such lists compared": (
        "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"
    ),
    "a tuple as a key": "{% set ns = namespace(x=(1,)) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
    "a doubled list": "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "a formatted width": "{{ '%1000000000d' % 1 }}",
    "a width given as a value": "{{ '%*d' % (1000000000, 1) }}",
    "a width in format()": "{{ '{:>1000000000}'.format(1) }}",
    "a width in the filter format": "{{ '%1000000000d'|format(1) }}",
    "a huge power": "{{ 10 ** 10 ** 10 }}",
    "a growing number": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "an explosive replace": "{% set x = 'x' * 9999999 %}{{ x.replace('x', x) }}",
    "an explosive filter replace": "{% set x = 'x' * 9999999 %}{{ x|replace('x', x) }}",
    "an explosive join": "{{ ('x' * 9999999).join(['a'] * 9999) }}",
    "an explosive filter join": "{{ (['a'] * 9999)|join('x' * 9999999) }}",
    "a repeated join": "{{ (['x' * 9999999] * 9999)|join }}",
    "a printed list": "{{ ['x' * 9999999] * 9999 }}",
    "a deep indent": "{{ ('\n' * 9999999)|indent(9999999) }}",
    "an indented JSON": "{{ [1, 2]|tojson(indent=999999999) }}",
    "a padded number": "{{ '1'.zfill(1000000000) }}",
    "centring": "{{ 'x'|center(1000000000) }}",
    "centring by method": "{{ 'x'.center(1000000000) }}",
    "translate": "{{ 'x'.translate({120: 'x' * 9999999}) }}",
    "lipsum": "{{ lipsum(1000000) }}",
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a class by filter": "{{ ''|attr('__class__') }}",
    "a class by index": "{{ ''['__class__'] }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__init__.__globals__ }}",
    "a class in format()": "{{ '{0.__class__}'.format('') }}",
    "the environment": "{{ self._TemplateReference__context.environment }}",
    "a change of the messages": "{{ messages.append(1) }}",
    "bytes, which forget their tier": "{{ messages[0]['content'].encode() }}",
    "another file": "{% include '/etc/passwd' %}",
    "too deep a nest": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "too long a template": "x" * 2_000_000,
    "broken syntax": "{% for %}",
    "an unknown filter": "{{ 1|evil }}",
}


@pytest.mark.parametrize("source", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_template_is_refused_in_time(source: str) -> None:
    started = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        rendered(source).encode()
    assert time.thread_time() - started < SECONDS + 1
    assert "\n" not in str(caught.value)


def test_a_template_that_refuses_says_why() -> None:
    with pytest.raises(Refusal, match="no system role"):
        rendered("{{ raise_exception('no system\n role') }}")


SECRET = "my\x1b[31m secret"


@pytest.mark.parametrize(
    "raised",
    [
        "raise_exception(messages|tojson)",
        "raise_exception(messages)",
        "raise_exception('no ' ~ messages[0].content ~ ' here')",
        "raise_exception('%s!' % messages[0].content)",
        "raise_exception(messages[0].content * 1000)",
        "messages[0][messages[0].content].x",
        "(messages[0].content ~ '')|map(messages[0].content)|list",
        "messages[0].content|int(default=none) + 1",
        "'%d' % messages[0].content",
        "messages[0].content.index('zzz')",
        "[1].index(messages[0].content)",
        "'{x}'.format(**{messages[0].content: 1})",
        "namespace(**{messages[0].content: 1})",
        "dict(messages[0].content)",
        "range(messages[0].content)",
        "strftime_now(messages[0].content * 1000)",
        "-messages[0].content",
        "messages[0].content < 1",
        "messages[0].content()",
    ],
)
def test_no_text_of_a_tier_stands_in_an_error(raised: str) -> None:
    messages = [{"role": "user", "content": TierText.of(SECRET, "query")}]
    with pytest.raises((Refusal, TemplateError)) as caught:
        Template("{{ " + raised + " }}", "the test").render(messages=messages)
    assert "secret" not in str(caught.value) and len(str(caught.value)) < 400


def test_no_control_character_that_a_template_raises_reaches_a_terminal(
    refuses: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / "raises.jinja"
    path.write_text("{{ raise_exception('\x1b[31mred\x07 ' ~ messages|tojson) }}{{ messages[0].content }}")
    said = refuses(7, "render", "--template", str(path), "my secret question")
    assert "\x1b" not in said and "\x07" not in said and "red" in said and "secret" not in said


def test_what_a_template_raises_is_shortened() -> None:
    with pytest.raises(Refusal) as caught:
        rendered("{{ raise_exception('no' * 1000) }}")
    assert len(str(caught.value)) < 250 and str(caught.value).endswith("…")


CARRIED = {
    "a namespace's field by format": "{% set ns = namespace(t=t) %}{{ t[:1] }}{{ '{0.t}'.format(ns)[1:] }}",
    "a method without its brackets": "{{ t }} {{ t.strip }}",
    "a printed namespace": "{{ t }}{{ namespace(t=t) }}",
    "a printed view": "{{ t }}{{ {'t': t}.items() }}",
    "an autoescape block": "{% autoescape true %}{{ t }}{{ t ~ '' }}{% endautoescape %}",
    "a cycler": "{{ t }}{% set c = cycler(t) %}{{ c.next() }}{{ c }}",
    "a joiner": "{{ t }}{% set j = joiner(t) %}{{ j() }}{{ j() }}",
    "a loop": "{% for x in [t] %}{{ x }}{{ loop }}{{ loop.previtem }}{{ loop.cycle(t) }}{% endfor %}",
    "a macro": "{{ t }}{% macro m() %}{{ kwargs }}{{ varargs }}{% endmacro %}{{ m(t, x=t) }}{{ m }}",
    "an exact format": "{{ '<%s|%5s>{}'.format(t) % (t, t) }}",
    "a look-up": "{% for c in t %}{{ {c: c}[c] }}{% endfor %}",
}


@pytest.mark.parametrize("source", CARRIED.values(), ids=CARRIED)
def test_what_a_template_carries_a_text_past_is_followed_or_refused(source: str) -> None:
    text = TierText.of("ЖЖ<|im_end|>ЖЖ", "query")
    try:
        prompt = Template(source, "the test").render(t=text)
    except TemplateError:
        return
    assert prompt.holds("query")
    assert not {"Ж", "_"} & set("".join(piece for piece, tier in prompt.pieces() if tier is None))


TAINTED = {
    "plain": "{{ messages[1]['content'] }}",
    "attribute": "{{ messages[1].content }}",
    "trimmed": "{{ messages[1].content | trim }}",
    "stripped": "{{ messages[1].content.strip() }}",
    "split": "{{ messages[1].content.split('\n')[-1] }}",
    "added": "{{ '<|x|>' + messages[1].content + '<|x|>' }}",
    "tilde": "{{ '<|x|>' ~ messages[1].content ~ 1 }}",
    "percent": "{{ '<%s>' % messages[1].content }}",
    "format": "{{ '<{}>'.format(messages[1].content) }}",
    "format by name": "{{ '<{x}>'.format(x=messages[1].content) }}",
    "filter format": "{{ '<%s>'|format(messages[1].content) }}",
    "a tier's text as the format": "{{ (messages[1].content ~ '%s')|format(1) }}",
    "join": "{{ messages|map(attribute='content')|join('-') }}",
    "join by method": "{{ '-'.join([messages[1].content, 'x']) }}",
    "replace in it": "{{ messages[1].content|replace('one', 'three') }}",
    "replace by it": "{{ 'three x'|replace('x', messages[1].content) }}",
    "replace by it, a method": "{{ 'three x'.replace('x', messages[1].content) }}",
    "set block": "{% set x %}[{{ messages[1].content }}]{% endset %}{{ x }}",
    "macro": "{% macro m(x) %}[{{ x }}]{% endmacro %}{{ m(messages[1].content) }}",
    "call block": "{% macro m() %}[{{ caller() }}]{% endmacro %}{% call m() %}{{ messages[1].content }}{% endcall %}",
    "filter block": "{% filter trim %}{{ messages[1].content }}{% endfilter %}",
    "JSON": "{{ messages|tojson }}",
    "string of a list": "{{ [messages[1].content]|string }}",
    "a printed list": "{{ [messages[1].content] }}",
    "default": "{{ nothing|default(messages[1].content) }}",
    "namespace": "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m.content %}{% endfor %}{{ ns.x }}",
    "letter by letter": "{% for letter in messages[1].content %}{{ letter }}{% endfor %}",
    "items": "{% for key, value in messages[1].items() %}{{ key }}={{ value }};{% endfor %}",
    "slice": "{{ messages[1].content[1:-1] }}",
    "indent": "{{ messages[1].content|indent(2) }}",
    "upper": "{{ messages[1].content|upper }}",
    "a lazy filter chain": "{{ messages|map(attribute='content')|map('upper')|list|string }}",
    "generation": "{% generation %}{{ messages[1].content }}{% endgeneration %}",
}


@pytest.mark.parametrize("source", TAINTED.values(), ids=TAINTED)
def test_a_tiers_text_keeps_its_owner_through_a_template(source: str) -> None:
    prompt = rendered(source)
    scaffold = "".join(text for text, tier in prompt.pieces() if tier is None).lower()
    assert prompt.holds("query")
    assert "one" not in scaffold and "two" not in scaffold


def test_what_a_template_writes_itself_stays_scaffold() -> None:
    prompt = rendered(
        "{{ bos }}{% for m in messages %}<|{{ m.role|upper }}|>{{ m.content|trim }}{{ '<|end|>' }}{% endfor %}",
        bos="<s>",
    )
    assert list(prompt.pieces()) == [
        ("<s><|SYSTEM|>", None), ("S", "system_info"), ("<|end|><|USER|>", None), ("one\ntwo", "query"), ("<|end|>", None),
    ]  # fmt: skip


def test_the_variables_that_templates_expect_are_there() -> None:
    assert rendered("{{ strftime_now('%Y') }}") == time.strftime("%Y")
    assert rendered("{{ {'ß': '<'}|tojson }}") == '{"ß": "<"}'
    assert rendered("{% for x in [1, 2, 3] %}{% if x == 2 %}{% continue %}{% endif %}{{ x }}{% endfor %}") == "13"
    assert (
        rendered("{% for x in [1, 2, 3] %}{{ loop.index }}{{ loop.last }}{{ loop.length }}{% endfor %}")
        == "1False32False33True3"
    )


@pytest.mark.parametrize("name", FILTERS)
def test_no_filter_lets_a_tiers_text_pass_as_scaffold(name: str) -> None:
    for source in (
        f"{{{{ messages[1].content|{name} }}}}",
        f"{{{{ ([messages[1].content]|{name}) }}}}",
        f"{{{{ 'x'|{name}(messages[1].content) }}}}",
    ):
        try:
            prompt = rendered(source)
        except TemplateError:
            continue  # not a use of this filter
        scaffold = "".join(text for text, tier in prompt.pieces() if tier is None).lower()
        assert "one" not in scaffold and "two" not in scaffold, source
