"""A template keeps to its budget of processor time and memory, whatever it is made of, and can be interrupted."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time

import pytest

from metaalign_edge_templates import budget
from metaalign_edge_templates.sandbox import SOURCE, Template

MEGABYTES = 500
MODULUS = 2**61 - 1  # Python's hash of its multiples is 0


def doubled(start: str, step: str, end: str, times: int = 200) -> str:
    return f"{{% set ns = namespace(x={start}, y={start}) %}}{{% for i in range({times}) %}}{{% set ns.x = {step} %}}{{% endfor %}}{{{{ {end} }}}}"


BIG = "('a' * 8000000)"
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}"
BOMBS: dict[str, dict[str, str]] = {
    "inside C": {
        "strip of many by many": f"{{{{ {BIG}.strip('b' * 8000000 ~ 'a') }}}}",
        "strip of many by many others": f"{{{{ {BIG}.lstrip('é' * 8000000) }}}}",
        "trim": f"{{{{ {BIG}|trim('b' * 8000000 ~ 'a') }}}}",
        "a search from the right": f"{{{{ {BIG}.rfind('b' ~ 'a' * 4000000) }}}}",
        "a cut from the right": f"{{{{ {BIG}.rsplit('b' ~ 'a' * 4000000) }}}}",
        "a part from the right": f"{{{{ {BIG}.rpartition('b' ~ 'a' * 4000000) }}}}",
        "sorting long texts": f"{{% set a = {BIG} ~ 'x' %}}{{% set b = {BIG} ~ 'y' %}}{{{{ ([a, b] * 60000)|sort }}}}",
        "the largest of long texts": f"{{% set a = {BIG} ~ 'x' %}}{{% set b = {BIG} ~ 'y' %}}{{{{ ([a, b] * 60000)|max }}}}",
        "comparing lists of themselves": doubled("[1]", "[ns.x, ns.x]", "ns.x == ns.x ~ ''"),
        "comparing two such lists": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
        "which comes first": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x < ns.y }}",
        "finding a list in a list": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x in [ns.y] }}",
        "loop.changed": "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{% for i in [1, 2] %}{{ loop.changed(ns.x if i == 1 else ns.y) }}{% endfor %}",
        "colliding numbers in a dict": "{{ {" + ", ".join(f"{n * MODULUS}: 1" for n in range(1, 4000)) + "} }}",
        "colliding numbers that are computed": "{% set ns = namespace(x=0) %}{% for i in range(4000) %}{% set ns.x = ns.x + %d %%}{%% endfor %%}{{ ns.x }}".replace("%d", str(MODULUS)).replace("%%", "%"),
        "a tuple as a key": doubled("(1,)", "(ns.x, ns.x)", "{ns.x: 1}"),
        "a choice of beginnings": f"{{% set a = {BIG} ~ 'b' %}}{{% set b = {BIG} ~ 'a' %}}{{{{ b.startswith((a,) * 99999) }}}}",
        "zeros in a format": "{{ ('%' ~ '0' * 9000000) % 1 }}",
        "digits in a format": "{{ ('%' ~ '01' * 4500000) % 1 }}",
        "spaces in a format": "{{ ('%' ~ ' ' * 9000000)|format(1) }}",
        "unique lists": doubled("(1,)", "(ns.x, ns.x)", "[ns.x]|unique|list"),
        "reading a long number": "{{ ('9' * 4000000)|int * ('9' * 8000000)|length ** 60 }}",
    },
    "loops": {
        "nested ranges": LOOP + "{% endfor %}{% endfor %}",
        "a long range": "{% for a in range(10**9) %}x{% endfor %}",
        "a loop that prints": LOOP + "xxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
        "a recursive loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
        "a recursive loop that widens": "{% for x in [1, 2, 3, 4] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2, 3, 4]) }}{% endif %}{% endfor %}",
        "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "a macro that calls itself twice": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(50) }}",
        "callers without end": "{% macro m() %}{{ caller() }}{% endmacro %}{% macro n() %}{% call m() %}{{ n() }}{% endcall %}{% endmacro %}{{ n() }}",
        "letters": f"{{% for a in {BIG} %}}{{% for b in {BIG} %}}{{% endfor %}}{{% endfor %}}",
        "a filter in a loop": "{% for a in range(99999) if range(99999)|list %}{% endfor %}",
        "select": LOOP + "{{ range(99999)|select('odd')|list }}{% endfor %}{% endfor %}",
        "joins": LOOP + "{{ range(99999)|join }}{% endfor %}{% endfor %}",
    },
    "memory": {
        "a multiplied text": "{{ 'x' * 3000000000 }}",
        "a number times a text": "{{ 3000000000 * 'x' }}",
        "a multiplied list": "{{ [0] * 3000000000 }}",
        "a multiplied tuple": "{{ (0, 0) * 3000000000 }}",
        "a doubled text": doubled("'x'", "ns.x + ns.x", "ns.x"),
        "a text doubled by a tilde": doubled("'x'", "ns.x ~ ns.x", "ns.x"),
        "a doubled list": doubled("[1]", "ns.x + ns.x", "ns.x"),
        "a doubled JSON": doubled("'x'", "ns.x|tojson|tojson", "ns.x"),
        "a doubled view": doubled("{'a': '\\\\'}", "{'a': ns.x.items()|list ~ ''}", "ns.x"),
        "a nested namespace": doubled("1", "namespace(a=ns.x, b=ns.x)", "ns.x|tojson", 60),
        "a printed list in itself": doubled("[1]", "[ns.x, ns.x]", "ns.x"),
        "JSON of a list in itself": doubled("[1]", "[ns.x, ns.x]", "ns.x|tojson"),
        "JSON of a dict in itself": doubled("[1]", "{'a': ns.x, 'b': ns.x}", "ns.x|tojson(indent=8)"),
        "many long texts": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = ns.x + ['a' * 4000000 ~ i] %}{% endfor %}{{ ns.x|length }}",
        "many wide texts": "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = ns.x + ['😀' * 4000000 ~ i] %}{% endfor %}{{ ns.x|length }}",
        "many short texts": "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% set ns.x = [ns.x, 'a' ~ i, [], {}] %}{% endfor %}{{ ns.x|length }}",
        "a width in format()": "{{ '{:>3000000000}'.format(1) }}",
        "a width given to format()": "{{ '{:{}}'.format('', 3000000000) }}",
        "a precision in format()": "{{ '{:.3000000000f}'.format(1.5) }}",
        "a padded place": "{{ '%3000000000d' % 1 }}",
        "a padded place given as a value": "{{ '%*d' % (3000000000, 1) }}",
        "a precise place": "{{ '%.3000000000f' % 1.5 }}",
        "a padded place in the filter": "{{ '%3000000000d'|format(1) }}",
        "a test that would format": "{{ '%3000000000d' is odd }}",
        "an indent": "{{ 'x'|indent(3000000000, true) }}",
        "an indent of many lines": "{{ ('\\n' * 9999999)|indent(99999) }}",
        "an indent by a text": "{{ ('\\n' * 99999)|indent('x' * 9999999) }}",
        "JSON indented by a number": "{{ [1, [2]]|tojson(indent=3000000000) }}",
        "JSON indented by a text": "{{ [[[1]]]|tojson(indent='x' * 4000000) }}",
        "JSON with long separators": "{{ ([1] * 99999)|tojson(separators=('x' * 99999, ':')) }}",
        "a date": "{{ strftime_now('%' ~ '9' * 9 ~ 'd') }}",
        "a long date": "{{ strftime_now('%A' * 3000000) }}",
        "an explosive replace": "{% set x = 'x' * 9999999 %}{{ x.replace('x', x) }}",
        "an explosive replace of nothing": "{% set x = 'x' * 9999999 %}{{ x.replace('', x) }}",
        "an explosive filter": "{% set x = 'x' * 9999999 %}{{ x|replace('x', x) }}",
        "an explosive join": "{{ ('x' * 9999999).join(['a'] * 9999) }}",
        "an explosive filter join": "{{ (['a'] * 9999)|join('x' * 9999999) }}",
        "zeros": "{{ '1'.zfill(3000000000) }}",
        "pieces": "{{ ('a ' * 8000000).split()|length }}",
        "pieces of a tier's text": "{{ (messages[0].content * 8000000).split()|length }}",
        "lines": "{{ ('a\\n' * 8000000).splitlines()|length }}",
        "letters as a list": f"{{{{ {BIG}|list|length }}}}",
        "a huge power": "{{ 10 ** 10 ** 10 }}",
        "a tower": "{{ 2 ** 64 ** 64 }}",
        "a growing number": doubled("9", "ns.x * ns.x", "ns.x"),
        "a rounded number": "{{ 1.5|round(3000000000) }}",
        "a text that is rounded": "{{ 'x'|round(60, 'ceil') }}",
        "HTML": "{{ ('&' * 16000000)|escape|escape|escape|escape }}",
        "titles": "{{ ('a-' * 8000000)|title }}",
    },
    "source": {
        "20,000 macros": "".join(f"{{% macro m{n}() %}}{{% endmacro %}}" for n in range(20000)),
        "4,000 macros in macros": "{% macro m() %}" * 4000 + "{% endmacro %}" * 4000,
        "brackets": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
        "lists": "{{ " + "[" * 50000 + "1" + "]" * 50000 + " }}",
        "a chain of dots": "{{ a" + ".b" * 60000 + " }}",
        "a chain of sums": "{{ 1" + " + 1" * 30000 + " }}",
        "a chain of filters": "{{ 1" + "|d" * 60000 + " }}",
        "conditions": "{% if a %}" * 8000,
        "loops in loops": "{% for a in [1, 2] %}" * 900 + "{% endfor %}" * 900,
        "a long number": "{{ " + "9" * 120000 + " }}",
        "a long text": "x" * (SOURCE + 1),
        "open tags": "{% raw " * 18000,
        "open comments": "{#" * 60000,
        "minus signs": "{{ " + "-" * 120000 + "1 }}",
    },
}  # fmt: skip
CHILD = """
import json, resource, sys, time
from metaalign_edge_runtime.errors import TemplateError
from metaalign_edge_templates.sandbox import Refusal, Template
from metaalign_edge_templates.tier_text import TierText
for name, source in json.load(sys.stdin).items():
    started = time.process_time()
    try:
        Template(source, "it").render(messages=[{"role": "user", "content": TierText.of("a b", "query")}])
        outcome = "rendered"
    except TemplateError as error:
        outcome = "refused"
    spent, peak = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1 << 20)
    print(json.dumps([name, outcome, spent, peak]), flush=True)
