"""What a Python program needs: `Dialog`, `Model`, `generate`, `stream` and `compare`."""

from __future__ import annotations

import ast
import doctest
import json
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import metaalign_edge as edge
from metaalign_edge import Dialog, Model, Turn, compare, generate, stream
from metaalign_edge_runtime.errors import ContextOverflow, EdgeError, NotFound, UsageError
from metaalign_edge_runtime.stores import profiles

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text()
FRONT = (ROOT / "README.md").read_text()


EXAMPLES = [example for example in doctest.DocTestFinder().find(edge) if example.examples]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_of_a_docstring_does_what_it_says(example: doctest.DocTest) -> None:
    assert doctest.DocTestRunner().run(example).failed == 0


def test_every_public_function_has_such_an_example() -> None:
    shown = {example.name.removeprefix("metaalign_edge.") for example in EXAMPLES}
    assert shown == {"Dialog", "Model.open", "generate", "stream", "compare"}


@pytest.mark.parametrize("program", re.findall(r"```python\n(.*?)```", PAGE + FRONT, re.DOTALL))
def test_a_program_that_is_shown_runs(program: str) -> None:
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stderr) == (0, "")
    assert "".join(re.findall(r"^ *# (.*\n)", program, re.MULTILINE)) == said.stdout


def test_pieces_make_the_answer_and_the_answer_is_what_chat_says(demo: Path, tmp_path: Path) -> None:
    with Model.open(demo) as model:
        answer = generate(model, "What is tea?", system="Be kind.", pref="@child", seed=7, temperature=1.0)
        writing, pieces = stream(model, "What is tea?", system="Be kind.", pref="@child", seed=7, temperature=1.0), []
        while True:
            try:
                pieces.append(next(writing))
            except StopIteration as end:
                again = end.value
                break
    assert "".join(pieces) == answer.response == again.response and len(pieces) > 5 and all(pieces)
    assert answer.user_info == profiles.expand_profile("@child") and answer.seed == 7 and again.cached_tokens > 20
    command = ["chat", "--system", "Be kind.", "--pref", "@child", "--seed", "7", "--temp", "1", "What is tea?"]
    said = subprocess.run([sys.executable, "-m", "metaalign_edge", *command], capture_output=True, text=True, input="")
    assert said.stdout == answer.response + "\n"


def test_a_conversation_goes_on_from_what_was_read(demo: Path) -> None:
    with Model.open(str(demo)) as model:
        dialog = Dialog("", "one sentence", [Turn("What is tea?")])
        first = generate(model, dialog, temperature=0)
        dialog = dialog.then(first.response, "What is bread?")
        second = generate(model, dialog, temperature=0)
    assert dialog.turns == (Turn("What is tea?", first.response), Turn("What is bread?"))
    assert second.cached_tokens >= first.input_tokens and second.query == "What is bread?"


def test_a_stream_that_is_closed_stops_at_once_and_the_next_call_is_as_ever(slow: Path) -> None:
    with Model.open(slow, context=4096) as model:
        alone = generate(model, "And bread?", max_tokens=5, temperature=0)
        with closing(stream(model, "What is tea?", max_tokens=3000, temperature=0)) as pieces:
            assert next(pieces)
        written = len(model.session.scheduler.engine.sequences[0].tokens)
        assert written < alone.input_tokens + 100
        assert generate(model, "And bread?", max_tokens=5, temperature=0).response == alone.response
        abandoned = stream(model, "What is tea?", max_tokens=3000)
        next(abandoned)
    with pytest.raises(RuntimeError, match="closed"):
        next(abandoned)
    assert model.pointer is None and model.session.scheduler.engine is None


def test_an_answer_inside_another_is_refused_and_other_threads_wait(demo: Path) -> None:
    with Model.open(demo) as model:
        usual = generate(model, "What is tea?", temperature=0).response
        pieces = stream(model, "What is bread?", temperature=0)
        begun = next(pieces)
        with pytest.raises(RuntimeError, match="still being written"):
            generate(model, "What is tea?")
        said: list[str] = []
        threads = [
            threading.Thread(target=lambda: said.append(generate(model, "What is tea?", temperature=0).response))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        assert not said
        bread = begun + "".join(pieces)
        for thread in threads:
            thread.join()
    assert said == [usual] * 3 and "flour" in bread


def test_ctrl_c_is_a_keyboard_interrupt_of_the_program_and_the_model_stays_usable(slow: Path, tmp_path: Path) -> None:
    program = f"""
from metaalign_edge import Model, generate, stream
with Model.open({str(slow)!r}, gpu_layers=0, verbose=True) as model:
    for long in ("zoo " * 6000, "tea?"):  # while it reads, while it writes
        try:
            for piece in stream(model, long, max_tokens=8000, temperature=0):
                print("writing" if long == "tea?" else "too soon", flush=True)
            print("too late")
        except KeyboardInterrupt:
            print("stopped", flush=True)
        if long != "tea?":
            print("next", flush=True)
    print(generate(model, "tea?", max_tokens=3).output_tokens)
"""
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=log)
    assert process.stdout
    while "reserve took" not in (tmp_path / "log").read_text():  # the context is made
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)  # and of the prompt, which takes seconds, something has been read
    process.send_signal(signal.SIGINT)
    lines = [process.stdout.readline() for _ in range(3)]
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read().split(b"\n")
    assert lines == [b"stopped\n", b"next\n", b"writing\n"]
    assert [line for line in rest if line != b"writing"] == [b"stopped", b"3", b""]
    assert process.wait() == 0


