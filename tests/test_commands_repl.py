"""The conversation at a terminal: real pseudo-terminals, dumb ones and one that emulates a screen."""

from __future__ import annotations

import re
import stat
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from helpers.terminal import Emulator, Terminal

from metaalign_edge_commands.terminal import repl_commands
from metaalign_edge_runtime.stores import files, profiles
from metaalign_edge_runtime.stores.sessions import Conversation, session_path


def test_the_conversation_at_a_terminal(tiny: Path) -> None:
    terminal = Terminal("chat", "-m", str(tiny), "-n", "6", "--temp", "0", "--pref", "short", "-v")
    terminal.until("[short] > ")
    terminal.type("What is tea?\n")
    assert "20 tokens in (0 cached)" in terminal.until("\n[short] > ")
    terminal.type("And coffee?\n")
    assert "cached), 6 out (length)" in terminal.until("\n[short] > ")
    terminal.type("/pref\n")
    assert "User Info: short" in terminal.until("\n[short] > ")
    terminal.type("/pref in capitals\n")
    assert "User Info: in capitals" in terminal.until("\n[in capitals] > ")
    terminal.type("/system be kind\n")
    assert "System Info: be kind" in terminal.until("\n[in capitals] > ")
    terminal.type("/pref -\n")
    assert "User Info: (empty)" in terminal.until("\n> ")
    terminal.type("/regen\n")
    terminal.until("seed")
    terminal.type('"""one\ntwo"""\n')
    terminal.until("seed")
    terminal.type("/clear\n")
    terminal.until("forgotten")
    terminal.type("/regen\n")
    terminal.until("no question")
    terminal.type("/help\n")
    help_text = terminal.until("stop an answer")
    assert all(word in help_text for word in repl_commands.COMMANDS)
    terminal.type("/exit\n")
    assert terminal.leave() == 0


def test_again_shows_and_keep_keeps(tiny: Path) -> None:
    terminal = Terminal("chat", "-m", str(tiny), "-n", "6", "--temp", "0", "--pref", "short", "--session", "work")
    terminal.until("session work begins")
    terminal.type("/again @child\n")
    terminal.until("no question")
    terminal.type("What is tea?\n")
    terminal.until("\n[short] > ")
    terminal.type("/keep\n")
    terminal.until("nothing to keep")
    terminal.type("/again @child\n")
    terminal.until("\n[short] > ")
    path = session_path("work")
    assert [turn["user_info"] for turn in Conversation.read(path).turns()] == ["short"]
    terminal.type("/keep\n")
    terminal.until("\n[@child] > ")
    (turn,) = Conversation.read(path).turns()
    assert (turn["query"], turn["user_info"]) == ("What is tea?", profiles.expand_profile("@child"))
    terminal.type("/pref @no-such-one\n")
    terminal.until("no preference profile @no-such-one")
    terminal.type("/pref @json+@child\n")
    terminal.until("\n[@json+@child] > ")
    terminal.type("\x04")
    assert terminal.leave() == 0
    assert Conversation.read(path).label == "@json+@child"  # though nothing was asked under it


WRONG = {
    "/stats": "no answer yet",
    "/compare @child @expert": "no question",
    "/prf @child": "do you mean /pref?",
    "/etc/passwd": "a space before it makes it a question",
    "/strength 2": "takes a tier and a number",
    "/strength pref x": "a number from 0 to 100, not 'x'",
    "/think maybe": "on, off or auto, not 'maybe'",
    "/save": "takes a name",
    "/save a b": "cannot name",
    "/load nobody": "no session nobody: there are none",
    "/keep": "nothing to keep",
    "/pref @nobody": "no preference profile @nobody",
}


def test_what_is_wrong_is_said_and_the_conversation_goes_on(tiny: Path) -> None:
    terminal = Terminal("chat", "-m", str(tiny), columns=40)
    terminal.until("> ")
    for wrong, said in WRONG.items():
        terminal.type(wrong + "\n")
        assert said in terminal.until("\n> ")
    terminal.type("\x04")
    assert terminal.leave() == 0


