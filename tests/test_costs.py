"""What a call costs: where its time went can be seen. (What memory it takes: test_fit.)"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import metaalign_edge as edge
from metaalign_edge import Interrupt, LoadError, Loading, ModelFile, Settings

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
