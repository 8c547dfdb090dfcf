"""The recipes of examples/, run as they are, with the embedded model."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FOLDER = Path(__file__).resolve().parent.parent / "examples"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
NASTY = '-n "it\'s" $(touch pwned) `touch pwned`; touch pwned\n'


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in a folder of its own, with `metaalign-edge` on the path."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def recipe(name: str, *arguments: str, stdin: str = "", **more: object) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(FOLDER / f"{name}.sh"), *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120, **more)  # type: ignore[call-overload, no-any-return]


def test_each_recipe_is_short_says_what_it_does_and_is_listed() -> None:
    listed = (FOLDER / "README.md").read_text()
    assert sorted(re.findall(r"\]\((.+\.sh)\)", listed)) == [script.name for script in SCRIPTS]
    for script in SCRIPTS:
        lines = script.read_text().splitlines()
        assert lines[0] == "#!/bin/sh" and lines[1].startswith("# ") and len(lines) <= 25, script
        assert os.access(script, os.X_OK)


def test_a_commit_message_is_proposed_and_edited_before_it_is_used(place: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    git("config", "user.name", "n")
    git("config", "user.email", "e")
    assert recipe("commit-message").returncode == 2  # nothing is staged
    for size in (3, 3000):  # the second is longer than the context
        (place / "numbers.txt").write_text("\n".join(map(str, range(size))))
        git("add", "numbers.txt")
        editor = 'sh -c \'cp "$1" proposed; echo mine > "$1"\' -'
        result = recipe("commit-message", env={**os.environ, "GIT_EDITOR": editor})
        assert result.returncode == 0, result.stderr
        assert (place / "proposed").read_text().partition("\n")[0].strip()
        assert git("log", "-1", "--format=%B").strip() == "mine"
    (place / "numbers.txt").write_text("none")
    git("add", "numbers.txt")
    refused = recipe("commit-message", env={**os.environ, "GIT_EDITOR": "false"})
    assert refused.returncode != 0 and git("log", "--oneline").count("\n") == 2


def test_a_manual_page_is_summed_up_for_two(place: Path) -> None:
    (place / "tea.1").write_text(".TH TEA 1\n.SH NAME\ntea \\- a drink\n.SH DESCRIPTION\nWhat is tea?\n")
    result = recipe("man-for-two", "./tea.1")
    reader = shutil.which("man")
    shown = subprocess.run([reader, "./tea.1"], capture_output=True, text=True).stdout if reader else ""
    if "a drink" in shown:  # no stub, as a container has
        assert recipe("man-for-two", "no-such-page").returncode != 0
        assert result.returncode == 0 and "[@child]" in result.stdout and "[@expert]" in result.stdout, result.stderr
    elif not reader:
        assert result.returncode == 127 and result.stdout == ""
    assert "name a command" in recipe("man-for-two").stderr


def test_files_are_renamed_only_when_asked_and_nothing_is_lost(place: Path) -> None:
    files = {"a.txt": "What is tea?", "-b c.txt": "What is a volcano?", "no ending": NASTY, "empty.txt": ""}
    for name, text in files.items():
        (place / name).write_text(text)
    asked = recipe("rename", *files, "missing.txt", stdin="n\nn\nn\n")
    assert asked.returncode == 0 and {path.name for path in place.iterdir()} == set(files)
    done = recipe("rename", *files, stdin="y\ny\ny\n")
    assert done.returncode == 0 and len(list(place.iterdir())) == len(files), done.stderr
    for path in place.iterdir():
        assert path.name in files or re.fullmatch(r"[a-z0-9][a-z0-9-]*(\.txt)?", path.name)
    assert sorted(path.read_text() for path in place.iterdir()) == sorted(files.values())
    assert not (place / "a.txt").exists()


def test_a_loop_goes_on_after_a_line_that_fails() -> None:
    said = recipe(
        "loop", stdin=f"@caps|What is tea?\n@nobody|What is tea?\n|What is bread?\n|{NASTY}"
    ).stdout.splitlines()
    assert said[0].startswith("[@caps] TEA IS") and said[1] == "[@nobody] exit code 3"
    assert said[2].startswith("[no preference] Bread is") and len(said) == 4


def test_xargs_answers_every_line_whatever_it_holds(place: Path) -> None:
    result = recipe("xargs", "answers", stdin=f"tea\nbread\n{NASTY}")
    assert (result.returncode, result.stderr) == (0, "")
    assert len(list((place / "answers").iterdir())) == 3 and not list(place.rglob("pwned"))
    assert (place / "answers" / "tea.txt").read_text().startswith("Tea is")


def test_parallel_keeps_the_order(place: Path) -> None:
    result = recipe("parallel", stdin=f"tea\n{NASTY}")
    if shutil.which("parallel"):
        assert result.returncode == 0 and result.stdout.count("\n") == 4, result.stderr
        assert result.stdout.startswith("tea @child\tTea is") and not list(place.rglob("pwned"))
    else:
        assert result.returncode == 127 and result.stdout == ""


def test_the_nightly_job_needs_no_home_and_goes_on_where_it_was(place: Path) -> None:
    (place / "questions.jsonl").write_text('{"query": "What is tea?", "pref": "@caps"}\n')
    folders = {f"METAALIGN_EDGE_{kind}": str(place / f".{kind}") for kind in ("CACHE", "CONFIG", "DATA")}
    cron = {"PATH": os.environ["PATH"], **folders}  # not those of the machine's user
    for _ in range(2):
        quiet = recipe("nightly", "questions.jsonl", env=cron)
        assert (quiet.returncode, quiet.stdout, quiet.stderr) == (0, "", "")
    assert json.loads((place / "questions-answers.jsonl").read_text())["response"].startswith("TEA IS")
    log = (place / "questions.log").read_text()
    assert "1 answered, 0 before" in log and "0 answered, 1 before" in log and log.count(": done") == 2
    (place / "questions.jsonl").write_text("nonsense\n")
    assert recipe("nightly", "questions.jsonl", env=cron).returncode == 1
    assert "failed with 1" in (place / "questions.log").read_text()
