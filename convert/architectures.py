"""Architectures as data: each is one small piece, and puts itself into a registry.

A piece lists the Hugging Face classes that it covers, its name in GGUF, its hyper-parameters in the order in which they
are written, its tensors with their shapes, and the models that it must refuse. Code stands only where a table does not
suffice. The tables follow llama.cpp's converter (MIT), so that the files come out byte for byte the same.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import gguf

from metaalign_edge_runtime.errors import LoadError, some

from .config import Config
from .shards import Array
from .vocabulary import PLAIN, VocabularyRules

Value = int | float | str | bool | list[bool]
Pair = tuple[str, Value]  # a GGUF key below the architecture's name, and its value


@dataclass(frozen=True)
class Key:
    """A hyper-parameter that GGUF stores as an integer (`u32`) or a float (`f32`)."""

    name: str  # of its key in GGUF, below the architecture's name
    kind: str  # u32 or f32
    sources: tuple[str, ...]  # its names in config.json; the first that is there counts

    def pairs(self, config: Config) -> Iterable[Pair]:
        """Return the key and its value, as the only pair."""
        integer = self.kind == "u32"
        return [(self.name, config.integer(*self.sources) if integer else float(config.number(*self.sources)))]


@dataclass(frozen=True)
class Computed:
    """Hyper-parameters that take code to compute: any number of pairs, or none."""

    pairs: Callable[[Config], Iterable[Pair]]


@dataclass(frozen=True)
class Transform:
    """A change to a tensor's rows, `unit` rows at a time, so that no tensor has to be in memory whole."""

    unit: int
    apply: Callable[[Array], Array]
    arithmetic: bool = False  # it computes with the numbers, so that it needs bfloat16 as float32, not as uint16


Make = Callable[[Config, int], Transform]  # makes a transform for a tensor with this number of rows
Guard = Callable[[Config], "str | None"]  # refuses what GGUF cannot express; returns a remark for the user, if any


@dataclass(frozen=True)
class Part:
    """One of several GGUF tensors that a Hugging Face tensor is split into."""

    gguf: str  # its name; `{}` stands for the number of the layer
    rows: str  # its number of rows, as a key of `Architecture.sizes`
    transform: Make  # makes the transform that picks its rows


@dataclass(frozen=True)
class Rule:
    """A tensor that a Hugging Face checkpoint must hold, in each layer if `{}` stands in its name."""

    name: str  # `{}` stands for the number of the layer
    shape: tuple[str, ...]  # as keys of `Architecture.sizes`
    when: Callable[[Config], bool] = lambda config: True  # whether a model has it
    transform: Make | None = None
    parts: tuple[Part, ...] = ()  # the GGUF tensors that it is split into, if it is


@dataclass(frozen=True)
class Architecture:
    """One architecture, as data."""

    name: str  # in GGUF, and the prefix of its keys
    classes: Mapping[str, Mapping[str, Any]]  # Hugging Face class -> its defaults for what config.json leaves out
    keys: tuple[Key | Computed, ...]  # in the order of writing; FILE_TYPE marks where general.file_type goes
    tensors: tuple[Rule, ...]
    sizes: Callable[[Config], Mapping[str, int]]  # the numbers that the shapes of the rules refer to
    guards: tuple[Guard, ...]
    extra: Callable[[Config], Iterable[tuple[str, Array]]] = lambda config: ()  # tensors computed from config.json
    first: Computed = Computed(lambda config: ())  # keys that llama.cpp's converter writes before all others
    vocabulary: VocabularyRules = PLAIN  # how its vocabularies differ from most

    def expected(self, config: Config) -> dict[str, tuple[Rule, tuple[int, ...]]]:
        """Return the tensors that the checkpoint must hold: name -> rule and shape."""
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


