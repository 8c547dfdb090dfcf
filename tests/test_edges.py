"""What the world does to a program: files without an end, names that no disk has, no memory, no handles, a kill."""

from __future__ import annotations

import json
import os
import resource
import signal
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.terminal import Terminal

import metaalign_edge as edge
from metaalign_edge_runtime.errors import EdgeError, without_passwords
from metaalign_edge_runtime.stores import files, sessions
from metaalign_edge_runtime.stores.prompt_cache import PromptCache

Run = Callable[..., subprocess.CompletedProcess[str]]
Refuses = Callable[..., str]

LONG = "a" * 256  # no file can have that name


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds all that the program keeps."""
    for name in ("config", "data", "cache"):
        monkeypatch.setenv(f"METAALIGN_EDGE_{name.upper()}", str(tmp_path / "homes" / name))
    return tmp_path / "homes"


# -- files without an end ---------------------------------------------------------------------------------------------


def little_memory() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (1 << 29, 1 << 29))


@pytest.mark.parametrize(
    "command",
    [
        "batch /dev/zero",
        "chat --no-stdin --pref-file /dev/zero hi",
        "chat --no-stdin --system-file /dev/zero hi",
        "render --no-stdin --template /dev/zero hi",
        "chat --no-stdin --json-schema ./zero.json hi",
        "eval --suite /dev/zero",
        "pref add --file /dev/zero zero",
        "pref show endless",
        "render --no-stdin --pref @endless hi",
        "sessions show endless",
        "batch rows.jsonl -o endless",
        "eval --size 1 --answers endless",
    ],
)
def test_a_file_without_an_end_is_refused(command: str, homes: Path, fails: Refuses, tmp_path: Path) -> None:
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "rows.jsonl").write_text('{"query": "hi"}\n')
    for path in (homes / "config/preferences/endless.txt", homes / "data/sessions/endless.jsonl", tmp_path / "endless"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.truncate(path, 1 << 40)
    said = fails(2, *command.split(), cwd=tmp_path, preexec_fn=little_memory)
    assert " has more than " in said and " bytes" in said


def test_a_line_of_stdin_without_an_end_is_refused(homes: Path, fails: Refuses) -> None:
    with open("/dev/zero", "rb") as zero:
        assert "line 1 of stdin has more than" in fails(
            2, "batch", "-", input=None, stdin=zero, preexec_fn=little_memory
        )


def test_settings_without_an_end_are_refused(homes: Path, refuses: Refuses) -> None:
    (homes / "config").mkdir(parents=True)
    (homes / "config/config.toml").touch()
    os.truncate(homes / "config/config.toml", 1 << 40)
    for command in (("config", "show"), ("config", "set", "temp", "1"), ("chat", "--no-stdin", "hi")):
        assert "config.toml has more than" in refuses(2, *command)


def test_a_pipe_in_the_place_of_what_the_program_keeps_holds_nothing_up(homes: Path, refuses: Refuses) -> None:
    pipes = [homes / "config/preferences/me.txt", homes / "data/sessions/talk.jsonl", homes / "cache/states/key.kv"]
    for pipe in pipes:
        pipe.parent.mkdir(parents=True)
        os.mkfifo(pipe)
    assert "it is no file" in refuses(3, "pref", "show", "me")
    assert "it is no file" in refuses(8, "pref", "add", "--force", "me", "Be brief.")
    with pytest.raises(edge.NotFound, match="it is no file"):
        sessions.Conversation.read(pipes[1])
    assert PromptCache().load("key") is None and not pipes[2].exists()


def test_a_profile_that_is_a_link_to_itself_is_said_to_be_one(homes: Path, refuses: Refuses) -> None:
    (homes / "config/preferences").mkdir(parents=True)
    (homes / "config/preferences/me.txt").symlink_to("me.txt")
    assert "links" in refuses(3, "pref", "show", "me") and "links" in refuses(3, "pref", "add", "me", "x")
    assert "it is no file" in refuses(8, "pref", "add", "--force", "me", "x")
    assert edge.run(["pref", "rm", "-q", "me"]) == 0


@pytest.mark.parametrize(
    "code, command",
    [
        (3, f"chat --no-stdin -m ./{LONG} hi"),
        (3, f"chat --no-stdin -m {LONG} hi"),
        (3, f"chat --no-stdin --lora {LONG} hi"),
        (3, f"chat --no-stdin --lora {LONG}:2 hi"),
        (3, f"chat --no-stdin --pref-file {LONG} hi"),
        (3, f"chat --no-stdin --json-schema ./{LONG} hi"),
        (3, f"render --no-stdin --template ./{LONG} hi"),
        (2, f"chat --session {LONG} hi"),
        (3, f"batch {LONG}"),
        (8, f"batch /dev/null -o {LONG}"),
        (3, f"eval --suite {LONG}"),
        (8, f"eval --size 1 --answers {LONG}"),
        (8, f"eval --report {LONG}"),
        (3, f"convert {LONG}"),
        (3, f"models show ./{LONG}"),
        (3, f"config set model {LONG}"),
        (3, "batch ~nobody-of-that-name/x"),
        (3, "eval --suite ~nobody-of-that-name/x"),
    ],
)
def test_a_name_that_no_file_can_have_is_a_file_that_is_not_there(code: int, command: str, refuses: Refuses) -> None:
    assert "metaalign-edge: " in refuses(code, *command.split())


# -- a system without means -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["--help", "chat --help", "help chat", "--version", "config show", "pref list"])
def test_a_full_disk_under_stdout_is_exit_8(command: str, run: Run) -> None:
    with open("/dev/full", "w") as full:
        ended = run(*command.split(), capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 8 and "No space left" in ended.stderr and ended.stderr.count("\n") == 1


def in_need(kind: str, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process to which nothing more of a resource is given."""
    code = f"""
import resource, sys, metaalign_edge as edge
from metaalign_edge_commands import chat, config
edge.library.llama_cpp()
have = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
most = {{"RLIMIT_NOFILE": 3, "RLIMIT_AS": have + (1 << 20)}}["{kind}"]
resource.setrlimit(resource.{kind}, (most, most))
sys.argv[1:] = {command.split()!r}
edge.main()
"""
    return subprocess.run([sys.executable, "-c", code], input="", capture_output=True, text=True, timeout=120)


