"""What the README and the pages of docs/ show is what happens. `python tests/test_readme.py` writes that anew."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.terminal import Terminal

import metaalign_edge as edge
from metaalign_edge_commands import program, summary
from metaalign_edge_commands.terminal.repl_commands import COMMANDS
from metaalign_edge_convert import ARCHITECTURES
from metaalign_edge_preferences import families, profiles
from metaalign_edge_runtime.stores import sessions

ROOT = Path(__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
PAGES = (README, *sorted(DOCS.glob("*.md")))
OTHERS = [
    ROOT / name for name in ("CONTRIBUTING.md", *(f"{one}/README.md" for one in ("benchmarks", "examples", "models")))
]
CONSOLE = re.compile(r"(?<=```console\n)(.*?)(?=```)", re.DOTALL)
TALK = re.compile(r"(?<=```text\n)\$ metaalign-edge (chat .*?)\n(.*?)(?=```)", re.DOTALL)
PROMPT = re.compile(r"^(\[[^]\n]+\] >)(?: (.*))?$", re.MULTILINE)
LINK = re.compile(r"\[[^]]+\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def shown() -> Iterator[Any]:
    """List the commands of the captures with their output."""
    for page in PAGES:
        for block in CONSOLE.findall(page.read_text()):
            for capture in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, _, output = capture.partition("\n")
                yield pytest.param(command, output, id=f"{name_of(page)}: {command}")


def happens(command: str) -> str:
    """Run a command line as a shell does, with this environment's programs first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    line = subprocess.run(
        ["sh", "-c", command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
    )
    assert line.returncode == 0 and line.stderr == "", line.stderr
    return line.stdout if line.stdout.endswith("\n") else line.stdout + "\n"


@pytest.mark.parametrize("command, output", [*shown()])
def test_a_command_that_is_shown_prints_what_is_shown(command: str, output: str) -> None:
    assert happens(command) == output


def talk(command: str, lines: Sequence[str]) -> str:
    """Hold a conversation in a terminal; return all of it but the command."""
    terminal, seen = Terminal(*shlex.split(command), columns=200), ""
    for line in lines:
        seen += terminal.until("] > ") + "] > " + line + "\n"
        terminal.type(line + "\n")
        terminal.until(line + "\n")
    seen += terminal.until("] > ") + "] >\n"
    terminal.type("\x04")
    assert terminal.leave() == 0
    return seen


def talks() -> dict[str, tuple[str, str]]:
    """Return the conversations that are shown, by the page: the command, and what stands below it."""
    return {name_of(page): block for page in PAGES for block in TALK.findall(page.read_text())}


@pytest.mark.parametrize("page", talks())
def test_a_conversation_that_is_shown_happens(page: str) -> None:
    command, text = talks()[page]
    assert talk(command, [line for _, line in PROMPT.findall(text) if line]) == text


def test_the_conversation_that_is_kept_holds_what_is_shown() -> None:
    command, text = talks()["docs/conversations.md"]
    talk(command, [line for _, line in PROMPT.findall(text) if line])
    kinds = [json.loads(line)["kind"] for line in sessions.session_path("garden").read_text().splitlines()]
    assert kinds == ["session", "meta_prompt", "turn", "meta_prompt", "turn"]


def test_the_readme_is_a_front_page() -> None:
    assert len(README.read_text().splitlines()) <= 250


def test_the_readme_has_both_commands_on_one_line_each() -> None:
    for name in ("start", "tests"):
        (command,) = re.findall(rf"<!-- {name} -->\n```bash\n([^\n]+)\n```", README.read_text())
        assert command.startswith("python3 -m venv .venv && ")


def test_the_picture_shows_a_dialog_that_happens() -> None:
    (picture,) = re.findall(r"```text\n([^$]*?Response.*?)```", README.read_text(), re.DOTALL)
    system, pref, query, answer = re.findall(
        r"(?:System Info|User Info|User Query|Response) +(\S.*?)(?: *│|$)", picture, re.MULTILINE
    )
    assert happens(f'metaalign-edge chat --system "{system}" --pref "{pref}" "{query}"') == answer + "\n"


