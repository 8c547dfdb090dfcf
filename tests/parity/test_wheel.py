"""The wheel, from an empty folder, in an environment that has the dependencies and not this checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOME = os.path.expanduser("~")  # of whoever runs the tests: pip keeps there what it has built


@pytest.fixture(autouse=True)
def nothing_beside_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep Python from a checkout that whoever runs the tests works in."""
    monkeypatch.delenv("PYTHONPATH", raising=False)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git tracks: pip builds beside the sources, where two workers would meet."""
    folder = tmp_path_factory.mktemp("checkout")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for path in filter(None, tracked.split("\0")):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(checkout)]
    subprocess.run(command, check=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of a fresh virtual environment with the wheel; dependencies come from this environment."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A path that a .pth file adds is searched, but the editable install's own .pth in it is not obeyed.
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    subprocess.run(
        [str(folder / "bin" / "pip"), "install", "-q", "--no-deps", "--force-reinstall", str(wheel)], check=True
    )
    return folder / "bin"


PROGRAM = """\
from metaalign_edge import Dialog, EdgeError, Model, Turn, generate


def answer(query: str) -> tuple[str, int]:
    dialog = Dialog("Be brief.", "I like tea.", [Turn(query)])
    try:
        with Model.open() as model:
            return generate(model, dialog, max_tokens=8).response, 0
    except EdgeError as error:
        return str(error), error.exit_code
"""


def test_the_wheel_answers_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    command = [str(installed / "metaalign-edge"), "chat", "--pref", "Answer in capital letters.", "What is the moon?"]
    result = subprocess.run(
        command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert "MOON" in result.stdout and result.stdout == result.stdout.upper()


def test_the_wheel_renders_and_says_where_it_was_loaded_from(installed: Path, tmp_path: Path) -> None:
    code = "import metaalign_edge as e, metaalign_edge_convert as c; print(e.__file__); print(c.__file__)"
    result = subprocess.run(
        [str(installed / "python"), "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(str(installed.parent) in line for line in result.stdout.splitlines())
    document = subprocess.run(
        [str(installed / "metaalign-edge"), "render", "--tokens", "--json", "--pref", "short", "tea?"],
        cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert {token["tier"] for token in json.loads(document.stdout)["tokens"]} == {"scaffold", "user_info", "query"}


def test_the_wheel_brings_its_help_and_its_completion(installed: Path, tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        command = [str(installed / "metaalign-edge"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    assert said("help", "exit-codes").startswith("Exit codes\n\n| exit code | means |")
    assert said("help").count("\n") == len([*(ROOT / "docs").glob("*.md")])
    assert said("completion", "fish").startswith("# Completion of metaalign-edge in fish")


def test_the_wheel_takes_no_name_but_its_own(wheel: Path) -> None:
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert all(name.startswith("metaalign_edge") for name in names), names


def test_the_wheel_holds_every_file_of_its_parts(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert {"runtime", "templates", "convert", "preferences", "commands", "models", "tune", "docs"} <= folders
    wanted = {"metaalign_edge.py", "metaalign_edge-stubs/__init__.pyi"}
    wanted |= {f"metaalign_edge_{path}" for path in tracked if path.split("/")[0] in folders}
    ours = {name for name in names if ".dist-info/" not in name}
    assert ours == wanted


def test_nothing_is_importable_but_by_its_installed_name(installed: Path, tmp_path: Path) -> None:
    folders = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
    code = f"import importlib.util as u; print([u.find_spec(name) for name in {[*folders, 'tests', 'benchmarks']!r}])"
    result = subprocess.run([str(installed / "python"), "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert set(result.stdout.strip("[]\n").split(", ")) == {"None"}, result


def test_the_wheel_is_typed_for_a_strict_program(installed: Path, tmp_path: Path) -> None:
    def checked(program: str, *arguments: str) -> str:
        (tmp_path / "program.py").write_text(program)
        command = [str(installed / "python"), "-m", "mypy", "--strict", *arguments, "program.py"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout

    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert "no issues found" in checked(program)
    wrong = "from metaalign_edge import Model, generate\nwith Model.open() as model:\n    generate(model, 3, seed='x').respons\n"
    assert set(re.findall(r"\[([a-z-]+)\]", checked(wrong))) == {"arg-type", "attr-defined"}
    assert "no issues found" in checked(PROGRAM)


def test_the_types_are_those_of_the_file(installed: Path, tmp_path: Path) -> None:
    command = [str(installed / "python"), "-m", "mypy.stubtest", "--ignore-missing-stub", "metaalign_edge"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_a_machine_without_a_network_installs_from_a_folder(checkout: Path, tmp_path: Path) -> None:
    """llama-cpp-python is not compiled again where pip has kept what it built for this environment."""
    commands = [
        re.findall(rf"<!-- {name} -->\n```bash\n([^\n]+)\n```", (ROOT / "docs" / "offline.md").read_text())[0]
        for name in ("wheels", "offline")
    ]
    gather = commands[0].replace("pip", f"{sys.executable} -m pip", 1).replace("wheels .", f"{tmp_path}/wheels .")
    subprocess.run(["sh", "-c", gather], cwd=checkout, env={**os.environ, "HOME": HOME}, check=True)
    nowhere = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "https_proxy": "http://127.0.0.1:9"}
    nowhere["PIP_CONFIG_FILE"] = os.devnull
    install = commands[1].replace("python3", sys.executable, 1)
    subprocess.run(["sh", "-c", install], cwd=tmp_path, env=nowhere, check=True)
    answer = [str(tmp_path / ".venv/bin/metaalign-edge"), "chat", "--temp", "0", "What is the moon?"]
    said = subprocess.run(answer, cwd=tmp_path, env=nowhere, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert said.returncode == 0 and "moon" in said.stdout, said.stderr
