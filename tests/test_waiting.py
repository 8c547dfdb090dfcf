"""At a terminal, a line says what is being waited for: loading, reading, measuring, rows. Elsewhere there is none."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.terminal import Emulator, Terminal

from metaalign_edge import Model, Settings
from metaalign_edge_runtime.llama.gguf import ModelFile

Run = Callable[..., "subprocess.CompletedProcess[str]"]
LONG = "zoo " * 1500  # some seconds for the slow model
SHELL = ("bash", "-c")


def stop(screen: Emulator) -> None:
    """Press Ctrl-C, and expect the command to end by it, with nothing of its line left."""
    screen.type("\x03")
    screen.rest()
    assert screen.leave() == 130


def test_reading_a_long_prompt_is_told_in_tokens_until_the_answer_begins(slow: Path) -> None:
    screen = Emulator("chat", "-m", str(slow), "-n", "8", "--temp", "0", "--system", LONG, "tea?")
    screen.until("reading the prompt: 0 of ")
    first = re.search(r"of ([\d,]+) tokens \(\d+ s\)", screen.until("reading the prompt: 512 of "))
    assert first and int(first[1].replace(",", "")) > 1500
    assert "reading" not in screen.rest() and "(" not in screen.screen.splitlines()[0]
    assert screen.leave() == 0


def test_what_is_loaded_is_named_with_its_share(tiny: Path, tmp_path: Path) -> None:
    template = tmp_path / "late.jinja"
    os.mkfifo(template)  # it is read while the model loads, and holds the command up until it is written
    screen = Emulator("chat", "-m", str(tiny), "-n", "2", "--temp", "0", "--template", str(template), "tea?")
    screen.until("loading tiny.gguf: 100%")
    template.write_text("{{ user_info }}{{ turns[-1].query }}")
    assert "loading" not in screen.rest() and screen.leave() == 0


def test_the_share_that_is_loaded_grows_to_all(tiny: Path) -> None:
    with Model(ModelFile(tiny), Settings(gpu_layers="0")) as model:
        assert model.loaded == 1.0


@pytest.mark.parametrize("way", ["--json", "--no-stream", "> answer"])
def test_an_answer_that_is_not_seen_as_it_is_written_is_counted(way: str, slow: Path, tmp_path: Path) -> None:
    line = f"cd {tmp_path}; {sys.executable} -m metaalign_edge chat -m {slow} -n 6000 --temp 0 tea? {way}"
    screen = Emulator(line, program=SHELL)
    screen.until("writing: ")
    screen.until(" tokens (")
    stop(screen)
    assert "writing" not in screen.screen


def test_quiet_off_a_terminal_and_on_a_dumb_one_nothing_is_said(slow: Path, run: Run) -> None:
    arguments = ("chat", "-m", str(slow), "-n", "2", "--temp", "0", "--system", LONG, "tea?")
    piped = run(*arguments)
    assert (piped.returncode, piped.stderr) == (
        0,
        "metaalign-edge: warning: the answer was cut at 2 tokens: raise -n\n",
    )
    for kind, quiet in (("xterm", ["-q"]), ("dumb", [])):
        terminal = Terminal(*arguments, *quiet, kind=kind)
        shown = terminal.rest()
        assert terminal.leave() == 0 and not re.search(r"reading|loading|\x1b| s\)", shown)


GIVES_WAY = """
import os, sys, tty
import metaalign_edge
from metaalign_edge_commands.terminal.screen import Screen
from metaalign_edge_commands.terminal.status import waiting
screen = Screen()
tty.setcbreak(0)  # without an echo of what is typed
with waiting(screen, lambda: "a file"):
    os.read(0, 1)
    screen.note("a note")
    os.read(0, 1)
    screen.write("an ans")
    os.read(0, 1)
    screen.write("wer\\n")
screen.note("the end")
"""


def test_it_gives_way_to_notes_and_answers_and_comes_back_at_a_new_line_only() -> None:
    screen = Emulator("-c", GIVES_WAY, program=(sys.executable,))
    screen.until("a file (")
    screen.type("x")
    assert re.fullmatch(r"a note\na file \(\d s\)\n", screen.until("a note\na file ("))
    screen.type("x")
    screen.until("an ans")
    assert not screen.look(1.5) and screen.screen == "a note\nan ans\n"
    screen.type("x")
    assert screen.rest() == "a note\nan answer\nthe end\n"
    assert screen.leave() == 0


def test_a_second_ctrl_c_takes_the_line_away() -> None:
    code = f"""