def test_compare_strength_think_and_stats(tiny: Path) -> None:
    terminal = Terminal("chat", "-m", str(tiny), "-n", "6", "--seed", "7", columns=40)

    def shown(line: str) -> str:
        terminal.type(line + "\n")
        return terminal.until("\n> ")

    terminal.until("> ")
    shown(" /what is this?")
    answers = shown('/compare @child "it\'s so" -')
    assert re.findall(r"^\[(.*)\]$", answers, re.MULTILINE) == ["@child", "it's so", "-"]
    assert "two preferences or more" in shown("/compare @child") and "a quote is left open" in shown('/compare "a b')
    assert "strength: system 1, pref auto" in shown("/strength pref auto")
    assert "strength: system 1.5, pref auto" in shown("/strength system 1.5")
    assert "thinking: off" in shown("/think off") and "thinking: auto" in shown("/think auto")
    figures = shown("/stats")
    for row in (r"in +\d+ tokens, 0 of them.*", r"out +\d tokens.*", "seed +7", "model +tiny.gguf", "session +none.*"):
        assert re.search(f"^{row}$", figures, re.MULTILINE), row
    terminal.type("\x04")
    assert terminal.leave() == 0


def test_a_conversation_becomes_a_session_and_goes_on_being_one(tiny: Path, tmp_path: Path) -> None:
    terminal = Terminal("chat", "-m", str(tiny), "-n", "6", "--pref", "short")
    terminal.until("> ")
    for line in ("one?", "/pref long", "two?"):
        terminal.type(line + "\n")
        terminal.until("] > ")
    terminal.type("/load work\n")
    terminal.until("no session work")
    terminal.type("/save work\n")
    terminal.until("this is session work from now on")
    terminal.type("three?\n")
    terminal.until("[long] > ")
    terminal.type("/save work\n")
    terminal.until("there is a session work")
    terminal.type(f"/save {tmp_path}/talk.md\n")
    terminal.until("written to")
    terminal.type(f"/save {tmp_path}/talk.md\n")
    terminal.until("exists: name another file")
    terminal.type("/save copy\n")
    terminal.until("this is session copy")
    terminal.type("/load work\n")
    terminal.until("session work: 3 turns")
    terminal.type("/exit\n")
    assert terminal.leave() == 0
    turns = Conversation.read(session_path("work")).turns()
    assert [(turn["query"], turn["user_info"]) for turn in turns] == [
        ("one?", "short"),
        ("two?", "long"),
        ("three?", "long"),
    ]
    assert "> **User Info:** long\n\n> **User Query:** two?" in (tmp_path / "talk.md").read_text()
    assert session_path("copy").read_text() == session_path("work").read_text()


