"""What a call costs: its memory is known before it is allocated, and where its time went can be seen."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from test_parallel import memories  # noqa: F401  a fixture

import metaalign_edge as edge
from metaalign_edge import Engine, Feed, Interrupt, LoadError, Loading, Model, ModelFile, Settings

Run = Callable[..., "subprocess.CompletedProcess[str]"]
CPU = Settings(threads=1, gpu_layers="0")


@pytest.mark.parametrize("kind", ["full", "demo"])
def test_the_bytes_of_a_token_are_what_llama_cpp_stores_of_it(kind: str, memories: dict[str, Path], demo: Path) -> None:  # noqa: F811
    file = ModelFile(demo if kind == "demo" else memories[kind])
    with Model(file, CPU) as model, Engine(model, CPU, Interrupt(), 256) as engine:
        (sequence,), sizes = engine.sequences, []
        for _ in range(2):
            engine.step([Feed(sequence, [7] * 20, False)])
            sizes.append(len(engine.state(sequence)))
        about = (sizes[1] - sizes[0]) / 20
        assert edge.cache_bytes(model) <= about <= edge.cache_bytes(model) + 16  # its position, and whose it is


@pytest.mark.parametrize("kind", ["window", "hybrid"])
def test_what_differs_by_layer_is_not_foretold(kind: str, memories: dict[str, Path]) -> None:  # noqa: F811
    with Model(ModelFile(memories[kind]), CPU) as model:
        assert edge.cache_bytes(model) == 0


def test_a_context_that_does_not_fit_is_refused_with_one_that_does(demo: Path) -> None:
    with Model(ModelFile(demo), CPU) as model:
        free, each = edge.free_memory(), edge.cache_bytes(model)
        assert each == 2 * 2 * 64 * 4 * 2  # keys and values, heads, their size, layers, bytes
        fits = int(0.4 * free / each / 3)
        edge.check_memory(model, fits, 3)
        with pytest.raises(LoadError) as refused:
            edge.check_memory(model, fits, 9)
    numbers = r"takes ([\d,.]+) GB .* ([\d,.]+) GB are free: -c (\d+) or --parallel (\d) would fit"
    ((takes, has, context, parallel),) = re.findall(numbers, str(refused.value))
    assert float(takes.replace(",", "")) == pytest.approx(each * 9 * fits / 1e9, abs=0.1)
    assert float(has.replace(",", "")) == pytest.approx(free / 1e9, rel=0.1)
    assert 0.6 * fits < int(context) < fits and parallel == "6"


def test_the_command_line_refuses_it_in_one_line(fails: Callable[..., str]) -> None:
    line = fails(5, "chat", "-ngl", "0", "-c", "2000000000", "What is tea?")
    assert re.search(
        r"a context of 2,000,000,000 tokens takes [\d,.]+ GB for .*, and [\d,.]+ GB are free: -c \d+", line
    )


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
    assert names == [*"start options metadata template model tokens context prompt answer other".split()]
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


def test_a_model_is_loaded_while_something_else_is_done(demo: Path, tmp_path: Path) -> None:
    usual = sys.getswitchinterval()
    with Loading(ModelFile(demo), CPU, Interrupt()) as loading, loading.take() as model:
        assert model.vocabulary.encode("tea", special=False)
    assert sys.getswitchinterval() == usual
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(demo.read_bytes()[:-1000])
    with pytest.raises(LoadError, match="cannot load"), Loading(ModelFile(damaged), CPU, Interrupt()) as loading:
        loading.take()


def test_a_model_that_nobody_takes_is_freed(demo: Path) -> None:
    loading = Loading(ModelFile(demo), CPU, Interrupt())
    with pytest.raises(ZeroDivisionError), loading:
        1 / 0  # noqa: B018
    assert loading.left is None


def test_ctrl_c_stops_a_load(demo: Path) -> None:
    interrupt = Interrupt()
    interrupt.raised = True
    with pytest.raises(edge.Interrupted), Loading(ModelFile(demo), CPU, interrupt) as loading:
        loading.take()
