"""Reasoning and the answer are two things, wherever the marks between them come from and however they are cut."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.parrot import make_parrot
from helpers.scripted import START, TEMPLATE, write_scripted
from helpers.terminal import Terminal

import metaalign_edge as edge
from metaalign_edge import Model, RenderOptions, Scheduler, Settings
from metaalign_edge_commands.terminal.repl import Repl
from metaalign_edge_commands.terminal.screen import Screen
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.stores.sessions import Conversation
from metaalign_edge_templates.reasoning import ReasoningSplitter, formats_of

Run = Callable[..., "subprocess.CompletedProcess[str]"]
FORMATS = formats_of("</think>", lambda _: False)
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
    thinking = ReasoningSplitter(FORMATS, "<think>\n" if opened else "")
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


def test_an_answer_that_is_cut_while_the_model_thinks_is_none(thinker: Path, refuses: Callable[..., str]) -> None:
    assert refuses(7, "chat", "-m", str(thinker), *GREEDY, "-n", "3", "-q", "tea?") == (
        "metaalign-edge: the answer was cut at 3 tokens while the model was still thinking: raise -n, or say --no-think\n"
    )


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
    assert found["reasoning"] == "quick brown fox" and json.loads(found["response"]) in ("a</think>b", True)
    model, template = opened
    options = ("--template", str(template), *GREEDY, "-j", "ok bool")
    found = json.loads(here("chat", "-m", str(model), *options, "--json", "tea?").stdout)
    assert found["reasoning"] == "quick fox" and json.loads(found["response"])["ok"] in (True, False)


def test_a_mark_inside_a_string_is_text(thinker: Path, here: Run) -> None:
    found = json.loads(
        here("chat", "-m", str(thinker), *GREEDY, "-j", '{"const": "<think>a</think>b"}', "--json", "tea?").stdout
    )
    assert (json.loads(found["response"]), found["reasoning"]) == ("<think>a</think>b", "quick brown fox")


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
    assert (cut.returncode, cut.stdout) == (7, "")
    assert "cut at 3 tokens while the model was still thinking: raise -n" in cut.stderr


# -- the formats of other models --------------------------------------------------------------------------------------

FINAL = "<|start|>assistant<|channel|>final<|message|>"
HARMONY = ["<|channel|>", "analysis", "<|message|>", "I wonder.", "<|end|>", FINAL, "Tea is ", "a drink."]


class Spoken(NamedTuple):
    """A model that writes its reasoning in some format."""

    marks: str  # that its template has in a comment
    script: list[str]
    control: tuple[str, ...] = ()  # its pieces that are control tokens
    opened: str = ""  # what its prompt ends with


SPOKEN = {
    "gemma 4": Spoken(
        "<|channel>thought <channel|>",
        ["<|channel>", "thought\n", "I wonder.", "\n", "<channel|>", "Tea is ", "a drink."],
        ("<|channel>", "<channel|>"),
    ),
    "command": Spoken(
        "<|START_THINKING|> <|END_THINKING|>",
        ["I wonder.", "<|END_THINKING|>", "<|START_RESPONSE|>", "Tea is ", "a drink.", "<|END_RESPONSE|>", " and more"],
        ("<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
        "<|START_THINKING|>",
    ),
    "think and answer": Spoken(
        "<think> </think> <answer>",
        ["<think>\n", "I wonder.", "\n</think>\n", "<ans", "wer>\n", "Tea is ", "a drink.", "\n</answer>"],
    ),
    "marks of several tokens": Spoken("</think>", ["<thi", "nk>I wo", "nder.</th", "ink>Tea is ", "a drink."]),
    "no template names it": Spoken("", ["<think>", "I wonder.", "</think>", "Tea is ", "a drink."]),
    "harmony": Spoken("<|channel|> <|message|>", HARMONY, ("<|channel|>", "<|message|>", "<|end|>")),
    "harmony by its tokens": Spoken("", HARMONY, ("<|channel|>", "<|message|>", "<|end|>")),
    "solar": Spoken(
        "<|begin|> <|think|> <|content|>",
        ["<|think|>", "I wonder.", "<|end|>", "<|begin|>assistant<|content|>", "Tea is ", "a drink."],
        ("<|think|>", "<|end|>"),
    ),
}


def write_spoken(path: Path, spoken: Spoken) -> Path:
    """Write the model; the last token of its prompt opens its reasoning, or says nothing."""
    template = TEMPLATE.replace(START, f"{START}{spoken.opened}") + f"{{# {spoken.marks} #}}"
    return write_scripted(
        path, spoken.script, template=template, start=spoken.opened or START, control=spoken.control, also=(START,)
    )


@pytest.mark.parametrize("name", SPOKEN)
def test_the_response_is_all_that_a_model_of_any_format_answers(name: str, tmp_path: Path, here: Run) -> None:
    model = str(write_spoken(tmp_path / "model.gguf", SPOKEN[name]))
    plain = here("chat", "-m", model, *GREEDY, "tea?")
    assert (plain.returncode, plain.stdout, plain.stderr) == (0, "Tea is a drink.\n", "")
    stopped = here("chat", "-m", model, *GREEDY, "--json", "--stop", "wonder", "--stop", "drink", "tea?")
    found = json.loads(stopped.stdout)
    assert (found["response"], found["reasoning"], found["finish_reason"]) == ("Tea is a ", "I wonder.", "stop")


@pytest.mark.parametrize("name", [name for name, spoken in SPOKEN.items() if spoken.marks])
def test_a_schema_lets_a_model_of_any_format_think_first(name: str, tmp_path: Path, here: Run) -> None:
    spoken = SPOKEN[name]
    said = [piece.replace("Tea is ", '{"ok": ').replace("a drink.", "true}") for piece in spoken.script]
    model = write_spoken(tmp_path / "model.gguf", spoken._replace(script=said))
    found = json.loads(here("chat", "-m", str(model), *GREEDY, "--json", "-j", "ok bool", "tea?").stdout)
    assert (found["response"], found["reasoning"], found["finish_reason"]) == ('{"ok": true}', "I wonder.", "stop")


def test_a_session_and_a_batch_keep_the_response_of_any_format(tmp_path: Path, here: Run) -> None:
    model = str(write_spoken(tmp_path / "model.gguf", SPOKEN["harmony"]))
    assert here("chat", "-m", model, *GREEDY, "--session", "tea", "tea?").returncode == 0
    assert "wonder" not in here("sessions", "export", "tea").stdout
    row = json.loads(here("batch", "-m", model, *GREEDY, "-", input='{"query": "tea?"}').stdout)
    assert (row["response"], row["reasoning"], row["error"]) == ("Tea is a drink.", "I wonder.", None)


@pytest.mark.parametrize("mark, noted", [("<|plan|>", True), ("<reflect>", True), ("<p>", False), ("Well, ", False)])
def test_a_format_that_nobody_knows_is_said_once(mark: str, noted: bool, tmp_path: Path, here: Run) -> None:
    model = str(write_scripted(tmp_path / "model.gguf", [mark, "I wonder."], control=("<|plan|>",)))
    said = here("chat", "-m", model, *GREEDY, "tea?")
    assert (said.returncode, said.stdout) == (0, f"{mark}I wonder.\n")
    line = f"metaalign-edge: note: the answer begins with {mark}, a mark of no format that is known here: "
    assert said.stderr.startswith(line) if noted else said.stderr == ""
    assert here("chat", "-m", model, *GREEDY, "-q", "tea?").stderr == ""
    rows = 3 * '{"query": "tea?"}\n'
    assert here("batch", "-m", model, *GREEDY, "-", input=rows).stderr.count("a mark of no format") == noted


# -- no answer, and half of one ---------------------------------------------------------------------------------------

ENDED = "is empty: the model ended while it was thinking: say --no-think, or ask otherwise\n"
SILENT = "is empty: the model ended at once: ask otherwise, or look at the prompt with `metaalign-edge render`\n"


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ends its answer at once."""
    return write_scripted(tmp_path_factory.mktemp("mute") / "mute.gguf", [])