# -- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, *OTHERS], ids=name_of)
def test_every_link_leads_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text()):
        path, _, part = link.partition("#")
        if not path.startswith("https://"):
            target = (page.parent / path) if path else page
            assert target.exists() and target.resolve().is_relative_to(ROOT), link
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if part else []
            assert not part or part in [re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings], link


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link for link in LINK.findall(README.read_text()) if link.startswith("docs/")}
    assert linked == {name_of(page) for page in PAGES[1:]}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_has_one_heading_on_top(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    assert re.match(r"# \S.*\n\n\S", prose) and len(re.findall(r"^# ", prose, re.MULTILINE)) == 1


def test_nothing_is_said_twice() -> None:
    """A paragraph, or a capture, stands on one page; the others link to it."""
    parts = [part for page in PAGES for part in re.split(r"\n\n+|^```\w*\n", page.read_text(), flags=re.MULTILINE)]
    assert [part for part, times in Counter(parts).items() if times > 1 and len(part) > 80] == []


def test_the_models_card_is_quoted() -> None:
    card = (ROOT / "models" / "README.md").read_text()
    for row, quoted in (
        (
            "adherence: held out combination",
            r"obeys ([\d.]+ %) of\s+preferences in wordings that are put together anew",
        ),
        ("conflict: system", r"System Info\s+wins ([\d.]+ %) of\s+conflicts"),
    ):
        said = {rate for page in PAGES for rate in re.findall(quoted, page.read_text())}
        assert {*re.findall(rf"^\| {row} \| .* \| ([\d.]+ %) \(", card, re.MULTILINE)} == said


# -- tables that are generated ----------------------------------------------------------------------------------------


def table(name: str, text: str, rows: Callable[[], str]) -> str:
    """Return a page with the rows of a table anew, if it has a table of this name."""
    return re.sub(rf"(?<=<!-- {name} -->\n)((?:\|.*\n){{2}})(?:\|.*\n)*", lambda head: head[1] + rows(), text)


def family_rows() -> str:
    """List the families of preferences and their values."""
    kinds: dict[str, list[str]] = {}
    for family in families().values():
        values = ", ".join(value.name for value in family.values)
        kinds.setdefault(family.kind, []).append(f"{family.name} ({values})")
    return "".join(f"| {kind} | {' · '.join(found)} |\n" for kind, found in kinds.items())


def word_rows() -> str:
    """List the commands of a conversation."""
    rows = ""
    for name, word in COMMANDS.items():
        takes = f"{name} {word.takes}".strip().replace("|", "\\|")
        rows += f"| `{takes}` | {word.help} |\n"
    return rows


def first_line(command: Any) -> str:
    """Return the first line of a command's help, without the full stop of a single sentence."""
    line = command.help.partition("\n")[0].strip()
    return line.removesuffix(".") if ". " not in line else line


def usage(name: str, command: Any) -> str:
    """Return a command as it is called: with the arguments that it takes."""
    arguments = [one for one in command.params if one.param_type_name == "argument" and not one.hidden]
    return " ".join([name, *(one.make_metavar(None) for one in arguments)]).replace("|", "\\|")


def command_rows() -> str:
    """List the commands, those that answer first, with what `--help` says of them in its first sentence."""
    names = [*FIRST, *(name for name in program.commands if name not in FIRST)]
    return "".join(f"| `{name}` | {summary(name).removesuffix('.').partition('. ')[0]} |\n" for name in names)


def usage_rows() -> str:
    """List the commands, also those of a group, with their arguments."""
    every = {
        " ".join(filter(None, [name, under])): command
        for name, group in program.commands.items()
        for under, command in getattr(group, "commands", {"": group}).items()
    }
    return "".join(f"| `{usage(name, command)}` | {first_line(command)} |\n" for name, command in every.items())


def option_rows() -> str:
    """List the options that several commands share, in the order of their headings in a command's help."""
    found: dict[tuple[str, ...], tuple[Any, list[str]]] = {}
    for name, command in program.commands.items():
        for option in command.params:
            if getattr(option, "rich_help_panel", None) in PANELS:
                found.setdefault((*option.opts, *option.secondary_opts), (option, []))[1].append(name)
    rows = ""
    for names, (option, takers) in sorted(found.items(), key=lambda one: PANELS.index(one[1][0].rich_help_panel)):
        if len(takers) > 1:
            called = ", ".join(f"`{name}`" for name in names)
            rows += f"| {called} | {option.help.removesuffix('.')} | {', '.join(takers)} |\n"
    return rows


FIRST = ("chat", "compare", "batch", "render")
PANELS = ("Dialog", "Model", "Sampling", "Output")
TABLES = {
    "commands": command_rows,
    "usage": usage_rows,
    "options": option_rows,
    "words": word_rows,
    "families": family_rows,
}


def generated(text: str) -> str:
    """Return a page with what is generated of it anew; captures are left as they are."""
    for name, rows in TABLES.items():
        text = table(name, text, rows)
    names = ", ".join(f"`@{name}`" for name in profiles())
    return re.sub(
        r"(?<=<!-- profiles -->\n).*\n", f"Profiles, alone or joined (`--pref @json+@child`): {names}.\n", text
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_the_tables_of_a_page_are_those_of_the_program(page: Path) -> None:
    assert generated(page.read_text()) == page.read_text()


def test_every_table_stands_somewhere() -> None:
    everything = "".join(page.read_text() for page in PAGES)
    assert all(everything.count(f"<!-- {name} -->\n") == 1 for name in (*TABLES, "profiles"))


def test_every_class_that_convert_knows_is_listed() -> None:
    (rows,) = re.findall(r"^\| architecture \|.*\n((?:\|.*\n)+)", (DOCS / "conversion.md").read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", rows)) == sorted(ARCHITECTURES)


def test_the_fields_of_an_answer_are_listed() -> None:
    (listed,) = re.findall(r"`chat --json` prints (.*?)\n\n", (DOCS / "scripts.md").read_text(), re.DOTALL)
    assert re.findall(r"`(\w+)`", listed) == list(edge.Answer.__dataclass_fields__)


if __name__ == "__main__":

    def captured(block: re.Match[str]) -> str:
        return "".join(f"{line}\n{happens(line[2:])}" for line in block[0].splitlines() if line.startswith("$ "))

    def held(block: re.Match[str]) -> str:
        lines = [line for _, line in PROMPT.findall(block[2]) if line]
        return f"$ metaalign-edge {block[1]}\n{talk(block[1], lines)}"

    with tempfile.TemporaryDirectory() as home:
        os.environ |= {f"METAALIGN_EDGE_{kind}": str(Path(home, kind)) for kind in ("CACHE", "CONFIG", "DATA")}
        os.environ["METAALIGN_EDGE_PROJECT"] = "0"
        for page in PAGES:
            page.write_text(generated(TALK.sub(held, CONSOLE.sub(captured, page.read_text()))))
