"""Damaged GGUF files: every command answers, or says in one line why it does not, with an exit code that is documented."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random

import pytest
from helpers.damaged_gguf import commands_on, damaged, fault, in_fork
from helpers.vocabularies import write_bpe, write_spm

from metaalign_edge_runtime.llama.gguf import ModelFile

FILES, MANY = 40, 400  # for a moment, and for each of several longer runs


def try_damaged(tiny: Path, folder: Path, seeds: range) -> Counter[str]:
    """Run commands on damaged copies of a model and of two vocabularies; return how often which exit code came."""
    wholes = [tiny, tiny, write_spm(folder / "spm.gguf"), write_bpe(folder / "bpe.gguf")]
    outcomes: Counter[str] = Counter()
    path = folder / "damaged.gguf"
    for seed in seeds:
        random, whole = Random(seed), wholes[seed % len(wholes)]
        path.write_bytes(damaged(random, whole))
        template = [] if ModelFile(whole).templates and random.random() < 0.7 else ["--template", "chatml"]
        for arguments in commands_on(path, template):
            status, stdout, stderr = in_fork(arguments, folder)
            found = fault(arguments[0], status, stdout, stderr)
            assert not found, (seed, arguments[0], found)
            outcomes[f"{arguments[0]} {status}"] += 1
    return outcomes


def test_no_damaged_file_crashes_a_command(tiny: Path, tmp_path: Path) -> None:
    outcomes = try_damaged(tiny, tmp_path, range(FILES))
    assert outcomes["chat 0"] and outcomes["chat 5"] and outcomes["models 0"] and outcomes["convert 5"], outcomes


@pytest.mark.slow
@pytest.mark.parametrize("part", range(1, 5))
def test_no_damaged_file_of_many_crashes_a_command(part: int, tiny: Path, tmp_path: Path) -> None:
    outcomes = try_damaged(tiny, tmp_path, range(part * MANY, (part + 1) * MANY))
    assert outcomes["chat 0"] > MANY // 50 and outcomes["chat 5"] > MANY // 5, outcomes
