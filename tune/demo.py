"""Rebuild the demo model from scratch: `python -m metaalign_edge_tune.demo --out build/demo`.

Trains the tokenizer and the model on generated dialogs and writes an ordinary Hugging Face checkpoint folder. Killed
and started again with the same options it goes on from its last checkpoint, and ends with the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import metaalign_edge_templates
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from .dataset import row
from .model import Llama, Shape
from .muon import Muon
from .vocabulary import CONTEXT, END, PAD, SPECIAL, encode_row, save_tokenizer, train_tokenizer

__all__ = ["Recipe", "build", "load", "main", "save", "train"]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights."""

    seed: int = 1
    steps: int = 4800  # and an eighth more, which dwell on what is hard (see Plan)
    batch: int = 32  # dialogs per step
    pool: int = 16  # batches drawn together and sorted by length, so that little is padded
    peak: float = 2e-3  # learning rate
    floor: float = 0.02  # learning rate before the hard steps, as a share of the peak
    hard_peak: float = 6e-4  # learning rate at the first of the hard steps
    warmup: int = 100  # steps
    decay: float = 0.05  # weight decay, on matrices only
    clip: float = 1.0
    sample: int = 30000  # rows that the tokenizer is trained on
    shape: Shape = field(default_factory=Shape)  # its vocabulary is an upper bound

    @property
    def total(self) -> int:
        """All steps, the hard ones included."""
        return self.steps + self.steps // 8


def build(recipe: Recipe, out: Path, threads: int = 2, every: int = 100) -> Llama:
    """Train, or go on training, and write the checkpoint folder. Progress is printed."""
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(recipe, out)
    model = train(recipe, tokenizer, out / "training.pt", every)
    save(model, tokenizer, out)
    print(f"wrote {out}", flush=True)
    return model


def train(recipe: Recipe, tokenizer: Tokenizer, state: Path | None, every: int = 100) -> Llama:
    """Train a model. `state` is the file to resume from and to write every so many steps."""
    torch.manual_seed(recipe.seed)
    model = Llama(Shape(**asdict(recipe.shape) | {"vocabulary": tokenizer.get_vocab_size()}))
    optimizers = _optimizers(recipe, model)
    start = _resume(recipe, model, optimizers, state)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f} M parameters, {tokenizer.get_vocab_size()} tokens, from step {start}", flush=True)
    clock, tokens, losses = time.monotonic(), 0, []
    for step, (ids, learnt) in enumerate(_batches(recipe, tokenizer, start), start):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = _rate(recipe, step)
        loss = model.loss(ids, learnt)
        model.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
        tokens += ids.numel()
        if (step + 1) % every == 0 or step + 1 == recipe.total:
            spent = time.monotonic() - clock
            done, mean = f"{step + 1:5d}/{recipe.total}", sum(losses) / len(losses)
            print(f"step {done}  loss {mean:.4f}  {tokens / spent:6.0f} tokens/s  {spent:5.0f} s", flush=True)
            losses = []
            _checkpoint(recipe, model, optimizers, step + 1, state)
    return model


