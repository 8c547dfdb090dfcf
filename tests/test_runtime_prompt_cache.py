"""What was read of a meta-prompt is kept on the disk: the same answer, sooner, whatever became of the files."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_scheduler import memories  # noqa: F401  a fixture

import metaalign_edge as edge
from metaalign_edge import Answer, Dialog, Engine, Model, Scheduler, Settings, Turn
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.stores.prompt_cache import PromptCache

Run = Callable[..., "subprocess.CompletedProcess[str]"]
GREEDY = Settings(temperature=0.0, threads=1, max_tokens=12, context=256)
LONG = Dialog("be a kind and patient fox " * 6, "brief and quick", (Turn("does the dog jump"),))


@pytest.fixture(autouse=True)
def everything_is_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep states of tiny models, too."""
    monkeypatch.setattr(edge, "CACHE_WORTH_SAVING", 1)


@pytest.fixture
def model(tiny: Path) -> Iterator[Model]:
    with Model(ModelFile(tiny), GREEDY) as loaded:
        yield loaded


@pytest.fixture
def states(tmp_path: Path) -> PromptCache:
    return PromptCache(tmp_path / "states")


def ask(
    model: Model, states: PromptCache | None, dialog: Dialog = LONG, settings: Settings = GREEDY
) -> tuple[Answer, bytes]:
    """Answer in a context of its own; return the answer and the last logits, bit by bit."""
    template = edge.choose_template("auto", model.file)
    with Scheduler(model, template, settings, edge.AS_USUAL, Interrupt(), cache=states) as session:
        answer = edge.answer_one(session, edge.Request(dialog, 0))
        assert session.engine
        return answer, session.engine.logits(-1).tobytes()


def test_a_second_call_loads_the_meta_prompt_and_computes_the_same_bits(model: Model, states: PromptCache) -> None:
    first, bits = ask(model, states)
    (file,) = states.files()
    assert (first.cached_tokens, file.hits) == (0, 0)
    second, same = ask(model, states)
    assert second.cached_tokens == first.input_tokens - 1 - len(model.vocabulary.encode(LONG.turns[0].query, False)) - 1
    assert (second.response, same) == (first.response, bits) and states.files()[0].hits == 1
    assert ask(model, None)[1] == bits  # without states, too
    other = replace(LONG, turns=(Turn("and the fox"),))
    assert ask(model, states, other)[0].cached_tokens == second.cached_tokens
    assert ask(model, states, other)[1] == ask(model, None, other)[1]


@pytest.mark.parametrize("kind", ["full", "window", "hybrid"])
def test_every_kind_of_memory_can_be_kept(kind: str, memories: dict[str, Path], states: PromptCache) -> None:  # noqa: F811
    with Model(ModelFile(memories[kind]), GREEDY) as model:
        wanted = ask(model, None)
        assert ask(model, states)[1] == wanted[1]
        again, bits = ask(model, states)
        assert again.cached_tokens > 30 and (again.response, bits) == (wanted[0].response, wanted[1])


def test_a_conversation_goes_on_from_its_longest_state(model: Model, states: PromptCache) -> None:
    first, _ = ask(model, states)
    turns = (Turn(LONG.turns[0].query, first.response), Turn("and the fox"))
    second, _ = ask(model, states, replace(LONG, turns=turns))
    assert 0 < second.cached_tokens < first.input_tokens  # that of the meta-prompt
    third, bits = ask(model, states, replace(LONG, turns=turns))
    assert third.cached_tokens > first.input_tokens and len(states.files()) == 2
    assert bits == ask(model, None, replace(LONG, turns=turns))[1]


@pytest.mark.parametrize(
    "changes", [{"system_info": "be a kind and patient cat " * 6}, {"user_info": "brief and slow"}]
)
def test_another_meta_prompt_is_another_state(changes: dict[str, str], model: Model, states: PromptCache) -> None:
    ask(model, states)
    assert ask(model, states, replace(LONG, **changes))[0].cached_tokens == 0
    assert len(states.files()) == 2


