"""Files that users edit, spoilt at random: whatever they hold, a command ends with a documented exit code and a line.

A sound file is mutated by a seed: JSON values of other types, nesting, huge numbers, NUL, bytes that are not UTF-8,
half a file, a folder or a link to itself in its place. As a program it prints the counts:
`python tests/fuzz/test_fuzz_files.py 1000`.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from helpers import checkpoints

import metaalign_edge as edge

DOCUMENTED = {0, 2, 3, 4, 5, 6, 7, 8}
PATIENCE = 60  # seconds after which a command counts as hanging
FAST, SLOW = 40, 1500  # mutations of each file


class Deep(list[Any]):
    """A list that is written as deep nesting."""


VALUES: list[Any] = [
    None, True, False, 0, -1, 7, 2**31, 2**63, 10**400, -(10**30), 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x",
    "\0", "\ud800", "é" * 300, "@none", "../../x", "2024-13-45T99:99:99Z", "a" * 100_000, [], {}, [[]], [{}], [None], ["x"],
    [1, "x"], {"x": 1}, {"": {"": ""}}, Deep([99]), Deep([3000]), Deep([200_000]),
]  # fmt: skip
TOML = [
    "true", "0", "-1", "9223372036854775807", "1" + "0" * 400, "1e400", "inf", "nan", "0.5", '""', '"x"', '"\\u0000"', '"@none"',
    "1979-05-27", "07:32:00", "1979-05-27T07:32:00Z", "[]", "[[]]", "[1, 'x']", "['a', 'b']", "{}", "{a = 1}", "{a = {b = [1]}}",
    "[" * 101 + "]" * 101, "[" * 5000 + "]" * 5000, "{a = " * 101 + "1" + "}" * 101, "'''\nx\n'''", "0x7f", "0o17", "1_000", "=", "[",
    '"' + "a" * 255 + '"', '"' + "a" * 300 + '/b"', '"/dev/null/x"', '"~nobody/x"', "['@a+@b', '']", '"all"', '"auto"',
]  # fmt: skip


def written(value: Any) -> str:
    """Write a value as JSON, also what JSON has no words for."""
    if isinstance(value, Deep):
        return "[" * value[0] + "]" * value[0]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)}: {written(part)}" for key, part in value.items()) + "}"
    return "[" + ", ".join(map(written, value)) + "]" if isinstance(value, list) else json.dumps(value)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a JSON document."""
    yield at
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(part, (*at, key))


def changed(document: Any, rng: random.Random) -> Any:
    """Replace, add or remove a value somewhere in a JSON document."""
    *way, last = rng.choice([place for place in places(document) if place] or [(None,)])
    if last is None or rng.random() < 0.1:
        return rng.choice(VALUES)
    document = json.loads(json.dumps(document))
    inner = document
    for key in way:
        inner = inner[key]
    kind = rng.random()
    if kind < 0.15:
        del inner[last]
    elif kind < 0.3 and isinstance(inner, dict):
        inner[rng.choice(["x", "", "\0", "$ref", "kind", "id", "error", "é" * 300])] = rng.choice(VALUES)
    else:
        inner[last] = rng.choice(VALUES)
    return document


def changed_lines(data: bytes, rng: random.Random) -> bytes:
    """Change some lines of JSON."""
    lines = data.decode().splitlines()
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        with contextlib.suppress(ValueError, RecursionError):
            lines[at] = written(changed(json.loads(lines[at]), rng))
    if rng.random() < 0.1:
        rng.shuffle(lines)
    return "\n".join(lines).encode("utf-8", "surrogatepass") + b"\n"