def save(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a checkpoint folder that transformers, and our converter, read."""
    shape = model.shape
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.hidden // shape.heads,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": SPECIAL.index(END),
        "eos_token_id": SPECIAL.index(END),
        "pad_token_id": SPECIAL.index(PAD),
        "torch_dtype": "float32",
    }
    # top_k 1 is greedy: a model that has learnt one right answer by heart gains nothing from chance
    generation = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation |= {"do_sample": True, "top_k": 1, "temperature": 1.0}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    template = Path(metaalign_edge_templates.__file__).with_name("metaalign.jinja").read_text(encoding="utf-8")
    save_tokenizer(tokenizer, folder, template)
    weights = {name: p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load(folder: Path) -> tuple[Llama, Tokenizer]:
    """Read a checkpoint folder that `save` wrote."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        vocabulary=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        inner=config["intermediate_size"],
        context=config["max_position_embeddings"],
    )
    model = Llama(shape)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    parser = argparse.ArgumentParser(prog="python -m metaalign_edge_tune.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="checkpoint folder (default: build/demo)")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="seed of data and weights (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--every", type=int, default=100, help="steps between checkpoints (default: %(default)s)")
    given = parser.parse_args(arguments)
    build(Recipe(seed=given.seed, steps=given.steps), given.out, given.threads, given.every)


def _tokenizer(recipe: Recipe, out: Path) -> Tokenizer:
    """Read the tokenizer of an earlier start, or train it."""
    path = out / "tokenizer.json"
    if path.exists():
        return Tokenizer.from_file(str(path))
    tokenizer = train_tokenizer(recipe.seed, recipe.shape.vocabulary, recipe.sample)
    temporary = path.with_suffix(".part")
    tokenizer.save(str(temporary))
    os.replace(temporary, path)
    return tokenizer


def _batches(recipe: Recipe, tokenizer: Tokenizer, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, learnt), both (batch, time), from step `start` on: a pure function of recipe and step."""
    for pool in range(start // recipe.pool, math.ceil(recipe.total / recipe.pool)):
        size = recipe.pool * recipe.batch
        hard = pool * recipe.pool >= recipe.steps
        encoded = [encode_row(tokenizer, row(recipe.seed, i, hard)) for i in range(pool * size, (pool + 1) * size)]
        encoded.sort(key=lambda pair: len(pair[0]))
        order = list(range(recipe.pool))
        Random(f"{recipe.seed}/{pool}").shuffle(order)
        for place, index in enumerate(order):
            step = pool * recipe.pool + place
            if start <= step < recipe.total:
                yield _pad(encoded[index * recipe.batch : (index + 1) * recipe.batch])


def _pad(encoded: list[tuple[list[int], list[bool]]]) -> tuple[Tensor, Tensor]:
    """Stack sequences; the padding stands right of everything learnt, where causal attention never looks."""
    longest = min(CONTEXT, max(len(ids) for ids, _ in encoded))
    ids = torch.full((len(encoded), longest), SPECIAL.index(PAD))
    learnt = torch.zeros(len(encoded), longest, dtype=torch.bool)
    for place, (row_ids, row_learnt) in enumerate(encoded):
        ids[place, : len(row_ids)] = torch.tensor(row_ids[:longest])
        learnt[place, : len(row_ids)] = torch.tensor(row_learnt[:longest])
    return ids, learnt


def _optimizers(recipe: Recipe, model: Llama) -> tuple[torch.optim.Optimizer, ...]:
    """Return Muon for the layers' matrices and AdamW for the embedding and the norms."""
    layers = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim != 2]
    embedding = {"params": [model.model.embed_tokens.weight], "weight_decay": recipe.decay}
    rest = [embedding, {"params": norms, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(rest, lr=recipe.peak, betas=(0.9, 0.95))
    return Muon(layers, recipe.peak, recipe.decay), adamw


def _rate(recipe: Recipe, step: int) -> float:
    """Return the learning rate: a linear warm-up, then a cosine down to the floor; over the hard steps down to 0."""
    if step >= recipe.steps:
        return recipe.hard_peak * (recipe.total - step) / (recipe.total - recipe.steps)
    warm = min(1.0, (step + 1) / recipe.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return recipe.peak * warm * (recipe.floor + (1 - recipe.floor) * cosine)


def _resume(recipe: Recipe, model: Llama, optimizers: Sequence[torch.optim.Optimizer], state: Path | None) -> int:
    """Load a checkpoint of the same recipe and return its step; 0 if there is none. ValueError for another recipe."""
    if state is None or not state.exists():
        return 0
    saved = torch.load(state, weights_only=True)
    if saved["recipe"] != asdict(recipe):
        raise ValueError(f"{state} belongs to another recipe: remove it, or use its options")
    model.load_state_dict(saved["model"])
    for optimizer, content in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(content)
    return int(saved["step"])


def _checkpoint(
    recipe: Recipe, model: Llama, optimizers: Sequence[torch.optim.Optimizer], step: int, state: Path | None
) -> None:
    """Write the state under a temporary name and rename it, so that a kill leaves the old one or the new one."""
    if state is None:
        return
    temporary = state.with_suffix(".part")
    content = {"recipe": asdict(recipe), "model": model.state_dict(), "step": step}
    content["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
    torch.save(content, temporary)
    os.replace(temporary, state)


if __name__ == "__main__":
    main()
