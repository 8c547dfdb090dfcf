"""What the README shows is what happens. `python tests/test_readme.py` writes the captures anew."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from metaalign_edge_commands.terminal.repl_commands import COMMANDS
from metaalign_edge_convert import ARCHITECTURES
from metaalign_edge_preferences import families, profiles

README = Path(__file__).resolve().parent.parent / "README.md"
CONSOLE = re.compile(r"(?<=```console\n)(.*?)(?=```)", re.DOTALL)


def shown() -> list[tuple[str, str]]:
    """List the commands of the README's captures with their output."""
    captures = []
    for block in CONSOLE.findall(README.read_text()):
        for capture in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = capture.partition("\n")
            captures.append((command, output))
    return captures


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


@pytest.mark.parametrize("command, output", shown())
def test_a_command_of_the_readme_prints_what_the_readme_shows(command: str, output: str) -> None:
    assert happens(command) == output


def test_the_readme_has_both_commands_on_one_line_each() -> None:
    for name in ("start", "tests"):
        (command,) = re.findall(rf"<!-- {name} -->\n```bash\n([^\n]+)\n```", README.read_text())
        assert command.startswith("python3 -m venv .venv && ")


def test_the_readme_lists_every_class_that_convert_knows() -> None:
    (table,) = re.findall(r"^\| architecture \|.*\n((?:\|.*\n)+)", README.read_text(), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(ARCHITECTURES)


def test_the_readme_quotes_the_models_card() -> None:
    card = (README.parent / "models" / "README.md").read_text()
    said = README.read_text()
    for row, quoted in (
        (
            "adherence: held out combination",
            r"obeys ([\d.]+ %) of\s+preferences in wordings that are put together anew",
        ),
        ("conflict: system", r"System Info wins ([\d.]+ %) of\s+conflicts"),
    ):
        assert re.findall(rf"^\| {row} \| .* \| ([\d.]+ %) \(", card, re.MULTILINE) == re.findall(quoted, said)


def preference_tables(text: str) -> str:
    """Return the README with its tables of families and profiles written anew."""
    kinds: dict[str, list[str]] = {}
    for family in families().values():
        values = ", ".join(value.name for value in family.values)
        kinds.setdefault(family.kind, []).append(f"{family.name} ({values})")
    rows = "".join(f"| {kind} | {' · '.join(found)} |\n" for kind, found in kinds.items())
    text = re.sub(r"(?<=<!-- families -->\n)((?:\|.*\n){2})(?:\|.*\n)*", lambda head: head[1] + rows, text)
    names = ", ".join(f"`@{name}`" for name in profiles())
    return re.sub(
        r"(?<=<!-- profiles -->\n).*\n", f"Profiles, alone or joined (`--pref @json+@child`): {names}.\n", text
    )


def words_table(text: str) -> str:
    """Return the README with its table of a conversation's commands written anew."""
    rows = ""
    for name, command in COMMANDS.items():
        takes = f"{name} {command.takes}".strip().replace("|", "\\|")
        rows += f"| `{takes}` | {command.help} |\n"
    return re.sub(r"(?<=<!-- words -->\n)((?:\|.*\n){2})(?:\|.*\n)*", lambda head: head[1] + rows, text)


def test_the_readme_lists_every_command_of_a_conversation() -> None:
    assert words_table(README.read_text()) == README.read_text()


def test_the_readme_lists_every_family_and_profile() -> None:
    assert preference_tables(README.read_text()) == README.read_text()


if __name__ == "__main__":

    def captured(block: re.Match[str]) -> str:
        return "".join(f"{line}\n{happens(line[2:])}" for line in block[0].splitlines() if line.startswith("$ "))

    README.write_text(words_table(preference_tables(CONSOLE.sub(captured, README.read_text()))))