def changed_toml(data: bytes, rng: random.Random) -> bytes:
    """Change some values of a file in TOML."""
    lines = data.decode().splitlines()
    for _ in range(rng.choice((1, 1, 2))):
        at = rng.randrange(len(lines))
        lines[at] = f"{lines[at].partition('=')[0]}= {rng.choice(TOML)}"
    if rng.random() < 0.1:
        lines.insert(
            rng.randrange(len(lines) + 1), rng.choice(["[table]", "[[x]]", "a.b.c = 1", "x", "model.x = 1", "'' = 1"])
        )
    return "\n".join(lines).encode() + b"\n"


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change a file without a thought for what is in it."""
    at = rng.randrange(len(data) + 1)
    piece = rng.choice(
        [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\x1b[2J", b"{", b'"', b"\n", b"\xed\xa0\x80", b"9" * 5000]
    )
    return rng.choice(
        [
            data[:at],
            b"",
            data[:at] + piece + data[at:],
            piece + data,
            data[:at] + data[at + 1 :],
            data + data,
            data.rstrip(b"\n"),
        ]
    )


def put(
    path: Path, data: bytes, change: Callable[[bytes, random.Random], bytes], rng: random.Random, named: bool
) -> None:
    """Put a spoilt file, or something else, in the place of a file. named: by the user, who may mean to wait for a pipe."""
    kind = rng.random()
    if kind < 0.02:
        path.mkdir()
    elif kind < 0.04:
        path.symlink_to(path)
    elif kind < 0.06 and not named:
        os.mkfifo(path)
    elif kind < 0.25:
        path.write_bytes(changed_bytes(data, rng))
    else:
        path.write_bytes(change(data, rng))


class Target(NamedTuple):
    """A file, and the commands that read it."""

    path: Path
    sound: bytes
    change: Callable[[bytes, random.Random], bytes]
    commands: list[list[str]]
    named: bool = False


SUITE = [
    {"query": "q", "checks": [{"checker": "mentions", "parameters": {"text": "tea"}}]},
    {"id": "b", "section": "own", "queries": ["q", "r"], "system_info": "s", "user_info": "u", "earlier": ["a", "b"],
     "values": ["case.upper"], "losing": ["case.lower", {"checker": "mentions", "parameters": {"text": "x"}}], "facts": ["Tea is hot."],
     "pair": "p", "implicit": True},
]  # fmt: skip
IFEVAL = {"key": 1, "prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
ROWS = [
    {"id": 1, "query": "q", "pref": ["@concise", "x"], "system_info": "s", "max_tokens": 1, "seed": 3},
    {"query": "r", "user_info": "u", "turns": [{"query": "a", "response": "b"}], "json_schema": {"type": "boolean"}, "max_tokens": 8},
]  # fmt: skip
SCHEMA = {
    "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "x", "type": "object", "$defs": {"a": {"type": "string"}},
    "properties": {"a": {"$ref": "#/$defs/a"}, "b": {"type": "integer", "minimum": 1, "maximum": 9, "multipleOf": 2},
                   "c": {"type": "array", "items": {"enum": [1, "x"]}, "minItems": 1, "maxItems": 3, "uniqueItems": True},
                   "d": {"type": "string", "pattern": "^a+$", "minLength": 1, "maxLength": 4, "format": "date"},
                   "e": {"oneOf": [{"const": 1}, {"not": {"type": "null"}}], "anyOf": [{}], "allOf": [True]}},
    "required": ["a"], "additionalProperties": {"type": "number"}, "patternProperties": {"^x": {"exclusiveMinimum": 0}},
    "minProperties": 1, "dependentRequired": {"a": ["b"]}, "if": {"type": "string"}, "then": {}, "prefixItems": [{}],
}  # fmt: skip
SETTINGS = b"""model = "tiny.gguf"
max_tokens = 3
temp = 0.5
system = "Be kind."
pref = ["@concise", "x"]
stop = ["a"]
ctx_size = 300
gpu_layers = 0
strict_tiers = true
pref_strength = 1.5
template = "auto"
parallel = 2
offline = true
"""
SESSION = [
    {"kind": "session", "at": "2024-01-01T00:00:00Z", "version": 1, "toolkit": "x"},
    {"kind": "meta_prompt", "at": "2024-01-01T00:00:00Z", "system_info": "s", "user_info": "u", "label": "l"},
    {
        "kind": "turn",
        "at": "2024-01-01T00:00:00Z",
        "id": "a1",
        "query": "q",
        "response": "r",
        "finish_reason": "stop",
        "model": "m",
    },
    {"kind": "clear", "at": "2024-01-01T00:00:00Z"},
    {
        "kind": "turn",
        "at": "2024-01-01T00:00:00Z",
        "id": "a2",
        "replaces": "a1",
        "query": "q",
        "response": "r",
        "model": "m",
    },
]


def lines_of(documents: list[Any]) -> bytes:
    """Write documents as JSON Lines."""
    return b"".join(json.dumps(document).encode() + b"\n" for document in documents)


def make_targets(folder: Path) -> dict[str, Target]:
    """Make the sound files and what they need, in a folder that the environment names for everything."""
    checkpoint = checkpoints.make_checkpoint(folder / "tiny", max_position_embeddings=512)
    model, rows, suite = str(folder / "tiny.gguf"), folder / "rows.jsonl", folder / "suite.jsonl"
    assert edge.run(["convert", str(checkpoint), "-o", model, "--outtype", "f32", "-q", "--no-check"]) == 0
    rows.write_bytes(lines_of(ROWS))
    suite.write_bytes(lines_of(SUITE))
    quick = ["-m", model, "--temp", "0", "-n", "1", "-q"]
    batch, results = ["batch", str(rows), *quick, "--seed", "1", "-o"], folder / "results.jsonl"
    ask, answers = ["eval", "--suite", str(suite), *quick, "--answers"], folder / "answers.jsonl"
    assert edge.run([*batch, str(results)]) in (0, 1) and edge.run([*ask, str(answers)]) == 0
    config, data, work = folder / "config", folder / "data" / "sessions", folder / "work"
    work.mkdir()
    render = ["render", "--no-stdin", "-m", model, "hi"]
    spoilt = folder / "spoilt"
    return {
        "results": Target(spoilt / "out.jsonl", results.read_bytes(), changed_lines, [[*batch, "out.jsonl"]], True),
        "answers": Target(spoilt / "answers.jsonl", answers.read_bytes(), changed_lines, [[*ask, "answers.jsonl"]], True),
        "suite": Target(spoilt / "suite.jsonl", lines_of(SUITE), changed_lines, [["eval", "--suite", "suite.jsonl", *quick]], True),
        "ifeval": Target(spoilt / "if.jsonl", lines_of([IFEVAL]), changed_lines, [["eval", "--suite", "if.jsonl", *quick]], True),
        "rows": Target(spoilt / "in.jsonl", lines_of(ROWS), changed_lines, [["batch", "in.jsonl", *quick, "-j", "a bool"]], True),
        "schema": Target(spoilt / "schema.json", lines_of([SCHEMA]), changed_lines,
                         [["batch", str(folder / "none.jsonl"), *quick, "-j", "schema.json"]], True),
        "settings": Target(config / "config.toml", SETTINGS, changed_toml,
                           [["config", "show"], render, ["config", "set", "top_k", "3"], ["pref", "list"], ["pref", "default", "concise"]]),
        "project": Target(work / ".metaalign.toml", b'system = "s"\npref = ["x"]\nmodel = "tiny.gguf"\n', changed_toml, [["config", "show", "--json"], render]),
        "profile": Target(config / "preferences" / "me.txt", b"Be brief.\n", changed_bytes,
                          [["pref", "list"], ["pref", "show", "me"], [*render, "--pref", "@me+@concise"], ["pref", "add", "--force", "me", "x"]]),
        "session": Target(data / "talk.jsonl", lines_of(SESSION), changed_lines,
                          [["sessions", "list"], ["sessions", "show", "talk"], ["sessions", "show", "talk", "--json"],
                           ["sessions", "export", "talk"], ["chat", "--no-stdin", "-q", *quick, "--session", "talk", "hi"]]),
    }  # fmt: skip


class Hangs(BaseException):
    """A command does not end."""


def outcome(arguments: list[str]) -> str:
    """Run a command in this process; return what is wrong with its end, "" if nothing."""

    def give_up(*_: object) -> None:
        raise Hangs

    said, out, stdin = io.StringIO(), io.TextIOWrapper(io.BytesIO(), "utf-8", errors="replace"), sys.stdin
    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE)
    sys.stdin = io.TextIOWrapper(io.BytesIO())
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(out):
            code = edge.run(arguments)
    except Hangs:
        return "hangs"
    except BaseException as error:  # what run() lets through
        return f"raises {type(error).__name__}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        sys.stdin = stdin
    lines = said.getvalue().splitlines()
    last = lines[-1] if lines else ""
    if "please report it" in said.getvalue() or "Traceback" in said.getvalue():
        return f"says {last[:150]}"
    if code not in DOCUMENTED and not (code == 1 and "rows failed" in last):
        return f"ends with {code}: {last[:150]}"
    return f"ends with {code} and no word" if code and not last.startswith("metaalign-edge: ") else ""


def remove(path: Path) -> None:
    """Remove whatever is there."""
    if path.is_dir() and not path.is_symlink():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def spoil(target: Target, numbers: range) -> collections.Counter[str]:
    """Mutate a target's file by each number; return the faults and how often they were seen."""
    found: collections.Counter[str] = collections.Counter()
    target.path.parent.mkdir(parents=True, exist_ok=True)
    here = Path.cwd()
    os.chdir(target.path.parent if target.named or target.path.name.startswith(".") else here)
    try:
        for number in numbers:
            for command in target.commands:
                remove(target.path)
                put(target.path, target.sound, target.change, random.Random(number), target.named)
                if fault := outcome(command):
                    found[f"{command[0]} {number}: {fault}"] += 1
    finally:
        remove(target.path)
        os.chdir(here)
    return found