def test_a_session_that_cannot_be_written_is_said_at_each_turn_and_at_the_end(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("METAALIGN_EDGE_DATA", str(tmp_path / "file" / "data"))
    terminal = Terminal("chat", "-m", str(tiny), "-n", "6", "--session", "work", columns=200)
    terminal.until("> ")
    terminal.type("one?\n")
    terminal.until("cannot write the session")
    (tmp_path / "file").unlink()
    terminal.type("two?\n")
    terminal.until("\n> ")
    terminal.until("\n> ")
    assert len(Conversation.read(session_path("work")).turns()) == 2
    session_path("work").unlink()
    (tmp_path / "file" / "data" / "sessions").rmdir()
    (tmp_path / "file" / "data" / "sessions").touch()
    terminal.type("/pref short\n")
    terminal.until("cannot write the session")
    terminal.type("/exit\n")
    assert "cannot write the session" in terminal.rest()
    assert terminal.leave() == 8


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation_and_ctrl_d_leaves(slow: Path) -> None:
    terminal = Terminal("chat", "-m", str(slow), "-ngl", "0", "-n", "8000", "--temp", "0", "-v", "--session", "work")
    terminal.until("> ")
    terminal.type("What is tea?\n")
    terminal.until("reserve took")  # the context is made
    time.sleep(0.5)  # and of the answer, which takes seconds, something has been written
    terminal.type("\x03")
    assert "interrupted" in terminal.until("\n> ")
    while "> " not in terminal.screen:  # between its prompt and its first look at the keyboard, nobody sees the signal
        terminal.type("half a line\x03")
        while terminal.look(0.5):
            pass
    terminal.until("> ")
    (turn,) = Conversation.read(session_path("work")).turns()
    assert turn["finish_reason"] == "interrupted"
    terminal.type("\x04")
    assert terminal.leave() == 0


def test_completion_knows_commands_profiles_and_sessions() -> None:
    assert repl_commands.completions("/p") == [("/pref", 2)] and repl_commands.completions("what /p") == []
    assert repl_commands.completions("/") == [(name, 1) for name in repl_commands.COMMANDS]
    assert ("@child", 3) in repl_commands.completions("/pref @ch") and ("@child", 3) in repl_commands.completions(
        "/again @json+@ch"
    )
    assert ("@expert", 3) in repl_commands.completions("/compare @child @ex") and repl_commands.completions(
        "/nonsense @"
    ) == []
    assert repl_commands.completions("/strength p") == [("pref", 1)] and len(repl_commands.completions("/think ")) == 3
    conversation = Conversation(session_path("garden"))
    conversation.clear()
    conversation.save()
    assert repl_commands.completions("/load g") == [("garden", 1)]


def test_a_screen_shows_the_prompt_and_completes_and_remembers(tiny: Path, tmp_path: Path) -> None:
    arguments = ("chat", "-m", str(tiny), "-n", "6", "--temp", "0", "--pref", "@concise")
    screen = Emulator(*arguments)
    screen.until("[@concise] >")
    screen.type("/stre\t")
    screen.until("> /strength")
    screen.type("\x03")
    screen.until("[@concise] >", times=2)
    screen.type(" secret?\r")
    screen.until("[@concise] >", times=3)
    screen.type("\x1b[200~first line\r\nsecond line\x1b[201~")  # as a terminal pastes from Windows
    assert "first line\n. second line" in screen.until("second line")
    screen.type("\r")
    screen.until("[@concise] >", times=4)
    screen.type("third\x1b\rline\r")
    screen.until("[@concise] >", times=5)
    screen.type("/clear\r")
    screen.until("stays\n[@concise] >")
    screen.type("\x04")
    screen.rest()
    assert screen.leave() == 0
    history = files.data_folder() / "history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert re.findall(
        r"^\+(.*)$", history.read_text(), re.MULTILINE
    ) == "first line|second line|third|line|/clear".split("|")
    again = Emulator(*arguments, columns=20)
    again.until("[@con")
    again.type("\x1b[A\x1b[A")
    again.until("third")
    again.type("\x03")
    again.until("third\n. line\n[@con")
    again.type("\x04")
    again.rest()
    assert again.leave() == 0


