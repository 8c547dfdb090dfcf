"""The benchmarks are no part of what is installed, and nobody else would notice that one does not run any more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def said_by(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("script", sorted(path.name for path in BENCHMARKS.glob("*.py")))
def test_each_says_how_it_is_called(script: str) -> None:
    assert f"python benchmarks/{script}" in said_by(script, "--help")


@pytest.mark.slow
def test_starts_are_timed(tmp_path: Path) -> None:
    said = said_by("startup.py", "--runs", "1", "--llm", "")
    assert "\nmetaalign-edge --version " in said and "of the heavy ones jinja2" in said.splitlines()[-1]


@pytest.mark.slow
def test_the_growth_of_a_conversion_is_measured() -> None:
    *_, row = said_by("conversion.py", "--sizes", "0.02", "--rounds", "1").splitlines()
    size, seconds, _, _, peak = map(float, row.split())
    assert size > 0 and seconds > 0 and 50 < peak < 2000


@pytest.mark.slow
def test_speeds_are_compared(demo: Path) -> None:
    said = said_by("decode.py", "--model", str(demo), "--rounds", "1", "--tokens", "4", "--threads", "1")
    ways = [line.split("  ")[0] for line in said.splitlines()[3:]]
    assert ways == ["answer_one", "Llama", "bare loop"]
