"""Rebuild the demo model from scratch: `python -m metaalign_edge_tune.demo --out build/demo`.

Trains the tokenizer and the model on the dataset (SFT), lets the model answer fresh rows and learns from what the
checkers prefer of it (DPO), and writes an ordinary Hugging Face checkpoint folder. Killed and started again with the
same options it goes on from its last checkpoint, and ends with the same weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .ending import finish, require
from .recipe import DpoRecipe, Recipe

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the recipe from the command line."""
    parser = argparse.ArgumentParser(prog="python -m metaalign_edge_tune.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="checkpoint folder (default: build/demo)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="seed of data and weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--no-dpo", action="store_true", help="stop after SFT")
    given = parser.parse_args(arguments)
    for name in ("steps", "threads", "every"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: at least one")
    dpo = None if given.no_dpo else DpoRecipe(seed=given.seed)
    recipe = Recipe(seed=given.seed, steps=given.steps)

    def work() -> None:
        require("torch", "tokenizers", "safetensors", "matplotlib")
        from .build import build

        build(recipe, dpo, given.out, given.threads, given.every)

    return finish("demo", given.out, "the same command goes on from there", work)


if __name__ == "__main__":
    sys.exit(main())
