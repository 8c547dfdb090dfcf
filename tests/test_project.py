"""A project's file: the nearest upwards, what it may set, and how the user learns of it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from metaalign_edge_runtime.stores import config

Says = Callable[..., tuple[str, str]]
Refuses = Callable[..., str]


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's file, in whose `deep/inside` the test stands."""
    monkeypatch.delenv("METAALIGN_EDGE_PROJECT")
    (tmp_path / "project" / "deep" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project" / "deep" / "inside")
    path = tmp_path / "project" / ".metaalign.toml"
    path.write_text('system = "Be kind."\npref = ["@concise", "I live in Rome."]\n')
    return path


BOTH = "<|system_info|>Be kind.<|end|><|user_info|>Answer in one sentence.\nI live in Rome.<|end|>"


def test_the_nearest_file_upwards_sets_system_info_and_preference(says: Says, project: Path) -> None:
    assert BOTH in says("render", "tea?")[0]
    (project.parent / "deep" / ".metaalign.toml").write_text('system = "Be brief."\n')
    assert "<|system_info|>Be brief.<|end|><|user_info|><|end|>" in says("render", "tea?")[0]


def test_it_comes_after_flags_and_variables_and_before_the_users_file(
    says: Says, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.store_setting("pref", "the user's")
    config.store_setting("system", "the user's")
    assert BOTH in says("render", "tea?")[0]
    assert f"{project} comes before it" in says("pref", "default", "json")[1]
    assert f"{project} comes before it" in says("config", "set", "system", "x")[1]
    assert json.loads(says("config", "show", "--json")[0])["system"] == {"value": "Be kind.", "origin": str(project)}
    assert "<|user_info|>asked<|end|>" in says("render", "--pref", "asked", "tea?")[0]
    assert "<|user_info|><|end|>" in says("render", "--no-pref", "tea?")[0]
    monkeypatch.setenv("METAALIGN_EDGE_SYSTEM", "the shell's")
    assert "<|system_info|>the shell's<|end|>" in says("render", "tea?")[0]


def test_its_model_is_found_from_where_the_file_lies(says: Says, tiny: Path, project: Path) -> None:
    (project.parent / "models").mkdir()
    (project.parent / "models" / "ours.gguf").symlink_to(tiny)
    project.write_text('model = "models/ours.gguf"\n')
    assert f"{project} comes before it" in says("models", "default")[1]
    assert json.loads(says("chat", "-n", "1", "--json", "tea?")[0])["model"] == "ours.gguf"


def test_the_first_use_is_announced_in_one_line_and_again_when_it_sets_something_else(
    says: Says, project: Path
) -> None:
    def announced(*arguments: str) -> list[str]:
        error = says("render", *arguments, "tea?")[1]
        return [line for line in error.splitlines() if str(project) in line]

    project.write_text('system = "Be kind."\n')
    assert announced("-q") == [] and announced("--system", "mine") == []
    (line,) = announced()
    assert line.endswith(f'{project} sets system "Be kind." (METAALIGN_EDGE_PROJECT=0 ignores it)')
    assert announced() == []
    project.write_text('# a comment\nsystem = "Be kind."\n')
    assert announced() == []
    project.write_text(f"system = {json.dumps('two' + chr(10) + 'lines ' + 'x' * 99)}\npref = ['@json', 'a']\n")
    (line,) = announced()
    assert f'sets system "two lines {"x" * 49}…", pref "@json, a" (' in line and announced() == []


def test_another_users_file_is_announced_at_every_use(
    says: Says, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: project.stat().st_uid + 1)
    for _ in range(2):
        assert f"another user's file (uid {project.stat().st_uid}), sets system" in says("render", "tea?")[1]


def test_it_is_announced_each_time_where_that_cannot_be_remembered(
    says: Says, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAALIGN_EDGE_DATA", "/dev/null/metaalign-edge")
    for _ in range(2):
        assert f"{project} sets" in says("render", "tea?")[1]


@pytest.mark.parametrize("line, said", [
    ('modle = "x"', "no setting 'modle': do you mean model?"),
    ('template = "x.jinja"', "no setting 'template': it takes system, pref, model"),
    ("temp = 0", "no setting 'temp': it takes system, pref, model"),
    ("system = Be kind.", "no TOML"),
    ("system = true", "system: it takes a text"),
    ('pref = "@nowhere-at-all"', "pref: no preference profile @nowhere-at-all"),
    ('model = "./none.gguf"', "model: no model file"),
])  # fmt: skip
def test_it_may_set_nothing_else_and_its_mistakes_are_named(
    line: str, said: str, refuses: Refuses, says: Says, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project.write_text(f"{line}\n")
    found = refuses(3 if "@" in line or "none" in line else 2, "render", "tea?")
    assert f"{project}" in found and said in found
    assert "--pref" in says("render", "--help")[0]
    monkeypatch.setenv("METAALIGN_EDGE_PROJECT", "0")
    says("render", "tea?")


def test_it_reads_no_other_file(says: Says, project: Path) -> None:
    (project.parent / "secret.txt").write_text("secret")
    for text in ("secret.txt", "@../../secret", "@/etc/passwd", "file:secret.txt"):
        project.write_text(f"pref = {json.dumps(text)}\n")
        assert f"<|user_info|>{text}<|end|>" in says("render", "tea?")[0]


def test_a_working_folder_that_is_gone_has_no_project(says: Says, project: Path, tiny: Path) -> None:
    Path.cwd().rmdir()
    assert "<|user_info|><|end|>" in says("render", "-m", str(tiny), "tea?")[0]
    assert "project   -" in says("paths")[0]


def test_what_is_no_file_is_passed_by(says: Says, project: Path) -> None:
    os.mkfifo(project.parent / "deep" / ".metaalign.toml")
    (project.parent / "deep" / "inside" / ".metaalign.toml").mkdir()
    assert BOTH in says("render", "tea?")[0]