def test_too_few_file_handles_are_said(homes: Path) -> None:
    (homes / "config").mkdir(parents=True)
    (homes / "config/config.toml").write_text("temp = 0\n")
    ended = in_need("RLIMIT_NOFILE", "chat --no-stdin hi")
    assert (ended.returncode, ended.stdout) == (5, "") and "ulimit -n" in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_too_little_memory_is_said(homes: Path) -> None:
    ended = in_need("RLIMIT_AS", "chat --no-stdin hi")
    assert (ended.returncode, ended.stdout) == (5, "") and "memory" in ended.stderr, ended.stderr
    assert ended.stderr.count("\n") == 1


# -- whose files they are ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o000, 0o277])
def test_what_the_program_keeps_is_for_its_user_alone_under_any_umask(
    umask: int, homes: Path, tiny: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"query": "hi"}\n')
    (tmp_path / "suite.jsonl").write_text('{"query": "hi", "values": ["case.upper"]}\n')
    quick = f"-m {tiny} -n 1 -q"
    for command in (
        "config set temp 0",
        "pref add me brief",
        f"chat {quick} --session talk --no-stdin --system {'tea ' * 40} hi".replace("tea  ", "tea "),
        f"batch rows.jsonl {quick} -o out.jsonl",
        f"eval --suite suite.jsonl {quick}",
    ):
        words = command.split() if "--system" not in command else [
            *f"chat {quick} --session talk --no-stdin --system".split(), "tea " * 40, "hi"
        ]  # fmt: skip
        ended = run(*words, cwd=tmp_path, preexec_fn=lambda: os.umask(umask))
        assert ended.returncode == 0, ended.stderr
    kept = list(homes.rglob("*"))
    assert len([path for path in kept if path.is_file()]) >= 5
    for path in (homes, *kept):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((tmp_path / "out.jsonl").stat().st_mode) == 0o666 & ~umask  # the user's own output


def test_nobody_can_put_a_link_where_something_is_written(homes: Path, refuses: Refuses, tmp_path: Path) -> None:
    seen = set()
    for _ in range(3):
        with files.replacing(tmp_path / "x") as part:
            seen.add(part.name)
    assert len(seen) == 3  # no name to foretell
    (tmp_path / "victim").write_text("mine")
    (homes / "config").mkdir(parents=True)
    (homes / "config/.config.toml.lock").symlink_to(tmp_path / "victim")
    assert "links" in refuses(8, "config", "set", "temp", "1")
    assert (tmp_path / "victim").read_text() == "mine"


def killed(process: subprocess.Popen[str], path: Path, pattern: str) -> None:
    """Kill a process as soon as there is a file of that pattern."""
    while not list(path.rglob(pattern)):
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()