def test_compare_gives_each_preference_its_answer_in_order(demo: Path) -> None:
    with Model.open(demo) as model:
        wishes = ["@caps", "", "in lower case"]
        answers = compare(model, "What is bread?", wishes, temperature=0, system="")
        alone = [generate(model, "What is bread?", pref=wish, temperature=0) for wish in wishes]
    assert [answer.response for answer in answers] == [answer.response for answer in alone]
    assert answers[0].response.isupper() and answers[2].response.islower()


def test_no_seed_draws_one_and_options_of_one_call_are_gone_in_the_next(tiny: Path) -> None:
    with Model.open(tiny) as model:
        first = generate(model, "tea?", max_tokens=9, temperature=1.5, stop=["\0"])
        second = generate(model, "tea?", max_tokens=9, temperature=1.5)
        again = generate(model, "tea?", max_tokens=9, temperature=1.5, seed=first.seed)
        assert first.seed != second.seed and first.response == again.response
        generate(model, "tea?", pref="x", max_tokens=2, pref_strength=2.0, system_strength=0.5)
        assert model.session.scheduler.settings.pref_strength == 2.0
        generate(model, "tea?", max_tokens=2)
        assert model.session.scheduler.settings.pref_strength == 1.0 and model.session.scheduler.settings.stop == ()


def test_options_are_those_of_the_settings_and_of_the_rendering() -> None:
    loading = {"context", "gpu_layers", "threads", "verbose", "adapters", "sources"}
    settings = {field.name for field in fields(edge.Settings)} - loading
    assert set(edge.Options.__annotations__) == settings | set(edge.RenderOptions._fields)


def test_an_answer_fits_the_schema_that_is_asked_for(tiny: Path) -> None:
    document = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    with Model.open(tiny) as model:
        for schema in (document, "sure bool"):
            answer = generate(model, "tea?", schema=schema, seed=1, max_tokens=99)
            assert list(json.loads(answer.response)) == ["sure"]
        with pytest.raises(UsageError, match="short form"):
            generate(model, "tea?", schema="sure what")


@pytest.mark.parametrize("call, error, says", [
    (lambda m: generate(m, ""), UsageError, "no query"),
    (lambda m: generate(m, Dialog()), UsageError, "no query"),
    (lambda m: generate(m, "tea?", temperature=-1), UsageError, "temperature takes a number from 0 on"),
    (lambda m: generate(m, "tea?", temperature=float("inf")), UsageError, "temperature takes a number from 0 on"),
    (lambda m: generate(m, "tea?", repeat_penalty=float("nan")), UsageError, "repeat_penalty takes a number from 0.1 on"),
    (lambda m: generate(m, "tea?", top_p=2), UsageError, "top_p takes a number from 0 to 1"),
    (lambda m: generate(m, Dialog("", "", [Turn("a", "b")])), UsageError, "no query"),
    (lambda m: generate(m, Dialog("a", "", [Turn("b")]), pref="c"), UsageError, "leave system and pref out"),
    (lambda m: generate(m, "tea \udcff?"), UsageError, "surrogate"),
    (lambda m: generate(m, "tea?", pref="@nobody"), NotFound, "@nobody"),
    (lambda m: generate(m, "tea?", temp=1), TypeError, "no option 'temp': there are max_tokens, temperature"),
    (lambda m: generate(m, "tea?", context=99), TypeError, "no option 'context'"),
    (lambda m: generate(m, "tea?", seed=-1), UsageError, "seed"),
    (lambda m: generate(m, "tea?", max_tokens=0), UsageError, "max_tokens"),
    (lambda m: generate(m, "tea?", pref_strength=-1.0), UsageError, "pref_strength"),
    (lambda m: generate(m, "zoo " * 900), ContextOverflow, "512"),
    (lambda m: compare(m, "tea?", []), UsageError, "preference"),
    (lambda m: compare(m, "tea?", ["short", "zoo " * 900]), ContextOverflow, "512"),
])  # fmt: skip
def test_what_makes_no_sense_is_said_and_the_model_stays_usable(
    call: Any, error: type[Exception], says: str, tiny: Path
) -> None:
    with Model.open(tiny) as model:
        with pytest.raises(error, match=says):
            call(model)
        assert generate(model, "tea?", max_tokens=2, temperature=0).output_tokens == 2
    with pytest.raises(RuntimeError, match="closed"):
        call(model)


def test_a_model_that_cannot_be_opened_is_said(tmp_path: Path, tiny: Path) -> None:
    for name, template, error in (("none.gguf", "auto", NotFound), (tiny, "nonsense", UsageError)):
        with pytest.raises(error):
            Model.open(name, template=template)
    wrong: dict[str, Any] = {"context": ("x", 8, -5), "gpu_layers": ("many", -1), "threads": ("x", 0, 1.5)}
    for option, values in wrong.items():
        for value in values:
            with pytest.raises(UsageError, match=option):
                Model.open(tiny, **{option: value})
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(EdgeError, match="damaged"):
        Model.open(tmp_path / "bad.gguf")


def test_a_program_hears_nothing_and_finds_nothing_on_its_disk(
    tiny: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with Model.open(tiny) as model:
        list(stream(model, "tea?", max_tokens=3))
        compare(model, "tea?", ["a", "b"], max_tokens=3)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "home").exists()


def test_the_public_names_are_typed_and_stand_on_the_page() -> None:
    stub = ast.parse((ROOT / "stubs" / "__init__.pyi").read_text())
    defined = {node.name for node in stub.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    assert set(edge.__all__) == defined - {"Options"}
    assert all(f"`{name}`" in PAGE for name in edge.__all__)


def test_an_interrupted_call_does_not_interrupt_the_next_one(demo: Path) -> None:
    with Model.open(demo) as model:
        edge.session_of(model).scheduler.interrupt.raised = True  # as Ctrl-C leaves it
        assert all(answer.response for answer in compare(model, "What is tea?", ["", "@child"], max_tokens=3))
