"""Everything that decides the embedded model: its size, and its two stages of training. Knows nothing of torch."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["DpoRecipe", "Recipe", "Shape"]


@dataclass(frozen=True)
class Shape:
    """The size of the model. Row lengths are multiples of 32, as q8_0's blocks need."""

    vocabulary: int = 6144
    hidden: int = 256
    layers: int = 4
    heads: int = 4  # of 64 numbers each: twice as many of 32 learn no more, and llama.cpp runs them at 0.6 of the speed
    kv_heads: int = 2
    inner: int = 704
    context: int = 1024  # tokens
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights after the first stage, SFT."""

    seed: int = 1
    steps: int = 4400
    easy: float = 0.35  # of the steps; the others dwell on what is hard (see Plan)
    batch: int = 48  # rows per step
    parts: int = 2  # of a batch, for a thread each
    pool: int = 20  # batches drawn together and sorted by length, so that little is padded
    peak: float = 3e-3  # learning rate, which falls to 0
    warmup: int = 100  # steps
    decay: float = 0.05  # weight decay, on matrices only
    clip: float = 1.0
    sample: int = 20000  # rows that the tokenizer is trained on
    shape: Shape = field(default_factory=Shape)  # its vocabulary is an upper bound


@dataclass(frozen=True)
class DpoRecipe:
    """Everything that decides the second stage, DPO."""

    seed: int = 1
    start: int = 10_000_000  # the first row: training has not seen these
    rows: int = 2500  # rows that the model answers
    samples: int = 4  # answers to each
    temperature: float = 1.0
    batch: int = 16  # pairs per step
    parts: int = 2  # of a batch, for a thread each
    rate: float = 3e-5  # learning rate, falling to 0
    beta: float = 0.1  # how far the model may move from where it started
    likelihood: float = 0.5  # weight of the winner's own likelihood