import os, signal
from metaalign_edge_runtime.llama.interrupt import Interrupt
with Interrupt():
    {GIVES_WAY.partition("    os.read")[0].replace(chr(10), chr(10) + "    ")}
        os.read(0, 1)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
"""
    screen = Emulator("-c", "import metaalign_edge\n" + code, program=(sys.executable,))
    screen.until("a file (")
    screen.type("x")
    assert screen.rest() == "\n" and screen.leave() == 130


def test_bench_says_which_row_it_measures() -> None:
    screen = Emulator("bench", "--rounds", "50")
    shown = screen.until(" of 50 (")
    assert re.search(r"(read a prompt|write .+), round \d+ of 50 \(\d+ s\)", shown)
    stop(screen)
    assert "round" not in screen.screen


SLOW_START = """
import sys
if any("trial" in word for word in sys.orig_argv):
    open({!r}).read()
"""


def test_doctor_says_what_it_checks(tiny: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)  # the process that tries the model starts when it is written
    (tmp_path / "sitecustomize.py").write_text(SLOW_START.format(str(gate)))
    python = ("env", f"PYTHONPATH={tmp_path}", sys.executable, "-m", "metaalign_edge")
    screen = Emulator("doctor", "-m", str(tiny), "-ngl", "0", columns=120, program=python)
    for what in ("llama.cpp", "first token"):
        screen.until(f"checking: {what} (")
        gate.write_text("go")
    assert "checking" not in screen.rest() and screen.leave() == 0


def rows(path: Path, *lengths: int) -> Path:
    """Write a batch whose answers have so many tokens at most."""
    path.write_text("".join(json.dumps({"query": "tea?", "max_tokens": most}) + "\n\n" for most in lengths))
    return path


def test_a_batch_counts_of_how_many_and_goes_on_counting(slow: Path, tmp_path: Path, run: Run) -> None:
    source, answers = rows(tmp_path / "rows.jsonl", 1, 1, 1), tmp_path / "answers.jsonl"
    batch = ("batch", str(source), "-o", str(answers), "-m", str(slow), "--temp", "0")
    assert "3 rows: 3 answered" in run(*batch).stderr
    rows(source, 1, 1, 1, 2, 3000)
    screen = Emulator(*batch, columns=100)
    assert re.search(r"slow\.gguf .* 3/5 .* -:--:-- left", screen.until("3/5"))
    assert re.search(r"4/5 +[\d.]+ answers/s, \d+:\d\d:\d\d left", screen.until("4/5"))
    screen.type("\x03")
    assert "4 rows answered; the same command goes on from there" in screen.rest() and screen.leave() == 130


def test_rows_that_are_seen_have_the_count_below_them(slow: Path, tmp_path: Path) -> None:
    screen = Emulator("batch", str(rows(tmp_path / "rows.jsonl", 1, 3000)), "-m", str(slow), "--temp", "0", columns=500)
    screen.until("1 of 2 rows are done (")
    assert json.loads(screen.screen.splitlines()[0])["index"] == 0
    stop(screen)
    assert "done" not in screen.screen


TAILS = """
import metaalign_edge
from metaalign_edge_commands.terminal.columns import Columns
from metaalign_edge_commands.terminal.screen import Screen
with Columns(["a", "b"], Screen()) as columns:
    columns.show(1, "one line")
    columns.show(0, "\\n".join(f"line {number}" for number in range(50)))
    input()
print("end")
"""


def test_columns_follow_the_end_of_each_answer_and_leave_the_whole() -> None:
    screen = Emulator("-c", TAILS, program=("env", "LINES=12", sys.executable), columns=60, lines=12)
    shown = screen.until("line 49")
    assert "one line" in shown and "line 40" not in shown.replace("line 49", "") and "a" in shown.split()
    screen.type("\n")
    assert "line 49" in screen.rest() and screen.leave() == 0
    terminal = Terminal("-c", TAILS, program=(sys.executable,), kind="xterm", columns=60)
    terminal.type("\n")
    whole = terminal.rest().rpartition("one line")[2]
    assert [f"line {number}" in whole for number in range(1, 50)] == [True] * 49 and terminal.leave() == 0
