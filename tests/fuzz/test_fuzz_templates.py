"""Random templates: whatever one does with a tier's text, none of it becomes scaffold; and it writes what Jinja writes.

A template is drawn from a grammar of all that Jinja knows, also of what no chat template needs. The texts of the tiers hold
letters that no template writes itself, so that any of them outside of a tier is a leak.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from metaalign_edge_runtime.errors import TemplateError
from metaalign_edge_templates.sandbox import Refusal, Template
from metaalign_edge_templates.tier_text import Tier, TierText

SECRETS: dict[Tier, str] = {
    "system_info": "ЖЗЖ\nЖЗ ж",
    "user_info": "ЩЪЩ ЩЪ\tщ",
    "query": "ЫЭЫ<|im_end|>\nЫЭ ы",
    "response": "ЮЯЮ{0}%sЮЯ ю",
}
LETTERS = set("".join(SECRETS.values())) & {chr(code) for code in range(0x400, 0x500)}
LETTERS |= {letter.swapcase() for letter in LETTERS}
ESCAPED = tuple(f"{ord(letter):04x}" for letter in LETTERS)  # as `tojson(ensure_ascii=true)` writes them


def messages(of: Any) -> list[dict[str, Any]]:
    roles = {"system_info": "system", "user_info": "user_info", "query": "user", "response": "assistant"}
    return [{"role": roles[tier], "content": of(text, tier)} for tier, text in SECRETS.items()]


class Draw:
    """Draws templates."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def one(self, *choices: str) -> str:
        return self.random.choice(choices)

    def value(self, depth: int = 3) -> str:
        """Draw an expression."""
        leaves = (
            "m.content",
            "m['content']",
            "messages",
            "m",
            "ns.t",
            "x",
            "d",
            "loop",
            "'<a>'",
            "''",
            "1",
            "0",
            "none",
        )
        if depth == 0 or self.random.random() < 0.15:
            return self.one(*leaves)

        def a() -> str:
            return self.value(depth - 1)

        one = self.one
        shapes: list[Callable[[], str]] = [
            lambda: f"{a()} {one('+', '~', '*', '%', '-', '//')} {a()}",
            lambda: f"({a()}).{one(*METHODS)}({one('', a(), f'{a()}, {a()}')})",
            lambda: f"({a()}).{one(*METHODS, 'content', 't', '__class__', '__str__', 'format_map', 'encode')}",
            lambda: f"({a()}){one('[0]', '[1:]', '[::-1]', '[::2]', '[-1]', '[:3]', f'[{a()}]')}",
            lambda: f"({a()})|{one(*FILTERS)}",
            lambda: f"({a()})|{one('replace', 'join', 'default', 'format', 'indent', 'trim', 'tojson', 'map')}({a()})",
            lambda: f"({a()})|map({one(*map(repr, FILTERS))})|{one('list', 'join', 'first')}",
            lambda: f"messages|map(attribute='content')|{one('list', 'join', 'first', 'last', 'sort', 'unique')}",
            lambda: f"'{one(*PATTERNS)}'.format({a()}, {a()}, a={a()})",
            lambda: f"'{one('%s', '%r', '%9s', '%.1s', '<%s>')}' % {one(a(), f'({a()},)')}",
            lambda: f"'%(a)s' % {{'a': {a()}}}",
            lambda: f"{one('namespace', 'dict')}(t={a()})",
            lambda: f"{one('cycler', 'loop.cycle')}({a()}, {a()})",
            lambda: f"{one('joiner', 'range', 'say')}({a()})",
            lambda: f"[{a()}, {a()}]",
            lambda: f"({a()}, {a()})",
            lambda: f"{{'k': {a()}}}",
            lambda: f"{{{a()}: {a()}}}",
            lambda: f"({a()} if {a()} else {a()})",
            lambda: f"({a()} {one('in', 'and', 'or', '==')} {a()})",
            lambda: f"(not {a()})",
            lambda: f"({a()} is {one('string', 'mapping', 'iterable', 'defined', 'none')})",
        ]
        return self.random.choice(shapes)()

    def block(self, depth: int = 2) -> str:
        """Draw a statement."""

        def inside() -> str:
            return self.block(depth - 1) if depth else f"{{{{ {self.value(2)} }}}}"

        one, value = self.one, self.value
        shapes: list[Callable[[], str]] = [
            *[lambda: f"{{{{ {value()} }}}}"] * 6,
            lambda: f"{{% set x = {value()} %}}{inside()}",
            lambda: f"{{% set ns.t = {value()} %}}{{{{ ns.t }}}}",
            lambda: f"{{% set x %}}{inside()}{{% endset %}}{{{{ x }}}}",
            lambda: f"{{% set x | {one(*FILTERS)} %}}{inside()}{{% endset %}}{{{{ x }}}}",
            lambda: f"{{% for x in {value()} %}}{inside()}{{% endfor %}}",
            lambda: (
                f"{{% for x in {value()} recursive %}}{{{{ x }}}}{{{{ loop({value(1)}) if loop.depth < 3 }}}}{{% endfor %}}"
            ),
            lambda: f"{{% if {value()} %}}{inside()}{{% else %}}{inside()}{{% endif %}}",
            lambda: f"{{% filter {one(*FILTERS)} %}}{inside()}{{% endfilter %}}",
            lambda: f"{{% autoescape true %}}{inside()}{{% endautoescape %}}",
            lambda: f"{{% with x = {value()} %}}{inside()}{{% endwith %}}",
            lambda: f"{{% call say({value()}) %}}{inside()}{{% endcall %}}",
            lambda: f"{{% macro other(x, y={value(1)}) %}}{inside()}{{% endmacro %}}{{{{ other({value()}) }}}}",
            lambda: f"{{% block b %}}{inside()}{{% endblock %}}",
        ]
        return self.random.choice(shapes)()

    def template(self) -> str:
        """Draw a template."""
        head = "{% macro say(x) %}[{{ x }}{{ caller() if caller }}]{% endmacro %}"
        return (
            f"{head}{{% for m in messages %}}{{% set ns = namespace(t=m.content) %}}{{% set d = {{'t': m.content}} %}}"
            f"{{% set x = m.content %}}<a>{{{{ m.content }}}}</a>{self.block()}{{% endfor %}}"
        )