def test_another_model_or_build_is_another_state(
    model: Model, states: PromptCache, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(model, states)
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(tiny.read_bytes())
    with Model(ModelFile(copy), GREEDY) as other:
        assert ask(other, states)[0].cached_tokens == 0
    monkeypatch.setattr("metaalign_edge_runtime.llama.library.build", lambda: "another")
    assert ask(model, states)[0].cached_tokens == 0
    monkeypatch.undo()
    monkeypatch.setattr(edge, "CACHE_WORTH_SAVING", 1)
    with Model(ModelFile(copy), GREEDY) as other:
        assert ask(other, states)[0].cached_tokens > 0
        copy.unlink()  # what is loaded answers on, and knows its states
        assert ask(other, states)[0].cached_tokens > 0


@pytest.mark.parametrize("keep", [shutil.copyfile, shutil.copy2])  # another time, the same time
def test_a_model_in_the_place_of_another_is_another_state(
    keep: Callable[[Path, Path], object], states: PromptCache, tiny: Path, tmp_path: Path
) -> None:
    place, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    shutil.copy2(tiny, place)
    shutil.copy2(tiny, other)
    with Model(ModelFile(place), GREEDY) as first:
        ask(first, states)
        assert ask(first, states)[0].cached_tokens > 0
    keep(other, place)
    with Model(ModelFile(place), GREEDY) as second:
        assert ask(second, states)[0].cached_tokens == 0


def damage(data: bytes) -> dict[str, bytes]:
    return {
        "empty": b"", "a head only": data[:48], "half a head": data[:20], "cut": data[:-1], "longer": data + b"x",
        "a bit": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:], "another magic": b"GGUF" + data[4:], "zeros": bytes(len(data)),
    }  # fmt: skip


@pytest.mark.parametrize("name", damage(bytes(100)))
def test_a_damaged_file_is_removed_and_the_answer_is_right(name: str, model: Model, states: PromptCache) -> None:
    wanted = ask(model, states)
    (file,) = states.files()
    file.path.write_bytes(damage(file.path.read_bytes())[name])
    answer, bits = ask(model, states)
    assert (answer.cached_tokens, bits) == (0, wanted[1])
    assert ask(model, states)[0].cached_tokens > 0  # there again


def test_what_is_no_file_is_passed_over_and_the_count_of_hits_has_an_end(model: Model, states: PromptCache) -> None:
    ask(model, states)
    (file,) = states.files()
    data = bytearray(file.path.read_bytes())
    data[8:16] = b"\xff" * 8
    file.path.write_bytes(data)
    assert ask(model, states)[0].cached_tokens > 0 and states.files()[0].hits == 2**64 - 1
    file.path.unlink()
    os.mkfifo(file.path)
    assert ask(model, states)[0].cached_tokens == 0


def test_a_state_under_another_name_is_not_trusted(model: Model, states: PromptCache) -> None:
    ask(model, states)
    (first,) = states.files()
    other = replace(LONG, user_info="brief and slow")
    ask(model, states, other)
    (second,) = [file for file in states.files() if file.path != first.path]
    second.path.write_bytes(first.path.read_bytes())
    assert ask(model, states, other)[0].cached_tokens == 0


def test_no_other_user_may_read_them(model: Model, states: PromptCache) -> None:
    before = os.umask(0)
    try:
        ask(model, states)
    finally:
        os.umask(before)
    assert stat.S_IMODE(states.folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in states.folder.iterdir()} == {0o600}


