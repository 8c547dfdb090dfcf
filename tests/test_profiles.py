"""Preferences with a name: text files of the user's own, beside the built-in ones, and those that stand."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.terminal import Terminal

import metaalign_edge as edge
from metaalign_edge_runtime.stores import config, profiles
from metaalign_edge_runtime.stores.config import PROJECT_KEYS

Says = Callable[..., tuple[str, str]]
Refuses = Callable[..., str]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's configuration."""
    monkeypatch.setenv("METAALIGN_EDGE_CONFIG", str(tmp_path / "config"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # where drafts stay
    return tmp_path / "config"


@pytest.fixture
def user_info(says: Says, tiny: Path) -> Callable[..., str]:
    """Return User Info as `render` has it under some options."""

    def rendered(*arguments: str) -> str:
        out, _ = says("render", "-m", str(tiny), *arguments, "tea?")
        return out.partition("<|user_info|>")[2].partition("<|end|>")[0]

    return rendered


def test_a_profile_comes_from_an_argument_a_file_or_a_pipe_and_is_a_text_file(
    says: Says, user_info: Callable[..., str], folder: Path, tmp_path: Path
) -> None:
    assert "--pref @brief" in says("pref", "add", "brief", "Two sentences.")[1]
    (tmp_path / "me.txt").write_bytes(b"\xef\xbb\xbfI live in Rome.\r\nI cook.\r\n")
    says("pref", "add", "@me", "--file", str(tmp_path / "me.txt"), "-q")
    says("pref", "add", "-q", "mood.2", stdin=b"\n  Be merry. \n\n")
    assert (folder / "preferences" / "brief.txt").read_bytes() == b"Two sentences.\n"
    assert says("pref", "show", "@me") == ("I live in Rome.\nI cook.\n", "")
    assert user_info("--pref", "@mood.2+@concise", "--pref", "@brief") == (
        "Be merry.\nAnswer in one sentence.\nTwo sentences."
    )
    if os.name != "nt":
        assert (folder / "preferences").stat().st_mode & 0o77 == 0


def test_a_file_written_by_hand_is_a_profile(says: Says, user_info: Callable[..., str], folder: Path) -> None:
    (folder / "preferences").mkdir(parents=True)
    (folder / "preferences" / "Rome.txt").write_bytes(b"\xef\xbb\xbfI live in Rome.\r\nI cook.\r\n")
    (folder / "preferences" / ".hidden.txt").write_text("no")
    (folder / "preferences" / "Rome.txt~").write_text("no")
    assert user_info("--pref", "@Rome") == "I live in Rome.\nI cook."
    assert [one["name"] for one in json.loads(says("pref", "list", "--json")[0]) if one["own"]] == ["Rome"]


def test_an_own_profile_wins_over_a_built_in_one_and_the_list_says_so(
    says: Says, user_info: Callable[..., str]
) -> None:
    says("pref", "add", "concise", "One word.")
    says("pref", "add", "brief", "Two sentences.")
    says("pref", "default", "brief")
    assert user_info("--pref", "@concise") == "One word."
    table = [line.split() for line in says("pref", "list")[0].splitlines()]
    assert ["@concise", "own,", "wins", "One", "word."] in table
    assert ["*", "@brief", "own", "Two", "sentences."] in table
    assert ["@json", "built-in", "Return", "JSON."] in table
    found = {one.pop("name"): one for one in json.loads(says("pref", "list", "--json")[0])}
    assert found["concise"] == {"text": "One word.", "own": True, "built_in": True, "default": False}
    assert found["json"] == {"text": "Return JSON.", "own": False, "built_in": True, "default": False}
    shown = json.loads(says("pref", "show", "brief", "--json")[0])
    assert shown == {"name": "brief", "text": "Two sentences.", "own": True, "built_in": False, "default": True}
    says("pref", "rm", "concise")
    assert user_info("--pref", "@concise") == "Answer in one sentence."


@pytest.mark.parametrize(
    "name", ["", "@", "a/b", "../up", "a\\b", ".hidden", "-x", "a b", "a+b", "a:b", "con", "NUL.txt", "x" * 51, "a\n"]
)
def test_a_name_that_a_file_cannot_have_everywhere_is_exit_2(name: str, refuses: Refuses, folder: Path) -> None:
    assert "cannot name a profile" in refuses(2, "pref", "add", "--", name, "text")
    assert not list(folder.rglob("*.txt"))


def test_names_that_differ_only_in_case_would_be_one_file_on_some_systems(says: Says, refuses: Refuses) -> None:
    says("pref", "add", "Brief", "Two sentences.")
    assert "@Brief" in refuses(2, "pref", "add", "brief", "x", "--force")
    assert "@concise" in refuses(2, "pref", "add", "Concise", "x")
    assert "@concise" in refuses(3, "pref", "show", "CONCISE")


def test_a_profile_that_exists_is_kept_unless_forced(says: Says, refuses: Refuses) -> None:
    says("pref", "add", "brief", "Two sentences.")
    assert "--force" in refuses(2, "pref", "add", "brief", "One.")
    assert says("pref", "show", "brief")[0] == "Two sentences.\n"
    says("pref", "add", "--force", "brief", "One.")
    assert says("pref", "show", "brief")[0] == "One.\n"


def test_a_text_that_is_none_is_refused(refuses: Refuses, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "empty" in refuses(2, "pref", "add", "x", "")
    assert "empty" in refuses(2, "pref", "add", "x", "--file", str(tmp_path / "empty.txt"))
    assert "UTF-8" in refuses(2, "pref", "add", "x", "--file", str(tmp_path / "latin.txt"))
    assert "UTF-8" in refuses(2, "pref", "add", "x", "caf\udce9")
    assert "nowhere.txt" in refuses(3, "pref", "add", "x", "--file", "nowhere.txt")
    assert "choose one" in refuses(2, "pref", "add", "x", "text", "--file", "nowhere.txt")
    assert "pipe" in refuses(2, "pref", "add", "x")


def test_a_profile_emptied_or_recoded_by_hand_is_named_and_the_others_are_listed(
    says: Says, refuses: Refuses, folder: Path
) -> None:
    (folder / "preferences").mkdir(parents=True)
    (folder / "preferences" / "void.txt").write_text("\n")
    (folder / "preferences" / "latin.txt").write_bytes(b"caf\xe9")
    assert "pref edit void" in refuses(2, "render", "--pref", "@void", "tea?")
    assert "latin.txt is not UTF-8" in refuses(2, "render", "--pref", "@latin", "tea?")
    out, error = says("pref", "list")
    says("pref", "add", "--force", "-q", "latin", "caf\xe9")
    assert says("pref", "show", "latin")[0] == "caf\xe9\n"
    assert "@concise" in out and "void.txt is empty" in error and "latin.txt is not UTF-8" in error


def test_the_nearest_names_of_one_that_is_not_there_are_said(says: Says, refuses: Refuses, tmp_path: Path) -> None:
    says("pref", "add", "my-tone", "Be merry.")
    assert refuses(3, "render", "--pref", "@my-tune", "tea?").endswith("@my-tune: do you mean @my-tone?\n")
    assert "@concise" in refuses(3, "pref", "edit", "concice")
    assert "pref list" in refuses(3, "pref", "show", "qqqq")
    (tmp_path / "rows.jsonl").write_text('{"query": "tea?", "pref": "@my-tune"}\n')
    assert edge.run(["batch", str(tmp_path / "rows.jsonl"), "-o", str(tmp_path / "out.jsonl")]) == 1
    assert "do you mean @my-tone?" in (tmp_path / "out.jsonl").read_text()


def test_rm_removes_own_profiles_all_or_none(says: Says, refuses: Refuses, folder: Path) -> None:
    for name in ("a", "b", "stands"):
        says("pref", "add", name, "text")
    says("pref", "default", "stands")
    assert "built in" in refuses(2, "pref", "rm", "a", "json")
    assert "do you mean @b?" in refuses(3, "pref", "rm", "a", "B")
    assert "pref default" in refuses(2, "pref", "rm", "a", "stands")
    assert "name the profiles" in refuses(2, "pref", "rm")
    assert profiles.own_profiles() == ["a", "b", "stands"]
    assert "@a, @b removed" in says("pref", "rm", "@a", "b", "a")[1]
    assert profiles.own_profiles() == ["stands"]


def editor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let $EDITOR be a program with arguments that does this to the text, and to the path of the draft."""
    program = tmp_path / "an editor.py"
    program.write_text(
        f"import sys\nfrom pathlib import Path\npath = Path(sys.argv[2])\ntext = path.read_text()\n{code}\n"
    )
    monkeypatch.setenv("EDITOR", f"'{sys.executable}' '{program}' --wait")


def test_edit_changes_a_profile_and_makes_a_built_in_one_ones_own(
    says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says("pref", "add", "brief", "Two sentences.")
    editor(tmp_path, monkeypatch, "path.write_text(text.replace('sentence', 'word') + '\\n')")
    assert says("pref", "edit", "brief") == ("", "@brief is changed\n")
    assert says("pref", "show", "brief")[0] == "Two words.\n"
    says("pref", "edit", "-q", "concise")
    assert says("pref", "show", "concise")[0] == "Answer in one word.\n"


@pytest.mark.parametrize("code, said", [("", "unchanged"), ("path.write_text(' \\n')", "empty")])
def test_edit_keeps_the_text_if_it_is_unchanged_or_emptied(
    code: str, said: str, says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says("pref", "add", "brief", "Two sentences.")
    editor(tmp_path, monkeypatch, code)
    assert said in says("pref", "edit", "brief")[1]
    assert says("pref", "show", "brief")[0] == "Two sentences.\n"


def test_edit_loses_nothing_if_the_editor_or_another_process_interferes(
    says: Says, refuses: Refuses, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    says("pref", "add", "brief", "Two sentences.")
    theirs = folder / "preferences" / "brief.txt"
    editor(tmp_path, monkeypatch, f"path.write_text('Mine.'); Path({str(theirs)!r}).write_text('Theirs.')")
    line = refuses(2, "pref", "edit", "brief")
    assert Path(line.split()[-1]).read_text() == "Mine." and theirs.read_text() == "Theirs."
    editor(tmp_path, monkeypatch, "path.write_text('Mine.'); sys.exit(3)")
    line = refuses(1, "pref", "edit", "brief")
    assert Path(line.split()[-1]).read_text() == "Mine." and theirs.read_text() == "Theirs."
    monkeypatch.setenv("EDITOR", "no-such-editor")
    assert "set VISUAL or EDITOR" in refuses(2, "pref", "edit", "brief")
    monkeypatch.setenv("EDITOR", "an 'open quote")
    assert "set VISUAL or EDITOR" in refuses(2, "pref", "edit", "brief")
    monkeypatch.delenv("EDITOR")
    assert "pref add --force" in refuses(2, "pref", "edit", "brief")  # and no vi that waits for a terminal


def test_a_default_applies_to_render_chat_batch_and_the_conversation(
    says: Says, user_info: Callable[..., str], tiny: Path, tmp_path: Path
) -> None:
    says("pref", "add", "rome", "I live in Rome.")
    assert says("pref", "default") == (
        "",
        "no preference applies by default: `metaalign-edge pref default NAME` chooses one\n",
    )
    assert says("pref", "default", "rome", "@concise") == ("", "")
    assert says("pref", "default", "--json")[0] == '["@rome", "@concise"]\n'
    assert says("pref", "default")[0] == "@rome\n@concise\n"
    both = "I live in Rome.\nAnswer in one sentence."
    assert user_info() == both
    out, error = says("chat", "-m", str(tiny), "-n", "1", "--json", "-v", "tea?")
    assert json.loads(out)["user_info"] == both
    assert f"pref: @rome, @concise (from {config.config_file()})\n" in error
    (tmp_path / "rows.jsonl").write_text('{"query": "tea?"}\n{"query": "tea?", "pref": "@caps"}\n')
    rows = says("batch", "-m", str(tiny), "-n", "1", str(tmp_path / "rows.jsonl"))[0].splitlines()
    assert [json.loads(row)["user_info"] for row in rows] == [both, "Write everything in capital letters."]
    terminal = Terminal("chat", "-m", str(tiny), "-n", "1")
    terminal.until("> ")
    terminal.type("/pref\n")
    terminal.until("User Info: I live in Rome.")
    terminal.type("/exit\n")
    assert terminal.leave() == 0
    says("pref", "default", "--none")
    assert user_info() == ""


def test_what_is_asked_for_replaces_what_stands(
    says: Says, user_info: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says("pref", "default", "concise")
    (tmp_path / "pref.txt").write_text("from a file\n")
    assert user_info("--no-pref") == ""
    assert user_info("--pref", "asked") == "asked"
    assert user_info("--pref", "asked", "--no-pref") == "asked"
    assert user_info("--pref-file", str(tmp_path / "pref.txt")) == "from a file"
    monkeypatch.setenv("METAALIGN_EDGE_PREF", "two words, and @json")
    assert user_info() == "two words, and @json"
    assert user_info("--no-pref") == "" and user_info("--pref", "asked") == "asked"
    assert "METAALIGN_EDGE_PREF comes before it" in says("pref", "default", "json")[1]
    assert says("pref", "default") == ("two words, and @json\n", "from METAALIGN_EDGE_PREF\n")


def test_the_columns_of_compare_are_those_that_are_asked_for(says: Says, refuses: Refuses, tiny: Path) -> None:
    says("pref", "default", "concise")
    out, _ = says("compare", "-m", str(tiny), "-n", "1", "--json", "--pref", "-", "--pref", "@json", "tea?")
    assert [column["user_info"] for column in json.loads(out)] == ["", "Return JSON."]
    assert "two preferences" in refuses(2, "compare", "tea?")


def test_a_default_that_makes_no_sense_is_refused(says: Says, refuses: Refuses) -> None:
    assert "do you mean @concise?" in refuses(3, "pref", "default", "concize")
    assert "choose one" in refuses(2, "pref", "default", "--none", "concise")
    config.store_setting("pref", "@gone")
    assert refuses(3, "render", "tea?").startswith(
        f"metaalign-edge: {config.config_file()}: pref: no preference profile"
    )
    says("render", "--no-pref", "tea?")
    says("render", "--pref", "x", "tea?")


def add_some(start: int) -> None:
    for number in range(start, start + 8):
        profiles.store_profile(f"p{number}", f"text {number}")
        config.store_setting(PROJECT_KEYS[start // 8], f"{number}")


def test_processes_at_once_lose_nothing(folder: Path) -> None:
    fork = multiprocessing.get_context("fork" if os.name != "nt" else "spawn")
    processes = [fork.Process(target=add_some, args=(start,)) for start in (0, 8, 16)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert profiles.own_profiles() == sorted(f"p{number}" for number in range(24))
    assert config.read_toml(config.config_file()) == {"system": "7", "pref": "15", "model": "23"}
    assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".txt", ".toml", ".lock"}


@pytest.mark.parametrize("arguments", [
    ("pref", "add", "x", "text"), ("pref", "default", "concise"), ("config", "set", "temp", "0.5"),
    ("config", "unset", "temp"),
])  # fmt: skip
def test_without_a_home_all_can_be_read_and_what_cannot_be_written_is_exit_8(
    arguments: tuple[str, ...], says: Says, refuses: Refuses, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAALIGN_EDGE_CONFIG", "/dev/null/metaalign-edge")  # as where there is no home
    monkeypatch.setenv("METAALIGN_EDGE_DATA", "/dev/null/metaalign-edge")
    assert "METAALIGN_EDGE_CONFIG" in refuses(8, *arguments)
    says("render", "-m", str(tiny), "--pref", "@concise", "tea?")
    assert "@concise" in says("pref", "list")[0]
    assert "/dev/null/metaalign-edge" in says("paths")[0]


def test_a_full_disk_is_exit_8_and_keeps_what_was_there(says: Says, refuses: Refuses, folder: Path) -> None:
    says("pref", "add", "brief", "Two sentences.")
    (folder / "config.toml").symlink_to("/dev/full")
    assert "No space" in refuses(8, "config", "set", "temp", "0.5")
    (folder / "preferences" / "full.txt").symlink_to("/dev/full")
    assert "No space" in refuses(8, "pref", "add", "--force", "full", "text")
    assert says("pref", "show", "brief")[0] == "Two sentences.\n"


@pytest.mark.parametrize(
    "command, arguments",
    [
        ("chat", ("-n", "1", "--json")),
        ("compare", ("-n", "1", "--json", "--pref", "-")),
        ("render", ("--json",)),
        ("batch", ("-n", "1", "-")),
    ],
)
def test_a_file_of_preferences_is_read_once_so_it_may_be_a_pipe(
    command: str, arguments: tuple[str, ...], says: Says, tiny: Path
) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"Be brief.\n")
    os.close(writer)
    out, _ = says(
        command, "-m", str(tiny), "--pref-file", f"/dev/fd/{reader}", *arguments, stdin=b'{"query": "tea?"}\n'
    )
    os.close(reader)
    assert "Be brief." in out


def test_a_lone_dash_is_no_preference_in_every_command(says: Says, user_info: Callable[..., str]) -> None:
    assert user_info("--pref", "-") == "" and user_info("--pref", "-", "--pref", "Be brief.") == "Be brief."
