"""What a call costs: where its time went can be seen. (What memory it takes: test_runtime_memory.)"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import metaalign_edge as edge
from metaalign_edge import Model, Settings
from metaalign_edge_runtime.errors import Interrupted, LoadError
from metaalign_edge_runtime.llama import library
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.llama.vocabulary import VocabularyLoader

Run = Callable[..., "subprocess.CompletedProcess[str]"]
CPU = Settings(threads=1, gpu_layers="0")


def test_laps_are_added_up_and_the_rest_is_other() -> None:
    watch = edge.Stopwatch()
    for _ in range(2):
        with watch("a lap"):
            time.sleep(0.01)
    with pytest.raises(ZeroDivisionError), watch("a failure"):
        time.sleep(0.01)
        1 / 0  # noqa: B018
    time.sleep(0.01)
    assert watch.laps["a lap"] >= 20 and watch.laps["a failure"] >= 10
    total, rest = re.fullmatch(r"(\d+) ms: start \d+, a lap \d+, a failure \d+, other (\d+)", str(watch)).groups()  # type: ignore[union-attr]
    assert int(rest) >= 10 and int(total) >= 40


def test_verbose_says_where_the_time_went(run: Run) -> None:
    (line,) = (one for one in run("chat", "-v", "What is tea?").stderr.splitlines() if one.startswith("time "))
    spent, memory = line.split("; ")
    total, *laps = (int(number) for number in re.findall(r"\d+", spent))
    names = re.findall(r"[a-z.]+(?= \d)", spent)[1:]
    assert names == [*"start options metadata plan template model tokens context prompt answer other".split()]
    assert abs(sum(laps) - total) <= len(laps)
    assert re.fullmatch(r"memory \d{2,} MB at most", memory)


def test_laps_of_another_thread_are_not_the_calls() -> None:
    watch = edge.Stopwatch()

    def work() -> None:
        with watch("elsewhere"):
            time.sleep(0.01)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    watch.mark("so far")
    assert "elsewhere" not in watch.laps and watch.laps["so far"] >= 10


@pytest.mark.parametrize("program", [True, False])
def test_a_vocabulary_is_loaded_while_something_else_is_done(
    program: bool, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metaalign_edge_runtime.llama.library.is_program", program)
    usual = sys.getswitchinterval()
    model = Model(ModelFile(demo), CPU, Interrupt())
    assert model.pointer is None and not hasattr(model, "vocabulary")
    assert (sys.getswitchinterval() < usual) == program
    with model:
        assert model.pointer and model.vocabulary.encode("tea", special=False) and model.load_ms > 0
        assert sys.getswitchinterval() == usual


@pytest.mark.parametrize("name", ["demo", "tiny", "parts"])
def test_weights_are_loaded_without_words_but_with_as_many_tokens(name: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(name)
    with Model(ModelFile(found[0] if name == "parts" else found), CPU) as model:
        llama, other = library.llama_cpp(), library.llama_cpp().llama_model_get_vocab(model.pointer)
        assert llama.llama_vocab_type(other) == 0 != llama.llama_vocab_type(model.vocabulary.pointer)
        assert llama.llama_vocab_n_tokens(other) == model.vocabulary.size > 100


def test_a_file_that_does_not_load_is_refused_and_nothing_stays_of_it(demo: Path, tmp_path: Path) -> None:
    damaged, unknown = tmp_path / "damaged.gguf", tmp_path / "unknown.gguf"
    damaged.write_bytes(demo.read_bytes()[:-1000])
    unknown.write_bytes(demo.read_bytes().replace(b"gpt2", b"gpt9", 1))
    for path, reason in ((damaged, "cannot load"), (unknown, "unknown tokenizer: 'gpt9'")):
        for interrupt in (Interrupt(), None):
            model = Model(ModelFile(path), CPU, interrupt)
            with pytest.raises(LoadError, match=reason):
                model.wait()
            assert model.pointer is None and model.wait().pointer is None


def test_a_vocabulary_that_nobody_takes_is_freed(demo: Path) -> None:
    loading = VocabularyLoader(demo)
    with pytest.raises(ZeroDivisionError), loading:
        1 / 0  # noqa: B018
    with pytest.raises(LoadError):
        loading.take(ModelFile(demo))
    loading.close()


def test_ctrl_c_stops_a_load(demo: Path) -> None:
    interrupt = Interrupt()
    interrupt.raised = True
    with pytest.raises(Interrupted):
        Model(ModelFile(demo), CPU, interrupt).wait()


def test_a_pipe_is_not_waited_for(tmp_path: Path, demo: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with VocabularyLoader(tmp_path / "pipe") as loading, pytest.raises(LoadError):
        loading.take(ModelFile(demo))