def test_the_least_recently_used_make_room(model: Model, states: PromptCache) -> None:
    ask(model, states)
    size = states.files()[0].bytes
    states.most = 3 * size + size // 2
    dialogs = [replace(LONG, user_info=f"brief and number {place}") for place in range(4)]
    for place, dialog in enumerate(dialogs[:2]):
        ask(model, states, dialog)
        for file in states.files():
            os.utime(file.path, (place, file.used - 100))
    assert ask(model, states)[0].cached_tokens > 0  # used now: it stays
    ask(model, states, dialogs[2])
    ask(model, states, dialogs[3])
    assert len(states.files()) == 3 and ask(model, states)[0].cached_tokens > 0
    assert ask(model, states, dialogs[0])[0].cached_tokens == 0
    states.most = size // 2
    ask(model, states, replace(LONG, user_info="too large"))
    assert all(file.bytes > size // 2 for file in states.files())  # it was not even written


@pytest.mark.parametrize("place", ["a file", "read-only", "full"])
def test_where_nothing_can_be_written_nothing_is_lost_but_time(
    place: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "states"
    if place == "a file":
        folder.write_text("in the way")
    else:
        error = OSError(30 if place == "read-only" else 28, "no")

        def refuse(*_: Any, **__: Any) -> int:
            raise error

        monkeypatch.setattr(edge.os, "open" if place == "read-only" else "replace", refuse)
    answer, bits = ask(model, PromptCache(folder))
    assert (answer.finish_reason, bits) == ("length", ask(model, None)[1])
    assert place == "a file" or list(folder.iterdir()) == []


def test_guided_contexts_are_kept_each(model: Model, states: PromptCache) -> None:
    settings = replace(GREEDY, system_strength=2.0, pref_strength=3.0)
    wanted = ask(model, None, LONG, settings)
    assert ask(model, states, LONG, settings)[1] == wanted[1]
    again, bits = ask(model, states, LONG, settings)
    assert again.cached_tokens > 30 and (again.response, bits) == (wanted[0].response, wanted[1])
    assert len(states.files()) >= 2


def test_what_is_near_is_not_kept(model: Model, states: PromptCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "CACHE_WORTH_SAVING", 1 << 40)
    ask(model, states)
    assert states.files() == [] and not states.folder.exists()


def test_ctrl_c_while_a_prompt_is_read_keeps_no_half_state(model: Model, states: PromptCache) -> None:
    template, interrupt = edge.choose_template("auto", model.file), Interrupt()
    with Scheduler(model, template, GREEDY, edge.AS_USUAL, interrupt, cache=states) as session:
        interrupt.raised = True
        assert edge.answer_one(session, edge.Request(LONG, 0)).finish_reason == "interrupted"
    assert states.files() == []


def test_a_state_that_llama_cpp_does_not_take_is_an_empty_sequence(model: Model) -> None:
    with Engine(model, GREEDY, Interrupt(), 64) as engine:
        (sequence,) = engine.sequences
        assert not engine.restore(sequence, [5, 6], bytearray(b"nonsense" * 4)) and sequence.tokens == []


@pytest.fixture
def far(demo: Path, run: Run) -> tuple[str, ...]:
    """A call whose meta-prompt is long enough to be kept, with the embedded model."""
    return ("--temp", "0", "--json", "--system", "Answer kindly and with patience, please. " * 55, "What is tea?")


@pytest.mark.slow
def test_the_command_line_keeps_shows_and_clears(run: Run, far: tuple[str, ...]) -> None:
    first, second = (json.loads(run("chat", *far).stdout) for _ in range(2))
    assert first["cached_tokens"] == 0 and second["cached_tokens"] > 500 and first["response"] == second["response"]
    assert json.loads(run("chat", "--no-cache", *far).stdout)["cached_tokens"] == 0
    shown = json.loads(run("cache", "show", "--json").stdout)
    assert shown["hits"] == 1 and len(shown["states"]) == 1 and shown["bytes"] == shown["states"][0]["bytes"] > 1e6
    assert "\n1 state, " in run("cache", "show").stdout
    assert "1 state removed" in run("cache", "clear").stderr
    assert json.loads(run("cache", "show", "--json").stdout)["states"] == []
    assert json.loads(run("chat", *far).stdout)["cached_tokens"] == 0


def test_processes_at_the_same_time_do_not_harm_each_other(far: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "metaalign_edge", "chat", "--no-stdin", "-t", "1", *far]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(5)]
    found = [process.communicate() for process in processes]
    assert all(process.returncode == 0 for process in processes) and {error for _, error in found} == {b""}
    assert len({json.loads(out)["response"] for out, _ in found}) == 1
