"""`help`: the pages of docs/ are the topics, and what they say of exit codes and variables is so."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.terminal import Emulator, Terminal

import metaalign_edge as edge
from metaalign_edge_commands import program
from metaalign_edge_runtime.errors import EdgeError
from metaalign_edge_runtime.stores import docs

DOCS = Path(edge.__file__).with_name("docs")
ROOT = Path(edge.__file__).resolve().parent
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def said(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert edge.run(arguments) == 0
    out, error = capfd.readouterr()
    assert error == ""
    return str(out)


def test_without_a_topic_the_topics_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    listed = dict(re.split("  +", line) for line in said(capfd, "help").splitlines())
    assert listed.keys() == docs.topics().keys() and listed["exit-codes"] == "Exit codes"
    wanted = {
        "dialog",
        "templates",
        "scripts",
        "exit-codes",
        "environment",
        "strength",
        "preferences",
        "offline",
        "python",
    }
    assert wanted <= listed.keys()


@pytest.mark.parametrize("topic", docs.topics())
def test_a_topic_is_a_whole_page(topic: str, capfd: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / f"{topic}.md").read_text(encoding="utf-8")
    heading, _, text = said(capfd, "help", topic).partition("\n\n")
    assert page.startswith(f"# {heading}\n") and len(text) > 100 and text.endswith("\n")
    assert text.count("```") % 2 == 0
    assert "<!--" not in text and "<sub>" not in text
    assert {line for line in text.splitlines() if " (" not in line} <= set(page.splitlines())
    assert len(text.splitlines()) == len(re.sub(r"<!--.*-->\n", "", page).splitlines()) - 2


def test_a_link_to_another_page_names_its_topic() -> None:
    scripts, codes = docs.topics()["scripts"].text, docs.topics()["exit-codes"].text
    assert "(help exit-codes)" in scripts and "(help environment)" in scripts and codes not in scripts
    assert "interrupted" in codes and "METAALIGN_EDGE" not in codes
    for topic in docs.topics().values():
        assert ".md)" not in topic.text.replace("README.md)", "")
        assert set(re.findall(r"\(help ([\w-]+)\)", topic.text)) <= docs.topics().keys()


def test_a_command_is_explained_by_its_help(capfd: pytest.CaptureFixture[str]) -> None:
    assert said(capfd, "help", "chat") == said(capfd, "chat", "--help")
    assert said(capfd, "help", "models", "show") == said(capfd, "models", "show", "--help")


@pytest.mark.parametrize("arguments", [("chat", "--help"), ("help", "chat"), ("--help",)])
def test_help_into_a_pipe_that_is_closed_ends_quietly(arguments: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "metaalign_edge", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writer)
    assert (process.returncode, process.stderr) == (0, b"")


def test_an_unknown_topic_names_the_nearest(refuses: Callable[..., str]) -> None:
    assert "do you mean exit-codes?" in refuses(2, "help", "exit-code")
    assert "do you mean compare?" in refuses(2, "help", "compere")
    assert "`metaalign-edge help` lists them" in refuses(2, "help", "xyzzy")


def test_at_a_narrow_terminal_a_topic_is_laid_out_for_it() -> None:
    terminal = Terminal("help", "exit-codes", columns=40)
    text = terminal.rest()
    assert "Exit codes" in text and "130" in text and "| ---" not in text
    assert max(map(len, text.splitlines())) <= 40 and "\x1b" not in text
    assert terminal.leave() == 0


def test_at_a_narrow_terminal_a_table_keeps_its_figures() -> None:
    terminal = Terminal("help", "strength", columns=40)
    text = terminal.rest()
    assert "…" not in text and {"58.7", "62.9", "(54–64", "(57–69"} <= set(text.split())
    assert max(map(len, text.splitlines())) <= 40 and terminal.leave() == 0


def test_the_exit_codes_are_those_of_the_errors() -> None:
    listed = [int(code) for code in re.findall(r"^\| (\d+) \|", docs.topics()["exit-codes"].text, re.MULTILINE)]
    assert listed == sorted({0, EdgeError.exit_code, *(kind.exit_code for kind in EdgeError.__subclasses__())})


def options(command: Any) -> Iterator[Any]:
    yield from command.params
    for one in getattr(command, "commands", {}).values():
        yield from options(one)


def test_the_variables_are_those_of_the_options_and_called_like_them() -> None:
    rows = re.findall(r"^\| (.+?) \|", docs.topics()["environment"].text, re.MULTILINE)
    listed = re.findall(r"`([A-Z_]+)`", " ".join(rows))
    read = set(
        re.findall(
            r'environ\.get\("METAALIGN_EDGE_([A-Z]+)"\)',
            "".join(
                path.read_text()
                for folder in ("runtime", "commands")
                for path in sorted(ROOT.glob(f"{folder}/**/*.py"))
            ),
        )
    )
    taken = {one.envvar: one for one in options(program) if getattr(one, "envvar", None)}
    assert len(listed) == len(set(listed))
    assert {f"METAALIGN_EDGE_{name}" for name in listed} == taken.keys() | {f"METAALIGN_EDGE_{name}" for name in read}
    for name, one in taken.items():
        assert "--" + name.removeprefix("METAALIGN_EDGE_").lower().replace("_", "-") in one.opts


def test_help_imports_nothing_heavy(run: Run) -> None:
    from test_package import imported_by

    heavy = {"llama_cpp", "jinja2", "numpy", "huggingface_hub", "metaalign_edge_convert", "rich.markdown"}
    assert not imported_by("help", "exit-codes") & heavy


# -- a page at a time --------------------------------------------------------------------------------------------------

LONG, SHORT = "many", "completion"  # of the terminal's 40 lines, more and fewer
MARKED = "sed 's/^/paged: /'"


def paged(topic: str, kind: str = "xterm-256color") -> str:
    """Return what a terminal gets of a topic, without an error."""
    terminal = Terminal("help", topic, kind=kind)
    text = terminal.rest()
    assert terminal.leave() == 0 and not re.search("metaalign-edge: |Traceback|not found", text)
    return text


def test_a_page_that_is_longer_than_the_screen_goes_through_the_pager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGER", MARKED)
    text = paged(LONG)
    assert all(line.startswith("paged: ") for line in text.splitlines()) and "exit code is 1" in text
    assert "\x1b" not in text  # who knows what this pager makes of it?
    assert "paged: " not in paged(SHORT) and "\x1b" in paged(SHORT)
    assert "paged: " not in paged(LONG, kind="dumb")


@pytest.mark.parametrize("pager", ["", "cat", "no-such-pager", "'", "sh -c 'exit 127'"])
def test_without_a_pager_that_starts_a_page_is_printed(pager: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGER", pager)
    assert "Many answers at once" in (text := paged(LONG)) and "exit code is 1" in text


def test_a_pager_may_be_left_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGER", "head -1")
    assert paged(LONG).strip() == "Many answers at once"


def test_ctrl_c_is_the_pagers(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from signal import *; import sys; signal(SIGINT, SIG_DFL); sys.stdin.read(); print('all read', flush=True); pause()"
    monkeypatch.setenv("PAGER", f'{sys.executable} -c "{code}"')
    terminal = Terminal("help", LONG, kind="xterm-256color")
    terminal.until("all read")
    terminal.type("\x03")
    assert terminal.rest(20).replace("^C", "").strip() == "" and terminal.leave() == 0


@pytest.mark.skipif(shutil.which("less") is None, reason="there is no less here")
@pytest.mark.parametrize("options", [None, "-i", "-P a prompt of mine"])
def test_less_shows_styles_and_is_left_with_q(options: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if options is not None:
        monkeypatch.setenv("LESS", options)
    screen = Emulator("help", LONG, columns=60, lines=20)
    screen.until("One question, several preferences")
    screen.type("/batch answers\n")
    text = screen.until("several at a time")
    assert "ESC" not in text and "[1m" not in text
    screen.type("q")
    screen.rest()
    assert screen.leave() == 0


def test_a_pipe_has_no_pager(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PAGER", MARKED)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert run("help", LONG).stdout.startswith("Many answers at once\n\nOne question")
