"""Real models that say what a test wants: weights that let each token be followed by one other, whatever came before."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

import metaalign_edge as edge
from helpers import checkpoints

THINKS = ("<think>", "</think>")
END = "<|end|>"


def make_parrot(folder: Path, *scripts: Sequence[str], marks: Sequence[str] = THINKS) -> Path:
    """Write a GGUF that says scripts. A script is a list of tokens: the first is said after what the prompt ends with.

    The token that begins a script is one of the prompt; no token stands twice before different ones. The marks are
    tokens of its vocabulary.
    """
    size = checkpoints.ROWS
    checkpoints.make_checkpoint(folder, hidden_size=size, intermediate_size=32, num_hidden_layers=1, head_dim=32)
    checkpoints.edit_json(folder / "config.json", max_position_embeddings=1024)
    known = json.loads((folder / "tokenizer.json").read_text())
    first = max(token["id"] for token in known["added_tokens"])
    first = max(first, *known["model"]["vocab"].values()) + 1
    known["added_tokens"] += [
        {"id": first + place, "content": mark, "special": False, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for place, mark in enumerate(marks)
    ]  # fmt: skip
    checkpoints.write_json(folder / "tokenizer.json", known)
    tokenizer = Tokenizer.from_str(json.dumps(known))
    follows = np.zeros((size, size), dtype=np.float32)
    follows[0] = 0.01  # what no script goes on from ends the text
    for script in scripts:
        ids = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in script]
        assert all(len(one) == 1 for one in ids), list(zip(script, ids, strict=True))
        for (one,), (other,) in itertools.pairwise(ids):
            follows[other, one] = 1
    weights = checkpoints.random_weights(json.loads((folder / "config.json").read_text()))
    weights = {name: np.ones_like(values) if "norm" in name else values * 0 for name, values in weights.items()}
    weights |= {"model.embed_tokens.weight": np.eye(size, dtype=np.float32), "lm_head.weight": follows}
    checkpoints.write_weights(folder, weights)
    path = folder.with_suffix(".gguf")
    assert edge.run(["convert", str(folder), "-o", str(path), "--outtype", "f32", "-q", "--force"]) == 0
    return path
