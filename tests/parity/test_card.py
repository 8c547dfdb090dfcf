"""The card's figures are those of `eval`. `python tests/parity/test_card.py` measures them anew and writes them down."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from metaalign_edge_preferences import report, statistics

CARD = Path(__file__).resolve().parents[2] / "models" / "README.md"
TABLE = re.compile(r"(?<=<!-- eval -->\n)(?:\|.*\n)*")
SIZE = 1000  # cases a section behind the card's figures


def measured(size: int, seed: int) -> dict[str, Any]:
    """Return what `eval` says of the embedded model."""
    command = [sys.executable, "-m", "metaalign_edge", "eval", "--json", "--size", str(size), "--seed", str(seed)]
    line = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(line.stdout)
    return found


def tree(document: dict[str, Any]) -> dict[str, Any]:
    """Return the rates of a JSON document, as rates."""
    branches = {name: branch for name, branch in document.items() if isinstance(branch, dict)}
    fields = {"rate", "n", "low", "high"}
    return {
        name: statistics.Rate(**branch) if fields == set(branch) else tree(branch) for name, branch in branches.items()
    }


def rows(document: dict[str, Any]) -> dict[str, tuple[str, Any]]:
    """Return the rates as (meaning, rate) by their names in the card."""
    found = {}
    for group in report.groups(tree(document)):
        prefix = group.name.replace("adherence by family", "family")
        for row in group.rows:
            found[row.name if row.alone else f"{prefix}: {row.name}"] = (row.meaning, row.rate)
    return found


def table(document: dict[str, Any]) -> str:
    """Return the card's table."""
    lines = ["| rate | of | share (95 %) | n |", "| --- | --- | --- | --- |"]
    for name, (meaning, rate) in rows(document).items():
        share = f"{100 * rate.rate:.1f} % ({100 * rate.low:.1f}-{100 * rate.high:.1f})"
        lines.append(f"| {name} | {meaning} | {share} | {rate.n:,} |")
    return "".join(line + "\n" for line in lines)


FLOORS = {
    "adherence.seen": 0.9,
    "adherence.held_out.combination": 0.9,
    "adherence.held_out.frame": 0.8,
    "adherence.held_out.word": 0.2,
    "adherence.topic_transfer": 0.9,
    "adherence.explicit": 0.9,
    "adherence.implicit": 0.85,
    "conflict.system": 0.9,
    "conflict.control": 0.9,
    "steerability": 0.9,
    "facts": 0.9,
    "plain.plain": 0.9,
    "plain.form": 0.5,
    "plain.unknown": 0.85,
    "combined.two": 0.8,
    "combined.three": 0.6,
    "multi_turn.same": 0.9,
    "multi_turn.changed": 0.85,
    "opinions.background": 0.8,
    "opinions.stranger": 0.25,
    "opinions.consensus": 0.9,
    "priority": 0.8,
}  # far below what the card reports on more cases, far above what a broken path would give


def test_the_cards_figures_are_those_of_other_cases_too() -> None:
    (written,) = TABLE.findall(CARD.read_text())
    found = re.findall(r"^\| (.+?) \| .* \| [\d.]+ % \(([\d.]+)-([\d.]+)\) \|", written, re.MULTILINE)
    claimed = {name: (float(low), float(high)) for name, low, high in found}
    evaluated = measured(120, seed=1)
    again = rows(evaluated)
    assert claimed.keys() == again.keys() and len(claimed) > 50
    apart = {
        name: (claimed[name], rate)
        for name, (_, rate) in again.items()
        if rate.n >= 20  # of a handful of cases one is too many
        and (100 * rate.high < claimed[name][0] or 100 * rate.low > claimed[name][1])
    }
    assert not apart
    for path, floor in FLOORS.items():
        found = functools.reduce(dict.__getitem__, path.split("."), evaluated)
        assert found["n"] >= 120 and found["rate"] >= floor, (path, found)


if __name__ == "__main__":
    CARD.write_text(TABLE.sub(lambda _: table(measured(SIZE, seed=0)), CARD.read_text()))
