"""Make the dataset: pairs of rows in which the order of the candidates flips with the meta-prompt.

`python -m metaalign_edge_tune.dataset --out rows.jsonl` writes rows and prints a report; `--validate FILE` checks rows
of the same shape. A program writes every response from facts and the preferences in force, so each row is right by
construction, and the checkers that adherence is measured with hold for it. Rows 2k and 2k + 1 of a seed ask the same:
what one chooses the other rejects. They are a pure function of `(seed, k)`: training can stop and resume anywhere.
"""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

from metaalign_edge_preferences import values
from metaalign_edge_preferences.dialogs import Plan, Scene, compose, flip, held_out_pair
from metaalign_edge_runtime.errors import NotFound, UsageError
from metaalign_edge_runtime.stores import files

from .ending import finish, say
from .responses import respond

__all__ = [
    "SUBSETS",
    "InvalidRow",
    "Row",
    "Turn",
    "document",
    "examine",
    "main",
    "pair",
    "read_rows",
    "report",
    "row",
    "rows",
]

SUBSETS = ("Priority", "Helpful-based", "Consensus", "Diverse-Opinion")
WINNERS = ("system", "user", "none")  # the tier whose preference decided between the candidates
SIZE = 38_900  # rows, the size of the paper's dataset
_TEXTS = ("system_info", "user_info", "query", "response", "rejected")


class InvalidRow(UsageError):
    """A row of a file that is no row; the text says which line and field, and what to do."""


@dataclass(frozen=True)
class Turn:
    """A question, the response, and whether the response is trained on."""

    query: str
    response: str
    trained: bool = True  # False where the response followed a meta-prompt that has been replaced since


@dataclass(frozen=True)
class Row:
    """A dialog with its response, and the candidate that its meta-prompt rejects."""

    subset: str
    turns: tuple[Turn, ...]  # the last is the one that is chosen
    rejected: str  # what the pair's other meta-prompt chooses
    winner: str
    scene: Scene = field(repr=False)

    @property
    def system_info(self) -> str:
        """Return tier 1 in words."""
        return str(self.scene.prompt.system_info)

    @property
    def user_info(self) -> str:
        """Return tier 2 in words."""
        return str(self.scene.prompt.user_info)

    @property
    def families(self) -> tuple[str, ...]:
        """Return the keys of all values in force."""
        return tuple(self.scene.prompt.force)


def pair(seed: int, index: int, hard: bool = False) -> tuple[Row, Row]:
    """Return the pair number `index`: one question, two meta-prompts, two candidates. hard: see ``Plan``."""
    rng = Random(f"{seed}/{index}")
    while True:
        scene = compose(rng, Plan(hard=hard))
        other = flip(rng, scene)
        if other is None:
            continue
        first, second = (respond(one.last, one.prompt.force) for one in (scene, other))
        if first != second:
            return _row(scene, first, second), _row(other, second, first)