METHODS = (
    "strip lstrip rstrip split rsplit splitlines partition rpartition replace join upper lower title capitalize zfill "
    "removeprefix removesuffix format count find index startswith endswith isdigit items keys values get copy"
).split()
PATTERNS = ("{0.t}", "{0[t]}", "{0}", "{a}", "{0.content}", "{0!r}", "{0:>9}", "{:{}}", "{}{}")
FILTERS = (
    "abs attr batch capitalize center count default dictsort escape filesizeformat first float forceescape format "
    "groupby indent int items join last length list lower map max min pprint random reject replace reverse round safe "
    "select slice sort string striptags sum title tojson trim truncate unique upper urlencode urlize wordcount wordwrap "
    "xmlattr"
).split()


def leak(source: str) -> str | None:
    """Return the scaffold of a template if it holds letters of a tier; None if it does not, or is refused."""
    try:
        prompt = Template(source, "it").render(messages=messages(TierText.of))
    except (TemplateError, Refusal):
        return None
    scaffold = "".join(text for text, tier in prompt.pieces() if tier is None)
    return scaffold if LETTERS & set(scaffold) or any(code in scaffold for code in ESCAPED) else None


def differs(source: str) -> tuple[str, str] | None:
    """Return what we and Jinja write, if both write something and it is not the same."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    try:
        ours = Template(source, "it").render(messages=messages(lambda text, tier: text))
        theirs = environment.from_string(source).render(messages=messages(lambda text, tier: text))
    except Exception:
        return None
    return None if ours == theirs else (ours, theirs)


def leaks(seeds: range) -> list[tuple[int, str]]:
    return [(seed, source) for seed in seeds if leak(source := Draw(seed).template()) is not None]


def test_random_templates_let_no_letter_of_a_tier_pass_as_scaffold() -> None:
    assert leaks(range(1500)) == []


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_thousands_of_random_templates_let_no_letter_of_a_tier_pass_as_scaffold(part: int) -> None:
    assert leaks(range(10_000 * (part + 1), 10_000 * (part + 1) + 6000)) == []


def test_random_templates_are_often_rendered_and_not_only_refused() -> None:
    rendered = 0
    for seed in range(300):
        try:
            Template(Draw(seed).template(), "it").render(messages=messages(TierText.of))
            rendered += 1
        except (TemplateError, Refusal):
            continue
    assert rendered > 50


@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # of the Python that Jinja compiles
def test_what_random_templates_write_is_what_jinja_writes() -> None:
    escaping = ("escape", "safe", "tojson", "autoescape")  # Jinja's own Markup, and its own JSON
    sources = [
        source for seed in range(1500) if not any(word in (source := Draw(seed).template()) for word in escaping)
    ]
    assert [(source, found) for source in sources if (found := differs(source))] == []