def find(values: Mapping[str, Any]) -> tuple[Architecture, Config, tuple[str, ...]]:
    """Find the piece for a config.json and lay the file over its class's defaults.

    Returns piece and configuration, and the guards' remarks for the user. Raises LoadError.
    """
    classes = values.get("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        raise LoadError("config.json: no architectures in it, so nobody can say what model this is")
    name = classes[0]
    if name not in ARCHITECTURES:
        raise LoadError(_unsupported(name, values))
    piece = ARCHITECTURES[name]
    text = values.get("text_config")  # the part for text in the config.json of a vision model
    config = Config({**values, **(text if isinstance(text, dict) else {})}, piece.classes[name])
    notes = [note for guard in (refuse_quantized, refuse_experts, *piece.guards) if (note := guard(config))]
    return piece, config, tuple(notes)


# Kinds of models that cannot be converted: a pattern for names of their classes, a key in their config.json, and why.
OTHER_KINDS = (
    (r"moe|mixtral|dbrx|grok|deepseekv[23]|gptoss|llama4", "num_experts", "it is a mixture of experts"),
    (r"mamba|jamba|hybrid|rwkv|lfm2|recurrent|falconh1|next|qwen3_5", "mamba_d_state", "it has layers with a state"),
    (r"conditionalgeneration|vision|vl|llava|audio|omni", "vision_config", "it reads more than text"),
    (r"bert|encoder|t5|bart|classification|embedding", "is_encoder_decoder", "it does not continue a text"),
)


def _unsupported(name: str, values: Mapping[str, Any]) -> str:
    """Return the message that a class is not supported, with the reason if it is known, or the most similar class."""
    whys = (why for pattern, key, why in OTHER_KINDS if re.search(pattern, name, re.I) or values.get(key))
    why = next(whys, "")
    near = difflib.get_close_matches(name, ARCHITECTURES, 1, 0.7)
    hint = f": {why}" if why else f"; did you mean {near[0]}?" if near else ""
    return (
        f"config.json: {name} is not supported{hint} (supported: {some(sorted(ARCHITECTURES), 20)}); "
        "llama.cpp's own convert_hf_to_gguf.py may know it"
    )


# -- guards that several architectures share --------------------------------------------------------------------------


def refuse_quantized(config: Config) -> None:
    """Refuse weights that are quantized already: GPTQ, AWQ, bitsandbytes, FP8."""
    found = config.get("quantization_config")
    if found is not None:
        method = found.get("quant_method", "quantized") if isinstance(found, dict) else found
        raise LoadError(
            f"config.json: the weights are quantized already ({method}); convert the original checkpoint, "
            "in float16, bfloat16 or float32, that they were made from"
        )


def refuse_experts(config: Config) -> None:
    """Refuse mixtures of experts."""
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        count = config.get(name)
        if isinstance(count, int) and count > 1:
            raise LoadError(f"config.json: {name} is {count}; mixtures of experts are not supported yet")


def refuse_activation(*allowed: str, key: str = "hidden_act") -> Guard:
    """Refuse an activation other than the one that llama.cpp computes for the architecture."""

    def guard(config: Config) -> None:
        found = config.get(key)
        if found not in allowed:
            raise LoadError(
                f"config.json: {key} is {found!r}, but llama.cpp computes {allowed[0]} for this architecture"
            )

    return guard


def refuse_window(config: Config) -> None:
    """Refuse a sliding window smaller than the context: llama.cpp attends to the whole context here."""
    window, context = config.get("sliding_window"), config.integer("max_position_embeddings")
    if window is None or config.get("use_sliding_window") is False:
        return
    if type(window) is not int or window < 1:
        raise LoadError(f"config.json: sliding_window is {window!r}, not a whole number")
    if window < context:
        raise LoadError(
            f"config.json: sliding_window {window} in a context of {context}; llama.cpp ignores it here, so answers "
            f"would change beyond {window} tokens: set max_position_embeddings to {window}, or sliding_window to null"
        )


SILU = refuse_activation("silu", "swish")


def refuse_set(*names: str) -> Guard:
    """Refuse a model with one of these switches on, if llama.cpp ignores them for the architecture."""

    def guard(config: Config) -> None:
        for name in names:
            if config.get(name):
                raise LoadError(
                    f"config.json: {name} is {config.get(name)}, which llama.cpp cannot compute for this architecture"
                )

    return guard


def refuse_other_head_size(config: Config) -> None:
    """Refuse heads whose sizes do not add up to the hidden size, which llama.cpp takes for granted."""
    heads, hidden = config.integer("num_attention_heads"), config.integer("hidden_size")
    if heads * config.head_dim != hidden:
        raise LoadError(
            f"config.json: {heads} heads of {config.head_dim} are not hidden_size {hidden}, which llama.cpp takes for "
            "granted in this architecture"
        )


def refuse_rope(*kinds: str, share: bool = False, layered: bool = False) -> Guard:
    """Refuse RoPE of any kind but `kinds`.

    share: a part of each head may be rotated. layered: layers may have different RoPE.
    """

    def guard(config: Config) -> str | None:
        rope = config.rope
        if rope.kind == "dynamic" and "dynamic" in kinds:
            return "RoPE of type 'dynamic' stretches beyond max_position_embeddings, which llama.cpp does not"
        if rope.kind not in kinds:
            raise LoadError(
                f"config.json: RoPE of type {rope.kind!r} has no place in this architecture (known: {', '.join(kinds)})"
            )
        if rope.share != 1 and not share:
            raise LoadError(f"config.json: partial_rotary_factor {rope.share!r}, but here whole heads are turned")
        if config.local_rope is not None and not layered:
            raise LoadError("config.json: RoPE that differs from layer to layer has no place in this architecture")
        return None

    return guard


PERIODS = ("sliding_window_pattern", "_sliding_window_pattern")


def sliding(config: Config, period: int) -> list[bool]:
    """Return for each layer whether it has a sliding window: all but every `period`-th have one."""
    return [number % period != 0 for number in range(1, config.integer("num_hidden_layers", high=1024) + 1)]


def refuse_layers(period: int) -> Guard:
    """Refuse any order of layers but the one that llama.cpp computes: every `period`-th with full attention."""

    def guard(config: Config) -> None:
        found = config.get("layer_types")
        wanted = ["sliding_attention" if slides else "full_attention" for slides in sliding(config, period)]
        every = next((config.get(key) for key in PERIODS if config.get(key) is not None), period)
        if (found is not None and found != wanted) or every != period:
            raise LoadError(
                f"config.json: layers of full and sliding attention in an order that llama.cpp does not compute here "
                f"(every layer number divisible by {period} is full, the others slide)"
            )

    return guard


def refuse_theta(theta: float) -> Guard:
    """Refuse a base frequency other than the one that llama.cpp has built in."""

    def guard(config: Config) -> None:
        if config.rope.theta != theta:
            raise LoadError(
                f"config.json: rope_theta is {config.rope.theta:g}, but llama.cpp takes {theta:g} for granted in this "
                "architecture"
            )

    return guard


def refuse_untied(config: Config) -> None:
    """Refuse an untied output head: llama.cpp has no place for it."""
    if not config.flag("tie_word_embeddings"):
        raise LoadError(
            "config.json: tie_word_embeddings is false, but llama.cpp takes the output head of this architecture from "
            "the embedding"
        )


def refuse_tied(config: Config) -> None:
    """Refuse an output head that is tied to the embedding: llama.cpp wants one of its own."""
    if config.flag("tie_word_embeddings"):
        raise LoadError(
            "config.json: tie_word_embeddings is true, but llama.cpp wants an output head of its own in this "
            "architecture: save the model with the head untied"
        )
