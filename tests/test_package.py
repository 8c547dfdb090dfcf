"""What a command imports, and what the documents say of the commands."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import metaalign_edge as edge
from metaalign_edge_commands import program

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
HEAVY = {"llama_cpp", "llama_cpp.llama", "numpy", "huggingface_hub", "torch", "gguf", "metaalign_edge_convert"}
PAGES = README + "".join(page.read_text() for page in sorted((ROOT / "docs").glob("*.md")))
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def commands() -> dict[str, object]:
    return dict(program.commands)  # type: ignore[attr-defined]


def imported_by(*arguments: str) -> set[str]:
    """Return what is imported by a command, or by the toolkit alone."""
    called = f"metaalign_edge.run({list(arguments)!r})" if arguments else ""
    code = f"import sys, metaalign_edge\n{called}\nprint(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], input="", capture_output=True, text=True, timeout=60)
    return set(result.stderr.splitlines()[-1].split())


def test_help_imports_no_command_and_nothing_heavy() -> None:
    loaded = imported_by("--help")  # Typer's own help needs rich, all of it
    assert not loaded & {*HEAVY, "jinja2", "llama_cpp.llama_cpp", "prompt_toolkit", "jsonschema"}
    assert not {f"metaalign_edge_commands.{name}" for name in commands()} & loaded


def test_importing_the_toolkit_imports_nothing_heavy() -> None:
    loaded = imported_by()
    assert not loaded & {*HEAVY, "jinja2", "llama_cpp.llama_cpp", "prompt_toolkit", "jsonschema", "typer", "rich"}


def test_render_and_chat_import_nothing_heavy(tiny: Path) -> None:
    assert not imported_by("render", "-m", str(tiny), "tea?") & HEAVY
    chat = imported_by("chat", "-m", str(tiny), "-n", "1", "tea?")
    assert "llama_cpp.llama_cpp" in chat and not chat & {*HEAVY, "prompt_toolkit", "rich.markdown"}


def test_importing_the_toolkit_leaves_llama_cpp_python_whole() -> None:
    code = "from metaalign_edge_runtime.llama import library as e; e.llama_cpp(); import llama_cpp; assert llama_cpp.Llama; assert llama_cpp.llama_cpp is e.llama_cpp()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("command", commands())
def test_every_command_has_help_an_example_and_a_place_in_the_readme(command: str, here: Run) -> None:
    result = here(command, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert f"metaalign-edge {command}" in result.stdout
    assert f"`{command}" in README


def test_every_option_that_is_shown_exists_and_every_template_stands_there() -> None:
    known = {
        name
        for group in commands().values()
        for command in getattr(group, "commands", {"": group}).values()
        for option in command.params
        for name in [*option.opts, *option.secondary_opts]
    }
    known |= {"--help", "--version"}
    shown = re.sub(
        r"```bash\n.*?```", lambda block: "\n".join(re.findall(r"metaalign-edge .*", block[0])), PAGES, flags=re.DOTALL
    )
    shown = re.sub(r"`python -m metaalign_edge_tune[^`]*`", "", shown)
    for option in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", shown)):
        assert option in known, option
    assert all(f"`{name}`" in PAGES for name in edge.shipped_templates())


def test_the_version_is_one(run: Run) -> None:
    assert re.search(
        rf'^version = "{re.escape(edge.__version__)}"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert run("--version").stdout == f"metaalign-edge {edge.__version__}\n"
    assert f"## [{edge.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_nothing_but_the_commands_stands_in_the_way_of_help(here: Run) -> None:
    bare = here()
    assert "chat" in bare.stdout + bare.stderr and "Traceback" not in bare.stderr


def test_every_dependency_says_why() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for line in re.findall(
        r'^  "[A-Za-z].*$', text[text.index("dependencies = [") : text.index("[project.scripts]")], re.MULTILINE
    ):
        assert "# " in line or '"metaalign-edge[' in line, line


def test_every_dependency_is_imported() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    needed = re.findall(r'^  "([\w-]+)', text[text.index("dependencies = [") : text.index("]\n\n")], re.MULTILINE)
    folders = {init.parent for init in ROOT.glob("*/__init__.py")} - {ROOT / "tune"}  # which has an extra of its own
    paths = [ROOT / "metaalign_edge.py", *(path for folder in folders for path in folder.rglob("*.py"))]
    source = "".join(path.read_text() for path in paths)
    for module in (name.replace("-", "_").removesuffix("_python") for name in needed):
        assert re.search(rf'^ *(import|from) {module}\b|import_module\("{module}\b', source, re.MULTILINE), module