def test_a_history_that_cannot_be_kept_is_no_hindrance(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METAALIGN_EDGE_DATA", "/dev/null/data")
    screen = Emulator("chat", "-m", str(tiny), "-n", "6")
    screen.until(">")
    screen.type("tea?\r/stats\r")
    screen.until("begins one\n>")
    screen.type("\x04")
    screen.rest()
    assert screen.leave() == 0


def test_markdown_is_rendered_when_the_answer_is_complete() -> None:
    bullets = ("--temp", "0", "--pref", "@bullets", "What is tea?")
    screen = Emulator("chat", "--markdown", *bullets, lines=12)
    shown = screen.rest()
    assert screen.leave() == 0
    assert " • Tea is a drink" in shown and "- Tea" not in shown and "…" not in shown
    whole = Emulator("chat", "--markdown", "--no-stream", *bullets, lines=12)
    assert whole.rest() == shown and whole.leave() == 0


PIECES = """
import metaalign_edge
from metaalign_edge_commands.terminal.reply import AnswerPrinter
from metaalign_edge_commands.terminal.screen import Screen
printer = AnswerPrinter(Screen(), markdown=True)
for piece in ("- **tea**", "\\n- a \x1b[2Jtrap"):
    printer.show(piece)
    input()
printer.end("- **tea**\\n- a \x1b[2Jtrap")
"""


def test_until_markdown_is_complete_only_a_sign_of_life_is_shown() -> None:
    screen = Emulator("-c", PIECES, program=(sys.executable,))
    assert screen.until("…") == "…\n"
    screen.type("typed meanwhile\n")
    screen.until("typed meanwhile\n")
    assert "tea" not in screen.screen
    screen.type("\n")
    assert screen.rest() == "typed meanwhile\n\n\n • tea\n • a [2Jtrap\n"
    assert screen.leave() == 0


def test_markdown_keeps_what_an_interrupted_answer_had_said(slow: Path) -> None:
    screen = Emulator("chat", "-m", str(slow), "-n", "8000", "--temp", "0", "--markdown", "--session", "work")
    screen.until(">")
    screen.type("tea?\r")
    screen.until("…")
    time.sleep(0.3)
    screen.type("\x03")
    screen.until("\n>", times=2)
    (turn,) = Conversation.read(session_path("work")).turns()
    assert turn["finish_reason"] == "interrupted" and turn["response"].strip()
    assert turn["response"].split()[0] in screen.screen
    screen.type("\x04")
    screen.rest()
    assert screen.leave() == 0


def test_json_is_not_taken_for_markdown() -> None:
    screen = Emulator("chat", "--markdown", "-j", '{"const": "*tea*"}', "What is tea?")
    assert '"*tea*"' in screen.rest() and screen.leave() == 0


@pytest.mark.slow
def test_what_is_typed_meanwhile_does_not_disturb_the_markdown(slow: Path) -> None:
    screen = Emulator("chat", "-m", str(slow), "-n", "60", "--markdown", "--seed", "1")
    screen.until(">")
    screen.type("tea?\r")
    screen.until("tea?\n")
    screen.type("/exit\r")
    shown = screen.rest()
    assert screen.leave() == 0
    assert shown.endswith("\n> /exit\n")


def test_markdown_is_text_on_a_narrow_terminal_and_rendered_on_a_low_one() -> None:
    arguments = ("chat", "--markdown", "--temp", "0", "--pref", "@bullets", "What is tea?")
    narrow = Emulator(*arguments, columns=39)
    assert "•" not in narrow.rest() and "- Tea contains" in narrow.screen
    assert narrow.leave() == 0
    low = Emulator(*arguments, lines=3)
    assert "•" in low.rest() and "- Tea contains" not in low.screen
    assert low.leave() == 0


def test_markdown_is_text_on_a_dumb_terminal_and_in_a_pipe() -> None:
    arguments = ["chat", "--markdown", "--temp", "0", "--pref", "@bullets", "What is tea?"]
    terminal = Terminal(*arguments)
    shown = terminal.rest()
    assert terminal.leave() == 0
    command = [sys.executable, "-m", "metaalign_edge", *arguments]
    piped = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert shown == piped.stdout and shown.startswith("- Tea is")


def test_only_a_conversation_pays_for_the_line_editor(tiny: Path) -> None:
    code = f"import sys, metaalign_edge as e; e.run(['chat', '-m', {str(tiny)!r}, '-n', '1', '--session', 'x', 'tea?']); print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    loaded = set(result.stdout.splitlines()[-1].split())
    assert "metaalign_edge" in loaded and not loaded & {"prompt_toolkit", "readline", "rich.markdown"}


TAKEN = {
    "bar": "progress.answers_bar(screen.Screen(), 'rows', 0, 8)",
    "download": "progress.progress_bar(screen.Screen())",
    "columns": "columns.Columns(['a', 'b'], screen.Screen())",
}


@pytest.mark.parametrize("what", TAKEN)
def test_a_second_ctrl_c_gives_the_terminal_back(what: str) -> None:
    code = f"""
import os, signal
import metaalign_edge
from metaalign_edge_commands.terminal import columns, progress, screen
from metaalign_edge_runtime.llama.interrupt import Interrupt
with Interrupt(), {TAKEN[what]} as taken:
    if hasattr(taken, "show"):
        taken.show(0, "an answer")  # columns are drawn at its first piece
    print("taken", flush=True)
    input()
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
"""
    screen = Emulator("-c", code, program=(sys.executable,))
    screen.until("taken")
    assert screen.glass.cursor.hidden
    screen.type("\n")
    screen.rest()
    assert not screen.glass.cursor.hidden
    assert termios.tcgetattr(screen.process[1])[3] & termios.ECHO
    assert screen.leave() == 130


@pytest.mark.parametrize("word", ["/bye", "/quit", "/exit", "exit", "quit", "exit "])
def test_every_usual_word_leaves(word: str, tiny: Path) -> None:
    terminal = Terminal("chat", "-m", str(tiny), "-n", "2", "--temp", "0")
    terminal.until("> ")
    terminal.type(f" exit\n{word}\n")  # with a space in front, it is a question
    terminal.rest()
    assert terminal.leave() == 0 and terminal.screen.count("\n> ") == 1


def test_what_is_typed_ahead_stays_out_of_the_answer_and_stands_at_the_next_prompt(slow: Path) -> None:
    screen = Emulator("chat", "-m", str(slow), "-ngl", "0", "-n", "40", "--temp", "0")
    screen.until("\n>")
    screen.type("tea?\r")
    while not screen.screen.partition("tea?\n")[2].strip():  # the answer has begun
        screen.look()
    screen.type("one, two")
    shown = screen.until("\n> one, two")
    assert shown.count("one, two") == 1
    screen.type(" and three\r/pref\rfour")  # lines that were ended run one after the other
    shown = screen.until("\n> four")
    assert shown.index("> one, two and three") < shown.index("> /pref\nUser Info: (empty)\n> four")
    screen.type("\x03\x04")
    screen.rest()
    assert screen.leave() == 0


SANE = r"stty -a | grep -o -E -e '-?\b(echo|icanon|icrnl|isig)\b' | sort | tr '\n' ' '; echo modes"


def test_ctrl_z_goes_to_a_shell_with_a_sound_terminal_and_fg_comes_back(slow: Path) -> None:
    shell = Emulator(program=("bash", "--norc", "--noprofile", "-i"))
    shell.type("PS1='shell: '; clear\n")
    shell.until("shell:")
    shell.type(f"{sys.executable} -m metaalign_edge chat -m {slow} -ngl 0 -n 9000 --temp 0\n")
    shell.until("\n>")
    shell.type("half a question\x1a")
    shell.until("Stopped")
    shell.type("clear; fg > /dev/null\n")
    shell.until("> half a question")
    shell.type("?\r")
    while not shell.screen.partition("a question?\n")[2].strip():  # the answer has begun
        shell.look()
    shell.type("typed ahead\x1a")
    shell.until("Stopped")
    shell.type(f"clear; {SANE}\n")
    shell.until("echo icanon icrnl isig modes")
    shell.type("clear; fg > /dev/null\n")
    while "modes" in shell.screen or not shell.screen.strip():  # until the answer goes on
        shell.look()
    shell.type("\x03")
    shell.until("\n>")
    assert "typed ahead" not in shell.screen  # Ctrl-Z forgets it, as Ctrl-C does
    shell.type("/exit\r")
    shell.until("shell:")
    shell.type(f"clear; {SANE}\n")
    shell.until("echo icanon icrnl isig modes")
    shell.type("exit\n")
    shell.rest()
    assert shell.leave() == 0
