"""Supervised fine-tuning, from random weights: the compact model learns the dataset's responses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils import parametrize

from metaalign_edge_runtime.errors import UsageError
from metaalign_edge_runtime.stores import files

from .dataset import row
from .model import Llama, Spellings
from .muon import Muon
from .parts import differentiate, one_core_each, update
from .progress import Progress
from .recipe import Recipe, Shape
from .vocabulary import CONTEXT, PAD, SPECIAL, encode_row, spellings

__all__ = ["pad", "train"]


def train(
    recipe: Recipe, tokenizer: Tokenizer, state: Path | None, every: int = 100, threads: int = 1
) -> tuple[Llama, list[float]]:
    """Train a model; return it with the loss of every step. The number of threads changes nothing but the time.

    `state` is the file to resume from and to write every so many steps.

    Raises:
        UsageError: the file belongs to another recipe, or is damaged.
        OSError: it cannot be written; the last one stays.
    """
    torch.manual_seed(recipe.seed)
    model = Llama(Shape(**asdict(recipe.shape) | {"vocabulary": tokenizer.get_vocab_size()}))
    plain, spelling = map(torch.tensor, spellings(tokenizer))
    shared = Spellings(plain, spelling, recipe.shape.hidden)
    parametrize.register_parametrization(model.model.embed_tokens, "weight", shared)
    optimizers = _optimizers(recipe, model)
    start, losses = _resume(recipe, model, optimizers, state)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters, {tokenizer.get_vocab_size()} tokens, from step {start}", flush=True)
    with one_core_each(threads) as pool, Progress("SFT", recipe.steps, start, every, losses) as progress:
        for step, parts in enumerate(_batches(recipe, tokenizer, start), start):
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = _rate(recipe, step)
            tokens = sum(int(learnt[:, 1:].sum()) for _, learnt in parts)
            loss = differentiate(pool, model, [partial(model.loss, *part, tokens) for part in parts])
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
            update(pool, optimizers)
            progress.step(loss, sum(ids.numel() for ids, _ in parts))
            if (step + 1) % every == 0 or step + 1 == recipe.steps:
                _checkpoint(recipe, model, optimizers, step + 1, progress.losses, state)
    parametrize.remove_parametrizations(model.model.embed_tokens, "weight")
    return model, losses


def pad(encoded: Sequence[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    """Stack (ids, learnt) to (batch, time); padding stands right of all that is learnt, where no attention looks."""
    longest = min(CONTEXT, max(len(ids) for ids, _ in encoded))
    ids = torch.full((len(encoded), longest), SPECIAL.index(PAD))
    learnt = torch.zeros(len(encoded), longest, dtype=torch.bool)
    for place, (row_ids, row_learnt) in enumerate(encoded):
        ids[place, : len(row_ids)] = torch.tensor(row_ids[:longest])
        learnt[place, : len(row_ids)] = torch.tensor(row_learnt[:longest])
    return ids, learnt


def _batches(recipe: Recipe, tokenizer: Tokenizer, start: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Yield batches from step `start` on, in parts (ids, learnt), both (rows, time): a function of recipe and step."""
    for pool in range(start // recipe.pool, math.ceil(recipe.steps / recipe.pool)):
        size = recipe.pool * recipe.batch
        hard = pool * recipe.pool >= recipe.easy * recipe.steps
        encoded = [encode_row(tokenizer, row(recipe.seed, i, hard)) for i in range(pool * size, (pool + 1) * size)]
        encoded.sort(key=lambda pair: len(pair[0]))
        order = list(range(recipe.pool))
        Random(f"{recipe.seed}/{pool}").shuffle(order)
        for place, index in enumerate(order):
            step = pool * recipe.pool + place
            if start <= step < recipe.steps:
                batch = encoded[index * recipe.batch : (index + 1) * recipe.batch]
                yield [pad(batch[part :: recipe.parts]) for part in range(recipe.parts)]


def _optimizers(recipe: Recipe, model: Llama) -> tuple[torch.optim.Optimizer, ...]:
    """Return Muon for the matrices of each layer, and AdamW for the embedding and the norms."""
    layers = [[p for p in layer.parameters() if p.ndim == 2] for layer in model.model.layers]
    norms = [p for p in model.parameters() if p.ndim != 2]
    embedding = {"params": [*model.model.embed_tokens.parameters()], "weight_decay": recipe.decay}
    rest = [embedding, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, lr=recipe.peak, betas=(0.9, 0.95))
    return *(Muon(matrices, recipe.peak, recipe.decay) for matrices in layers), adamw


def _rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate: up in a straight line, then down to 0 in another (Bergsma et al. 2025)."""
    return recipe.peak * min((step + 1) / recipe.warmup, 1 - step / recipe.steps)


def _resume(
    recipe: Recipe, model: Llama, optimizers: Sequence[torch.optim.Optimizer], state: Path | None
) -> tuple[int, list[float]]:
    """Load a checkpoint of the same recipe; return its step and the losses so far."""
    if state is None or not state.exists():
        return 0, []
    try:
        saved = torch.load(state, weights_only=True)
    except OSError:
        raise
    except Exception:  # whichever of torch's and pickle's
        raise UsageError(f"{state} is damaged: remove it to begin anew") from None
    if saved["recipe"] != asdict(recipe):
        raise UsageError(f"{state} belongs to another recipe: remove it, or use its options")
    model.load_state_dict(saved["model"])
    for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(content)
    return int(saved["step"]), list(saved["losses"])


def _checkpoint(
    recipe: Recipe,
    model: Llama,
    optimizers: Sequence[torch.optim.Optimizer],
    step: int,
    losses: list[float],
    state: Path | None,
) -> None:
    """Write the state, if there shall be one; a kill leaves the old one or the new one."""
    if state is None:
        return
    content: dict[str, Any] = {"recipe": asdict(recipe), "model": model.state_dict(), "step": step, "losses": losses}
    content["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    with files.replacing(state) as part:
        torch.save(content, part)