"""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (240, 240))
    if sys.platform == "linux":  # others do not obey it
        resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))


@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_within_the_budget(kind: str) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD], input=json.dumps(BOMBS[kind]), capture_output=True, text=True, preexec_fn=limited
    )
    rows = [json.loads(line) for line in child.stdout.splitlines()]
    assert [row[0] for row in rows] == list(BOMBS[kind]), child.stderr[-2000:]
    broke_out = [row for row in rows if row[1] != "refused" or row[2] > budget.SECONDS + 1 or row[3] > MEGABYTES]
    assert broke_out == []


def test_there_are_bombs_enough() -> None:
    assert sum(map(len, BOMBS.values())) > 60


def test_the_budget_is_processor_time_so_a_stopped_process_has_not_spent_it() -> None:
    code = (
        "from metaalign_edge_templates import budget; budget.SECONDS = 0.5\n"
        "from metaalign_edge_templates.sandbox import Template\n"
        "source = '{% for i in range(30000) %}{% endfor %}x'\n"
        "template = Template(source, 'it'); print('ready', flush=True); print(template.render())"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGSTOP)
        time.sleep(1)
        child.send_signal(signal.SIGCONT)
        assert child.stdout.read() == "x\n"


def test_ctrl_c_stops_a_template() -> None:
    code = (
        "from metaalign_edge_templates import budget; budget.SECONDS = budget.STEPS = 10**9\n"
        "from metaalign_edge_templates.sandbox import Template\n"
        f"template = Template({LOOP + '{% endfor %}{% endfor %}'!r}, 'it'); print('ready', flush=True); template.render()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in child.stderr.read()


def test_a_long_dialog_is_within_the_budget() -> None:
    source = "{% set ns = namespace(t='') %}{% for m in messages %}{% set ns.t = ns.t + m.content|trim %}{{ m.content.strip().split('x')|last }}{% endfor %}{{ ns.t }}"
    messages = [{"role": "user", "content": f" {'word ' * 100}{number} "} for number in range(2000)]
    assert len(Template(source, "it").render(messages=messages)) > 2_000_000
