"""-v is this program's own account, -vv shows llama.cpp's log, too; nothing that a file says steers a terminal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.gguf_files import copy_model
from helpers.terminal import Terminal

Says = Callable[..., tuple[str, str]]
LOG = (
    "print_info:",
    "llama_model_loader:",
    "load:",
    "llama_context:",
    "sched_reserve:",
)  # how lines of llama.cpp begin


def logged(error: str) -> bool:
    return any(line.startswith(LOG) for line in error.splitlines())


def test_v_names_model_template_plan_sampling_and_time_and_vv_shows_the_log_besides(tiny: Path, says: Says) -> None:
    chat = ("chat", "-m", str(tiny), "-n", "2")
    ours = ("model ", "template ", "memory for ", "sampling: ", "time ")
    assert says(*chat, "tea?")[1] == ""
    for flags, log in ((("-v",), False), (("--verbose",), False), (("-vv",), True), (("--llama-log",), True)):
        error = says(*chat, *flags, "tea?")[1]
        assert logged(error) == log
        for begin in ours:
            assert sum(line.startswith(begin) for line in error.splitlines()) == 1, (flags, begin)


@pytest.mark.parametrize("arguments", [
    ("compare", "--pref", "a", "--pref", "b", "-n", "2", "tea?"), ("render", "--tokens", "tea?"),
    ("batch", "-n", "2", "-"),
])  # fmt: skip
def test_every_command_with_a_model_tells_the_two_apart(arguments: tuple[str, ...], tiny: Path, says: Says) -> None:
    command, *rest = arguments
    for flag in ("-v", "-vv"):
        error = says(command, "-m", str(tiny), flag, *rest, stdin=b'{"query": "tea?"}\n')[1]
        assert logged(error) == (flag == "-vv")


def test_settings_give_both_and_q_overrides_both(
    tiny: Path, says: Says, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("METAALIGN_EDGE_CONFIG", str(tmp_path))
    chat = ("chat", "-m", str(tiny), "-n", "1")
    for setting in ("verbose", "llama_log"):
        (tmp_path / "config.toml").write_text(f"{setting} = true\n")
        error = says(*chat, "tea?")[1]
        assert "template metaalign" in error and logged(error) == (setting == "llama_log")
        assert says(*chat, "-q", "tea?")[1] == ""


@pytest.mark.parametrize("flags", [("-v",), ("-vv",), ()])
def test_a_file_steers_no_terminal(flags: tuple[str, ...], tiny: Path, tmp_path: Path) -> None:
    hostile = {
        "general.name": "a\x1b[31mred\x07\x9b2J\rname",
        "general.description": "\x1b]0;title\x07\x1b[2J",
        "metaalign.template": "\x1b[2Jnone\rof it",
    }
    model = copy_model(tiny, tmp_path / "hostile.gguf", drop=("metaalign.template", "general.name"), add=hostile)
    for command in (("chat", "-n", "1", "--temp", "0"), ("render", "--tokens")):
        terminal = Terminal(command[0], "-m", str(model), *command[1:], *flags, "tea?")
        shown = terminal.rest()
        assert terminal.leave() == 0
        assert not set(shown) & {"\x1b", "\x07", "\x9b", "\r"}
        if flags:
            assert "template \\x1b[2Jnone\\x0dof it" in shown
        if flags == ("-vv",):
            assert "a\\x1b[31mred\\x07" in shown and "\\x1b]0;title" in shown


def test_a_program_that_asks_for_the_log_gets_it_as_text(
    tiny: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from metaalign_edge import Model

    model = copy_model(tiny, tmp_path / "hostile.gguf", drop=("general.name",), add={"general.name": "\x1b[31mred"})
    with Model.open(model, verbose=True):
        pass
    out, error = capfd.readouterr()
    assert out == "" and "\\x1b[31mred" in error and "\x1b" not in error


def test_what_a_note_quotes_is_text(says: Says, tiny: Path) -> None:
    out, error = says("chat", "-m", str(tiny), "-n", "1", "-v", "--json", "--template-arg", "a\u0301=\x1b[2J", "tea?")
    assert "\x1b" not in error and json.loads(out)["output_tokens"] == 1
