"""Conversations that are kept: they go on, whatever became of the process, the disk, or the file."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import metaalign_edge as edge
from metaalign_edge import Dialog, Turn
from metaalign_edge_commands.terminal.repl_state import dialog_of as dialog_of_conversation
from metaalign_edge_runtime.errors import CannotWrite, UsageError
from metaalign_edge_runtime.stores import models, session_text
from metaalign_edge_runtime.stores.sessions import Conversation, session_path

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Ask = Callable[..., dict[str, Any]]
CHAT = [sys.executable, "-m", "metaalign_edge", "chat"]


@pytest.fixture
def ask(tiny: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Ask the tiny model in this process; return the JSON document, with what was said on stderr."""

    def call(*arguments: str, code: int = 0) -> dict[str, Any]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        capfd.readouterr()
        assert edge.run(["chat", "-m", str(tiny), "-n", "4", "--temp", "0", "--json", *arguments]) == code
        out, error = capfd.readouterr()
        return {**json.loads(out), "stderr": error}

    return call


@pytest.fixture
def say(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must succeed, in this process; return its stdout."""

    def call(*arguments: str) -> str:
        capfd.readouterr()
        assert edge.run(arguments) == 0, capfd.readouterr().err
        return capfd.readouterr().out

    return call


def kept(name: str, *turns: tuple[str, str], pref: str = "") -> Path:
    """Write a session as the program does; return its path."""
    conversation = Conversation(session_path(name))
    conversation.set("", pref, session_text.label_of([pref]))
    for query, response in turns:
        conversation.add({"query": query, "response": response, "model": "m.gguf", "finish_reason": "stop"})
    conversation.save()
    return session_path(name)


def dialog_of(name: str) -> Dialog:
    conversation = Conversation.read(session_path(name))
    tiers = conversation.meta_prompt
    return Dialog(tiers["system_info"], tiers["user_info"], tuple(Turn(*pair) for pair in conversation.pairs()))


def test_a_session_goes_on_where_it_was(ask: Ask) -> None:
    first = ask("--session", "work", "What is tea?")
    second = ask("--session", "work", "And coffee?")
    assert (first["session"], second["session"]) == ("work", "work") and "session" not in ask("alone?")
    said = (Turn("What is tea?", first["response"]), Turn("And coffee?", second["response"]))
    assert dialog_of("work") == Dialog(turns=said)
    assert second["input_tokens"] > first["input_tokens"] + 4
    kinds = [json.loads(line)["kind"] for line in session_path("work").read_text().splitlines()]
    assert kinds == ["session", "turn", "turn"]
    figures = json.loads(session_path("work").read_text().splitlines()[-1])
    assert all(
        figures[name] == second[name] for name in ("seed", "finish_reason", "model", "template", "output_tokens")
    )


def test_nobody_else_can_read_it(ask: Ask) -> None:
    before = os.umask(0)
    try:
        ask("--session", "work", "tea?")
    finally:
        os.umask(before)
    path = session_path("work")
    modes = [stat.S_IMODE(one.stat().st_mode) for one in (path, path.parent, path.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]


def test_the_meta_prompt_stays_until_the_command_line_changes_it(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def tiers(*arguments: str) -> tuple[str, str]:
        answer = ask("--session", "work", *arguments, "tea?")
        return answer["system_info"], answer["user_info"]

    assert tiers("--system", "be kind", "--pref", "brief") == ("be kind", "brief")
    assert tiers() == ("be kind", "brief")
    assert tiers("--pref", "long") == ("be kind", "long")
    monkeypatch.setenv("METAALIGN_EDGE_SYSTEM", "of the machine")
    monkeypatch.setenv("METAALIGN_EDGE_PREF", "of the machine")
    assert tiers() == ("be kind", "long")
    assert tiers("--system", "") == ("", "long")
    assert ask("--session", "new", "tea?")["user_info"] == "of the machine"
    lines = [json.loads(line) for line in session_path("work").read_text().splitlines()]
    changes = [(line["system_info"], line["user_info"]) for line in lines if line["kind"] == "meta_prompt"]
    assert changes == [("be kind", "brief"), ("be kind", "long"), ("", "long")]


def test_continue_is_the_session_used_last(ask: Ask, refuses: Callable[..., str]) -> None:
    assert "chat --session NAME` begins one" in refuses(3, "chat", "--continue", "tea?")
    ask("--session", "old", "tea?")
    ask("--session", "new", "tea?")
    assert ask("-C", "tea?")["session"] == "new"
    os.utime(session_path("old"), (time.time() + 9, time.time() + 9))
    assert ask("--continue", "tea?")["session"] == "old"
    assert "give one" in refuses(2, "chat", "-C", "--session", "new", "tea?")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b", "-x", "x\n", "é" * 51, "\udcff", "con", "NUL.x"])
def test_what_is_no_name_is_refused(name: str, refuses: Callable[..., str]) -> None:
    assert "cannot name a session" in refuses(2, "chat", f"--session={name}", "tea?")


def test_another_model_is_said(ask: Ask) -> None:
    kept("work", ("tea?", "leaves"))
    assert "m.gguf answered last; this is tiny.gguf" in ask("--session", "work", "tea?")["stderr"]
    assert ask("--session", "work", "tea?")["stderr"] == ""


def test_a_session_keeps_its_model_until_the_command_line_gives_another(
    tiny: Path, demo: Path, tmp_path: Path, here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*arguments: str) -> tuple[str, str]:
        result = here("chat", "-n", "2", "--temp", "0", "--json", *arguments, "tea?")
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)["model"], result.stderr

    other = shutil.copy(tiny, tmp_path / "other.gguf")
    monkeypatch.chdir(tmp_path)
    assert asked("--session", "work", "-m", "other.gguf") == ("other.gguf", "")
    monkeypatch.chdir("/")
    assert asked("-C") == asked("--session", "work") == ("other.gguf", "")
    monkeypatch.setenv("METAALIGN_EDGE_MODEL", str(tiny))  # of the machine, as its preference is
    assert asked("-C")[0] == "other.gguf" and asked("--session", "new")[0] == tiny.name
    note = f"in this session other.gguf answered last; this is {tiny.name} (-m chooses)"
    name, said = asked("--session", "work", "-m", str(tiny))
    assert name == tiny.name and note in said
    monkeypatch.delenv("METAALIGN_EDGE_MODEL")
    assert asked("--session", "work") == (tiny.name, "")
    assert asked("--session", "work", "-m", str(other))[0] == "other.gguf"
    other.unlink()
    name, said = asked("--session", "work")
    assert name == demo.name and f"other.gguf answered last, and is no longer at {other}; this is {name}" in said
    assert asked("--session", "work", "-q", "-m", str(tiny)) == (tiny.name, "")


def test_a_session_of_the_embedded_model_keeps_that_one(
    tiny: Path, demo: Path, here: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert here("chat", "-n", "2", "--session", "work", "tea?").returncode == 0
    lines = session_path("work").read_text()
    assert here("config", "set", "model", str(tiny)).returncode == 0
    for written in (
        lines,
        lines.replace(str(demo.parent), "/an/older/installation"),
        re.sub(r', "model_path": "[^"]*"', "", lines),
    ):
        session_path("work").write_text(written)
        result = here("chat", "-n", "2", "--json", "-C", "tea?")
        assert (json.loads(result.stdout)["model"], result.stderr) == (demo.name, "")
    assert json.loads(here("chat", "-n", "2", "--json", "--session", "new", "tea?").stdout)["model"] == tiny.name


def test_a_model_of_the_hub_is_still_there_when_its_repository_has_a_newer_version(tiny: Path, tmp_path: Path) -> None:
    snapshots = tmp_path / "hub" / "hub" / "models--me--tiny" / "snapshots"
    for version, name in (("new", "tiny-Q8_0.gguf"), ("new", "tiny-Q4_0.gguf")):
        (snapshots / version).mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny, snapshots / version / name)
    assert models.still_there(snapshots / "old" / "tiny-Q4_0.gguf") == snapshots / "new" / "tiny-Q4_0.gguf"
    assert models.still_there(snapshots / "old" / "tiny-Q2_K.gguf") is None
    assert models.still_there(Path(tiny.name)) is None  # a name alone could be any file of the working folder


def test_answers_are_kept_where_settings_say_so_and_continue_goes_on_after_any(
    here: Run, tiny: Path, say: Callable[..., str]
) -> None:
    def asked(*arguments: str) -> dict[str, Any]:
        return dict(json.loads(here("chat", "-m", str(tiny), "-n", "2", "--temp", "0", "--json", *arguments).stdout))

    assert "session" not in asked("tea?") and "config set log true" in here("chat", "-C", "tea?").stderr
    say("config", "set", "log", "true")
    first, second = asked("--pref", "short", "What is tea?"), asked("What is bread?")
    assert re.fullmatch(r"log-\d{8}-\d{6}-[0-9a-f]{4}", first["session"]) and first["session"] != second["session"]
    again = asked("-C", "And salt?")
    assert again["session"] == second["session"]
    assert dialog_of(second["session"]).turns[0] == Turn("What is bread?", second["response"])
    assert len(dialog_of(second["session"]).turns) == 2 and dialog_of(first["session"]).user_info == "short"
    assert asked("--session", "work", "tea?")["session"] == "work" and "session" not in asked("--no-log", "tea?")
    assert here("chat", "-m", str(tiny), "-c", "16", "a question that does not fit").returncode == 6
    assert len(json.loads(say("sessions", "list", "--json"))) == 3
    assert say("config", "get", "log") == "true\n"


def test_what_was_said_is_found_in_all_sessions(
    here: Run, say: Callable[..., str], refuses: Callable[..., str], tmp_path: Path
) -> None:
    kept(
        "garden",
        ("When do I sow\npeas?", "In spring.  " + "x" * 99 + " Then sow PEAS [again]. " + "y" * 99),
        ("And?", "No."),
    )
    kept("soup", ("Which soup?", "Pea soup, of dried peas."), pref="peas")
    os.utime(session_path("garden"), (time.time() + 9, time.time() + 9))
    found = json.loads(say("sessions", "search", "Peas", "--json"))
    assert [(row["session"], row["turn"], row["tier"]) for row in found] == [
        ("garden", 1, "query"),
        ("soup", 1, "response"),
    ]
    assert found[0]["excerpt"] == "When do I sow peas?" and found[0]["at"].endswith("Z")
    assert json.loads(say("sessions", "search", "sow  peas", "--json"))[0]["turn"] == 1  # over the end of a line
    (row,) = json.loads(say("sessions", "search", "[AGAIN].", "--json"))  # no pattern but a text
    assert row["excerpt"] == "…" + "x" * 15 + " Then sow PEAS [again]. " + "y" * 29 + "…"
    table = say("sessions", "search", "no").splitlines()
    assert table[0].split() == ["session", "turn", "text"] and table[1].split() == ["garden", "2", "No."]
    session_path("bad").write_text("{}\n")
    nothing = here("sessions", "search", "nowhere")
    assert (nothing.returncode, nothing.stdout) == (0, "") and "no session has 'nowhere'" in nothing.stderr
    assert "bad.jsonl does not begin with the header" in nothing.stderr
    assert json.loads(here("sessions", "search", "nowhere", "--json").stdout) == []
    assert "empty" in refuses(2, "sessions", "search", " ")


def test_a_line_torn_off_at_any_byte_is_cut_and_the_session_goes_on() -> None:
    path = kept("work", ("one?", "1"), ("tŵo?", "2"))
    data = path.read_bytes()
    begins = data.rindex(b"\n", 0, -1) + 1
    for end in range(begins, len(data) + 1):
        path.write_bytes(data[:end])
        conversation = Conversation.read(path)
        whole = end >= len(data) - 1  # without its newline, too: so an editor may leave it
        assert [turn["query"] for turn in conversation.turns()] == ["one?", "tŵo?"][: 1 + whole]
        conversation.add({"query": "three?", "response": "3"})
        conversation.save()
        assert path.read_bytes().startswith(data if whole else data[:begins])
        assert [turn.query for turn in dialog_of("work").turns] == ["one?", "tŵo?", "three?"][:: 1 if whole else 2]


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_header_torn_off_is_written_anew(cut: int) -> None:
    path = kept("work", ("one?", "1"))
    path.write_bytes(path.read_bytes()[:cut])
    kept("work", ("two?", "2"))
    assert dialog_of("work").turns == (Turn("two?", "2"),)


@pytest.mark.parametrize(
    "spoilt, why",
    [
        (b'{"kind": "turn", "que', "Unterminated string"),
        (b"[1, 2]", "no JSON object"),
        (b'{"kind": "turn", "query": "x"}', "its response is no text"),
        (b'{"kind": "meta_prompt", "system_info": 1, "user_info": ""}', "its system_info is no text"),
        (b'{"kind": "turn", "query": "\\ud800", "response": ""}', "surrogates not allowed"),
        (b'{"kind": "\xff"}', "invalid start byte"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_line_spoilt_by_hand_is_named_and_nothing_is_lost(
    spoilt: bytes, why: str, refuses: Callable[..., str]
) -> None:
    path = kept("work", ("one?", "1"), ("two?", "2"))
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(2, spoilt + b"\n")
    path.write_bytes(b"".join(lines))
    line = refuses(2, "chat", "--session", "work", "tea?")
    assert f"line 3 of the session {path} is spoilt" in line and why in line and "mend or delete that line" in line
    assert path.read_bytes() == b"".join(lines)
    del lines[2]
    path.write_bytes(b"".join(lines))
    assert len(dialog_of("work").turns) == 2


def test_what_an_editor_on_windows_makes_of_it_can_be_read() -> None:
    path = kept("work", ("one?", "1"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + b"\r\n")
    assert dialog_of("work").turns == (Turn("one?", "1"),)


def test_unknown_fields_and_kinds_are_left_alone() -> None:
    path = kept("work", ("one?", "1"))
    more = b'{"kind": "weather", "rain": true}\n{"kind": "turn", "query": "two?", "response": "2", "mood": "good"}\n'
    path.write_bytes(data := path.read_bytes() + more)
    conversation = Conversation.read(path)
    conversation.add({"query": "three?", "response": "3"}, again=True)  # in the place of one that has no id
    conversation.save()
    assert [turn.query for turn in dialog_of("work").turns] == ["one?", "three?"]
    assert path.read_bytes().startswith(data)


def test_a_newer_programs_session_and_another_file_are_refused() -> None:
    path = kept("work", ("one?", "1"))
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(UsageError, match="update this program"):
        Conversation.read(path)
    path.write_text('{"index": 0}\n')
    with pytest.raises(UsageError, match="does not begin with the header"):
        Conversation.read(path)


WRITER = """
import sys, metaalign_edge
from metaalign_edge_runtime.stores import sessions
name, who, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
conversation = sessions.Conversation.read(sessions.session_path(name))
print("ready", flush=True)
for number in range(count):
    conversation.set("", who, who)
    conversation.add({"query": f"{who} {number}", "response": "x" * 20000})
    conversation.save()
"""


def writer(name: str, who: str, count: int) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", WRITER, name, who, str(count)], stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def test_two_processes_write_whole_lines_and_each_turn_keeps_its_meta_prompt() -> None:
    both = [writer("work", who, 30) for who in ("anna", "bert")]  # one of them begins it
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    conversation = Conversation.read(session_path("work"))
    turns = conversation.turns()
    for who in ("anna", "bert"):
        mine = [turn for turn in turns if turn["query"].startswith(who)]
        assert [turn["query"] for turn in mine] == [f"{who} {number}" for number in range(30)]
        assert {turn["user_info"] for turn in mine} == {who}
    assert len(turns) == 60 and [line["kind"] for line in conversation.lines].count("session") == 1


def test_two_that_begin_a_session_share_it() -> None:
    path = session_path("work")
    anna, bert = Conversation.read(path), Conversation.read(path)
    anna.set("", "brief", "")
    for one in (anna, bert, anna):
        one.add({"query": "?", "response": "!"})
        one.save()
    assert [turn["user_info"] for turn in Conversation.read(path).turns()] == ["brief", "", "brief"]
    assert path.read_text().count('"session"') == 1


def test_killed_at_any_moment_it_has_all_that_was_finished() -> None:
    said = 0
    for round in range(4):
        process = writer("work", "anna", 100_000)
        time.sleep(0.02 + 0.017 * round)
        process.send_signal(signal.SIGKILL)
        process.wait()
        turns = Conversation.read(session_path("work")).turns()
        mine = [turn["query"] for turn in turns[said:]]
        assert mine == [f"anna {number}" for number in range(len(mine))]
        said = len(turns)
    assert said


@pytest.mark.parametrize("room", [0, 1, 200])
def test_a_full_disk_is_exit_8_after_the_answer_and_what_was_there_stays(room: int, tiny: Path) -> None:
    path = kept("work", ("one?", "1"))
    before = path.read_bytes()

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + room,) * 2)

    command = [*CHAT, "-m", str(tiny), "-n", "4", "--seed", "1", "--no-cache", "-q", "--session", "work", "tea?"]
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, preexec_fn=full, timeout=60
    )
    assert result.returncode == 8 and len(result.stdout) > 1
    assert result.stderr.startswith(
        f"metaalign-edge: cannot write the session {path}: File too large (METAALIGN_EDGE_DATA"
    )
    assert path.read_bytes() == before
    kept_on = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert (kept_on.returncode, kept_on.stdout) == (0, result.stdout)


@pytest.mark.parametrize("folder", ["/proc/nowhere", "/dev/null/nowhere"])
def test_where_nothing_can_be_written_the_answer_comes_first(
    folder: str, ask: Ask, monkeypatch: pytest.MonkeyPatch, refuses: Callable[..., str]
) -> None:
    monkeypatch.setenv("METAALIGN_EDGE_DATA", folder)
    answer = ask("--session", "work", "tea?", code=8)
    assert (
        answer["response"]
        and answer["stderr"].count("\n") == 1
        and f"cannot write the session {folder}" in answer["stderr"]
    )
    refuses(3, "sessions", "show", "work")


def test_what_could_not_be_written_is_written_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    conversation = Conversation(blocked / "sessions" / "work.jsonl")
    conversation.add({"query": "one?", "response": "1"})
    with pytest.raises(CannotWrite):
        conversation.save()
    blocked.unlink()
    conversation.add({"query": "two?", "response": "2"})
    conversation.save()
    assert len(Conversation.read(conversation.path).turns()) == 2  # type: ignore[arg-type]


def test_a_session_removed_meanwhile_is_written_whole() -> None:
    path = kept("work", ("one?", "1"))
    conversation = Conversation.read(path)
    path.unlink()
    conversation.add({"query": "two?", "response": "2"})
    conversation.save()
    assert [turn.query for turn in dialog_of("work").turns] == ["one?", "two?"]


def test_what_does_not_fit_is_dropped_from_the_prompt_and_said_but_not_from_the_session(ask: Ask) -> None:
    kept("work", *[(f"what is number {number}", "a fox and a dog " * 4) for number in range(12)], pref="short please")
    answer = ask("--session", "work", "-c", "256", "And now?")
    assert 0 < answer["truncated"] < 12
    assert f"{answer['truncated']} of the oldest turns dropped" in answer["stderr"]
    assert answer["user_info"] == "short please" and len(dialog_of("work").turns) == 13


def test_the_turns_that_were_cleared_or_replaced_are_not_in_the_prompt() -> None:
    kept("work", ("one?", "1"), ("two?", "2"))
    conversation = Conversation.read(session_path("work"))
    conversation.add({"query": "two?", "response": "II"}, again=True)
    assert dialog_of_conversation(conversation, "three?").turns == (
        Turn("one?", "1"),
        Turn("two?", "II"),
        Turn("three?"),
    )
    assert dialog_of_conversation(conversation, "two?", again=True).turns == (Turn("one?", "1"), Turn("two?"))
    conversation.clear()
    conversation.add({"query": "four?", "response": "4"})
    conversation.save()
    assert dialog_of("work").turns == (Turn("four?", "4"),)
    assert [turn["forgotten"] for turn in Conversation.read(session_path("work")).turns()] == [True, True, False]


def test_sessions_are_listed_shown_and_exported_with_preferences_where_they_changed(
    say: Callable[..., str], refuses: Callable[..., str], tmp_path: Path
) -> None:
    path = kept("work", ("one?", "1"), pref="@concise")
    conversation = Conversation.read(path)
    conversation.set("be kind", "two\nlines", "two lines")
    conversation.add({"query": "two\nor three?", "response": "2\n", "finish_reason": "interrupted"})
    conversation.clear()
    conversation.add({"query": "four?", "response": "4", "model": "n.gguf"})
    conversation.save()
    text = say("sessions", "show", "work")
    assert text == (
        "User Info: @concise\n\n> one?\n1\n\nSystem Info: be kind\n\nUser Info: two\nlines\n\n> two\nor three?\n"
        "2 (interrupted)\n\nWhat was said up to here was forgotten.\n\n> four?\n4\n"
    )
    markdown = say("sessions", "export", "work")
    assert markdown.startswith(
        "# work\n\n> **User Info:** @concise\n\n> **User Query:** one?\n\n1\n\n> **System Info:** be kind"
    )
    assert "> **User Info:** two\n> lines\n\n> **User Query:** two\n> or three?\n\n2 (interrupted)\n\n---\n" in markdown
    document = json.loads(say("sessions", "show", "work", "--json"))
    assert document == json.loads(say("sessions", "export", "work", "--format", "json"))
    assert [turn["user_info"] for turn in document["turns"]] == ["@concise", "two\nlines", "two\nlines"]
    out = tmp_path / "work.json"
    say("sessions", "export", "work", "-o", str(out))
    assert json.loads(out.read_text()) == document
    assert "--force" in refuses(2, "sessions", "export", "work", "-o", str(out))
    say("sessions", "export", "work", "-o", str(out), "--format", "md", "--force")
    assert out.read_text() == markdown
    assert "cannot write" in refuses(8, "sessions", "export", "work", "-o", str(tmp_path / "none" / "work.md"))
    assert "md or json" in refuses(2, "sessions", "export", "work", "--format", "pdf")
    (row,) = json.loads(say("sessions", "list", "--json"))
    assert (row["name"], row["turns"], row["model"], row["preference"]) == ("work", 3, "n.gguf", "two lines")
    assert row["first"] <= row["last"] and row["error"] is None


def test_a_spoilt_session_does_not_hide_the_others(say: Callable[..., str]) -> None:
    kept("good", ("one?", "1"))
    kept("bad", ("one?", "1")).write_text("nonsense\n")
    rows = {row["name"]: row for row in json.loads(say("sessions", "list", "--json"))}
    assert rows["good"]["turns"] == 1 and "line 1" in rows["bad"]["error"] and rows["bad"]["turns"] is None
    table = say("sessions", "list")
    assert "is spoilt" in table and table.splitlines()[0].split() == "session turns last used preference".split()


def test_sessions_are_removed_all_or_none(say: Callable[..., str], refuses: Callable[..., str]) -> None:
    paths = [kept(name, ("one?", "1")) for name in ("a", "b", "c")]
    assert "no session nobody" in refuses(3, "sessions", "rm", "a", "nobody")
    assert all(path.exists() for path in paths)
    say("sessions", "rm", "a", "b", "a")
    assert [path.exists() for path in paths] == [False, False, True]
    assert sorted(path.name for path in paths[0].parent.iterdir()) == ["c.jsonl"]
    assert "there are c" in refuses(3, "sessions", "show", "a")
    paths[2].unlink()
    assert say("sessions", "list") == "" and say("sessions", "list", "--json").strip() == "[]"
    assert "none yet" in refuses(3, "sessions", "export", "a")


@pytest.mark.slow
def test_ctrl_c_and_a_closed_pipe_keep_what_was_said(slow: Path) -> None:
    for number, end in enumerate(("signal", "pipe"), 1):
        process = subprocess.Popen(
            [*CHAT, "-m", str(slow), "-n", "8000", "--temp", "0", "--session", "work", "tea?"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert process.stdout
        said = process.stdout.read(20)
        if end == "signal":
            process.send_signal(signal.SIGINT)
            said += process.stdout.read()
        process.stdout.close()
        assert process.wait(timeout=30) == (130 if end == "signal" else 0)
        turn = Conversation.read(session_path("work")).turns()[-1]
        assert (turn["query"], turn["finish_reason"]) == ("tea?", "interrupted")
        assert turn["response"].encode().startswith(said.removesuffix(b"\n"))
        assert len(dialog_of("work").turns) == number


@pytest.mark.slow
def test_a_later_call_goes_on_from_the_state_on_the_disk(slow: Path, run: Run) -> None:
    def ask(query: str) -> dict[str, Any]:
        arguments = ("chat", "-m", str(slow), "-n", "8", "--temp", "0", "--json", "--session", "work", query)
        return dict(json.loads(run(*arguments, "--pref", "a fox and a dog " * 20).stdout))

    first, second, third = ask("one?"), ask("two?"), ask("three?")
    assert first["cached_tokens"] == 0
    assert 0 < second["cached_tokens"] < first["input_tokens"]  # the meta-prompt
    assert third["cached_tokens"] > first["input_tokens"]  # and the first turn