def test_a_killed_editor_leaves_nothing_where_others_may_look(
    homes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    (tmp_path / "editor").write_text('#!/bin/sh\ntouch "$(dirname "$0")/begun"\nexec sleep 60\n')
    (tmp_path / "editor").chmod(0o700)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setenv("EDITOR", str(tmp_path / "editor"))
    process = subprocess.Popen(
        [sys.executable, "-m", "metaalign_edge", "pref", "edit", "concise"], text=True, start_new_session=True
    )
    try:
        killed(process, tmp_path, "begun")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
    assert list((tmp_path / "temporary").iterdir()) == []
    drafts = list((homes / "data/drafts").rglob("*"))
    assert drafts and all(path.stat().st_mode & 0o77 == 0 for path in [homes / "data/drafts", *drafts])


def test_what_a_killed_conversion_left_anywhere_is_removed_by_the_next_one(
    homes: Path, checkpoint: Path, tmp_path: Path, here: Run
) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    code = (
        "import sys, time, pathlib, metaalign_edge\nfrom metaalign_edge_runtime.stores import files\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with files.remembered(path), files.replacing(path, alone=True) as part:\n"
        "    part.write_text('half')\n    time.sleep(60)\n"
    )
    for place in ("one", "other"):
        half = tmp_path / place / "half.gguf"
        process = subprocess.Popen([sys.executable, "-c", code, str(half)], text=True)
        killed(process, half.parent, ".*.metaalign-part")
    assert list((homes / "cache/writing").iterdir()) != []
    done = here(
        "convert", str(checkpoint), "-o", str(tmp_path / "one/tiny.gguf"), "--outtype", "f32", "--no-check", "-q"
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["tiny.gguf"]
    assert list((tmp_path / "other").iterdir()) == list((homes / "cache/writing").iterdir()) == []


# -- passwords --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "HTTPS_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["http", "nonsense"])
@pytest.mark.parametrize(
    "command", ["pull user/repo", "convert user/repo", "doctor --network --json", "chat -m user/repo hi"]
)
def test_a_password_in_an_address_is_never_printed(
    variable: str, scheme: str, command: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    if variable != "HF_ENDPOINT":
        monkeypatch.setenv("HF_ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setenv(variable, f"{scheme}://me:s3cret@127.0.0.1:9")
    ended = run(*command.split())
    assert "s3cret" not in ended.stdout + ended.stderr and "unexpected" not in ended.stderr
    assert ended.returncode == (0 if "doctor" in command else 4) or "doctor" in command


def test_words_that_only_look_like_a_password_stay() -> None:
    assert without_passwords("http://a:b@c.de/x?y=@z and a@b.c") == "http://c.de/x?y=@z and a@b.c"
    assert without_passwords("https://c.de/@user/x") == "https://c.de/@user/x"
    assert "secret" not in str(EdgeError("no https://me:se/cret@host".replace("/cret", "cret")))


# -- a terminal that is given back ------------------------------------------------------------------------------------


def test_a_conversation_ended_from_outside_gives_the_terminal_back(tiny: Path) -> None:
    terminal = Terminal("chat", "-m", str(tiny), "-n", "4", kind="xterm")
    terminal.until("\x1b[?2004h")  # the editor reads: no echo, pasted text in brackets
    os.kill(terminal.process[0], signal.SIGTERM)
    shown = terminal.rest()
    modes = termios.tcgetattr(terminal.process[1])[3]
    assert "\x1b[?25h\x1b[?2004l\x1b[0m" in shown
    assert modes & termios.ECHO and modes & termios.ICANON
    assert terminal.leave() == 128 + signal.SIGTERM


def test_columns_ended_from_outside_show_the_cursor_again(slow: Path) -> None:
    terminal = Terminal(
        "compare", "-m", str(slow), "-n", "4000", "--pref", "a", "--pref", "b", "--no-stdin", "tea?", kind="xterm"
    )
    terminal.until("\x1b[?25l")
    os.kill(terminal.process[0], signal.SIGTERM)
    assert terminal.rest().endswith("\x1b[?25h")
    assert terminal.leave() == 128 + signal.SIGTERM


def test_a_bar_ended_from_outside_shows_the_cursor_again(slow: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "tea?"}) + "\n")
    terminal = Terminal(
        "batch", str(tmp_path / "rows.jsonl"), "-m", str(slow), "-n", "4000", "-o", str(tmp_path / "out"), kind="xterm"
    )
    terminal.until("\x1b[?25l")
    os.kill(terminal.process[0], signal.SIGTERM)
    assert terminal.rest().endswith("\x1b[?25h")
    assert terminal.leave() == 128 + signal.SIGTERM
