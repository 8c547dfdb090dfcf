"""What an architecture is: one small piece of data. The pieces fill the registry themselves.

A piece says which Hugging Face classes it covers, its name in GGUF, its hyper-parameters in the order in which they
are written, its tensors with their shapes, and what it must refuse. Code stands only where a table cannot say it.
The tables follow llama.cpp's converter (MIT), so that the files come out byte for byte the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from .config import Config
from .errors import ConvertError, some
from .shards import Array
from .vocabulary import PLAIN, VocabularyRules

Pair = tuple[str, "int | float | str"]  # a GGUF key below the architecture's name, and its value


@dataclass(frozen=True)
class Key:
    """A whole number (``u32``) or a number (``f32``) in GGUF, and the names it goes by in config.json."""

    name: str
    kind: str
    sources: tuple[str, ...]

    def pairs(self, config: Config) -> Iterable[Pair]:
        """Return the one pair that this key makes."""
        integer = self.kind == "u32"
        return [(self.name, config.integer(*self.sources) if integer else float(config.number(*self.sources)))]


@dataclass(frozen=True)
class Computed:
    """Hyper-parameters that take code: any number of pairs, none too."""

    pairs: Callable[[Config], Iterable[Pair]]


@dataclass(frozen=True)
class Transform:
    """A change to a tensor's rows, ``unit`` rows at a time, so that no tensor has to be in memory whole."""

    unit: int
    apply: Callable[[Array], Array]


@dataclass(frozen=True)
class Rule:
    """One Hugging Face tensor: its name (``{}`` is the layer), the names of its sizes, and when it exists."""

    name: str
    shape: tuple[str, ...]
    when: Callable[[Config], bool] = lambda config: True
    transform: Callable[[Config, int], Transform] | None = None  # takes the number of rows


@dataclass(frozen=True)
class Architecture:
    """One architecture, as data."""

    name: str  # in GGUF, and the prefix of its keys
    classes: Mapping[str, Mapping[str, Any]]  # Hugging Face class -> what it assumes where config.json is silent
    keys: tuple[Key | Computed, ...]  # in the order of writing; FILE_TYPE marks where general.file_type goes
    tensors: tuple[Rule, ...]
    sizes: Callable[[Config], Mapping[str, int]]  # what the names in the shapes mean
    guards: tuple[Callable[[Config], None], ...]  # each refuses what GGUF cannot express
    extra: Callable[[Config], Iterable[tuple[str, Array]]] = lambda config: ()  # tensors made from the configuration
    vocabulary: VocabularyRules = PLAIN  # what its vocabularies do otherwise than most

    def expected(self, config: Config) -> dict[str, tuple[Rule, tuple[int, ...]]]:
        """Say which tensors the checkpoint must hold: name -> its rule and shape."""
        sizes = self.sizes(config)
        found: dict[str, tuple[Rule, tuple[int, ...]]] = {}
        for rule in self.tensors:
            if not rule.when(config):
                continue
            shape = tuple(sizes[name] for name in rule.shape)
            layers = range(sizes["layers"]) if "{}" in rule.name else range(1)
            found.update((rule.name.format(layer), (rule, shape)) for layer in layers)
        return found

    def gguf_names(self, layers: int) -> gguf.TensorNameMap:
        """Return the library's table from Hugging Face names to GGUF names."""
        number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == self.name)
        return gguf.get_tensor_name_map(number, layers)


FILE_TYPE = Computed(lambda config: ())

ARCHITECTURES: dict[str, Architecture] = {}  # by Hugging Face class


def register(piece: Architecture) -> Architecture:
    """Put a piece into the registry under each of its classes."""
    for name in piece.classes:
        if name in ARCHITECTURES:
            raise ValueError(f"two pieces claim {name}")
        ARCHITECTURES[name] = piece
    return piece


def find(values: Mapping[str, Any]) -> tuple[Architecture, Config]:
    """Find the piece for a config.json and lay the file over its class's defaults. Raises ConvertError."""
    classes = values.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise ConvertError("config.json: no architectures in it, so nobody can say what model this is")
    if classes[0] not in ARCHITECTURES:
        raise ConvertError(
            f"config.json: {classes[0]} is not supported (supported: {some(sorted(ARCHITECTURES), 20)}); "
            "llama.cpp's own convert_hf_to_gguf.py may know it"
        )
    piece = ARCHITECTURES[classes[0]]
    config = Config(values, piece.classes[classes[0]])
    for guard in piece.guards:
        guard(config)
    return piece, config


# -- what many architectures refuse -----------------------------------------------------------------------------------


def refuse_quantized(config: Config) -> None:
    """Refuse weights that are quantised already: GPTQ, AWQ, bitsandbytes, FP8."""
    found = config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method", "quantised") if isinstance(found, dict) else found
        raise ConvertError(
            f"config.json: the weights are quantised already ({method}); convert the original checkpoint, "
            "in float16, bfloat16 or float32, that they were made from"
        )


def refuse_experts(config: Config) -> None:
    """Refuse mixtures of experts."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        count = config.get(name)
        if isinstance(count, int) and count > 1:
            raise ConvertError(f"config.json: {name} is {count}; mixtures of experts are not supported yet")


def refuse_activation(*allowed: str) -> Callable[[Config], None]:
    """Refuse an activation other than the one that llama.cpp computes for the architecture."""

    def guard(config: Config) -> None:
        found = config.get("hidden_act")
        if found not in allowed:
            raise ConvertError(
                f"config.json: hidden_act is {found!r}, but llama.cpp computes {allowed[0]} for this architecture"
            )

    return guard


def refuse_window(config: Config) -> None:
    """Refuse a sliding window that would be noticed: llama.cpp attends to everything here."""
    window, context = config.get("sliding_window"), config.integer("max_position_embeddings")
    if window is None or config.get("use_sliding_window") is False:
        return
    if type(window) is not int or window < 1:
        raise ConvertError(f"config.json: sliding_window is {window!r}, not a whole number")
    if window < context:
        raise ConvertError(
            f"config.json: sliding_window {window} in a context of {context}; llama.cpp ignores it here, so answers "
            f"would change beyond {window} tokens: set max_position_embeddings to {window}, or sliding_window to null"
        )