@contextlib.contextmanager
def homes(folder: Path) -> Iterator[None]:
    """Let all that the program keeps lie in a folder."""
    names = {
        "METAALIGN_EDGE_CONFIG": "config",
        "METAALIGN_EDGE_DATA": "data",
        "METAALIGN_EDGE_CACHE": "cache",
        "HF_HOME": "hub",
    }
    given = {
        **{name: str(folder / place) for name, place in names.items()},
        "HOME": str(folder),
        "METAALIGN_EDGE_PROJECT": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    """The files and the commands that read them."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "none.jsonl").touch()
    with homes(folder):
        yield make_targets(folder)


NAMES = ("results", "answers", "suite", "ifeval", "rows", "schema", "settings", "project", "profile", "session")


@pytest.mark.parametrize("name", NAMES)
def test_a_spoilt_file_ends_in_a_line_and_a_documented_exit_code(targets: dict[str, Target], name: str) -> None:
    with homes(targets["settings"].path.parents[1]):
        assert not spoil(targets[name], range(FAST))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_many_spoilt_files_likewise(targets: dict[str, Target], name: str) -> None:
    with homes(targets["settings"].path.parents[1]):
        assert not spoil(targets[name], range(FAST, SLOW))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, homes(Path(place)):
        Path(place, "none.jsonl").touch()
        every = make_targets(Path(place))
        for one in sys.argv[2:] or NAMES:
            faults = spoil(every[one], range(int(sys.argv[1])))
            print(f"{one}: {faults.total():,} of {int(sys.argv[1]) * len(every[one].commands):,} ended otherwise")
            kinds = collections.Counter(fault.partition(": ")[2] for fault in faults)
            for kind, count in kinds.most_common(12):
                example = next(fault for fault in faults if fault.endswith(kind))
                print(f"  {count} x {kind}   ({example.partition(':')[0]})")