def row(seed: int, index: int, hard: bool = False) -> Row:
    """Return one row: half of pair `index // 2`."""
    return _pair(seed, index // 2, hard)[index % 2]


def rows(seed: int, start: int = 0) -> Iterator[Row]:
    """Yield rows without end, from row `start`."""
    index = start
    while True:
        yield row(seed, index)
        index += 1


@lru_cache(maxsize=4)
def _pair(seed: int, index: int, hard: bool) -> tuple[Row, Row]:
    return pair(seed, index, hard)


def _row(scene: Scene, chosen: str, rejected: str) -> Row:
    earlier = [Turn(q.query, respond(q, q.prompt.force), q.prompt is scene.prompt) for q in scene.questions[:-1]]
    turns = (*earlier, Turn(scene.last.query, chosen))
    return Row(_subset(scene), turns, rejected, _winner(scene), scene)


def _subset(scene: Scene) -> str:
    """Return the paper's name for what a row teaches."""
    if scene.prompt.losing:
        return "Priority"
    if scene.last.subject.kind == "topic":
        return "Helpful-based"
    mine = any(key in scene.last.subject.by_value for key in scene.prompt.force)
    return "Diverse-Opinion" if mine and "stance.open" not in scene.prompt.force else "Consensus"


def _winner(scene: Scene) -> str:
    if scene.prompt.losing or (scene.prompt.system and not scene.prompt.user):
        return "system"
    return "user" if scene.prompt.user else "none"


# --- files ------------------------------------------------------------------------------------------------------------


def document(one: Row) -> dict[str, Any]:
    """Return a row as its line in a file holds it."""
    return {
        "subset": one.subset,
        "system_info": one.system_info,
        "user_info": one.user_info,
        "turns": [{"query": turn.query, "response": turn.response} for turn in one.turns[:-1]],
        "query": one.turns[-1].query,
        "response": one.turns[-1].response,
        "rejected": one.rejected,
        "families": list(one.families),
        "winner": one.winner,
    }


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file; `turns` is there even if the file left it out.

    Raises:
        InvalidRow: a line is no row. NotFound: the file cannot be read.
    """
    for found, wrong in examine(path):
        if wrong:
            raise InvalidRow(wrong[0])
        yield found


def examine(path: Path) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """Yield the row of each line of a JSONL file, with all that is wrong with it: the row is empty if it is none.

    Raises:
        NotFound: the file cannot be read.
    """
    try:
        opened = path.open("rb")
    except OSError as error:
        raise NotFound(f"{path}: {str(error.strerror).lower()}: give a JSONL file of rows") from None
    with opened as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            found: Any = {}
            try:
                found = json.loads(line.decode("utf-8"))
                problems = list(_problems(found))
            except UnicodeDecodeError as error:
                problems = [f"not UTF-8 (byte {error.start + 1}): save it as UTF-8"]
            except ValueError as error:
                problems = [f"not JSON ({error}): one object on each line"]
            except RecursionError:
                problems = ["not JSON (nested too deeply): one object on each line"]
            yield {} if problems else {"turns": [], **found}, [f"{path}, line {number}: {one}" for one in problems]


def _problems(found: Any) -> Iterator[str]:
    """Yield what is wrong with a row, field by field."""
    if not isinstance(found, dict):
        yield f"a {type(found).__name__} where an object belongs"
        return
    for name in _TEXTS:
        if name not in found:
            yield f"field {name!r} is missing"
        elif not isinstance(found[name], str):
            yield f"field {name!r} must be a string, not {type(found[name]).__name__}"
    texts = {name: found[name] for name in _TEXTS if isinstance(found.get(name), str)}
    for name, allowed in (("subset", SUBSETS), ("winner", WINNERS)):
        if found.get(name) not in allowed:
            yield f"field {name!r} must be one of {', '.join(allowed)}, not {found.get(name)!r}"
    for name in ("query", "response"):
        if name in texts and not texts[name].strip():
            yield f"field {name!r} is empty"
    if "response" in texts and texts["response"] == texts.get("rejected"):
        yield "field 'rejected' is the same as 'response': leave it empty if there is no other candidate"
    keys = found.get("families")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        yield "field 'families' must be a list of strings such as 'case.upper'"
        keys = []
    for key in keys:
        if key not in values():
            near = difflib.get_close_matches(key, values(), 1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            yield f"field 'families' names {key!r}, which is unknown{hint}"
    turns = found.get("turns", [])
    if not isinstance(turns, list) or not all(_is_turn(turn) for turn in turns):
        yield "field 'turns' must be a list of objects with the strings 'query' and 'response'"


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, dict) and all(isinstance(turn.get(name), str) for name in ("query", "response"))


def report(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Count what a dataset holds: sizes, distinct texts, lengths in characters, duplicates."""
    subsets: Counter[str] = Counter()
    winners: Counter[str] = Counter()
    keys: Counter[str] = Counter()
    lengths: dict[str, list[int]] = {"meta_prompt": [], "query": [], "response": []}
    prompts: set[tuple[str, str]] = set()
    preferences: set[str] = set()
    queries: set[str] = set()
    whole: set[int] = set()
    count = duplicates = 0
    for one in found:
        count += 1
        subsets[one["subset"]] += 1
        winners[one["winner"]] += 1
        keys.update(one["families"])
        prompt = (one["system_info"], one["user_info"])
        prompts.add(prompt)
        preferences.update(line for tier in prompt for line in tier.splitlines() if line)
        queries.add(one["query"])
        lengths["meta_prompt"].append(sum(map(len, prompt)))
        lengths["query"].append(len(one["query"]))
        lengths["response"].append(len(one["response"]))
        text = hash((prompt, json.dumps(one["turns"]), one["query"], one["response"]))
        duplicates += text in whole
        whole.add(text)
    characters = {n: {"mean": round(mean(v), 1), "median": median(v), "max": max(v)} for n, v in lengths.items() if v}
    return {
        "rows": count,
        "subsets": dict(subsets),
        "winners": dict(winners),
        "distinct": {"meta_prompts": len(prompts), "preferences": len(preferences), "queries": len(queries)},
        "values": {"named": len(keys), "rarest": min(keys.values(), default=0)},
        "characters": characters,
        "duplicates": duplicates,
    }


def leaks(one: Row) -> list[str]:
    """Return what a training row shows of that which is held out: wordings, pairs of topic and value."""
    scene = one.scene
    found = [wording.text for wording in scene.prompt.wordings if wording.split != "seen"]
    trained = [q.subject.name for q in scene.questions if q.prompt is scene.prompt and q.subject.kind == "topic"]
    return found + [f"{name}/{key}" for name in trained for key in scene.prompt.force if held_out_pair(name, key)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write a dataset, or check one."""
    parser = argparse.ArgumentParser(prog="python -m metaalign_edge_tune.dataset", description=__doc__)
    parser.add_argument("--out", type=Path, help="file to write, one JSON object a line")
    parser.add_argument("--rows", type=int, default=SIZE, help="rows to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the rows (default: %(default)s)")
    parser.add_argument("--validate", type=Path, metavar="FILE", help="check a file of your own, and report on it")
    given = parser.parse_args(arguments)
    if bool(given.out) == bool(given.validate):
        parser.error("give --out FILE to write a dataset, or --validate FILE to check one")
    if given.rows < 1:
        parser.error(f"--rows {given.rows}: at least one")
    if given.validate:
        return finish("dataset", given.validate, "start it again", lambda: _validate(given.validate))
    return finish("dataset", given.out, "start it again", lambda: _generate(given.out, given.seed, given.rows))


def _generate(path: Path, seed: int, count: int) -> int:
    """Write rows and report on them; return the exit code."""
    leaked: list[str] = []
    summary = report(_write(path, seed, count, leaked)) | {"held_out_shown": len(leaked)}
    print(json.dumps(summary, indent=2))
    return 0


def _validate(path: Path) -> int:
    """Report on a file, or name everything that is wrong with it; return the exit code."""
    lines: Counter[bool] = Counter()  # by whether something is wrong with them

    def good() -> Iterator[dict[str, Any]]:
        for found, problems in examine(path):
            lines[bool(problems)] += 1
            for problem in problems:
                say("dataset", problem)
            if not problems:
                yield found

    summary = report(good())
    if lines[True]:
        say("dataset", f"{path}: {lines[True]:,} of {lines.total():,} rows are wrong")
    elif not lines:
        say("dataset", f"{path} holds no row")
    else:
        print(json.dumps(summary, indent=2))
        return 0
    return 2


def _write(path: Path, seed: int, count: int, leaked: list[str]) -> Iterator[dict[str, Any]]:
    """Write rows to a file as they come and yield them; the file appears under its name when it is whole."""
    with files.replacing(path) as part, part.open("w", encoding="utf-8") as file:
        for index in range(count):
            one = row(seed, index)
            leaked += leaks(one)
            file.write(json.dumps(document(one), ensure_ascii=False) + "\n")
            yield document(one)


if __name__ == "__main__":
    sys.exit(main())
