"""How the project is built: imports run one way, nothing grows too large, a file in `commands/` is a command."""

from __future__ import annotations

import ast
import bisect
import functools
import graphlib
import io
import os
import re
import shutil
import subprocess
import symtable
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import metaalign_edge_commands as commands

ROOT = Path(__file__).resolve().parent.parent
HEART = "metaalign_edge"
Run = Callable[..., "subprocess.CompletedProcess[str]"]
Function = ast.FunctionDef | ast.AsyncFunctionDef

RUNTIME = ("runtime", "runtime.errors", "runtime.llama", "runtime.stores", "runtime.structured")
MAY_IMPORT: dict[str, tuple[str, ...]] = {  # a room: what it may import besides itself; the ground floor first
    "runtime": (),
    "runtime.errors": ("runtime",),
    "runtime.llama": ("runtime", "runtime.errors"),
    "runtime.stores": ("runtime", "runtime.errors", "runtime.llama"),
    "runtime.structured": ("runtime", "runtime.errors"),
    "templates": ("runtime.errors",),
    HEART: (*RUNTIME, "templates"),
    "convert": RUNTIME,
    "preferences": RUNTIME,
    "commands": (*RUNTIME, "templates", HEART, "convert", "preferences"),
    "tune": (*RUNTIME, "templates", HEART, "convert", "preferences", "commands"),
}

CODE_OF_A_FILE, LINES_OF_THE_HEART = 400, 2700
LINES = {ast.FunctionDef: 50, ast.AsyncFunctionDef: 50, ast.ClassDef: 150}
ONE_THOUGHT = {"TierText", "TierSandbox"}  # classes that are long, and would not be clearer in two

BY_STRING = [  # functions that import what a string names
    ("commands", "build"),  # the command that was asked for
    ("runtime.llama.library", "_llama_cpp"),  # llama-cpp-python without what its package imports besides
]


class Import(NamedTuple):
    """An import of the project by the project."""

    source: str  # the module that imports
    function: str  # in which it does, empty at the top
    target: str  # the module that is imported
    name: str  # of it; empty for the module itself


UPWARD = Import(HEART, "run", "commands", "program")  # the one that goes up: the heart's `run` asks for the commands


class Source:
    """A file of the project. It is named like its module, without the `metaalign_edge_` that this has when installed."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path, self.text = name, path, path.read_text(encoding="utf-8")
        self.tree = ast.parse(self.text)
        self.package = name if path.name == "__init__.py" else name.rpartition(".")[0]

    @functools.cached_property
    def nodes(self) -> list[tuple[ast.AST, str]]:
        """All nodes, each with the name of the outermost function that it stands in."""
        found: list[tuple[ast.AST, str]] = []

        def walk(node: ast.AST, function: str) -> None:
            found.append((node, function))
            if isinstance(node, Function):
                function = function or node.name
            for child in ast.iter_child_nodes(node):
                walk(child, function)

        walk(self.tree, "")
        return found

    def at(self, node: ast.AST) -> str:
        """Return the place of a node: file and line."""
        return f"{self.path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"

    def lines_of_code(self) -> int:
        """Count the lines that hold code: not those of comments, docstrings and nothing."""
        no_code = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
        lines: set[int] = set()
        for token in tokenize.generate_tokens(io.StringIO(self.text).readline):
            if token.type not in no_code and token.string:
                lines.update(range(token.start[0], token.end[0] + 1))
        for node, _ in self.nodes:
            if isinstance(node, Function | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
                lines.difference_update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
        return len(lines)

    def imported(self) -> Iterator[tuple[str, str, str]]:
        """Yield the project's modules that are imported: in which function, the module, and a name of it or none."""
        for node, function in self.nodes:
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.startswith(HEART):
                        yield function, alias.name.removeprefix(f"{HEART}_"), ""
            elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith(HEART)):
                package = self.package.split(".")
                above = package[: len(package) - node.level + 1] if node.level else []
                module = ".".join([*above, *filter(None, [node.module])]).removeprefix(f"{HEART}_")
                for alias in node.names:
                    yield function, module, alias.name


