"""Measure a model on dialogs that training never saw: `python -m metaalign_edge_tune.evaluate build/demo`.

`suite` makes the test rows, `measure` runs any `generate(row) -> str` over them, `summary` and `table` give the rates.
A response obeys when the checkers of all its preferences hold; it is exact when it is the text that the data give, word
for word.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import TypeVar

from metaalign_edge_preferences import SPLITS, families
from metaalign_edge_preferences.statistics import Rate, rate

from .dataset import Plan, Row, held_out_pair, subjects, write_row

__all__ = [
    "Generate",
    "Result",
    "edge_generator",
    "main",
    "measure",
    "suite",
    "summary",
    "table",
    "torch_generator",
]

Generate = Callable[[Row], str]
T = TypeVar("T")

_LONGEST = 300  # tokens of a response


@dataclass(frozen=True)
class Result:
    """One row and what the model made of it."""

    row: Row
    response: str

    @property
    def obeyed(self) -> bool:
        """Tell whether every check holds."""
        return all(check.holds(self.response) for check in self.row.checks)

    @property
    def exact(self) -> bool:
        """Tell whether the response is word for word the one that the data give."""
        return self.response == self.row.turns[-1].response

    @property
    def lost(self) -> bool:
        """Tell whether the response obeys what User Info asked for in vain."""
        return bool(self.row.losing) and all(check.holds(self.response) for check in self.row.losing)

    @property
    def decidable(self) -> bool:
        """Tell whether the right response to a conflict can please one tier only."""
        return bool(self.row.losing) and not replace(self, response=self.row.turns[-1].response).lost


# --- the test rows ----------------------------------------------------------------------------------------------------


def suite(seed: int = 0, size: int = 100) -> dict[str, list[Row]]:
    """Return test rows by section, about `size` each."""
    rng = Random(f"evaluation/{seed}")
    named = [family for family in families().values() if family.name != "background"]
    keys = [value.key for family in named for value in family.values]
    opposites = [(a.key, b.key) for f in named for a in f.values for b in f.values if f.conflicts and a != b]
    topics = [topic.name for topic in subjects("topic")]
    apart = [(topic, key) for topic in topics for key in keys if held_out_pair(topic, key)]
    backgrounds = [key.partition(".")[2] for opinion in subjects("opinion") for key in opinion.by_value]

    def rows(plans: Iterable[Plan]) -> list[Row]:
        return [write_row(rng, plan) for plan in plans]

    def evenly(items: Sequence[T]) -> list[T]:
        return list(islice(cycle(rng.sample(items, len(items))), size))

    one = Plan(kind="topic", turns=1, background="")  # one turn on a topic; each section says what is new in it
    none = replace(one, values=())
    new = replace(one, split="combination")
    opinion = replace(none, kind="opinion")
    return {
        "no preference": rows(replace(none, subject=topic) for topic in evenly(topics)),
        "new form of question": rows([replace(none, held_out_query=True)] * size),
        **{f"wording: {s}": rows(replace(one, values=(k,), split=s) for k in evenly(keys)) for s in SPLITS},
        "topic new to the value": rows(replace(one, subject=t, values=(k,)) for t, k in evenly(apart)),
        "conflict": rows(replace(new, values=(a,), tiers=("system",), losing=b) for a, b in evenly(opposites)),
        "two preferences": _several(rng, new, 2, size),
        "three preferences": _several(rng, new, 3, size),
        "three turns": rows([replace(new, turns=3, changed=False)] * size),
        "preference changed midway": rows([replace(new, turns=3, changed=True)] * size),
        "opinion, no background": rows([opinion] * size),
        "opinion, background: seen": rows(replace(opinion, background=b) for b in evenly(backgrounds)),
        "opinion, background: word": rows(replace(opinion, background=b, split="word") for b in evenly(backgrounds)),
        "unknown question": rows([replace(none, kind="unknown", split="word")] * size),
    }


def _several(rng: Random, plan: Plan, count: int, size: int) -> list[Row]:
    """Return rows with `count` preferences that do not contradict each other, spread over both tiers."""
    rows: list[Row] = []
    while len(rows) < size:
        row = write_row(rng, plan)
        if len(row.wordings) == count and not row.losing:
            rows.append(row)
    return rows


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(generate: Generate, rows: dict[str, list[Row]]) -> dict[str, list[Result]]:
    """Let a model answer every row."""
    return {name: [Result(row, generate(row)) for row in section] for name, section in rows.items()}


def summary(results: dict[str, list[Result]]) -> dict[str, dict[str, Rate]]:
    """Return the rates `obeyed` and `exact` by section and by family, and who won the conflicts."""
    report = {name: _rates(section) for name, section in results.items()}
    understood = [r for split in SPLITS[:3] for r in results.get(f"wording: {split}", [])]
    for family in families():
        report[f"family: {family}"] = _rates([r for r in understood if r.row.checks[0].key.startswith(family + ".")])
    report["explicit wordings"] = _rates([r for r in understood if not r.row.wordings[0].implicit])
    report["implicit wordings"] = _rates([r for r in understood if r.row.wordings[0].implicit])
    clashes = [r for r in results.get("conflict", []) if r.decidable]
    report["conflicts"] = {
        "system wins": rate(r.obeyed and not r.lost for r in clashes),
        "user wins": rate(r.lost and not r.obeyed for r in clashes),
    }
    return {name: rates for name, rates in report.items() if any(r.n for r in rates.values())}


def table(report: dict[str, dict[str, Rate]]) -> str:
    """Format a summary for people: n, then each rate with its 95 % interval."""
    lines = []
    for name, rates in report.items():
        shown = "   ".join(f"{label} {value}" for label, value in rates.items())
        lines.append(f"{name:28} n {max(r.n for r in rates.values()):4d}   {shown}")
    return "\n".join(lines)


def _rates(section: list[Result]) -> dict[str, Rate]:
    rates = {"obeyed": rate(r.obeyed for r in section if r.row.checks), "exact": rate(r.exact for r in section)}
    return {label: rate for label, rate in rates.items() if rate.n}


# --- models -----------------------------------------------------------------------------------------------------------


def torch_generator(folder: Path, threads: int = 1) -> Generate:
    """Return a greedy generator over a checkpoint folder."""
    import torch

    from .demo import load
    from .vocabulary import encode_prompt

    torch.set_num_threads(threads)
    model, tokenizer = load(folder)

    def generate(row: Row) -> str:
        return str(tokenizer.decode(model.complete(encode_prompt(tokenizer, row), end=0, limit=_LONGEST)))

    return generate


def edge_generator(path: Path, threads: int = 1) -> Generate:
    """Return a greedy generator over a converted model, through the toolkit itself. Close nothing: it lives on."""
    import metaalign_edge as edge

    settings = edge.Settings(temperature=0.0, max_tokens=_LONGEST, threads=threads)
    file, interrupt = edge.ModelFile(path), edge.Interrupt()
    template = edge.choose_template("auto", file)
    chat = edge.Chat(edge.Model(file, settings), template, settings, edge.AS_USUAL, interrupt)

    def generate(row: Row) -> str:
        turns = [edge.Turn(turn.query, turn.response) for turn in row.turns[:-1]]
        dialog = edge.Dialog(row.system_info, row.user_info, (*turns, edge.Turn(row.turns[-1].query)))
        return chat.answer(dialog, 0, lambda _: None, lambda _: None).response

    return generate


def main(arguments: Sequence[str] | None = None) -> None:
    """Evaluate a checkpoint folder, or a GGUF file, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m metaalign_edge_tune.evaluate", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint folder, or a .gguf file")
    parser.add_argument("--size", type=int, default=100, help="rows per section (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the test rows (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="CPU threads; more do not help so small a model (default: %(default)s)"
    )
    parser.add_argument("--misses", type=int, default=0, help="also print so many inexact rows of each section")
    parser.add_argument("--json", action="store_true", help="print the rates as JSON")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    make = edge_generator if given.model.suffix == ".gguf" else torch_generator
    results = measure(make(given.model, given.threads), suite(given.seed, given.size))
    report = summary(results)
    if given.json:
        print(json.dumps({name: {k: asdict(r) for k, r in rates.items()} for name, rates in report.items()}, indent=2))
        return
    print(table(report))
    print(f"{sum(map(len, results.values()))} rows in {time.monotonic() - start:.0f} s")
    for name, section in results.items():
        for result in [r for r in section if not r.exact][: given.misses]:
            print(f"\n[{name}] {result.row.system_info!r} | {result.row.user_info!r} | {result.row.turns[-1].query!r}")
            print(f"  want {result.row.turns[-1].response!r}\n  got  {result.response!r}")


if __name__ == "__main__":
    main()
