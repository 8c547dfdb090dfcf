"""A vocabulary that loads in a thread of its own, beside the weights."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from metaalign_edge import Model, Settings
from metaalign_edge_runtime.errors import LoadError
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt
from metaalign_edge_runtime.llama.library import Background

GREEDY = Settings(temperature=0.0, threads=1, max_tokens=12, context=256)


def test_one_interrupt_may_hold_another() -> None:
    usual, interrupt = signal.getsignal(signal.SIGINT), Interrupt()
    with interrupt:
        ours = signal.getsignal(signal.SIGINT)
        with interrupt:
            pass
        assert signal.getsignal(signal.SIGINT) == ours != usual
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is usual and interrupt.raised


def test_what_fails_in_the_background_is_raised_where_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaalign_edge_runtime.llama.library.is_program", True)
    usual = sys.getswitchinterval()
    one, two = Background(lambda: 1 / 0), Background(lambda: 2)
    assert sys.getswitchinterval() < usual
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            one.result()
    assert sys.getswitchinterval() < usual  # the other one may still be at work
    assert two.result() == two.result() == 2
    assert sys.getswitchinterval() == usual


def test_a_model_that_is_closed_while_it_loads_is_freed(tiny: Path, tmp_path: Path) -> None:
    Model(ModelFile(tiny), GREEDY, Interrupt()).close()
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(tiny.read_bytes()[:-5000])
    model = Model(ModelFile(damaged), GREEDY, Interrupt())
    with pytest.raises(LoadError):
        model.wait()
    model.close()
