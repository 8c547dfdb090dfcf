"""One query under several preferences: side by side, one after the other, or as JSON."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.terminal import Terminal

Run = Callable[..., "subprocess.CompletedProcess[str]"]
ASKED = ("--pref", "Answer in capital letters.", "--pref", "@json", "--pref", "-", "What is a volcano?")


def test_each_answer_is_the_one_that_chat_gives(here: Run) -> None:
    done = here("compare", "--temp", "0", "--json", "--system", "one sentence", *ASKED)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert [one["pref"] for one in found] == ["Answer in capital letters.", "@json", "-"]
    assert found[1]["user_info"] == "Return JSON." and found[2]["user_info"] == ""
    for one in found:
        pref = ["--pref", one["user_info"]] if one["user_info"] else []
        alone = here("chat", "--temp", "0", "--json", "--system", "one sentence", *pref, "What is a volcano?")
        assert json.loads(alone.stdout)["response"] == one["response"]
        assert json.loads(alone.stdout).keys() == one.keys() - {"pref"}


def test_in_a_pipe_the_answers_stand_one_after_the_other_under_their_preferences(run: Run) -> None:
    done = run("compare", "--temp", "0", *ASKED)
    texts = [one["response"] for one in json.loads(run("compare", "--temp", "0", "--json", *ASKED).stdout)]
    heads = ["Answer in capital letters.", "@json", "-"]
    assert done.stdout == "\n".join(f"[{head}]\n{text}\n" for head, text in zip(heads, texts, strict=True))


def test_preferences_join_in_a_column_and_a_pipe_is_the_query(here: Run) -> None:
    done = here("compare", "--pref", "@json+@caps", "--pref", "one\nsentence", "--temp", "0", input="What is tea?\n")
    assert done.returncode == 0 and "[@json+@caps]\n{" in done.stdout and "[one sentence]\nTea " in done.stdout


@pytest.mark.slow
def test_the_beginning_is_read_once_for_all_columns(here: Run) -> None:
    system = ("--system", "Be kind and patient. " * 10)
    done = here(
        "compare", "--json", *system, "--pref", "one sentence", "--pref", "be formal", "--pref", "-", "What is tea?"
    )
    first, *others = json.loads(done.stdout)
    assert first["cached_tokens"] == 0 and all(one["cached_tokens"] > 40 for one in others)


def test_a_strength_and_a_seed_mean_the_same_in_every_column(here: Run) -> None:
    options = ("--pref-strength", "2", "--temp", "1.2", "--seed", "7")
    done = here("compare", "--json", *options, "--pref", "be formal", "--pref", "be formal", "What is tea?")
    one, other = json.loads(done.stdout)
    assert one["response"] == other["response"] and one["seed"] == other["seed"] == 7


@pytest.mark.parametrize("columns, wide", [(100, True), (50, False)])
def test_a_terminal_shows_columns_if_it_is_wide_enough(columns: int, wide: bool) -> None:
    terminal = Terminal("compare", "--temp", "0", *ASKED, columns=columns, kind="xterm")
    shown = terminal.rest()
    assert terminal.leave() == 0
    heads = [line for line in shown.splitlines() if "Answer in capital letters." in line and "@json" in line]
    assert bool(heads) == wide and ("[@json]\n" in shown) != wide
    assert "A VOLCANO" in shown and '{"answer"' in shown


def test_a_dumb_terminal_gets_no_escapes() -> None:
    terminal = Terminal("compare", "--temp", "0", *ASKED, columns=100)
    assert "\x1b" not in terminal.rest()
    assert terminal.leave() == 0


@pytest.mark.parametrize("arguments, said", [
    (["--pref", "brief", "tea?"], "two preferences"), (["tea?"], "two preferences"), (["--pref", "a", "--pref", "b"], "no query"),
    (["--pref", "a", "--pref", " ", "tea?"], "empty"),
])  # fmt: skip
def test_what_cannot_be_compared_is_a_usage_error(arguments: list[str], said: str, refuses: Callable[..., str]) -> None:
    assert said in refuses(2, "compare", *arguments)


def test_other_errors_keep_their_codes(refuses: Callable[..., str]) -> None:
    pair = ("--pref", "a", "--pref", "b")
    assert "@nobody" in refuses(3, "compare", "--pref", "a", "--pref", "@nobody", "tea?")
    assert "shorten" in refuses(6, "compare", *pair, "-c", "64", "tea " * 200)
    assert "fewer at a time" in refuses(5, "compare", *["--pref", "a"] * 300, "tea?")


def test_ctrl_c_keeps_what_was_said(slow: Path) -> None:
    command = [sys.executable, "-m", "metaalign_edge", "compare", "-m", str(slow), "-n", "6000", "--temp", "0"]
    process = subprocess.Popen([*command, "--no-stdin", "--pref", "a", "--pref", "b", "tea?"], stdout=subprocess.PIPE)
    assert process.stdout
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    rest = process.stdout.read()
    assert process.wait() == 130 and time.monotonic() - started < 5
    head, _, tail = (first + rest).partition(b"\n[b]\n")
    assert head.startswith(b"[a]\n") and len(head) > 20 and len(tail) > 1


def test_a_closed_pipe_ends_quietly(slow: Path) -> None:
    command = [sys.executable, "-m", "metaalign_edge", "compare", "-m", str(slow), "-n", "6000", "--temp", "0"]
    process = subprocess.Popen(
        [*command, "--no-stdin", "--pref", "a", "--pref", "b", "tea?"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout and process.stderr
    os.read(process.stdout.fileno(), 4)
    process.stdout.close()
    assert (process.wait(timeout=30), process.stderr.read()) == (0, b"")
