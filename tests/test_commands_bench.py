"""`bench` measures real work and real calls; what it prints is what it measured."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from metaalign_edge import Model, Settings
from metaalign_edge_commands.measure.speeds import BENCH_PROMPT, BENCH_TOKENS, Bench, Speeds
from metaalign_edge_runtime.llama.gguf import ModelFile
from metaalign_edge_runtime.llama.interrupt import Interrupt

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.slow
def test_the_document_is_complete_and_the_chart_is_drawn(run: Run, demo: Path, tmp_path: Path) -> None:
    chart = tmp_path / "bench.svg"
    result = run("bench", "--rounds", "1", "--json", "--chart", str(chart))
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    numbers = ("prefill_tps", "decode_tps", "guided_tps", "first_token_ms", "first_token_cached_ms", "peak_mb")
    assert found.keys() == {"model", "parallel", *numbers} and found["model"] == demo.name
    assert found["parallel"].keys() == {"2", "4", "8"}
    assert all(figure > 0 for figure in (*found["parallel"].values(), *(found[name] for name in numbers)))
    assert found["peak_mb"] > demo.stat().st_size / 1e6
    assert "first token, cached" in chart.read_text() and "write 8 at a time" in chart.read_text()


def test_the_table_relates_what_can_be_related() -> None:
    speeds = Speeds("tiny.gguf", 1000.0, 100.0, {"2": 150.0}, 50.0, 400.0, 100.0, 60.0)
    assert [row[:3] for row in speeds.rows()] == [
        ["read a prompt", "1,000.0", ""],
        ["write an answer", "100.0", "1.00"],
        ["write 2 at a time", "150.0", "1.50"],
        ["write with a strength", "50.0", "0.50"],
        ["first token", "400.0", "1.00"],
        ["first token, cached", "100.0", "0.25"],
        ["memory", "60.0", ""],
    ]


def test_what_is_measured_is_done(tiny: Path) -> None:
    settings = Settings(temperature=0.0, threads=1, gpu_layers="0")
    with Model(ModelFile(tiny), settings) as model, Bench(model, settings, Interrupt()) as bench:
        assert bench.read() > 0 and bench.write(4) > 0
        lengths = [len(sequence.tokens) for sequence in bench._engine.sequences]
        assert lengths == [BENCH_PROMPT // 4 + BENCH_TOKENS] * 4 + [0] * 4


@pytest.mark.parametrize("code, arguments", [
    (3, ("-m", "./none.gguf")),
    (2, ("--rounds", "0")),
    (2, ("--template", "nosuch")),
    (2, ("--chart", "bench.pdf")),
    (8, ("--chart", "no/such/folder/bench.png")),
])  # fmt: skip
def test_what_cannot_be_measured_is_refused(code: int, arguments: tuple[str, ...], refuses: Callable[..., str]) -> None:
    assert refuses(code, "bench", *arguments)
