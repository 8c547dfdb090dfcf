"""Reasoning and the answer are two things, wherever the marks between them come from and however they are cut."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.parrot import make_parrot
from helpers.terminal import Terminal

import metaalign_edge as edge
from metaalign_edge import Model, ReasoningSplitter, RenderOptions, Scheduler, Settings
from metaalign_edge_commands.terminal.repl import Repl
from metaalign_edge_commands.terminal.screen import Screen
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.stores.sessions import Conversation

Run = Callable[..., "subprocess.CompletedProcess[str]"]
MARKS = ("<think>", "</think>")
GREEDY = ("--temp", "0", "--seed", "1")


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that opens its reasoning itself, and says `quick brown fox` in it and `lazy dog` behind it."""
    script = ["<|assistant|>", "<think>", " quick", " brown", " fox", "</think>", "\n", " lazy", " dog", "<|end|>"]
    return make_parrot(tmp_path_factory.mktemp("thinker") / "thinker", script)


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model whose prompt opens the reasoning, by marks that are no tokens; and its template."""
    folder = tmp_path_factory.mktemp("opened")
    (folder / "opened.jinja").write_text(
        "{# [/THINK] ends it #}{% for message in messages %}{{ message.content }}<|user|>{% endfor %}{{ '[THINK]\\n' }}"
    )
    script = ["\n", " quick", " fox", "[", "/", "T", "H", "I", "N", "K", "]", " lazy", " dog", "<|end|>"]
    return make_parrot(folder / "model", script, marks=()), folder / "opened.jinja"


# -- the marks --------------------------------------------------------------------------------------------------------


def parted(pieces: list[bytes], opened: bool = False) -> tuple[str, str]:
    thinking = ReasoningSplitter(MARKS, opened)
    found = [*(thinking.feed(piece) for piece in pieces), thinking.rest()]
    return b"".join(thought for thought, _ in found).decode(), b"".join(said for _, said in found).decode()


@pytest.mark.parametrize("text, thought, said", [
    ("<think>a thought</think>said", "a thought", "said"),
    ("\n<think>\n a </think not < it>\n </think>\n\n said </think> <think> ", "a </think not < it>", "said </think> <think>"),
    ("said <think>no thought</think>", "", "said <think>no thought</think>"),
    ("<thinking>said", "", "<thinking>said"),
    ("<thin", "", "<thin"),
    ("<think>cut in the mid</thi", "cut in the mid</thi", ""),
    ("<think>cut at its end </think>\n", "cut at its end", ""),
    ("<think>\n\n</think>\n\nsaid", "", "said"),
    ("", "", ""),
])  # fmt: skip
def test_reasoning_stands_between_marks_at_the_beginning_however_they_are_cut(
    text: str, thought: str, said: str
) -> None:
    data = text.encode()
    for size in (*range(1, 12), len(data) + 1):
        pieces = [data[at : at + size] for at in range(0, len(data), size)]
        found = parted(pieces)
        assert (found[0], found[1].strip()) == (thought, said), size


def test_a_prompt_may_have_opened_it() -> None:
    assert parted([b"a </th", b"ink> thought</think>s", b"aid"], opened=True) == ("a", "thought</think>said")
    assert parted([b"a <think> b</think>", b"c"], opened=True) == ("a <think> b", "c")


def test_half_characters_stay_whole(thinker: Path) -> None:
    assert parted([b"<think>\xc3", b"\xa9</think>\xf0\x9f", b"\x98\x80"]) == ("é", "😀")


# -- what a user sees -------------------------------------------------------------------------------------------------


def test_stdout_has_the_answer_only_and_json_both(thinker: Path, here: Run) -> None:
    plain, document = (here("chat", "-m", str(thinker), *GREEDY, *more, "tea?") for more in ((), ("--json",)))
    assert (plain.stdout, plain.stderr) == ("lazy dog\n", "")
    found = json.loads(document.stdout)
    assert (found["response"], found["reasoning"], found["output_tokens"]) == ("lazy dog", "quick brown fox", 8)


def test_a_model_that_does_not_think_has_no_reasoning(tiny: Path, here: Run) -> None:
    assert json.loads(here("chat", "-m", str(tiny), "-n", "3", "--json", "tea?").stdout)["reasoning"] is None


def test_off_a_terminal_v_shows_it_on_stderr(thinker: Path, here: Run) -> None:
    shown = here("chat", "-m", str(thinker), *GREEDY, "-v", "tea?")
    assert shown.stdout == "lazy dog\n" and "quick brown fox\n\n" in shown.stderr and "\x1b" not in shown.stderr
    assert "fox" not in here("chat", "-m", str(thinker), *GREEDY, "-v", "-q", "tea?").stderr


@pytest.mark.parametrize("kind, colour, dim", [("xterm", "", True), ("xterm", "1", False), ("dumb", "", False)])
def test_a_terminal_shows_it_dim_while_it_comes(
    kind: str, colour: str, dim: bool, thinker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", colour)
    terminal = Terminal("chat", "-m", str(thinker), *GREEDY, "tea?", kind=kind)
    shown = terminal.rest()
    assert terminal.leave() == 0
    assert ("\x1b[2m brown\x1b[22m" in shown) == dim
    assert shown.replace("\x1b[2m", "").replace("\x1b[22m", "") == "quick brown fox\n\nlazy dog\n"


def test_a_prompt_opens_it_and_the_end_is_several_tokens(opened: tuple[Path, Path], here: Run) -> None:
    model, template = opened
    document = json.loads(here("chat", "-m", str(model), "--template", str(template), *GREEDY, "--json", "tea?").stdout)
    assert (document["reasoning"], document["response"]) == ("quick fox", "lazy dog")


def test_a_question_that_opens_it_opens_nothing(thinker: Path, here: Run) -> None:
    document = json.loads(here("chat", "-m", str(thinker), *GREEDY, "--json", "<think>").stdout)
    assert (document["reasoning"], document["response"]) == ("quick brown fox", "lazy dog")


def test_a_stop_text_ends_the_answer_not_the_reasoning(thinker: Path, here: Run) -> None:
    document = json.loads(
        here("chat", "-m", str(thinker), *GREEDY, "--json", "--stop", "fox", "--stop", " d", "tea?").stdout
    )
    assert (document["reasoning"], document["response"]) == ("quick brown fox", "lazy")


def test_an_answer_that_is_cut_while_the_model_thinks_says_so(thinker: Path, here: Run) -> None:
    cut = here("chat", "-m", str(thinker), *GREEDY, "-n", "3", "tea?")
    assert (cut.returncode, cut.stdout) == (0, "\n")
    assert (
        cut.stderr
        == "metaalign-edge: warning: the answer was cut at 3 tokens while the model was still thinking: raise -n or -c, or say --no-think\n"
    )
    assert here("chat", "-m", str(thinker), *GREEDY, "-n", "7", "tea?").stderr == ""


def test_reasoning_is_no_part_of_the_conversation(thinker: Path) -> None:
    settings, file = Settings(temperature=0.0, threads=1), ModelFile(thinker)
    with Model(file, settings) as model, Scheduler(
        model, edge.choose_template("auto", file), settings, RenderOptions(), Interrupt()
    ) as chat:  # fmt: skip
        repl = Repl(chat, Conversation(), Screen(quiet=True), False)
        for query in ("tea?", "and coffee?"):
            repl.ask(query)
        assert [response for _, response in repl.conversation.pairs()] == ["lazy dog", "lazy dog"]


@pytest.mark.slow
def test_several_at_a_time_think_each_for_itself(thinker: Path, here: Run) -> None:
    compared = json.loads(
        here("compare", "-m", str(thinker), *GREEDY, "--json", "--pref", "a", "--pref", "b", "tea?").stdout
    )
    rows = "".join(json.dumps({"query": f"tea {number}?"}) + "\n" for number in range(5))
    answered = [
        json.loads(line) for line in here("batch", "-m", str(thinker), *GREEDY, "-", input=rows).stdout.splitlines()
    ]
    assert len(compared + answered) == 7
    assert {(one["reasoning"], one["response"]) for one in compared + answered} == {("quick brown fox", "lazy dog")}


# -- and a schema -----------------------------------------------------------------------------------------------------


def test_a_schema_holds_from_the_end_of_the_reasoning(thinker: Path, opened: tuple[Path, Path], here: Run) -> None:
    shape = ("-j", '{"enum": ["a</think>b", true]}')
    found = json.loads(here("chat", "-m", str(thinker), *GREEDY, *shape, "--json", "tea?").stdout)
    assert found["reasoning"] == "quick brown fox" and found["response"] in ("a</think>b", True)
    model, template = opened
    options = ("--template", str(template), *GREEDY, "-j", "ok bool")
    found = json.loads(here("chat", "-m", str(model), *options, "--json", "tea?").stdout)
    assert found["reasoning"] == "quick fox" and found["response"]["ok"] in (True, False)


def test_a_mark_inside_a_string_is_text(thinker: Path, here: Run) -> None:
    found = json.loads(
        here("chat", "-m", str(thinker), *GREEDY, "-j", '{"const": "<think>a</think>b"}', "--json", "tea?").stdout
    )
    assert (found["response"], found["reasoning"]) == ("<think>a</think>b", "quick brown fox")


def test_what_the_last_token_of_the_reasoning_says_already_counts(tmp_path: Path, here: Run) -> None:
    template = tmp_path / "run-on.jinja"
    template.write_text(
        "{# [/THINK] #}{% for message in messages %}{{ message.content }}{% endfor %}{{ '[THINK]\\n' }}"
    )
    script = ["\n", " quick", "[", "/", "T", "H", "I", "N", "K", "]{"]
    model = make_parrot(tmp_path / "run-on", script, marks=("]{",))
    options = ("-m", str(model), "--template", str(template), *GREEDY)
    assert here("chat", *options, "-j", "ok bool", "tea?").stdout in ('{"ok":true}\n', '{"ok":false}\n')
    refused = here("chat", *options, "-j", "[bool]", "tea?")
    assert (refused.returncode, refused.stdout) == (7, "{\n")


def test_a_schema_and_no_room_to_think_is_exit_7(thinker: Path, here: Run) -> None:
    cut = here("chat", "-m", str(thinker), *GREEDY, "-n", "3", "-j", "ok bool", "tea?")
    assert (cut.returncode, cut.stdout) == (7, "\n")
    assert "cut at 3 tokens while the model was still thinking: raise -n" in cut.stderr