@functools.cache
def sources() -> dict[str, Source]:
    """Return all files of the project; tests and benchmarks are none."""
    paths = {HEART: ROOT / f"{HEART}.py"}
    for init in sorted(ROOT.glob("*/__init__.py")):
        for path in sorted(init.parent.rglob("*.py")):
            paths[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    return {name: Source(name, path) for name, path in paths.items()}


@functools.cache
def imports() -> list[Import]:
    """Return every import of the project by the project, wherever it stands."""
    found = []
    for source in sources().values():
        for function, module, name in source.imported():
            whole = f"{module}.{name}" in sources()
            found.append(Import(source.name, function, *((f"{module}.{name}", "") if whole else (module, name))))
    return found


def room(module: str) -> str:
    """Return the room of a module: the longest name of the table that it begins with."""
    within = (name for name in MAY_IMPORT if f"{module}.".startswith(f"{name}."))
    return max(within, key=len, default=module.split(".")[0])


def is_command(module: str) -> bool:
    """Tell whether a module is the file of a command."""
    return module.removeprefix("commands.") in commands.names() and module.startswith("commands.")


def none(found: Iterable[object]) -> None:
    """Fail with a line for each of those that were found."""
    lines = sorted(map(str, found))
    assert not lines, "\n".join(["", *lines])


def checkout(folder: Path) -> Path:
    """Copy what a checkout needs to run to a new folder; return its script."""
    folder.mkdir()
    for name in (f"{HEART}.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    for init in ROOT.glob("*/__init__.py"):
        left_out = shutil.ignore_patterns("*.gguf", "__pycache__")
        shutil.copytree(init.parent, folder / init.parent.name, ignore=left_out)
    return folder / f"{HEART}.py"


# -- arrows -----------------------------------------------------------------------------------------------------------


def test_every_import_of_the_project_finds_a_file() -> None:
    none(one for one in imports() if one.target not in sources())


def test_folders_are_imported_by_the_names_that_they_have_when_installed() -> None:
    folders = {name.split(".")[0] for name in sources()} - {HEART}
    for source in sources().values():
        for node, _ in source.nodes:
            absolute = isinstance(node, ast.ImportFrom) and not node.level and node.module
            named = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [absolute or ""]
            assert not {name.split(".")[0] for name in named} & folders, source.at(node)


def test_every_folder_with_code_has_its_floor() -> None:
    with_code = {name.split(".")[0] for name, source in sources().items() if len(source.tree.body) > 1}
    assert {name.split(".")[0] for name in MAY_IMPORT} == with_code
    assert MAY_IMPORT.keys() <= sources().keys()


def test_imports_run_one_way() -> None:
    def allowed(one: Import) -> bool:
        here, there = room(one.source), room(one.target)
        return here == there or there in MAY_IMPORT[here] or one == UPWARD

    none(one for one in imports() if not allowed(one))
    assert UPWARD in imports()


def test_no_command_imports_another() -> None:
    none(one for one in imports() if is_command(one.target))


def test_there_is_no_circle() -> None:
    arrows: dict[str, set[str]] = {name: set() for name in sources()}
    for one in imports():
        if one != UPWARD:
            arrows[one.source].add(one.target)
    graphlib.TopologicalSorter(arrows).prepare()  # it names the circle


def test_nothing_is_imported_by_a_string() -> None:
    by_string = {"import_module", "__import__", "run_module", "run_path"}
    found = [
        (source.name, function)
        for source in sources().values()
        for node, function in source.nodes
        if {getattr(node, "attr", ""), getattr(node, "id", "")} & by_string
    ]
    assert sorted(found) == sorted(BY_STRING)


def test_the_heart_alone_imports_no_command_line() -> None:
    code = f"import sys, {HEART}; print(*sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(child.stdout.split())
    heavy = {"typer", "click", "rich", "jinja2", "numpy", "llama_cpp", "huggingface_hub", "prompt_toolkit", "gguf"}
    assert HEART in loaded and not loaded & heavy
    rooms = {room(name.removeprefix(f"{HEART}_")) for name in loaded if name.startswith(HEART)}
    assert rooms <= {HEART, *MAY_IMPORT[HEART]}


# -- sizes and names --------------------------------------------------------------------------------------------------


def test_no_file_is_long() -> None:
    code = {name: source.lines_of_code() for name, source in sources().items() if name != HEART}
    none(f"{name}: {lines} lines of code" for name, lines in code.items() if lines > CODE_OF_A_FILE)
    assert sources()[HEART].text.count("\n") <= LINES_OF_THE_HEART


def test_no_function_and_no_class_is_long() -> None:
    none(
        f"{source.at(node)} {node.name}: {lines} lines"
        for source in sources().values()
        for node, _ in source.nodes
        if isinstance(node, Function | ast.ClassDef) and node.name not in ONE_THOUGHT
        if (lines := (node.end_lineno or 0) - node.lineno + 1) > LINES[type(node)]
    )


def test_no_local_has_the_name_of_something_at_the_top() -> None:
    def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
        for child in table.get_children():
            yield child
            yield from tables(child)

    shadows = []
    for source in sources().values():
        module = symtable.symtable(source.text, str(source.path), "exec")
        top = {one.get_name() for one in module.get_symbols() if one.is_assigned() or one.is_imported()}
        for table in tables(module):
            names = {one.get_name() for one in table.get_symbols() if one.is_local()}
            if table.get_type() == "function":
                shadows += [f"{source.name}: {name} in {table.get_name()}" for name in names & top]
    none(shadows)


def test_every_file_and_every_public_name_says_what_it_is() -> None:
    def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
        for node in body:
            if isinstance(node, Function | ast.ClassDef) and not node.name.startswith(("_", "visit_")):
                yield node
                if isinstance(node, ast.ClassDef):
                    yield from public(node.body)

    for source in sources().values():
        assert ast.get_docstring(source.tree), source.name
        none(f"{source.at(node)} {node.name}" for node in public(source.tree.body) if not ast.get_docstring(node))


# -- the heart, from top to bottom ------------------------------------------------------------------------------------


def test_the_table_of_contents_is_the_list_of_the_banners() -> None:
    heart = sources()[HEART]
    banners = re.findall(r"^# ={100,}\n# ([ \d]\d  .+)\n# ={100,}$", heart.text, re.MULTILINE)
    contents = re.findall(r"^    ([ \d]\d  .+)$", ast.get_docstring(heart.tree, clean=False) or "", re.MULTILINE)
    assert banners == contents and len(banners) > 5


def test_nothing_refers_upward() -> None:
    heart = sources()[HEART]
    banners = [
        heart.text.count("\n", 0, banner.start())
        for banner in re.finditer(r"^# ={100,}\n# [ \d]\d  ", heart.text, re.MULTILINE)
    ]
    module = symtable.symtable(heart.text, str(heart.path), "exec")
    begins = {table.get_name(): bisect.bisect(banners, table.get_lineno()) for table in module.get_children()}

    def used(table: symtable.SymbolTable) -> set[str]:
        names = {one.get_name() for one in table.get_symbols() if one.is_global() and one.is_referenced()}
        return names.union(*map(used, table.get_children()))

    none(
        f"{one.get_name()} uses {name}"
        for one in module.get_children()
        for name in used(one)
        if begins.get(name, 0) > begins[one.get_name()]
    )


# -- a file in commands/ is a command ---------------------------------------------------------------------------------


def test_the_first_line_of_a_command_is_its_line_in_the_help(here: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    listed = here("--help").stdout
    for name in commands.names():
        source = sources()[f"commands.{name}"]
        first = (ast.get_docstring(source.tree) or "").splitlines()[0]
        assert source.text.startswith(f'"""{first}') and first.endswith("."), name
        assert re.search(rf"^\W*{name} +{re.escape(first)}\W*$", listed, re.MULTILINE), name


HELLO = '''"""Greet."""

import sys


def hello(name: str) -> None:
    """Greet somebody, and say which files of the toolkit are in use."""
    print(name, *{module.__file__ for key, module in [*sys.modules.items()] if key.startswith("metaalign_edge")})
'''


def test_a_file_more_is_a_command_more_and_a_checkout_wins_over_what_is_installed(tmp_path: Path) -> None:
    script, elsewhere = checkout(tmp_path / "checkout"), tmp_path / "elsewhere"
    (script.parent / "commands" / "hello.py").write_text(HELLO)
    elsewhere.mkdir()

    def python(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=True, timeout=60).stdout

    program = f"import sys; sys.path.insert(0, {str(script.parent)!r}); import {HEART}; {HEART}.run(['hello', 'you'])"
    for said in (python(str(script), "hello", "you"), python("-c", program)):
        name, *files = said.split()
        assert name == "you" and len(files) > 10
        none(file for file in files if not Path(file).is_relative_to(script.parent))
    assert re.search(r"^\W*hello +Greet\.\W*$", python(str(script), "--help"), re.MULTILINE)


def test_a_bare_checkout_runs_from_any_folder(tiny: Path, tmp_path: Path) -> None:
    script, elsewhere = checkout(tmp_path / "checkout"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    depends_on = os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))

    def start(*arguments: str, path: str = depends_on) -> tuple[int, str, str]:
        """Run the script where nothing is installed: -S leaves out what an editable install adds."""
        child = subprocess.run(
            [sys.executable, "-S", str(script), *arguments], input="", capture_output=True, text=True, timeout=120,
            cwd=elsewhere, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        return child.returncode, child.stdout, child.stderr

    asked = ("-q", "-m", str(tiny), "--pref", "short", "tea?")
    code, out, error = start("render", *asked)
    assert (code, error) == (0, "") and "<|user_info|>short<|end|>" in out
    assert start("chat", "-n", "2", *asked)[::2] == (0, "")
    assert start("convert", str(elsewhere))[0] == 3
    code, out, error = start("--version", path="")  # nor what the program depends on
    assert (code, out, error.count("\n")) == (5, "", 1) and "package typer is missing: `pip install .`" in error
    (elsewhere / "jsonschema.py").touch()  # a package of another version
    code, out, error = start("chat", "-j", "name", *asked, path=f"{elsewhere}{os.pathsep}{depends_on}")
    assert (code, out, error.count("\n")) == (5, "", 1) and "of another version" in error
