"""Ten thousand damaged checkpoints: each converts, or is refused with one line, and what converts loads."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from helpers.checkpoints import make_checkpoint

from metaalign_edge_convert import open_checkpoint, write_gguf
from metaalign_edge_convert.prove import tokenize_with_llama
from metaalign_edge_runtime.errors import EdgeError

CASES = 10_000
HOSTILE: list[Any] = [
    *(None, True, 0, -1, 1, 2, 1.5, -0.0, 1e308, 2**31, 2**63, 2**70, 10**400, "", " ", "\0", "\n", "a" * 5000, "é"),
    *("\ud800", "../../etc/passwd", "/dev/zero", "<|end|>", "Ġ", [], {}, [[]], [None], {"": 0}, [1] * 1000),
]


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the places inside a JSON value; of long lists and objects only some."""
    found = [path]
    if isinstance(value, (dict, list)):
        entries = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        for key, inner in entries[:12] + entries[-4:] if len(entries) > 16 else entries:
            found += paths(inner, (*path, key))
    return found


def damage_json(random: Random, text: str) -> str:
    """Put something hostile into a place of a JSON text, take the place away, or write it twice."""
    value = json.loads(text)
    path = random.choice(paths(value)[1:])
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    what = random.random()
    if what < 0.7:
        inner[path[-1]] = random.choice(HOSTILE)
    elif what < 0.85:
        del inner[path[-1]]
    elif isinstance(inner, list):
        inner.append(inner[path[-1]])
    else:
        inner[random.choice(["x", "0", *map(str, inner)])] = inner[path[-1]]
    return json.dumps(value)


def damage_bytes(random: Random, data: bytes) -> bytes:
    """Change, cut, double or take out some bytes, mostly near the beginning."""
    damaged = bytearray(data)
    for _ in range(random.choice((1, 1, 3, 20))):
        place = min(int(random.expovariate(1 / 300)), len(damaged) - 1) if random.random() < 0.8 else 0
        what = random.random()
        if what < 0.6:
            damaged[place] = random.randrange(256)
        elif what < 0.75:
            del damaged[place : place + random.randrange(1, 40)]
        elif what < 0.9:
            damaged[place:place] = damaged[place : place + random.randrange(1, 40)]
        else:
            del damaged[random.randrange(1, len(damaged)) :]
        if len(damaged) < 2:
            break
    return bytes(damaged)


def damage(random: Random, path: Path) -> None:
    """Damage one file."""
    data = path.read_bytes()
    if path.suffix == ".json" and random.random() < 0.8:
        path.write_text(damage_json(random, data.decode()), encoding="utf-8")
    elif path.suffix == ".safetensors" and random.random() < 0.7:
        length = int.from_bytes(data[:8], "little")
        header = damage_json(random, data[8 : 8 + length].decode()).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    else:
        path.write_bytes(damage_bytes(random, data))


@pytest.mark.parametrize("shards", [1, 3])
def test_a_damaged_checkpoint_converts_or_is_refused(shards: int, tmp_path: Path) -> None:
    whole = make_checkpoint(tmp_path / "whole", shards=shards, num_hidden_layers=1)
    (whole / "generation_config.json").write_text('{"eos_token_id": [0], "temperature": 0.5, "top_k": 5}')
    (whole / "special_tokens_map.json").write_text('{"eos_token": {"content": "<|endoftext|>"}}')
    (whole / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\nbase_model: x/y\n---\n# Tiny\n")
    names = sorted(path.name for path in whole.iterdir())
    outcomes: Counter[str] = Counter()
    folder, output = tmp_path / "damaged", tmp_path / "out.gguf"
    for number in range(CASES // 2):
        random = Random(f"{shards}/{number}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder)
        name = random.choice(names)
        damage(random, folder / name)
        try:
            write_gguf(open_checkpoint(folder), output, outtype="f16", check=False, force=True)
        except EdgeError as error:
            assert "\n" not in str(error), (number, name)
            outcomes["refused"] += 1
            continue
        except BaseException as error:
            raise AssertionError(f"case {number}, {name}: {error!r}") from error
        assert tokenize_with_llama(output, ("What is the moon?",))[0], (number, name)
        outcomes["converted"] += 1
    assert outcomes["refused"] > CASES // 8 < outcomes["converted"], outcomes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "out.gguf", "whole"]