@pytest.fixture(scope="module")
def lost(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ends in the midst of its reasoning."""
    return write_scripted(tmp_path_factory.mktemp("lost") / "lost.gguf", ["<think>", "Tea is ", "a drink."])


def test_an_empty_answer_is_no_success(mute: Path, lost: Path, here: Run, refuses: Callable[..., str]) -> None:
    for model, line, thought in ((mute, SILENT, None), (lost, ENDED, "Tea is a drink.")):
        for more in ((), ("-q",), ("--no-stream",)):
            assert refuses(7, "chat", "-m", str(model), *GREEDY, *more, "tea?") == f"metaalign-edge: the answer {line}"
        document = here("chat", "-m", str(model), *GREEDY, "--json", "tea?")
        assert (document.returncode, document.stderr) == (7, f"metaalign-edge: the answer {line}")
        found = json.loads(document.stdout)
        assert (found["finish_reason"], found["response"], found["reasoning"]) == ("empty", "", thought)


def test_a_terminal_shows_nothing_but_the_error_of_an_empty_answer(mute: Path) -> None:
    terminal = Terminal("chat", "-m", str(mute), *GREEDY, "tea?", columns=200)
    assert terminal.rest() == f"metaalign-edge: the answer {SILENT}"
    assert terminal.leave() == 7


def test_an_answer_that_a_stop_text_ended_at_once_is_one(thinker: Path, here: Run) -> None:
    document = here("chat", "-m", str(thinker), *GREEDY, "--json", "--stop", "lazy", "tea?")
    assert (document.returncode, document.stderr) == (0, "")
    assert (json.loads(document.stdout)["finish_reason"], json.loads(document.stdout)["response"]) == ("stop", "")


def test_each_empty_column_of_compare_is_named(lost: Path, here: Run) -> None:
    compared = here("compare", "-m", str(lost), *GREEDY, "--json", "--pref", "a", "--pref", "b", "tea?")
    assert compared.returncode == 7
    assert compared.stderr == "".join(f"metaalign-edge: the answer under {head} {ENDED}" for head in "ab")
    assert [one["finish_reason"] for one in json.loads(compared.stdout)] == ["empty", "empty"]


def test_a_row_without_an_answer_has_failed(lost: Path, here: Run, tmp_path: Path) -> None:
    answered = here("batch", "-m", str(lost), *GREEDY, "-", input='{"query": "tea?"}')
    row = json.loads(answered.stdout)
    assert answered.returncode == 1 and "0 answered, 0 before, 1 failed" in answered.stderr
    assert row["error"] == f"the answer to line 1 {ENDED}".strip()
    assert (row["finish_reason"], row["reasoning"]) == ("empty", "Tea is a drink.")


def test_the_repl_says_so_and_goes_on(lost: Path) -> None:
    terminal = Terminal("chat", "-m", str(lost), *GREEDY)
    terminal.until("leaves\n")
    for _ in range(2):
        terminal.until("> ")
        terminal.type("tea?\r")
        terminal.until(ENDED.strip())
    terminal.until("> ")
    terminal.type("\x04")
    assert terminal.leave() == 0


def test_a_program_gets_an_empty_answer_as_one(mute: Path) -> None:
    with Model.open(mute) as model:
        answer = edge.generate(model, "tea?", temperature=0)
        assert (answer.finish_reason, answer.response) == ("empty", "")


CUT = "was cut at 2 tokens: raise -n\n"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that says four words and ends."""
    words = ["Tea ", "is ", "a ", "drink."]
    return write_scripted(tmp_path_factory.mktemp("talker") / "talker.gguf", words)


def test_an_answer_that_was_cut_is_said_and_is_one(talker: Path, here: Run) -> None:
    cut = here("chat", "-m", str(talker), *GREEDY, "-n", "2", "tea?")
    assert (cut.returncode, cut.stdout, cut.stderr) == (0, "Tea is \n", f"metaalign-edge: warning: the answer {CUT}")
    assert here("chat", "-m", str(talker), *GREEDY, "-n", "2", "-q", "tea?").stderr == ""
    assert here("chat", "-m", str(talker), *GREEDY, "-n", "9", "tea?").stderr == ""
    compared = here("compare", "-m", str(talker), *GREEDY, "-n", "2", "--pref", "a", "--pref", "b", "tea?")
    assert compared.returncode == 0
    assert compared.stderr == "".join(f"metaalign-edge: warning: the answer under {head} {CUT}" for head in "ab")


def test_a_batch_counts_the_answers_that_were_cut(talker: Path, here: Run) -> None:
    rows = '{"query": "tea?", "max_tokens": 2}\n{"query": "tea?"}\n{"query": "ice?", "max_tokens": 1}\n'
    answered = here("batch", "-m", str(talker), *GREEDY, "-", input=rows)
    assert answered.returncode == 0
    line = "metaalign-edge: warning: 2 answers were cut (finish_reason length): raise -n, or -c\n"
    assert answered.stderr == f"3 rows: 3 answered, 0 before, 0 failed\n{line}"


def test_a_context_that_is_full_asks_for_a_larger_one(tmp_path: Path, here: Run) -> None:
    model = str(write_scripted(tmp_path / "endless.gguf", ["Tea ", "and "], ending="Tea ", context=64))
    full = here("chat", "-m", model, *GREEDY, "-c", "32", "--json", "tea?")
    found = json.loads(full.stdout)
    line = f"the answer was cut at {32 - found['input_tokens']} tokens: the context is full, raise -c"
    assert (full.returncode, full.stderr) == (0, f"metaalign-edge: warning: {line}\n")
    thinking = str(write_scripted(tmp_path / "thinking.gguf", ["<think>", "Tea ", "and "], ending="Tea ", context=64))
    full = here("chat", "-m", thinking, *GREEDY, "-c", "32", "tea?")
    assert full.returncode == 7 and "still thinking: the context is full, raise -c, or say --no-think" in full.stderr
