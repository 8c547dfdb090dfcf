"""The shape of the thing: what a command imports, what the documents say, what the file says of itself."""

from __future__ import annotations

import ast
import bisect
import re
import shutil
import subprocess
import symtable
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import metaalign_edge as edge
from metaalign_edge_commands import program

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
Run = Callable[..., "subprocess.CompletedProcess[str]"]


def commands() -> dict[str, object]:
    return dict(program.commands)  # type: ignore[attr-defined]


def imported_by(*arguments: str) -> set[str]:
    code = f"import sys, metaalign_edge\nmetaalign_edge.run({list(arguments)!r})\nprint(*sys.modules, file=sys.stderr)"
    result = subprocess.run([sys.executable, "-c", code], input="", capture_output=True, text=True, timeout=60)
    return set(result.stderr.splitlines()[-1].split())


def test_help_and_render_import_nothing_heavy(tiny: Path) -> None:
    heavy = {"llama_cpp", "llama_cpp.llama_cpp", "numpy", "huggingface_hub", "metaalign_edge_convert", "torch", "gguf"}
    assert not imported_by("--help") & (heavy | {"jinja2"})
    assert not imported_by("render", "-m", str(tiny), "tea?") & heavy


def test_chat_imports_neither_numpy_nor_the_high_level_class_nor_the_hub(tiny: Path) -> None:
    assert not imported_by("chat", "-m", str(tiny), "-n", "1", "tea?") & {
        "numpy",
        "llama_cpp.llama",
        "huggingface_hub",
        "torch",
    }


def test_importing_the_toolkit_leaves_llama_cpp_python_whole() -> None:
    code = "from metaalign_edge_runtime.llama import library as e; e.llama_cpp(); import llama_cpp; assert llama_cpp.Llama; assert llama_cpp.llama_cpp is e.llama_cpp()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_bare_checkout_runs_as_a_script(tiny: Path, tmp_path: Path) -> None:
    for name in ("metaalign_edge.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("runtime", "templates", "convert", "models", "preferences", "schema", "commands"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.gguf", "__pycache__"))
    script = [
        sys.executable,
        "-I",
        "-S",
        str(tmp_path / "metaalign_edge.py"),
    ]  # no site packages: only the checkout's own
    site = f"import sys; sys.path += {[path for path in sys.path if 'site-packages' in path]!r}; sys.argv = sys.argv[1:]; import runpy; "
    run = [sys.executable, "-I", "-S", "-c", site + "runpy.run_path(sys.argv[0], run_name='__main__')", script[-1]]
    render = subprocess.run(
        [*run, "render", "-q", "-m", str(tiny), "--pref", "short", "tea?"], input="", capture_output=True, text=True
    )
    assert (render.returncode, render.stderr) == (0, "")
    assert "<|user_info|>short<|end|>" in render.stdout
    refused = subprocess.run([*run, "convert", str(tmp_path)], input="", capture_output=True, text=True)
    assert refused.returncode == 3, refused.stderr


def test_the_table_of_contents_is_the_list_of_the_banners() -> None:
    source = Path(edge.__file__).read_text()
    banners = re.findall(r"^# ={100,}\n# ([ \d]\d  .+)\n# ={100,}$", source, re.MULTILINE)
    contents = re.findall(r"^    ([ \d]\d  .+)$", ast.get_docstring(ast.parse(source), clean=False) or "", re.MULTILINE)
    assert banners == contents and len(banners) > 5


@pytest.mark.slow
def test_every_public_name_has_a_docstring() -> None:
    source = Path(edge.__file__).read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith(("_", "visit_")):
            documented = ast.get_docstring(node) or node.name in ("wrapper", "fill", "filtered", "guarded", "main")
            assert documented or _is_nested(source, node), node.name


def _is_nested(source: str, node: ast.AST) -> bool:
    """Tell whether a definition lies inside a function, where it is nobody's interface."""
    functions = [other for other in ast.walk(ast.parse(source)) if isinstance(other, ast.FunctionDef)]
    return any(other.lineno < node.lineno and node.end_lineno <= (other.end_lineno or 0) for other in functions)  # type: ignore[attr-defined]


def test_no_function_is_long() -> None:
    long = {"chat": 90, "convert": 80, "render_command": 70}  # their options are most of them
    for node in ast.walk(ast.parse(Path(edge.__file__).read_text())):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= long.get(node.name, 60), (node.name, lines)


@pytest.mark.parametrize("command", commands())
def test_every_command_has_help_an_example_and_a_place_in_the_readme(command: str, here: Run) -> None:
    result = here(command, "--help")
    assert result.returncode == 0 and result.stderr == ""
    assert f"metaalign-edge {command}" in result.stdout
    assert f"`{command}" in README


def test_every_option_of_the_readme_exists_and_every_template_stands_there() -> None:
    known = {
        name
        for group in commands().values()
        for command in getattr(group, "commands", {"": group}).values()
        for option in command.params
        for name in [*option.opts, *option.secondary_opts]
    }
    known |= {"--help", "--version"}
    shown = re.sub(
        r"```bash\n.*?```", lambda block: "\n".join(re.findall(r"metaalign-edge .*", block[0])), README, flags=re.DOTALL
    )
    shown = re.sub(r"`python -m metaalign_edge_tune[^`]*`", "", shown)
    for option in set(re.findall(r"(?<![\w-])--[a-z][\w-]+", shown)):
        assert option in known, option
    assert all(f"`{name}`" in README for name in edge.shipped_templates())


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


def test_nothing_refers_upward() -> None:
    source = Path(edge.__file__).read_text()
    banners = [
        source.count("\n", 0, banner.start())
        for banner in re.finditer(r"^# ={100,}\n# [ \d]\d  ", source, re.MULTILINE)
    ]
    module = symtable.symtable(source, edge.__file__, "exec")
    begins = {table.get_name(): bisect.bisect(banners, table.get_lineno()) for table in module.get_children()}

    def used(table: symtable.SymbolTable) -> set[str]:
        names = {one.get_name() for one in table.get_symbols() if one.is_global() and one.is_referenced()}
        return names.union(*map(used, table.get_children()))

    upward = {
        (one.get_name(), name)
        for one in module.get_children()
        for name in used(one)
        if begins.get(name, 0) > begins[one.get_name()]
    }
    assert upward == set()
