"""What a strength gains: an early checkpoint of the embedded model's training, which half follows, follows harder.

`tests/early.gguf` is `python -m metaalign_edge_tune.demo --out build/early --steps 600 --no-dpo`, then
`metaalign-edge convert build/early --outtype Q4_K_M`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EARLY = Path(__file__).parent.parent / "early.gguf"


@pytest.fixture(scope="module")
def rates(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Ask at strengths of 1 and 2, 80 cases a section; return what each gave."""
    command = [sys.executable, "-m", "metaalign_edge", "eval", "-m", str(EARLY), "--size", "80", "--seed", "9"]
    command += [
        "--strength",
        "pref=1,2",
        "--json",
        "-q",
        "--answers",
        str(tmp_path_factory.mktemp("early") / "a.jsonl"),
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)["strengths"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("what", ["not_by_default", "implicit"])
def test_a_preference_is_followed_more_often(what: str, rates: list[dict[str, Any]]) -> None:
    usual, strong = (one["adherence"][what] for one in rates)
    assert usual["n"] > 100 and strong["rate"] > usual["rate"] + 0.03


def test_a_stronger_user_wins_more_conflicts_and_loses_few_facts(rates: list[dict[str, Any]]) -> None:
    usual, strong = rates
    assert strong["conflict"]["system"]["rate"] < usual["conflict"]["system"]["rate"] - 0.05
    assert usual["facts"]["rate"] > strong["facts"]["rate"] > usual["facts"]["rate"] - 0.05


def test_without_a_preference_nothing_changes(rates: list[dict[str, Any]]) -> None:
    usual, strong = rates
    for kind in ("plain", "form"):
        assert abs(strong["plain"][kind]["rate"] - usual["plain"][kind]["rate"]) <= 0.03  # but for the bits of a batch
